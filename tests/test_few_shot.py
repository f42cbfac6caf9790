"""Problems after solved ones: what is drawn and asked, and which numbers are found in an answer."""

import random

import pytest
from eval_helpers import make_run, results_of
from helpers import fails

import eval as evaluation
from evals.few_shot import after_shots, is_right
from inference.solutions import SHOTS
from runtime.files import read_jsonl

POOL = [{"question": f"{i}+1?", "answer": f"It is\n#### {i + 1}"} for i in range(20)]


def test_each_problem_follows_five_others_of_one_sequence_of_draws():
    """The first n problems have the same shots, however many there are."""
    problems = [{"question": "2+2?", "answer": "#### 4"}, {"question": "3+3?", "answer": "#### 6"}]
    asked, until = after_shots(POOL, problems)
    rng = random.Random(1234)
    for row, problem in zip(asked, problems, strict=True):
        shots = [
            f"Question: {x['question']}\nAnswer: {x['answer']}\n\n" for x in rng.sample(POOL, 5)
        ]
        assert row[SHOTS] == "".join(shots) + f"Question: {problem['question']}\nAnswer:"
    assert after_shots(POOL, problems[:1])[0] == asked[:1] and "Question:" in until
    fails(lambda: after_shots(POOL[:4], problems), "4 problems", "expected 5")


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        ("It is 3\n#### 1,200", True, True),
        ("#### 1200. So it is", True, False),
        ("so $1,200.", False, True),
        ("1200 or 1201", False, False),
        ("#### 1200 #### 7", True, False),
        ("#### 7 and 1200", False, True),
        ("", False, False),
    ],
)
def test_numbers_are_found_in_the_harnesss_two_ways(text, strict, flexible):
    """The first after ####, or the last of all; a point at the end, commas and $ do not count."""
    row = {"answer": "600 * 2 = 1,200\n#### 1,200", "solutions": [{"text": text}]}
    if "So" in text:
        row["solutions"][0]["text"] += " 3"
    assert is_right(row, "strict-match") == strict
    assert is_right(row, "flexible-extract") == flexible


def test_every_policy_is_asked_with_or_without_a_template(tmp_path, capsys):
    """It is a task of its own: the other problems and their kept texts stay as they are."""
    argv = [*make_run(tmp_path), "--stages=pretrain,sft", "--tasks=problems,few_shot"]
    assert evaluation.main([*argv, "--problem_shots=shots"]) == 0
    rows = results_of(tmp_path / "run", "few_shot")
    protocols = ["5-shot strict-match", "5-shot flexible-extract", "5-shot"]
    assert [row["protocol"] for row in rows] == 2 * protocols
    assert [row["stage"] for row in rows] == 3 * ["pretrain"] + 3 * ["sft"]
    assert len(results_of(tmp_path / "run", "problems")) > 0
    (path,) = (tmp_path / "run" / "generations").glob("few_shot_sft_*")
    (kept, *_) = read_jsonl(str(path))
    assert kept[SHOTS].count("Question:") == 6 and len(kept["solutions"]) == 1
    capsys.readouterr()
    argv = [
        *argv,
        "--problem_shots=shots",
        "--n_problems=1",
        "--stages=sft",
        "--tasks=few_shot",
        "--force",
    ]
    (tmp_path / "data/toy/problems_test.jsonl").write_text(
        '{"question": "%s?", "answer": "#### 1"}' % ("x" * 300)
    )
    fails(lambda: evaluation.main(argv), "longer than seq_len=256")
