"""Chats become the right ids with the right ones supervised, and packing loses none of them."""

import pytest
from corpus_helpers import chat, quick
from helpers import BYTE, END, PAD, fails
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus.chat import (
    Packed,
    Pair,
    drop_too_long,
    encode_pair,
    pack,
    render,
    render_prompt,
    show_supervised,
    user_turn,
)
from corpus.tokenizer import Tokenizer


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
    question = merging.encode(prompt)
    assert pair.prompt == [merging.user, *question, merging.end, merging.assistant]
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
    assert said == ["texts: 1 of 3 are longer than seq_len=2 tokens and dropped"]
    assert drop_too_long(["ab"], len, 2, "texts", said.append) == ["ab"] and len(said) == 1
    fails(lambda: drop_too_long(["abc"], len, 2, "texts", said.append), "all 1 are longer")


def test_supervised_stretches_are_shown_in_brackets():
    """A mask lost in a change of the code is seen in the log, if it shows the mask."""
    ids, targets = [97, 98, 99, 100, 260], [-1, 98, -1, 100, 260]
    assert show_supervised(ids, targets, BYTE) == "'a[[b]]c[[d<|end|>]]'"
    assert show_supervised([97], [-1], BYTE) == "'a'"
