"""The loop: a batch is the batch however it is cut; no kill, signal or full disk changes it."""

import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import ROOT, fails, wait
from helpers import fork as start_child
from hypothesis import given, settings
from hypothesis import strategies as st

import configurator
import train
from configurator import UserError, key_types, load
from corpus.folders import ensure_toy
from corpus.shards import write_shard
from corpus.tokenizer import load_tokenizer
from model import GPT, ModelConfig
from runtime import budget
from runtime.checkpoint import (
    checkpoint_files,
    find_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    weights_hash,
)
from runtime.files import is_dead
from runtime.logs import read_log
from runtime.run_folder import check_same_run, lock, read_state
from runtime.world import StopFlag, World, die_with_parent
from train import LoopConfig

TESTS = Path(__file__).resolve().parent
SMOKE = str(ROOT / "config/smoke.py")
T = 16  # tokens of a row of the task below


class Rows:
    """A task of random rows of which 1 to 16 tokens are supervised. before(split, first) is called
    ahead of each batch."""

    name, metrics, extra, tokens_per_row = "rows", ["loss"], {"tokenizer": {}}, T

    def __init__(self, before=None, fingerprint="rows", n_val_rows=10, spoil=None):
        self.before, self.fingerprint, self.n_val_rows, self.spoil = (
            before,
            fingerprint,
            n_val_rows,
            spoil,
        )
        self.first = None

    def row(self, split: str, number: int):
        random = torch.Generator().manual_seed(number + (10**6 if split == "val" else 0))
        row = torch.randint(50, (T + 1,), generator=random)
        targets, supervised = row[1:].clone(), (1, 16, 2, 11, 3)[number % 5]
        targets[supervised:] = -1
        return row[:-1], targets

    def batch(self, split: str, first: int, last: int) -> dict:
        if self.before:
            self.before(split, first)
        self.first = first if split == "train" else None
        idx, targets = zip(
            *(self.row(split, number) for number in range(first, last)), strict=False
        )
        return {"idx": torch.stack(idx), "targets": torch.stack(targets)}

    def units(self, batch: dict):
        return (batch["targets"] >= 0).sum()

    def loss(self, model, batch: dict):
        nll = model(batch["idx"], batch["targets"])
        return (self.spoil(self.first, nll) if self.spoil and torch.is_grad_enabled() else nll), {
            "loss": nll
        }


class Config(NamedTuple):
    """The parts of a run's settings."""

    sizes: ModelConfig
    loop: LoopConfig

    @property
    def out_dir(self) -> str:
        return self.loop.out_dir


SIZES = {"seq_len": T, "n_layer": 1, "n_head": 2, "d_model": 16, "d_ff": 24}
LOOP = {"device": "cpu", "batch_tokens": 8 * T, "micro_batch": 4, "max_steps": 6, "eval_rows": 0}
LOOP |= {"eval_interval": 2, "log_interval": 1, "save_interval": 3}


def config(folder, **changes) -> Config:
    values = SIZES | LOOP | {"out_dir": str(folder)} | changes
    parts = []
    for part in (ModelConfig, LoopConfig):
        keys = key_types(part)
        parts.append(part(**{key: values.pop(key) for key in list(values) if key in keys}))
    assert not values
    return Config(*parts)


def tiny(cfg: Config, dtype=torch.float32) -> GPT:
    """A model with every parameter random: output projections are zero at first, and then hide
    wrong gradients."""
    torch.manual_seed(0)
    model = GPT(replace(cfg.sizes, vocab_size=50))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model.to(dtype)


def go(cfg: Config, task=None, model=None, world=None) -> dict:
    return train.train(cfg.loop, task or Rows(), model or tiny(cfg), world or World("cpu"), cfg)


def at_step(step: int, action, rows: int = 8, first: int = 0):
    """A Rows.before that calls action() while step is computed, by the rank whose share begins with
    row `first`."""
    return lambda split, row: action() if split == "train" and row == step * rows + first else None


def send(number=signal.SIGTERM):
    return lambda: os.kill(os.getpid(), number)


TIMES = {"step_ms", "tokens_per_s", "eta_s"}


def metrics(folder) -> list[dict]:
    """Rows of metrics.jsonl without what no two runs share."""
    with open(
        Path(folder) / "metrics.jsonl"
    ) as f:  # every line must be whole: read_metrics would leave a torn one out
        return [
            {key: value for key, value in json.loads(text).items() if key not in TIMES}
            for text in f
        ]


def outcome(folder) -> dict:
    """All that must not depend on how a run was interrupted."""
    newest, best = newest_checkpoint(str(folder))[1], read_checkpoint(str(Path(folder) / "best.pt"))
    return {
        "metrics": metrics(folder),
        "weights": newest["weights_hash"],
        "step": newest["step"],
        "best_value": newest["best"],
        "best_step": best["step"],
        "best_weights": best["weights_hash"],
        "state": read_state(str(folder)),
    }


def snapshot(folder) -> dict:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(Path(folder).iterdir())}


def leftovers(folder) -> list[str]:
    return [p.name for p in Path(folder).iterdir() if "tmp" in p.name]


def fork(call) -> int:
    """Exit code of a child that runs call(): 0, 1 where it raises, negative after a signal."""
    return wait(start_child(call))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    ensure_toy("toy", str(folder))
    return str(folder)


def smoke_argv(folder, data_dir, *more: str) -> list[str]:
    return [
        SMOKE,
        f"--out_dir={folder}",
        f"--data_dir={data_dir}",
        "--device=cpu",
        "--log_interval=1",
        *more,
    ]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, data_dir):
    """The 30 steps of config/smoke.py, with no way into the network."""
    folder = tmp_path_factory.mktemp("smoke") / "run"
    with pytest.MonkeyPatch.context() as patch:
        block_network(patch)
        assert train.main(smoke_argv(folder, data_dir)) == 0
    return folder


@pytest.fixture(scope="module")
def twenty(tmp_path_factory, data_dir):
    """The outcome of 20 uninterrupted steps."""
    folder = tmp_path_factory.mktemp("twenty") / "run"
    assert train.main(smoke_argv(folder, data_dir, "--max_steps=20")) == 0
    return outcome(folder)


@pytest.fixture(
    scope="module",
    params=[{}, {"muon_lr": 1.0, "learning_rate": 0.02}],
    ids=["best_last", "best_early"],
)
def six(request, tmp_path_factory):
    """The settings and the outcome of 6 uninterrupted steps of the tiny task. Validation is best at
    the end or, with rates too high on purpose, at step 2: then no later best.pt covers up that
    one was missed."""
    folder = tmp_path_factory.mktemp("six") / "run"
    go(config(folder, **request.param))
    found = outcome(folder)
    assert found["best_step"] == (2 if request.param else 6)
    return SimpleNamespace(outcome=found, settings=request.param, best_step=found["best_step"])


