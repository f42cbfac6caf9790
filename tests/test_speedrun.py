"""The whole loop in one command, killed and repeated."""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from helpers import ROOT, fails, fork, save_start, tiny

import speedrun
from corpus import toy
from corpus.shards import write_shard
from corpus.tokenizer import load_tokenizer
from runtime.checkpoint import load_checkpoint
from runtime.files import digest_of_files, read_jsonl, write_json, write_jsonl
from runtime.logs import read_log

TOY = load_tokenizer("toy")


RECIPES = {
    "pretrain": "seq_len = 192; n_layer = 1; n_head = 2; d_model = 32; batch_tokens = 768",
    "sft": 'mode = "sft"; batch_tokens = 768',
    "dpo": 'mode = "dpo"; batch_tokens = 768; optimizer = "adamw"',
    "verifier": 'mode = "verifier"; batch_tokens = 768; n_problems = 4; n_samples = 2',
    "eval": 'n_problems = 4; n_samples = 2; max_new_tokens = 8; device = "cpu"',
}
LOOP = "; micro_batch = 4; eval_interval = 3; eval_rows = 4; save_interval = 3; log_interval = 1"
CPU = '; device = "cpu"; dtype = "float32"'
BODIES = {name: body + (LOOP + CPU) * (name != "eval") for name, body in RECIPES.items()}
BODIES["verifier"] += "; max_new_tokens = 8"


@pytest.fixture
def handlers(monkeypatch):
    """Leave the test runner its own signal handlers, and the stages one thread."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------
# The loop, with programs that only write down what they were given

WRITES = """
import json, os, sys
names = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
row = [sys.argv, [os.environ.get(name) for name in names]]
with open(os.environ["LOG"], "a") as f:
    f.write(json.dumps(row) + "\\n")
"""
WAITS = """
import os, signal, sys, time
def stop(number, frame):
    with open(os.environ["LOG"], "a") as f:
        f.write(f"{number}\\n")
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, stop)
with open(os.environ["LOG"] + ".pid", "w") as f:
    f.write(f"{os.getpid()}\\n")
while not os.path.exists(os.environ["LOG"] + ".end"):
    time.sleep(0.01)
sys.exit(75)
"""


@pytest.fixture
def programs(tmp_path, monkeypatch, handlers):
    """Programs in the place of ours, all with one text. -> a function that writes them"""
    monkeypatch.setattr(speedrun, "HERE", str(tmp_path / "code"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))

    def write(text: str):
        for name in ("train.py", "align.py", "eval.py", "evals/report.py"):
            path = tmp_path / "code" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def alive(pid: int) -> bool:
    """Say whether a process runs; one that no one has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "too slow"
        time.sleep(0.01)


def written(path: Path) -> bool:
    return path.exists() and path.read_text().endswith("\n")


def test_every_stage_gets_its_recipe_and_the_checkpoint_of_the_stage_before(tmp_path, programs):
    """One program after the other, each with the flags that are given."""
    programs(WRITES)
    out, code = tmp_path / "run", tmp_path / "code"
    assert speedrun.main([f"--out_dir={out}", "--data_dir=d", "--max_steps=6", "--force"]) == 0
    rows = [row[0] for row in read_jsonl(str(tmp_path / "log"))]
    common = ["--data_dir=d", "--seed=1337"]
    expected = []
    for stage, before in (("pretrain", None), ("sft", "pretrain"), ("dpo", "sft")):
        start = [f"--init_from={out / before}"] if before else []
        program = str(code / ("align.py" if before else "train.py"))
        own = [f"config/{stage}.py", f"--out_dir={out / stage}"]
        expected.append([program, *own, *common, *start, "--max_steps=6", "--force"])
    assert rows[:3] == expected and rows[3][1] == "config/verifier.py"
    assert f"--init_from={out / 'dpo'}" in rows[3]
    assert rows[4:] == [
        [str(code / "eval.py"), f"--out_dir={out}", "--data_dir=d", "--force"],
        [str(code / "evals" / "report.py"), f"--out_dir={out}", "--force"],
    ]


