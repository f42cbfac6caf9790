"""Tokenizers: plain bytes, the toy world's words, or BPE with GPT-2's split pattern.

A BPE is given by a ranks file (.tiktoken): one token in base64 and its rank on each line. It is
GPT-2's, or learnt from a text (train_ranks). The tokenizer of an imported model is in foreign.py.
"""

import base64
import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tiktoken
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from configurator import UserError
from corpus import toy
from corpus.foreign import SPEC_FILE, ForeignTokenizer, Template, byte_of_symbol
from runtime.files import read_json, sha256, write_atomic

SPECIAL = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")
# The pattern that OpenAI released with GPT-2, in a form that is faster and cuts the same
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_HASH = "306cd27f03c1a714"  # of gpt2.tiktoken
# The pattern steps back over white space, and tiktoken fails after a million steps
LONGEST_BLANK = 500_000
LONG_BLANK = re.compile(rf"(?<!\s)\s{{{LONGEST_BLANK + 1},}}")
# Training takes the square of the length of a run without a cut, such as a line of base64
LONG_RUN = re.compile(r"(\S{1000}|\s{1000})")
CHAT_1 = "chat-1"  # our own chat template
BYTES = {bytes([i]): i for i in range(256)}


def chat_1(special: dict[str, int]) -> Template:
    """Return our own template: <|user|>...<|end|><|assistant|>...<|end|>."""
    after = [special["<|end|>"]]
    roles = {role: ([special[f"<|{role}|>"]], after) for role in ("system", "user", "assistant")}
    return Template(CHAT_1, [], roles)


