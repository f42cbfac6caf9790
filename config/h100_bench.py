"""Training speed on one GPU, by batch: tokens/s, share of the card's peak (MFU), peak memory.

    python -m bench config/h100_bench.py --nanogpt=PATH [--compile=False]
    python -m bench config/h100_bench.py --tasks=profile --systems="ours with Muon" --batches=32

With and without sinks, Muon, experts, recompute and compilation, and nanoGPT beside us. h100 has
nanoGPT's parameters layer by layer (203M). h100_recipe is the model of config/h100_pretrain.py
(253M), beside 16 layers of nanoGPT. On a known card the milliseconds and MFU that docs/gpu.md
expects stand beside ours; the second command gives them by groups of kernels. The systems run one
after the other, and each compiles its own step. Expected result: not yet run.
"""

tasks = ("train",)
shapes = ("h100", "h100_recipe")
systems = ("ours", "ours without sinks", "ours with Muon", "ours with recompute", "ours eager")
systems += ("ours MoE 8 top 2", "nanoGPT")
batches = (8, 16, 32)
rounds = 20
device = "cuda"
dtype = "bfloat16"
compile = True
