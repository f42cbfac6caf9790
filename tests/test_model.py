"""Properties of model.py. Most run in float64, where a fast path equals plain maths to 1e-10."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
from configurator import UserError
from fast import attention as attention_kernels
from fast import loss
from fast.attention import Mask, dense, kernel_for, one_query
from fast.cpu import FusedRMSNorm, linear
from fast.loss import LinearCrossEntropy
from inference.cache import KVCache
from model import (
    GPT,
    ModelConfig,
    MoE,
    RMSNorm,
    SwiGLU,
    attention,
    attention_weights,
    rotary_angles,
    rotate,
    training_mask,
)
from runtime.budget import flops_per_token

CPU = torch.device("cpu")
VARIANTS = {  # fields over the tiny model below; every feature alone and all at once
    "dense": {"sinks": False},
    "sinks": {},
    "gqa": {"n_kv_head": 2},
    "mqa": {"n_kv_head": 1, "sinks": False},
    "window": {"sliding_window": 4},
    "no_qk_norm": {"qk_norm": False},
    "untied": {"tied": False},
    "moe": {"n_expert": 4},
    "all": {"n_kv_head": 2, "sliding_window": 4, "n_expert": 4, "tied": False},
}
variants = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())


CAUSAL, ALL = Mask(causal=True), Mask()


def attention_reference(q, k, v, sinks=None, mask=CAUSAL):
    """The definition in plain maths, which every kernel is held to."""
    weights = attention_weights(q, k, sinks, mask)[..., : k.size(2)]
    return weights @ v.repeat_interleave(q.size(1) // v.size(1), dim=1)


def config(**fields) -> ModelConfig:
    return ModelConfig(
        **{"vocab_size": 50, "seq_len": 16, "n_layer": 2, "n_head": 4, "d_model": 32, "d_ff": 48}
        | fields
    )


def tiny(seed: int = 0, dtype=torch.float64, **fields) -> GPT:
    """A tiny model with every parameter random: at initialisation the output projections are zero
    and hide mistakes."""
    model, random = GPT(config(**fields)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = 0.3 * torch.randn(p.shape, generator=random)
            p.copy_(1 + noise if "norm" in name else 3 * noise if "sinks" in name else noise)
    return model.to(dtype).eval()


def ids(*shape, seed: int = 1, vocab: int = 50) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape, seed: int = 2, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(a, b, tol: float = 1e-10):
    torch.testing.assert_close(a, b, atol=tol, rtol=tol)


def grads(y, inputs, seed: int = 3):
    """Gradients of y under a random cotangent, so that no entry of y is left out or cancels."""
    return torch.autograd.grad((y * randn(*y.shape, seed=seed, dtype=y.dtype)).sum(), inputs)


def tolerance(fields, tight: float = 1e-10) -> float:
    return 1e-5 if fields.get("n_expert") else tight  # the router's scores are float32 in any model


# ------------------------------------------------------------------------------------------------
# Causality, documents, windows


@variants
@pytest.mark.parametrize("docs", [None, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]], ids=["one_doc", "docs"])
def test_no_logit_depends_on_a_later_token_or_another_document(fields, docs):
    """Gradients see every path; training on the future, or on a packed neighbour, would look like a
    very good loss."""
    model, T = tiny(**fields), 10
    embedded = []
    model.embed.register_forward_hook(lambda module, args, out: embedded.append(out))
    docs_t = None if docs is None else torch.tensor([docs])
    logits = model(ids(1, T), docs=docs_t)
    for t in range(T):
        reach = (
            torch.autograd.grad(logits[0, t].sum(), embedded[0], retain_graph=True)[0][0]
            .abs()
            .amax(-1)
        )  # (T,)
        same = torch.tensor([s <= t and (docs is None or docs[s] == docs[t]) for s in range(T)])
        assert (reach[~same] == 0).all(), (
            f"logits[{t}] depend on {(reach * ~same).nonzero().flatten().tolist()}"
        )
        near = same & (torch.arange(T) > t - (model.cfg.sliding_window or T))
        assert (reach[near] > 0).all(), (
            f"logits[{t}] do not see {(near & (reach == 0)).nonzero().flatten().tolist()}"
        )


@variants
def test_packed_documents_give_the_hidden_states_of_separate_ones(fields):
    """Packing is an optimisation: document mask and relative positions make it invisible to the
    model."""
    model, lengths = tiny(**fields), (3, 1, 6, 5)
    idx = ids(1, sum(lengths))
    docs = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    separate = torch.cat([model.hidden(part) for part in idx.split(lengths, dim=1)], dim=1)
    close(model.hidden(idx, docs), separate, tolerance(fields))


def test_documents_are_masked_per_row():
    """Two rows with different borders: a mask that is broadcast from row 0 would
    pass with one row."""
    model, idx = tiny(), ids(2, 8)
    docs = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1]])
    packed = model.hidden(idx, docs)
    for row, border in enumerate((3, 6)):
        close(packed[row, border:], model.hidden(idx[row : row + 1, border:])[0])


def test_training_mask_of_documents_and_window_is_this_array():
    """A mask small enough to check by eye: row = query, column = key, 1 = seen."""
    assert training_mask(None, None, 5, CPU) == training_mask(None, 5, 5, CPU) == CAUSAL
    window = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert (training_mask(None, 2, 5, CPU).bias[0, 0] == 0).int().tolist() == window
    both = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert (
        training_mask(torch.tensor([[7, 7, 7, 4, 4]]), 2, 5, CPU).bias[0, 0] == 0
    ).int().tolist() == both


@pytest.mark.parametrize("sinks", [True, False])
def test_a_token_outside_the_window_changes_nothing(sinks):
    """sliding_window counts the query itself: with window 4 and one layer, token t sees t-3 .. t
    and not t-4."""
    model, idx, at = tiny(n_layer=1, sliding_window=4, sinks=sinks), ids(1, 12), 2
    changed = idx.clone()
    changed[0, at] = (idx[0, at] + 1) % 50
    differs = (model.hidden(idx) != model.hidden(changed))[0].any(-1)
    assert differs.nonzero().flatten().tolist() == [at, at + 1, at + 2, at + 3]


# ------------------------------------------------------------------------------------------------
# Norm and rotary positions


def test_rmsnorm_is_x_over_its_root_mean_square():
    """The formula of arXiv 1910.07467 written out, eps included."""
    norm, x = RMSNorm(8, 1e-6).double(), randn(3, 8)
    with torch.no_grad():
        norm.weight.copy_(randn(8, seed=4))
    close(norm(x), x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight)


@pytest.mark.parametrize("dtype,tol", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_fused_rmsnorm_equals_torchs_in_value_and_gradients(dtype, tol):
    """On a slice too, as queries and keys are; rows of tiny values show the eps."""
    inputs = [
        (
            randn(3, 5, 6, 8).to(dtype) * torch.tensor([1.0, 1e-4, 50.0]).view(3, 1, 1, 1)
        ).requires_grad_(),
        randn(8, seed=4).to(dtype).requires_grad_(),
    ]
    dout = randn(3, 5, 2, 8, seed=5).to(dtype)
    ours, theirs = (
        f(inputs[0][:, :, 2:4], inputs[1])
        for f in (
            lambda x, w: FusedRMSNorm.apply(x, w, 1e-6),
            lambda x, w: F.rms_norm(x, (8,), w, eps=1e-6),
        )
    )
    close(ours, theirs, tol)
    for got, wanted in zip(
        torch.autograd.grad(ours, inputs, dout),
        torch.autograd.grad(theirs, inputs, dout),
        strict=False,
    ):
        close(got / wanted.abs().max(), wanted / wanted.abs().max(), tol)


@pytest.mark.parametrize("d_out", [24, 8, 13, 1])
@pytest.mark.parametrize(
    "shape", [(1, 6), (1, 1, 6), (2, 1, 6), (8, 1, 6), (9, 6), (0, 6), (2, 5, 6)]
)
def test_products_of_few_rows_are_those_of_many(shape, d_out):
    """Generation takes another way through the same product, for any number of
    rows and any width."""
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(d_out, 6, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(linear(x, weight), F.linear(x, weight)) and linear(
            x, weight
        ).shape == (*shape[:-1], d_out)
        assert linear(x, weight).is_contiguous()


def test_values_do_not_depend_on_whether_gradients_are_taken():
    """Training and evaluation go through different functions (fused, split, plain), which must be
    the same model."""
    model = tiny(n_kv_head=2)
    for shape in ((2, 12), (1, 7), (1, 1)):  # many rows, and the few of a short text
        with torch.no_grad():
            without = model(ids(*shape))
        close(model(ids(*shape)), without)


@pytest.mark.parametrize("sinks", [True, False])
def test_a_single_query_without_mask_sees_every_key(sinks):
    """The step of generation: one query at the end of the cache, for which "causal" means
    everything."""
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    s = torch.randn(4) if sinks else None
    everything = attention_reference(q, k, v, s, Mask(bias=torch.zeros(1, 1, 1, 7)))
    for mask in (CAUSAL, ALL):
        assert torch.allclose(attention_reference(q, k, v, s, mask), everything, atol=1e-6)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for mask in (CAUSAL, ALL):
                got = attention(q.requires_grad_(grad), k, v, s, mask)
                assert torch.allclose(got, everything, atol=1e-6)


@pytest.mark.parametrize("H, K", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_query_in_16_bits_errs_by_rounding_alone(monkeypatch, H, K, dtype):
    """Left pads and a cache that is not all in use, as in generation; float64 is the measure."""
    monkeypatch.setattr(fast, "ENABLED", True)
    q, store = randn(5, H, 1, 32), randn(2, 5, K, 90, 32, seed=5)
    q, (k, v) = q.to(dtype), store.to(dtype)[:, :, :, :70]
    pads = torch.arange(70) < torch.arange(5).view(5, 1, 1, 1)
    bias = torch.zeros(5, 1, 1, 70).masked_fill(pads, -math.inf)
    for mask in (CAUSAL, ALL, Mask(bias=bias)):
        want = attention_reference(q.double(), k.double(), v.double(), mask=mask)
        assert kernel_for(q, k, None, mask) is one_query
        got = attention(q, k, v, None, mask)
        error = (got.double() - want).abs().mean() / want.abs().mean()
        assert got.dtype == dtype and error < torch.finfo(dtype).eps
    assert kernel_for(q.float(), k.float(), None, ALL) is dense


@pytest.mark.parametrize("shift", [1, 1000, 1_000_000])
def test_rope_scores_depend_on_relative_positions_only(shift):
    """Packing, left padding and the rolling cache all shift positions and rely on it, however far a
    stream has run."""
    q, k, pos = randn(1, 9, 2, 16), randn(1, 9, 2, 16, seed=5), torch.arange(9)

    def scores(pos):
        cos, sin = rotary_angles(pos, 16, 10000.0, torch.float64)
        return torch.einsum("bthd,bshd->bhts", rotate(q, cos, sin), rotate(k, cos, sin))

    close(scores(pos + shift), scores(pos), 1e-8)
    assert not torch.allclose(scores(pos), scores(torch.zeros_like(pos)), atol=0.1), (
        "positions have no effect at all"
    )


def test_rope_keeps_norms():
    """A rotation; a wrong pairing of cos and sin is none, and this is how the original system's
    defect shows."""
    x = randn(2, 50, 3, 16)
    y = rotate(x, *rotary_angles(torch.arange(50), 16, 10000.0, torch.float64))
    close(y.norm(dim=-1), x.norm(dim=-1))
    close(y[:, 0], x[:, 0])


def test_rope_turns_the_pair_i_and_i_plus_half_by_position_times_frequency():
    """The half-split layout of transformers, by hand for D = 4, position 3, base 100: frequencies 1
    and 1/10."""
    y = rotate(
        torch.tensor([[[[1.0, 2.0, 5.0, 7.0]]]]),
        *rotary_angles(torch.tensor([3]), 4, 100.0, torch.float32),
    )
    want = [
        math.cos(3) - 5 * math.sin(3),
        2 * math.cos(0.3) - 7 * math.sin(0.3),
        5 * math.cos(3) + math.sin(3),
        7 * math.cos(0.3) + 2 * math.sin(0.3),
    ]
    close(y.flatten(), torch.tensor(want), 1e-5)


# ------------------------------------------------------------------------------------------------
# Attention: fast paths against the plain maths


def test_attention_reference_is_this_loop():
    """The definition itself, once more in scalars: the sink takes probability and
    gives no value."""
    q, k, v, s = (
        randn(1, 2, 3, 4),
        randn(1, 1, 3, 4, seed=5),
        randn(1, 1, 3, 4, seed=6),
        [0.5, -1.0],
    )
    got = attention_reference(q, k, v, torch.tensor(s, dtype=torch.float64))
    for h in range(2):
        for t in range(3):
            e = [math.exp(float(q[0, h, t] @ k[0, 0, j]) / 2) for j in range(t + 1)]
            close(
                got[0, h, t],
                sum(w * v[0, 0, j] for j, w in enumerate(e)) / (sum(e) + math.exp(s[h])),
            )


MASKS = {
    "causal": lambda B, T: CAUSAL,
    "docs": lambda B, T: training_mask((torch.arange(T) // 3).expand(B, T), None, T, CPU),
    "window": lambda B, T: training_mask(None, 3, T, CPU),
    "docs_window": lambda B, T: training_mask((torch.arange(T) // 5).expand(B, T), 3, T, CPU),
}


@pytest.mark.parametrize(
    "dtype, tol", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "no_sinks"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("H, K", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("T, D", [(1, 8), (7, 2), (40, 16)])
def test_every_fast_path_equals_the_reference_in_value_and_gradient(
    dtype, tol, sinks, mask, H, K, T, D
):
    """FlashSinks' backward is our own derivation, and a wrong gradient still trains, only worse."""
    q, k, v = (
        randn(2, H, T, D, dtype=dtype),
        randn(2, K, T, D, seed=5, dtype=dtype),
        randn(2, K, T, D, seed=6, dtype=dtype),
    )
    inputs = [q, k, v] + ([randn(H, seed=7, dtype=dtype)] if sinks else [])
    for x in inputs:
        x.requires_grad_()
    mask = mask(2, T)
    ours = attention(q, k, v, inputs[3] if sinks else None, mask)
    slow = attention_reference(*inputs, mask=mask)
    assert ours.dtype == dtype
    close(ours, slow.to(dtype), tol)
    for a, b in zip(grads(ours, inputs), grads(slow.to(dtype), inputs), strict=False):
        close(a, b, tol)


