"""Which parameters each optimizer gets, what is decayed, and the learning rate over any horizon."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GPT, ModelConfig
from train import lr_at, make_optimizers


def randn(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------
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
    """A parameter in no group never learns, one in two groups is stepped twice; neither shows in
    the loss at once."""
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
    """Decay on norms, sinks or the embedding pulls towards a value that means nothing there. Seen
    in the step itself."""
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
    """The loop scales peak_lr by the schedule; a group without it, or with the other optimizer's
    rate, trains wrongly."""
    for name, expected in (("muon", [0.02, 1e-3]), ("adamw", [1e-3, 1e-3])):
        optimizers = make_optimizers(tiny({}), settings_of(optimizer=name))
        assert [
            group["peak_lr"] for optimizer in optimizers for group in optimizer.param_groups
        ] == expected


def test_optimizer_state_survives_a_round_trip():
    """A resumed run continues with the old momentum: after load_state_dict the next step is bitwise
    the same."""
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
    for old, new in zip(first, second, strict=False):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    step(a, first, 1000), step(b, second, 1000)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=False))


# ------------------------------------------------------------------------------------------------
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


def drawn_schedule(max_steps, warmup, decay, final, kind) -> SimpleNamespace:
    fractions = {"warmup_frac": warmup, "decay_frac": decay, "final_lr_frac": final}
    return schedule(max_steps=max_steps, schedule=kind, **fractions)


share = st.floats(0, 1)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 400), share, share, share, st.sampled_from(["wsd", "cosine"]))
def test_learning_rate_is_within_zero_and_peak_and_first_step_learns(
    max_steps, warmup, decay, final, kind
):
    """A first step at rate 0 is a wasted batch, a negative rate climbs the loss; no horizon and no
    shares may give them."""
    cfg = drawn_schedule(max_steps, warmup, decay, final, kind)
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
    """The configured rate is the peak that is really reached; after it the schedule only holds or
    falls."""
    cfg = drawn_schedule(max_steps, warmup, decay, final, kind)
    values, top = [lr_at(step, cfg) for step in range(max_steps)], round(warmup * max_steps)
    assert all(a < b for a, b in itertools.pairwise(values[: top + 1]))
    assert max(values) == pytest.approx(1.0)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values[top:]))


def test_wsd_holds_its_plateau_and_decays_in_a_straight_line():
    """100 steps worked out by hand: warm-up in 10, plateau to 60, then 40 equal
    steps down to 0.1."""
    cfg = schedule()
    assert lr_at(0, cfg) == pytest.approx(1 / 11) and lr_at(9, cfg) == pytest.approx(10 / 11)
    assert [lr_at(step, cfg) for step in (10, 30, 59, 60)] == pytest.approx([1] * 4)
    assert lr_at(80, cfg) == pytest.approx(0.55)  # half-way of 1 and 0.1
    assert lr_at(99, cfg) == pytest.approx(0.1 + 0.9 / 40) and lr_at(100, cfg) == pytest.approx(0.1)


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine_ends_at_its_final_share(final):
    """The end of the horizon is where the rate must have arrived; half-way lies the mean of both
    ends."""
    cfg = schedule(schedule="cosine", final_lr_frac=final, warmup_frac=0.0)
    assert lr_at(0, cfg) == pytest.approx(1) and lr_at(50, cfg) == pytest.approx((1 + final) / 2)
    assert lr_at(100, cfg) == pytest.approx(final, abs=1e-12) and lr_at(99, cfg) >= final


def test_no_warm_up_and_no_decay_is_a_constant_rate():
    """Shares of 0 are the way to switch both off; rounding must not leave a step of them."""
    cfg = schedule(warmup_frac=0.0, decay_frac=0.0)
    assert {lr_at(step, cfg) for step in range(100)} == {1.0}
