"""What a run costs, known before it starts. (Activations and disk: test_train.py.)"""

from types import SimpleNamespace

import pytest
import torch
from helpers import fails

import train
from model import ModelConfig
from runtime import budget
from runtime.world import World
from train import LoopConfig

PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM2e": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA RTX A1000": None,
    "NVIDIA RTX A1000 6GB Laptop GPU": None,
    "NVIDIA A10": None,
    "NVIDIA A100X": None,
    "NVIDIA GB200": None,
    "NVIDIA H20": None,
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    "NVIDIA GeForce RTX 4090": None,
}


@pytest.mark.parametrize("name", PEAKS)
def test_a_gpu_is_known_by_whole_words_of_its_name(name, monkeypatch):
    """A part of another's name gives an MFU that is wrong by a factor; unknown is no number."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: name)
    assert budget.device_peak_flops() == PEAKS[name]


def loop(**changes) -> LoopConfig:
    return LoopConfig(device="cpu", **changes)


def check_fits(cfg: ModelConfig, seq_len: int, loop: LoopConfig, world: World):
    budget.check_memory((train.GPT, train.make_optimizers), cfg, seq_len, loop, world)


def test_a_model_that_no_memory_holds_is_refused_before_it_is_built():
    """A terabyte of weights: an attempt to make them would end this very process."""
    world, cfg = World("cpu"), ModelConfig(vocab_size=50_000, d_model=2**16, n_layer=24, n_head=512)
    words = ("M parameters", "GB", "micro_batch", "--fsdp")
    fails(lambda: check_fits(cfg, 1024, loop(), world), *words)


def test_memory_is_asked_for_what_the_run_needs(monkeypatch):
    """16 bytes a parameter and half the activations; ranks on a machine have a share each.

    Rows at once count, activation checkpointing and FSDP help.
    """
    cfg = ModelConfig(vocab_size=512, d_model=64, n_head=2, n_layer=8, seq_len=256)
    world = World("cpu")
    with torch.device("meta"):
        n = train.GPT(cfg).num_params()
    rows = budget.activation_bytes(cfg, 16 * 256, 4, False)
    need = 16 * n + rows // 2
    monkeypatch.setattr(budget.os, "sysconf", lambda name: need if name == "SC_PHYS_PAGES" else 1)
    adamw = {"optimizer": "adamw", "batch_tokens": 16 * 256}
    check_fits(cfg, 256, loop(**adamw), world)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    fails(lambda: check_fits(cfg, 256, loop(**adamw), world), "a rank has")
    world.size = 2
    sharded = loop(**adamw, micro_batch=1, fsdp=True)
    check_fits(cfg, 256, sharded, world)


def test_the_estimate_of_a_small_model_passes_on_this_machine():
    """No recipe of the toy world may be refused."""
    cfg = ModelConfig(vocab_size=380, seq_len=128, n_layer=4, n_head=4, d_model=128)
    check_fits(cfg, 128, loop(), World("cpu"))


def test_a_gpu_without_a_known_peak_is_named_once(tmp_path, monkeypatch):
    """No MFU in the log, and the reason for it in the line before the first step."""
    cfg = ModelConfig(vocab_size=50, seq_len=16, n_layer=1, n_head=2, d_model=16)
    model = train.GPT(cfg)
    world = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, size=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "RTX A1000")
    optimizers = train.make_optimizers(model, loop())
    text = budget.preflight(model, optimizers, (16, 160), world, 1, (str(tmp_path), 4))
    assert "the peak of RTX A1000 is not known" in text
