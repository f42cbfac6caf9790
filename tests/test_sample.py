"""Generation equals naive decoding; sampling obeys its distribution; the program streams, chats and refuses in words."""

import copy
import io
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import sample as program
from conftest import fails
from sample import generate, sample
from test_align import BYTE, save_start
from test_model import ids, randn, tiny, variants

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k_train.jsonl.gz"
GREEDY = {"temperature": 0}
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5], [3, 5, 8, 9, 7, 9], [31, 41, 5, 9]]


# ---------------------------------------------------------------------------------------------------------------------
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
    assert generate(model, PROMPTS, 8, **GREEDY) == want
    assert len({tuple(w) for w in want}) > 1, "all prompts go on alike: the test sees nothing"


@pytest.mark.parametrize("n_layer", [1, 2])
def test_generation_beyond_the_cache_equals_a_windowed_model(n_layer):
    """slots bounds memory: what a row still sees are its own last `slots` tokens, whatever the padding before them."""
    model, window = tiny(seed=5, n_layer=n_layer), tiny(seed=5, n_layer=n_layer, sliding_window=4)
    want = [naive(window, prompt[-4:], 12) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 12, slots=4, **GREEDY) == want


def test_generation_runs_past_seq_len_with_the_last_seq_len_tokens():
    """The default cache is never longer than the training context; beyond it the oldest tokens go."""
    model, window = tiny(seed=5, seq_len=8), tiny(seed=5, seq_len=8, sliding_window=8)
    assert generate(model, [PROMPTS[0]], 20, **GREEDY) == [naive(window, PROMPTS[0], 20)]


def test_generation_ends_a_row_at_its_first_stop_id():
    """Rows end at different steps and are dropped from the batch; the rest must not notice, and the stop id is kept."""
    model = tiny(seed=5)
    free = [naive(model, prompt, 12) for prompt in PROMPTS]
    stop = (free[0][1], free[3][5], free[4][8])
    want = [naive(model, prompt, 12, stop) for prompt in PROMPTS]
    assert len({len(w) for w in want}) > 2, "the rows end alike: the test sees nothing"
    assert generate(model, PROMPTS, 12, stop, **GREEDY) == want


def test_generation_reports_every_id_once_and_in_order():
    """on_token streams: what it is told, row by row, is what is returned, nothing after a stop."""
    model, seen = tiny(seed=5), [[] for _ in PROMPTS]
    stop = (naive(model, PROMPTS[0], 3)[2],)
    out = generate(
        model, PROMPTS, 7, stop, on_token=lambda row, token: seen[row].append(token), **GREEDY
    )
    assert seen == out and max(map(len, out)) == 7 and len(out[0]) <= 3


@pytest.mark.parametrize("n", [0, 1, 5])
def test_generation_gives_max_new_tokens_ids(n):
    """Neither one more nor one less, down to none."""
    assert [len(out) for out in generate(tiny(), PROMPTS, n, **GREEDY)] == [n] * len(PROMPTS)


def test_generation_of_a_row_does_not_depend_on_its_batch():
    """Best-of-N and evaluation batch freely: a result that moved with the batch would not be reproducible."""
    model = tiny(seed=5, n_kv_head=2)
    together = generate(model, PROMPTS, 8, **GREEDY)
    assert [generate(model, [prompt], 8, **GREEDY)[0] for prompt in PROMPTS] == together
    assert generate(model, PROMPTS[::-1], 8, **GREEDY) == together[::-1]
    assert generate(model, [], 8, **GREEDY) == []


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
    generate(tiny(), prompts, 3, slots=4, **GREEDY)
    assert prompts == PROMPTS


@pytest.mark.parametrize("sinks", [True, False], ids=["sinks", "no_sinks"])
def test_generation_works_under_autocast(sinks):
    """Queries are then bfloat16 while the cache has the dtype of the weights."""
    with torch.autocast("cpu", torch.bfloat16):
        out = generate(tiny(dtype=torch.float32, sinks=sinks), PROMPTS, 3, **GREEDY)
    assert [len(row) for row in out] == [3] * len(PROMPTS)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def test_temperature_zero_and_top_k_one_are_argmax():
    """Both are greedy decoding."""
    logits = randn(40, 50)
    assert torch.equal(sample(logits, temperature=0), logits.argmax(-1))
    assert torch.equal(sample(logits, top_k=1), logits.argmax(-1))


