"""Chats become the right ids with the right ones supervised, and packing loses none of them."""

import pytest
from corpus_helpers import chat, quick
from helpers import ASSISTANT, BYTE, END, EOS, PAD, USER, fails
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus.chat import (
    Packed,
    Pair,
    chat_document,
    describe_pairs,
    describe_solutions,
    drop_too_long,
    encode_pair,
    pack,
    pair_rows,
    render,
    render_prompt,
    show_supervised,
    solution_documents,
    user_turn,
)
from corpus.tokenizer import Tokenizer
from corpus.toy import chat as toy_chat


def test_a_single_turn_as_literal_ids():
    """Written out by hand: the assistant's words and its <|end|> are supervised, nothing else."""
    ids, supervised = render(chat("hi", "yo!"), BYTE)
    assert ids == [258, 104, 105, 260, 259, 121, 111, 33, 260]
    assert [int(s) for s in supervised] == [0, 0, 0, 0, 0, 1, 1, 1, 1]


def test_several_turns_after_a_system_message_as_literal_ids():
    """Every answer of the assistant is supervised, also the earlier ones.

    System and user turns never are.
    """
    ids, supervised = render([{"role": "system", "content": "S"}, *chat("a", "b", "c", "dé")], BYTE)
    assert ids == [257, 83, 260, 258, 97, 260, 259, 98, 260, 258, 99, 260, 259, 100, 195, 169, 260]
    assert [int(s) for s in supervised] == [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]


@given(st.lists(st.booleans(), min_size=1, max_size=4))
@quick
def test_an_answer_that_is_not_to_be_trained_on_is_context_alone(trained):
    """The ids are the same; of the masked answer neither words nor <|end|> are supervised."""
    turns = chat(*(text for i in range(len(trained)) for text in (f"q{i}", f"a{i}")))
    masked = [dict(turn) for turn in turns]
    for turn, is_trained in zip(masked[1::2], trained, strict=True):
        if not is_trained:
            turn["train"] = False
    ids, supervised = render(masked, BYTE)
    assert ids == render(turns, BYTE)[0]
    taught = [i for i, flag in zip(ids, supervised, strict=True) if flag]
    expected = [[*f"a{i}".encode(), END] for i, flag in enumerate(trained) if flag]
    assert taught == [i for part in expected for i in part]


@given(
    st.lists(st.text(max_size=9), min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0)
)
@quick
def test_the_last_supervised_id_is_the_end_of_the_answer(texts):
    """A model that is not taught to stop never stops; and text can add no special id of its own."""
    ids, supervised = render(chat(*texts), BYTE)
    assert len(ids) == len(supervised) and supervised[-1] and ids[-1] == END
    assert sum(i >= 256 for i in ids) == 2 * len(texts)
    assert sum(supervised) == sum(len(text.encode()) + 1 for text in texts[1::2])


def test_a_prompt_is_the_beginning_of_the_whole_conversation():
    """Generation must continue from the very ids that training saw before the answer."""
    prompt = render_prompt(user_turn("hi"), BYTE)
    assert prompt == [258, 104, 105, 260, 259] == render(chat("hi", "yo"), BYTE)[0][:5]


@pytest.mark.parametrize(
    "roles",
    [
        [],
        ["assistant"],
        ["system"],
        ["user", "user"],
        ["user", "assistant", "assistant"],
        ["user", "system"],
        ["system", "system", "user"],
        ["user", "tool"],
    ],
)
def test_turns_out_of_order_are_an_error_that_lists_them(roles):
    """The template has no meaning for them; the message shows what came."""
    fails(
        lambda: render([{"role": role, "content": "x"} for role in roles], BYTE),
        ", ".join(roles) or "empty",
    )


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 60).flatmap(
        lambda space: st.tuples(st.just(space), st.lists(st.integers(1, space), max_size=60))
    )
)
def test_packing_keeps_every_item_once_within_the_space_and_wastes_little(case):
    """A lost document is lost data, an overfull row is a crash, a half-empty one is waste.

    Best-fit decreasing needs at most 11/9 of the least number of groups plus one, and first-fit is
    never below that least number.
    """
    space, lengths = case
    groups = pack(lengths, space)
    assert sorted(item for group in groups for item in group) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in group) <= space for group in groups)
    free = []
    for length in lengths:
        place = next((i for i, left in enumerate(free) if left >= length), None)
        if place is None:
            free.append(space - length)
        else:
            free[place] -= length
    assert len(groups) <= 11 / 9 * len(free) + 1


