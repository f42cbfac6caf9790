"""DPO of the 253M model on HH-RLHF, one or more H100s.

    python align.py config/h100_dpo.py --init_from=out/h100/sft

128 pairs a step, 1,250 steps = 160k pairs, one epoch. Expected: not yet run.
"""

mode = "dpo"
out_dir = "out/h100/dpo"
init_from = "out/h100/sft"
data = "hh-rlhf"
dtype = "bfloat16"
compile = True
optimizer = "adamw"
# SmolLM2-135M/360M: beta 0.5, LR 1e-6, 10 % warm-up (alignment-handbook recipes/smollm2/dpo)
learning_rate = 1e-6
beta = 0.5
schedule = "cosine"
warmup_frac = 0.1
seq_len = 1024  # longer pairs are dropped with a count
batch_tokens = 262144
micro_batch = 16
max_steps = 1250
eval_interval = 250
eval_rows = 2000
save_interval = 250
