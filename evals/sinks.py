"""Attention sinks and streaming: loss far beyond the training context, and what heads look at.

A stream of 16 times the cache is read in up to four ways (arXiv 2309.17453). The cache has the
training context's seq_len slots, or the stream_slots that are given: fewer.

    rolling    token by token through a KV cache, which keeps the last tokens alone
    kept       the same, but the first 4 tokens stay: for models without sinks, as in sample.py
    dense      every token sees all before it: beyond seq_len RoPE meets distances new to it
    recompute  the last tokens from scratch for every token: no key knows what is older

As good as recompute means stable, not a longer memory: no key is older than the cache, if those of
upper layers carry a little of older tokens. Loss on ordinary text cannot show recall.
"""

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configurator import UserError
from corpus.shards import Mixture
from evals.base import EvalConfig, Row, Subject, own_policies, task
from evals.stats import Estimate, difference, ratio
from inference.cache import KVCache, kept_tokens
from model import GPT, Attention, Mask, ModelConfig, attention_weights, training_mask
from runtime.files import write_jsonl

FACTOR = 16  # caches in a stream


def clock(device: torch.device) -> float:
    """Return the time in ms, when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


@torch.no_grad()
def cached(model: GPT, ids: Tensor, slots: int, kept: int = 0) -> tuple[Tensor, np.ndarray, int]:
    """Read through a rolling cache. -> nats (n, P), ms of each step (P,), the cache's bytes."""
    cache = KVCache(model.cfg, len(ids), slots, ids.device, model.embed.weight.dtype, kept)
    nll, ms = [], []
    for p in range(ids.size(1) - 1):
        began = clock(ids.device)
        x = model.hidden(ids[:, p : p + 1], cache=cache)
        nll.append(-model.logprobs(x, ids[:, p + 1 : p + 2]))
        ms.append(clock(ids.device) - began)
    n_bytes = cache.k.nbytes + cache.v.nbytes + cache.first.nbytes
    return torch.cat(nll, dim=1), np.array(ms), n_bytes


@torch.no_grad()
def recomputed(
    model: GPT, ids: Tensor, positions: Iterable[int], slots: int
) -> tuple[Tensor, np.ndarray]:
    """Read at these positions only, each from the last `slots` tokens alone. -> nats, ms."""
    nll, ms = [], []
    for p in positions:
        began = clock(ids.device)
        x = model.hidden(ids[:, max(0, p + 1 - slots) : p + 1])
        nll.append(-model.logprobs(x[:, -1:], ids[:, p + 1 : p + 2]))
        ms.append(clock(ids.device) - began)
    return torch.cat(nll, dim=1), np.array(ms)


