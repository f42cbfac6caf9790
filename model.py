"""The model: a decoder-only transformer with RoPE, RMSNorm, QK-norm, GQA, SwiGLU, optional MoE, attention sinks and windows.

Every switch is a field of ModelConfig, and every combination has a home in transformers (Flint; Qwen3 without sinks).
Sources: RoPE arXiv 2104.09864, RMSNorm 1910.07467, QK-norm 2010.04245, GQA 2305.13245, SwiGLU 2002.05202, sigmoid-routed MoE
with a shared expert 2412.19437, sinks as a learned logit per head: gpt-oss; streaming: 2309.17453.

Shapes: B batch, T time, S cache slots, C d_model, H query heads, K key/value heads, D d_head, F d_ff, E experts, N rows,
V vocabulary padded to a multiple of 128.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import UserError

aten = torch.ops.aten


@dataclass
class ModelConfig:
    vocab_size: int = 50262  # ids in use, special tokens included (gpt2: 50262, byte: 262)
    seq_len: int = 1024  # tokens of training context
    n_layer: int = 12  # blocks
    n_head: int = 16  # query heads
    n_kv_head: int | None = None  # key/value heads, a divisor of n_head; None = n_head
    d_model: int = 1024  # width of the residual stream
    d_head: int | None = None  # width of a head, even; None = d_model / n_head
    d_ff: int | None = None  # hidden width of the MLP; None = 8/3 d_model rounded up to 64
    rope_base: float = 10000.0  # RoPE: wavelengths run from 2 pi to 2 pi * rope_base tokens
    qk_norm: bool = True  # RMSNorm on queries and keys, per head, before RoPE
    sinks: bool = True  # one learned logit per head in the softmax denominator
    sliding_window: int | None = None  # tokens a query sees, itself included; None = all before it
    tied: bool = True  # one matrix for the embedding and the head
    n_expert: int = 0  # routed experts per MoE layer; 0 = dense SwiGLU
    n_expert_active: int = 2  # routed experts a token goes to
    d_expert: int | None = (
        None  # hidden width of an expert; None = d_ff / n_expert_active, down to a multiple of 8
    )
    shared_expert: bool = True  # MoE: one more expert that every token goes to
    balance_coef: float = 0.01  # MoE: weight of the load-balancing loss
    score_head: bool = False  # a scalar head per token (verifier)

    def __post_init__(self):
        undivided = self.d_head is None and self.n_head > 0 and self.d_model % self.n_head
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.d_head is None and self.n_head > 0:
            self.d_head = self.d_model // self.n_head
        if self.d_ff is None:
            self.d_ff = -(-8 * self.d_model // (3 * 64)) * 64
        if self.d_expert is None:
            self.d_expert = max(
                8, self.d_ff // max(1, self.n_expert_active) // 8 * 8
            )  # the grouped kernels want multiples of 8
        faults = [
            f"{key} must be at least 1, got {getattr(self, key)}"
            for key in (
                "vocab_size",
                "seq_len",
                "n_layer",
                "n_head",
                "n_kv_head",
                "d_model",
                "d_ff",
            )
            if getattr(self, key) < 1
        ]
        if not faults:
            if undivided:
                faults.append(
                    f"d_model={self.d_model} must be a multiple of n_head={self.n_head}, or give d_head"
                )
            if self.n_expert and self.d_expert < 1:
                faults.append(f"d_expert must be at least 1, got {self.d_expert}")
            if self.rope_base <= 0:
                faults.append(f"rope_base must be above 0, got {self.rope_base}")
            if self.n_head % self.n_kv_head:
                faults.append(
                    f"n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}"
                )
            if self.d_head < 2 or self.d_head % 2:
                faults.append(
                    f"RoPE needs an even d_head, got {self.d_head} (d_model={self.d_model}, n_head={self.n_head})"
                )
            if self.n_expert and not 1 <= self.n_expert_active <= self.n_expert:
                faults.append(
                    f"n_expert_active={self.n_expert_active} must be between 1 and n_expert={self.n_expert}"
                )
            if self.sliding_window is not None and self.sliding_window < 1:
                faults.append(
                    f"sliding_window must be None or at least 1, got {self.sliding_window}"
                )
        if faults:
            raise UserError("; ".join(faults))

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // 128) * 128


# ---------------------------------------------------------------------------------------------------------------------
# Norm and rotary positions

EPS = 1e-6  # of RMSNorm


def eager_cpu_training(x) -> bool:
    """Where our own autograd functions pay: torch's fused kernels are for CUDA or for the compiler, and without gradients plain is faster."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class FusedRMSNorm(torch.autograd.Function):
    """x / rms(x) * weight for eager mode on the CPU, where torch has no kernel for it: a quarter of F.rms_norm's time (LOG.md).

    The backward pass is LayerNorm's kernel, told that the mean is 0: dx = (g - n mean(g n) - mean(g)) / rms(x) with g = dout * weight and
    n = x / rms(x). The last term belongs to the mean that RMSNorm does not take, and is added again.
    """

    @staticmethod
    def forward(ctx, x, weight):
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1))
        inverse = mean_square.add_(EPS).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx, dout):
        x, weight, inverse = ctx.saved_tensors
        dx, dweight, _ = aten.native_layer_norm_backward(
            dout,
            x,
            [x.size(-1)],
            torch.zeros_like(inverse),
            inverse,
            weight,
            None,
            [True, True, False],
        )
        return dx.addcmul_((dout @ weight).unsqueeze(-1), inverse, value=1 / x.size(-1)), dweight


