"""The report of a run: report.md and its plots, made from result files alone (results*.jsonl, items, metrics.jsonl, generations).

    python report.py --out_dir=out/toy            # where there is a report, the new one goes into a folder with a timestamp
    python report.py --out_dir=out/toy --force    # replaces it; --no_overwrite keeps it
    python eval.py --compare=out/a,out/b          # runs side by side: compare() below
"""
import json
import os
import re
import time
from dataclasses import dataclass

import configurator
import data
from configurator import UserError
from eval import item_key, read_results, run_folders
from plots import plot_calibration, plot_dpo, plot_loss, plot_rerank, plot_tradeoff
from problems import RERANKERS
from stats import difference


@dataclass
class ReportConfig:
    out_dir: str = "out/toy"  # folder of a pipeline, or of any runs
    force: bool = False  # replace an existing report
    no_overwrite: bool = False  # keep an existing report and say so
    n_samples: int = 4  # test problems shown with every stage's answer


MEASURES = [  # of the first tables: heading, task, metric, protocol
    ("val loss (nats/token)", "val_loss", "val_loss", "windows"), ("problems, exact match", "problems", "exact_match", "greedy"),
    ("stops by itself", "problems", "stop_rate", "greedy"), ("prefers chosen, log-prob", "preference", "accuracy", "logprob"),
    ("prefers chosen, reward", "preference", "accuracy", "reward"), ("prefers chosen, length", "preference", "accuracy", "length"),
    ("tales on topic and kind", "tales", "on_topic_and_kind", "sampled"), ("response loss (nats/token)", "chats", "response_loss", "teacher"),
    ("answers stop", "chats", "stop_rate", "greedy"), ("repeated 4-grams", "chats", "repetition", "greedy"),
    ("2-grams in no other answer", "chats", "distinct_2", "greedy"), ("SST-2, zero-shot", "sst2", "accuracy", "zero-shot"),
    ("DialogSum, ROUGE-L", "dialogsum", "rougeL", "greedy")]
DETAILS = {"problems": "Word problems, greedily: right answers and kinds of error", "sst2": "SST-2 by prompt", "dialogsum": "DialogSum",
           "text_perplexity": "Perplexity by protocol", "streaming": "Streaming"}
DIGITS = {"val_loss": 4, "response_loss": 4, "bits_per_byte": 4, "perplexity": 2, "auc": 3, "brier": 3, "calibration_error": 3, "length": 1}  # the rest are rates


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
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, ["---"] * len(heads), *rows])


def find(results: list[dict], **wanted) -> dict | None:
    """The newest result with these fields."""
    return next((row for row in reversed(results) if all(row.get(k) == v for k, v in wanted.items())), None)


def models_of(results: list[dict]) -> list[str]:
    """Names of the models in the order of evaluation."""
    return list(dict.fromkeys(row["model"] for row in results))


def by_model(results: list[dict], measures) -> str:
    """One row per (heading, task, metric, protocol, split or None), one column per model that has any of them; trivial answers share a column."""
    stages = {row["stage"] for row in results}
    wanted = [(head, {"task": t, "metric": m, "protocol": p, **({"split": s} if s else {})}) for head, t, m, p, s in measures]
    wanted = [(head, fields) for head, fields in wanted if find(results, **fields)]
    models = [model for model in models_of(results) if any(find(results, model=model, **fields) for _, fields in wanted)]
    columns = [model for model in models if model in stages]
    rows = []
    for head, fields in wanted:
        trivial = [(model, find(results, model=model, **fields)) for model in models if model not in stages]
        rows.append([head, str(find(results, **fields)["n"]), "; ".join(f"{show(row)} ({model})" for model, row in trivial if row),
                     *(show(find(results, model=model, **fields)) for model in columns)])
    return table(["", "n", "trivial answer", *columns], rows)


