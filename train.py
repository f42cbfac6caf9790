"""Pretraining, and the one training loop of the project; align.py brings its own tasks to it.

    python train.py config/smoke.py                                  # one process, CPU or GPU
    torchrun --nproc_per_node=4 train.py config/h100_pretrain.py     # the same batches on 4 GPUs
    python train.py --init_from=out/smoke --data=mine --out_dir=out/more  # its weights, trained on

The model must be named, by a config file, --n_layer or --init_from. Started again in its out_dir, a
run goes on from its newest good checkpoint, bitwise; a finished one is left alone. Schedule: WSD,
arXiv 2404.06395. Muon: fast/muon.py.
"""

import math
import os
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn as nn
from torch import Tensor

from configurator import UserError, load, read_file, read_flag, require
from corpus.folders import ensure_toy
from corpus.shards import Mixture, checksums
from corpus.tokenizer import Tokenizer, load_tokenizer
from fast.muon import Muon, full_tensor
from model import GPT, ModelConfig
from runtime.budget import check_memory, expert_notes, preflight
from runtime.checkpoint import model_from, open_start, sizes_of_start
from runtime.files import digest
from runtime.program import run
from runtime.run_folder import PREEMPTED, RunFolder, is_done
from runtime.world import World, distribute, sync_gradients


@dataclass
class LoopConfig:
    """The training loop."""

    out_dir: str = "out/pretrain"  # run folder; of align.py the default is beside its init_from
    data: str = "toy"  # data sets under data_dir, "name" or a mixture "name*0.7,other*0.3"
    data_dir: str = "data"  # where data.py put them
    seed: int = 1337  # initial weights and data order
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # compute dtype: auto, float32, bfloat16; the weights stay float32
    compile: bool | None = None  # torch.compile; None = on CUDA only
    batch_tokens: int = 4096  # tokens per optimizer step, over all ranks and micro-steps
    micro_batch: int = 16  # rows per micro-step and rank
    recompute: bool = False  # activation checkpointing: blocks again in the backward pass
    fsdp: bool = False  # share weights, gradients and optimizer state out among ranks (FSDP2)
    max_steps: int = 100  # optimizer steps
    optimizer: str = "muon"  # muon (hidden matrices; the rest AdamW) or adamw
    muon_lr: float = 0.02  # peak learning rate of Muon, for updates of unit spectral norm
    learning_rate: float = 3e-3  # peak learning rate of AdamW
    weight_decay: float = 0.0  # decoupled, on hidden matrices only
    momentum: float = 0.95  # Muon
    ns_steps: int = 5  # Newton-Schulz iterations of Muon
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # largest gradient norm; 0 = no clipping
    schedule: str = "wsd"  # wsd (warm-up, stable, linear decay) or cosine
    warmup_frac: float = 0.02  # share of max_steps
    decay_frac: float = 0.4  # wsd: share of max_steps at the end
    final_lr_frac: float = 0.0  # learning rate at the end, as a share of the peak
    eval_interval: int = 100  # steps between validations
    eval_rows: int = 256  # rows of the validation split, 0 = all
    log_interval: int = 10  # steps between log lines
    save_interval: int = 100  # steps between checkpoints
    keep: int = 2  # newest checkpoints kept, beside the best
    max_bad_steps: int = 5  # non-finite steps in a row that end the run
    force: bool = False  # start over; the run in out_dir is kept until the new one has saved

    def __post_init__(self):
        counts = "micro_batch max_steps eval_interval log_interval save_interval max_bad_steps"
        zero_or_more = "seed eval_rows learning_rate muon_lr weight_decay grad_clip"
        ranges = {"[1, inf)": counts, "[2, inf)": "keep", "[1, 1e9]": "batch_tokens"}
        ranges["[1, 100]"] = "ns_steps"
        ranges |= {"[0, inf)": zero_or_more, "[0, 1]": "warmup_frac decay_frac final_lr_frac"}
        choices = {"schedule": ("wsd", "cosine"), "optimizer": ("muon", "adamw")}
        choices |= {"dtype": ("auto", "float32", "bfloat16")}
        choices |= {"device": ("auto", "cpu", "cuda", "mps")}
        require(self, ranges | {"[0, 1)": "momentum beta1 beta2"}, choices)


@dataclass
class PretrainConfig:
    """Pretraining."""

    init_from: str | None = None  # go on from a run folder, checkpoint or run name, in its sizes
    tokenizer: str = "toy"  # toy, byte, gpt2, a .tiktoken file, an imported run; or init_from's own
    headerless: bool = False  # the shards are nanoGPT's .bin files, plain uint16 without a header


