"""Every published schema becomes one form, and what cannot be trained on is dropped aloud."""

import json
import random
from functools import partial

import pytest
from corpus_helpers import chat, quick, real
from helpers import BYTE, fails
from hypothesis import given
from hypothesis import strategies as st

from configurator import UserError
from corpus.chat import render, user_turn
from corpus.records import (
    evaluation_set,
    load_records,
    refuse_evaluation_problems,
    solution_pairs,
    split_records,
    to_records,
)
from corpus.schemas import GOLD, WEIGHTS, sft_record
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


SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = chat("", "a")[1:]
WORSE = chat("", "b")[1:]
PIRATE = "Be a pirate.\n\nHuman: Hi.\n\nAssistant: {}"
PUBLIC = [  # name, stage, row, record
    (
        "Alpaca of LLaMA-Factory, with system and history",
        "sft",
        {"instruction": "q", "input": "", "output": "a", "system": "Be brief.", "history": []}
        | {"history": [["Hi.", "Hello."]]},
        {"messages": [SYSTEM, *chat("Hi.", "Hello.", "q", "a")]},
    ),
    (
        "history as messages",
        "sft",
        {"instruction": "q", "output": "a", "history": chat("Hi.", "Hello.")},
        {"messages": chat("Hi.", "Hello.", "q", "a")},
    ),
    (
        "Dolly",
        "sft",
        {"instruction": "q", "context": "Read.", "response": "a", "category": "open_qa"},
        {"messages": chat("q\n\nRead.", "a")},
    ),
    (
        "Orca",
        "sft",
        {"id": "t0.1", "system_prompt": "Be brief.", "question": "q", "response": "a"},
        {"messages": [SYSTEM, *chat("q", "a")]},
    ),
    ("prompt, completion", "sft", {"prompt": "q", "completion": "a"}, {"messages": chat("q", "a")}),
    (
        "conversational prompt, completion of TRL",
        "sft",
        {"prompt": [SYSTEM, *chat("q")], "completion": ANSWER},
        {"messages": [SYSTEM, *chat("q", "a")]},
    ),
    (
        "a pair as a demonstration",
        "sft",
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"messages": chat("q", "a")},
    ),
    (
        "an implicit pair as a demonstration",
        "sft",
        {"chosen": chat("q", "a"), "rejected": chat("q", "b")},
        {"messages": chat("q", "a")},
    ),
    (
        "a system field beside messages",
        "sft",
        {"system": "Be brief.", "messages": chat("q", "a")},
        {"messages": [SYSTEM, *chat("q", "a")]},
    ),
    (
        "an empty system turn",
        "sft",
        {"messages": [{"role": "system", "content": " "}, *chat("q", "a")]},
        {"messages": chat("q", "a")},
    ),
    (
        "ShareGPT with an answer apart",
        "sft",
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
        },
        {"messages": chat("q", "a")},
    ),
    (
        "OpenAssistant's roles",
        "sft",
        {"messages": [{"role": "prompter", "text": "q"}, {"role": "assistant", "text": "a"}]},
        {"messages": chat("q", "a")},
    ),
    (
        "explicit prompt of TRL",
        "dpo",
        {"prompt": [SYSTEM, *chat("q")], "chosen": ANSWER, "rejected": WORSE},
        {"prompt": [SYSTEM, *chat("q")], "chosen": "a", "rejected": "b"},
    ),
    (
        "implicit prompt of TRL",
        "dpo",
        {"chosen": [SYSTEM, *chat("q", "a")], "rejected": [SYSTEM, *chat("q", "b")]},
        {"prompt": [SYSTEM, *chat("q")], "chosen": "a", "rejected": "b"},
    ),
    (
        "UltraFeedback, binarized",
        "dpo",
        {"prompt": "q", "chosen": chat("q", "a"), "rejected": chat("q", "b")}
        | {"messages": chat("q", "a"), "score_chosen": 8.0, "score_rejected": 5.0},
        {"prompt": chat("q"), "chosen": "a", "rejected": "b"},
    ),
    (
        "Orca's pairs",
        "dpo",
        {"system": "Be brief.", "question": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [SYSTEM, *chat("q")], "chosen": "a", "rejected": "b"},
    ),
    (
        "an HH prompt and its answers",
        "dpo",
        {"prompt": HH.format(""), "chosen": " So.", "rejected": " No."},
        {"prompt": HH_PROMPT, "chosen": "So.", "rejected": "No."},
    ),
    (
        "an HH prompt and whole dialogues",
        "dpo",
        {"prompt": HH.format(""), "chosen": HH.format("So."), "rejected": HH.format("No.")},
        {"prompt": HH_PROMPT, "chosen": "So.", "rejected": "No."},
    ),
    (
        "an HH prompt and marked answers",
        "dpo",
        {"prompt": "\n\nHuman: q", "chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"},
        {"prompt": chat("q"), "chosen": "a", "rejected": "b"},
    ),
    (
        "text before HH's first mark",
        "dpo",
        {"chosen": PIRATE.format("a"), "rejected": PIRATE.format("b")},
        {
            "prompt": [{"role": "system", "content": "Be a pirate."}, *chat("Hi.")],
            "chosen": "a",
            "rejected": "b",
        },
    ),
    (
        "pairs of LLaMA-Factory with a system column",
        "dpo",
        {"conversations": [{"from": "human", "value": "q"}], "system": "Be brief."}
        | {"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        {"prompt": [SYSTEM, *chat("q")], "chosen": "a", "rejected": "b"},
    ),
]


