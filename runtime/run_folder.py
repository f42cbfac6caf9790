"""The folder of one run: locked, resumed, saved to, logged to.

It holds config.json, metrics.jsonl, state.json (running, preempted, done or failed), ckpt_<step>.pt
(the newest) and best.pt (the lowest validation loss).
"""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from typing import Any, Self

import torch
import torch.distributed.checkpoint.state_dict as full
import torch.nn as nn

from configurator import UserError, as_dict, read_flag
from runtime.checkpoint import (
    FORMAT,
    NEW,
    check_keys,
    checkpoint_files,
    newest_checkpoint,
    replace_run,
    save_checkpoint,
)
from runtime.diary import Diary
from runtime.files import read_json, remove_if_there, write_json
from runtime.locks import locked
from runtime.logs import rewrite_log
from runtime.world import StopFlag, World

BEGAN = time.perf_counter()  # when this process had read its imports
PREEMPTED = 75  # exit code (EX_TEMPFAIL): saved; run the same command again
WAIT = 15.0  # seconds in which a process that is ending may let go of its folder
START_OVER = "Choose another --out_dir, or --force to start over in its place"
# Keys that cannot change the result of a run: they may differ when it goes on. Of init_from the
# weights count, not the name
HARMLESS = "log_interval save_interval keep device micro_batch compile recompute fsdp force "
HARMLESS += "out_dir data_dir init_from"
# Weights and optimizer state whole, on the CPU, by name: the same file from one rank, DDP or FSDP
FULL_STATE = full.StateDictOptions(full_state_dict=True, cpu_offload=True)


def provenance() -> dict:
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"cpu x{torch.get_num_threads()}"
    dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
    origin = {"commit": git("rev-parse", "--short", "HEAD"), "dirty": dirty}
    return origin | {"torch": torch.__version__, "device": device, "command": " ".join(sys.argv)}


def git(*args: str) -> str | None:
    """Return what a git command prints about this code; None on a machine without git."""
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), *args]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return None


def command(n_ranks: int = 1, **changes: object) -> str:
    """Return the command line of this program without --force, and with these keys changed."""
    flags = {arg: read_flag(arg)[0] for arg in sys.argv if arg.startswith("--")}
    kept = [arg for arg in sys.argv if flags.get(arg) not in ("force", *changes)]
    new = [f"--{key}={value}" for key, value in changes.items()]
    launcher = ["torchrun", f"--nproc_per_node={n_ranks}"] if n_ranks > 1 else ["python"]
    return shlex.join([*launcher, *kept, *new])


def read_state(folder: str) -> str | None:
    """Return running, preempted, done or failed; None where no run has been."""
    return read_json(os.path.join(folder, "state.json")).get("state")


def check_same_run(folder: str, parts: tuple, found: dict, origin: dict | None) -> None:
    """Raise UserError where a run differs in a way that counts from the one that would begin now.

    found: its checkpoint; a key that is newer than the run had its default. origin: {"ref",
    "weights_hash"} of the checkpoint that it would start from; None = initial weights.
    """
    saved, harmless = found["model_config"] | found["train_config"], HARMLESS.split()
    if saved.get("n_expert") and saved.get("balance_coef"):
        harmless.remove("micro_batch")  # experts are balanced over a micro-step
    before = []
    for part in parts:
        own = {key: saved[key] for key in as_dict(part) if key in saved}
        before.append(type(part)(**own))
    was, now = (json.loads(json.dumps(as_dict(*some))) for some in (before, parts))
    changed = [key for key in now if key not in harmless and was[key] != now[key]]
    if changed:
        differ = "; ".join(f"{key}: {was[key]!r} -> {now[key]!r}" for key in changed)
        advice, more = START_OVER, now["max_steps"] - was["max_steps"]
        if more > 0:
            run = folder.rstrip("/")
            how = command(init_from=run, out_dir=f"{run}-more", max_steps=more)
            advice += f". To train its weights on, under a schedule of its own: {how}"
        raise UserError(f"{folder} holds a run with other settings: {differ}. {advice}")
    starts = (found.get("init_from") or {}, origin or {})
    if starts[0].get("weights_hash") != starts[1].get("weights_hash"):
        old, new = (f"{x['ref']} ({x['weights_hash']})" if x else "nothing" for x in starts)
        what = f"{folder} is stale: it was trained from {old}, and would start from {new} now"
        raise UserError(f"{what}. {START_OVER} (it is kept until the new one has saved)")


