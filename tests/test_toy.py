"""The toy world: what its docstring promises, checked on records of several seeds."""

import random
import re
import runpy
import subprocess
import sys
from collections import Counter

import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import toy
from corpus.chat import render, render_prompt, user_turn
from corpus.folders import ToySizes, toy_records
from corpus.tokenizer import load_tokenizer
from inference.answers import answer_text
from inference.sampling import GREEDY, generate
from inference.solutions import final_answer
from runtime.checkpoint import load_checkpoint, model_from

MAKERS = (toy.story, toy.instruction, toy.preference, toy.problem)
SPLITS = ("train", "verifier", "val", "test")
LINE = re.compile(r"(\d+)([-+*])(\d+)=<<(\d+)([-+*])(\d+)=(\d+)>>(\d+)")
VALUE = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def keyed(make, split: str, n: int = 300, seed: int = 0) -> list[tuple[str, object]]:
    """n (key, record) of a split, as records() draws them."""
    rng, found = random.Random(f"{split} {seed}"), []
    while len(found) < n:
        key, record = make(rng)
        if toy.in_split(key, split):
            found.append((key, record))
    return found


def numbers_of(question: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", question)))


@pytest.mark.parametrize("make", MAKERS)
def test_records_are_a_pure_function_of_their_arguments(make):
    """Every stage of every machine must see the same world, whatever was drawn before."""
    first = toy.records(make, "train", 40, 3)
    random.seed(0)
    toy.records(make, "val", 7, 3)
    assert toy.records(make, "train", 40, 3) == first
    assert toy.records(make, "train", 40, 4) != first


@pytest.mark.parametrize("make", MAKERS)
def test_more_records_continue_the_shorter_list(make):
    """A larger toy world is the smaller one and more: runs of different sizes can be compared."""
    assert toy.records(make, "train", 60, 0)[:25] == toy.records(make, "train", 25, 0)


@pytest.mark.parametrize("make", MAKERS)
def test_records_are_distinct(make):
    """n records must be n facts, not one repeated."""
    rows = toy.records(make, "train", 500, 0)
    assert len(rows) == 500 == len({repr(row) for row in rows})


@pytest.mark.parametrize("seed", range(8))
def test_no_records_asked_for_none_made(seed):
    """0 is a count like any other; it must not search for ever or depend on the seed."""
    assert toy.records(toy.problem, "train", 0, seed) == []


def test_every_key_belongs_to_exactly_one_split():
    """The shares of SPLITS must cover the key space once, else a problem leaks or is lost."""
    for number in range(2000):
        assert sum(toy.in_split(f"key {number}", split) for split in SPLITS) == 1
    assert sorted(tenth for tenths in toy.SPLITS.values() for tenth in tenths) == list(range(10))


def test_the_splits_have_about_their_shares():
    """60 % train, 20 % verifier, 10 % val, 10 % test of the keys."""
    share = {
        split: sum(toy.in_split(f"key {i}", split) for i in range(5000)) / 5000 for split in SPLITS
    }
    assert share == pytest.approx(
        {"train": 0.6, "verifier": 0.2, "val": 0.1, "test": 0.1}, abs=0.03
    )


def test_the_numbers_of_a_problem_are_in_one_split_alone():
    """A held-out problem must not be a training problem with other names.

    The numbers decide, in the order they are asked.
    """
    seen = {}
    names, things = "|".join(toy.NAMES), "|".join(toy.THINGS)
    for split in SPLITS:
        for seed in range(2):
            for row in toy.records(toy.problem, split, 400, seed):
                form = re.sub(rf"\b(?:{names})\b", "N", row["question"])
                form = re.sub(rf"\b(?:{things})s\b", "things", form)
                assert seen.setdefault(form, split) == split, form


@pytest.mark.parametrize("make", [toy.instruction, toy.preference])
def test_the_cast_of_a_tale_is_in_one_split_alone(make):
    """The prompt names the cast: a prompt of val or test must never be trained on."""
    prompts = {
        split: {
            (row.get("messages") or row["prompt"])[0]["content"]
            for row in toy.records(make, split, 300, 0)
        }
        for split in SPLITS
    }
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or not prompts[one] & prompts[other]


def test_instructions_and_pairs_of_one_split_share_their_casts():
    """Both stages cut by the same key, or DPO would train on prompts that SFT holds out."""
    for split, other in (("train", "test"), ("val", "train")):
        asked = {
            row["messages"][0]["content"] for row in toy.records(toy.instruction, split, 300, 0)
        }
        assert not asked & {
            row["prompt"][0]["content"] for row in toy.records(toy.preference, other, 300, 0)
        }


@pytest.mark.parametrize(
    "make, split",
    [(toy.story, "train"), (toy.story, "val"), (toy.problem, "train"), (toy.problem, "test")],
)
def test_every_calculation_is_right_and_never_negative(make, split):
    """A wrong sum in the data would be learnt.

    Both the <<a+b=c>> note and the number after it count.
    """
    checked = 0
    for row in toy.records(make, split, 800, 1):
        for a, op, b, left, op_again, right, noted, shown in LINE.findall(
            row if make is toy.story else row["answer"]
        ):
            assert (a, op, b) == (left, op_again, right) and noted == shown
            assert int(shown) == VALUE[op](int(a), int(b)) >= 0
            checked += 1
    assert checked > 300


def recomputed(question: str) -> int:
    """The answer from the words of the question alone, by a second way of reading it."""
    a, b, *c = numbers_of(question)
    if "more than" in question:
        return a + (a + b)
    if "bags" in question:
        return a * b - c[0]
    if "loses" in question:
        return a + b - c[0]
    assert "lost" in question and "got" in question
    return a - b + c[0]


@given(st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_the_final_answer_is_what_the_question_asks(seed):
    """The verifier and eval trust the number after ####.

    It must follow from the question, not only from the steps.
    """
    _, row = toy.problem(random.Random(seed))
    lines = row["answer"].split("\n")
    assert lines[-1] == f"#### {recomputed(row['question'])}"
    assert int(lines[-1].removeprefix("#### ")) >= 0


def test_problems_have_the_form_of_gsm8k():
    """GSM8K's reader must read question and answer.

    The answer is calculator lines, then one line '#### N'.
    """
    for row in toy.records(toy.problem, "train", 300, 0):
        assert set(row) == {"question", "answer"}
        *steps, final = row["answer"].split("\n")
        assert len(steps) == 2 and all(LINE.fullmatch(step) for step in steps)
        assert re.fullmatch(r"#### \d+", final)
        assert steps[-1].endswith(">>" + final.removeprefix("#### "))
        assert row["question"].endswith("?")


def test_a_problem_needs_both_of_its_steps():
    """The second step starts from or adds to the first one's value.

    It is reasoning in two steps, not two sums side by side.
    """
    for row in toy.records(toy.problem, "train", 300, 0):
        first, second = (LINE.match(step) for step in row["answer"].split("\n")[:2])
        assert second[1] == first[8]


def test_all_four_kinds_of_problem_occur_alike():
    """A kind that never came would be a kind that eval cannot measure."""
    kinds = Counter(key.split()[1] for key, _ in keyed(toy.problem, "train", 1000))
    assert set(kinds) == set("0123") and min(kinds.values()) > 150


def test_a_worked_step():
    """GSM8K's notation by hand."""
    assert toy.step(3, "+", 4) == ("3+4=<<3+4=7>>7", 7)
    assert toy.step(9, "-", 4) == ("9-4=<<9-4=5>>5", 5)
    assert toy.step(3, "*", 4) == ("3*4=<<3*4=12>>12", 12)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_chosen_tales_pass_both_counts_and_rejected_ones_fail_exactly_one(split):
    """The pairs teach two things, one at a time.

    A rejected tale that fails both or none would teach neither.
    """
    failed = Counter()
    for row in toy.records(toy.preference, split, 500, 0):
        prompt = row["prompt"][0]["content"]
        assert toy.judge_tale(prompt, row["chosen"]) == {"on_topic": True, "kind": True}
        verdict = toy.judge_tale(prompt, row["rejected"])
        assert sum(verdict.values()) == 1, row
        failed[min(verdict, key=verdict.get)] += 1
    assert min(failed["on_topic"], failed["kind"]) > 175  # about half each


@pytest.mark.parametrize("seed", range(3))
def test_length_does_not_tell_chosen_from_rejected(seed):
    """The rule "the longer one wins" must be a coin toss, else DPO learns length."""
    rows = toy.records(toy.preference, "train", 1200, seed)
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in rows)
    shorter = sum(len(row["chosen"]) < len(row["rejected"]) for row in rows)
    assert 0.4 < longer / (longer + shorter) < 0.6


VERDICTS = [
    ("Tom the cat found a red pen at the park. Tom gave Mia a hug.", (True, True)),
    ("Tom the cat found a red pen at the park. Tom yelled at Mia and ran off.", (True, False)),
    ("Tom the dog found a red pen at the park. Tom gave Mia a hug.", (False, True)),
    ("Tom the cat found a red cup at the park. Tom gave Mia a hug.", (False, True)),
    ("Mia the cat found a red pen at the park. Mia gave Tom a hug.", (False, True)),
    (
        "Tom the dog found a red pen at the park. It was a bad day and all were sad.",
        (False, False),
    ),
    ("", (False, False)),
    ("pen. pen. pen.", (False, False)),
    (
        "Tom the cat found a red pen at the park. Tom gave Mia a hug. Tom gave Mia a hug.",
        (True, False),
    ),
]


@pytest.mark.parametrize("response, verdict", VERDICTS)
def test_the_judge_by_hand(response, verdict):
    """The measure of the DPO stage gives what a reader would say, whatever the model wrote."""
    assert (
        tuple(toy.judge_tale("Tell a tale of Tom the cat and a pen.", response).values()) == verdict
    )


def test_the_crowd_of_the_sft_tales_is_as_careless_as_told():
    """About half rude and a third off topic: that is what DPO has to mend, so it must be there."""
    verdicts = [
        toy.judge_tale(*(m["content"] for m in row["messages"]))
        for row in toy.records(toy.instruction, "train", 1200, 0)
    ]
    assert sum(v["kind"] for v in verdicts) / 1200 == pytest.approx(1 / 2, abs=0.06)
    assert sum(v["on_topic"] for v in verdicts) / 1200 == pytest.approx(2 / 3, abs=0.06)


def test_chats_are_one_question_and_one_answer():
    """The form that render() and SFT take."""
    for row in toy.records(toy.instruction, "train", 50, 0):
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


def test_dialogues_hold_every_chat_once_in_one_to_three_turns():
    """Joining must neither lose a chat nor teach one twice, nor mix the turns of two."""
    chats = toy.records(toy.instruction, "train", 200, 0)
    joined = toy.conversations(chats, 0)
    turns = [message for row in joined for message in row["messages"]]
    pairs = [{"messages": turns[i : i + 2]} for i in range(0, len(turns), 2)]
    assert sorted(map(repr, pairs)) == sorted(map(repr, chats))
    counts = Counter(len(row["messages"]) // 2 for row in joined)
    assert counts.keys() == {1, 2, 3}
    assert counts[1] == pytest.approx(len(joined) / 2, abs=2)
    assert counts[2] == pytest.approx(counts[3], abs=2)


def test_dialogues_depend_on_the_seed_alone():
    """Two machines must train on the same data."""
    chats = toy.records(toy.instruction, "val", 40, 0)
    assert toy.conversations(chats, 1) == toy.conversations(chats, 1)
    assert toy.conversations(chats, 1) != toy.conversations(chats, 2)


def test_every_dialogue_of_the_default_world_fits_the_context_of_its_recipe():
    """A dialogue that is dropped for its length would leave the third turn untaught."""
    tokenizer = load_tokenizer("toy")
    recipe = runpy.run_path(str(ROOT / "config" / "pretrain.py"))
    for split in ("train", "val"):
        rows = toy_records(ToySizes())[f"sft_{split}"]
        longest = max(len(render(row["messages"], tokenizer)[0]) for row in rows)
        assert recipe["seq_len"] - 16 <= longest - 1 <= recipe["seq_len"]


@pytest.mark.parametrize("make", MAKERS)
def test_every_word_is_one_token_and_every_digit_too(make):
    """The toy tokenizer exists so that the default run is short.

    Nothing but digits, "," and line ends may fall to bytes.
    """
    tokenizer = load_tokenizer("toy")
    for record in toy.records(make, "train", 500, 7):
        for text in toy.strings(record):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert {chr(i) for i in ids if i < 256} <= set("0123456789+-*=,.? \nA"), text


def test_the_toy_tokenizer_is_the_same_on_every_machine():
    """Its words are collected from generated records.

    Another order, and a checkpoint would be read with other ids.
    """
    assert load_tokenizer("toy").spec() == load_tokenizer("toy").spec() and toy.words() == sorted(
        set(toy.words())
    )
    assert load_tokenizer("toy").hash == "9d5b4d0ba5837d85"


def test_a_world_too_small_for_the_request_says_so():
    """An endless search would look like a hang."""
    with pytest.raises(Exception, match="too small"):
        toy.records(
            lambda rng: ("key 1", "the only record"),
            next(s for s in SPLITS if toy.in_split("key 1", s)),
            2,
            0,
        )


@pytest.mark.slow
def test_a_second_question_is_answered_about_as_well_as_the_first(tmp_path):
    """The default recipes, pretrained and tuned: a chat does not end after one answer."""
    for program, stage in (("train.py", "pretrain"), ("align.py", "sft")):
        command = [sys.executable, program, f"config/{stage}.py", f"--out_dir={tmp_path}/{stage}"]
        command += [f"--data_dir={tmp_path}/data"]
        command += [f"--init_from={tmp_path}/pretrain"] * (stage == "sft")
        subprocess.run(command, cwd=ROOT, check=True)
    model = model_from(load_checkpoint(str(tmp_path / "sft"))).eval()
    tokenizer = load_tokenizer("toy")
    problems = toy.records(toy.problem, "test", 100, 0)
    asked = [user_turn(row["question"]) for row in problems]
    tales = toy.records(toy.instruction, "test", 100, 0)

    def answers(dialogues: list[list[dict]]) -> list[str]:
        prompts = [render_prompt(messages, tokenizer) for messages in dialogues]
        found = generate(model, prompts, 64, tokenizer.stops, sampling=GREEDY)
        return [answer_text(ids, tokenizer) for ids in found]

    def share_right(texts: list[str]) -> float:
        pairs = zip(texts, problems, strict=True)
        return sum(final_answer(text) == final_answer(row["answer"]) for text, row in pairs) / 100

    before = [row["messages"][:1] for row in tales]
    told = [
        toy.chat(turn[0]["content"], text)
        for turn, text in zip(before, answers(before), strict=True)
    ]
    later = [row["messages"] + turn for row, turn in zip(told, asked, strict=True)]
    first, second = share_right(answers(asked)), share_right(answers(later))
    assert first > 0.6
    assert second > 0.8 * first
