"""Tables show which differences are real, and numbers as what they are."""

import re
from dataclasses import asdict

import pytest
from helpers import fails
from hypothesis import given, settings
from hypothesis import strategies as st
from report_helpers import leave_out_plots, row, text_of, with_items, write_run

import eval as evaluation
from evals.results import item_key
from evals.stats import mean, proportion
from evals.tables import compare, table
from runtime.files import write_json


@pytest.fixture
def no_plots(monkeypatch):
    leave_out_plots(monkeypatch)


def test_bits_per_byte_below_one_are_no_percentage(tmp_path, no_plots):
    """0.91 bits per byte is a good model, "91.0 %" is nonsense."""
    text = text_of(
        write_run(
            tmp_path, [row("text_perplexity", "dpo", "bits_per_byte", "bpb", 0.912, split="wiki")]
        )
    )
    assert "0.912" in text and "91.2 %" not in text


def test_the_report_says_which_differences_are_real(tmp_path, no_plots):
    """40 of 100 newly right and none lost is real, and bold; one gained and one lost is not.

    Rows of other data are not compared.
    """
    items = {"pretrain": [0] * 100, "sft": [1] * 40 + [0] * 60}
    items["dpo"] = [0] + [1] * 40 + [0] * 59
    rows = [row("problems", model, "exact_match", "greedy", 0) for model in items]
    with_items(tmp_path, rows, items)
    text = text_of(write_run(tmp_path, rows))
    real = r"\*\*\+40\.0 points \[\+3\d\.0, \+\d\d\.0\], p < 0\.001\*\*"
    none = r"\+0\.0 points \[-\d\.0, \+\d\.0\], p = 1\.000"
    assert re.search(rf"{real} \| {none} \|", text)
    rows[1]["data_hash"] = "other"
    (tmp_path / "report.md").unlink()
    assert "Which differences are real" not in text_of(write_run(tmp_path, rows))


@pytest.mark.parametrize("kept, compared", [((None, None), True), (("a", "a"), True)])
@pytest.mark.parametrize("swap", [False, True])
def test_items_are_paired_only_where_the_same_ones_were_kept(
    tmp_path, no_plots, kept, compared, swap
):
    """Two contexts may leave out equally many problems, and not the same: item 7 is another one."""
    items = {"pretrain": [0] * 50, "sft": [1] * 50}
    rows = [row("problems", model, "exact_match", "greedy", 0) for model in items]
    with_items(tmp_path, rows, items)
    for one, digest in zip(rows, ("b", kept[1]) if swap else kept, strict=True):
        one |= {"kept": digest} if digest else {}
    assert ("p < 0.001" in text_of(write_run(tmp_path, rows))) == (compared and not swap)


@pytest.mark.parametrize("changed, compared", [("calculator", False), ("dtype", True)])
def test_answers_under_other_settings_are_not_compared(tmp_path, no_plots, changed, compared):
    """With the calculator against without it is no gain; what one alone has may differ."""
    items = {"pretrain": [0] * 50, "sft": [1] * 50}
    rows = [row("problems", model, "exact_match", "greedy", 0) for model in items]
    rows[0]["settings"] = {"problems": "exam", "calculator": "no", "dtype": "no", "n_samples": 8}
    rows[1]["settings"] = {"problems": "exam", "calculator": "no", "dtype": "no"}
    rows[1]["settings"][changed] = "yes"
    with_items(tmp_path, rows, items)
    assert ("p < 0.001" in text_of(write_run(tmp_path, rows))) == compared


def test_runs_are_compared_item_by_item(tmp_path, capsys):
    """eval.py --compare shows both values, and the paired difference where the data are the same.

    A run without results is an error in words.
    """
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
    missing = [f"--compare={tmp_path / 'a'},{tmp_path / 'c'}"]
    fails(lambda: evaluation.main(missing), "holds no results")


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
    items = {}
    for r, n in ((greedy, 50), (best, 70)):
        items[item_key(r)] = asdict(proportion([1] * n + [0] * (100 - n)).items)
    write_json(str(tmp_path / greedy["items"]), items)
    words = r"best_of, samples = 4, exact match \| 70\.0 % \[.*?\] \| \*\*\+20\.0 points"
    assert re.search(words, text_of(write_run(tmp_path, [greedy, best])))


def test_spread_and_overlap_are_said_in_words(tmp_path, no_plots):
    """How much a few-shot number depends on the draw of its examples is said.

    So is how much of a text training may have seen.
    """
    rows = [
        row("sst2", "sft", "accuracy", "4-shot", 0.6, draws=[0.551, 0.648]),
        row("text_perplexity", "sft", "perplexity", "words", 30, split="wiki", overlap=0.1234),
    ]
    text = text_of(write_run(tmp_path, rows))
    assert (
        "4-shot, lowest and highest of the draws of examples: sft 55.1-64.8 %" in text
        and "Of wiki, detokenised, 12.34 % of all runs of 13 tokens" in text
    )


