"""How fast this code is beside its peers, on this machine, now.

    python -m bench                         # ours alone, beside the machine's matmul peak
    python -m bench --nanogpt=PATH --nanochat=PATH --transformers           # beside these peers
    python -m bench --tasks=race --shapes=tiny,small --nanogpt=PATH --text=tinyshakespeare.txt
    python -m bench config/h100_bench.py --nanogpt=PATH     # on a GPU: tokens/s, MFU, memory
    python -m bench config/h100_bench.py --tasks=profile    # where a step's time goes, by kernels
    python -m bench --tasks=sft,dpo --shapes=smollm2 --model=RUN    # a run of ours, beside TRL

Each system lives in a process of its own, as its users have it, and the processes take turns (A B A
B ...); on a GPU, which may not hold two of them, one follows the other. The speed of a shared
machine moves by tens of percent from minute to minute, so only the ratio of neighbours means
something: `ratio` is the median over the rounds of (time of the baseline) / (time of the system).
Every system has its own optimizer; parameter counts are printed. A system that cannot run is left
out, with a message. Where the GPU is known, what runtime/budget.py expects stands beside it
(docs/gpu.md). One table per task, and JSON lines in --out.

Tasks: train, profile, generate, tokenize, load, start, race; of a run of ours: sft and dpo (beside
TRL), sample (answers to problems, beside transformers and llama.cpp), evaluate (sst2 and wikitext-2
of data_dir, beside lm_eval). Of their shape only seq_len and batch count: the tokens of a step.
"""

import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from subprocess import PIPE, Popen

import torch

from bench.worker import KERNELS, SYSTEMS, group_of, model_fields
from configurator import UserError, load, require
from model import GPT, ModelConfig
from runtime.budget import Part, device_rates, expected_seconds, expected_step, flops_per_token
from runtime.program import run
from runtime.run_folder import provenance
from runtime.world import KEEP_MEMORY

HERE = os.path.dirname(os.path.abspath(__file__))
ALL_LOGITS, TRL_CACHED = "ours with all logits", "TRL with cached reference"
TASKS = {  # task -> the systems that can do it
    **dict.fromkeys(("train", "profile"), tuple(SYSTEMS)),
    "generate": tuple(name for name in SYSTEMS if not re.search("Muon|recompute|eager", name)),
    **dict.fromkeys(("tokenize", "load", "start"), ("ours", "nanoGPT")),
    "race": ("ours", "nanoGPT", "nanochat"),
    "sft": ("ours", "ours without packing", ALL_LOGITS, "other", "TRL", "TRL with packing"),
    "dpo": ("ours", "ours without cached reference", ALL_LOGITS, "other", "TRL", TRL_CACHED),
    "sample": ("ours", "other", "transformers", "llama.cpp"),
    "evaluate": ("ours", "other", "lm_eval"),
}
PROGRAMS = dict.fromkeys(("train", "profile", "generate"), "worker.py")
PROGRAMS |= dict.fromkeys(("start", "race"), "race.py")
PROGRAMS |= {"sft": "tuning.py", "dpo": "tuning.py", "sample": "usage.py", "evaluate": "usage.py"}
# What is no time, or a part of one
NO_RATIO = ("forward_backward", "val_loss", "parameters", "tokens", "new_tokens", *KERNELS)
NO_RATIO += ("accuracy", "bits_per_byte")


@dataclass
class Shape:
    n_layer: int
    d_model: int
    n_head: int
    seq_len: int
    batch: int
    vocab: int
    d_ff: int | None = None  # of a SwiGLU; None = 8/3 d_model: nanoGPT's MLP has as many parameters


