"""This module samples solutions of word problems and checks them, with a calculator if wanted.

A problem is {question, answer}; its answer ends in "#### " and a number (GSM8K, arXiv 2110.14168).
Two rules compare answers: the strict one as GSM8K does, by characters; the other by value.
"""

import ast
import hashlib
import operator
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction

from corpus.chat import drop_too_long, render_prompt, user_turn
from corpus.tokenizer import Tokenizer
from inference.answers import Ending
from inference.sampling import Ids, Sampling, generate
from model import GPT

BATCH = 512  # solutions that are sampled at once
SHOTS = "text with solved problems"  # a problem's field: what to continue, in place of its question
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
# The start of a number with all that is written into it, so that no part is taken for the whole
NUMBER = re.compile(
    r"(?:(?<![\w)])[-−+])?[$€£¥₹]?(?:\.?\d|[½¼¾])"  # the dash of 10-15 is no minus
    r"(?:[\d½¼¾²³]|[.,:'’_](?=\d)|[eE][-+]?(?=\d)"  # 3.5, 1,000, 3:30, 1e3
    r"|(?<!\d{4})[ \u00a0\u2009\u202f](?=\d{3}(?!\d))| (?=\d+/\d|[½¼¾])"  # 1 000, 1 1/2
    r"| ?[-−–—+*/x×^]{1,2} ?[$€£¥₹]?(?=\.?\d))*"  # 1/2, 10-15, 3 x 4, 2**3
)
ANSWER = re.compile(rf"####[ \t]*(?:[$€£¥₹] ?)?({NUMBER.pattern})")
IN_THOUSANDS = re.compile(r"[-+]?\d{1,3}([,\s'’_])\d{3}(?:\1\d{3})*(?:\.\d+)?")
WHOLE = re.compile(r"[-+]?(?:(?:\d*\.)?\d+(?:[eE][-+]?\d\d?)?|\d+ ?/ ?\d+)")


def number_value(written: str) -> Fraction | None:
    """Return the value of a number as people write it, or None where it is not wholly one."""
    plain = re.sub("[$€£¥₹]", "", written).replace("−", "-")
    if IN_THOUSANDS.fullmatch(plain):
        plain = re.sub(r"[,\s'’_]", "", plain)
    if WHOLE.fullmatch(plain):
        with suppress(ValueError, ZeroDivisionError):  # thousands of digits, or 1/0
            return Fraction(plain.replace(" ", ""))
    return None


def answer_value(text: str) -> Fraction | None:
    """Return the value of the number after ####, or None."""
    found = ANSWER.search(text)
    return number_value(found[1]) if found else None


def last_value(text: str) -> Fraction | None:
    """Return the value of the last number, or None where that is not wholly one."""
    found = NUMBER.findall(text)
    return number_value(found[-1]) if found else None


def final_answer(text: str) -> str | None:
    """Return the number after ####, commas removed, or None (GSM8K's strict match)."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found[1].replace(",", "").rstrip(".") if found else None


def is_same(a: str | Fraction | None, b: str | Fraction | None) -> bool:
    return a is not None and a == b  # no number is not the same as no number


def label_by_value(rows: list[dict]) -> list[dict]:
    """Call those solutions correct whose answers have the right value; rows as of solve()."""
    for row in rows:
        if (gold := answer_value(row["answer"])) is not None:
            for solution in row["solutions"]:
                solution["correct"] = answer_value(solution["text"]) == gold
    return rows


def value_of(node: ast.expr) -> float:
    """Return the value of a parsed expression. Raises LookupError where it is no arithmetic."""
    match node:
        case ast.Constant(int() | float() as value):
            return float(value)
        case ast.UnaryOp(sign, operand):
            return OPERATORS[type(sign)](value_of(operand))
        case ast.BinOp(left, sign, right):
            return OPERATORS[type(sign)](value_of(left), value_of(right))
    raise LookupError(node)


def arithmetic(text: str) -> float | None:
    """Return the value of an expression of + - * / // ( ) and decimal numbers.

    It is None for anything else, for more than 64 characters, for a division by zero and for 10^15
    or more: nothing that a model can write is run, hangs or raises.
    """
    if len(text) > 64:
        return None
    text = " ".join(text.replace(",", "").split())  # any white space separates
    if not re.fullmatch(r"[\d.+\-*/() ]+", text):
        return None
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)  # 007 is a number, though not in Python
    try:
        value = value_of(ast.parse(text, mode="eval").body)
    except (SyntaxError, LookupError, ZeroDivisionError):
        return None
    return value if abs(value) < 1e15 else None


class Calculator:
    """A calculator finishes what a model writes: after <<48/2= it hands over 24>>."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, ids: Ids) -> Ids:
        """Return the ids of the result and >> where ids end in an open <<expression=, else none."""
        if b"=" not in self.tokenizer.token_bytes(ids[-1]):
            return []
        asked = re.search(r"<<([^<>=]*)=$", self.tokenizer.decode(ids[-70:]))
        value = arithmetic(asked[1]) if asked else None
        if value is None:
            return []
        digits = f"{round(value, 6) + 0.0:.6f}"  # + 0.0 makes 0 of -0
        return self.tokenizer.encode(digits.rstrip("0").rstrip(".") + ">>")


