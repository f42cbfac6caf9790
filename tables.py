"""The tables of a report, and which differences in them are real: each function takes rows of result files and returns Markdown."""

import json
import os

from configurator import UserError
from eval import item_key, read_results
from stats import difference

MEASURES = [  # of the first tables: heading, task, metric, protocol
    ("val loss (nats/token)", "val_loss", "val_loss", "windows"),
    ("problems, exact match", "problems", "exact_match", "greedy"),
    ("stops by itself", "problems", "stop_rate", "greedy"),
    ("prefers chosen, log-prob", "preference", "accuracy", "logprob"),
    ("prefers chosen, reward", "preference", "accuracy", "reward"),
    ("prefers chosen, length", "preference", "accuracy", "length"),
    ("tales on topic and kind", "tales", "on_topic_and_kind", "sampled"),
    ("response loss (nats/token)", "chats", "response_loss", "teacher"),
    ("answers stop", "chats", "stop_rate", "greedy"),
    ("repeated 4-grams", "chats", "repetition", "greedy"),
    ("2-grams in no other answer", "chats", "distinct_2", "greedy"),
    ("SST-2, zero-shot", "sst2", "accuracy", "zero-shot"),
    ("DialogSum, ROUGE-L", "dialogsum", "rougeL", "greedy"),
]
DIGITS = {
    "val_loss": 4,
    "response_loss": 4,
    "bits_per_byte": 4,
    "perplexity": 2,
    "auc": 3,
    "brier": 3,
    "calibration_error": 3,
    "length": 1,
    "loss_within_context": 3,
    "loss_beyond_context": 3,
}  # the rest are rates


def show(row: dict | None, sign: str = "") -> str:
    """value [low, high] of a result; a rate as percent."""
    if row is None:
        return ""
    digits = DIGITS.get(row["metric"])
    number = lambda x: f"{100 * x:{sign}.1f}" if digits is None else f"{x:{sign}.{digits}f}"
    interval = f" [{number(row['low'])}, {number(row['high'])}]" if "low" in row else ""
    unit = "" if digits is not None else " points" if sign else " %"
    return number(row["value"]) + unit + interval


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *rows]
    )


def find(results: list[dict], **wanted) -> dict | None:
    """The newest result with these fields."""
    return next(
        (row for row in reversed(results) if all(row.get(k) == v for k, v in wanted.items())), None
    )


def models_of(results: list[dict]) -> list[str]:
    """Names of the models in the order of evaluation."""
    return list(dict.fromkeys(row["model"] for row in results))


def by_model(results: list[dict], measures) -> str:
    """One row per (heading, task, metric, protocol, split or None), one column per model that has any of them; trivial answers share a column."""
    stages = {row["stage"] for row in results}
    wanted = [
        (head, {"task": t, "metric": m, "protocol": p, **({"split": s} if s else {})})
        for head, t, m, p, s in measures
    ]
    wanted = [(head, fields) for head, fields in wanted if find(results, **fields)]
    models = [
        model
        for model in models_of(results)
        if any(find(results, model=model, **fields) for _, fields in wanted)
    ]
    columns = [model for model in models if model in stages]
    rows = []
    for head, fields in wanted:
        trivial = [
            (model, find(results, model=model, **fields)) for model in models if model not in stages
        ]
        rows.append(
            [
                head,
                str(find(results, **fields)["n"]),
                "; ".join(f"{show(row)} ({model})" for model, row in trivial if row),
                *(show(find(results, model=model, **fields)) for model in columns),
            ]
        )
    return table(["", "n", "trivial answer", *columns], rows)


def streaming_table(results: list[dict]) -> str:
    rows = [
        r
        for r in results
        if r["task"] == "streaming"
        and r["metric"] in ("loss_within_context", "loss_beyond_context")
    ]
    protocols, keys = (
        list(dict.fromkeys(values))
        for values in ((r["protocol"] for r in rows), ((r["model"], r["metric"]) for r in rows))
    )
    return table(
        ["model", "nats/token", *protocols],
        [
            [
                model,
                metric.replace("_", " "),
                *(show(find(rows, model=model, metric=metric, protocol=p)) for p in protocols),
            ]
            for model, metric in keys
        ],
    )


