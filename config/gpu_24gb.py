"""Pretraining of the 253M model of config/h100_pretrain.py on one card of 24 GB.

    python data.py --stage=all                  # where there is a network
    python train.py config/gpu_24gb.py

The same model, tokens and steps; 32 micro-steps of 8 x 1,024 tokens instead of 8 of 32.
Memory, by runtime/budget.py: weights, gradients and optimizer 3.2 GB, activations 5.9 GB, logits
1.6 GB: 10.7 GB. micro_batch = 16 would be 18.2 GB. Recomputation is not needed.
Tokens: 2,400 x 262,144 = 629M; 1.05e18 FLOPs. Time, by the arithmetic of docs/gpu.md: 3.6 h on an
RTX 4090 (165 TFLOP/s), 7.5 h on an RTX 3090 (71 TFLOP/s). Expected result: not yet run.
"""

out_dir = "out/gpu_24gb/pretrain"
data = "wikitext-103*0.7,tinystories*0.3"
tokenizer = "gpt2"
seq_len = 1024
n_layer = 12
n_head = 16
d_model = 1024
d_ff = 4096
dtype = "bfloat16"
compile = True
batch_tokens = 262144
micro_batch = 8
max_steps = 2400
weight_decay = 0.1  # Muon needs some on runs of this length (arXiv 2502.16982)
warmup_frac = 0.01
eval_interval = 200
eval_rows = 256
save_interval = 100  # every few minutes: such a machine has other users
