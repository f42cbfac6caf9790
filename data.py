"""Data: tokenizers, token shards, the mixture loader, chat records, and the one program that may use the network.

    python data.py --stage=all                                    # hub presets of every stage, on the login node
    python data.py --stage=pretrain --sources=tinystories:100000  # one preset, capped
    python data.py --stage=sft --sources=mine=notes.jsonl         # your own file, any schema listed under RECORDS
    python data.py --sources=toy                                  # the built-in world, no network

Each source becomes a folder data_dir/<name>: token shards (train_000.bin, val_000.bin) for text, JSON lines for records, and a
manifest_<stage>.json with source, revision, counts and sha256. Shards have the header of llm.c and modded-nanogpt, so theirs load too.
"""

import base64
import contextlib
import functools
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch

import configurator
import toy
from configurator import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_atomic(path: str, write, need: int = 0) -> None:
    """write(file) into path, all or nothing: a reader sees the old file or the new one, also after a kill or a full disk.

    need: bytes, for the message. Raises UserError where the disk is full or the folder cannot be written.
    """
    tmp = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch reports a full disk as a RuntimeError without errno
        if os.path.exists(tmp):
            os.remove(tmp)
        free = (
            shutil.disk_usage(os.path.dirname(path) or ".").free
            if os.path.isdir(os.path.dirname(path) or ".")
            else 0
        )
        raise UserError(
            f"could not write {path} ({type(error).__name__}: {error}); about {need / 1e6:.1f} MB needed, "
            f"{free / 1e6:.1f} MB free. What was there before is untouched: free space, run the same command again"
        ) from None


def write_json(path: str, value) -> None:
    write_atomic(path, lambda f: f.write(json.dumps(value, indent=1).encode() + b"\n"))


def write_jsonl(path: str, rows) -> None:
    write_atomic(
        path,
        lambda f: f.writelines(
            json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n" for row in rows
        ),
    )


@contextlib.contextmanager
def open_text(path: str):
    """A text file, gzipped or not. Raises UserError where it is missing or empty, and where reading finds no UTF-8 or a torn gzip."""
    if not os.path.isfile(path):
        raise UserError(f"file {path} does not exist")
    if os.path.getsize(path) == 0:
        raise UserError(f"file {path} is empty")
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig")
            if path.endswith(".gz")
            else open(path, encoding="utf-8-sig") as f
        ):
            yield f
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is no whole gzip file ({error}): copy it again") from None


def read_jsonl(path: str) -> list[dict]:
    """Every line of a .jsonl file (or every element of a .json list). Raises UserError with file:line where one is no record."""
    rows, number = [], 0
    with open_text(path) as f:
        try:
            if path.removesuffix(".gz").endswith(".json"):
                return json.load(f)
            for number, text in enumerate(f, 1):
                if text.strip():
                    rows.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number or error.lineno} is no JSON: {error}") from None
    return rows


def read_rows(path: str):
    """Records of a .parquet, .json or .jsonl file. Raises UserError where it cannot be read."""
    if not path.endswith(".parquet"):
        yield from read_jsonl(path)
        return
    import pyarrow.parquet

    if not os.path.isfile(path):
        raise UserError(f"file {path} does not exist")
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no parquet file: {error}") from None


def read_metrics(path: str) -> list[dict]:
    """Rows of a log that a kill may have torn: an unreadable last line is left out. No file, no rows."""
    if not os.path.exists(path):
        return []
    rows = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for text in f:
            try:
                rows.append(json.loads(text))
            except ValueError:
                break
    return rows


