"""RL of the 253M model on GSM8K, one or more H100s: the reward is the right final answer.

    torchrun --nproc_per_node=4 align.py config/h100_rl.py --init_from=out/h100/sft

64 problems a step, 16 answers to each. Expected: not yet run.
"""

mode = "rl"
out_dir = "out/h100/rl"
init_from = "out/h100/sft"
data = "gsm8k"
dtype = "bfloat16"
compile = True
n_problems = 64
n_samples = 16
calculator = True
max_new_tokens = 256
optimizer = "adamw"
learning_rate = 3e-6
warmup_frac = 0.1
max_steps = 400
micro_batch = 32
eval_interval = 50
save_interval = 50
