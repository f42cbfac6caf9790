"""The plots of a report.

Each takes rows of results and the folder to write to, and returns its file's name, or None.
"""

import os
import re

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import PowerNorm
from matplotlib.ticker import LogLocator, NullFormatter

from evals.results import RERANKERS
from runtime.files import read_jsonl, write_atomic

WIDTH = 6  # inches of a picture, whose 1,200 pixels are twice what a page shows
# Okabe and Ito's palette: told apart by colour-blind readers
BLUE, RED, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
GRAY = "#666666"
plt.rcParams["text.parse_math"] = False  # a $ in a name or a token is a $
plt.rcParams |= {"font.size": 13, "axes.titlesize": 13, "legend.fontsize": 12}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=(BLUE, RED, GREEN, ORANGE, PURPLE, GRAY))
RERANKER_COLORS = (BLUE, PURPLE, ORANGE, RED, GRAY)
STREAM_STYLES = {"rolling": "-", "kept": "--", "dense": ":", "recompute": "x"}  # by way to read


def save(figure: plt.Figure, folder: str, name: str, grid: bool = True) -> str:
    """Write the picture and return its name, without blanks: a link with one does not work."""
    if grid:
        for axes in figure.axes:
            axes.grid(alpha=0.3)
            shown = len(axes.get_legend_handles_labels()[0])
            if shown:
                axes.legend(edgecolor="none", framealpha=0.6, ncols=2 if shown > 4 else 1)
        figure.tight_layout()
    name = re.sub(r"[^\w.-]+", "_", name)
    path, dpi = os.path.join(folder, name), min(200, 1200 / figure.get_figwidth())
    write_atomic(path, lambda f: figure.savefig(f, format="png", dpi=dpi))
    plt.close(figure)
    return name


def column(rows: list[dict], key: str, scale: float = 1) -> list[float]:
    return [scale * row[key] for row in rows]


def error_bars(rows: list[dict]) -> list[list[float]]:
    """Return what matplotlib calls error bars: distances to low and high, never below 0."""
    below = [max(0, row["value"] - row["low"]) for row in rows]
    return [below, [max(0, row["high"] - row["value"]) for row in rows]]


