"""A small model on real English text, minutes on 2 CPU cores: shows that the whole path works on real data, not that it is good.

    python data.py config/local_data.py --local_dir=FOLDER --tokenizer=FOLDER/gpt2.tiktoken
    python train.py config/local_pretrain.py

7.2M parameters, 6.4M of them in the tied embedding; 0.6M of 25M tokens. Measured runs: LOG.md.
"""
out_dir = "out/local/pretrain"
data = "english"
tokenizer = "gpt2"
seq_len = 256
n_layer = 4
n_head = 4
d_model = 128
batch_tokens = 4096
micro_batch = 16
max_steps = 150
learning_rate = 5e-3  # AdamW; nearly all parameters are in the embedding
warmup_frac = 0.05
eval_interval = 50
eval_rows = 64
save_interval = 50
log_interval = 5
