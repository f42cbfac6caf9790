"""The whole loop in one command: data -> pretrain -> SFT -> DPO -> verifier -> eval -> report.

    python speedrun.py                                       # the toy world, minutes on 2 cores
    python speedrun.py config/h100_speedrun.py --nproc=4     # every stage under torchrun, 4 GPUs
    python speedrun.py --stage=dpo --checkpoint=out/toy/sft  # one stage, from this checkpoint

Finished stages are skipped: after a kill the same command goes on, after the end it does nothing.
"""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import UserError, load, require
from runtime.checkpoint import NEW, is_stale
from runtime.files import digest_of_files, write_json
from runtime.program import run
from runtime.run_folder import PREEMPTED, command, lock, read_state
from runtime.world import KEEP_MEMORY, die_with_parent, on_stop_signals

HERE = os.path.dirname(os.path.abspath(__file__))
STAGES = ("pretrain", "sft", "dpo", "verifier", "eval")  # of the whole loop; rl is by request
START = {"sft": "pretrain", "dpo": "sft", "rl": "sft", "verifier": "dpo"}  # of each stage


@dataclass
class SpeedrunConfig:
    """The stages and their recipes."""

    out_dir: str = "out/toy"  # one folder per stage goes into it, and results.jsonl, report.md
    stage: str = "all"  # all, pretrain, sft, dpo, rl, verifier, eval (which writes the report too)
    checkpoint: str | None = None  # start the stage from this one instead of the stage before
    pretrain: str = "config/pretrain.py"  # recipe of each stage
    sft: str = "config/sft.py"
    dpo: str = "config/dpo.py"
    rl: str = "config/rl_problems.py"
    verifier: str = "config/verifier.py"
    eval: str | None = None  # config file for eval.py; None = its defaults
    data_dir: str = "data"  # where data.py put, or will put, the data
    seed: int = 1337  # of every stage
    nproc: int = 1  # processes per stage; more than one runs the stages under torchrun
    max_steps: int | None = None  # of every stage, for a quick look
    force: bool = False  # start over: replaces what the stages have left in out_dir
    no_overwrite: bool = False  # skip what exists; this is what happens anyway unless --force

    def __post_init__(self) -> None:
        bounds = {"[1, inf)": "nproc max_steps", "[0, inf)": "seed"}
        require(self, bounds, {"stage": ("all", *STAGES, "rl")})
        if self.checkpoint and self.stage not in START:
            known = ", ".join(START)
            raise UserError(f"checkpoint is for the stages {known}, not for {self.stage!r}")
        if self.force and self.no_overwrite:
            raise UserError("force and no_overwrite exclude each other")
        most = max(os.cpu_count() or 1, torch.cuda.device_count())
        if self.nproc > most:
            raise UserError(f"nproc={self.nproc} is more than the {most} cores or GPUs there are")
        for stage in (*STAGES, "rl"):
            if getattr(self, stage):
                setattr(self, stage, find_recipe(stage, getattr(self, stage)))


def find_recipe(stage: str, path: str) -> str:
    """Return the path of a recipe, given from here or from the folder of this program."""
    for candidate in (path, os.path.join(HERE, path)):
        if os.path.isfile(candidate):
            return candidate
    raise UserError(f"{stage}={path!r} is no file, neither here nor in {HERE}")


