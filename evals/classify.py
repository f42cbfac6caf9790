"""Classification: SST-2 by the likelihood of its labels after a prompt."""

import os
import random
from collections.abc import Iterable

import numpy as np

from corpus.tokenizer import Tokenizer
from evals.base import EvalConfig, Row, Subject, task
from evals.stats import mean, proportion
from inference.scoring import Window, windows_nll
from model import GPT
from runtime.files import read_jsonl

ORDERS = 4  # draws of few-shot examples
SST2_PROMPT = "{}\nQuestion: Is this sentence positive or negative?\nAnswer:"  # of lm-eval-harness
LABELS = (" negative", " positive")


@task("sst2", data=("sst2", "shots"), files=("test.jsonl",), settings=("n_problems",))
def sst2(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Measure SST-2 by the likelihood of its labels, without examples and after four of them.

    Which four and in which order decides more than the model (arXiv 2102.09690), so the number is
    the mean over ORDERS draws. calibrated: relative to the likelihoods after the sentence "N/A"
    (same paper).
    """
    model = subject.model(stage)
    records = read_jsonl(os.path.join(cfg.data_dir, cfg.sst2, "test.jsonl"))[: cfg.n_problems]
    gold = np.array([int(record["label"]) for record in records])
    sentences = [record["sentence"] for record in records] + ["N/A"]
    results = []
    for name, texts in contexts(cfg).items():
        scores = [label_scores(model, subject.tokenizer, text, sentences) for text in texts]
        if any(own is None for own in scores):
            too_long = f"longer than seq_len={model.cfg.seq_len}"
            print(f"eval sst2: {name} prompts are {too_long} and left out")
            continue
        results.append(accuracy(name, [own[:-1] for own in scores], gold))
        relative = [own[:-1] - own[-1] for own in scores]
        results.append(accuracy(f"{name} calibrated", relative, gold))
    if stage == "untrained":
        majority = proportion(gold == (gold.mean() >= 0.5))
        results.append(Row("accuracy", "zero-shot", majority, model="majority class"))
    return results


def accuracy(protocol: str, scores: Iterable[np.ndarray], gold: np.ndarray) -> Row:
    """Return the accuracy of the likelier labels, the mean over draws of examples."""
    right = [own.argmax(1) == gold for own in scores]
    estimate = proportion(right[0]) if len(right) == 1 else mean(np.mean(right, axis=0))
    draws = [float(own.mean()) for own in right]
    return Row("accuracy", protocol, estimate, extra={"draws": draws})


def contexts(cfg: EvalConfig) -> dict[str, list[str]]:
    """Return what stands before the question: nothing, or draws of examples."""
    found = {"zero-shot": [""]}
    if cfg.shots:
        pool = read_jsonl(os.path.join(cfg.data_dir, cfg.shots, "test.jsonl"))
        found["4-shot"] = [four_shots(pool, seed) for seed in range(ORDERS)]
    return found


def four_shots(pool: list[dict], seed: int) -> str:
    """Return two sentences of each label with their answers, in a random order."""
    rng = random.Random(seed)
    chosen = []
    for label in (0, 1):
        chosen += rng.sample([row for row in pool if int(row["label"]) == label], 2)
    rng.shuffle(chosen)
    shots = ""
    for row in chosen:
        shots += SST2_PROMPT.format(row["sentence"].strip()) + LABELS[int(row["label"])] + "\n\n"
    return shots


def label_scores(
    model: GPT, tokenizer: Tokenizer, before: str, sentences: list[str]
) -> np.ndarray | None:
    """Return log-probs of the labels after each sentence (n, 2); None where one does not fit."""
    labels = [tokenizer.encode(label) for label in LABELS]
    windows = []
    for sentence in sentences:
        prompt = tokenizer.encode(before + SST2_PROMPT.format(sentence.strip()))
        windows += [Window([tokenizer.eos, *prompt, *label], len(label)) for label in labels]
    if max(len(window.ids) for window in windows) > model.cfg.seq_len:
        return None
    return -np.array(windows_nll(model, windows, 64)).reshape(-1, 2)