def details(results: list[dict], task: str) -> str:
    """Every number of a task."""
    keys = dict.fromkeys((r["metric"], r["protocol"], r["split"]) for r in results if r["task"] == task)
    several = len({split for *_, split in keys}) > 1 or task == "text_perplexity"
    heads = {key: ", ".join([*(dict.fromkeys((key[0].replace("_", " "), key[1]))), *([key[2]] if several else [])]) for key in keys}
    text = by_model(results, [(heads[key], task, *key) for key in keys])
    drawn = {(r["protocol"], r["model"]): r["draws"] for r in results if r["task"] == task and len(r.get("draws", [])) > 1}
    notes = [f"{protocol}, lowest and highest of the draws of examples: " + ", ".join(
        f"{model} {100 * min(draws):.1f}-{100 * max(draws):.1f} %" for (p, model), draws in drawn.items() if p == protocol) for protocol in dict.fromkeys(p for p, _ in drawn)]
    seen = {(r["split"], "as it stands" if r["protocol"] not in ("words", "bpb") else "detokenised"): r["overlap"] for r in results if r.get("overlap") is not None}
    notes += [f"Of {split}, {form}, {100 * share:.2f} % of all runs of 13 tokens stand in the training shards." for (split, form), share in seen.items()] if task == "text_perplexity" else []
    return "\n\n".join([text, *notes])


def mistakes(results: list[dict]) -> str:
    """Examples of each kind of error, of the last stage."""
    rows = [r for r in results if r["task"] == "problems" and r.get("examples")]
    return "\n".join(f"- {r['metric'].replace('_', ' ')}: `{shorten(e['question'])}` said `{shorten(e['text'])}`, right is {e['answer']}"
                     + (f"; false: `{e['false_equation']}`" if e["false_equation"] else "") for r in rows if r["stage"] == rows[-1]["stage"] for e in r["examples"][:2])


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
        pairs = [[find(results, model=name, task=t, metric=m, protocol=p) for name in step] for step in steps]
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
    keys = list(dict.fromkeys((r["task"], r["model"], r["metric"], r["protocol"], r["split"]) for r in found[first]))
    parts = [f"# {first} beside {', '.join(others)}", "Differences are paired, item by item, with 95 % intervals, in bold where these exclude 0; none is given where the data differ."]
    for task in dict.fromkeys(key[0] for key in keys):
        rows = []
        for key in (key for key in keys if key[0] == task):
            sides = {folder: find(results, **dict(zip(("task", "model", "metric", "protocol", "split"), key))) for folder, results in found.items()}
            if any(sides[other] for other in others):
                rows.append([", ".join(dict.fromkeys(key[1:4])), *map(show, sides.values()),
                             *(gain((first, sides[first]), (other, sides[other])) if sides[other] else "" for other in others)])
        parts += [f"## {task}", table(["", *folders, *(f"{other} - {first}" for other in others)], rows)] if rows else []
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The report

def rerank_table(results: list[dict]) -> str:
    k = max((int(row["protocol"].partition("@")[2]) for row in results if row["task"] == "rerank" and "@" in row["protocol"]), default=0)
    greedy = find(results, task="problems", model=find(results, task="rerank")["model"], metric="exact_match")
    rows = [["greedy, exact match", show(greedy)], *([f"{how}, samples = {k}, exact match", show(find(results, task="rerank", protocol=f"{how}@{k}"))] for how in RERANKERS)]
    for metric, how, name in (("auc", "likelihood", "AUC of the likelihood"), ("auc", "best_of", "AUC of the verifier"),
                              ("auc", "best_of_same_form", "AUC of the verifier among solutions that stop and have an answer"), ("auc", "form_alone", "AUC of form alone"),
                              ("auc", "last_number_alone", "AUC of the verifier shown the final answer alone"),
                              ("brier", "verifier", "Brier score of the verifier"), ("calibration_error", "verifier", "expected calibration error")):
        row = find(results, task="rerank", metric=metric, protocol=how)
        rows += [[f"{name}, n = {row['n']} solutions", show(row)]] if row else []
    return table(["", ""], [row for row in rows if row[1]])


def cost_table(logs: dict[str, list[dict]]) -> str:
    rows, seconds = [], 0.0
    for run, log in logs.items():
        steps = [r for r in log if "tokens" in r]
        if steps:
            last = steps[-1]
            took = last["step_ms"] * (last["step"] + 1) / 1e3
            seconds += took
            rows.append([run, f"{last['step'] + 1}", f"{last['tokens'] / 1e6:.2f}M", f"{last['flops']:.2e}", f"{last['tokens_per_s']:,.0f}", f"{took:.0f}"])
    return table(["run", "steps", "tokens", "FLOPs", "tokens/s", "training s"], [*rows, ["all", "", "", "", "", f"{seconds:.0f}"]])


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
        said = [f"- **{stage}**: `{shorten(answers[stage][i]['solutions'][0]['text'])}`" for stage in order]
        parts.append("\n".join([f"**{row['question']}** (right: `{shorten(row['answer'])}`)", *said]))
    return "\n\n".join(parts)