def label_ends(axes: plt.Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write names right of the ends of their lines, none over another.

    ends: height, text and colour of each.
    """
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [to_axes.transform((1, height))[1] for height, *_ in sorted(ends)]
    places = heights[:1]
    for height in heights[1:]:
        places.append(max(height, places[-1] + 0.075))
    places = np.array(places) - np.mean(places) + np.mean(heights)
    for place, (_, text, color) in zip(places, sorted(ends), strict=True):
        axes.text(1.02, place, text, color=color, va="center", transform=axes.transAxes)


def plot_changes(changes: list[tuple[str, str, dict, dict]], folder: str) -> str | None:
    """Plot what stages did to rates: stage, what is measured, results before and after."""
    if not changes:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 1 + 0.75 * len(changes)))
    for place, (_, _, *pair) in enumerate(changes):
        before, after = column(pair, "value", 100)
        color = BLUE if after >= before else RED
        axes.plot([before, after], [place, place], color=color, lw=3, alpha=0.5)
        axes.plot(before, place, "o", ms=9, color=color, mfc="white", mew=2)
        axes.plot(after, place, "o", ms=9, color=color)
        style = {"textcoords": "offset points", "ha": "center", "color": color}
        axes.annotate(f"{after:.1f}", (after, place), (0, 8), **style)
    names = [f"{stage}\n{what}" for stage, what, *_ in changes]
    axes.set_yticks(range(len(names)), names, fontsize=12)
    axes.set(xlim=(-4, 104), xticks=range(0, 101, 25), ylim=(len(changes) - 0.5, -0.5))
    axes.set_xlabel("% before (hollow) and\nafter the stage (filled)")
    return save(figure, folder, "stages.png")


def plot_loss(rows: list[dict], folder: str, run: str) -> str | None:
    train = [row for row in rows if "loss" in row]
    val = [row for row in rows if "val_loss" in row]
    if not train or "sampled_per_s" in train[0]:  # RL's loss does not say how good the answers are
        return None
    losses, held_out = column(train, "loss"), column(val, "val_loss")
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6))
    axes.plot(column(train, "step"), losses, lw=1.2, color=GRAY)
    axes.plot(column(val, "step"), held_out, "o-", ms=7, color=RED)
    if max(losses) > 10 * min(losses) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    ends = [(losses[-1], "training", GRAY)]
    if val:
        axes.set_title(f"{run}: validation loss {held_out[0]:.2f} to {held_out[-1]:.2f}")
        ends.append((held_out[-1], "validation", RED))
    label_ends(axes, ends)
    of_pairs = "rewards/margins" in train[0]
    axes.set(xlabel="step", ylabel="loss of a pair" if of_pairs else "loss (nats)")
    return save(figure, folder, f"loss_{run}.png")


def plot_dpo(rows: list[dict], folder: str, run: str) -> str | None:
    """Plot held-out log-probs and rewards, by which a DPO run is judged."""
    rows = [row for row in rows if "val_logps/chosen" in row]
    if not rows:
        return None
    units = ("log-prob (nats)", "implicit reward")
    figure, both = plt.subplots(2, 1, sharex=True, figsize=(WIDTH, 5.6))
    for axes, metric, unit in zip(both, ("logps", "rewards"), units, strict=True):
        ends = []
        for side, color in (("chosen", BLUE), ("rejected", RED)):
            values = column(rows, f"val_{metric}/{side}")
            axes.plot(column(rows, "step"), values, "o-", ms=7, color=color)
            ends.append((values[-1], side, color))
        label_ends(axes, ends)
        axes.set_ylabel(unit)
    both[0].set_title("Answers of held-out pairs")
    both[1].set_xlabel("step")
    return save(figure, folder, f"{run}_curves.png")


def plot_rl(rows: list[dict], folder: str, run: str) -> str | None:
    """Plot what the answers are worth, which an RL run is to raise, and what that costs."""
    sampled = [row for row in rows if "sampled_per_s" in row]
    greedy = [row for row in rows if "val_reward" in row]
    if not sampled:
        return None
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(WIDTH, 5.8))
    steps = column(sampled, "step")
    for key, color in (("reward", BLUE), ("accuracy", GREEN)):
        if key == "reward" and column(sampled, key) == column(sampled, "accuracy"):
            continue
        upper.plot(steps, column(sampled, key, 100), lw=1, color=color, label=f"samples: {key}")
        values = column(greedy, f"val_{key}", 100)
        style = {"ms": 7, "color": color, "label": f"greedy, held out: {key}"}
        upper.plot(column(greedy, "step"), values, "o-", **style)
    upper.set_ylabel("answers (%)")
    lower.plot(steps, column(sampled, "entropy"), color=RED, label="nats per sampled token")
    lower.plot(steps, column(sampled, "signal"), color=GRAY, label="share with signal")
    lower.set(xlabel="step", ylabel="left to learn from", ylim=(0, None))
    return save(figure, folder, f"{run}_curves.png")


def plot_rerank(rows: list[dict], folder: str, greedy: dict | None, label: str = "") -> str | None:
    latest = {row["protocol"]: row for row in rows if "@" in row["protocol"]}
    ks = sorted({int(protocol.partition("@")[2]) for protocol in latest})
    if not ks:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 4.4))
    ends = []
    for how, color in zip(RERANKERS, RERANKER_COLORS, strict=True):
        points = [latest[f"{how}@{k}"] for k in ks]
        low, high = column(points, "low", 100), column(points, "high", 100)
        values = column(points, "value", 100)
        axes.plot(ks, values, "o-", ms=6, color=color)
        axes.fill_between(ks, low, high, color=color, alpha=0.1, lw=0)
        ends.append((values[-1], how.replace("_", " "), color))
    if greedy:
        axes.axhline(100 * greedy["value"], color="black", ls="--", lw=1)
        ends.append((100 * greedy["value"], "greedy", "black"))
    label_ends(axes, ends)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, map(str, ks))
    axes.set_title(f"Choosing among samples{label} (95 % intervals)")
    axes.set(xlabel="samples per problem", ylabel="right answers (%)")
    return save(figure, folder, f"best_of_n{label}.png")


def plot_calibration(rows: list[dict], folder: str, label: str = "") -> str | None:
    """Plot the share of right solutions against the verifier's probability, by tenths of it."""
    tenths = {row["protocol"]: row for row in rows if row["metric"] == "calibration"}
    rows = sorted(tenths.values(), key=lambda row: row["predicted"])
    if not rows:
        return None
    x, y = column(rows, "predicted", 100), column(rows, "value", 100)
    bars = [[100 * length for length in lengths] for lengths in error_bars(rows)]
    figure, axes = plt.subplots(figsize=(WIDTH, 4.4))
    axes.errorbar(x, y, bars, fmt="o-", ms=6, capsize=3, label="verifier, 95 % intervals")
    axes.plot([0, 100], [0, 100], "k--", lw=1, label="as it should be")
    axes.set_title(f"Does the verifier know how sure it is{label}?")
    axes.set(xlabel="probability given by the verifier (%)", ylabel="right solutions (%)")
    return save(figure, folder, f"calibration{label}.png")


def plot_tradeoff(points: dict[str, tuple[dict, dict]], folder: str) -> str | None:
    """Plot points: model -> (loss on held-out answers, perplexity of plain text)."""
    if len(points) < 3:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 4.4))
    for name, (answers, text) in points.items():
        place = (text["value"], answers["value"])
        axes.errorbar(*place, error_bars([answers]), fmt="o", ms=6, capsize=3)
        axes.annotate(name, place, xytext=(6, 4), textcoords="offset points", fontsize=12)
    axes.margins(x=0.15)
    axes.set_title("Down and left is better")
    axes.set_xlabel(f"perplexity of {text['split']}, {text['protocol']}")
    axes.set_ylabel("loss on held-out\nanswers (nats/token)")
    return save(figure, folder, "tradeoff.png")