def block_network(patch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    patch.setattr(socket, "socket", refuse)
    patch.setattr(socket, "create_connection", refuse)


# ------------------------------------------------------------------------------------------------
# The batch, however it is cut


def gradients(folder, rows: int, micro_batch: int) -> list[dict]:
    """Gradients in float64 of two steps, as the optimizer gets them, and the logged rows of
    metrics."""
    cfg = config(folder, batch_tokens=rows * T, micro_batch=micro_batch, max_steps=2, grad_clip=0.0)
    model, found, clip = tiny(cfg, torch.float64), [], torch.nn.utils.clip_grad_norm_

    def record(parameters, *args, **kwargs):
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        return clip(parameters, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.nn.utils, "clip_grad_norm_", record)
        go(cfg, Rows(), model)
    return found


def assert_equal_gradients(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected) == 2
    for step, (a, b) in enumerate(zip(found, expected, strict=False)):
        for name in b:
            torch.testing.assert_close(
                a[name],
                b[name],
                rtol=1e-7,
                atol=1e-10,
                msg=lambda text, where=f"step {step}, {name}": f"{where}: {text}",
            )


def whole_batch_gradient(rows: int, mean_of_means: int = 0) -> dict:
    """The gradient of step 0 without the loop: sum over all tokens / their number; or, wrongly, a
    mean over parts of means."""
    cfg, task = config("unused"), Rows()
    model = tiny(cfg, torch.float64)
    size = mean_of_means or rows
    parts = [task.batch("train", first, min(first + size, rows)) for first in range(0, rows, size)]
    loss = sum(model(part["idx"], part["targets"]) / task.units(part) for part in parts) / len(
        parts
    )
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


CASES = [
    (8, 8),
    (8, 4),
    (8, 1),
    (9, 4),
    (7, 2),
]  # rows, micro_batch; on two ranks 9 by 4 is one micro-step here, two there


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return {case: gradients(folder / f"{case[0]}_{case[1]}", *case) for case in CASES}


@pytest.mark.parametrize("rows, micro_batch", CASES)
def test_gradient_is_the_mean_over_all_supervised_tokens(rows, micro_batch, one_process):
    """The best-known bug of gradient accumulation is a mean of means; the rows here are uneven
    enough to show it."""
    found, right = one_process[rows, micro_batch][0], whole_batch_gradient(rows)
    for name in right:
        torch.testing.assert_close(found[name], right[name], rtol=1e-7, atol=1e-10)
    for size in (1, 2, 4):
        wrong = whole_batch_gradient(rows, size)
        away = math.sqrt(sum(float((wrong[name] - right[name]).square().sum()) for name in right))
        assert away > 0.1 * math.sqrt(sum(float(g.square().sum()) for g in right.values())), (
            "these rows would hide the bug"
        )


def test_gradients_do_not_depend_on_micro_batch(one_process):
    """The batch size is part of the recipe, the micro-batch only of the machine; over two steps, so
    the update counts too."""
    for micro_batch in (4, 1):
        assert_equal_gradients(one_process[8, micro_batch], one_process[8, 8])


@pytest.mark.parametrize("real", [[5], [5, 3], [1, 8, 4], [0, 2]])
def test_each_micro_step_counts_in_the_balance_as_its_real_tokens(real):
    """Neither as one of n micro-steps nor as its labelled tokens, of which each has 2 here."""
    weight = torch.ones((), requires_grad=True)
    batches = []
    for i, n in enumerate(real):
        docs = torch.full((2, 4), -1)
        docs.view(-1)[:n] = 0
        batches.append({"idx": docs, "docs": docs, "number": i})

    def module(batch):
        return weight * 0, weight * 10.0 ** batch["number"], {}

    world, task = World("cpu"), Rows()
    task.units = lambda batch: 2
    sizes = train.sizes_of(task, batches, world)
    assert sizes == (2 * len(real), sum(real))
    train.accumulate(module, batches, sizes, world)
    mean = sum(n * 10.0**i for i, n in enumerate(real)) / sum(real)
    assert weight.grad.item() == pytest.approx(mean, rel=1e-6)


def test_a_run_with_experts_says_what_decides_it(tmp_path, capsys):
    """Its balance is per micro-step, and one active expert leaves the router without its loss."""
    heard = {}
    for name, fields in {
        "dense": {},
        "two": {"n_expert": 4},
        "one": {"n_expert": 4, "n_expert_active": 1},
        "unbalanced": {"n_expert": 4, "balance_coef": 0.0},
    }.items():
        go(config(tmp_path / name, max_steps=1, **fields))
        heard[name] = capsys.readouterr().out
    said = {name: "micro_batch and ranks change" in text for name, text in heard.items()}
    assert said == {"dense": False, "two": True, "one": True, "unbalanced": False}
    warned = {name: "NOTE n_expert_active=1" in text for name, text in heard.items()}
    assert warned == {"dense": False, "two": False, "one": True, "unbalanced": False}


def save_gradients(folder: str) -> None:
    """What each of two ranks runs: gradients of every case, and the results of evaluate."""
    with World("cpu") as world:
        for case in CASES:
            found = gradients(Path(folder) / f"{case[0]}_{case[1]}", *case)
            torch.save(found, Path(folder) / f"{case[0]}_{case[1]}_{world.rank}.pt")


def test_gradients_losses_and_validation_are_those_of_one_rank_on_two(tmp_path, one_process):
    """Adding a GPU must not change the run: same gradients (also with uneven shares), same logged
    losses, same validation."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(TESTS)!r}]\n"
        "import torch\ntorch.set_num_threads(1)\n"
        f"import test_train\ntest_train.save_gradients({str(tmp_path)!r})\n"
    )
    torchrun(script, cwd=tmp_path)
    for rows, micro_batch in CASES:
        single = one_process[rows, micro_batch]
        for rank in (0, 1):
            assert_equal_gradients(torch.load(tmp_path / f"{rows}_{micro_batch}_{rank}.pt"), single)
    go(
        config(tmp_path / "single", max_steps=2, grad_clip=0.0),
        None,
        tiny(config("unused"), torch.float64),
    )
    for mine, other in zip(metrics(tmp_path / "single"), metrics(tmp_path / "8_4"), strict=True):
        assert mine == pytest.approx(other, rel=1e-9)


SHARDED = {"dense": {}, "MoE, recomputed": {"n_expert": 4, "recompute": True}}


def run_sharded(folder: str) -> None:
    """On each of two FSDP ranks: a whole run, the first half of one, and the second half of
    another."""
    with World("cpu") as world:
        for name, fields in SHARDED.items():
            for run, stop in (("whole", None), ("begun", 3), ("finished", None)):
                cfg = config(f"{folder}/{name} {run}", fsdp=True, **fields)
                model = tiny(cfg, torch.float64)
                go(cfg, Rows(stop and at_step(stop, send(), first=world.rank * 4)), model, world)
                assert all(
                    p.to_local().numel() == p.numel() // 2 for p in model.blocks.parameters()
                ), "a rank holds more than its half"


def test_fsdp_is_the_same_run_and_any_number_of_ranks_resumes_it(tmp_path):
    """Losses, gradient norms and validations of one process, on two ranks that each hold half of
    the model; a checkpoint of two sharded ranks goes on in one plain process, and the other way
    round; no rank holds the whole."""
    for name, fields in SHARDED.items():
        cfg = config(tmp_path / f"{name} single", **fields)
        go(cfg, None, tiny(cfg, torch.float64))
        cfg = config(tmp_path / f"{name} finished", **fields)
        go(cfg, Rows(at_step(3, send())), tiny(cfg, torch.float64))
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(TESTS)!r}]\n"
        "import torch\ntorch.set_num_threads(1)\n"
        f"import test_train\ntest_train.run_sharded({str(tmp_path)!r})\n"
    )
    torchrun(script, cwd=tmp_path)
    for name, fields in SHARDED.items():
        assert read_state(str(tmp_path / f"{name} begun")) == "preempted"
        cfg = config(tmp_path / f"{name} begun", **fields)
        go(cfg, None, tiny(cfg, torch.float64))
        for run in ("whole", "begun", "finished"):
            assert read_state(str(tmp_path / f"{name} {run}")) == "done"
            for mine, other in zip(
                metrics(tmp_path / f"{name} {run}"),
                metrics(tmp_path / f"{name} single"),
                strict=True,
            ):
                assert mine == pytest.approx(other, rel=1e-6), (
                    name,
                    run,
                )  # Muon orthogonalises in float32
            final, single = (
                newest_checkpoint(str(tmp_path / f"{name} {r}"))[1] for r in (run, "single")
            )
            assert all(
                torch.allclose(x, single["model"][key], rtol=1e-5, atol=1e-6)
                for key, x in final["model"].items()
            )


def test_fsdp_refuses_what_it_cannot_do(tmp_path):
    """One rank has nobody to share with; ranks with unequal numbers of passes would wait for each
    other for ever."""
    fails(lambda: go(config(tmp_path / "one", fsdp=True)), "torchrun")
    world = World("cpu")
    world.size = 3
    refused = config("unused", fsdp=True).loop
    fails(lambda: train.Plan(refused, Rows(), world), "8 rows", "3 ranks", "batch_tokens")


def torchrun(script, *argv: str, cwd) -> str:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(script),
            *argv,
        ],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        out = process.communicate(timeout=150)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun passes TERM on; after KILL its workers would live on
        pytest.fail("ranks wait for each other:\n" + process.communicate()[0])
    assert process.returncode == 0, out
    return out


def test_evaluate_weighs_every_token_alike_and_not_every_batch():
    """The mean over tokens, worked out row by row, for any micro_batch and for the shares of three
    ranks added up."""
    cfg, task = config("unused", eval_rows=9), Rows()
    model = tiny(cfg, torch.float64)
    batches = [task.batch("val", i, i + 1) for i in range(9)]
    with torch.no_grad():
        nll, units = (
            [float(model(b["idx"], b["targets"])) for b in batches],
            [int(task.units(b)) for b in batches],
        )
    expected = sum(nll) / sum(units)
    assert (
        abs(sum(n / u for n, u in zip(nll, units, strict=False)) / 9 - expected) > 0.001 * expected
    ), "these rows would hide a mean of means"
    for micro_batch in (1, 2, 4, 9, 100):
        cfg.loop.micro_batch = micro_batch
        found = train.evaluate(train.TrainStep(model, task), task, cfg.loop, World("cpu"))
        assert found == {"loss": pytest.approx(expected, rel=1e-12)}
        parts = []
        for rank in range(3):
            world = World("cpu")
            world.rank, world.size = rank, 3
            world.sum = lambda values, parts=parts: parts.append(values) or values
            train.evaluate(train.TrainStep(model, task), task, cfg.loop, world)
        total = [sum(column) for column in zip(*parts, strict=False)]
        assert total[0] / total[1] == pytest.approx(expected, rel=1e-12) and total[1] == sum(units)


def test_eval_rows_zero_means_all_and_more_than_there_are_means_all():
    """The validation number must say what it covers."""
    seen = []
    for rows in (0, 99, 3):
        task = Rows(lambda split, first: seen.append(first))
        train.evaluate(
            train.TrainStep(tiny(config("unused")), task),
            task,
            config("unused", eval_rows=rows, micro_batch=1).loop,
            World("cpu"),
        )
    assert seen == [*range(10), *range(10), *range(3)]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 50), st.integers(1, 100), st.integers(1, 20), st.integers(1, 16))
def test_ranks_partition_the_rows_of_every_step(step, rows, micro_batch, size):
    """Each row of the step once over all ranks and micro-steps, whatever divides: so the batch is
    the same on any machine."""
    plan = object.__new__(train.Plan)  # without its refusal of fewer rows than ranks
    plan.loop, plan.rows_per_step, shares = SimpleNamespace(micro_batch=micro_batch), rows, []
    for rank in range(size):
        plan.world = SimpleNamespace(rank=rank, size=size)
        shares.append(plan.rows_of(step))
    assert [row for share in shares for first, end in share for row in range(first, end)] == [
        *range(step * rows, (step + 1) * rows)
    ]
    assert all(0 < end - first <= micro_batch for share in shares for first, end in share)
    sizes = [sum(end - first for first, end in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1 and (rows < size or min(sizes) > 0)


def test_fewer_rows_than_ranks_is_refused_with_a_batch_that_would_do(tmp_path):
    """A rank without rows would wait for ever in a collective; the advice in the message must be
    right."""

    def start(tokens):
        world = World("cpu")
        world.size = 4
        return train.Plan(config(tmp_path / "run", batch_tokens=tokens).loop, Rows(), world)

    fails(lambda: start(3 * T), f"batch_tokens={3 * T}", "3 rows", "4 ranks", f"at least {4 * T}")
    assert start(4 * T).rows_per_step == 4


def test_cuda_without_gpu_is_one_clear_line():
    """The first thing many people see: it must name the flag to use, not a CUDA initialisation
    error."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "\n" not in fails(lambda: World("cuda"), "device=cuda", "0 found", "--device=cpu")


@pytest.mark.parametrize(
    "fields",
    [{}, {"n_kv_head": 2}, {"d_ff": 96}, {"n_layer": 4}],
    ids=["plain", "gqa", "narrow", "deep"],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimate_of_activation_memory_is_near_what_autograd_keeps(fields, recompute):
    """An estimate that nobody compared with the truth is a guess: here every storage that the graph
    holds is counted once."""
    model = GPT(
        ModelConfig(
            **{
                "vocab_size": 50,
                "seq_len": 64,
                "n_layer": 2,
                "n_head": 4,
                "d_model": 64,
                "d_ff": 192,
            }
            | fields
        )
    )
    idx, kept = torch.randint(50, (8, 64)), {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    model.recompute = recompute
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.hidden(idx).sum()
    measured = sum(storage.nbytes() for storage in kept.values())
    estimated = budget.activation_bytes(model.cfg, idx.numel(), 4, recompute)
    if recompute:  # the one layer in full exists only in the backward pass
        deeper = ModelConfig(**vars(model.cfg) | {"n_layer": model.cfg.n_layer + 1})
        estimated -= budget.activation_bytes(
            deeper, idx.numel(), 4, False
        ) - budget.activation_bytes(model.cfg, idx.numel(), 4, False)
    assert 0.7 < measured / estimated < 1.45, (measured, estimated)


def test_a_disk_that_cannot_hold_the_checkpoints_is_refused_before_the_first_step(
    tmp_path, monkeypatch
):
    """Found after hours, the same fact costs hours."""
    monkeypatch.setattr(budget.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    fails(lambda: go(config(tmp_path)), tmp_path, "free", "checkpoints")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_preflight_line_counts_weights_gradients_and_optimizer(tmp_path, capsys):
    """4 bytes each: weights, gradients, one moment under Muon, two under AdamW."""
    cfg = config(tmp_path, optimizer="adamw")
    model = tiny(cfg)
    optimizers = train.make_optimizers(model, cfg.loop)
    text = budget.preflight(model, optimizers, T, cfg.loop, World("cpu"))
    wanted = 16 * model.num_params() + budget.activation_bytes(model.cfg, 4 * T, 4, False)
    assert (
        f"about {wanted / 1e9:.2f} GB of memory" in text
        and f"{4 * 12 * model.num_params() / 1e9:.2f} GB of disk" in text
    )
    assert f"{budget.flops_per_token(model):.2e} FLOPs a token" in text


# ------------------------------------------------------------------------------------------------
# The smoke recipe


def test_loss_falls_in_the_smoke_recipe(smoke):
    """From ln 380 (nothing known of 380 ids) to below 60 % of it in 30 steps; a loop that does not
    learn fails here."""
    losses = [row["loss"] for row in metrics(smoke) if "loss" in row]
    validations = [row["val_loss"] for row in metrics(smoke) if "val_loss" in row]
    assert abs(losses[0] - math.log(380)) < 0.15 and abs(validations[0] - math.log(380)) < 0.15
    assert losses[-1] < 0.6 * math.log(380) and validations[-1] < 0.6 * math.log(380)


def test_metrics_are_consistent(smoke, data_dir):
    """tokens, flops and speed are what tables are made of: each must follow from the others and
    from the configuration."""
    rows = read_log(str(smoke / "metrics.jsonl"))
    steps, state = (
        [row for row in rows if "loss" in row],
        json.loads((smoke / "state.json").read_text()),
    )
    assert [row["step"] for row in steps] == [*range(30)]
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 10, 20, 30]
    kinds = (ModelConfig, LoopConfig, train.PretrainConfig)
    sizes, loop, _ = load(smoke_argv(smoke, data_dir), *kinds)
    per_token = budget.flops_per_token(GPT(replace(sizes, vocab_size=262)))
    for row in steps:
        assert row["tokens"] == (row["step"] + 1) * 2048
        assert row["flops"] == pytest.approx(per_token * row["tokens"])
        assert row["tokens_per_s"] == pytest.approx(2048 / (row["step_ms"] / 1000))
        assert row["eta_s"] >= (29 - row["step"]) * row["step_ms"] / 1000
        assert row["lr_share"] == train.lr_at(row["step"], loop)
        assert 0 < row["grad_norm"] < 100 and "skipped" not in row
    assert 0.2 * state["seconds"] < 30 * steps[-1]["step_ms"] / 1000 <= state["seconds"]
    assert (
        state["val_loss"] == rows[-1]["val_loss"]
        and state["loss"] == steps[-1]["loss"]
        and state["step"] == 30
    )


def test_a_finished_run_started_again_changes_nothing(smoke, data_dir, capsys):
    """A requeued or repeated command must not rewrite results; harmless keys may differ."""
    before = snapshot(smoke)
    for more in ((), ("--log_interval=7", "--micro_batch=3", "--keep=5", "--save_interval=1")):
        assert train.main(smoke_argv(smoke, data_dir, *more)) == 0
        assert "nothing to do" in capsys.readouterr().out
    assert snapshot(smoke) == before


def test_a_finished_run_is_refused_to_other_settings(smoke, data_dir):
    """The same folder for another experiment mixes two runs: refused with old -> new, and with both
    ways out."""
    before = snapshot(smoke)
    fails(
        lambda: train.main(smoke_argv(smoke, data_dir, "--learning_rate=0.1", "--seed=5")),
        "learning_rate: 0.003 -> 0.1",
        "seed: 1337 -> 5",
        "--out_dir",
        "--force",
    )
    assert snapshot(smoke) == before


@pytest.mark.parametrize("argv", [[], ["--max_steps=3"], ["--seed=1", "--force"]])
def test_no_model_is_trained_that_nobody_named(argv, tmp_path, monkeypatch):
    """The defaults are a model of 152M parameters: nobody wants it by leaving everything out."""
    monkeypatch.chdir(tmp_path)
    fails(lambda: train.main(argv), "no model is named", "python train.py config/smoke.py")
    assert os.listdir(tmp_path) == []


def test_the_config_json_of_a_run_gives_its_settings_again(smoke):
    """As a config file for the same program; and it finds its own run finished."""
    kinds = (ModelConfig, LoopConfig, train.PretrainConfig)
    path = str(smoke / "config.json")
    again = configurator.as_dict(*load([path], *kinds))
    assert json.loads(json.dumps(again)) == json.loads((smoke / "config.json").read_text())
    assert train.main([path]) == 0


LARGE_AND_SMALL = ("0", "1e-30", "1e18")


@pytest.mark.parametrize("key", ["learning_rate", "muon_lr", "weight_decay", "rope_base"])
def test_numbers_of_any_size_train_or_are_refused(key, data_dir, tmp_path):
    """What the bounds let pass must neither raise nor leave a run in a state of its own."""
    for number, text in enumerate(LARGE_AND_SMALL):
        folder = tmp_path / f"{number}"
        with suppress(UserError):
            argv = smoke_argv(folder, data_dir, "--max_steps=2", f"--{key}={text}")
            assert train.main(argv) == 0
            assert json.loads((folder / "state.json").read_text())["state"] == "done"


def test_training_and_evaluation_open_no_socket(smoke, data_dir, monkeypatch):
    """Compute nodes have no network: the smoke run above was made with sockets blocked, now its
    evaluation is."""
    import eval as eval_py

    block_network(monkeypatch)
    with pytest.raises(AssertionError, match="socket"):
        socket.socket()
    before = read_checkpoint(str(smoke / "best.pt"))["weights_hash"]
    assert (
        eval_py.main(
            [f"--out_dir={smoke}", f"--data_dir={data_dir}", "--tasks=val_loss", "--device=cpu"]
        )
        == 0
    )
    found = read_log(str(smoke / "results.jsonl"))
    os.remove(smoke / "results.jsonl")
    assert found and all(math.isfinite(row["value"]) for row in found) and before


@pytest.mark.slow
def test_torchrun_of_the_smoke_recipe_has_the_losses_of_one_process(smoke, tmp_path, data_dir):
    """The command of the README on two ranks; only the order of float32 additions may differ."""
    out = torchrun(ROOT / "train.py", *smoke_argv(tmp_path / "two", data_dir), cwd=tmp_path)
    assert read_state(str(tmp_path / "two")) == "done" and out.count("done at step 30") == 1
    for mine, other in zip(metrics(tmp_path / "two"), metrics(smoke), strict=True):
        assert mine == pytest.approx(other, rel=0.01)
    assert (
        torchrun(ROOT / "train.py", *smoke_argv(tmp_path / "two", data_dir), cwd=tmp_path).count(
            "nothing to do"
        )
        == 1
    )


# ------------------------------------------------------------------------------------------------
# Kills, signals, resume


def start_and_signal(folder, data_dir, number, step: int = 12) -> int:
    """Exit code of train.py, signalled when its metrics show the step."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *smoke_argv(folder, data_dir, "--max_steps=20")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 120
    while not any(row["step"] >= step for row in read_log(str(folder / "metrics.jsonl"))):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode


def test_kill_9_and_resume_is_bitwise_the_uninterrupted_run(tmp_path, data_dir, twenty):
    """10 steps + kill + resume = 20 steps: losses, gradient norms, validations and final weights,
    to the last bit."""
    assert start_and_signal(tmp_path / "run", data_dir, signal.SIGKILL) == -signal.SIGKILL
    assert (
        read_state(str(tmp_path / "run")) == "running"
        and newest_checkpoint(str(tmp_path / "run"))[1]["step"] == 10
    )
    assert train.main(smoke_argv(tmp_path / "run", data_dir, "--max_steps=20")) == 0
    assert outcome(tmp_path / "run") == twenty


def test_sigterm_saves_exits_75_and_resumes_to_the_same_weights(tmp_path, data_dir, twenty):
    """What a scheduler does before it takes the node away: nothing of the finished
    steps is lost."""
    assert start_and_signal(tmp_path / "run", data_dir, signal.SIGTERM) == train.PREEMPTED == 75
    state = json.loads((tmp_path / "run/state.json").read_text())
    assert state["state"] == "preempted" and 12 < state["step"] < 20
    assert newest_checkpoint(str(tmp_path / "run"))[1]["step"] == state["step"]
    assert train.main(smoke_argv(tmp_path / "run", data_dir, "--max_steps=20")) == 0
    assert outcome(tmp_path / "run") == twenty


@pytest.mark.parametrize("step", range(6))
def test_preemption_in_any_step_does_not_change_the_outcome(step, tmp_path, six):
    """Also in a step before a validation, before a save, and in the last one: same rows, same
    weights, same best.pt."""
    cfg = config(tmp_path / "run", **six.settings)
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    first = go(cfg, Rows(at_step(step, send(numbers[step % 3]))))
    assert (
        first["state"] in ("preempted", "done")
        and newest_checkpoint(cfg.out_dir)[1]["step"] == first["step"] == step + 1
    )
    if first["state"] == "preempted":
        assert go(cfg)["state"] == "done"
    assert outcome(cfg.out_dir) == six.outcome


@pytest.mark.parametrize("step", range(1, 6))
def test_a_crash_in_any_step_does_not_change_the_outcome(step, tmp_path, six):
    """Out of memory, a failing disk, Ctrl-C: the next start repeats the steps since the last
    checkpoint, and only these."""
    cfg = config(tmp_path / "run", **six.settings)

    def crash():
        raise MemoryError("in this step")

    with pytest.raises(MemoryError):
        go(cfg, Rows(at_step(step, crash)))
    state = json.loads((tmp_path / "run/state.json").read_text())
    assert state["state"] == "failed" and "MemoryError: in this step" in state["error"]
    go(cfg)
    assert outcome(cfg.out_dir) == six.outcome


def test_a_crash_between_a_checkpoint_and_best_pt_does_not_lose_the_best(
    tmp_path, six, monkeypatch
):
    """Two files are written; whichever comes first, the other must be made up for after a kill
    between them."""
    cfg, replace = config(tmp_path / "run", **six.settings), os.replace

    def crash_after_the_first(source, target):
        replace(source, target)
        if str(target).endswith(".pt"):
            raise KeyboardInterrupt

    arm = at_step(
        six.best_step - 1, lambda: monkeypatch.setattr(os, "replace", crash_after_the_first)
    )
    with pytest.raises(KeyboardInterrupt):
        go(cfg, Rows(arm))
    monkeypatch.setattr(os, "replace", replace)
    go(cfg)
    assert outcome(cfg.out_dir) == six.outcome


def newest_step(cfg) -> list[int]:
    return [int(os.path.basename(path)[5:12]) for path in checkpoint_files(cfg.out_dir)]


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    """A worker that hangs in a collective never sees the flag; a later second signal must not wait
    for it."""
    cfg, clock = config(tmp_path / "run"), time.monotonic

    def twice():  # in a child, whose clock may be moved
        send()()
        time.monotonic = lambda: clock() + 3
        send()()
        (tmp_path / "still_alive").touch()

    assert fork(lambda: go(cfg, Rows(at_step(4, twice)))) == 128 + signal.SIGTERM
    assert not (tmp_path / "still_alive").exists()
    assert read_state(cfg.out_dir) == "running" and newest_checkpoint(cfg.out_dir)[1]["step"] == 4
    go(cfg)  # and the lock went with it


@pytest.mark.parametrize("ranks, dies", [(1, True), (2, False)])
def test_a_second_ctrl_c_ends_a_program_of_one_process_soon(tmp_path, monkeypatch, ranks, dies):
    """A person presses it again after half a second; under torchrun the second may be sent on."""
    cfg, clock = config(tmp_path / "run"), time.monotonic
    if ranks > 1:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")

    def twice():
        send(signal.SIGINT)()
        time.monotonic = lambda: clock() + 0.5
        send(signal.SIGINT)()

    code = fork(lambda: go(cfg, Rows(at_step(4, twice))))
    assert code == (128 + signal.SIGINT if dies else 0)
    assert newest_checkpoint(cfg.out_dir)[1]["step"] == (4 if dies else 5)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("asked", [False, True])
def test_a_rank_dies_with_torchrun_unless_it_is_saving(tmp_path, monkeypatch, asked):
    """No orphan trains on; but Slurm's SIGTERM to all processes ends torchrun before its ranks,
    which must not lose what they were asked to save."""
    cfg, ready = config(tmp_path / "run"), tmp_path / "ready"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")

    def end_parent():
        if asked:
            send()()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(0.5)

    def rank():
        die_with_parent()
        ready.write_text(str(os.getpid()))
        go(cfg, Rows(at_step(4, end_parent)))

    parent = start_child(lambda: wait(start_child(rank)))
    assert wait(parent) == -signal.SIGKILL
    end = time.monotonic() + 30
    while Path(f"/proc/{ready.read_text()}/cmdline").exists() and time.monotonic() < end:
        state = Path(f"/proc/{ready.read_text()}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            break
        time.sleep(0.05)
    assert read_state(cfg.out_dir) == ("preempted" if asked else "running")
    assert newest_checkpoint(cfg.out_dir)[1]["step"] == (5 if asked else 4)


def test_ctrl_c_says_what_happens_and_which_command_goes_on(tmp_path, monkeypatch, capfd):
    """The state on the disk is preempted; the command has no --force, which would start over."""
    argv = ["train.py", "a recipe.py", "--force", "--lr=3", "--force=True", "--forced=1"]
    monkeypatch.setattr(sys, "argv", argv)
    cfg = config(tmp_path / "run")
    assert go(cfg, Rows(at_step(3, send(signal.SIGINT))))["state"] == "preempted"
    said = capfd.readouterr()
    assert "Ctrl-C again ends at once" in said.err
    assert "go on with: python train.py 'a recipe.py' --lr=3 --forced=1\n" in said.out
    assert read_state(cfg.out_dir) == "preempted" and go(cfg)["state"] == "done"


def test_the_same_warning_twice_within_milliseconds_is_one_warning(tmp_path):
    """A signal to a whole job reaches torchrun too, which sends it on: the second must not cut off
    the save."""
    state = go(config(tmp_path / "run"), Rows(at_step(4, lambda: (send()(), send()()))))
    assert (
        state["state"] == "preempted" and newest_checkpoint(str(tmp_path / "run"))[1]["step"] == 5
    )


def test_signal_handlers_are_given_back(tmp_path):
    """The loop is called several times in one process (speedrun.py): afterwards Ctrl-C and TERM are
    the caller's again."""
    before = [
        signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    ]
    go(config(tmp_path / "run", max_steps=1))
    assert [
        signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    ] == before


def test_a_torn_log_is_cut_and_no_step_appears_twice(tmp_path, six):
    """A kill tears the last line and leaves rows of steps that will be done again."""
    cfg = config(tmp_path / "run", **six.settings)
    go(cfg, Rows(at_step(3, send())))
    with open(tmp_path / "run/metrics.jsonl", "a") as f:
        f.write('{"step": 4, "val_loss": 1.0}\n{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    go(cfg)
    assert metrics(cfg.out_dir) == six.outcome["metrics"]
    assert len({(row["step"], "loss" in row) for row in metrics(cfg.out_dir)}) == len(
        metrics(cfg.out_dir)
    )


def preempted(folder, step: int = 3, **changes) -> Config:
    cfg = config(folder, **changes)
    assert go(cfg, Rows(at_step(step, send())))["state"] == "preempted"
    return cfg


def kept(folder) -> dict:
    return {
        name: found
        for name, found in snapshot(folder).items()
        if name not in (".lock", "state.json")
    }


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"seed": 7}, "seed: 1337 -> 7"),
        ({"n_layer": 2}, "n_layer: 1 -> 2"),
        ({"max_steps": 9}, "max_steps: 6 -> 9"),
        ({"sliding_window": 4}, "sliding_window: None -> 4"),
        ({"dtype": "bfloat16"}, "dtype: 'auto' -> 'bfloat16'"),
    ],
)
def test_resume_under_other_settings_is_refused_and_touches_nothing(changes, words, tmp_path):
    """Half a run of one recipe and half of another is a result of none: old and new value are
    named, the run is left as it was."""
    cfg = preempted(tmp_path / "run")
    before = kept(cfg.out_dir)
    fails(lambda: go(config(cfg.out_dir, **changes)), words, cfg.out_dir, "--force")
    assert kept(cfg.out_dir) == before


