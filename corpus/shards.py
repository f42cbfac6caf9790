"""Shards: files of tokens, and mixtures of them as shuffled rows for pretraining.

A shard has a header of 256 int32, then uint16 tokens: shards of llm.c and modded-nanogpt load too.
The order of the rows is a pure function of the seed and the row number.
"""

import functools
import glob
import hashlib
import math
import os
import re
import struct
import zlib

import numpy as np
import torch
from torch import Tensor

from configurator import UserError
from corpus.sources import check_made, how_to_make
from corpus.tokenizer import Tokenizer
from runtime.files import write_atomic

MAGIC, VERSION, HEADER = 20240520, 1, 256
LLAMA_3 = 20240801  # llm.c's magic for shards of uint32
# Header words of our own, 0 in shards of llm.c: 3-4 tokenizer hash, 5 vocabulary, 6 EOS, 7 crc32
SHARD_TOKENS = 100_000_000
AGAIN = "make it again with data.py"
# Words in a file's name -> the split that they say
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}


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

    headerless: a file of bare uint16, as nanoGPT writes it. Raises UserError where the file is not
    what its header says, or of another tokenizer.
    """
    if not os.path.isfile(path):
        raise UserError(f"shard {path} does not exist: {AGAIN}")
    size = os.path.getsize(path)
    header = np.fromfile(path, "<i4", HEADER)
    if headerless:
        check_headerless(path, header, size)
        return np.memmap(path, "<u2", "r")
    check_header(path, header, size)
    tokens = np.memmap(path, "<u2", "r", 4 * HEADER) if header[2] else np.zeros(0, "<u2")
    if header[5] == 0:  # llm.c's shards say nothing of the tokenizer and have no checksum
        return tokens
    if tuple(header[3:5]) != hash_words(tokenizer.hash):
        this = f"{tokenizer.name} ({tokenizer.vocab_size} ids)"
        what = f"shard {path} was made with another tokenizer ({header[5]} ids) than {this}"
        make = f"make them with data.py --tokenizer={tokenizer.name}"
        raise UserError(f"{what}: {make}, name other --data, or the shard's own --tokenizer")
    if zlib.crc32(tokens) != int(header[7:8].view("<u4")[0]):
        raise UserError(f"shard {path} is damaged (checksum): {AGAIN}")
    return tokens


def check_headerless(path: str, start: np.ndarray, size: int) -> None:
    if size == 0 or size % 2:
        raise UserError(f"{path} has {size} bytes, expected an even number above 0: uint16")
    if start[:1].tolist() in ([MAGIC], [LLAMA_3]):
        raise UserError(f"{path} begins with the header of a token shard: leave out --headerless")


def check_header(path: str, header: np.ndarray, size: int) -> None:
    """Raise UserError where a file does not have the size that its header promises."""
    if len(header) < HEADER:
        raise UserError(f"shard {path} has {size} bytes, fewer than a header: {AGAIN}")
    magic, version, count = header[:3].tolist()
    if magic != MAGIC:
        hint = "nanoGPT's files need --headerless"
        if magic == LLAMA_3:
            hint = "it is llm.c's for llama-3, of uint32, expected uint16"
        what = f"{path} is not a token shard (magic {magic}, expected {MAGIC})"
        raise UserError(f"{what}: {AGAIN}; {hint}")
    if version != VERSION:
        raise UserError(f"shard {path} has version {version}, expected {VERSION}: {AGAIN}")
    expected = 4 * HEADER + 2 * count
    if count < 0 or size != expected:
        what = f"shard {path} promises {count} tokens = {expected} bytes and has {size}"
        raise UserError(f"{what}: it is truncated or damaged, {AGAIN}")


@functools.lru_cache(maxsize=8)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def shuffled_index(number: int, n: int, seed: int) -> tuple[int, int]:
    """Return epoch and index of a draw; every epoch draws each index once, in its own order."""
    epoch, place = divmod(number, n)
    return epoch, int(permutation(n, seed, epoch)[place])


def parse_mixture(spec: str) -> list[tuple[str, float]]:
    """Return names and weights of "a*0.7,b*0.3"; the weights sum to 1 and are equal if left out."""
    items = [item.strip().partition("*") for item in spec.split(",") if item]
    names = [name for name, _, _ in items]
    try:
        weights = [float(weight or 1) for _, _, weight in items]
    except ValueError:
        weights = []
    total = sum(weights)
    if not all(names) or not 0 < total < math.inf or min(weights) < 0:
        rule = "must name data, with weights of at least 0"
        raise UserError(f"mixture {spec!r} {rule}: write name*0.7,other*0.3")
    return [(name, weight / total) for name, weight in zip(names, weights, strict=True)]


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
            names = ", ".join(paths[:3]) + f" and {len(paths) - 3} more" * (len(paths) > 3)
            what = f"{names}: {total} tokens, fewer than seq_len + 1 = {seq_len + 1}"
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


def split_of(path: str) -> str | None:
    """Return "train" or "val": the split that the last word of its kind in a file's name says."""
    words = re.split(r"[\W\d_]+", os.path.basename(path).lower())
    known = [SPLITS[word] for word in words if word in SPLITS]
    return known[-1] if known else None


