"""Pretraining, and the one training loop of the project (align.py brings its own tasks to it).

    python train.py config/smoke.py                                      # one process, CPU or GPU
    torchrun --nproc_per_node=4 train.py config/h100_pretrain.py         # the same global batches on 4 GPUs; --fsdp for models that outgrow one

Started again in the same out_dir, a run resumes from its newest good checkpoint, bitwise; a finished run is left alone.
"""

import json
import math
import os
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import configurator
import data
from checkpoint import (
    FORMAT,
    checkpoint_files,
    lock,
    newest_checkpoint,
    provenance,
    read_state,
    save_checkpoint,
)
from configurator import UserError
from data import write_json
from model import GPT, ModelConfig
from optim import Muon, lr_at, make_optimizers, whole
from ranks import Ranks, StopFlag

PREEMPTED = 75  # exit code (EX_TEMPFAIL): saved, run the same command again
HARMLESS = {
    "log_interval",
    "save_interval",
    "keep",
    "device",
    "micro_batch",
    "compile",
    "recompute",
    "fsdp",
    "force",
    "out_dir",
    "data_dir",
}


@dataclass
class LoopConfig:
    out_dir: str = "out/pretrain"  # run folder: config, metrics.jsonl, checkpoints, state.json
    data: str = "toy"  # data sets under data_dir, "name" or a mixture "name*0.7,other*0.3"
    data_dir: str = "data"  # where data.py put them
    tokenizer: str = "toy"  # toy, byte, gpt2, or the path of a .tiktoken ranks file
    seed: int = 1337  # initial weights and data order
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = (
        "auto"  # compute dtype: auto, float32, bfloat16; weights and optimizer stay float32
    )
    compile: bool | None = None  # torch.compile; None = on CUDA only
    batch_tokens: int = 4096  # tokens per optimizer step, over all ranks and micro-steps
    micro_batch: int = 16  # rows per micro-step and rank
    recompute: bool = False  # activation checkpointing: each block again in the backward pass, for a third of the memory or less
    fsdp: bool = False  # share weights, gradients and optimizer state out among the ranks (FSDP2) instead of copying them (DDP)
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
    force: bool = False  # start over: deletes this run's checkpoints and metrics

    def __post_init__(self):
        faults = [
            f"{key} must be at least {low}, got {getattr(self, key)}"
            for key, low in (
                ("batch_tokens", 1),
                ("micro_batch", 1),
                ("max_steps", 1),
                ("eval_interval", 1),
                ("log_interval", 1),
                ("save_interval", 1),
                ("keep", 2),
                ("max_bad_steps", 1),
                ("learning_rate", 0),
                ("muon_lr", 0),
                ("weight_decay", 0),
                ("grad_clip", 0),
                ("eval_rows", 0),
                ("ns_steps", 1),
            )
            if getattr(self, key) < low
        ]
        faults += [
            f"{key} must be between 0 and 1, got {getattr(self, key)}"
            for key in ("warmup_frac", "decay_frac", "final_lr_frac", "momentum", "beta1", "beta2")
            if not 0 <= getattr(self, key) <= 1
        ]
        for key, known in {
            "schedule": ("wsd", "cosine"),
            "optimizer": ("muon", "adamw"),
            "dtype": ("auto", "float32", "bfloat16"),
            "device": ("auto", "cpu", "cuda", "mps"),
        }.items():
            if getattr(self, key) not in known:
                faults.append(
                    f"{key} must be one of {', '.join(known)}, got {getattr(self, key)!r}"
                )
        if faults:
            raise UserError("; ".join(faults))


@dataclass
class TrainConfig(LoopConfig, ModelConfig):
    vocab_size: int | None = None  # None = what the tokenizer has
    headerless: bool = False  # the shards are nanoGPT's .bin files, plain uint16 without a header

    def __post_init__(self):
        LoopConfig.__post_init__(self)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


class TrainStep(nn.Module):
    """Forward pass of a task as one module, so that DDP and torch.compile see all of it."""

    def __init__(self, model: GPT, task):
        super().__init__()
        self.model, self.task_loss = model, task.loss

    def forward(self, batch: dict):
        return self.task_loss(self.model, batch)


