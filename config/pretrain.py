"""Pretraining on the toy world, the first stage of the default speedrun."""
out_dir = "out/toy/pretrain"
seq_len = 256
n_layer = 4
n_head = 4
d_model = 128
batch_tokens = 4096
micro_batch = 16
max_steps = 200
eval_interval = 50
save_interval = 100
eval_rows = 128