def split_files(folder: str, split: str) -> list[str]:
    """Return the paths of a split's shards in a folder, in the order of their names."""
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*.bin")))
    return [path for path in paths if split_of(path) == split]


def shard_paths(folder: str, split: str) -> list[str]:
    """Return the shards of a split in a folder. Raises UserError where there is none."""
    paths = split_files(folder, split)
    if not paths:
        what = f"no {split} shard (a .bin file with the word {split} in its name)"
        lack = what if os.path.isdir(folder) else "no data"
        hint = how_to_make("pretrain", os.path.basename(folder))
        raise UserError(f"there is {lack} at {folder}: {hint}, or name other data (--data)")
    check_made(paths, sha256=None)  # a shard has a checksum of its own
    return paths


class Mixture:
    """A Mixture gives each source its share of every 1,000 rows, in a seeded order."""

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
        self.per_block = np.array(weights) * self.BLOCK  # rows of each source, with fractions
        self.drawn = [np.zeros(len(names), int)]  # before each block: rows of each source
        self.order = np.random.default_rng([seed, 7]).permutation(self.BLOCK)
        self.draws = functools.lru_cache(maxsize=2)(self.draws_of)
        is_whole = np.allclose(self.per_block, np.round(self.per_block), rtol=0, atol=1e-6)
        # Before fractions were carried from block to block, such shares gave other rows
        self.fingerprint = fingerprint(spec if is_whole else f"{spec} carried", self.streams)

    def draws_of(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return of each place in a block its source and the rows of that source before it.

        What a share loses or gains when it is rounded to whole rows is carried to the next block.
        """
        while len(self.drawn) < block + 2:
            owed = self.per_block * len(self.drawn) - self.drawn[-1]
            edges = np.round(np.cumsum([0, *owed])).clip(0, self.BLOCK).astype(int)
            shares = np.diff(np.maximum.accumulate(edges))
            self.drawn.append(self.drawn[-1] + shares)
        first, end = self.drawn[block : block + 2]
        sources = np.repeat(np.arange(len(first)), end - first)[self.order]
        rows = np.empty(self.BLOCK, int)
        for source, row in enumerate(first):
            places = np.flatnonzero(sources == source)
            rows[places] = row + np.arange(len(places))
        return sources, rows

    def shuffled(self, first: int, last: int) -> Tensor:
        """Return rows first to last of an endless sequence: (last - first, seq_len + 1) int64."""
        rows = []
        for number in range(first, last):
            block, place = divmod(number, self.BLOCK)
            sources, draws = self.draws(block)
            stream = self.streams[sources[place]]
            epoch, index = shuffled_index(int(draws[place]), stream.n_rows, self.seed)
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


def checksum_of(path: str, tokens: np.ndarray) -> int:
    """Return the crc32 of a shard's tokens: of the header, where it has been checked."""
    header = np.fromfile(path, "<i4", HEADER)
    is_ours = header[:1].tolist() == [MAGIC] and header[5]
    return int(header[7:8].view("<u4")[0]) if is_ours else zlib.crc32(tokens)


def checksums(streams: list[Stream]) -> dict[tuple[int, int], str]:
    """Return {(tokens, crc32 of them): path} of all shards."""
    found = {}
    for stream in streams:
        for path, shard in zip(stream.paths, stream.shards, strict=True):
            found[len(shard), checksum_of(path, shard)] = path
    return found


def fingerprint(spec: str, streams: list[Stream]) -> str:
    """Return 16 digits that change with the mixture and with the beginning of every shard."""
    digest = hashlib.sha256(spec.encode())
    for stream in streams:
        for path, shard in zip(stream.paths, stream.shards, strict=True):
            start = zlib.crc32(shard[:65536])
            digest.update(f"{os.path.basename(path)} {len(shard)} {start}".encode())
    return digest.hexdigest()[:16]
