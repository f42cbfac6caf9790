"""Attention on fused kernels, with sinks, windows and documents.

    device  sinks  mask                                      kernel
    any     any    blocks                                    flex: skips the blocks that are masked
    cpu     any    lengths                                   by_document: leaves out what is masked
    cpu     no     one query, in 16 bits                     one_query
    cuda    any    one query and a bias, in 16 bits          one_query
    any     no     causal, bias or none                      dense: torch's fused attention
    cpu     yes    causal, bias or none                      flash_sinks
    cuda    yes    causal or one query, D fits, in 16 bits   flash_sinks
    else                                                     none: the plain maths of model.py

On CUDA the flash kernel wants D in whole eights and at most 256.

Shapes: B batch, H query heads, K key/value heads (H a multiple of K), T queries, S keys, D width.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

import fast

aten = torch.ops.aten
LONG = 512  # tokens of a row from which documents one by one are faster than all under a mask


@dataclass
class Mask:
    """A Mask says which keys a query sees; Mask() lets every query see every key."""

    causal: bool = False  # the last query stands at the last key and sees all, others less
    bias: Tensor | None = None  # (B or 1, 1, T, S): 0 where a query sees a key, -inf elsewhere
    blocks: BlockMask | None = None  # the same for FlexAttention
    lengths: list[int] | None = None  # of documents side by side that fill all rows; each causal


def kernel_for(q: Tensor, k: Tensor, sinks: Tensor | None, mask: Mask) -> Callable | None:
    """Return the kernel(q, k, v, sinks, mask) of the table above, or None."""
    if not fast.ENABLED:
        return None
    if mask.blocks is not None:
        return flex
    if mask.lengths is not None:
        return by_document
    on_cpu, in_16_bits = q.device.type == "cpu", q.dtype in (torch.bfloat16, torch.float16)
    unfused = sinks is None if on_cpu else q.is_cuda and mask.bias is not None
    if in_16_bits and q.size(2) == 1 and unfused:
        return one_query
    if sinks is None:
        return dense
    square = mask.causal and q.size(2) == k.size(2)
    everything = q.size(2) == 1 and mask.bias is None
    fits = q.size(3) % 8 == 0 and q.size(3) <= 256
    flash_on_cuda = q.is_cuda and in_16_bits and fits and (square or everything)
    return flash_sinks if on_cpu or flash_on_cuda else None


def dense(q: Tensor, k: Tensor, v: Tensor, sinks: None, mask: Mask) -> Tensor:
    """Attention without sinks: q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D)."""
    bias, causal = for_kernel(mask, q)
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, enable_gqa=grouped)


def one_query(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: Mask) -> Tensor:
    """Attention of one query per row, q (B, H, 1, D), in a step of generation.

    In 16 bits the CPU's fused kernel takes 8 times as long, and 100 times for large batches. On
    CUDA no fused kernel takes a bias and grouped heads. Scores are rounded to 16 bits.
    """
    bias, _ = for_kernel(mask, q)
    q = q.reshape(q.size(0), k.size(1), -1, q.size(3))  # (B, K, H / K, D)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(3))  # (B, K, H / K, S)
    scores = scores if bias is None else scores + bias
    if sinks is not None:
        column = sinks.to(q.dtype).view(1, *q.shape[1:3], 1).expand(*q.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32)[..., : k.size(2)]
    return (weights.to(q.dtype) @ v).flatten(1, 2).unsqueeze(2)  # (B, H, 1, D)


def for_kernel(mask: Mask, q: Tensor) -> tuple[Tensor | None, bool]:
    """Return bias and causal as the kernels want them; a single query sees every key."""
    bias = None if mask.bias is None else mask.bias.to(q.dtype)
    return bias, mask.causal and q.size(2) > 1


@functools.cache
def compiled_flex() -> Callable:  # it pays only when compiled
    return torch.compile(flex_attention)


def flex(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: Mask) -> Tensor:
    """Attention over a block mask; sinks need only its log-sum-exp, which is differentiable."""
    grouped, width, scale = q.size(1) != k.size(1), q.size(3), 1 / math.sqrt(q.size(3))
    if width < 16:  # its least: zeros change no score
        q, k, v = (F.pad(x, (0, 16 - width)) for x in (q, k, v))
    how = {"block_mask": mask.blocks, "enable_gqa": grouped, "scale": scale}
    o, aux = compiled_flex()(q, k, v, return_aux=AuxRequest(lse=True), **how)
    o = o[..., :width]
    return o if sinks is None else o * sink_gate(aux.lse, sinks).to(o.dtype)


def fused_mask(
    allowed: Callable, docs: Tensor | None, window: int | None, shape: tuple, device: torch.device
) -> Mask | None:
    """Return the mask of a kernel that leaves out what is masked, None where no kernel does.

    allowed(b, h, q, k) says what a query sees; docs (B, T) are numbers of documents side by side.
    """
    B, T = shape
    if fast.ENABLED and device.type == "cuda":
        return Mask(blocks=create_block_mask(allowed, B, None, T, T, device=device))
    pays = fast.ENABLED and T >= LONG and not torch.compiler.is_compiling()
    if docs is None or window is not None or device.type != "cpu" or not pays:
        return None
    number = docs + (T + 1) * torch.arange(B).unsqueeze(1)  # rows have none in common
    return Mask(lengths=number.flatten().unique_consecutive(return_counts=True)[1].tolist())


def by_document(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: Mask) -> Tensor:
    """Attention of one document after the other: q (B, H, T, D), k and v (B, K, T, D)."""
    B, T = q.size(0), q.size(2)
    attend = dense if sinks is None else flash_sinks
    flat = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    documents = zip(*(x.split(mask.lengths, dim=2) for x in flat), strict=True)  # (1, H, n, D)
    parts = [attend(*own, sinks, Mask(causal=True)).transpose(1, 2) for own in documents]
    return torch.cat(parts, dim=1).unflatten(1, (B, T)).squeeze(0).transpose(1, 2)


def sink_gate(lse: Tensor, sinks: Tensor) -> Tensor:
    """Return the share of the softmax that the sink leaves to the keys: (B, H, T, 1).

    It adds exp(s) to the denominator: exp(lse) / (exp(lse) + exp(s)) = sigmoid(lse - s).
    """
    return torch.sigmoid(lse - sinks.view(1, -1, 1).to(lse.dtype)).unsqueeze(-1)


def flash_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Mask) -> Tensor:
    """Attention with one sink logit per head: q (B, H, T, D), k and v (B, K, S, D), sinks (H,)."""
    bias, causal = for_kernel(mask, q)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return FlashSinks.apply(q, k, v, sinks, bias, causal)
    return flash(q, k, v, sinks, bias, causal)[0]  # an autograd function costs more than a token


def flash(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, bias: Tensor | None, causal: bool
) -> tuple:
    """Return output (B, H, T, D), lse (B, H, T), gate (B, H, T, 1) and the kernel's own state."""
    if q.is_cuda:
        o, lse, *state = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
        state = state[:6]  # cum_seq_q, cum_seq_k, max_q, max_k, rng state, unused
    else:
        kernel = aten._scaled_dot_product_flash_attention_for_cpu
        o, lse = kernel(q, k, v, 0.0, causal, attn_mask=bias)
        state = []
    gate = sink_gate(lse, sinks)
    return o.mul_(gate.to(o.dtype)), lse, gate, state


