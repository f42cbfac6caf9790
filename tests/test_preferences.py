"""Preferences: what stands beside the log-probs of chosen and rejected answers."""

from pathlib import Path

import pytest
import torch
from eval_helpers import make_run, make_stage, results_of
from helpers import BYTE, plain_logprobs

import eval as evaluation
from corpus.chat import encode_pair
from evals import preferences
from inference.scoring import pair_logprobs
from runtime.checkpoint import model_from, save_checkpoint
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


def test_every_weights_read_the_pairs_once(tmp_path, monkeypatch):
    """DPO's start is a stage of its own: what it said of the pairs is not worked out again."""
    read = []

    def counted(model, pairs):
        read.append(model)
        return pair_logprobs(model, pairs)

    monkeypatch.setattr(preferences, "pair_logprobs", counted)
    argv = [*make_run(tmp_path), "--tasks=preference"]
    assert evaluation.main(argv) == 0
    assert len(read) == len(set(read)) == 4  # untrained, pretrain, sft, dpo


def rewards_of(folder: Path, loss_type: str) -> dict[str, float]:
    """Return the evaluated accuracies of a DPO run with this loss, by protocol."""
    argv = make_run(folder)
    path = folder / "run" / "dpo" / "ckpt_0000007.pt"
    saved = torch.load(path, weights_only=True)
    save_checkpoint(str(path), saved | {"train_config": {"loss_type": loss_type}})
    assert evaluation.main([*argv, "--tasks=preference"]) == 0
    rows = results_of(folder / "run", "preference")
    return {row["protocol"]: row["value"] for row in rows if row["stage"] == "dpo"}


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "simpo"])
def test_a_reward_is_the_one_that_its_loss_means(tmp_path, loss_type):
    """By hand, from log-probs: DPO's is a sum, IPO's and SimPO's a mean; SimPO has no reference."""
    found = rewards_of(tmp_path, loss_type)
    models = {}
    for stage in ("sft", "dpo"):
        path = tmp_path / "run" / stage / "ckpt_0000007.pt"
        models[stage] = model_from(torch.load(path, weights_only=True)).eval()
    right = []
    for record in read_jsonl(str(tmp_path / "data" / "toy" / "dpo_test.jsonl")):
        pair = encode_pair(record, BYTE)
        values = []
        for answer in (pair.chosen, pair.rejected):
            logp = {}
            for stage, model in models.items():
                all_of_it = plain_logprobs(model, pair.prompt + answer)
                logp[stage] = all_of_it[-len(answer) :].sum().item()
            value = logp["dpo"] - (0 if loss_type == "simpo" else logp["sft"])
            values.append(value / (1 if loss_type == "sigmoid" else len(answer)))
        right.append(values[0] > values[1])
    assert found["reward"] == sum(right) / len(right)


def test_the_reference_of_a_reward_is_found_by_its_weights(tmp_path, capsys):
    """Whatever is called sft now, it is the run that holds the weights, here or elsewhere."""
    argv = [*make_run(tmp_path), "--tasks=preference"]
    assert evaluation.main(argv) == 0
    before = {row["protocol"]: row["value"] for row in results_of(tmp_path / "run", "preference")}
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "run" / "sft").rename(elsewhere)
    make_stage(tmp_path / "run" / "sft", 99, "sft")
    fields = torch.load(tmp_path / "run" / "dpo" / "ckpt_0000007.pt", weights_only=True)
    origin = fields["init_from"] | {"ref": str(elsewhere)}
    path = str(tmp_path / "run" / "dpo" / "ckpt_0000007.pt")
    save_checkpoint(path, fields | {"init_from": origin})
    assert evaluation.main([*argv, "--force"]) == 0
    after = [row for row in results_of(tmp_path / "run", "preference") if row["stage"] == "dpo"]
    assert {row["value"] for row in after if row["protocol"] == "reward"} == {before["reward"]}
    assert "stale" not in capsys.readouterr().out
