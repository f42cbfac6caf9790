"""RL on the toy world's word problems: the reward is the right final answer.

    python align.py config/rl_problems.py --init_from=out/toy/sft

The problems are those of SFT and 4,000 new ones; 94 steps sample as many answers as
config/dpo_problems.py does. Greedy exact match over SFT, 2,000 test problems, seeds 1337, 1, 2:
+8.0, +2.4, +24.2 points (docs/log.md), in 5 minutes of one core.
"""

mode = "rl"
out_dir = "out/toy/rl"
init_from = "out/toy/sft"
n_problems = 64
n_samples = 8
micro_batch = 128
optimizer = "adamw"
learning_rate = 3e-4
max_steps = 94
warmup_frac = 0.1
final_lr_frac = 0.1
eval_interval = 24
save_interval = 24
log_interval = 2
