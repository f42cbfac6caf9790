"""The report of a run: report.md and its plots, made from result files alone.

    python -m evals.report --out_dir=out/toy            # a second one goes into its own folder
    python -m evals.report --out_dir=out/toy --force    # replaces it; --no_overwrite keeps it

It reads results*.jsonl, stages.json, items, metrics.jsonl and generations, and never a checkpoint.
Without results it shows the curves and the cost of training alone.
"""

import glob
import os
import time
from dataclasses import dataclass

import configurator
from configurator import UserError
from evals import plots, tables
from evals.results import RERANKERS, current, matches, newest, run_folders
from evals.tables import format_value, table
from runtime.files import digest_of_files, read_json, write_atomic
from runtime.logs import read_log, read_sealed
from runtime.program import run

SOURCES = "results*.jsonl stages.json metrics.jsonl */metrics.jsonl"
DETAILS = {  # task -> heading of the section with all of its numbers
    "published": "Published solutions of GSM8K's test problems, judged",
    "problems": "Word problems, greedily: right answers and kinds of error",
    "few_shot": "Word problems after five solved ones",
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
Paired, item by item; bold where the interval excludes 0 and p < 0.05; p by McNemar's exact test \
where items are right or wrong, else by bootstrap, which has a floor. With many rows some will be \
bold by chance."""
RERANK_NOTE = """\
majority: the most common answer; likelihood: the solution that the model itself finds likeliest; \
weighted: votes weighted by the verifier; best_of: the verifier's first choice; oracle: solved \
when any sample is right, which no choice among them can beat."""
SCORES_NOTE = """\
auc: how often a right solution scores higher than a wrong one; best_of: by the verifier."""
COST_NOTE = """\
Seconds in all: of a training with what it samples, validates and saves, or of the tasks of an \
evaluation; starting the programs and preparing data are not in them."""
STREAMING_NOTE = """\
rolling: a cache of one training context, token by token; kept: the same, and the first four \
tokens stay; dense: every token sees all before it; recompute: the last training context from \
scratch for every token. As good as recompute means stable, not a longer memory: no key is older \
than the cache. @512: with 512 tokens in place of the training context."""


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
    results: list[dict]  # of the weights that the stages have now
    stages: dict[str, dict]  # their weights, and where these come from
    logs: dict[str, list[dict]]  # metrics.jsonl of every stage
    states: dict[str, dict]  # state.json of every stage
    n_samples: int


def heading(run: Run) -> list[str]:
    """Say what was measured, by which code, and which stages are out of date."""
    last = max(run.results or run.states.values(), key=lambda row: row.get("date", ""))
    dirty = " (with uncommitted changes)" if last.get("dirty") else ""
    origin = f"Commit {last.get('commit')}{dirty}, torch {last.get('torch')}, {last.get('device')}"
    told = f". There are no results: run eval.py --out_dir={run.folder}."
    if run.results:
        source = "Every number comes from results*.jsonl, items/ and metrics.jsonl in this folder"
        told = f", {last['date']}. {source}; brackets are 95 % intervals."
    parts = [f"# Report of {shorten(run.folder)}", f"{origin}{told}"]
    again = "make it again with speedrun.py, or with align.py --force"
    for name, stage in run.stages.items():
        if stage["stale"]:
            parts.append(f"**{name} is stale**: {stage['stale']}; {again}.")
        if stage["outdated"]:
            parts.append(f"**{name} was trained again**: run eval.py, its results are left out.")
    return parts


def stages(run: Run) -> list[str]:
    if not run.results:
        return []
    parts = ["## What each stage brought", tables.by_model(run.results, tables.MEASURES)]
    gains = tables.gains_table(run.results, run.folder, run.stages)
    return [*parts, "## Which differences are real", gains, GAINS_NOTE] if gains else parts


def verifier(run: Run) -> list[str]:
    """Show what choosing among samples brings, and whether probabilities are what they say."""
    found = {}  # (judged model, data set) -> rows
    for row in run.results:
        if row["task"] == "rerank":
            found.setdefault((row["model"], row["data"]), []).append(row)
    parts = []
    for (model, data), rows in found.items():
        label = f": {model}, {data}" if len(found) > 1 else ""
        wanted = {"task": "problems", "metric": "exact_match", "data": data}
        greedy = newest(run.results, **wanted, model=rows[0]["stage"])
        parts += [f"## The verifier{shorten(label)}", rerank_table(run.folder, rows, greedy)]
        parts += [RERANK_NOTE, plots.plot_rerank(rows, run.target, greedy, label)]
        parts.append(plots.plot_calibration(rows, run.target, label))
    return parts


def rerank_table(folder: str, rows: list[dict], greedy: dict | None) -> str:
    """Return the ways to choose among most samples, then how scores separate right from wrong."""
    k = max(int(row["protocol"].partition("@")[2] or 0) for row in rows)
    lines = [["greedy, exact match", format_value(greedy), "", str(greedy["n"])]] if greedy else []
    for how in RERANKERS:
        row = newest(rows, metric="exact_match", protocol=f"{how}@{k}")
        against = tables.paired_cell(greedy, row, folder)
        if row:
            words = f"{how}, samples = {k}, exact match"
            lines.append([words, format_value(row), against, str(row["n"])])
    for key, words in SEPARATION.items():
        metric, protocol = key.split()
        row = newest(rows, metric=metric, protocol=protocol)
        if row:
            lines.append([words, format_value(row), "", f"{row['n']} solutions"])
    return table(["", "", "against greedy, paired", "n"], lines)


def details(run: Run) -> list[str]:
    rows = [row for row in run.results if "@" not in row["protocol"]]  # a choice, see verifier()
    rows = [row for row in rows if row["metric"] != "calibration"]  # tenths, in its plot
    parts = []
    for task, title in DETAILS.items():
        if newest(rows, task=task):
            parts += [f"## {title}", tables.details(rows, task)]
            parts += [SCORES_NOTE] if task == "published" else []
            parts += [mistakes(run.results)] if task == "problems" else []
    return parts


def mistakes(results: list[dict]) -> str:
    """Return examples of each kind of error of the last stage, with the right answers."""
    found = [row for row in results if row["task"] == "problems" and row.get("examples")]
    same = {key: found[-1][key] for key in ("stage", "data")} if found else {}
    lines = []
    for row in {row["metric"]: row for row in found if matches(row, **same)}.values():
        kind = row["metric"].replace("_", " ")
        for example in row["examples"][:2]:
            asked, said = shorten(example["question"]), shorten(example["text"])
            line = f"- {kind}: `{asked}` said `{said}`, right is {shorten(str(example['answer']))}"
            if example["false_equation"]:
                line += f"; false: `{shorten(example['false_equation'])}`"
            lines.append(line)
    return "\n".join(lines)


def sinks(run: Run) -> list[str]:
    parts = []
    if newest(run.results, task="streaming"):
        parts += ["## Streams of 16 times the cache", tables.streaming_table(run.results)]
        parts += [STREAMING_NOTE, plots.plot_streaming(run.results, run.target)]
    rows = [row for row in run.results if row["task"] == "attention"]
    shown = sorted({(row["model"], int(row["protocol"].split()[1])) for row in rows})
    if shown:
        parts.append("## Attention maps")
    return parts + [plots.plot_attention(rows, run.folder, run.target, *which) for which in shown]


def curves(run: Run) -> list[str]:
    """Show losses against steps, and what tuning gains and forgets."""
    measures = {"task": "text_perplexity", "metric": "perplexity"}
    last = newest(run.results, **measures) or {}
    measures |= {key: last.get(key) for key in ("split", "protocol")}  # of one text
    points = {}
    for model in dict.fromkeys(row["model"] for row in run.results):
        answers = newest(run.results, model=model, task="chats", metric="response_loss")
        text = newest(run.results, model=model, **measures)
        if answers and text and model != "untrained":
            points[model] = (answers, text)
    images = [plots.plot_tradeoff(points, run.target)]
    for name, log in run.logs.items():
        kinds = (plots.plot_loss, plots.plot_dpo, plots.plot_rl)
        images += [plot(log, run.target, name) for plot in kinds]
    return ["## Curves", *images] if any(images) else []


def samples(run: Run) -> list[str]:
    """Show the same test problems answered greedily by every stage, from stored generations."""
    last = newest(run.results, task="problems", metric="exact_match") or {}
    answers = {}  # stage -> question -> row of its file
    for name in run.stages:
        wanted = {"task": "problems", "metric": "exact_match", "model": name}
        row = newest(run.results, **wanted, data=last.get("data"))
        rows = generations(run.folder, row) if row else []
        if rows:
            answers[name] = {own["question"]: own for own in rows}
    first = next(iter(answers.values()), {})
    shared = [asked for asked in first if all(asked in own for own in answers.values())]
    blocks = []
    for asked in shared[: run.n_samples]:
        lines = [f"**`{shorten(asked, 400)}`** (right: `{shorten(first[asked]['answer'])}`)"]
        for stage, own in answers.items():
            lines.append(f"- **{stage}**: `{shorten(own[asked]['solutions'][0]['text'])}`")
        blocks.append("\n".join(lines))
    return ["## The same problems at every stage", *blocks] if blocks else []


def generations(folder: str, row: dict) -> list[dict]:
    """Return the greedy answers of the weights that a result is of; [] where they are not kept."""
    name = f"{glob.escape(row['stage'])}_{row['weights_hash']}_*.jsonl"
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "generations", name)))
    found = [rows for rows in map(read_sealed, paths) if rows and len(rows[0]["solutions"]) == 1]
    return min(found, key=lambda rows: abs(len(rows) - row["n"]), default=[])