@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "no_sinks"])
def test_documents_one_by_one_are_documents_under_a_mask(monkeypatch, sinks):
    """Long rows on a CPU: value and gradient, grouped heads, padding, a whole row of one document.

    Documents of the same number in neighbouring rows are not one.
    """
    docs = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [2, 2, 3, 3, 3, -1, -1, -1], [0] * 8])
    model, found = tiny(n_kv_head=2, sinks=sinks), []
    for least in (4, 100):
        monkeypatch.setattr(attention_kernels, "LONG", least)
        mask = training_mask(docs, None, 8, CPU)
        assert (mask.lengths == [3, 4, 1, 2, 3, 3, 8]) == (fast.ENABLED and least == 4)
        loss = model.nll(model.hidden(ids(3, 8), docs), ids(3, 8, seed=9))
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for one_by_one, masked in zip(*found, strict=True):
        close(one_by_one, masked, 1e-9)


def test_a_sink_at_minus_infinity_is_no_sink():
    """exp(-inf) = 0: such a model must be the sinkless one, in the definition and
    on the fast path."""
    q, k, v = randn(1, 4, 6, 8), randn(1, 2, 6, 8, seed=5), randn(1, 2, 6, 8, seed=6)
    without = attention_reference(q, k, v)
    close(attention_reference(q, k, v, torch.full((4,), -math.inf, dtype=torch.float64)), without)
    close(attention(q, k, v, torch.full((4,), -1e30, dtype=torch.float64), CAUSAL), without)
    model, plain = tiny(), tiny(sinks=False)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.sinks.fill_(-1e30)
    plain.load_state_dict(
        {name: p for name, p in model.state_dict().items() if "sinks" not in name}
    )
    close(model(ids(2, 9)), plain(ids(2, 9)))