def plot_streaming(results: list[dict], folder: str) -> str:
    """Plot what a stream costs and what every head gives to the sink and to the first token."""
    rows = [row for row in results if row["task"] == "streaming"]
    layout = {"figsize": (8, 10), "height_ratios": (1.5, 1, 1)}
    figure, axes = plt.subplot_mosaic([["loss"], ["share"], ["ms"]], **layout)
    draw_losses(axes["loss"], rows)
    low, high = axes["loss"].get_ylim()
    axes["loss"].set_ylim(low, 1.6 * high - 0.6 * low)  # room for the legend
    draw_curves(axes["ms"], stream_curves(rows, "ms_per_token"))
    axes["ms"].set(title="Time per step (one token of each stream)", ylim=(0, None))
    axes["ms"].set_ylabel("ms")
    draw_head_shares(axes["share"], rows)
    return save(figure, folder, "streaming.png")


def stream_curves(rows: list[dict], metric: str) -> dict[tuple[str, str], list[dict]]:
    """Return the newest rows of a metric by (model, way to read), in the order of positions."""
    latest = {(row["model"], row["protocol"]): row for row in rows if row["metric"] == metric}
    curves = {}
    for row in sorted(latest.values(), key=lambda row: row["position"]):
        curves.setdefault((row["model"], row["protocol"].split()[0]), []).append(row)
    return curves


def middles(curve: list[dict]) -> list[float]:
    """Return the middle of each stretch of a stream, in sizes of its cache."""
    sizes = [row.get("slots", row["seq_len"]) for row in curve]  # seq_len: an old result
    places = [row["position"] + row["width"] / 2 for row in curve]
    return [place / size for place, size in zip(places, sizes, strict=True)]


def draw_curves(axes: plt.Axes, curves: dict[tuple[str, str], list[dict]]) -> None:
    """Draw a line per (model, way to read): a colour per model and cache, a style per way."""
    groups = list(dict.fromkeys((model, how.partition("@")[2]) for model, how in curves))
    for (model, how), curve in curves.items():
        way, _, size = how.partition("@")
        style = {"color": f"C{groups.index((model, size))}", "lw": 1.8, "ms": 5}
        axes.plot(middles(curve), column(curve, "value"), STREAM_STYLES[way], **style)
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xlabel("position / slots of the cache")


