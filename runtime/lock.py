"""The lock of a run folder: one process at a time, and a second one is told who is there."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from configurator import UserError

WAIT = 15.0  # seconds in which a process that is ending may let go of its folder


def hold(f: TextIO, folder: str) -> None:
    """Lock an open file, soon; raise UserError where another process keeps it."""
    end, told = time.monotonic() + WAIT, False
    while True:
        try:
            return fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            owner = f.read().strip() or "another process"
        if time.monotonic() >= end:
            advice = "wait for it, or choose another --out_dir"
            raise UserError(f"{folder} is in use by {owner}: {advice}")
        if not told:
            print(f"{folder} is in use by {owner}: waiting {WAIT:.0f} s for it", flush=True)
        told = True
        time.sleep(0.1)


@contextmanager
def lock(folder: str) -> Iterator[None]:
    """Hold a folder for this process; a second one waits a while, then is told who is there.

    The lock dies with its process.
    """
    path = os.path.join(folder, ".lock")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(path, "a"):
            pass
    except OSError as error:
        what = f"cannot use {folder} as run folder ({error})"
        raise UserError(f"{what}: choose another --out_dir") from None
    with open(path, "a+") as f:
        hold(f, folder)
        f.truncate(0)
        job = os.environ.get("SLURM_JOB_ID")
        where = f"{os.uname().nodename}{f', job {job}' if job else ''}"
        f.write(f"process {os.getpid()} on {where}, since {time.ctime()}")
        f.flush()
        yield
