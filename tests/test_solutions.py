"""Solutions are sampled one like the other, and checked by their final answer; the calculator."""

import re

import pytest
import torch
import torch.nn.functional as F
from helpers import BYTE, END, REAL, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.tokenizer import load_tokenizer
from inference.sampling import GREEDY, generate
from inference.solutions import Attempts, Calculator, arithmetic, final_answer, solve
from runtime.files import read_jsonl

GSM8K = REAL / "gsm8k_train.jsonl.gz"
QUESTIONS = [{"question": "1+1?" + " please" * (i % 3), "answer": "#### 2"} for i in range(5)]


@pytest.mark.parametrize(
    "text,answer",
    [
        ("3+4=<<3+4=7>>7\n#### 7", "7"),
        ("#### 1,234,567", "1234567"),
        ("#### -12", "-12"),
        ("so it is 7", None),
        ("", None),
        ("#### 5.", "5"),
        ("#### 2.50", "2.50"),
        ("####5", None),
        ("#### $5", None),
        ("#### 7 apples", "7"),
        ("#### 3\n#### 4", "3"),
    ],
)
def test_final_answer_reads_what_gsm8k_reads(text, answer):
    """The strict match of the data set's own scorer.

    Number after "#### ", commas dropped; everything else is no answer.
    """
    assert final_answer(text) == answer


def test_a_batch_of_prompts_is_solved_as_each_alone():
    """Left padding and the shared cache must not leak between problems of unequal length."""
    model = tiny().double()
    together = solve(model, BYTE, QUESTIONS, Attempts(1, 0.0, 12))
    alone = [solve(model, BYTE, [question], Attempts(1, 0.0, 12))[0] for question in QUESTIONS]
    assert together == alone and len({tuple(row["solutions"][0]["ids"]) for row in alone}) > 1
    assert [row["question"] for row in together] == [row["question"] for row in QUESTIONS]


def test_the_same_seed_gives_the_same_samples_and_another_seed_others():
    """A number from samples can be had again.

    And samples of one problem differ from each other, or there is nothing to vote on.
    """
    model = tiny()

    def ids(seed):
        rows = solve(model, BYTE, QUESTIONS[:2], Attempts(3, 0.8, 12, seed=seed))
        return [[s["ids"] for s in row["solutions"]] for row in rows]

    first = ids(5)
    assert first == ids(5) != ids(6)
    assert len({tuple(x) for row in first for x in row}) == 6


def test_solutions_end_at_end_and_say_whether_they_did(monkeypatch):
    """What comes after <|end|> is no part of the answer.

    A solution cut by max_new_tokens is known as such.
    """
    model = tiny()
    script = [*b"#### 2", END, *b"#### 3"]
    position = iter(script)

    def logits(x):
        return F.one_hot(torch.tensor([next(position)]), 262).float() * 100

    monkeypatch.setattr(model, "logits", logits)
    (row,) = solve(model, BYTE, QUESTIONS[:1], Attempts(1, 0.0, 20))
    assert row["solutions"] == [
        {"ids": [*b"#### 2", END], "text": "#### 2", "stopped": True, "correct": True}
    ]
    position = iter(script)
    (row,) = solve(model, BYTE, QUESTIONS[:1], Attempts(1, 0.0, 4))
    assert row["solutions"] == [
        {"ids": [*b"####"], "text": "####", "stopped": False, "correct": False}
    ]


# ------------------------------------------------------------------------------------------------
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
    assert arithmetic(text) == pytest.approx(value)


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
    assert arithmetic(text) is None


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789.+-*/() ", max_size=20))
def test_arithmetic_agrees_with_python_wherever_both_have_a_value(text):
    value = arithmetic(text)
    if (
        value is not None
        and "**" not in text
        and not re.search(r"\b0\d|\d\s+[\d.]|\.\s|/\s+/|\.\d*\.", text)
    ):
        assert value == pytest.approx(eval(text), nan_ok=True)


def test_the_calculator_reproduces_the_annotations_of_gsm8k():
    """Every <<expression=value>> of the 7,473 training solutions, by value.

    The few that differ are wrong in the source.
    """
    if not GSM8K.is_file():
        pytest.skip(f"no GSM8K at {GSM8K}")
    asked = [
        pair.split("=")
        for row in read_jsonl(str(GSM8K))
        for pair in re.findall(r"<<([^<>]*)>>", row["answer"])
    ]
    wrong = [
        (left, right)
        for left, right in asked
        if (value := arithmetic(left)) is None or abs(value - float(right)) > 1e-6
    ]
    assert len(asked) == 23716 and len(wrong) < 15, wrong


@pytest.mark.parametrize("name", ["byte", "toy"])
def test_a_row_that_asks_the_calculator_is_handed_the_result(name):
    """The ids after "<<3+4=" are those of "7>>"; outside an open << there is nothing to hand."""
    tokenizer = load_tokenizer(name)
    tool = Calculator(tokenizer)
    assert tool(tokenizer.encode("x <<3+4=")) == tokenizer.encode("7>>")
    assert (
        tool(tokenizer.encode("3+4="))
        == tool(tokenizer.encode("<<3+="))
        == tool(tokenizer.encode("<<3+4=7>> ="))
        == []
    )
    assert tool(tokenizer.encode("<<1/3=")) == tokenizer.encode("0.333333>>")
    assert tool(tokenizer.encode("<<0*-5=")) == tokenizer.encode("0>>")


def test_the_calculator_corrects_a_model_while_it_generates():
    """A model trained to write "<<2+2=" is emulated by a model that can say one thing only."""
    model, tokenizer = tiny(), BYTE
    script = iter(tokenizer.encode("<<2+2=") + [0] * 99)

    class Scripted:
        embed, cfg = model.embed, model.cfg

        def hidden(self, idx, cache=None, pads=None):
            return model.hidden(idx, cache=cache, pads=pads)

        def logits(self, x):
            next_id = torch.tensor([next(script)])
            return F.one_hot(next_id, tokenizer.vocab_size).float()

    tool = Calculator(tokenizer)
    (row,) = generate(Scripted(), [[1]], 12, sampling=GREEDY, calculator=tool)
    assert tokenizer.decode(row[:9]) == "<<2+2=4>>" and row[9:] == [0, 0, 0]
