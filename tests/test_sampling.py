"""Generation equals naive decoding, whatever the batch; sampling obeys its distribution."""

import contextlib
import copy
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import fails
from test_model import ids, randn, tiny, variants

from inference import sampling
from inference.cache import KVCache, kept_tokens
from inference.sampling import GREEDY, Sampling, Steps, generate, sample, stream
from model import GPT, Mask, attention_weights, rotary_angles, rotate

PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5], [3, 5, 8, 9, 7, 9], [31, 41, 5, 9]]


# ------------------------------------------------------------------------------------------------
# Generation


def naive(model, prompt, n, stop=()):
    """Greedy decoding without a cache: the whole text again for every token."""
    text = list(prompt)
    while len(text) < len(prompt) + n and not (len(text) > len(prompt) and text[-1] in stop):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


@variants
def test_ragged_greedy_generation_equals_naive_decoding_of_each_prompt(fields):
    """Left padding, the cache and the other rows of the batch must leave no trace in a row."""
    model = tiny(seed=5, **fields)
    want = [naive(model, prompt, 8) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 8, sampling=GREEDY) == want
    assert len({tuple(w) for w in want}) > 1, "all prompts go on alike: the test sees nothing"


@pytest.mark.parametrize("n_layer", [1, 2])
def test_generation_beyond_the_cache_equals_a_windowed_model(n_layer):
    """seq_len bounds memory: a row still sees its own last seq_len tokens, whatever its padding."""
    model = tiny(seed=5, n_layer=n_layer, seq_len=4)
    window = tiny(seed=5, n_layer=n_layer, sliding_window=4)
    prompts = [prompt[-4:] for prompt in PROMPTS]
    want = [naive(window, prompt, 12) for prompt in prompts]
    assert generate(model, prompts, 12, sampling=GREEDY) == want


@pytest.mark.parametrize("n", [1, 40])
def test_a_prompt_that_does_not_fit_is_refused_and_not_cut(n):
    """A question without its beginning is another one: whoever asks it must know."""
    model = tiny(seed=5, seq_len=4)
    fits, too_long = [1, 2, 3, 4], [1, 2, 3, 4, 5]
    assert len(generate(model, [fits], n, sampling=GREEDY)[0]) == n
    fails(lambda: generate(model, [fits, too_long], n), "5 tokens", "seq_len=4")


def test_generation_runs_past_seq_len_with_the_last_seq_len_tokens():
    """The cache is never longer than the training context; beyond it the oldest tokens go."""
    model, window = tiny(seed=5, seq_len=8), tiny(seed=5, seq_len=8, sliding_window=8)
    assert generate(model, [PROMPTS[0]], 20, sampling=GREEDY) == [naive(window, PROMPTS[0], 20)]


def test_generation_ends_a_row_at_its_first_stop_id():
    """Rows end at different steps and are dropped from the batch.

    The rest must not notice, and the stop id is kept.
    """
    model = tiny(seed=5)
    free = [naive(model, prompt, 12) for prompt in PROMPTS]
    stop = (free[0][1], free[3][5], free[4][8])
    want = [naive(model, prompt, 12, stop) for prompt in PROMPTS]
    assert len({len(w) for w in want}) > 2, "the rows end alike: the test sees nothing"
    assert generate(model, PROMPTS, 12, stop, sampling=GREEDY) == want


def test_generation_reports_every_id_once_and_in_order():
    """What is streamed, row by row, is what is returned, and nothing after a stop."""
    model, seen = tiny(seed=5), [[] for _ in PROMPTS]
    stop = (naive(model, PROMPTS[0], 3)[2],)
    for written in stream(model, PROMPTS, 7, stop, sampling=GREEDY):
        assert written
        for row, token in written.items():
            seen[row].append(token)
    out = generate(model, PROMPTS, 7, stop, sampling=GREEDY)
    assert seen == out and max(map(len, out)) == 7 and len(out[0]) <= 3


@pytest.mark.parametrize("n", [0, 1, 5])
def test_generation_gives_max_new_tokens_ids(n):
    """Neither one more nor one less, down to none."""
    assert [len(out) for out in generate(tiny(), PROMPTS, n, sampling=GREEDY)] == [n] * len(PROMPTS)


def test_generation_of_a_row_does_not_depend_on_its_batch():
    """Best-of-N and evaluation batch freely: results must not move with the batch."""
    model = tiny(seed=5, n_kv_head=2)
    together = generate(model, PROMPTS, 8, sampling=GREEDY)
    assert [generate(model, [prompt], 8, sampling=GREEDY)[0] for prompt in PROMPTS] == together
    assert generate(model, PROMPTS[::-1], 8, sampling=GREEDY) == together[::-1]
    assert generate(model, [], 8, sampling=GREEDY) == []


