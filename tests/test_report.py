"""The report is made of result files and nothing else."""

import os
import re

import pytest
from helpers import fails
from report_helpers import hand_made, metrics_rows, row, text_of, write_run

from evals import plots, report
from runtime.files import write_jsonl


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(plots, "plot_loss", lambda rows, folder, run: None)
    monkeypatch.setattr(plots, "plot_rerank", lambda rows, folder, greedy: "best_of_n.png")


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
    """A report once said 40,000 steps of a run of 80,000.

    Three runs that differ in every number have none in common, but 95 (per cent intervals), the 4
    of "samples = 4" and the 7 of the problem shown.
    """
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


def test_a_report_is_not_overwritten_unasked(tmp_path, no_plots, capsys):
    """Somebody may have written notes into it: a new one gets a folder of its own.

    --no_overwrite keeps the old one, --force replaces it.
    """
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
    fails(lambda: report.main([f"--out_dir={tmp_path}"]), "holds no results: run eval.py")
    assert os.listdir(tmp_path) == []


def test_the_newest_of_equal_results_is_shown(tmp_path, no_plots):
    """After --force or a retrained stage results.jsonl is newer than the files with a timestamp."""
    key = {"task": "val_loss", "model": "pretrain", "metric": "val_loss", "protocol": "windows"}
    folder = write_run(tmp_path, [row(**key, value=1.111, date="2026-01-03 00:00:00")])
    write_jsonl(
        str(tmp_path / "results_20260102_000000.jsonl"),
        [row(**key, value=2.222, date="2026-01-02 00:00:00")],
    )
    text = text_of(folder)
    assert "1.1110" in text and "2.2220" not in text


@pytest.mark.parametrize(
    "task", ["val_loss", "problems", "preference", "tales", "text_perplexity", "rerank"]
)
def test_results_of_one_task_alone_make_a_report(tmp_path, task):
    """eval.py --tasks=... is allowed, so its results make a report without the rest."""
    folder = write_run(tmp_path, [r for r in hand_made() if r["task"] == task])
    assert text_of(folder).startswith("# Report of")


def test_errors_are_shown_with_examples(tmp_path, no_plots):
    example = {"question": "2 + 2?", "text": "2+2=5", "answer": "4", "false_equation": "2+2=5"}
    text = text_of(
        write_run(
            tmp_path,
            [row("problems", "sft", "error_arithmetic", "greedy", 0.1, examples=[example])],
        )
    )
    assert "error arithmetic: `2 + 2?` said `2+2=5`, right is 4; false: `2+2=5`" in text
