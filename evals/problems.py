"""Word problems: greedy answers and their errors, choices among samples, and the verifier."""

import math
import os
import re
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np

from corpus.chat import drop_too_long
from corpus.records import load_records
from corpus.tokenizer import Tokenizer
from evals.base import VERSION, EvalConfig, Row, Subject, judged, task
from evals.mistakes import taxonomy
from evals.results import RERANKERS
from evals.stats import Estimate, auc, bootstrap, mean, proportion
from inference.scoring import log_likelihoods, score_solutions, with_prompts
from inference.solutions import Attempts, final_answer, solve
from model import GPT
from runtime.files import digest, read_jsonl, write_jsonl

CHOSEN_BY = {"likelihood": "loglik", "best_of": "score"}  # the highest of which field of a solution
ANSWERS = ("n_problems", "max_new_tokens", "calculator")  # settings that decide a greedy solution
SAMPLES = ("n_samples", "temperature", "seed")  # and these the sampled ones


def solutions(subject: Subject, stage: str, cfg: EvalConfig, greedy: bool) -> list[dict]:
    """Return the test problems with solutions of a stage: one greedy one, or n_samples of each.

    They are kept beside the results, so that every number can be traced to its text.
    """
    n, temperature, seed = (1, 0.0, 0) if greedy else (cfg.n_samples, cfg.temperature, cfg.seed)
    seed = seed if temperature else 0
    settings = [VERSION, n, temperature, cfg.max_new_tokens, seed, cfg.problems, cfg.n_problems]
    settings += [cfg.calculator, str(subject.dtype)]
    weights = subject.checkpoints[stage]["weights_hash"]
    name = f"{stage}_{weights}_{digest(settings)[:8]}.jsonl"
    path = os.path.join(cfg.out_dir, "generations", name)
    if not os.path.exists(path):
        problems = load_records(cfg.problems, cfg.data_dir, "problems", "test")[: cfg.n_problems]
        attempts = Attempts(n, temperature, cfg.max_new_tokens, cfg.calculator, seed)
        log = partial(print, f"eval {stage}:", flush=True)
        rows = solve(subject.model(stage), subject.tokenizer, problems, attempts, log)
        write_jsonl(path, rows)
    return read_jsonl(path)


