"""Word problems with a final answer that can be checked: sampled solutions, ways to choose among them, and the verifier that judges them."""

import hashlib
import math
import re
import time
from collections import Counter

import numpy as np
import torch

import data
from model import GPT
from perplexity import windows_nll
from sample import Calculator, arithmetic, generate
from stats import auc, bootstrap, mean, proportion

CHOSEN_BY = {"likelihood": "loglik", "best_of": "score"}  # the highest of which field of a solution
RERANKERS = ("majority", "likelihood", "weighted", "best_of", "oracle")


def final_answer(text: str) -> str | None:
    """The number after ####, commas removed (GSM8K's strict match); None where there is none."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found[1].replace(",", "").rstrip(".") if found else None


def last_number(text: str) -> str | None:
    """The last number of all, commas and dollars removed (GSM8K's flexible extraction); None where there is none."""
    found = re.findall(r"-?[0-9][0-9,]*\.?[0-9]*|-?\.[0-9]+", text)
    return found[-1].replace(",", "").rstrip(".") if found else None


def false_equation(text: str) -> str | None:
    """The first equation of a solution that does not hold (3+4=8, inside <<>> or outside), else None. Only sums that both sides spell out in
    numbers are judged, with room for rounding to cents or to whole numbers."""

    def close(exact: float, claimed: float | None) -> bool:
        rounded = claimed is not None and claimed == int(claimed) and exact != int(exact)
        return claimed is not None and abs(exact - claimed) < max(
            0.011, 0.01 * abs(exact), float(rounded)
        )

    def value(side: str) -> float | None:
        side = re.sub(r"(?<=\d)\s*x\s*(?=[\d(])", "*", side.replace("$", "").strip().rstrip(".,"))
        return (
            arithmetic(side) if re.match(r"[-(\d.]", side) else None
        )  # one that begins with an operator lacks what stood in words before it

    for part in re.findall(r"<<([^<>]*)>>", text) + re.sub(r"<<[^<>]*>>", "", text).split("\n"):
        sides = part.split("=")
        for before, after in zip(sides, sides[1:]):
            left, right = (
                re.search(r"[-+*/x().$\d\s,]*$", before)[0].split(", ")[-1].strip(),
                re.match(r"[-+*/x().,$\d\s]*", after)[0].strip(),
            )
            a, b = value(left), value(right)
            if a is None or b is None or not re.search(r"\d\s*\)*\s*[-+*/x]", left):
                continue
            if not any(
                close(a, claim) for claim in (b, value(re.match(r"[-$(\d.,]*", right)[0]))
            ):  # 2*3=6+1=7 is bad style and good arithmetic
                return f"{left}={right}"
    return None


def taxonomy(rows: list[dict]) -> tuple[dict[str, list[bool]], dict[str, list[dict]]]:
    """What became of the first solution of every problem: one flag a problem under each name, and up to three examples of each error.

    exact_match       the number after #### is the answer's (strict)
    flexible_match    the last number is
    no_answer         nothing after ####
    stop_rate         it ended by itself
    error_extraction  strictly wrong, but the last number is right: a false reject
    error_arithmetic  wrong, and an equation in it does not hold
    error_reasoning   wrong, though every equation in it holds
    false_accept      right, though an equation in it does not hold
    """
    flags, examples = {}, {}
    for row in rows:
        s, answer = row["solutions"][0], final_answer(row["answer"])
        flexible, false = last_number(s["text"]) == answer, false_equation(s["text"])
        verdict = {
            "exact_match": s["correct"],
            "flexible_match": flexible,
            "no_answer": final_answer(s["text"]) is None,
            "stop_rate": s["stopped"],
            "error_extraction": not s["correct"] and flexible,
            "error_arithmetic": not (s["correct"] or flexible) and false is not None,
            "error_reasoning": not (s["correct"] or flexible) and false is None,
            "false_accept": s["correct"] and false is not None,
        }
        for name, flag in verdict.items():
            flags.setdefault(name, []).append(flag)
            if (
                flag
                and (name.startswith("error") or name == "false_accept")
                and len(examples.setdefault(name, [])) < 3
            ):
                examples[name].append(
                    {
                        "question": row["question"],
                        "text": s["text"],
                        "answer": answer,
                        "false_equation": false,
                    }
                )
    return flags, examples


def solve(
    model: GPT,
    tokenizer,
    problems: list[dict],
    n: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    calculator: bool = False,
    say=print,
) -> list[dict]:
    """n solutions of every problem, in batches of prompts of similar length: [{question, answer, solutions: [{ids, text, correct}]}].
    A problem's solutions depend on it and the seed alone, not on the other problems or the ranks that share them."""
    rows = [{**problem, "solutions": []} for problem in problems]
    prompts = [data.render_prompt(data.user(row["question"]), tokenizer) for row in rows]
    own_seed = [int(hashlib.sha256(row["question"].encode()).hexdigest()[:8], 16) for row in rows]
    order = [
        (i, k) for i in sorted(range(len(rows)), key=lambda i: len(prompts[i])) for k in range(n)
    ]
    stop, tool = (tokenizer.end, tokenizer.eos), Calculator(tokenizer) if calculator else None
    began, made, batch = time.perf_counter(), 0, 512
    for first in range(0, len(order), batch):
        part = order[first : first + batch]
        outputs = generate(
            model,
            [prompts[i] for i, _ in part],
            max_new_tokens,
            stop,
            [(seed, own_seed[i], k) for i, k in part],
            calculator=tool,
            temperature=temperature,
        )
        for (i, _), ids in zip(part, outputs):
            stopped = ids[-1] in stop
            text = tokenizer.decode(ids[:-1] if stopped else ids)
            right = final_answer(text)
            rows[i]["solutions"].append(
                {
                    "ids": ids,
                    "text": text,
                    "stopped": stopped,
                    "correct": right is not None and right == final_answer(rows[i]["answer"]),
                }
            )
            made += len(ids)
        elapsed, finished = time.perf_counter() - began, first + len(part)
        if finished == len(order) or (first // batch) % 4 == 3:
            say(
                f"sampled {finished}/{len(order)} solutions | {made / elapsed:,.0f} tok/s | eta {elapsed * (len(order) / finished - 1):.0f} s"
            )
    return rows


def with_prompts(rows: list[dict], tokenizer) -> list[tuple[list[int], dict]]:
    """(ids of prompt and solution, the solution) of every solution."""
    return [
        (data.render_prompt(data.user(row["question"]), tokenizer) + s["ids"], s)
        for row in rows
        for s in row["solutions"]
    ]


@torch.no_grad()
def score_solutions(verifier: GPT, tokenizer, rows: list[dict], batch: int = 128) -> None:
    """Write the verifier's logit at the last token of every solution into it as "score"."""
    items = sorted(with_prompts(rows, tokenizer), key=lambda item: len(item[0]))
    device = verifier.embed.weight.device
    for first in range(0, len(items), batch):
        part = items[first : first + batch]
        width = max(len(ids) for ids, _ in part)
        idx = torch.tensor(
            [ids + [tokenizer.pad] * (width - len(ids)) for ids, _ in part], device=device
        )
        solution = torch.tensor(
            [[len(ids) - len(s["ids"]) <= t < len(ids) for t in range(width)] for ids, s in part],
            device=device,
        )
        scores = verifier.scores(verifier.hidden(idx), idx, solution)
        for row, (ids, s) in enumerate(part):
            s["score"] = float(scores[row, len(ids) - 1])


def likelihoods(model: GPT, tokenizer, rows: list[dict]) -> None:
    """Write the log-likelihood of every solution under the model that made it into it as "loglik"."""
    items = with_prompts(rows, tokenizer)
    for (_, s), nll in zip(
        items, windows_nll(model, [(ids, len(s["ids"])) for ids, s in items], 128)
    ):
        s["loglik"] = -nll


def probability(solution: dict) -> float:
    """The verifier's, that the solution is right: sigmoid(score), without overflow."""
    return (1 + math.tanh(solution["score"] / 2)) / 2


def choose(solutions: list[dict], how: str) -> bool:
    """Whether the answer chosen from the solutions is right. oracle: any is; majority: the most common answer (first seen wins a
    tie); likelihood: the likeliest; best_of: the highest score; weighted: the answer with the largest sum of sigmoid(score)."""
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


def auc_interval(rows: list[dict], key: str) -> dict:
    """AUC of a field of the solutions; 95 % interval by 200 bootstrap draws of problems."""
    of = lambda numbers: auc(
        *zip(*((s[key], s["correct"]) for i in numbers for s in rows[i]["solutions"]))
    )
    low, high = np.nanquantile([of(draw) for draw in bootstrap(len(rows), 200)], [0.025, 0.975])
    return {
        "value": of(range(len(rows))),
        "low": float(low),
        "high": float(high),
        "n": sum(len(row["solutions"]) for row in rows),
    }


def both_kinds(rows: list[dict]) -> bool:
    return len({s["correct"] for row in rows for s in row["solutions"]}) == 2


def discrimination(verifier: GPT, tokenizer, rows: list[dict]) -> list[dict]:
    """AUC over scored solutions: of the likelihood and the verifier; of form alone (it stopped and has an answer), which must not
    separate; of the verifier among solutions of full form; and of the verifier when it is shown the final answer alone."""
    solutions = [s for row in rows for s in row["solutions"]]
    for s in solutions:
        s["form"] = s["stopped"] and final_answer(s["text"]) is not None
    matched = [{**row, "solutions": [s for s in row["solutions"] if s["form"]]} for row in rows]
    matched = [row for row in matched if row["solutions"]]
    bare = [
        {
            **row,
            "solutions": [
                {
                    "ids": tokenizer.encode(f"#### {final_answer(s['text'])}") + [tokenizer.end],
                    "correct": s["correct"],
                }
                for s in row["solutions"]
            ],
        }
        for row in matched
    ]
    score_solutions(verifier, tokenizer, bare)
    cases = [(how, rows, key) for how, key in CHOSEN_BY.items()]
    cases += [
        ("form_alone", rows, "form"),
        ("best_of_same_form", matched, "score"),
        ("last_number_alone", bare, "score"),
    ]
    return [
        {"metric": "auc", "protocol": how, **auc_interval(part, key)}
        for how, part, key in cases
        if both_kinds(part)
    ]


def calibration(rows: list[dict]) -> list[dict]:
    """Is a score of p right p of the time? Brier score, expected calibration error over tenths, and each tenth with its mean p."""
    solutions = [s for row in rows for s in row["solutions"]]
    p, right = (
        np.array([probability(s) for s in solutions]),
        np.array([float(s["correct"]) for s in solutions]),
    )
    tenth = np.minimum((10 * p).astype(int), 9)
    bins = [(t, p[tenth == t].mean(), right[tenth == t]) for t in range(10) if (tenth == t).any()]
    error = lambda draw: np.abs(np.bincount(tenth[draw], (p - right)[draw], 10)).sum() / len(p)
    draws = [error(draw) for draw in bootstrap(len(p), 200)]  # biased upwards: sampling adds to it
    low, high = np.minimum(np.quantile(draws, 0.025), error(slice(None))), np.quantile(draws, 0.975)
    return [
        {"metric": "brier", "protocol": "verifier", **mean((p - right) ** 2)},
        {
            "metric": "calibration_error",
            "protocol": "verifier",
            "value": float(error(slice(None))),
            "low": float(low),
            "high": float(high),
            "n": len(p),
        },
        *(
            {
                "metric": "calibration",
                "protocol": f"tenth {t}",
                "predicted": float(center),
                **proportion(flags),
            }
            for t, center, flags in bins
        ),
    ]
