"""Perplexity: sums of negative log-likelihood over windows of text, under named protocols; ours and transformers' GPT-2 by the same code."""

import os
import re
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import data
from configurator import UserError
from model import GPT
from stats import ratio

PROTOCOLS = ("per_line", "tokens", "strided", "words", "bpb")


class Peer(torch.nn.Module):
    """transformers' GPT-2 from a folder (GPT-2, DistilGPT-2, ...; nothing is downloaded), with the part of our GPT that windows_nll uses.
    Raises UserError where it cannot be loaded whole: from_pretrained alone would fill what is missing with random weights and go on."""

    def __init__(self, folder: str, tokenizer):
        super().__init__()
        try:
            from transformers import GPT2LMHeadModel
        except ImportError:
            raise UserError(
                f"baseline {folder} needs the transformers library: pip install -r requirements-peers.txt"
            ) from None
        if not os.path.isfile(os.path.join(folder, "config.json")):
            raise UserError(
                f"baseline {folder} is no folder of a transformers model: it has no config.json"
            )
        try:
            self.model, info = GPT2LMHeadModel.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
        except Exception as error:  # whatever the library raises at a damaged file, another shape or another architecture
            raise UserError(
                f"baseline {folder} cannot be loaded ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]})"
            ) from None
        info["unexpected_keys"] = [
            name for name in info["unexpected_keys"] if not name.endswith(".attn.masked_bias")
        ]  # a constant of older versions
        odd = [
            f"{what.replace('_', ' ')} {sorted(map(str, names))[:3]}"
            for what, names in info.items()
            if names
        ]
        if odd:
            raise UserError(f"baseline {folder} is not a whole GPT-2: {', '.join(odd)}")
        vocab_size = self.model.config.vocab_size
        if vocab_size != tokenizer.eos + 1:
            raise UserError(
                f"baseline {folder} has {vocab_size} ids, the tokenizer {tokenizer.name} has {tokenizer.eos + 1} with <|endoftext|>: "
                "only models of GPT-2's own vocabulary can be compared"
            )
        self.cfg = SimpleNamespace(seq_len=self.model.config.n_positions)

    def hidden(self, idx):
        return self.model.transformer(idx, use_cache=False).last_hidden_state

    def logprobs(self, x, targets):
        """log p(target) at every position (B, T); 0 where target < 0. In parts: all logits at once would be gigabytes."""
        parts = [
            -F.cross_entropy(self.model.lm_head(h).float(), t, ignore_index=-1, reduction="none")
            for h, t in zip(x.flatten(0, 1).split(1024), targets.flatten().split(1024))
        ]
        return torch.cat(parts).view(targets.shape)


@torch.no_grad()
def windows_nll(
    model: GPT | Peer, windows: list[tuple[list[int], int]], batch: int = 16
) -> list[float]:
    """nats of each window: (ids, k) scores the last k of its ids, each given all ids before it in the window."""
    device, nll = next(model.parameters()).device, [0.0] * len(windows)
    order = sorted(range(len(windows)), key=lambda i: len(windows[i][0]))
    for first in range(0, len(order), batch):
        numbers = order[first : first + batch]
        width = max(len(windows[i][0]) for i in numbers) - 1
        idx = torch.zeros(len(numbers), width, dtype=torch.long)
        targets = torch.full((len(numbers), width), -1)
        for row, i in enumerate(numbers):
            ids, scored = windows[i]
            end = len(ids) - 1
            idx[row, :end] = torch.tensor(ids[:-1])
            targets[row, end - scored : end] = torch.tensor(ids[len(ids) - scored :])
        logp = model.logprobs(model.hidden(idx.to(device)), targets.to(device))
        for i, value in zip(numbers, logp.sum(-1).tolist()):
            nll[i] = -value
    return nll


def disjoint(ids: list[int], length: int) -> list[tuple[list[int], int]]:
    """Windows of `length` ids; the first id of each has no context and is not scored."""
    parts = [ids[i : i + length] for i in range(0, len(ids), length)]
    return [(part, len(part) - 1) for part in parts if len(part) > 1]


def strided(ids: list[int], length: int, stride: int) -> list[tuple[list[int], int]]:
    """Windows of `length` ids that move by stride: every id but the first is scored once, with as much context as fits."""
    windows, done = [], 1
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        if end > done:
            windows.append((ids[begin:end], end - done))
            done = end
    return windows


def rolling(ids: list[int], length: int, eos: int) -> list[tuple[list[int], int]]:
    """lm-evaluation-harness's rolling windows: all ids scored; the context of a window's first is one id (EOS at the start)."""
    ids = [eos, *ids]
    return [
        (
            ids[max(0, min(i, len(ids) - 1 - length)) : i + length + 1],
            len(ids[i + 1 : i + length + 1]),
        )
        for i in range(0, len(ids) - 1, length)
    ]