def test_harmless_settings_may_change_at_resume(tmp_path, six):
    """Logging, saving and the micro-batch belong to the machine; the weights end the same but for
    rounding."""
    cfg = preempted(tmp_path / "run", **six.settings)
    assert (
        go(
            config(
                cfg.out_dir, log_interval=2, save_interval=1, keep=4, micro_batch=8, **six.settings
            )
        )["state"]
        == "done"
    )
    found = newest_checkpoint(cfg.out_dir)[1]
    assert (
        found["best"] == pytest.approx(six.outcome["best_value"], rel=1e-3)
        and len(checkpoint_files(cfg.out_dir)) == 4
    )


@pytest.mark.parametrize("fields", [{"n_expert": 4}, {"n_expert": 2, "n_expert_active": 1}])
def test_the_micro_batch_of_a_run_with_experts_is_kept(tmp_path, fields):
    """Experts are balanced over a micro-step: another size is another run, unless nothing balances.

    A tuned model's experts are none of the keys of its run; they count all the same.
    """
    cfg = preempted(tmp_path / "run", **fields)
    fails(lambda: go(config(cfg.out_dir, micro_batch=8, **fields)), "micro_batch: 4 -> 8")
    assert go(config(cfg.out_dir, log_interval=2, **fields))["state"] == "done"
    free = {**fields, "balance_coef": 0.0}
    cfg = preempted(tmp_path / "free", **free)
    assert go(config(cfg.out_dir, micro_batch=8, **free))["state"] == "done"
    parts = (config(cfg.out_dir, micro_batch=8).loop,)
    tuned = {"train_config": vars(cfg.loop), "model_config": {"n_expert": 4, "balance_coef": 0.1}}
    fails(lambda: check_same_run(cfg.out_dir, parts, tuned, None), "micro_batch: 4 -> 8")
    check_same_run(cfg.out_dir, parts, tuned | {"model_config": {"n_expert": 0}}, None)


