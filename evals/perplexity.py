"""Perplexity under named protocols, of our models and of baselines by the same code."""

import re

import numpy as np

from corpus.sources import documents
from corpus.tokenizer import Tokenizer
from evals.base import PROTOCOLS, Row
from evals.stats import ratio
from inference.scoring import Window, windows_nll
from model import GPT


def disjoint(ids: list[int], length: int) -> list[Window]:
    """Return windows of `length` ids; the first id of each has no context and is not scored."""
    parts = [ids[i : i + length] for i in range(0, len(ids), length)]
    return [Window(part, len(part) - 1) for part in parts if len(part) > 1]


def strided(ids: list[int], length: int, stride: int) -> list[Window]:
    """Return windows of `length` ids that move by stride; all ids but the first are scored once."""
    windows, done = [], 1
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        if end > done:
            windows.append(Window(ids[begin:end], end - done))
            done = end
    return windows


def rolling(ids: list[int], length: int, bos: int) -> list[Window]:
    """Return lm-evaluation-harness's rolling windows, in which all ids are scored."""
    ids = [bos, *ids]  # the context of a window's first id is one id, BOS or EOS at the start
    windows = []
    for i in range(0, len(ids) - 1, length):
        begin = max(0, min(i, len(ids) - 1 - length))  # the last one reaches back
        end = min(i + length + 1, len(ids))
        windows.append(Window(ids[begin:end], end - i - 1))
    return windows


def lines_alone(text: str, tokenizer: Tokenizer, length: int) -> list[Window]:
    """Return the first 100 lines that are not empty as windows of their own."""
    lines = [line for line in text.split("\n") if line.strip()][:100]
    parts = [tokenizer.encode(line)[:length] for line in lines]
    return [Window(ids, len(ids) - 1) for ids in parts if len(ids) > 1]


def perplexity(
    model: GPT, tokenizer: Tokenizer, text: str, protocols: tuple[str, ...] = PROTOCOLS
) -> list[Row]:
    """Return a row for the same text under each protocol.

    per_line  100 non-empty lines, each alone, at most 512 ids, first id not scored  [40.64, valid]
    tokens    windows of seq_len, first id of each not scored: exp(nats / ids)        [29.94, test]
    strided   the same, windows move by seq_len / 2                                   [25.2, test]
    words     per article, detokenised: exp(nats / whitespace words of the original)  [37.37, test]
    bpb       the same nats / (ln 2 * UTF-8 bytes of the original)

    The figures are GPT-2 small's; README.md says whose they are. words and bpb are lm-eval's task
    wikitext, and compare models of any tokenizer.
    """
    rows, windows = [], {}
    length = model.cfg.seq_len
    if "per_line" in protocols:
        windows["per_line"] = lines_alone(text, tokenizer, min(512, length))
    whole = tokenizer.encode(text) if {"tokens", "strided"} & set(protocols) else []
    if "tokens" in protocols:
        windows["tokens"] = disjoint(whole, length)
    if "strided" in protocols:
        windows["strided"] = strided(whole, length, length // 2)
    for protocol, own in windows.items():
        loss = ratio(windows_nll(model, own), [window.n_scored for window in own], "exp")
        rows.append(Row("perplexity", protocol, loss))
    articles = articles_of(text) if {"words", "bpb"} & set(protocols) else []
    ids = [tokenizer.encode(detokenize(article)) for article in articles]
    nll = [sum(windows_nll(model, rolling(own, length, tokenizer.bos))) for own in ids]
    if "words" in protocols:
        # The harness counts so: the empty strings at both ends are words too.
        words = [len(re.split(r"\s+", article)) for article in articles]
        rows.append(Row("perplexity", "words", ratio(nll, words, "exp")))
    if "bpb" in protocols:
        n_bytes = [len(article.encode()) for article in articles]
        rows.append(Row("bits_per_byte", "bpb", ratio(nll, n_bytes, "bits")))
    return rows


def articles_of(text: str) -> list[str]:
    """Return the articles of a text in WikiText's form, as the harness's data set cuts them."""
    lines = re.findall(r"[^\n]*\n", text + "\n")  # splitlines would cut at U+2028 too
    # The pages of the data set lack the newline before the next heading.
    return [text.removesuffix("\n") for text in documents(lines, True) if text.strip()]


PUNCTUATION = [  # WikiText's marks and what they stand for, after lm-eval's wikitext
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
]
BRACKETS = ((r"\(", r"\)"), (r"\[", r"\]"), ("{", "}"), ('"', '"'), ("'", "'"))
OTHERS = [
    *(("= = = =", "===="), ("= = =", "==="), ("= =", "==")),
    *((" " + chr(176) + " ", chr(176)), (" \n", "\n"), ("\n ", "\n")),
    *((" N ", " 1 "), (" 's", "'s")),
]


def detokenize(text: str) -> str:
    """Return WikiText's marked text as plain text."""
    text = text.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", "/'[0-9]/", text)  # the digit is lost: the harness's own slip
    for mark, plain in PUNCTUATION:
        text = text.replace(mark, plain)
    for opening, closing in BRACKETS:
        pattern = rf"{opening}\s*([^{closing}]*?)\s*{closing}"
        text = re.sub(pattern, lambda m: m[0][0] + m[1] + m[0][-1], text)
    for mark, plain in OTHERS:
        text = text.replace(mark, plain)
    return text


def run_hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """Return a 64-bit hash of every run of n ids: (len - n + 1,)."""
    ids, multiplier = ids.astype(np.uint64) + np.uint64(1), np.uint64(0x9E3779B97F4A7C15)
    hashes = np.zeros(max(0, len(ids) - n + 1), np.uint64)
    for j in range(n):  # a polynomial of the ids, modulo 2^64
        hashes = hashes * multiplier + ids[j : j + len(hashes)]
    return hashes ^ (hashes >> np.uint64(29))


def overlap(ids: np.ndarray, shards: list[np.ndarray], n: int = 13, chunk: int = 1 << 22) -> float:
    """Return the share of a text's runs of n ids that stand in the shards."""
    # GPT-3's measure of contamination (arXiv 2005.14165, appendix C), of tokens
    wanted, inverse = np.unique(run_hashes(ids, n), return_inverse=True)
    if not len(wanted):
        return 0.0
    found = np.zeros(len(wanted), bool)
    # Most runs of the shards are ruled out by their first 24 bits.
    table = np.zeros(1 << 24, bool)
    table[wanted >> np.uint64(40)] = True
    for shard in shards:
        for first in range(0, len(shard), chunk):
            hashes = run_hashes(np.asarray(shard[first : first + chunk + n - 1]), n)
            hashes = hashes[table[hashes >> np.uint64(40)]]
            place = np.searchsorted(wanted, hashes).clip(max=len(wanted) - 1)
            found[place[wanted[place] == hashes]] = True
    return float(found[inverse].mean())
