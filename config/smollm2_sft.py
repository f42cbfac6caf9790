"""SFT of SmolLM2-135M-Instruct on GSM8K, an hour and a half on one CPU core.

    python align.py config/smollm2_sft.py                              # all 5,187 problems, once
    python align.py config/smollm2_sft.py --max_steps=40 --out_dir=out/smollm2/sft_1500
    python align.py config/smollm2_sft.py --max_steps=40 --out_dir=out/smollm2/sft_replay \
        --replay=0.25 --replay_data=english-smollm2 --batch_tokens=10923  # a third of it text

Greedy exact match with the calculator, 300 test problems: 1.0 -> 8.3 % [5.7, 12.0]; after 40 steps,
without it, 0.7 -> 2.0 %. WikiText-2 is not forgotten: 1.006 [0.992, 1.020] times the perplexity of
the start (docs/log.md). The start is a 4-bit copy of the published model (smollm2_data.py).
"""

mode = "sft"
out_dir = "out/smollm2/sft"
init_from = "out/smollm2/base"
data = "gsm8k"
dtype = "bfloat16"
seq_len = 512
optimizer = "adamw"
learning_rate = 2e-4
schedule = "cosine"
warmup_frac = 0.1
batch_tokens = 8192
micro_batch = 4
max_steps = 142
max_new_tokens = 256
n_answers = 16
eval_interval = 20
eval_rows = 16
save_interval = 20
keep = 2
log_interval = 1
