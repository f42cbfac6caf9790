"""Properties of fast/muon.py: Muon against torch's own."""

import pytest
import torch
import torch.distributed as dist

from fast.muon import Muon

SHAPES = {"wide": (24, 64), "tall": (64, 24), "square": (32, 32)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def randn(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_beside_torch(shape, dtype, steps: int = 6):
    """Yields (our update, torch's update) of each step, under equal gradients of very unequal
    sizes."""
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.3, "ns_steps": 5}
    ours, theirs = (torch.nn.Parameter(randn(*shape, seed=99)) for _ in range(2))
    optimizers = Muon([ours], dtype=dtype, **settings), torch.optim.Muon([theirs], **settings)
    for step in range(steps):
        grad = randn(*shape, seed=step) * 10.0 ** (step % 3 - 3)
        before = []
        for p, optimizer in zip((ours, theirs), optimizers, strict=False):
            p.grad = grad.clone()
            before.append(p.detach().clone())
            optimizer.step()
        yield ours.detach() - before[0], theirs.detach() - before[1]


def relative(a, b) -> float:
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------------------------------------------
# Muon


@shapes
def test_muon_equals_torch_muon_in_float32(shape, monkeypatch):
    """Torch's Newton-Schulz casts to bf16, which hides small mistakes; with that cast taken out
    only rounding may remain."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    for ours, theirs in run_beside_torch(shape, torch.float32):
        assert relative(ours, theirs) < 1e-4


@shapes
def test_muon_equals_torch_muon_in_bfloat16(shape):
    """The real torch.optim.Muon. bf16 keeps 8 bits (0.4 %) and each of 15 products rounds in
    another order: some per cent."""
    errors = [relative(ours, theirs) for ours, theirs in run_beside_torch(shape, torch.bfloat16)]
    assert max(errors) < 0.06


@pytest.mark.parametrize(
    "wrong",
    [{"ns_steps": 4}, {"momentum": 0.6}, {"lr": 0.022}, {"weight_decay": 0.0}],
    ids=lambda d: next(iter(d)),
)
def test_the_bfloat16_tolerance_would_notice_a_wrong_setting(wrong):
    """A tolerance of some per cent is only worth something if a wrong coefficient lies outside of
    it."""
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
    """Experts are stacks (E, m, n); each must be orthogonalised by itself, not as part of one large
    matrix."""
    stack = torch.nn.Parameter(randn(3, *shape, seed=1))
    single = [torch.nn.Parameter(stack[i].detach().clone()) for i in range(3)]
    one, three = Muon([stack], weight_decay=0.1), Muon(single, weight_decay=0.1)
    for step in range(3):
        stack.grad = randn(3, *shape, seed=10 + step) * torch.tensor([1.0, 100.0, 0.01]).view(
            3, 1, 1
        )
        for p, grad in zip(single, stack.grad, strict=False):
            p.grad = grad.clone()
        one.step(), three.step()
    torch.testing.assert_close(
        stack.detach(), torch.stack([p.detach() for p in single]), rtol=0, atol=1e-5
    )


def test_updates_of_parameters_of_one_shape_do_not_mix():
    """Equal shapes share one batched call: each must get its own rows of the answer, also between a
    matrix and a stack."""
    shapes = [(16, 24), (2, 16, 24), (16, 24), (24, 16), (3, 16, 24)]
    together = [torch.nn.Parameter(randn(*s, seed=i)) for i, s in enumerate(shapes)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [Muon(together), *(Muon([p]) for p in alone)]
    for step in range(2):
        for i, (p, q) in enumerate(zip(together, alone, strict=False)):
            p.grad = randn(*shapes[i], seed=50 + 10 * step + i)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for i, (p, q) in enumerate(zip(together, alone, strict=False)):
        torch.testing.assert_close(
            p.detach(),
            q.detach(),
            rtol=0,
            atol=1e-5,
            msg=lambda text, i=i: f"parameter {i}: {text}",
        )


def test_a_parameter_without_gradient_is_left_alone():
    """An expert layer or head that a step did not use must not drift by weight decay or old
    momentum."""
    p, q = torch.nn.Parameter(randn(8, 8)), torch.nn.Parameter(randn(8, 8, seed=1))
    optimizer = Muon([p, q], weight_decay=0.5)
    p.grad, before = randn(8, 8, seed=2), q.detach().clone()
    optimizer.step()
    assert torch.equal(q, before) and q not in optimizer.state


@pytest.mark.parametrize("rows, columns", [(48, 48), (32, 96), (96, 32), (128, 120)])
def test_orthogonalized_singular_values_are_near_one(rows, columns):
    """The update must move every direction of the matrix about as far, whatever the spread in the
    gradient (here 30 x)."""
    muon, n = Muon([torch.nn.Parameter(torch.zeros(1, 1))]), min(rows, columns)
    u, v = torch.linalg.qr(randn(rows, n))[0], torch.linalg.qr(randn(columns, n, seed=1))[0]
    for scale in (1e-4, 1.0, 1e4):
        found = torch.linalg.svdvals(
            muon.orthogonalize(scale * (u * torch.logspace(-1.5, 0, n)) @ v.T[None], 5)
        )
        assert found.min() > 0.6 and found.max() < 1.3, (scale, found.min(), found.max())


def test_orthogonalization_keeps_the_direction_of_the_gradient():
    """Singular values near one say nothing of the singular vectors: U V^T must come from the
    gradient's own U and V."""
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


def test_muon_chooses_float32_on_a_cpu():
    """bf16 without bf16 units costs 16 times as much: on a CPU the default is float32."""
    assert (
        Muon([torch.nn.Parameter(randn(4, 4))]).orthogonalize(randn(1, 4, 4), 5).dtype
        == torch.float32
    )


@pytest.mark.parametrize("n", [1, 4, 5])
def test_every_rank_orthogonalizes_its_share_alone(monkeypatch, n):
    """Three ranks' shares, in their order, are what one rank makes of all matrices."""
    g, muon = randn(n, 6, 4), Muon([torch.zeros(6, 4)])
    want, shares = muon.orthogonalize(g, 5), []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "all_gather_into_tensor", lambda out, part: shares.append(part))
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        muon.shared_out(g, 5)
    assert [len(share) for share in shares] == [-(-n // 3)] * 3
    torch.testing.assert_close(torch.cat(shares)[:n], want)