def test_bold_needs_the_interval_and_the_p_value(tmp_path, no_plots):
    """Four of forty gained: the bootstrap's interval excludes 0, McNemar's p is 0.125."""
    items = {"pretrain": [0] * 40, "sft": [1] * 4 + [0] * 36}
    rows = [row("problems", model, "exact_match", "greedy", 0) for model in items]
    text = text_of(write_run(tmp_path, with_items(tmp_path, rows, items)))
    assert re.search(r"\| \+10\.0 points \[\+\d\.\d, \+\d+\.\d\], p = 0\.125 \|", text)


def test_a_bootstrap_says_that_it_has_a_floor(tmp_path, no_plots):
    """No draw of a thousand is on the other side: the p-value is below 0.002, not 0.002."""
    rows = [row("chats", model, "response_loss", "teacher", 0) for model in ("pretrain", "sft")]
    for r, loss in zip(rows, (2.0, 1.0), strict=True):
        estimate = mean([loss + i % 7 / 10 for i in range(50)])
        r |= {"items": f"items/{r['model']}.json", "data_hash": "same", **estimate.as_json()}
        write_json(str(tmp_path / r["items"]), {item_key(r): asdict(estimate.items)})
    text = text_of(write_run(tmp_path, rows))
    assert "-1.0000], p < 0.002**" in text.replace("-1.0000, -1.0000", "-1.0000")


@pytest.mark.parametrize("n, said", [(29, True), (30, False), (1, True)])
def test_an_interval_of_few_items_says_so(tmp_path, no_plots, n, said):
    """In the table of values and in that of differences."""
    items = {"pretrain": [0] * n, "sft": [1] * n}
    rows = [row("problems", model, "exact_match", "greedy", 0) for model in items]
    text = text_of(write_run(tmp_path, with_items(tmp_path, rows, items)))
    words = f"] (only {n})"
    assert text.count(words) == (8 if said else 0)  # three tables, two differences
    assert "-0.0 %" not in text and "[-0.0" not in text


def test_the_data_set_stands_in_the_row_where_there_are_several(tmp_path, no_plots):
    """A run measured on its own shards and one measured on others are not put side by side."""
    rows = []
    for data, value in (("toy", 1.1111), ("novel", 2.2222)):
        for model in ("pretrain", "sft"):
            rows.append(row("val_loss", model, "val_loss", "windows", value, 0))
            rows[-1] |= {"settings": {"data": data, "dtype": "x"}, "data_hash": data}
            value += 0.5
    text = text_of(write_run(tmp_path, rows[:3]))
    assert re.search(r"\| val loss \(nats/token\), toy \| 40 \|  \| 1\.1111.*? \| 1\.6111", text)
    assert re.search(r"\| val loss \(nats/token\), novel \| 40 \|  \| 2\.2222 [^|]* \|  \|", text)
    (tmp_path / "report.md").unlink()
    assert "| val loss (nats/token) | 40" in text_of(write_run(tmp_path, rows[:2]))


def test_what_cannot_be_compared_is_refused(tmp_path):
    """One folder alone, or the same one twice under two names."""
    folder = write_run(tmp_path / "a", [row("val_loss", "sft", "val_loss", "windows", 2.5)])
    for argv in ([folder], [folder, folder], [folder, f"{tmp_path}/b/../a/"]):
        fails(lambda argv=argv: evaluation.main([f"--compare={','.join(argv)}"]), "two folders")
    other = write_run(tmp_path / "b", [row("chats", "sft", "response_loss", "teacher", 2.5)])
    assert "They share no number" in compare([folder, other])


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.text(max_size=12), min_size=2, max_size=2), min_size=1, max_size=3))
def test_no_text_breaks_a_table(rows):
    """Names of runs, data sets and sources hold bars, newlines and whatever else people type."""
    text = table(["a", "b"], rows)
    lines = text.split("\n")
    assert len(lines) == len(rows) + 2 == len(text.splitlines())
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in lines)


def test_the_number_of_items_is_that_of_every_model(tmp_path, no_plots):
    """A stage of a smaller context leaves problems out: its 12 are not the 40 of the others."""
    rows = [row("problems", "sft", "exact_match", "greedy", 0.5)]
    rows.append(row("problems", "dpo", "exact_match", "greedy", 0.5, n=12))
    text = text_of(write_run(tmp_path, rows))
    assert "| problems, exact match | 12-40 |" in text and "exact match, greedy | 12-40 |" in text
