"""Every published schema becomes one form, and what cannot be trained on is dropped aloud."""

from functools import partial

import pytest
from corpus_helpers import chat, real
from helpers import BYTE, fails

from configurator import UserError
from corpus.chat import render, user_turn
from corpus.records import (
    load_records,
    refuse_evaluation_problems,
    sft_record,
    solution_pairs,
    split_records,
    to_records,
)
from runtime.files import read_jsonl, write_jsonl

HH = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: {}"


HH_PROMPT = chat("Hi.", "Hello.", "Why?")


SCHEMAS = [
    (
        "sft",
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"messages": chat("Add\n\n1 2", "3")},
    ),
    (
        "sft",
        {"instruction": "Add", "input": "", "output": "3", "text": "..."},
        {"messages": chat("Add", "3")},
    ),
    ("sft", {"instruction": "Add", "output": "3"}, {"messages": chat("Add", "3")}),
    ("sft", {"messages": chat("a", "b"), "id": 7}, {"messages": chat("a", "b")}),
    ("sft", {"question": "q", "answer": "#### 1"}, {"messages": chat("q", "#### 1")}),
    (
        "sft",
        {"chosen": HH.format("So."), "rejected": HH.format("No.")},
        {"messages": [*HH_PROMPT, *chat("", "So.")[1:]]},
    ),
    (
        "sft",
        {
            "instruction": "Add",
            "input": "",
            "output": "3",
            "chosen": "3",
            "rejected": "go away",
        },
        {"messages": chat("Add", "3")},
    ),
    (
        "dpo",
        {"chosen": HH.format("So."), "rejected": HH.format("No.")},
        {"prompt": HH_PROMPT, "chosen": "So.", "rejected": "No."},
    ),
    (
        "dpo",
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": chat("q"), "chosen": "a", "rejected": "b"},
    ),
    (
        "dpo",
        {"prompt": chat("q"), "chosen": "a", "rejected": "b"},
        {"prompt": chat("q"), "chosen": "a", "rejected": "b"},
    ),
    (
        "dpo",
        {"instruction": "i", "input": "x", "output": "a", "chosen": "a", "rejected": "b"},
        {"prompt": chat("i\n\nx"), "chosen": "a", "rejected": "b"},
    ),
    (
        "dpo",
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
            ],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {
            "prompt": [{"role": "system", "content": "s"}, *chat("q")],
            "chosen": "a",
            "rejected": "b",
        },
    ),
    (
        "verifier",
        {"question": "q", "answer": "#### 1", "id": 3},
        {"question": "q", "answer": "#### 1"},
    ),
]


@pytest.mark.parametrize("stage, row, record", SCHEMAS)
def test_each_schema_becomes_the_canonical_record(stage, row, record):
    """The published forms that RECORDS names, by hand."""
    assert to_records([row], stage, "x") == [record]


