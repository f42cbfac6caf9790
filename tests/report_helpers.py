"""Result files written by hand, for the tests of the report, its tables and its plots."""

import os
from dataclasses import asdict
from pathlib import Path

from evals import plots, report
from evals.results import STAGES, item_key
from evals.stats import proportion
from runtime.files import write_json, write_jsonl
from runtime.logs import write_sealed

ORIGIN = {
    "commit": "abc1234",
    "dirty": False,
    "torch": "2.x",
    "device": "cpu",
    "date": "2026-01-01 00:00:00",
    "step": 9,
    "version": 1,
    "seconds": 1.0,
}


RERANKED = {
    "majority": 0.214,
    "likelihood": 0.225,
    "weighted": 0.236,
    "best_of": 0.258,
    "oracle": 0.399,
}


def leave_out_plots(monkeypatch) -> None:
    """Draw nothing but what a test asks for: a plot takes longer than the rest of a report."""
    for name in ("plot_loss", "plot_rerank", "plot_changes"):
        monkeypatch.setattr(plots, name, lambda *args: None)


def row(task, model, metric, protocol, value, width=0.05, n=40, **more) -> dict:
    """Return a result as eval.py writes it."""
    what = {"task": task, "model": model, "metric": metric, "protocol": protocol}
    what |= {"stage": model if model in STAGES else "untrained", "split": "test"}
    number = {"value": value, "low": value - width, "high": value + width / 2, "n": n}
    result = {**what, **number, **ORIGIN, **more}
    return {"weights_hash": f"hash-{result['stage']}", **result}


def hand_made(scale: float = 1.0, n: int = 40) -> list[dict]:
    """Return one result of every kind the report shows. scale: another world, other numbers."""
    rows = []

    def add(task, model, metric, protocol, value, **more):
        rows.append(row(task, model, metric, protocol, value * scale, **more))

    for model, loss in (("untrained", 5.561), ("pretrain", 1.372)):
        add("val_loss", model, "val_loss", "windows", loss, n=n)
    for model, right in (("pretrain", 0.153), ("dpo", 0.417)):
        add("problems", model, "exact_match", "greedy", right, n=n + 1)
        add("problems", model, "stop_rate", "greedy", right + 0.29, n=n + 1)
    add("preference", "dpo", "accuracy", "logprob", 0.633, n=n + 2)
    add("preference", "dpo", "accuracy", "reward", 0.777, n=n + 2)
    add("preference", "longer answer wins", "accuracy", "length", 0.481, n=n + 2)
    add("tales", "dpo", "on_topic_and_kind", "sampled", 0.861, n=n + 3)
    wiki = {"n": n + 4, "split": "wiki"}
    add("text_perplexity", "dpo", "perplexity", "tokens", 33.1, **wiki)
    add("text_perplexity", "dpo", "perplexity", "words", 71.7, **wiki)
    add("text_perplexity", "dpo", "bits_per_byte", "bpb", 1.834, **wiki)
    for how, auc in (("likelihood", 0.641), ("best_of", 0.692)):
        add("rerank", "dpo", "auc", how, auc, n=n + 5, verifier_hash="hash-verifier")
    for k in (1, 2, 4):
        for how, right in RERANKED.items():
            value = right * scale + k / 100
            rows.append(row("rerank", "dpo", "exact_match", f"{how}@{k}", value, n=n + 6))
    return [r | {"seconds": 50 * scale} for r in rows]


def metrics_rows(scale: float = 1.0) -> list[dict]:
    """Return the log of a run of four steps."""
    costs = {"flops": 3.3e11, "step_ms": 2123.0, "tokens_per_s": 8111.0}
    costs = {name: value * scale for name, value in costs.items()}
    steps = []
    for i in range(4):
        done = {"step": i, "loss": (5.0 - i) * scale, "tokens": 1.7e6 * scale * (i + 1)}
        steps.append(done | costs)
    return [{"step": 0, "val_loss": 5.0 * scale}, *steps, {"step": 4, "val_loss": 1.5 * scale}]


def write_run(folder: Path, results=None, metrics=None, said: str = "it is 7") -> str:
    """Write results, logs and generations. -> the folder"""
    write_jsonl(str(folder / "results.jsonl"), hand_made() if results is None else results)
    for stage in ("pretrain", "dpo"):
        log = metrics_rows() if metrics is None else metrics
        write_jsonl(str(folder / stage / "metrics.jsonl"), log)
        solutions = [{"text": f"{stage}: {said}", "correct": False}]
        rows = [{"question": "How many?", "answer": "#### 7", "solutions": solutions}]
        write_sealed(str(folder / "generations" / f"{stage}_hash-{stage}_settings.jsonl"), rows)
    return str(folder)


def text_of(folder: str) -> str:
    """Write the report, and return its text."""
    assert report.main([f"--out_dir={folder}"]) == 0
    with open(os.path.join(folder, "report.md")) as f:
        return f.read()


def with_items(folder: Path, rows: list[dict], items: dict[str, list[float]]) -> list[dict]:
    """Return the rows with items files: right or wrong as items[model] says."""
    for r in rows:
        estimate = proportion(items[r["model"]])
        r |= {"items": f"items/{r['model']}.json", "data_hash": "same", **estimate.as_json()}
        write_json(str(folder / r["items"]), {item_key(r): asdict(estimate.items)})
    return rows
