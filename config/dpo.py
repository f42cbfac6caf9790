"""DPO on the toy world."""
mode = "dpo"
out_dir = "out/toy/dpo"
init_from = "out/toy/sft"
optimizer = "adamw"
learning_rate = 3e-4
beta = 0.1
batch_tokens = 6144
micro_batch = 32
max_steps = 50
warmup_frac = 0.1
schedule = "cosine"
eval_interval = 20
save_interval = 20
eval_rows = 0
