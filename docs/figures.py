"""The pictures of the README and of docs/, drawn from the numbers in docs/img/numbers.json.

python -m docs.figures                                   # draws all of them anew
python -m docs.figures --toy=out/1337,out/1,out/2 --streams=out/smollm2 --race=bench.jsonl
                                                         # takes the numbers from runs first
python -m docs.figures --maps=out/sinks,out/plain --experts=out/balanced,out/free
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import PowerNorm

from configurator import load
from corpus.shards import Mixture
from corpus.tokenizer import load_tokenizer
from evals.plots import BLUE, GRAY, GREEN, ORANGE, RED
from evals.results import newest, read_results
from model import rotary_angles, rotate
from runtime.checkpoint import load_checkpoint, model_from
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
    maps: tuple[str, ...] = ()  # with eval.py's attention/: a run with sinks, one without
    experts: tuple[str, ...] = ()  # MoE runs with and without the balance loss
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
    chosen = [f"best_of@{n}" for n in (1, 8)]
    brought["verifier"] = [[value_of(r, **verifier, protocol=p) for p in chosen] for r in runs]
    choices = {}
    for how in ("majority", "likelihood", "best_of", "oracle"):
        points = [
            [value_of(r, **verifier, protocol=f"{how}@{n}") for r in runs] for n in (1, 2, 4, 8)
        ]
        choices[how] = [mean(values) for values in points]
    log = read_log(f"{folders[0]}/dpo/metrics.jsonl")
    keys = ("step", "val_rewards/chosen", "val_rewards/rejected")
    margins = [[row[key] for key in keys] for row in log if keys[-1] in row]
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


def map_numbers(folder: str) -> list[list[float]]:
    """Return the mean map of the first layer's heads on a sentence: (T, T + 1), the sink last."""
    (kept,) = read_jsonl(f"{folder}/attention/pretrain_1.jsonl")
    weights = torch.tensor(kept["maps"][0], dtype=torch.float64).mean(0)  # over heads
    return weights.round(decimals=4).tolist()


@torch.no_grad()
def expert_numbers(run: str) -> list[list[float]]:
    """Return each layer's share of tokens for each expert, over 64 rows of the validation text."""
    checkpoint = load_checkpoint(run)
    model, given = model_from(checkpoint), checkpoint["train_config"]
    data, data_dir, spec = given["data"], given["data_dir"], checkpoint["tokenizer"]
    tokenizer = load_tokenizer(spec["name"], data_dir, spec)
    val = Mixture(data, data_dir, "val", model.cfg.seq_len, 0, tokenizer)
    model.hidden(val.validation(0, 64)[:, :-1])
    used = torch.stack([block.mlp.routing[0] for block in model.blocks])  # (L, N, E)
    return used.mean(1).round(decimals=4).tolist()


# ------------------------------------------------------------------------------------------------
# Pictures


@figure
def loop(axes: plt.Axes, numbers: dict) -> None:
    """The whole loop: a box per stage, and under it what it brought, mean of the runs."""
    axes.figure.set_size_inches(8.6, 3)
    axes.set_position([0, 0, 1, 1])
    axes.axis("off")
    axes.set(xlim=(-1, 101), ylim=(0, 30))
    what = {
        "pretrain": ("24,000 tales", "loss, nats", "{:.2f}"),
        "SFT": ("2,287 dialogues", "problems\nsolved", "{:.0%}"),
        "DPO": ("2,000 pairs", "tales of the\nkind asked", "{:.0%}"),
        "verifier": ("8,000 solutions", "one sample,\nits choice of 8", "{:.0%}"),
    }
    width, gap = 22, 4
    for i, (name, (data, metric, form)) in enumerate(what.items()):
        x, color = i * (width + gap), (GRAY, BLUE, GREEN, RED)[i]
        box = {"facecolor": color, "edgecolor": "none", "boxstyle": "round,pad=0,rounding_size=1"}
        axes.add_patch(matplotlib.patches.FancyBboxPatch((x, 17), width, 12, **box))
        middle = x + width / 2
        white = {"color": "white", "ha": "center", "va": "center"}
        axes.text(middle, 25, name, **white, fontsize=20, weight="bold")
        axes.text(middle, 20.3, data, **white, fontsize=15)
        before, after = map(mean, zip(*numbers["toy"]["brought"][name], strict=True))
        text = f"{form.format(before)} → {form.format(after)}"
        how = {"ha": "center", "va": "top", "fontsize": 18, "linespacing": 1}
        axes.text(middle, 14.5, text, color=color, weight="bold", **how)
        axes.text(middle, 9, metric, color=GRAY, **how)
        if i:
            arrow = {"arrowstyle": "-|>", "lw": 2.5, "color": GRAY}
            axes.annotate("", (x - 0.2, 23), (x - gap + 0.2, 23), arrowprops=arrow)


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
def maps(axes: plt.Axes, numbers: dict) -> None:
    """Where the tokens of a sentence look in the first layer, with sinks and without."""
    with_sinks, without = map(np.array, numbers["maps"])
    with_sinks = np.roll(with_sinks, 1, axis=1)  # the sink stands before the first token
    panels = {"with sinks": with_sinks, "without": without[:, :-1]}
    canvas = axes.figure
    canvas.clear()
    canvas.set_size_inches(10, 4.9)
    for place, (name, weights) in zip(canvas.subplots(1, 2), panels.items(), strict=True):
        first = weights.shape[1] - len(weights)  # columns before the first token
        edges = (0.5 - first, len(weights) + 0.5, len(weights) + 0.5, 0.5)
        how = {"cmap": "Blues", "norm": PowerNorm(0.5, 0, 1), "extent": edges}
        place.imshow(weights, **how)
        share = weights[8:, 0].mean()
        said = f"the {'sink' if first else 'first token'} has {share:.0%}"
        place.text(0.97, 0.93, f"{name}:\n{said}", transform=place.transAxes, ha="right", va="top")
        place.set(xlabel="looks at token" + ", 0 = sink" * first, ylabel="token")


@figure
def experts(axes: plt.Axes, numbers: dict) -> None:
    """How many tokens each expert gets, in each layer, with and without the balance loss."""
    runs = dict(zip(("with the balance loss", "without"), numbers["experts"], strict=True))
    n_expert = len(numbers["experts"][0][0])
    for (name, layers), color, shift in zip(runs.items(), (BLUE, RED), (-0.15, 0.15), strict=True):
        for i, shares in enumerate(layers, 1):
            y = [100 * share for share in shares]
            axes.plot([i + shift] * len(y), y, "o", color=color, alpha=0.8, label=name * (i == 1))
    axes.axhline(100 / n_expert, color=GRAY, lw=0.8)
    axes.set(xlabel="layer", ylabel="tokens of an expert, %", ylim=(0, None))
    axes.set_xticks(range(1, len(layers) + 1))
    axes.legend(frameon=False)


@figure
def dpo(axes: plt.Axes, numbers: dict) -> None:
    """The rewards of held-out chosen and rejected answers while DPO learns, seed 1337."""
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
        if axes.axison:
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
    if cfg.maps:
        numbers["maps"] = [map_numbers(folder) for folder in cfg.maps]
    if cfg.experts:
        numbers["experts"] = [expert_numbers(run) for run in cfg.experts]
    write_json(str(kept), json.loads(json.dumps(numbers)))
    for path in draw_all(numbers, cfg.out):
        print(path)
    return 0


if __name__ == "__main__":
    run(main)
