"""SST-2: log-probs of the labels, and examples that are drawn and hashed; ROUGE by hand."""

import json
import re
from pathlib import Path

import pytest
from eval_helpers import make_run, results_of
from helpers import BYTE, EOS, fails, plain_logprobs, tiny

import eval as evaluation
from configurator import UserError
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


def test_labels_of_one_token_need_one_pass_and_have_the_same_log_probs(monkeypatch):
    """Both are read off the same place, in batches of prompts of unequal length."""
    model = tiny(seq_len=128)
    monkeypatch.setattr(classify, "LABELS", ("x", "y"))
    seen = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx: seen.extend(idx) or hidden(idx))
    scores = classify.label_scores(model, BYTE, "", ["fine", "a bore ", "it was long"])
    assert len(seen) == 3
    for own, sentence in zip(scores, ("fine", "a bore", "it was long"), strict=True):
        prompt = [EOS, *BYTE.encode(classify.SST2_PROMPT.format(sentence))]
        wanted = [float(plain_logprobs(model, [*prompt, ord(x)])[-1]) for x in "xy"]
        assert list(own) == pytest.approx(wanted, rel=1e-4)


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


BAD_RECORDS = {
    "sst2": [
        {"sentence": "fine", "label": -1},
        {"sentence": "fine", "label": 2},
        {"sentence": "fine", "label": "positive"},
        {"sentence": None, "label": 1},
        {"sentence": 7, "label": 1},
        {"text": "fine", "label": 1},
        ["fine", 1],
    ],
    "dialogsum": [
        {"dialogue": "A: hi", "summary": ""},
        {"dialogue": "A: hi", "summary": None},
        {"dialogue": "", "summary": "hi"},
        {"dialogue": 5, "summary": "hi"},
        {"summary": "hi"},
        "text",
    ],
    "published": [
        {"question": {}, "a": {"solution": "A: 1", "is_correct": True}},
        {"question": "1 + 1?"},
        {"question": "1 + 1?", "a": {"solution": None, "is_correct": True}},
        {"question": "1 + 1?", "a": {"solution": "A: 1", "is_correct": "yes"}},
        None,
    ],
}
FOLDERS = {"sst2": "films", "dialogsum": "talks", "published": "larger"}
CASES = [(task, record) for task, records in BAD_RECORDS.items() for record in records]


@pytest.mark.parametrize("task, record", CASES)
def test_a_record_that_cannot_be_measured_takes_no_part(tmp_path, made, task, record):
    """Alone it is an error in words; among good ones it is refused, or changes no number."""
    argv = [*made, f"--tasks={task}"]
    data = next(flag for flag in made if flag.startswith("--data_dir=")).partition("=")[2]
    path = Path(data) / FOLDERS[task] / "test.jsonl"
    good = path.read_text()
    try:
        path.write_text(json.dumps(record) + "\n")
        fails(lambda: evaluation.main([*argv, "--force"]), "record")
        path.write_text(good + json.dumps(record) + "\n")
        try:
            assert evaluation.main([*argv, "--force"]) == 0
        except UserError as error:
            assert "record" in str(error)
    finally:
        path.write_text(good)
    out = next(flag for flag in made if flag.startswith("--out_dir=")).partition("=")[2]
    text = "".join(file.read_text() for file in Path(out).glob("results*.jsonl"))
    assert "NaN" not in text


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small run and its data. -> flags"""
    return make_run(tmp_path_factory.mktemp("bad"))
