"""The scripts in slurm/ run with plain bash and under Slurm.

A stopped run is saved, requeued and finished. Tests marked slurm need a cluster that sees this
folder and pytest's temporary one (--basetemp). MODERN_LLM_SLURM_START may name a command that
brings one up, e.g. a toy cluster on this machine; it is left running. Site options come from
SBATCH_ACCOUNT etc.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from helpers import ROOT

import speedrun

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
JOBS = [path for path in SCRIPTS if path.name != "common.sh"]
SMALL = ["config/smoke.py", "--device=cpu", "--eval_interval=1000", "--log_interval=1"]


def environment(**changes) -> dict:
    """Return an environment with our Python first on PATH, and one process with one thread.

    Nothing is in it of a job that this session may run in.
    """
    env = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("SLURM_") and k != "CUDA_VISIBLE_DEVICES"
    }
    env |= {
        "PATH": os.path.dirname(sys.executable) + os.pathsep + env["PATH"],
        "NPROC": "1",
        "OMP_NUM_THREADS": "1",
        **changes,
    }
    return {key: value for key, value in env.items() if value is not None}


def bash(*args, **changes) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", *map(str, args)],
        cwd=ROOT,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=300,
    )


def common(code: str, *args, **changes) -> subprocess.CompletedProcess:
    """Bash code after slurm/common.sh, as a batch script would run it."""
    return bash("-c", f"set -euo pipefail; . slurm/common.sh; {code}", "script", *args, **changes)


def wait_for(what, seconds: float, condition):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} within {seconds} s"
        time.sleep(0.2)


def steps_done(out_dir: Path) -> int:
    path = out_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def state_of(out_dir: Path) -> dict:
    return json.loads((out_dir / "state.json").read_text())


@pytest.fixture(scope="module")
def data_flag(tmp_path_factory) -> str:
    """The toy world is made there by the first run that needs it."""
    return f"--data_dir={tmp_path_factory.mktemp('data')}"


# --------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_is_short_and_parses(path):
    assert bash("-n", path).returncode == 0
    assert len(path.read_text().splitlines()) < 60


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_script_is_site_neutral_and_can_be_requeued(path):
    text = path.read_text()
    options = re.findall(r"^#SBATCH (.*)$", text, re.M)
    assert "set -euo pipefail" in text and '"$@"' in text
    assert not [o for o in options if re.match(r"(--account|--partition|--qos|--mail|-A|-p)\b", o)]
    assert {
        "--requeue",
        "--open-mode=append",
        "--output=slurm-%x-%j.out",
        "--nodes=1",
        "--ntasks=1",
    } <= set(options)
    assert any(o.startswith("--signal=B:USR1@") for o in options)
    assert f"sbatch slurm/{path.name}" in text and f"bash slurm/{path.name}" in text


# --------------------------------------------------------------------------------------------------
# Decisions of common.sh, without a program that trains


@pytest.mark.parametrize(
    "script, module, config",
    [
        ("pretrain", "train", "LoopConfig"),
        ("align", "train", "LoopConfig"),
        ("eval", "evals.base", "EvalConfig"),
        ("speedrun", "speedrun", "SpeedrunConfig"),
    ],
)
def test_default_out_dir_is_the_programs(script, module, config):
    """The script looks for state.json there when the command line names no out_dir."""
    default = re.search(r"out_dir_of (\S+)", (ROOT / "slurm" / f"{script}.sh").read_text())[1]
    assert default == getattr(importlib.import_module(module), config).out_dir


@pytest.mark.parametrize(
    "args, out_dir",
    [
        ([], "out/default"),
        (["config/smoke.py"], "out/smoke"),
        (["config/smoke.py", "--seed=2"], "out/smoke"),
        (["--out_dir=a b/c=d", "config/smoke.py"], "a b/c=d"),
        (["--out-dir=x", "--out_dir=y"], "y"),
        (["config/missing.py"], "out/default"),
    ],
)
def test_out_dir_is_found_as_the_configurator_does(args, out_dir):
    assert common('out_dir_of out/default "$@"', *args).stdout.strip() == out_dir


def test_alignment_without_an_out_dir_is_looked_for_where_it_goes(tmp_path):
    """Beside its start, as align.py does; else the script would read another run's state."""
    text = (ROOT / "slurm" / "align.sh").read_text()
    lines = text[text.index('out_dir="$(') : text.index("run ")] + 'echo "$out_dir"'
    start = tmp_path / "pretrain"
    start.mkdir()
    for given, wanted in (["--mode=dpo"], tmp_path / "dpo"), (["--out_dir=x"], "x"):
        assert common(lines, f"--init_from={start}/", *given).stdout.strip() == str(wanted)


