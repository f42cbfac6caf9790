"""ROUGE by hand."""

import pytest

from evals.summarize import rouge


def test_rouge_is_a_mean_over_references():
    """By hand: against itself 1.

    Two of three words, in order, of one reference (F 0.8), none of the other.
    """
    assert rouge(["the cat sat"], [["the cat sat"]]) == {
        "rouge1": [1.0],
        "rouge2": [1.0],
        "rougeL": [1.0],
    }
    half = rouge(["the cat"], [["the cat sat", "no"]])
    assert half["rouge1"] == half["rougeL"] == [pytest.approx(0.4)] and half["rouge2"] == [
        pytest.approx(1 / 3)
    ]
