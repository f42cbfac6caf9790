"""What is set for the whole process. (Signals and collectives: test_train.py.)"""

import os
import platform
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, fails

from runtime.world import KEEP_MEMORY, choose_device

COUNT_FAULTS = """
import resource, torch
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
a = torch.ones(12_000_000)
for step in range(40):
    if step == 20:
        before = faults()
    a = a * 1.0
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the variables are glibc's")
def test_freed_memory_is_used_again_instead_of_being_mapped_anew():
    """Twenty new tensors of 48 MB in turn: 11,719 page faults each without what speedrun.py and
    slurm/common.sh put into the environment, with it one in all at most."""
    script = (ROOT / "slurm/common.sh").read_text()
    for key, value in KEEP_MEMORY.items():
        assert f'{key}="${{{key}:-{value}}}"' in script

    def faults(environment: dict) -> int:
        command = [sys.executable, "-c", COUNT_FAULTS]
        bare = {key: x for key, x in os.environ.items() if not key.startswith("MALLOC_")}
        run = subprocess.run(command, capture_output=True, text=True, env=bare | environment)
        return int(run.stdout)

    assert faults(KEEP_MEMORY) <= 12_000
    assert faults({}) > 100_000, "this libc keeps freed memory anyway: the variables can go"


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused_in_words(name, monkeypatch):
    """Every program asks here: torch itself fails at the first tensor, deep inside."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    fails(lambda: choose_device(name), f"device={name}", "--device=cpu")
