"""Cross-entropy and log-probs of a head, without a (B, T, V) tensor of logits.

Shapes: N rows, C width, V vocabulary with its padding; ids from n_vocab on are padding.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def row_chunks(n_rows: int, n_columns: int, device: torch.device) -> int:
    """Return the rows of a chunk whose float32 logits take 32 MB, or 1 GB on a GPU."""
    numbers = 1 << (28 if device.type == "cuda" else 23)
    return max(1, min(n_rows, numbers // n_columns))


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, n_vocab: int) -> Tensor:
    """Return the summed cross-entropy of x (..., C) @ weight.T (V, C) over targets (...) >= 0."""
    x, targets, supervised = supervised_rows(x, targets)
    if is_fused(x):
        return plain_nll(x, weight, targets.where(supervised, -1), n_vocab).sum()
    return LinearCrossEntropy.apply(x, weight, targets, n_vocab)


def logprobs(x: Tensor, weight: Tensor, targets: Tensor, n_vocab: int) -> Tensor:
    """Return log p(target) of x (..., C) and targets (...), 0 where a target is below 0: (...)."""
    rows, target, supervised = supervised_rows(x, targets)
    if is_fused(x):
        return -plain_nll(rows, weight, target.where(supervised, -1), n_vocab).view(targets.shape)
    logp = LinearLogprobs.apply(rows, weight, target.clamp(min=0), n_vocab)
    if torch.compiler.is_compiling():
        return (logp * supervised).view(targets.shape)
    return logp.new_zeros(targets.numel()).masked_scatter(supervised, logp).view(targets.shape)


def is_fused(x: Tensor) -> bool:
    """Say whether Inductor makes few kernels of the plain form; a loop it would unroll."""
    return x.is_cuda and torch.compiler.is_compiling()


def plain_nll(x: Tensor, weight: Tensor, targets: Tensor, n_vocab: int) -> Tensor:
    """Return -log p(target) of x (N, C) and targets (N,), 0 where a target is -1: (N,)."""
    logits = (x @ weight.to(x.dtype).T)[:, :n_vocab].float()
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")


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
                add_product(dw, dlogits, x[rows])
        ctx.save_for_backward(dx, dw)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple:
        dx, dw = ctx.saved_tensors
        dw = (dw * dloss.to(dw.dtype)).to(ctx.weight_dtype)
        return dx * dloss.to(dx.dtype), dw, None, None


class LinearLogprobs(torch.autograd.Function):
    """Log p(target) of each row; the backward pass makes each chunk's logits again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, n_vocab: int) -> Tensor:
        w, precise = weight.to(x.dtype), torch.promote_types(x.dtype, torch.float32)
        logp, lse = torch.empty(2, len(x), 1, device=x.device, dtype=precise)
        n = row_chunks(len(x), w.size(0), x.device)
        for start in range(0, len(x), n):
            rows = slice(start, start + n)
            logits = (x[rows] @ w.T).to(precise)[:, :n_vocab]
            top, chosen = logits.amax(-1, keepdim=True), logits.gather(1, targets[rows, None])
            lse[rows] = logits.sub_(top).exp_().sum(-1, keepdim=True).log() + top
            logp[rows] = chosen - lse[rows]
        ctx.save_for_backward(x, w, targets, lse)
        ctx.n_vocab, ctx.weight_dtype = n_vocab, weight.dtype
        return logp.squeeze(1)

    @staticmethod
    def backward(ctx: Any, dlogp: Tensor) -> tuple:
        x, w, targets, lse = ctx.saved_tensors
        dx, dw = torch.empty_like(x), torch.zeros_like(w, dtype=lse.dtype)
        n = row_chunks(len(x), w.size(0), x.device)
        for start in range(0, len(x), n):
            rows = slice(start, start + n)
            d = dlogp[rows, None]
            logits = (x[rows] @ w.T).to(lse.dtype)
            dlogits = logits.sub_(lse[rows]).exp_().mul_(-d)
            dlogits[:, ctx.n_vocab :] = 0
            dlogits = dlogits.scatter_add_(1, targets[rows, None], d).to(x.dtype)
            dx[rows] = dlogits @ w
            add_product(dw, dlogits, x[rows])
        return dx, dw.to(ctx.weight_dtype), None, None


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a.T @ b to a sum whose precision may be higher."""
    if total.dtype == a.dtype:
        total.addmm_(a.T, b)
    else:
        total += a.T @ b