def test_force_starts_over(tmp_path):
    """--force is the way out that the refusal names: the old run leaves no row and no checkpoint
    behind."""
    cfg = config(
        preempted(tmp_path / "run", step=4).out_dir,
        seed=7,
        max_steps=2,
        eval_interval=5,
        force=True,
    )
    assert go(cfg)["state"] == "done"
    assert newest_step(cfg) == [2] and {row["step"] for row in metrics(cfg.out_dir)} == {0, 1, 2}
    assert newest_checkpoint(cfg.out_dir)[1]["train_config"]["seed"] == 7
    assert (
        not os.path.exists(tmp_path / "run/best.pt")
        or read_checkpoint(str(tmp_path / "run/best.pt"))["step"] <= 2
    )


def test_force_keeps_the_old_run_until_the_new_one_has_saved(tmp_path, six):
    """A forced run that dies before its first checkpoint has cost nothing: the old one comes back,
    to whoever reads the folder and to the next start."""
    old = config(tmp_path / "run", **six.settings)
    go(old)
    forced = config(old.out_dir, seed=7, force=True)
    finals = []

    def crash():
        finals.append(find_checkpoint(old.out_dir)[1]["weights_hash"])
        raise MemoryError

    for _ in range(2):
        with pytest.raises(MemoryError):
            go(forced, Rows(at_step(1, crash)))
    assert finals == [six.outcome["weights"]] * 2
    assert find_checkpoint(old.out_dir)[1]["weights_hash"] == six.outcome["weights"]
    assert go(old)["state"] == "done" and outcome(old.out_dir) == six.outcome
    assert go(forced)["state"] == "done" and not os.path.exists(f"{old.out_dir}/.new")
    assert newest_checkpoint(old.out_dir)[1]["train_config"]["seed"] == 7