@pytest.mark.parametrize(
    "stage, row, record", [case[1:] for case in PUBLIC], ids=[c[0] for c in PUBLIC]
)
def test_public_forms_are_read_with_all_that_changes_their_meaning(stage, row, record):
    """The forms that most public sets have; system texts and earlier turns are part of them."""
    assert to_records([row], stage, "x") == [record]
    table = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()
    }
    if not any(isinstance(value, dict) for value in row.values()):  # the same from a .csv
        assert to_records([table], stage, "x") == [record]
    nulls = dict.fromkeys([*WEIGHTS, "messages", "prompt", "output", "tools", "history"])
    assert to_records([nulls | row], stage, "x") == [record]  # columns of a merged table


def as_sharegpt(turns: list[dict]) -> list[dict]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]


def as_parts(turns: list[dict]) -> list[dict]:
    """Cut every text into two parts, as OpenAI's content may be."""
    return [
        {
            **turn,
            "content": [
                {"type": "text", "text": part}
                for part in (turn["content"][:2], turn["content"][2:])
            ],
        }
        for turn in turns
    ]


WORDS = st.text("ab :é\n#", min_size=1, max_size=9).filter(str.strip)


@given(st.lists(WORDS, min_size=2, max_size=8), st.none() | WORDS)
@quick
def test_a_conversation_is_the_same_record_in_every_form(texts, system):
    """What a conversation means does not depend on how its publisher wrote it down."""
    turns = chat(*texts[: len(texts) // 2 * 2])
    first = [{"role": "system", "content": system}] if system else []
    whole = first + turns
    *before, question, answer = turns
    pairs = [[q["content"], a["content"]] for q, a in zip(before[::2], before[1::2], strict=True)]
    forms = [
        {"messages": whole},
        {"system": system, "messages": turns},
        {"messages": json.dumps(whole)},
        {"messages": as_parts(whole)},
        {"conversations": as_sharegpt(whole)},
        {"conversations": as_sharegpt(whole[:-1]), "chosen": as_sharegpt([answer])[0]},
        {"prompt": whole[:-1], "completion": [answer]},
        {"prompt": whole[:-1], "completion": answer["content"]},
        {"prompt": question["content"], "chosen": whole},
        {"chosen": whole},
        {
            "instruction": question["content"],
            "output": answer["content"],
            "history": pairs,
            "system": system,
        },
    ]
    for form in forms:
        assert to_records([form], "sft", "x") == [{"messages": whole}]


@given(
    st.lists(st.tuples(st.sampled_from(WEIGHTS), st.sampled_from([0, 1, 1.0, True, False, None])))
)
@quick
def test_no_answer_of_weight_0_is_trained_on_and_every_other_one_is(weights):
    """A bad turn that its publisher masked must not be learnt; all names of the mask count."""
    turns = chat(*(part for i in range(len(weights)) for part in (f"q{i}", f"a{i}")))
    for turn, (name, weight) in zip(turns[1::2], weights, strict=True):
        turn[name] = weight
    wanted = [f"a{i}" for i, (_, weight) in enumerate(weights) if weight is None or weight]
    spare = {"messages": chat("spare", "spare")}
    record, *others = to_records([{"messages": turns}, spare], "sft", "x")
    if not wanted:
        assert [record, *others] == [spare]
        return
    ids, supervised = render(record["messages"], BYTE)
    taught = BYTE.decode([i for i, is_taught in zip(ids, supervised, strict=True) if is_taught])
    assert taught == "".join(answer + "<|end|>" for answer in wanted)
    assert "train" not in record["messages"][-1]


@pytest.mark.parametrize("weight", [0.5, 2, -1, "no", [0]])
def test_a_weight_that_cannot_be_kept_is_refused(weight):
    """Half a weight, taken for a whole one, would be another loss than the publisher's."""
    turns = [*chat("q"), {**ANSWER[0], "weight": weight}]
    fails(lambda: to_records([{"messages": turns}], "sft", "x"), "record 1", "weight", str(weight))


def test_a_row_of_weight_0_is_dropped_and_a_row_marked_as_good_or_bad_is_refused(capsys):
    """Answers that somebody marked as bad must never become demonstrations."""
    good = {"prompt": "q", "completion": "a"}
    assert len(to_records([good, {**good, "prompt": "p", "weight": 0}], "sft", "x")) == 1
    assert "1 weight of 0" in capsys.readouterr().out
    for mark in ({"label": False}, {"label": True}, {"kto_tag": True}):
        fails(partial(to_records, [good | mark], "sft", "x"), *mark, "KTO")
        fails(partial(to_records, [good | mark], "dpo", "x"), *mark)


UNREAD = [
    ("sft", {"question": "q", "answer": "a", "choices": ["b"], "context": "c"}, "choices, context"),
    ("sft", {"messages": chat("q", "a"), "tools": [{"name": "f"}], "id": 0}, "tools, id"),
    (
        "sft",
        {"messages": [*chat("q"), {**ANSWER[0], "reasoning_content": "hm"}]},
        "messages.reasoning_content",
    ),
    (
        "sft",
        {"messages": [{**chat("q")[0], "train": True}, *ANSWER]},
        "messages.weight of the user",
    ),
    ("sft", {"instruction": "q", "output": "a", "images": ["a.png"]}, "images"),
    ("sft", {"messages": [SYSTEM, *chat("q", "a")], "system": "Other."}, "system"),
    ("dpo", {"prompt": "q", "chosen": "a", "rejected": "b", "score": 0.0}, "score"),
    ("verifier", {"question": "q", "answer": "#### 1", "system": "s"}, "system"),
    ("eval", {"question": "q", "answer": "#### 1", "choices": [1]}, "choices"),
    ("eval", {"sentence": "s", "label": 0, "idx": 0}, "idx"),
    ("eval", {"dialogue": "d", "summary": "s", "topic": "t"}, "topic"),
]


@pytest.mark.parametrize("stage, row, names", UNREAD)
def test_fields_that_are_not_read_are_named_once(capsys, stage, row, names):
    """Whoever made a field meant something by it; a null or an empty one says nothing."""
    read = partial(evaluation_set if stage == "eval" else to_records)
    arguments = ("mine",) if stage == "eval" else (stage, "mine")
    read([{**row, "notes": None, "extra": "", "list": []}] * 3, *arguments)
    assert f"mine: ignored: {names}\n" in capsys.readouterr().out


MARKED = [
    "<|im_start|>user\nhi<|im_end|>",
    "hi<|eot_id|>",
    "<|start_header_id|>user<|end_header_id|>\n\nhi",
    "<s>[INST] hi [/INST]",
    "[INST] <<SYS>>s<</SYS>> hi",
    "hi</s>\n",
    "<start_of_turn>user\nhi",
    "<｜User｜>hi",
    "<|endoftext|>",
    "hi<|end|><|assistant|>",
    "Below is a task.\n\n### Instruction:\nhi\n\n### Response:",
    "### Human: hi",
    "USER: hi ASSISTANT:",
    "so\n\nHuman: hi\n\nAssistant: yo",
]
UNMARKED = [
    "xs <| f |> g",
    "a <b> c",
    "Human: Living\nCar: not",
    "User: hi\n\nAssistant: yo",
    "<s>old</s> new",
    "# Instruction",
]


@pytest.mark.parametrize("text", MARKED)
def test_a_text_with_the_marks_of_a_template_is_dropped_aloud(capsys, text):
    """A template within the template would be learnt as words."""
    spare = {"messages": chat("spare", "spare")}
    rows = [{"messages": chat(text, "a")}, {"messages": chat("q", text)}, spare]
    assert to_records(rows, "sft", "mine") == [spare]
    assert "2 of 3 records dropped" in capsys.readouterr().out
    spare = {"prompt": chat("spare"), "chosen": "a", "rejected": "b"}
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": text},
        {**spare, "prompt": chat(text)},
        spare,
    ]
    assert to_records(rows, "dpo", "mine") == [spare]
    assert "of a chat template" in capsys.readouterr().out or text == MARKED[-1]
    rows = problems(text, "spare")
    assert to_records(rows, "verifier", "mine") == evaluation_set(rows, "mine")[1] == rows[1:]


@pytest.mark.parametrize("text", UNMARKED)
def test_a_text_that_only_looks_like_a_template_is_kept(text):
    """Code and plays are written with the same signs."""
    assert to_records([{"instruction": text, "output": text}], "sft", "x") == [
        {"messages": chat(text, text)}
    ]


def test_an_answer_that_is_json_with_roles_of_its_own_stays_a_text():
    """A model may be taught to write JSON, of staff or of chess men."""
    for text in (
        '[{"name": "Eva", "role": "engineer", "content": "x"}]',
        '{"role": "user"}',
        "[1]",
    ):
        assert to_records([{"prompt": "q", "completion": text}], "sft", "x") == [
            {"messages": chat("q", text)}
        ]


NO_SCHEMA = [
    ("sft", {"text": "### Human: hi### Assistant: yo"}),
    ("sft", {"role": "prompter", "text": "q", "message_id": "1", "parent_id": None}),
    ("dpo", {"history": "a post", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}),
    ("dpo", {"prompt": "q", "completion": "a", "label": True}),
    ("sft", {"instruction": "no output"}),
    ("sft", {"question": "q"}),
    ("sft", {"messages": [{"from": "a"}]}),
    ("sft", {"messages": "text"}),
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
        "verifier": {"question": "q", "answer": "#### 1"},
    }
    fails(
        lambda: to_records([good[stage], row], stage, "mine.jsonl"), "mine.jsonl, record 2", stage
    )


FAULTS = [
    ("sft", {"messages": "text"}, "messages is 'text', expected a list of messages"),
    ("sft", {"messages": [*chat("q"), "a"]}, "messages holds 'a', expected a message"),
    (
        "sft",
        {"messages": [{"role": "user", "content": 3}]},
        "messages.content is 3, expected a text",
    ),
    ("sft", {"messages": [{"role": "elf", "content": "a"}]}, "messages holds {'role': 'elf'"),
    ("sft", {"instruction": "q", "output": 3}, "output is 3, expected a text"),
    ("sft", {"instruction": "q", "output": "a", "history": "q"}, "history is 'q'"),
    ("sft", {"instruction": "q", "output": "a", "system": 3}, "system is 3"),
    ("sft", {"chosen": "plain"}, "chosen is 'plain': a text without a prompt"),
    ("dpo", {"prompt": "q", "chosen": ["a"], "rejected": "b"}, r"chosen is \['a'\]"),
    ("dpo", {"prompt": "q", "chosen": {}, "rejected": "b"}, "chosen is {}"),
    ("dpo", {"prompt": "q", "chosen": "a"}, "it lacks rejected"),
    ("dpo", {"prompt": "q", "completion": "a"}, "it lacks chosen and rejected"),
    ("verifier", {"question": ["q"], "answer": "#### 1"}, r"question is \['q'\]"),
]


@pytest.mark.parametrize("stage, row, words", FAULTS)
def test_the_message_names_the_field_that_is_wrong_and_what_it_holds(stage, row, words):
    """A Python error's text helps nobody to mend a file."""
    with pytest.raises(UserError, match=words) as caught:
        to_records([row], stage, "mine")
    assert "mine, record 1" in str(caught.value)
    assert not any(word in str(caught.value) for word in ("KeyError", "TypeError", "attribute"))


JUNK = [
    None,
    3,
    True,
    float("nan"),
    "",
    " ",
    "x",
    [],
    {},
    [None],
    [3],
    ["x"],
    [[]],
    [["x", 3]],
    {"a": 1},
]
JUNK += [[{}], [{"role": "user"}], [{"type": "text"}], [{"type": "image"}], "[" * 5000, "[{}]"]
JUNK += [{"role": None, "content": None}, [{"role": ["user"], "content": "x"}], chat("q", "a")]


@pytest.mark.parametrize("seed", range(60))
def test_no_row_ends_in_anything_but_records_or_words(seed):
    """Any field of any form may hold anything; what comes out is well formed."""
    rng = random.Random(seed)
    rows = [case[-2] for case in SCHEMAS + PUBLIC] + [row for _, row, _ in UNREAD]
    for _ in range(100):
        row = dict(rng.choice(rows))
        for key in rng.sample(sorted(row), rng.randint(1, min(2, len(row)))):
            row[key] = rng.choice(JUNK)
        for stage in ("sft", "dpo", "verifier", "eval"):
            try:
                found = (
                    evaluation_set([row], "x")[1]
                    if stage == "eval"
                    else to_records([row], stage, "x")
                )
            except UserError as error:
                assert str(error).startswith("x")
                continue
            assert len(found) == 1 and (stage in ("verifier", "eval") or renders(found[0]))


@pytest.mark.parametrize("stage, row, record", SCHEMAS)
def test_a_null_is_an_empty_text(capsys, stage, row, record):
    """One null in a million rows must not stop the preparation; it is dropped as "" is."""
    for key in row:
        outcomes = []
        for nothing in ("", None):
            rows = [{**row, key: nothing}, row]
            if isinstance(row[key], str):
                outcomes.append((to_records(rows, stage, "x"), capsys.readouterr().out))
        assert len({str(outcome) for outcome in outcomes}) <= 1


GOLDS = {
    True: ["5", "-5", "0.5", ".5", "5.", "18.00", "1,080", "12,345,678.9", "5\n", "007"],
    False: [
        "1/2",
        "3:30",
        "1 000",
        "1,5",
        "1,00,000",
        "$18",
        "12%",
        "5 apples",
        "--5",
        "1e5",
        "٣",
        "",
        "-",
        ".",
        ",",
        "five",
        "5\nso",
        "1.2.3",
        "−5",
        "10-15",
        "5 #### 6",
    ],
}


@pytest.mark.parametrize("is_number", GOLDS)
def test_a_problem_needs_a_gold_answer_that_is_wholly_a_number(capsys, is_number):
    """Of 1/2 only the 1 would be compared, and without #### none is; then every answer is wrong."""
    rows = [
        {"question": f"q{i}", "answer": f"so #### {gold}"}
        for i, gold in enumerate(GOLDS[is_number])
    ]
    spare = problems("spare")
    for read in (
        partial(to_records, kind="verifier", where="x"),
        lambda rows: evaluation_set(rows, "x")[1],
    ):
        assert read([*spare, *rows]) == spare + (rows if is_number else [])
        assert (
            f"{0 if is_number else len(rows)} answer that does not end in"
            in capsys.readouterr().out
            or is_number
        )
    bare = [{"question": "q", "answer": answer} for answer in ("5", "####5", "## 5", "#### \n5")]
    assert to_records([*spare, *bare], "verifier", "x") == spare
    fails(lambda: to_records(bare, "verifier", "x"), "x: no usable verifier record")
    assert all(bool(GOLD.fullmatch(gold.rstrip())) == is_number for gold in GOLDS[is_number])


SOLUTION = {"solution": "so 3", "is_correct": True}
TEST_RECORDS = {
    "problems_test.jsonl": {"question": "q", "answer": "#### 1"},
    "test.jsonl of sentences": {"sentence": "fine ", "label": "1"},
    "test.jsonl of dialogues": {"dialogue": "A: hi", "summary1": "s", "summary2": "t"},
    "test.jsonl of published": {"question": "q", "small": SOLUTION, "large": SOLUTION},
}


@pytest.mark.parametrize("file", TEST_RECORDS)
def test_a_test_set_keeps_its_form_its_order_and_its_doubles(file):
    """A cleaned benchmark is another benchmark."""
    row = TEST_RECORDS[file]
    first = {**row, "id": 7}
    before = json.dumps([first, row, row])
    assert json.dumps(evaluation_set([first, row, row], "x")[1]) == before
    assert evaluation_set([row], "x")[0] == file.partition(" ")[0]


def test_pairs_to_evaluate_become_records_of_dpo():
    """The task of preferences reads dpo_test.jsonl, and one form alone."""
    pairs = [{"prompt": "q", "chosen": ANSWER, "rejected": "b"}]
    record = {"prompt": chat("q"), "chosen": "a", "rejected": "b"}
    assert evaluation_set(pairs, "x") == ("dpo_test.jsonl", [record])


BAD_TEST_RECORDS = [
    ({"question": "2+2?", "answer": 4}, "answer is 4"),
    ({"question": {"stem": "Which?"}, "answerKey": "A"}, "question is {'stem'"),
    ({"sentence": "fine", "label": "positive"}, "label is 'positive', expected 0"),
    ({"sentence": "fine", "label": -1}, "label is -1, expected 0"),
    ({"sentence": "fine", "label": 2}, "label is 2"),
    ({"sentence": "fine", "label": None}, "label is null"),
    ({"sentence": "fine"}, "it lacks label"),
    ({"sentence": 3, "label": 1}, "sentence is 3"),
    ({"text": "fine", "label": 1}, "has text, label; expected .*sentence, label"),
    ({"dialogue": 3, "summary": "s"}, "dialogue is 3"),
    ({"dialogue": "d", "summary": 3}, "summary is 3"),
    (
        {"question": "q", "small": {"solution": None, "is_correct": True}},
        "small is {'solution': None",
    ),
    ({"question": "q", "small": {"text": "s"}}, "small is {'text'"),
    ({"messages": chat("q", "a")}, "has messages; expected"),
    (5, "no field"),
]


@pytest.mark.parametrize("row, words", BAD_TEST_RECORDS)
def test_a_test_record_that_no_task_can_read_is_refused_with_its_place(row, words):
    """Found at preparation, not after an hour of sampling."""
    with pytest.raises(UserError, match=f"mine, record 1.*{words}"):
        evaluation_set([row, row], "mine")


@pytest.mark.parametrize("file", TEST_RECORDS)
def test_a_test_set_of_two_kinds_is_refused(file):
    """Its file would be read by one task, which knows one kind."""
    other = next(
        row for name, row in TEST_RECORDS.items() if name != file and "question" not in row
    )
    other = other if file != "test.jsonl of sentences" else TEST_RECORDS["test.jsonl of dialogues"]
    fails(lambda: evaluation_set([TEST_RECORDS[file], other], "mine"), "mine, record 2", "lacks")


def test_what_is_empty_in_a_test_set_is_dropped_aloud(capsys):
    """An empty reference has no ROUGE, and an empty sentence no mood."""
    rows = [
        {"dialogue": "d", "summary1": text, "summary2": "", "n": 0} for text in ("s", " ", None)
    ]
    assert evaluation_set(rows, "x")[1] == rows[:1]
    assert "2 of 3 records dropped: 2 empty dialogue or no summary" in capsys.readouterr().out
    rows = [{"sentence": text, "label": True} for text in ("s", None, "\n")]
    assert evaluation_set(rows, "x")[1] == rows[:1]
    assert "2 empty sentence" in capsys.readouterr().out
    fails(lambda: evaluation_set([{"dialogue": "", "summary": "s"}], "x"), "x: no usable")
    fails(lambda: evaluation_set([], "x"), "x holds no record")


USELESS = [
    ("sft", {"instruction": None, "output": "a"}, "empty question"),
    ("sft", {"messages": None}, "empty response"),
    ("sft", {"messages": chat("q", "", "p", "a")}, "empty response"),
    ("sft", {"messages": chat("q", "b", "\n", "a")}, "empty question"),
    ("sft", {"instruction": "q", "output": "a", "history": [["p", ""]]}, "empty response"),
    (
        "sft",
        {"messages": [*chat("q"), {"role": "assistant", "function_call": {"name": "f"}}]},
        "tool",
    ),
    (
        "sft",
        {"conversations": [*as_sharegpt(chat("q", "a")), {"from": "observation", "value": "1"}]},
        "tool",
    ),
    (
        "sft",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, *chat("", "a")[1:]]},
        "image_url",
    ),
    (
        "dpo",
        {"prompt": "p", "chosen": chat("q", "a"), "rejected": chat("q", "b")},
        "another prompt",
    ),
    ("dpo", {"prompt": "q", "chosen": None, "rejected": "b"}, "empty response"),
    ("dpo", {"prompt": chat("q", "", "p"), "chosen": "a", "rejected": "b"}, "empty response"),
    (
        "dpo",
        {
            "chosen": HH.format("a").replace("Hi.", ""),
            "rejected": HH.format("b").replace("Hi.", ""),
        },
        "empty question",
    ),
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
        "verifier": {"question": "fine", "answer": "#### 1"},
    }
    assert len(to_records([good[stage], bad, bad], stage, "mine")) == 1
    said = capsys.readouterr().out
    assert "mine: 2 of 3 records dropped: 2 " in said and reason in said
    fails(lambda: to_records([bad], stage, "mine"), "mine: no usable", stage)


