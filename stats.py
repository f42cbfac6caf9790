"""Numbers with their uncertainty. Every estimate keeps the items it was made of, so that two models can be compared item by item."""

import math

import numpy as np

TRANSFORMS = {
    "": lambda x: x,
    "exp": np.exp,
    "bits": lambda x: x / math.log(2),
}  # of a mean, by the name under which items are kept


def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    p = hits / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def proportion(flags) -> dict:
    """Share of flags that hold (a half counts half: a tie), with Wilson's interval."""
    hits = [float(flag) for flag in flags]
    low, high = wilson(sum(hits), len(hits))
    return {
        "value": sum(hits) / len(hits),
        "low": low,
        "high": high,
        "n": len(hits),
        "items": {"num": hits, "den": [1] * len(hits), "transform": ""},
    }


def bootstrap(n: int, draws: int = 1000) -> np.ndarray:
    """(draws, n) numbers of items drawn with replacement; the same for the same n, so that comparisons are paired."""
    return np.random.default_rng(0).integers(0, n, (draws, n))


def ratio(numerators, denominators, transform: str = "") -> dict:
    """transform(sum / sum) over independent parts (lines, windows, documents); 95 % interval by 1,000 bootstrap draws of parts."""
    a, b, f = np.array(numerators, float), np.array(denominators, float), TRANSFORMS[transform]
    draws = bootstrap(len(a))
    low, high = np.quantile(a[draws].sum(1) / b[draws].sum(1), [0.025, 0.975])
    return {
        "value": float(f(a.sum() / b.sum())),
        "low": float(f(low)),
        "high": float(f(high)),
        "n": int(b.sum()),
        "items": {"num": a.tolist(), "den": b.tolist(), "transform": transform},
    }


def mean(values) -> dict:
    return ratio(values, np.ones(len(values)))


def difference(before: dict, after: dict) -> dict:
    """after - before, of the items of two results on the same data: value, 95 % interval by 1,000 bootstrap draws of items, and a p-value:
    McNemar's exact test (1947) where the items are right or wrong, else the bootstrap's. Raises ValueError where they are not paired."""
    (a, n), (b, m) = ((np.array(items["num"]), np.array(items["den"])) for items in (before, after))
    if before["transform"] != after["transform"] or len(a) != len(b) or (n != m).any():
        raise ValueError(f"{len(a)} and {len(b)} items are not the same ones")
    f, draws = TRANSFORMS[before["transform"]], bootstrap(len(a))
    deltas = f(b[draws].sum(1) / m[draws].sum(1)) - f(a[draws].sum(1) / n[draws].sum(1))
    if set(a) | set(b) <= {0.0, 1.0} and (n == 1).all():
        p = mcnemar(int((b > a).sum()), int((b < a).sum()))
    else:
        p = min(1.0, 2 * (1 + min((deltas <= 0).sum(), (deltas >= 0).sum())) / (1 + len(deltas)))
    low, high = np.quantile(deltas, [0.025, 0.975])
    return {
        "value": float(f(b.sum() / m.sum()) - f(a.sum() / n.sum())),
        "low": float(low),
        "high": float(high),
        "p": float(p),
        "n": len(a),
    }


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p of `gained` items newly right and `lost` newly wrong, were both equally likely."""
    n, k = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def auc(scores, labels) -> float:
    """Probability that a right solution scores above a wrong one, ties counting half; nan where one kind is missing."""
    scores, labels = np.array(scores, float), np.array(labels, bool)
    if labels.all() or not labels.any():
        return math.nan
    order = np.sort(scores)
    rank = (
        np.searchsorted(order, scores, "left") + np.searchsorted(order, scores, "right") + 1
    ) / 2
    positive = labels.sum()
    return float(
        (rank[labels].sum() - positive * (positive + 1) / 2) / (positive * (~labels).sum())
    )