def sha256(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: bytes, or BPE with GPT-2's split pattern and a ranks file

SPECIAL = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")
GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
GPT2_HASH = "306cd27f03c1a714"  # of gpt2.tiktoken


class Tokenizer:
    """Text <-> ids. The special tokens take the ids after the ordinary ones; text that spells one never becomes it."""

    def __init__(self, name: str, ranks: dict[bytes, int], digest: str):
        self.name, self.hash = name, digest
        self.n_text = len(ranks)
        if sorted(ranks.values()) != list(range(self.n_text)) or any(
            bytes([i]) not in ranks for i in range(256)
        ):
            raise UserError(
                f"the ranks of tokenizer {name} are not 0..{self.n_text - 1}, or lack some of the 256 bytes"
            )
        self.special = {token: self.n_text + i for i, token in enumerate(SPECIAL)}
        self.eos, self.system, self.user, self.assistant, self.end, self.pad = self.special.values()
        self.vocab_size = self.n_text + len(SPECIAL)
        self.bpe = tiktoken.Encoding(
            name, pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens=self.special
        )
        self.bytes_only = self.n_text == 256

    def encode(self, text: str) -> list[int]:
        return (
            list(text.encode(errors="replace"))
            if self.bytes_only
            else self.bpe.encode_ordinary(text)
        )

    def encode_array(self, text: str) -> np.ndarray:
        """encode, straight into uint32: no Python integer per token."""
        if self.bytes_only:
            return np.frombuffer(text.encode(errors="replace"), np.uint8).astype("<u4")
        try:
            return self.bpe.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # half a surrogate pair
            return np.array(self.encode(text), "<u4")

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Each text's ids, worked out by all cores: tiktoken works outside the interpreter's lock."""
        size = (
            -(-len(texts) // (8 * os.cpu_count())) or 1
        )  # texts per task: a task for each would cost more than a short text
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = pool.map(
                lambda start: [self.encode_array(text) for text in texts[start : start + size]],
                range(0, len(texts), size),
            )
            return [ids for part in parts for ids in part]

    def decode(self, ids) -> str:
        return self.bpe.decode(list(ids))

    def spec(self) -> dict:
        return {"name": self.name, "hash": self.hash, "vocab_size": self.vocab_size}


def load_tokenizer(name: str, data_dir: str = "data", expect: dict | None = None) -> Tokenizer:
    """byte, toy (bytes and the toy world's words), gpt2 (its ranks in data_dir, where data.py put them) or the path of a ranks file.

    expect: spec() of the tokenizer that a checkpoint or shard was made with. Raises UserError where this is another one.
    """
    if name in ("byte", "toy"):
        words = [bytes([i]) for i in range(256)] + [
            word.encode() for word in toy.words() if name == "toy"
        ]
        digest = hashlib.sha256(b"\0".join(words)).hexdigest()[:16] if name == "toy" else "bytes"
        tokenizer = Tokenizer(name, {word: i for i, word in enumerate(words)}, digest)
    else:
        path = os.path.join(data_dir, "gpt2.tiktoken") if name == "gpt2" else name
        if not os.path.isfile(path):
            raise UserError(
                f"tokenizer {name!r}: no ranks file at {path}. Run data.py --tokenizer=gpt2 on a machine with network, or "
                "give the path of a .tiktoken file; --tokenizer=byte needs none"
            )
        try:
            with open(path, "rb") as f:
                ranks = {
                    base64.b64decode(token): int(rank)
                    for token, rank in (row.split() for row in f if row.strip())
                }
        except ValueError as error:
            raise UserError(
                f"{path} is no ranks file (base64 token, space, rank on each line): {error}"
            ) from None
        digest = sha256(path)[:16]
        if name == "gpt2" and digest != GPT2_HASH:
            raise UserError(
                f"{path} is not GPT-2's ranks file (sha256 {digest}..., expected {GPT2_HASH}...): copy it again"
            )
        tokenizer = Tokenizer(
            "gpt2" if digest == GPT2_HASH else os.path.basename(path), ranks, digest
        )
    if expect and tokenizer.hash != expect["hash"]:
        raise UserError(
            f"tokenizer {tokenizer.name} ({tokenizer.hash}) is not the one the checkpoint was trained with: "
            f"{expect['name']} ({expect['hash']})"
        )
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Shards: 256 int32 of header, then uint16 tokens

MAGIC, VERSION, HEADER = 20240520, 1, 256
# Header words of our own, 0 in shards of llm.c and modded-nanogpt: 3-4 tokenizer hash, 5 vocabulary, 6 EOS id, 7 crc32
SHARD_TOKENS = 100_000_000


def hash_words(digest: str) -> tuple[int, int]:
    full = hashlib.sha256(digest.encode()).digest()
    return int.from_bytes(full[:4], "little", signed=True), int.from_bytes(
        full[4:8], "little", signed=True
    )


def write_shard(path: str, tokens: np.ndarray, tokenizer: Tokenizer) -> None:
    """tokens: (n,) integer ids. Raises UserError for an id that the vocabulary or uint16 cannot hold."""
    if tokenizer.vocab_size > 65_536:
        raise UserError(
            f"vocabulary of {tokenizer.vocab_size} ids does not fit the uint16 shards (at most 65,536)"
        )
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
        bad = tokens.min() if tokens.min() < 0 else tokens.max()
        raise UserError(
            f"token id {bad} is not in the vocabulary of {tokenizer.vocab_size} ids ({path})"
        )
    tokens = tokens.astype("<u2")
    header = np.zeros(HEADER, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    header[3:7] = *hash_words(tokenizer.hash), tokenizer.vocab_size, tokenizer.eos
    header[7:8] = np.array([zlib.crc32(tokens)], "<u4").view("<i4")
    write_atomic(
        path, lambda f: (f.write(header.tobytes()), f.write(tokens.tobytes())), tokens.nbytes
    )


def read_shard(path: str, tokenizer: Tokenizer, headerless: bool = False) -> np.ndarray:
    """Memory-mapped tokens of a shard. Raises UserError where the file is not what its header says, or of another tokenizer."""
    if not os.path.isfile(path):
        raise UserError(f"shard {path} does not exist: make it again with data.py")
    size = os.path.getsize(path)
    if headerless:
        if size == 0 or size % 2:
            raise UserError(f"{path}: {size} bytes are no uint16 tokens")
        return np.memmap(path, "<u2", "r")
    if size < 4 * HEADER:
        raise UserError(
            f"shard {path} has {size} bytes, less than its header of {4 * HEADER}: make it again with data.py"
        )
    header = np.fromfile(path, "<i4", HEADER)
    if header[0] != MAGIC:
        raise UserError(
            f"{path} is no token shard (magic {header[0]}, expected {MAGIC}). nanoGPT's headerless files need --headerless"
        )
    if header[1] != VERSION:
        raise UserError(f"shard {path} has version {header[1]}, this code reads {VERSION}")
    count = int(header[2])
    if count < 0 or size != 4 * HEADER + 2 * count:
        raise UserError(
            f"shard {path} promises {count} tokens = {4 * HEADER + 2 * count} bytes and has {size}: it is truncated or damaged"
        )
    tokens = np.memmap(path, "<u2", "r", 4 * HEADER) if count else np.zeros(0, "<u2")
    if header[5] and tuple(header[3:5]) != hash_words(tokenizer.hash):
        raise UserError(
            f"shard {path} was made with another tokenizer than {tokenizer.name} ({header[5]} ids, this one has "
            f"{tokenizer.vocab_size}): make it again with data.py, or choose its tokenizer"
        )
    if header[5] and zlib.crc32(tokens) != int(header[7:8].view("<u4")[0]):
        raise UserError(f"shard {path} is damaged (checksum): make it again with data.py")
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# Rows of tokens for pretraining: order is a pure function of (seed, row number)


@functools.lru_cache(maxsize=8)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def shuffled_index(number: int, n: int, seed: int) -> tuple[int, int]:
    """(epoch, index) of the number-th draw: every index once per epoch, in an order of its own."""
    epoch, place = divmod(number, n)
    return epoch, int(permutation(n, seed, epoch)[place])


def parse_mixture(spec: str) -> list[tuple[str, float]]:
    """ "a*0.7,b*0.3" -> [("a", 0.7), ("b", 0.3)], weights scaled to 1; without weights all are alike."""
    parts = []
    for item in filter(None, spec.split(",")):
        name, _, weight = item.strip().partition("*")
        try:
            parts.append((name, float(weight or 1)))
        except ValueError:
            raise UserError(
                f"mixture {spec!r}: {weight!r} is no weight; write name*0.7,other*0.3"
            ) from None
    total = sum(weight for _, weight in parts)
    if not 0 < total < float("inf") or any(weight < 0 or not name for name, weight in parts):
        raise UserError(
            f"mixture {spec!r} names no data, or a weight below 0; write name*0.7,other*0.3"
        )
    return [(name, weight / total) for name, weight in parts]


class Stream:
    """Non-overlapping windows of seq_len + 1 tokens (the last token of one is the first of the next) from one source's shards."""

    def __init__(
        self, folder: str, split: str, seq_len: int, tokenizer: Tokenizer, headerless: bool
    ):
        if not os.path.isdir(folder):
            raise UserError(
                f"no data at {folder}: make it with data.py --sources={os.path.basename(folder)}"
            )
        self.paths = sorted(
            os.path.join(folder, n) for n in os.listdir(folder) if split in n and n.endswith(".bin")
        )
        if not self.paths:
            raise UserError(
                f"no {split} shard (*{split}*.bin) in {folder}: make it with data.py --sources={os.path.basename(folder)}"
            )
        self.seq_len, self.tokenizer = seq_len, tokenizer
        self.shards = [read_shard(path, tokenizer, headerless) for path in self.paths]
        self.windows = np.cumsum([max(0, len(shard) - 1) // seq_len for shard in self.shards])
        self.n_rows = int(self.windows[-1])
        if self.n_rows == 0:
            raise UserError(
                f"{folder}: the {split} shards hold {sum(map(len, self.shards))} tokens, fewer than seq_len + 1 = {seq_len + 1}"
            )

    def row(self, index: int, epoch: int = 0) -> np.ndarray:
        number = int(np.searchsorted(self.windows, index, side="right"))
        shard = self.shards[number]
        first = index - (int(self.windows[number - 1]) if number else 0)
        slack = (
            len(shard) - 1
        ) % self.seq_len  # tokens the windows leave over: each epoch cuts at another place
        start = first * self.seq_len + epoch * 7919 % (slack + 1)
        tokens = shard[start : start + self.seq_len + 1]
        if tokens.max() >= self.tokenizer.vocab_size:
            raise UserError(
                f"{self.paths[number]} holds id {tokens.max()} near token {start}, over the vocabulary of "
                f"{self.tokenizer.vocab_size} ids: it is damaged or of another tokenizer"
            )
        return tokens


class Mixture:
    """Rows from several sources. In every block of 1,000 rows each source has its exact share, in a seeded order."""

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
        names, weights = zip(*parse_mixture(spec))
        self.streams = [
            Stream(os.path.join(data_dir, name), split, seq_len, tokenizer, headerless)
            for name in names
        ]
        self.seed = seed
        self.n_rows = sum(stream.n_rows for stream in self.streams)
        edges = np.round(np.cumsum([0, *weights]) * self.BLOCK).astype(int)
        self.shares = np.diff(edges)
        self.source_of = np.random.default_rng([seed, 7]).permutation(
            np.repeat(np.arange(len(names)), self.shares)
        )
        self.place_of = np.array(
            [(self.source_of[:i] == source).sum() for i, source in enumerate(self.source_of)]
        )
        digest = hashlib.sha256(spec.encode())
        for stream in self.streams:
            for path, shard in zip(stream.paths, stream.shards):
                digest.update(
                    f"{os.path.basename(path)} {len(shard)} {zlib.crc32(shard[:65536])}".encode()
                )
        self.fingerprint = digest.hexdigest()[:16]

    def shuffled(self, first: int, last: int) -> torch.Tensor:
        """Training rows number first..last of an endless sequence: (last - first, seq_len + 1)."""
        rows = []
        for number in range(first, last):
            block, place = divmod(number, self.BLOCK)
            source = self.source_of[place]
            stream = self.streams[source]
            draw = block * int(self.shares[source]) + int(self.place_of[place])
            epoch, index = shuffled_index(draw, stream.n_rows, self.seed)
            rows.append(stream.row(index, epoch))
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def validation(self, first: int, last: int) -> torch.Tensor:
        """Validation rows first..last, each once, in one order for all seeds: the first of them are a fair sample of all sources."""
        rows = []
        for number in permutation(self.n_rows, 0, 0)[first:last]:
            for stream in self.streams:
                if number < stream.n_rows:
                    rows.append(stream.row(number))
                    break
                number -= stream.n_rows
        return torch.from_numpy(np.stack(rows).astype(np.int64))


# ---------------------------------------------------------------------------------------------------------------------
# Chat template: ids are concatenated, never searched for in text

TEMPLATE = (
    "chat-1"  # <|user|>...<|end|><|assistant|>...<|end|>, an optional <|system|>...<|end|> before
)


def render(messages: list[dict], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """ids of a conversation and, for each, whether it is supervised: the assistant's words and the <|end|> after them.

    Raises UserError where the turns are not [system,] user, assistant, user, assistant, ...
    """
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
        raise UserError(
            f"a conversation must be [system,] user, assistant, user, ...; this one is {', '.join(roles) or 'empty'}: "
            f"{str(messages)[:100]}"
        )
    ids, supervised = [], []
    for message in messages:
        text = tokenizer.encode(message["content"])
        speaks = message["role"] == "assistant"
        ids += [getattr(tokenizer, message["role"]), *text, tokenizer.end]
        supervised += [False, *[speaks] * len(text), speaks]
    return ids, supervised


def render_prompt(messages: list[dict], tokenizer: Tokenizer) -> list[int]:
    """ids of a conversation that the assistant is to go on with."""
    return render(messages, tokenizer)[0] + [tokenizer.assistant]


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


# ---------------------------------------------------------------------------------------------------------------------
# Records: whatever schema comes in, one canonical form goes out


def hh_turns(dialogue: str) -> list[dict]:
    """Anthropic's "\\n\\nHuman: ...\\n\\nAssistant: ..." as messages."""
    parts = re.split(r"\n\n(Human|Assistant):", dialogue)
    return [
        {"role": "user" if who == "Human" else "assistant", "content": text.strip()}
        for who, text in zip(parts[1::2], parts[2::2])
    ]


def with_input(row: dict) -> str:
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]


def sft_record(row: dict) -> dict:
    if "messages" in row:
        return {"messages": row["messages"]}
    if "question" in row:
        return toy.chat(row["question"], row["answer"])
    if "chosen" in row and "output" not in row:  # preference data as demonstrations
        return {"messages": hh_turns(row["chosen"])}
    return toy.chat(with_input(row), row["output"])


def dpo_record(row: dict) -> dict | None:
    """{"prompt": messages, "chosen": text, "rejected": text}; None where the two answers have different prompts."""
    if "conversations" in row:  # LLaMA-Factory
        role = {"human": "user", "gpt": "assistant", "system": "system"}
        prompt = [
            {"role": role[turn["from"]], "content": turn["value"]} for turn in row["conversations"]
        ]
        return {
            "prompt": prompt,
            "chosen": row["chosen"]["value"],
            "rejected": row["rejected"]["value"],
        }
    if "prompt" in row:
        prompt = row["prompt"] if isinstance(row["prompt"], list) else user(row["prompt"])
        return {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]}
    if "instruction" in row:
        return {
            "prompt": user(with_input(row)),
            "chosen": row["chosen"],
            "rejected": row["rejected"],
        }
    chosen, rejected = hh_turns(row["chosen"]), hh_turns(row["rejected"])
    if chosen[:-1] != rejected[:-1] or chosen[-1]["role"] != rejected[-1]["role"]:
        return None
    if chosen[-1]["role"] == "user":
        return {
            "prompt": chosen,
            "chosen": "",
            "rejected": "",
        }  # the dialogue has no answer: usable() says so
    return {
        "prompt": chosen[:-1],
        "chosen": chosen[-1]["content"],
        "rejected": rejected[-1]["content"],
    }


def solution_pairs(row: dict) -> list[dict]:
    """Pairs of a right and a wrong sample of one problem (its "solutions" as eval.solve leaves them), each sample in at most one pair;
    samples that ran into the length limit are no answers to learn from."""
    texts = {
        right: dict.fromkeys(
            s["text"]
            for s in row["solutions"]
            if s["stopped"] and s["correct"] == right and s["text"].strip()
        )
        for right in (True, False)
    }
    return [
        {"prompt": user(row["question"]), "chosen": right, "rejected": wrong}
        for right, wrong in zip(texts[True], texts[False])
    ]


def problem_record(row: dict) -> dict:
    return {"question": row["question"], "answer": row["answer"]}


RECORDS = {  # stage -> (function, the schemas it reads, in words)
    "sft": (sft_record, "messages | instruction[, input], output | question, answer | chosen"),
    "dpo": (
        dpo_record,
        "prompt, chosen, rejected | chosen, rejected (HH dialogues) | conversations, chosen, rejected",
    ),
    "verifier": (problem_record, "question, answer"),
}


def usable(record: dict | None) -> str:
    """ "" for a record to train on, else why it is dropped."""
    if record is None:
        return "answers to different prompts"
    if "question" in record:
        return (
            ""
            if record["question"].strip() and record["answer"].strip()
            else "empty question or empty response"
        )
    messages = record.get("messages", record.get("prompt", []))
    answers = (
        [record["chosen"], record["rejected"]]
        if "chosen" in record
        else [m["content"] for m in messages[-1:]]
    )
    roles = [m["role"] for m in messages] + ["assistant"] * ("chosen" in record)
    turns = roles[1:] if roles[:1] == ["system"] else roles
    for text in [m["content"] for m in messages] + answers:
        text.strip()  # AttributeError where it is no text
    if not answers or not all(map(str.strip, answers)):
        return "empty response"
    if turns[:1] != ["user"]:
        return "does not begin with the user"
    if turns != ["user", "assistant"] * (len(turns) // 2):
        return "turns not user, assistant, user, ..., assistant"
    return "chosen equals rejected" if answers[0] == answers[-1] and len(answers) == 2 else ""


def convert(rows, stage: str, where: str) -> list[dict]:
    """Canonical records of a stage; dropped ones are counted aloud. Raises UserError with the place of a row of no known schema."""
    function, schemas = RECORDS[stage]
    kept, dropped, seen = [], {}, set()
    for number, row in enumerate(rows, 1):
        try:
            record = function(row)
            reason = usable(record)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f"{where}, record {number}: no {stage} record ({type(error).__name__}: {error}); it has {keys}, "
                f"wanted {schemas}"
            ) from None
        key = json.dumps(record)
        reason = reason or ("duplicate" if key in seen else "")
        seen.add(key)
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
        else:
            kept.append(record)
    if dropped:
        print(
            f"{where}: {sum(dropped.values())} of {len(kept) + sum(dropped.values())} records dropped: "
            + ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        )
    if not kept:
        raise UserError(f"{where}: no usable {stage} record among {sum(dropped.values())}")
    return kept


def prompt_of(record: dict) -> str:
    """What records of one prompt share: splits are cut by it."""
    return json.dumps(record.get("question") or record.get("prompt") or record["messages"][:-1])


def load_records(spec: str, data_dir: str, kind: str, split: str) -> list[dict]:
    """Records of kind sft | dpo | problems from the folders that spec names. SFT takes problems where a folder has no chats."""
    rows = []
    for name, _ in parse_mixture(spec):
        paths = [
            os.path.join(data_dir, name, f"{k}_{split}.jsonl")
            for k in ([kind, "problems"] if kind == "sft" else [kind])
        ]
        path = next(filter(os.path.isfile, paths), None)
        if path is None:
            raise UserError(
                f"no {kind} records at {paths[0]}: make them with data.py --sources={name}"
            )
        rows += [sft_record(row) if kind == "sft" else row for row in read_jsonl(path)]
    if split in ("train", "verifier"):
        refuse_evaluation_problems(rows, spec, data_dir)
    return rows


def fitting(rows: list, length, space: int, what: str, say) -> list:
    """Rows whose length is at most space; the others are counted aloud."""
    kept = [row for row in rows if length(row) <= space]
    if len(kept) < len(rows):
        say(
            f"{what}: {len(rows) - len(kept)} of {len(rows)} are longer than seq_len={space} tokens and dropped"
        )
    if not kept:
        raise UserError(f"{what}: all {len(rows)} are longer than seq_len={space} tokens")
    return kept


def refuse_evaluation_problems(rows: list[dict], spec: str, data_dir: str) -> None:
    """Raises UserError where a record to train on asks a question of an evaluation set in data_dir, up to case and spaces."""
    plain = lambda text: " ".join(text.lower().split())
    paths = [
        os.path.join(data_dir, name, file)
        for name in sorted(os.listdir(data_dir))
        for file in ("problems_test.jsonl", "test.jsonl")
    ]
    held_out = {
        plain(row["question"]): os.path.dirname(path)
        for path in filter(os.path.isfile, paths)
        for row in read_jsonl(path)
        if "question" in row
    }
    asked = [
        row.get("question")
        or next(
            (
                m["content"]
                for m in row.get("messages", row.get("prompt", []))
                if m["role"] == "user"
            ),
            "",
        )
        for row in rows
    ]
    leaked = [question for question in asked if plain(question) in held_out]
    if leaked:
        raise UserError(
            f"{len(leaked)} of {len(rows)} training records of {spec} ask a question of {held_out[plain(leaked[0])]}, an evaluation set: "
            f"take them out. The first: {leaked[0][:100]!r}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Preparation

# name: (stage, hub id, config, revision, split)
PRESETS = {
    "wikitext-103": (
        "pretrain",
        "Salesforce/wikitext",
        "wikitext-103-raw-v1",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        "train",
    ),
    "tinystories": (
        "pretrain",
        "roneneldan/TinyStories",
        None,
        "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64",
        "train",
    ),
    "alpaca": (
        "sft",
        "tatsu-lab/alpaca",
        None,
        "dce01c9b08f87459cf36a430d809084718273017",
        "train",
    ),
    "hh-rlhf": (
        "dpo",
        "Anthropic/hh-rlhf",
        None,
        "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
        "train",
    ),
    "gsm8k": (
        "verifier",
        "openai/gsm8k",
        "main",
        "740312add88f781978c0658806c59bc2815b9866",
        "train",
    ),
    "gsm8k-test": (
        "eval",
        "openai/gsm8k",
        "main",
        "740312add88f781978c0658806c59bc2815b9866",
        "test",
    ),
    "wikitext-2": (
        "eval",
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        "test",
    ),
    "wikitext-2-valid": (
        "eval",
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        "validation",
    ),
    "sst2": (
        "eval",
        "stanfordnlp/sst2",
        None,
        "8d51e7e4887a4caaa95b3fbebbf53c0490b58bbb",
        "validation",
    ),
    "sst2-train": (
        "eval",
        "stanfordnlp/sst2",
        None,
        "8d51e7e4887a4caaa95b3fbebbf53c0490b58bbb",
        "train",
    ),
    "dialogsum": (
        "eval",
        "knkarthick/dialogsum",
        None,
        "a968e7aee0602e257935f1321a02e4287f7d5848",
        "test",
    ),
}
STAGES = ("pretrain", "sft", "dpo", "verifier", "eval")


@dataclass
class DataConfig:
    stage: str = "all"  # pretrain, sft, dpo, verifier, eval or all: which presets, and what a source of your own is for
    sources: tuple[
        str, ...
    ] = ()  # [stage/]name[:cap][=file;file]; none = the presets of the stage; toy = the built-in world
    data_dir: str = "data"  # each source becomes a folder here
    local_dir: str = "."  # where relative files of the sources lie
    tokenizer: str = "gpt2"  # of pretraining shards: byte, gpt2 or the path of a ranks file; the toy world has its own
    seed: int = 0  # of the toy world
    toy_stories: int = 24000  # toy world: pretraining documents
    toy_problems: int = (
        2000  # toy world: word problems to learn from; few enough that held-out ones stay hard
    )
    toy_test: int = 500  # toy world: problems and pairs to test on

    def __post_init__(self):
        if self.stage not in (*STAGES, "all"):
            raise UserError(f"stage must be one of {', '.join(STAGES)}, all; got {self.stage!r}")
        faults = [
            f"{key} must be at least {low}, got {getattr(self, key)}"
            for key, low in (("toy_stories", 40), ("toy_problems", 1), ("toy_test", 1))
            if getattr(self, key) < low
        ]
        if faults:
            raise UserError("; ".join(faults))


@dataclass
class Source:
    stage: str
    name: str
    cap: int | None
    files: list[str]  # empty: from the hub

    @classmethod
    def parse(cls, text: str, cfg: DataConfig):
        head, equals, files = text.partition("=")
        stage, slash, name = head.rpartition("/")
        name, colon, cap = name.partition(":")
        if (
            not re.fullmatch(r"[\w.-]+", name)
            or name.startswith(".")
            or (colon and not cap.isdigit())
        ):
            raise UserError(f"source {text!r}: write [stage/]name[:cap][=file;file]")
        stage = stage or (PRESETS[name][0] if name in PRESETS and not files else cfg.stage)
        if stage not in STAGES:
            raise UserError(
                f"source {text!r}: {'unknown preset, or no' if not slash else 'unknown'} stage {stage!r}. Presets: "
                f"{', '.join(PRESETS)}; your own files need --stage= or stage/name=file, stage one of {', '.join(STAGES)}"
            )
        if name not in PRESETS and not equals:
            raise UserError(
                f"source {text!r}: unknown preset {name!r}, and no =file. Presets: {', '.join(PRESETS)}"
            )
        return cls(
            stage,
            name,
            int(cap) if cap else None,
            [os.path.join(cfg.local_dir, f) for f in files.split(";")] if equals else [],
        )


def hub_rows(name: str):
    """Rows of a preset from the Hugging Face hub, at its pinned revision. Any failure is an error, never a skip."""
    import datasets

    stage, repo, config, revision, split = PRESETS[name]
    try:
        return datasets.load_dataset(repo, config, split=split, revision=revision)
    except Exception as error:  # network, hub, disk: all end the same way
        raise UserError(
            f"could not load {repo} {config or ''} at {revision[:12]} ({type(error).__name__}: {str(error)[:200]}). On a "
            f"node without network, prepare it where there is one, or give a local file: --sources={stage}/{name}=FILE"
        ) from None


def text_documents(source: Source):
    """Documents of a text source. .txt: separated by <|endoftext|> lines, else WikiText headings, else one; others: "text"."""
    if not source.files:
        yield from (
            wikitext_articles(row["text"] for row in hub_rows(source.name))
            if "wikitext" in source.name
            else (row["text"] for row in hub_rows(source.name))
        )
    for path in source.files:
        kind = path.removesuffix(".gz").rpartition(".")[2]
        if kind in ("json", "jsonl", "parquet"):
            for number, row in enumerate(read_rows(path), 1):
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise UserError(f'{path}, record {number}: no "text" in it')
                yield row["text"]
        else:
            with open_text(path) as f:
                yield from (
                    wikitext_articles(f) if "wikitext" in source.name else marked_documents(f)
                )


def marked_documents(lines):
    document = []
    for text in lines:
        if text.strip() == SPECIAL[0]:
            yield "".join(document)
            document = []
        else:
            document.append(text)
    yield "".join(document)


def wikitext_articles(lines):
    """WikiText comes line by line; a line " = Title = " begins an article."""
    article = []
    for text in lines:
        marker = text.strip() == SPECIAL[0]
        if (marker or re.fullmatch(r" = [^=](.*[^=])? = \n?", text)) and article:
            yield "".join(article)
            article = []
        if not marker:
            article.append(text if text.endswith("\n") or not text else text + "\n")
    yield "".join(article)


def prepare_text(source: Source, folder: str, tokenizer: Tokenizer) -> dict:
    """Token shards of a text source, each document followed by EOS; every 100th document (or the last 5 %) is validation."""
    buffers, counts = {"train": [], "val": []}, {"train": 0, "val": 0}
    tokens, waiting, n_documents, eos = (
        {"train": 0, "val": 0},
        {"train": 0, "val": 0},
        0,
        np.array([tokenizer.eos], "<u4"),
    )

    def flush(split: str):
        if buffers[split]:
            write_shard(
                os.path.join(folder, f"{split}_{counts[split]:03d}.bin"),
                np.concatenate(buffers[split]),
                tokenizer,
            )
            counts[split] += 1
            tokens[split] += sum(map(len, buffers[split]))
            buffers[split], waiting[split] = [], 0

    def add(batch: list[str]):
        nonlocal n_documents
        for ids in tokenizer.encode_batch(batch):
            n_documents += 1
            split = "val" if n_documents % 100 == 0 else "train"
            buffers[split] += [ids, eos]
            waiting[split] += len(ids) + 1
            if (
                waiting[split] >= SHARD_TOKENS and n_documents >= 100
            ):  # before, the tail may yet become validation
                flush(split)

    batch, n_characters = [], 0
    for number, text in enumerate(filter(str.strip, text_documents(source))):
        if number == source.cap:
            break
        batch.append(text)
        n_characters += len(text)
        if n_characters > 1 << 22:
            add(batch)
            batch, n_characters = [], 0
    add(batch)
    if n_documents == 0:
        raise UserError(f"source {source.name}: no text in it")
    if not buffers["val"] and not counts["val"]:
        rest = np.concatenate(buffers["train"])
        cut = len(rest) - max(1, len(rest) // 20)
        buffers["train"], buffers["val"] = [rest[:cut]], [rest[cut:]]
    flush("train"), flush("val")
    return {"documents": n_documents, "tokens": tokens, "tokenizer": tokenizer.spec()}


def prepare_records(source: Source, folder: str) -> dict:
    """JSON lines of a record source, cut by a hash of the prompt: 5 % validation; of problems also 25 % for the verifier."""
    rows = (
        [row for path in source.files for row in read_rows(path)]
        if source.files
        else list(hub_rows(source.name))
    )
    records = convert(rows[: source.cap], source.stage, source.name)
    splits = {"train": [], "val": [], "verifier": []}
    for record in records:
        percent = int(hashlib.sha256(prompt_of(record).encode()).hexdigest(), 16) % 100
        splits[
            "val"
            if percent < 5
            else "verifier"
            if percent < 30 and source.stage == "verifier"
            else "train"
        ].append(record)
    for split in [
        s for s in splits if not splits[s] and (s != "verifier" or source.stage == "verifier")
    ]:
        largest = max(
            splits.values(), key=len
        )  # too few prompts for the hash: move the last one, with all its records
        prompts = [prompt_of(record) for record in largest]
        if len(set(prompts)) > 1:
            splits[split] += [r for r, prompt in zip(largest, prompts) if prompt == prompts[-1]]
            largest[:] = [r for r, prompt in zip(largest, prompts) if prompt != prompts[-1]]
    lacking = [
        s for s in splits if not splits[s] and (s != "verifier" or source.stage == "verifier")
    ]
    if lacking:
        raise UserError(
            f"source {source.name}: {len(records)} usable records of {len(set(map(prompt_of, records)))} prompts, too few to hold some out for "
            f"{' and '.join(lacking)}: at least {2 + (source.stage == 'verifier')} different prompts are needed"
        )
    kind = "problems" if source.stage == "verifier" else source.stage
    for split, part in splits.items():
        if part:
            write_jsonl(os.path.join(folder, f"{kind}_{split}.jsonl"), part)
    return {"records": {split: len(part) for split, part in splits.items() if part}}


def prepare_eval(source: Source, folder: str) -> dict:
    """Evaluation data keeps its own form: text as test.txt, problems as problems_test.jsonl, other records as test.jsonl."""
    first = source.files[0] if source.files else source.name
    if "wikitext" in source.name or first.removesuffix(".gz").endswith(".txt"):
        if source.files:
            text = ""
            for path in source.files:
                with open_text(path) as f:
                    text += f.read()
        else:
            text = "".join(row["text"] for row in hub_rows(source.name))
        write_atomic(os.path.join(folder, "test.txt"), lambda f: f.write(text.encode()))
        return {"bytes": len(text.encode())}
    if first.removesuffix(".gz").endswith(".tsv"):
        with open_text(first) as f:
            keys, *lines = (line.rstrip("\n").split("\t") for line in f)
        rows = [dict(zip(keys, values)) for values in lines]
    else:
        rows = (
            [row for path in source.files for row in read_rows(path)]
            if source.files
            else list(hub_rows(source.name))
        )
    if not rows[: source.cap]:
        raise UserError(f"source {source.name}: no record in {', '.join(source.files) or 'it'}")
    problems = all(isinstance(row, dict) and {"question", "answer"} <= set(row) for row in rows)
    write_jsonl(
        os.path.join(folder, "problems_test.jsonl" if problems else "test.jsonl"),
        rows[: source.cap],
    )
    return {"records": len(rows[: source.cap])}


def prepare_toy(folder: str, cfg: DataConfig) -> dict:
    """The built-in world: text shards in bytes, chats, pairs and problems; see toy.py for what each stage is to learn."""
    tokenizer = load_tokenizer("toy")
    counts = {}
    for split, n in (("train", cfg.toy_stories), ("val", cfg.toy_stories // 40)):
        documents = toy.records(toy.story, split, n, cfg.seed)
        tokens = np.concatenate(
            [np.array([*tokenizer.encode(text), tokenizer.eos], "<u4") for text in documents]
        )
        write_shard(os.path.join(folder, f"{split}_000.bin"), tokens, tokenizer)
        counts[f"pretrain_{split}_tokens"] = len(tokens)
    files = {"problems_train": toy.records(toy.problem, "train", cfg.toy_problems, cfg.seed)}
    for split, n in (("verifier", 4000), ("val", 500), ("test", cfg.toy_test)):
        files[f"problems_{split}"] = toy.records(toy.problem, split, n, cfg.seed)
    for split, n, problems in (
        ("train", 2000, files["problems_train"]),
        ("val", 200, files["problems_val"][:200]),
    ):
        files[f"sft_{split}"] = toy.records(toy.instruction, split, n, cfg.seed) + [
            sft_record(row) for row in problems
        ]
        files[f"dpo_{split}"] = toy.records(toy.preference, split, n, cfg.seed)
    files["dpo_test"] = toy.records(toy.preference, "test", cfg.toy_test, cfg.seed)
    for name, rows in files.items():
        write_jsonl(os.path.join(folder, f"{name}.jsonl"), rows)
        counts[name] = len(rows)
    return counts


def prepare(cfg: DataConfig) -> None:
    """Make every source's folder; a folder whose manifest names the same request is kept."""
    texts = cfg.sources or tuple(
        name for name, preset in PRESETS.items() if cfg.stage in (preset[0], "all")
    )
    sources = [
        Source("pretrain", "toy", None, []) if text == "toy" else Source.parse(text, cfg)
        for text in texts
    ]
    tokenizer = None
    for source in sources:
        folder = os.path.join(cfg.data_dir, source.name)
        request = {
            "stage": source.stage,
            "cap": source.cap,
            "tokenizer": cfg.tokenizer,
            "files": [
                [os.path.basename(f), sha256(f)[:16] if os.path.isfile(f) else None]
                for f in source.files
            ],
            "from": list(PRESETS[source.name][1:])
            if source.name in PRESETS and not source.files
            else None,
        }
        if source.name == "toy":
            request = {
                "toy": [
                    cfg.seed,
                    cfg.toy_stories,
                    cfg.toy_problems,
                    cfg.toy_test,
                    sha256(toy.__file__)[:16],
                ]
            }
        path = os.path.join(folder, f"manifest_{source.stage}.json")
        before = read_manifest(path)
        if before["request"] == request and all(
            os.path.isfile(os.path.join(folder, name)) for name in before["files"]
        ):
            print(f"data: {folder} ({source.stage}) is there already")
            continue
        made = f"{folder}.{os.getpid()}.part"  # the files move over when all of them are there
        if source.name == "toy":
            counts = prepare_toy(made, cfg)
        elif source.stage == "pretrain":
            tokenizer = tokenizer or tokenizer_for_preparation(cfg)
            counts = prepare_text(source, made, tokenizer)
        else:
            counts = (
                prepare_eval(source, made)
                if source.stage == "eval"
                else prepare_records(source, made)
            )
        digests = {name: sha256(os.path.join(made, name)) for name in sorted(os.listdir(made))}
        os.makedirs(folder, exist_ok=True)
        remove_if_there(path)  # it must not vouch for what is half replaced
        for name in digests:
            os.replace(os.path.join(made, name), os.path.join(folder, name))
        for name in set(before["files"]) - set(digests):
            remove_if_there(os.path.join(folder, name))
        os.rmdir(made)
        write_json(path, {"request": request, "counts": counts, "sha256": digests})
        print(f"data: {folder}: {json.dumps(counts)}")


def remove_if_there(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def read_manifest(path: str) -> dict:
    """Request and file names of a manifest; of none where it is missing or damaged, so that its folder is made again."""
    try:
        manifest = read_jsonl(path)
        return {
            "request": manifest["request"],
            "files": [os.path.basename(name) for name in manifest["sha256"]],
        }
    except (UserError, KeyError, TypeError):
        return {"request": None, "files": []}


def ensure(spec: str, data_dir: str) -> None:
    """Make the toy world where spec names it and it is missing: it needs no network, and equal files may be written twice."""
    if (
        spec
        and any(name == "toy" for name, _ in parse_mixture(spec))
        and not os.path.isfile(os.path.join(data_dir, "toy", "manifest_pretrain.json"))
    ):
        prepare(DataConfig(sources=("toy",), data_dir=data_dir))


def tokenizer_for_preparation(cfg: DataConfig) -> Tokenizer:
    """The tokenizer, its ranks copied to data_dir so that training nodes need nothing else."""
    kept = os.path.join(cfg.data_dir, "gpt2.tiktoken")
    if cfg.tokenizer == "gpt2" and not os.path.isfile(kept):
        try:
            ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
        except Exception as error:
            raise UserError(
                f"could not fetch the GPT-2 ranks ({type(error).__name__}); give a local file: --tokenizer=gpt2.tiktoken"
            ) from None
        rows = sorted(ranks.items(), key=lambda item: item[1])
        write_atomic(
            kept,
            lambda f: f.writelines(
                base64.b64encode(token) + b" %d\n" % rank for token, rank in rows
            ),
        )
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.data_dir)
    if tokenizer.name == "gpt2" and not os.path.isfile(kept):
        with open(cfg.tokenizer, "rb") as f:
            content = f.read()
        write_atomic(kept, lambda f: f.write(content))
    return tokenizer


def main(argv: list[str]) -> int:
    prepare(configurator.load(DataConfig, argv, quiet=False))
    return 0


if __name__ == "__main__":
    configurator.run(main)
