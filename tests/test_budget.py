"""What a run costs, known before it starts. (Activations and disk: test_train.py.)"""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, fails

import train
from bench.worker import group_of
from configurator import load
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
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 3090 Ti": None,
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
    words = ("M parameters", "GB", "a smaller model", "--fsdp")
    fails(lambda: check_fits(cfg, 1024, loop(), world), *words)


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(monkeypatch):
    """Half of the room that it needs: about half of its rows, which then are accepted."""
    cfg = ModelConfig(vocab_size=512, d_model=64, n_head=2, n_layer=8, seq_len=256)
    world, large = World("cpu"), loop(micro_batch=64, batch_tokens=64 * 256)
    monkeypatch.setattr(budget, "memory_here", lambda world: 100e6)
    text = fails(lambda: check_fits(cfg, 256, large, world), "--micro_batch=")
    fits = int(re.search(r"--micro_batch=(\d+) fits", text)[1])
    assert 1 <= fits < 64
    check_fits(cfg, 256, replace(large, micro_batch=fits), world)
    refused = replace(large, micro_batch=fits + 1)
    fails(lambda: check_fits(cfg, 256, refused, world), f"--micro_batch={fits} fits")


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


# ------------------------------------------------------------------------------------------------
# The time of a step: docs/gpu.md


H100 = budget.CARDS["H100"]


def on_meta(**sizes) -> train.GPT:
    """Return a model of config/h100_pretrain.py's sizes, but for these."""
    with torch.device("meta"):
        return train.GPT(ModelConfig(**{"vocab_size": 50262, "d_ff": 4096, **sizes}))


def test_the_parts_of_a_step_hold_all_the_flops_that_mfu_counts():
    """Weights in full, attention as the causal half: 2 products forward and 5 backward, of 12.

    Recomputation adds a forward pass of the blocks, and a step of more micro-steps as much again.
    """
    model, n = on_meta(), 4 * 1024
    causal = 12 * 1024 * 1024 * n  # layers x width x seq_len, for every token
    parts = {part.name: part for part in budget.expected_step(model, "adamw", n)}
    in_all = sum(part.flops for part in parts.values())
    assert in_all - 7 * causal == budget.flops_per_token(model) * n - 12 * causal
    again = {part.name: part for part in budget.expected_step(model, "adamw", n, recompute=True)}
    products = "products of the blocks"
    assert again[products].flops == parts[products].flops * 4 / 3
    assert again["attention, forward"].flops == 2 * parts["attention, forward"].flops
    assert again["attention, backward"] == parts["attention, backward"]
    twice = budget.expected_step(model, "adamw", n, micro_steps=2)
    assert sum(part.flops for part in twice) == 2 * in_all


def test_a_part_takes_the_longer_of_its_two_times():
    """Bytes over the memory's rate, or FLOPs over that of the matrix units."""
    rates = (1e12, 1e9)
    part = budget.Part("some product", moved=0.84e9, flops=1.32e12)
    assert part.seconds(rates) == pytest.approx({"arithmetic": 2.0, "memory": 1.0})
    slow = budget.Part("batches", cpu_s=9.0)
    assert budget.expected_seconds([part, slow, part], rates) == pytest.approx(4.0)


def test_muon_costs_what_its_iterations_do():
    """On one (rows, columns) matrix: a = x x', a a and the product with x, five times."""
    model = on_meta(n_layer=1, n_head=2, d_model=16, d_ff=32)
    parts = {part.name: part for part in budget.expected_step(model, "muon", 1024)}
    want = 0
    for p in model.param_groups()["muon"]:
        short, long = sorted(p.shape)
        want += 5 * (2 * short * short * long + 2 * short**3 + 2 * short * short * long)
    assert parts["Muon, products"].flops == want
    embedding = model.num_params() - sum(p.numel() for p in model.param_groups()["muon"])
    assert parts["AdamW"].moved == 28 * embedding