def draw_losses(axes: plt.Axes, rows: list[dict]) -> None:
    """Draw the losses with their intervals."""
    curves = stream_curves(rows, "loss_at_position")
    draw_curves(axes, curves)
    lines = axes.lines[: len(curves)]
    for ((model, how), curve), line in zip(curves.items(), lines, strict=True):
        line.set_label(f"{model}, {how}")
        limits = (middles(curve), column(curve, "low"), column(curve, "high"))
        if how.startswith("recompute"):
            axes.vlines(*limits, color=line.get_color(), lw=0.8)
        else:
            axes.fill_between(*limits, color=line.get_color(), alpha=0.1, lw=0)
    axes.set_ylabel("nats/token")
    axes.set_title("Loss against position (95 % intervals over streams)")


def draw_head_shares(axes: plt.Axes, rows: list[dict]) -> None:
    """Draw a point per head, those of a layer side by side, and a line of the layers' means."""
    for number, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
        for metric, marker in (("sink_share", "o"), ("first_token_share", "^")):
            found = [row for row in rows if (row["model"], row["metric"]) == (model, metric)]
            found = list({row["protocol"]: row for row in found}.values())  # the newest of each
            heads = [row for row in found if "head" in row]
            layers = [row for row in found if "head" not in row]
            n_head = max(column(heads, "head"), default=1)
            places = [row["layer"] + 0.8 * (row["head"] - 0.5) / n_head - 0.4 for row in heads]
            if found:
                style = {"c": f"C{number}", "ms": 5, "lw": 1}
                label = f"{model}: {metric.removesuffix('_share').replace('_', ' ')}"
                axes.plot(places, column(heads, "value", 100), marker, label=label, **style)
                axes.plot(column(layers, "layer"), column(layers, "value", 100), **style)
                uniform = 100 * found[0]["uniform"]
    axes.axhline(uniform, color="black", ls="--", lw=1, label="all looked at alike")
    axes.set(title="Attention given by the second half of the cache", ylabel="%")
    axes.set(xlabel="layer: its heads, and a line of their means", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)


def plot_attention(results: list[dict], source: str, folder: str, model: str, sentence: int) -> str:
    """Plot every layer (down) and head (across) on one sentence.

    Rows look at columns; the sink is the last column. source: the folder of the results.
    """
    (kept,) = read_jsonl(os.path.join(source, "attention", f"{model}_{sentence}.jsonl"))
    tokens = [repr(token)[1:-1].replace(" ", "\N{OPEN BOX}") for token in kept["tokens"]]
    columns = tokens + ["SINK"] * kept["sinks"]
    side = max(2.2, 0.4 + 0.085 * len(tokens))  # inches of a map
    n_layer, n_head = len(kept["maps"]), len(kept["maps"][0])
    size = (side * n_head + 1, (side + 0.8) * n_layer + 0.6)
    shape = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, grid = plt.subplots(n_layer, n_head, figsize=size, **shape)
    rows = [row for row in results if row["model"] == model]
    for (layer, head), axes in np.ndenumerate(grid):
        weights = [line[: len(columns)] for line in kept["maps"][layer][head]]
        image = axes.imshow(weights, "Blues", PowerNorm(0.5, 0, 1), aspect="auto")
        protocol = f"sentence {sentence} layer {layer + 1} head {head + 1}"
        found = {row["metric"]: row for row in rows if row["protocol"] == protocol}
        numbers = [f"{name.replace('_', ' ')} {row['value']:.2f}" for name, row in found.items()]
        title = "\n".join([f"layer {layer + 1} head {head + 1}", *numbers])
        axes.set_title(title, fontsize=max(8, 2.4 * side))
        axes.set_xticks(range(len(columns)), columns, fontsize=6, rotation=90)
        axes.set_yticks(range(len(tokens)), tokens, fontsize=6)
    uniform = f"entropy in nats, {found['attention_entropy']['uniform']:.2f} if all were alike"
    figure.suptitle(
        f"{model}: attention of rows to columns;\n{uniform}", fontsize=max(10, 3 * side)
    )
    figure.colorbar(image, ax=grid, shrink=0.5, aspect=40, label="weight")
    return save(figure, folder, f"attention_{model}_{sentence}.png", grid=False)