class Task(Protocol):
    """What is trained: where its rows come from, and what their loss is."""

    name: str  # in logs and checkpoints
    metrics: list[str]  # the first is the loss
    tokens_per_row: int
    n_val_rows: int
    fingerprint: str  # of the data
    extra: dict  # kept in the checkpoint: tokenizer, template

    def batch(self, split: str, first: int, last: int) -> dict[str, Tensor]:
        """Return rows first..last of a split; a pure function of its arguments."""

    def units(self, batch: dict[str, Tensor]) -> Tensor | int:
        """Return how many tokens or pairs the loss is a mean over."""

    def loss(self, model: GPT, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the objective to differentiate and the metrics, all summed over the units."""


class TrainStep(nn.Module):
    """The forward pass of a task as one module, so that DDP and torch.compile see all of it."""

    def __init__(self, model: GPT, task: Task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | float, dict[str, Tensor]]:
        objective, metrics = self.task.loss(self.model, batch)
        return objective, self.model.balance_loss(batch.get("docs")), metrics


# ------------------------------------------------------------------------------------------------
# The loop


def train(loop: LoopConfig, task: Task, model: GPT, world: World, parts: tuple) -> dict:
    """Train a model on a task in loop.out_dir: resume, save, stop on signals.

    parts: all settings of the run. -> the last metrics, with "state": done or preempted.
    """
    with RunFolder(loop, task, world, parts) as run:
        plan = Plan(loop, task, world)
        model.recompute = loop.recompute
        compiled = is_compiled(loop, world)
        step_module = TrainStep(model, task)
        module = distribute(step_module, world, compiled, loop.fsdp)
        optimizers = make_optimizers(model, loop)
        first = run.resume(model, optimizers)
        needs = preflight(model, optimizers, task.tokens_per_row, loop, world)
        run.begin(model, plan.tokens_per_step, needs, plan.in_words(model, compiled))

        for step in range(first, loop.max_steps + 1):  # one more: the last validation and save
            last = step == loop.max_steps
            stopping = world.any(run.stop.signal is not None)
            if not stopping and (last or step % loop.eval_interval == 0):
                with run.clock.paused("validation"):
                    run.validated(step, evaluate(step_module, task, loop, world))
            if run.save_is_due(step, last or stopping):
                with run.clock.paused("save"):
                    run.save(step, model, optimizers)
            if last or stopping:
                break

            batches = [world.to_device(task.batch("train", *rows)) for rows in plan.rows_of(step)]
            units, tokens = sizes_of(task, batches, world)
            sums = accumulate(module, batches, (units, tokens), world)
            largest = loop.grad_clip or math.inf
            norm = nn.utils.clip_grad_norm_(model.parameters(), largest)
            norm = float(full_tensor(norm))
            lr_share = lr_at(step, loop)
            if run.accepts(step, norm, batches):
                take_step(optimizers, lr_share)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            run.log(step, sums, units, norm, lr_share)
        return run.finish(step, preempted=stopping)


def is_compiled(loop: LoopConfig, world: World) -> bool:
    return world.device.type == "cuda" if loop.compile is None else loop.compile


class Plan:
    """Which rows each rank takes in each step; the rows of a step are the same for any ranks."""

    def __init__(self, loop: LoopConfig, task: Task, world: World):
        self.loop, self.task, self.world = loop, task, world
        wanted = max(1, round(loop.batch_tokens / task.tokens_per_row))
        self.rows_per_step = getattr(task, "rows_per_step", wanted)
        rows = f"batch_tokens={loop.batch_tokens} is {self.rows_per_step} rows"
        if self.rows_per_step < world.size:
            needed = f"use at least {world.size * task.tokens_per_row}"
            raise UserError(f"{rows}, too few for {world.size} ranks: {needed}")
        if loop.fsdp and world.size == 1:
            raise UserError("--fsdp needs several ranks: use torchrun --nproc_per_node=2 or more")
        if loop.fsdp and self.rows_per_step % world.size:
            raise UserError(f"--fsdp: {rows}, which do not divide by {world.size} ranks: change it")
        self.tokens_per_step = self.rows_per_step * task.tokens_per_row

    def rows_of(self, step: int) -> list[tuple[int, int]]:
        """Return (first, end) of this rank's micro-steps; ranks get near-equal shares."""
        rank, size, rows = self.world.rank, self.world.size, self.rows_per_step
        first = step * rows + rank * rows // size
        end = step * rows + (rank + 1) * rows // size
        size = self.loop.micro_batch
        return [(row, min(row + size, end)) for row in range(first, end, size)]

    def in_words(self, model: GPT, compiled: bool) -> str:
        loop, world, width = self.loop, self.world, self.task.tokens_per_row
        how = str(world.dtype)[6:] + ", compiled" * compiled + ", FSDP" * loop.fsdp
        sizes = f"{model.num_params() / 1e6:.2f}M parameters on {world.device} ({how})"
        one = f"{self.rows_per_step} rows x {width} tokens = {self.tokens_per_step} tokens"
        micro_steps = f"{len(self.rows_of(0))} micro-steps of up to {loop.micro_batch} rows"
        in_all = f"{loop.max_steps * self.tokens_per_step / 1e6:.2f}M tokens"
        step = f"one step is {one}: {world.size} ranks x {micro_steps}"
        notes = expert_notes(model.cfg)
        return f"{sizes}; {step}; {loop.max_steps} steps = {in_all}{notes}"


def evaluate(module: nn.Module, task: Task, loop: LoopConfig, world: World) -> dict[str, float]:
    """Return the task's metrics over the validation rows: sums over all ranks, then divided."""
    totals, units = dict.fromkeys(getattr(task, "val_metrics", task.metrics), 0.0), 0
    rows = min(task.n_val_rows, loop.eval_rows or task.n_val_rows)
    for start in range(0, rows, world.size * loop.micro_batch):
        first = start + world.rank * loop.micro_batch
        idle = first >= rows  # yet it makes the pass: under FSDP ranks gather weights together
        some = (0, 1) if idle else (first, min(first + loop.micro_batch, rows))
        batch = world.to_device(task.batch("val", *some))
        with torch.no_grad(), world.autocast():
            *_, sums = module(batch)
        if idle:
            break
        units += int(task.units(batch))
        for key, value in sums.items():
            totals[key] += float(value)
    *sums, units = world.sum([*totals.values(), units])
    return {key: value / max(1, units) for key, value in zip(totals, sums, strict=True)}


def n_tokens(batch: dict[str, Tensor]) -> Tensor | int:  # that are no padding
    docs = batch.get("docs")
    return batch["idx"].numel() if docs is None else (docs >= 0).sum()


def sizes_of(task: Task, batches: list, world: World) -> tuple[float, float]:
    """Return how many units and how many real tokens a step has on all ranks, at least 1."""
    counts = [(float(task.units(batch)), float(n_tokens(batch))) for batch in batches]
    units, tokens = world.sum([sum(numbers) for numbers in zip(*counts, strict=True)])
    return max(1.0, units), max(1.0, tokens)


def accumulate(module: nn.Module, batches: list, sizes: tuple, world: World) -> dict[str, Tensor]:
    """Run forward and backward passes of all micro-steps. -> {metric: sum over this rank}

    The loss is a mean over all units of the step, on all ranks; DDP averages over the ranks. Each
    micro-step has a balance loss of its own, which counts as its share of the step's real tokens.
    """
    units, tokens = sizes
    totals = {}
    for i, batch in enumerate(batches):
        sync_gradients(module, i == len(batches) - 1)
        with world.autocast():
            objective, balance, sums = module(batch)
        loss = objective * (world.size / units) + balance * (world.size * n_tokens(batch) / tokens)
        loss.backward()
        for key, value in sums.items():
            totals[key] = totals.get(key, 0.0) + value.detach()
    return totals


# ------------------------------------------------------------------------------------------------
# Optimizers and schedule


def make_optimizers(model: GPT, loop: LoopConfig) -> list[torch.optim.Optimizer]:
    """Return Muon and AdamW, or AdamW alone; weight decay falls on the hidden matrices only."""
    groups = model.param_groups()
    adamw = [{"params": groups["adamw"], "weight_decay": 0.0}]
    optimizers = []
    if loop.optimizer == "muon":
        settings = {key: getattr(loop, key) for key in ("momentum", "weight_decay", "ns_steps")}
        optimizers.append(Muon(groups["muon"], lr=loop.muon_lr, **settings))
    else:
        adamw.append({"params": groups["muon"], "weight_decay": loop.weight_decay})
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    how = {"lr": loop.learning_rate, "betas": (loop.beta1, loop.beta2), "fused": fused}
    optimizers.append(torch.optim.AdamW(adamw, eps=1e-10, **how))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_at(step: int, loop: LoopConfig) -> float:
    """Return a step's learning rate as a share of the peak; it is never 0."""
    warmup = round(loop.warmup_frac * loop.max_steps)
    decay = round(loop.decay_frac * loop.max_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if loop.schedule == "cosine":
        progress = (step - warmup) / max(1, loop.max_steps - warmup)
        share = (1 + math.cos(math.pi * progress)) / 2
    else:
        share = min(1.0, (loop.max_steps - step) / max(1, decay))
    return loop.final_lr_frac + (1 - loop.final_lr_frac) * share


def take_step(optimizers: list[torch.optim.Optimizer], lr_share: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_share
        optimizer.step()


# ------------------------------------------------------------------------------------------------
# Pretraining


class Pretrain:
    """Next-token prediction over the token shards of loop.data."""

    name, metrics = "pretrain", ["loss"]

    def __init__(self, loop: LoopConfig, seq_len: int, tokenizer: Tokenizer, headerless: bool):
        self.tokens_per_row = seq_len
        how = (seq_len, loop.seed, tokenizer, headerless)
        self.train_rows = Mixture(loop.data, loop.data_dir, "train", *how)
        self.val_rows = Mixture(loop.data, loop.data_dir, "val", *how)
        self.n_val_rows = self.val_rows.n_rows
        self.fingerprint = self.train_rows.fingerprint
        contents = [checksums(rows.streams) for rows in (self.train_rows, self.val_rows)]
        for same in contents[0].keys() & contents[1].keys():
            what = f"{contents[1][same]} has the tokens of {contents[0][same]}"
            raise UserError(f"{what}: validation would measure memory. Hold some text out")
        shards = digest([sorted(content) for content in contents])
        self.extra = {"tokenizer": tokenizer.spec(), "shards": shards}

    def batch(self, split: str, first: int, last: int) -> dict[str, Tensor]:
        train = split == "train"
        source = self.train_rows.shuffled if train else self.val_rows.validation
        rows = source(first, last)  # (B, T + 1)
        return {"idx": rows[:, :-1], "targets": rows[:, 1:]}

    def units(self, batch: dict[str, Tensor]) -> int:
        return batch["targets"].numel()

    def loss(self, model: GPT, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        nll = model(batch["idx"], batch["targets"])
        return nll, {"loss": nll}


def main(argv: list[str]) -> int:
    quiet = os.environ.get("RANK", "0") != "0"
    given = {read_flag(arg)[0] for arg in argv if arg.startswith("--")}
    for path in (arg for arg in argv if not arg.startswith("-")):
        given |= {key for key, *_ in read_file(path)}
    if "-h" not in argv and not given & {"n_layer", "d_model", "init_from", "help"}:
        usage = "python train.py config/smoke.py [--key=value ...]; --help lists the keys"
        raise UserError(f"no model is named, by a config file or by --n_layer. Usage: {usage}")
    sizes, loop, pretrain = load(argv, ModelConfig, LoopConfig, PretrainConfig, quiet=quiet)
    ensure_toy(loop.data, loop.data_dir)
    name, start, origin = pretrain.tokenizer, None, None
    if pretrain.init_from:
        start, origin = open_start(pretrain.init_from, loop.out_dir, loop.force)
        sizes = sizes_of_start(start, sizes, given, pretrain.init_from)
        name = name if "tokenizer" in given else start["tokenizer"]["name"]
    tokenizer = load_tokenizer(name, loop.data_dir, start and start["tokenizer"])
    cfg = replace(sizes, vocab_size=tokenizer.vocab_size)
    parts = (sizes, loop, replace(pretrain, tokenizer=name))
    with World(loop.device, loop.dtype) as world:
        if is_done(loop, parts, world, origin, []):
            return 0
        check_memory((GPT, make_optimizers), cfg, cfg.seq_len, loop, world)
        torch.manual_seed(loop.seed)
        model = model_from(start, seq_len=cfg.seq_len) if start else GPT(cfg)
        task = Pretrain(loop, cfg.seq_len, tokenizer, pretrain.headerless)
        if origin:
            task.extra["init_from"] = origin
            what = "optimizer, schedule and data order begin anew"
            world.log(f"pretrain: from {pretrain.init_from}; {what}")
        result = train(loop, task, model, world, parts)
        return PREEMPTED if result["state"] == "preempted" else 0


if __name__ == "__main__":
    run(main, outlives_output=True)
