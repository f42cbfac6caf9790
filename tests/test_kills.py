"""Kills: whichever program is killed at whatever moment, the same command ends with the same files.

pytest -m kills      # 100 kills of nine programs, two ranks among them, about ten minutes
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpus_helpers import snapshot
from helpers import ROOT

from evals.results import item_key, read_results
from runtime.checkpoint import load_checkpoint
from runtime.logs import read_log

STEPS = "--log_interval=1 --save_interval=2 --eval_interval=6 --max_steps=12 --micro_batch=8"
SHORT = f"{STEPS} --batch_tokens=1024"
FEW = "--n_problems=6 --n_samples=2 --max_new_tokens=16 --n_chats=4"
TORCHRUN = "-m torch.distributed.run --standalone --local_addr=127.0.0.1 --nproc_per_node=2"
COMMANDS = {  # {whole} is the unbroken pipeline, {out} the folder of what is killed
    "data": "data.py --sources=toy --data_dir={out} --toy_stories=800 --toy_problems=300",
    "pretrain": f"train.py config/smoke.py --out_dir={{out}} {STEPS} --max_steps=60",
    "sft": f"align.py config/sft.py --init_from={{whole}}/pretrain --out_dir={{out}} {SHORT}",
    "dpo": f"align.py config/dpo.py --init_from={{whole}}/sft --out_dir={{out}} {SHORT}",
    "rl": "align.py config/rl_problems.py --init_from={whole}/sft --out_dir={out}"
    f" {STEPS} --max_steps=6 --n_problems=4 --n_samples=4 --max_new_tokens=24 --epochs=2",
    "verifier": "align.py config/verifier.py --init_from={whole}/dpo --out_dir={out}"
    f" {SHORT} --n_problems=60 --n_samples=4 --max_new_tokens=24",
    "eval": f"eval.py --out_dir={{out}} --no_overwrite {FEW}"
    " --tasks=val_loss,problems,preference,chats",
}
COMMANDS["pretrain on two ranks"] = f"{TORCHRUN} {COMMANDS['pretrain']}"
COMMANDS["sft on two ranks"] = f"{TORCHRUN} {COMMANDS['sft']}"


def start(name: str, whole: Path, out: Path) -> subprocess.Popen:
    parts = [part.format(whole=whole / "out", out=out) for part in COMMANDS[name].split()]
    command = [sys.executable, *parts]
    if name != "data":
        command.append(f"--data_dir={whole / 'data'}")
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **how)


def outcome(name: str, out: Path) -> object:
    """Return all of what a program leaves that no clock has a part in."""
    if name == "data":
        return snapshot(out)
    if name == "eval":
        rows = {(row["stage"], item_key(row)): row for row in read_results(str(out))}
        return {key: (row["value"], row["weights_hash"]) for key, row in rows.items()}
    times = ("step_ms", "tokens_per_s", "sampled_per_s", "eta_s", "mfu")
    rows = read_log(str(out / "metrics.jsonl"))
    rows = [{key: row[key] for key in row if key not in times} for row in rows]
    return load_checkpoint(str(out))["weights_hash"], rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The pipeline that nobody kills. -> its folder, {program: (its outcome, seconds)}"""
    folder, outcomes = tmp_path_factory.mktemp("whole"), {}
    for name in COMMANDS:
        places = {"data": folder / "data", "eval": folder / "out"}
        out, began = places.get(name, folder / "out" / name), time.monotonic()
        if "ranks" in name:
            out = folder / name
        process = start(name, folder, out)
        assert process.communicate()[0] is not None and process.returncode == 0, name
        outcomes[name] = outcome(name, out), time.monotonic() - began
    return folder, outcomes


def kill_often(name: str, whole: tuple, out: Path, kills: int) -> None:
    """Kill a program so often, at random moments of its way, and compare whatever it finishes."""
    folder, outcomes = whole
    expected, seconds = outcomes[name]
    chance = random.Random(f"{name} {kills}")
    while True:
        if name == "eval" and not out.exists():
            kept = ("pretrain", "sft", "dpo")
            for stage in kept:
                shutil.copytree(folder / "out" / stage, out / stage)
        process = start(name, folder, out)
        time.sleep(chance.uniform(0.1, seconds) if kills else 0)
        if kills and process.poll() is None:
            alone = chance.random() < 0.5  # the others of its group then have to notice
            (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
            kills -= 1
        text = process.communicate()[0]
        assert process.returncode in (0, -signal.SIGKILL), text
        if process.returncode == 0:
            found = outcome(name, out)
            if name == "eval":
                expected = {key: expected[key] for key in expected if key in found}
                assert len(found) > 20
            assert found == expected
            if not kills:
                return
            shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_changes_nothing(name, whole, tmp_path):
    kill_often(name, whole, tmp_path / "out", 2 if name == "pretrain on two ranks" else 1)


@pytest.mark.kills
@pytest.mark.parametrize("name", COMMANDS)
def test_a_hundred_kills_change_nothing(name, whole, tmp_path):
    kill_often(name, whole, tmp_path / "out", 12 if name == "pretrain on two ranks" else 11)
