"""The pictures of the README and of docs/, drawn from the numbers in docs/img/numbers.json.

python -m docs.figures                                   # draws all of them anew
python -m docs.figures --toy=out/1337,out/1,out/2 --streams=out/smollm2 --race=bench.jsonl
                                                         # takes the numbers from runs first
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import matplotlib
import matplotlib.pyplot as plt
import torch

from configurator import load
from evals.plots import BLUE, GRAY, GREEN, ORANGE, RED
from evals.results import newest, read_results
from model import rotary_angles, rotate
from runtime.files import read_json, read_jsonl, write_json
from runtime.logs import read_log
from runtime.program import run

IMG = Path(__file__).resolve().parent / "img"
plt.rcParams |= {"font.size": 15, "svg.hashsalt": "modern-llm", "svg.fonttype": "path"}
DRAWN: dict[str, Callable] = {}


@dataclass
class FiguresConfig:
    """Where new numbers come from; without any the kept ones are drawn."""

    toy: tuple[str, ...] = ()  # folders of default runs, one per seed
    streams: str | None = None  # folder of a run with results of the task streaming
    race: str | None = None  # the JSON lines of bench --tasks=race
    out: str = str(IMG)  # where the pictures go


def figure(draw: Callable) -> Callable:
    """Register a function of (axes, numbers) as the picture of its name."""
    DRAWN[draw.__name__] = draw
    return draw


# ------------------------------------------------------------------------------------------------
# Numbers

BROUGHT = {  # of a default run -> what was before and after: task, metric, protocol, stage
    "pretrain": ("val_loss", "val_loss", "windows", "untrained", "pretrain"),
    "SFT": ("problems", "exact_match", "greedy", "pretrain", "sft"),
    "DPO": ("tales", "kind", "sampled", "sft", "dpo"),
}


def value_of(results: list[dict], **wanted: str) -> float:
    return newest(results, **wanted)["value"]


def toy_numbers(folders: list[str]) -> dict:
    """Return what each stage brought in each run, and the curves of DPO and of best-of-N."""
    brought, runs = {}, [read_results(folder) for folder in folders]
    for name, (task, metric, protocol, *models) in BROUGHT.items():
        what = {"task": task, "metric": metric, "protocol": protocol}
        brought[name] = [[value_of(run, **what, model=m) for m in models] for run in runs]
    verifier = {"task": "rerank", "metric": "exact_match"}
    before = [value_of(r, task="problems", metric="exact_match", model="dpo") for r in runs]
    after = [value_of(run, **verifier, protocol="best_of@8") for run in runs]
    brought["verifier"] = [list(pair) for pair in zip(before, after, strict=True)]
    choices = {}
    for how in ("majority", "likelihood", "best_of", "oracle"):
        points = [
            [value_of(r, **verifier, protocol=f"{how}@{n}") for r in runs] for n in (1, 2, 4, 8)
        ]
        choices[how] = [mean(values) for values in points]
    log = read_log(f"{folders[0]}/dpo/metrics.jsonl")
    rows = [row for row in log if "rewards/margins" in row]
    margins = [[row["step"], row["rewards/chosen"], row["rewards/rejected"]] for row in rows]
    return {"brought": brought, "choices": choices, "margins": margins}


def stream_numbers(folder: str) -> dict:
    """Return the loss by position of each way to read a stream; each layer's share of token 1."""
    results = [row for row in read_results(folder) if row["task"] == "streaming"]
    curves, shares = {}, {}
    for row in results:
        if row["metric"] == "loss_at_position":
            how, place = row["protocol"].split(" ")
            first, last = map(int, place.split("-"))
            curves.setdefault(how.partition("@")[0], {})[(first + last + 1) // 2] = row["value"]
        elif row["metric"] == "first_token_share" and "head" not in row["protocol"]:
            shares[int(row["protocol"].removeprefix("layer "))] = row["value"]
    in_order = {how: sorted(curve.items()) for how, curve in curves.items()}
    return {"curves": in_order, "first_token": [shares[layer] for layer in sorted(shares)]}


def race_numbers(path: str) -> dict:
    keys = ("seconds_of_each", "val_loss_of_each")
    rows = [row for row in read_jsonl(path) if row["task"] == "race"]
    return {f"{row['shape']} {row['system']}": [row[key] for key in keys] for row in rows}


# ------------------------------------------------------------------------------------------------
# Pictures


@figure
def loop(axes: plt.Axes, numbers: dict) -> None:
    """The whole loop: a box per stage, and under it what it brought, mean of the runs."""
    axes.figure.set_size_inches(11, 3.4)
    axes.axis("off")
    axes.set(xlim=(0, 100), ylim=(0, 30))
    what = {
        "pretrain": ("24,000 tales", "loss, nats", "{:.2f}"),
        "SFT": ("2,287 dialogues", "problems solved", "{:.0%}"),
        "DPO": ("2,000 pairs", "tales of the kind asked", "{:.0%}"),
        "verifier": ("8,000 solutions", "best of 8 solved", "{:.0%}"),
    }
    width, gap = 21, 5.3
    for i, (name, (data, metric, form)) in enumerate(what.items()):
        x, color = i * (width + gap), (BLUE, GREEN, ORANGE, RED)[i]
        box = {"facecolor": color, "edgecolor": "none", "boxstyle": "round,pad=0,rounding_size=1"}
        axes.add_patch(matplotlib.patches.FancyBboxPatch((x, 17), width, 12, **box))
        middle = x + width / 2
        white = {"color": "white", "ha": "center", "va": "center"}
        axes.text(middle, 24.8, name, **white, fontsize=20, weight="bold")
        axes.text(middle, 20, data, **white, fontsize=14)
        before, after = map(mean, zip(*numbers["toy"]["brought"][name], strict=True))
        text = f"{form.format(before)} → {form.format(after)}"
        axes.text(middle, 10, text, ha="center", fontsize=20, color=color, weight="bold")
        axes.text(middle, 4.5, metric, ha="center", fontsize=14, color=GRAY)
        if i:
            arrow = {"arrowstyle": "-|>", "lw": 2.5, "color": GRAY}
            axes.annotate("", (x - 0.4, 23), (x - gap + 0.4, 23), arrowprops=arrow)


@figure
def rope(axes: plt.Axes, numbers: dict) -> None:
    """What RoPE makes of the score of two equal vectors: a function of their distance."""
    distances = torch.arange(512)
    cos, sin = rotary_angles(distances, 64, 10_000.0, torch.float32)
    turned = rotate(torch.ones(1, 512, 1, 64), cos, sin)[0, :, 0]  # (512, 64)
    axes.plot(distances, turned @ turned[0] / 64, color=BLUE, lw=2)
    axes.axhline(0, color=GRAY, lw=0.8)
    axes.set(xlabel="distance, tokens", ylabel="score, as a share of distance 0")


@figure
def streams(axes: plt.Axes, numbers: dict) -> None:
    """SmolLM2-135M far behind its window: loss by position."""
    said = {
        "rolling": (RED, "window of 512 tokens alone", 4.42),
        "kept": (BLUE, "the same, the first 4 tokens kept", 3.1),
    }
    for how, (color, text, y) in said.items():
        places, losses = zip(*numbers["streams"]["curves"][how], strict=True)
        axes.plot(places, losses, color=color, lw=2)
        axes.text(600, y, text, color=color)
    axes.set(
        xlabel="position in the stream, tokens", ylabel="loss, nats per token", ylim=(3.05, None)
    )


@figure
def first_token(axes: plt.Axes, numbers: dict) -> None:
    """How much of its attention each layer of SmolLM2-135M gives to the first token."""
    shares = numbers["streams"]["first_token"]
    axes.bar(range(1, len(shares) + 1), [100 * share for share in shares], color=BLUE)
    axes.set(xlabel="layer", ylabel="attention to token 1, %")


@figure
def dpo(axes: plt.Axes, numbers: dict) -> None:
    """The rewards of chosen and rejected answers while DPO learns, seed 1337."""
    steps, *rewards = zip(*numbers["toy"]["margins"], strict=True)
    for values, color, name in zip(rewards, (BLUE, RED), ("chosen", "rejected"), strict=True):
        axes.plot(steps, values, color=color, lw=2)
        axes.text(steps[-1], values[-1], f" {name}", color=color, va="center")
    axes.axhline(0, color=GRAY, lw=0.8)
    axes.set(xlabel="step", ylabel="reward, nats", xlim=(0, 1.25 * steps[-1]))


@figure
def best_of_n(axes: plt.Axes, numbers: dict) -> None:
    """How many problems are solved when one of N samples is chosen, mean of the runs."""
    said = {"oracle": GRAY, "best_of": RED, "likelihood": BLUE, "majority": GREEN}
    words = {"best_of": "verifier", "oracle": "oracle", "likelihood": "likelihood"}
    for how, color in said.items():
        values = [100 * value for value in numbers["toy"]["choices"][how]]
        axes.plot([1, 2, 4, 8], values, "o-", color=color, lw=2)
        axes.text(8.3, values[-1], words.get(how, how), color=color, va="center")
    axes.set(xlabel="samples of a problem", ylabel="solved, %", xscale="log", xlim=(0.95, 16))
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.minorticks_off()


@figure
def race(axes: plt.Axes, numbers: dict) -> None:
    """Seconds of one core to nanoGPT's loss, each seed a dot."""
    systems = {"nanoGPT": GRAY, "nanochat": ORANGE, "ours": BLUE}
    rows = [(shape, system) for shape in ("small", "tiny") for system in systems]
    for y, (shape, system) in enumerate(rows):
        seconds, losses = numbers["race"][f"{shape} {system}"]
        axes.barh(y, mean(seconds), color=systems[system], height=0.7)
        axes.plot(seconds, [y] * len(seconds), "o", color="black", ms=4)
        text = f" {mean(seconds):.0f} s to {mean(losses) / math.log(2):.2f} bits a byte"
        axes.text(max(seconds), y, text, va="center", fontsize=13)
    names = [f"{system}, {'2.7M' if shape == 'small' else '0.8M'}" for shape, system in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set(xlabel="seconds", xlim=(0, 1.8 * axes.get_xlim()[1] / 1.05))


def draw_all(numbers: dict, folder: str) -> list[str]:
    """Draw every picture whose numbers are there. -> paths"""
    paths = []
    for name, draw in DRAWN.items():
        canvas, axes = plt.subplots(figsize=(7, 4.4))
        draw(axes, numbers)
        canvas.tight_layout()
        path = Path(folder, f"{name}.svg")
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, facecolor="white", metadata={"Date": None})
        plt.close(canvas)
        paths.append(str(path))
    return paths


def main(argv: list[str]) -> int:
    cfg = load(argv, FiguresConfig)
    kept = IMG / "numbers.json"
    numbers = read_json(str(kept))
    if cfg.toy:
        numbers["toy"] = toy_numbers(list(cfg.toy))
    if cfg.streams:
        numbers["streams"] = stream_numbers(cfg.streams)
    if cfg.race:
        numbers["race"] = race_numbers(cfg.race)
    write_json(str(kept), json.loads(json.dumps(numbers)))
    for path in draw_all(numbers, cfg.out):
        print(path)
    return 0


if __name__ == "__main__":
    run(main)