def uniform(n: int, seed: int = 0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def drawn(logits, n: int = 3000, **sampling) -> set[int]:
    many = torch.tensor(logits).expand(n, len(logits))
    return set(sample(many, draws=uniform(n), **sampling).tolist())


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
    got = sample(logits, top_k=2, draws=uniform(20000)).bincount(minlength=4) / 20000
    assert got[1] == got[3] == 0 and abs(got[2] - 0.625) < 0.015  # 4 standard errors of 0.0034
    assert drawn([0.0, 1.0, 2.0], top_k=99) == {0, 1, 2}


def test_temperature_divides_the_logits():
    """At temperature 2 the odds of 4 : 1 become 2 : 1."""
    got = sample(
        torch.tensor([math.log(4.0), 0.0]).expand(20000, 2), temperature=2.0, draws=uniform(20000)
    )
    assert abs((got == 0).float().mean() - 2 / 3) < 0.015


def test_the_same_draws_give_the_same_ids():
    """And the global random state plays no part."""
    logits = randn(64, 50)
    first = sample(logits, draws=uniform(64, 3))
    torch.manual_seed(99)
    assert torch.equal(first, sample(logits, draws=uniform(64, 3)))
    assert not torch.equal(first, sample(logits, draws=uniform(64, 4)))


def test_no_draw_reaches_an_id_of_probability_zero():
    """The largest draws below 1, and 0 itself, where ids without probability stand at both ends of the vocabulary."""
    logits = torch.full((1, 1000), -math.inf)
    logits[:, 3:700] = 0.0
    for draw in (0.0, 1 - 2**-24, 0.5):
        assert 3 <= int(sample(logits, draws=torch.tensor([draw]))) < 700


def test_a_sampled_row_depends_on_its_prompt_and_its_seed_alone():
    """Not on its place in the batch, nor on rows that end before it: best-of-N may be cut into batches at will."""
    model, seeds = tiny(seed=5), [7, (1, 2), 9, 11, 13]
    together = generate(model, PROMPTS, 12, stop=(3,), seeds=seeds)
    assert [
        generate(model, [prompt], 12, stop=(3,), seeds=[seed])[0]
        for prompt, seed in zip(PROMPTS, seeds)
    ] == together
    assert len({len(row) for row in together}) > 1 or len(set(map(tuple, together))) == 5
    assert (
        generate(model, [PROMPTS[0]] * 3, 12, seeds=[7, 7, 8])[0]
        != generate(model, [PROMPTS[0]], 12, seeds=[8])[0]
    )


def test_padded_ids_are_never_sampled_nor_predicted():
    """The vocabulary is padded to 128 for speed; ids from vocab_size on belong to no token, so they must not exist."""
    model = tiny(vocab_size=50)
    with torch.no_grad():
        model.embed.weight[50:] = 100 * randn(78, 32)  # would win every softmax
    logits = model(ids(1, 4))
    assert model.embed.weight.shape == (128, 32) and logits.shape == (1, 4, 50)
    drawn_ids = sample(logits[0, -1:].expand(2000, 50), temperature=100.0, draws=uniform(2000))
    assert drawn_ids.max() < 50 and len(drawn_ids.unique()) > 25
    assert max(map(max, generate(model, PROMPTS, 8, temperature=100.0))) < 50


@pytest.mark.parametrize(
    "min_p, kept", [(0.05, {0, 1, 2, 3}), (0.2, {0, 2, 3}), (0.5, {0, 2}), (1.0, {2})]
)
def test_min_p_keeps_ids_of_that_share_of_the_best(min_p, kept):
    """By hand: .30 .05 .50 .15 are .6 .1 1 .3 of the best."""
    assert drawn([math.log(p) for p in (0.30, 0.05, 0.50, 0.15)], min_p=min_p) == kept


# ---------------------------------------------------------------------------------------------------------------------
# The calculator


@pytest.mark.parametrize(
    "text, value",
    [
        ("48/2", 24),
        ("20*.01", 0.2),
        ("(3+4)*2-1", 13),
        ("2-3-4", -5),
        ("12/3/2", 2),
        ("-3+5", 2),
        ("+10", 10),
        ("560//10", 56),
        ("1,000*2", 2000),
        ("2*-3", -6),
        ("((((1))))", 1),
    ],
)
def test_arithmetic_has_the_usual_rules(text, value):
    assert program.arithmetic(text) == pytest.approx(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1/0",
        "2**9",
        "9**9**9",
        "1+",
        "(1",
        "1)",
        "a+1",
        "__import__('os')",
        "1 2",
        "1e9",
        ".",
        "9" * 65,
        "9" * 40,
        "(" * 60,
        "0x1f",
    ],
)
def test_what_is_no_bounded_arithmetic_has_no_value(text):
    """Nothing a model can write is run, hangs, or raises."""
    assert program.arithmetic(text) is None


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789.+-*/() ", max_size=20))
def test_arithmetic_agrees_with_python_wherever_both_have_a_value(text):
    value = program.arithmetic(text)
    if (
        value is not None
        and "**" not in text
        and not re.search(r"\b0\d|\d\s+[\d.]|\.\s|/\s+/|\.\d*\.", text)
    ):
        assert value == pytest.approx(eval(text), nan_ok=True)


