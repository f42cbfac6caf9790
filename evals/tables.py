"""The tables of a report, as Markdown, and which differences in them are real.

Each function takes rows of result files.
"""

from itertools import pairwise
from typing import NamedTuple

from configurator import UserError
from evals.results import items_of, newest, read_results
from evals.stats import difference


class Measure(NamedTuple):
    """A kind of result and its heading in a table."""

    heading: str
    task: str
    metric: str
    protocol: str
    split: str | None = None  # None = any

    def fields(self) -> dict[str, str]:
        """Return the fields by which `newest` finds its results."""
        fields = {"task": self.task, "metric": self.metric, "protocol": self.protocol}
        return fields | {"split": self.split} if self.split else fields


MEASURES = (  # of the first tables
    Measure("val loss (nats/token)", "val_loss", "val_loss", "windows"),
    Measure("problems, exact match", "problems", "exact_match", "greedy"),
    Measure("stops by itself", "problems", "stop_rate", "greedy"),
    Measure("prefers chosen, log-prob", "preference", "accuracy", "logprob"),
    Measure("prefers chosen, reward", "preference", "accuracy", "reward"),
    Measure("prefers chosen, length", "preference", "accuracy", "length"),
    Measure("tales on topic and kind", "tales", "on_topic_and_kind", "sampled"),
    Measure("response loss (nats/token)", "chats", "response_loss", "teacher"),
    Measure("answers stop", "chats", "stop_rate", "greedy"),
    Measure("repeated 4-grams", "chats", "repetition", "greedy"),
    Measure("2-grams in no other answer", "chats", "distinct_2", "greedy"),
    Measure("SST-2, zero-shot", "sst2", "accuracy", "zero-shot"),
    Measure("DialogSum, ROUGE-L", "dialogsum", "rougeL", "greedy"),
)
LOSSES = ("val_loss", "response_loss", "bits_per_byte")
SCORES = ("auc", "brier", "calibration_error", "loss_within_context", "loss_beyond_context")
# Digits behind the point; a metric that has none here is a rate.
DIGITS = dict.fromkeys(LOSSES, 4) | dict.fromkeys(SCORES, 3) | {"perplexity": 2, "length": 1}


def format_number(x: float, metric: str, sign: str = "") -> str:
    """Return a number with the digits of its metric, a rate in percent."""
    if metric in DIGITS:
        return f"{x:{sign}.{DIGITS[metric]}f}"
    return f"{100 * x:{sign}.1f}"


def format_value(row: dict | None, sign: str = "") -> str:
    """Return "value [low, high]" of a result, or with sign="+" of a difference."""
    if row is None:
        return ""
    metric = row["metric"]
    text = format_number(row["value"], metric, sign)
    if metric not in DIGITS:
        text += " points" if sign else " %"
    if "low" not in row:
        return text
    low, high = (format_number(row[end], metric, sign) for end in ("low", "high"))
    return f"{text} [{low}, {high}]"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def models_of(results: list[dict]) -> list[str]:
    """Return the names of the models in the order of evaluation."""
    return list(dict.fromkeys(row["model"] for row in results))


def by_model(results: list[dict], measures: list[Measure]) -> str:
    """Return a row per measure and a column per model that has any of them.

    Trivial answers (always the same number, the longer one) share one column.
    """
    measures = [measure for measure in measures if newest(results, **measure.fields())]
    wanted = [measure.fields() for measure in measures]
    stages = {row["stage"] for row in results}
    columns, trivial = [], []
    for model in models_of(results):
        if any(newest(results, model=model, **fields) for fields in wanted):
            (columns if model in stages else trivial).append(model)
    rows = []
    for measure, fields in zip(measures, wanted, strict=True):
        n = newest(results, **fields)["n"]
        found = {model: newest(results, model=model, **fields) for model in [*trivial, *columns]}
        answers = [f"{format_value(found[model])} ({model})" for model in trivial if found[model]]
        values = [format_value(found[model]) for model in columns]
        rows.append([measure.heading, str(n), "; ".join(answers), *values])
    return table(["", "n", "trivial answer", *columns], rows)