def test_a_large_sink_silences_its_head():
    """The other end: exp(30) against scores near 1 takes all probability, and only in the head it
    belongs to."""
    y = attention(
        randn(1, 2, 5, 8),
        randn(1, 2, 5, 8, seed=5),
        randn(1, 2, 5, 8, seed=6),
        torch.tensor([60.0, 0.0]).double(),
        CAUSAL,
    )
    assert y[:, 0].abs().max() < 1e-10 and y[:, 1].abs().min() > 0


def test_mha_is_gqa_with_one_key_head_per_query_head():
    """n_kv_head = n_head must be plain multi-head attention, here written with
    torch's own kernel."""
    model = tiny(n_layer=1, sinks=False, qk_norm=False)
    attn, x, T = model.blocks[0].attn, randn(2, 7, 32), 7
    cos, sin = rotary_angles(torch.arange(T), 8, 10000.0, torch.float64)
    q, k, v = (F.linear(x, w).view(2, T, 4, 8) for w in attn.qkv.weight.chunk(3))
    y = F.scaled_dot_product_attention(
        rotate(q, cos, sin).transpose(1, 2),
        rotate(k, cos, sin).transpose(1, 2),
        v.transpose(1, 2),
        is_causal=True,
    )
    close(
        attn(x, cos, sin, CAUSAL, None),
        F.linear(y.transpose(1, 2).reshape(2, T, 32), attn.out.weight),
    )


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "no_sinks"])
def test_gqa_equals_mha_with_repeated_key_and_value_heads(K, sinks):
    """Query head h reads key head h // (H / K): the grouping that converts to transformers."""
    gqa, mha = tiny(n_kv_head=K, sinks=sinks), tiny(sinks=sinks)
    state = gqa.state_dict()
    for name, w in state.items():
        if "qkv" in name:
            q, k, v = w.view(4 + 2 * K, 8, 32).split((4, K, K))
            state[name] = torch.cat(
                (q, k.repeat_interleave(4 // K, 0), v.repeat_interleave(4 // K, 0))
            ).view(96, 32)
    mha.load_state_dict(state)
    close(gqa(ids(2, 9)), mha(ids(2, 9)))


@torch.no_grad()
def cached(model, idx, slots, pieces):
    """Hidden states of idx fed to a cache in pieces of these lengths."""
    cache = KVCache(model.cfg, len(idx), slots, CPU, model.embed.weight.dtype)
    return torch.cat(
        [model.hidden(piece, cache=cache) for piece in idx.split(pieces, dim=1)], dim=1
    )


@variants
@pytest.mark.parametrize(
    "pieces",
    [[1] * 12, [12], [7, 1, 1, 1, 1, 1], [3, 5, 1, 3]],
    ids=["tokens", "once", "prefill", "chunks"],
)
def test_cached_decoding_equals_the_full_forward_pass(fields, pieces):
    """However the text is cut, a cache may save time but not change a hidden state; a token sees
    the same keys."""
    model, idx = tiny(**fields), ids(2, 12)
    close(cached(model, idx, 16, pieces), model.hidden(idx), tolerance(fields))


@pytest.mark.parametrize(
    "fields",
    [{}, {"sinks": False, "n_kv_head": 2}, {"n_expert": 4}, {"sliding_window": 3}],
    ids=["sinks", "gqa", "moe", "window"],
)
@pytest.mark.parametrize("n_layer", [1, 3])
def test_a_rolling_cache_is_a_sliding_window_of_its_slots(fields, n_layer):
    """A key of layer 2 was computed when its token was fed, from the window of that moment: the
    same keys in both, so they agree in every layer, also where a stack of windows reaches
    further back than one."""
    slots, idx = 5, ids(2, 18)
    model = tiny(n_layer=n_layer, **fields)
    window = tiny(n_layer=n_layer, **{"sliding_window": slots} | fields)
    rolled = cached(model, idx, slots, [4] + [1] * 14)
    close(rolled, window.hidden(idx), tolerance(fields))
    if "sliding_window" not in fields:
        assert not torch.allclose(rolled, model.hidden(idx), atol=1e-3), "the cache did not roll"


def test_cache_memory_does_not_grow_with_the_text():
    """Streaming is constant in memory: 50 tokens through 5 slots store 5."""
    model = tiny(n_layer=1)
    cache = KVCache(model.cfg, 1, 5, CPU, torch.float64)
    for t in range(50):
        model.hidden(ids(1, 1, seed=t), cache=cache)
    assert cache.k.shape == cache.v.shape == (1, 1, 4, 5, 8)
    assert sorted(cache.pos.tolist()) == [45, 46, 47, 48, 49]


# ------------------------------------------------------------------------------------------------
# Loss


@pytest.mark.parametrize(
    "fields",
    [{}, {"tied": False}, {"n_expert": 4}, {"n_expert": 4, "tied": False}],
    ids=["tied", "untied", "moe", "moe_untied"],
)
@pytest.mark.parametrize("d_model", [64, 512])
def test_the_initial_loss_is_near_the_log_of_the_vocabulary(fields, d_model):
    """A fresh model knows nothing: more than ln V means that the initialisation is confidently
    wrong."""
    torch.manual_seed(0)
    model = GPT(
        ModelConfig(
            vocab_size=262, seq_len=32, n_layer=2, n_head=4, d_model=d_model, d_ff=128, **fields
        )
    )
    with torch.no_grad():
        nll = model(ids(8, 32, vocab=262), ids(8, 32, seed=9, vocab=262)) / 256
    assert abs(nll - math.log(262)) < 0.3


@pytest.mark.parametrize("n_rows", [1, 3, 7, 12])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_linear_cross_entropy_equals_torch_in_value_and_gradients(monkeypatch, n_rows, ignored):
    """It takes its gradients in the forward pass, in chunks: three rows each here, the last one
    short."""
    monkeypatch.setattr(loss, "row_chunks", lambda n_rows, n_columns, device: 3)
    x, w, target = randn(n_rows, 8), randn(20, 8, seed=5), ids(n_rows, vocab=17)
    target[{"none": slice(0, 0), "some": slice(1, None, 2), "all": slice(None)}[ignored]] = -1
    x.requires_grad_(), w.requires_grad_()
    ours = LinearCrossEntropy.apply(x, w, target, 17)
    torchs = F.cross_entropy(x @ w[:17].T, target, ignore_index=-1, reduction="sum")
    close(ours, torchs)
    for a, b in zip(
        torch.autograd.grad(2.5 * ours, (x, w)),
        torch.autograd.grad(2.5 * torchs, (x, w)),
        strict=False,
    ):
        close(a, b)


def test_linear_cross_entropy_chunks_keep_to_their_size():
    """The memory it exists for: a chunk of float32 logits stays near 32 MB, and never below one
    row."""
    assert 30e6 < 4 * loss.row_chunks(10**6, 50304, CPU) * 50304 <= 34e6
    assert loss.row_chunks(5, 128, CPU) == 5 and loss.row_chunks(5, 10**9, CPU) == 1


def test_linear_cross_entropy_needs_no_gradient_to_be_asked_for():
    """Validation runs under no_grad, and a frozen head is allowed."""
    x, w, target = randn(5, 8), randn(20, 8, seed=5), ids(5, vocab=20)
    want = F.cross_entropy(x @ w.T, target, reduction="sum")
    close(LinearCrossEntropy.apply(x, w, target, 20), want)
    x.requires_grad_()
    close(
        torch.autograd.grad(LinearCrossEntropy.apply(x, w, target, 20), x)[0],
        torch.autograd.grad(F.cross_entropy(x @ w.T, target, reduction="sum"), x)[0],
    )


def test_padded_rows_of_the_head_get_no_gradient():
    """Else the optimizer would move them, and they would take probability from real tokens."""
    model = tiny(tied=False, vocab_size=50)
    model(ids(2, 8), ids(2, 8, seed=9)).backward()
    assert (model.head.weight.grad[50:] == 0).all() and (model.head.weight.grad[:50] != 0).any(
        -1
    ).all()


@variants
def test_the_loss_is_the_summed_cross_entropy_of_the_logits(fields):
    """The chunked loss against the logits that sampling uses; targets below 0 do not count."""
    model, idx, targets = tiny(**fields), ids(2, 9), ids(2, 9, seed=9)
    targets[0, :4] = -1
    want = F.cross_entropy(
        model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum"
    )
    close(model(idx, targets), want.double(), 1e-5)  # logits are float32


def test_a_batch_without_supervised_tokens_has_loss_zero_and_gradient_zero():
    """A micro-batch of prompts only is legal where the whole batch has targets; it must add
    nothing, not fail."""
    model = tiny()
    loss = model(ids(2, 6), torch.full((2, 6), -1))
    loss.backward()
    assert loss == 0 and all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_logprobs_equal_a_gathered_log_softmax_in_value_and_gradients(monkeypatch, chunk):
    """DPO and the evaluation read them; ignored positions are 0 and pass no gradient."""
    monkeypatch.setattr(loss, "row_chunks", lambda n_rows, n_columns, device: chunk)
    model, x, targets = tiny(tied=False), randn(2, 6, 32), ids(2, 6, seed=9)
    targets[0, 2:4] = -1
    x.requires_grad_()
    ours = model.logprobs(x, targets)
    logits = x @ model.head.weight[:50].T
    plain = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (
        targets >= 0
    )
    close(ours, plain)
    for a, b in zip(
        grads(ours, (x, model.head.weight)), grads(plain, (x, model.head.weight)), strict=False
    ):
        close(a, b)
    assert (ours[0, 2:4] == 0).all()


# ------------------------------------------------------------------------------------------------
# Mixture of experts


def moe(dtype=torch.float64, **fields) -> MoE:
    return tiny(dtype=dtype, **{"n_layer": 1, "n_expert": 4} | fields).blocks[0].mlp


def moe_loop(moe: MoE, x):
    """The same maths token by token and expert by expert."""
    rows = []
    for token in x.flatten(0, -2):
        scores = torch.sigmoid((moe.router.weight @ token).float())
        chosen = scores.argsort(descending=True)[: moe.n_active]
        y = 0
        for e in chosen:
            gate, up = (moe.gate_up[e] @ token).chunk(2)
            y = y + (scores[e] / scores[chosen].sum()).to(x.dtype) * (
                moe.down[e] @ (F.silu(gate) * up)
            )
        rows.append(y if moe.shared is None else y + moe.shared(token))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize(
    "path, dtype", [("grouped", torch.float32), ("split", torch.float32), ("split", torch.float64)]
)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_expert_active": 1},
        {"shared_expert": False},
        {"n_expert": 9, "n_expert_active": 3, "d_expert": 8},
    ],
    ids=["top2", "top1", "no_shared", "many"],
)
def test_moe_equals_a_loop_over_tokens_and_experts(monkeypatch, path, dtype, fields):
    """Sorting by expert and scattering back is easy to get wrong for one token in a hundred."""
    calls = []
    if path == "grouped":
        monkeypatch.setattr(fast, "ENABLED", True)
        if not hasattr(F, "grouped_mm"):
            pytest.skip("this torch has no grouped_mm")
        grouped_mm = F.grouped_mm
        monkeypatch.setattr(
            F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or grouped_mm(*args, **kwargs)
        )
    else:
        monkeypatch.delattr(F, "grouped_mm", raising=False)
    layer, x = moe(dtype, **fields), randn(2, 9, 32, dtype=dtype)
    x.requires_grad_()
    ours, loop = layer(x), moe_loop(layer, x)
    assert len(calls) == (2 if path == "grouped" else 0)
    tol = 2e-5 if dtype == torch.float32 else 1e-6  # router scores are float32 in both
    close(ours, loop, tol)
    inputs = [x, *layer.parameters()]
    for a, b in zip(grads(ours, inputs), grads(loop, inputs), strict=False):
        close(a, b, 5 * tol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moe_of_one_expert_is_swiglu(dtype):
    """One expert has the whole weight, whatever its score: value, gradients, and no gradient for
    the router."""
    layer, x = (
        moe(dtype, n_expert=1, n_expert_active=1, shared_expert=False, d_expert=16),
        randn(2, 5, 32, dtype=dtype),
    )
    dense = SwiGLU(32, 16).to(dtype)
    with torch.no_grad():
        dense.gate_up.weight.copy_(layer.gate_up[0])
        dense.down.weight.copy_(layer.down[0])
    x.requires_grad_()
    tol = 1e-5 if dtype == torch.float32 else 1e-10
    ours, plain = layer(x), dense(x)
    close(ours, plain, tol)
    mine = grads(ours, (x, layer.gate_up, layer.down, layer.router.weight))
    for a, b in zip(mine, grads(plain, (x, dense.gate_up.weight, dense.down.weight)), strict=False):
        close(
            a.view_as(b), b, max(tol, 1e-5)
        )  # s / s passes the float32 rounding of a gradient 0 on to x
    assert mine[3].abs().max() < 1e-4


def test_moe_runs_when_an_expert_gets_no_token():
    """Fewer tokens than experts is every decoding step; unused experts get gradient zero, not
    garbage."""
    layer, x = moe(torch.float32, n_expert=8), randn(1, 1, 32, dtype=torch.float32)
    y = layer(x)
    close(y, moe_loop(layer, x), 2e-5)
    gradient = grads(y, (layer.gate_up,))[0]
    assert (gradient.abs().amax((1, 2)) > 0).sum() == 2 and gradient.isfinite().all()


@pytest.mark.parametrize(
    "fields", [{"d_expert": 6}, {"n_expert_active": 3, "d_ff": 64}], ids=["given", "derived"]
)
def test_moe_runs_with_any_expert_width(fields):
    """grouped_mm wants rows of whole 16 bytes, and d_ff // n_expert_active is often none (64 // 3 =
    21)."""
    layer, x = moe(torch.float32, **fields), randn(2, 9, 32, dtype=torch.float32)
    close(layer(x), moe_loop(layer, x), 2e-5)


def balance(layer: MoE, docs=None) -> torch.Tensor:
    """Return the balance loss of one layer after its last pass, with a coefficient of 1."""
    cfg = SimpleNamespace(n_expert=layer.n_expert, balance_coef=1.0)
    model = SimpleNamespace(cfg=cfg, blocks=[SimpleNamespace(mlp=layer)])
    return GPT.balance_loss(model, docs)


def test_balance_loss_is_one_when_routing_is_even():
    """By hand: one-hot tokens, a router of c * identity, every expert the same count and score
    share."""
    layer = moe(n_expert=4, n_expert_active=1, d_model=4, n_head=1, d_head=4)
    with torch.no_grad():
        layer.router.weight.copy_(3 * torch.eye(4))
    layer(torch.eye(4, dtype=torch.float64).repeat(5, 1))
    assert abs(balance(layer).item() - 1) < 1e-6
    layer(
        torch.eye(4, dtype=torch.float64)[[0]].repeat(20, 1)
    )  # all to expert 0, whose share is s(3) / (s(3) + 3 s(0))
    s3 = 1 / (1 + math.exp(-3))
    assert abs(balance(layer).item() - 4 * s3 / (s3 + 1.5)) < 1e-6


def test_balance_loss_spreads_the_tokens():
    """What it is for: a router that sends most tokens to one expert learns to use
    all four alike."""
    layer, x = (
        moe(torch.float32, n_expert=4, n_expert_active=1, d_expert=4),
        randn(256, 32, dtype=torch.float32),
    )
    x[:, 0] = 2.0
    with torch.no_grad():
        layer.router.weight.mul_(0.3)
        layer.router.weight[:, 0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    optimizer = torch.optim.Adam([layer.router.weight], lr=0.02)

    def largest_share():
        return (layer.router(x).argmax(-1).bincount(minlength=4) / len(x)).max()

    before = largest_share()
    for _ in range(200):
        optimizer.zero_grad()
        layer(x)
        balance(layer).backward()
        optimizer.step()
    assert before > 0.7 and largest_share() < 0.35


def test_balance_loss_of_the_model_is_the_mean_over_layers_times_its_coefficient():
    """And a dense model has none, so that train.py may add it without asking."""
    model = tiny(n_expert=4, balance_coef=0.5)
    model(ids(2, 8))
    close(
        model.balance_loss(),
        0.5 * (balance(model.blocks[0].mlp) + balance(model.blocks[1].mlp)) / 2,
    )
    assert tiny().balance_loss() == 0


@pytest.mark.parametrize("fields", [{}, {"n_expert_active": 1}, {"n_expert": 9, "d_expert": 8}])
def test_balance_loss_is_the_switch_formula(fields):
    """E sum_e f_e P_e, by loops: f_e the share of the choices, P_e the mean share of the scores."""
    layer, x = moe(torch.float32, **fields), randn(3, 7, 32, dtype=torch.float32)
    layer(x)
    choices, shares = torch.zeros(layer.n_expert), torch.zeros(layer.n_expert)
    for token in x.flatten(0, 1):
        scores = torch.sigmoid(layer.router(token))
        choices[scores.topk(layer.n_active).indices] += 1
        shares += scores / scores.sum()
    wanted = layer.n_expert * (choices / choices.sum() * shares / 21).sum()
    close(balance(layer), wanted, 1e-6)


@settings(deadline=None, max_examples=20)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_padding_has_no_part_in_the_balance_of_experts(lengths, seed):
    """Loss and gradient of the router are those of the real tokens alone, wherever padding is."""
    layer = moe(torch.float32)
    rows = [randn(n, 32, seed=seed + i, dtype=torch.float32) for i, n in enumerate(lengths)]
    docs = torch.full((len(rows), 9), -1)
    x = 3 * randn(1, 1, 32, seed=77, dtype=torch.float32).repeat(len(rows), 9, 1)  # one pad id
    for i, row in enumerate(rows):
        x[i, 9 - len(row) - i % 2 : 9 - i % 2] = row
        docs[i, 9 - len(row) - i % 2 : 9 - i % 2] = i
    layer(x)
    loss = balance(layer, docs)
    found = torch.autograd.grad(loss, layer.router.weight)[0]
    assert loss.isfinite() and found.isfinite().all()
    if not sum(lengths):
        assert loss == 0
        return
    layer(torch.cat(rows))
    alone = balance(layer)
    close(loss, alone, 1e-5)
    close(found, torch.autograd.grad(alone, layer.router.weight)[0], 1e-5)


# ------------------------------------------------------------------------------------------------
# The model as a whole


@pytest.mark.parametrize(
    "fields",
    [{}, {"sinks": False, "sliding_window": 4}, {"n_expert": 4, "n_kv_head": 2}],
    ids=["sinks", "window", "moe"],
)
def test_bfloat16_autocast_trains_near_float32(fields):
    """The compute dtype of every GPU run: loss within 2 %, gradients in the same direction, finite
    and float32."""
    model, idx, targets = tiny(dtype=torch.float32, **fields), ids(4, 16), ids(4, 16, seed=9)
    exact = model(idx, targets)
    exact.backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, targets)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert loss.dtype == torch.float32 and abs(loss / exact - 1) < 0.02
    assert got.isfinite().all() and F.cosine_similarity(got, want, dim=0) > 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields, dtype, tol",
    [
        ({}, torch.float32, 1e-4),
        ({"n_expert": 4}, torch.float32, 1e-4),
        ({"n_expert": 4}, torch.bfloat16, 5e-2),
    ],
    ids=["dense", "moe", "moe_bfloat16"],
)
def test_the_compiled_loss_equals_the_eager_one(fields, dtype, tol):
    """torch.compile is on in every GPU run; ignored targets take another way there (no boolean
    indexing)."""
    model, idx, targets = (
        tiny(dtype=torch.float32, n_layer=1, **fields),
        ids(2, 16),
        ids(2, 16, seed=9),
    )
    targets[0, :5] = -1
    results = []
    for run in (model, torch.compile(model)):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = run(idx, targets)
        loss.backward()
        results.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (eager, want), (compiled, got) = results
    assert abs(compiled / eager - 1) < tol and (got - want).norm() < tol * want.norm()


