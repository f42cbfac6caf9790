"""The tables of a report, in Markdown, from rows of result files; which differences are real."""

import math
import os
from itertools import pairwise
from typing import NamedTuple

from configurator import UserError
from evals.results import current, items_of, matches, newest
from evals.stats import FEW, FLOOR, difference


def fields(task: str, metric: str, protocol: str) -> dict[str, str]:
    """Return the fields by which `newest` finds a kind of result."""
    return {"task": task, "metric": metric, "protocol": protocol}


MEASURES = {  # of the first tables: heading -> fields
    "val loss (nats/token)": fields("val_loss", "val_loss", "windows"),
    "problems, exact match": fields("problems", "exact_match", "greedy"),
    "problems, any of 8 samples right": fields("samples", "exact_match", "any of 8"),
    "nats per sampled token": fields("samples", "nats_per_token", "sampled"),
    "stops by itself": fields("problems", "stop_rate", "greedy"),
    "prefers chosen, log-prob": fields("preference", "accuracy", "logprob"),
    "prefers chosen, reward": fields("preference", "accuracy", "reward"),
    "prefers chosen, length": fields("preference", "accuracy", "length"),
    "tales on topic and kind": fields("tales", "on_topic_and_kind", "sampled"),
    "response loss (nats/token)": fields("chats", "response_loss", "teacher"),
    "answers stop": fields("chats", "stop_rate", "greedy"),
    "repeated 4-grams": fields("chats", "repetition", "greedy"),
    "2-grams in no other answer": fields("chats", "distinct_2", "greedy"),
    "SST-2, zero-shot": fields("sst2", "accuracy", "zero-shot"),
    "DialogSum, ROUGE-L": fields("dialogsum", "rougeL", "greedy"),
}
BROUGHT = {  # stage -> headings of what it is there for, and of what it may cost
    "pretrain": ("val loss (nats/token)",),
    "sft": ("problems, exact match", "stops by itself"),
    "dpo": ("prefers chosen, log-prob", "tales on topic and kind", "problems, exact match"),
    "rl": ("problems, exact match", "problems, any of 8 samples right", "stops by itself"),
}
LOSSES = ("val_loss", "response_loss", "bits_per_byte")
SCORES = ("auc", "brier", "calibration_error", "loss_within_context", "loss_beyond_context")
# Digits behind the point; a metric that has none here is a rate.
DIGITS = (
    dict.fromkeys(LOSSES, 4)
    | dict.fromkeys(SCORES, 3)
    | {"perplexity": 2, "length": 1, "nats_per_token": 3}
)
DIGITS["cache_bytes"] = 0


def format_value(row: dict | None, sign: str = "") -> str:
    """Return "value [low, high]", rates in percent; of a difference with sign="+".

    An interval of few items says of how many.
    """
    if row is None:
        return ""
    scale, digits, unit = 1, DIGITS.get(row["metric"]), ""
    if digits is None:
        scale, digits, unit = 100, 1, " points" if sign else " %"
    numbers = [row[key] for key in ("value", "low", "high") if key in row]
    value, *ends = [f"{scale * number:{sign}z.{digits}f}" for number in numbers]
    if not ends:
        return f"{value}{unit}"
    n = row.get("parts", row["n"])
    few = f" (only {n})" if n < FEW else ""
    return f"{value}{unit} [{', '.join(ends)}]{few}"


class Change(NamedTuple):
    """What a stage did to one number."""

    stage: str  # with the name of its start
    what: str
    before: dict | None  # the result of its start
    after: dict


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [list(map(escape, cells)) for cells in (heads, *rows)]
    lines.insert(1, ["---"] * len(heads))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def escape(cell: str) -> str:
    """Return a text that stays in its cell: names of runs and of data hold what they like."""
    return " ".join(cell.split()).replace("|", "\\|")


def by_model(results: list[dict], measures: dict[str, dict]) -> str:
    """Return a row per measure and a column per model that has any of them.

    measures: heading -> fields. Trivial answers (one number always, the longer one) share a column.
    """
    measures = split_by_data(results, measures)
    shown = [row for row in results if any(matches(row, **own) for own in measures.values())]
    models = dict.fromkeys(row["model"] for row in shown)
    judged = {row["model"] for row in shown if "verifier_hash" in row}
    columns = [name for name in models if name in judged | {row["stage"] for row in shown}]
    rows = []
    for heading, wanted in measures.items():
        found = {row["model"]: row for row in shown if matches(row, **wanted)}  # the newest
        sizes = sorted({row["n"] for row in found.values()})
        n = "-".join(map(str, dict.fromkeys([sizes[0], sizes[-1]])))
        trivial = [f"{format_value(found[x])} ({x})" for x in found if x not in columns]
        values = [format_value(found.get(name)) for name in columns]
        rows.append([heading, n, "; ".join(trivial), *values])
    return table(["", "n", "trivial answer", *columns], rows) if rows else ""


