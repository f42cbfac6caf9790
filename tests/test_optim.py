"""Properties of optim.py: Muon against torch's own, what is decayed, and the learning rate over any horizon."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GPT, ModelConfig
from optim import Muon, lr_at, make_optimizers

SHAPES = {"wide": (24, 64), "tall": (64, 24), "square": (32, 32)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def randn(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_beside_torch(shape, dtype, steps: int = 6):
    """Yields (our update, torch's update) of each step, under equal gradients of very unequal sizes."""
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.3, "ns_steps": 5}
    ours, theirs = (torch.nn.Parameter(randn(*shape, seed=99)) for _ in range(2))
    optimizers = Muon([ours], dtype=dtype, **settings), torch.optim.Muon([theirs], **settings)
    for step in range(steps):
        grad = randn(*shape, seed=step) * 10.0 ** (step % 3 - 3)
        before = []
        for p, optimizer in zip((ours, theirs), optimizers):
            p.grad = grad.clone()
            before.append(p.detach().clone())
            optimizer.step()
        yield ours.detach() - before[0], theirs.detach() - before[1]


def relative(a, b) -> float:
    return float((a - b).norm() / b.norm())


# ---------------------------------------------------------------------------------------------------------------------
# Muon


@shapes
def test_muon_equals_torch_muon_in_float32(shape, monkeypatch):
    """Torch's Newton-Schulz casts to bf16, which hides small mistakes; with that cast taken out only rounding may remain."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    for ours, theirs in run_beside_torch(shape, torch.float32):
        assert relative(ours, theirs) < 1e-4


@shapes
def test_muon_equals_torch_muon_in_bfloat16(shape):
    """The real torch.optim.Muon. bf16 keeps 8 bits (0.4 %) and each of 15 products rounds in another order: some per cent."""
    errors = [relative(ours, theirs) for ours, theirs in run_beside_torch(shape, torch.bfloat16)]
    assert max(errors) < 0.06


@pytest.mark.parametrize(
    "wrong",
    [{"ns_steps": 4}, {"momentum": 0.6}, {"lr": 0.022}, {"weight_decay": 0.0}],
    ids=lambda d: next(iter(d)),
)
def test_the_bfloat16_tolerance_would_notice_a_wrong_setting(wrong):
    """A tolerance of some per cent is only worth something if a wrong coefficient lies outside of it."""
    base = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.3, "ns_steps": 5}
    a, b = torch.nn.Parameter(randn(64, 24, seed=9)), torch.nn.Parameter(randn(64, 24, seed=9))
    first, second = Muon([a], dtype=torch.bfloat16, **base), torch.optim.Muon([b], **base | wrong)
    worst = 0.0
    for step in range(4):
        before = [a.detach().clone(), b.detach().clone()]
        a.grad = b.grad = randn(64, 24, seed=step)
        first.step(), second.step()
        worst = max(worst, relative(a.detach() - before[0], b.detach() - before[1]))
    assert worst > 0.06, worst


@shapes
def test_a_stack_of_matrices_equals_separate_matrices(shape):
    """Experts are stacks (E, m, n); each must be orthogonalised by itself, not as part of one large matrix."""
    stack = torch.nn.Parameter(randn(3, *shape, seed=1))
    single = [torch.nn.Parameter(stack[i].detach().clone()) for i in range(3)]
    one, three = Muon([stack], weight_decay=0.1), Muon(single, weight_decay=0.1)
    for step in range(3):
        stack.grad = randn(3, *shape, seed=10 + step) * torch.tensor([1.0, 100.0, 0.01]).view(
            3, 1, 1
        )
        for p, grad in zip(single, stack.grad):
            p.grad = grad.clone()
        one.step(), three.step()
    torch.testing.assert_close(
        stack.detach(), torch.stack([p.detach() for p in single]), rtol=0, atol=1e-5
    )


def test_updates_of_parameters_of_one_shape_do_not_mix():
    """Equal shapes share one batched call: each must get its own rows of the answer, also between a matrix and a stack."""
    shapes = [(16, 24), (2, 16, 24), (16, 24), (24, 16), (3, 16, 24)]
    together = [torch.nn.Parameter(randn(*s, seed=i)) for i, s in enumerate(shapes)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [Muon(together), *(Muon([p]) for p in alone)]
    for step in range(2):
        for i, (p, q) in enumerate(zip(together, alone)):
            p.grad = randn(*shapes[i], seed=50 + 10 * step + i)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for i, (p, q) in enumerate(zip(together, alone)):
        torch.testing.assert_close(
            p.detach(),
            q.detach(),
            rtol=0,
            atol=1e-5,
            msg=lambda text, i=i: f"parameter {i}: {text}",
        )


def test_a_parameter_without_gradient_is_left_alone():
    """An expert layer or head that a step did not use must not drift by weight decay or old momentum."""
    p, q = torch.nn.Parameter(randn(8, 8)), torch.nn.Parameter(randn(8, 8, seed=1))
    optimizer = Muon([p, q], weight_decay=0.5)
    p.grad, before = randn(8, 8, seed=2), q.detach().clone()
    optimizer.step()
    assert torch.equal(q, before) and q not in optimizer.state


@pytest.mark.parametrize("rows, columns", [(48, 48), (32, 96), (96, 32), (128, 120)])
def test_orthogonalized_singular_values_are_near_one(rows, columns):
    """The update must move every direction of the matrix about as far, whatever the spread in the gradient (here 30 x)."""
    muon, n = Muon([torch.nn.Parameter(torch.zeros(1, 1))]), min(rows, columns)
    u, v = torch.linalg.qr(randn(rows, n))[0], torch.linalg.qr(randn(columns, n, seed=1))[0]
    for scale in (1e-4, 1.0, 1e4):
        found = torch.linalg.svdvals(
            muon.orthogonalize(scale * (u * torch.logspace(-1.5, 0, n)) @ v.T[None], 5)
        )
        assert 0.6 < found.min() and found.max() < 1.3, (scale, found.min(), found.max())


def test_orthogonalization_keeps_the_direction_of_the_gradient():
    """Singular values near one say nothing of the singular vectors: U V^T must come from the gradient's own U and V."""
    muon, g = Muon([torch.nn.Parameter(torch.zeros(1, 1))]), randn(1, 40, 24)
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    core = u.mT @ muon.orthogonalize(g, 5) @ vh.mT  # diagonal if the vectors are the same
    off = core - torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-3 and core.diagonal(dim1=-2, dim2=-1).min() > 0.6


