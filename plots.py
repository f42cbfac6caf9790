"""The plots of a report: each takes rows of result files and the folder to write to, and returns its file's name, or None with nothing to show."""

import os
import re

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import data
from problems import RERANKERS
from tables import find


def finish(figure, folder: str, name: str) -> str:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.tight_layout()
    return save(figure, folder, name)


def save(figure, folder: str, name: str) -> str:
    name = re.sub(r"[^\w.-]+", "_", name)  # a link with a space in it is none
    data.write_atomic(
        os.path.join(folder, name), lambda f: figure.savefig(f, format="png", dpi=110)
    )
    plt.close(figure)
    return name


def plot_loss(rows: list[dict], folder: str, run: str) -> str | None:
    train, val = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]
    if not train:
        return None
    figure, axes = plt.subplots(figsize=(6, 3.5))
    axes.plot([r["step"] for r in train], [r["loss"] for r in train], lw=1, label="training")
    axes.plot(
        [r["step"] for r in val], [r["val_loss"] for r in val], "o-", ms=3, label="validation"
    )
    if max(r["loss"] for r in train) > 10 * min(r["loss"] for r in train) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss", title=f"{run}: loss")
    return finish(figure, folder, f"loss_{run}.png")


def plot_dpo(rows: list[dict], folder: str, run: str) -> str | None:
    """The four curves by which a DPO run is judged: log-probs and rewards, of chosen and rejected answers, held out."""
    rows = [r for r in rows if "val_logps/chosen" in r]
    if not rows:
        return None
    figure, both = plt.subplots(1, 2, figsize=(9, 3.5))
    for axes, kind, title in zip(
        both,
        ("logps", "rewards"),
        ("log-prob of the answers", "reward: beta x log-ratio to the reference"),
    ):
        for which, color in (("chosen", "tab:green"), ("rejected", "tab:red")):
            axes.plot(
                [r["step"] for r in rows],
                [r[f"val_{kind}/{which}"] for r in rows],
                "o-",
                ms=3,
                color=color,
                label=which,
            )
        axes.set(xlabel="step", title=f"{run}: {title}")
    return finish(figure, folder, f"{run}_curves.png")


def spread(rows: list[dict]) -> list[list[float]]:
    """What matplotlib calls error bars: distances to low and high, never below 0."""
    return [
        [max(0, r["value"] - r["low"]) for r in rows],
        [max(0, r["high"] - r["value"]) for r in rows],
    ]


def plot_rerank(rows: list[dict], folder: str, greedy: dict | None) -> str:
    """Ways to choose among k samples, against k."""
    figure, axes = plt.subplots(figsize=(6, 3.5))
    for how, color in zip(
        RERANKERS, ("tab:blue", "tab:red", "tab:green", "tab:orange", "tab:gray")
    ):
        points = sorted(
            {
                int(r["protocol"].partition("@")[2]): r
                for r in rows
                if r["protocol"].startswith(how + "@")
            }.items()
        )
        k = [number for number, _ in points]
        axes.plot(
            k,
            [100 * r["value"] for _, r in points],
            "o-",
            ms=4,
            color=color,
            label=how.replace("_", " "),
        )
        axes.fill_between(
            k,
            [100 * r["low"] for _, r in points],
            [100 * r["high"] for _, r in points],
            color=color,
            alpha=0.12,
            lw=0,
        )
    if greedy:
        axes.axhline(100 * greedy["value"], color="black", ls="--", lw=1, label="greedy")
    axes.set_xscale("log", base=2)
    axes.set_xticks(k, map(str, k))
    axes.set(
        xlabel="samples per problem",
        ylabel="exact match, %",
        title="Choosing among samples (95 % intervals)",
    )
    return finish(figure, folder, "best_of_n.png")


