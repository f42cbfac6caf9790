"""Training speed on one GPU, by batch: tokens/s, share of the card's peak (MFU), peak memory.

    python -m bench config/h100_bench.py --nanogpt=PATH [--compile=False]

With and without sinks, with Muon, as MoE, and nanoGPT beside us. h100 has nanoGPT's parameters
layer by layer (203M). h100_recipe is the model of config/h100_pretrain.py (253M), beside 16 layers
of nanoGPT. Expected result: not yet run.
"""

tasks = ("train",)
shapes = ("h100", "h100_recipe")
systems = ("ours", "ours without sinks", "ours with Muon", "ours MoE 8 top 2", "nanoGPT")
batches = (8, 16, 32)
device = "cuda"
dtype = "bfloat16"
compile = True
