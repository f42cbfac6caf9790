"""Pretraining on the toy world, the first stage of the default speedrun.

0.9M parameters, 130 x 4,096 = 0.53M tokens.
"""

out_dir = "out/toy/pretrain"
seq_len = 192  # as long as the longest dialogue of three turns
n_layer = 4
n_head = 4
d_model = 128
batch_tokens = 4096
micro_batch = 32
max_steps = 130
momentum = 0.9  # 0.95 averages over more steps than so short a run can wait for (docs/log.md)
learning_rate = 5e-3
eval_interval = 13
save_interval = 65
eval_rows = 128
