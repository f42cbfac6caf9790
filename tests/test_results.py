"""A results file that no accident can spoil."""

import functools
import json
import math
import multiprocessing
import resource
import tempfile

import pytest
from helpers import fork, wait
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.results import (
    append_results,
    current,
    is_whole,
    item_key,
    items_of,
    matches,
    newest,
    read_results,
)
from runtime.files import digest, write_json


def test_results_are_read_in_the_order_in_which_they_were_made(tmp_path):
    """The report shows the newest of equal results.

    Rows added to results.jsonl after a timestamped file are newer than that file.
    """
    for name, date, value in (
        ("results.jsonl", "2026-01-01 10:00:00", 1),
        ("results_20260102_100000.jsonl", "2026-01-02 10:00:00", 2),
        ("results.jsonl", "2026-01-03 10:00:00", 3),
    ):
        append_results(str(tmp_path / name), [{"task": "t", "date": date, "value": value}])
    assert [row["value"] for row in read_results(str(tmp_path))] == [1, 2, 3]


def appender(path: str, name: str, n: int, replace: bool):
    for i in range(n):
        rows = [{"who": name, "i": i, "part": part, "text": name * 3000} for part in range(3)]
        old = functools.partial(matches, who=name, i=i)
        append_results(path, rows, old if replace else None)


