"""The plots of a report: each takes rows of result files and the folder to write to, and returns its file's name, or None with nothing to show."""
import os
import re

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import data
from problems import RERANKERS


def finish(figure, folder: str, name: str) -> str:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    name = re.sub(r"[^\w.-]+", "_", name)  # a link with a space in it is none
    data.write_atomic(os.path.join(folder, name), lambda f: figure.savefig(f, format="png", dpi=110))
    plt.close(figure)
    return name


def plot_loss(rows: list[dict], folder: str, run: str) -> str | None:
    train, val = [r for r in rows if "loss" in r], [r for r in rows if "val_loss" in r]
    if not train:
        return None
    figure, axes = plt.subplots(figsize=(6, 3.5))
    axes.plot([r["step"] for r in train], [r["loss"] for r in train], lw=1, label="training")
    axes.plot([r["step"] for r in val], [r["val_loss"] for r in val], "o-", ms=3, label="validation")
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
    for axes, kind, title in zip(both, ("logps", "rewards"), ("log-prob of the answers", "reward: beta x log-ratio to the reference")):
        for which, color in (("chosen", "tab:green"), ("rejected", "tab:red")):
            axes.plot([r["step"] for r in rows], [r[f"val_{kind}/{which}"] for r in rows], "o-", ms=3, color=color, label=which)
        axes.set(xlabel="step", title=f"{run}: {title}")
    return finish(figure, folder, f"{run}_curves.png")


def spread(rows: list[dict], scale: float = 1.0) -> list[list[float]]:
    """What matplotlib calls error bars: distances to low and high, never below 0."""
    return [[max(0, scale * (r["value"] - r["low"])) for r in rows], [max(0, scale * (r["high"] - r["value"])) for r in rows]]


def plot_rerank(rows: list[dict], folder: str, greedy: dict | None) -> str:
    """Ways to choose among k samples, against k."""
    figure, axes = plt.subplots(figsize=(6, 3.5))
    for how, color in zip(RERANKERS, ("tab:blue", "tab:red", "tab:green", "tab:orange", "tab:gray")):
        points = sorted({int(r["protocol"].partition("@")[2]): r for r in rows if r["protocol"].startswith(how + "@")}.items())
        k = [number for number, _ in points]
        axes.plot(k, [100 * r["value"] for _, r in points], "o-", ms=4, color=color, label=how.replace("_", " "))
        axes.fill_between(k, [100 * r["low"] for _, r in points], [100 * r["high"] for _, r in points], color=color, alpha=0.12, lw=0)
    if greedy:
        axes.axhline(100 * greedy["value"], color="black", ls="--", lw=1, label="greedy")
    axes.set_xscale("log", base=2)
    axes.set_xticks(k, map(str, k))
    axes.set(xlabel="samples per problem", ylabel="exact match, %", title="Choosing among samples (95 % intervals)")
    return finish(figure, folder, "best_of_n.png")


def plot_calibration(rows: list[dict], folder: str) -> str | None:
    """Share of right solutions beside the verifier's mean probability, by tenths of it."""
    rows = sorted({r["protocol"]: r for r in rows if r["metric"] == "calibration"}.values(), key=lambda r: r["predicted"])
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(4.5, 3.8))
    axes.errorbar([r["predicted"] for r in rows], [r["value"] for r in rows], spread(rows), fmt="o-", ms=4, capsize=2, label="verifier")
    axes.plot([0, 1], [0, 1], "k--", lw=1, label="calibrated")
    axes.set(xlabel="probability given by the verifier", ylabel="share of right solutions", title="Calibration (95 % intervals)")
    return finish(figure, folder, "calibration.png")


def plot_tradeoff(points: dict[str, tuple[dict, dict]], folder: str) -> str | None:
    """What tuning gains and what it forgets: per model its loss on held-out answers against its perplexity on plain text. Down and left is better."""
    if len(points) < 3:
        return None
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, (answers, text) in points.items():
        axes.errorbar(text["value"], answers["value"], spread([answers]), fmt="o", ms=5, capsize=2)
        axes.annotate(name, (text["value"], answers["value"]), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.margins(x=0.15)
    axes.set(xlabel=f"perplexity of {text['split']}, {text['protocol']}", ylabel="loss on held-out answers, nats/token",
             title="What tuning gains and what it forgets (95 % intervals)")
    axes.plot([], [], " ", label="down and left is better")
    return finish(figure, folder, "tradeoff.png")
