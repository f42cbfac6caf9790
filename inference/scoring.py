"""This module scores given text by log-likelihood or by a verifier; and the losses of scores."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus.chat import Pair, render_prompt, user_turn
from corpus.tokenizer import Tokenizer
from model import GPT

AT_ONCE = 4096, 65536  # tokens of a pass, CPU and GPU: on a CPU more would leave its cache


class Window(NamedTuple):
    """A window is a piece of text whose last n_scored ids are scored, given all ids before them."""

    ids: list[int]
    n_scored: int


def batches(model: nn.Module, windows: list[Window]) -> Iterator[tuple]:
    """Yield (numbers of windows of similar length, their inputs, their targets (B, T)).

    Rows are padded on the right; targets are -1 where nothing is scored.
    """
    device = next(model.parameters()).device
    room = AT_ONCE[device.type == "cuda"]
    lengths = [len(ids) for ids, _ in windows]
    order = sorted(range(len(windows)), key=lambda i: lengths[i])
    while order:
        size = 1
        while size < len(order) and (size + 1) * lengths[order[size]] <= room:
            size += 1
        numbers, order = order[:size], order[size:]
        width = max(lengths[i] for i in numbers) - 1
        idx = torch.zeros(len(numbers), width, dtype=torch.long)
        targets = torch.full_like(idx, -1)
        for row, i in enumerate(numbers):
            ids, n_scored = windows[i]
            end = len(ids) - 1
            begin = end - n_scored
            idx[row, :end] = torch.tensor(ids[:-1])
            targets[row, begin:end] = torch.tensor(ids[begin + 1 :])
        yield numbers, idx.to(device), targets.to(device)


@torch.no_grad()
def windows_nll(model: nn.Module, windows: list[Window]) -> list[float]:
    """Return the nats of each window; the model is anything with hidden() and logprobs()."""
    nll = [0.0] * len(windows)
    for numbers, idx, targets in batches(model, windows):
        logp = model.logprobs(model.hidden(idx), targets)
        for i, total in zip(numbers, logp.sum(-1).tolist(), strict=True):
            nll[i] = -total
    return nll


@torch.no_grad()
def next_logprobs(model: GPT, prompts: list[list[int]], ids: list[int]) -> np.ndarray:
    """Return the log-probs of these ids after each prompt, (prompts, ids), from one pass."""
    found = np.zeros((len(prompts), len(ids)))
    windows = [Window([*prompt, ids[0]], 1) for prompt in prompts]
    for numbers, idx, targets in batches(model, windows):
        x = model.hidden(idx)[targets >= 0]  # (B, C): the last place of each prompt
        for column, token in enumerate(ids):
            wanted = torch.full((1, len(x)), token, device=x.device)
            found[numbers, column] = model.logprobs(x[None], wanted)[0].tolist()
    return found


def sequence_logprobs(model: GPT, batch: dict) -> Tensor:
    """Return the summed log-probs of the supervised tokens, (2, B): chosen, rejected."""
    return model.logprobs(model.hidden(batch["idx"]), batch["targets"]).sum(-1).view(2, -1)


def pair_logprobs(model: GPT, pairs: list[Pair]) -> np.ndarray:
    """Return the summed log-probs (n, 2) of the chosen and the rejected answers."""
    windows = []
    for prompt, *answers in pairs:
        windows += [Window(prompt + answer, len(answer)) for answer in answers]
    return -np.array(windows_nll(model, windows)).reshape(-1, 2)


def with_prompts(rows: list[dict], tokenizer: Tokenizer) -> list[tuple[list[int], dict]]:
    """Return (ids of prompt and solution, the solution) for every solution that solve() made."""
    items = []
    for row in rows:
        prompt = render_prompt(user_turn(row["question"]), tokenizer)
        items += [(prompt + solution["ids"], solution) for solution in row["solutions"]]
    return items


def log_likelihoods(model: GPT, tokenizer: Tokenizer, rows: list[dict]) -> None:
    """Write the log-likelihood of every solution under the model into it, as "loglik"."""
    items = with_prompts(rows, tokenizer)
    windows = [Window(ids, len(solution["ids"])) for ids, solution in items]
    nll = windows_nll(model, windows)
    for (_, solution), nats in zip(items, nll, strict=True):
        solution["loglik"] = -nats


@torch.no_grad()
def score_solutions(model: GPT, tokenizer: Tokenizer, rows: list[dict]) -> None:
    """Write a verifier's logit at the last token of every solution into it, as "score"."""
    items = with_prompts(rows, tokenizer)
    # one more id follows each solution, so that its last token is an input and has a score
    windows = [Window([*ids, tokenizer.eos], len(solution["ids"])) for ids, solution in items]
    for numbers, idx, targets in batches(model, windows):
        scores = model.scores(model.hidden(idx), idx, targets >= 0)
        for row, i in enumerate(numbers):
            ids, solution = items[i]
            solution["score"] = float(scores[row, len(ids) - 1])


