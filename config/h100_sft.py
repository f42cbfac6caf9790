"""SFT of the 253M model on Alpaca's records and GSM8K's solutions, one or more H100s.

    python align.py config/h100_sft.py --init_from=out/h100/pretrain

About 52k + 5k chats, 6M tokens an epoch; 100 steps x 131,072 tokens = 2 epochs = 13M tokens,
minutes. Expected: not yet run.
"""

mode = "sft"
out_dir = "out/h100/sft"
init_from = "out/h100/pretrain"
data = "alpaca,gsm8k"
replay = 0.25  # from our sweep at 10M parameters (docs/log.md); at this size not yet run
dtype = "bfloat16"
compile = True
optimizer = "adamw"
# SmolLM2-135M/360M: LR 1e-3, cosine, 10 % warm-up, 2 epochs (alignment-handbook, smollm2/sft)
learning_rate = 1e-3
schedule = "cosine"
warmup_frac = 0.1
batch_tokens = 131072
micro_batch = 32
max_steps = 100
eval_interval = 50
save_interval = 50
