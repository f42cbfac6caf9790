"""The verifier on the toy world: 4 samples of each of 2,000 problems that SFT never saw.

It begins as the log-likelihood, and low rates keep what that knows; at temperature 1 more of the
samples are wrong, which it learns from (docs/log.md).
"""

mode = "verifier"
out_dir = "out/toy/verifier"
init_from = "out/toy/dpo"
n_problems = 2000
n_samples = 4
temperature = 1.0
batch_tokens = 4096
micro_batch = 32
max_steps = 150
momentum = 0.9
muon_lr = 0.0003
learning_rate = 1e-4
eval_interval = 15
save_interval = 75
