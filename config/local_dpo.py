"""DPO of the small local model on HH-RLHF, helpfulness and politeness pairs; minutes on 2 cores.

python align.py config/local_dpo.py --init_from=out/local/sft
"""

mode = "dpo"
out_dir = "out/local/dpo"
init_from = "out/local/sft"
data = "hh-rlhf,helpful,polite"
optimizer = "adamw"
rpo_alpha = 1.0  # without it and at 1e-4 the held-out loss rose (docs/log.md)
learning_rate = (
    3e-4  # 300 x SmolLM2-135M's 1e-6: this model sees 60 small batches, not 2 epochs of 60k pairs
)
beta = 0.1
schedule = "cosine"
warmup_frac = 0.1
batch_tokens = 8192
micro_batch = 8
max_steps = 60
eval_interval = 20
eval_rows = 0
save_interval = 20
log_interval = 5