class Programs:
    """This process starts one program after the other and passes a request to stop on to it."""

    def __init__(self) -> None:
        self.process, self.stopping = None, False
        on_stop_signals(self.stop)

    def stop(self, number: int, frame: object) -> None:
        """Pass on the first request, as SIGTERM: torchrun dies of SIGUSR1. Ctrl-C again kills."""
        if self.process and not self.stopping:
            self.process.send_signal(signal.SIGTERM)
        elif self.process and number == signal.SIGINT:
            self.process.kill()
        self.stopping = True

    def run(self, arguments: list[str]) -> int:
        """Run a Python program and return its exit code, or PREEMPTED when it was to stop."""
        if self.stopping:
            return PREEMPTED
        path = f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
        env = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240", **KEEP_MEMORY, **os.environ}
        env |= {"PYTHONPATH": path, "SPEEDRUN_PID": str(os.getpid())}
        how = {"env": env, "preexec_fn": die_with_parent, "process_group": 0}
        # the group keeps Ctrl-C in a terminal for this process alone
        self.process = subprocess.Popen([sys.executable, *arguments], **how)
        if self.stopping:  # asked a moment ago
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait()
        if code and self.stopping:
            return PREEMPTED
        return code if code >= 0 else 128 - code  # killed by a signal: as a shell says it

    def train(self, cfg: SpeedrunConfig, stage: str, start: str | None) -> int:
        folder = os.path.join(cfg.out_dir, stage)
        program = [os.path.join(HERE, "align.py" if start else "train.py"), getattr(cfg, stage)]
        flags = {"out_dir": folder, "data_dir": cfg.data_dir, "seed": cfg.seed}
        flags |= {"init_from": start, "max_steps": cfg.max_steps}
        program += [f"--{key}={value}" for key, value in flags.items() if value is not None]
        stale = start is not None and is_stale(folder, start)
        if stale and not cfg.force:
            print(f"{folder} is stale: {start} has other weights now; made again", flush=True)
        begun = os.path.isdir(os.path.join(folder, NEW))  # --force, and nothing saved so far
        program += ["--force"] if cfg.force or stale or begun else []
        if cfg.nproc == 1:
            return self.run(program)
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cfg.nproc}"]
        torchrun += ["--local_addr=127.0.0.1"]  # a host name that no server knows costs minutes
        code = self.run(torchrun + program)
        return PREEMPTED if read_state(folder) == "preempted" else code  # torchrun's code is 1

    def evaluate(self, cfg: SpeedrunConfig) -> int:
        out_dir, keep = f"--out_dir={cfg.out_dir}", "--force" if cfg.force else "--no_overwrite"
        program = [os.path.join(HERE, "eval.py"), out_dir, f"--data_dir={cfg.data_dir}", keep]
        code = self.run(program + [cfg.eval] * bool(cfg.eval))
        keep = "--force" if is_outdated(cfg.out_dir) else keep
        return code or self.run(["-P", "-m", "evals.report", out_dir, keep])

    def run_stages(self, cfg: SpeedrunConfig) -> int:
        for stage in STAGES if cfg.stage == "all" else (cfg.stage,):
            print(f"\n=== {stage} ===", flush=True)
            before = os.path.join(cfg.out_dir, START[stage]) if stage in START else None
            start = cfg.checkpoint or before
            code = self.evaluate(cfg) if stage == "eval" else self.train(cfg, stage, start)
            if code:
                return code
        return 0


def is_outdated(out_dir: str) -> bool:
    """Say whether the report was made from other results or metrics than there are now."""
    path = Path(out_dir, "report.md")
    text = path.read_text(errors="replace") if path.exists() else ""
    made_from = re.search(r"<!-- made from (.*): (\w+) -->", text)
    now = made_from and digest_of_files(out_dir, made_from[1])
    return path.exists() and not (made_from and now == made_from[2])


def main(argv: list[str]) -> int:
    cfg = load(argv, SpeedrunConfig, quiet=False)
    began, code = time.perf_counter(), 1
    programs, state_path = Programs(), os.path.join(cfg.out_dir, "state.json")
    with lock(cfg.out_dir):
        write_json(state_path, {"state": "running"})
        try:
            code = programs.run_stages(cfg)
        finally:
            state = {0: "done", PREEMPTED: "preempted"}.get(code, "failed")
            write_json(state_path, {"state": state})
    advice = f"{'mend that, and ' * (state == 'failed')}go on with: {command()}"
    if state == "done":
        has_report = cfg.stage in ("all", "eval")
        advice = f"read {os.path.join(cfg.out_dir, 'report.md' if has_report else cfg.stage)}"
    print(f"\nspeedrun: {state} after {(time.perf_counter() - began) / 60:.1f} min; {advice}")
    return code


if __name__ == "__main__":
    run(main, outlives_output=True)
