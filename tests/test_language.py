"""Loss and perplexity beside trivial answers, and how much of a text was trained on."""

import numpy as np
import pytest
from corpus_helpers import foreign
from eval_helpers import TEXT, make_run, results_of

import eval as evaluation
from corpus.shards import shard_paths
from evals.base import data_files
from evals.results import read_results


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with the tasks of language evaluated, read only. -> folder"""
    folder = tmp_path_factory.mktemp("eval")
    assert evaluation.main([*make_run(folder), "--tasks=val_loss,text_perplexity"]) == 0
    return folder / "run"


def test_the_baselines_are_the_trivial_answers(finished):
    """The unigram entropy of shards and of a text, computed here from the data alone."""
    rows = read_results(str(finished))
    tokens = np.fromfile(finished.parent / "data" / "toy" / "val_000.bin", "<u2")[512:]
    scored = tokens[1 : 1 + (len(tokens) - 1) // 256 * 256]
    share = np.bincount(scored) / len(scored)
    (entropy,) = [row for row in rows if row["model"] == "unigram entropy"]
    assert entropy["value"] == pytest.approx(
        -(share[share > 0] * np.log(share[share > 0])).sum()
    ) and entropy["n"] == len(scored)
    counts = np.bincount(list(TEXT.encode())) / len(TEXT.encode())
    (text,) = [row for row in rows if row["model"] == "unigrams of the text"]
    assert text["value"] == pytest.approx(
        np.exp(-(counts[counts > 0] * np.log(counts[counts > 0])).sum())
    )


def test_the_shards_of_a_split_are_those_that_the_loader_reads(tmp_path):
    """What is hashed beside a number and what the number is measured on must be one choice."""
    for name in ("a_val_000.bin", "retrieval_train_000.bin", "train_1.bin", "evaluation.bin"):
        foreign(tmp_path / "mine" / name, range(99))
    for split, n in (("val", 1), ("train", 2)):
        found = data_files(["mine", "gone"], [split, "*.jsonl"], str(tmp_path))
        assert found == shard_paths(str(tmp_path / "mine"), split) and len(found) == n


def test_numbers_of_the_validation_split_do_not_call_themselves_test(finished):
    """val_loss is computed on the validation shards, and its rows must say so."""
    assert {row["split"] for row in results_of(finished, "val_loss")} == {"val"}


def test_the_overlap_with_the_training_shards_stands_beside_each_perplexity(finished):
    """Half of the text is in the training shard; a detokenised text is another text."""
    rows = {
        row["protocol"]: row["overlap"]
        for row in results_of(finished, "text_perplexity")
        if row["stage"] == "sft"
    }
    assert (
        rows["tokens"]
        == rows["per_line"]
        == pytest.approx((len(TEXT) // 2 - 12) / (len(TEXT) - 12))
        and rows["words"] == rows["bpb"] < rows["tokens"]
    )
