"""Pretraining on the toy world, the first stage of the default speedrun."""
out_dir = "out/toy/pretrain"
seq_len = 128
n_layer = 4
n_head = 4
d_model = 128
batch_tokens = 4096
micro_batch = 32
max_steps = 120
eval_interval = 60
save_interval = 60
eval_rows = 128
