"""What a run writes down while it trains: metrics.jsonl for programs, lines for people."""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from tqdm import tqdm

from runtime.budget import device_peak_flops, flops_per_token


class Clock:
    """Seconds spent on training steps; it stands still while something else is done."""

    def __init__(self):
        self.spent, self.since, self.began = 0.0, time.perf_counter(), time.perf_counter()
        self.pauses = dict.fromkeys(("validation", "save", "sampling"), 0.0)  # seconds of each

    def read(self) -> float:
        now = time.perf_counter()
        self.spent, self.since = self.spent + now - self.since, now
        return self.spent

    @contextmanager
    def paused(self, what: str) -> Iterator[None]:
        self.read()
        yield
        began, self.since = self.since, time.perf_counter()
        self.pauses[what] += self.since - began


class Diary:
    """The log of one run from its first step on; only rank 0 writes."""

    def __init__(self, run: Any, model: nn.Module, tokens_per_step: int):
        self.run, self.loop, self.task, self.world = run, run.loop, run.task, run.world
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token(model)
        self.clock, self.timed_steps = Clock(), 0
        hidden = not (self.world.main and sys.stderr.isatty())
        steps = {"total": self.loop.max_steps, "initial": run.first}
        self.bar = tqdm(desc=self.task.name, leave=False, disable=hidden, **steps)

    def record(self, row: dict) -> None:
        if self.world.main:
            with open(self.run.path("metrics.jsonl"), "a") as f:
                f.write(json.dumps(row) + "\n")

    def validation(self, step: int, values: dict[str, float]) -> dict:
        """Write down the metrics of a validation. -> the same under names that begin with val_"""
        row = {f"val_{key}": value for key, value in values.items()}
        self.record({"step": step, **row})
        shown = " | ".join(f"val {key} {value:.4f}" for key, value in values.items())
        self.world.log(f"{self.heading(step)} | {shown}")
        return row

    def training(self, step: int, means: dict, norm: float, lr_share: float, skipped: int) -> None:
        """Write down a training step; skipped: steps without a finite gradient so far."""
        step_s = self.clock.read() / self.timed_steps
        tokens = (step + 1) * self.tokens_per_step
        row = {"step": step, **means, "lr_share": lr_share, "grad_norm": norm}
        row |= {"step_ms": step_s * 1e3, "tokens_per_s": self.tokens_per_step / step_s}
        if "trained" in means:  # of rl: most rows may be dropped, and none is as wide as it may be
            row["tokens_per_s"] = means["trained"] * self.task.rows_per_step / step_s
        row |= {"tokens": tokens, "flops": self.flops_per_token * tokens}
        row["eta_s"] = self.seconds_left(step, step_s)
        if peak := device_peak_flops():
            row["mfu"] = row["tokens_per_s"] * self.flops_per_token / peak / self.world.size
        if torch.cuda.is_available():
            row["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
        self.record(row | ({"skipped": skipped} if skipped else {}))
        if self.bar.disable:
            self.world.log(self.line(row))
        self.bar.set_postfix_str(f"loss {means[self.task.metrics[0]]:.3f}")

    def seconds_left(self, step: int, step_s: float) -> float:
        """Estimate the time from a step to the end, with the validations and saves to come."""
        last = self.loop.max_steps
        left = (last - step - 1) * step_s
        intervals = {"validation": self.loop.eval_interval, "save": self.loop.save_interval}
        intervals["sampling"] = getattr(self.task, "epochs", 1)
        for what, interval in intervals.items():
            ends = step // interval  # of intervals, up to now
            before = self.run.first - (what != "save")  # there is one before the first step
            to_come = math.ceil(last / interval) - ends
            left += to_come * self.clock.pauses[what] / max(1, ends - before // interval)
        return left

    def line(self, row: dict) -> str:
        first, *others = self.task.metrics
        parts = [self.heading(row["step"]), f"loss {row[first]:.4f}"]
        parts += [f"{key.removeprefix('rewards/')} {row[key]:.3f}" for key in others[:3]]
        parts += [f"lr {row['lr_share']:.0%}", f"norm {row['grad_norm']:.2f}"]
        parts += [f"{row['step_ms']:.1f} ms", f"{row['tokens_per_s']:,.0f} tok/s"]
        parts += [f"mfu {row['mfu']:.1%}"] if "mfu" in row else []
        return " | ".join([*parts, f"eta {row['eta_s']:.0f} s"])

    def heading(self, step: int) -> str:
        return f"{self.task.name} step {step:05d}/{self.loop.max_steps:05d}"