def split_by_data(results: list[dict], measures: dict[str, dict]) -> dict[str, dict]:
    """Return the measures that have results, once for each data set, named where it is not one."""
    parts = {}
    for heading, wanted in measures.items():
        names = dict.fromkeys(row["data"] for row in results if matches(row, **wanted))
        for name in names:
            label = f"{heading}, {name}" if len(names) > 1 else heading
            parts[label] = {**wanted, "data": name}
    return parts


def streaming_table(results: list[dict]) -> str:
    """Return the losses and caches of streams by model, and by protocol from left to right."""
    metrics = ("loss_within_context", "loss_beyond_context", "cache_bytes")
    rows = [row for row in results if row["task"] == "streaming" and row["metric"] in metrics]
    protocols = list(dict.fromkeys(row["protocol"] for row in rows if row["metric"] in metrics[:2]))
    lines = []
    for model, metric in dict.fromkeys((row["model"], row["metric"]) for row in rows):
        found = [newest(rows, model=model, metric=metric, protocol=name) for name in protocols]
        lines.append([model, metric.replace("_", " "), *map(format_value, found)])
    return table(["model", "losses in nats/token", *protocols], lines)


def details(results: list[dict], task: str) -> str:
    """Return every number of a task, and the notes that belong to them."""
    rows = [row for row in results if row["task"] == task]
    several_splits = task == "text_perplexity" or len({row["split"] for row in rows}) > 1
    keys = dict.fromkeys((row["metric"], row["protocol"], row["split"]) for row in rows)
    measures = {}
    for metric, protocol, split in keys:
        words = dict.fromkeys((metric.replace("_", " "), protocol))
        heading = ", ".join([*words, split] if several_splits else words)
        measures[heading] = fields(task, metric, protocol) | {"split": split}
    return "\n\n".join([by_model(results, measures), *draws_notes(rows), *overlap_notes(rows)])


def draws_notes(rows: list[dict]) -> list[str]:
    """Say how much few-shot numbers depend on the draw of their examples."""
    ranges = {}  # protocol -> model -> lowest and highest
    for row in rows:
        draws = [100 * value for value in row.get("draws", [])]
        if len(draws) > 1:
            text = f"{row['model']} {min(draws):.1f}-{max(draws):.1f} %"
            ranges.setdefault(row["protocol"], {})[row["model"]] = text
    words = "lowest and highest of the draws of examples"
    return [f"{name}, {words}: {', '.join(texts.values())}" for name, texts in ranges.items()]


def overlap_notes(rows: list[dict]) -> list[str]:
    """Say how much of a text training may have seen."""
    shares = {}  # (split, form) -> share
    for row in rows:
        if row.get("overlap") is not None:
            form = "detokenised" if row["protocol"] in ("words", "bpb") else "as it stands"
            shares[row["split"], form] = row["overlap"]
    words = "of all runs of 13 tokens stand in the training shards"
    return [f"Of {a}, {b}, {100 * share:.2f} % {words}." for (a, b), share in shares.items()]


def paired_cell(before: dict | None, after: dict | None, folder: str, other: str = "") -> str:
    """Return after - before, bold where interval and p-value agree; "" where items differ.

    folder: of the items; other: of those of after, where they are elsewhere.
    """
    if before is None or after is None or before.get("data_hash") != after.get("data_hash"):
        return ""
    asked, again = before.get("settings") or {}, after.get("settings") or {}
    shared = (asked.keys() & again.keys()) - {"dtype"}
    if any(asked[key] != again[key] for key in shared):  # with the calculator, and without
        return ""
    if before.get("kept") != after.get("kept"):  # some did not fit a context, and not the same
        return ""
    old, new = items_of(folder, before), items_of(other or folder, after)
    if old is None or new is None:
        return ""
    try:
        delta = difference(old, new)
    except ValueError:
        return ""
    floor = f"< {math.ceil(1e3 * FLOOR) / 1e3}" if delta.p == FLOOR else f"= {delta.p:.3f}"
    value = format_value({"metric": after["metric"], **delta.as_json()}, "+")
    text = f"{value}, p {'< 0.001' if delta.p < 0.001 else floor}"
    is_real = delta.p < 0.05 and (delta.low > 0 or delta.high < 0)
    return f"**{text}**" if is_real else text


def starts(results: list[dict], stages: dict[str, dict]) -> dict[str, str | None]:
    """Return the stages that are not stale, and what each is compared with.

    That is the stage it was made from, or the one before it where that has no results.
    """
    names = list(dict.fromkeys(row["stage"] for row in results if not row.get("baseline")))
    found = {}
    for before, after in pairwise([None, *names]):
        start = stages[after]["start"]
        if not stages[after]["stale"]:
            found[after] = start if start in names else before
    return found