NO_SCHEMA = [
    ("sft", {"instruction": "no output"}),
    ("sft", {"prompt": "q", "completion": "a"}),
    ("sft", {"question": "q"}),
    ("sft", {"messages": [{"from": "a"}]}),
    ("sft", {"messages": "text"}),
    ("sft", {"instruction": "q", "output": None}),
    ("sft", {"instruction": None, "output": "a"}),
    ("sft", {"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}),
    ("sft", "text"),
    ("sft", 5),
    ("sft", None),
    ("sft", []),
    ("dpo", {"prompt": "q", "chosen": "a"}),
    ("dpo", {"instruction": "q", "output": "a"}),
    ("dpo", {"chosen": "no dialogue", "rejected": "no dialogue."}),
    ("dpo", {"prompt": "q", "chosen": ["a"], "rejected": ["b"]}),
    ("dpo", {"conversations": [{"from": "alien", "value": "q"}], "chosen": {}, "rejected": {}}),
    ("dpo", {"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}),
    ("verifier", {"instruction": "i", "output": "a"}),
    ("verifier", {"question": "q"}),
    ("verifier", {"question": "q", "answer": None}),
    ("verifier", {"question": 3, "answer": "3"}),
]


@pytest.mark.parametrize("stage, row", NO_SCHEMA)
def test_a_row_of_no_known_schema_is_an_error_with_its_place(stage, row):
    """A missing key, or text that is none, is a wrong file, not a record to skip.

    The second row is named, with what was wanted.
    """
    good = {
        "sft": {"instruction": "q", "output": "a"},
        "dpo": {"prompt": "q", "chosen": "a", "rejected": "b"},
        "verifier": {"question": "q", "answer": "1"},
    }
    fails(
        lambda: to_records([good[stage], row], stage, "mine.jsonl"), "mine.jsonl, record 2", stage
    )


USELESS = [
    ("sft", {"instruction": "q", "output": " \n"}, "empty response"),
    ("sft", {"messages": chat("a", "b", "c", "")}, "empty response"),
    ("sft", {"question": "q", "answer": ""}, "empty response"),
    ("sft", {"messages": chat("", "a", "b")[1:]}, "does not begin with the user"),
    ("sft", {"messages": []}, ""),
    ("sft", {"messages": chat("only a question")}, ""),
    ("sft", {"messages": chat("a", "b", "c")}, ""),
    ("sft", {"messages": [*chat("a", "b"), *chat("", "c")[1:]]}, ""),
    ("sft", {"messages": [{"role": "tool", "content": "x"}, *chat("a", "b")]}, ""),
    ("dpo", {"prompt": "q", "chosen": "", "rejected": "b"}, "empty response"),
    ("dpo", {"prompt": "q", "chosen": "a", "rejected": "\n"}, "empty response"),
    ("dpo", {"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
    (
        "dpo",
        {"chosen": HH.format("a"), "rejected": HH.replace("Why", "How").format("b")},
        "different prompts",
    ),
    (
        "dpo",
        {
            "chosen": "\n\nAssistant: Hi\n\nAssistant: a",
            "rejected": "\n\nAssistant: Hi\n\nAssistant: b",
        },
        "does not begin with the user",
    ),
    ("dpo", {"prompt": chat("q", "a"), "chosen": "b", "rejected": "c"}, ""),
    ("dpo", {"prompt": [], "chosen": "b", "rejected": "c"}, ""),
    ("dpo", {"chosen": HH.format("a\n\nHuman: b"), "rejected": HH.format("a\n\nHuman: c")}, ""),
    ("verifier", {"question": "q", "answer": " "}, "empty response"),
    ("verifier", {"question": "", "answer": "1"}, ""),
]


@pytest.mark.parametrize("stage, bad, reason", USELESS)
def test_a_useless_record_is_dropped_aloud(capsys, stage, bad, reason):
    """Known faults of real data are left out with a printed count and reason.

    It is an error where nothing is left. A conversation that render() would refuse, or that
    supervises nothing at its end, is of this kind: later it would end the run.
    """
    good = {
        "sft": {"instruction": "fine", "output": "a"},
        "dpo": {"prompt": "fine", "chosen": "a", "rejected": "b"},
        "verifier": {"question": "fine", "answer": "1"},
    }
    assert len(to_records([good[stage], bad, bad], stage, "mine")) == 1
    said = capsys.readouterr().out
    assert "mine: 2 of 3 records dropped: 2 " in said and reason in said
    fails(lambda: to_records([bad], stage, "mine"), "mine: no usable", stage)


def test_duplicates_are_kept_once(capsys):
    """The same record twice would weigh double, and could be on both sides of a split."""
    rows = [
        {"question": "q", "answer": "1"},
        {"question": "q", "answer": "2"},
        {"question": "q", "answer": "1", "id": 2},
    ]
    assert len(to_records(rows, "verifier", "mine")) == 2
    assert "1 of 3 records dropped: 1 duplicate" in capsys.readouterr().out


def test_no_rows_at_all_are_an_error():
    """0 records would train on nothing."""
    fails(lambda: to_records([], "sft", "mine"), "mine: no usable sft record")


def test_pairs_of_samples_are_right_against_wrong_and_no_sample_is_used_twice():
    """Cut-off samples are left out: their missing end is what a model would learn from."""
    solutions = [
        ("a", True, True),
        ("b", True, False),
        ("a", True, True),
        ("c", True, True),
        ("d", False, False),
        ("e", True, False),
        ("f", True, False),
    ]
    row = {
        "question": "q",
        "solutions": [
            {"text": t, "stopped": stopped, "correct": right} for t, stopped, right in solutions
        ],
    }
    assert solution_pairs(row) == [
        {"prompt": user_turn("q"), "chosen": "a", "rejected": "b"},
        {"prompt": user_turn("q"), "chosen": "c", "rejected": "e"},
    ]


def problems(*questions: str) -> list[dict]:
    return [{"question": question, "answer": "#### 4"} for question in questions]


@pytest.mark.parametrize("stage, n", [("sft", 2), ("dpo", 2), ("verifier", 3)])
def test_the_fewest_prompts_fill_every_split_and_one_less_is_an_error(stage, n):
    """A prompt moves with all its records, so no split shares one with another."""
    rows = problems(*(f"q{i}" for i in range(n)))
    if stage == "sft":
        rows = list(map(sft_record, rows))
    elif stage == "dpo":
        rows = [{"prompt": chat(f"q{i}"), "chosen": "a", "rejected": "b"} for i in range(n)]
    splits = split_records(rows + rows, stage, "mine")
    assert list(splits) == ["train", "val", "verifier"][:n]
    assert all(len(part) == 2 and part[0] == part[1] for part in splits.values())
    fails(lambda: split_records(rows[1:] * 3, stage, "mine"), "mine", "too few", f"at least {n}")


@pytest.mark.parametrize("file", ["problems_test.jsonl", "test.jsonl"])
def test_records_that_ask_a_question_of_an_evaluation_set_are_refused(tmp_path, file):
    """In another case and spacing too, and in each kind of record."""
    write_jsonl(str(tmp_path / "exam" / file), [*problems(" What  IS 2+2? "), {"sentence": "x"}])
    question = "what is 2+2?"
    leaks = [
        {"question": question, "answer": "4"},
        {"messages": [{"role": "system", "content": "s"}, *chat(question, "4")]},
        {"prompt": chat(question), "chosen": "4", "rejected": "5"},
    ]
    clean = problems("what is 2+3?")
    refuse_evaluation_problems(clean, "mine", str(tmp_path))
    for leak in leaks:
        words = ("1 of 2", "mine", str(tmp_path / "exam"), question)
        fails(partial(refuse_evaluation_problems, [*clean, leak], "mine", str(tmp_path)), *words)
    write_jsonl(str(tmp_path / "mine" / "problems_train.jsonl"), problems(question))
    for kind in ("sft", "problems"):
        fails(partial(load_records, "mine", str(tmp_path), kind, "train"), "1 of 1")


def renders(record: dict) -> bool:
    try:
        render(
            record["messages"]
            if "messages" in record
            else [*record["prompt"], {"role": "assistant", "content": record["chosen"]}],
            BYTE,
        )
    except UserError:
        return False
    return True


def test_alpaca_converts_whole_but_for_its_empty_outputs(capsys):
    """52,002 published records, 28 of them without an answer; no two are equal."""
    rows = read_jsonl(real("alpaca_52k.jsonl.gz"))
    kept = to_records(rows, "sft", "alpaca")
    assert (len(rows), len(kept)) == (52_002, 51_974)
    assert capsys.readouterr().out == "alpaca: 28 of 52002 records dropped: 28 empty response\n"
    assert all(renders(record) for record in kept[::50])


def test_hh_rlhf_pairs_that_are_kept_can_be_rendered(capsys):
    """Of 2,312 published test pairs 13 are dropped.

    4 have an empty answer, 5 differ before the last turn, 4 more hold two assistant turns in a row.
    """
    rows = read_jsonl(real("hh_rlhf_harmless_base_test.jsonl.gz"))
    kept = to_records(rows, "dpo", "hh")
    assert len(rows) == 2312
    assert "4 empty response" in capsys.readouterr().out
    assert sum(not renders(record) for record in kept) == 0
    assert len(kept) == 2299


@pytest.mark.parametrize(
    "name, n, kept, why",
    [
        ("preference_raschka_1100.jsonl", 1100, 1094, "6 chosen equals rejected"),
        ("preference_llamafactory_dpo_en.jsonl.gz", 300, 295, "5 duplicate"),
    ],
)
def test_the_preference_files_convert(capsys, name, n, kept, why):
    """The counts are those that were looked up in the files.

    Six pairs are equal in the one, five rows are repeated in the other.
    """
    rows = read_jsonl(real(name))
    records = to_records(rows, "dpo", "x")
    assert (len(rows), len(records)) == (
        n,
        kept,
    ) and f"{n - kept} of {n} records dropped: {why}\n" in capsys.readouterr().out
    assert all(renders(record) for record in records)


@pytest.mark.parametrize("name, n", [("gsm8k_train.jsonl.gz", 7473), ("gsm8k_test.jsonl", 1319)])
def test_gsm8k_converts_whole(capsys, name, n):
    """The published counts; nothing may be dropped from a benchmark."""
    records = to_records(read_jsonl(real(name)), "verifier", "gsm8k")
    assert (
        len(records) == n
        and all("#### " in record["answer"] for record in records)
        and capsys.readouterr().out == ""
    )