@pytest.mark.parametrize("replace", [False, True])
def test_processes_that_append_at_once_lose_and_mix_nothing(tmp_path, replace):
    """Two evaluations of one run on a cluster are a normal event.

    Also when one of them replaces rows.
    """
    path, context = str(tmp_path / "results.jsonl"), multiprocessing.get_context("fork")
    processes = [
        context.Process(target=appender, args=(path, name, 15, replace and name == "a"))
        for name in "abc"
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    with open(path) as f:
        rows = [json.loads(line) for line in f]
    assert [(row["i"], row["part"]) for row in rows if row["who"] == "b"] == [
        (i, part) for i in range(15) for part in range(3)
    ]
    assert sorted((row["who"], row["i"], row["part"]) for row in rows) == [
        (name, i, part) for name in "abc" for i in range(15) for part in range(3)
    ]
    assert all(row["text"] == row["who"] * 3000 for row in rows)


def test_a_torn_last_line_hides_no_other_result(tmp_path):
    """A full disk or a kill may leave half a line.

    Those before it are read, and those appended later too.
    """
    path = tmp_path / "results.jsonl"
    append_results(str(path), [{"value": 1}, {"value": 2}])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"value": 3, "task": "val')
    assert [row["value"] for row in read_results(str(tmp_path))] == [1, 2]


def test_results_appended_after_a_torn_line_are_not_lost(tmp_path):
    """Else every later evaluation would be done again and again, and no report would show it."""
    path = tmp_path / "results.jsonl"
    append_results(str(path), [{"value": 1}])
    path.write_bytes(path.read_bytes() + b'{"value": 2, "task": "val')
    append_results(str(path), [{"value": 3}, {"value": 4}])
    assert [row["value"] for row in read_results(str(tmp_path))] == [1, 3, 4]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("byte", [b"\xff", b"\n", b"x", b"\0"])
def test_a_flipped_byte_costs_its_own_row_and_no_other(tmp_path, capsys, place, byte):
    """It is named, it stays in the file, and what is added or replaced later loses nothing."""
    path = tmp_path / "results.jsonl"
    for value in range(3):
        append_results(str(path), [{"value": value}])
    lines = path.read_bytes().splitlines(keepends=True)
    lines[place] = byte + lines[place][1:]
    path.write_bytes(b"".join(lines))
    left = [value for value in range(3) if value != place]
    assert [row["value"] for row in read_results(str(tmp_path))] == left
    assert f"{path}:{place + 1} is no JSON object" in capsys.readouterr().out
    append_results(str(path), [{"value": 3}])
    append_results(str(path), [{"value": 4}], lambda row: row["value"] == 3)
    assert [row["value"] for row in read_results(str(tmp_path))] == [*left, 4]
    assert lines[place].rstrip(b"\n") in path.read_bytes()


def test_rows_are_appended_whole_or_not_at_all(tmp_path):
    """A full disk takes a part of what is written: here as a limit on the file's size."""
    path, whole = tmp_path / "results.jsonl", [{"value": i, "text": "x" * 100} for i in range(9)]
    append_results(str(path), whole)
    before = path.read_bytes()

    def child():
        limits = (len(before) + 500, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with pytest.raises(OSError, match=r"too large|No space"):
            append_results(str(path), whole)

    assert wait(fork(child)) == 0 and path.read_bytes() == before


def test_a_call_of_a_task_is_there_with_all_of_its_rows_alone(tmp_path):
    """Else a row that was lost is never measured again. Rows of old files do not tell."""
    path = tmp_path / "results.jsonl"
    append_results(str(path), [{"value": 1}, {"value": 2}])
    rows = read_results(str(tmp_path))
    assert is_whole(rows) and not is_whole(rows[:1]) and not is_whole([])
    assert is_whole([{"value": 1}])
    append_results(str(path), [{"value": 1}, {"value": 2}])
    assert is_whole(read_results(str(tmp_path))[1:])


def test_the_newest_is_the_last_by_order_whatever_the_clock_says(tmp_path):
    """Clocks are set back, and machines of one cluster stand in different time zones."""
    for i, date in enumerate(("2026-03-01T10:00:00Z", "2025-01-01T10:00:00Z", "")):
        name = "results.jsonl" if i % 2 else "results_20260101_100000.jsonl"
        append_results(str(tmp_path / name), [{"task": "t", "date": date, "value": i}])
    assert newest(read_results(str(tmp_path)), task="t")["value"] == 2


def test_items_that_have_changed_are_not_compared(tmp_path, capsys):
    """A changed digit gave another interval, silently."""
    items = {"num": [1.0, 2.0], "den": [1, 1], "transform": "mean"}
    row = {"model": "m", "metric": "x", "protocol": "p", "split": "test", "items": "items.json"}
    write_json(str(tmp_path / "items.json"), {item_key(row): items})
    assert items_of(str(tmp_path), row).num == [1.0, 2.0]  # an old row has no hash
    row["items_hash"] = digest(items)
    assert items_of(str(tmp_path), row).num == [1.0, 2.0]
    text = (tmp_path / "items.json").read_text()
    (tmp_path / "items.json").write_text(text.replace("2.0", "3.0"))
    assert items_of(str(tmp_path), row) is None and "has changed" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [lambda x: x, lambda x: [x], lambda x: {"deep": [1, x]}])
def test_a_number_that_is_not_finite_is_neither_written_nor_read(tmp_path, bad, place):
    """Such a file is no JSON, and an older one may hold such rows."""
    path = tmp_path / "results.jsonl"
    good = {"task": "t", "date": "1", "value": 1.0}
    append_results(str(path), [good])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_results(str(path), [{**good, "value": place(bad)}])
    assert path.read_bytes() == before
    with open(path, "a") as f:
        f.write(json.dumps({**good, "value": place(bad)}) + "\n")
    assert [row["value"] for row in read_results(str(tmp_path))] == [1.0]
    append_results(str(path), [good], lambda row: False)
    assert path.read_text().count("\n") == 2 and "N" not in path.read_text()


def stage_row(stage: str, weights: str, date: int, **more) -> dict:
    row = {"task": "val_loss", "model": stage, "stage": stage, "weights_hash": weights}
    return {**row, "split": "val", "date": str(date), "value": 1.0, **more}


@settings(max_examples=60, deadline=None)
@given(st.permutations(["a1", "a2", "b1", "b2", "c1"]), st.sampled_from("12"), st.booleans())
def test_only_results_of_the_present_weights_are_current(order, now, kept):
    """Whatever was evaluated last: stages.json says which weights are there, and their order.

    Without it they are the newest of each.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = [stage_row(name[0], name, date) for date, name in enumerate(order)]
        append_results(f"{folder}/results.jsonl", rows)
        weights = {"c": "c1", "b": f"b{now}", "a": f"a{now}"}
        stages = {name: {"weights_hash": x, "start": None} for name, x in weights.items()}
        if kept:
            write_json(f"{folder}/stages.json", stages)
        results, found = current(folder)
        newest = {name[0]: name for name in order}
        expected = weights if kept else newest
        assert {row["weights_hash"] for row in results} == set(expected.values())
        assert [row["stage"] for row in results] == (list("cba") if kept else list(newest))
        assert {name: stage["weights_hash"] for name, stage in found.items()} == expected


@pytest.mark.parametrize("place", ["sft", "."])
def test_a_run_trained_again_has_no_results(tmp_path, place):
    """In the folder of a pipeline, and in that of one run; the untrained model is what it was."""
    names = ("untrained", "sft")
    stages = {name: {"weights_hash": name, "start": None, "trained": None} for name in names}
    write_json(str(tmp_path / "stages.json"), stages)
    append_results(str(tmp_path / "results.jsonl"), [stage_row(name, name, 1) for name in names])
    (tmp_path / place).mkdir(exist_ok=True)
    write_json(str(tmp_path / place / "state.json"), {"state": "done", "weights_hash": "new"})
    assert [row["stage"] for row in current(str(tmp_path))[0]] == ["untrained"]


def test_what_was_trained_again_is_outdated_and_what_follows_is_stale(tmp_path):
    """sft was trained anew after the evaluation: dpo is stale, and the verifier made from it."""
    chain = {"pretrain": None, "sft": "pretrain", "dpo": "sft", "verifier": "dpo"}
    stages = {}
    for name, start in chain.items():
        stages[name] = {"weights_hash": name, "start": start, "start_hash": start}
    write_json(str(tmp_path / "stages.json"), stages)
    rows = [stage_row(name, name, 1) for name in ("pretrain", "sft", "dpo")]
    append_results(str(tmp_path / "results.jsonl"), rows)
    assert len(current(str(tmp_path))[0]) == 3
    write_json(str(tmp_path / "sft" / "state.json"), {"state": "done", "weights_hash": "new"})
    results, found = current(str(tmp_path))
    assert [row["stage"] for row in results] == ["pretrain", "dpo"]
    assert [name for name, stage in found.items() if stage["outdated"]] == ["sft"]
    why = {name: stage["stale"] for name, stage in found.items() if stage["stale"]}
    assert why == {"dpo": "sft has other weights by now", "verifier": "dpo is stale"}


def test_results_of_another_verifier_are_not_current(tmp_path):
    """The judged weights are the same, the judge is not."""
    stages = {"dpo": {"weights_hash": "d", "start": None}}
    stages["judge"] = {"weights_hash": "v2", "start": None}
    write_json(str(tmp_path / "stages.json"), stages)
    rows = [stage_row("dpo", "d", i, verifier_hash=f"v{i}") for i in (1, 2, 3)]
    append_results(str(tmp_path / "results.jsonl"), [*rows, stage_row("dpo", "d", 4)])
    found = [row.get("verifier_hash") for row in current(str(tmp_path))[0]]
    assert found == ["v2", None]


@pytest.mark.parametrize("text", ["", "{", "[1]", "[]", "null", '"x"', "{}\n{}"])
def test_a_damaged_stages_file_is_as_good_as_none(tmp_path, text):
    """A report must not end in a traceback for a file that another evaluation writes anew."""
    append_results(str(tmp_path / "results.jsonl"), [stage_row("sft", "s", 1)])
    (tmp_path / "stages.json").write_text(text)
    assert len(current(str(tmp_path))[0]) == 1


def test_a_checkpoint_taken_away_makes_nothing_outdated(tmp_path):
    """An earlier checkpoint was evaluated; the run's end is no training since."""
    (tmp_path / "sft").mkdir()
    write_json(str(tmp_path / "sft" / "state.json"), {"weights_hash": "last"})
    stages = {"sft": {"weights_hash": "earlier", "start": None, "trained": "last"}}
    write_json(str(tmp_path / "stages.json"), stages)
    append_results(str(tmp_path / "results.jsonl"), [stage_row("sft", "earlier", 1)])
    results, found = current(str(tmp_path))
    assert len(results) == 1 and not found["sft"]["outdated"]
