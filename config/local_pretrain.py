"""A small model on real English text, minutes on 2 CPU cores.

    python data.py config/local_data.py --local_dir=FOLDER --tokenizer=FOLDER/gpt2.tiktoken
    python train.py config/local_pretrain.py

It shows that the whole path works on real data, not that it is good. 10M parameters, 8.0M of them
in the tied embedding; 1.6M of 25M tokens. Measured runs: docs/log.md.

With 4,096 symbols learnt from the text (config/local_data.py) a step of as many bytes takes 0.38
times the FLOPs:

    python train.py config/local_pretrain.py --tokenizer=data/english-4096.tiktoken \\
        --seq_len=320 --batch_tokens=5120

Bits per byte at equal FLOPs (3.6e13; 140 steps with GPT-2's symbols, 366 with these; one run each):
held-out rows of this text 1.80 (GPT-2's: 1.86), WikiText-2 valid, 20 articles, 2.232 (GPT-2's:
2.194). GPT-2's symbols stay; docs/log.md has the intervals.
"""

out_dir = "out/local/pretrain"
data = "english"
tokenizer = "gpt2"
seq_len = 256
n_layer = 6
n_head = 5
d_model = 160
batch_tokens = 4096
micro_batch = 16
max_steps = 400
learning_rate = 5e-3  # AdamW; nearly all parameters are in the embedding
warmup_frac = 0.05
eval_interval = 100
eval_rows = 64
save_interval = 100
log_interval = 10
