"""A verifier from SmolLM2-135M's own solutions of held-out GSM8K problems, an hour of one CPU core.

    python align.py config/smollm2_verifier.py

400 problems that SFT never saw, four samples each, with the calculator: 3.6 % right. AUC on samples
of 300 test problems 0.823 [0.781, 0.862], that of the likelihood 0.816; a weighted vote of eight is
right in 8.3 %, as one greedy answer (docs/log.md). Evaluate with --calculator.
"""

mode = "verifier"
out_dir = "out/smollm2/verifier"
init_from = "out/smollm2/sft"
data = "gsm8k"
dtype = "bfloat16"
seq_len = 512
n_problems = 400
n_samples = 4
max_new_tokens = 256
calculator = True
optimizer = "adamw"
learning_rate = 1e-4
schedule = "cosine"
warmup_frac = 0.1
batch_tokens = 8192
micro_batch = 4
max_steps = 40
eval_interval = 10
eval_rows = 32
save_interval = 10
log_interval = 1