def test_the_page_on_gpus_says_what_the_code_gives():
    """Every row of the table, the sums below it, and the times in README and recipe."""
    page = " ".join((ROOT / "docs" / "gpu.md").read_text().split())
    model, rows = on_meta(), []
    parts = budget.expected_step(model, "muon", 32 * 1024, 8)
    for part in parts:
        seconds = part.seconds(H100)
        bound = max(seconds, key=seconds.get)
        ms, group = f"{1e3 * seconds[bound]:.1f}", group_of(part.name)
        if part.cpu_s:
            ms, bound, group = f"({1e3 * part.cpu_s:.1f})", "CPU, hidden", ""
        numbers = f"{part.flops / 1e12:.1f} | {part.moved / 1e9:.1f} | {ms}"
        rows.append(f"| {part.name} | {numbers} | {bound} | {group} |".replace("|  |", "| |"))
    assert " ".join(rows) in page, "\n".join(rows)
    step, n = budget.expected_seconds(parts, H100), 8 * 32 * 1024
    flops = budget.flops_per_token(model) * n
    mfu, minutes = flops / step / H100[0], 2400 * step / 60
    of = {part.name: max(part.seconds(H100).values()) / step for part in parts}
    products = sum(share for name, share in of.items() if "product" in name)
    attention = sum(share for name, share in of.items() if "attention" in name)
    rest = 1 - products - attention
    said = [
        f"{1e3 * step:.0f} ms a step, {n / step:,.0f} tokens/s, {mfu:.1%} MFU",
        f"{minutes:.0f} minutes for 2,400 steps",
        f"products {products:.0%} of the step, attention {attention:.0%}, the rest {rest:.0%}",
        f"| {of['sinks']:.1%} of the step |",
        f"{1e3 * flops / 0.55 / H100[0]:.0f} ms a step | {mfu:.0%} |",
        *(f"{key} {share:.0%}" for key, share in budget.SHARES.items()),
    ]
    for words in said:
        assert words.replace("%", " %") in page, words
    for name in ("README.md", "config/h100_pretrain.py"):
        text = " ".join((ROOT / name).read_text().split())
        assert f"{minutes:.0f} min" in text and f"{100 * mfu:.0f} %" in text, name


RECIPES = {"h100_pretrain": 80, "gpu_24gb": 24, "gpu_8gb": 8}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_the_card_that_it_is_named_after(name):
    """With a quarter to spare, for the estimate is rough; page and header hold its numbers."""
    path = ROOT / "config" / f"{name}.py"
    parts = (ModelConfig, LoopConfig, train.PretrainConfig)
    sizes, settings, _ = load([str(path)], *parts)
    model = on_meta(**{key: getattr(sizes, key) for key in ("d_model", "n_head", "d_ff")})
    world = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, size=1)
    cpu = LoopConfig(device="cpu")
    how = (model, train.make_optimizers(model, cpu), sizes.seq_len)
    states, working, n = budget.memory_bytes(*how, settings, world)
    logits = 4 * n * model.cfg.padded_vocab
    assert states + working < 0.75 * RECIPES[name] * 1e9
    numbers = [states, working - logits, logits, states + working]
    row = [f"config/{name}.py", str(settings.micro_batch), *(f"{x / 1e9:.1f}" for x in numbers)]
    page, header = ((ROOT / file).read_text() for file in ("docs/gpu.md", path))
    assert f"| {' | '.join(row)} |" in page
    in_all = budget.flops_per_token(model) * settings.batch_tokens * settings.max_steps
    said = [f"{in_all:.2e} FLOPs".replace("e+", "e")]
    said += [f"{x} GB" for x in row[2:]] if name != "h100_pretrain" else ["33 GB"]
    if name == "gpu_24gb":
        for card in ("RTX 4090", "RTX 3090"):
            rates, micro_steps = budget.CARDS[card], 256 // settings.micro_batch
            expected = budget.expected_step(model, "muon", n, micro_steps)
            hours = settings.max_steps * budget.expected_seconds(expected, rates) / 3600
            said.append(f"{hours:.1f} h on an {card} ({rates[0] / 1e12:.0f} TFLOP/s)")
    for words in said:
        assert words in " ".join(header.split()), words
