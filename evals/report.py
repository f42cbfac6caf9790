"""The report of a run: report.md, its plots and report.html, made from result files alone.

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
from evals import html, plots, tables
from evals.results import RERANKERS, STAGES, current, matches, newest, run_folders
from evals.tables import format_value, table
from runtime.files import digest_of_files, read_json, write_atomic
from runtime.logs import read_log, read_sealed
from runtime.program import run

SOURCES = "results*.jsonl stages.json metrics.jsonl */metrics.jsonl"
TITLES = dict(zip(STAGES, ("Pretraining", "SFT", "DPO", "RL", "The verifier"), strict=True))
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
BOLD_NOTE = """\
Paired by item; bold: the interval excludes 0 and p < 0.05, by McNemar's exact test where items \
are right or wrong, else by bootstrap, which has a floor. Of many, some are bold by chance."""
RERANK_NOTE = """\
majority: the most common answer; likelihood: the solution that the model itself finds likeliest; \
weighted: votes weighted by the verifier; best_of: the verifier's first choice; oracle: solved \
when any sample is right, which no choice among them can beat."""
SCORES_NOTE = "auc: how often right solutions score above wrong ones; best_of: by the verifier."
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
    changes: list[tables.Change]  # that each stage brought
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
    for key, stage in run.stages.items():
        name = shorten(key)
        if stage["stale"]:
            parts.append(f"**{name} is stale**: {shorten(stage['stale'])}; {again}.")
        if stage["outdated"]:
            parts.append(f"**{name} was trained again**: run eval.py, its results are left out.")
    return parts


def fold(title: str, *parts: str | None) -> list[str]:
    """Return parts that are shown once their title is clicked on."""
    return [f"<details><summary>{title}</summary>", *parts, "</details>"] if any(parts) else []


def summary(run: Run) -> list[str]:
    """Show what each stage changed, or of other runs all that was measured."""
    title = "## What each stage brought"
    if not run.changes:
        every = tables.by_model(run.results, tables.MEASURES)
        return [title, every] if every else []
    paired = [change for change in run.changes if change.before]
    rates = [change for change in paired if change.after["metric"] not in tables.DIGITS]
    every = tables.changes_table(run.changes, run.folder)
    note = BOLD_NOTE if ", p " in every else None
    return [title, every, note, plots.plot_changes(rates, run.target)]


def stages(run: Run) -> list[str]:
    """Show the main numbers and the curves of every stage, in the order of the loop."""
    parts = []
    for name in dict.fromkeys((*STAGES, *run.logs)):
        measures = tables.brought_by(name) if name in run.stages else {}
        shown = [tables.by_model(run.results, measures)]
        kinds = (plots.plot_loss, plots.plot_dpo, plots.plot_rl)
        shown += [plot(run.logs.get(name, []), run.target, name) for plot in kinds]
        shown += verifier(run) if name == "verifier" else []
        if any(shown):
            parts += [f"## {TITLES.get(name, shorten(name))}", *shown]
    return parts


def verifier(run: Run) -> list[str]:
    """Show what choosing among samples brings, and whether probabilities are what they say."""
    parts = []
    for label, rows, greedy in tables.judged(run.results):
        parts += [f"###{shorten(label[1:])}"] if label else []
        parts += [plots.plot_rerank(rows, run.target, greedy, label), RERANK_NOTE]
        every = rerank_table(run.folder, rows, greedy)
        calibration = plots.plot_calibration(rows, run.target, label)
        parts += fold("All ways to choose, and calibration", every, calibration)
    return parts


def rerank_table(folder: str, rows: list[dict], greedy: dict | None) -> str:
    """Return the ways to choose among most samples, then how scores separate right from wrong."""
    k = tables.most_samples(rows)
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
    """Show all numbers, folded."""
    every = tables.by_model(run.results, tables.MEASURES)
    parts = fold("All measures", every) if run.changes else []
    gains = tables.gains_table(run.results, run.folder, run.stages)
    parts += fold("Which differences are real", gains, BOLD_NOTE) if gains else []
    rows = [row for row in run.results if "@" not in row["protocol"]]  # a choice, see verifier()
    rows = [row for row in rows if row["metric"] != "calibration"]  # tenths, in its plot
    notes = {"published": SCORES_NOTE, "problems": mistakes(run.results)}
    for task, title in DETAILS.items():
        if newest(rows, task=task):
            parts += fold(title, tables.details(rows, task), notes.get(task))
    return [*parts, *cost(run)]


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
    parts += ["## Attention maps"] if shown else []
    return parts + [plots.plot_attention(rows, run.folder, run.target, *which) for which in shown]


def tradeoff(run: Run) -> list[str]:
    """Show what tuning gains and forgets, where there are several runs of it."""
    measures = {"task": "text_perplexity", "metric": "perplexity"}
    last = newest(run.results, **measures) or {}
    measures |= {key: last.get(key) for key in ("split", "protocol")}  # of one text
    points = {}
    for model in dict.fromkeys(row["model"] for row in run.results):
        answers = newest(run.results, model=model, task="chats", metric="response_loss")
        text = newest(run.results, model=model, **measures)
        if answers and text and model != "untrained":
            points[model] = (answers, text)
    image = plots.plot_tradeoff(points, run.target)
    return ["## What tuning gains and forgets", image] if image else []


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
            lines.append(f"- **{shorten(stage)}**: `{shorten(own[asked]['solutions'][0]['text'])}`")
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
    hashes = [[name, stage["weights_hash"]] for name, stage in run.stages.items()]
    weights = table(["stage", "sha256 of the weights"], hashes) if hashes else ""
    return fold("Cost", table(heads, lines), COST_NOTE) + fold("Weights", weights)


# Each returns Markdown blocks and names of images, or nothing
SECTIONS = (heading, summary, stages, tradeoff, sinks, samples, details)


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
    changes = tables.changes(results, stages)
    run = Run(folder, target, results, stages, logs, states, changes, n_samples)
    parts = []
    for section in SECTIONS:
        parts += [part for part in section(run) if part]
    parts = [f"![]({part})" if part.endswith(".png") else part for part in parts]
    made_from = f"<!-- made from {SOURCES}: {digest_of_files(folder, SOURCES)} -->"
    text = "\n\n".join([*parts, made_from]) + "\n"
    path = os.path.join(target, "report.md")
    page = html.page(text, target).encode(errors="replace")
    write_atomic(os.path.join(target, "report.html"), lambda f: f.write(page))
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
