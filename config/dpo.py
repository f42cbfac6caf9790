"""DPO on the toy world, with RPO's term on the chosen answers, and SFT's chats beside the pairs.

Without that term the chosen answers became less likely too, and the tales worse. Without the chats
the model forgot problems, for the pairs have tales alone (docs/log.md).
"""

mode = "dpo"
out_dir = "out/toy/dpo"
init_from = "out/toy/sft"
rpo_alpha = 1.0
replay = 0.25
optimizer = "adamw"
learning_rate = 3e-4
beta = 0.1
batch_tokens = 8448  # 48 pairs of 2 x 64, and 12 rows of 192
micro_batch = 48
max_steps = 80
warmup_frac = 0.1
schedule = "cosine"
eval_interval = 8
save_interval = 20
eval_rows = 0
