"""Attention sinks and streaming: loss against position far beyond the training context, and what every head looks at.

    python eval.py --out_dir=out/streaming --tasks=streaming --streaming=novels        # every run in the folder; config/streaming.py trains two
    python eval.py --out_dir=out/streaming --tasks=attention --sentences="A sentence to look at.;Another."

Three ways to read a stream of 16 times the training context (seq_len), for the question of arXiv 2309.17453:

    rolling      a KV cache of seq_len slots, token by token: what sample.py does. Memory and time per token are constant
    dense        every token sees all before it: the cache grows, and RoPE meets distances that training never had
    recompute    the last seq_len tokens from scratch for every token: no key knows of anything older, at the cost of seq_len tokens each

Rolling that is as good as recompute is stable, no more. No key is older than the cache (those of upper layers were formed when older tokens were
still there, and carry a little of them), so this says nothing about recall, and loss on ordinary text could not show it.
"""

import os
import time

import numpy as np
import torch
import torch.nn.functional as F

import data
from configurator import UserError
from model import GPT, KVCache, attention_weights, training_mask
from stats import difference, ratio

FACTOR = 16  # training contexts in a stream


# ---------------------------------------------------------------------------------------------------------------------
# Three ways to read a stream. ids (n, P + 1) -> nats of each of the P predictions, the p-th given the tokens up to p: (n, P)


