"""Attention sinks and streaming: two models of 0.90M parameters on novels, byte by byte.

    python data.py --local_dir=FOLDER --tokenizer=byte \
        --sources=pretrain/novels:8=novels_1of3.txt.gz       # eight novels; any long text will do
    python train.py config/streaming.py
    python train.py config/streaming.py --sinks=False --out_dir=out/streaming/no_sinks
    python eval.py --out_dir=out/streaming --tasks=val_loss,streaming,attention --data=novels \
        --streaming=novels --sentences="SENTENCE;ANOTHER"
    python -m evals.report --out_dir=out/streaming  # report.md, streaming.png, attention_*.png

The models are alike but for the sinks. Each: 400 steps x 4,096 = 1.64M of 7.7M bytes, 1.0e13 FLOPs,
6 minutes of one thread on a shared 2-core machine; the evaluation takes 3 minutes a model. Trained
at 379fb9a, evaluated at 5f6822b, one seed (docs/log.md): validation loss 1.505 nats/byte with sinks
and 1.506 without. From 1 to 16 times the training context a rolling cache loses nothing to
recomputation in either (-0.000 nats), and dense attention loses 0.77 and 0.63. At this size sinks
are not needed.
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
