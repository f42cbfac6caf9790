"""Cross-entropy and log-probs of a head, without a (B, T, V) tensor of logits.

Shapes: N rows, C width, V vocabulary with its padding; ids from n_vocab on are padding.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def row_chunks(n_rows: int, n_columns: int, device: torch.device) -> int:
    """Return the rows of a chunk whose float32 logits take 32 MB, or 1 GB on a GPU."""
    numbers = 1 << (28 if device.type == "cuda" else 23)
    return max(1, min(n_rows, numbers // n_columns))


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, n_vocab: int) -> Tensor:
    """Return the summed cross-entropy of x (..., C) @ weight.T (V, C) over targets (...) >= 0."""
    x, targets, supervised = supervised_rows(x, targets)
    if x.is_cuda and torch.compiler.is_compiling():  # one graph, whose parts Inductor fuses
        logits = (x @ weight.to(x.dtype).T)[:, :n_vocab].float()
        targets = targets.where(supervised, -1)
        return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    return LinearCrossEntropy.apply(x, weight, targets, n_vocab)


def supervised_rows(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows that need logits, (n, C) and (n,), and which of all (N,) are supervised."""
    x, targets = x.flatten(0, -2), targets.flatten()
    supervised = targets >= 0
    if torch.compiler.is_compiling():  # a compiled graph wants fixed shapes
        return x, targets, supervised
    return x[supervised], targets[supervised], supervised


class LinearCrossEntropy(torch.autograd.Function):
    """The forward pass takes loss and both gradients from each chunk, and keeps no logits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, n_vocab: int) -> Tensor:
        w = weight.to(x.dtype)
        loss = torch.zeros((), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        need = any(ctx.needs_input_grad)
        dx = torch.empty_like(x) if need else None
        # of weights in 16 bits too: it is a sum over chunks
        dw = torch.zeros_like(weight, dtype=loss.dtype) if need else None
        n = row_chunks(len(x), w.size(0), x.device)
        for start in range(0, len(x), n):
            rows = slice(start, start + n)
            supervised = targets[rows] >= 0
            target = targets[rows].clamp(min=0).unsqueeze(1)
            logits = (x[rows] @ w.T).to(loss.dtype)  # (n, V)
            logits[:, n_vocab:] = -math.inf
            top, chosen = logits.amax(-1, keepdim=True), logits.gather(1, target)
            total = logits.sub_(top).exp_().sum(-1, keepdim=True)
            loss += ((total.log() + top - chosen).squeeze(1) * supervised).sum()
            if need:
                share = supervised.unsqueeze(1).to(total.dtype)
                softmax = logits.mul_(share / total)
                dlogits = softmax.scatter_add_(1, target, -share).to(x.dtype)  # less 1 at target
                dx[rows] = dlogits @ w
                if dw.dtype == x.dtype:
                    dw.addmm_(dlogits.T, x[rows])
                else:
                    dw += dlogits.T @ x[rows]
        ctx.save_for_backward(dx, dw)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple:
        dx, dw = ctx.saved_tensors
        dw = (dw * dloss.to(dw.dtype)).to(ctx.weight_dtype)
        return dx * dloss.to(dx.dtype), dw, None, None


def logprobs(x: Tensor, weight: Tensor, targets: Tensor, n_vocab: int) -> Tensor:
    """Return log p(target) of x (..., C) and targets (...), 0 where a target is below 0: (...).

    The backward pass makes each chunk's logits again, and holds their exponentials and a gradient.
    """
    rows, target, supervised = supervised_rows(x, targets)
    n = row_chunks(len(rows), 2 * weight.size(0), x.device)
    parts = []
    for h, t in zip(rows.split(n), target.clamp(min=0).split(n), strict=True):
        parts.append(checkpoint(chunk_logprobs, h, weight, t, n_vocab, use_reentrant=False))
    logp = torch.cat(parts)
    if torch.compiler.is_compiling():
        return (logp * supervised).view(targets.shape)
    return logp.new_zeros(targets.numel()).masked_scatter(supervised, logp).view(targets.shape)


def chunk_logprobs(x: Tensor, weight: Tensor, targets: Tensor, n_vocab: int) -> Tensor:
    logits = (x @ weight.to(x.dtype).T)[:, :n_vocab]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(1, targets.unsqueeze(1))
    if torch.compiler.is_compiling():
        return (chosen - logits.logsumexp(-1, keepdim=True)).squeeze(1)
    top = logits.detach().amax(-1, keepdim=True)  # it cancels out, and so does its gradient
    total = logits.sub_(top).exp_().sum(-1, keepdim=True)
    return (chosen - top - total.log()).squeeze(1)
