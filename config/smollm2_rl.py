"""RL of SmolLM2-135M on GSM8K from its SFT: the reward is the right final answer.

    python align.py config/smollm2_rl.py

16 problems a step, 8 answers to each, with the calculator. The start is a 4-bit copy of the
published model (smollm2_data.py). One run, an hour of one core: 8.3 -> 10.0 % of 300 test problems,
+1.7 [-1.3, 4.7] paired: nothing shown (docs/log.md, 2026-11-26).
"""

mode = "rl"
out_dir = "out/smollm2/rl"
init_from = "out/smollm2/sft"
data = "gsm8k"
dtype = "bfloat16"
n_problems = 16
n_samples = 8
temperature = 0.8  # at 1.0 fewer are right, and problems without a right answer teach nothing
calculator = True
max_new_tokens = 192
optimizer = "adamw"
learning_rate = 1e-5
warmup_frac = 0.1
max_steps = 40
micro_batch = 8
n_answers = 0
eval_interval = 40
eval_rows = 64
save_interval = 2
log_interval = 1
