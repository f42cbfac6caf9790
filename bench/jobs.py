"""A worker for more than a model: tokenize, load, start, race, of this checkout or of nanoGPT."""

import os
import pickle
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from bench.worker import import_file, serve
from configurator import UserError
from corpus.folders import write_text_shards
from corpus.shards import Mixture, write_shard
from corpus.sources import Source, text_documents
from corpus.tokenizer import Tokenizer, load_tokenizer
from runtime.checkpoint import load_checkpoint, model_from

ROOT = Path(__file__).resolve().parent.parent
RACE_STEPS = {"tiny": 2000, "small": 250}  # of nanoGPT; ours: config/race_<shape>.py
FIRST_STEP = {"ours": "step 00000/[0-9]+ . loss", "nanoGPT": "iter 0: loss"}  # what train.py prints


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


class Race:
    """Training runs from the command line to the last checkpoint, and the loss of that one.

    The loss is over the whole validation split: the last tenth of the text, in windows that do not
    overlap. nanoGPT: the CPU recipe of its README.
    """

    def __init__(self, cfg: SimpleNamespace) -> None:
        self.cfg, self.shape, self.folder = cfg, cfg.shape, TemporaryDirectory()
        self.home = Path(self.folder.name)
        text = "\n".join(text_documents(Source("pretrain", "bench", None, [cfg.text]))).encode()
        if not text.isascii():
            raise UserError(f"{cfg.text} is not ASCII: a byte would not be a character")
        tokens, tokenizer = np.frombuffer(text, np.uint8), load_tokenizer("byte")
        cut = len(tokens) * 9 // 10
        parts = {"train": tokens[:cut], "val": tokens[cut:]}
        for split, part in parts.items():
            write_shard(str(self.home / "race" / f"{split}_000.bin"), part, tokenizer)
        self.val = Mixture("race", str(self.home), "val", self.shape.seq_len, 0, tokenizer)
        if cfg.system == "nanoGPT":
            self.prepare_nanogpt(parts, np.unique(tokens))

    def prepare_nanogpt(self, parts: dict[str, np.ndarray], symbols: np.ndarray) -> None:
        numbers = np.searchsorted(symbols, np.arange(256))
        self.numbers = torch.from_numpy(numbers)
        self.nanogpt = shutil.copytree(self.cfg.nanogpt, self.home / "nanogpt")
        folder = self.nanogpt / "data" / "shakespeare_char"
        folder.mkdir(parents=True, exist_ok=True)
        for split, part in parts.items():
            numbers[part].astype(np.uint16).tofile(folder / f"{split}.bin")
        (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(symbols)}))

    def run(self, seed: int, until: str | None = None) -> float:
        """Return the seconds of train.py until it prints a line that matches `until`, or ends."""
        shape, name = self.shape, self.cfg.shape_name
        if self.cfg.system == "ours":
            command = [f"{ROOT}/train.py", f"{ROOT}/config/race_{name}.py", f"--seed={seed}"]
            command += ["--data=race", "--tokenizer=byte", f"--data_dir={self.home}"]
            return timed([*command, f"--out_dir={self.home}/{seed}"], ROOT, until)
        path = self.nanogpt / "train.py"
        path.write_text(re.sub(r"manual_seed\(\d+", f"manual_seed({seed}", path.read_text()))
        command = "train.py config/train_shakespeare_char.py --device=cpu --compile=False"
        command += f" --block_size={shape.seq_len} --batch_size={shape.batch} --eval_iters=1"
        command += f" --n_embd={shape.d_model} --n_layer={shape.n_layer} --n_head={shape.n_head}"
        if not until:
            steps = RACE_STEPS[name]
            command += f" --max_iters={steps} --lr_decay_iters={steps} --eval_interval={steps}"
            command += " --log_interval=100 --dropout=0.0"
        return timed(command.split(), self.nanogpt, until)

    def judge(self, seed: int) -> dict[str, float]:
        """Return the loss of the last checkpoint, its parameters, and the tokens it has seen."""
        if self.cfg.system == "ours":
            checkpoint = load_checkpoint(f"{self.home}/{seed}")
            model = summed_loss = model_from(checkpoint)
            tokens = checkpoint["step"] * checkpoint["train_config"]["batch_tokens"]
        else:
            module = import_file("nanogpt_model", f"{self.nanogpt}/model.py")
            path = f"{self.nanogpt}/out-shakespeare-char/ckpt.pt"
            checkpoint = torch.load(path, weights_only=True)
            model = module.GPT(module.GPTConfig(**checkpoint["model_args"]))
            model.load_state_dict(checkpoint["model"])
            tokens = RACE_STEPS[self.cfg.shape_name] * self.shape.batch * self.shape.seq_len

            def summed_loss(idx: Tensor, targets: Tensor) -> Tensor:
                return model(self.numbers[idx], self.numbers[targets])[1] * targets.numel()

        loss, n_parameters = self.val_loss(summed_loss), sum(p.numel() for p in model.parameters())
        return {"val_loss": loss, "parameters": n_parameters, "tokens": tokens}

    @torch.no_grad()
    def val_loss(self, summed_loss: Callable[[Tensor, Tensor], Tensor]) -> float:
        total = 0.0
        for first in range(0, self.val.n_rows, 64):
            rows = self.val.validation(first, min(first + 64, self.val.n_rows))
            total += float(summed_loss(rows[:, :-1], rows[:, 1:]))
        return total / (self.val.n_rows * self.shape.seq_len)


def race(cfg: SimpleNamespace) -> Iterator[dict]:
    """Measure whole runs; with task=start, until the first training step, at the shape tiny."""
    contest = Race(cfg)
    until = FIRST_STEP[cfg.system] if cfg.task == "start" else None
    yield {}
    for seed in count(1):
        seconds = contest.run(seed, until)
        yield {"first_step": seconds} if until else {"seconds": seconds, **contest.judge(seed)}


def timed(command: list[str], folder: Path, until: str | None) -> float:
    """Return the seconds until a Python program prints a line that matches `until`, or ends."""
    began, lines = time.perf_counter(), []
    command = [sys.executable, "-u", *command]
    pipes = {"stdin": DEVNULL, "stdout": PIPE, "stderr": STDOUT}
    with Popen(command, cwd=folder, text=True, **pipes) as process:
        for text in process.stdout:
            lines.append(text)
            if until and re.search(until, text):
                seconds = time.perf_counter() - began
                process.kill()
                return seconds
    if process.returncode or until:
        raise UserError(f"{' '.join(command)} failed: {''.join(lines[-15:])}")
    return time.perf_counter() - began


if __name__ == "__main__":
    serve({"tokenize": tokenize, "load": load, "start": race, "race": race})