def evaluate(module, task, cfg: LoopConfig, ranks: Ranks) -> dict[str, float]:
    """Every metric of the task over the validation rows: sums and units are added over batches and ranks, then divided."""
    totals, units = {}, 0
    rows = min(task.n_val_rows, cfg.eval_rows or task.n_val_rows)
    for start in range(0, rows, ranks.world * cfg.micro_batch):
        first = start + ranks.rank * cfg.micro_batch
        idle = (
            first >= rows
        )  # and yet it makes the pass: under FSDP the ranks gather each block's weights together
        batch = to_device(
            task.batch("val", *(0, 1) if idle else (first, min(first + cfg.micro_batch, rows))),
            ranks.device,
        )
        with torch.no_grad(), ranks.autocast():
            _, sums = module(batch)
        if idle:
            break
        units += int(task.units(batch))
        for key, value in sums.items():
            totals[key] = totals.get(key, 0.0) + float(value)
    keys = task.metrics
    total = ranks.sum([*(totals.get(key, 0.0) for key in keys), units])
    return {key: value / max(1, total[-1]) for key, value in zip(keys, total)}


def to_device(batch: dict, device) -> dict:
    if device.type == "cuda":
        return {key: x.pin_memory().to(device, non_blocking=True) for key, x in batch.items()}
    return {key: x.to(device) for key, x in batch.items()}


def train(cfg: LoopConfig, task, model: GPT, ranks: Ranks) -> dict:
    """Train model on task in cfg.out_dir; resumes, saves, stops on signals. -> the last metrics, with "state": done | preempted.

    A task has name, metrics (names; the first is the loss), tokens_per_row, n_val_rows, fingerprint (of its data), extra (kept
    in the checkpoint: tokenizer, template), units(batch) -> how many tokens or pairs the loss is a mean over,
    batch(split, first, last) -> tensors of rows first..last, a pure function, and loss(model, batch) -> (objective to
    differentiate, metrics), both sums over the units. Raises UserError for what the user can mend.
    """
    if not ranks.main:
        return run_loop(cfg, task, model, ranks)
    state_path = os.path.join(cfg.out_dir, "state.json")
    with lock(cfg.out_dir):
        try:
            result = run_loop(cfg, task, model, ranks)
        except Exception as error:
            with suppress(UserError):  # a full disk must not hide the message
                write_json(
                    state_path, {"state": "failed", "error": f"{type(error).__name__}: {error}"}
                )
            raise
        write_json(state_path, {**result, **provenance()})
        return result


def check_same_run(cfg: LoopConfig, saved: dict) -> None:
    """Refuse to continue a run under another configuration; keys that cannot change the result are free."""
    now = json.loads(json.dumps(asdict(cfg)))
    before = {
        field.name: field.default for field in fields(cfg)
    } | saved  # a key that is newer than the run had its default
    differ = [
        f"{key}: {before[key]!r} -> {now[key]!r}"
        for key in now
        if key not in HARMLESS and before[key] != now[key]
    ]
    if differ:
        raise UserError(
            f"{cfg.out_dir} holds a run with other settings: {'; '.join(differ)}. Choose another --out_dir, or --force to "
            "delete that run and start over"
        )


def is_done(cfg: LoopConfig, ranks: Ranks) -> bool:
    """True, aloud, where this very run is finished already. Raises UserError where another one is."""
    if cfg.force or read_state(cfg.out_dir) != "done":
        return False
    with open(os.path.join(cfg.out_dir, "config.json")) as f:
        check_same_run(cfg, json.load(f))
    ranks.print(f"{cfg.out_dir} is done: nothing to do")
    return True


def cut_metrics(path: str, step: int) -> None:
    """Drop the rows of steps that will be done again, and a line torn by a kill."""
    data.write_jsonl(path, [row for row in data.read_metrics(path) if row["step"] < step])


# Weights and optimizer state whole and on the CPU, by name: the same file from one rank, from DDP and from FSDP, for any of them to go on from
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def distribute(
    module: TrainStep, compiled: bool, rows_per_step: int, cfg: LoopConfig, ranks: Ranks
):
    """The module to call in training: on the device, compiled, its gradients averaged over the ranks."""
    model = module.model
    if cfg.fsdp:
        if ranks.world == 1:
            raise UserError(
                "--fsdp shares the model out among ranks, and there is one: start it with torchrun --nproc_per_node=2 or more"
            )
        if rows_per_step % ranks.world:
            raise UserError(
                f"--fsdp needs the same micro-steps on every rank: {rows_per_step} rows a step do not divide by {ranks.world} ranks; "
                f"change batch_tokens={cfg.batch_tokens}"
            )
        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        for block in model.blocks:
            if compiled:
                block.compile(dynamic=False)
            fully_shard(block, mesh=mesh)
        fully_shard(
            module, mesh=mesh, reshard_after_forward=False
        )  # embedding, head and norm: needed again at once
        return module
    model.to(ranks.device)
    module = torch.compile(module, dynamic=False) if compiled else module
    if ranks.world == 1:
        return module
    return DistributedDataParallel(
        module, device_ids=[ranks.device] if ranks.device.type == "cuda" else None
    )


