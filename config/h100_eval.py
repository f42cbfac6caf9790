"""Evaluation of the 253M model. About 10 minutes, not yet run.

    python eval.py config/h100_eval.py

Perplexity protocols on WikiText-2, GSM8K, SST-2, DialogSum, held-out HH-RLHF pairs.
"""

out_dir = "out/h100"
data = "wikitext-103"
text = "wikitext-2-valid,wikitext-2"
problems = "gsm8k-test"
pairs = "hh-rlhf"
chats = "alpaca"
sst2 = "sst2"
shots = "sst2-train"
dialogues = "dialogsum"
calculator = True
n_samples = 8
temperature = 0.7
max_new_tokens = 256
