"""SST-2: log-probs of the labels, and examples that are drawn and hashed; ROUGE by hand."""

import re

import pytest
from eval_helpers import make_run, results_of
from helpers import BYTE, EOS, plain_logprobs, tiny

import eval as evaluation
from evals import transfer as classify
from evals.transfer import rouge


def test_label_scores_are_log_probs_of_the_labels():
    """Each label alone after the prompt, as plain log-softmax gives them.

    A prompt that does not fit is refused, not cut.
    """
    model = tiny(seq_len=128)
    prompt = [EOS, *BYTE.encode(classify.SST2_PROMPT.format("fine"))]
    (scores,) = classify.label_scores(model, BYTE, "", ["fine "])
    for score, label in zip(scores, classify.LABELS, strict=True):
        ids = BYTE.encode(label)
        assert score == pytest.approx(
            float(plain_logprobs(model, prompt + ids)[-len(ids) :].sum()), rel=1e-4
        )
    assert classify.label_scores(model, BYTE, "x" * 100, ["fine"]) is None


def test_few_shot_examples_are_balanced_and_their_order_is_drawn():
    pool = [{"sentence": f"s{i}", "label": i % 2} for i in range(20)]
    texts = [classify.four_shots(pool, seed) for seed in range(6)]
    assert (
        all(text.count(" positive\n") == text.count(" negative\n") == 2 for text in texts)
        and len(set(texts)) == 6
    )
    assert len({tuple(re.findall("(positive|negative)\n", text)) for text in texts}) > 1


def test_other_examples_are_other_data_too(tmp_path):
    """The sentences of a few-shot prompt decide its number as much as those it is asked about."""
    argv = [*make_run(tmp_path), "--tasks=sst2", "--shots=films-train", "--no_overwrite"]
    path = tmp_path / "data" / "films-train" / "test.jsonl"
    counts = []
    for change in (
        lambda: None,
        lambda: None,
        lambda: path.write_text(path.read_text().replace("no.", "nr.")),
    ):
        change()
        assert evaluation.main(argv) == 0
        counts.append(len(results_of(tmp_path / "run", "sst2")))
    assert counts[0] == counts[1] > 0 and counts[2] == 2 * counts[0]


def test_rouge_is_a_mean_over_references():
    """By hand: against itself 1.

    Two of three words, in order, of one reference (F 0.8), none of the other.
    """
    assert rouge(["the cat sat"], [["the cat sat"]]) == {
        "rouge1": [1.0],
        "rouge2": [1.0],
        "rougeL": [1.0],
    }
    half = rouge(["the cat"], [["the cat sat", "no"]])
    assert half["rouge1"] == half["rougeL"] == [pytest.approx(0.4)] and half["rouge2"] == [
        pytest.approx(1 / 3)
    ]
