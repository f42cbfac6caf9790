"""The files of an evaluation's results: one JSON line per number, append-only, and their items.

Reading them needs neither torch nor a checkpoint.
"""

import fcntl
import glob
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from evals.stats import Items
from runtime.files import read_log, write_jsonl

STAGES = ("pretrain", "sft", "dpo", "verifier")  # of a pipeline, in their order
RERANKERS = ("majority", "likelihood", "weighted", "best_of", "oracle")  # see problems.choose


def run_folders(folder: str, pattern: str) -> list[str]:
    """Return the names of the subfolders that hold such a file: stages in order, then by name."""
    paths = glob.glob(os.path.join(glob.escape(folder), "*", pattern))
    names = sorted({os.path.basename(os.path.dirname(path)) for path in paths})
    return sorted(names, key=lambda name: STAGES.index(name) if name in STAGES else len(STAGES))


def read_results(folder: str) -> list[dict]:
    """Return the rows of every results file of a run, oldest first."""
    if not os.path.isdir(folder):
        return []
    names = sorted(os.listdir(folder))
    names = [name for name in names if name.startswith("results") and name.endswith(".jsonl")]
    rows = [row for name in names for row in read_log(os.path.join(folder, name))]
    return sorted(rows, key=lambda row: row.get("date", ""))


def matches(row: dict, **wanted: object) -> bool:
    """Return whether a result has these fields."""
    return all(row.get(key) == value for key, value in wanted.items())


def newest(results: list[dict], **wanted: object) -> dict | None:
    """Return the newest result with these fields, or None."""
    return next((row for row in reversed(results) if matches(row, **wanted)), None)


@contextmanager
def results_lock(folder: str) -> Iterator[None]:
    """Wait until no other process writes results of this folder."""
    with open(os.path.join(folder, ".results_lock"), "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def append_results(
    path: str, rows: list[dict], replace: Callable[[dict], bool] | None = None
) -> None:
    """Append all rows in one write, under a lock: two evaluations at once lose nothing.

    replace(row) says which old rows are dropped.
    """
    with results_lock(os.path.dirname(path)):
        # After a kill the next row must not be glued to half a one.
        if os.path.exists(path) and (replace is not None or is_torn(path)):
            old = read_log(path)
            write_jsonl(path, [row for row in old if replace is None or not replace(row)])
        with open(path, "a") as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows))
            f.flush()
            os.fsync(f.fileno())


def is_torn(path: str) -> bool:
    """Return whether the last line of a file has no end."""
    with open(path, "rb") as f:
        return not (f.read() or b"\n").endswith(b"\n")


def item_key(row: dict) -> str:
    """Return the name under which a row's items stand in its items file."""
    return f"{row['model']} {row['metric']} {row['protocol']} {row['split']}"


def items_of(folder: str, row: dict) -> Items | None:
    """Return the items of a row, or None where they are not kept."""
    try:
        with open(os.path.join(folder, row["items"])) as f:
            return Items(**json.load(f)[item_key(row)])
    except (OSError, KeyError, ValueError, TypeError):
        return None
