"""What a run costs: FLOPs, memory, disk, the time of a step, and the share of a GPU's peak."""

import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from configurator import UserError
from runtime.world import World

# words of a device's name -> bf16 dense FLOP/s and memory bytes/s of its data sheet; first match
CARDS = {"H100 PCIE": (756e12, 2.0e12), "H100 HBM2E": (756e12, 2.0e12)}
CARDS |= {"H100 NVL": (835e12, 3.9e12), "H100": (989e12, 3.35e12)}
CARDS |= {"H200 NVL": (835e12, 4.8e12), "H200": (989e12, 4.8e12), "B200": (2250e12, 8.0e12)}
CARDS |= {"A100 80GB": (312e12, 2.0e12), "A100": (312e12, 1.55e12)}
CARDS |= {"RTX 4090": (165e12, 1.01e12), "RTX 3090": (71e12, 0.94e12)}
OTHER_CARDS = {"MIG", "LAPTOP", "TI", "D"}  # a slice of a GPU, and chips that share a name
# What share of these kernels are taken to reach. Attention forward: FlashAttention-2 at 1,024
# tokens and heads of 64, causal, 229 TFLOP/s (arXiv 2407.08608, figure 5); the rest is assumed
SHARES = {"product": 0.66, "attention": 0.23, "attention backward": 0.20, "memory": 0.84}
LAUNCHES, LAUNCH_S, LOADED = 40, 5e-6, 50e6  # kernels a layer, seconds each, tokens/s; assumed
GROUPS, OWN_GROUP = "/sys/fs/cgroup", "/proc/self/cgroup"  # Linux's limits, cgroup v2