@variants
def test_param_groups_hold_every_parameter_once(fields):
    """One in no group is never trained, one in two is trained twice; Muon takes matrices only."""
    model = tiny(score_head=True, **fields)
    groups = model.param_groups()
    grouped = [id(p) for group in groups.values() for p in group]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters()) and len(
        set(grouped)
    ) == len(grouped)
    muon, name_of = groups["muon"], {id(p): name for name, p in model.named_parameters()}
    assert all(p.ndim >= 2 for p in muon)
    assert {name_of[id(p)].rsplit(".", 2)[-2] for p in muon if p.ndim == 2} <= {
        "qkv",
        "out",
        "gate_up",
        "down",
    }
    assert not any("router" in name_of[id(p)] for p in muon)


@variants
def test_every_parameter_gets_a_gradient(fields):
    """A parameter that nothing reads is a feature that does nothing."""
    model, idx = tiny(score_head=True, **fields), ids(4, 16)
    x = model.hidden(idx)
    (model.nll(x, ids(4, 16, seed=9)) + model.scores(x, idx, idx > 9).square().sum()).backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or (p.grad == 0).all()
    ] == []


@variants
def test_recomputed_blocks_give_the_same_loss_and_gradients(fields):
    """Activation checkpointing changes memory and time, nothing else."""
    model, idx, targets = tiny(**fields), ids(3, 12), ids(3, 12, seed=9)
    results = []
    for model.recompute in (False, True):
        model.zero_grad()
        loss = model(idx, targets) + model.balance_loss()
        loss.backward()
        results.append(
            [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        )
    assert len(results[0]) == len(results[1]) and all(map(torch.equal, *results))


def test_init_weights_refuses_a_parameter_that_it_does_not_know():
    """A new parameter left at its default would go unnoticed."""
    model = GPT(config())
    model.blocks[1].attn.gain = nn.Parameter(torch.ones(3))
    with pytest.raises(AssertionError, match=r"blocks\.1\.attn\.gain"):
        model.init_weights()


def test_blocks_start_as_the_identity():
    """The table in init_weights: out and down are zero, so the residual stream of a fresh model is
    the embedding."""
    for fields in VARIANTS.values():
        model, idx = GPT(config(**fields)), ids(2, 8)
        close(model.hidden(idx), model.norm(model.embed(idx)), 1e-6)


def test_a_tied_head_shares_storage_and_an_untied_one_does_not():
    """Tied: one parameter, counted once; untied: two."""
    tied, untied = GPT(config()), GPT(config(tied=False))
    assert tied.head.weight is tied.embed.weight
    assert untied.head.weight.data_ptr() != untied.embed.weight.data_ptr()
    assert untied.num_params() - tied.num_params() == 128 * 32


def test_num_params_is_this_count():
    """By hand: C 16, H 4, K 2, D 4, F 32, 2 layers, vocabulary 128."""
    model = GPT(
        ModelConfig(
            vocab_size=100, seq_len=8, n_layer=2, n_head=4, n_kv_head=2, d_model=16, d_ff=32
        )
    )
    layer = (
        8 * 4 * 16 + 16 * 16 + 2 * 32 * 16 + 16 * 32 + 16 + 16 + 4 + 4 + 4
    )  # qkv, out, gate_up, down, norms, sinks
    assert model.num_params() == 128 * 16 + 2 * layer + 16


def test_flops_per_token_is_this_count():
    """By hand: 6 per weight of qkv, out, gate_up, down and head, and 12 L H D T of attention; MFU
    stands on it."""
    fields = {
        "vocab_size": 100,
        "seq_len": 8,
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "d_model": 16,
        "d_ff": 32,
    }
    weights = 2 * (8 * 4 * 16 + 16 * 16 + 2 * 32 * 16 + 16 * 32) + 128 * 16
    for tied in (True, False):
        assert (
            flops_per_token(GPT(ModelConfig(**fields, tied=tied)))
            == 6 * weights + 12 * 2 * 4 * 4 * 8
        )
    assert (
        flops_per_token(GPT(ModelConfig(**fields, sliding_window=3)))
        == 6 * weights + 12 * 2 * 4 * 4 * 3
    )


def test_flops_per_token_do_not_count_the_experts_a_token_does_not_go_to():
    """Else the MFU of an MoE would be flattered; 3 d_expert C weights per active or shared expert,
    up to the router's."""
    fields = {
        "vocab_size": 100,
        "seq_len": 8,
        "n_layer": 2,
        "n_head": 4,
        "d_model": 16,
        "d_expert": 8,
    }
    weights = 2 * (4 * 16 * 16 + 3 * (3 * 8 * 16)) + 128 * 16
    for n_expert in (4, 8):
        got = flops_per_token(GPT(ModelConfig(**fields, n_expert=n_expert)))
        assert abs(got / (6 * weights + 12 * 2 * 16 * 8) - 1) < 0.05


def test_scores_add_the_hidden_state_and_the_log_likelihood_of_the_solution_so_far():
    """Each solution of a row counts from its own beginning; prompts contribute nothing."""
    model, idx = tiny(dtype=torch.float32, score_head=True), ids(1, 7)
    model.score_loglik.data.fill_(0.5)
    solution = torch.tensor([[False, False, True, True, False, True, True]])
    x = model.hidden(idx)
    logp = model.logits(x).log_softmax(-1)[0]
    p = [0.0] + [logp[t - 1, idx[0, t]].item() for t in range(1, 7)]
    wanted = model.score(x)[0, :, 0] + 0.5 * torch.tensor(
        [0, 0, p[2], p[2] + p[3], 0, p[5], p[5] + p[6]]
    )
    scores = model.scores(x, idx, solution)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores[0], wanted)