class FlashSinks(torch.autograd.Function):
    """out = o * g with g = sigmoid(lse - s), and its gradients by the kernel's own backward pass.

    Flash backward uses `out` for D = rowsum(dout * out) alone. So out = o * g together with
    dout * g gives the exact gradients of q, k and v. That of s is -sum((1 - g) * D).
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, bias: Tensor | None, causal: bool
    ) -> Tensor:
        out, lse, gate, ctx.kernel_state = flash(q, k, v, sinks, bias, causal)
        ctx.save_for_backward(q, k, v, out, lse, gate, bias)
        ctx.sink_dtype, ctx.causal = sinks.dtype, causal
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:
        q, k, v, out, lse, gate, bias = ctx.saved_tensors
        dgate = (dout * gate.to(dout.dtype)).contiguous()
        if q.is_cuda:
            kernel = aten._scaled_dot_product_flash_attention_backward
            sizes, rng = ctx.kernel_state[:4], ctx.kernel_state[4:]
            dq, dk, dv = kernel(dgate, q, k, v, out, lse, *sizes, 0.0, ctx.causal, *rng)
        else:
            kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
            dq, dk, dv = kernel(dgate, q, k, v, out, lse, 0.0, ctx.causal, attn_mask=bias)
        d = (dout * out).sum(-1, keepdim=True).to(gate.dtype)  # (B, H, T, 1)
        dsinks = -((1 - gate) * d).sum(dim=(0, 2, 3)).to(ctx.sink_dtype)
        return dq, dk, dv, dsinks, None, None