class RMSNorm(nn.Module):
    def __init__(self, d: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        if eager_cpu_training(x) and x.dtype != torch.bfloat16:
            return FusedRMSNorm.apply(x, weight)
        return F.rms_norm(x, (x.size(-1),), weight, eps=EPS)


def rotary_angles(pos, d_head: int, base: float, dtype):
    """cos, sin: (T, D/2) for integer positions (T,). Only differences of positions matter to the scores."""
    precise = (
        torch.float32 if pos.device.type == "mps" else torch.float64
    )  # a streaming cache counts far
    inv_freq = base ** (-torch.arange(0, d_head, 2, device=pos.device, dtype=precise) / d_head)
    angle = pos.to(precise)[:, None] * inv_freq
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Turn the pair (x[i], x[i + D/2]) by the angle of frequency i. x: (B, T, heads, D); cos, sin: (T, D/2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Attention with sinks: a reference in plain maths, and the same on fused kernels


def attention_weights(q, k, sinks=None, mask=None):
    """What each query gives to each key, (B, H, T, S); with sinks (H,) one more column, (B, H, T, S + 1): what the sink takes. Rows sum to 1.

    q: (B, H, T, D); k: (B, K, S, D); mask: (B or 1, 1, T, S), added to the scores; None = causal, the last query at the last key.
    """
    B, H, T, D = q.shape
    k = k.repeat_interleave(H // k.size(1), dim=1)
    if mask is None:
        mask = torch.full((T, k.size(2)), -math.inf, device=q.device, dtype=q.dtype).triu(
            1 + k.size(2) - T
        )
    scores = q @ k.transpose(-1, -2) / math.sqrt(D) + mask  # (B, H, T, S)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(q.dtype).view(1, H, 1, 1).expand(B, H, T, 1)), dim=-1)
    return F.softmax(scores, dim=-1)


def attention_reference(q, k, v, sinks=None, mask=None):
    """Softmax attention; sinks add one logit per head to the denominator and give no value. The definition that fast paths are held to.

    v: (B, K, S, D); the rest as in attention_weights. -> (B, H, T, D)
    """
    v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
    return attention_weights(q, k, sinks, mask)[..., : k.size(2)] @ v


def is_causal(q, mask) -> bool:
    return mask is None and q.size(2) > 1  # a single query sees every key


def flash(q, k, v, sinks, mask):
    """-> output with sinks (B, H, T, D), log-sum-exp of the scores (B, H, T), gate (B, H, T, 1), what the kernel's backward wants besides."""
    if q.is_cuda:
        o, lse, *state = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
        state = state[:6]  # cum_seq_q, cum_seq_k, max_q, max_k, rng state, unused
    else:
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal(q, mask), attn_mask=mask
        )
        state = []
    gate = torch.sigmoid(lse - sinks.view(1, -1, 1).to(lse.dtype)).unsqueeze(-1)
    return o.mul_(gate.to(o.dtype)), lse, gate, state


class FlashSinks(torch.autograd.Function):
    """Sinks on a fused kernel that knows none: out = o * g with g = sigmoid(lse - s), because the sink only scales the
    softmax denominator. Flash backward uses `out` for D = rowsum(dout * out) alone, so handing it out = o * g and dout * g
    gives the exact gradients of q, k and v; the gradient of s is -sum((1 - g) * D).
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, mask):
        out, lse, gate, ctx.kernel_state = flash(q, k, v, sinks, mask)
        ctx.save_for_backward(q, k, v, out, lse, gate, mask)
        ctx.sink_dtype = sinks.dtype
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse, gate, mask = ctx.saved_tensors
        dgate = (dout * gate.to(dout.dtype)).contiguous()
        if q.is_cuda:
            dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
                dgate, q, k, v, out, lse, *ctx.kernel_state[:4], 0.0, True, *ctx.kernel_state[4:]
            )
        else:
            dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dgate, q, k, v, out, lse, 0.0, is_causal(q, mask), attn_mask=mask
            )
        d = (dout * out).sum(-1, keepdim=True).to(gate.dtype)  # (B, H, T, 1)
        dsinks = -((1 - gate) * d).sum(dim=(0, 2, 3)).to(ctx.sink_dtype)
        return dq, dk, dv, dsinks, None


def attention_flex(q, k, v, sinks, mask):
    """Documents and windows on CUDA: FlexAttention skips the masked blocks and returns a differentiable lse."""
    from torch.nn.attention.flex_attention import flex_attention

    o, lse = torch.compile(flex_attention)(
        q, k, v, block_mask=mask, return_lse=True, enable_gqa=q.size(1) != k.size(1)
    )
    return (
        o
        if sinks is None
        else o * torch.sigmoid(lse - sinks.view(1, -1, 1)).unsqueeze(-1).to(o.dtype)
    )


def attention(q, k, v, sinks=None, mask=None):
    """attention_reference by the fastest exact way there is for the device, dtype and mask. Mask None: causal where k, v are as long
    as q; a single query sees all of them."""
    if mask is not None and not isinstance(mask, torch.Tensor):
        return attention_flex(q, k, v, sinks, mask)
    k, v = k.to(q.dtype), v.to(q.dtype)  # under autocast the cache keeps the dtype of the weights
    if sinks is None:
        mask = mask if mask is None else mask.to(q.dtype)
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=is_causal(q, mask), enable_gqa=q.size(1) != k.size(1)
        )
    causal = mask is None and q.size(2) == k.size(2)
    if q.device.type != "cpu" and not (
        q.is_cuda and causal and q.dtype in (torch.bfloat16, torch.float16)
    ):
        return attention_reference(q, k, v, sinks, mask)
    mask = mask if mask is None else mask.to(q.dtype)
    if (
        not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    ):  # an autograd function costs more than a token's attention
        return flash(q, k, v, sinks, mask)[0]
    return FlashSinks.apply(q, k, v, sinks, mask)


def training_mask(docs, window, T: int, device):
    """Causal, inside one document, at most `window` back. None (plain causal) | (B or 1, 1, T, T) on the CPU | BlockMask."""
    if docs is None and (window is None or window >= T):
        return None

    def allowed(b, h, q, k):
        ok = q >= k
        if window is not None:
            ok = ok & (q - k < window)
        return ok if docs is None else ok & (docs[b, q] == docs[b, k])

    B = 1 if docs is None else docs.size(0)
    if device.type == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(allowed, B, None, T, T, device=device)
    b, t = torch.arange(B, device=device), torch.arange(T, device=device)
    ok = allowed(b.view(B, 1, 1, 1), 0, t.view(1, 1, T, 1), t.view(1, 1, 1, T))
    return torch.zeros(B, 1, T, T, device=device).masked_fill(~ok, -math.inf)


class KVCache:
    """Keys (rotated) and values of the last S tokens of every layer. When the slots are full the oldest are overwritten:
    memory and time per token stay constant for any length, and the model sees the last S tokens, no more.

    Rows of unequal length are padded on the left; pads are never attended to, and RoPE does not mind the shift.
    """

    def __init__(self, cfg: ModelConfig, batch: int, slots: int, device, dtype):
        shape = (cfg.n_layer, batch, cfg.n_kv_head, slots, cfg.d_head)
        self.k, self.v = (
            torch.zeros(shape, device=device, dtype=dtype),
            torch.zeros(shape, device=device, dtype=dtype),
        )
        self.real = torch.ones(
            batch, slots, device=device, dtype=torch.bool
        )  # slot holds a token, not a pad
        self.pos = torch.full((slots,), -1, device=device)  # position of the token in each slot
        self.length, self.slots, self.window, self.padded = (
            0,
            slots,
            cfg.sliding_window or slots,
            False,
        )

    def reserve(self, T: int, pads=None):
        """Take slots for T further tokens. -> positions (T,), mask (B, 1, T, used slots) or None where plain causal."""
        assert T == 1 or self.length + T <= self.slots, "a full cache rolls token by token"
        pos = torch.arange(self.length, self.length + T, device=self.pos.device)
        self.taken = pos % self.slots
        self.pos[self.taken] = pos
        self.real[:, self.taken] = True if pads is None else pos >= pads[:, None]
        self.length += T
        self.used = min(self.length, self.slots)
        self.padded |= pads is not None
        if not self.padded and (
            self.length == T <= self.window or T == 1 and self.used <= self.window
        ):
            return pos, None
        age = pos[:, None] - self.pos[: self.used]  # (T, used)
        ok = (age >= 0) & (age < self.window) & self.real[:, None, : self.used] | (
            age == 0
        )  # a pad sees itself: no 0/0
        return pos, torch.zeros(ok.shape, device=ok.device, dtype=self.k.dtype).masked_fill_(
            ~ok, -math.inf
        ).unsqueeze(1)

    def put(self, layer: int, k, v):
        """Store k, v: (B, K, T, D). -> everything stored so far, (B, K, used, D)."""
        if self.taken.numel() == 1:  # a slice is written faster than an index
            slot = (self.length - 1) % self.slots
            self.k[layer, :, :, slot], self.v[layer, :, :, slot] = k[:, :, 0], v[:, :, 0]
        else:
            self.k[layer].index_copy_(2, self.taken, k.to(self.k.dtype))
            self.v[layer].index_copy_(2, self.taken, v.to(self.v.dtype))
        return self.k[layer, :, :, : self.used], self.v[layer, :, :, : self.used]

    def keep(self, rows):
        """Drop all batch rows but these."""
        self.k, self.v, self.real = self.k[:, rows], self.v[:, rows], self.real[rows]


def linear(x, weight):
    """F.linear; for the one token of each row that generation on the CPU is at, in the forms that read the weights fastest (LOG.md)."""
    n_rows = x.numel() // x.size(-1)
    if (
        not 1 <= n_rows <= 8
        or x.device.type != "cpu"
        or torch.is_grad_enabled()
        or x.dtype != weight.dtype
    ):
        return F.linear(x, weight)
    rows = x.reshape(n_rows, -1)
    if n_rows == 1 and weight.size(0) % 8 == 0:
        return torch.bmm(weight.unflatten(0, (8, -1)), rows.T.expand(8, -1, 1)).view(
            *x.shape[:-1], -1
        )
    return (
        (weight @ rows.T).T.contiguous().view(*x.shape[:-1], -1)
    )  # the attention kernel takes it for granted that rows lie whole


class Linear(nn.Linear):
    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x):
        return linear(x, self.weight)


def split_linear(x, weight, sizes):
    """x @ weight.T, cut into parts. In training on the CPU a product for each part, since what follows reads and writes them whole."""
    if eager_cpu_training(x):
        return [F.linear(x, w) for w in weight.split(sizes)]
    return linear(x, weight).split(sizes, dim=-1)


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.n_head, self.n_kv_head, self.d_head = cfg.n_head, cfg.n_kv_head, cfg.d_head
        self.qkv = Linear(cfg.d_model, (cfg.n_head + 2 * cfg.n_kv_head) * cfg.d_head)
        self.out = Linear(cfg.n_head * cfg.d_head, cfg.d_model)
        self.q_norm = RMSNorm(cfg.d_head) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.d_head) if cfg.qk_norm else nn.Identity()
        self.sinks = nn.Parameter(torch.zeros(cfg.n_head)) if cfg.sinks else None

    def project(self, x, cos, sin):
        """Rotated queries and keys, and values, of x (B, T, C): (B, H or K, T, D) each."""
        B, T, _ = x.shape
        H, K, D = self.n_head, self.n_kv_head, self.d_head
        q, k, v = (
            y.view(B, T, -1, D) for y in split_linear(x, self.qkv.weight, (H * D, K * D, K * D))
        )  # (B, T, H or K, D)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, cos, sin, mask=None, cache=None, layer=0):
        q, k, v = self.project(x, cos, sin)
        if cache is not None:
            k, v = cache.put(layer, k, v)
        y = attention(q, k, v, self.sinks, mask)
        return self.out(y.transpose(1, 2).flatten(2))


# ---------------------------------------------------------------------------------------------------------------------
# MLP: dense or a mixture of experts


class SiluMul(torch.autograd.Function):
    """silu(gate) * up in eager mode on the CPU, with one tensor less to write in each direction."""

    @staticmethod
    def forward(ctx, gate, up):
        silu = F.silu(gate)
        ctx.save_for_backward(gate, up, silu)
        return silu * up

    @staticmethod
    def backward(ctx, dout):
        gate, up, silu = ctx.saved_tensors
        dgate = dout * up
        aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        return dgate, dout * silu


def silu_mul(gate, up):
    return SiluMul.apply(gate, up) if eager_cpu_training(gate) else F.silu(gate) * up


class SwiGLU(nn.Module):
    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_up = Linear(d_model, 2 * d_ff)
        self.down = Linear(d_ff, d_model)

    def forward(self, x):
        gate, up = split_linear(x, self.gate_up.weight, self.down.in_features)
        return self.down(silu_mul(gate, up))


class MoE(nn.Module):
    """Each token goes to the n_expert_active experts of highest sigmoid score, weighted by these scores renormalised to 1,
    and to the shared expert. balance_loss is E * sum(share of tokens * mean score share), 1 when all experts are used alike.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.n_expert, self.n_active = cfg.n_expert, cfg.n_expert_active
        self.router = Linear(cfg.d_model, cfg.n_expert)
        self.gate_up = nn.Parameter(torch.empty(cfg.n_expert, 2 * cfg.d_expert, cfg.d_model))
        self.down = nn.Parameter(torch.empty(cfg.n_expert, cfg.d_model, cfg.d_expert))
        self.shared = SwiGLU(cfg.d_model, cfg.d_expert) if cfg.shared_expert else None
        self.balance_loss = None

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, shape[-1])  # (N, C)
        scores = torch.sigmoid(self.router(x).float())  # (N, E)
        weight, expert = scores.topk(self.n_active, dim=-1)  # (N, active)
        weight = weight / weight.sum(-1, keepdim=True)
        order = expert.flatten().argsort()  # (N * active,) grouped by expert
        token = order // self.n_active
        counts = torch.bincount(expert.flatten(), minlength=self.n_expert)  # (E,)
        gate, up = self.grouped_linear(x[token], self.gate_up, counts).chunk(2, dim=-1)
        y = self.grouped_linear(F.silu(gate) * up, self.down, counts)
        y = y * weight.flatten()[order].unsqueeze(-1).to(y.dtype)
        y = torch.zeros_like(x, dtype=y.dtype).index_add(0, token, y)
        share = scores / scores.sum(-1, keepdim=True)
        self.balance_loss = (counts / counts.sum() * share.mean(0)).sum() * self.n_expert
        if self.shared is not None:
            y = y + self.shared(x)
        return y.view(shape)

    @staticmethod
    def grouped_linear(x, weight, counts):
        """Rows of x (N, in), sorted by expert, each through its expert's matrix: weight (E, out, in). -> (N, out)"""
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        aligned = all(
            n * x.element_size() % 16 == 0 for n in weight.shape[1:]
        )  # grouped_mm wants rows of whole 16 bytes
        compiled = (
            x.dtype == torch.float32 and torch.compiler.is_compiling()
        )  # its meta kernel knows bfloat16 only
        if (
            hasattr(F, "grouped_mm")
            and x.dtype in (torch.bfloat16, torch.float32)
            and aligned
            and not compiled
        ):
            return F.grouped_mm(x, weight.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))
        return torch.cat([F.linear(part, w) for part, w in zip(x.split(counts.tolist()), weight)])


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(cfg.d_model), Attention(cfg)
        self.mlp_norm, self.mlp = (
            RMSNorm(cfg.d_model),
            MoE(cfg) if cfg.n_expert else SwiGLU(cfg.d_model, cfg.d_ff),
        )

    def forward(self, x, *args):
        x = x + self.attn(self.attn_norm(x), *args)
        return x + self.mlp(self.mlp_norm(x))