def test_rl_is_a_stage_by_request_that_starts_from_sft(tmp_path, programs):
    """The whole loop leaves it out."""
    programs(WRITES)
    out = tmp_path / "run"
    assert speedrun.main([f"--out_dir={out}", "--stage=rl"]) == 0
    ((program, recipe, *flags), _), *rest = read_jsonl(str(tmp_path / "log"))
    assert (os.path.basename(program), recipe) == ("align.py", "config/rl_problems.py")
    assert {f"--out_dir={out / 'rl'}", f"--init_from={out / 'sft'}"} <= set(flags) and not rest


def test_stages_keep_freed_memory_unless_told_otherwise(tmp_path, programs, monkeypatch):
    """The allocator's settings are in their environment; those of the user count more."""
    programs(WRITES)
    argv = [f"--out_dir={tmp_path / 'run'}", "--stage=pretrain"]
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    speedrun.main(argv)
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    speedrun.main(argv)
    assert [row[1] for row in read_jsonl(str(tmp_path / "log"))] == [["0", "-1"], ["7", "-1"]]


def test_a_failed_stage_ends_the_loop_with_its_exit_code(tmp_path, programs, capfd):
    """What comes after it would start from a checkpoint that is not there."""
    programs(WRITES + "sys.exit(3)")
    assert speedrun.main([f"--out_dir={tmp_path / 'run'}"]) == 3
    assert len(read_jsonl(str(tmp_path / "log"))) == 1
    assert speedrun.read_state(str(tmp_path / "run")) == "failed"
    assert "mend that, and go on with: python " in capfd.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_request_to_stop_reaches_the_stage_once_and_as_sigterm(tmp_path, programs, number):
    """torchrun dies of SIGUSR1, and a second SIGTERM would end its wait for the save."""
    programs(WAITS)
    log = tmp_path / "log"

    def ask():
        wait_for(lambda: written(Path(f"{log}.pid")))
        os.kill(os.getpid(), number)
        wait_for(lambda: written(log))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        Path(f"{log}.end").touch()

    thread = threading.Thread(target=ask)
    thread.start()
    assert speedrun.main([f"--out_dir={tmp_path / 'run'}"]) == 75
    thread.join()
    assert log.read_text() == f"{signal.SIGTERM:d}\n"
    assert speedrun.read_state(str(tmp_path / "run")) == "preempted"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_stage_does_not_outlive_a_killed_loop(tmp_path, programs):
    """kill -9 of speedrun.py must not leave a run that holds its folder."""
    programs(WAITS)
    log, program = tmp_path / "log", tmp_path / "code" / "train.py"
    loop = fork(lambda: speedrun.Programs().run([str(program)]))
    wait_for(lambda: written(Path(f"{log}.pid")))
    pid = int(Path(f"{log}.pid").read_text())
    os.kill(loop, signal.SIGKILL)
    os.waitpid(loop, 0)
    wait_for(lambda: not alive(pid))


@pytest.mark.parametrize("where", ["elsewhere", "here"])
def test_recipes_are_found_from_any_directory(tmp_path, monkeypatch, where):
    """Beside the program; one of the same name in the directory of the user comes first."""
    monkeypatch.chdir(tmp_path)
    if where == "here":
        (tmp_path / "config").mkdir()
        for stage in speedrun.STAGES[:-1]:
            (tmp_path / "config" / f"{stage}.py").touch()
    cfg = speedrun.SpeedrunConfig()
    found = {stage: getattr(cfg, stage) for stage in speedrun.STAGES[:-1]}
    folder = "config" if where == "here" else f"{ROOT}/config"
    assert found == {stage: f"{folder}/{stage}.py" for stage in found} and cfg.eval is None
    fails(lambda: speedrun.SpeedrunConfig(dpo="no.py"), "dpo='no.py' is no file", str(ROOT))


def test_more_processes_than_the_machine_has_are_refused_before_anything(tmp_path):
    """A thousand of them fill the memory while the first is still starting."""
    out_dir = tmp_path / "run"
    for nproc in (1000, 0, -1):
        argv = [f"--nproc={nproc}", f"--out_dir={out_dir}"]
        fails(lambda argv=argv: speedrun.main(argv), "nproc", str(nproc))
    assert not out_dir.exists()


