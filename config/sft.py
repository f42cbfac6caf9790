"""SFT on the toy world."""
mode = "sft"
out_dir = "out/toy/sft"
init_from = "out/toy/pretrain"
batch_tokens = 4096
micro_batch = 32
max_steps = 120
muon_lr = 0.01
learning_rate = 2e-3
eval_interval = 60
save_interval = 60
