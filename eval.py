"""Evaluation: every stage of a run under named protocols, one JSON line per number, append-only.

    python eval.py --out_dir=out/toy --no_overwrite    # skips what results.jsonl holds already
    python eval.py --out_dir=out/toy                   # again: into a new file with a timestamp
    python eval.py --out_dir=out/local --problems=gsm8k-test --pairs=hh-rlhf
    python eval.py --out_dir=out/local --tasks=text_perplexity --text=wikitext-2,wikitext-2-valid \\
                   --baselines=models/gpt2,models/distilgpt2

    python eval.py --compare=out/a,out/b               # two runs side by side, paired differences

out_dir is the folder of a pipeline (with pretrain/, sft/, dpo/, verifier/ in it), of any runs (a
sweep), or of a single stage.
"""

import functools
import json
import os
import time
from dataclasses import asdict

from configurator import UserError, load, run
from evals import classify, language, preferences, problems, sinks, summarize, tables
from evals.base import VERSION, EvalConfig, Row, Subject, Task, chosen_tasks, data_hash, judged
from evals.results import append_results, item_key, matches, read_results
from runtime.files import digest, write_json
from runtime.run_folder import provenance

TASK_MODULES = (language, problems, preferences, classify, summarize, sinks)  # they fill TASKS


def settings_of(task: Task, subject: Subject, cfg: EvalConfig) -> dict:
    """Return all settings that decide a task's numbers, in the form that JSON gives back."""
    settings = {key: getattr(cfg, key) for key in (*task.data, *task.settings)}
    return json.loads(json.dumps({**settings, "dtype": str(subject.dtype)}))


def results_path(cfg: EvalConfig, existing: list[dict]) -> str:
    """Return where new results go: beside old ones into a file of their own, unless told else."""
    alone = existing and not (cfg.no_overwrite or cfg.force)
    name = time.strftime("results_%Y%m%d_%H%M%S.jsonl") if alone else "results.jsonl"
    return os.path.join(cfg.out_dir, name)


def items_path(path: str, key: dict) -> str:
    """Return the items file of results with this key, relative to the folder of the results."""
    folder = os.path.basename(path).removesuffix(".jsonl").replace("results", "items")
    name = f"{key['task']}_{key['stage']}_{digest(key, sort_keys=False)}.json"
    return os.path.join(folder, name)


def write_items(path: str, results: list[dict], rows: list[Row]) -> None:
    """Write the items of all rows that have any."""
    kept = {}
    for result, row in zip(results, rows, strict=True):
        if row.estimate.items is not None:
            kept[item_key(result)] = asdict(row.estimate.items)
    write_json(path, kept)


def report_line(key: dict, rows: list[Row], seconds: float) -> str:
    """Return what is printed of a task: its numbers, but not every point of a curve."""
    shown = [
        f"{row.metric} {row.protocol} {row.estimate.value:.4g}"
        for row in rows
        if not {"position", "head"} & row.extra.keys()
    ]
    return f"eval {key['task']} {key['stage']} ({seconds:.0f} s): {', '.join(shown)}"


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
    origin = provenance()
    n_new = 0
    for task in tasks:
        settings = settings_of(task, subject, cfg)
        hash_of_data = data_hash(task, cfg)
        for stage in task.stages(subject, cfg):
            key = {"task": task.name, "stage": stage, "version": VERSION}
            key["weights_hash"] = subject.checkpoints[stage]["weights_hash"]
            key |= {"data_hash": hash_of_data, "settings": settings}
            if task.stages is judged:
                key["verifier_hash"] = subject.checkpoints["verifier"]["weights_hash"]
            same = functools.partial(matches, **key)
            if cfg.no_overwrite and any(same(row) for row in existing):
                continue
            began = time.perf_counter()
            rows = task.run(subject, stage, cfg)
            seconds = time.perf_counter() - began
            date = time.strftime("%Y-%m-%d %H:%M:%S")
            items = items_path(path, key)
            about = {"items": items, "seconds": round(seconds, 2), "date": date, **origin}
            step = subject.checkpoints[stage].get("step", 0)
            results = []
            for row in rows:
                named = {"model": row.model or stage, "split": row.split}
                results.append({**named, **key, "step": step, **row.as_json(), **about})
            write_items(os.path.join(cfg.out_dir, items), results, rows)
            append_results(path, results, same if cfg.force else None)
            n_new += len(results)
            print(report_line(key, rows, seconds), flush=True)
    if n_new:
        print(f"eval: {n_new} new results in {path}")
    else:
        print(f"eval: all results exist in {cfg.out_dir}, nothing to do")
    return 0


if __name__ == "__main__":
    run(main)
