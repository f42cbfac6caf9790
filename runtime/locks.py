"""Locks: one process at a time; where a file system has none, a file with a heartbeat stands in."""

import errno
import fcntl
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TextIO

from configurator import UserError
from runtime.files import is_dead, remove_if_there

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # Lustre by default, some NFS
BEAT, SILENCE = 10.0, 60.0  # seconds between heartbeats; without one the holder is taken for dead


@contextmanager
def locked(path: str, what: str, wait: float) -> Iterator[None]:
    """Hold the lock of a file while the block runs; UserError where another holds it too long.

    what: is in use, for the message. wait: seconds to wait for it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "r+") as f, ExitStack() as stack:
        owner, end = holder(f, path, stack), time.monotonic() + wait
        if owner:
            print(f"{what} is in use by {owner}: waiting {wait:.0f} s for it", flush=True)
        while owner and time.monotonic() < end:
            time.sleep(0.1)
            owner = holder(f, path, stack)
        if owner:
            used = f"{what} is in use by {owner}"
            raise UserError(f"{used}: wait for it, or choose another --out_dir")
        f.seek(0)
        f.truncate(0)
        f.write(about_us())
        f.flush()
        yield


def about_us() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    where = os.uname().nodename + f", job {job}" * bool(job)
    return f"process {os.getpid()} on {where}, since {time.ctime()}"


def holder(f: TextIO, path: str, stack: ExitStack) -> str | None:
    """Lock an open file, or say who has locked it."""
    try:
        return fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.seek(0)
        return f.read().strip() or "another process"
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return holder_by_heartbeat(f"{path}.held", stack)


def holder_by_heartbeat(path: str, stack: ExitStack) -> str | None:
    """Make a file that only one process can make, and keep it young; or say who has made it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        with suppress(OSError), open(path) as f:
            owner = f.read().strip() or "another process"
            if is_left(path, owner):
                os.rename(path, f"{path}.dead")  # of several processes one succeeds
                remove_if_there(f"{path}.dead")
                return holder_by_heartbeat(path, stack)
            return owner
        return "another process"
    with os.fdopen(descriptor, "w") as f:
        f.write(about_us())
    print(f"NOTE: no file locks here: {path} stands for one while this process lives", flush=True)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            with suppress(OSError):
                os.utime(path)

    threading.Thread(target=beat, daemon=True).start()
    stack.callback(remove_if_there, path)
    stack.callback(ended.set)
    return None


def is_left(path: str, owner: str) -> bool:
    """Say whether the process that made this file has died: by its number, or by its silence."""
    found = re.match(r"process (\d+) on (\S+?),", owner)
    if found and found[2] == os.uname().nodename and is_dead(int(found[1])):
        return True
    probe = f"{path}.{os.getpid()}@{os.uname().nodename}"
    with open(probe, "w"):
        now = os.stat(probe).st_mtime  # by the clock of the file system, whatever ours says
    os.remove(probe)
    return now - os.stat(path).st_mtime > SILENCE
