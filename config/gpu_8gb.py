"""Pretraining of a 124M model on a laptop's card of 8 GB that computes in bfloat16.

    python data.py --stage=all                  # where there is a network
    python train.py config/gpu_8gb.py

Parameters: embedding 50,304 x 768 = 38.6M (tied), and
12 x (4 x 768^2 + 3 x 768 x 2,048) = 84.9M: 123.6M.
Memory, by runtime/budget.py: weights, gradients and optimizer 1.6 GB, activations 1.8 GB, logits
0.8 GB: 4.3 GB; a screen on the same card needs some too. --recompute saves 1.6 GB.
Tokens: 2,000 x 131,072 = 262M; 2.24e17 FLOPs: 6.2 h at 10 TFLOP/s. Expected result: not yet run.
"""

out_dir = "out/gpu_8gb/pretrain"
data = "wikitext-103*0.7,tinystories*0.3"
tokenizer = "gpt2"
seq_len = 1024
n_layer = 12
n_head = 12
d_model = 768
d_ff = 2048
dtype = "bfloat16"
compile = True
batch_tokens = 131072
micro_batch = 4
max_steps = 2000
weight_decay = 0.1
warmup_frac = 0.01
eval_interval = 200
eval_rows = 64
save_interval = 100  # every few minutes: a laptop is closed