def device_rates() -> tuple[float, float] | None:
    """Return this machine's GPU as CARDS knows it, or None where there is none that is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    words = set(re.findall(r"\w+", name.upper()))
    known = [rates for key, rates in CARDS.items() if words >= set(key.split())]
    return known[0] if known and not words & OTHER_CARDS else None


def device_peak_flops() -> float | None:
    rates = device_rates()
    return rates and rates[0]


def flops_per_token(model: nn.Module) -> float:
    """Return forward + backward FLOPs of a token, as PaLM counts (arXiv 2204.02311, appendix B)."""
    cfg = model.cfg
    weights = sum(p.numel() for p in model.param_groups()["muon"])
    weights += cfg.padded_vocab * cfg.d_model
    if cfg.n_expert:
        idle = cfg.n_expert - cfg.n_expert_active
        weights -= cfg.n_layer * idle * 3 * cfg.d_expert * cfg.d_model
    span = min(cfg.seq_len, cfg.sliding_window or cfg.seq_len)
    # the second term is attention, with both halves of its triangle
    return 6.0 * weights + 12.0 * cfg.n_layer * cfg.n_head * cfg.d_head * span


@dataclass
class Part:
    """A part of a training step, all micro-steps together, and what it costs."""

    name: str
    moved: float = 0.0  # bytes read and written in the GPU's memory
    flops: float = 0.0
    kind: str = "product"  # as SHARES calls it
    cpu_s: float = 0.0  # seconds of the CPU, while the GPU has other work

    def seconds(self, rates: tuple[float, float]) -> dict[str, float]:
        """Return the time of the arithmetic and that of the memory; the longer one counts."""
        arithmetic = self.flops / (SHARES[self.kind] * rates[0])
        return {"arithmetic": arithmetic, "memory": self.moved / (SHARES["memory"] * rates[1])}


def expected_step(
    model: nn.Module, optimizer: str, at_once: int, micro_steps: int = 1, recompute: bool = False
) -> list[Part]:
    """Return the parts of a dense model's step in bf16, compiled, of micro_steps x at_once tokens.

    A chain of element-wise operations is taken for one kernel. docs/gpu.md explains the counts.
    """
    cfg, matrices, in_all = model.cfg, model.param_groups()["muon"], model.num_params()
    n, C, F, V = at_once * micro_steps, cfg.d_model, cfg.d_ff, cfg.padded_vocab
    q, k = cfg.n_head * cfg.d_head, cfg.n_kv_head * cfg.d_head  # widths of queries and of keys
    in_blocks, sides = sum(p.numel() for p in matrices), sum(sum(p.shape) for p in matrices)
    forward, numbers = 1 + recompute, 2 * cfg.n_layer * n  # numbers: bytes of one a token and layer
    causal = cfg.n_layer * n * q * cfg.seq_len  # FLOPs of one product, half of its square
    blocks = (sides * n + in_blocks * micro_steps, in_blocks * n)  # of a product and pass, halves
    parts = [Part("products of the blocks", *(2 * (2 + forward) * half for half in blocks))]
    parts.append(
        Part("product of the head", 6 * (n * (V + C) + V * C * micro_steps), 6 * V * C * n)
    )
    parts.append(Part("logits and cross-entropy", 12 * V * n))
    flash = 2 * numbers * (q + k) * forward, 2 * causal * forward
    parts.append(Part("attention, forward", *flash, "attention"))
    flash = 4 * numbers * (q + k), 5 * causal
    parts.append(Part("attention, backward", *flash, "attention backward"))
    parts.append(Part("norms and residual", numbers * C * (8 * forward + 12)))
    parts.append(Part("QK-norm and RoPE", numbers * ((q + k) * (2 * forward + 3) + 2 * k)))
    parts.append(Part("SwiGLU", numbers * F * (3 * forward + 5)))
    parts.append(Part("sinks", numbers * q * (2 * forward + 3) * cfg.sinks))
    parts.append(Part("weights to bf16, gradients added", 24 * in_all * micro_steps))
    parts.append(Part("gradient norm and clipping", 12 * in_all))
    if optimizer == "muon":
        short = [min(p.shape) for p in matrices]
        flops = sum(20 * p.numel() * m + 10 * m**3 for p, m in zip(matrices, short, strict=True))
        parts.append(Part("Muon, products", 0, flops))
        parts.append(Part("Muon, element-wise", 120 * in_blocks + 70 * sum(m * m for m in short)))
    parts.append(Part("AdamW", 28 * (in_all - in_blocks * (optimizer == "muon"))))
    parts.append(Part("batches from shards", cpu_s=n / LOADED))
    parts.append(Part("launches", cpu_s=LAUNCHES * LAUNCH_S * cfg.n_layer * micro_steps))
    return parts


def expected_seconds(parts: list[Part], rates: tuple[float, float]) -> float:
    return sum(max(part.seconds(rates).values()) for part in parts)


def expert_notes(cfg: Any) -> str:
    """Return what a run should know of its experts; nothing where there are none."""
    notes = ""
    if cfg.n_expert and cfg.balance_coef:
        notes = "; experts are balanced over a micro-step: micro_batch and ranks change the result"
    if cfg.n_expert and cfg.n_expert_active == 1:
        why = "an expert alone has the weight 1, so the router learns from its balance loss only"
        notes += f". NOTE n_expert_active=1: {why}"
    return notes


def activation_bytes(cfg: Any, n_tokens: int, width: int, recompute: bool) -> int:
    """Return the bytes that a forward pass over n_tokens keeps, at `width` bytes a number.

    Per token and layer, eagerly: 4 C (residual stream and norm, twice), 2 (H + K) D (queries and
    keys before and after their norm), (H + 2 K) D (what the attention kernel reads), 2 H D (its
    output) and 4 F (gate, up, silu, product). With recompute C alone, and one layer in full. The
    last norm adds C; logits come beside. Counted as in arXiv 2205.05198.
    """
    hidden = cfg.d_ff
    if cfg.n_expert:
        hidden = cfg.d_expert * (cfg.n_expert_active + cfg.shared_expert)
    layer = 4 * cfg.d_model + (5 * cfg.n_head + 4 * cfg.n_kv_head) * cfg.d_head + 4 * hidden
    layers = cfg.n_layer * cfg.d_model + layer if recompute else cfg.n_layer * layer
    return n_tokens * width * (cfg.d_model + layers)


def state_bytes(model: nn.Module, optimizers: list) -> int:
    """Return the bytes of a checkpoint: weights and optimizer state, in float32."""
    numbers = model.num_params()
    for optimizer in optimizers:
        moments = 2 if isinstance(optimizer, torch.optim.AdamW) else 1
        for group in optimizer.param_groups:
            numbers += moments * sum(p.numel() for p in group["params"])
    return 4 * numbers


def free_disk(folder: str, need: int, checkpoint: int) -> int:
    """Return a disk's free bytes; raise UserError where `need` more than a run has do not fit."""
    free = shutil.disk_usage(folder).free
    own = sum(path.stat().st_size for path in Path(folder).glob("*.pt"))
    if need > free + own:
        what = f"{need // checkpoint} checkpoints of {checkpoint / 1e9:.2f} GB"
        needs = f"{folder} has {free / 1e9:.2f} GB free; {what} need {need / 1e9:.2f} GB"
        raise UserError(f"{needs}: free some space, or choose another --out_dir")
    return free