def test_a_zero_gradient_gives_a_finite_update():
    """A head that no token reached has gradient 0: 0/0 here would poison the whole model."""
    p = torch.nn.Parameter(randn(8, 4))
    optimizer, before, p.grad = Muon([p]), p.detach().clone(), torch.zeros(8, 4)
    optimizer.step()
    assert torch.equal(p, before)


# ---------------------------------------------------------------------------------------------------------------------
# Groups


def settings_of(**changes) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "optimizer": "muon",
            "muon_lr": 0.02,
            "learning_rate": 1e-3,
            "momentum": 0.95,
            "weight_decay": 0.1,
            "ns_steps": 5,
            "beta1": 0.9,
            "beta2": 0.95,
        }
        | changes
    )


VARIANTS = [{}, {"tied": False}, {"n_expert": 4}, {"score_head": True, "sinks": False}]
variants = pytest.mark.parametrize("fields", VARIANTS, ids=["dense", "untied", "moe", "score"])


def tiny(fields) -> GPT:
    torch.manual_seed(0)
    return GPT(
        ModelConfig(
            **{"vocab_size": 50, "seq_len": 8, "n_layer": 2, "n_head": 2, "d_model": 16, "d_ff": 24}
            | fields
        )
    )


@variants
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_is_in_one_group_of_one_optimizer(fields, name):
    """A parameter in no group never learns, one in two groups is stepped twice; neither shows in the loss at once."""
    model = tiny(fields)
    found = [
        p
        for optimizer in make_optimizers(model, settings_of(optimizer=name))
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert len(found) == len(set(found)) == len(list(model.parameters()))
    assert set(found) == set(model.parameters())


@variants
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_weight_decay_falls_on_hidden_matrices_only(fields, name):
    """Decay on norms, sinks or the embedding pulls towards a value that means nothing there. Seen in the step itself."""
    model = tiny(fields)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand_like(p) + 1)
    before, shrunk = {name: p.detach().clone() for name, p in model.named_parameters()}, set()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # so that decay is all that moves
    for optimizer in make_optimizers(model, settings_of(optimizer=name, weight_decay=0.5)):
        optimizer.step()
    for key, p in model.named_parameters():
        if not torch.equal(p, before[key]):
            shrunk.add(key)
    hidden = {
        key
        for key, p in model.named_parameters()
        if key.startswith("blocks.") and p.ndim >= 2 and "router" not in key
    }
    assert shrunk == hidden and len(hidden) >= 4 * 2


