"""Word problems: choices among solutions, and how well scores separate."""

import math
import os

import pytest
import torch
from eval_helpers import make_run, make_stage, results_of
from helpers import ASSISTANT, BYTE, END, USER, fails, plain_logprobs, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as evaluation
from corpus.chat import render_prompt, user_turn
from evals import problems, stats
from evals import problems as mistakes
from evals.results import RERANKERS, read_results
from inference.scoring import log_likelihoods
from inference.solutions import answer_value, final_answer, last_value
from runtime.files import read_jsonl, write_jsonl
from runtime.logs import read_sealed


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


@pytest.mark.parametrize("how", ["majority", "weighted"])
def test_votes_are_for_values_however_they_are_written(how):
    """18, 18.00 and $18 are one answer with three votes, and not three answers with one each."""
    same = [solution(8), solution(18, True), solution("18.00"), solution("$18"), solution(8)]
    assert problems.choose(same, how)
    assert not problems.choose([*same, solution("8.0")] * 2 + [solution("8")], how)


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


def test_beside_rl_tuned_stages_are_measured_by_their_samples(tmp_path):
    """Any of k is right at least as often as any of fewer; nats and length are of these samples."""
    argv = [*make_run(tmp_path), "--tasks=samples"]
    fails(lambda: evaluation.main(argv), "samples", "needs a stage trained by RL")
    make_stage(tmp_path / "run" / "rl", 9, "rl")
    assert evaluation.main(argv) == 0
    rows = read_results(str(tmp_path / "run"))
    assert {row["model"] for row in rows} == {"sft", "dpo", "rl"}
    own = {(r["metric"], r["protocol"]): r["value"] for r in rows if r["model"] == "rl"}
    assert own["exact_match", "any of 1"] <= own["exact_match", "any of 2"]
    (path,) = (tmp_path / "run" / "generations").glob("rl_*.jsonl")
    written = [s["ids"] for row in read_sealed(str(path)) for s in row["solutions"]]
    assert own["length", "sampled"] == sum(map(len, written)) / len(written)
    model = tiny(9, n_layer=1, seq_len=256)
    nats = 0.0
    for row in read_sealed(str(path)):
        prompt = render_prompt(user_turn(row["question"]), BYTE)
        for solution in row["solutions"]:
            logp = plain_logprobs(model, [*prompt, *solution["ids"]])
            nats -= logp[-len(solution["ids"]) :].sum().item()
    wanted = nats / sum(map(len, written))
    assert own["nats_per_token", "sampled"] == pytest.approx(wanted, rel=1e-4)


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
    rows = read_sealed(str(folder / "generations" / name))
    stopped = [
        row["value"]
        for row in results_of(folder, "problems")
        if (row["stage"], row["metric"]) == ("sft", "stop_rate")
    ]
    assert stopped == [sum(row["solutions"][0]["stopped"] for row in rows) / 3] and all(
        row["solutions"][0]["ids"] for row in rows
    )


@pytest.mark.parametrize(
    "text, false",
    [
        ("3+4=<<3+4=8>>8", "3+4=8"),
        ("3+4=<<3+4=7>>7", None),
        ("He has 3 + 4 = 8 pens", "3 + 4=8"),
        ("2*3=6+1=7", None),
        ("2*3=6+1=8", "6+1=8"),
        ("10/3=3.33", None),
        ("10/3=3", None),
        ("10/3=4", None),
        ("10/3=5", "10/3=5"),
        ("$5 x 3 = $15", None),
        ("$5 x 3 = $16", "$5 x 3=$16"),
        ("5 miles * 2 = 7", None),
        ("x = 5", None),
        ("3x - 5 = 16", None),
        ("2+2=2 1/2", None),
        ("no sum", None),
    ],
)
def test_a_false_equation_is_one_that_both_sides_spell_out(text, false):
    """What cannot be read is not called wrong.

    Thirds may be rounded to cents or to whole numbers.
    """
    assert mistakes.false_equation(text) == false


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789+-*/x=().,$<>% \n#a", max_size=60))
def test_no_text_of_a_model_stops_the_sorting_of_errors(text):
    """Models write anything; and an equation called false is one that stands in the text."""
    found = mistakes.false_equation(text)
    assert found is None or found.split("=")[0] in text
    last_value(text), answer_value(text), final_answer(text)