GPUS = [
    ({"NPROC": "3"}, "3"),
    ({"CUDA_VISIBLE_DEVICES": "0,1"}, "2"),
    ({"CUDA_VISIBLE_DEVICES": ""}, "1"),
    ({"CUDA_VISIBLE_DEVICES": "GPU-1f,GPU-2e,GPU-3d"}, "3"),
    ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "1"),
    ({"SLURM_GPUS_ON_NODE": "4"}, "4"),
    ({"CUDA_VISIBLE_DEVICES": "0,1", "NPROC": "1"}, "1"),
]


@pytest.mark.parametrize("env, nproc", GPUS)
def test_processes_are_the_visible_gpus(env, nproc):
    assert common('echo "$nproc ${launch[0]}"', **{"NPROC": None, **env}).stdout.split() == [
        nproc,
        "python" if nproc == "1" else "torchrun",
    ]


def test_programs_keep_freed_memory_unless_told_otherwise():
    """The allocator's settings are those that speedrun.py gives its stages."""
    show = "python -c \"import os; print(os.environ['MALLOC_MMAP_MAX_'], "
    show += "os.environ['MALLOC_TRIM_THRESHOLD_'])\""
    unset = dict.fromkeys(speedrun.KEEP_MEMORY)
    assert common(show, **unset).stdout.split() == list(speedrun.KEEP_MEMORY.values())
    assert common(show, **{**unset, "MALLOC_MMAP_MAX_": "7"}).stdout.split() == ["7", "-1"]


def test_requeued_job_does_not_start_over():
    """--force deletes the run: right at a job's first start, wrong when it comes back."""
    args = ["config/smoke.py", "--force", "--force=1", "--out_dir=a b"]
    show = r'printf "%s\n" "$@"'
    assert common(show, *args, SLURM_RESTART_COUNT="0").stdout.splitlines() == args
    assert common(show, *args, SLURM_RESTART_COUNT="1").stdout.splitlines() == [
        "config/smoke.py",
        "--out_dir=a b",
    ]


def batch_job(tmp_path: Path, program: str, restart: int = 0) -> subprocess.CompletedProcess:
    """Run a program as job 7 of a pretended Slurm that writes down what is requeued.

    program: shell code; it runs in the run folder.
    """
    fake = tmp_path / "bin" / "scontrol"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(f'#!/bin/sh\necho "$@" >>"{tmp_path}/scontrol.log"\n')
    fake.chmod(0o755)
    env = {
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": str(restart),
        "PATH": f"{fake.parent}{os.pathsep}{environment()['PATH']}",
    }
    code = "set -euo pipefail; SLURM_TASK_PID=$$; . slurm/common.sh; listen() { :; }; "
    code += 'out_dir="$1"; run sh -c "$2" "$1"'
    return bash("-c", code, "script", tmp_path / "run", f'cd "$0"; {program}', **env)


ENDS = [  # program, exit code, requeued
    ("""echo '{"state": "done"}' >state.json""", 0, False),
    ("""echo '{"state": "preempted"}' >state.json; exit 75""", 75, True),
    # torchrun's exit code is 1 whatever happened
    ("""echo '{"state": "preempted"}' >state.json; exit 1""", 75, True),
    ("""echo '{"state": "failed"}' >state.json; exit 1""", 1, False),
    ("""echo '{"state": "running"}' >state.json; kill -9 $$""", 137, False),
    ("""kill -USR1 $PPID; sleep 5""", 75, True),  # warned while nothing was there to save
    ("""kill -TERM $PPID; sleep 1; exit 75""", 75, False),  # scancel
    ("exit 2", 2, False),
]


