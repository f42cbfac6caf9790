"""The CUDA path on a machine without a GPU: fake CUDA tensors, and kernels stood in for.

The tests marked `gpu` need a card: pytest -m gpu.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from fake_cuda import SIZES, compiled_step_on_cpu, make_guard, task_of
from helpers import ROOT

import fast
from fast import attention
from fast.attention import Mask, kernel_for
from inference.sampling import Steps, generate
from model import GPT, ModelConfig, attention_weights
from train import TrainStep

FLASH, FLEX = "_scaled_dot_product_flash_attention", "flex_attention"
# name -> (fields of the model and of the step, kernel, calls forward)
CASES = {
    "dense": ({"n_layer": 2}, FLASH, 2),
    "without sinks": ({"sinks": False}, None, 0),  # torch's choice is made in its CUDA library
    "grouped, AdamW": ({"n_kv_head": 2, "optimizer": "adamw"}, FLASH, 1),
    "untied, recompute": ({"tied": False, "recompute": True}, FLASH, 2),
    "experts": ({"n_expert": 4}, FLASH, 1),
    "window, narrow heads": ({"sliding_window": 64, "d_head": 8}, FLEX, 1),
    "sft": ({"mode": "sft"}, FLEX, 1),
    "dpo": ({"mode": "dpo"}, FLASH, 1),
    "rl": ({"mode": "rl"}, FLASH, 1),
    "verifier": ({"mode": "verifier"}, FLEX, 1),
    "odd heads": ({"d_head": 20}, None, 0),  # the plain maths
}


GENERATION = {
    "generation, sinks, grouped": {"generate": True, "n_kv_head": 2},
    "generation, kept": {"generate": True, "sinks": False},
    "generation, window": {"generate": True, "sliding_window": 64},
    "generation, experts": {"generate": True, "n_expert": 4},
}


@pytest.fixture(scope="session")
def steps(tmp_path_factory) -> dict:
    """What a compiled training step calls on fake CUDA tensors: {case: operators, graphs}."""
    if shutil.which("g++") is None or torch.version.cuda is not None:
        pytest.skip("fake CUDA tensors need g++, and a torch without CUDA hooks of its own")
    guard = make_guard(tmp_path_factory.mktemp("guard"))
    every = {name: fields for name, (fields, *_) in CASES.items()} | GENERATION
    cases = list(map(json.dumps, every.values()))
    command = [sys.executable, str(ROOT / "tests" / "fake_cuda.py"), guard, *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(every, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_step_is_one_graph_on_the_fused_kernel(steps, case):
    """No (T, T) scores, no graph break; float32 gradients are asserted where the step is made.

    RMSNorm in float32 under CUDA's autocast once kept flash attention from being used at all.
    """
    fields, kernel, calls = CASES[case]
    found, ops = steps[case], steps[case]["ops"]
    assert found["graphs"] == 1 and not found["breaks"]
    if kernel:
        assert ops[kernel] == calls and ops[f"{kernel}_backward"] == fields.get("n_layer", 1)
        assert not {"bmm", "_softmax", "_safe_softmax"} & set(ops)
    else:
        assert FLASH not in ops


def test_angles_are_computed_once_and_outside_the_layers(steps):
    """In float64 they would be fused into every layer's kernel."""
    trained = [steps[case]["ops"] for case in CASES]
    assert all(ops["modern_llm"] == 1 and not {"cos", "sin"} & set(ops) for ops in trained)


def test_the_head_needs_no_loop_of_chunks_when_compiled(steps):
    """Chunks would be unrolled: hundreds of kernels, and minutes of compilation."""
    assert all(steps[case]["ops"]["mm"] < 50 for case in CASES)
    assert steps["dense"]["ops"]["_log_softmax"] == 1


@pytest.mark.parametrize("case", GENERATION)
def test_a_step_of_generation_can_be_recorded(steps, case):
    """It never waits for the GPU: nothing is read back, no shape depends on a number."""
    ops = steps[case]["ops"]
    assert ops["bmm"] == 2 and not {"_local_scalar_dense", "nonzero", "repeat_interleave"} & set(
        ops
    )


class OnCuda(torch.Tensor):  # says so, and computes on the CPU
    is_cuda, device = True, torch.device("cuda")