def shorten(text: str, width: int = 100) -> str:
    text = re.sub(r"[^ -~]+", " ", text.replace("\n", "; ").replace("`", "'"))
    return text[:width] + " ..." * (len(text) > width)


def write_report(folder: str, target: str, n_samples: int) -> str:
    """report.md of the results in folder, and its plots, written into target."""
    results = read_results(folder)
    if not results:
        raise UserError(f"{folder} holds no results: run eval.py --out_dir={folder} first")
    logs = {name: data.read_metrics(os.path.join(folder, name, "metrics.jsonl")) for name in run_folders(folder, "metrics.jsonl")}
    last, found = results[-1], gains(results, folder)
    parts = [f"# Report of {folder}", f"Commit {last['commit']}{' (with uncommitted changes)' if last['dirty'] else ''}, torch {last['torch']}, "
             f"{last['device']}, {last['date']}. Every number comes from results*.jsonl, items/ and metrics.jsonl in this folder; brackets are 95 % intervals.",
             "## What each stage brought", by_model(results, [(*measure, None) for measure in MEASURES])]
    parts += ["## Which differences are real", found, "Paired, item by item; bold where the interval excludes 0; p by McNemar's exact test where items are right or wrong, "
              "else by bootstrap. With many rows some will be bold by chance."] if found else []
    if find(results, task="rerank"):
        rows = [r for r in results if r["task"] == "rerank"]
        greedy = find(results, task="problems", model=rows[-1]["model"], metric="exact_match")
        images = [plot_rerank(rows, target, greedy) if any("@" in r["protocol"] for r in rows) else None, plot_calibration(rows, target)]
        parts += ["## The verifier", rerank_table(results), "majority: the most common answer; likelihood: the solution that the model itself "
                  "finds likeliest; weighted: votes weighted by the verifier; best_of: the verifier's first choice; oracle: solved when any "
                  "sample is right, which no choice among them can beat.", *(f"![]({name})" for name in images if name)]
    judged = {(row["metric"], row["protocol"]): row for row in results if row["task"] == "published"}
    if judged:
        parts += ["## Published solutions of GSM8K's test problems, judged", table(["", "", "n"], [
            [f"{r['metric'].replace('_', ' ')}, {p}", show(r), str(r["n"])] for (_, p), r in judged.items() if r["metric"] in ("auc", "exact_match")])]
    for task, title in DETAILS.items():
        parts += [f"## {title}", details(results, task)] if find(results, task=task) else []
        parts += [mistakes(results)] if task == "problems" and mistakes(results) else []
    pairs = {model: (find(results, model=model, task="chats", metric="response_loss"), find(results, model=model, task="text_perplexity", metric="perplexity"))
             for model in models_of(results) if model != "untrained"}
    images = [plot_tradeoff({model: pair for model, pair in pairs.items() if all(pair)}, target)]
    images += [plot(log, target, run) for run, log in logs.items() for plot in (plot_loss, plot_dpo)]
    parts += ["## Curves", *(f"![]({name})" for name in images if name)] if any(images) else []
    shown = samples(folder, models_of(results), n_samples)
    parts += ["## The same problems at every stage", shown] if shown else []
    hashes = {row["stage"]: row["weights_hash"] for row in results} | {"verifier": row["verifier_hash"] for row in results if "verifier_hash" in row}
    parts += ["## Cost", cost_table(logs), "## Weights", table(["stage", "sha256 of the weights"], [[k, v] for k, v in hashes.items()])]
    path = os.path.join(target, "report.md")
    data.write_atomic(path, lambda f: f.write(("\n\n".join(parts) + "\n").encode()))
    return path


def main(argv: list[str]) -> int:
    cfg = configurator.load(ReportConfig, argv)
    exists = os.path.exists(os.path.join(cfg.out_dir, "report.md"))
    if exists and cfg.no_overwrite:
        print(f"report: {os.path.join(cfg.out_dir, 'report.md')} exists and is kept (--force replaces it)")
        return 0
    target = os.path.join(cfg.out_dir, time.strftime("report_%Y%m%d_%H%M%S")) if exists and not cfg.force else cfg.out_dir
    print(f"report: {write_report(cfg.out_dir, target, cfg.n_samples)}")
    return 0


if __name__ == "__main__":
    configurator.run(main)
