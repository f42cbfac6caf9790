"""DPO on the toy world's word problems: the SFT model's own right samples against its wrong ones, on problems that SFT never saw.

    python align.py config/dpo_problems.py --init_from=out/toy/sft
"""
mode = "dpo"
out_dir = "out/toy/dpo_problems"
init_from = "out/toy/sft"
on_policy = True
n_samples = 8
temperature = 1.0  # more wrong samples to learn from
rpo_alpha = 1.0
optimizer = "adamw"
learning_rate = 1e-3
beta = 0.1
batch_tokens = 6144
micro_batch = 48
max_steps = 100
warmup_frac = 0.1
schedule = "cosine"
eval_interval = 50
save_interval = 50
eval_rows = 0