def streaming_table(results: list[dict]) -> str:
    """Return the losses of streams by model, and by protocol from left to right."""
    metrics = ("loss_within_context", "loss_beyond_context")
    rows = [row for row in results if row["task"] == "streaming" and row["metric"] in metrics]
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    lines = []
    for model, metric in dict.fromkeys((row["model"], row["metric"]) for row in rows):
        found = [newest(rows, model=model, metric=metric, protocol=name) for name in protocols]
        lines.append([model, metric.replace("_", " "), *map(format_value, found)])
    return table(["model", "nats/token", *protocols], lines)


def details(results: list[dict], task: str) -> str:
    """Return every number of a task, and the notes that belong to them."""
    rows = [row for row in results if row["task"] == task]
    several_splits = task == "text_perplexity" or len({row["split"] for row in rows}) > 1
    keys = dict.fromkeys((row["metric"], row["protocol"], row["split"]) for row in rows)
    measures = []
    for metric, protocol, split in keys:
        words = list(dict.fromkeys((metric.replace("_", " "), protocol)))
        heading = ", ".join([*words, split] if several_splits else words)
        measures.append(Measure(heading, task, metric, protocol, split))
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


# --------------------------------------------------------------------------------------------------
# Which differences are real


class Source(NamedTuple):
    """A result, or None, and the folder that holds its items."""

    folder: str
    row: dict | None


def paired_cell(before: Source, after: Source) -> str:
    """Return after - before, bold where its interval excludes 0; "" where items differ."""
    if before.row is None or after.row is None:
        return ""
    old, new = items_of(*before), items_of(*after)
    same_data = before.row.get("data_hash") == after.row.get("data_hash")
    if old is None or new is None or not same_data:
        return ""
    try:
        delta = difference(old, new)
    except ValueError:
        return ""
    p = "< 0.001" if delta.p < 0.001 else f"= {delta.p:.3f}"
    value = format_value({"metric": after.row["metric"], **delta.as_json()}, "+")
    text = f"{value}, p {p}"
    return f"**{text}**" if delta.low > 0 or delta.high < 0 else text


def gains_table(results: list[dict], folder: str) -> str:
    """Return each stage against the one before it, measure by measure."""
    stages = list(dict.fromkeys(row["stage"] for row in results))
    rows = []
    for measure in MEASURES:
        found = [newest(results, model=stage, **measure.fields()) for stage in stages]
        pairs = pairwise(Source(folder, row) for row in found)
        cells = [paired_cell(before, after) for before, after in pairs]
        if any(cells):
            rows.append([measure.heading, *cells])
    heads = [f"{after} - {before}" for before, after in pairwise(stages)]
    return table(["", *heads], rows) if rows else ""


def compare(folders: list[str]) -> str:
    """Return every number that the first of some runs shares with another, and the differences.

    Raises UserError where a run has no results.
    """
    found = {folder: read_results(folder) for folder in folders}
    for folder, results in found.items():
        if not results:
            raise UserError(f"{folder} holds no results: run eval.py --out_dir={folder} first")
    first, *others = folders
    parts = [
        f"# {first} beside {', '.join(others)}",
        "Differences are paired, item by item, with 95 % intervals, in bold where these exclude "
        "0; none is given where the data differ.",
    ]
    heads = ["", *folders, *(f"{other} - {first}" for other in others)]
    for task in dict.fromkeys(row["task"] for row in found[first]):
        rows = compared_rows(found, task)
        if rows:
            parts += [f"## {task}", table(heads, rows)]
    return "\n\n".join(parts) + "\n"


def compared_rows(found: dict[str, list[dict]], task: str) -> list[list[str]]:
    """Return the lines of one task: what is measured, its values, its differences."""
    names = ("model", "metric", "protocol", "split")
    results = next(iter(found.values()))
    keys = dict.fromkeys(tuple(row[key] for key in names) for row in results if row["task"] == task)
    lines = []
    for key in keys:
        wanted = {"task": task, **dict(zip(names, key, strict=True))}
        first, *others = (Source(folder, newest(rows, **wanted)) for folder, rows in found.items())
        if any(other.row for other in others):
            values = [format_value(side.row) for side in (first, *others)]
            heading = ", ".join(dict.fromkeys(key[:3]))
            lines.append([heading, *values, *(paired_cell(first, other) for other in others)])
    return lines
