"""The report, made of result files and nothing else, and the whole loop in one command, killed and repeated."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import data
import eval as evaluation
import report
import speedrun
import stats
import toy
from configurator import UserError

ROOT = Path(__file__).resolve().parent.parent
TOY = data.load_tokenizer("toy")


# ---------------------------------------------------------------------------------------------------------------------
# The report, from files written by hand

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


def row(task, model, metric, protocol, value, width=0.05, n=40, **more) -> dict:
    stage = model if model in speedrun.STAGES else "untrained"
    return {
        "task": task,
        "model": model,
        "stage": stage,
        "metric": metric,
        "protocol": protocol,
        "value": value,
        "low": value - width,
        "high": value + width / 2,
        "n": n,
        "split": "test",
        "weights_hash": f"hash-{model}",
        **ORIGIN,
        **more,
    }


def hand_made(scale: float = 1.0, n: int = 40) -> list[dict]:
    """One result of every kind the report shows. scale: another world with other numbers."""
    s = scale
    rows = [
        row("val_loss", model, "val_loss", "windows", value * s, n=n)
        for model, value in (("untrained", 5.561), ("pretrain", 1.372))
    ]
    rows += [
        row("problems", model, metric, "greedy", value * s, n=n + 1)
        for model, value in (("pretrain", 0.153), ("dpo", 0.417))
        for metric, value in (("exact_match", value), ("stop_rate", value + 0.29))
    ]
    rows += [
        row("preference", "dpo", "accuracy", "logprob", 0.633 * s, n=n + 2),
        row("preference", "dpo", "accuracy", "reward", 0.777 * s, n=n + 2),
        row("preference", "longer answer wins", "accuracy", "length", 0.481 * s, n=n + 2),
    ]
    rows += [row("tales", "dpo", "on_topic_and_kind", "sampled", 0.861 * s, n=n + 3)]
    rows += [
        row("text_perplexity", "dpo", "perplexity", protocol, value * s, n=n + 4, split="wiki")
        for protocol, value in (("tokens", 33.1), ("words", 71.7))
    ]
    rows += [
        row("text_perplexity", "dpo", "bits_per_byte", "bpb", 1.834 * s, n=n + 4, split="wiki")
    ]
    rows += [
        row("rerank", "dpo", "auc", how, value * s, n=n + 5, verifier_hash="hash-verifier")
        for how, value in (("likelihood", 0.641), ("best_of", 0.692))
    ]
    rows += [
        row("rerank", "dpo", "exact_match", f"{how}@{k}", value * s + k / 100, n=n + 6)
        for k in (1, 2, 4)
        for how, value in (
            ("majority", 0.214),
            ("likelihood", 0.225),
            ("weighted", 0.236),
            ("best_of", 0.258),
            ("oracle", 0.399),
        )
    ]
    return rows


def metrics_rows(scale: float = 1.0) -> list[dict]:
    steps = [
        {
            "step": i,
            "loss": (5.0 - i) * scale,
            "tokens": 1.7e6 * scale * (i + 1),
            "flops": 3.3e11 * scale,
            "step_ms": 2123.0 * scale,
            "tokens_per_s": 8111.0 * scale,
        }
        for i in range(4)
    ]
    return [{"step": 0, "val_loss": 5.0 * scale}, *steps, {"step": 4, "val_loss": 1.5 * scale}]


def write_run(folder: Path, results=None, metrics=None, said: str = "it is 7") -> str:
    data.write_jsonl(str(folder / "results.jsonl"), hand_made() if results is None else results)
    for stage in ("pretrain", "dpo"):
        data.write_jsonl(
            str(folder / stage / "metrics.jsonl"), metrics_rows() if metrics is None else metrics
        )
        data.write_jsonl(
            str(folder / "generations" / f"{stage}_hash_settings.jsonl"),
            [
                {
                    "question": "How many?",
                    "answer": "#### 7",
                    "solutions": [{"text": f"{stage}: {said}", "correct": False}],
                }
            ],
        )
    return str(folder)


def text_of(folder: str) -> str:
    assert report.main([f"--out_dir={folder}"]) == 0
    with open(os.path.join(folder, "report.md")) as f:
        return f.read()


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(report, "plot_loss", lambda rows, folder, run: None)
    monkeypatch.setattr(report, "plot_rerank", lambda rows, folder, greedy: "best_of_n.png")


def test_the_report_shows_the_values_of_the_files(tmp_path, no_plots):
    """Rates in percent with their intervals, losses and perplexities as they are."""
    text = text_of(write_run(tmp_path))
    for shown in (
        "5.5610 [5.5110, 5.5860]",
        "1.3720 [1.3220, 1.3970]",
        "41.7 % [36.7, 44.2]",
        "63.3 % [58.3, 65.8]",
        "77.7 % [72.7, 80.2]",
        "48.1 % [43.1, 50.6]",
        "86.1 % [81.1, 88.6]",
        "33.10 [33.05, 33.12]",
        "71.70 [71.65, 71.73]",
        "1.8340 [1.7840, 1.8590]",
        "AUC of the verifier, n = 45 solutions | 0.692 [0.642, 0.717]",
        "0.641 [0.591, 0.666]",
        "43.9 % [38.9, 46.4]",
        "How many?",
        "dpo: it is 7",
        "hash-pretrain",
        "hash-verifier",
        "abc1234",
        "6.80M",
        "3.30e+11",
        "8,111",
    ):
        assert shown in text, shown


def test_no_number_in_the_report_is_written_by_hand(tmp_path, no_plots):
    """A report once said 40,000 steps of a run of 80,000. Three runs that differ in every number have none in common, but
    95 (per cent intervals), the 4 of "samples = 4" and the 7 of the problem shown."""
    number = re.compile(r"(?<![\w.+-])\d[\d.,]*")
    texts = []
    for name, scale, n in (("a", 1.0, 40), ("b", 0.8131, 60), ("c", 0.6377, 90)):
        folder = tmp_path / name
        write_run(
            folder, hand_made(scale, n), metrics_rows(scale)[: {"a": 6, "b": 4, "c": 3}[name]]
        )
        text = re.sub("Commit .*? Every", "Every", text_of(str(folder)).replace(str(folder), ""))
        texts.append({found.rstrip(".,") for found in number.findall(text)})
    common = set.intersection(*texts)
    assert len(texts[0]) > 40 and common <= {"95", "4", "7"}, common


@pytest.mark.parametrize(
    "number",
    [
        i
        for i, r in enumerate(hand_made())
        if "@" not in r["protocol"] or r["protocol"].endswith("@4")
    ],
)
def test_a_changed_result_changes_the_report(tmp_path, no_plots, number):
    """Each single value counts: none is taken from elsewhere, none is left out."""
    results = hand_made()
    before = text_of(write_run(tmp_path, results))
    results[number] = {**results[number], "value": 1.07 * results[number]["value"]}
    write_run(tmp_path, results)
    os.remove(tmp_path / "report.md")
    assert text_of(str(tmp_path)) != before


def test_changed_logs_and_samples_change_the_report(tmp_path, no_plots):
    """Cost comes from metrics.jsonl, the shown answers from the stored generations."""
    texts = set()
    for metrics, said in (
        (metrics_rows(), "it is 7"),
        (metrics_rows(1.1), "it is 7"),
        (metrics_rows(), "it is 8"),
    ):
        write_run(tmp_path, metrics=metrics, said=said)
        (tmp_path / "report.md").unlink(missing_ok=True)
        texts.add(text_of(str(tmp_path)))
    assert len(texts) == 3


def test_every_image_in_the_report_exists_and_shows_something(tmp_path):
    """A broken link or a blank plot is found by no one but the reader. And the curve follows the numbers."""
    text = text_of(write_run(tmp_path))
    names = re.findall(r"!\[\]\((.*?)\)", text)
    assert sorted(names) == ["best_of_n.png", "loss_dpo.png", "loss_pretrain.png"]
    for name in names:
        image = matplotlib.image.imread(tmp_path / name)
        assert (
            min(image.shape[:2]) > 200
            and len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 3
        )
    before = {name: (tmp_path / name).read_bytes() for name in names}
    results = [{**r, "value": 0.3} if r["protocol"] == "best_of@2" else r for r in hand_made()]
    write_run(tmp_path, results, metrics_rows()[:-2])
    assert report.main([f"--out_dir={tmp_path}", "--force"]) == 0
    assert all((tmp_path / name).read_bytes() != content for name, content in before.items())


def test_a_report_is_not_overwritten_unasked(tmp_path, no_plots, capsys):
    """Somebody may have written notes into it: a new one gets a folder of its own, kept with --no_overwrite, replaced with --force."""
    folder = write_run(tmp_path)
    (tmp_path / "report.md").write_text("mine")
    assert report.main([f"--out_dir={folder}"]) == 0
    (new,) = [name for name in os.listdir(folder) if name.startswith("report_")]
    assert (tmp_path / new / "report.md").read_text().startswith("# Report of") and (
        tmp_path / "report.md"
    ).read_text() == "mine"
    assert report.main([f"--out_dir={folder}", "--no_overwrite"]) == 0
    assert "kept" in capsys.readouterr().out and (tmp_path / "report.md").read_text() == "mine"
    assert report.main([f"--out_dir={folder}", "--force"]) == 0
    assert (tmp_path / "report.md").read_text().startswith("# Report of")


def test_no_results_is_an_error_in_words(tmp_path):
    """An empty report would look like a finished one."""
    with pytest.raises(UserError, match="holds no results: run eval.py"):
        report.main([f"--out_dir={tmp_path}"])
    assert os.listdir(tmp_path) == []


def test_the_newest_of_equal_results_is_shown(tmp_path, no_plots):
    """After --force or a retrained stage results.jsonl is newer than the timestamped files beside it."""
    key = {"task": "val_loss", "model": "pretrain", "metric": "val_loss", "protocol": "windows"}
    folder = write_run(tmp_path, [row(**key, value=1.111, date="2026-01-03 00:00:00")])
    data.write_jsonl(
        str(tmp_path / "results_20260102_000000.jsonl"),
        [row(**key, value=2.222, date="2026-01-02 00:00:00")],
    )
    text = text_of(folder)
    assert "1.1110" in text and "2.2220" not in text


def test_bits_per_byte_below_one_are_no_percentage(tmp_path, no_plots):
    """0.91 bits per byte is a good model, "91.0 %" is nonsense."""
    text = text_of(
        write_run(
            tmp_path, [row("text_perplexity", "dpo", "bits_per_byte", "bpb", 0.912, split="wiki")]
        )
    )
    assert "0.912" in text and "91.2 %" not in text


@pytest.mark.parametrize(
    "task", ["val_loss", "problems", "preference", "tales", "text_perplexity", "rerank"]
)
def test_results_of_one_task_alone_make_a_report(tmp_path, task):
    """eval.py --tasks=... is allowed, so its results must be reportable, with what is missing left out."""
    folder = write_run(tmp_path, [r for r in hand_made() if r["task"] == task])
    assert text_of(folder).startswith("# Report of")


def with_items(folder: Path, rows: list[dict], items: dict[str, list[float]]) -> list[dict]:
    """rows whose items files exist, right or wrong as items[model] says."""
    for r in rows:
        r |= {
            "items": f"items/{r['model']}.json",
            "data_hash": "same",
            **{k: v for k, v in stats.proportion(items[r["model"]]).items() if k != "items"},
        }
        data.write_json(
            str(folder / r["items"]),
            {evaluation.item_key(r): stats.proportion(items[r["model"]])["items"]},
        )
    return rows


def test_the_report_says_which_differences_are_real(tmp_path, no_plots):
    """40 of 100 newly right and none lost is real, and bold; one gained and one lost is not. Rows of other data are not compared."""
    rows = [
        row("problems", model, "exact_match", "greedy", 0) for model in ("pretrain", "sft", "dpo")
    ]
    with_items(
        tmp_path,
        rows,
        {"pretrain": [0] * 100, "sft": [1] * 40 + [0] * 60, "dpo": [0] + [1] * 40 + [0] * 59},
    )
    text = text_of(write_run(tmp_path, rows))
    assert re.search(
        r"\*\*\+40\.0 points \[\+3\d\.0, \+\d\d\.0\], p < 0\.001\*\* \| \+0\.0 points \[-\d\.0, \+\d\.0\], p = 1\.000 \|",
        text,
    )
    rows[1]["data_hash"] = "other"
    (tmp_path / "report.md").unlink()
    assert "Which differences are real" not in text_of(write_run(tmp_path, rows))


def test_runs_are_compared_item_by_item(tmp_path, capsys):
    """eval.py --compare: both values, the paired difference where the data are the same, and an error in words for a run without results."""
    for name, hits in (("a", 30), ("b", 60)):
        rows = with_items(
            tmp_path / name,
            [row("problems", "sft", "exact_match", "greedy", 0)],
            {"sft": [1] * hits + [0] * (100 - hits)},
        )
        write_run(
            tmp_path / name, [*rows, row("val_loss", "sft", "val_loss", "windows", hits / 10)]
        )
    assert evaluation.main([f"--compare={tmp_path / 'a'},{tmp_path / 'b'}"]) == 0
    text = capsys.readouterr().out
    assert (
        "30.0 %" in text
        and "60.0 %" in text
        and "**+30.0 points" in text
        and "3.0000" in text
        and "6.0000" in text
    )
    with pytest.raises(UserError, match="holds no results"):
        evaluation.main([f"--compare={tmp_path / 'a'},{tmp_path / 'c'}"])


def test_a_sweep_gets_its_trade_off_curve(tmp_path):
    """Three runs with answers and plain text measured: a point each, and the plot follows the numbers."""
    rows = [
        row("chats", model, "response_loss", "teacher", 6 + i / 10, stage=model)
        for i, model in enumerate(("lr1", "lr2", "lr 3, replay"))
    ]
    rows += [
        row(
            "text_perplexity",
            model,
            "perplexity",
            "per_line",
            2000 + 100 * i,
            split="wiki",
            stage=model,
        )
        for i, model in enumerate(("lr1", "lr2", "lr 3, replay"))
    ]
    data.write_jsonl(str(tmp_path / "lr 3, replay" / "metrics.jsonl"), metrics_rows())
    assert (
        "![](loss_lr_3_replay.png)" in text_of(write_run(tmp_path, rows))
        and (tmp_path / "loss_lr_3_replay.png").exists()
    )
    (tmp_path / "report.md").unlink()
    assert "![](tradeoff.png)" in text_of(write_run(tmp_path, rows))
    before = (tmp_path / "tradeoff.png").read_bytes()
    rows[-1]["value"] *= 2
    write_run(tmp_path, rows)
    assert (
        report.main([f"--out_dir={tmp_path}", "--force"]) == 0
        and (tmp_path / "tradeoff.png").read_bytes() != before
    )


def test_choosing_is_compared_with_the_greedy_answer(tmp_path, no_plots):
    """Best-of-N counts for what it adds to one greedy answer, on the same problems."""
    (greedy,) = with_items(
        tmp_path, [row("problems", "dpo", "exact_match", "greedy", 0)], {"dpo": [1] * 50 + [0] * 50}
    )
    (best,) = with_items(
        tmp_path,
        [row("rerank", "dpo", "exact_match", "best_of@4", 0)],
        {"dpo": [1] * 70 + [0] * 30},
    )
    data.write_json(
        str(tmp_path / greedy["items"]),
        {
            evaluation.item_key(r): stats.proportion([1] * n + [0] * (100 - n))["items"]
            for r, n in ((greedy, 50), (best, 70))
        },
    )
    assert re.search(
        r"best_of, samples = 4, exact match \| 70\.0 % \[.*?\] \| \*\*\+20\.0 points",
        text_of(write_run(tmp_path, [greedy, best])),
    )


def test_spread_and_overlap_are_said_in_words(tmp_path, no_plots):
    """How much a few-shot number depends on the draw of its examples, and how much of a text training may have seen."""
    rows = [
        row("sst2", "sft", "accuracy", "4-shot", 0.6, draws=[0.551, 0.648]),
        row("text_perplexity", "sft", "perplexity", "words", 30, split="wiki", overlap=0.1234),
    ]
    text = text_of(write_run(tmp_path, rows))
    assert (
        "4-shot, lowest and highest of the draws of examples: sft 55.1-64.8 %" in text
        and "Of wiki, detokenised, 12.34 % of all runs of 13 tokens" in text
    )


def test_errors_are_shown_with_examples(tmp_path, no_plots):
    example = {"question": "2 + 2?", "text": "2+2=5", "answer": "4", "false_equation": "2+2=5"}
    text = text_of(
        write_run(
            tmp_path,
            [row("problems", "sft", "error_arithmetic", "greedy", 0.1, examples=[example])],
        )
    )
    assert "error arithmetic: `2 + 2?` said `2+2=5`, right is 4; false: `2+2=5`" in text


# ---------------------------------------------------------------------------------------------------------------------
# The whole loop

RECIPES = {
    "pretrain": "seq_len = 192; n_layer = 1; n_head = 2; d_model = 32; batch_tokens = 768",
    "sft": 'mode = "sft"; batch_tokens = 768',
    "dpo": 'mode = "dpo"; batch_tokens = 768; optimizer = "adamw"',
    "verifier": 'mode = "verifier"; batch_tokens = 768; n_problems = 4; n_samples = 2; max_new_tokens = 8',
    "eval": "n_problems = 4; n_samples = 2; max_new_tokens = 8",
}
LOOP = '; micro_batch = 4; eval_interval = 3; eval_rows = 4; save_interval = 3; log_interval = 1; device = "cpu"; dtype = "float32"'


def prepared(folder: Path) -> list[str]:
    """A tiny toy world and recipes. -> flags for speedrun.py"""
    world = folder / "data" / "toy"
    for split, n in (("train", 60), ("val", 20)):
        text = "".join(toy.records(toy.story, split, n, 0))
        data.write_shard(str(world / f"{split}_000.bin"), np.array(TOY.encode(text), "<u4"), TOY)
        data.write_jsonl(
            str(world / f"sft_{split}.jsonl"), toy.records(toy.instruction, split, 12, 0)
        )
        data.write_jsonl(
            str(world / f"dpo_{split}.jsonl"), toy.records(toy.preference, split, 8, 0)
        )
    for split in ("train", "verifier", "val", "test"):
        data.write_jsonl(
            str(world / f"problems_{split}.jsonl"), toy.records(toy.problem, split, 6, 0)
        )
    data.write_jsonl(str(world / "dpo_test.jsonl"), toy.records(toy.preference, "test", 3, 0))
    data.write_json(str(world / "manifest_pretrain.json"), {})
    for name, body in RECIPES.items():
        (folder / f"{name}.py").write_text(
            (body + (LOOP if name != "eval" else '; device = "cpu"')).replace("; ", "\n") + "\n"
        )
    return [
        f"--out_dir={folder / 'run'}",
        f"--data_dir={folder / 'data'}",
        *(f"--{name}={folder / name}.py" for name in RECIPES),
        "--max_steps=6",
    ]


def no_network(*args, **kwargs):
    raise AssertionError("a socket was opened: this program must run without network")


@pytest.fixture
def handlers():
    """The speedrun sets signal handlers; leave the test runner its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def digests(folder: Path) -> dict[str, tuple]:
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / "state.json" and path.name != ".lock"
    }


