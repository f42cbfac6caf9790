"""Tests run on one thread, so that two suites can share a machine."""

import socket

import pytest
import torch
from corpus_helpers import real

from corpus.tokenizer import load_tokenizer
from runtime import run_folder

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's tokenizer, where its ranks are."""
    return load_tokenizer(real("gpt2.tiktoken"))


@pytest.fixture(autouse=True)
def no_patience(monkeypatch):
    """A folder in use is refused at once; only the test of the waiting waits."""
    monkeypatch.setattr(run_folder, "WAIT", 0.0)


@pytest.fixture(autouse=True)
def torch_as_it_was():
    """A test leaves gradients switched on, float32 the default type and one thread."""
    yield
    left = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    assert left == (True, torch.float32, 1)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to open a socket fails the test."""

    def refuse(*args, **keys):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def transformers(monkeypatch):
    """The library, without a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers", reason="pip install -r requirements-peers.txt")