# ------------------------------------------------------------------------------------------------
# ModelConfig


@pytest.mark.parametrize(
    "fields, names",
    [
        ({"n_head": 4, "n_kv_head": 3}, ["n_head=4", "n_kv_head=3"]),
        ({"n_kv_head": 8, "n_head": 4}, ["n_head=4", "n_kv_head=8"]),
        ({"d_head": 7}, ["d_head", "7"]),
        ({"d_model": 12, "n_head": 4}, ["d_head", "3", "d_model=12", "n_head=4"]),
        ({"d_model": 66, "n_head": 4}, ["d_model=66", "n_head=4"]),
        ({"d_head": 0}, ["d_head", "0"]),
        ({"n_expert": 4, "n_expert_active": 5}, ["n_expert_active=5", "n_expert=4"]),
        ({"n_expert": 4, "n_expert_active": 0}, ["n_expert_active", "at least 1, got 0"]),
        ({"n_expert": -1}, ["n_expert", "at least 0, got -1"]),
        ({"n_expert": 4, "d_expert": 0}, ["d_expert", "0"]),
        ({"sliding_window": 0}, ["sliding_window", "0"]),
        ({"rope_base": -1.0}, ["rope_base", "-1"]),
        ({"n_head": 0}, ["n_head", "0"]),
        ({"n_kv_head": 0}, ["n_kv_head", "0"]),
        ({"d_model": 0}, ["d_model", "0"]),
        ({"n_layer": 0}, ["n_layer", "0"]),
        ({"vocab_size": 0}, ["vocab_size", "0"]),
        ({"seq_len": -5}, ["seq_len", "-5"]),
        ({"d_ff": 0}, ["d_ff", "0"]),
    ],
    ids=lambda x: ",".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_a_bad_combination_is_refused_with_its_names_and_values(fields, names):
    """It is the user's to mend, so the message must say which settings and what they were."""
    with pytest.raises(UserError) as error:
        config(**fields)
    assert all(name in str(error.value) for name in names), str(error.value)


def test_all_bad_settings_are_named_at_once():
    """One run, one list: not one fault per attempt."""
    with pytest.raises(UserError) as error:
        config(n_layer=0, seq_len=0)
    assert "n_layer" in str(error.value) and "seq_len" in str(error.value)


def test_what_was_given_is_never_overwritten():
    """A derived field that silently replaces the user's is the worst kind of default."""
    given = {
        "vocab_size": 77,
        "seq_len": 9,
        "n_layer": 3,
        "n_head": 6,
        "n_kv_head": 3,
        "d_model": 20,
        "d_head": 4,
        "d_ff": 30,
        "n_expert": 5,
        "n_expert_active": 2,
        "d_expert": 7,
        "sliding_window": 2,
    }
    cfg = ModelConfig(**given)
    assert {key: getattr(cfg, key) for key in given} == given


def test_fields_left_none_are_derived():
    """n_kv_head = n_head, d_head = C / H, d_ff = 8/3 C up to 64, d_expert = d_ff / active."""
    cfg = ModelConfig(n_head=4, d_model=96)
    assert (cfg.n_kv_head, cfg.d_head, cfg.d_ff, cfg.d_expert) == (4, 24, 256, 128)
    assert [ModelConfig(vocab_size=v).padded_vocab for v in (1, 128, 129, 50262)] == [
        128,
        128,
        256,
        50304,
    ]


def test_a_head_width_given_frees_the_model_width():
    """d_head is a field of its own: H * D need not be C."""
    model = tiny(d_model=20, n_head=6, n_kv_head=3, d_head=4)
    assert model(ids(1, 5)).shape == (1, 5, 50)