def test_the_calculator_reproduces_the_annotations_of_gsm8k():
    """Every <<expression=value>> of the 7,473 training solutions, by value; the few that differ are wrong in the source."""
    if not REAL.is_file():
        pytest.skip(f"no GSM8K at {REAL}")
    asked = [
        pair.split("=")
        for row in data.read_jsonl(str(REAL))
        for pair in re.findall(r"<<([^<>]*)>>", row["answer"])
    ]
    wrong = [
        (left, right)
        for left, right in asked
        if (value := program.arithmetic(left)) is None or abs(value - float(right)) > 1e-6
    ]
    assert len(asked) == 23716 and len(wrong) < 15, wrong


@pytest.mark.parametrize("name", ["byte", "toy"])
def test_a_row_that_asks_the_calculator_is_handed_the_result(name):
    """The ids after "<<3+4=" are those of "7>>"; outside an open << there is nothing to hand."""
    tokenizer = data.load_tokenizer(name)
    tool = program.Calculator(tokenizer)
    assert tool(tokenizer.encode("x <<3+4=")) == tokenizer.encode("7>>")
    assert (
        tool(tokenizer.encode("3+4="))
        == tool(tokenizer.encode("<<3+="))
        == tool(tokenizer.encode("<<3+4=7>> ="))
        == []
    )
    assert tool(tokenizer.encode("<<1/3=")) == tokenizer.encode("0.333333>>") and tool(
        tokenizer.encode("<<0*-5=")
    ) == tokenizer.encode("0>>")


