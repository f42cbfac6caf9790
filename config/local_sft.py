"""SFT of the small local model, minutes on 2 CPU cores.

    python align.py config/local_sft.py --init_from=out/local/pretrain

On Alpaca, HH-RLHF's chosen dialogues and GSM8K's solutions.
"""

mode = "sft"
out_dir = "out/local/sft"
init_from = "out/local/pretrain"
data = "alpaca,hh-chosen,gsm8k"
replay = (
    0.25  # costs 0.06 nats of response loss and keeps 6 % of WikiText-2's perplexity (docs/log.md)
)
optimizer = "adamw"
learning_rate = 1e-3  # SmolLM2-135M's SFT value (alignment-handbook recipes/smollm2)
schedule = "cosine"
warmup_frac = 0.1
batch_tokens = 4096
micro_batch = 16
max_steps = 100
eval_interval = 50
eval_rows = 32
save_interval = 50
log_interval = 5