class Tokenizer:
    """A Tokenizer turns text into ids and back. No text becomes a special token."""

    def __init__(self, name: str, ranks: dict[bytes, int], digest: str):
        self.name, self.hash = name, digest
        self.n_text = len(ranks)
        if not ranks.keys() >= BYTES.keys() or sorted(ranks.values()) != list(range(self.n_text)):
            wanted = f"must be 0 to {self.n_text - 1} without a gap, and name all of the 256 bytes"
            raise UserError(f"the ranks of tokenizer {name} {wanted}: copy the file again")
        self.special = {token: self.n_text + i for i, token in enumerate(SPECIAL)}
        self.template = chat_1(self.special)
        self.eos, self.pad = self.special[SPECIAL[0]], self.special["<|pad|>"]
        self.end = self.special["<|end|>"]
        self.stops = self.end, self.eos  # what ends an answer: of the turn, of the document
        self.until = ()  # texts before which an answer ends
        self.bos, self.prefix = self.eos, [self.eos]  # a text begins after the end of another
        self.vocab_size = self.n_text + len(SPECIAL)
        self.bpe = tiktoken.Encoding(
            name, pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens=self.special
        )
        self.bytes_only = self.n_text == 256

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; half a surrogate pair becomes a replacement character."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of a text as uint32, without a Python integer per token."""
        if self.bytes_only:
            return np.frombuffer(text.encode(errors="replace"), np.uint8).astype("<u4")
        pieces = cut_long_blanks(text)
        try:
            parts = [self.bpe.encode_to_numpy(part, disallowed_special=()) for part in pieces]
        except UnicodeEncodeError:  # half a surrogate pair
            parts = [np.array(self.bpe.encode_ordinary(part), "<u4") for part in pieces]
        return np.concatenate(parts)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, by threads: tiktoken works outside the interpreter lock."""
        size = 16  # texts of a job: a job for each short text would cost too much

        def encode_part(start: int) -> list[np.ndarray]:
            return [self.encode_array(text) for text in texts[start : start + size]]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = pool.map(encode_part, range(0, len(texts), size))
            return [ids for part in parts for ids in part]

    def decode(self, ids: Iterable[int]) -> str:
        return self.bpe.decode(list(ids))

    def token_bytes(self, token: int) -> bytes:
        return self.bpe.decode_single_token_bytes(token)

    def spec(self) -> dict:
        """Return what a checkpoint or a manifest keeps to recognize this tokenizer."""
        return {"name": self.name, "hash": self.hash, "vocab_size": self.vocab_size}


def cut_long_blanks(text: str) -> list[str]:
    """Return a text in pieces, cut only inside white space that is too long for tiktoken."""
    if len(text) <= LONGEST_BLANK:
        return [text]
    cuts = [0]
    for blank in LONG_BLANK.finditer(text):
        cuts += range(blank.start() + LONGEST_BLANK, blank.end(), LONGEST_BLANK)
    ends = [*cuts[1:], len(text)]
    return [text[start:end] for start, end in zip(cuts, ends, strict=True)]


def load_tokenizer(
    name: str, data_dir: str = "data", expect: dict | None = None
) -> Tokenizer | ForeignTokenizer:
    """Return the tokenizer byte, toy, gpt2 (its ranks are in data_dir), or that of a ranks file.

    Or that of the run folder of an imported model. expect: spec() of a checkpoint's tokenizer,
    which is all of an imported one. Raises UserError where name means another.
    """
    if expect and "json" in expect and name == expect["name"]:
        return ForeignTokenizer(expect)
    if os.path.isfile(os.path.join(name, SPEC_FILE)):
        tokenizer = ForeignTokenizer(read_json(os.path.join(name, SPEC_FILE)))
    elif name == "byte":
        tokenizer = Tokenizer(name, BYTES, "bytes")
    elif name == "toy":
        words = [*BYTES, *(word.encode() for word in toy.words())]
        ranks = {word: i for i, word in enumerate(words)}
        digest = hashlib.sha256(b"\0".join(words)).hexdigest()[:16]
        tokenizer = Tokenizer(name, ranks, digest)
    else:
        tokenizer = of_file(name, data_dir)
    if expect and tokenizer.hash != expect["hash"]:
        wanted = f"choose {expect['name']} ({expect['hash']}) with --tokenizer"
        found = f"tokenizer {tokenizer.name} ({tokenizer.hash})"
        raise UserError(f"{found} is not the checkpoint's: {wanted}")
    return tokenizer


def of_file(name: str, data_dir: str) -> Tokenizer:
    """Return the tokenizer of a ranks file, which is at the path `name` or kept in data_dir.

    Raises UserError where it is missing or damaged.
    """
    kept = os.path.join(data_dir, "gpt2.tiktoken" if name == "gpt2" else os.path.basename(name))
    path = name if name != "gpt2" and os.path.isfile(name) else kept
    if not os.path.isfile(path):
        makers = "data.py --tokenizer=gpt2 with a network, or data.py --train_tokenizer=4096"
        what = f"tokenizer {name!r} has no ranks file at {path}"
        advice = f"run {makers}, or give the file's path, or its folder with --data_dir"
        raise UserError(f"{what}: {advice}; --tokenizer=byte needs none")
    ranks = read_ranks(path)
    digest = sha256(path)[:16]
    if name == "gpt2" and digest != GPT2_HASH:
        raise UserError(f"{path} has sha256 {digest}, GPT-2's has {GPT2_HASH}: copy it again")
    return Tokenizer("gpt2" if digest == GPT2_HASH else os.path.basename(path), ranks, digest)


def read_ranks(path: str) -> dict[bytes, int]:
    ranks = {}
    try:
        with open(path, "rb") as f:
            for line in filter(bytes.strip, f):
                token, rank = line.split()
                ranks[base64.b64decode(token)] = int(rank)
    except ValueError as error:
        raise UserError(f"{path} is no ranks file (lines of base64 token, rank): {error}") from None
    return ranks


def write_ranks(path: str, ranks: dict[bytes, int]) -> None:
    """Write a ranks file. Raises UserError where there is one of other ranks."""
    if os.path.isfile(path):
        if read_ranks(path) == ranks:
            return
        what = f"{path} holds the symbols of another text, which a checkpoint may need"
        raise UserError(f"{what}: move it away, or choose another --data_dir")
    tokens = sorted(ranks, key=ranks.get)
    lines = [base64.b64encode(token) + b" %d\n" % ranks[token] for token in tokens]
    write_atomic(path, lambda f: f.writelines(lines))


def train_ranks(texts: Iterable[str], n_text: int) -> dict[bytes, int]:
    """Return the ranks of n_text symbols: all bytes, then pairs learnt from the texts.

    Again and again the most frequent pair of neighbours becomes a symbol (arXiv 1508.07909), inside
    the pieces of GPT-2's split pattern. Threads do not change the result.
    """
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)  # it cuts as GPT2_SPLIT does
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pieces
    how = {"initial_alphabet": pieces.alphabet(), "show_progress": False}
    # a pair that occurs once is no habit of the language
    trainer = trainers.BpeTrainer(vocab_size=n_text, min_frequency=2, **how)
    whole = (text.encode(errors="replace").decode() for text in texts)
    bpe.train_from_iterator((part for text in whole for part in LONG_RUN.split(text)), trainer)
    symbols = bpe.get_vocab()
    if len(symbols) < n_text:
        fewer = f", or --train_tokenizer={len(symbols)}" if len(symbols) > len(BYTES) else ""
        found = f"the text has pairs for {len(symbols)} symbols, and {n_text} are wanted"
        raise UserError(f"{found}: give more text{fewer}")
    byte_of = byte_of_symbol()
    return {bytes(map(byte_of.get, symbol)): rank for symbol, rank in symbols.items()}
