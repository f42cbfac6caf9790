"""Evaluation of the small local model.

    python eval.py config/local_eval.py

WikiText-2 (test), GSM8K, SST-2, DialogSum and held-out HH-RLHF pairs.
"""

out_dir = "out/local"
data = "english"
# the test split; about five minutes a model on 2 cores: five protocols over 290,000 tokens
text = "wikitext-2"
problems = "gsm8k-test"
pairs = "hh-rlhf,helpful,polite"
chats = "alpaca"
sst2 = "sst2"
shots = "sst2-train"
dialogues = "dialogsum"
published = "gsm8k-published"
calculator = True
n_problems = 50  # of 1,319: a model of this size solves none
n_samples = 2
max_new_tokens = 100