def scale_scores(model: GPT, tokenizer: Tokenizer, rows: list[dict]) -> None:
    """Let the scores of a new verifier, multiples of log-likelihoods, spread by 2 at most."""
    log_likelihoods(model, tokenizer, rows)
    logliks = [solution["loglik"] for row in rows for solution in row["solutions"]]
    spread = float(torch.tensor(logliks).std(correction=0))  # tens of nats for long solutions
    model.score_loglik.data.fill_(1 / max(1.0, spread / 2))


def preference_loss(policy: Tensor, reference: Tensor, lengths: Tensor, cfg: Any) -> Tensor:
    """Return the loss (B,) of pairs; summed log-probs and lengths are (2, B): chosen, rejected.

    sigmoid: DPO, arXiv 2305.18290, equation 7, with cDPO's smoothing, ericmitchell.ai/cdpo.pdf.
    On means per token: ipo, arXiv 2310.12036, equation 17; simpo, arXiv 2405.14734, equation 6.
    """
    beta, smoothing = cfg.beta, cfg.label_smoothing
    if cfg.loss_type != "sigmoid":
        policy, reference = policy / lengths, reference / lengths
    margin = policy[0] - policy[1]
    if cfg.loss_type != "simpo":
        margin = margin - (reference[0] - reference[1])
    if cfg.loss_type == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    d = beta * margin
    if cfg.loss_type == "simpo":
        d = d - (beta / 2 if cfg.simpo_gamma is None else cfg.simpo_gamma)
    return -(1 - smoothing) * F.logsigmoid(d) - smoothing * F.logsigmoid(-d)


def policy_loss(
    policy: Tensor,
    old: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    sampled: Tensor,
    cfg: Any,
    longest: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss (B,) of sampled answers; and of each answer means over its tokens (B,).

    policy, old, reference: log-probs (B, T) under the weights of now, of the sampling and of the
    start. sampled (B, T): which tokens count. advantages (B,): A. With r = exp(policy - old) and
    d = reference - policy a token's loss is
        -min(r A, clip(r, 1 - clip, 1 + clip_high) A) + beta (exp(d) - d - 1)
    PPO, arXiv 1707.06347, equation 7, with DAPO's clip_high, 2503.14476, section 3.1, and GRPO's
    estimate of the KL divergence, 2402.03300, equation 4. grpo is the mean over an answer, equation
    3 there; it prefers short right answers and long wrong ones. So dr_grpo divides the sum by a
    constant, the longest answer: 2503.20783, section 3.
    """
    ratio, advantages = (policy - old).exp(), advantages[:, None]
    low, high = 1 - cfg.clip, 1 + (cfg.clip if cfg.clip_high is None else cfg.clip_high)
    loss = -torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)
    beyond = torch.where(advantages > 0, ratio > high, ratio < low) & (advantages != 0)
    values = {"entropy": -policy.detach(), "clipped": beyond}
    if reference is not None:
        d = reference - policy
        values["kl"] = d.exp() - d - 1
        loss = loss + cfg.beta * values["kl"]
    lengths = sampled.sum(-1).clamp(min=1)
    loss = (loss * sampled).sum(-1) / (lengths if cfg.loss_type == "grpo" else longest)
    return loss, {key: (x * sampled).sum(-1).detach() / lengths for key, x in values.items()}


def verifier_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy over labels (B, T), -1 = none (arXiv 2110.14168, section 4.1)."""
    wanted = labels.clamp(min=0).to(scores.dtype)
    loss = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none")
    return (loss * (labels >= 0)).sum()
