"""Data folders: made whole or not at all, with a manifest of what they were made from.

A folder data_dir/NAME holds token shards (train_000.bin, val_000.bin) for text, JSON lines for
records, and a manifest_STAGE.json with the request, counts and the sha256 of every file.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import astuple, dataclass

import numpy as np

from configurator import UserError
from corpus import toy
from corpus.shards import SHARD_TOKENS, parse_mixture, write_shard
from corpus.sources import Source, read_manifest, text_documents
from corpus.tokenizer import Tokenizer, load_tokenizer, train_ranks, write_ranks
from runtime.files import (
    read_json,
    remove_if_there,
    remove_leftovers,
    sha256,
    unfinished,
    write_json,
    write_jsonl,
)

BATCH = 1024  # documents to encode at a time


def fault_of(folder: str, digests: dict[str, str]) -> str:
    """Say which of the files that a manifest names is not what it was; "" where none is."""
    for name, wanted in digests.items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            return f"{name} is missing"
        if sha256(path) != wanted:
            return f"{name} is damaged or was changed"
    return ""


def make_folder(
    folder: str, stage: str, request: dict, write: Callable[[str], dict], force: bool = False
) -> None:
    """Make the part of a data folder that belongs to a stage, whole or not at all.

    write(folder) writes the files into a new folder and returns counts for the manifest. A folder
    whose manifest names the same request, and whose files are as they were, is kept.
    """
    remove_leftovers(os.path.dirname(folder))
    path = os.path.join(folder, f"manifest_{stage}.json")
    old_request, old_files = read_manifest(path)
    reason = "by another request, or older rules" * (old_request not in (None, request))
    if old_request == request:
        reason = "as --force says" if force else fault_of(folder, old_files)
        if not reason:
            print(f"data: {folder} ({stage}) is there already")
            return
    if reason:
        print(f"data: {folder} ({stage}) is made again: {reason}", flush=True)
    made = unfinished(folder, "part")  # the files move over when all of them are there
    shutil.rmtree(made, ignore_errors=True)  # of a dead process that had our number
    try:
        counts = write(made)
        digests = {name: sha256(os.path.join(made, name)) for name in sorted(os.listdir(made))}
        os.makedirs(folder, exist_ok=True)
        write_json(path, {"unfinished": request})  # nobody takes a folder that is half replaced
        for name in digests:
            os.replace(os.path.join(made, name), os.path.join(folder, name))
    finally:
        shutil.rmtree(made, ignore_errors=True)
    for name in set(old_files) - set(digests):
        remove_if_there(os.path.join(folder, name))
    write_json(path, {"request": request, "counts": counts, "sha256": digests})
    print(f"data: {folder}: {json.dumps(counts)}")


class ShardWriter:
    """A ShardWriter collects the documents of one split and writes them as shards."""

    def __init__(self, folder: str, split: str, tokenizer: Tokenizer):
        self.folder, self.split, self.tokenizer = folder, split, tokenizer
        self.eos = np.array([tokenizer.eos], "<u4")
        self.parts = []  # of the next shard: arrays of ids
        self.waiting = self.n_tokens = self.n_shards = 0

    def add(self, ids: np.ndarray) -> None:
        self.parts += [ids, self.eos]
        self.waiting += len(ids) + 1

    def flush(self) -> None:
        if self.parts:
            tokens = np.concatenate(self.parts)
            name = f"{self.split}_{self.n_shards:03d}.bin"
            write_shard(os.path.join(self.folder, name), tokens, self.tokenizer)
            self.n_shards += 1
            self.n_tokens += len(tokens)
            self.parts, self.waiting = [], 0


def write_text_shards(source: Source, folder: str, tokenizer: Tokenizer) -> dict:
    """Write the shards of a text source, EOS after each document; return counts.

    Every 100th document is for validation; of fewer documents the last 5 % of the tokens are.
    """
    train = ShardWriter(folder, "train", tokenizer)
    val = ShardWriter(folder, "val", tokenizer)
    documents = text_documents(source)
    n_documents = 0
    while texts := list(itertools.islice(documents, BATCH)):
        for ids in tokenizer.encode_batch(texts):
            n_documents += 1
            writer = train if n_documents % 100 else val
            writer.add(ids)
            if writer.waiting >= SHARD_TOKENS and n_documents >= 100:
                writer.flush()
    if n_documents == 0:
        raise UserError(f"source {source.name}: there is no text in it")
    if n_documents < 100:
        tokens = np.concatenate(train.parts)
        cut = len(tokens) - max(1, len(tokens) // 20)
        train.parts, val.parts = [tokens[:cut]], [tokens[cut:]]
    train.flush()
    val.flush()
    n_tokens = {"train": train.n_tokens, "val": val.n_tokens}
    made_by = {key: getattr(tokenizer, key) for key in ("name", "hash", "vocab_size")}
    return {"documents": n_documents, "tokens": n_tokens, "tokenizer": made_by}


def learn_tokenizer(path: str, sources: list[Source], n_text: int) -> Tokenizer:
    """Write the ranks of n_text symbols that suit the sources' text; return their tokenizer."""
    print(f"data: {path}: learnt from {', '.join(source.name for source in sources)}", flush=True)
    texts = itertools.chain.from_iterable(map(text_documents, sources))
    write_ranks(path, train_ranks(texts, n_text))
    return load_tokenizer(path)


