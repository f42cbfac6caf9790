"""This module describes the answers of a model: do they stop, how long are they, do they repeat?"""

import math
from collections import Counter
from itertools import pairwise

from configurator import UserError
from corpus.chat import TEMPLATE
from corpus.tokenizer import Tokenizer
from inference.sampling import GREEDY, generate
from model import GPT


def check_template(checkpoint: dict, ref: str) -> None:
    """Raise UserError where a checkpoint was tuned with another chat template than this code's."""
    template = checkpoint.get("template", TEMPLATE)
    if template != TEMPLATE:
        raise UserError(f"{ref} was tuned with chat template {template}, this code has {TEMPLATE}")


def stops(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the ids that end an answer: of the turn, and of the document."""
    return tokenizer.end, tokenizer.eos


def answer_text(ids: list[int], tokenizer: Tokenizer) -> str:
    """Return the text of an answer, without the id that ended it."""
    stopped = ids[-1] in stops(tokenizer)
    return tokenizer.decode(ids[:-1] if stopped else ids)


def answer_stats(
    model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int
) -> dict[str, list[float]]:
    """Answer the prompts greedily and describe each answer.

    stop_rate   whether it stops by itself
    length      its tokens
    repetition  the share of its 4-grams that it repeats
    distinct_2  the share of its 2-grams that no other answer has
    """
    answers = generate(model, prompts, max_new_tokens, stops(tokenizer), sampling=GREEDY)
    return {
        "stop_rate": [ids[-1] in stops(tokenizer) for ids in answers],
        "length": [len(ids) for ids in answers],
        "repetition": [repetition(ids) for ids in answers],
        "distinct_2": distinct_2(answers),
    }


def repetition(ids: list[int], n: int = 4) -> float:
    """Return the share of the n-grams that stood in the same text before."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_2(answers: list[list[int]]) -> list[float]:
    """Return the share of each answer's 2-grams that no other answer has.

    It is 0 where a model says the same to everyone (distinct-2, arXiv 1510.03055, across answers).
    """
    grams = [set(pairwise(ids)) for ids in answers]
    answers_with = Counter(gram for own in grams for gram in own)
    shares = []
    for own in grams:
        unshared = sum(answers_with[gram] == 1 for gram in own)
        shares.append(unshared / max(1, len(own)))
    return shares


# ------------------------------------------------------------------------------------------------
# Before and after tuning


def mean_stats(
    model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int
) -> dict[str, float]:
    """Return the means of answer_stats()."""
    stats = answer_stats(model, tokenizer, prompts, max_new_tokens)
    return {key: sum(values) / len(values) for key, values in stats.items()}


def changes(before: dict, after: dict) -> str:
    """Return what became of the answers, on one line."""
    stops = f"stop by themselves {before['stop_rate']:.0%} -> {after['stop_rate']:.0%}"
    length = f"{before['length']:.0f} -> {after['length']:.0f} tokens"
    repeated = f"repeated 4-grams {before['repetition']:.0%} -> {after['repetition']:.0%}"
    what = "greedy answers to held-out prompts, before -> after"
    return f"{what}: {stops}, {length}, {repeated}"


def answer_notes(before: dict, after: dict) -> list[str]:
    """Return what went wrong with the answers of a model tuned by DPO, if anything."""
    notes = []
    if after["stop_rate"] < before["stop_rate"] - 0.1:
        change = f"{before['stop_rate']:.0%} -> {after['stop_rate']:.0%}"
        notes.append(f"answers stop by themselves less often: {change}")
    if after["repetition"] > before["repetition"] + 0.1:
        change = f"{before['repetition']:.0%} -> {after['repetition']:.0%}"
        notes.append(
            f"the text collapses into repetition: {change} of 4-grams are repeated; "
            "lower --learning_rate, raise --beta, or add --rpo_alpha=1"
        )
    if not 0.7 < after["length"] / before["length"] < 1.4:
        change = f"{before['length']:.0f} -> {after['length']:.0f} tokens"
        notes.append(f"the length of answers drifts: {change}; compare it with the chosen ones")
    return notes


def curve_notes(result: dict, before: dict) -> list[str]:
    """Return what a reader of DPO's curves should know; before: the first validation."""
    notes = []
    if result["val_logps/chosen"] < before.get("val_logps/chosen", -math.inf):
        notes.append("the chosen answers became less likely too: if they suffer, --rpo_alpha=1")
    if result["val_rewards/accuracies"] > 0.995:
        notes.append("held-out accuracy is saturated: something shallow may tell these pairs apart")
    if result.get("val_loss", -math.inf) > before.get("val_loss", math.inf):
        notes.append("the held-out loss rose: lower --learning_rate, or take fewer steps")
    return notes