def details(results: list[dict], task: str) -> str:
    """Every number of a task."""
    keys = dict.fromkeys(
        (r["metric"], r["protocol"], r["split"]) for r in results if r["task"] == task
    )
    several = len({split for *_, split in keys}) > 1 or task == "text_perplexity"
    heads = {
        key: ", ".join(
            [*(dict.fromkeys((key[0].replace("_", " "), key[1]))), *([key[2]] if several else [])]
        )
        for key in keys
    }
    text = by_model(results, [(heads[key], task, *key) for key in keys])
    drawn = {
        (r["protocol"], r["model"]): r["draws"]
        for r in results
        if r["task"] == task and len(r.get("draws", [])) > 1
    }
    spread = lambda protocol: [
        f"{model} {100 * min(draws):.1f}-{100 * max(draws):.1f} %"
        for (p, model), draws in drawn.items()
        if p == protocol
    ]
    notes = [
        f"{protocol}, lowest and highest of the draws of examples: {', '.join(spread(protocol))}"
        for protocol in dict.fromkeys(p for p, _ in drawn)
    ]
    form = lambda r: "detokenised" if r["protocol"] in ("words", "bpb") else "as it stands"
    seen = {
        (r["split"], form(r)): r["overlap"]
        for r in results
        if r["task"] == task and r.get("overlap") is not None
    }
    notes += [
        f"Of {split}, {how}, {100 * share:.2f} % of all runs of 13 tokens stand in the training shards."
        for (split, how), share in seen.items()
    ]
    return "\n\n".join([text, *notes])


# ---------------------------------------------------------------------------------------------------------------------
# Which differences are real


def items_of(folder: str, row: dict) -> dict | None:
    try:
        with open(os.path.join(folder, row["items"])) as f:
            return json.load(f).get(item_key(row))
    except (OSError, KeyError, ValueError):
        return None


def gain(before: tuple[str, dict], after: tuple[str, dict]) -> str:
    """The paired difference of two (folder, row), in bold where its interval excludes 0; "" where the two are not of the same items."""
    items = [items_of(*side) for side in (before, after)]
    if None in items or before[1].get("data_hash") != after[1].get("data_hash"):
        return ""
    try:
        delta = difference(*items)
    except ValueError:
        return ""
    text = f"{show({'metric': after[1]['metric'], **delta}, '+')}, p {'< 0.001' if delta['p'] < 0.001 else '= %.3f' % delta['p']}"
    return f"**{text}**" if delta["low"] > 0 or delta["high"] < 0 else text


def gains(results: list[dict], folder: str) -> str:
    """Each stage against the one before it, measure by measure."""
    stages = list(dict.fromkeys(row["stage"] for row in results))
    steps, rows = list(zip(stages, stages[1:])), []
    for head, t, m, p in MEASURES:
        pairs = [
            [find(results, model=name, task=t, metric=m, protocol=p) for name in step]
            for step in steps
        ]
        cells = [gain((folder, a), (folder, b)) if a and b else "" for a, b in pairs]
        rows += [[head, *cells]] if any(cells) else []
    return table(["", *(f"{b} - {a}" for a, b in steps)], rows) if rows else ""


def compare(folders: list[str]) -> str:
    """Every number that the first of some runs shares with another, with their paired difference. Raises UserError where a run has no results."""
    found = {folder: read_results(folder) for folder in folders}
    for folder, results in found.items():
        if not results:
            raise UserError(f"{folder} holds no results: run eval.py --out_dir={folder} first")
    first, *others = folders
    keys = list(
        dict.fromkeys(
            (r["task"], r["model"], r["metric"], r["protocol"], r["split"]) for r in found[first]
        )
    )
    parts = [
        f"# {first} beside {', '.join(others)}",
        "Differences are paired, item by item, with 95 % intervals, in bold where these exclude 0; none is given where the data differ.",
    ]
    for task in dict.fromkeys(key[0] for key in keys):
        rows = []
        for key in (key for key in keys if key[0] == task):
            sides = {
                folder: find(
                    results, **dict(zip(("task", "model", "metric", "protocol", "split"), key))
                )
                for folder, results in found.items()
            }
            if any(sides[other] for other in others):
                rows.append(
                    [
                        ", ".join(dict.fromkeys(key[1:4])),
                        *map(show, sides.values()),
                        *(
                            gain((first, sides[first]), (other, sides[other]))
                            if sides[other]
                            else ""
                            for other in others
                        ),
                    ]
                )
        parts += (
            [f"## {task}", table(["", *folders, *(f"{other} - {first}" for other in others)], rows)]
            if rows
            else []
        )
    return "\n\n".join(parts) + "\n"