def test_a_forced_run_that_fails_its_checks_touches_nothing(tmp_path, six, monkeypatch):
    """The old run moves when all is known to be well, not before."""
    old = config(tmp_path / "run", **six.settings)
    go(old)
    before = kept(old.out_dir)
    monkeypatch.setattr(budget.shutil, "disk_usage", lambda path: SimpleNamespace(free=-(10**9)))
    fails(lambda: go(config(old.out_dir, force=True)), "free")
    assert read_state(f"{old.out_dir}/.new") == "failed" and read_state(old.out_dir) == "done"
    shutil.rmtree(f"{old.out_dir}/.new")
    assert kept(old.out_dir) == before


def test_a_requeued_job_goes_on_with_what_its_force_began(tmp_path, six, monkeypatch):
    """slurm/common.sh takes --force from a job that comes back: the old run is then not meant."""
    old = config(tmp_path / "run", **six.settings)
    go(old)

    def crash():
        raise MemoryError

    with pytest.raises(MemoryError):
        go(config(old.out_dir, seed=7, force=True), Rows(at_step(1, crash)))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert go(config(old.out_dir, seed=7))["state"] == "done"
    assert newest_checkpoint(old.out_dir)[1]["train_config"]["seed"] == 7


def test_more_steps_on_a_run_are_refused_with_the_command_that_does_it(tmp_path, monkeypatch):
    """A schedule cannot be stretched; the weights can be trained further in a run of their own."""
    cfg = config(tmp_path / "run")
    go(cfg)
    monkeypatch.setattr(sys, "argv", ["train.py", "r.py", "--max-steps=9", "--out_dir=x"])
    flags = f"--init_from={cfg.out_dir} --out_dir={cfg.out_dir}-more --max_steps=3"
    fails(lambda: go(config(cfg.out_dir, max_steps=9)), f"python train.py r.py {flags}")
    text = fails(lambda: go(config(cfg.out_dir, max_steps=4)), "max_steps: 6 -> 4")
    assert "-more" not in text


