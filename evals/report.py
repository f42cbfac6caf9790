"""The report of a run: report.md and its plots, made from result files alone.

    python -m evals.report --out_dir=out/toy            # a second one goes into its own folder
    python -m evals.report --out_dir=out/toy --force    # replaces it; --no_overwrite keeps it

It reads results*.jsonl, items, metrics.jsonl and generations, and never a checkpoint.
"""

import os
import re
import time
from dataclasses import dataclass

import configurator
from configurator import UserError
from evals import plots, tables
from evals.results import RERANKERS, newest, read_results, run_folders
from evals.tables import format_value, table
from runtime.files import read_jsonl, read_log, write_atomic
from runtime.program import run

DETAILS = {  # task -> heading of the section with all of its numbers
    "problems": "Word problems, greedily: right answers and kinds of error",
    "sst2": "SST-2 by prompt",
    "dialogsum": "DialogSum",
    "text_perplexity": "Perplexity by protocol",
}
SEPARATION = {  # of right solutions from wrong ones: metric and protocol -> words
    "auc likelihood": "AUC of the likelihood",
    "auc best_of": "AUC of the verifier",
    "auc best_of_same_form": "AUC of the verifier among solutions that stop and have an answer",
    "auc form_alone": "AUC of form alone",
    "auc last_number_alone": "AUC of the verifier shown the final answer alone",
    "brier verifier": "Brier score of the verifier",
    "calibration_error verifier": "expected calibration error",
}
GAINS_NOTE = """\
Paired, item by item; bold where the interval excludes 0; p by McNemar's exact test where items \
are right or wrong, else by bootstrap. With many rows some will be bold by chance."""
RERANK_NOTE = """\
majority: the most common answer; likelihood: the solution that the model itself finds likeliest; \
weighted: votes weighted by the verifier; best_of: the verifier's first choice; oracle: solved \
when any sample is right, which no choice among them can beat."""
STREAMING_NOTE = """\
rolling: a cache of one training context, token by token; dense: every token sees all before it; \
recompute: the last training context from scratch for every token. As good as recompute means \
stable, not a longer memory: no key is older than the cache."""


@dataclass
class ReportConfig:
    """The report."""

    out_dir: str = "out/toy"  # folder of a pipeline, or of any runs
    force: bool = False  # replace an existing report
    no_overwrite: bool = False  # keep an existing report and say so
    n_samples: int = 4  # test problems shown with every stage's answer

    def __post_init__(self) -> None:
        configurator.require(self, {"[0, inf)": "n_samples"})


@dataclass
class Run:
    folder: str  # of the results
    target: str  # where report.md and its plots go
    results: list[dict]
    logs: dict[str, list[dict]]  # metrics.jsonl of every stage
    n_samples: int


def stages(run: Run) -> list[str]:
    parts = ["## What each stage brought", tables.by_model(run.results, tables.MEASURES)]
    gains = tables.gains_table(run.results, run.folder)
    return [*parts, "## Which differences are real", gains, GAINS_NOTE] if gains else parts


def verifier(run: Run) -> list[str]:
    """Show what choosing among samples brings, and how far the verifier's scores can be trusted."""
    rows = [row for row in run.results if row["task"] == "rerank"]
    if not rows:
        return []
    greedy = newest(run.results, task="problems", model=rows[-1]["model"], metric="exact_match")
    parts = ["## The verifier", rerank_table(run.folder, rows, greedy), RERANK_NOTE]
    if any("@" in row["protocol"] for row in rows):
        parts.append(plots.plot_rerank(rows, run.target, greedy))
    return [*parts, plots.plot_calibration(rows, run.target)]


def rerank_table(folder: str, rows: list[dict], greedy: dict | None) -> str:
    """Return the ways to choose among most samples, then how scores separate right from wrong."""
    k = max(int(row["protocol"].partition("@")[2] or 0) for row in rows)
    lines = [["greedy, exact match", format_value(greedy), ""]]
    for how in RERANKERS:
        row = newest(rows, metric="exact_match", protocol=f"{how}@{k}")
        against = tables.paired_cell(greedy, row, folder)
        lines.append([f"{how}, samples = {k}, exact match", format_value(row), against])
    for key, words in SEPARATION.items():
        metric, protocol = key.split()
        row = newest(rows, metric=metric, protocol=protocol)
        if row:
            lines.append([f"{words}, n = {row['n']} solutions", format_value(row), ""])
    return table(["", "", "against greedy, paired"], [line for line in lines if line[1]])


def published(run: Run) -> list[str]:
    """Show the verifier's judgement of solutions that others have published."""
    found = {}  # words -> newest row
    for row in run.results:
        if row["task"] == "published" and row["metric"] in ("auc", "exact_match"):
            found[f"{row['metric'].replace('_', ' ')}, {row['protocol']}"] = row
    lines = [[words, format_value(row), str(row["n"])] for words, row in found.items()]
    heading = "## Published solutions of GSM8K's test problems, judged"
    return [heading, table(["", "", "n"], lines)] if lines else []


def details(run: Run) -> list[str]:
    parts = []
    for task, title in DETAILS.items():
        if newest(run.results, task=task):
            parts += [f"## {title}", tables.details(run.results, task)]
            if task == "problems":
                parts.append(mistakes(run.results))
    return parts


def mistakes(results: list[dict]) -> str:
    """Return examples of each kind of error of the last stage, with the right answers."""
    found = [row for row in results if row["task"] == "problems" and row.get("examples")]
    lines = []
    for row in [row for row in found if row["stage"] == found[-1]["stage"]]:
        kind = row["metric"].replace("_", " ")
        for example in row["examples"][:2]:
            asked, said = shorten(example["question"]), shorten(example["text"])
            line = f"- {kind}: `{asked}` said `{said}`, right is {example['answer']}"
            if example["false_equation"]:
                line += f"; false: `{example['false_equation']}`"
            lines.append(line)
    return "\n".join(lines)


