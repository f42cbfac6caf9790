"""Word problems: greedy answers and their errors, choices among samples, and the verifier."""

import copy
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np

from corpus.chat import drop_too_long
from corpus.tokenizer import Tokenizer
from evals.base import VERSION, EvalConfig, Row, Subject, judged, task
from evals.results import RERANKERS
from evals.stats import Estimate, auc, bootstrap, mean, proportion, ratio
from inference.scoring import log_likelihoods, score_solutions, with_prompts
from inference.solutions import (
    Attempts,
    answer_value,
    arithmetic,
    final_answer,
    is_same,
    last_value,
    solve,
    with_room,
)
from model import GPT
from runtime.files import digest
from runtime.logs import read_sealed, write_sealed

CHOSEN_BY = {"likelihood": "loglik", "best_of": "score"}  # the highest of this field
ANSWERS = "n_problems max_new_tokens calculator"  # settings of a greedy solution
SAMPLES = f"{ANSWERS} n_samples temperature seed"  # of samples


def solutions(
    subject: Subject, stage: str, cfg: EvalConfig, greedy: bool, ask: Callable | None = None
) -> list[dict]:
    """Return the test problems solved once greedily or n_samples times, and keep them in a file.

    ask(problems) returns them with the text that is to be continued, and what ends an answer.
    """
    n, temperature = (1, 0.0) if greedy else (cfg.n_samples, cfg.temperature)
    seed = cfg.seed if temperature else 0
    problems, until = subject.records("problems", cfg.problems)[: cfg.n_problems], ()
    if ask:
        problems, until = ask(problems)
    settings = [VERSION, n, temperature, cfg.max_new_tokens, seed, cfg.calculator]
    settings += [str(subject.dtype), digest(problems)]
    weights = subject.checkpoints[stage]["weights_hash"]
    name = "few_shot_" * bool(ask) + f"{stage}_{weights}_{digest(settings)[:8]}.jsonl"
    path = os.path.join(cfg.out_dir, "generations", name)
    rows = read_sealed(path)
    if rows is None:
        attempts = Attempts(n, temperature, cfg.max_new_tokens, cfg.calculator, seed, until)
        log = partial(print, f"eval {stage}:", flush=True)
        model, tokenizer = subject.model(stage), subject.tokenizers[stage]
        fit = with_room(model, tokenizer, problems, log)
        rows = solve(model, tokenizer, fit, attempts, log)
        write_sealed(path, rows)
    subject.note_kept([row["question"] for row in problems], [row["question"] for row in rows])
    return rows


