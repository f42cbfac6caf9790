"""Numbers with their uncertainty, and with their items, by which two models are compared."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from configurator import UserError

DRAWS = 1000  # of a bootstrap
FLOOR = 2 / (1 + DRAWS)  # no p-value of a bootstrap is below it
EMPTY = "nothing is left to measure: there is no item"
FEW = 30  # items; of fewer the intervals are rough
TRANSFORMS = {"": lambda x: x, "exp": np.exp, "bits": lambda x: x / math.log(2)}  # of a mean


@dataclass(frozen=True)
class Items:
    """The parts of one number, which is transform(sum of num / sum of den)."""

    num: list[float]
    den: list[float]
    transform: str = ""  # a name of TRANSFORMS


@dataclass(frozen=True)
class Estimate:
    """One number, with its 95 % interval where it has one."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None
    p: float | None = None  # p-value of a difference
    parts: int | None = None  # independent parts behind an interval, where they are not n
    items: Items | None = None

    def as_json(self) -> dict:
        names = ("value", "low", "high", "p", "n", "parts")
        return {name: x for name in names if (x := getattr(self, name)) is not None}


def wilson(hits: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927)."""
    p, z = hits / n, 1.96
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return max(0.0, low), min(1.0, high)  # without hits low is 0, but for the last digit


def proportion(flags: Iterable[float]) -> Estimate:
    """Return the share of flags that hold, with Wilson's interval. A tie is a half."""
    hits = [float(flag) for flag in flags]
    if not hits:
        raise UserError(EMPTY)
    total, n = sum(hits), len(hits)
    return Estimate(total / n, n, *wilson(total, n), items=Items(hits, [1] * n))


def bootstrap(n: int, draws: int = DRAWS) -> np.ndarray:
    """Return numbers of items drawn with replacement (draws, n), the same for the same n."""
    return np.random.default_rng(0).integers(0, n, (draws, n))


def ratio(num: Sequence[float], den: Sequence[float], transform: str = "") -> Estimate:
    """Return transform(sum / sum) over independent parts, with its bootstrap interval."""
    a, b, f = np.array(num, float), np.array(den, float), TRANSFORMS[transform]
    if not len(a):
        raise UserError(EMPTY)
    draws = bootstrap(len(a))
    low, high = np.quantile(a[draws].sum(1) / b[draws].sum(1), [0.025, 0.975])
    items = Items(a.tolist(), b.tolist(), transform)
    value, low, high = (float(f(x)) for x in (a.sum() / b.sum(), low, high))
    n = int(b.sum())
    parts = None if len(a) == n else len(a)
    return Estimate(value, n, low, high, parts=parts, items=items)


def mean(values: Sequence[float]) -> Estimate:
    return ratio(values, np.ones(len(values)))


def difference(before: Items, after: Items) -> Estimate:
    """Return after - before, paired item by item; ValueError where the items are not the same.

    The p-value is McNemar's exact one (1947) where items are right or wrong, else the bootstrap's,
    but never below that of a sign test in which all items agree.
    """
    a, n = np.array(before.num), np.array(before.den)
    b, m = np.array(after.num), np.array(after.den)
    if before.transform != after.transform or len(a) != len(b) or (n != m).any():
        raise ValueError(f"{len(a)} and {len(b)} items are not the same")
    f, draws = TRANSFORMS[before.transform], bootstrap(len(a))
    deltas = f(b[draws].sum(1) / m[draws].sum(1)) - f(a[draws].sum(1) / n[draws].sum(1))
    if set(a) | set(b) <= {0.0, 1.0} and (n == 1).all():
        p = mcnemar(int((b > a).sum()), int((b < a).sum()))
    else:
        smaller_tail = min((deltas <= 0).sum(), (deltas >= 0).sum())
        p = min(1.0, max(2 * (1 + smaller_tail) / (1 + len(deltas)), 2.0 ** (1 - len(a))))
    low, high = np.quantile(deltas, [0.025, 0.975])
    value = float(f(b.sum() / m.sum()) - f(a.sum() / n.sum()))
    return Estimate(value, len(a), float(low), float(high), float(p))


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided exact p of `gained` items newly right and `lost` newly wrong."""
    n, k = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Return the probability that right is above wrong, ties counting half; nan without both."""
    scores, labels = np.array(scores, float), np.array(labels, bool)
    if labels.all() or not labels.any():
        return math.nan
    order = np.sort(scores)
    left, right = np.searchsorted(order, scores, "left"), np.searchsorted(order, scores, "right")
    ranks, n_right = (left + right + 1) / 2, labels.sum()
    above = ranks[labels].sum() - n_right * (n_right + 1) / 2
    return float(above / (n_right * (~labels).sum()))
