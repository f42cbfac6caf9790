"""Characters of one small text, 2.7M parameters, for python -m bench --tasks=race.

There it runs beside nanoGPT's 250 steps: 6 layers, 6 heads, 192 wide, context 256, batch 16.
Ablations in docs/log.md.
"""

seq_len = 256
n_layer = 6
n_head = 6
d_model = 192
batch_tokens = 2048
micro_batch = 8
max_steps = 50
momentum = 0.9
muon_lr = 0.02
learning_rate = 6e-3
beta1 = 0.8
warmup_frac = 0.0
eval_interval = 1000
eval_rows = 16
save_interval = 1000
log_interval = 30
