"""The first ten minutes on a card: what holds, how it learns, how fast; all in one JSON file.

    python -m bench.gpu --nanogpt=PATH [--out=out/gpu.json]     # on the card
    python -m bench.gpu --device=cpu                            # the same, tiny, for a look

In this order: the GPU's tests; three minutes of config/h100_pretrain.py with their loss curve (on
its data, or on the toy world where that is missing); a step by groups of kernels; tokens/s, MFU and
memory, system by system. Each part is a program of its own: when it ends, in whatever way, what it
gave is written down, and the next one begins.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import STDOUT, Popen, TimeoutExpired

from configurator import UserError, load, require
from runtime.files import read_json, remove_if_there, write_json
from runtime.logs import read_log
from runtime.program import run
from runtime.run_folder import PREEMPTED, provenance

ROOT = Path(__file__).resolve().parent.parent
SYSTEMS = ("ours with Muon", "nanoGPT", "ours", "ours without sinks", "ours with recompute")
SYSTEMS += ("ours eager", "ours MoE 8 top 2")
ON_CPU = ["--device=cpu", "--dtype=float32", "--compile=False"]
TINY = "--seq_len=32 --n_layer=1 --n_head=2 --d_model=32 --d_ff=64 --batch_tokens=256"
TINY += " --max_steps=3 --log_interval=1"


@dataclass
class GpuConfig:
    """The first minutes on a card."""

    out: str = "out/gpu.json"  # kept and extended; what the parts write is in a folder beside it
    parts: tuple[str, ...] = ()  # some of them, again; none = all
    nanogpt: str | None = None  # path of a checkout
    data_dir: str = "data"  # where the recipe's data may be
    seconds: int = 240  # of a part, compilation included; then it may save, and ends
    device: str = "cuda"  # cuda or cpu

    def __post_init__(self) -> None:
        require(self, {"[1, 1e5]": "seconds"}, {"device": ("cuda", "cpu")})


def programs(cfg: GpuConfig, folder: Path) -> dict[str, list[str]]:
    """Return the program of every part; its rows go to folder/PART/metrics.jsonl."""
    tiny, data_dir = cfg.device == "cpu", os.path.abspath(cfg.data_dir)
    there = all(Path(data_dir, name).is_dir() for name in ("wikitext-103", "tinystories"))
    train = ["train.py", "config/h100_pretrain.py", "--force", f"--data_dir={data_dir}"]
    train += [f"--out_dir={folder}/train"] + [*ON_CPU, *TINY.split()] * tiny
    train += [] if there and not tiny else ["--data=toy", "--tokenizer=toy"]
    bench = ["-m", "bench", "config/h100_bench.py", "--shapes=h100_recipe"]
    bench += [*ON_CPU, "--shapes=tiny", "--rounds=1"] * tiny
    bench += [f"--nanogpt={os.path.abspath(cfg.nanogpt)}"] if cfg.nanogpt else []
    parts = {"tests": ["-m", "pytest", "-m", "gpu", "-rs", "tests"], "train": train}
    flags = {"profile": ["--tasks=profile", "--batches=32", f"--systems={SYSTEMS[0]}"]}
    flags |= {f"table of {name}": ["--batches=8,32", f"--systems={name}"] for name in SYSTEMS}
    for part, how in flags.items():
        parts[part] = [*bench, *how, f"--out={folder}/{part}/metrics.jsonl"]
    return parts


def perform(command: list[str], seconds: int, folder: Path) -> dict:
    """Run a program for so long at most. -> what is written down of it"""
    rows, began = f"{folder}/metrics.jsonl", time.perf_counter()
    remove_if_there(rows)
    with open(f"{folder}.txt", "w+") as log:
        how = {"cwd": ROOT, "stdout": log, "stderr": STDOUT, "start_new_session": True}
        process = Popen([sys.executable, *command], **how)
        for number, limit in ((signal.SIGTERM, seconds), (signal.SIGKILL, 60)):
            with suppress(TimeoutExpired):
                process.wait(limit)
                break
            os.killpg(process.pid, number)  # the first lets training save
        log.seek(0)
        last_lines = log.read().splitlines()[-20:]
    result = {"exit_code": process.wait(), "seconds": time.perf_counter() - began}
    return result | {"command": command, "last_lines": last_lines, "rows": read_log(rows)}


def main(argv: list[str]) -> int:
    cfg = load(argv, GpuConfig)
    folder = Path(os.path.abspath(f"{cfg.out}.parts"))
    folder.mkdir(parents=True, exist_ok=True)
    known, results, failed = programs(cfg, folder), read_json(cfg.out) | provenance(), False
    if unknown := set(cfg.parts) - {*known}:
        raise UserError(f"unknown part {min(unknown)!r}; there are {', '.join(known)}")
    for part in cfg.parts or known:
        print(f"{part} ...", flush=True)
        results[part] = perform(known[part], cfg.seconds, folder / part)
        write_json(cfg.out, results)
        code, last = results[part]["exit_code"], results[part]["last_lines"][-1:]
        print(f"{part}: exit code {code}, {results[part]['seconds']:.0f} s", *last, flush=True)
        failed |= code not in (0, PREEMPTED)
    return int(failed)


if __name__ == "__main__":
    run(main)