def sinks(run: Run) -> list[str]:
    parts = []
    if newest(run.results, task="streaming"):
        parts += ["## Streams of 16 training contexts", tables.streaming_table(run.results)]
        parts += [STREAMING_NOTE, plots.plot_streaming(run.results, run.target)]
    rows = [row for row in run.results if row["task"] == "attention"]
    shown = sorted({(row["model"], int(row["protocol"].split()[1])) for row in rows})
    if shown:
        parts.append("## Attention maps")
    return parts + [plots.plot_attention(rows, run.folder, run.target, *which) for which in shown]


def curves(run: Run) -> list[str]:
    """Show losses against steps, and what tuning gains and forgets."""
    points = {}
    for model in dict.fromkeys(row["model"] for row in run.results):
        answers = newest(run.results, model=model, task="chats", metric="response_loss")
        text = newest(run.results, model=model, task="text_perplexity", metric="perplexity")
        if answers and text and model != "untrained":
            points[model] = (answers, text)
    images = [plots.plot_tradeoff(points, run.target)]
    for name, log in run.logs.items():
        images += [plots.plot_loss(log, run.target, name), plots.plot_dpo(log, run.target, name)]
    return ["## Curves", *images] if any(images) else []


def samples(run: Run) -> list[str]:
    """Show the same test problems answered greedily by every stage, from stored generations."""
    folder = os.path.join(run.folder, "generations")
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    answers = {}  # stage -> one row per problem
    for name in names:
        rows = read_jsonl(os.path.join(folder, name))
        if len(rows[0]["solutions"]) == 1:
            answers[name.rsplit("_", 2)[0]] = rows
    shown = [name for name in dict.fromkeys(row["model"] for row in run.results) if name in answers]
    problems = list(zip(*(answers[stage] for stage in shown), strict=False))
    blocks = []
    for rows in problems[: run.n_samples]:
        lines = [f"**{rows[0]['question']}** (right: `{shorten(rows[0]['answer'])}`)"]
        for stage, row in zip(shown, rows, strict=True):
            lines.append(f"- **{stage}**: `{shorten(row['solutions'][0]['text'])}`")
        blocks.append("\n".join(lines))
    return ["## The same problems at every stage", *blocks] if blocks else []


def shorten(text: str, width: int = 100) -> str:
    """Return text as one short line of printable ASCII without backquotes."""
    text = re.sub(r"[^ -~]+", " ", text.replace("\n", "; ").replace("`", "'"))
    return text[:width] + " ..." * (len(text) > width)


def cost(run: Run) -> list[str]:
    lines, seconds = [], 0.0
    for name, log in run.logs.items():
        steps = [row for row in log if "tokens" in row]
        if steps:
            last = steps[-1]
            n_steps = last["step"] + 1
            took = last["step_ms"] * n_steps / 1e3
            seconds += took
            amounts = [f"{n_steps}", f"{last['tokens'] / 1e6:.2f}M", f"{last['flops']:.2e}"]
            lines.append([name, *amounts, f"{last['tokens_per_s']:,.0f}", f"{took:.0f}"])
    lines.append(["all", "", "", "", "", f"{seconds:.0f}"])
    costs = table(["run", "steps", "tokens", "FLOPs", "tokens/s", "training s"], lines)
    hashes = {row["stage"]: row["weights_hash"] for row in run.results}
    for row in run.results:
        if "verifier_hash" in row:
            hashes["verifier"] = row["verifier_hash"]
    weights = table(["stage", "sha256 of the weights"], [list(pair) for pair in hashes.items()])
    return ["## Cost", costs, "## Weights", weights]


# Each returns Markdown blocks and names of images, or nothing
SECTIONS = (stages, verifier, published, details, sinks, curves, samples, cost)


def write_report(folder: str, target: str, n_samples: int) -> str:
    """Write the report of a folder to another, or the same, and return the path of report.md."""
    results = read_results(folder)
    if not results:
        raise UserError(f"{folder} holds no results: run eval.py --out_dir={folder} first")
    names = run_folders(folder, "metrics.jsonl")
    logs = {name: read_log(os.path.join(folder, name, "metrics.jsonl")) for name in names}
    run = Run(folder, target, results, logs, n_samples)
    last = results[-1]
    dirty = " (with uncommitted changes)" if last["dirty"] else ""
    parts = [
        f"# Report of {folder}",
        f"Commit {last['commit']}{dirty}, torch {last['torch']}, {last['device']}, {last['date']}. "
        "Every number comes from results*.jsonl, items/ and metrics.jsonl in this folder; "
        "brackets are 95 % intervals.",
    ]
    for section in SECTIONS:
        parts += [part for part in section(run) if part]
    parts = [f"![]({part})" if part.endswith(".png") else part for part in parts]
    text = "\n\n".join(parts) + "\n"
    path = os.path.join(target, "report.md")
    write_atomic(path, lambda f: f.write(text.encode()))
    return path


def main(argv: list[str]) -> int:
    cfg = configurator.load(argv, ReportConfig)
    path = os.path.join(cfg.out_dir, "report.md")
    exists = os.path.exists(path)
    if exists and cfg.no_overwrite:
        print(f"report: {path} exists and is kept (--force replaces it)")
        return 0
    target = cfg.out_dir
    if exists and not cfg.force:
        target = os.path.join(cfg.out_dir, time.strftime("report_%Y%m%d_%H%M%S"))
    print(f"report: {write_report(cfg.out_dir, target, cfg.n_samples)}")
    return 0


if __name__ == "__main__":
    run(main)
