"""A locked folder: the next start waits for a process that is ending. (More: test_run_folder.py)"""

import os
import signal
import time

import pytest
from helpers import fails, fork, wait

from runtime import lock


def holder(folder, seconds: float) -> int:
    """Return the process id of a child that holds a folder for so long."""
    ready, go = os.pipe()

    def child():
        with lock.lock(folder):
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
    monkeypatch.setattr(lock, "WAIT", 20.0)
    pid = holder(tmp_path, 60 if kill else 0.4)
    if kill:
        os.kill(pid, signal.SIGKILL)
    with lock.lock(tmp_path):
        said = capsys.readouterr().out
        assert kill or said.count(f"in use by process {pid} ") == 1
    wait(pid)


def test_a_process_that_stays_is_refused_after_the_wait(tmp_path, monkeypatch):
    """It waits as long as it said, and no longer."""
    monkeypatch.setattr(lock, "WAIT", 0.5)
    pid, began = holder(tmp_path, 30), time.monotonic()
    fails(lambda: lock.lock(tmp_path).__enter__(), f"in use by process {pid} ", "--out_dir")
    assert 0.5 <= time.monotonic() - began < 5
    os.kill(pid, signal.SIGKILL)
    wait(pid)
