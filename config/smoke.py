"""Smoke test of the training loop: 0.2M parameters, 30 steps on the toy world, seconds.

python train.py config/smoke.py
torchrun --nproc_per_node=2 train.py config/smoke.py --out_dir=out/smoke2
"""

out_dir = "out/smoke"
seq_len = 128
n_layer = 2
n_head = 4
n_kv_head = 2  # GQA, so that it is exercised
d_model = 64
batch_tokens = 2048
micro_batch = 8
max_steps = 30
eval_interval = 10
eval_rows = 32
save_interval = 10
