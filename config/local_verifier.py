"""The verifier of the small local model on GSM8K, minutes on 2 CPU cores.

    python align.py config/local_verifier.py --init_from=out/local/dpo

A model of this size solves none of it: expect the note that there is nothing to rerank. What this
recipe shows is that the stage runs on the real problems.
"""

mode = "verifier"
out_dir = "out/local/verifier"
init_from = "out/local/dpo"
data = "gsm8k"
n_problems = 60
n_samples = 2
max_new_tokens = 100
calculator = True  # as Cobbe et al. sampled
optimizer = "adamw"
learning_rate = 3e-4
batch_tokens = 4096
micro_batch = 16
max_steps = 40
eval_interval = 20
eval_rows = 16
save_interval = 20
log_interval = 5
