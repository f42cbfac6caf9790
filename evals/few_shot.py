"""Word problems after five solved ones in plain text: GSM8K as lm-evaluation-harness asks it.

It needs no chat template, so that a pretrained model can show what it knows. Equal to the harness's
task gsm8k item by item, where --problem_shots holds the training problems in their own order.
"""

import random
import re
from functools import partial

from configurator import UserError
from evals.base import EvalConfig, Row, Subject, task
from evals.problems import ANSWERS, solutions
from evals.stats import proportion
from inference.solutions import SHOTS

N_SHOTS, SEED = 5, 1234  # the harness's own
QUESTION, ANSWER = "Question: {question}\nAnswer:", " {answer}\n\n"
UNTIL = ("Question:", "</s>", "<|im_end|>")  # texts before which an answer ends
FOUND_BY = {  # pattern of the number, and which of those found is the answer
    "strict-match": (r"#### (\-?[0-9\.\,]+)", 0),
    "flexible-extract": (r"-?[$0-9.,]{2,}|-?[0-9]+", -1),
}
IGNORED = (",", r"\$", "(?s).*#### ", r"\.$")


def after_shots(pool: list[dict], problems: list[dict]) -> tuple[list[dict], tuple[str, ...]]:
    """Return the problems with what a model is to continue, and what ends its answer.

    Five others with their solutions are drawn anew for each problem, in one sequence.
    """
    if len(pool) < N_SHOTS:
        raise UserError(f"problem_shots: there are {len(pool)} problems, expected {N_SHOTS}")
    rng = random.Random(SEED)
    asked = []
    for problem in problems:
        shots = [(QUESTION + ANSWER).format(**row) for row in rng.sample(pool, N_SHOTS)]
        text = "".join([*shots, QUESTION.format(**problem)])
        asked.append({**problem, SHOTS: text})
    return asked, UNTIL


@task("few_shot", "problem_shots problems", "problems_test.jsonl", ANSWERS)
def few_shot(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Measure one greedy answer to every problem, read in the harness's two ways."""
    pool = subject.records("problems", cfg.problem_shots)
    rows = solutions(subject, stage, cfg, greedy=True, ask=partial(after_shots, pool))
    results = []
    for name in FOUND_BY:
        right = [is_right(row, name) for row in rows]
        results.append(Row("exact_match", f"{N_SHOTS}-shot {name}", proportion(right)))
    stopped = proportion(row["solutions"][0]["stopped"] for row in rows)
    return [*results, Row("stop_rate", f"{N_SHOTS}-shot", stopped)]


def is_right(row: dict, how: str) -> bool:
    """Return whether the number that is found in an answer is that of the problem's own."""
    pattern, place = FOUND_BY[how]
    found = re.findall(pattern, row["solutions"][0]["text"])
    return bool(found) and bare(found[place]) == bare(row["answer"])


def bare(answer: str) -> str:
    """Return an answer without what the harness does not compare."""
    for pattern in IGNORED:
        answer = re.sub(pattern, "", answer)
    return answer.lower()