@task("problems", data=("problems",), files=("problems_test.jsonl",), settings=ANSWERS)
def greedy(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Measure one greedy answer to every problem: how many are right, and what went wrong.

    Beside the untrained row stands the answer that is right most often.
    """
    rows = solutions(subject, stage, cfg, greedy=True)
    flags, examples = taxonomy(rows)
    results = []
    for metric, values in flags.items():
        extra = {"examples": examples.get(metric, [])}
        results.append(Row(metric, "greedy", proportion(values), extra=extra))
    if stage == "untrained":
        answers = [final_answer(row["answer"]) for row in rows]
        common = Counter(answers).most_common(1)[0][0]
        share = proportion(answer == common for answer in answers)
        results.append(Row("exact_match", "greedy", share, model=f"always {common}"))
    return results


# --------------------------------------------------------------------------------------------------
# Choices among several solutions


@task("rerank", ("problems",), ("problems_test.jsonl",), (*ANSWERS, *SAMPLES), judged)
def rerank(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Measure ways to choose among the first k solutions, for k = 1, 2, 4, ..., and the scores."""
    rows = solutions(subject, stage, cfg, greedy=False)
    verifier, tokenizer = subject.model("verifier"), subject.tokenizer
    score_solutions(verifier, tokenizer, rows)
    log_likelihoods(subject.model(stage), tokenizer, rows)
    results = [*discrimination(verifier, tokenizer, rows), *calibration(rows)]
    k = 1
    while k <= cfg.n_samples:
        first = [{**row, "solutions": row["solutions"][:k]} for row in rows]
        results += [accuracy(first, f"{how}@{k}", how) for how in RERANKERS]
        k *= 2
    return results


@task("published", ("published",), ("test.jsonl",), ("n_problems",), judged)
def published(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Judge GSM8K's published solutions of its test problems, which are never trained on.

    Four larger models made them. The AUC is that over all of them and that within each source, for
    sources differ in style and in accuracy.
    """
    tokenizer, verifier = subject.tokenizer, subject.model("verifier")
    records = read_jsonl(os.path.join(cfg.data_dir, cfg.published, "test.jsonl"))[: cfg.n_problems]
    rows = [published_solutions(record, tokenizer) for record in records]

    def longest(row: dict) -> int:
        return max(len(ids) for ids, _ in with_prompts([row], tokenizer))

    what = f"eval: problems of {cfg.published}, with their solutions,"
    rows = drop_too_long(rows, longest, subject.seq_len, what, subject.log_once)
    score_solutions(verifier, tokenizer, rows)
    log_likelihoods(subject.model(stage), tokenizer, rows)
    results = [*discrimination(verifier, tokenizer, rows), *calibration(rows)]
    results += [accuracy(rows, how, how) for how in (*CHOSEN_BY, "oracle")]
    for source in [s["source"] for s in rows[0]["solutions"]]:
        part = only(rows, lambda s, source=source: s["source"] == source)
        results.append(accuracy(part, source, "oracle"))
        for how, key in CHOSEN_BY.items():
            results += auc_rows(f"{how} of {source}", part, key)
    return results


def published_solutions(record: dict, tokenizer: Tokenizer) -> dict:
    """Return a published record in the form of a solved problem."""
    own = []
    for source, value in record.items():
        if isinstance(value, dict):
            text = re.sub(r"\nA: (.*)$", r"\n#### \1", value["solution"])
            ids = [*tokenizer.encode(text), tokenizer.end]
            judged = {"stopped": True, "correct": value["is_correct"]}
            own.append({"source": source, "text": text, "ids": ids, **judged})
    return {"question": record["question"], "solutions": own}


def accuracy(rows: list[dict], protocol: str, how: str) -> Row:
    """Return the share of problems whose chosen solution is right."""
    return Row("exact_match", protocol, proportion(choose(row["solutions"], how) for row in rows))


def only(rows: list[dict], keep: Callable[[dict], bool]) -> list[dict]:
    """Return the problems with those of their solutions that keep() wants."""
    return [{**row, "solutions": [s for s in row["solutions"] if keep(s)]} for row in rows]


def probability(solution: dict) -> float:
    """Return the verifier's probability that a solution is right: sigmoid(score)."""
    return (1 + math.tanh(solution["score"] / 2)) / 2  # without overflow


def choose(solutions: list[dict], how: str) -> bool:
    """Return whether the answer that is chosen from the solutions is right.

    oracle: any is; majority: the most common answer, the one seen first in a tie; likelihood: the
    likeliest; best_of: the highest score; weighted: the largest sum of sigmoid(score).
    """
    if how == "oracle":
        return any(s["correct"] for s in solutions)
    if how in CHOSEN_BY:
        return max(solutions, key=lambda s: s[CHOSEN_BY[how]])["correct"]
    votes = Counter()
    for s in solutions:
        votes[final_answer(s["text"])] += 1.0 if how == "majority" else probability(s)
    votes.pop(None, None)  # no answer is no vote
    winner = votes.most_common(1)[0][0] if votes else None
    return any(s["correct"] for s in solutions if final_answer(s["text"]) == winner)


# --------------------------------------------------------------------------------------------------
# How well the scores separate


def auc_rows(protocol: str, rows: list[dict], key: str) -> list[Row]:
    """Return the AUC of a field of the solutions, as a row; none where all are right or wrong."""
    kinds = {s["correct"] for row in rows for s in row["solutions"]}
    return [Row("auc", protocol, auc_interval(rows, key))] if len(kinds) == 2 else []


def auc_interval(rows: list[dict], key: str) -> Estimate:
    """Return the AUC of a field of the solutions; its interval is of 200 draws of problems."""

    def value_of(numbers: np.ndarray | range) -> float:
        drawn = [s for i in numbers for s in rows[i]["solutions"]]
        return auc([s[key] for s in drawn], [s["correct"] for s in drawn])

    draws = [value_of(draw) for draw in bootstrap(len(rows), 200)]
    low, high = np.nanquantile(draws, [0.025, 0.975])
    n = sum(len(row["solutions"]) for row in rows)
    return Estimate(value_of(range(len(rows))), n, float(low), float(high))


def discrimination(verifier: GPT, tokenizer: Tokenizer, rows: list[dict]) -> list[Row]:
    """Return the AUC of the model's likelihood, of the verifier, and of controls.

    form_alone is that a solution stopped and has an answer, which must not separate;
    best_of_same_form is the verifier among solutions of full form; last_number_alone is the
    verifier when it is shown the final answer alone.
    """
    for row in rows:
        for s in row["solutions"]:
            s["form"] = s["stopped"] and final_answer(s["text"]) is not None
    matched = [row for row in only(rows, lambda s: s["form"]) if row["solutions"]]
    bare = []
    for row in matched:
        own = [{**s, "ids": last_line(s, tokenizer)} for s in row["solutions"]]
        bare.append({**row, "solutions": own})
    score_solutions(verifier, tokenizer, bare)
    return [
        *auc_rows("likelihood", rows, "loglik"),
        *auc_rows("best_of", rows, "score"),
        *auc_rows("form_alone", rows, "form"),
        *auc_rows("best_of_same_form", matched, "score"),
        *auc_rows("last_number_alone", bare, "score"),
    ]


def last_line(solution: dict, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of the final answer alone."""
    return [*tokenizer.encode(f"#### {final_answer(solution['text'])}"), tokenizer.end]


def calibration(rows: list[dict]) -> list[Row]:
    """Measure whether a score of p is right p of the time, over all and in tenths of p."""
    solutions = [s for row in rows for s in row["solutions"]]
    p = np.array([probability(s) for s in solutions])
    right = np.array([float(s["correct"]) for s in solutions])
    tenth = np.minimum((10 * p).astype(int), 9)

    def error(draw: np.ndarray | slice) -> float:
        return np.abs(np.bincount(tenth[draw], (p - right)[draw], 10)).sum() / len(p)

    value = error(slice(None))
    draws = [error(draw) for draw in bootstrap(len(p), 200)]  # biased upwards: sampling adds to it
    low, high = min(np.quantile(draws, 0.025), value), np.quantile(draws, 0.975)
    expected = Estimate(float(value), len(p), float(low), float(high))
    results = [Row("brier", "verifier", mean((p - right) ** 2))]
    results.append(Row("calibration_error", "verifier", expected))
    for t in range(10):
        inside = tenth == t
        if inside.any():
            extra = {"predicted": float(p[inside].mean())}
            share = proportion(right[inside])
            results.append(Row("calibration", f"tenth {t}", share, extra=extra))
    return results
