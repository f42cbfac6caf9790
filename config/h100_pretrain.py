"""Pretraining of the 253M model on one node of H100s.

    python data.py --stage=all                                      # on the login node
    torchrun --nproc_per_node=4 train.py config/h100_pretrain.py    # 1, 2, 8: the same batches
    sbatch slurm/pretrain.sh config/h100_pretrain.py

Parameters: embedding 50,304 x 1,024 = 51.5M (tied), and
12 x (4 x 1,024^2 + 3 x 1,024 x 4,096) = 201.3M: 252.8M.
FLOPs per token: 6 x 252.8M + 12 x 12 x 1,024 x 1,024 = 1.67 G.
Tokens: 2,400 x 262,144 = 629M; 1.05e18 FLOPs in all.
Time on one H100, by the arithmetic of docs/gpu.md: 39 min, at 46 % of 989 TFLOP/s. Memory, by that
of runtime/budget.py: 33 GB. Expected result: not yet run.
"""

out_dir = "out/h100/pretrain"
data = "wikitext-103*0.7,tinystories*0.3"  # the original's text, and a capped second source
tokenizer = "gpt2"
seq_len = 1024
n_layer = 12
n_head = 16
d_model = 1024
d_ff = 4096
tied = True
dtype = "bfloat16"
compile = True
batch_tokens = 262144
micro_batch = 32  # 32 x 1,024 tokens: 23 GB of activations and 7 GB of logits
max_steps = 2400
weight_decay = 0.1  # Muon needs some on runs of this length (arXiv 2502.16982)
warmup_frac = 0.01
eval_interval = 200
eval_rows = 256
save_interval = 400
