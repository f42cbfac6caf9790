"""The files of an evaluation's results: one JSON line per number, append-only, and their items.

Reading them needs neither torch nor a checkpoint.
"""

import fcntl
import glob
import json
import os
from collections.abc import Callable

from evals.stats import Items
from runtime.files import read_log, write_jsonl

STAGES = ("pretrain", "sft", "dpo", "verifier")  # of a pipeline, in their order
RERANKERS = ("majority", "likelihood", "weighted", "best_of", "oracle")  # see problems.choose


def run_folders(folder: str, pattern: str) -> list[str]:
    """Return the names of the subfolders that hold such a file: stages in order, then by name."""
    paths = glob.glob(os.path.join("*", pattern), root_dir=folder)
    names = sorted({os.path.dirname(path) for path in paths})
    return sorted(names, key=lambda name: (*STAGES, name).index(name))


def read_results(folder: str) -> list[dict]:
    names = sorted(glob.glob("results*.jsonl", root_dir=folder))
    rows = [row for name in names for row in read_log(os.path.join(folder, name))]
    return sorted(rows, key=lambda row: row.get("date", ""))


def matches(row: dict, **wanted: object) -> bool:
    return all(row.get(key) == value for key, value in wanted.items())


def newest(results: list[dict], **wanted: object) -> dict | None:
    return next((row for row in reversed(results) if matches(row, **wanted)), None)


def append_results(path: str, rows: list[dict], replace: Callable | None = None) -> None:
    """Append rows under a lock, in place of the old ones for which replace(row) holds."""
    with open(os.path.join(os.path.dirname(path), ".results_lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # After a kill the next row must not be glued to half a one.
        if os.path.exists(path) and (replace or is_torn(path)):
            old = read_log(path)
            write_jsonl(path, [row for row in old if not (replace and replace(row))])
        with open(path, "a") as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows))
            f.flush()
            os.fsync(f.fileno())


def is_torn(path: str) -> bool:
    with open(path, "rb") as f:
        return not (f.read() or b"\n").endswith(b"\n")  # the last line has no end


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