def test_packing_fills_rows_that_fit_exactly():
    """Items that complement each other share a row: 6 + 4 and 7 + 3 need two rows of 10."""
    assert sorted(map(sorted, pack([6, 7, 3, 4], 10))) == [[0, 3], [1, 2]]


@pytest.fixture(scope="module")
def merging():
    """A BPE tokenizer with merges across the words of a pair."""
    ranks = {bytes([i]): i for i in range(256)} | {
        merge: 256 + i for i, merge in enumerate((b"ab", b" a", b" ab", b"aa"))
    }
    return Tokenizer("merging", ranks, "test")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(*[st.text("ab \n<|end|>", max_size=12)] * 3)
def test_chosen_and_rejected_have_identical_prompt_ids(merging, prompt, chosen, rejected):
    """A token that merges across the border would give the two answers different prompts.

    Text that spells <|end|> ends nothing.
    """
    record = {"prompt": user_turn(prompt), "chosen": chosen, "rejected": rejected}
    pair = encode_pair(record, merging)
    question, special = merging.encode(prompt), merging.special
    before, after = special["<|user|>"], special["<|assistant|>"]
    assert pair.prompt == [before, *question, merging.end, after]
    assert pair.chosen == [*merging.encode(chosen), merging.end]
    assert pair.rejected == [*merging.encode(rejected), merging.end]
    assert all(part.count(merging.end) == 1 for part in pair)


def test_the_longest_of_a_pair_is_the_prompt_with_the_longer_answer():
    """Pairs are dropped and padded by it, so it must count every id."""
    assert Pair([1, 2], [3], [4, 5, 6]).longest == 5 == Pair([1, 2], [4, 5, 6], [3]).longest


DOCUMENTS = [
    {"ids": [1, 2, 3], "targets": [-1, 2, 3], "labels": [0, -1, 1]},
    {"ids": [4, 5], "targets": [-1, 5], "labels": [-1, -1]},
    {"ids": [6, 7, 8, 9, 10], "targets": [-1] * 5, "labels": [-1] * 5},
]
ROWS = {
    "idx": [[1, 2, 4, PAD], [6, 7, 8, 9]],
    "docs": [[0, 0, 1, -1], [0, 0, 0, 0]],
    "targets": [[2, 3, 5, -1], [-1] * 4],
    "labels": [[-1, 1, -1, -1], [-1] * 4],
}


def test_two_documents_in_one_row_as_literal_arrays():
    """Inputs are all ids but the last, labels all but the first; nothing else is filled."""
    packed = Packed(DOCUMENTS, 4, PAD, 0)
    assert packed.rows == [[2], [0, 1]]
    assert {name: rows.tolist() for name, rows in packed.batch([1, 0]).items()} == ROWS


def test_packed_rows_come_once_per_epoch_in_an_order_of_the_seed():
    """Resume asks for the same rows in other pieces."""
    documents = [{"ids": list(range(9)), "targets": [-1] * 9} for _ in range(20)]
    packed = Packed(documents, 8, PAD, 3)
    order = packed.shuffled(0, 40)
    assert sorted(order[:20]) == sorted(order[20:]) == list(range(20))
    assert order[:20] != order[20:] and order != Packed(documents, 8, PAD, 4).shuffled(0, 40)
    assert packed.shuffled(0, 7) + packed.shuffled(7, 40) == order