def save_stage(folder: Path, seed: int, origin: dict | None = None) -> dict:
    """Save a checkpoint as a stage leaves it. -> where another would say it comes from"""
    folder.mkdir(parents=True, exist_ok=True)
    save_start(folder, tiny(seed), **({"init_from": origin} if origin else {}))
    write_json(str(folder / "state.json"), {"state": "done"})
    return {"ref": str(folder), "weights_hash": load_checkpoint(str(folder))["weights_hash"]}


def test_a_stage_whose_start_was_trained_anew_is_made_again(tmp_path, programs, capfd):
    """It gets --force, and only it: the others are left to find that they are done."""
    programs(WRITES)
    out = tmp_path / "run"
    first = save_stage(out / "pretrain", 0)
    second = save_stage(out / "sft", 1, first)
    save_stage(out / "dpo", 2, second)
    argv = [f"--out_dir={out}"]

    def forced() -> list[bool]:
        (tmp_path / "log").unlink(missing_ok=True)
        assert speedrun.main(argv) == 0
        return ["--force" in row[0] for row in read_jsonl(str(tmp_path / "log"))][:4]

    assert forced() == [False] * 4
    save_stage(out / "sft", 3, first)
    assert forced() == [False, False, True, False]
    assert f"{out / 'dpo'} is stale" in capfd.readouterr().out
    assert forced() == [False, False, True, False]  # until it has saved
    save_stage(out / "dpo", 4, save_stage(out / "sft", 3, first))
    (out / "verifier/.new").mkdir(parents=True)  # a --force that was killed before it saved
    assert forced() == [False, False, False, True]


def test_a_report_is_made_again_when_a_stage_or_a_result_has_changed(tmp_path, programs):
    """It would show numbers of weights that are gone. Clocks do not tell: they may be set back."""
    programs(WRITES)
    out = tmp_path / "run"
    (out / "sft").mkdir(parents=True)
    sources = "results*.jsonl */metrics.jsonl"

    def flag() -> str:
        assert speedrun.main([f"--out_dir={out}", "--stage=eval"]) == 0
        return read_jsonl(str(tmp_path / "log"))[-1][0][-1]

    for changed in (out / "results.jsonl", out / "sft" / "metrics.jsonl"):
        made_from = digest_of_files(str(out), sources)
        (out / "report.md").write_text(f"# Report\n<!-- made from {sources}: {made_from} -->\n")
        assert flag() == "--no_overwrite"
        changed.write_text("{}\n")
        os.utime(changed, (1e9, 1e9))
        assert flag() == "--force"
    (out / "report.md").write_text("# Report of a time before there were marks\n")
    assert flag() == "--force"


def test_a_second_ctrl_c_ends_a_stage_that_does_not_stop(tmp_path, programs):
    """The first one asks; a stage that hangs would else hold the terminal for ever."""
    programs(WAITS)
    log = tmp_path / "log"

    def ask():
        wait_for(lambda: written(Path(f"{log}.pid")))
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: written(log))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=ask)
    thread.start()
    assert speedrun.main([f"--out_dir={tmp_path / 'run'}"]) == 75
    thread.join()
    assert speedrun.read_state(str(tmp_path / "run")) == "preempted"
    wait_for(lambda: not alive(int(Path(f"{log}.pid").read_text())))


# --------------------------------------------------------------------------------------------------
# The loop itself


def prepared(folder: Path) -> list[str]:
    """Write a tiny toy world and recipes. -> flags for speedrun.py"""
    world = folder / "data" / "toy"
    for split, n in (("train", 60), ("val", 20)):
        text = "".join(toy.records(toy.story, split, n, 0))
        write_shard(str(world / f"{split}_000.bin"), np.array(TOY.encode(text), "<u4"), TOY)
        write_jsonl(str(world / f"sft_{split}.jsonl"), toy.records(toy.instruction, split, 12, 0))
        write_jsonl(str(world / f"dpo_{split}.jsonl"), toy.records(toy.preference, split, 8, 0))
    for split in ("train", "verifier", "val", "test"):
        write_jsonl(str(world / f"problems_{split}.jsonl"), toy.records(toy.problem, split, 6, 0))
    write_jsonl(str(world / "dpo_test.jsonl"), toy.records(toy.preference, "test", 3, 0))
    write_json(str(world / "manifest_pretrain.json"), {})
    for name, body in BODIES.items():
        (folder / f"{name}.py").write_text(body.replace("; ", "\n") + "\n")
    return [
        f"--out_dir={folder / 'run'}",
        f"--data_dir={folder / 'data'}",
        *(f"--{name}={folder / name}.py" for name in RECIPES),
        "--max_steps=6",
    ]