def plot_calibration(rows: list[dict], folder: str) -> str | None:
    """Share of right solutions beside the verifier's mean probability, by tenths of it."""
    rows = sorted(
        {r["protocol"]: r for r in rows if r["metric"] == "calibration"}.values(),
        key=lambda r: r["predicted"],
    )
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(4.5, 3.8))
    axes.errorbar(
        [r["predicted"] for r in rows],
        [r["value"] for r in rows],
        spread(rows),
        fmt="o-",
        ms=4,
        capsize=2,
        label="verifier",
    )
    axes.plot([0, 1], [0, 1], "k--", lw=1, label="calibrated")
    axes.set(
        xlabel="probability given by the verifier",
        ylabel="share of right solutions",
        title="Calibration (95 % intervals)",
    )
    return finish(figure, folder, "calibration.png")


def plot_tradeoff(points: dict[str, tuple[dict, dict]], folder: str) -> str | None:
    """What tuning gains and what it forgets: per model its loss on held-out answers against its perplexity on plain text. Down and left is better."""
    if len(points) < 3:
        return None
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, (answers, text) in points.items():
        axes.errorbar(text["value"], answers["value"], spread([answers]), fmt="o", ms=5, capsize=2)
        axes.annotate(
            name,
            (text["value"], answers["value"]),
            xytext=(6, 4),
            textcoords="offset points",
            fontsize=8,
        )
    axes.margins(x=0.15)
    axes.set(
        xlabel=f"perplexity of {text['split']}, {text['protocol']}",
        ylabel="loss on held-out answers, nats/token",
        title="What tuning gains and what it forgets (95 % intervals)",
    )
    axes.plot([], [], " ", label="down and left is better")
    return finish(figure, folder, "tradeoff.png")


def curves(results: list[dict], metric: str) -> dict[tuple[str, str], list[dict]]:
    """Newest rows of a metric by (model, way to read the stream), in the order of positions."""
    newest, lines = (
        {
            (r["model"], r["protocol"]): r
            for r in results
            if r["task"] == "streaming" and r["metric"] == metric
        },
        {},
    )
    for (model, protocol), row in newest.items():
        lines.setdefault((model, protocol.split()[0]), []).append(row)
    return {key: sorted(rows, key=lambda r: r["position"]) for key, rows in lines.items()}


def plot_streaming(results: list[dict], folder: str) -> str:
    """Loss against position by model and way to read, time per token, cache, and what every head gives to the sink and to the first token."""
    figure, axes = plt.subplot_mosaic(
        [["loss"] * 4, ["ms", "cache", "share", "share"]], figsize=(12, 8.5)
    )
    models = dict.fromkeys(r["model"] for r in results if r["task"] == "streaming")
    colors = {model: f"C{number}" for number, model in enumerate(models)}
    styles = {
        "rolling": {"ls": "-"},
        "dense": {"ls": ":"},
        "recompute": {"ls": "", "marker": "x", "ms": 5},
    }
    for panel, metric, unit in (
        ("loss", "loss_at_position", 1),
        ("ms", "ms_per_token", 1),
        ("cache", "cache_bytes", 1e3),
    ):
        for (model, how), rows in curves(results, metric).items():
            middle = [(r["position"] + r["width"] / 2) / r["seq_len"] for r in rows]
            axes[panel].plot(
                middle,
                [r["value"] / unit for r in rows],
                color=colors[model],
                lw=1.8,
                **styles[how],
                label=f"{model}, {how}" if panel == "loss" else None,
            )
            if panel == "loss" and how == "recompute":
                axes[panel].vlines(
                    middle,
                    [r["low"] for r in rows],
                    [r["high"] for r in rows],
                    color=colors[model],
                    lw=0.8,
                )
            elif panel == "loss":
                axes[panel].fill_between(
                    middle,
                    [r["low"] for r in rows],
                    [r["high"] for r in rows],
                    color=colors[model],
                    alpha=0.1,
                    lw=0,
                )
        axes[panel].axvline(1, color="black", lw=0.8)
        axes[panel].set_xlabel("position / training context")
    gaps = [
        (
            model,
            find(
                results, model=model, metric="loss_beyond_context", protocol="rolling - recompute"
            ),
        )
        for model in colors
    ]
    axes["loss"].set(
        ylabel="nats/token",
        title="Loss against position (95 % intervals over streams)\nrolling - recompute beyond the training context: "
        + "; ".join(
            f"{model} {row['value']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
            for model, row in gaps
        ),
    )
    axes["ms"].set(title="Time per token, ms", ylim=(0, None))
    axes["cache"].set(title="Keys and values kept, kB", ylim=(0, None))
    for model, metric, marker in (
        (model, *kind)
        for model in colors
        for kind in (("sink_share", "o"), ("first_token_share", "^"))
    ):
        newest = {
            r["protocol"]: r
            for r in results
            if r["task"] == "streaming" and (r["model"], r["metric"]) == (model, metric)
        }
        if newest:
            heads, shares = (
                [f"{r['layer']}.{r['head']}" for r in newest.values()],
                [100 * r["value"] for r in newest.values()],
            )
            label = f"{model}: {metric.removesuffix('_share').replace('_', ' ')}"
            axes["share"].plot(
                heads, shares, color=colors[model], ms=6, ls="", marker=marker, label=label
            )
            uniform = 100 * next(iter(newest.values()))["uniform"]
    axes["share"].axhline(uniform, color="black", ls="--", lw=1, label="all looked at alike")
    axes["share"].set(
        title="Attention given by the second half of the training context, %",
        xlabel="layer.head",
        ylim=(0, None),
    )
    axes["share"].tick_params("x", rotation=90)
    for panel in axes.values():
        panel.title.set_fontsize(10)
    return finish(figure, folder, "streaming.png")