def test_rows_that_are_too_long_are_dropped_aloud_and_all_of_them_is_an_error():
    """A row in the log that nobody counts, or training on nothing, would be missed."""
    said = []
    assert drop_too_long(["a", "bcd", "ef"], len, 2, "texts", said.append) == ["a", "ef"]
    (line,) = said
    assert line.startswith("texts: 1 of 3 are longer than seq_len=2 tokens and dropped")
    assert "the longest has 3" in line and "--seq_len=3" in line
    assert drop_too_long(["ab"], len, 2, "texts", said.append) == ["ab"] and len(said) == 1
    fails(lambda: drop_too_long(["abc"], len, 2, "texts", said.append), "all 1 are longer")
    fails(lambda: drop_too_long(["abc"], len, 2, "texts", said.append), "seq_len=2", "--seq_len=3")
    assert drop_too_long(["abc"], len, 2, "texts", said.append, needed=False) == []
    assert said[1].startswith("texts: 1 of 1 are")


def test_supervised_stretches_are_shown_in_brackets():
    """A mask lost in a change of the code is seen in the log, if it shows the mask."""
    ids, targets = [97, 98, 99, 100, 260], [-1, 98, -1, 100, 260]
    assert show_supervised(ids, targets, BYTE) == "'a[[b]]c[[d<|end|>]]'"
    assert show_supervised([97], [-1], BYTE) == "'a'"


QUESTION = [USER, 113, END, ASSISTANT]  # "q"


def solved(*labels: bool) -> dict:
    """A problem "q" with the answer "r" and a solution "xy" for each label."""
    solutions = [{"ids": [120, 121, END], "correct": label} for label in labels]
    return {"question": "q", "answer": "r", "solutions": solutions}


def test_the_targets_of_a_chat_are_the_words_of_the_assistant():
    """And the <|end|> after them, each at its own id."""
    document = chat_document(toy_chat("q", "xy")["messages"], BYTE)
    assert document == {"ids": [*QUESTION, 120, 121, END], "targets": [-1] * 4 + [120, 121, END]}


def test_a_sample_has_labels_and_a_reference_solution_has_targets():
    """One more id stands at the end, so that the last of the solution is an input."""
    sample, reference = solution_documents([solved(True)], BYTE, "token")
    assert sample["ids"] == [*QUESTION, 120, 121, END, EOS]
    assert sample["labels"] == [-1] * 5 + [1] * 3 and set(sample["targets"]) == {-1}
    assert reference["ids"] == [*QUESTION, 114, END, EOS]
    assert reference["targets"] == [-1] * 4 + [114, END, -1] and set(reference["labels"]) == {-1}


def test_a_solution_level_verifier_has_one_label_a_solution():
    """The ablation of Cobbe et al.: the judgement at the end alone."""
    right, wrong, _ = solution_documents([solved(True, False)], BYTE, "solution")
    assert right["labels"] == [-1] * 7 + [1] and wrong["labels"] == [-1] * 7 + [0]


def test_pairs_as_literal_rows():
    """The chosen answers come first; the lengths are those of the answers alone."""
    rows = pair_rows([Pair([1, 2], [3, END], [END]), Pair([4], [5, END], [6, 7, END])], 4, PAD)
    assert rows["idx"].tolist() == [
        [1, 2, 3, PAD],
        [4, 5, PAD, PAD],
        [1, 2, PAD, PAD],
        [4, 6, 7, PAD],
    ]
    assert rows["targets"].tolist()[:2] == [[-1, 3, END, -1], [5, END, -1, -1]]
    assert rows["targets"].tolist()[2:] == [[-1, END, -1, -1], [6, 7, END, -1]]
    assert rows["lengths"].tolist() == [[2, 2], [1, 3]]


def test_descriptions_count_what_they_say():
    """They are what a user reads before a long run."""
    text = describe_solutions([solved(True, False), solved(False, False)])
    assert "2 problems, 4 solutions, 25.0% right; 50.0% of the problems" in text
    assert "nothing to rerank" in describe_solutions([solved(True, True)])
    text = describe_pairs([Pair([1], [2, 3], [4]), Pair([1], [2], [3, 4])])
    assert text.startswith("2 pairs") and "1.5 tokens, the rejected 1.5" in text and "50%" in text
