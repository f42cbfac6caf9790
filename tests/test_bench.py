"""The benchmark runs, counts what it says it counts, and refuses what it does not know. (Its numbers are no test: LOG.md.)"""
import json

import pytest

import bench
from conftest import fails


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "mini", bench.Shape(1, 32, 2, 32, 2, 65))
    monkeypatch.setattr(bench, "matmul_peak", lambda cfg: 1e9)
    out = tmp_path / "bench.jsonl"
    flags = ["--shapes=mini", "--tasks=train,generate", "--rounds=1", "--new_tokens=4", "--systems=ours", f"--out={out}"]
    assert bench.main(flags) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_speeds_follow_from_each_other(rows):
    """A whole step is slower than its forward and backward pass, and the share of the peak is the count of operations over time."""
    (train,) = [row for row in rows if row["task"] == "train"]
    assert train["slowest"] <= train["tokens_per_s"] <= train["fastest"] and train["tokens_per_s"] < train["forward_backward_tokens_per_s"]
    model = bench.Ours(bench.BenchConfig(), bench.SHAPES["mini"]).model
    assert train["share_of_matmul_peak"] == pytest.approx(model.flops_per_token() * train["forward_backward_tokens_per_s"] / 1e9)
    assert train["parameters"] == model.num_params()


def test_every_row_says_what_was_measured(rows):
    """Generation at one row and at eight; commit, versions and device beside every number."""
    assert [row["batch"] for row in rows if row["task"] == "generate"] == [1, 8]
    assert all({"system", "shape", "commit", "torch", "device", "settings"} <= set(row) for row in rows)


def test_unknown_names_are_errors_in_words(tmp_path):
    """A peer whose checkout is not given is not silently left out when it was asked for."""
    fails(lambda: bench.main(["--shapes=huge"]), "huge", "char")
    fails(lambda: bench.main(["--systems=nanoGPT", f"--out={tmp_path}/x"]), "nanoGPT", "ours")
