"""Processes, devices and signals: what a program of several ranks needs on a shared cluster."""

import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from configurator import UserError

# Environment in which glibc keeps freed memory; by default every large tensor goes back to the
# kernel, and the next one pays a page fault for each of its 4 KB (mallopt(3))
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
PATIENCE = timedelta(minutes=3)  # that ranks wait for another one: longer than a save may take
# ask for an end: a terminal that closed and a used-up limit of CPU time, too
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)
STOPPING = b"\nstopping: this step is finished and saved; Ctrl-C again ends at once\n"


def choose_device(name: str) -> torch.device:
    """Return the device of a name, of CUDA the GPU of this rank; "auto" is the best there is."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps: this machine has no Apple GPU for torch. Use --device=cpu")
    if name != "cuda":
        return torch.device(name)
    local, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= found:
        advice = f"Use --device=cpu, or --nproc_per_node={max(1, found)}"
        raise UserError(f"device=cuda: process {local} has no GPU, {found} found. {advice}")
    return torch.device(name, local)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype of a name; "auto" is bfloat16 on a GPU that has it."""
    if name != "auto":
        return getattr(torch, name)
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Let the kernel send this process a signal when its parent ends, in any way (Linux alone)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def end_if_orphan() -> None:
    """End a rank whose torchrun, or its speedrun.py, was killed while this rank started."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    with open(f"/proc/{os.getppid()}/cmdline") as f:
        orphan = not re.search("torch|launch", f.read())  # another process has inherited this one
    with open(f"/proc/{os.getppid()}/stat") as f:
        grandparent = f.read().rpartition(")")[2].split()[1]
    if orphan or os.environ.get("SPEEDRUN_PID", grandparent) != grandparent:
        os._exit(128 + signal.SIGKILL)


class World:
    """This process among the others: rank, size, device, and the collectives of the loop."""

    def __init__(self, device: str, dtype: str = "auto"):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        if self.size > 1:  # started by torchrun: without it nobody would end this process
            die_with_parent()
            end_if_orphan()
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            exact = self.dtype == torch.float32
            torch.set_float32_matmul_precision("highest" if exact else "high")  # high: TF32

    def __enter__(self) -> Self:
        if self.size > 1:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
        return self

    def __exit__(self, *exception: object) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def sum(self, values: list[float]) -> list[float]:
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.all_reduce(total).tolist()

    def any(self, flag: bool) -> bool:
        return self.sum([float(flag)])[0] > 0

    def all_reduce(self, x: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, rows: list) -> list:
        """Return the rows of all ranks, in the order of the ranks."""
        if self.size == 1:
            return rows
        parts = [None] * self.size
        dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def agree(self, notes: dict) -> None:
        """Raise UserError on every rank where the ranks' notes, of the same keys, differ."""
        first, *others = self.gather([notes])
        for rank, other in enumerate(others, 1):
            differ = [key for key in first if first[key] != other[key]]
            if differ:
                values = "; ".join(f"{key}: {first[key]!r}, {other[key]!r}" for key in differ)
                what = f"rank 0 and rank {rank} differ in {values}"
                advice = "Give every node the same command and the same shared folders"
                raise UserError(f"{what}. {advice}")

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def log(self, text: str) -> None:
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.device.type == "cuda":
            batch = {key: x.pin_memory() for key, x in batch.items()}
        return {key: x.to(self.device, non_blocking=True) for key, x in batch.items()}


def distribute(module: nn.Module, world: World, compiled: bool, fsdp: bool) -> nn.Module:
    """Return the module to call in training: on the device, its gradients averaged over the ranks.

    module.model is a GPT. With fsdp the ranks share weights, gradients and optimizer state out
    (FSDP2); without, each rank has a copy (DDP).
    """
    if fsdp:
        policy = MixedPrecisionPolicy()
        if world.dtype != torch.float32:  # gather weights in it; the floats of a batch stay
            policy = MixedPrecisionPolicy(world.dtype, torch.float32, cast_forward_inputs=False)
        mesh = init_device_mesh(world.device.type, (world.size,))
        how = {"mesh": mesh, "mp_policy": policy}
        for block in module.model.blocks:
            if compiled:
                block.compile(dynamic=False)
            fully_shard(block, **how)
        fully_shard(module, reshard_after_forward=False, **how)  # needed again at once
        return module
    module.model.to(world.device)
    module = torch.compile(module, dynamic=False) if compiled else module
    if world.size == 1:
        return module
    on_gpu = world.device.type == "cuda"
    return DistributedDataParallel(module, device_ids=[world.device] if on_gpu else None)


def sync_gradients(module: nn.Module, on: bool) -> None:
    """Say whether the next backward pass averages gradients: only the last micro-step needs to."""
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = on
    elif hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(on)


def on_stop_signals(handle: Callable) -> dict[int, Any]:
    """Let handle(number, frame) take the signals that ask for an end. -> the handlers before it"""
    under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    heard = [n for n in STOP_SIGNALS if n != signal.SIGHUP or not under_nohup]
    return {number: signal.signal(number, handle) for number in heard}


class StopFlag:
    """SIGTERM and its like, or Ctrl-C, ask the loop to save and stop; a second ends it at once.

    The first may come twice within 2 s, for torchrun sends it on; to one process Ctrl-C does not.
    """

    def __init__(self):
        self.signal, self.since, self.previous = None, 0.0, {}
        self.main = os.environ.get("RANK", "0") == "0"
        self.relayed = "TORCHELASTIC_RUN_ID" in os.environ

    def __enter__(self) -> Self:
        self.previous = on_stop_signals(self.handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        pressed_again = number == self.signal == signal.SIGINT and not self.relayed
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
            if self.relayed:  # Slurm's second SIGTERM ends torchrun: that must not end the save
                die_with_parent(signal.SIGTERM)
            if number == signal.SIGINT and self.main:  # print is not safe in a handler
                os.write(2, STOPPING)
        elif time.monotonic() - self.since > (0.2 if pressed_again else 2):
            os._exit(128 + number)
