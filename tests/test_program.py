"""A program ends with one message and a code, whatever its streams, its reader or its user do."""

import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from configurator import UserError
from runtime import program

PROGRAM = """
import sys
from dataclasses import dataclass
import configurator
from runtime.program import run

@dataclass
class C:
    seed: int = 1  # s

def main(argv):
    cfg = configurator.load(argv, C)
    BODY
    return 0

run(main)
"""


@pytest.fixture
def start(tmp_path):
    """Start a small program with this body: through a shell, where one is given."""

    def of_body(body: str, *argv: str, shell: str = '"$@"', **environment: str):
        path = tmp_path / "program.py"
        path.write_text(PROGRAM.replace("BODY", body), encoding="utf-8")
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        command = ["bash", "-c", shell, "bash", sys.executable, str(path), *argv]
        where = {"cwd": tmp_path, "env": env | environment}
        where |= {"text": True, "errors": "replace"}
        return subprocess.run(command, capture_output=True, **where)

    return of_body


def outcome_of(monkeypatch, capsys, error: BaseException) -> tuple[int, str]:
    """Exit code and message of a program whose main() raises this error."""
    monkeypatch.setattr(sys, "argv", ["x.py"])

    def main(argv):
        raise error

    with pytest.raises(SystemExit) as end:
        program.run(main)
    shown = capsys.readouterr()
    assert shown.out == "" and "Traceback" not in shown.err
    return end.value.code, shown.err


# ------------------------------------------------------------------------------------------------
# Exit codes and messages


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_exit_code_is_that_of_main(monkeypatch, code):
    """Slurm scripts look at it."""
    monkeypatch.setattr(sys, "argv", ["x.py", "a"])
    with pytest.raises(SystemExit) as end:
        program.run(lambda argv: code if argv == ["a"] else 9)
    assert end.value.code == code


CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB"
CPU = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"
MENDABLE = {
    "a wish": (UserError("n_layer must be at least 1"), ["n_layer must be at least 1"]),
    "no such file": (FileNotFoundError(2, "No such file", "data/x.bin"), ["data/x.bin"]),
    "unreadable": (PermissionError(13, "Permission denied", "a/config.json"), ["a/config.json"]),
    "a folder": (IsADirectoryError(21, "Is a directory", "metrics.jsonl"), ["metrics.jsonl"]),
    "full disk": (OSError(28, "No space left on device", "m.jsonl"), ["m.jsonl", "free some"]),
    "full disk, unnamed": (OSError(28, "No space left on device"), ["No space", "free some"]),
    "over quota": (OSError(122, "Disk quota exceeded"), ["quota", "free some"]),
    "no network": (ConnectionError("Name or service not known"), ["not known"]),
    "GPU full": (torch.OutOfMemoryError(CUDA), ["out of memory", "20.00 GiB", "micro_batch"]),
    "memory full": (RuntimeError(CPU), ["out of memory", "micro_batch"]),
    "memory full, Python": (MemoryError(), ["out of memory", "micro_batch"]),
    "not UTF-8": (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), ["UTF-8"]),
}


@pytest.mark.parametrize("error, words", MENDABLE.values(), ids=MENDABLE.keys())
def test_what_the_user_can_mend_is_one_message_and_code_2(monkeypatch, capsys, error, words):
    """A traceback hides the one line that helps."""
    code, message = outcome_of(monkeypatch, capsys, error)
    assert code == 2 and message.startswith("error: ") and message.count("\n") == 1
    assert all(word in message for word in words)


def allocate():
    torch.empty(2**50)


def allocate_what_overflows():
    torch.empty(2**40, 2**40)


@pytest.mark.parametrize("call", [allocate, allocate_what_overflows, lambda: [0] * 2**60])
def test_a_real_lack_of_memory_is_recognized(call):
    """torch has no error of its own for it on the CPU: its words are what there is."""
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        call()
    assert "out of memory" in program.in_words(caught.value)


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("size mismatch"), KeyError(1)])
def test_our_own_mistakes_come_through(monkeypatch, error):
    """The traceback of a bug is worth having."""
    monkeypatch.setattr(sys, "argv", ["x.py"])

    def main(argv):
        raise error

    with pytest.raises(type(error)):
        program.run(main)


def test_an_error_of_the_system_says_where_in_the_code(monkeypatch, capsys):
    """A wrong path may be a mistake of ours, and its message is all that a report of it holds."""
    code, message = outcome_of(monkeypatch, capsys, FileNotFoundError(2, "No such file", "x"))
    assert code == 2 and re.search(
        r"x: No such file \(in main, test_program.py line \d+\)", message
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ("InvalidCxxCompiler: No working C++ compiler found", "install g++, or --compile=False"),
        ("[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]", "another rank"),
        ("Timed out waiting 180000ms for recv operation to complete", "does not answer"),
    ],
)
def test_what_torch_says_of_compilers_and_peers_is_said_in_words(monkeypatch, capsys, text, words):
    """Its own text is a page, and the cause stands elsewhere."""
    code, message = outcome_of(monkeypatch, capsys, RuntimeError(text))
    assert code == 2 and words in message


