"""The folder of a run: one process at a time, a state that can be read, and where it came from."""

import errno
import fcntl
import json
import os
import signal
import sys
import threading
import time

import pytest
import torch
from helpers import fails, fork, wait

from configurator import UserError
from runtime import locks, run_folder
from runtime.run_folder import lock, provenance, read_state


def test_a_locked_folder_refuses_a_second_process_and_names_the_first(tmp_path):
    """Two writers in one folder destroy each other's checkpoints; the user needs to know whom to
    wait for."""
    with lock(tmp_path):
        report = tmp_path / "report"

        def child():
            try:
                with lock(tmp_path):
                    pass
            except UserError as error:
                report.write_text(str(error))

        assert wait(fork(child)) == 0
        assert (
            f"process {os.getpid()} on {os.uname().nodename}" in report.read_text()
            and str(tmp_path) in report.read_text()
        )
    with lock(tmp_path):  # free again after the with
        pass


def test_a_lock_dies_with_its_process(tmp_path):
    """After kill -9 nobody can clean up: a lock that outlives its owner would need a human before
    every requeue."""
    ready, go = os.pipe()

    def child():
        with lock(tmp_path):
            os.write(go, b"x")
            time.sleep(60)

    pid = fork(child)
    os.read(ready, 1)
    fails(lambda: lock(tmp_path).__enter__(), f"process {pid} ")
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL
    with lock(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()
        assert str(pid) not in (tmp_path / ".lock").read_text().split()


def test_the_lock_names_the_slurm_job(tmp_path, monkeypatch):
    """On a cluster the process id alone does not tell whose run it is."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with lock(tmp_path):
        fails(lambda: lock(tmp_path).__enter__(), "job 4711")


def test_a_run_folder_that_is_a_file_is_one_clear_line(tmp_path):
    """--out_dir=notes.txt is a slip of the hand; it must end in words and leave
    the file as it is."""
    (tmp_path / "notes.txt").write_text("mine")
    fails(lambda: lock(str(tmp_path / "notes.txt")).__enter__(), "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def holder(folder, seconds: float) -> int:
    """Return the process id of a child that holds a folder for so long."""
    ready, go = os.pipe()

    def child():
        with lock(folder):
            os.write(go, b"x")
            time.sleep(seconds)

    pid = fork(child)
    os.read(ready, 1)
    return pid


@pytest.mark.parametrize("kill", [False, True])
def test_a_start_waits_for_a_process_that_is_ending_and_says_for_whom(
    tmp_path, monkeypatch, capsys, kill
):
    """After kill -9 of a job its processes take a moment to go: no reason to fail."""
    monkeypatch.setattr(run_folder, "WAIT", 20.0)
    pid = holder(tmp_path, 60 if kill else 0.4)
    if kill:
        os.kill(pid, signal.SIGKILL)
    with lock(tmp_path):
        said = capsys.readouterr().out
        assert kill or said.count(f"in use by process {pid} ") == 1
    wait(pid)


def test_a_process_that_stays_is_refused_after_the_wait(tmp_path, monkeypatch):
    """It waits as long as it said, and no longer."""
    monkeypatch.setattr(run_folder, "WAIT", 0.5)
    pid, began = holder(tmp_path, 30), time.monotonic()
    fails(lambda: lock(tmp_path).__enter__(), f"in use by process {pid} ", "--out_dir")
    assert 0.5 <= time.monotonic() - began < 5
    os.kill(pid, signal.SIGKILL)
    wait(pid)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    """In a folder that others may write to it would empty any file of ours."""
    (tmp_path / "precious.txt").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious.txt")
    fails(lambda: lock(str(tmp_path)).__enter__(), "cannot use", ".lock")
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without flock, as Lustre by default."""

    def flock(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_without_file_locks_a_file_stands_for_one(tmp_path, no_locks, capsys):
    """The second process is refused by name, the end frees the folder, and it is said aloud."""
    with lock(tmp_path):
        assert "no file locks here" in capsys.readouterr().out
        fails(lambda: lock(tmp_path).__enter__(), f"process {os.getpid()} on")
    with lock(tmp_path):
        pass
    assert os.listdir(tmp_path) == [".lock"]


def test_without_file_locks_a_killed_process_holds_nothing(tmp_path, no_locks):
    """Of this machine its number tells, of another one the silence."""
    pid = holder(tmp_path, 60)
    fails(lambda: lock(tmp_path).__enter__(), f"process {pid} on")
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    with lock(tmp_path):
        pass
    held = tmp_path / ".lock.held"
    held.write_text("process 1 on another-node, since yesterday")
    fails(lambda: lock(tmp_path).__enter__(), "another-node")
    before = time.time() - locks.SILENCE - 5
    os.utime(held, (before, before))
    with lock(tmp_path):
        assert str(os.getpid()) in held.read_text()


def test_without_file_locks_the_heartbeat_keeps_a_lock_young(tmp_path, no_locks, monkeypatch):
    """Else a long run would be taken for dead by a node that knows no other sign of it."""
    beats, first = [], threading.Event()

    def utime(path):
        beats.append(path)
        first.set()

    monkeypatch.setattr(locks, "BEAT", 0.01)
    monkeypatch.setattr(os, "utime", utime)
    with lock(tmp_path):
        assert first.wait(20) and beats[0] == f"{tmp_path}/.lock.held"


def test_state_is_read_or_none(tmp_path):
    """A missing, torn or foreign state.json means "no run has been here", never a traceback before
    training."""
    assert read_state(tmp_path) is None
    (tmp_path / "state.json").write_text(json.dumps({"state": "preempted"}))
    assert read_state(tmp_path) == "preempted"
    for text in ("", '{"state": "do', "{}", "[]", "\0\0"):
        (tmp_path / "state.json").write_text(text)
        assert read_state(tmp_path) is None, text


def test_provenance_holds_what_a_result_needs():
    """A number without commit, dirt, torch version, device and command cannot be reproduced."""
    found = provenance()
    assert (
        found["torch"] == torch.__version__
        and found["device"]
        and found["command"] == " ".join(sys.argv)
    )
    assert isinstance(found["dirty"], bool) and isinstance(found["commit"], str)


def test_provenance_needs_no_git(tmp_path, monkeypatch):
    """Compute nodes and containers often have no git: the commit is then unknown, but training must
    start."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance()["torch"] == torch.__version__
