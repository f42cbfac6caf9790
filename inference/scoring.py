"""This module scores given text: its log-likelihood under a model, and a verifier's judgement."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from corpus.chat import Pair, render_prompt, user_turn
from corpus.tokenizer import Tokenizer
from model import GPT

# ------------------------------------------------------------------------------------------------
# Log-likelihoods


class Window(NamedTuple):
    """A window is a piece of text whose last n_scored ids are scored, given all ids before them."""

    ids: list[int]
    n_scored: int


def pad_windows(windows: list[Window]) -> tuple[Tensor, Tensor]:
    """Return inputs and targets (B, T), padded on the right; targets are -1 where not scored."""
    width = max(len(ids) for ids, _ in windows) - 1
    idx = torch.zeros(len(windows), width, dtype=torch.long)
    targets = torch.full((len(windows), width), -1)
    for row, (ids, n_scored) in enumerate(windows):
        end = len(ids) - 1
        idx[row, :end] = torch.tensor(ids[:-1])
        targets[row, end - n_scored : end] = torch.tensor(ids[len(ids) - n_scored :])
    return idx, targets


@torch.no_grad()
def windows_nll(model: nn.Module, windows: list[Window], batch: int = 16) -> list[float]:
    """Return the nats of each window.

    The model is a GPT, or anything else that has its hidden() and logprobs().
    """
    device = next(model.parameters()).device
    nll = [0.0] * len(windows)
    order = sorted(range(len(windows)), key=lambda i: len(windows[i][0]))
    for first in range(0, len(order), batch):
        numbers = order[first : first + batch]
        idx, targets = pad_windows([windows[i] for i in numbers])
        logp = model.logprobs(model.hidden(idx.to(device)), targets.to(device))
        for i, total in zip(numbers, logp.sum(-1).tolist(), strict=True):
            nll[i] = -total
    return nll


def pair_logprobs(model: GPT, pairs: list[Pair]) -> np.ndarray:
    """Return the summed log-probs (n, 2) of the chosen and the rejected answers."""
    windows = []
    for prompt, chosen, rejected in pairs:
        windows.append(Window(prompt + chosen, len(chosen)))
        windows.append(Window(prompt + rejected, len(rejected)))
    return -np.array(windows_nll(model, windows, batch=64)).reshape(-1, 2)


# ------------------------------------------------------------------------------------------------
# Solutions of word problems (rows as solutions.solve() makes them)


def with_prompts(rows: list[dict], tokenizer: Tokenizer) -> list[tuple[list[int], dict]]:
    """Return (ids of prompt and solution, the solution) for every solution of the rows."""
    items = []
    for row in rows:
        prompt = render_prompt(user_turn(row["question"]), tokenizer)
        items += [(prompt + solution["ids"], solution) for solution in row["solutions"]]
    return items


def log_likelihoods(model: GPT, tokenizer: Tokenizer, rows: list[dict]) -> None:
    """Write the log-likelihood of every solution under the model into it, as "loglik"."""
    items = with_prompts(rows, tokenizer)
    windows = [Window(ids, len(solution["ids"])) for ids, solution in items]
    nll = windows_nll(model, windows, batch=128)
    for (_, solution), nats in zip(items, nll, strict=True):
        solution["loglik"] = -nats


@torch.no_grad()
def score_solutions(
    verifier: GPT, tokenizer: Tokenizer, rows: list[dict], batch: int = 128
) -> None:
    """Write the verifier's logit at the last token of every solution into it, as "score"."""
    device = verifier.embed.weight.device
    items = sorted(with_prompts(rows, tokenizer), key=lambda item: len(item[0]))
    for first in range(0, len(items), batch):
        part = items[first : first + batch]
        width = max(len(ids) for ids, _ in part)
        idx = torch.full((len(part), width), tokenizer.pad)
        judged = torch.zeros(len(part), width, dtype=torch.bool)
        for row, (ids, solution) in enumerate(part):
            idx[row, : len(ids)] = torch.tensor(ids)
            judged[row, len(ids) - len(solution["ids"]) : len(ids)] = True
        idx = idx.to(device)
        scores = verifier.scores(verifier.hidden(idx), idx, judged.to(device))
        for row, (ids, solution) in enumerate(part):
            solution["score"] = float(scores[row, len(ids) - 1])


@torch.no_grad()
def scale_scores(verifier: GPT, tokenizer: Tokenizer, rows: list[dict]) -> None:
    """Let the scores of a new verifier, multiples of log-likelihoods, begin small.

    The log-likelihoods of long solutions spread over tens of nats; the scores' standard deviation
    over the rows becomes at most 2.
    """
    log_likelihoods(verifier, tokenizer, rows)
    logliks = [solution["loglik"] for row in rows for solution in row["solutions"]]
    spread = float(torch.tensor(logliks).std(correction=0))
    verifier.score_loglik.fill_(1 / max(1.0, spread / 2))
