"""The whole loop in one command: data -> pretrain -> SFT -> DPO -> verifier -> eval -> report.

    python speedrun.py                                               # the toy world, minutes on two CPU cores
    python speedrun.py config/h100_speedrun.py --nproc=4             # every stage under torchrun on 4 GPUs
    python speedrun.py --stage=dpo --checkpoint=out/toy/sft          # one stage, from a checkpoint of your choice

Finished stages are skipped, so the same command goes on after a kill and does nothing after the end.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import align
import configurator
import data
import eval as evaluation
import report
import train
from checkpoint import lock
from configurator import UserError
from train import PREEMPTED

STAGES = ("pretrain", "sft", "dpo", "verifier", "eval")


@dataclass
class SpeedrunConfig:
    out_dir: str = "out/toy"  # one folder per stage goes into it, and results.jsonl, report.md
    stage: str = (
        "all"  # all, or one of pretrain, sft, dpo, verifier, eval (eval writes the report too)
    )
    checkpoint: str | None = None  # start the stage from this one instead of the stage before
    pretrain: str = "config/pretrain.py"  # recipe of each stage
    sft: str = "config/sft.py"
    dpo: str = "config/dpo.py"
    verifier: str = "config/verifier.py"
    eval: str | None = None  # config file for eval.py; None = its defaults
    data_dir: str = "data"  # where data.py put, or will put, the data
    seed: int = 1337  # of every stage
    nproc: int = 1  # processes per stage; more than one runs the stages under torchrun
    max_steps: int | None = None  # of every stage, for a quick look
    force: bool = False  # start over: replaces what the stages have left in out_dir
    no_overwrite: bool = False  # skip what exists; this is what happens anyway unless --force

    def __post_init__(self):
        if self.stage not in ("all", *STAGES):
            raise UserError(f"stage must be all or one of {', '.join(STAGES)}, got {self.stage!r}")
        if self.checkpoint and self.stage not in STAGES[1:-1]:
            raise UserError(
                f"checkpoint is for --stage=sft, dpo or verifier; stage {self.stage!r} does not start from one"
            )
        if self.force and self.no_overwrite:
            raise UserError("force and no_overwrite exclude each other")


def run_stage(cfg: SpeedrunConfig, stage: str, checkpoint: str | None) -> int:
    """One training stage, in this process or under torchrun. -> exit code"""
    module = train if stage == "pretrain" else align
    args = [
        getattr(cfg, stage),
        f"--out_dir={os.path.join(cfg.out_dir, stage)}",
        f"--data_dir={cfg.data_dir}",
        f"--seed={cfg.seed}",
    ]
    args += [f"--init_from={checkpoint}"] if stage != "pretrain" else []
    args += [f"--max_steps={cfg.max_steps}"] if cfg.max_steps else []
    args += ["--force"] if cfg.force else []
    if cfg.nproc == 1:
        return module.main(args)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={cfg.nproc}",
        module.__file__,
        *args,
    ]
    process = subprocess.Popen(command)
    asked = []

    def ask(
        number, frame
    ):  # once, and as TERM: torchrun dies of USR1, and a second TERM ends its wait for the save
        if not asked:
            asked.append(process.send_signal(signal.SIGTERM))

    before = [(number, signal.signal(number, ask)) for number in (signal.SIGTERM, signal.SIGUSR1)]
    code = process.wait()
    for number, handler in before:
        signal.signal(number, handler)
    return PREEMPTED if train.read_state(os.path.join(cfg.out_dir, stage)) == "preempted" else code


def run_stages(cfg: SpeedrunConfig) -> int:
    checkpoint = cfg.checkpoint
    for stage in STAGES[:-1]:
        if cfg.stage in ("all", stage):
            print(f"\n=== {stage} ===", flush=True)
            code = run_stage(
                cfg,
                stage,
                checkpoint or os.path.join(cfg.out_dir, STAGES[max(0, STAGES.index(stage) - 1)]),
            )
            if code:
                return code
            checkpoint = None
    if cfg.stage in ("all", "eval"):
        print("\n=== eval ===", flush=True)
        keep = "--force" if cfg.force else "--no_overwrite"
        code = evaluation.main(
            [
                *filter(None, [cfg.eval]),
                f"--out_dir={cfg.out_dir}",
                f"--data_dir={cfg.data_dir}",
                keep,
            ]
        )
        return code or report.main([f"--out_dir={cfg.out_dir}", keep])
    return 0


def stop(number, frame):
    sys.exit(PREEMPTED)  # between the training loops, which save first


def main(argv: list[str]) -> int:
    cfg = configurator.load(SpeedrunConfig, argv, quiet=False)
    began, state, code = time.perf_counter(), "failed", 1
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
    with lock(cfg.out_dir):
        data.write_json(os.path.join(cfg.out_dir, "state.json"), {"state": "running"})
        try:
            code = run_stages(cfg)
            state = {0: "done", PREEMPTED: "preempted"}.get(code, "failed")
        except SystemExit as end:
            code = end.code
            state = "preempted" if code == PREEMPTED else "failed"
            raise
        finally:
            data.write_json(os.path.join(cfg.out_dir, "state.json"), {"state": state})
    advice = (
        "run the same command again to go on"
        if state != "done"
        else f"read {os.path.join(cfg.out_dir, 'report.md')}"
        if cfg.stage in ("all", "eval")
        else f"stage {cfg.stage} is in {cfg.out_dir}"
    )
    print(f"\nspeedrun: {state} after {(time.perf_counter() - began) / 60:.1f} min; {advice}")
    return code


if __name__ == "__main__":
    configurator.run(main)