@dataclass(frozen=True)
class ToySizes:
    """ToySizes says how large a toy world is, and its seed."""

    seed: int = 0
    stories: int = 24_000
    problems: int = 2_000
    test: int = 500


def make_toy(sizes: ToySizes, data_dir: str, force: bool = False) -> None:
    """Make the folder of the toy world, unless the same world is there."""
    request = {"toy": [*astuple(sizes), toy.VERSION]}
    folder = os.path.join(data_dir, "toy")
    make_folder(folder, "pretrain", request, lambda made: write_toy_world(made, sizes), force)


def ensure_toy(spec: str, data_dir: str) -> None:
    """Make the toy world where a mixture names it and it is missing. Many processes may do so."""
    manifest = os.path.join(data_dir, "toy", "manifest_pretrain.json")
    named = spec and "toy" in dict(parse_mixture(spec))
    if named and (not os.path.isfile(manifest) or read_json(manifest).get("unfinished")):
        make_toy(ToySizes(), data_dir)


def write_toy_world(folder: str, sizes: ToySizes) -> dict:
    """Write the shards, chats, pairs and problems of the toy world, and return counts."""
    counts = {}
    tokenizer = load_tokenizer("toy")
    for split, n in (("train", sizes.stories), ("val", sizes.stories // 40)):
        writer = ShardWriter(folder, split, tokenizer)
        for story in toy.records(toy.story, split, n, sizes.seed):
            writer.add(tokenizer.encode_array(story))
        writer.flush()
        counts[f"pretrain_{split}_tokens"] = writer.n_tokens
    for name, rows in toy_records(sizes).items():
        write_jsonl(os.path.join(folder, f"{name}.jsonl"), rows)
        counts[name] = len(rows)
    return counts


def toy_records(sizes: ToySizes) -> dict[str, list[dict]]:
    """Return the records of the toy world under the names of their files."""
    seed, files = sizes.seed, {}
    n_problems = {"train": sizes.problems, "verifier": 4000, "val": 500, "test": sizes.test}
    for split, n in n_problems.items():
        files[f"problems_{split}"] = toy.records(toy.problem, split, n, seed)
    for split, n, n_solved in (("train", 2000, None), ("val", 200, 200)):
        problems = files[f"problems_{split}"][:n_solved]
        solved = [toy.chat(row["question"], row["answer"]) for row in problems]
        tales = toy.records(toy.instruction, split, n, seed)
        files[f"sft_{split}"] = toy.conversations(tales + solved, seed)
        files[f"dpo_{split}"] = toy.records(toy.preference, split, n, seed)
    files["dpo_test"] = toy.records(toy.preference, "test", sizes.test, seed)
    return files