def shorten(text: str, width: int = 100) -> str:
    """Return text as one short line of printable characters without backquotes."""
    text = text.replace("\n", "; ").replace("`", "'")
    text = "".join(c if c.isprintable() else " " for c in text)
    return text[:width] + " ..." * (len(text) > width)


def cost(run: Run) -> list[str]:
    """Show what training took, step by step and in all, and what the evaluation took."""
    lines, total = [], 0.0
    for name, log in run.logs.items():
        last = next((row for row in reversed(log) if "tokens" in row), None)
        if last:
            n_steps = last["step"] + 1
            took = last["step_ms"] * n_steps / 1e3
            # A run that went on after a stop knows the seconds of its last part alone.
            state = run.states[name]
            whole = max(took, state.get("process_seconds", state.get("seconds", 0)))
            total += whole
            amounts = [f"{n_steps}", f"{last['tokens'] / 1e6:.2f}M", f"{last['flops']:.2e}"]
            amounts += [f"{last['tokens_per_s']:,.0f}", f"{took:.0f}", f"{whole:.0f}"]
            lines.append([name, *amounts])
    calls = {(row.get("items"), row["date"]): row["seconds"] for row in run.results}
    evaluation = sum(calls.values())
    lines.append(["evaluation", *[""] * 5, f"{evaluation:.0f}"])
    lines.append(["all", *[""] * 5, f"{total + evaluation:.0f}"])
    heads = ["run", "steps", "tokens", "FLOPs", "tokens/s", "seconds of steps", "seconds in all"]
    parts = ["## Cost", table(heads, lines), COST_NOTE]
    hashes = [[name, stage["weights_hash"]] for name, stage in run.stages.items()]
    weights = table(["stage", "sha256 of the weights"], hashes)
    return [*parts, "## Weights", weights] if hashes else parts


