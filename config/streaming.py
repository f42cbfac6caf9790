"""Attention sinks and streaming: two models of 0.90M parameters on novels, byte by byte, alike but for the sinks.

    python data.py --local_dir=FOLDER --sources=pretrain/novels:8=novels_1of3.txt.gz --tokenizer=byte    # eight novels; any long text will do
    python train.py config/streaming.py
    python train.py config/streaming.py --sinks=False --out_dir=out/streaming/no_sinks
    python eval.py --out_dir=out/streaming --tasks=val_loss,streaming,attention --data=novels --streaming=novels --sentences="SENTENCE;ANOTHER"
    python report.py --out_dir=out/streaming                                                             # report.md, streaming.png, attention_*.png

RESULTS
"""
out_dir = "out/streaming/sinks"
data = "novels"
tokenizer = "byte"
seq_len = 128
n_layer = 4
n_head = 4
d_model = 128
batch_tokens = 4096
micro_batch = 32
max_steps = 400
learning_rate = 5e-3
eval_interval = 100
eval_rows = 128
save_interval = 100