SHAPES = {
    "char": Shape(6, 384, 6, 256, 12, 65),
    "gpt2": Shape(4, 256, 4, 256, 8, 50304),
    "tiny": Shape(4, 128, 4, 64, 12, 65),
    "small": Shape(6, 192, 6, 256, 16, 65),
    "smollm2": Shape(30, 576, 9, 1024, 8, 49152, 1536),
    "h100": Shape(12, 1024, 16, 1024, 16, 50304),
    "h100_recipe": Shape(12, 1024, 16, 1024, 32, 50304, 4096),
}


@dataclass
class BenchConfig:
    """The benchmark."""

    tasks: tuple[str, ...] = ("train", "generate")  # what is measured: see above
    shapes: tuple[str, ...] = ("char", "gpt2")  # tiny, small, smollm2, h100, h100_recipe
    systems: tuple[str, ...] = ()  # ours and peers by name; none = all that can do the task
    baseline: str | None = None  # the system that ratios refer to; None = the first peer
    other: str | None = None  # path of another checkout of this project, to compare two states
    nanogpt: str | None = None  # path of a checkout
    nanochat: str | None = None  # path of a checkout
    transformers: bool = False  # Llama and Qwen3 from the installed transformers
    model: str | None = None  # sft, dpo, sample, evaluate: the run that all systems start from
    gguf: str | None = None  # sample: the same model as a file for llama.cpp
    text: str | None = None  # a file (.txt, .jsonl, .parquet, .gz); sft, dpo, sample: of records
    tokenizer: str = "gpt2"  # tokenize: gpt2 or the path of a ranks file
    data_dir: str = "data"  # where gpt2's ranks are
    rounds: int = 9  # measurements of each system; race: seeds
    new_tokens: int = 256  # generate: per row
    batches: tuple[int, ...] = ()  # rows of a step, one after the other; none = the shape's own
    device: str = "cpu"  # cpu or cuda
    dtype: str = "float32"  # float32 or bfloat16 (autocast)
    compile: bool = False  # torch.compile every system's training step
    threads: int | None = None  # of torch on the CPU
    out: str = "out/bench.jsonl"  # results are appended here

    def __post_init__(self) -> None:
        bounds = {"[1, 1e6]": "rounds new_tokens batches threads"}
        choices = {"device": ("cpu", "cuda"), "dtype": ("float32", "bfloat16")}
        require(self, bounds, choices)
        unknown = {*self.shapes} - {*SHAPES} | {*self.tasks} - {*TASKS}
        if unknown:
            known = f"shapes: {', '.join(SHAPES)}; tasks: {', '.join(TASKS)}"
            raise UserError(f"unknown {', '.join(sorted(unknown))}; {known}")
        if not self.text and {"tokenize", "start", "race"} & set(self.tasks):
            raise UserError("tokenize, start and race need a text: --text=FILE")
        if not self.model and {"sft", "dpo", "sample", "evaluate"} & set(self.tasks):
            raise UserError("sft, dpo, sample and evaluate need a run of ours: --model=RUN")


@dataclass
class Case:
    """What is measured, and the measurements of each system."""

    task: str
    shape_name: str
    shape: Shape
    facts: dict[str, dict] = field(default_factory=dict)
    rounds: dict[str, list[dict]] = field(default_factory=dict)
    peaks: dict[str, list[float]] = field(default_factory=dict)  # FLOP/s of a matmul at each round


def answers(cfg: BenchConfig, case: Case, system: str) -> Iterator[dict | float]:
    """Yield the facts of a system, its rounds and its megabytes, from a process; see worker.py."""
    what = {"shape_name": case.shape_name, "shape": asdict(case.shape)}
    request = {**asdict(cfg), **what, "task": case.task, "system": system}
    program = PROGRAMS.get(case.task, "jobs.py")
    command = [sys.executable, "-P", os.path.join(HERE, program), json.dumps(request)]
    checkout = cfg.other if system == "other" else os.path.dirname(HERE)
    env = {**os.environ, "PYTHONPATH": os.path.abspath(checkout)}
    if system.startswith(("ours", "other")):
        env = KEEP_MEMORY | env
    process = Popen(command, env=env, text=True, stdin=PIPE, stdout=PIPE)
    try:
        for wish in ("", *["round\n"] * cfg.rounds, "end\n"):
            with suppress(BrokenPipeError):  # it has died: there is no answer either
                print(wish, end="", file=process.stdin, flush=True)
            answer = json.loads(process.stdout.readline() or '{"error": "the process has died"}')
            if isinstance(answer, dict) and "error" in answer:
                raise UserError(f"{system}, {case.task} at {case.shape_name}: {answer['error']}")
            yield answer
    finally:
        process.communicate()  # it removes its temporary files, and ends


