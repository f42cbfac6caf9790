"""Processes, devices and signals: what a program of several ranks, on a cluster that may stop it, needs to know."""

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress

import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import UserError


class Ranks:
    """This process among the others: rank, world size, device, and the three collectives the loop needs."""

    def __init__(self, device: str, dtype: str = "auto"):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        if device == "auto":
            device = (
                "cuda"
                if torch.cuda.is_available()
                else "mps"
                if torch.backends.mps.is_available()
                else "cpu"
            )
        local, found = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if device == "cuda" and local >= found:
            raise UserError(
                f"device=cuda: process {local} of this node has no GPU, {found} found. "
                f"Use --device=cpu, or --nproc_per_node={max(1, found)}"
            )
        self.device = torch.device(device, local) if device == "cuda" else torch.device(device)
        if device == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        elif device == "cpu":
            keep_freed_memory()
        bf16 = (
            device == "cuda" and torch.cuda.is_bf16_supported()
            if dtype == "auto"
            else dtype == "bfloat16"
        )
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    def __enter__(self):
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        return self

    def __exit__(self, *exception):
        if dist.is_initialized():
            dist.destroy_process_group()

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over the ranks."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def print(self, text: str):
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


def keep_freed_memory() -> None:
    """Let glibc keep freed memory. By default it hands every large tensor back to the kernel, and the next one pays a page fault for
    each of its 4 KB; with the settings of mallopt(3) for "no mmap, no trimming" a training step soon faults no more (LOG.md)."""
    with suppress(OSError, AttributeError):  # another libc: nothing to set
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


class StopFlag:
    """SIGTERM or SIGUSR1 asks the loop to save and stop; a further one, 2 s later or more, ends the process at once. (A signal to
    a whole job reaches torchrun too, which sends it on: the same warning comes twice within milliseconds.)"""

    def __init__(self):
        self.signal, self.since = None, 0.0
        self.previous = {}

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self.previous[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > 2:
            os._exit(128 + number)
