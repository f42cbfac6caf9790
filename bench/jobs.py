"""A worker for the way of the data: tokenize and load, of this checkout or of nanoGPT."""

import os
import time
from collections.abc import Iterator
from itertools import count
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from bench.worker import serve
from corpus.folders import write_text_shards
from corpus.shards import Mixture, write_shard
from corpus.sources import Source, text_documents
from corpus.tokenizer import Tokenizer, load_tokenizer


def tokenize(cfg: SimpleNamespace) -> Iterator[dict]:
    """Measure from documents in a file to token shards on the disk, as each project makes them."""
    source = Source("pretrain", "bench", None, [cfg.text])
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.data_dir)
    write = write_text_shards if cfg.system == "ours" else write_like_nanogpt
    yield {"megabytes": sum(len(text.encode()) for text in text_documents(source)) / 1e6}
    while True:
        with TemporaryDirectory() as folder:
            began = time.perf_counter()
            write(source, folder, tokenizer)
            seconds = time.perf_counter() - began
        yield {"tokenize": seconds}


def write_like_nanogpt(source: Source, folder: str, tokenizer: Tokenizer) -> None:
    """Do as nanoGPT's data/openwebtext/prepare.py: datasets.map, then a memmap in batches."""
    import datasets

    def documents() -> Iterator[dict]:
        return ({"text": text} for text in text_documents(source))

    def process(row: dict) -> dict:
        ids = [*tokenizer.bpe.encode_ordinary(row["text"]), tokenizer.eos]
        return {"ids": ids, "len": len(ids)}

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_generator(documents, cache_dir=folder)
    tokenized = rows.map(process, remove_columns=["text"], num_proc=os.cpu_count())
    path, n_parts = os.path.join(folder, "train.bin"), min(1024, len(tokenized))
    out, place = np.memmap(path, np.uint16, "w+", shape=(sum(tokenized["len"]),)), 0
    for i in range(n_parts):
        shard = tokenized.shard(n_parts, i, contiguous=True).with_format("numpy")
        ids = np.concatenate(shard["ids"])
        out[place : place + len(ids)] = ids
        place += len(ids)
    out.flush()


def load(cfg: SimpleNamespace) -> Iterator[dict]:
    """Measure one training batch from token shards of 10M tokens."""
    tokenizer = load_tokenizer("byte")
    with TemporaryDirectory() as folder:
        path = os.path.join(folder, "bench", "train_000.bin")
        write_shard(path, np.random.default_rng(0).integers(0, 256, 10_000_000), tokenizer)
        batches = nanogpt_batches(path, cfg.shape)
        if cfg.system == "ours":
            mixture = Mixture("bench", folder, "train", cfg.shape.seq_len, 0, tokenizer)
            batches = our_batches(mixture, cfg.shape.batch)
        yield {}
        while True:
            began = time.perf_counter()
            for _ in range(100):
                next(batches)
            yield {"batch": (time.perf_counter() - began) / 100}


def our_batches(mixture: Mixture, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for first in count(0, size):
        rows = mixture.shuffled(first, first + size)
        yield rows[:, :-1], rows[:, 1:]


def nanogpt_batches(path: str, shape: SimpleNamespace) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        tokens, T = np.memmap(path, dtype=np.uint16, mode="r"), shape.seq_len
        starts = torch.randint(len(tokens) - T, (shape.batch,))
        idx = [torch.from_numpy(tokens[i : i + T].astype(np.int64)) for i in starts]
        targets = [torch.from_numpy(tokens[i + 1 : i + 1 + T].astype(np.int64)) for i in starts]
        yield torch.stack(idx), torch.stack(targets)


if __name__ == "__main__":
    serve({"tokenize": tokenize, "load": load})
