"""DPO on the toy world's word problems: the SFT model's own right samples against its wrong ones.

    python align.py config/dpo_problems.py --init_from=out/toy/sft

The problems are those of SFT and 4,000 new ones. Greedy exact match over SFT, 2,000 test problems,
seeds 1337, 1, 2: +13.2, +5.4, +8.3 points. With --beta=1e-6, which switches the preference term
off: +13.3, +5.8, +8.6. So it is the likelihood of the right samples that helps (docs/log.md).
"""

mode = "dpo"
out_dir = "out/toy/dpo_problems"
init_from = "out/toy/sft"
on_policy = True
n_samples = 8
temperature = 1.0  # enough wrong samples to learn from
rpo_alpha = 20.0  # with 1 or 5 exact match falls below that of SFT (docs/log.md)
muon_lr = 0.003
learning_rate = 3e-4
momentum = 0.9
beta = 0.02  # at 0.1 the preference term costs 1 to 2 points
batch_tokens = 6144
micro_batch = 48
max_steps = 80  # one pass over some 4,000 pairs
warmup_frac = 0.1
schedule = "cosine"
eval_interval = 80
eval_rows = 64
save_interval = 80
