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


@pytest.mark.parametrize("kind", ["0::", "9:name=systemd:/\n4:memory:/x\n0::"])
def test_slurm_and_containers_leave_less_memory(tmp_path, monkeypatch, kind):
    """The smallest limit above this process counts; "max" is none, and a missing file is none."""
    (tmp_path / "slurm/job_1/step_0").mkdir(parents=True)
    (tmp_path / "slurm/memory.max").write_text("max\n")
    (tmp_path / "slurm/job_1/memory.max").write_text("4000\n")
    (tmp_path / "slurm/job_1/step_0/memory.max").write_text("8000\n")
    (tmp_path / "cgroup").write_text(f"{kind}/slurm/job_1/step_0\n")
    monkeypatch.setattr(budget, "GROUPS", str(tmp_path))
    monkeypatch.setattr(budget, "OWN_GROUP", str(tmp_path / "cgroup"))
    assert budget.memory_here(World("cpu")) == 4000
    (tmp_path / "slurm/job_1/memory.max").unlink()
    assert budget.memory_here(World("cpu")) == 8000
    (tmp_path / "cgroup").unlink()
    assert budget.memory_here(World("cpu")) > 10**6


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
    settings = loop(out_dir=str(tmp_path))
    optimizers = train.make_optimizers(model, settings)
    text = budget.preflight(model, optimizers, 16, settings, world)
    assert "the peak of RTX A1000 is not known" in text
