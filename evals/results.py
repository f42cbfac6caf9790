"""The files of an evaluation's results: one JSON line per number, append-only, and their items.

Reading them needs neither torch nor a checkpoint.
"""

import glob
import json
import os
from collections import Counter
from collections.abc import Callable

from evals.stats import Items
from runtime.files import digest, read_json
from runtime.locks import locked
from runtime.logs import append_log, read_log, rewrite_log

STAGES = ("pretrain", "sft", "dpo", "rl", "verifier")  # of a pipeline, in their order
RERANKERS = ("majority", "likelihood", "weighted", "best_of", "oracle")  # see problems.choose


def run_folders(folder: str, *patterns: str) -> list[str]:
    """Return the names of the subfolders that hold such a file: stages in order, then by name."""
    paths = [p for name in patterns for p in glob.glob(os.path.join("*", name), root_dir=folder)]
    names = sorted({os.path.dirname(path) for path in paths})
    return sorted(names, key=lambda name: (*STAGES, name).index(name))


def read_results(folder: str) -> list[dict]:
    names = sorted(glob.glob("results*.jsonl", root_dir=folder))
    rows = [row for name in names for row in read_log(os.path.join(folder, name))]
    return sorted(filter(is_finite, rows), key=lambda row: (row.get("seq", 0), row.get("date", "")))


def is_finite(row: dict) -> bool:
    """Return whether no number of a row is nan or infinite: such a row measures nothing."""
    try:
        json.dumps(row, allow_nan=False)
    except ValueError:
        return False
    return True


def trained_weights(folder: str, stage: str) -> str | None:
    """Return the hash of the weights that a stage had when its training ended."""
    if stage == "untrained":
        return None
    own = read_json(os.path.join(folder, stage, "state.json"))
    return (own or read_json(os.path.join(folder, "state.json"))).get("weights_hash")


def read_stages(folder: str, results: list[dict]) -> dict[str, dict]:
    """Return the stages in the order of the loop: their weights, and what they were made from.

    They are those that the last evaluation saw, then others by their newest results. A stage is
    outdated where it was trained since: its weights are those of now. "stale" says why it must be
    made again: its start has other weights than those that it was made from.
    """
    stages = read_json(os.path.join(folder, "stages.json"))
    kept = set(stages)
    for row in results:
        if row["stage"] not in kept:  # a run that is gone, or a baseline
            stages[row["stage"]] = {"weights_hash": row["weights_hash"]}
        if "verifier_hash" in row and not kept:  # an old evaluation wrote no stages.json
            stages["verifier"] = {"weights_hash": row["verifier_hash"]}
    for name, stage in stages.items():
        trained = trained_weights(folder, name)
        stage["outdated"] = trained not in (None, stage.get("trained"), stage["weights_hash"])
        if stage["outdated"]:
            stage["weights_hash"] = trained
        start, stage["stale"] = stages.get(stage.setdefault("start")), ""
        if start and start["weights_hash"] != stage["start_hash"]:
            stage["stale"] = f"{stage['start']} has other weights by now"
        elif start and start.get("stale"):
            stage["stale"] = f"{stage['start']} is stale"
    return stages


def current(folder: str) -> tuple[list[dict], dict[str, dict]]:
    """Return the results of the weights that the stages have now, and the stages.

    The results stand in the order of the loop, their data set under "data".
    """
    results = read_results(folder)
    stages = read_stages(folder, results)
    now = {stage["weights_hash"] for stage in stages.values()}
    kept = []
    for row in results:
        own = row["weights_hash"] == stages[row["stage"]]["weights_hash"]
        if own and row.get("verifier_hash") in (None, *now):
            kept.append({**row, "data": data_of(row)})
    return sorted(kept, key=lambda row: list(stages).index(row["stage"])), stages


def data_of(row: dict) -> str:
    """Return the name of a row's data set: the first of its settings; of a text, its split."""
    settings = row.get("settings") or {"data": ""}
    return row["split"] if row["task"] == "text_perplexity" else str(next(iter(settings.values())))


def matches(row: dict, **wanted: object) -> bool:
    return all(row.get(key) == value for key, value in wanted.items())


def newest(results: list[dict], **wanted: object) -> dict | None:
    return next((row for row in reversed(results) if matches(row, **wanted)), None)


def append_results(path: str, rows: list[dict], replace: Callable | None = None) -> None:
    """Append the rows of one call of a task under a lock; their number tells when some are lost.

    replace(row): whether an old row goes. seq numbers the calls: clocks may be set back.
    """
    folder = os.path.dirname(path)
    with locked(os.path.join(folder, ".results_lock"), f"{folder}/results.jsonl", wait=60):
        seq = 1 + max((row.get("seq", 0) for row in read_results(folder)), default=0)
        if replace and os.path.exists(path):
            rewrite_log(path, lambda row: is_finite(row) and not replace(row))
        append_log(path, [{**row, "seq": seq, "n_rows": len(rows)} for row in rows])


def is_whole(rows: list[dict]) -> bool:
    """Say whether these are all rows of a call, or of several; old rows do not tell."""
    calls = Counter(row.get("seq") for row in rows)
    return any(calls[row.get("seq")] >= row.get("n_rows", 1) for row in rows)


def item_key(row: dict) -> str:
    """Return the name under which a row's items stand in its items file."""
    return f"{row['model']} {row['metric']} {row['protocol']} {row['split']}"


def items_of(folder: str, row: dict) -> Items | None:
    """Return the items of a row, or None where they are not kept, or (aloud) are others."""
    try:
        items = read_json(os.path.join(folder, row["items"]))[item_key(row)]
        if row.get("items_hash") in (None, digest(items)):
            return Items(**items)
        print(f"WARNING: {row['items']} in {folder} has changed since it was written: not used")
    except (KeyError, TypeError):
        pass
    return None