def test_ctrl_c_ends_quietly_with_130(monkeypatch, capsys):
    """The code that shells give to it; what was printed before it is not lost."""
    assert outcome_of(monkeypatch, capsys, KeyboardInterrupt()) == (130, "")


def test_a_program_shows_no_traceback_and_makes_no_folder(start, tmp_path):
    """The whole way once, in a process: exit code 2, one message, nothing left behind."""
    bad, good = start("print(cfg)", "--sede=3"), start("print(cfg)", "--seed=3")
    assert bad.returncode == 2 and bad.stdout == "" and "did you mean seed" in bad.stderr
    assert "Traceback" not in bad.stderr
    assert (good.returncode, good.stdout, good.stderr) == (0, "C(seed=3)\n", "")
    assert os.listdir(tmp_path) == ["program.py"]


# ------------------------------------------------------------------------------------------------
# Streams


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_text_can_be_printed_to_any_terminal(start, encoding):
    """A character that the terminal does not know, and half a surrogate pair, are escaped."""
    body = "print('a\u4e2d\u00e9\\ud800'); print('\u4e2d\\udcff', file=sys.stderr)"
    done = start(body, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stdout.startswith("a") and done.stdout.endswith("\\ud800\n")
    assert "\\udcff" in done.stderr


MANY = "for i in range(100_000): print(i)"
FEW = "print(1); import time; time.sleep(0.3)"


@pytest.mark.parametrize(
    "body, argv, shell",
    [
        (MANY, [], '"$@" | head -1; exit ${PIPESTATUS[0]}'),
        (MANY, [], '"$@" 2>&1 | head -1; exit ${PIPESTATUS[0]}'),
        (FEW, [], '"$@" | true; exit ${PIPESTATUS[0]}'),  # met by the last flush alone
        (FEW, ["--help"], '"$@" | true; exit ${PIPESTATUS[0]}'),
        ("for i in range(9): print(i, file=sys.stderr)", [], '"$@" 2> >(true); exit $?'),
    ],
)
def test_a_reader_who_has_enough_ends_a_program_quietly(start, body, argv, shell):
    """As `| head`: 141 is what a shell shows for the signal of a broken pipe."""
    if "head" not in shell:  # let the reader be gone first
        shell = shell.replace('"$@"', '(sleep 0.3; exec "$@")')
    done = start(body, *argv, shell=shell)
    assert done.stderr == "" and done.returncode == 141


def test_a_broken_pipe_still_runs_what_closes_a_run(start, tmp_path):
    """A run's state must not stay "running" because nobody reads its log."""
    body = "\n".join(
        [
            "try:",
            "        for i in range(100_000): print(i)",
            "    finally:",
            "        open('closed', 'w').close()",
        ]
    )
    assert start(body, shell='"$@" | head -1; exit ${PIPESTATUS[0]}').returncode == 141
    assert (tmp_path / "closed").exists()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_does_no_harm(start, closed):
    """As under cron and some job starters: Python has None there."""
    body = "print(sys.stdin.read()); sys.stdout.flush(); print(2, file=sys.stderr)"
    done = start(body, shell=f'echo x | "$@" {closed}')
    assert done.returncode == 0 and "Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_under_the_output_is_said_once(start):
    """Nor does Python's own second attempt add its complaint."""
    done = start("print(1)", shell='"$@" > /dev/full')
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space" in done.stderr


LASTING = ("train.py", "align.py", "eval.py", "speedrun.py")
PROGRAMS = {
    "train": ["train.py"],
    "align": ["align.py"],
    "data": ["data.py"],
    "eval": ["eval.py"],
    "sample": ["sample.py"],
    "speedrun": ["speedrun.py"],
    "report": ["-m", "evals.report"],
    "bench": ["-m", "bench"],
}


@pytest.mark.parametrize("command", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_every_program_begins_and_ends_so(command):
    """The last line of each is run(main), from here; training and evaluation outlive a pipe."""
    path = command[0] if command[0] != "-m" else command[1].replace(".", "/")
    path = path + "/__main__.py" if path == "bench" else path.removesuffix(".py") + ".py"
    text = (ROOT / path).read_text(encoding="utf-8")
    assert "from runtime.program import run\n" in text
    lasts = ", outlives_output=True" * (command[0] in LASTING)
    assert text.endswith(f'\n\nif __name__ == "__main__":\n    run(main{lasts})\n')