# ---------------------------------------------------------------------------------------------------------------------
# Head and loss, without a (B, T, V) tensor


def row_chunks(n_rows: int, n_columns: int) -> int:
    """Rows per chunk, so that a chunk of float32 logits stays near 32 MB."""
    return max(1, min(n_rows, (1 << 23) // n_columns))


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over rows of the cross-entropy of x @ weight.T, walking over chunks of rows: the forward pass takes loss and both
    gradients from each chunk of logits and keeps none. x: (N, C), weight: (V, C), targets: (N,); rows with target < 0 and
    vocabulary entries from n_vocab on do not count. (Peak memory and time beside other forms: LOG.md.)
    """

    @staticmethod
    def forward(ctx, x, weight, targets, n_vocab):
        w = weight.to(x.dtype)
        loss = torch.zeros((), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        need = any(ctx.needs_input_grad)
        dx, dw = (torch.empty_like(x), torch.zeros_like(weight)) if need else (None, None)
        n = row_chunks(len(x), w.size(0))
        for rows in (slice(start, start + n) for start in range(0, len(x), n)):
            supervised = targets[rows] >= 0
            target = targets[rows].clamp(min=0).unsqueeze(1)
            logits = (x[rows] @ w.T).to(loss.dtype)  # (n, V)
            logits[:, n_vocab:] = -math.inf
            top, chosen = logits.amax(-1, keepdim=True), logits.gather(1, target)
            total = logits.sub_(top).exp_().sum(-1, keepdim=True)
            loss += ((total.log() + top - chosen).squeeze(1) * supervised).sum()
            if need:
                share = supervised.unsqueeze(1).to(total.dtype)
                dlogits = (
                    logits.mul_(share / total).scatter_add_(1, target, -share).to(x.dtype)
                )  # softmax, minus one at the target
                dx[rows] = dlogits @ w
                if dw.dtype == x.dtype:
                    dw.addmm_(dlogits.T, x[rows])
                else:
                    dw += dlogits.T @ x[rows]
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dx, dw = ctx.saved_tensors
        return dx * dloss.to(dx.dtype), dw * dloss.to(dw.dtype), None, None


def chunk_logprobs(x, weight, targets, n_vocab):
    """log p(target) per row: (N,). Gradients by autograd; called under checkpoint, so that no logits outlive the chunk."""
    logits = (x @ weight.to(x.dtype).T)[:, :n_vocab]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(1, targets.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)


# ---------------------------------------------------------------------------------------------------------------------
# The model


class GPT(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.padded_vocab, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = RMSNorm(cfg.d_model)
        self.head = Linear(cfg.d_model, cfg.padded_vocab)
        if cfg.tied:
            self.head.weight = self.embed.weight
        self.score = Linear(cfg.d_model, 1) if cfg.score_head else None
        self.score_loglik = nn.Parameter(torch.empty(1)) if cfg.score_head else None
        self.recompute = (
            False  # in the backward pass, instead of keeping what happens inside the blocks
        )
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """embed              normal, std min(0.02, 4/C): a tied head must not predict the current token
        head (untied)      normal, std 0.02
        qkv, gate_up       normal, std 1/sqrt(C)
        router             normal, std 0.02
        out, down          zero: every block starts as the identity
        norms              one
        sinks, score       zero
        score_loglik       one: a verifier begins as the model's own log-likelihood
        """
        for name, p in self.named_parameters():
            match name.removesuffix(".weight").rsplit(".", 1)[-1]:
                case "embed":
                    nn.init.normal_(p, std=min(0.02, 4 / self.cfg.d_model))
                case "head" | "router":
                    nn.init.normal_(p, std=0.02)
                case "qkv" | "gate_up":
                    nn.init.normal_(p, std=self.cfg.d_model**-0.5)
                case "out" | "down" | "sinks" | "score":
                    nn.init.zeros_(p)
                case "attn_norm" | "mlp_norm" | "norm" | "q_norm" | "k_norm" | "score_loglik":
                    nn.init.ones_(p)
                case _:
                    raise AssertionError(f"no initialisation rule for parameter {name}")

    def hidden(self, idx, docs=None, cache: KVCache | None = None, pads=None):
        """Final hidden states (B, T, C) of token ids (B, T). docs (B, T): document numbers; attention stays inside one."""
        if cache is not None:
            pos, mask = cache.reserve(idx.size(1), pads)
        else:
            pos = torch.arange(idx.size(1), device=idx.device)
            mask = training_mask(docs, self.cfg.sliding_window, idx.size(1), idx.device)
        x = self.embed(idx)
        if torch.is_autocast_enabled(idx.device.type):
            x = x.to(
                torch.get_autocast_dtype(idx.device.type)
            )  # the residual stream too is in the compute dtype
        cos, sin = rotary_angles(pos, self.cfg.d_head, self.cfg.rope_base, x.dtype)
        for layer, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache, layer)
        return self.norm(x)

    def logits(self, x):
        """(..., C) -> (..., vocab_size): ids of the padding have no logit and so are never sampled."""
        return self.head(x)[..., : self.cfg.vocab_size].float()

    def nll(self, x, targets):
        """Sum of -log p(target) over targets >= 0, for hidden states x (B, T, C) and targets (B, T)."""
        x, targets = x.flatten(0, -2), targets.flatten()
        if (
            not torch.compiler.is_compiling()
        ):  # unsupervised rows need no logits; a compiled graph wants fixed shapes
            supervised = targets >= 0
            x, targets = x[supervised], targets[supervised]
        return LinearCrossEntropy.apply(x, self.head.weight, targets, self.cfg.vocab_size)

    def logprobs(self, x, targets):
        """log p(target) at every position (B, T); 0 where target < 0."""
        flat, target = x.flatten(0, -2), targets.flatten()
        supervised = target >= 0
        chosen = supervised if not torch.compiler.is_compiling() else slice(None)  # as in nll
        flat, target = flat[chosen], target[chosen].clamp(min=0)
        rows = row_chunks(
            len(flat), 3 * self.cfg.padded_vocab
        )  # its backward pass holds logits, their softmax and a gradient at once
        parts = [
            checkpoint(
                chunk_logprobs, h, self.head.weight, t, self.cfg.vocab_size, use_reentrant=False
            )
            for h, t in zip(flat.split(rows), target.split(rows))
        ]
        logp = torch.cat(parts)
        if torch.compiler.is_compiling():
            return (logp * supervised).view(targets.shape)
        return logp.new_zeros(targets.numel()).masked_scatter(supervised, logp).view(targets.shape)

    def scores(self, x, idx, solution):
        """Verifier scores (B, T) in float32: a linear function of the hidden states x (B, T, C), plus score_loglik times the
        log-likelihood of the solution so far. solution (B, T): which of the ids idx (B, T) belong to a solution.

        No layer can compare a token with the model's prediction of it, which is formed in the last layer, one place earlier: the
        likelihood carries that comparison. Trained through it, right solutions become likely and wrong ones do not (LOG.md).
        """
        logp = self.logprobs(x[:, :-1], torch.where(solution[:, 1:], idx[:, 1:], -1))
        total = F.pad(logp, (1, 0)).cumsum(1)  # (B, T)
        place = torch.arange(idx.size(1), device=idx.device)
        before = (
            torch.where(solution, 0, place).cummax(1).values
        )  # the last place before each solution
        return self.score(x).squeeze(-1).float() + self.score_loglik * (
            total - total.gather(1, before)
        )

    def balance_loss(self):
        """Mean load-balancing loss of the MoE layers in the last forward pass, times balance_coef; 0 for a dense model."""
        losses = [block.mlp.balance_loss for block in self.blocks if isinstance(block.mlp, MoE)]
        return self.cfg.balance_coef * sum(losses) / len(losses) if losses else 0.0

    def forward(self, idx, targets=None, docs=None):
        """Logits (B, T, vocab_size), or with targets (B, T) the summed negative log-likelihood of targets >= 0."""
        x = self.hidden(idx, docs)
        return self.logits(x) if targets is None else self.nll(x, targets)

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """muon: the hidden matrices (experts are stacks of them); adamw: embedding, head, norms, sinks, router, score."""
        groups = {"muon": [], "adamw": []}
        for name, p in self.named_parameters():
            hidden = name.startswith("blocks.") and p.ndim >= 2 and "router" not in name
            groups["muon" if hidden else "adamw"].append(p)
        assert sum(map(len, groups.values())) == len(list(self.parameters())), (
            "a parameter is in no or two groups"
        )
        return groups

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> float:
        """Forward + backward FLOPs of a training token: 6 per active matrix weight plus 12 L H D T for attention, as PaLM
        (arXiv 2204.02311, appendix B) counts it; the causal half is not subtracted, the embedding is a lookup.
        """
        cfg = self.cfg
        weights = (
            sum(p.numel() for p in self.param_groups()["muon"]) + cfg.padded_vocab * cfg.d_model
        )
        if cfg.n_expert:
            weights -= (
                cfg.n_layer * (cfg.n_expert - cfg.n_expert_active) * 3 * cfg.d_expert * cfg.d_model
            )
        return 6.0 * weights + 12.0 * cfg.n_layer * cfg.n_head * cfg.d_head * min(
            cfg.seq_len, cfg.sliding_window or cfg.seq_len
        )