def test_a_finished_run_whose_last_checkpoint_is_gone_is_not_done(smoke, tmp_path, data_dir):
    """Later stages would start from an older one; who keeps best.pt alone has chosen it."""
    folder = tmp_path / "run"
    shutil.copytree(smoke, folder, ignore=shutil.ignore_patterns("items"))
    last = newest_checkpoint(str(smoke))[1]["weights_hash"]
    os.remove(checkpoint_files(str(folder))[0])
    assert train.main(smoke_argv(folder, data_dir)) == 0
    assert newest_checkpoint(str(folder))[1]["weights_hash"] == last
    for path in checkpoint_files(str(folder)):
        os.remove(path)
    before = snapshot(folder)
    assert train.main(smoke_argv(folder, data_dir)) == 0 and snapshot(folder) == before


# ------------------------------------------------------------------------------------------------
# Continued pretraining


def more_argv(folder, data_dir, start, *more: str) -> list[str]:
    flags = ("--max_steps=3", "--save_interval=2", f"--init_from={start}", *more)
    return smoke_argv(folder, data_dir, *flags)


def byte_shards(folder, **parts: bytes) -> None:
    """Write shards of bytes: their names without number, and their text."""
    for split, text in parts.items():
        ids = np.frombuffer(text, np.uint8)
        write_shard(str(folder / "mine" / f"{split}_000.bin"), ids, load_tokenizer("byte"))


def byte_argv(folder, *more: str) -> list[str]:
    flags = ("--data=mine", "--tokenizer=byte", "--max_steps=4", "--save_interval=2", *more)
    return smoke_argv(folder / "run", folder, *flags)


def test_a_change_anywhere_in_the_data_ends_a_resume_in_words(tmp_path):
    """Also behind the first 65,536 tokens, and in the validation split: the best would be of two
    texts."""
    text = bytes(random.Random(0).choices(range(32, 127), k=140_000))
    byte_shards(tmp_path, train=text[:130_000], val=text[130_000:])
    assert train.main(byte_argv(tmp_path)) == 0
    (tmp_path / "run/state.json").unlink()  # as if it had not ended
    os.remove(checkpoint_files(str(tmp_path / "run"))[0])
    for parts in (
        {"train": text[:129_999] + b"\n", "val": text[130_000:]},
        {"train": text[:130_000], "val": text[130_000:-1] + b"\n"},
    ):
        byte_shards(tmp_path, **parts)
        fails(lambda: train.main(byte_argv(tmp_path)), "data", "has changed", "restore it")
    byte_shards(tmp_path, train=text[:130_000], val=text[130_000:])
    assert train.main(byte_argv(tmp_path)) == 0


def test_validation_on_the_training_text_is_refused(tmp_path):
    """Its loss would fall for ever, and mean nothing."""
    text = bytes(random.Random(0).choices(range(32, 127), k=3000))
    byte_shards(tmp_path, train=text, val=text)
    fails(lambda: train.main(byte_argv(tmp_path)), "val_000.bin", "train_000.bin", "memory")


def test_more_shards_than_a_process_may_open_by_default_are_read(tmp_path):
    """1,100 shards of 100M tokens are a usual copy of FineWeb; the default limit is 1,024 files."""
    text = bytes(random.Random(0).choices(range(32, 127), k=1101 * 140))
    parts = {f"train_{i:04d}": text[140 * i : 140 * i + 140] for i in range(1100)}
    byte_shards(tmp_path, **parts, val=text[-140:])
    argv = byte_argv(tmp_path, "--max_steps=1")
    command = ["bash", "-c", 'ulimit -S -n 1024; exec "$@"', "-", sys.executable, "train.py"]
    done = subprocess.run([*command, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "shell", ['"$@" | head -1', '"$@" > /dev/full', '"$@" >&- 2>&-', '"$@" 2>&1 | true']
)
def test_a_run_outlives_its_output(tmp_path, data_dir, shell):
    """Its work is in its files: a closed pipe, a full log disk, a closed terminal end nothing."""
    command = [sys.executable, "train.py", *smoke_argv(tmp_path / "run", data_dir, "--max_steps=2")]
    line = f"{shell}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line, "-", *command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert read_state(str(tmp_path / "run")) == "done" and newest_step_of(tmp_path / "run") == 2


def newest_step_of(folder) -> int:
    return newest_checkpoint(str(folder))[1]["step"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGXCPU])
def test_a_closed_terminal_and_a_used_up_limit_of_cpu_time_save_like_term(tmp_path, six, number):
    old = signal.signal(number, signal.SIG_DFL)  # whatever this suite was started under
    cfg = config(tmp_path / "run", **six.settings)
    assert go(cfg, Rows(at_step(3, send(number))))["state"] == "preempted"
    signal.signal(number, old)
    go(cfg)
    assert outcome(cfg.out_dir) == six.outcome


def test_a_run_under_nohup_does_not_hear_the_terminal_close(tmp_path):
    """nohup says so by ignoring SIGHUP; who asks for the end then asks by SIGTERM."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_job_in_the_background_hears_all_that_it_is_sent():
    """A shell starts it with Ctrl-C ignored; who sends it that signal by name means it."""
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopFlag() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, old)


RANKS_DIFFER = """
import os, shutil, sys
import train
argv = sys.argv[2:]
if os.environ["RANK"] == "1" and sys.argv[1] == "settings":
    argv.append("--learning_rate=1e-4")
if os.environ["RANK"] == "1" and sys.argv[1] == "folder":  # of its own, as on another node
    argv = [arg.replace("/run", "/elsewhere") for arg in argv]
train.run(train.main)
""".replace("train.main)", "lambda _: train.main(argv))")


@pytest.mark.parametrize(
    "kind, word", [("settings", "learning_rate: 0.003, 0.0001"), ("folder", "out_dir")]
)
def test_ranks_that_differ_are_told_so_at_the_start(tmp_path, data_dir, kind, word):
    """They trained to the end with other weights on each, or waited for each other for ever."""
    script = tmp_path / "differ.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + RANKS_DIFFER)
    run = smoke_argv(tmp_path / "run", data_dir, "--max_steps=2", "--save_interval=1")
    if kind == "folder":
        assert train.main(run) == 0
        (tmp_path / "run" / "state.json").unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(script), kind, *run], capture_output=True, text=True, timeout=120
    )
    assert "rank 0 and rank 1 differ in" in done.stderr and word in done.stderr, done.stderr


STOPPED = """
import os, signal, sys
from datetime import timedelta
import train
from runtime import world
world.PATIENCE = timedelta(seconds=6)
if os.environ["RANK"] == "1":  # as a node that hangs
    signal.setitimer(signal.ITIMER_REAL, 8)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGSTOP))