def systems_for(cfg: BenchConfig, task: str) -> list[str]:
    given = {"other": cfg.other, "nanoGPT": cfg.nanogpt, "nanochat": cfg.nanochat}
    given |= {"Llama": cfg.transformers, "Qwen3": cfg.transformers, "llama.cpp": cfg.gguf}
    there = [name for name in TASKS[task] if given.get(name, True)]
    unknown = ", ".join(name for name in cfg.systems if name not in there)
    if unknown:
        raise UserError(f"no system {unknown} for {task} here; there are {', '.join(there)}")
    return list(cfg.systems) or [name for name in there if not re.search("recompute|eager", name)]


def take_turns(cfg: BenchConfig, case: Case) -> None:
    systems = systems_for(cfg, case.task)
    for group in [[system] for system in systems] if cfg.device == "cuda" else [systems]:
        workers = {}
        for system in group:
            worker = answers(cfg, case, system)
            try:
                case.facts[system], workers[system] = next(worker), worker
            except UserError as error:
                print(f"left out: {error}", flush=True)
        for _ in range(cfg.rounds if workers else 0):
            peak = matmul_peak(cfg) if case.task == "train" else None
            for system, worker in workers.items():
                case.rounds.setdefault(system, []).append(next(worker))
                case.peaks.setdefault(system, []).append(peak)
        for system, worker in workers.items():
            case.facts[system]["peak_mb"] = next(worker)
    if not case.rounds:
        raise UserError(f"no system could do {case.task} at {case.shape_name}: see above")


def matmul_peak(cfg: BenchConfig) -> float:
    """Return the FLOP/s of a large square product, in the compute dtype."""
    n = 8192 if cfg.device == "cuda" else 1536
    a, b = torch.randn(2, n, n, device=cfg.device, dtype=getattr(torch, cfg.dtype))
    for _ in range(2):  # the first is for warming up
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # which waits for the GPU
        seconds = time.perf_counter() - began
    return 2 * n**3 / seconds


def summarize(cfg: BenchConfig, case: Case) -> list[dict]:
    """Return a row per system: medians, their ratio to the baseline, and what follows from them."""
    peers = [system for system in case.rounds if not system.startswith("ours")]
    baseline = case.rounds.get(cfg.baseline or [*peers, *case.rounds][0])
    n_tokens = dict.fromkeys(("step", "forward_backward"), case.shape.batch * case.shape.seq_len)
    n_tokens |= {"batch_1": cfg.new_tokens, "batch_8": 8 * cfg.new_tokens}
    rows = []
    for system, rounds in case.rounds.items():
        row = {"shape": case.shape_name, "batch_rows": case.shape.batch, "system": system}
        row |= case.facts[system]
        for key in rounds[0]:
            values = [measured[key] for measured in rounds]
            row |= in_speeds(key, median(values), row, n_tokens)
            if key in ("seconds", "val_loss"):
                row[f"{key}_of_each"] = values
            if baseline and key not in NO_RATIO:
                ratios = [theirs[key] / own for theirs, own in zip(baseline, values, strict=True)]
                end = f"_{key}" if len(rounds[0]) > 1 else ""
                row[f"ratio{end}"] = median(ratios)
                row[f"range{end}"] = f"{min(ratios):.2f}-{max(ratios):.2f}"
        if case.task == "train" and "MoE" not in system:
            row |= shares_of_peak(cfg, case, system, [measured["step"] for measured in rounds])
        row["peak_mb"] = row.pop("peak_mb")  # the last column
        rows.append(row)
        if case.task == "profile" and (parts := expected_parts(cfg, case, system)):
            ms = Counter()
            for part in parts:
                ms[group_of(part.name)] += 1e3 * expected_seconds([part], device_rates())
            rows.append({"system": f"{system}, expected", **ms})
    return rows