def assert_complete(folder: Path):
    """Everything that a finished loop owes its reader."""
    for stage in speedrun.STAGES[:-1]:
        assert json.loads((folder / stage / "state.json").read_text())["state"] == "done"
        assert (folder / stage / "ckpt_0000006.pt").is_file() and (
            folder / stage / "config.json"
        ).is_file()
        steps = [
            r["step"]
            for r in data.read_metrics(str(folder / stage / "metrics.jsonl"))
            if "loss" in r
        ]
        assert steps == list(range(6)), stage
    assert json.loads((folder / "state.json").read_text()) == {"state": "done"}
    rows = data.read_jsonl(str(folder / "results.jsonl"))
    assert {r["task"] for r in rows} == {
        "val_loss",
        "chats",
        "problems",
        "preference",
        "tales",
        "rerank",
    }
    assert {r["stage"] for r in rows} == {"untrained", "pretrain", "sft", "dpo"}
    text = (folder / "report.md").read_text()
    images = re.findall(r"!\[\]\((.*?)\)", text)
    assert set(images) == {
        "best_of_n.png",
        "calibration.png",
        "dpo_curves.png",
        *(f"loss_{stage}.png" for stage in speedrun.STAGES[:-1]),
    }
    assert all(matplotlib.image.imread(folder / name).std() > 0 for name in images)


