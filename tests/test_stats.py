"""Intervals, paired differences and AUC, beside published numbers and definitions."""

import math

import numpy as np
import pytest
from helpers import fails
from hypothesis import given, settings
from hypothesis import strategies as st

from evals import stats


@pytest.mark.parametrize(
    "hits,n,low,high",
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0000),
    ],
)
def test_wilson_gives_the_published_intervals(hits, n, low, high):
    """Newcombe 1998, table I, method 3.

    Also where nothing or everything was hit, where the naive interval has no width.
    """
    assert stats.wilson(hits, n) == pytest.approx((low, high), abs=6e-5)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_an_interval_of_a_proportion_holds_its_value_and_stays_a_proportion(case):
    """Whatever the counts."""
    hits, n = case
    row = stats.proportion([True] * hits + [False] * (n - hits))
    assert -1e-12 <= row.low <= row.value + 1e-12 and row.value <= row.high + 1e-12 <= 1 + 2e-12
    assert row.value == hits / n and row.n == n


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30))
def test_auc_is_the_share_of_pairs_in_right_order(items):
    """Every right solution against every wrong one, ties counting half.

    Without both kinds there is no such number.
    """
    pairs = [
        (a > b) + (a == b) / 2 for a, right in items if right for b, wrong in items if not wrong
    ]
    value = stats.auc(*zip(*items, strict=True))
    assert (
        math.isnan(value)
        if not pairs
        else value == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    )


def test_a_ratio_is_sum_over_sum_and_its_interval_covers_the_truth():
    """A mean of ratios would weigh short lines as much as long ones.

    An interval of 95 % must hold the truth about 95 times of 100.
    """
    row = stats.ratio([1.0, 30.0], [1, 10], "exp")
    assert row.value == pytest.approx(math.exp(31 / 11)) and row.n == 11
    draws, covered = np.random.default_rng(1), 0
    for _ in range(150):
        counts = draws.integers(5, 50, 60)
        row = stats.ratio([draws.normal(3.0, 1.0, n).sum() for n in counts], counts, "exp")
        covered += row.low <= math.exp(3.0) <= row.high
        assert row.low <= row.value <= row.high
    assert 130 <= covered <= 149


@pytest.mark.parametrize(
    "gained, lost, p",
    [(10, 2, 0.0386), (0, 0, 1.0), (5, 5, 1.0), (0, 6, 0.0313), (121, 59, 4.4e-6)],
)
def test_mcnemar_gives_the_published_p_values(gained, lost, p):
    """Twice the tail of the binomial with one half (exact test.

    R's exact2x2 gives 0.0386 for 10 against 2).
    """
    assert stats.mcnemar(gained, lost) == pytest.approx(p, rel=0.02)


def test_a_difference_is_paired():
    """Two models that err on the same hard items differ by little noise.

    The paired interval is far narrower than that of two samples.
    """
    rng = np.random.default_rng(0)
    hard = rng.random(400) < 0.5
    before, after = stats.proportion(~hard), stats.proportion(~hard | (rng.random(400) < 0.08))
    gain = stats.difference(before.items, after.items)
    assert (
        gain.value == pytest.approx(after.value - before.value)
        and 0 < gain.low < gain.value < gain.high
        and gain.p < 1e-3
    )
    assert gain.high - gain.low < 0.6 * (after.high - after.low)
    same = stats.difference(before.items, before.items)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_perplexities_differ_by_perplexities():
    a, b = (
        stats.ratio([10.0, 20.0, 31.0], [5, 10, 15], "exp"),
        stats.ratio([11.0, 22.0, 33.0], [5, 10, 15], "exp"),
    )
    assert stats.difference(a.items, b.items).value == pytest.approx(
        math.exp(66 / 30) - math.exp(61 / 30)
    )


def test_items_of_other_data_are_not_compared():
    with pytest.raises(ValueError, match="not the same"):
        stats.difference(stats.mean([1.0, 2.0]).items, stats.mean([1.0, 2.0, 3.0]).items)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.sampled_from([0, n]), st.just(n))))
def test_nothing_and_everything_have_ends_that_are_proportions(case):
    """The low end of no hit is 0 and not -0.0 in print, the high end of all hits is 1."""
    low, high = stats.wilson(*case)
    assert 0 <= low <= high <= 1 and f"{100 * low:.1f}" != "-0.0"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.booleans())
def test_few_items_that_all_agree_are_no_proof(n, binary):
    """n differences of one sign come by chance once in 2^(n - 1): no test may say less."""
    gained = [1.0] * n if binary else [1.5 + i for i in range(n)]
    before, after = stats.mean([0.0] * n), stats.mean(gained)
    assert stats.difference(before.items, after.items).p >= min(1, 2.0 ** (1 - n)) * 0.999


def test_nothing_left_to_measure_is_an_error_in_words():
    """A division by zero, or the mean of nothing, names neither the task nor what to do."""
    for call in (lambda: stats.proportion([]), lambda: stats.mean([]), lambda: stats.ratio([], [])):
        fails(call, "nothing is left to measure")


def test_an_interval_says_over_how_many_parts_it_was_drawn():
    """Thousands of tokens in five windows are five items."""
    assert stats.ratio([10.0] * 5, [1000] * 5).as_json()["parts"] == 5
    assert "parts" not in stats.mean([1.0] * 50).as_json()
