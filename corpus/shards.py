"""Shards: files of tokens, and mixtures of them as shuffled rows for pretraining.

A shard has a header of 256 int32, then uint16 tokens: shards of llm.c and modded-nanogpt load too.
The order of the rows is a pure function of the seed and the row number.
"""

import functools
import hashlib
import math
import os
import struct
import zlib

import numpy as np
import torch
from torch import Tensor

from configurator import UserError
from corpus.tokenizer import Tokenizer
from runtime.files import write_atomic

MAGIC, VERSION, HEADER = 20240520, 1, 256
# Header words of our own, 0 in shards of llm.c: 3-4 tokenizer hash, 5 vocabulary, 6 EOS, 7 crc32
SHARD_TOKENS = 100_000_000
AGAIN = "make it again with data.py"
EXAMPLE = "write name*0.7,other*0.3"


def hash_words(digest: str) -> tuple[int, int]:
    """Return the two int32 that stand for a tokenizer's hash in the header."""
    return struct.unpack("<ii", hashlib.sha256(digest.encode()).digest()[:8])


def write_shard(path: str, tokens: np.ndarray, tokenizer: Tokenizer) -> None:
    """Write ids (n,) as a shard, all or nothing. Raises UserError for an id that would wrap."""
    n_ids = tokenizer.vocab_size
    if n_ids > 65_536:
        raise UserError(f"{n_ids} ids are more than uint16 can hold: choose another tokenizer")
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < n_ids:
        bad = tokens.min() if tokens.min() < 0 else tokens.max()
        raise UserError(f"token id {bad} of {path} is not in the vocabulary of {n_ids} ids")
    tokens = tokens.astype("<u2")
    header = np.zeros(HEADER, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    header[3:7] = *hash_words(tokenizer.hash), n_ids, tokenizer.eos
    header[7:8] = np.array([zlib.crc32(tokens)], "<u4").view("<i4")
    write_atomic(path, lambda f: f.writelines([header, tokens]), tokens.nbytes)


def read_shard(path: str, tokenizer: Tokenizer, headerless: bool = False) -> np.ndarray:
    """Return the tokens of a shard, mapped into memory: (n,) uint16.

    Raises UserError where the file is not what its header says, or of another tokenizer.
    """
    if not os.path.isfile(path):
        raise UserError(f"shard {path} does not exist: {AGAIN}")
    if headerless:  # as nanoGPT writes it
        size = os.path.getsize(path)
        if size == 0 or size % 2:
            raise UserError(f"{path} has {size} bytes, expected an even number above 0: uint16")
        return np.memmap(path, "<u2", "r")
    header = read_header(path)
    count = int(header[2])
    tokens = np.memmap(path, "<u2", "r", 4 * HEADER) if count else np.zeros(0, "<u2")
    ours = header[5] != 0  # llm.c's shards say nothing of the tokenizer and have no checksum
    if ours and tuple(header[3:5]) != hash_words(tokenizer.hash):
        this = f"{tokenizer.name} ({tokenizer.vocab_size} ids)"
        what = f"shard {path} was made with another tokenizer ({header[5]} ids) than {this}"
        raise UserError(f"{what}: {AGAIN}, or choose its tokenizer")
    if ours and zlib.crc32(tokens) != int(header[7:8].view("<u4")[0]):
        raise UserError(f"shard {path} is damaged (checksum): {AGAIN}")
    return tokens


def read_header(path: str) -> np.ndarray:
    """Return the header of a shard whose size is the one that the header promises."""
    size, least = os.path.getsize(path), 4 * HEADER
    if size < least:
        raise UserError(f"shard {path} has {size} bytes, expected at least {least}: {AGAIN}")
    header = np.fromfile(path, "<i4", HEADER)
    if header[0] != MAGIC:
        what = f"{path} is not a token shard (magic {header[0]}, expected {MAGIC})"
        raise UserError(f"{what}: {AGAIN}; nanoGPT's files need --headerless")
    if header[1] != VERSION:
        raise UserError(f"shard {path} has version {header[1]}, expected {VERSION}: {AGAIN}")
    count = int(header[2])
    expected = least + 2 * count
    if count < 0 or size != expected:
        what = f"shard {path} promises {count} tokens = {expected} bytes and has {size}"
        raise UserError(f"{what}: it is truncated or damaged, {AGAIN}")
    return header


@functools.lru_cache(maxsize=8)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def shuffled_index(number: int, n: int, seed: int) -> tuple[int, int]:
    """Return epoch and index of a draw; every epoch draws each index once, in its own order."""
    epoch, place = divmod(number, n)
    return epoch, int(permutation(n, seed, epoch)[place])


def parse_mixture(spec: str) -> list[tuple[str, float]]:
    """Return names and weights of "a*0.7,b*0.3"; the weights sum to 1 and are equal if left out."""
    parts = []
    for item in filter(None, spec.split(",")):
        name, _, weight = item.strip().partition("*")
        try:
            parts.append((name, float(weight or 1)))
        except ValueError:
            raise UserError(f"mixture {spec!r}: {weight!r} is not a weight; {EXAMPLE}") from None
    total = sum(weight for _, weight in parts)
    faulty = any(weight < 0 or not name for name, weight in parts)
    if faulty or not 0 < total < math.inf:
        raise UserError(f"mixture {spec!r} names no data, or a weight below 0; {EXAMPLE}")
    return [(name, weight / total) for name, weight in parts]


class Stream:
    """A Stream cuts shards into rows of seq_len + 1 tokens; a row's last is the next's first."""

    def __init__(self, paths: list[str], seq_len: int, tokenizer: Tokenizer, headerless: bool):
        self.paths, self.seq_len, self.tokenizer = paths, seq_len, tokenizer
        self.shards = [read_shard(path, tokenizer, headerless) for path in paths]
        rows = [max(0, len(shard) - 1) // seq_len for shard in self.shards]
        self.ends = np.cumsum(rows)  # of each shard: rows up to its end
        self.n_rows = sum(rows)
        if self.n_rows == 0:
            total = sum(len(shard) for shard in self.shards)
            what = f"{', '.join(paths)}: {total} tokens, fewer than seq_len + 1 = {seq_len + 1}"
            raise UserError(f"{what}: take more data or a smaller --seq_len")

    def row(self, index: int, epoch: int = 0) -> np.ndarray:
        """Return a row: (seq_len + 1,). Raises UserError for an id that the vocabulary lacks."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        shard = self.shards[number]
        rows_before = int(self.ends[number - 1]) if number else 0
        slack = (len(shard) - 1) % self.seq_len  # tokens that the rows leave over
        shift = epoch * 7919 % (slack + 1)  # so that each epoch cuts at another place
        start = (index - rows_before) * self.seq_len + shift
        tokens = shard[start : start + self.seq_len + 1]
        if tokens.max() >= self.tokenizer.vocab_size:
            what = f"{self.paths[number]} has id {tokens.max()} near token {start}"
            known = f"the vocabulary {self.tokenizer.vocab_size} ids"
            raise UserError(f"{what}, {known}: it is damaged or of another tokenizer")
        return tokens


def shard_paths(folder: str, split: str) -> list[str]:
    """Return the shards of a split in a folder. Raises UserError where there is none."""
    hint = f"make it with data.py --sources={os.path.basename(folder)}"
    if not os.path.isdir(folder):
        raise UserError(f"there is no data at {folder}: {hint}")
    names = [name for name in os.listdir(folder) if split in name and name.endswith(".bin")]
    if not names:
        raise UserError(f"there is no {split} shard (*{split}*.bin) in {folder}: {hint}")
    return sorted(os.path.join(folder, name) for name in names)


class Mixture:
    """A Mixture gives each source its exact share of every 1,000 rows, in a seeded order."""

    BLOCK = 1000

    def __init__(
        self,
        spec: str,
        data_dir: str,
        split: str,
        seq_len: int,
        seed: int,
        tokenizer: Tokenizer,
        headerless: bool = False,
    ):
        names, weights = zip(*parse_mixture(spec), strict=True)
        paths = [shard_paths(os.path.join(data_dir, name), split) for name in names]
        self.streams = [Stream(found, seq_len, tokenizer, headerless) for found in paths]
        self.seed = seed
        self.n_rows = sum(stream.n_rows for stream in self.streams)
        edges = np.round(np.cumsum([0, *weights]) * self.BLOCK).astype(int)
        self.shares = np.diff(edges)  # rows of each source in a block
        sources = np.repeat(np.arange(len(names)), self.shares)
        # Of each place in a block: its source, and the rows of that source before it
        self.source_of = np.random.default_rng([seed, 7]).permutation(sources)
        self.place_of = [(self.source_of[:i] == s).sum() for i, s in enumerate(self.source_of)]
        self.fingerprint = fingerprint(spec, self.streams)

    def shuffled(self, first: int, last: int) -> Tensor:
        """Return rows first to last of an endless sequence: (last - first, seq_len + 1) int64."""
        rows = []
        for number in range(first, last):
            block, place = divmod(number, self.BLOCK)
            source = self.source_of[place]
            stream = self.streams[source]
            draw = block * int(self.shares[source]) + int(self.place_of[place])
            epoch, index = shuffled_index(draw, stream.n_rows, self.seed)
            rows.append(stream.row(index, epoch))
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def validation(self, first: int, last: int) -> Tensor:
        """Return rows first to last of all rows, each once: (last - first, seq_len + 1) int64.

        The order is the same for all seeds, and the first rows are a fair sample of all sources.
        """
        rows = []
        for number in permutation(self.n_rows, 0, 0)[first:last]:
            for stream in self.streams:
                if number < stream.n_rows:
                    rows.append(stream.row(number))
                    break
                number -= stream.n_rows
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def fingerprint(spec: str, streams: list[Stream]) -> str:
    """Return 16 digits that change with the mixture and with the beginning of every shard."""
    digest = hashlib.sha256(spec.encode())
    for stream in streams:
        for path, shard in zip(stream.paths, stream.shards, strict=True):
            start = zlib.crc32(shard[:65536])
            digest.update(f"{os.path.basename(path)} {len(shard)} {start}".encode())
    return digest.hexdigest()[:16]