# Each returns Markdown blocks and names of images, or nothing
SECTIONS = (heading, stages, verifier, details, sinks, curves, samples, cost)


def write_report(folder: str, target: str, n_samples: int) -> str:
    """Write the report of a folder to another, or the same, and return the path of report.md."""
    results, stages = current(folder)
    places = {name: os.path.join(folder, name) for name in run_folders(folder, "metrics.jsonl")}
    if os.path.isfile(os.path.join(folder, "metrics.jsonl")):
        places[os.path.basename(os.path.abspath(folder))] = folder
    if not results and not places:
        raise UserError(f"{folder} holds no results: run eval.py --out_dir={folder} first")
    logs = {name: read_log(os.path.join(place, "metrics.jsonl")) for name, place in places.items()}
    states = {name: read_json(os.path.join(place, "state.json")) for name, place in places.items()}
    run = Run(folder, target, results, stages, logs, states, n_samples)
    parts = []
    for section in SECTIONS:
        parts += [part for part in section(run) if part]
    parts = [f"![]({part})" if part.endswith(".png") else part for part in parts]
    made_from = f"<!-- made from {SOURCES}: {digest_of_files(folder, SOURCES)} -->"
    text = "\n\n".join([*parts, made_from]) + "\n"
    path = os.path.join(target, "report.md")
    write_atomic(path, lambda f: f.write(text.encode(errors="replace")))
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
