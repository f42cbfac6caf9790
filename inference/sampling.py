"""This module samples text from a model: one row or many, a seed per row."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configurator import UserError
from inference.cache import FixedCache, KVCache, kept_tokens
from model import GPT

Ids = list[int]
Seed = int | tuple[int, ...]
Stop = tuple[int, ...] | Callable[[Ids], bool]  # ids that end a row, or a rule for its ids
Calculate = Callable[[Ids], Ids] | None  # the ids that must follow those of a row so far
CACHE_BYTES = 2 << 30, 16 << 30  # of the caches that generate() fills at once: CPU, GPU


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


class Steps:
    """Steps of generation after the prompt, one id of each row at a time.

    A step launches hundreds of small kernels, each of which takes longer to launch than to run. So
    on CUDA a step is recorded once as a graph, and replayed.
    """

    def __init__(self, model: GPT, cache: Any):
        self.model, self.cache, self.graph = model, cache, None

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the hidden states (B, C) after one more id of each row (B,)."""
        if not self.is_replayed(ids):
            return self.model.hidden(ids.unsqueeze(1), cache=self.cache)[:, -1]
        if self.graph is None:
            self.record(ids)
        self.ids.copy_(ids.unsqueeze(1))
        self.graph.replay()
        self.cache.length += 1
        return self.x

    def is_replayed(self, ids: Tensor) -> bool:
        return ids.is_cuda and self.is_alike()

    def is_alike(self) -> bool:
        """Say whether the next step does on the device what every step does."""
        cache = self.cache
        if not isinstance(cache, KVCache) or (cache.kept and cache.length >= cache.slots):
            return False
        return not cache.cfg.n_expert or cache.k.dtype == torch.bfloat16  # else experts are counted

    def record(self, ids: Tensor) -> None:
        """Run a step once, for kernels that are prepared at their first call, and record it."""
        self.ids, fixed = ids.unsqueeze(1).clone(), FixedCache(self.cache)
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            self.model.hidden(self.ids, cache=fixed)
        torch.cuda.current_stream().wait_stream(beside)
        fixed.next -= 1  # the first replay writes the same slot again
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.x = self.model.hidden(self.ids, cache=fixed)[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone; the next step is recorded anew."""
        self.cache.keep(rows)
        self.graph = None


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
    steps = Steps(model, cache_of(model, len(prompts), slots))
    rows = list(range(len(prompts)))  # the prompt that each row of the batch belongs to
    writers = [Writer(seed, stop, calculator) for seed in seeds or rows]
    x = model.hidden(idx, cache=steps.cache, pads=pads if pads.any() else None)[:, -1]
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
            steps.keep(keep)
            ids = ids[keep]
            rows = [rows[i] for i in running]
        x = steps(ids)


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