def test_generation_repeats_with_the_seed():
    """A sampled evaluation must be repeatable."""
    model = tiny(seed=5)
    runs = [
        generate(model, PROMPTS, 8, seeds=[(seed, row) for row in range(len(PROMPTS))])
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_generation_leaves_the_prompts_alone():
    """They are the caller's lists."""
    prompts = copy.deepcopy(PROMPTS)
    generate(tiny(seq_len=8), prompts, 3, sampling=GREEDY)
    assert prompts == PROMPTS


@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "no_sinks"])
def test_generation_works_under_autocast(sinks):
    """Queries are then bfloat16 while the cache has the dtype of the weights."""
    with torch.autocast("cpu", torch.bfloat16):
        out = generate(tiny(dtype=torch.float32, sinks=sinks), PROMPTS, 3, sampling=GREEDY)
    assert [len(row) for row in out] == [3] * len(PROMPTS)


# ------------------------------------------------------------------------------------------------
# A cache that keeps the first tokens


@torch.no_grad()
def paper_stream(model, text, slots, kept):
    """Logits of a text (n,), token by token, as arXiv 2309.17453 describes the cache.

    Keys are stored before RoPE. At each step every one is turned by its place in the cache.
    """
    cfg, logits = model.cfg, []
    caches = [([], []) for _ in model.blocks]
    for token in text.tolist():
        x = model.embed(torch.tensor([[token]]))
        for block, (keys, values) in zip(model.blocks, caches, strict=True):
            attn, y = block.attn, block.attn_norm(x)
            parts = (y @ attn.qkv.weight.T).split(attn.sizes, dim=-1)
            q, k, v = (part.view(1, 1, -1, cfg.d_head) for part in parts)
            keys.append(attn.k_norm(k)), values.append(v)
            if len(keys) > slots:
                del keys[kept], values[kept]
            cos, sin = rotary_angles(torch.arange(len(keys)), cfg.d_head, cfg.rope_base, x.dtype)
            q = rotate(attn.q_norm(q), cos[-1:], sin[-1:]).transpose(1, 2)
            k = rotate(torch.cat(keys, dim=1), cos, sin).transpose(1, 2)
            v = torch.cat(values, dim=1).transpose(1, 2)
            weights = attention_weights(q, k, attn.sinks, Mask())[..., : k.size(2)]
            y = weights @ v.repeat_interleave(cfg.n_head // cfg.n_kv_head, dim=1)
            x = x + attn.out(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.mlp_norm(x))
        logits.append(model.logits(model.norm(x))[0, 0])
    return torch.stack(logits)


@torch.no_grad()
def cached_logits(model, idx, slots, kept, prompt=1, pads=None):
    """Logits (B, n, V) of idx (B, n) through a cache: the first `prompt` at once, then by one."""
    cache = KVCache(model.cfg, len(idx), slots, idx.device, model.embed.weight.dtype, kept)
    pieces = idx.split([prompt, *[1] * (idx.size(1) - prompt)], dim=1)
    hidden = [model.hidden(pieces[0], cache=cache, pads=pads)]
    hidden += [model.hidden(piece, cache=cache) for piece in pieces[1:]]
    return model.logits(torch.cat(hidden, dim=1))


kept_variants = pytest.mark.parametrize(
    "fields",
    [
        {"sinks": False},
        {"sinks": False, "qk_norm": False, "n_kv_head": 2},
        {"n_kv_head": 1},
    ],
    ids=["qk_norm", "gqa_no_norm", "sinks"],
)


@kept_variants
@pytest.mark.parametrize("kept, slots", [(0, 6), (1, 2), (1, 6), (4, 9), (5, 6)])
def test_kept_tokens_stand_before_the_window_as_in_the_paper(fields, kept, slots):
    """One row and three, far beyond the slots: positions count inside the cache."""
    model, idx = tiny(seed=5, dtype=torch.float32, **fields), ids(3, 30)
    want = torch.stack([paper_stream(model, row, slots, kept) for row in idx])
    for prompt in (1, slots):
        got = cached_logits(model, idx, slots, kept, prompt)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    alone = cached_logits(model, idx[:1], slots, kept)
    torch.testing.assert_close(alone, want[:1], atol=1e-5, rtol=1e-5)
    if kept:
        rolling = cached_logits(model, idx, slots, 0, slots)
        assert torch.equal(rolling[:, :slots], got[:, :slots]), "the same until it rolls"
        assert (rolling[:, slots:] - got[:, slots:]).abs().amax((1, 2)).min() > 1e-3


@kept_variants
def test_every_row_keeps_its_own_first_tokens_whatever_its_pads(fields):
    """Pads are no tokens: neither kept nor seen, and a short prompt goes on filling the kept slots.

    The shortest row begins after the cache has begun to roll for the longest.
    """
    model, text, lengths = tiny(seed=5, **fields), ids(5, 30), [8, 1, 7, 3, 6]
    slots, kept, width = 8, 3, max(lengths)
    rows = [torch.cat((ids(width - n, seed=9), text[i])) for i, n in enumerate(lengths)]
    idx = torch.stack([row[:30] for row in rows])
    pads = torch.tensor([width - n for n in lengths])
    got = cached_logits(model, idx, slots, kept, width, pads)
    for i, pad in enumerate(pads.tolist()):
        want = paper_stream(model, idx[i, pad:], slots, kept)
        torch.testing.assert_close(got[i, pad:], want, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_kept_keys_do_not_drift_in_bfloat16():
    """They are turned from where they were computed: after 300 steps one rounding is all."""
    model, slots, kept = tiny(seed=5, dtype=torch.bfloat16, sinks=False), 6, 4
    cache = KVCache(model.cfg, 2, slots, torch.device("cpu"), torch.bfloat16, kept)
    for piece in ids(2, 300).split(1, dim=1):
        model.hidden(piece, cache=cache)
        if cache.length == slots:
            first = cache.k[..., :kept, :].double()  # (layers, B, K, kept, D)
    angles = rotary_angles(torch.tensor([300 - slots]), 8, model.cfg.rope_base, torch.float64)
    want = rotate(first.flatten(0, 2).unsqueeze(1), *angles).view(first.shape)
    torch.testing.assert_close(cache.k[..., :kept, :].double(), want, atol=1e-5, rtol=2**-8)


def test_generation_without_sinks_keeps_four_tokens_when_it_rolls():
    """Rows of any prompt end at their own steps; sinks, a window or tiny caches keep none."""
    model = tiny(seed=5, seq_len=8, sinks=False, n_kv_head=2)
    want = []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(20):
            text.append(int(paper_stream(model, torch.tensor(text), 8, 4)[-1].argmax()))
        want.append(text[len(prompt) :])
    assert generate(model, PROMPTS, 20, sampling=GREEDY) == want
    stop = (want[0][2], want[3][12], want[4][15])
    cut = [row[: next((i for i, x in enumerate(row) if x in stop), 19) + 1] for row in want]
    assert generate(model, PROMPTS, 20, stop, sampling=GREEDY) == cut
    assert len(set(map(len, cut))) > 2, "the rows end alike: the test sees nothing"
    assert [kept_tokens(model.cfg, slots) for slots in (4, 5, 8)] == [0, 4, 4]
    assert kept_tokens(tiny().cfg, 8) == 0
    assert kept_tokens(tiny(sinks=False, sliding_window=4).cfg, 8) == 0


@pytest.mark.parametrize("kept, fields", [(6, {}), (7, {}), (-1, {}), (1, {"sliding_window": 4})])
def test_a_cache_that_could_not_roll_is_refused(kept, fields):
    """Without a free slot nothing rolls; a window of the model already says what is seen."""
    model = tiny(**fields)
    fails(lambda: cached_logits(model, ids(1, 9), 6, kept), f"kept={kept}", "slots=6")


# ------------------------------------------------------------------------------------------------
# Sampling


def test_temperature_zero_and_top_k_one_are_argmax():
    """Both are greedy decoding."""
    logits = randn(40, 50)
    assert torch.equal(sample(logits, Sampling(temperature=0)), logits.argmax(-1))
    assert torch.equal(sample(logits, Sampling(top_k=1)), logits.argmax(-1))


def uniform(n: int, seed: int = 0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def drawn(logits, n: int = 3000, **sampling) -> set[int]:
    many = torch.tensor(logits).expand(n, len(logits))
    return set(sample(many, Sampling(**sampling), uniform(n)).tolist())


@pytest.mark.parametrize(
    "top_p, kept",
    [
        (0.05, {2}),
        (0.49, {2}),
        (0.51, {2, 0}),
        (0.79, {2, 0}),
        (0.81, {2, 0, 3}),
        (0.96, {0, 1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_smallest_set_of_that_probability(top_p, kept):
    """By hand: probabilities .30 .05 .50 .15; sorted and summed .50 .80 .95 1."""
    assert drawn([math.log(p) for p in (0.30, 0.05, 0.50, 0.15)], top_p=top_p) == kept


def test_top_p_zero_keeps_the_most_likely_id():
    """The limit of a small top_p is greedy, and no distribution is empty."""
    assert drawn([math.log(p) for p in (0.30, 0.05, 0.50, 0.15)], top_p=0.0) == {2}


def test_top_k_keeps_the_k_most_likely_and_their_proportions():
    """What is left is renormalised, not made uniform: .5 and .3 become .625 and .375."""
    logits = torch.tensor([0.30, 0.05, 0.50, 0.15]).log().expand(20000, 4)
    got = sample(logits, Sampling(top_k=2), uniform(20000)).bincount(minlength=4) / 20000
    assert got[1] == got[3] == 0 and abs(got[2] - 0.625) < 0.015  # 4 standard errors of 0.0034
    assert drawn([0.0, 1.0, 2.0], top_k=99) == {0, 1, 2}


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, 1e-31, 1e-30, 1e-20, 1e-6])
def test_the_limit_of_a_low_temperature_is_greedy(temperature):
    """Logits must not grow to infinity on the way: inf - inf is nan, and no id at all."""
    logits = torch.cat([randn(40, 50), 1e4 * randn(40, 50)])
    for more in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}):
        got = sample(logits, Sampling(temperature, **more), uniform(80))
        assert torch.equal(got, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e9, 1e18, 1e30])
def test_the_limit_of_a_high_temperature_is_uniform(temperature):
    """Every id of the vocabulary, and no other."""
    got = sample(randn(1, 8).expand(4000, 8), Sampling(temperature), uniform(4000))
    assert got.bincount(minlength=8).shape == (8,) and got.bincount().min() > 400


def test_temperature_divides_the_logits():
    """At temperature 2 the odds of 4 : 1 become 2 : 1."""
    logits = torch.tensor([math.log(4.0), 0.0]).expand(20000, 2)
    got = sample(logits, Sampling(temperature=2.0), uniform(20000))
    assert abs((got == 0).float().mean() - 2 / 3) < 0.015


def test_the_same_draws_give_the_same_ids():
    """And the global random state plays no part."""
    logits = randn(64, 50)
    first = sample(logits, draws=uniform(64, 3))
    torch.manual_seed(99)
    assert torch.equal(first, sample(logits, draws=uniform(64, 3)))
    assert not torch.equal(first, sample(logits, draws=uniform(64, 4)))


def test_no_draw_reaches_an_id_of_probability_zero():
    """The largest draws below 1, and 0, where ids without probability stand at both ends."""
    logits = torch.full((1, 1000), -math.inf)
    logits[:, 3:700] = 0.0
    for draw in (0.0, 1 - 2**-24, 0.5):
        assert 3 <= int(sample(logits, draws=torch.tensor([draw]))) < 700


def test_a_sampled_row_depends_on_its_prompt_and_its_seed_alone():
    """Not on its place in the batch, nor on rows that end before it."""
    model, seeds = tiny(seed=5), [7, (1, 2), 9, 11, 13]
    together = generate(model, PROMPTS, 12, stop=(3,), seeds=seeds)
    assert [
        generate(model, [prompt], 12, stop=(3,), seeds=[seed])[0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ] == together
    assert len({len(row) for row in together}) > 1 or len(set(map(tuple, together))) == 5
    assert (
        generate(model, [PROMPTS[0]] * 3, 12, seeds=[7, 7, 8])[0]
        != generate(model, [PROMPTS[0]], 12, seeds=[8])[0]
    )


def test_padded_ids_are_never_sampled_nor_predicted():
    """The vocabulary is padded to 128 for speed; ids from vocab_size on belong to no token."""
    model = tiny(vocab_size=50)
    with torch.no_grad():
        model.embed.weight[50:] = 100 * randn(78, 32)  # would win every softmax
    logits = model(ids(1, 4))
    assert model.embed.weight.shape == (128, 32) and logits.shape == (1, 4, 50)
    drawn_ids = sample(logits[0, -1:].expand(2000, 50), Sampling(temperature=100.0), uniform(2000))
    assert drawn_ids.max() < 50 and len(drawn_ids.unique()) > 25
    assert max(map(max, generate(model, PROMPTS, 8, sampling=Sampling(temperature=100.0)))) < 50


@pytest.mark.parametrize(
    "min_p, kept", [(0.05, {0, 1, 2, 3}), (0.2, {0, 2, 3}), (0.5, {0, 2}), (1.0, {2})]
)
def test_min_p_keeps_ids_of_that_share_of_the_best(min_p, kept):
    """By hand: .30 .05 .50 .15 are .6 .1 1 .3 of the best."""
    assert drawn([math.log(p) for p in (0.30, 0.05, 0.50, 0.15)], min_p=min_p) == kept


def test_a_cache_that_memory_has_no_room_for_is_filled_in_parts(monkeypatch):
    """Every row is what it is in one batch, its seed too; parts hold prompts of similar length."""
    model = tiny(seq_len=48)
    prompts = [[i] * n for i, n in enumerate((9, 2, 30, 5, 47, 3))]
    settings = {"seeds": None, "sampling": Sampling(0.9)}
    whole = sampling.generate(model, prompts, 10, (7,), **settings)
    sizes, stream = [], sampling.stream
    cfg = model.cfg
    token = 2 * cfg.n_layer * cfg.n_kv_head * cfg.d_head * model.embed.weight.itemsize

    def counted(model, prompts, *args, **settings):
        sizes.append([len(prompt) for prompt in prompts])
        return stream(model, prompts, *args, **settings)

    monkeypatch.setattr(sampling, "stream", counted)
    assert sampling.generate(model, prompts, 10, (7,), **settings) == whole
    monkeypatch.setattr(sampling, "CACHE_BYTES", (60 * token, 0))
    assert sampling.generate(model, prompts, 10, (7,), **settings) == whole
    assert sizes == [[9, 2, 30, 5, 47, 3], [2, 3, 5], [9], [30], [47]]
    monkeypatch.setattr(sampling, "CACHE_BYTES", (0, 0))
    assert sampling.generate(model, prompts, 10, (7,), **settings) == whole
    assert sampling.generate(model, [], 10) == []


def test_a_rule_on_a_rows_ids_ends_it_as_an_id_does():
    """A text that ends answers may span several ids."""
    model, prompts = tiny(), [[1, 2], [3], [4, 5, 6]]
    free = sampling.generate(model, prompts, 12, sampling=GREEDY)
    pair = tuple(free[0][3:5])
    ended = sampling.generate(
        model, prompts, 12, lambda own: tuple(own[-2:]) == pair, sampling=GREEDY
    )
    for row, own in zip(free, ended, strict=True):
        ends = [i + 2 for i in range(11) if tuple(row[i : i + 2]) == pair]
        assert own == row[: min(ends, default=12)]
    assert len(ended[0]) < 12


# ------------------------------------------------------------------------------------------------
# CUDA graphs, stood in for


@pytest.fixture
def replayed(monkeypatch) -> list:
    """Record every step that can be; a replay runs it anew, and is noted by its rows."""
    replays, calls, hidden = [], [], GPT.hidden

    def noted(model, *args, **keys):
        calls.append((model, args, keys))
        return hidden(model, *args, **keys)

    class Graph:
        def replay(self):
            model, args, keys = self.call
            self.x.copy_(hidden(model, *args, **keys)[:, -1])
            replays.append(len(args[0]))

    @contextlib.contextmanager
    def record(graph):
        yield
        graph.call = calls[-1]
        graph.call[2]["cache"].next.sub_(1)  # a recording runs nothing

    def keep_output(steps, ids):
        record_step(steps, ids)
        steps.graph.x = steps.x

    record_step = Steps.record
    beside = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: beside)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(GPT, "hidden", noted)
    monkeypatch.setattr(Steps, "record", keep_output)
    monkeypatch.setattr(Steps, "is_replayed", lambda steps, ids: steps.is_alike())
    return replays


@variants
def test_replayed_steps_give_the_same_text(replayed, fields):
    """Prompts of unequal length, rows that end, a cache that rolls, a window, experts."""
    model = tiny(seed=5, **fields)
    free = [naive(model, prompt, 12) for prompt in PROMPTS]
    stop = (free[0][1], free[3][5], free[4][8])
    want = [naive(model, prompt, 12, stop) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 12, stop, sampling=GREEDY) == want
    # in float64 no experts: they are counted on the host
    assert bool(replayed) == ("n_expert" not in fields) and len(set(replayed)) != 1


@pytest.mark.parametrize("fields", [{}, {"sinks": False}], ids=["sinks", "kept"])
def test_replayed_steps_roll_as_the_others_do(replayed, monkeypatch, fields):
    """A full cache that keeps its first tokens goes on step by step."""
    model = tiny(seed=5, seq_len=8, n_layer=2, **fields)
    prompts = [prompt[:3] for prompt in PROMPTS]
    found = generate(model, prompts, 20, sampling=GREEDY)
    assert len(replayed) == (19 if model.cfg.sinks else 5)
    monkeypatch.setattr(Steps, "is_replayed", lambda steps, ids: False)
    assert found == generate(model, prompts, 20, sampling=GREEDY)