def brought_by(stage: str) -> dict[str, dict]:
    """Return the measures of BROUGHT; none of a stage that is not named there."""
    return {heading: MEASURES[heading] for heading in BROUGHT.get(stage, ())}


def changes(results: list[dict], stages: dict[str, dict]) -> list[Change]:
    """Return what each stage changed of what it is there for, in the order of the loop."""
    found = []
    for stage, start in starts(results, stages).items():
        name = f"{stage} from {start}" if start else stage
        for heading, wanted in split_by_data(results, brought_by(stage)).items():
            pair = [newest(results, model=model, **wanted) for model in (start, stage)]
            found.append(Change(name, heading, *pair))
    for label, rows, greedy in judged(results):
        pair = [newest(rows, metric="auc", protocol=how) for how in ("likelihood", "best_of")]
        found.append(Change("verifier", f"AUC, by likelihood and by verifier{label}", *pair))
        k = most_samples(rows)
        best = newest(rows, metric="exact_match", protocol=f"best_of@{k}")
        found.append(Change("verifier", f"problems, greedy and best of {k}{label}", greedy, best))
    return [change for change in found if change.after]


def judged(results: list[dict]) -> list[tuple[str, list[dict], dict | None]]:
    """Return whose samples a verifier chose among: words for it, its rows, its greedy result."""
    found = {}  # (judged model, data set) -> rows
    for row in results:
        if row["task"] == "rerank":
            found.setdefault((row["model"], row["data"]), []).append(row)
    parts = []
    for (model, data), rows in found.items():
        label = f": {model}, {data}" if len(found) > 1 else ""
        wanted = MEASURES["problems, exact match"] | {"data": data}
        parts.append((label, rows, newest(results, **wanted, model=rows[0]["stage"])))
    return parts


def most_samples(rows: list[dict]) -> int:
    return max(int(row["protocol"].partition("@")[2] or 0) for row in rows)


def changes_table(changes: list[Change], folder: str) -> str:
    lines = []
    for stage, what, before, after in changes:
        values = [format_value(row).partition(" [")[0] for row in (before, after)]
        delta = paired_cell(before, after, folder)
        lines.append([stage, what, *values, delta, str(after["n"])])
    return table(["stage", "what", "before", "after", "difference, paired", "n"], lines)


def gains_table(results: list[dict], folder: str, stages: dict[str, dict]) -> str:
    """Return what each stage changed against the one that it is compared with, in all measures."""
    pairs = [(before, after) for after, before in starts(results, stages).items() if before]
    names = {name for pair in pairs for name in pair}
    rows = []
    for heading, wanted in split_by_data(results, MEASURES).items():
        found = {name: newest(results, model=name, **wanted) for name in names}
        cells = [paired_cell(found[before], found[after], folder) for before, after in pairs]
        if any(cells):
            rows.append([heading, *cells])
    heads = [f"{after} - {before}" for before, after in pairs]
    return table(["", *heads], rows) if rows else ""


def compare(folders: list[str]) -> str:
    """Return every number that the first run shares with another, and the differences."""
    if len(set(map(os.path.realpath, folders))) < max(2, len(folders)):
        raise UserError(f"compare={','.join(folders)}: give two folders or more, each once")
    found = {folder: current(folder)[0] for folder in folders}
    for folder, results in found.items():
        if not results:
            raise UserError(f"{folder} holds no results: run eval.py --out_dir={folder} first")
    home, *others = folders
    lines = {row["task"]: [] for row in found[home]}  # of each task
    names = ("task", "model", "metric", "protocol", "data", "split")
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in found[home]):
        wanted = dict(zip(names, key, strict=True))
        first, *rest = (newest(results, **wanted) for results in found.values())
        if any(rest):
            values = [format_value(row) for row in (first, *rest)]
            pairs = zip(rest, others, strict=True)
            gaps = [paired_cell(first, row, home, folder) for row, folder in pairs]
            words = filter(None, dict.fromkeys(key[1:5]))
            lines[key[0]].append([", ".join(words), *values, *gaps])
    heads = ["", *folders, *(f"{other} - {home}" for other in others)]
    parts = [f"## {task}\n\n{table(heads, rows)}" for task, rows in lines.items() if rows]
    text = (
        f"# {home} beside {', '.join(others)}\n\nDifferences are paired, item by item, with 95 % "
        "intervals, bold where these exclude 0 and p < 0.05; none is given where data or settings "
        "differ."
    )
    return "\n\n".join([text, *(parts or ["They share no number."])]) + "\n"
