"""Evaluation: every stage of a run under named protocols, one JSON line per number, append-only.

    python eval.py --out_dir=out/toy --no_overwrite    # skips what results.jsonl holds already
    python eval.py --out_dir=out/toy                   # again: into a new file with a timestamp
    python eval.py --out_dir=out/local --problems=gsm8k-test --pairs=hh-rlhf
    python eval.py --out_dir=out/local --tasks=text_perplexity --text=wikitext-2,wikitext-2-valid \\
                   --baselines=models/gpt2,models/distilgpt2

    python eval.py --compare=out/a,out/b               # two runs side by side, paired differences
"""

import functools
import os
import time

from configurator import UserError, load
from evals import language, preferences, problems, sinks, tables, transfer
from evals.base import VERSION, EvalConfig, Row, Subject, chosen_tasks, inputs_of, judged
from evals.results import append_results, item_key, matches, read_results
from runtime.files import digest, write_json
from runtime.program import run
from runtime.run_folder import provenance

TASK_MODULES = (language, problems, preferences, transfer, sinks)  # they fill TASKS


def results_path(cfg: EvalConfig, existing: list[dict]) -> str:
    """Return where new results go: beside old ones into a file of their own, unless told else."""
    alone = existing and not (cfg.no_overwrite or cfg.force)
    name = time.strftime("results_%Y%m%d_%H%M%S.jsonl") if alone else "results.jsonl"
    return os.path.join(cfg.out_dir, name)


def items_path(path: str, key: dict) -> str:
    """Return the items file of results with this key, relative to the folder of the results."""
    folder = os.path.basename(path).removesuffix(".jsonl").replace("results", "items")
    return f"{folder}/{key['task']}_{key['stage']}_{digest(key, sort_keys=False)}.json"


def report_line(key: dict, rows: list[Row], seconds: float) -> str:
    """Return what is printed of a task: its numbers, but not every point of a curve."""
    shown = [row for row in rows if not {"position", "head"} & row.extra.keys()]
    shown = [f"{row.metric} {row.protocol} {row.estimate.value:.4g}" for row in shown]
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
        read = inputs_of(task, subject, cfg)
        for stage in task.stages(subject, cfg):
            checkpoint = subject.checkpoints[stage]
            key = {"task": task.name, "stage": stage, "version": VERSION}
            key |= {"weights_hash": checkpoint["weights_hash"], **read}
            if task.stages is judged:
                key["verifier_hash"] = subject.checkpoints["verifier"]["weights_hash"]
            same = functools.partial(matches, **key)
            if cfg.no_overwrite and any(map(same, existing)):
                continue
            began = time.perf_counter()
            rows = task.run(subject, stage, cfg)
            seconds = time.perf_counter() - began
            step = {"step": checkpoint.get("step", 0)}
            about = {"items": items_path(path, key), "seconds": round(seconds, 2)}
            about |= {"date": time.strftime("%Y-%m-%d %H:%M:%S"), **origin}
            results, items = [], {}
            for row in rows:
                named = {"model": row.model or stage, "split": row.split, **key, **step}
                named |= {"metric": row.metric, "protocol": row.protocol}
                results.append(named | row.estimate.as_json() | row.extra | about)
                if row.estimate.items:
                    items[item_key(results[-1])] = vars(row.estimate.items)
            write_json(os.path.join(cfg.out_dir, about["items"]), items)
            append_results(path, results, same if cfg.force else None)
            n_new += len(results)
            print(report_line(key, rows, seconds), flush=True)
    nothing = f"all results exist in {cfg.out_dir}, nothing to do"
    print("eval:", f"{n_new} new results in {path}" if n_new else nothing)
    return 0


if __name__ == "__main__":
    run(main)