DETOKENIZE = [  # WikiText's marks back into plain text, after lm-evaluation-harness's wikitext task
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" " + chr(176) + " ", chr(176)),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]


def detokenize(text: str) -> str:
    text = re.sub(
        r"/' [0-9]/", "/'[0-9]/", text.replace("s '", "s'")
    )  # the digit is lost: the harness's own slip
    for mark, plain in DETOKENIZE[:9]:
        text = text.replace(mark, plain)
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]"), ("{", "}"), ('"', '"'), ("'", "'")):
        text = re.sub(
            rf"{opening}\s*([^{closing}]*?)\s*{closing}", lambda m: m[0][0] + m[1] + m[0][-1], text
        )
    for mark, plain in DETOKENIZE[9:]:
        text = text.replace(mark, plain)
    return text


def perplexity(
    model: GPT | Peer, tokenizer, text: str, protocols: tuple[str, ...] = PROTOCOLS
) -> list[dict]:
    """The same text under each protocol (figures of GPT-2 small in brackets; README.md says whose):

    per_line  first 100 non-empty lines, each alone, at most 512 ids, first id not scored: exp(nats / ids)  [40.64 on valid]
    tokens    whole text, windows of seq_len, first id of each not scored: exp(nats / ids)                  [29.94 on test]
    strided   the same, windows move by seq_len / 2                                                         [25.2 on test]
    words     per article, detokenised, rolling windows: exp(nats / whitespace words of the original)       [37.37 on test]
    bpb       the same nats / (ln 2 * UTF-8 bytes of the original)

    words and bpb are lm-evaluation-harness's task wikitext, and compare models of any tokenizer; its pages lack the newline before the next heading.
    """
    T = model.cfg.seq_len
    results = []

    def add(protocol, nll, counts, transform="exp"):
        results.append(
            {
                "metric": "bits_per_byte" if protocol == "bpb" else "perplexity",
                "protocol": protocol,
                **ratio(nll, counts, transform),
            }
        )

    lines = [line for line in text.split("\n") if line.strip()][:100]
    plain = {
        "per_line": lambda: [
            (ids, len(ids) - 1)
            for ids in (tokenizer.encode(line)[: min(512, T)] for line in lines)
            if len(ids) > 1
        ],
        "tokens": lambda: disjoint(tokenizer.encode(text), T),
        "strided": lambda: strided(tokenizer.encode(text), T, T // 2),
    }
    for protocol in filter(protocols.__contains__, plain):
        windows = plain[protocol]()
        add(protocol, windows_nll(model, windows), [scored for _, scored in windows])
    if "words" in protocols or "bpb" in protocols:
        articles = [
            article.removesuffix("\n")
            for article in data.wikitext_articles(re.findall(r"[^\n]*\n", text + "\n"))
            if article.strip()
        ]
        nll = [
            sum(
                windows_nll(model, rolling(tokenizer.encode(detokenize(article)), T, tokenizer.eos))
            )
            for article in articles
        ]
        if "words" in protocols:
            add("words", nll, [len(re.split(r"\s+", article)) for article in articles])
        if "bpb" in protocols:
            add("bpb", nll, [len(article.encode()) for article in articles], "bits")
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Contamination


def run_hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """A 64-bit hash of every run of n ids: (len - n + 1,)"""
    ids, multiplier = ids.astype(np.uint64) + np.uint64(1), np.uint64(0x9E3779B97F4A7C15)
    hashes = np.zeros(max(0, len(ids) - n + 1), np.uint64)
    for j in range(n):  # a polynomial of the ids, modulo 2^64
        hashes = hashes * multiplier + ids[j : j + len(hashes)]
    return hashes ^ (hashes >> np.uint64(29))


def overlap(ids: np.ndarray, shards: list[np.ndarray], n: int = 13, chunk: int = 1 << 22) -> float:
    """Share of a text's runs of n ids that stand in the training shards too (GPT-3's 13-grams, arXiv 2005.14165 appendix C, of tokens)."""
    wanted, inverse = np.unique(run_hashes(ids, n), return_inverse=True)
    found, table = np.zeros(len(wanted), bool), np.zeros(1 << 24, bool)
    table[wanted >> np.uint64(40)] = (
        True  # most runs of the shards are ruled out by their first 24 bits
    )
    for shard in shards:
        for first in range(0, len(shard), chunk):
            hashes = run_hashes(np.asarray(shard[first : first + chunk + n - 1]), n)
            hashes = hashes[table[hashes >> np.uint64(40)]]
            place = np.searchsorted(wanted, hashes).clip(max=max(0, len(wanted) - 1))
            found[place[wanted[place] == hashes]] = True
    return float(found[inverse].mean()) if len(wanted) else 0.0
