"""Tests run from any folder, on one thread."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)

from configurator import UserError  # after the path is set


def fails(call, *words: str) -> str:
    """The text of the UserError of call(), which must hold each of the words."""
    with pytest.raises(UserError) as caught:
        call()
    for word in words:
        assert str(word) in str(caught.value)
    return str(caught.value)


def fork(call) -> int:
    """Process id of a child that runs call() and exits 0, or 1 where it raises."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            call()
            code = 0
        finally:
            os._exit(code)
    return pid