def in_speeds(key: str, value: float, row: dict, n_tokens: dict[str, int]) -> dict[str, float]:
    """Return a measured value as it is shown: the time of a known amount as a speed."""
    if key in n_tokens:
        return {f"{key}_tok_s": n_tokens[key] / value}
    if key == "tokenize":
        return {"mb_s": row["megabytes"] / value}
    if key == "token":
        share = {"supervised_tok_s": row["supervised"] / value} if "supervised" in row else {}
        return {"tok_s": 1 / value} | share
    return {key: value}


def shares_of_peak(cfg: BenchConfig, case: Case, system: str, seconds: list[float]) -> dict:
    """Return the dense model's FLOP/s as shares of the matmul's, and of the data sheet's."""
    flops = flops_per_token(dense_model(case, system)) * case.shape.batch * case.shape.seq_len
    shares = [flops / step / peak for step, peak in zip(seconds, case.peaks[system], strict=True)]
    row, rates = {"of_matmul_peak": median(shares)}, device_rates()
    if cfg.device == "cuda" and rates:
        row |= {"mfu": flops / median(seconds) / rates[0], "step_ms": 1e3 * median(seconds)}
        if parts := expected_parts(cfg, case, system):
            expected = expected_seconds(parts, rates)
            row |= {"expected_mfu": flops / expected / rates[0], "expected_ms": 1e3 * expected}
    return row


def dense_model(case: Case, system: str) -> GPT:
    with torch.device("meta"):  # nothing is allocated
        return GPT(ModelConfig(**model_fields(case.shape), sinks="without sinks" not in system))


def expected_parts(cfg: BenchConfig, case: Case, system: str) -> list[Part]:
    """Return the parts of a step of a dense system of ours, compiled in bf16; of others none."""
    ours = system.startswith("ours") and not re.search("MoE|eager", system)
    if not ours or not cfg.compile or cfg.dtype != "bfloat16" or not device_rates():
        return []
    at_once = case.shape.batch * case.shape.seq_len
    how = ("muon" if "Muon" in system else "adamw", at_once, 1, "recompute" in system)
    return expected_step(dense_model(case, system), *how)


def in_columns(rows: list[dict]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, *([in_words(row.get(key, "")) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def in_words(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(in_words, value))
    if isinstance(value, float) and abs(value) < 10:
        return f"{value:,.3g}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def main(argv: list[str]) -> int:
    cfg = load(argv, BenchConfig)
    os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)
    for task in cfg.tasks:
        rows = []
        for name in ("tiny",) if task in ("tokenize", "start") else cfg.shapes:
            for batch in cfg.batches or (SHAPES[name].batch,):
                case = Case(task, name, replace(SHAPES[name], batch=batch))
                print(f"{task}, {name}: {case.shape}", flush=True)
                take_turns(cfg, case)
                found = summarize(cfg, case)
                rows += found
                origin = {"settings": asdict(cfg), **provenance()}
                with open(cfg.out, "a") as f:
                    for row in found:
                        f.write(json.dumps({"task": task, **row, **origin}) + "\n")
        compiled = ", compiled" if cfg.compile else ""
        print(f"\n{task}: {cfg.device}, {cfg.dtype}{compiled}\n{in_columns(rows)}\n", flush=True)
    return 0


if __name__ == "__main__":
    run(main)
