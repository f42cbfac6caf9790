"""Characters of one small text, 0.80M parameters, for python -m bench --tasks=race.

The model of nanoGPT's CPU recipe (4 layers, 4 heads, 128 wide, context 64, batch 12) and our
optimizer; there it runs beside nanoGPT's 2,000 steps. Ablations in docs/log.md.
"""

seq_len = 64
n_layer = 4
n_head = 4
d_model = 128
# 0.80M parameters like nanoGPT's, whose vocabulary has 65 symbols where bytes take 384 rows
d_ff = 320
batch_tokens = 768
micro_batch = 12
max_steps = 270
momentum = 0.9
muon_lr = 0.03
learning_rate = 6e-3
beta1 = 0.8
warmup_frac = 0.0
eval_interval = 1000
eval_rows = 12  # the bench takes the loss over the whole validation split
save_interval = 1000
log_interval = 100