train.run(train.main)
"""


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_with_one_sentence(tmp_path, data_dir):
    """Not with the traceback of a library, and not never."""
    script = tmp_path / "stopped.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + STOPPED)
    run = smoke_argv(tmp_path / "run", data_dir, "--max_steps=100000")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(script), *run], capture_output=True, text=True, timeout=120
    )
    assert done.returncode and "another rank has ended or does not answer" in done.stderr
    assert "[rank0]: Traceback" not in done.stderr, done.stderr  # torchrun's own apart
    assert read_state(str(tmp_path / "run")) == "failed"


def test_a_refused_start_leaves_a_finished_run_done(smoke, tmp_path, data_dir):
    """Its state is that of the run, not of an attempt to change it."""
    folder = tmp_path / "run"
    shutil.copytree(smoke, folder)
    state = (folder / "state.json").read_bytes()
    for change, advice in (("--seed=3", "other settings"), ("--max_steps=40", "--init_from")):
        fails(lambda change=change: train.main(smoke_argv(folder, data_dir, change)), advice)
        assert (folder / "state.json").read_bytes() == state


RANK = """
import os, sys
with open("pid", "w") as f:
    f.write(str(os.getpid()))
os.rename("pid", "started")
while not os.path.exists("go"):
    pass
from runtime.world import World
World("cpu")
open("alive", "w").close()
"""
LAUNCHER = """
import subprocess, sys  # as torchrun, whose command line has the word torch in it
subprocess.Popen([sys.executable, sys.argv[1]]).wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("killed", [True, False])
def test_a_rank_whose_torchrun_was_killed_while_it_started_ends(tmp_path, killed):
    """The kernel tells a process of its parent's end only when it has asked before: such a rank
    waited for the others for ever, and held the folder."""
    (tmp_path / "rank.py").write_text(RANK)
    env = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LAUNCHER, "rank.py"]
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | env) as launcher:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        if killed:
            launcher.kill()
            launcher.wait()
        (tmp_path / "go").touch()
        rank = int((tmp_path / "started").read_text())
        while not is_dead(rank):
            time.sleep(0.01)
    assert (tmp_path / "alive").exists() != killed


def test_pretraining_goes_on_from_any_checkpoint(smoke, tmp_path, data_dir, capsys):
    """Its first validation is the last of the run before, and its schedule begins anew."""
    folder = tmp_path / "more"
    assert train.main(more_argv(folder, data_dir, smoke)) == 0
    assert "begin anew" in capsys.readouterr().out
    assert metrics(folder)[0]["val_loss"] == metrics(smoke)[-1]["val_loss"]
    saved, start = newest_checkpoint(str(folder))[1], newest_checkpoint(str(smoke))[1]
    assert saved["step"] == 3 and saved["init_from"]["weights_hash"] == start["weights_hash"]
    before = snapshot(folder)
    for ref in (f"{smoke}/", f"{smoke}/../run", checkpoint_files(str(smoke))[0]):
        assert train.main(more_argv(folder, data_dir, ref)) == 0
    assert snapshot(folder) == before


def test_a_start_that_does_not_fit_is_refused_in_words(smoke, tmp_path, data_dir):
    """Another shape names the flags that fit; another tokenizer, a verifier and the run itself are
    named too. A longer context is no other shape."""
    run = str(tmp_path / "run")
    main = train.main
    shape = ("--n_layer=2", "--d_model=64", "another shape")
    larger = ("--n_layer=12", "--d_model=128")  # 12 is the default; it is given all the same
    fails(lambda: main(more_argv(run, data_dir, smoke, *larger)), *shape)
    fails(lambda: main(more_argv(run, data_dir, smoke, "--tokenizer=byte")), "tokenizer")
    fails(lambda: main(more_argv(run, data_dir, "no/such/run")), "no checkpoint at")
    for force in ((), ("--force",)):
        text = fails(lambda force=force: main(more_argv(smoke, data_dir, smoke, *force)), "inside")
        assert "--force" not in text
    assert not os.path.exists(run)
    assert main(more_argv(run, data_dir, smoke, "--seq_len=256", "--max_steps=1")) == 0


def test_the_sizes_of_a_model_come_from_the_checkpoint(smoke, tmp_path, data_dir):
    """Nobody need name a recipe; config.json has the sizes, and a start without them goes on."""
    folder = tmp_path / "more"
    argv = [f"--init_from={smoke}", f"--out_dir={folder}", f"--data_dir={data_dir}"]
    argv += ["--device=cpu", "--max_steps=1", "--batch_tokens=256", "--eval_rows=2"]
    assert train.main(argv) == 0
    start, saved = newest_checkpoint(str(smoke))[1], newest_checkpoint(str(folder))[1]
    assert saved["model_config"] == start["model_config"]
    assert saved["train_config"]["n_layer"] == start["model_config"]["n_layer"]
    before = snapshot(folder)
    assert train.main(argv) == 0 and train.main([*argv, "--n_layer=2"]) == 0
    assert snapshot(folder) == before


def test_a_run_whose_start_was_trained_anew_is_stale(smoke, tmp_path, data_dir):
    """Finished or not, it says so instead of passing for a run of the new weights."""
    start, folder = tmp_path / "start", tmp_path / "more"
    shutil.copytree(smoke, start)
    for argv in (
        more_argv(folder, data_dir, start),
        more_argv(folder, data_dir, start, "--seed=3"),
    ):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(smoke, start, dirs_exist_ok=True)
        assert train.main(argv) == 0
        if "--seed=3" in argv:  # as if it had not ended
            os.remove(folder / "state.json")
        for path in checkpoint_files(str(start))[:1]:
            os.remove(path)
        fails(lambda argv=argv: train.main(argv), "stale", str(start), "--force")
    assert train.main([*argv, "--force"]) == 0 and train.main(argv) == 0


def test_changed_data_is_refused_at_resume(tmp_path):
    """The data order is a function of the data: another file would silently
    continue another run."""
    cfg = preempted(tmp_path / "run")
    before = kept(cfg.out_dir)
    fails(lambda: go(cfg, Rows(fingerprint="other")), "data", "rows -> other", cfg.out_dir)
    assert kept(cfg.out_dir) == before


def test_a_second_process_in_the_folder_is_refused_and_the_first_is_not_disturbed(tmp_path):
    """Two jobs of one name: the second reads who is there and writes nothing, not
    even its state."""
    cfg, report = config(tmp_path / "run"), tmp_path / "report"
    with lock(cfg.out_dir):
        (tmp_path / "run/state.json").write_text('{"state": "running"}')
        before = snapshot(cfg.out_dir)

        def second():
            try:
                go(cfg)
            except UserError as error:
                report.write_text(str(error))

        assert fork(second) == 0
        assert f"process {os.getpid()} on " in report.read_text()
        assert snapshot(cfg.out_dir) == before


# ------------------------------------------------------------------------------------------------
# Checkpoints of a run


def test_the_newest_checkpoints_and_the_best_are_kept_and_the_old_go_last(tmp_path, monkeypatch):
    """At every moment at least `keep` good files; the best survives although its own checkpoint is
    long gone."""
    values, remove, removed = (
        iter([9.0, 5.0, 3.0, 4.0, 6.0, 7.0, 8.0]),
        os.remove,
        [],
    )  # lowest at step 4
    monkeypatch.setattr(train, "evaluate", lambda *args: {"loss": next(values)})

    def checked_remove(path):
        if os.path.basename(path).startswith("ckpt_") and path.endswith(".pt"):
            others = [other for other in checkpoint_files(os.path.dirname(path)) if other != path]
            assert (
                len(others) >= 3
                and all(read_checkpoint(other) for other in others)
                and path < min(others)
            )
            removed.append(os.path.basename(path))
        remove(path)

    monkeypatch.setattr(os, "remove", checked_remove)
    cfg = config(tmp_path / "run", max_steps=12, eval_interval=2, save_interval=2, keep=3)
    go(cfg)
    assert newest_step(cfg) == [12, 10, 8] and removed == [
        f"ckpt_{step:07d}.pt" for step in (2, 4, 6)
    ]
    assert read_checkpoint(str(tmp_path / "run/best.pt"))["step"] == 4