def plot_attention(results: list[dict], source: str, folder: str, stage: str, sentence: int) -> str:
    """Every layer (down) and head (across) on one sentence: who (rows) looks at whom (columns; the sink last)."""
    (kept,) = data.read_jsonl(os.path.join(source, "attention", f"{stage}_{sentence}.jsonl"))
    tokens = [repr(token)[1:-1].replace(" ", "\N{OPEN BOX}") for token in kept["tokens"]]
    columns, side = (
        tokens + ["SINK"] * kept["sinks"],
        max(2.2, 0.4 + 0.085 * len(tokens)),
    )  # inches of a map
    n_layer, n_head = len(kept["maps"]), len(kept["maps"][0])
    figure, grid = plt.subplots(
        n_layer,
        n_head,
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
        figsize=(side * n_head + 1, (side + 0.4) * n_layer + 0.6),
    )
    for layer, head in ((layer, head) for layer in range(n_layer) for head in range(n_head)):
        axes, of_head = (
            grid[layer, head],
            dict(
                task="attention",
                model=stage,
                protocol=f"sentence {sentence} layer {layer + 1} head {head + 1}",
            ),
        )
        weights = [row[: len(columns)] for row in kept["maps"][layer][head]]
        image = axes.imshow(
            weights, cmap="Blues", norm=matplotlib.colors.PowerNorm(0.5, 0, 1), aspect="auto"
        )
        shares = {
            name: find(results, metric=f"{name}_share", **of_head)
            for name in ("sink", "first_token")
        }
        entropy = find(results, metric="attention_entropy", **of_head)
        axes.set_title(
            f"layer {layer + 1} head {head + 1}: entropy {entropy['value']:.2f}\n"
            + ", ".join(
                f"{name.replace('_', ' ')} {100 * row['value']:.1f} %"
                for name, row in shares.items()
                if row
            ),
            fontsize=max(8, 2.4 * side),
        )
        axes.set_xticks(range(len(columns)), columns, fontsize=6, rotation=90)
        axes.set_yticks(range(len(tokens)), tokens, fontsize=6)
    figure.suptitle(
        f"{stage}: attention of each token (row) to those before it (columns); {len(tokens)} tokens. Entropy in nats: {entropy['uniform']:.2f} "
        "where all are looked at alike",
        fontsize=max(10, 3 * side),
    )
    figure.colorbar(image, ax=grid, shrink=0.5, aspect=40, label="weight")
    return save(figure, folder, f"attention_{stage}_{sentence}.png")