def test_duplicates_are_kept_once(capsys):
    """The same record twice would weigh double, and could be on both sides of a split."""
    rows = [
        {"question": "q", "answer": "#### 1"},
        {"question": "q", "answer": "#### 2"},
        {"question": "q", "answer": "#### 1", "id": 2},
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


@pytest.mark.parametrize("weight", [0, "0", 0.0, "0.0", False, "False", "false"])
def test_a_rows_weight_of_0_is_one_in_every_form(weight):
    """In a .csv all that a column holds is text."""
    rows = [{"prompt": f"q{i}", "completion": "a", "weight": i} for i in ("1", weight)]
    assert to_records(rows, "sft", "x") == [{"messages": chat("q1", "a")}]


def test_shares_of_records_are_refused(tmp_path):
    """All records of a name are used, whatever share of it was asked for."""
    write_jsonl(str(tmp_path / "mine" / "sft_val.jsonl"), [{"messages": chat("q", "a")}])
    assert len(load_records("mine", str(tmp_path), "sft", "val")) == 1
    fails(lambda: load_records("mine*0.5", str(tmp_path), "sft", "val"), "--data=mine*0.5", "name")


@pytest.mark.parametrize("content", ["", "{", "\0", '{"question": NaN}'])
def test_a_damaged_evaluation_set_that_a_run_does_not_name_is_passed_over_aloud(
    tmp_path, capsys, content
):
    """It is no reason to end a run, and leaks from the others are still found."""
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "test.jsonl").write_text(content)
    write_jsonl(str(tmp_path / "exam" / "problems_test.jsonl"), problems("2+2?"))
    refuse_evaluation_problems(problems("2+3?"), "mine", str(tmp_path))
    assert "bad/test.jsonl" in capsys.readouterr().out
    fails(lambda: refuse_evaluation_problems(problems("2+2?"), "mine", str(tmp_path)), "1 of 1")