def digests(folder: Path) -> dict[str, tuple]:
    """Return content and time of every file, but for the state and the lock."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / "state.json" and path.name != ".lock":
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = (content, path.stat().st_mtime_ns)
    return found


def assert_complete(folder: Path):
    """Everything that a finished loop owes its reader."""
    for stage in speedrun.STAGES[:-1]:
        assert json.loads((folder / stage / "state.json").read_text())["state"] == "done"
        assert (folder / stage / "ckpt_0000006.pt").is_file() and (
            folder / stage / "config.json"
        ).is_file()
        steps = [r["step"] for r in read_log(str(folder / stage / "metrics.jsonl")) if "loss" in r]
        assert steps == list(range(6)), stage
    assert json.loads((folder / "state.json").read_text()) == {"state": "done"}
    rows = read_jsonl(str(folder / "results.jsonl"))
    assert {r["task"] for r in rows} == {
        "val_loss",
        "chats",
        "problems",
        "preference",
        "tales",
        "rerank",
    }
    assert {r["stage"] for r in rows} == {"untrained", "pretrain", "sft", "dpo"}
    text = (folder / "report.md").read_text()
    images = re.findall(r"!\[\]\((.*?)\)", text)
    assert set(images) == {
        "best_of_n.png",
        "stages.png",
        "calibration.png",
        "dpo_curves.png",
        *(f"loss_{stage}.png" for stage in speedrun.STAGES[:-1]),
    }
    assert all(matplotlib.image.imread(folder / name).std() > 0 for name in images)


OFFLINE = """
import socket
class NoNetwork(socket.socket):
    def __init__(self, *args, **kwargs):
        raise AssertionError("a socket was opened: this program must run without network")
socket.socket = NoNetwork
"""


@pytest.mark.slow
def test_the_whole_loop_runs_without_network_and_a_second_time_does_nothing(
    tmp_path, monkeypatch, handlers, capfd
):
    """One command, offline, from nothing to a report.

    Repeated it says what it skips and changes no file.
    """
    (tmp_path / "offline").mkdir()
    (tmp_path / "offline" / "sitecustomize.py").write_text(OFFLINE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "offline"))
    opens = [sys.executable, "-c", "import socket; socket.socket()"]
    assert b"a socket was opened" in subprocess.run(opens, capture_output=True).stderr
    argv, folder = prepared(tmp_path), tmp_path / "run"
    assert speedrun.main(argv) == 0
    assert_complete(folder)
    before = digests(folder)
    capfd.readouterr()
    assert speedrun.main(argv) == 0
    said = capfd.readouterr().out
    assert digests(folder) == before
    assert (
        said.count("is done: nothing to do") == 4
        and "all results exist" in said
        and "exists and is kept" in said
    )
    assert json.loads((folder / "state.json").read_text()) == {"state": "done"}


def start_until(argv: list[str], folder: Path, step: int) -> subprocess.Popen:
    """Start the loop in a process of its own and wait for that step of a slow SFT."""
    recipe = Path(next(arg for arg in argv if arg.startswith("--sft=")).partition("=")[2])
    text = recipe.read_text().replace("batch_tokens = 768", "batch_tokens = 12288")
    recipe.write_text(text)
    command = [sys.executable, str(ROOT / "speedrun.py"), *argv]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=folder.parent, **pipes)
    log, limit = str(folder / "sft" / "metrics.jsonl"), time.time() + 120
    while not any(row["step"] >= step and "loss" in row for row in read_log(log)):
        if process.poll() is not None or time.time() > limit:
            process.kill()
            raise AssertionError(process.stderr.read().decode() or "too slow")
        time.sleep(0.005)
    return process


@pytest.mark.slow
def test_a_killed_loop_ends_done_when_it_is_started_again(tmp_path, handlers):
    """After kill -9 in the middle of a stage the same command goes on from the last checkpoint.

    Finished stages are not touched.
    """
    argv, folder = prepared(tmp_path), tmp_path / "run"
    process = start_until(argv, folder, 3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -9 and speedrun.read_state(str(folder / "sft")) == "running"
    assert not (folder / "dpo").exists()
    pretrained = digests(folder / "pretrain")
    assert speedrun.main(argv) == 0
    assert_complete(folder)
    assert {
        name: x for name, x in digests(folder / "pretrain").items() if name != "state.json"
    } == {n: x for n, x in pretrained.items() if n != "state.json"}


def processes_of(folder: Path) -> list[int]:
    """Return the ids of the processes that have a folder in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes() and alive(int(path.parent.name)):
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("victim", ["speedrun.py", "torch.distributed.run"])
def test_no_rank_outlives_a_killed_parent(tmp_path, handlers, victim):
    """kill -9 of the loop or of torchrun ends all: two runs would else train in one folder."""
    argv, folder = prepared(tmp_path), tmp_path / "run"
    process = start_until([*argv, "--nproc=2"], folder, 1)
    everyone = processes_of(folder)
    assert len(everyone) == 4
    names = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in everyone}
    os.kill(next(pid for pid, name in names.items() if victim in name), signal.SIGKILL)
    wait_for(lambda: not processes_of(folder), 10)
    assert process.wait() != 0
    assert speedrun.main(argv) == 0