@pytest.mark.parametrize("program, code, requeued", ENDS)
def test_only_a_preempted_run_is_requeued(tmp_path, program, code, requeued):
    result = batch_job(tmp_path, program)
    assert result.returncode == code, result.stdout + result.stderr
    assert (tmp_path / "scontrol.log").exists() == requeued
    assert (tmp_path / "run" / "DONE").exists() == (code == 0)


def test_state_of_an_earlier_run_does_not_count(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text('{"state": "preempted"}')
    assert batch_job(tmp_path, "exit 1").returncode == 1


def test_crash_loop_stops(tmp_path):
    """Three restarts without a new checkpoint are enough.

    With new checkpoints a job may come back for ever.
    """
    idle, busy = "exit 75", "touch ckpt_$(date +%N).pt; exit 75"
    assert [batch_job(tmp_path, busy, restart).returncode for restart in range(5)] == [75] * 5
    assert [batch_job(tmp_path, idle, restart).returncode for restart in range(5, 9)] == [
        75,
        75,
        75,
        1,
    ]
    assert batch_job(tmp_path, idle).returncode == 75  # submitted anew


# --------------------------------------------------------------------------------------------------
# Plain bash


@pytest.mark.slow
def test_smoke_script_ends_done(tmp_path, data_flag):
    out_dir = tmp_path / "run with space"
    result = bash("slurm/smoke.sh", "--max_steps=6", f"--out_dir={out_dir}", data_flag, NPROC="2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (
        state_of(out_dir)["state"] == "done"
        and (out_dir / "DONE").exists()
        and "2 processes" in result.stdout
    )


@pytest.mark.slow
def test_exit_code_of_a_failing_program_is_kept(tmp_path):
    result = bash(
        "slurm/pretrain.sh", "config/smoke.py", "--no_such_key=1", f"--out_dir={tmp_path / 'run'}"
    )
    assert (
        result.returncode == 2
        and "no_such_key" in result.stderr
        and not (tmp_path / "run").exists()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "nproc, number", [(1, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGUSR1)]
)
def test_signal_saves_and_the_same_command_goes_on(tmp_path, data_flag, nproc, number):
    """A kill of the script, not of the program, gives state preempted and exit code 75.

    The second start resumes there and ends done.
    """
    command = [
        "bash",
        "slurm/pretrain.sh",
        *SMALL,
        "--max_steps=80",
        f"--out_dir={tmp_path}",
        data_flag,
    ]
    env = environment(NPROC=str(nproc))
    first = subprocess.Popen(command, cwd=ROOT, env=env)
    try:
        wait_for("step 5", 120, lambda: steps_done(tmp_path) > 5)
        first.send_signal(number)
        assert first.wait(60) == 75
    finally:
        if first.poll() is None:
            first.terminate()
    stopped = state_of(tmp_path)
    assert (
        stopped["state"] == "preempted"
        and stopped["step"] < 80
        and not (tmp_path / "DONE").exists()
    )
    second = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0 and f"at step {stopped['step']}" in second.stdout, (
        second.stdout + second.stderr
    )
    assert state_of(tmp_path)["state"] == "done" and (tmp_path / "DONE").exists()


# --------------------------------------------------------------------------------------------------
# Slurm


def answers() -> bool:
    try:
        return bool(subprocess.run(["sinfo", "-h"], capture_output=True, timeout=20).stdout.strip())
    except subprocess.TimeoutExpired:
        return False


@pytest.fixture(scope="module")
def cluster():
    if not shutil.which("sbatch"):
        pytest.skip("no sbatch here")
    start = os.environ.get("MODERN_LLM_SLURM_START")
    if not answers() and start:
        subprocess.run(shlex.split(start), check=True, timeout=120, stdout=subprocess.DEVNULL)
    if not answers():
        pytest.skip(
            "sbatch is here, but no cluster answers "
            "(MODERN_LLM_SLURM_START may name a command that starts one)"
        )


class Job:
    def __init__(self, out_dir: Path, *command):
        self.log = out_dir / "log"
        options = [
            "--parsable",
            "--gres=none",
            "--cpus-per-task=1",
            "--time=15",
            f"--output={self.log}",
        ]
        result = subprocess.run(
            ["sbatch", *options, *map(str, command)],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        self.id = result.stdout.strip().split(";")[0]

    def field(self, key: str) -> str:
        shown = subprocess.run(
            ["scontrol", "show", "job", self.id], capture_output=True, text=True
        ).stdout
        found = re.search(rf"\b{key}=(\S+)", shown)
        return found[1] if found else ""

    def wait(self, seconds: float = 300):
        wait_for(
            "end of the job",
            seconds,
            lambda: (
                self.field("JobState") not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
            ),
        )
        return self.field("JobState"), self.field("ExitCode")

    def cancel(self):
        subprocess.run(["scancel", self.id], capture_output=True)


@pytest.fixture
def submit(cluster):
    jobs = []
    yield lambda *args: jobs.append(Job(*args)) or jobs[-1]
    for job in jobs:
        job.cancel()


@pytest.mark.slurm
def test_smoke_job_completes(submit, tmp_path, data_flag):
    job = submit(
        tmp_path, "slurm/smoke.sh", "--max_steps=6", f"--out_dir={tmp_path / 'run'}", data_flag
    )
    assert job.wait() == ("COMPLETED", "0:0"), job.log.read_text()
    assert state_of(tmp_path / "run")["state"] == "done"


def runs_beyond(job: Job, run: Path, step: int) -> bool:
    return job.field("JobState") == "RUNNING" and steps_done(run) > step


def is_requeued(job: Job, restart: int) -> bool:
    return job.field("JobState") == "PENDING" and job.field("Restarts") == str(restart)


def is_restarted(job: Job) -> bool:
    now = ["scontrol", "update", f"jobid={job.id}", "StartTime=now"]
    subprocess.run(now, capture_output=True)
    return job.field("JobState") != "PENDING"


@pytest.mark.slurm
def test_warned_job_is_requeued_resumes_and_completes(submit, tmp_path, data_flag):
    """What --signal=B:USR1@... does before the time limit, twice."""
    run = tmp_path / "run"
    job = submit(
        tmp_path,
        "slurm/pretrain.sh",
        *SMALL,
        "--max_steps=150",
        "--force",
        f"--out_dir={run}",
        data_flag,
    )
    for restart, step in (1, 5), (2, 60):
        wait_for(f"step {step}", 180, partial(runs_beyond, job, run, step))
        subprocess.run(["scancel", "--signal=USR1", "--batch", job.id], check=True)
        wait_for("requeue", 120, partial(is_requeued, job, restart))
        assert state_of(run)["state"] == "preempted"
        # A requeued job is held back for about two minutes, set at a moment of Slurm's own: ask
        # until it runs. But not within the second in which its node revoked the old credential
        # ("Job credential revoked": the job would end FAILED, 1:0).
        time.sleep(3)
        wait_for("restart", 300, partial(is_restarted, job))
    assert job.wait() == ("COMPLETED", "0:0"), job.log.read_text()
    assert job.log.read_text().count("resuming") == 2
    assert (
        state_of(run)["state"] == "done"
        and state_of(run)["step"] == 150
        and (run / "DONE").exists()
    )


@pytest.mark.slurm
def test_cancelled_job_saves_and_is_not_requeued(submit, tmp_path, data_flag):
    run = tmp_path / "run"
    job = submit(
        tmp_path, "slurm/pretrain.sh", *SMALL, "--max_steps=2000", f"--out_dir={run}", data_flag
    )
    wait_for("step 5", 180, lambda: steps_done(run) > 5)
    job.cancel()
    assert job.wait()[0] == "CANCELLED"
    assert state_of(run)["state"] == "preempted" and job.field("Restarts") == "0"
