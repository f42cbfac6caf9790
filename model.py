"""The model: a decoder-only transformer in plain maths. fast/ computes the same sooner.

Sources: RoPE arXiv 2104.09864, RMSNorm 1910.07467, QK-norm 2010.04245, GQA 2305.13245, SwiGLU
2002.05202, sigmoid-routed experts with a shared one 2412.19437, sinks: gpt-oss.
Every switch is a field of ModelConfig with a home in transformers: Flint, or without sinks Qwen3.

Shapes: B batch, T time, S keys, C d_model, H query heads, K key/value heads, D d_head, F d_ff,
E experts, N rows, V vocabulary padded to a multiple of 128.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fast
from configurator import UserError, require
from fast import cpu, loss
from fast.attention import Mask, fused_mask, kernel_for

Maybe = Tensor | None


@dataclass
class ModelConfig:
    """The model."""

    vocab_size: int | None = field(default=None, metadata={"key": False})  # the tokenizer's ids
    seq_len: int = 1024  # tokens of training context
    n_layer: int = 12  # blocks
    n_head: int = 16  # query heads
    n_kv_head: int | None = None  # key/value heads, a divisor of n_head; None = n_head
    d_model: int = 1024  # width of the residual stream
    d_head: int | None = None  # width of a head, even; None = d_model / n_head
    d_ff: int | None = None  # hidden width of the MLP; None = 8/3 d_model rounded up to 64
    rope_base: float = 10000.0  # RoPE: wavelengths run from 2 pi to 2 pi * rope_base tokens
    rms_eps: float = 1e-6  # added to the mean square in RMSNorm
    qk_norm: bool = True  # RMSNorm on queries and keys, per head, before RoPE
    sinks: bool = True  # one learned logit per head in the softmax denominator
    sliding_window: int | None = None  # tokens a query sees, itself included; None = all before it
    tied: bool = True  # one matrix for the embedding and the head
    n_expert: int = 0  # routed experts per MoE layer; 0 = dense SwiGLU
    n_expert_active: int = 2  # routed experts a token goes to
    d_expert: int | None = None  # width of an expert; None = d_ff / n_expert_active, in steps of 8
    shared_expert: bool = True  # MoE: one more expert that every token goes to
    balance_coef: float = 0.01  # MoE: weight of the load-balancing loss
    score_head: bool = field(default=False, metadata={"key": False})  # a verifier's scalar head

    def __post_init__(self):
        counts = "vocab_size seq_len n_head n_kv_head d_model d_ff n_expert_active d_expert"
        ranges = {"[1, inf)": f"{counts} sliding_window", "[1, 1e3]": "n_layer"}
        ranges |= {"[0, inf)": "n_expert balance_coef", "(0, inf)": "rope_base rms_eps"}
        require(self, ranges | {"[2, inf)": "d_head"})
        width, heads = f"d_model={self.d_model}", f"n_head={self.n_head}"
        if self.d_head is None and self.d_model % self.n_head:
            raise UserError(f"{width} must be a multiple of {heads}, or give d_head")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.d_head = self.d_head or self.d_model // self.n_head
        self.d_ff = self.d_ff or -(-8 * self.d_model // (3 * 64)) * 64
        self.d_expert = self.d_expert or max(8, self.d_ff // self.n_expert_active // 8 * 8)
        if self.n_head % self.n_kv_head:
            raise UserError(f"{heads} must be a multiple of n_kv_head={self.n_kv_head}")
        if self.d_head < 2 or self.d_head % 2:
            raise UserError(f"RoPE needs an even d_head, got {self.d_head} ({width}, {heads})")
        if self.n_expert and self.n_expert_active > self.n_expert:
            active = f"n_expert_active={self.n_expert_active}"
            raise UserError(f"{active} is more than n_expert={self.n_expert}")

    @property
    def padded_vocab(self) -> int:  # V
        return -(-self.vocab_size // 128) * 128


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension."""

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x: Tensor) -> Tensor:  # (..., d) -> (..., d)
        # CUDA's autocast makes the norm float32, and flash attention wants the dtype of x
        return cpu.rms_norm(x, self.weight.to(x.dtype), self.eps).to(x.dtype)


