"""What ranks.py sets for the whole process. (Signals and collectives: test_train.py.)"""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

COUNT_FAULTS = """
import resource, sys
sys.path.insert(0, {root!r})
import torch
from ranks import Ranks
if {kept}:
    Ranks("cpu")
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
a = torch.ones(12_000_000)
for step in range(40):
    if step == 20:
        before = faults()
    a = a * 1.0
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again_instead_of_being_mapped_anew():
    """Twenty new tensors of 48 MB in turn: without the setting 11,719 page faults each, with it one in all at most."""

    def faults(kept: bool) -> int:
        code = COUNT_FAULTS.format(root=str(Path(__file__).resolve().parent.parent), kept=kept)
        return int(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout
        )

    assert faults(kept=True) <= 12_000
    assert faults(kept=False) > 100_000, "this libc keeps freed memory anyway: the setting can go"
