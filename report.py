"""The report of a run: report.md and its plots, made from result files alone (results*.jsonl, items, metrics.jsonl, generations).

python report.py --out_dir=out/toy            # where there is a report, the new one goes into a folder with a timestamp
python report.py --out_dir=out/toy --force    # replaces it; --no_overwrite keeps it
"""

import os
import re
import time
from dataclasses import dataclass

import configurator
import data
from configurator import UserError
from eval import read_results, run_folders
from plots import (
    plot_attention,
    plot_calibration,
    plot_dpo,
    plot_loss,
    plot_rerank,
    plot_streaming,
    plot_tradeoff,
)
from problems import RERANKERS
from tables import (
    MEASURES,
    by_model,
    details,
    find,
    gain,
    gains,
    models_of,
    show,
    streaming_table,
    table,
)


@dataclass
class ReportConfig:
    out_dir: str = "out/toy"  # folder of a pipeline, or of any runs
    force: bool = False  # replace an existing report
    no_overwrite: bool = False  # keep an existing report and say so
    n_samples: int = 4  # test problems shown with every stage's answer


DETAILS = {
    "problems": "Word problems, greedily: right answers and kinds of error",
    "sst2": "SST-2 by prompt",
    "dialogsum": "DialogSum",
    "text_perplexity": "Perplexity by protocol",
}


def mistakes(results: list[dict]) -> str:
    """Examples of each kind of error, of the last stage."""
    rows = [r for r in results if r["task"] == "problems" and r.get("examples")]
    return "\n".join(
        f"- {r['metric'].replace('_', ' ')}: `{shorten(e['question'])}` said `{shorten(e['text'])}`, right is {e['answer']}"
        + (f"; false: `{e['false_equation']}`" if e["false_equation"] else "")
        for r in rows
        if r["stage"] == rows[-1]["stage"]
        for e in r["examples"][:2]
    )


def rerank_table(run, rows: list[dict], greedy: dict | None) -> str:
    """Ways to choose among the largest number of samples, each also against the greedy answer; then how well the scores separate."""
    of = lambda metric, protocol: find(rows, metric=metric, protocol=protocol)
    k = max((int(r["protocol"].partition("@")[2]) for r in rows if "@" in r["protocol"]), default=0)
    lines = [["greedy, exact match", show(greedy), ""]]
    for how in RERANKERS:
        row = of("exact_match", f"{how}@{k}")
        lines.append(
            [
                f"{how}, samples = {k}, exact match",
                show(row),
                gain((run.folder, greedy), (run.folder, row)) if row and greedy else "",
            ]
        )
    for metric, how, name in (
        ("auc", "likelihood", "AUC of the likelihood"),
        ("auc", "best_of", "AUC of the verifier"),
        (
            "auc",
            "best_of_same_form",
            "AUC of the verifier among solutions that stop and have an answer",
        ),
        ("auc", "form_alone", "AUC of form alone"),
        ("auc", "last_number_alone", "AUC of the verifier shown the final answer alone"),
        ("brier", "verifier", "Brier score of the verifier"),
        ("calibration_error", "verifier", "expected calibration error"),
    ):
        row = of(metric, how)
        lines += [[f"{name}, n = {row['n']} solutions", show(row), ""]] if row else []
    return table(["", "", "against greedy, paired"], [line for line in lines if line[1]])


def cost_table(logs: dict[str, list[dict]]) -> str:
    rows, seconds = [], 0.0
    for run, log in logs.items():
        steps = [r for r in log if "tokens" in r]
        if steps:
            last = steps[-1]
            took = last["step_ms"] * (last["step"] + 1) / 1e3
            seconds += took
            rows.append(
                [
                    run,
                    f"{last['step'] + 1}",
                    f"{last['tokens'] / 1e6:.2f}M",
                    f"{last['flops']:.2e}",
                    f"{last['tokens_per_s']:,.0f}",
                    f"{took:.0f}",
                ]
            )
    return table(
        ["run", "steps", "tokens", "FLOPs", "tokens/s", "training s"],
        [*rows, ["all", "", "", "", "", f"{seconds:.0f}"]],
    )


def samples(folder: str, order: list[str], n: int) -> str:
    """The same test problems answered greedily by every stage, from the stored generations."""
    path, answers = os.path.join(folder, "generations"), {}
    for name in sorted(os.listdir(path)) if os.path.isdir(path) else []:
        rows = data.read_jsonl(os.path.join(path, name))
        if len(rows[0]["solutions"]) == 1:
            answers[name.rsplit("_", 2)[0]] = rows
    order, parts = [stage for stage in order if stage in answers], []
    for i in range(min(n, len(answers[order[0]])) if order else 0):
        row = answers[order[0]][i]
        said = [
            f"- **{stage}**: `{shorten(answers[stage][i]['solutions'][0]['text'])}`"
            for stage in order
        ]
        parts.append(
            "\n".join([f"**{row['question']}** (right: `{shorten(row['answer'])}`)", *said])
        )
    return "\n\n".join(parts)


def shorten(text: str, width: int = 100) -> str:
    text = re.sub(r"[^ -~]+", " ", text.replace("\n", "; ").replace("`", "'"))
    return text[:width] + " ..." * (len(text) > width)


# ---------------------------------------------------------------------------------------------------------------------
# Sections: each is a list of Markdown blocks, empty where the run has nothing to show


def stages_section(run) -> list[str]:
    found = gains(run.results, run.folder)
    return [
        "## What each stage brought",
        by_model(run.results, [(*measure, None) for measure in MEASURES]),
    ] + (
        [
            "## Which differences are real",
            found,
            "Paired, item by item; bold where the interval excludes 0; p by McNemar's exact test where items are right or wrong, "
            "else by bootstrap. With many rows some will be bold by chance.",
        ]
        if found
        else []
    )


