"""The verifier of the 253M model on GSM8K (Cobbe et al. 2021), one or more H100s.

    python align.py config/h100_verifier.py --init_from=out/h100/dpo

Samples 8 solutions for each of the 1,900 problems of train that SFT left out. Where none is right
it says so. Expected: not yet run.
"""

mode = "verifier"
out_dir = "out/h100/verifier"
init_from = "out/h100/dpo"
data = "gsm8k"
dtype = "bfloat16"
compile = True
n_samples = 8
temperature = 0.7  # Cobbe et al.
calculator = True  # Cobbe et al.
max_new_tokens = 256
optimizer = "adamw"
learning_rate = 1e-4
batch_tokens = 65536
micro_batch = 32
max_steps = 100
eval_interval = 50
save_interval = 50