def is_done(loop: Any, parts: tuple, world: World, origin: dict | None, files: list) -> bool:
    """Say whether this very run is finished, with these files; UserError where another is there."""
    folder, found = loop.out_dir, None
    complete = all(os.path.exists(os.path.join(folder, name)) for name in files)
    begun = loop.force or os.path.isdir(os.path.join(folder, NEW))
    if not begun and complete and read_state(folder) == "done":
        found = newest_checkpoint(folder, world.log, whole=False)
        if found and checkpoint_files(folder) and found[1]["step"] < loop.max_steps:
            found = None  # its last checkpoint was taken away
    if world.any(not found):  # on any rank
        return False
    check_same_run(folder, parts, found[1], origin)
    world.log(f"{folder} is done: nothing to do")
    return True


@contextmanager
def lock(folder: str) -> Iterator[None]:
    """Hold a folder while this process lives; a second one waits, then is told who is there."""
    with ExitStack() as stack:
        try:
            os.makedirs(folder, exist_ok=True)
            stack.enter_context(locked(os.path.join(folder, ".lock"), folder, WAIT))
        except OSError as error:
            what = f"cannot use {folder} as run folder ({error})"
            raise UserError(f"{what}: choose another --out_dir") from None
        yield


class RunFolder:
    """One run: everything about it that is not a training step; see train.train."""

    def __init__(self, loop: Any, task: Any, world: World, parts: tuple):
        self.loop, self.task, self.world, self.parts = loop, task, world, parts
        self.folder, self.stop, self.stack = loop.out_dir, StopFlag(), ExitStack()
        self.first, self.best, self.best_step = 0, math.inf, None
        self.bad_steps, self.skipped = 0, 0
        self.result = {}

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def __enter__(self) -> Self:
        new = self.path(NEW)
        if self.world.main:
            self.stack.enter_context(lock(self.folder))
            replace_run(self.folder)
            begun = os.path.isdir(new)
            requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"  # then without --force
            if self.loop.force or (begun and requeued):
                shutil.rmtree(new, ignore_errors=True)
                os.mkdir(new)
            elif begun:
                self.world.log(f"{self.folder}: what --force began had not saved and is dropped")
                shutil.rmtree(new)
        self.world.barrier()
        if os.path.isdir(new):
            self.folder = new
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        # a start that was refused is no failure of a run that is done
        own = hasattr(self, "diary") or read_state(self.folder) != "done"
        if own and self.world.main and isinstance(error, Exception):
            reason = f"{kind.__name__}: {error}"
            with suppress(UserError):  # a full disk must not hide the message
                write_json(self.path("state.json"), {"state": "failed", "error": reason})
        self.stack.close()

    def resume(self, model: nn.Module, optimizers: list) -> int:
        """Load the newest checkpoint that can be read, if there is one. -> the first step to do"""
        found = newest_checkpoint(self.folder, self.world.log)
        notes = as_dict(*self.parts) | {"data read": self.task.fingerprint}
        notes |= {"shards": self.task.extra.get("shards"), "checkpoint": found and found[0]}
        self.world.agree(notes | {"weights": found and found[1]["weights_hash"]})
        if not found:
            return 0
        path, saved = found
        check_same_run(self.folder, self.parts, saved, self.task.extra.get("init_from"))
        check_keys(path, saved, "step best data rng optimizers")
        if saved["format"] < FORMAT:
            what = f"{path} is of format {saved['format']}, not {FORMAT}"
            raise UserError(f"{what}: its weights serve as --init_from alone. {START_OVER}")
        was = [saved["data"], saved.get("shards")]  # without shards: a run of before they were kept
        now = [self.task.fingerprint, self.task.extra.get("shards") if was[1] else None]
        if was != now:
            change = " -> ".join("/".join(filter(None, some)) for some in (was, now))
            what = f"the data of {self.folder} has changed since {path} was written ({change})"
            raise UserError(f"{what}: restore it. {START_OVER}")
        self.first, self.best = saved["step"], saved["best"]
        states = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizers"]}
        full.set_state_dict(model, optimizers, **states, options=FULL_STATE)
        torch.set_rng_state(saved["rng"])
        if "round" in saved:  # of rl: answers that are still to be learned from
            self.task.extra["round"] = saved["round"]
        self.world.log(f"{self.task.name}: resuming {path} at step {self.first}")
        return self.first

    def begin(self, model: nn.Module, tokens_per_step: int, *lines: str) -> None:
        """Clean up what a killed run left, say what will be done, start the clock."""
        if self.world.main:
            for name in os.listdir(self.folder):
                if name.endswith(".tmp"):  # of a save that was killed; we hold the lock
                    remove_if_there(self.path(name))
            # without the steps that are to be done again
            rewrite_log(self.path("metrics.jsonl"), lambda row: row.get("step", 0) < self.first)
            write_json(self.path("config.json"), as_dict(*self.parts))
            write_json(self.path("state.json"), {"state": "running", **provenance()})
        for line in lines:
            self.world.log(f"{self.task.name}: {line}")
        self.stack.enter_context(self.stop)
        self.diary = Diary(self, model, tokens_per_step)
        self.stack.enter_context(self.diary.bar)
        self.clock = self.task.clock = self.diary.clock

    def validated(self, step: int, values: dict[str, float]) -> None:
        """Take the validation metrics of a step; the first of them decides which is best."""
        loss = values[self.task.metrics[0]]
        if loss < self.best:
            self.best, self.best_step = loss, step
        self.result |= self.diary.validation(step, values)

    def save_is_due(self, step: int, ending: bool) -> bool:
        regular = step > self.first and (ending or step % self.loop.save_interval == 0)
        return regular or (step == self.best_step and step > 0)

    def save(self, step: int, model: nn.Module, optimizers: list) -> None:
        """Write a checkpoint, then remove those that are no longer kept."""
        if self.world.main or self.loop.fsdp:  # whose ranks all give their share to rank 0
            weights, moments = full.get_state_dict(model, optimizers, options=FULL_STATE)
        if not self.world.main:
            return
        settings = json.loads(json.dumps(as_dict(*self.parts)))
        checkpoint = {"model": weights, "model_config": asdict(model.cfg)}
        checkpoint |= {"train_config": settings, "step": step, "best": self.best}
        checkpoint |= {"task": self.task.name, "data": self.task.fingerprint}
        checkpoint |= {"rng": torch.get_rng_state(), "optimizers": moments, **self.task.extra}
        name = f"ckpt_{step:07d}.pt"
        if step == self.best_step:  # first: after a kill between the two it comes again
            save_checkpoint(self.path("best.pt"), checkpoint)
        self.result["weights_hash"] = save_checkpoint(self.path(name), checkpoint)
        if self.folder != self.loop.out_dir:  # --force
            replace_run(self.loop.out_dir)
            self.folder = self.loop.out_dir
        up_to_now = [p for p in checkpoint_files(self.folder) if p <= self.path(name)]
        for old in up_to_now[self.loop.keep :]:  # only now, when the new one is safe
            os.remove(old)

    def accepts(self, step: int, norm: float, batches: list) -> bool:
        """Say whether a gradient of this norm is to be used; raise UserError after too many."""
        if math.isfinite(norm):
            self.bad_steps = 0
            return True
        self.bad_steps, self.skipped = self.bad_steps + 1, self.skipped + 1
        counts = f"{self.bad_steps} in a row, {self.skipped} in all"
        what = f"{self.task.name} step {step:05d}: non-finite gradient, step skipped ({counts})"
        self.world.log(what)
        if self.bad_steps == self.loop.max_bad_steps:
            path = os.path.join(self.loop.out_dir, f"bad_batch_{self.world.rank}.pt")
            torch.save({"step": step, "batches": batches}, path)
            advice = "Lower learning_rate and muon_lr, or look at the last batch"
            raise UserError(f"{what}. {advice}, in {path}; the last good checkpoint is intact")
        return False

    def log(self, step: int, sums: dict, units: float, norm: float, lr_share: float) -> None:
        """Log a training step where one is due; sums: {metric: its sum over this rank's units}."""
        self.diary.timed_steps += 1
        if step % self.loop.log_interval == 0 or step + 1 == self.loop.max_steps:
            keys = self.task.metrics
            totals = self.world.sum([float(sums[key]) for key in keys])
            means = {key: total / units for key, total in zip(keys, totals, strict=True)}
            self.diary.training(step, means, norm, lr_share, self.skipped)
            self.result |= means
        self.diary.bar.update(1)

    def finish(self, step: int, preempted: bool) -> dict:
        """Write the final state of the run. -> its last metrics, state and seconds"""
        seconds = time.perf_counter() - self.clock.began
        state = "preempted" if preempted else "done"
        self.result |= {"state": state, "step": step, "seconds": seconds}
        self.result["process_seconds"] = time.perf_counter() - BEGAN
        line = f"{state} at step {step} after {seconds:.0f} s, {self.loop.out_dir}"
        if preempted:
            force = " --force" * (self.folder != self.loop.out_dir)  # nothing is saved yet
            line += f"; go on with: {command(self.world.size)}{force}"
        self.world.log(f"{self.task.name}: {line}")
        self.world.barrier()
        if self.world.main:
            write_json(self.path("state.json"), {**self.result, **provenance()})
        return self.result
