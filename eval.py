"""Evaluation: every stage of a run under named protocols, one JSON line per number, append-only.

    python eval.py --out_dir=out/toy --no_overwrite    # skips what results.jsonl holds already
    python eval.py --out_dir=out/toy                   # again: into a new file with a timestamp
    python eval.py --out_dir=out/local --problems=gsm8k-test --pairs=hh-rlhf
    python eval.py --out_dir=out/local --tasks=text_perplexity --text=wikitext-2,wikitext-2-valid \\
                   --baselines=models/gpt2,models/distilgpt2

    python eval.py --compare=out/a,out/b               # two runs side by side, paired differences
"""

import functools
import json
import os
import time

from configurator import UserError, load
from corpus.sources import check_made
from evals import few_shot, language, preferences, problems, sinks, tables, transfer
from evals.base import (
    CHATS,
    NEEDS,
    VERSION,
    EvalConfig,
    Row,
    Subject,
    Task,
    chosen_tasks,
    data_files,
)
from evals.results import (
    append_results,
    is_finite,
    is_whole,
    item_key,
    matches,
    read_results,
    read_stages,
)
from runtime.files import digest, read_json, write_json
from runtime.program import run
from runtime.run_folder import provenance

TASK_MODULES = (language, problems, few_shot, preferences, transfer, sinks)  # they fill TASKS


def results_path(cfg: EvalConfig, existing: list[dict]) -> str:
    """Return where new results go: beside old ones into a file of their own, unless told else."""
    alone = existing and not (cfg.no_overwrite or cfg.force)
    name = time.strftime("results_%Y%m%d_%H%M%S.jsonl") if alone else "results.jsonl"
    return os.path.join(cfg.out_dir, name)


def items_path(path: str, key: dict) -> str:
    """Return the items file of results with this key, relative to the folder of the results."""
    folder = os.path.basename(path).removesuffix(".jsonl").replace("results", "items")
    return f"{folder}/{key['task']}_{key['stage']}_{digest(key, sort_keys=False)}.json"


def inputs_of(task: Task, subject: Subject, cfg: EvalConfig) -> dict:
    """Return what decides a task's numbers: a hash of its files, and settings as JSON has them."""
    settings = {key: getattr(cfg, key) for key in (*task.data, *task.settings)}
    settings["dtype"] = str(subject.dtype)
    paths = data_files([settings[key] for key in task.data], task.files, cfg.data_dir)
    check_made(paths, subject.sha256)
    hashes = [[os.path.relpath(path, cfg.data_dir), subject.sha256(path)] for path in paths]
    return {"data_hash": digest(hashes), "settings": json.loads(json.dumps(settings))}


def report_line(key: dict, results: list[dict], seconds: float) -> str:
    """Return what is printed of a task: its numbers, but not every point of a curve."""
    shown = [row for row in results if not {"position", "layer"} & row.keys()]
    shown = [f"{row['metric']} {row['protocol']} {row['value']:.4g}" for row in shown]
    return f"eval {key['task']} {key['stage']} ({seconds:.0f} s): {', '.join(shown)}"


def as_results(rows: list[Row], key: dict, about: dict) -> tuple[list[dict], dict]:
    """Return the results of rows, and their items; a number that is not finite is left out."""
    results, items = [], {}
    for row in rows:
        result = {"model": row.model or key["stage"], "split": row.split, **key}
        result |= {"metric": row.metric, "protocol": row.protocol}
        result |= row.estimate.as_json() | row.extra | about
        if not is_finite(result):
            print(f"eval: {item_key(result)} is left out: {row.estimate.value} measures nothing")
            continue
        if row.estimate.items:
            items[item_key(result)] = own = vars(row.estimate.items)
            result["items_hash"] = digest(own)
        results.append(result)
    if not results:
        raise UserError(f"{key['task']} gives no finite number of {key['stage']}")
    return results, items