def clock(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def cached(model: GPT, ids, slots: int):
    """Token by token through a cache that rolls when its slots are full. -> nats (n, P), ms of each step (P,), the cache's bytes"""
    cache = KVCache(model.cfg, len(ids), slots, ids.device, model.embed.weight.dtype)
    nll, ms = [], []
    for p in range(ids.size(1) - 1):
        began = clock(ids.device)
        nll.append(
            -model.logprobs(model.hidden(ids[:, p : p + 1], cache=cache), ids[:, p + 1 : p + 2])
        )
        ms.append(1e3 * (clock(ids.device) - began))
    return torch.cat(nll, dim=1), np.array(ms), cache.k.nbytes + cache.v.nbytes


@torch.no_grad()
def dense(model: GPT, ids, batch: int = 4):
    """One forward pass over whole streams, `batch` at a time: the loss that a cache of all tokens would give."""
    return torch.cat(
        [-model.logprobs(model.hidden(rows[:, :-1]), rows[:, 1:]) for rows in ids.split(batch)]
    )


@torch.no_grad()
def recomputed(model: GPT, ids, positions):
    """At these positions only, each from the last seq_len tokens alone. -> nats (n, len(positions)), ms of each (len(positions),)"""
    nll, ms = [], []
    for p in positions:
        began = clock(ids.device)
        x = model.hidden(ids[:, max(0, p + 1 - model.cfg.seq_len) : p + 1])
        nll.append(-model.logprobs(x[:, -1:], ids[:, p + 1 : p + 2]))
        ms.append(1e3 * (clock(ids.device) - began))
    return torch.cat(nll, dim=1), np.array(ms)


# ---------------------------------------------------------------------------------------------------------------------
# What the heads look at


@torch.no_grad()
def attention_maps(model: GPT, ids):
    """Weights of every layer and head on ids (B, T), a copy from the forward pass: (layers, B, H, T, T + 1), the sink last (0 without sinks)."""
    maps, T = [], ids.size(1)
    mask = training_mask(
        None, model.cfg.sliding_window, T, torch.device("cpu")
    )  # as numbers on every device

    def record(attn, args, output):
        q, k, _ = attn.project(*args[:3])
        weights = attention_weights(q, k, attn.sinks, mask if mask is None else mask.to(q))
        maps.append(F.pad(weights, (0, T + 1 - weights.size(-1))).float().cpu())

    hooks = [block.attn.register_forward_hook(record) for block in model.blocks]
    try:
        model.hidden(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(maps)


def entropy(maps):
    """nats of each query's attention over the tokens, the sink set aside: maps (..., T, T + 1) -> (..., T)"""
    tokens = maps[..., :-1]
    return torch.special.entr(tokens / tokens.sum(-1, keepdim=True)).sum(-1)


def head_numbers(maps) -> dict:
    """Of every query, from maps (layers, B, H, T, T + 1): (layers, B, H, T) each."""
    return {
        "attention_entropy": entropy(maps),
        "first_token_share": maps[..., 0],
        "sink_share": maps[..., -1],
    }


def by_head(numbers: dict, sinks: bool, skip: int = 0, where: str = "") -> list[dict]:
    """Means over all queries but the first `skip`, beside what a head has that looks at all it can see alike, which the i-th query (without
    a window) has with entropy ln i, 1/i for the first token, or 1/(i + 1) for the sink. Independent parts are the rows B."""
    layers, B, H, T = numbers["attention_entropy"].shape
    i = torch.arange(1 + skip, 1 + T)
    uniform = {"attention_entropy": i.log(), "first_token_share": 1 / i} | (
        {"sink_share": 1 / (i + 1)} if sinks else {}
    )
    return [
        {
            "metric": metric,
            "protocol": f"{where}layer {layer + 1} head {head + 1}",
            "layer": layer + 1,
            "head": head + 1,
            "uniform": uniform[metric].mean().item(),
            **ratio(numbers[metric][layer, :, head, skip:].double().sum(-1).tolist(), [len(i)] * B),
        }
        for metric in uniform
        for layer in range(layers)
        for head in range(H)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The tasks of eval.py


def streams(bench, length: int):
    """Validation rows of length + 1 tokens: (n_streams or fewer, length + 1); and whether each lies in one document, as all do where any does."""
    try:
        rows = data.Mixture(
            bench.cfg.streaming,
            bench.cfg.data_dir,
            "val",
            length,
            0,
            bench.tokenizer,
            bench.headerless,
        )
    except UserError as error:
        raise UserError(
            f"streaming={bench.cfg.streaming} does not give validation text in streams of {FACTOR} x seq_len = {length} tokens: "
            f"{error}"
        ) from None
    ids = rows.validation(0, min(rows.n_rows, 16 * bench.cfg.n_streams))
    whole = ids[(ids != bench.tokenizer.eos).all(1)]
    if not len(whole):
        print(
            f"eval streaming: no document of {bench.cfg.streaming} has {length} tokens; the streams run on from one to the next, "
            "and what is old is of no use"
        )
    return (whole if len(whole) else ids)[: bench.cfg.n_streams].to(bench.device), len(whole) > 0


def mean_loss(nll, chosen) -> dict:
    """Of the chosen columns of nats (n, P); the streams are the independent parts."""
    nll = nll.cpu()[:, chosen].double()
    return ratio(nll.sum(1).tolist(), [nll.size(1)] * len(nll))


def buckets(metric: str, how: str, at, width: int, row_of) -> list[dict]:
    """A row for every `width` positions: row_of(which of the positions `at` are in it) -> value, n, ..."""
    starts = np.unique(at // width) * width
    return [
        {
            "metric": metric,
            "protocol": f"{how} {first}-{first + width - 1}",
            "position": int(first),
            "width": width,
            **row_of(at // width == first // width),
        }
        for first in starts
    ]


def against_recompute(losses: dict, T: int, at) -> list[dict]:
    """Loss within and beyond the training context at the positions `at`, where all are known; recompute is the yardstick."""
    rows = []
    for metric, chosen in (("loss_within_context", at < T), ("loss_beyond_context", at >= T)):
        means = {how: mean_loss(nll, chosen) for how, nll in losses.items()}
        rows += [{"metric": metric, "protocol": how, **row} for how, row in means.items()]
        rows += [
            {
                "metric": metric,
                "protocol": f"{how} - recompute",
                **difference(means["recompute"]["items"], means[how]["items"]),
            }
            for how in ("rolling", "dense")
        ]
    return rows


def streaming(bench, stage: str) -> list[dict]:
    """Loss, ms per token and cache bytes by position, in buckets of half a training context; what the heads give to sink and first token.
    recompute takes eight positions of every training context, and so do the comparisons with it. Time and memory are of one stream; the time is
    the fastest of a bucket, because what else runs on the machine only adds to it."""
    model, rows = bench.model(stage), []
    T, P, width = model.cfg.seq_len, FACTOR * model.cfg.seq_len, max(1, model.cfg.seq_len // 2)
    ids, one_document = streams(bench, P)
    every, few, one = np.arange(P), np.arange(width // 8, P, max(1, width // 4)), ids[:1]
    nll = {
        "rolling": cached(model, ids, T)[0],
        "dense": dense(model, ids),
        "recompute": recomputed(model, ids, few)[0],
    }
    (_, rolling_ms, rolling_bytes), (_, dense_ms, dense_bytes) = (
        cached(model, one, T),
        cached(model, one, P),
    )
    for how, at, ms in (
        ("rolling", every, rolling_ms),
        ("dense", every, dense_ms),
        ("recompute", few, recomputed(model, one, few)[1]),
    ):
        rows += buckets(
            "loss_at_position",
            how,
            at,
            width if at is every else T,
            lambda chosen: mean_loss(nll[how], chosen),
        )
        rows += buckets(
            "ms_per_token",
            how,
            at,
            width,
            lambda chosen: {"value": float(ms[chosen].min()), "n": int(chosen.sum())},
        )
    for how, size in (
        ("rolling", lambda end: rolling_bytes),
        ("dense", lambda end: dense_bytes * int(end) // P),
    ):
        rows += buckets(
            "cache_bytes",
            how,
            every,
            width,
            lambda chosen: {"value": size(every[chosen][-1] + 1), "n": 1},
        )
    rows += against_recompute(
        {how: x if how == "recompute" else x[:, few] for how, x in nll.items()}, T, few
    )
    parts = [
        head_numbers(attention_maps(model, row)) for row in ids[:, :T].split(1)
    ]  # one at a time: maps are large
    rows += by_head(
        {key: torch.cat([part[key] for part in parts], dim=1) for key in parts[0]},
        model.cfg.sinks,
        T // 2,
    )
    return [{"split": "val", "seq_len": T, "one_document": one_document, **row} for row in rows]


def attention(bench, stage: str) -> list[dict]:
    """Every head's numbers on each of the given sentences, and the mean over the heads; the weights themselves are kept in attention/ for
    report.py to draw. The untrained model stands beside the trained ones: what it has too is no finding."""
    model, rows = bench.model(stage), []
    for number, text in enumerate(filter(None, map(str.strip, bench.cfg.sentences.split(";"))), 1):
        ids = bench.tokenizer.encode(text)
        if not 2 <= len(ids) <= model.cfg.seq_len:
            raise UserError(
                f"sentence {text!r} has {len(ids)} tokens: give one of 2 to seq_len={model.cfg.seq_len} (sentences are separated by ;)"
            )
        maps = attention_maps(model, torch.tensor([ids], device=bench.device))
        heads = [
            {
                key: value for key, value in row.items() if key not in ("low", "high", "items")
            }  # one sentence has no interval
            for row in by_head(head_numbers(maps), model.cfg.sinks, where=f"sentence {number} ")
        ]
        rows += heads
        for metric in dict.fromkeys(row["metric"] for row in heads):
            own = [row for row in heads if row["metric"] == metric]
            rows.append(
                {
                    "metric": metric,
                    "protocol": f"sentence {number}",
                    "uniform": own[0]["uniform"],
                    "n": len(own),
                    "value": sum(row["value"] for row in own) / len(own),
                }
            )
        tokens = [
            bench.tokenizer.bpe.decode_single_token_bytes(i).decode("utf-8", "replace") for i in ids
        ]
        data.write_jsonl(
            os.path.join(bench.cfg.out_dir, "attention", f"{stage}_{number}.jsonl"),
            [
                {
                    "text": text,
                    "tokens": tokens,
                    "sinks": model.cfg.sinks,
                    "maps": maps[:, 0].double().numpy().round(5).tolist(),
                }
            ],
        )
    return [{**row, "split": "sentences"} for row in rows]
