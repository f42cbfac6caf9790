"""The verifier on the toy world."""
mode = "verifier"
out_dir = "out/toy/verifier"
init_from = "out/toy/dpo"
n_problems = 1000
n_samples = 4
batch_tokens = 4096
micro_batch = 16
max_steps = 180
muon_lr = 0.01
learning_rate = 2e-3
eval_interval = 50
save_interval = 50
eval_rows = 0