def about_baseline(subject: Subject, task: str, stage: str) -> dict:
    """Return what a result says of a baseline: that it is one, and how its chats are told."""
    if stage not in subject.baselines:
        return {}
    told = {"template": subject.tokenizers[stage].template.name} if task in CHATS else {}
    return {"baseline": True} | told


def evaluate(
    task: Task, subject: Subject, cfg: EvalConfig, path: str, existing: list[dict], origin: dict
) -> int:
    """Run a task on its stages and append its results. -> how many are new"""
    read = inputs_of(task, subject, cfg)
    chosen = (*cfg.stages, *subject.baselines) if cfg.stages else subject.checkpoints
    names = [x for x in task.stages(subject, cfg) if x in chosen]
    n_new, left_out = 0, {}
    for name in names:
        stage = subject.judges.get(name, name)  # a verifier judges a policy's solutions
        checkpoint = subject.checkpoints[stage]
        key = {"task": task.name, "stage": stage, "version": VERSION}
        key |= {"weights_hash": checkpoint["weights_hash"], **read}
        if name != stage:
            key["verifier_hash"] = subject.checkpoints[name]["weights_hash"]
            if list(subject.judges.values()).count(stage) > 1:
                key["model"] = f"{stage} judged by {name}"
        same = functools.partial(matches, **key)
        there = list(filter(same, existing))
        if cfg.no_overwrite and is_whole(there):
            continue
        began = time.perf_counter()
        subject.model(name)  # weights that do not fit end the evaluation, whatever is left out
        about = {"items": items_path(path, key)} | about_baseline(subject, task.name, name)
        subject.kept = None
        try:
            rows = task.run(subject, name, cfg)
            about["seconds"] = round(time.perf_counter() - began, 2)
            about["date"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            about |= {"kept": subject.kept} if subject.kept else {}
            step = {"step": checkpoint.get("step", 0)}
            results, items = as_results(rows, key | step, about | origin)
        except UserError as error:
            left_out[name] = error
            continue
        write_json(os.path.join(cfg.out_dir, about["items"]), items)
        append_results(path, results, same if cfg.force or there else None)
        n_new += len(results)
        print(report_line(key, results, about["seconds"]), flush=True)
    if names and len(left_out) == len(names):
        raise next(iter(left_out.values()))
    for name, error in left_out.items():
        print(f"eval: {task.name} of {name} is left out: {error}")
    if not names:
        needs = f"{task.name} is left out: it needs {NEEDS[task.name]} in {cfg.out_dir}"
        if cfg.tasks:
            raise UserError(needs)
        print(f"eval: {needs}")
    return n_new


def main(argv: list[str]) -> int:
    """Run all tasks that are asked for on all stages, and append their results."""
    cfg = load(argv, EvalConfig)
    if cfg.compare:
        print(tables.compare(list(cfg.compare)))
        return 0
    if not os.path.isdir(cfg.out_dir):
        raise UserError(f"out_dir {cfg.out_dir!r} does not exist: give the folder of a run")
    tasks = chosen_tasks(cfg)
    existing = read_results(cfg.out_dir)
    path = results_path(cfg, existing)
    subject = Subject(cfg)
    stages, kept = subject.lineage(cfg.out_dir), os.path.join(cfg.out_dir, "stages.json")
    if stages != read_json(kept):  # a report that is as new as its results stays
        write_json(kept, stages)
    for name, stage in read_stages(cfg.out_dir, existing).items():
        if stage["stale"]:
            print(f"eval: NOTE {name} is stale: {stage['stale']}")
    known = (subject, cfg, path, existing, provenance())
    n_new = sum(evaluate(task, *known) for task in tasks)
    nothing = f"all results exist in {cfg.out_dir}, nothing to do"
    print("eval:", f"{n_new} new results in {path}" if n_new else nothing)
    return 0


if __name__ == "__main__":
    run(main, outlives_output=True)