@pytest.mark.slow
def test_one_stage_alone_starts_from_the_checkpoint_it_is_given(tmp_path, handlers, capfd):
    """--stage=dpo --checkpoint=... trains DPO from there and runs nothing else.

    Without --checkpoint it needs the stage before.
    """
    argv, folder = prepared(tmp_path), tmp_path / "run"
    assert speedrun.main([*argv, "--stage=pretrain"]) == 0
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["pretrain"]
    assert speedrun.main([*argv, "--stage=dpo"]) == 2
    assert f"error: no checkpoint at '{folder / 'sft'}'" in capfd.readouterr().err
    assert json.loads((folder / "state.json").read_text()) == {"state": "failed"}
    assert speedrun.main([*argv, "--stage=dpo", f"--checkpoint={folder / 'pretrain'}"]) == 0
    assert (
        sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["dpo", "pretrain"]
        and not (folder / "report.md").exists()
    )
    config = json.loads((folder / "dpo" / "config.json").read_text())
    assert config["mode"] == "dpo" and config["init_from"] == str(folder / "pretrain")


@pytest.mark.slow
def test_a_stage_stopped_by_a_signal_is_preempted_and_goes_on_later(tmp_path, handlers):
    """After SIGTERM during a stage it is saved, with exit code 75 for the scheduler.

    The same command finishes the work.
    """
    argv, folder = prepared(tmp_path), tmp_path / "run"
    process = start_until(argv, folder, 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert json.loads((folder / "state.json").read_text()) == {"state": "preempted"}
    stopped = json.loads((folder / "sft" / "state.json").read_text())
    assert stopped["state"] == "preempted" and 1 < stopped["step"] < 6
    assert (folder / "sft" / f"ckpt_{stopped['step']:07d}.pt").is_file()
    assert speedrun.main(argv) == 0
    assert_complete(folder)


def test_wrong_requests_are_errors_in_words(tmp_path):
    """An unknown stage names the known ones, and contradictions are refused; nothing is started."""
    known = "stage must be one of all, pretrain, sft, dpo, verifier, eval, rl, got 'rlhf'"
    out_dir = f"--out_dir={tmp_path / 'run'}"
    fails(lambda: speedrun.main(["--stage=rlhf", out_dir]), known)
    fails(lambda: speedrun.main(["--force", "--no_overwrite", out_dir]), "exclude each other")
    numbers = ("nproc must be at least 1, got 0", "max_steps must be at least 1, got 0", "seed")
    fails(lambda: speedrun.main(["--nproc=0", "--max_steps=0", "--seed=-1", out_dir]), *numbers)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["all", "pretrain", "eval"])
def test_a_checkpoint_that_no_stage_would_start_from_is_refused(stage):
    """Pretraining starts from nothing, and eval reads the folder.

    The checkpoint would be dropped in silence, and the user would believe that it had been used.
    """
    fails(lambda: speedrun.SpeedrunConfig(stage=stage, checkpoint="out/toy/sft"), "checkpoint")
