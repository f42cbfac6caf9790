"""What a run costs: FLOPs, memory, disk, and the share of a GPU's peak that it reaches."""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from configurator import UserError
from runtime.world import World

# bf16 dense peak FLOP/s by words of the device's name, from the vendor's data sheets; first match
PEAK_FLOPS = {"H100 PCIE": 756e12, "H100 HBM2E": 756e12, "H100 NVL": 835e12, "H100": 989e12}
PEAK_FLOPS |= {"H200 NVL": 835e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}
GROUPS, OWN_GROUP = "/sys/fs/cgroup", "/proc/self/cgroup"  # Linux's limits, cgroup v2


def device_peak_flops() -> float | None:
    """Return the peak of this machine's GPU, or None where there is none that is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    words = set(re.findall(r"\w+", name.upper()))
    known = [flops for key, flops in PEAK_FLOPS.items() if words >= set(key.split())]
    return known[0] if known and "MIG" not in words else None  # MIG: a slice of a GPU


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
    last norm adds C; the head's logits are chunked. Counted as in arXiv 2205.05198.
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
        advice = "choose a smaller model or micro_batch, --recompute, or --fsdp on more GPUs"
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