def flip(path) -> None:
    raw = bytearray(Path(path).read_bytes())
    raw[len(raw) // 2] ^= 1
    Path(path).write_bytes(raw)


def test_resume_passes_over_a_damaged_checkpoint_aloud(tmp_path, six, capsys):
    """A flipped bit costs the steps since the file before, not the run and not its exactness."""
    cfg = preempted(tmp_path / "run", step=4, **six.settings)
    newest, _ = checkpoint_files(cfg.out_dir)
    flip(newest)
    go(cfg)
    assert f"WARNING: {newest} is damaged" in capsys.readouterr().out
    assert outcome(cfg.out_dir) == six.outcome


def test_damaged_checkpoints_of_later_steps_do_not_push_out_the_good_ones(tmp_path):
    """After falling back, the new file has a lower step than the broken ones: pruning by order
    alone would delete just it."""
    cfg = config(tmp_path / "run", save_interval=1, keep=5, max_steps=9, eval_interval=9)
    go(cfg, Rows(at_step(4, send())))
    for path in checkpoint_files(cfg.out_dir)[:3]:
        flip(path)  # steps 5, 4, 3; left are 2 and 1
    cfg = config(cfg.out_dir, keep=2, max_steps=9, eval_interval=9)
    go(cfg, Rows(at_step(2, send())))
    assert newest_checkpoint(cfg.out_dir)[1]["step"] == 3
    assert read_checkpoint(str(tmp_path / "run/ckpt_0000002.pt"))["step"] == 2


def test_leftovers_of_a_killed_save_are_ignored_and_removed(tmp_path, six):
    """Each kill in a save leaves a .tmp as large as a checkpoint: a run that is often preempted
    would fill the disk."""
    cfg = preempted(tmp_path / "run", **six.settings)
    (tmp_path / "run/ckpt_0000005.pt.99999.tmp").write_bytes(b"torn")
    go(cfg)
    assert outcome(cfg.out_dir) == six.outcome
    assert leftovers(cfg.out_dir) == []


# ------------------------------------------------------------------------------------------------
# Full disks

PLAIN = {"max_steps": 9, "eval_interval": 9}  # checkpoints at 3 and 6 without a best.pt beside them


def test_a_full_disk_ends_the_run_with_path_and_sizes_and_the_old_checkpoint(tmp_path, monkeypatch):
    """torch says "unexpected pos 704 vs 598" and no more; the user must read which file, how much,
    and that all is safe."""
    cfg, save = config(tmp_path / "run", **PLAIN), torch.save

    def fill_disk():
        def half(checkpoint, f):
            f.write(b"half of it")
            raise RuntimeError("unexpected pos 704 vs 598")

        monkeypatch.setattr(torch, "save", half)

    fails(lambda: go(cfg, Rows(at_step(4, fill_disk))), "ckpt_0000006.pt", "MB needed", "MB free")
    monkeypatch.setattr(torch, "save", save)
    assert newest_checkpoint(cfg.out_dir)[1]["step"] == 3 and leftovers(cfg.out_dir) == []
    assert (
        read_state(cfg.out_dir) == "failed"
        and "ckpt_0000006.pt" in (tmp_path / "run/state.json").read_text()
    )
    assert go(cfg)["state"] == "done"


def test_a_disk_too_full_for_state_json_still_names_the_checkpoint(tmp_path, monkeypatch):
    """On a really full disk not even the state can be written; that second failure must not hide
    the first."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    cfg = config(tmp_path / "run", **PLAIN)
    fails(
        lambda: go(cfg, Rows(at_step(4, lambda: monkeypatch.setattr(os, "fsync", full)))),
        "ckpt_0000006.pt",
        "MB needed",
    )
    monkeypatch.undo()
    assert newest_checkpoint(cfg.out_dir)[1]["step"] == 3 and leftovers(cfg.out_dir) == []


def test_a_failure_to_write_best_pt_is_told_like_any_other(tmp_path, monkeypatch):
    """best.pt is a second file of the same size: the disk may be full just there."""
    cfg, replace = config(tmp_path / "run"), os.replace

    def no_best(source, target):
        if os.path.basename(target) == "best.pt":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", no_best)
    fails(lambda: go(cfg), "best.pt")
    assert leftovers(cfg.out_dir) == []


def test_a_file_size_limit_ends_the_run_in_words(tmp_path):
    """`ulimit -f` and quotas, with torch's own writer: message, old checkpoint, no leftovers, and
    the run can go on after."""
    cfg, report = config(tmp_path / "run", **PLAIN), tmp_path / "report"

    def lower():
        size = os.path.getsize(checkpoint_files(cfg.out_dir)[0])
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))

    def child():
        try:
            go(cfg, Rows(at_step(4, lower)))
        except UserError as error:
            report.write_text(str(error))

    assert fork(child) == 0
    assert "ckpt_0000006.pt" in report.read_text() and "MB needed" in report.read_text()
    assert (
        newest_checkpoint(cfg.out_dir)[1]["step"] == 3
        and leftovers(cfg.out_dir) == []
        and read_state(cfg.out_dir) == "failed"
    )
    assert go(cfg)["state"] == "done"


# ------------------------------------------------------------------------------------------------
# Numbers that are none


def nan_loss(nll):
    return nll * math.nan


def infinite_gradient(nll):
    nll = nll * 1.0
    nll.register_hook(lambda grad: grad * math.inf)  # the loss itself stays finite
    return nll


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize("poison", [nan_loss, infinite_gradient])
def test_one_bad_step_is_skipped_counted_and_changes_no_weight(poison, clip, tmp_path, capsys):
    """One bad batch in a long run: neither weights nor momentum may see it, and
    training goes on."""
    cfg, hashes = config(tmp_path / "run", grad_clip=clip, micro_batch=8), []
    model = tiny(cfg)
    task = Rows(
        lambda split, first: (
            hashes.append(weights_hash(model.state_dict())) if split == "train" else None
        ),
        spoil=lambda first, nll: poison(nll) if first == 2 * 8 else nll,
    )
    assert go(cfg, task, model)["state"] == "done"
    assert hashes[2] == hashes[3] and len(set(hashes)) == 5
    assert [row.get("skipped") for row in metrics(cfg.out_dir) if "loss" in row] == [
        None,
        None,
        1,
        1,
        1,
        1,
    ]
    assert (
        "step 00002: non-finite gradient, step skipped (1 in a row, 1 in all)"
        in capsys.readouterr().out
    )
    state = newest_checkpoint(cfg.out_dir)[1]["optimizers"]
    assert state["state"] and all(
        x.isfinite().all() for values in state["state"].values() for x in values.values()
    )


def test_bad_steps_that_do_not_follow_each_other_do_not_end_the_run(tmp_path):
    """The limit is of steps in a row: a rare bad batch in a month of training is not a diverged
    run."""
    cfg = config(tmp_path / "run", max_bad_steps=2)
    assert (
        go(cfg, Rows(spoil=lambda first, nll: nan_loss(nll) if first // 8 in (0, 2, 4) else nll))[
            "state"
        ]
        == "done"
    )
    assert metrics(cfg.out_dir)[-2]["skipped"] == 3


def test_bad_steps_in_a_row_end_the_run_with_the_batch_saved(tmp_path):
    """A diverged run must not burn its allocation: it ends in words, with the batch to look at and
    the last good checkpoint."""
    cfg = config(tmp_path / "run", max_bad_steps=2, max_steps=9)
    good = go(config(tmp_path / "good", max_steps=9), Rows(at_step(3, send())))
    text = fails(
        lambda: go(cfg, Rows(spoil=lambda first, nll: nan_loss(nll) if first >= 4 * 8 else nll)),
        "2 in a row",
        "learning_rate",
    )
    path = next(word.rstrip(",;") for word in text.split() if "bad_batch" in word)
    saved, task = torch.load(path, weights_only=True), Rows()
    assert saved["step"] == 5 and torch.equal(
        saved["batches"][1]["idx"], task.batch("train", 5 * 8 + 4, 6 * 8)["idx"]
    )
    newest = newest_checkpoint(cfg.out_dir)[1]
    assert (
        newest["step"] == good["step"] == 4
        and newest["weights_hash"] == newest_checkpoint(str(tmp_path / "good"))[1]["weights_hash"]
    )
    assert (
        read_state(cfg.out_dir) == "failed"
        and "non-finite" in (tmp_path / "run/state.json").read_text()
    )
    assert go(cfg)["state"] == "done"  # with sound data it goes on from there


def test_the_state_of_a_finished_run_names_its_weights(tmp_path):
    """A report sees by it that a stage was trained again, without opening a checkpoint."""
    cfg = config(tmp_path / "run", **PLAIN)
    go(cfg)
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["weights_hash"] == newest_checkpoint(cfg.out_dir)[1]["weights_hash"]
    assert state["process_seconds"] > state["seconds"] > 0