def sync_gradients(module, on: bool) -> None:
    """Whether the next backward pass averages gradients over the ranks: only that of the last micro-step needs to."""
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = on
    else:
        module.set_requires_gradient_sync(on)


def run_loop(cfg: LoopConfig, task, model: GPT, ranks: Ranks) -> dict:
    folder = cfg.out_dir
    metrics_path, state_path = (
        os.path.join(folder, "metrics.jsonl"),
        os.path.join(folder, "state.json"),
    )
    rows_per_step = max(1, round(cfg.batch_tokens / task.tokens_per_row))
    if rows_per_step < ranks.world:
        raise UserError(
            f"batch_tokens={cfg.batch_tokens} is {rows_per_step} rows of {task.tokens_per_row} tokens, too few for "
            f"{ranks.world} ranks: use at least {ranks.world * task.tokens_per_row}"
        )
    if ranks.main and cfg.force:
        for path in [
            *checkpoint_files(folder),
            os.path.join(folder, "best.pt"),
            metrics_path,
            state_path,
        ]:
            if os.path.exists(path):
                os.remove(path)
    ranks.barrier()

    model.recompute = cfg.recompute
    compiled = cfg.compile if cfg.compile is not None else ranks.device.type == "cuda"
    step_module = TrainStep(model, task)
    module = distribute(step_module, compiled, rows_per_step, cfg, ranks)
    optimizers = make_optimizers(model, cfg)
    start, best = 0, math.inf
    found = newest_checkpoint(folder, ranks.print)
    if found:
        path, saved = found
        check_same_run(cfg, saved["train_config"])
        if saved["format"] < FORMAT:
            raise UserError(
                f"{path} is of format {saved['format']}, from which a run cannot be resumed (this is {FORMAT}); its weights can: "
                "--init_from in align.py. Choose another --out_dir, or --force to start over"
            )
        if saved["data"] != task.fingerprint:
            raise UserError(
                f"the data of {folder} has changed since {path} was written ({saved['data']} -> {task.fingerprint}): "
                "restore it, choose another --out_dir, or --force to start over"
            )
        start, best = saved["step"], saved["best"]
        set_state_dict(
            model,
            optimizers,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizers"],
            options=WHOLE,
        )
        torch.set_rng_state(saved["rng"])
        ranks.print(
            f"{task.name}: "
            + (
                f"resuming {path} at step {start}"
                if start < cfg.max_steps
                else f"{path} is at its last step"
            )
        )

    micro_rows = rows_of_rank(0, rows_per_step, cfg.micro_batch, ranks)
    if ranks.main:
        for name in os.listdir(folder):
            if name.endswith(".tmp"):  # of a save that was killed; the folder is ours alone
                os.remove(os.path.join(folder, name))
        cut_metrics(metrics_path, start)
        configurator.save(cfg, os.path.join(folder, "config.json"))
        write_json(state_path, {"state": "running", **provenance()})
        ranks.print(preflight(cfg, task, model, optimizers, ranks))
        ranks.print(
            f"{task.name}: {model.num_params() / 1e6:.2f}M parameters on {ranks.device} ({str(ranks.dtype)[6:]}"
            f"{', compiled' if compiled else ''}{', FSDP' if cfg.fsdp else ''}); one step is {rows_per_step} rows x {task.tokens_per_row} tokens = "
            f"{rows_per_step * task.tokens_per_row} tokens: {ranks.world} ranks x {len(micro_rows)} micro-steps of up to "
            f"{cfg.micro_batch} rows; {cfg.max_steps} steps = {cfg.max_steps * rows_per_step * task.tokens_per_row / 1e6:.2f}M tokens"
        )

    def save(step: int, is_best: bool):
        if not (ranks.main or cfg.fsdp):
            return
        weights, moments = get_state_dict(
            model, optimizers, options=WHOLE
        )  # under FSDP all ranks give their share, rank 0 gets the whole
        if not ranks.main:
            return
        path = os.path.join(folder, f"ckpt_{step:07d}.pt")
        checkpoint = {
            "model": weights,
            "model_config": asdict(model.cfg),
            "train_config": json.loads(json.dumps(asdict(cfg))),
            "step": step,
            "best": best,
            "task": task.name,
            "data": task.fingerprint,
            "rng": torch.get_rng_state(),
            "optimizers": moments,
            **task.extra,
        }
        for target in [os.path.join(folder, "best.pt")] * is_best + [
            path
        ]:  # best first: after a kill between them it comes again
            save_checkpoint(target, checkpoint)
        for old in [p for p in checkpoint_files(folder) if p <= path][
            cfg.keep :
        ]:  # only now, after the new one is safe
            os.remove(old)

    result, bad_steps, skipped = {}, 0, 0
    with StopFlag() as stop, open(metrics_path, "a") as log:

        def record(row: dict):
            if ranks.main:
                log.write(json.dumps(row) + "\n")
                log.flush()

        bar = tqdm(
            total=cfg.max_steps,
            initial=start,
            desc=task.name,
            leave=False,
            disable=not (ranks.main and sys.stderr.isatty()),
        )
        clock, timed_steps, began, spent = time.perf_counter(), 0, time.perf_counter(), 0.0
        for step in range(
            start, cfg.max_steps + 1
        ):  # one more than the steps: the last validation and save use the same code
            last = step == cfg.max_steps
            stopping = ranks.sum([float(stop.signal is not None)])[0] > 0
            is_best = False
            if (step % cfg.eval_interval == 0 or last) and not stopping:
                spent += time.perf_counter() - clock
                values = evaluate(step_module, task, cfg, ranks)
                is_best, best = values[task.metrics[0]] < best, min(best, values[task.metrics[0]])
                validation = {f"val_{key}": value for key, value in values.items()}
                result |= validation
                record({"step": step, **validation})
                ranks.print(
                    f"{task.name} step {step:05d}/{cfg.max_steps:05d} | "
                    + " | ".join(f"val {k} {v:.4f}" for k, v in values.items())
                )
                clock = time.perf_counter()
            if (
                (last or stopping or step % cfg.save_interval == 0)
                and step > start
                or is_best
                and step > 0
            ):
                save(step, is_best)
            if last or stopping:
                break

            batches = [
                to_device(task.batch("train", first, end), ranks.device)
                for first, end in rows_of_rank(step, rows_per_step, cfg.micro_batch, ranks)
            ]
            units = max(1.0, ranks.sum([float(sum(int(task.units(b)) for b in batches))])[0])
            sums = {key: 0.0 for key in task.metrics}
            for i, batch in enumerate(batches):
                if ranks.world > 1:
                    sync_gradients(module, i == len(batches) - 1)
                with ranks.autocast():
                    objective, values = module(batch)
                (
                    objective * (ranks.world / units)
                ).backward()  # DDP averages over ranks; the loss is a mean over all units
                for key, value in values.items():
                    sums[key] = sums[key] + value.detach()
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
            norm = float(whole(norm))
            share = lr_at(step, cfg)
            if math.isfinite(norm):
                bad_steps = 0
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = group["peak_lr"] * share
                    optimizer.step()
            else:
                bad_steps, skipped = bad_steps + 1, skipped + 1
                ranks.print(
                    f"{task.name} step {step:05d}: non-finite gradient, step skipped ({bad_steps} in a row, {skipped} in all)"
                )
                if bad_steps == cfg.max_bad_steps:
                    bad_path = os.path.join(folder, f"bad_batch_{ranks.rank}.pt")
                    torch.save({"step": step, "batches": batches}, bad_path)
                    raise UserError(
                        f"{bad_steps} steps in a row had non-finite gradients; the last batch is in {bad_path}, the last "
                        "good checkpoint is intact. Lower learning_rate and muon_lr, or look at that batch"
                    )
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            timed_steps += 1

            if step % cfg.log_interval == 0 or step + 1 == cfg.max_steps:
                totals = ranks.sum([float(sums[key]) for key in task.metrics])
                spent += time.perf_counter() - clock
                clock = time.perf_counter()
                row = progress(
                    step,
                    cfg,
                    task,
                    model,
                    totals,
                    units,
                    norm,
                    share,
                    spent / timed_steps,
                    rows_per_step,
                    skipped,
                )
                record(row)
                result.update({key: row[key] for key in task.metrics})
                bar.set_postfix_str(
                    f"loss {row[task.metrics[0]]:.3f}"
                ) if not bar.disable else ranks.print(line(row, cfg, task))
            bar.update(1)
        bar.close()
    result |= {
        "state": "preempted" if stopping else "done",
        "step": step,
        "seconds": time.perf_counter() - began,
    }
    ranks.print(
        f"{task.name}: {result['state']} at step {step} after {result['seconds']:.0f} s, {folder}"
    )
    ranks.barrier()
    return result


