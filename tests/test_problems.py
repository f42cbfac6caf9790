"""Word problems: choices among solutions, and how well scores separate."""

import math
import os

import pytest
import torch
from eval_helpers import make_run, results_of
from helpers import ASSISTANT, BYTE, END, USER, tiny

import eval as evaluation
from evals import problems, stats
from evals.results import RERANKERS
from inference.scoring import log_likelihoods
from runtime.files import read_jsonl


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with its word problems evaluated, read only. -> folder, flags"""
    folder = tmp_path_factory.mktemp("eval")
    argv = make_run(folder)
    assert evaluation.main([*argv, "--tasks=problems,rerank,published"]) == 0
    return folder / "run", argv


def solution(answer, correct=False, score=0.0) -> dict:
    return {"text": f"#### {answer}" if answer else "no idea", "correct": correct, "score": score}


def test_oracle_takes_any_right_solution():
    """The ceiling of every other way to choose."""
    assert problems.choose([solution(1), solution(2, True)], "oracle") and not problems.choose(
        [solution(1), solution(None)], "oracle"
    )


def test_majority_takes_the_most_common_answer_and_counts_no_answer_for_nothing():
    """A tie goes to the answer seen first.

    Solutions without an answer do not vote, however many they are.
    """
    right, wrong, none = solution(7, True), solution(8), solution(None)

    def choose(*solutions):
        return problems.choose(list(solutions), "majority")

    assert choose(right, wrong, right) and not choose(wrong, right, wrong)
    assert choose(right, wrong) and not choose(wrong, right)
    assert choose(none, none, none, right) and not choose(none, none)
    assert choose(solution("1,000", True), solution(8), solution("1000", True))


def test_likelihood_takes_the_likeliest_and_is_the_models_own():
    """What the model itself would choose: the row that a verifier must beat."""
    assert problems.choose(
        [{"loglik": -3.0, "correct": False}, {"loglik": -1.0, "correct": True}], "likelihood"
    )
    model, rows = (
        tiny(seed=4),
        [{"question": "q", "solutions": [{"ids": [*b"ab", END]}, {"ids": [*b"c"]}]}],
    )
    log_likelihoods(model, BYTE, rows)
    for s in rows[0]["solutions"]:
        ids = torch.tensor([USER, *b"q", END, ASSISTANT, *s["ids"]])
        logp = model(ids[None])[0].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
        assert s["loglik"] == pytest.approx(logp[-len(s["ids"]) :].sum().item(), abs=1e-4)


def test_best_of_takes_the_highest_score():
    """The score decides alone, not the number of votes."""
    assert problems.choose(
        [solution(8, score=1), solution(8, score=1), solution(7, True, score=2)], "best_of"
    )
    assert not problems.choose([solution(7, True, score=-1), solution(8, score=0)], "best_of")
    assert not problems.choose([solution(7, True, score=1), solution(None, score=2)], "best_of")


def test_weighted_adds_up_probabilities_not_scores():
    """Two votes of s(0) = 0.5 each beat one of s(2) = 0.88, which beats two of s(-2) = 0.12."""
    right = solution(7, True, score=2)
    assert not problems.choose([right, solution(8, score=0), solution(8, score=0)], "weighted")
    assert problems.choose([right, solution(8, score=-2), solution(8, score=-2)], "weighted")
    assert problems.choose([right, solution(None, score=9), solution(None, score=9)], "weighted")


def test_a_very_low_score_is_a_very_small_weight():
    """exp(800) is no float: one hopeless solution must not end the evaluation."""
    assert problems.choose([solution(7, True, score=2), solution(8, score=-800)], "weighted")


def test_the_interval_of_an_auc_is_drawn_over_problems():
    """Solutions of one problem are not independent; the value is that of all solutions."""
    rows = [
        {"solutions": [{"score": i % 7 + 2.0 * right, "correct": right} for right in (True, False)]}
        for i in range(60)
    ]
    (row,) = problems.auc_rows("best_of", rows, "score")
    result = row.estimate
    solutions = [s for row in rows for s in row["solutions"]]
    scores, right = [s["score"] for s in solutions], [s["correct"] for s in solutions]
    assert result.value == stats.auc(scores, right) and result.n == 120
    assert result.low < result.value < result.high


def test_calibration_by_hand():
    """Two scores of probability 0.75, one right.

    The tenth is a quarter off, and so is the expected error; Brier (.0625 + .5625) / 2.
    """
    score = math.log(3)
    rows = [{"solutions": [{"score": score, "correct": True}, {"score": score, "correct": False}]}]
    brier, error, tenth = problems.calibration(rows)
    assert brier.estimate.value == pytest.approx(0.3125)
    assert error.estimate.value == pytest.approx(0.25)
    assert tenth.protocol == "tenth 7" and tenth.estimate.value == 0.5
    assert tenth.extra["predicted"] == pytest.approx(0.75)


def test_form_alone_is_told_from_content():
    """Right solutions that stop beside wrong ones that do not.

    Form separates perfectly, and among equal forms nothing is left to separate.
    """

    def solution(right):
        scores = {"score": float(right), "loglik": 0.0}
        return {"text": "#### 1", "ids": [*b"#### 1"], "correct": right, "stopped": right, **scores}

    rows = [{"question": "q", "solutions": [solution(True), solution(False)]} for _ in range(4)]
    results = problems.discrimination(tiny(score_head=True).float(), BYTE, rows)
    found = {row.protocol: row.estimate.value for row in results}
    assert found == {"likelihood": 0.5, "best_of": 1.0, "form_alone": 1.0}


def test_reranking_of_one_sample_is_the_same_by_any_way(finished):
    """With k = 1 there is no choice; with more, nothing beats the oracle."""
    rows = {row["protocol"]: row["value"] for row in results_of(finished[0], "rerank")}
    chosen = {protocol for protocol in rows if "@" in protocol}
    assert chosen == {f"{how}@{k}" for how in RERANKERS for k in (1, 2)}
    assert all(
        protocol == "verifier" or protocol.startswith("tenth") for protocol in set(rows) - chosen
    )  # all are wrong: there is no AUC, and no nan
    assert rows["best_of@1"] == rows["oracle@1"] >= rows["majority@1"]
    assert all(rows[f"{how}@2"] <= rows["oracle@2"] for how in ("majority", "best_of", "weighted"))


def test_published_solutions_are_judged_by_source_and_by_choice(finished):
    """By hand: the small source is right once in three, the large one always.

    So is the oracle, and within the large source there is no AUC.
    """
    rows = {(row["metric"], row["protocol"]): row for row in results_of(finished[0], "published")}
    assert rows["exact_match", "small"]["value"] == pytest.approx(1 / 3)
    assert rows["exact_match", "large"]["value"] == rows["exact_match", "oracle"]["value"] == 1
    assert (
        1 / 3 <= rows["exact_match", "best_of"]["value"] <= 1 and rows["auc", "best_of"]["n"] == 6
    )
    assert ("auc", "best_of of small") in rows and ("auc", "best_of of large") not in rows
    assert ("auc", "form_alone") not in rows or rows["auc", "form_alone"]["value"] == 0.5


def test_an_evaluation_may_need_nothing_but_the_published_solutions(tmp_path, capsys):
    """Every other data set switched off is no error."""
    argv = [*make_run(tmp_path), "--data=", "--chats=", "--problems=", "--pairs=", "--text="]
    assert evaluation.main(argv) == 0 and "eval published dpo" in capsys.readouterr().out


def test_generations_are_kept_so_that_a_number_can_be_traced_to_its_text(finished):
    """The exact match of a stage is the share of right solutions in its file."""
    folder, _ = finished
    (name,) = [name for name in os.listdir(folder / "generations") if name.startswith("sft_")]
    rows = read_jsonl(str(folder / "generations" / name))
    stopped = [
        row["value"]
        for row in results_of(folder, "problems")
        if (row["stage"], row["metric"]) == ("sft", "stop_rate")
    ]
    assert stopped == [sum(row["solutions"][0]["stopped"] for row in rows) / 3] and all(
        row["solutions"][0]["ids"] for row in rows
    )