@pytest.mark.parametrize(
    "answer, text, flexible",
    [
        ("#### 18", "it is 18.00", True),
        ("#### 18", "so she makes $18 a day.", True),
        ("#### 1800", "1,800 dollars", True),
        ("#### -15", "10-15 days", False),
        ("#### 15", "10-15 days", False),
        ("#### 30", "at 3:30", False),
        ("#### 2", "1/2", False),
        ("none", "none", False),
        ("none", "3", False),
    ],
)
def test_the_flexible_rule_compares_values(answer, text, flexible):
    """The last number of the text, wholly read; a reference without a number is met by nothing."""
    row = {"question": "q", "answer": answer}
    row["solutions"] = [{"text": text, "correct": False, "stopped": True}]
    flags, _ = mistakes.taxonomy([row])
    assert flags["flexible_match"] == [flexible]
    assert flags["error_extraction"] == [flexible]


def test_errors_are_sorted_by_what_went_wrong():
    """One solution of each kind; the classes of error are disjoint and cover all that is wrong."""
    texts = [
        "2+2=4\n#### 4",
        "2+2=4, so 4",
        "2+2=5\n#### 5",
        "2+3=5\n#### 5",
        "2+2=5\n#### 4",
        "hm",
    ]
    flags, examples = mistakes.taxonomy(
        [
            {
                "question": "2 + 2?",
                "answer": "#### 4",
                "solutions": [
                    {"text": text, "correct": final_answer(text) == "4", "stopped": True}
                ],
            }
            for text in texts
        ]
    )
    found = {
        name: [text for text, flag in zip(texts, values, strict=True) if flag]
        for name, values in flags.items()
    }
    assert (
        found["exact_match"] == [texts[0], texts[4]]
        and found["flexible_match"] == [texts[0], texts[1], texts[4]]
        and found["no_answer"] == [texts[1], texts[5]]
    )
    assert (
        found["error_extraction"] == [texts[1]]
        and found["error_arithmetic"] == [texts[2]]
        and found["error_reasoning"] == [texts[3], texts[5]]
    )
    assert found["false_accept"] == [texts[4]] and [
        e["false_equation"] for e in examples["false_accept"]
    ] == ["2+2=5"]


LONG = {"question": "how many? " * 40, "answer": "#### 4"}
NO_GOLD = ["four", "4", "####4x", "#### 1/2", "#### 3:30", "#### 1 000", "#### ", ""]


@pytest.mark.parametrize("bad", [LONG, *({"question": "2 + 2?", "answer": x} for x in NO_GOLD)])
def test_a_problem_that_cannot_be_measured_takes_no_part(tmp_path, capsys, bad):
    """A prompt that leaves no room, a gold that is no number: left out and counted, or an error."""
    argv = [*make_run(tmp_path), "--tasks=problems,rerank"]
    path = tmp_path / "data" / "toy" / "problems_test.jsonl"
    good = read_jsonl(str(path))
    write_jsonl(str(path), [bad])
    fails(lambda: evaluation.main(argv), "problem")
    assert not list((tmp_path / "run").glob("results*"))
    write_jsonl(str(path), [bad, *good, bad])
    capsys.readouterr()
    assert evaluation.main(argv) == 0
    assert "2 of 5" in capsys.readouterr().out
    rows = results_of(tmp_path / "run", "problems") + results_of(tmp_path / "run", "rerank")
    assert {row["n"] for row in rows if "exact" in row["metric"]} == {len(good)}


def test_a_stage_of_a_smaller_context_measures_what_fits_it(tmp_path, capsys):
    """A run of another shape in the folder: its own problems are left out, not those of others."""
    argv = [*make_run(tmp_path), "--tasks=problems,chats,preference"]
    make_stage(tmp_path / "run" / "small", 3, "pretrain", fields={"seq_len": 16})
    path = tmp_path / "data" / "toy" / "problems_test.jsonl"
    good = read_jsonl(str(path))
    write_jsonl(str(path), [{"question": "1 + 1?", "answer": "#### 2"}, *good])
    assert evaluation.main(argv) == 0
    said = capsys.readouterr().out
    assert "chats of small is left out" in said and "preference of small is left out" in said
    rows = results_of(tmp_path / "run", "problems")
    sizes = {row["stage"]: row["n"] for row in rows if row["metric"] == "exact_match"}
    assert sizes == {**dict.fromkeys(("untrained", "pretrain", "sft", "dpo"), 4), "small": 1}
    assert {row["stage"] for row in rows if "kept" in row} == {"small"}
