"""This module turns sampled solutions into answers that a policy learns from.

An answer is {prompt, ids, targets, reward, correct, advantage}; targets are its ids, with -1 where
the calculator wrote.
"""

import math

import torch
from torch import Tensor

from corpus.chat import lay_out
from corpus.tokenizer import Tokenizer
from inference.sampling import Calculate, Ids
from inference.scoring import score_solutions
from inference.solutions import Attempts, prompt_of, solve
from model import GPT

NOBODY = {"prompt": [0], "ids": [0], "targets": [-1], "advantage": 0.0}  # fills a batch up


def group_advantages(rewards: Tensor, scaled: bool) -> Tensor:
    """Return how much better each answer to a problem is than their mean, for rewards (P, S).

    scaled: in standard deviations of the group, as GRPO does (arXiv 2402.03300, section 4.1.2).
    That weighs problems that are nearly always or never solved more: Dr. GRPO, arXiv 2503.20783.
    """
    better = rewards - rewards.mean(1, keepdim=True)
    return better / (rewards.std(1, keepdim=True) + 1e-4) if scaled else better


def own_ids(ids: Ids, calculator: Calculate) -> Ids:
    """Return the ids of an answer, with -1 where the calculator wrote and not the model."""
    own, pending = [], 0
    for i, token in enumerate(ids):
        own.append(-1 if pending else token)
        if pending:
            pending -= 1
        elif calculator is not None:
            pending = len(calculator(ids[: i + 1]))
    return own


def rewarded(
    model: GPT, judge: GPT | None, tokenizer: Tokenizer, problems: list[dict], attempts: Attempts
) -> list[dict]:
    """Return solved problems, see solve(), whose solutions have a reward each.

    It is 1 where the final answer is right, else 0; with a judge its probability of that.
    """
    rows = solve(model, tokenizer, problems, attempts, log=lambda text: None)
    if judge is not None:
        score_solutions(judge, tokenizer, rows)
    for solution in (solution for row in rows for solution in row["solutions"]):
        right, score = float(solution["correct"]), solution.get("score")
        solution["reward"] = right if score is None else (1 + math.tanh(score / 2)) / 2  # sigmoid
    return rows


def answers_of(
    rows: list[dict], tokenizer: Tokenizer, calculator: Calculate, scaled: bool
) -> list[dict]:
    """Return the answers of solved problems, whose solutions have a reward each; see solve()."""
    rewards = [[solution["reward"] for solution in row["solutions"]] for row in rows]
    advantages = group_advantages(torch.tensor(rewards), scaled)
    answers = []
    for row, own in zip(rows, advantages.tolist(), strict=True):
        prompt = prompt_of(row, tokenizer)
        for solution, advantage in zip(row["solutions"], own, strict=True):
            answer = {key: solution[key] for key in ("ids", "reward", "correct")}
            targets = own_ids(answer["ids"], calculator)
            answers.append({"prompt": prompt, "targets": targets, "advantage": advantage, **answer})
    return answers


def with_signal(answers: list[dict], n_ranks: int) -> list[dict]:
    """Return the answers that are better or worse than their group, dealt out by length.

    Each rank takes a neighbouring share of them, and so gets answers of all lengths.
    """
    kept = [answer for answer in answers if abs(answer["advantage"]) > 1e-9]
    kept.sort(key=lambda answer: len(answer["prompt"]) + len(answer["ids"]))
    return [answer for rank in range(n_ranks) for answer in kept[rank::n_ranks]]


def columns(answers: list[dict], **constants: float) -> dict[str, Tensor]:
    """Return what is known of answers before they are learned from, (B,) each."""
    found = {
        "reward": [answer["reward"] for answer in answers],
        "accuracy": [float(answer["correct"]) for answer in answers],
        "length": [float(len(answer["ids"])) for answer in answers],
    }
    found |= {key: [value] * len(answers) for key, value in constants.items()}
    return {key: torch.tensor(values) for key, values in found.items()}


def describe_answers(answers: list[dict], n_samples: int) -> str:
    """Return what a round brought: problems whose answers are all worth the same teach nothing."""
    rewards = torch.tensor([answer["reward"] for answer in answers]).view(-1, n_samples)
    right = sum(answer["correct"] for answer in answers) / len(answers)
    low, high = rewards.amin(1), rewards.amax(1)
    alike, n = high - low < 1e-9, len(rewards)
    text = f"{len(answers)} answers to {n} problems, {right:.1%} right"
    if dropped := int(alike.sum()):
        best = int((alike & (low > 0.5)).sum())
        text += f"; {dropped} problems dropped, {best} always solved and {dropped - best} never"
    return text


def answer_rows(answers: list[dict], width: int | None, pad: int) -> dict[str, Tensor]:
    """Return idx and targets (B, width) and advantages (B,); width None: of the longest answer."""
    rows = []
    for answer in answers:
        prompt = answer["prompt"]
        targets = [-1] * len(prompt) + answer["targets"]
        rows.append([{"ids": prompt + answer["ids"], "targets": targets}])
    longest = max(len(row[0]["ids"]) for row in rows) - 1
    batch = lay_out(rows, ["targets"], width or longest, pad)
    batch["advantages"] = torch.tensor([answer["advantage"] for answer in answers])
    if "old" in answers[0]:  # the log-probs of what was sampled, when it was
        old = [answer["old"] for answer in answers if answer is not NOBODY]
        batch["old"] = torch.zeros(batch["idx"].shape)
        batch["old"][batch["targets"] >= 0] = torch.cat(old)
    return batch
