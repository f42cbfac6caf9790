"""Scores of given text are those that each text has alone, whatever the batch."""

import copy

import numpy as np
import pytest
import torch
from helpers import ASSISTANT, BYTE, END, USER, plain_logprobs, tiny

from corpus.chat import encode_pair, user_turn
from inference import scoring
from inference.scoring import pair_logprobs, score_solutions, windows_nll


def test_windows_nll_equals_a_full_log_softmax_whatever_the_batch(monkeypatch):
    """Sorting, padding and chunking are an economy: each window has the sum it has alone."""
    model, draws = tiny().double(), np.random.default_rng(0)
    windows = [
        (draws.integers(0, 262, n).tolist(), k)
        for n, k in ((9, 8), (2, 1), (30, 4), (17, 16), (30, 29), (5, 0))
    ]
    wanted = [-plain_logprobs(model, ids)[len(ids) - 1 - k :].sum().item() for ids, k in windows]
    for room in (1, 40, 1000):
        monkeypatch.setattr(scoring, "AT_ONCE", (room, room))
        assert windows_nll(model, windows) == pytest.approx(wanted, abs=1e-9)
    assert windows_nll(model, []) == []


def test_scores_are_read_at_the_last_token_of_each_solution_whatever_the_batch(monkeypatch):
    """Solutions of unequal length share a batch.

    The score of a short one must not come from its padding.
    """
    verifier = tiny(score_head=True).double()
    rows = [
        {
            "question": "q",
            "solutions": [
                {"ids": [*text.encode(), END]} for text in ("a", "bcd", "a longer one", "bce")
            ],
        },
        {"question": "another question", "solutions": [{"ids": [*b"xyz"]}]},
    ]

    def prompt(row):
        return [USER, *row["question"].encode(), END, ASSISTANT]

    wanted = []
    for row in rows:
        for s in row["solutions"]:
            ids = torch.tensor([prompt(row) + s["ids"]])
            solution = torch.arange(ids.size(1))[None] >= len(prompt(row))
            wanted.append(verifier.scores(verifier.hidden(ids), ids, solution)[0, -1].item())
    for room in (1, 20, 1000):
        monkeypatch.setattr(scoring, "AT_ONCE", (room, room))
        scored = copy.deepcopy(rows)
        score_solutions(verifier, BYTE, scored)
        assert [s["score"] for row in scored for s in row["solutions"]] == pytest.approx(
            wanted, abs=1e-6
        )
    assert len(set(wanted)) == 5


def test_pair_log_probs_are_sums_over_the_answers():
    """The order is chosen, rejected; the prompt is not counted."""
    model = tiny().double()
    records = [
        {"prompt": user_turn("hello"), "chosen": "good day", "rejected": "bad"},
        {"prompt": user_turn("x"), "chosen": "y", "rejected": "zzzz"},
    ]
    pairs = [encode_pair(record, BYTE) for record in records]
    wanted = [
        [plain_logprobs(model, prompt + answer)[-len(answer) :].sum().item() for answer in answers]
        for prompt, *answers in pairs
    ]
    assert pair_logprobs(model, pairs) == pytest.approx(np.array(wanted), abs=1e-9)
