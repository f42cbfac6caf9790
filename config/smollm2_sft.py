"""SFT of SmolLM2-135M-Instruct on GSM8K, three quarters of an hour on one CPU core.

    python align.py config/smollm2_sft.py
    python align.py config/smollm2_sft.py --out_dir=out/smollm2/sft_replay --replay=0.25 \
        --replay_data=english-smollm2 --batch_tokens=10923    # the same chats, and a third of text

About 1,500 problems, once. The start is a 4-bit copy of the published model (smollm2_data.py).
"""

mode = "sft"
out_dir = "out/smollm2/sft"
init_from = "out/smollm2/base"
data = "gsm8k"
dtype = "bfloat16"
seq_len = 512
optimizer = "adamw"
learning_rate = 2e-4
schedule = "cosine"
warmup_frac = 0.1
batch_tokens = 8192
micro_batch = 4
max_steps = 40
max_new_tokens = 256
n_answers = 16
eval_interval = 10
eval_rows = 16
save_interval = 10
keep = 2
log_interval = 1