def test_the_calculator_corrects_a_model_while_it_generates():
    """A model trained to write "<<2+2=" is emulated by a model that can say one thing only."""
    model, tokenizer = tiny(dtype=torch.float32, vocab_size=BYTE.vocab_size, seq_len=64), BYTE
    script = iter(tokenizer.encode("<<2+2=") + [0] * 99)

    class Scripted:
        embed, cfg = model.embed, model.cfg
        hidden = lambda self, idx, cache=None, pads=None: model.hidden(idx, cache=cache, pads=pads)
        logits = lambda self, x: torch.nn.functional.one_hot(
            torch.tensor([next(script)]), tokenizer.vocab_size
        ).float()

    (row,) = generate(
        Scripted(), [[1]], 12, temperature=0, calculator=program.Calculator(tokenizer)
    )
    assert tokenizer.decode(row[:9]) == "<<2+2=4>>" and row[9:] == [0, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# The program


@pytest.fixture
def start(tmp_path):
    """Folders of a base model and of a chat model, in bytes."""
    model = tiny(dtype=torch.float32, vocab_size=BYTE.vocab_size)
    return {
        "base": save_start(tmp_path / "base", model),
        "chat": save_start(tmp_path / "chat", model, template=data.TEMPLATE, task="sft"),
    }


def answers_of(monkeypatch) -> list:
    """What generate() was asked, while it answers "h\u00e9!" and <|end|>, one byte a token."""
    asked = []

    def generate(model, prompts, max_new_tokens, stop, seeds, on_token=None, **sampling):
        asked.append(prompts[0])
        row = [*"h\u00e9!".encode(), BYTE.end]
        for token in row if on_token else []:
            on_token(0, token)
        return [row] * len(prompts)

    monkeypatch.setattr(program, "generate", generate)
    return asked


def test_the_same_seed_prints_the_same_text_and_another_seed_another(start, capsys):
    """The whole program on a real checkpoint: the prompt first, then what was sampled."""
    texts = []
    for seed in (1, 1, 2):
        assert (
            program.main(
                [
                    f"--checkpoint={start['base']}",
                    "--prompt=ab",
                    "--max_new_tokens=12",
                    "--temperature=1.5",
                    f"--seed={seed}",
                    "--device=cpu",
                ]
            )
            == 0
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("ab")


def test_what_is_streamed_is_what_was_sampled(start, capsys):
    """Token by token or as a whole: the same text, without the stop token, and a count of tokens on stderr."""
    flags = ["--prompt=ab", "--max_new_tokens=9", "--device=cpu", "--temperature=0"]
    program.main([f"--checkpoint={start['base']}", *flags])
    streamed = capsys.readouterr()
    program.main([f"--checkpoint={start['base']}", "--n_samples=2", *flags])
    both = capsys.readouterr().out.removeprefix("ab").split("--- ")
    assert (
        both[1].removeprefix("1\n").rstrip()
        == both[2].removeprefix("2\n").rstrip()
        == streamed.out.removeprefix("ab").rstrip()
    )
    assert "[9 tokens" in streamed.err and "cut at max_new_tokens" in streamed.err


def test_a_character_of_several_tokens_is_printed_whole(start, monkeypatch, capsys):
    """Bytes of one character come one token at a time; half a character would show as a replacement mark."""
    answers_of(monkeypatch)
    program.main([f"--checkpoint={start['chat']}", "--prompt=x"])
    assert capsys.readouterr().out == "h\u00e9!\n"


def test_a_chat_model_gets_the_template_and_a_base_model_plain_text(start, monkeypatch, capsys):
    """The checkpoint decides; --chat overrides it. A document begins after the end of another."""
    asked = answers_of(monkeypatch)
    for name, flags in (
        ("chat", []),
        ("base", []),
        ("chat", ["--chat=False"]),
        ("base", ["--chat"]),
    ):
        program.main([f"--checkpoint={start[name]}", "--prompt=x", *flags])
    templated, plain = [BYTE.user, ord("x"), BYTE.end, BYTE.assistant], [BYTE.eos, ord("x")]
    assert asked == [templated, plain, plain, templated]


def test_a_conversation_keeps_its_turns_until_an_empty_line(start, monkeypatch, capsys):
    """Every answer sees all turns before it."""
    asked, lines = answers_of(monkeypatch), iter(["one", "two", "", "never read"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert program.main([f"--checkpoint={start['chat']}"]) == 0
    turn = lambda text: [BYTE.user, *text.encode(), BYTE.end, BYTE.assistant]
    assert (
        asked == [turn("one"), [*turn("one"), *"h\u00e9!".encode(), BYTE.end, *turn("two")]]
        and next(lines) == "never read"
    )


def test_the_prompt_may_come_on_stdin(start, monkeypatch, capsys):
    """echo ... | python sample.py"""
    asked = answers_of(monkeypatch)
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    program.main([f"--checkpoint={start['chat']}"])
    assert asked == [[BYTE.user, *b"from a pipe", BYTE.end, BYTE.assistant]]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--temperature=-1"], ["temperature", "-1"]),
        (["--top_p=1.5", "--n_samples=0"], ["top_p", "n_samples"]),
        (["--prompt= "], ["empty"]),
        (["--checkpoint=nowhere"], ["nowhere"]),
    ],
)
def test_wrong_requests_are_errors_in_words(start, flags, words):
    """A sampler is the first thing people try."""
    fails(lambda: program.main([f"--checkpoint={start['chat']}", "--prompt=x", *flags]), *words)