def test_an_evaluation_set_whose_questions_are_no_texts_is_passed_over(tmp_path):
    """A set that a run does not name must not be able to end it."""
    rows = [{"question": {"stem": "Which?"}}, {"question": None}, {"question": ["a"]}, 3, ["x"]]
    write_jsonl(str(tmp_path / "arc" / "test.jsonl"), [*rows, *problems("2+2?")])
    refuse_evaluation_problems(problems("2+3?"), "mine", str(tmp_path))
    fails(lambda: refuse_evaluation_problems(problems("2+2?"), "mine", str(tmp_path)), "1 of 1")


@pytest.mark.parametrize(
    "spec, kind, split, key, command",
    [
        ("toy", "dpo", "train", "data", "data.py --sources=toy"),
        ("alpaca", "sft", "train", "data", "data.py --sources=alpaca"),
        ("alpaca", "dpo", "train", "data", "data.py --stage=dpo --sources=alpaca=FILE"),
        ("gsm8k", "problems", "train", "data", "data.py --sources=gsm8k"),
        ("mine", "sft", "val", "chats", "data.py --stage=sft --sources=mine=FILE"),
        ("mine", "problems", "verifier", "data", "data.py --stage=verifier --sources=mine=FILE"),
        ("mine", "problems", "test", "problems", "data.py --stage=eval --sources=mine=FILE"),
        ("mine", "dpo", "val", "pairs", "data.py --stage=dpo --sources=mine=FILE"),
    ],
)
def test_missing_records_name_the_setting_and_a_command_that_makes_them(
    tmp_path, spec, kind, split, key, command
):
    """--sources=NAME alone makes presets and the toy world; own data need a stage and a file."""
    said = fails(lambda: load_records(spec, str(tmp_path), kind, split, key), f"--{key}={spec}: ")
    assert said.endswith(command)


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


@pytest.mark.parametrize("kind", ["sft", "dpo", "problems"])
@pytest.mark.parametrize(
    "row",
    [
        *(
            7,
            [1, 2],
            {},
            {"messages": 3, "prompt": 3, "question": 3},
            {"messages": [7], "prompt": []},
        ),
    ],
)
def test_a_file_that_data_py_did_not_write_is_refused_by_record(tmp_path, kind, row):
    """Somebody puts a file of their own into the data folder: its third record is at fault."""
    good = {"messages": chat("a", "b"), "question": "a", "answer": "b"}
    good |= {"prompt": user_turn("a"), "chosen": "b", "rejected": "c"}
    write_jsonl(str(tmp_path / "mine" / f"{kind}_val.jsonl"), [good, good, row])
    fails(lambda: load_records("mine", str(tmp_path), kind, "val"), f"{kind}_val.jsonl", "record 3")
    write_jsonl(str(tmp_path / "mine" / f"{kind}_val.jsonl"), [good, good])
    assert load_records("mine", str(tmp_path), kind, "val") == [good, good]