def activation_bytes(cfg: ModelConfig, n_tokens: int, width: int, recompute: bool) -> int:
    """Bytes that the backward pass finds of a forward pass over n_tokens, at `width` bytes a number, eager mode: per token and layer
    4 C (residual stream and norm, twice), 2 (H + K) D (queries and keys before and after their norm), (H + 2 K) D (what the
    attention kernel reads), 2 H D (its output) and 4 F (gate, up, silu, product); with recompute C alone and one layer
    in full; and C for the last norm. Counted as in arXiv 2205.05198; the head's logits are chunked and stay near 64 MB.
    """
    hidden = (
        cfg.d_ff if not cfg.n_expert else cfg.d_expert * (cfg.n_expert_active + cfg.shared_expert)
    )
    layer = 4 * cfg.d_model + (5 * cfg.n_head + 4 * cfg.n_kv_head) * cfg.d_head + 4 * hidden
    return (
        n_tokens
        * width
        * (cfg.d_model + (cfg.n_layer * cfg.d_model + layer if recompute else cfg.n_layer * layer))
    )


def preflight(cfg: LoopConfig, task, model: GPT, optimizers, ranks: Ranks) -> str:
    """What the run will need, in one line. Raises UserError where the disk cannot hold its checkpoints."""
    n_tokens = (
        max(1, min(cfg.micro_batch, round(cfg.batch_tokens / task.tokens_per_row / ranks.world)))
        * task.tokens_per_row
    )
    moments = sum(
        p.numel() * (1 if isinstance(o, Muon) else 2)
        for o in optimizers
        for group in o.param_groups
        for p in group["params"]
    )
    saved = 4 * (model.num_params() + moments)  # weights and optimizer state are float32
    memory = (saved + 4 * model.num_params()) / (ranks.world if cfg.fsdp else 1) + activation_bytes(
        model.cfg, n_tokens, ranks.dtype.itemsize, cfg.recompute
    )
    disk, free = (
        saved * (cfg.keep + 2),
        shutil.disk_usage(cfg.out_dir).free,
    )  # the newest, the best, and the one being written
    held = sum(
        os.path.getsize(os.path.join(cfg.out_dir, name))
        for name in os.listdir(cfg.out_dir)
        if name.endswith(".pt")
    )
    if disk > free + held:
        raise UserError(
            f"{cfg.out_dir} has {free / 1e9:.2f} GB free; {cfg.keep + 2} checkpoints of {saved / 1e9:.2f} GB need {disk / 1e9:.2f} GB: "
            "free space, or choose another --out_dir"
        )
    flops = model.flops_per_token()
    total = flops * cfg.max_steps * cfg.batch_tokens
    peak = device_peak_flops()
    hours = (
        f", {total / (0.4 * peak * ranks.world) / 3600:.2f} h at 40 % of the peak" if peak else ""
    )
    return (
        f"{task.name}: about {memory / 1e9:.2f} GB of memory per rank ({n_tokens:,} tokens at once), {disk / 1e9:.2f} GB of disk ({free / 1e9:,.0f} GB free); "
        f"{flops:.2e} FLOPs a token, {total:.2e} in all{hours}"
    )