@dataclass(frozen=True)
class Attempts:
    n_samples: int
    temperature: float
    max_new_tokens: int
    calculator: bool = False
    seed: int = 0
    until: tuple[str, ...] = ()  # texts before which an answer ends


def checked(ids: Ids, answer: str, ending: Ending) -> dict:
    """Return a solution {ids, text, stopped, correct}, checked by the strict rule."""
    text = ending.text(ids)
    found = final_answer(text)
    correct = is_same(found, final_answer(answer))  # which is the 1 of 1/2
    correct = correct and is_same(number_value(found), answer_value(answer))
    return {"ids": ids, "text": text, "stopped": ending(ids), "correct": correct}


def prompt_of(row: dict, tokenizer: Tokenizer) -> Ids:
    """Return the ids that a solution follows: a plain text if there is one, or the user's turn."""
    if SHOTS in row:
        return [*tokenizer.prefix, *tokenizer.encode(row[SHOTS])]
    return render_prompt(user_turn(row["question"]), tokenizer)


def with_room(model: GPT, tokenizer: Tokenizer, problems: list[dict], log: Callable) -> list[dict]:
    """Return the problems whose prompts leave room for an answer; log how many do not."""

    def length(problem: dict) -> int:
        return len(prompt_of(problem, tokenizer)) + 1

    return drop_too_long(problems, length, model.cfg.seq_len, "problems", log)


def solve(
    model: GPT,
    tokenizer: Tokenizer,
    problems: list[dict],
    attempts: Attempts,
    log: Callable[[str], None] = print,
) -> list[dict]:
    """Sample solutions of every problem. -> [{question, answer, solutions: [...]}], see checked().

    Prompts of similar length share a batch. The solutions of a problem depend on it and the seed
    alone, not on the other problems or on the processes that share them. Every prompt must have
    room, see with_room(); an answer ends where the context does.
    """
    rows = [{**problem, "solutions": []} for problem in problems]
    prompts = [prompt_of(row, tokenizer) for row in rows]
    hashes = [hashlib.sha256(row["question"].encode()).hexdigest() for row in rows]
    by_length = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    order = [(i, k) for i in by_length for k in range(attempts.n_samples)]
    length = attempts.max_new_tokens
    ending = Ending(tokenizer, attempts.until)
    settings = {"sampling": Sampling(attempts.temperature)}
    settings["calculator"] = Calculator(tokenizer) if attempts.calculator else None
    began = time.perf_counter()
    n_tokens = 0
    for first in range(0, len(order), BATCH):
        part = order[first : first + BATCH]
        batch = [prompts[i] for i, _ in part]
        seeds = [(attempts.seed, int(hashes[i][:8], 16), k) for i, k in part]
        texts = generate(model, batch, length, ending, seeds, **settings)
        for (i, _), ids in zip(part, texts, strict=True):
            ids = ids[: model.cfg.seq_len - len(prompts[i])]
            rows[i]["solutions"].append(checked(ids, rows[i]["answer"], ending))
            n_tokens += len(ids)
        n_done = first + len(part)
        if n_done == len(order) or (first // BATCH) % 4 == 3:
            seconds = time.perf_counter() - began
            speed = f"{n_tokens / seconds:,.0f} tok/s"
            eta = seconds * (len(order) / n_done - 1)
            log(f"sampled {n_done}/{len(order)} solutions | {speed} | eta {eta:.0f} s")
    return rows
