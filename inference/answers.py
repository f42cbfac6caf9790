"""This module describes the answers of a model: do they stop, how long are they, do they repeat?"""

import math
from collections import Counter
from itertools import pairwise

from corpus.tokenizer import Tokenizer
from inference.sampling import GREEDY, Ids, generate
from model import GPT


class Ending:
    """An Ending knows where an answer ends: with an id, or before a text that begins a new turn."""

    def __init__(self, tokenizer: Tokenizer, texts: tuple[str, ...] = ()):
        self.tokenizer, self.texts = tokenizer, (*tokenizer.until, *texts)
        self.longest = max((len(text.encode()) for text in self.texts), default=0)  # tokens

    def __call__(self, ids: Ids) -> bool:
        """Return whether the last of some ids ends the answer."""
        if ids[-1] in self.tokenizer.stops:
            return True
        tail = self.tokenizer.decode(ids[-self.longest :]) if self.texts else ""
        return any(text in tail for text in self.texts)

    def text(self, ids: Ids) -> str:
        """Return the text of an answer, without what ended it."""
        text = self.tokenizer.decode(ids[:-1] if ids[-1] in self.tokenizer.stops else ids)
        for end in self.texts:
            text = text.partition(end)[0]
        return text


def answer_text(ids: Ids, tokenizer: Tokenizer) -> str:
    """Return the text of an answer, without what ended it."""
    return Ending(tokenizer).text(ids)


def answer_stats(model: GPT, tokenizer: Tokenizer, prompts: list[Ids], max_new_tokens: int) -> dict:
    """Answer the prompts greedily. -> {measure: its value for every answer}"""
    ending = Ending(tokenizer)
    answers = generate(model, prompts, max_new_tokens, ending, sampling=GREEDY)
    return {
        "stop_rate": [ending(ids) for ids in answers],
        "length": [len(ids) for ids in answers],
        "repetition": [repetition(ids) for ids in answers],
        "distinct_2": distinct_2(answers),
    }


def repetition(ids: Ids) -> float:
    """Return the share of the 4-grams that stood in the same text before."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_2(answers: list[Ids]) -> list[float]:
    """Return the share of each answer's 2-grams that no other answer has (arXiv 1510.03055)."""
    grams = [set(pairwise(ids)) for ids in answers]
    answers_with = Counter(gram for own in grams for gram in own)
    n_unshared = [sum(answers_with[gram] == 1 for gram in own) for own in grams]
    return [n / max(1, len(own)) for n, own in zip(n_unshared, grams, strict=True)]


def changes(before: dict, after: dict) -> tuple[str, list[str]]:
    """Say on one line what became of the answers, and list what went wrong with them."""
    stopped = f"{before['stop_rate']:.0%} -> {after['stop_rate']:.0%}"
    length = f"{before['length']:.0f} -> {after['length']:.0f} tokens"
    repeated = f"{before['repetition']:.0%} -> {after['repetition']:.0%}"
    line = f"stop by themselves {stopped}, {length}, repeated 4-grams {repeated}"
    notes = []
    if after["stop_rate"] < before["stop_rate"] - 0.1:
        notes.append(f"answers stop by themselves less often: {stopped}")
    if after["repetition"] > before["repetition"] + 0.1:
        remedy = "lower --learning_rate, raise --beta, or add --rpo_alpha=1"
        notes.append(f"the text collapses into repetition: {repeated} of 4-grams; {remedy}")
    if not 0.7 < after["length"] / before["length"] < 1.4:
        notes.append(f"the length of answers drifts: {length}; compare it with the chosen ones")
    return f"greedy answers to held-out prompts, before -> after: {line}", notes


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