@pytest.mark.slow
def test_the_whole_loop_runs_without_network_and_a_second_time_does_nothing(
    tmp_path, monkeypatch, handlers, capsys
):
    """One command, offline, from nothing to a report; repeated it says what it skips and changes no file."""
    monkeypatch.setattr(socket, "socket", no_network)
    argv, folder = prepared(tmp_path), tmp_path / "run"
    assert speedrun.main(argv) == 0
    assert_complete(folder)
    before = digests(folder)
    capsys.readouterr()
    assert speedrun.main(argv) == 0
    said = capsys.readouterr().out
    assert digests(folder) == before
    assert (
        said.count("is done: nothing to do") == 4
        and "all results exist" in said
        and "exists and is kept" in said
    )
    assert json.loads((folder / "state.json").read_text()) == {"state": "done"}


@pytest.mark.slow
def test_a_killed_loop_ends_done_when_it_is_started_again(tmp_path, handlers):
    """kill -9 in the middle of a stage: the same command goes on from the last checkpoint, finished stages are not touched."""
    argv, folder = prepared(tmp_path), tmp_path / "run"
    (tmp_path / "sft.py").write_text(
        (tmp_path / "sft.py").read_text().replace("batch_tokens = 768", "batch_tokens = 12288")
    )
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "speedrun.py"), *argv],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        limit = time.time() + 120
        while not any(
            r["step"] >= 3 and "loss" in r
            for r in data.read_metrics(str(folder / "sft" / "metrics.jsonl"))
        ):
            assert process.poll() is None and time.time() < limit, (
                process.stderr.read().decode() if process.poll() is not None else "too slow"
            )
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (
        process.returncode == -9
        and json.loads((folder / "sft" / "state.json").read_text())["state"] == "running"
    )
    assert not (folder / "dpo").exists()
    pretrained = digests(folder / "pretrain")
    assert speedrun.main(argv) == 0
    assert_complete(folder)
    assert {
        name: x for name, x in digests(folder / "pretrain").items() if name != "state.json"
    } == {n: x for n, x in pretrained.items() if n != "state.json"}


