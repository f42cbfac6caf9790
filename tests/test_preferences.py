"""Preferences: what stands beside the log-probs of chosen and rejected answers."""

import pytest
from eval_helpers import make_run, results_of

import eval as evaluation
from runtime.files import read_jsonl


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with its preferences evaluated, read only. -> folder"""
    folder = tmp_path_factory.mktemp("eval")
    assert evaluation.main([*make_run(folder), "--tasks=preference,tales"]) == 0
    return folder / "run"


def test_the_baseline_is_the_trivial_answer(finished):
    """ "The longer answer wins", computed here from the data alone; equal lengths are a tie."""
    records = read_jsonl(str(finished.parent / "data" / "toy" / "dpo_test.jsonl"))
    pairs = [(len(record["chosen"]), len(record["rejected"])) for record in records]
    hits = sum((chosen > rejected) + (chosen == rejected) / 2 for chosen, rejected in pairs)
    rows = results_of(finished, "preference")
    found = [row["value"] for row in rows if row["model"] == "longer answer wins"]
    assert found == [hits / len(records)]


def test_a_reward_is_that_of_dpo_alone(finished):
    """It is relative to SFT, so the other stages have none; tales are told by tuned stages."""
    rows = results_of(finished, "preference")
    assert {row["stage"] for row in rows if row["protocol"] == "reward"} == {"dpo"}
    assert {row["stage"] for row in results_of(finished, "tales")} == {"sft", "dpo"}