@torch.no_grad()
def attention_maps(model: GPT, ids: Tensor) -> Tensor:
    """Return the weights of every head on ids (B, T): (layers, B, H, T, T + 1), the sink last."""
    maps, T = [], ids.size(1)
    mask = training_mask(None, model.cfg.sliding_window, T, torch.device("cpu"))
    if mask.bias is not None:
        mask = Mask(bias=mask.bias.to(ids.device))

    def record(attn: Attention, args: tuple, output: Tensor) -> None:
        q, k, _ = attn.project(*args[:3])
        weights = attention_weights(q, k, attn.sinks, mask)
        maps.append(F.pad(weights, (0, T + 1 - weights.size(-1))).float().cpu())

    hooks = [block.attn.register_forward_hook(record) for block in model.blocks]
    try:
        model.hidden(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(maps)


def entropy(maps: Tensor) -> Tensor:
    """Return nats of each query's attention over the tokens: (..., T, T + 1) -> (..., T)."""
    tokens = maps[..., :-1]  # the sink is set aside
    return torch.special.entr(tokens / tokens.sum(-1, keepdim=True)).sum(-1)


def head_numbers(maps: Tensor) -> dict[str, Tensor]:
    """Return numbers of every query, from maps (layers, B, H, T, T + 1): (layers, B, H, T) each."""
    shares = {"first_token_share": maps[..., 0], "sink_share": maps[..., -1]}
    return {"attention_entropy": entropy(maps), **shares}


def by_head(numbers: dict[str, Tensor], sinks: bool, skip: int = 0, where: str = "") -> list[Row]:
    """Return means over all queries but the first `skip`; the rows B are independent parts."""
    layers, B, H, T = numbers["attention_entropy"].shape
    i = torch.arange(1 + skip, 1 + T)
    # What the i-th query has, without a window, if it looks at all it can see alike
    uniform = {"attention_entropy": i.log(), "first_token_share": 1 / i}
    if sinks:
        uniform["sink_share"] = 1 / (i + 1)
    rows = []
    for metric, layer, head in itertools.product(uniform, range(layers), range(H)):
        sums = numbers[metric][layer, :, head, skip:].double().sum(-1)  # (B,)
        mean = ratio(sums.tolist(), [len(i)] * B)
        extra = {"layer": layer + 1, "head": head + 1, "uniform": uniform[metric].mean().item()}
        protocol = f"{where}layer {layer + 1} head {head + 1}"
        rows.append(Row(metric, protocol, mean, extra=extra))
    return rows


def by_layer(numbers: dict[str, Tensor], sinks: bool, skip: int) -> list[Row]:
    """Return the same means over all heads of a layer."""
    means = {metric: values.mean(2, keepdim=True) for metric, values in numbers.items()}
    rows = []
    for row in by_head(means, sinks, skip):
        extra = {key: value for key, value in row.extra.items() if key != "head"}
        rows.append(replace(row, protocol=f"layer {extra['layer']}", extra=extra))
    return rows


def streams(subject: Subject, stage: str, cfg: EvalConfig, length: int) -> tuple[Tensor, bool]:
    """Return rows (n_streams or fewer, length + 1), and whether each is in one document."""
    spec, tokenizer = cfg.streaming, subject.tokenizers[stage]
    headerless = subject.pretraining(stage).get("headerless", False)
    try:
        rows = Mixture(spec, cfg.data_dir, "val", length, 0, tokenizer, headerless)
    except UserError as error:
        size = "stream_slots" if cfg.stream_slots else "seq_len"
        needed = f"{FACTOR} x {size} = {length} tokens"
        raise UserError(f"streaming={spec}: a stream needs {needed}: {error}") from None
    ids = rows.validation(0, min(rows.n_rows, 16 * cfg.n_streams))
    whole = ids[(ids != tokenizer.eos).all(1)]
    if not len(whole):
        print(f"eval streaming: no document of {spec} has {length} tokens; the streams run on")
    chosen = whole if len(whole) else ids
    return chosen[: cfg.n_streams].to(subject.device), len(whole) > 0


def mean_loss(nll: Tensor, chosen: np.ndarray) -> Estimate:
    """Return the mean of chosen columns of nats (n, P); the streams are the independent parts."""
    nll = nll.cpu()[:, chosen].double()
    return ratio(nll.sum(1).tolist(), [nll.size(1)] * len(nll))


def fastest(ms: np.ndarray, chosen: np.ndarray) -> Estimate:
    """Return the least of the chosen times, because other work on a machine only adds."""
    return Estimate(float(ms[chosen].min()), int(chosen.sum()))


def by_position(
    metric: str, how: str, at: np.ndarray, width: int, estimate: Callable, values: object
) -> list[Row]:
    """Return a row for every `width` positions: an estimate of those values whose `at` is in it."""
    rows = []
    for bucket in np.unique(at // width):
        first = int(bucket) * width
        extra = {"position": first, "width": width}
        protocol = f"{how} {first}-{first + width - 1}"
        rows.append(Row(metric, protocol, estimate(values, at // width == bucket), extra=extra))
    return rows


def against_recompute(losses: dict[str, Tensor], T: int, at: np.ndarray) -> list[Row]:
    """Return the loss at `at` within and beyond the first T tokens; recompute is the last way."""
    rows = []
    for metric, chosen in (("loss_within_context", at < T), ("loss_beyond_context", at >= T)):
        means = {how: mean_loss(nll, chosen) for how, nll in losses.items()}
        rows += [Row(metric, how, mean) for how, mean in means.items()]
        *ways, recompute = means
        for how in ways:
            gap = difference(means[recompute].items, means[how].items)
            rows.append(Row(metric, f"{how} - {recompute}", gap))
    return rows


def ways_to_read(cfg: ModelConfig, slots: int) -> dict[str, tuple[int, int]]:
    """Return the slots and the kept tokens of each way to read through a cache."""
    ways = {"rolling": (slots, 0)}
    if kept := kept_tokens(cfg, slots):
        ways["kept"] = (slots, kept)
    return ways | {"dense": (FACTOR * slots, 0)}


def trained(subject: Subject, cfg: EvalConfig) -> list[str]:
    return subject.policies[1:]


@task("streaming", "streaming", "val", "n_streams stream_slots", trained)
def streaming(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Measure loss and ms by position, cache bytes, what sink and first token get.

    ms_per_token is the time of a step, which reads one token of each stream.
    """
    model = subject.model(stage)
    context = model.cfg.seq_len
    T = cfg.stream_slots or context
    if context < T:
        raise UserError(f"stream_slots={T} is more than the context, seq_len={context}: give fewer")
    P, width = FACTOR * T, max(1, T // 2)
    size = f"@{T}" if cfg.stream_slots else ""
    ids, one_document = streams(subject, stage, cfg, P)
    # recompute is slow: eight positions of every T are enough
    every, few = np.arange(P), np.arange(width // 8, P, max(1, width // 4))
    rows, nll = [], {}
    for way, cache in ways_to_read(model.cfg, T).items():
        how = way + size
        losses, ms, n_bytes = cached(model, ids, *cache)
        rows.append(Row("cache_bytes", how, Estimate(n_bytes // len(ids), 1)))
        rows += by_position("loss_at_position", how, every, width, mean_loss, losses)
        rows += by_position("ms_per_token", how, every, width, fastest, ms)
        nll[how] = losses[:, few]
    how = f"recompute{size}"
    nll[how], ms = recomputed(model, ids, few, T)
    rows += by_position("loss_at_position", how, few, T, mean_loss, nll[how])
    rows += by_position("ms_per_token", how, few, width, fastest, ms)
    rows += against_recompute(nll, T, few)
    # One stream at a time, because maps are large.
    parts = [head_numbers(attention_maps(model, row)) for row in ids[:, :T].split(1)]
    numbers = {key: torch.cat([part[key] for part in parts], dim=1) for key in parts[0]}
    rows += by_head(numbers, model.cfg.sinks, T // 2)
    rows += by_layer(numbers, model.cfg.sinks, T // 2)
    about = {"seq_len": context, "slots": T, "one_document": one_document}
    return [replace(row, split="val", extra=about | row.extra) for row in rows]


@task("attention", data="sentences", stages=own_policies)
def attention(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Measure every head on each of the given sentences; attention/ keeps the weights, to draw."""
    model, tokenizer = subject.model(stage), subject.tokenizers[stage]
    rows = []
    for number, text in enumerate(map(str.strip, cfg.sentences.split(";")), 1):
        ids = tokenizer.encode(text)
        if not 2 <= len(ids) <= model.cfg.seq_len:
            wanted = f"2 to seq_len={model.cfg.seq_len} (sentences are separated by ;)"
            raise UserError(f"sentence {text!r} has {len(ids)} tokens: give one of {wanted}")
        maps = attention_maps(model, torch.tensor([ids], device=subject.device))
        heads = by_head(head_numbers(maps), model.cfg.sinks, where=f"sentence {number} ")
        # One sentence has no interval.
        rows += [replace(x, estimate=Estimate(x.estimate.value, x.estimate.n)) for x in heads]
        tokens = map(tokenizer.token_bytes, ids)
        kept = {"text": text, "tokens": [token.decode("utf-8", "replace") for token in tokens]}
        kept |= {"sinks": model.cfg.sinks, "maps": maps[:, 0].double().numpy().round(5).tolist()}
        write_jsonl(f"{cfg.out_dir}/attention/{stage}_{number}.jsonl", [kept])
    return [replace(row, split="sentences") for row in rows]