@pytest.mark.slow
def test_one_stage_alone_starts_from_the_checkpoint_it_is_given(tmp_path, handlers):
    """--stage=dpo --checkpoint=... trains DPO from there and runs nothing else; without --checkpoint it needs the stage before."""
    argv, folder = prepared(tmp_path), tmp_path / "run"
    assert speedrun.main([*argv, "--stage=pretrain"]) == 0
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["pretrain"]
    with pytest.raises(UserError, match="no checkpoint at"):
        speedrun.main([*argv, "--stage=dpo"])
    assert json.loads((folder / "state.json").read_text()) == {"state": "failed"}
    assert speedrun.main([*argv, "--stage=dpo", f"--checkpoint={folder / 'pretrain'}"]) == 0
    assert (
        sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["dpo", "pretrain"]
        and not (folder / "report.md").exists()
    )
    config = json.loads((folder / "dpo" / "config.json").read_text())
    assert config["mode"] == "dpo" and config["init_from"] == str(folder / "pretrain")


@pytest.mark.slow
def test_a_stage_stopped_by_a_signal_is_preempted_and_goes_on_later(
    tmp_path, monkeypatch, handlers
):
    """SIGTERM during a stage: saved, exit code 75 for the scheduler, and the same command finishes the work."""
    argv, folder = prepared(tmp_path), tmp_path / "run"
    lr_at = speedrun.train.lr_at

    def interrupted(step, cfg):
        if step == 2 and cfg.out_dir.endswith("sft"):
            os.kill(os.getpid(), signal.SIGTERM)
        return lr_at(step, cfg)

    monkeypatch.setattr(speedrun.train, "lr_at", interrupted)
    assert speedrun.main(argv) == 75
    assert (
        json.loads((folder / "state.json").read_text()) == {"state": "preempted"}
        and (folder / "sft" / "ckpt_0000003.pt").is_file()
    )
    monkeypatch.undo()
    assert speedrun.main(argv) == 0
    assert_complete(folder)


def test_wrong_requests_are_errors_in_words(tmp_path):
    """An unknown stage names the known ones; flags that contradict each other are refused; nothing is started."""
    for argv, words in (
        (
            ["--stage=rlhf"],
            "stage must be all or one of pretrain, sft, dpo, verifier, eval, got 'rlhf'",
        ),
        (["--force", "--no_overwrite"], "exclude each other"),
    ):
        with pytest.raises(UserError, match=words):
            speedrun.main([*argv, f"--out_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["all", "pretrain", "eval"])
def test_a_checkpoint_that_no_stage_would_start_from_is_refused(stage):
    """Pretraining starts from nothing and eval reads the folder: a --checkpoint would be dropped in silence, and the user would believe
    that it had been used."""
    with pytest.raises(UserError, match="checkpoint"):
        speedrun.SpeedrunConfig(stage=stage, checkpoint="out/toy/sft")
