"""DPO of SmolLM2-135M-Instruct on HH-RLHF, half an hour on one CPU core.

    python align.py config/smollm2_dpo.py

The pairs of at most 256 tokens among 1,000, once (692; 18 minutes of a free core). On 1,304 others
its reward is right in 60.5 % [57.8, 63.1], the start's log-prob in 55.8 %, the shorter answer in
55.7 % (docs/log.md). The start is a 4-bit copy of the published model (smollm2_data.py).
"""

mode = "dpo"
out_dir = "out/smollm2/dpo"
init_from = "out/smollm2/base"
data = "hh-train"
dtype = "bfloat16"
seq_len = 256
optimizer = "adamw"
learning_rate = 2e-5
beta = 0.1
schedule = "cosine"
warmup_frac = 0.1
batch_tokens = 8192
micro_batch = 8
max_steps = 45
max_new_tokens = 128
n_answers = 32
eval_interval = 5
eval_rows = 0
save_interval = 15
log_interval = 1
