"""Chats, solutions and pairs become the right ids with the right targets and labels."""

from helpers import ASSISTANT, BYTE, END, EOS, PAD, USER

from corpus.chat import Pair
from corpus.documents import (
    chat_document,
    describe_pairs,
    describe_solutions,
    pair_rows,
    solution_documents,
)
from corpus.toy import chat

QUESTION = [USER, 113, END, ASSISTANT]  # "q"


def solved(*labels: bool) -> dict:
    """A problem "q" with the answer "r" and a solution "xy" for each label."""
    solutions = [{"ids": [120, 121, END], "correct": label} for label in labels]
    return {"question": "q", "answer": "r", "solutions": solutions}


def test_the_targets_of_a_chat_are_the_words_of_the_assistant():
    """And the <|end|> after them, each at its own id."""
    document = chat_document(chat("q", "xy")["messages"], BYTE)
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