@task("problems", data="problems", files="problems_test.jsonl", settings=ANSWERS)
def greedy(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Measure one greedy answer to every problem: how many are right, and what went wrong."""
    rows = solutions(subject, stage, cfg, greedy=True)
    flags, examples = taxonomy(rows)
    results = []
    for metric, values in flags.items():
        extra = {"examples": examples.get(metric, [])}
        results.append(Row(metric, "greedy", proportion(values), extra=extra))
    if stage == subject.first:
        answers = [final_answer(row["answer"]) for row in rows]
        common = Counter(answers).most_common(1)[0][0]
        share = proportion(answer == common for answer in answers)
        results.append(Row("exact_match", "greedy", share, model=f"always {common}"))
    return results


def beside_rl(subject: Subject, cfg: EvalConfig) -> list[str]:
    """Return the tuned stages if RL is one of them, for whose sake this is measured."""
    tasks = {run.get("task") for run in subject.checkpoints.values()}
    return subject.tuned if "rl" in tasks else []


@task("samples", "problems", "problems_test.jsonl", SAMPLES, beside_rl)
def samples(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Measure problems solved by any of k samples, their length, and their nats per token.

    RL may only make likely what was possible before: then one sample is right more often, and any
    of many is not (arXiv 2504.13837).
    """
    rows = solutions(subject, stage, cfg, greedy=False)
    log_likelihoods(subject.model(stage), subject.tokenizers[stage], rows)
    results = []
    for k in (2**i for i in range(cfg.n_samples.bit_length())):
        first = [{**row, "solutions": row["solutions"][:k]} for row in rows]
        results.append(accuracy(first, f"any of {k}", "oracle"))
    n_tokens = [sum(len(s["ids"]) for s in row["solutions"]) for row in rows]
    nats = [-sum(s["loglik"] for s in row["solutions"]) for row in rows]
    results.append(Row("nats_per_token", "sampled", ratio(nats, n_tokens)))
    lengths = [n / len(row["solutions"]) for n, row in zip(n_tokens, rows, strict=True)]
    return [*results, Row("length", "sampled", mean(lengths))]


@task("rerank", "problems", "problems_test.jsonl", SAMPLES, judged)
def rerank(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Measure ways to choose among the first k solutions, for k = 1, 2, 4, ..., and the scores."""
    rows = solutions(subject, subject.judges[stage], cfg, greedy=False)
    results = judge(subject, stage, rows)
    for k in (2**i for i in range(cfg.n_samples.bit_length())):
        first = [{**row, "solutions": row["solutions"][:k]} for row in rows]
        results += [accuracy(first, f"{how}@{k}", how) for how in RERANKERS]
    return results


@task("published", "published", "test.jsonl", "n_problems", judged)
def published(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Judge four larger models' published solutions of GSM8K's test problems."""
    tokenizer, policy = subject.tokenizers[stage], subject.judges[stage]
    records = subject.records("published", cfg.published)[: cfg.n_problems]
    rows = [published_solutions(record, tokenizer) for record in records]

    def longest(row: dict) -> int:
        return max(len(ids) for ids, _ in with_prompts([row], tokenizer))

    what = f"eval: problems of {cfg.published}, with their solutions,"
    space = min(subject.model(name).cfg.seq_len for name in (stage, policy))
    every = rows
    rows = drop_too_long(every, longest, space, what, subject.log_once)
    subject.note_kept(every, rows)
    results = judge(subject, stage, rows)
    results += [accuracy(rows, how, how) for how in (*CHOSEN_BY, "oracle")]
    # Sources differ in style and in accuracy.
    for source in dict.fromkeys(s["source"] for s in solutions_in(rows)):
        part = [row for row in only(rows, "source", source) if row["solutions"]]
        results.append(accuracy(part, source, "oracle"))
        for how, key in CHOSEN_BY.items():
            results += auc_rows(f"{how} of {source}", part, key)
    return results


def judge(subject: Subject, stage: str, rows: list[dict]) -> list[Row]:
    """Write score and loglik into all solutions, and return how well they tell which are right."""
    verifier, tokenizer = subject.model(stage), subject.tokenizers[stage]
    score_solutions(verifier, tokenizer, rows)
    log_likelihoods(subject.model(subject.judges[stage]), tokenizer, rows)
    return [*discrimination(verifier, tokenizer, rows), *calibration(rows)]


def published_solutions(record: dict, tokenizer: Tokenizer) -> dict:
    own = []
    for source, value in record.items():
        if isinstance(value, dict):
            text = re.sub(r"\nA: (.*)$", r"\n#### \1", value["solution"])
            ids = [*tokenizer.encode(text), tokenizer.end]
            judged = {"stopped": True, "correct": value["is_correct"]}
            own.append({"source": source, "text": text, "ids": ids, **judged})
    return {"question": record["question"], "solutions": own}


def accuracy(rows: list[dict], protocol: str, how: str) -> Row:
    return Row("exact_match", protocol, proportion(choose(row["solutions"], how) for row in rows))


def solutions_in(rows: list[dict]) -> list[dict]:
    return [solution for row in rows for solution in row["solutions"]]


def only(rows: list[dict], key: str, value: object) -> list[dict]:
    return [{**row, "solutions": [s for s in row["solutions"] if s[key] == value]} for row in rows]


def probability(solution: dict) -> float:
    return (1 + math.tanh(solution["score"] / 2)) / 2  # sigmoid(score) without overflow


def choose(solutions: list[dict], how: str) -> bool:
    """Return whether the answer that is chosen from the solutions is right.

    oracle: any is; majority: the most common value, the one seen first in a tie; likelihood: the
    likeliest; best_of: the highest score; weighted: the value of the largest sum of sigmoid(score).
    """
    if how == "oracle":
        return any(s["correct"] for s in solutions)
    if how in CHOSEN_BY:
        return max(solutions, key=lambda s: s[CHOSEN_BY[how]])["correct"]
    votes = Counter()
    for s in solutions:
        votes[answer_value(s["text"])] += 1.0 if how == "majority" else probability(s)
    votes.pop(None, None)  # no answer is no vote
    winner = votes.most_common(1)[0][0] if votes else None
    return any(s["correct"] for s in solutions if answer_value(s["text"]) == winner)


def auc_rows(protocol: str, rows: list[dict], key: str) -> list[Row]:
    """Return a row for the AUC of a field; none where all solutions are right or all wrong."""

    def value_of(drawn: list[dict]) -> float:
        own = solutions_in(drawn)
        return auc([s[key] for s in own], [s["correct"] for s in own])

    value = value_of(rows)
    if math.isnan(value):
        return []
    draws = [value_of([rows[i] for i in draw]) for draw in bootstrap(len(rows), 200)]
    low, high = map(float, np.nanquantile(draws, [0.025, 0.975]))
    n = len(solutions_in(rows))
    return [Row("auc", protocol, Estimate(value, n, low, high, parts=len(rows)))]


def discrimination(verifier: GPT, tokenizer: Tokenizer, rows: list[dict]) -> list[Row]:
    """Return the AUC of the model's likelihood, of the verifier, and of three controls."""
    for s in solutions_in(rows):
        s["form"] = s["stopped"] and final_answer(s["text"]) is not None
    matched = [row for row in only(rows, "form", True) if row["solutions"]]
    bare = copy.deepcopy(matched)
    for s in solutions_in(bare):
        s["ids"] = [*tokenizer.encode(f"#### {final_answer(s['text'])}"), tokenizer.end]
    score_solutions(verifier, tokenizer, bare)
    return [
        *auc_rows("likelihood", rows, "loglik"),
        *auc_rows("best_of", rows, "score"),
        *auc_rows("form_alone", rows, "form"),  # it stopped and has an answer
        *auc_rows("best_of_same_form", matched, "score"),  # among those that did
        *auc_rows("last_number_alone", bare, "score"),  # the verifier sees #### N only
    ]


def calibration(rows: list[dict]) -> list[Row]:
    """Measure whether a score of p is right p of the time, over all and in tenths of p."""
    p = np.array([probability(s) for s in solutions_in(rows)])
    right = np.array([float(s["correct"]) for s in solutions_in(rows)])
    tenth = np.minimum((10 * p).astype(int), 9)

    def error(draw: np.ndarray | slice) -> float:
        return np.abs(np.bincount(tenth[draw], (p - right)[draw], 10)).sum() / len(p)

    value = float(error(slice(None)))
    draws = [error(draw) for draw in bootstrap(len(p), 200)]  # biased upwards: sampling adds to it
    low, high = map(float, np.quantile(draws, [0.025, 0.975]))
    results = [Row("brier", "verifier", mean((p - right) ** 2))]
    expected = Estimate(value, len(p), min(low, value), high)
    results.append(Row("calibration_error", "verifier", expected))
    for t in np.unique(tenth):
        inside = tenth == t
        extra = {"predicted": float(p[inside].mean())}
        results.append(Row("calibration", f"tenth {t}", proportion(right[inside]), extra=extra))
    return results


def taxonomy(rows: list[dict]) -> tuple[dict[str, list[bool]], dict[str, list[dict]]]:
    """Return a flag per problem for each outcome and error, and three examples of each error."""
    flags, examples = {}, {}
    for row in rows:
        text, correct = row["solutions"][0]["text"], row["solutions"][0]["correct"]
        answer, false = final_answer(row["answer"]), false_equation(text)
        flexible = is_same(last_value(text), answer_value(row["answer"]))
        wrong = not (correct or flexible)
        outcome = {
            "exact_match": correct,  # the number after #### is the answer's (strict)
            "flexible_match": flexible,  # the last number has its value
            "no_answer": final_answer(text) is None,  # nothing after ####
            "stop_rate": row["solutions"][0]["stopped"],  # it ended by itself
        }
        errors = {
            "error_extraction": not correct and flexible,  # a false reject
            "error_arithmetic": wrong and false is not None,  # an equation does not hold
            "error_reasoning": wrong and false is None,  # though every equation holds
            "false_accept": correct and false is not None,  # though an equation does not hold
        }
        for name, flag in {**outcome, **errors}.items():
            flags.setdefault(name, []).append(flag)
        example = {"question": row["question"], "text": text, "answer": answer}
        for name in (name for name, flag in errors.items() if flag):
            examples.setdefault(name, []).append({**example, "false_equation": false})
    return flags, {name: found[:3] for name, found in examples.items()}


def false_equation(text: str) -> str | None:
    """Return the first equation between numbers alone that does not hold (3+4=8), or None."""
    outside = re.sub(r"<<[^<>]*>>", "", text)
    for part in re.findall(r"<<([^<>]*)>>", text) + outside.split("\n"):
        for before, after in pairwise(part.split("=")):
            left = re.search(r"[-+*/x().$\d\s,]*$", before)[0].split(", ")[-1].strip()
            right = re.match(r"[-+*/x().,$\d\s]*", after)[0].strip()
            if is_false(left, right):
                return f"{left}={right}"
    return None


def is_false(left: str, right: str) -> bool:
    """Return whether left=right can be read and does not hold."""
    exact, claimed = side_value(left), side_value(right)
    if exact is None or claimed is None or not re.search(r"\d\s*\)*\s*[-+*/x]", left):
        return False
    # 2*3=6+1=7 is bad style and good arithmetic.
    first_number = side_value(re.match(r"[-$(\d.,]*", right)[0])
    return not any(is_close(exact, x) for x in (claimed, first_number) if x is not None)


def side_value(side: str) -> float | None:
    """Return the value of one side of an equation, or None where it cannot be read."""
    side = side.replace("$", "").strip().rstrip(".,")
    side = re.sub(r"(?<=\d)\s*x\s*(?=[\d(])", "*", side)
    # A side that begins with an operator lacks what stood in words before it.
    return arithmetic(side) if re.match(r"[-(\d.]", side) else None


def is_close(exact: float, claimed: float) -> bool:
    """Return whether a claim is right up to rounding to cents or to whole numbers."""
    rounded = claimed == int(claimed) and exact != int(exact)
    return abs(exact - claimed) < max(0.011, 0.01 * abs(exact), float(rounded))
