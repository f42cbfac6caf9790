"""This module samples text from a model: one row or many, a rolling cache, a seed per row."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configurator import UserError
from model import GPT, Mask, ModelConfig, rotary_angles, rotate

Ids = list[int]
Seed = int | tuple[int, ...]
Stop = tuple[int, ...] | Callable[[Ids], bool]  # ids that end a row, or a rule for its ids
Calculate = Callable[[Ids], Ids] | None  # the ids that must follow those of a row so far
CACHE_BYTES = 2 << 30, 16 << 30  # of the caches that generate() fills at once: CPU, GPU
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
        self.used = min(self.length, self.slots)
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


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0  # 0 = greedy: the most likely id
    top_k: int | None = None  # keep the k most likely ids
    top_p: float | None = None  # keep the smallest set of this probability
    min_p: float | None = None  # keep ids of this share of the best one's (arXiv 2407.01082)


PLAIN = Sampling()
GREEDY = Sampling(temperature=0)


def sample(logits: Tensor, sampling: Sampling = PLAIN, draws: Tensor | None = None) -> Tensor:
    """Return the next ids (B,) for logits (B, vocab).

    draws (B,): uniform numbers in [0, 1), which decide the rows by inversion of the distribution.
    """
    if sampling.temperature < 1e-30:  # 0, or the logits would grow to infinity
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.min_p:
        lowest = logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < lowest, -math.inf)
    if sampling.top_k and sampling.top_k < logits.size(-1):
        lowest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= sampling.top_p
        beyond[:, 0] = False  # the most likely id always stays
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -math.inf)
    if draws is None:
        draws = torch.rand(len(logits), device=logits.device)
    below = logits.softmax(-1).cumsum(-1)  # (B, vocab)
    # rounding must not carry a draw to the very end, where ids of probability 0 stand
    draws = draws.to(below).clamp(max=1 - 2**-23)
    place = (draws * below[:, -1]).unsqueeze(1)
    return torch.searchsorted(below, place, right=True).squeeze(1)


class Writer:  # the state of one row
    def __init__(self, seed: Seed, stop: Stop, calculator: Calculate):
        self.random = np.random.default_rng(seed)
        self.ends = stop if callable(stop) else lambda ids: ids[-1] in stop
        self.calculator = calculator
        self.ids = []
        self.pending = []  # ids of the calculator that are still to be written
        self.done = False

    def write(self, token: int) -> int:
        """Write the sampled id, or the calculator's in its place. -> the id written"""
        if self.pending:
            token = self.pending.pop(0)
        elif self.calculator is not None:
            self.pending = self.calculator([*self.ids, token])
        self.ids.append(token)
        self.done = self.ends(self.ids)
        return token


def cache_of(model: GPT, batch: int, slots: int) -> Any:
    """Return an empty cache for a model; those of transformers bring their own."""
    if hasattr(model, "new_cache"):
        return model.new_cache(batch)
    weight, kept = model.embed.weight, kept_tokens(model.cfg, slots)
    return KVCache(model.cfg, batch, slots, weight.device, weight.dtype, kept)


@torch.no_grad()
def stream(
    model: GPT,
    prompts: list[Ids],
    max_new_tokens: int,
    stop: Stop = (),
    seeds: Sequence[Seed] | None = None,
    sampling: Sampling = PLAIN,
    calculator: Calculate = None,
) -> Iterator[dict[int, int]]:
    """Sample all prompts at once. -> step by step, {row: new id} of the rows that have not ended

    A row ends where stop says so, and depends on its prompt and its seed (None: 0, 1, ...) alone;
    on CUDA up to rounding, because kernels differ by the number of rows.
    The cache has room for the prompt and max_new_tokens, at most seq_len; then it rolls, and
    a model without sinks keeps its first tokens. A longer prompt is the caller's to cut. What the
    calculator returns replaces sampled ids.
    """
    if not prompts:
        return
    device, space = model.embed.weight.device, model.cfg.seq_len
    width = max(map(len, prompts))
    if width > space:
        raise UserError(f"a prompt has {width} tokens, and seq_len={space} of them fit: shorten it")
    slots = min(space, width + max_new_tokens)
    pads = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    idx = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    cache = cache_of(model, len(prompts), slots)
    rows = list(range(len(prompts)))  # the prompt that each row of the batch belongs to
    writers = [Writer(seed, stop, calculator) for seed in seeds or rows]
    x = model.hidden(idx, cache=cache, pads=pads if pads.any() else None)[:, -1]
    for step in range(max_new_tokens):
        draws = [writers[row].random.random(dtype=np.float32) for row in rows]
        ids = sample(model.logits(x), sampling, torch.tensor(draws, device=device))
        written = {}
        for i, token in enumerate(ids.tolist()):
            row = rows[i]
            if not writers[row].done:
                written[row] = writers[row].write(token)
                if written[row] != token:
                    ids[i] = written[row]
        yield written
        running = [i for i, row in enumerate(rows) if not writers[row].done]
        if not running or step + 1 == max_new_tokens:
            return
        if len(running) <= 0.8 * len(rows):  # now and then: each time costs a copy of the cache
            keep = torch.tensor(running, device=device)
            cache.keep(keep)
            ids = ids[keep]
            rows = [rows[i] for i in running]
        x = model.hidden(ids.unsqueeze(1), cache=cache)[:, -1]


def generate(
    model: GPT,
    prompts: list[Ids],
    max_new_tokens: int,
    stop: Stop = (),
    seeds: Sequence[Seed] | None = None,
    **settings: Any,
) -> list[Ids]:
    """Return the new ids of every prompt, all that stream() yields for the same arguments."""
    texts = [[] for _ in prompts]
    seeds = seeds or range(len(prompts))
    for part in parts_of(model, prompts, max_new_tokens):
        own = [prompts[i] for i in part], max_new_tokens, stop, [seeds[i] for i in part]
        for step in stream(model, *own, **settings):
            for row, token in step.items():
                texts[part[row]].append(token)
    return texts


def parts_of(model: GPT, prompts: list[Ids], max_new_tokens: int) -> list[list[int]]:
    """Return the numbers of the prompts in parts, each of a cache that memory has room for.

    One part keeps their order; of several each has prompts of similar length.
    """
    cfg, weight = model.cfg, model.embed.weight
    token = 2 * cfg.n_layer * cfg.n_kv_head * cfg.d_head * weight.element_size()
    room = CACHE_BYTES[weight.is_cuda] // token
    slots = [min(cfg.seq_len, len(prompt) + max_new_tokens) for prompt in prompts]
    if len(slots) * max(slots, default=0) <= room:
        return [list(range(len(slots)))]
    parts = [[]]
    for i in sorted(range(len(slots)), key=slots.__getitem__):
        if parts[-1] and (len(parts[-1]) + 1) * slots[i] > room:
            parts.append([])
        parts[-1].append(i)
    return parts