def rows_of_rank(
    step: int, rows_per_step: int, micro_batch: int, ranks: Ranks
) -> list[tuple[int, int]]:
    """(first, end) of this rank's micro-steps; over all ranks they are the step's rows, each once. Ranks get near-equal shares."""
    first = step * rows_per_step + ranks.rank * rows_per_step // ranks.world
    end = step * rows_per_step + (ranks.rank + 1) * rows_per_step // ranks.world
    return [(row, min(row + micro_batch, end)) for row in range(first, end, micro_batch)]


# bf16 dense peak FLOP/s by device name, from the vendor's data sheets
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def device_peak_flops() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)


def progress(
    step, cfg, task, model, totals, units, norm, share, step_s, rows_per_step, skipped
) -> dict:
    """The row of metrics.jsonl for a training step. step_s: mean seconds per step since the start, validation excluded."""
    tokens_per_s = rows_per_step * task.tokens_per_row / step_s
    row = {
        "step": step,
        **{key: total / units for key, total in zip(task.metrics, totals)},
        "lr_share": share,
        "grad_norm": norm,
        "step_ms": step_s * 1e3,
        "tokens_per_s": tokens_per_s,
        "tokens": (step + 1) * rows_per_step * task.tokens_per_row,
        "flops": model.flops_per_token() * (step + 1) * rows_per_step * task.tokens_per_row,
        "eta_s": (cfg.max_steps - step - 1) * step_s,
    }
    if torch.cuda.is_available():
        peak, world = device_peak_flops(), int(os.environ.get("WORLD_SIZE", 1))
        row |= {"mfu": tokens_per_s * model.flops_per_token() / peak / world} if peak else {}
        row["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return row | ({"skipped": skipped} if skipped else {})


def line(row: dict, cfg: LoopConfig, task) -> str:
    mfu = f" | mfu {row['mfu']:.1%}" if "mfu" in row else ""
    others = "".join(
        f" | {key.removeprefix('rewards/')} {row[key]:.3f}" for key in task.metrics[1:4]
    )
    return (
        f"{task.name} step {row['step']:05d}/{cfg.max_steps:05d} | loss {row[task.metrics[0]]:.4f}{others} | lr {row['lr_share']:.0%} | "
        f"norm {row['grad_norm']:.2f} | {row['step_ms']:.1f} ms | {row['tokens_per_s']:,.0f} tok/s{mfu} | eta {row['eta_s']:.0f} s"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining


class Pretrain:
    """Next-token prediction over the token shards of cfg.data."""

    name, metrics = "pretrain", ["loss"]

    def __init__(self, cfg: TrainConfig, tokenizer):
        self.tokens_per_row = cfg.seq_len
        self.train_rows, self.val_rows = (
            data.Mixture(
                cfg.data, cfg.data_dir, split, cfg.seq_len, cfg.seed, tokenizer, cfg.headerless
            )
            for split in ("train", "val")
        )
        self.n_val_rows = self.val_rows.n_rows
        self.fingerprint = self.train_rows.fingerprint
        self.extra = {"tokenizer": tokenizer.spec()}

    def batch(self, split: str, first: int, last: int) -> dict:
        rows = (
            self.train_rows.shuffled(first, last)
            if split == "train"
            else self.val_rows.validation(first, last)
        )
        return {"idx": rows[:, :-1], "targets": rows[:, 1:]}

    def units(self, batch: dict):
        return batch["targets"].numel()

    def loss(self, model: GPT, batch: dict):
        nll = model(batch["idx"], batch["targets"])
        return nll + model.balance_loss() * self.units(batch), {"loss": nll}


def model_config(cfg: TrainConfig, vocab_size: int) -> ModelConfig:
    values = {f.name: getattr(cfg, f.name) for f in fields(ModelConfig)}
    if cfg.vocab_size not in (None, vocab_size):
        raise UserError(
            f"vocab_size={cfg.vocab_size}, but tokenizer {cfg.tokenizer!r} has {vocab_size} ids: leave it out"
        )
    return ModelConfig(**values | {"vocab_size": vocab_size})


def main(argv: list[str]) -> int:
    cfg = configurator.load(TrainConfig, argv, quiet=os.environ.get("RANK", "0") != "0")
    data.ensure(cfg.data, cfg.data_dir)
    tokenizer = data.load_tokenizer(cfg.tokenizer, cfg.data_dir)
    with Ranks(cfg.device, cfg.dtype) as ranks:
        if is_done(cfg, ranks):
            return 0
        torch.manual_seed(cfg.seed)
        model = GPT(model_config(cfg, tokenizer.vocab_size))
        return (
            PREEMPTED
            if train(cfg, Pretrain(cfg, tokenizer), model, ranks)["state"] == "preempted"
            else 0
        )


if __name__ == "__main__":
    configurator.run(main)