@pytest.fixture
def stand_ins():
    """The CPU's kernels under the names and signatures of CUDA's."""
    aten, library = torch.ops.aten, torch.library.Library("aten", "IMPL")

    def forward(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        kernel = aten._scaled_dot_product_flash_attention_for_cpu
        o, lse = kernel(q, k, v, dropout_p, is_causal, scale=scale)
        rng, unused = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
        return o, lse, None, None, q.size(2), k.size(2), rng, unused, q.new_empty(0)

    def backward(dout, q, k, v, out, lse, *rest, scale=None):
        _, _, max_q, max_k, dropout_p, is_causal, rng, unused = rest
        assert (max_q, max_k) == (q.size(2), k.size(2)) and rng.shape == (2,) and not unused.shape
        kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(dout, q, k, v, out, lse, dropout_p, is_causal, scale=scale)

    library.impl(FLASH, forward, "CPU")
    library.impl(f"{FLASH}_backward", backward, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("queries", [32, 1])
def test_the_flash_branch_gives_the_numbers_of_the_plain_maths(stand_ins, queries):
    """Order and meaning of every argument of CUDA's two kernels; one query sees all keys."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(2, 4, n, 16) for n in (queries, 32, 32, queries))
    sinks, mask = torch.randn(4), Mask(causal=queries > 1)
    inputs = [x.requires_grad_() for x in (q, k, v, sinks)]
    want = attention_weights(q, k, sinks, mask)[..., :32] @ v
    gradients = torch.autograd.grad(want, inputs, dout)

    class Context:
        def save_for_backward(self, *tensors):
            self.saved_tensors = tensors

    context = Context()
    with torch.no_grad():
        tensors = [x.detach().as_subclass(OnCuda) for x in (q, k, v)]
        rest = (sinks.detach(), None, mask.causal)
        out = attention.FlashSinks.forward(context, *tensors, *rest)
        found = attention.FlashSinks.backward(context, dout)[:4]
    for mine, plain in zip((out, *found), (want, *gradients), strict=True):
        mine = mine.as_subclass(torch.Tensor)
        torch.testing.assert_close(mine, plain.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "shape, sinks, mask, kernel",
    [
        ((2, 4, 8, 64), True, Mask(causal=True), "flash_sinks"),
        ((2, 4, 8, 20), True, Mask(causal=True), None),  # no whole eights
        ((2, 4, 8, 264), True, Mask(causal=True), None),
        ((2, 4, 1, 64), True, Mask(), "flash_sinks"),
        ((2, 4, 1, 64), True, Mask(bias=torch.zeros(2, 1, 1, 8)), "one_query"),  # padded rows
        ((2, 4, 1, 64), False, Mask(bias=torch.zeros(2, 1, 1, 8)), "one_query"),
        ((2, 4, 1, 64), False, Mask(), "dense"),
        ((2, 4, 8, 64), False, Mask(causal=True), "dense"),
        ((2, 4, 8, 64), True, Mask(bias=torch.zeros(2, 1, 8, 8)), None),
    ],
)
def test_the_kernel_on_cuda(shape, sinks, mask, kernel):
    """What the kernel refuses goes to the plain maths."""
    q = torch.zeros(shape, dtype=torch.bfloat16).as_subclass(OnCuda)
    k = torch.zeros(2, 2, 8, shape[-1], dtype=torch.bfloat16)
    found = kernel_for(q, k, torch.zeros(4) if sinks else None, mask)
    assert (found and found.__name__) == kernel


@pytest.mark.parametrize("sinks", [True, False])
def test_one_query_with_a_bias_is_the_plain_maths(sinks):
    """Grouped heads, sinks and padded rows at once: a step of generation on CUDA."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16)
    bias = torch.zeros(2, 1, 1, 8).masked_fill(torch.arange(8) < 3, -torch.inf)
    sink, mask = torch.randn(4) if sinks else None, Mask(bias=bias)
    weights = attention_weights(q, k, sink, mask)[..., :8]
    want = weights @ v.repeat_interleave(2, dim=1)
    torch.testing.assert_close(attention.one_query(q, k, v, sink, mask), want)


# --------------------------------------------------------------------------------------------------
# On a card: pytest -m gpu


@pytest.fixture
def card() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    return torch.device("cuda")


def randomized(mode: str, fields: dict) -> GPT:
    """Return a model with every parameter random: as initialised, its blocks add nothing."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**fields, score_head=mode == "verifier"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def loss_and_gradients(model, batch: dict, task, compiled: bool) -> tuple:
    model.zero_grad()
    step = TrainStep(model, task)
    step = torch.compile(step, dynamic=False) if compiled else step
    with torch.autocast("cuda", torch.bfloat16):
        loss, balance, _ = step(batch)
    (loss + balance).backward()
    return loss.item(), torch.cat([p.grad.float().flatten() for p in model.parameters()])


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", [case for case in CASES if case != "odd heads"])
def test_a_step_on_the_card_is_the_plain_maths(card, monkeypatch, case, compiled):
    """Fused kernels in bf16 against model.py's own lines in bf16: the same within rounding."""
    fields = {**SIZES, **CASES[case][0]}
    mode, recompute = fields.pop("mode", "pretrain"), fields.pop("recompute", False)
    fields.pop("optimizer", None)
    model = randomized(mode, fields).to(card)
    model.recompute = recompute
    with card:
        task, batch = task_of(mode)
    batch |= {"idx": torch.randint(0, 300, (4, 256), device=card)}
    fused = loss_and_gradients(model, batch, task, compiled)
    monkeypatch.setattr(fast, "ENABLED", False)
    plain = loss_and_gradients(model, batch, task, False)
    assert fused[0] == pytest.approx(plain[0], rel=2e-2)
    assert torch.nn.functional.cosine_similarity(fused[1], plain[1], dim=0) > 0.98


@pytest.mark.gpu
@pytest.mark.parametrize("case", GENERATION)
def test_replayed_steps_on_the_card_give_the_same_text(card, monkeypatch, case):
    """Rows of unequal length that end one after the other, and a cache that rolls."""
    fields = {key: x for key, x in GENERATION[case].items() if key != "generate"}
    model = randomized("pretrain", {**SIZES, **fields, "seq_len": 64}).to(card, torch.bfloat16)
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5], [3, 5, 8, 9, 7, 9]]
    replayed = generate(model, prompts, 90, (7,))
    monkeypatch.setattr(Steps, "is_replayed", lambda steps, ids: False)
    same = [a == b for a, b in zip(replayed, generate(model, prompts, 90, (7,)), strict=True)]
    assert sum(same) >= 3  # rounding may turn a draw


# --------------------------------------------------------------------------------------------------
# Compilation


@pytest.mark.parametrize("mode", ["pretrain", "sft", "dpo", "dpo beside chats", "rl", "verifier"])
def test_each_shape_is_compiled_once(mode):
    """Training, validation and the last part of a batch: a graph each, and none in a second step.

    The graphs are of autocast in bfloat16, without breaks.
    """
    assert compiled_step_on_cpu(mode) == {"train": 1, "again": 1, "val": 2, "part": 3, "next": 3}
