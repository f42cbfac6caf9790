"""A results file that no accident can spoil."""

import functools
import json
import multiprocessing

import pytest

from evals.results import append_results, matches, read_results


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