def test_peak_learning_rates_are_kept_in_every_group():
    """The loop scales peak_lr by the schedule; a group without it, or with the other optimizer's rate, trains wrongly."""
    for name, expected in (("muon", [0.02, 1e-3]), ("adamw", [1e-3, 1e-3])):
        optimizers = make_optimizers(tiny({}), settings_of(optimizer=name))
        assert [
            group["peak_lr"] for optimizer in optimizers for group in optimizer.param_groups
        ] == expected


def test_optimizer_state_survives_a_round_trip():
    """A resumed run continues with the old momentum: after load_state_dict the next step is bitwise the same."""
    a = tiny({"n_expert": 4})
    first = make_optimizers(a, settings_of())

    def step(model, optimizers, seed):
        for i, p in enumerate(model.parameters()):
            p.grad = randn(*p.shape, seed=seed + i)
        for optimizer in optimizers:
            optimizer.step()

    step(a, first, 0)
    b = copy.deepcopy(a)
    second = make_optimizers(b, settings_of())
    for old, new in zip(first, second):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    step(a, first, 1000), step(b, second, 1000)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


# ---------------------------------------------------------------------------------------------------------------------
# Schedule


def schedule(**changes) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "max_steps": 100,
            "warmup_frac": 0.1,
            "decay_frac": 0.4,
            "final_lr_frac": 0.1,
            "schedule": "wsd",
        }
        | changes
    )


share = st.floats(0, 1)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), share, share, share, st.sampled_from(["wsd", "cosine"]))
def test_learning_rate_is_within_zero_and_peak_and_first_step_learns(
    max_steps, warmup, decay, final, kind
):
    """A first step at rate 0 is a wasted batch, a negative rate climbs the loss; no horizon and no shares may give them."""
    cfg = schedule(
        max_steps=max_steps,
        warmup_frac=warmup,
        decay_frac=decay,
        final_lr_frac=final,
        schedule=kind,
    )
    values = [lr_at(step, cfg) for step in range(max_steps + 1)]
    assert values[0] > 0
    assert all(math.isfinite(v) and 0 <= v <= 1 + 1e-12 for v in values)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(2, 400),
    st.floats(0, 0.4),
    st.floats(0, 0.5),
    share,
    st.sampled_from(["wsd", "cosine"]),
)
def test_warm_up_rises_to_the_peak_and_the_rate_then_never_rises(
    max_steps, warmup, decay, final, kind
):
    """The configured rate is the peak that is really reached; after it the schedule only holds or falls."""
    cfg = schedule(
        max_steps=max_steps,
        warmup_frac=warmup,
        decay_frac=decay,
        final_lr_frac=final,
        schedule=kind,
    )
    values, top = [lr_at(step, cfg) for step in range(max_steps)], round(warmup * max_steps)
    assert all(a < b for a, b in zip(values[: top + 1], values[1 : top + 1]))
    assert max(values) == pytest.approx(1.0)
    assert all(a >= b - 1e-12 for a, b in zip(values[top:], values[top + 1 :]))


def test_wsd_holds_its_plateau_and_decays_in_a_straight_line():
    """100 steps worked out by hand: warm-up in 10, plateau to 60, then 40 equal steps down to 0.1."""
    cfg = schedule()
    assert lr_at(0, cfg) == pytest.approx(1 / 11) and lr_at(9, cfg) == pytest.approx(10 / 11)
    assert [lr_at(step, cfg) for step in (10, 30, 59, 60)] == pytest.approx([1] * 4)
    assert lr_at(80, cfg) == pytest.approx(0.55)  # half-way of 1 and 0.1
    assert lr_at(99, cfg) == pytest.approx(0.1 + 0.9 / 40) and lr_at(100, cfg) == pytest.approx(0.1)


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine_ends_at_its_final_share(final):
    """The end of the horizon is where the rate must have arrived; half-way lies the mean of both ends."""
    cfg = schedule(schedule="cosine", final_lr_frac=final, warmup_frac=0.0)
    assert lr_at(0, cfg) == pytest.approx(1) and lr_at(50, cfg) == pytest.approx((1 + final) / 2)
    assert lr_at(100, cfg) == pytest.approx(final, abs=1e-12) and lr_at(99, cfg) >= final


def test_no_warm_up_and_no_decay_is_a_constant_rate():
    """Shares of 0 are the way to switch both off; rounding must not leave a step of them."""
    cfg = schedule(warmup_frac=0.0, decay_frac=0.0)
    assert {lr_at(step, cfg) for step in range(100)} == {1.0}


def test_muon_chooses_float32_on_a_cpu():
    """bf16 without bf16 units costs 16 times as much: on a CPU the default is float32."""
    assert (
        Muon([torch.nn.Parameter(randn(4, 4))]).orthogonalize(randn(1, 4, 4), 5).dtype
        == torch.float32
    )