def memory_bytes(model: Any, optimizers: list, width: int, loop: Any, world: World) -> tuple:
    """Return a rank's bytes of weights, gradients and optimizer, of activations; tokens at once."""
    states = state_bytes(model, optimizers) + 4 * model.num_params()
    rows_of_rank = round(loop.batch_tokens / width / world.size)
    at_once = width * max(1, min(loop.micro_batch, rows_of_rank))
    activations = activation_bytes(model.cfg, at_once, world.dtype.itemsize, loop.recompute)
    if world.device.type == "cuda" and loop.compile is not False:  # elsewhere they are chunked
        logits_and_gradient = 2 * at_once * model.cfg.padded_vocab
        activations += world.dtype.itemsize * logits_and_gradient
    return states / (world.size if loop.fsdp else 1), activations, at_once


def memory_here(world: World) -> int:
    """Return the bytes of this rank's GPU, or of its share of the memory that it may use."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info()[1]
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError):  # Slurm and containers allow less
        group = Path(GROUPS + Path(OWN_GROUP).read_text().rpartition("::")[2].strip())
        limits = [folder / "memory.max" for folder in (group, *group.parents)]
        texts = [path.read_text() for path in limits if path.is_file()]
        sizes += [int(text) for text in texts if text.strip() != "max"]
    return min(sizes) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_memory(makers: tuple, cfg: Any, seq_len: int, loop: Any, world: World) -> None:
    """Raise UserError where a model is too large to be trained here, before it is built.

    makers: of a model and of its optimizers. Only half of the activations count: they are rough.
    """
    make_model, make_optimizers = makers
    with torch.device("meta"):  # which keeps no numbers
        model = make_model(cfg)
    optimizers = make_optimizers(model, loop)
    states, activations, at_once = memory_bytes(model, optimizers, seq_len, loop, world)
    there = memory_here(world)
    if states + activations / 2 > there:
        what = f"{model.num_params() / 1e6:,.0f}M parameters: weights, gradients and optimizer"
        parts = f"{states / 1e9:.1f} GB, {activations / 1e9:.1f} GB for {at_once:,} tokens at once"
        rows = at_once / seq_len * (there - states) / (activations / 2)
        advice = "choose a smaller model, or --fsdp on more GPUs"
        if rows >= 1:
            advice = f"--micro_batch={int(rows)} fits, or try --recompute"
        raise UserError(f"{what} need {parts}; a rank has {there / 1e9:.1f} GB here: {advice}")


def preflight(model: nn.Module, optimizers: list, width: int, loop: Any, world: World) -> str:
    """Say in one line what a run will need; raise UserError where its checkpoints do not fit."""
    *memory, at_once = memory_bytes(model, optimizers, width, loop, world)
    in_all = loop.max_steps * loop.batch_tokens
    checkpoint = state_bytes(model, optimizers)
    need = (loop.keep + 2) * checkpoint  # the newest, the best, and the one being written
    free = free_disk(loop.out_dir, need, checkpoint)
    flops, peak = flops_per_token(model), device_peak_flops()
    memory_note = (
        f"about {sum(memory) / 1e9:.2f} GB of memory per rank ({at_once:,} tokens at once)"
    )
    disk_note = f"{need / 1e9:.2f} GB of disk ({free / 1e9:,.0f} GB free)"
    flops_note = f"{flops:.2e} FLOPs a token, {flops * in_all:.2e} in all"
    if peak:
        hours = flops * in_all / (0.4 * peak * world.size) / 3600
        flops_note += f", {hours:.2f} h at 40 % of the peak"
    elif world.device.type == "cuda":
        flops_note += f"; the peak of {torch.cuda.get_device_name()} is not known: no MFU"
    return f"{memory_note}, {disk_note}; {flops_note}"