def verifier_section(run) -> list[str]:
    rows = [r for r in run.results if r["task"] == "rerank"]
    if not rows:
        return []
    greedy = find(run.results, task="problems", model=rows[-1]["model"], metric="exact_match")
    images = [
        plot_rerank(rows, run.target, greedy) if any("@" in r["protocol"] for r in rows) else None,
        plot_calibration(rows, run.target),
    ]
    return [
        "## The verifier",
        rerank_table(run, rows, greedy),
        "majority: the most common answer; likelihood: the solution that the model itself finds likeliest; weighted: votes "
        "weighted by the verifier; best_of: the verifier's first choice; oracle: solved when any sample is right, which no choice among them can beat.",
        *images,
    ]


def published_section(run) -> list[str]:
    rows = {
        (r["metric"], r["protocol"]): r
        for r in run.results
        if r["task"] == "published" and r["metric"] in ("auc", "exact_match")
    }
    return (
        [
            "## Published solutions of GSM8K's test problems, judged",
            table(
                ["", "", "n"],
                [
                    [f"{r['metric'].replace('_', ' ')}, {p}", show(r), str(r["n"])]
                    for (_, p), r in rows.items()
                ],
            ),
        ]
        if rows
        else []
    )


def details_sections(run) -> list[str]:
    parts = []
    for task, title in DETAILS.items():
        parts += [f"## {title}", details(run.results, task)] if find(run.results, task=task) else []
        parts += [mistakes(run.results)] if task == "problems" else []
    return parts


def sinks_sections(run) -> list[str]:
    parts = []
    if find(run.results, task="streaming"):
        parts += [
            "## Streams of 16 training contexts",
            streaming_table(run.results),
            "rolling: a cache of one training context, token by token; dense: every "
            "token sees all before it; recompute: the last training context from scratch for every token. As good as recompute means stable, "
            "not a longer memory: no key is older than the cache.",
            plot_streaming(run.results, run.target),
        ]
    looked_at = sorted(
        {
            (r["model"], int(r["protocol"].split()[1]))
            for r in run.results
            if r["task"] == "attention"
        }
    )
    return parts + (
        [
            "## Attention maps",
            *(plot_attention(run.results, run.folder, run.target, *which) for which in looked_at),
        ]
        if looked_at
        else []
    )


def curves_section(run) -> list[str]:
    pairs = {
        model: (
            find(run.results, model=model, task="chats", metric="response_loss"),
            find(run.results, model=model, task="text_perplexity", metric="perplexity"),
        )
        for model in models_of(run.results)
        if model != "untrained"
    }
    images = [
        plot_tradeoff({model: pair for model, pair in pairs.items() if all(pair)}, run.target)
    ]
    images += [
        plot(log, run.target, name)
        for name, log in run.logs.items()
        for plot in (plot_loss, plot_dpo)
    ]
    return ["## Curves", *images] if any(images) else []


def samples_section(run) -> list[str]:
    shown = samples(run.folder, models_of(run.results), run.n_samples)
    return ["## The same problems at every stage", shown] if shown else []


def cost_section(run) -> list[str]:
    hashes = {r["stage"]: r["weights_hash"] for r in run.results} | {
        "verifier": r["verifier_hash"] for r in run.results if "verifier_hash" in r
    }
    return [
        "## Cost",
        cost_table(run.logs),
        "## Weights",
        table(["stage", "sha256 of the weights"], [[k, v] for k, v in hashes.items()]),
    ]


SECTIONS = (
    stages_section,
    verifier_section,
    published_section,
    details_sections,
    sinks_sections,
    curves_section,
    samples_section,
    cost_section,
)


@dataclass
class Run:
    folder: str  # of the results
    target: str  # where report.md and its plots go
    results: list[dict]
    logs: dict[str, list[dict]]  # metrics.jsonl of every stage
    n_samples: int


def write_report(folder: str, target: str, n_samples: int) -> str:
    results = read_results(folder)
    if not results:
        raise UserError(f"{folder} holds no results: run eval.py --out_dir={folder} first")
    logs = {
        name: data.read_metrics(os.path.join(folder, name, "metrics.jsonl"))
        for name in run_folders(folder, "metrics.jsonl")
    }
    run, last = Run(folder, target, results, logs, n_samples), results[-1]
    parts = [
        f"# Report of {folder}",
        f"Commit {last['commit']}{' (with uncommitted changes)' if last['dirty'] else ''}, torch {last['torch']}, "
        f"{last['device']}, {last['date']}. Every number comes from results*.jsonl, items/ and metrics.jsonl in this folder; brackets are 95 % intervals.",
    ]
    parts += [
        f"![]({part})" if part.endswith(".png") else part
        for section in SECTIONS
        for part in section(run)
        if part
    ]
    path = os.path.join(target, "report.md")
    data.write_atomic(path, lambda f: f.write(("\n\n".join(parts) + "\n").encode()))
    return path


def main(argv: list[str]) -> int:
    cfg = configurator.load(ReportConfig, argv)
    exists = os.path.exists(os.path.join(cfg.out_dir, "report.md"))
    if exists and cfg.no_overwrite:
        print(
            f"report: {os.path.join(cfg.out_dir, 'report.md')} exists and is kept (--force replaces it)"
        )
        return 0
    target = (
        os.path.join(cfg.out_dir, time.strftime("report_%Y%m%d_%H%M%S"))
        if exists and not cfg.force
        else cfg.out_dir
    )
    print(f"report: {write_report(cfg.out_dir, target, cfg.n_samples)}")
    return 0


if __name__ == "__main__":
    configurator.run(main)