@fast.one_operator
def rotary_angles(pos: Tensor, d_head: int, base: float, dtype: torch.dtype) -> Tensor:
    """Return cos and sin (2, T, D/2) of positions (T,); scores see only their differences."""
    precise = torch.float32 if pos.device.type == "mps" else torch.float64  # a stream counts far
    exponent = -torch.arange(0, d_head, 2, device=pos.device, dtype=precise) / d_head
    angle = pos.to(precise)[:, None] * base**exponent
    return torch.stack((angle.cos(), angle.sin())).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of x (B, T, heads, D) by the angle of frequency i."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attention_weights(q: Tensor, k: Tensor, sinks: Tensor | None, mask: Mask) -> Tensor:
    """Return the softmax weights of q (B, H, T, D) on k (B, K, S, D): (B, H, T, S), or S + 1.

    sinks (H,) are one more logit per head in the denominator: the last column is their share.
    """
    B, H, T, D = q.shape
    S, precise = k.size(2), torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(precise), k.to(precise).repeat_interleave(H // k.size(1), dim=1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(D)  # (B, H, T, S)
    if mask.causal:
        scores = scores + torch.full_like(scores[0, 0], -math.inf).triu(1 + S - T)
    elif mask.bias is not None:
        scores = scores + mask.bias
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, H, 1, 1).expand(B, H, T, 1)
        scores = torch.cat((scores, column), dim=-1)
    return F.softmax(scores, dim=-1, dtype=precise)


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: Mask) -> Tensor:
    """Return softmax attention (B, H, T, D) of q (B, H, T, D) over k and v (B, K, S, D)."""
    k, v = k.to(q.dtype), v.to(q.dtype)  # under autocast a cache keeps the dtype of the weights
    if kernel := kernel_for(q, k, sinks, mask):  # computes what the last lines define
        return kernel(q, k, v, sinks, mask)
    weights = attention_weights(q, k, sinks, mask)[..., : k.size(2)]  # sinks give no value
    return weights.to(q.dtype) @ v.repeat_interleave(q.size(1) // v.size(1), dim=1)


def training_mask(docs: Maybe, window: int | None, T: int, device: torch.device) -> Mask:
    """Return the mask: causal, inside one document of docs (B, T), at most `window` back."""
    if docs is None and (window is None or window >= T):
        return Mask(causal=True)

    def allowed(b: Tensor, h: Tensor | int, q: Tensor, k: Tensor) -> Tensor:
        ok = q >= k
        if window is not None:
            ok = ok & (q - k < window)
        return ok if docs is None else ok & (docs[b, q] == docs[b, k])

    B = 1 if docs is None else docs.size(0)
    if mask := fused_mask(allowed, docs, window, (B, T), device):
        return mask
    b, t = torch.arange(B, device=device), torch.arange(T, device=device)
    ok = allowed(b.view(B, 1, 1, 1), 0, t.view(1, 1, T, 1), t.view(1, 1, 1, T))
    return Mask(bias=torch.zeros(B, 1, T, T, device=device).masked_fill(~ok, -math.inf))


class Linear(nn.Linear):
    """A product with a matrix, without a bias."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return cpu.linear(x, self.weight)


class Attention(nn.Module):
    """Grouped-query attention with QK-norm, RoPE and sinks."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.d_head = layer, cfg.d_head
        self.sizes = [n * cfg.d_head for n in (cfg.n_head, cfg.n_kv_head, cfg.n_kv_head)]
        self.qkv = Linear(cfg.d_model, sum(self.sizes))
        self.out = Linear(cfg.n_head * cfg.d_head, cfg.d_model)
        self.q_norm = RMSNorm(cfg.d_head, cfg.rms_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.d_head, cfg.rms_eps) if cfg.qk_norm else nn.Identity()
        self.sinks = nn.Parameter(torch.zeros(cfg.n_head)) if cfg.sinks else None

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries (B, H, T, D), rotated keys and values (B, K, T, D) of x."""
        parts = cpu.split_linear(x, self.qkv.weight, self.sizes)
        q, k, v = (y.view(*x.shape[:2], -1, self.d_head) for y in parts)  # (B, T, H or K, D)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Mask, cache: Any) -> Tensor:
        """x (B, T, C) -> (B, T, C); a cache takes this layer's keys and values and gives all."""
        q, k, v = self.project(x, cos, sin)
        if cache is not None:
            k, v = cache.put(self.layer, k, v)
        y = attention(q, k, v, self.sinks, mask)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_up = Linear(d_model, 2 * d_ff)
        self.down = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        gate, up = cpu.split_linear(x, self.gate_up.weight, [self.down.in_features] * 2)
        return self.down(F.silu(gate) * up)


class MoE(nn.Module):
    """A token goes to the n_expert_active experts of highest score, weighted, and to the shared."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.n_expert, self.n_active = cfg.n_expert, cfg.n_expert_active
        self.router = Linear(cfg.d_model, cfg.n_expert)
        self.gate_up = nn.Parameter(torch.empty(cfg.n_expert, 2 * cfg.d_expert, cfg.d_model))
        self.down = nn.Parameter(torch.empty(cfg.n_expert, cfg.d_model, cfg.d_expert))
        self.shared = SwiGLU(cfg.d_model, cfg.d_expert) if cfg.shared_expert else None
        self.routing = None  # (2, N, E): each token's share of its experts, and of the scores

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        rows = x.reshape(-1, x.size(-1))  # (N, C)
        scores = torch.sigmoid(self.router(rows).float())  # (N, E)
        weight, expert = scores.topk(self.n_active, dim=-1)  # (N, active)
        weight = weight / weight.sum(-1, keepdim=True)
        order = expert.flatten().argsort()  # (N * active,) grouped by expert
        token = order // self.n_active
        used = torch.zeros_like(scores).scatter(1, expert, 1 / self.n_active)
        counts = (used > 0).sum(0)  # (E,); bincount would break a compiled graph
        gate, up = grouped_linear(rows[token], self.gate_up, counts).chunk(2, dim=-1)
        y = grouped_linear(F.silu(gate) * up, self.down, counts)
        y = y * weight.flatten()[order].unsqueeze(-1).to(y.dtype)
        y = torch.zeros_like(rows, dtype=y.dtype).index_add(0, token, y)
        self.routing = torch.stack((used, scores / scores.sum(-1, keepdim=True)))
        return (y if self.shared is None else y + self.shared(rows)).view(x.shape)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply rows of x (N, in), sorted by expert, with their experts' weight (E, out, in)."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    # grouped_mm wants rows of whole 16 bytes; its meta kernel knows bfloat16 alone
    aligned = all(n * x.element_size() % 16 == 0 for n in weight.shape[1:])
    dtypes = [torch.bfloat16] if torch.compiler.is_compiling() else [torch.bfloat16, torch.float32]
    if fast.ENABLED and hasattr(F, "grouped_mm") and aligned and x.dtype in dtypes:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))
    parts = x.split(counts.tolist())
    return torch.cat([F.linear(part, w) for part, w in zip(parts, weight, strict=True)])


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(cfg.d_model, cfg.rms_eps), Attention(cfg, layer)
        self.mlp_norm = RMSNorm(cfg.d_model, cfg.rms_eps)
        self.mlp = MoE(cfg) if cfg.n_expert else SwiGLU(cfg.d_model, cfg.d_ff)

    def forward(self, x: Tensor, *args: Any) -> Tensor:  # args: those of Attention
        x = x + self.attn(self.attn_norm(x), *args)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Embedding, blocks, norm and head; a verifier has a scalar head beside it."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.padded_vocab, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.d_model, cfg.rms_eps)
        self.head = Linear(cfg.d_model, cfg.padded_vocab)
        if cfg.tied:
            self.head.weight = self.embed.weight
        self.score = Linear(cfg.d_model, 1) if cfg.score_head else None
        self.score_loglik = nn.Parameter(torch.empty(1)) if cfg.score_head else None
        self.recompute = False  # blocks again in the backward pass, instead of keeping their inside
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter: normal with these deviations, or constant; V's padding is 0."""
        C = self.cfg.d_model
        # a tied head must not predict its own input: the embedding is small
        normal = {"embed": min(0.02, 4 / C), "head": 0.02, "router": 0.02}
        normal |= {"qkv": C**-0.5, "gate_up": C**-0.5}
        zero = ("out", "down", "sinks", "score")  # every block starts as the identity
        one = ("attn_norm", "mlp_norm", "norm", "q_norm", "k_norm", "score_loglik")
        constant = dict.fromkeys(zero, 0.0) | dict.fromkeys(one, 1.0)
        for name, p in self.named_parameters():
            kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
            if kind in normal:
                nn.init.normal_(p, std=normal[kind])
            else:
                assert kind in constant, f"no initialisation rule for parameter {name}"
                nn.init.constant_(p, constant[kind])
        self.embed.weight[self.cfg.vocab_size :] = self.head.weight[self.cfg.vocab_size :] = 0

    def hidden(
        self, idx: Tensor, docs: Maybe = None, cache: Any = None, pads: Maybe = None
    ) -> Tensor:
        """Return final hidden states (B, T, C) of token ids idx (B, T).

        docs (B, T): numbers of documents; attention stays inside one. cache: a KVCache of
        inference/sampling.py; pads (B,): the ids at the left of each row that are padding.
        """
        T, device = idx.size(1), idx.device
        if cache is not None:
            pos, mask = cache.reserve(T, pads)
        else:
            pos = torch.arange(T, device=device)
            mask = training_mask(docs, self.cfg.sliding_window, T, device)
        x = self.embed(idx)
        if torch.is_autocast_enabled(device.type):  # the residual stream is in that dtype too
            x = x.to(torch.get_autocast_dtype(device.type))
        cos, sin = rotary_angles(pos, self.cfg.d_head, self.cfg.rope_base, x.dtype)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, cache, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """x (..., C) -> (..., vocab_size); ids of the padding have no logit: none is sampled."""
        logits = self.head(x)[..., : self.cfg.vocab_size]
        return logits.to(torch.promote_types(x.dtype, torch.float32))

    def nll(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of -log p(target) over targets (B, T) >= 0, for hidden states x."""
        if fast.ENABLED:
            return loss.cross_entropy(x, self.head.weight, targets, self.cfg.vocab_size)
        return -self.logprobs(x, targets).sum()

    def logprobs(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return log p(target) at every position (B, T); 0 where target < 0."""
        if fast.ENABLED:
            return loss.logprobs(x, self.head.weight, targets, self.cfg.vocab_size)
        logits = self.logits(x).flatten(0, -2)  # (N, vocab_size)
        nll = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none")
        return -nll.view(targets.shape)

    def scores(self, x: Tensor, idx: Tensor, solution: Tensor) -> Tensor:
        """Return a verifier's scores (B, T) of ids idx (B, T), for hidden states x (B, T, C).

        A score is linear in the hidden state, plus score_loglik times the log-likelihood of the
        solution so far; solution (B, T) says which ids belong to one. The likelihood compares each
        token with its prediction, which no layer can: it forms one place earlier, in the last.
        """
        logp = self.logprobs(x[:, :-1], torch.where(solution[:, 1:], idx[:, 1:], -1))
        total = F.pad(logp, (1, 0)).cumsum(1)  # (B, T)
        place = torch.arange(idx.size(1), device=idx.device)
        before = torch.where(solution, 0, place).cummax(1).values  # the place before each solution
        likelihood = total - total.gather(1, before)
        return self.score(x).squeeze(-1).float() + self.score_loglik * likelihood

    def balance_loss(self, docs: Maybe = None) -> Tensor | float:
        """Return balance_coef times the layers' mean loss, 1 for even use; docs -1 is padding."""
        if not self.cfg.n_expert:
            return 0.0
        routing = torch.stack([block.mlp.routing for block in self.blocks])  # (L, 2, N, E)
        real = routing.new_ones(1, 1) if docs is None else (docs >= 0).float().view(-1, 1)
        shares = (routing * real).mean(2) / real.mean().clamp(min=1e-9)  # (L, 2, E)
        return self.cfg.balance_coef * self.cfg.n_expert * shares.prod(1).sum(-1).mean()

    def forward(self, idx: Tensor, targets: Maybe = None, docs: Maybe = None) -> Tensor:
        """Return logits (B, T, vocab_size), or with targets (B, T) their summed nll."""
        x = self.hidden(idx, docs)
        return self.logits(x) if targets is None else self.nll(x, targets)

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the hidden matrices under "muon" (experts are stacks), the rest under "adamw"."""
        groups = {"muon": [], "adamw": []}
        for name, p in self.named_parameters():
            hidden = name.startswith("blocks.") and p.ndim >= 2 and "router" not in name
            groups["muon" if hidden else "adamw"].append(p)
        return groups

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())
