"""This module keeps the keys and values of a text: a rolling cache, and one for CUDA graphs."""

import math

import torch
from torch import Tensor

from configurator import UserError
from model import Mask, ModelConfig, rotary_angles, rotate

KEPT = 4  # first tokens of a stream that stay in the cache (arXiv 2309.17453, table 2)


def kept_tokens(cfg: ModelConfig, slots: int) -> int:
    """Return how many first tokens a cache keeps: those that a model without sinks leans on."""
    return 0 if cfg.sinks or cfg.sliding_window or slots <= KEPT else KEPT


class KVCache:
    """A cache keeps the rotated keys and the values of the last `slots` tokens in every layer.

    When they are full, the oldest are overwritten: memory and time per token stay constant. Rows
    are padded on the left; nothing attends to the pads, and RoPE does not mind the shift.

    The first `kept` tokens of each row, pads not counted, are never overwritten (StreamingLLM,
    arXiv 2309.17453). Positions count inside the cache: before each step the kept keys are turned
    on, so that they stand directly before the window. Scores see only differences of positions.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        batch: int,
        slots: int,
        device: torch.device,
        dtype: torch.dtype,
        kept: int = 0,
    ):
        if not 0 <= kept < slots or (kept and cfg.sliding_window):
            window = f"slots={slots}, sliding_window={cfg.sliding_window}"
            raise UserError(f"kept={kept} with {window}: keep fewer than slots, 0 with a window")
        shape = (cfg.n_layer, batch, cfg.n_kv_head, slots, cfg.d_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        # whether a slot holds a token and not a pad, and the position of its token
        self.real = torch.ones(batch, slots, device=device, dtype=torch.bool)
        self.pos = torch.full((slots,), -1, device=device)
        self.slots = slots
        self.window = cfg.sliding_window or slots
        self.length = 0  # tokens seen so far
        self.padded = False
        self.cfg, self.kept = cfg, kept
        self.pads = torch.zeros(batch, device=device, dtype=torch.long)  # of each row
        self.first = self.k[..., :kept, :].clone()  # the kept keys as they were computed

    @property
    def used(self) -> int:  # slots that hold something
        return min(self.length, self.slots)

    def reserve(self, T: int, pads: Tensor | None = None) -> tuple[Tensor, Mask]:
        """Take slots for T further tokens. -> their positions (T,), what they may attend to."""
        assert T == 1 or self.length + T <= self.slots, "a full cache rolls token by token"
        pos = torch.arange(self.length, self.length + T, device=self.pos.device)
        self.length += T
        if self.kept and self.length > self.slots:
            return pos, self.roll()
        self.taken = pos % self.slots
        self.place = (slice(None), slice(None), (self.length - 1) % self.slots)  # of one token
        self.pos[self.taken] = pos
        self.real[:, self.taken] = True if pads is None else pos >= pads[:, None]
        self.padded |= pads is not None
        self.pads = self.pads if pads is None else pads
        first = self.length == T  # else a single token sees all that is stored
        if not self.padded and self.used <= self.window and (first or T == 1):
            return pos, Mask(causal=first)
        age = pos[:, None] - self.pos[: self.used]  # (T, used)
        seen = (age >= 0) & (age < self.window) & self.real[:, None, : self.used]
        return pos, self.mask(seen | (age == 0))  # a pad sees itself: no 0/0

    def mask(self, seen: Tensor) -> Mask:
        bias = torch.zeros(seen.shape, device=seen.device, dtype=self.k.dtype)
        return Mask(bias=bias.masked_fill_(~seen, -math.inf).unsqueeze(1))

    def roll(self) -> Mask:
        """Take one slot in each row of a full cache that keeps its first tokens. -> the mask"""
        if self.length == self.slots + 1 and self.padded:
            self.align()
        number = self.length - 1 - self.pads  # (B,) of the new token in its row
        window = self.kept + (number - self.kept) % (self.slots - self.kept)
        slot = torch.where(number < self.kept, number, window)
        rows = torch.arange(len(slot), device=slot.device)
        self.place = (rows, slice(None), slot)
        self.real[rows, slot] = True
        # a row that holds s tokens more than its slots sees its kept keys s positions later
        shift = (number + 1 - self.slots).clamp(min=0)
        untouched = shift <= 1
        self.first[:, untouched] = self.k[:, untouched, :, : self.kept]
        dtype = torch.promote_types(self.k.dtype, torch.float32)
        cos, sin = rotary_angles(shift, self.cfg.d_head, self.cfg.rope_base, dtype)
        turned = rotate(self.first.flatten(2, 3).to(dtype), cos, sin)  # (layers, B, K * kept, D)
        self.k[..., : self.kept, :] = turned.view(self.first.shape)
        return self.mask(self.real[:, None]) if self.padded else Mask()

    def align(self) -> None:
        """Turn each row of the cache so that its first token, behind the pads, has slot 0."""
        for row, pads in enumerate(self.pads.tolist()):
            self.k[:, row] = self.k[:, row].roll(-pads, dims=2)
            self.v[:, row] = self.v[:, row].roll(-pads, dims=2)
            self.real[row] = self.real[row].roll(-pads)

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, D) in the reserved slots. -> everything stored, (B, K, used, D)."""
        if k.size(2) == 1:  # a slice is written faster than an index
            self.k[layer, *self.place] = k[:, :, 0].to(self.k.dtype)
            self.v[layer, *self.place] = v[:, :, 0].to(self.v.dtype)
        else:
            self.k[layer].index_copy_(2, self.taken, k.to(self.k.dtype))
            self.v[layer].index_copy_(2, self.taken, v.to(self.v.dtype))
        return self.k[layer, :, :, : self.used], self.v[layer, :, :, : self.used]

    def keep(self, rows: Tensor) -> None:
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.first = self.first[:, rows]
        self.real, self.pads = self.real[rows], self.pads[rows]


class FixedCache:
    """A KVCache with what a step changes on the device alone: a replayed step runs no Python.

    Every step reads all slots, those that are still empty under a mask.
    """

    def __init__(self, cache: KVCache):
        self.cache = cache
        cache.real[:, cache.used :] = False  # empty slots are no tokens
        self.next = torch.full((1,), cache.length, device=cache.pos.device)  # position

    def reserve(self, T: int, pads: None = None) -> tuple[Tensor, Mask]:
        cache, pos = self.cache, self.next.clone()
        self.slot = pos % cache.slots  # (1,)
        cache.pos.index_copy_(0, self.slot, pos)
        cache.real.index_fill_(1, self.slot, True)
        self.next += 1
        seen = (pos - cache.pos < cache.window) & cache.real  # (B, slots)
        return pos, cache.mask(seen[:, None])

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, 1, D) in the reserved slot. -> all slots, (B, K, slots, D)"""
        cache = self.cache
        cache.k[layer].index_copy_(2, self.slot, k.to(cache.k.dtype))
        cache.v[layer].index_copy_(2, self.slot, v.to(cache.v.dtype))
        return cache.k[layer], cache.v[layer]
