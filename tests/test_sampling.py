"""Generation equals naive decoding, whatever the batch; sampling obeys its distribution."""

import copy
import math

import pytest
import torch
from helpers import fails
from test_model import ids, randn, tiny, variants

from inference.sampling import GREEDY, Sampling, generate, sample, stream

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
