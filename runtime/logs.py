"""Logs of JSON lines, and caches under a seal: damage is noticed, named, and costs no other row."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable

from runtime.files import as_lines, write_atomic


def log_lines(path: str) -> list[tuple[bytes, dict | None]]:
    """Return the lines of a log with the row of each, None where a line is damaged; [] without.

    What a kill left of a last line is none; of damage anywhere else a message says where.
    """
    if not os.path.exists(path):
        return []
    with open(path, "rb") as f:
        lines = f.read().splitlines(keepends=True)
    found, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        row = row if isinstance(row, dict) else None
        torn = row is None and number == len(lines) and not line.endswith(b"\n")
        if not torn:
            found.append((line.rstrip(b"\n") + b"\n", row))
            bad += [str(number)] * (row is None)
    if bad:
        what = f"{path}:{bad[0]} is no JSON object" + f", nor {len(bad) - 1} more" * (len(bad) > 1)
        print(f"WARNING: {what}: skipped, and kept in the file", flush=True)
    return found


def read_log(path: str) -> list[dict]:
    return [row for _, row in log_lines(path) if row is not None]


def rewrite_log(path: str, keep: Callable[[dict], bool]) -> None:
    """Write a log anew without the rows that are not to be kept; damaged lines stay."""
    lines = [line for line, row in log_lines(path) if row is None or keep(row)]
    write_atomic(path, lambda f: f.writelines(lines))


def append_log(path: str, rows: list[dict]) -> None:
    """Append rows to a log, all or none (also on a full disk), after a line that a kill tore."""
    if is_torn(path):
        rewrite_log(path, lambda row: True)
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    with open(path, "ab", buffering=0) as f:
        before = f.seek(0, os.SEEK_END)
        try:
            if f.write(text.encode()) < len(text):  # a full disk takes a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            os.fsync(f.fileno())
        except OSError:
            f.truncate(before)
            raise


def is_torn(path: str) -> bool:
    if not os.path.exists(path) or not os.path.getsize(path):
        return False
    with open(path, "rb") as f:
        f.seek(-1, os.SEEK_END)
        return f.read() != b"\n"  # the last line has no end


def write_sealed(path: str, rows: list) -> None:
    """Write rows as JSON lines, and after them one with their sha256, for read_sealed."""
    text = as_lines(rows)
    seal = as_lines([{"seal": hashlib.sha256(text).hexdigest()}])
    write_atomic(path, lambda f: f.write(text + seal))


def read_sealed(path: str) -> list | None:
    """Return the rows that write_sealed wrote; None where there are none, or (aloud) others."""
    if not os.path.exists(path):
        return None
    with open(path, "rb") as f, contextlib.suppress(ValueError, LookupError, TypeError):
        *lines, end = f.read().splitlines(keepends=True)
        if json.loads(end)["seal"] == hashlib.sha256(b"".join(lines)).hexdigest():
            return list(map(json.loads, lines))
    what = "has changed since it was written, or is older than the seals of such files"
    print(f"WARNING: {path} {what}: it is not used", flush=True)
    return None
