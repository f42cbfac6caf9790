"""A worker for what is not about a model alone: tokenize, load, start, race.

Here `ours` is this checkout, and the only peer is nanoGPT.
"""

import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from bench.worker import import_file, serve
from configurator import UserError
from corpus.folders import write_text_shards
from corpus.shards import Mixture, write_shard
from corpus.sources import Source, text_documents
from corpus.tokenizer import load_tokenizer
from runtime.checkpoint import load_checkpoint, model_from

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RACE_STEPS = {"tiny": 2000, "small": 250}  # of nanoGPT; ours: config/race_<shape>.py


class Tokenize:
    """From documents in a file to token shards on the disk, as each project prepares its data."""

    def __init__(self, cfg: SimpleNamespace) -> None:
        self.cfg, self.facts = cfg, {}
        self.source = Source("pretrain", "bench", None, [cfg.text])
        self.tokenizer = load_tokenizer(cfg.tokenizer, cfg.data_dir)
        n_bytes = sum(len(text.encode()) for text in text_documents(self.source))
        self.facts["megabytes"] = n_bytes / 1e6

    def round(self) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            if self.cfg.system == "ours":
                write_text_shards(self.source, folder, self.tokenizer)
            else:
                self.like_nanogpt(folder)
            return {"tokenize": time.perf_counter() - began}

    def like_nanogpt(self, folder: str) -> None:
        """Do as nanoGPT's data/openwebtext/prepare.py: datasets.map, then a memmap in batches."""
        import datasets

        def documents() -> object:
            return ({"text": text} for text in text_documents(self.source))

        def process(row: dict) -> dict:
            ids = [*self.tokenizer.bpe.encode_ordinary(row["text"]), self.tokenizer.eos]
            return {"ids": ids, "len": len(ids)}

        datasets.disable_progress_bars()
        rows = datasets.Dataset.from_generator(documents, cache_dir=folder)
        tokenized = rows.map(process, remove_columns=["text"], num_proc=os.cpu_count())
        path, n_tokens = os.path.join(folder, "train.bin"), sum(tokenized["len"])
        out, place = np.memmap(path, np.uint16, "w+", shape=(n_tokens,)), 0
        n_parts = min(1024, len(tokenized))
        for i in range(n_parts):
            shard = tokenized.shard(n_parts, i, contiguous=True).with_format("numpy")
            ids = np.concatenate(shard["ids"])
            out[place : place + len(ids)] = ids
            place += len(ids)
        out.flush()


class Load:
    """One training batch from token shards of 10M tokens."""

    def __init__(self, cfg: SimpleNamespace) -> None:
        self.cfg, self.shape, self.facts = cfg, cfg.shape, {}
        self.folder, self.rows, tokenizer = tempfile.TemporaryDirectory(), 0, load_tokenizer("byte")
        home = self.folder.name
        self.path = os.path.join(home, "bench", "train_000.bin")
        write_shard(self.path, np.random.default_rng(0).integers(0, 256, 10_000_000), tokenizer)
        self.mixture = Mixture("bench", home, "train", self.shape.seq_len, 0, tokenizer)

    def round(self) -> dict[str, float]:
        make = self.ours if self.cfg.system == "ours" else self.nanogpt
        began = time.perf_counter()
        for _ in range(100):
            make()
        return {"batch": (time.perf_counter() - began) / 100}

    def ours(self) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the next rows."""
        rows = self.mixture.shuffled(self.rows, self.rows + self.shape.batch)
        self.rows += self.shape.batch
        return rows[:, :-1], rows[:, 1:]

    def nanogpt(self) -> tuple[Tensor, Tensor]:
        """Do as nanoGPT's get_batch."""
        tokens, T = np.memmap(self.path, dtype=np.uint16, mode="r"), self.shape.seq_len
        starts = torch.randint(len(tokens) - T, (self.shape.batch,))
        idx = [torch.from_numpy(tokens[i : i + T].astype(np.int64)) for i in starts]
        targets = [torch.from_numpy(tokens[i + 1 : i + 1 + T].astype(np.int64)) for i in starts]
        return torch.stack(idx), torch.stack(targets)


class Race:
    """A training run from the command line to its last checkpoint, and the loss of that one.

    The loss is over the whole validation split: the last tenth of the text, in windows that do not
    overlap. nanoGPT: the CPU recipe of its README.
    """

    def __init__(self, cfg: SimpleNamespace) -> None:
        self.cfg, self.shape, self.facts = cfg, cfg.shape, {}
        self.seed, self.folder = 0, tempfile.TemporaryDirectory()
        self.home = self.folder.name
        text = "\n".join(text_documents(Source("pretrain", "bench", None, [cfg.text]))).encode()
        if not text.isascii():
            raise UserError(f"{cfg.text} is not ASCII: a byte would not be a character")
        tokens, tokenizer = np.frombuffer(text, np.uint8), load_tokenizer("byte")
        cut = len(tokens) * 9 // 10
        parts = {"train": tokens[:cut], "val": tokens[cut:]}
        self.data = os.path.join(self.home, "data")
        for split, part in parts.items():
            write_shard(os.path.join(self.data, "race", f"{split}_000.bin"), part, tokenizer)
        self.val = Mixture("race", self.data, "val", self.shape.seq_len, 0, tokenizer)
        if cfg.system == "nanoGPT":
            self.prepare_nanogpt(parts, np.unique(tokens))

    def prepare_nanogpt(self, parts: dict[str, np.ndarray], symbols: np.ndarray) -> None:
        """Copy the checkout, and write its data: each character as its number."""
        self.numbers = np.zeros(256, np.uint16)
        self.numbers[symbols] = range(len(symbols))
        self.checkout = shutil.copytree(self.cfg.nanogpt, os.path.join(self.home, "nanogpt"))
        folder = os.path.join(self.checkout, "data", "shakespeare_char")
        os.makedirs(folder, exist_ok=True)
        for split, part in parts.items():
            self.numbers[part].tofile(os.path.join(folder, f"{split}.bin"))
        with open(os.path.join(folder, "meta.pkl"), "wb") as f:
            pickle.dump({"vocab_size": len(symbols)}, f)

    def round(self) -> dict[str, float]:
        self.seed += 1
        return self.ours() if self.cfg.system == "ours" else self.nanogpt()

    def our_seconds(self, out_dir: str, until: str | None = None) -> float:
        """Run train.py."""
        recipe = os.path.join(ROOT, "config", f"race_{self.cfg.shape_name}.py")
        command = [os.path.join(ROOT, "train.py"), recipe, "--data=race", "--tokenizer=byte"]
        command += [f"--data_dir={self.data}", f"--out_dir={out_dir}", f"--seed={self.seed}"]
        return timed(command, ROOT, until)

    def nanogpt_seconds(self, loop: str, until: str | None = None) -> float:
        """Run nanoGPT's train.py with this seed."""
        with open(os.path.join(self.cfg.nanogpt, "train.py")) as f:
            text = f.read().replace("manual_seed(1337", f"manual_seed({self.seed}")
        with open(os.path.join(self.checkout, "train.py"), "w") as f:
            f.write(text)
        shape = self.shape
        sizes = f"--block_size={shape.seq_len} --batch_size={shape.batch} --n_embd={shape.d_model}"
        sizes += f" --n_layer={shape.n_layer} --n_head={shape.n_head} --eval_iters=1"
        command = "train.py config/train_shakespeare_char.py --device=cpu --compile=False"
        return timed(f"{command} {sizes} {loop}".split(), self.checkout, until)

    def ours(self) -> dict[str, float]:
        """Race, and judge the checkpoint."""
        out_dir = os.path.join(self.home, f"out{self.seed}")
        seconds = self.our_seconds(out_dir)
        checkpoint = load_checkpoint(out_dir)
        model = model_from(checkpoint)
        tokens = checkpoint["step"] * checkpoint["train_config"]["batch_tokens"]
        found = {"seconds": seconds, "val_loss": self.val_loss(model)}
        return found | {"parameters": model.num_params(), "tokens": tokens}

    def nanogpt(self) -> dict[str, float]:
        """Race, and judge the checkpoint."""
        steps = RACE_STEPS[self.cfg.shape_name]
        loop = f"--max_iters={steps} --lr_decay_iters={steps} --eval_interval={steps}"
        seconds = self.nanogpt_seconds(f"{loop} --log_interval=100 --dropout=0.0")
        module = import_file("nanogpt_model", os.path.join(self.checkout, "model.py"))
        path = os.path.join(self.checkout, "out-shakespeare-char", "ckpt.pt")
        checkpoint = torch.load(path, weights_only=True)
        model = module.GPT(module.GPTConfig(**checkpoint["model_args"]))
        model.load_state_dict(checkpoint["model"])
        numbers = torch.from_numpy(self.numbers.astype(np.int64))

        def summed_loss(idx: Tensor, targets: Tensor) -> Tensor:
            return model(numbers[idx], numbers[targets])[1] * targets.numel()

        found = {"seconds": seconds, "val_loss": self.val_loss(summed_loss)}
        n_parameters = sum(p.numel() for p in model.parameters())
        tokens = steps * self.shape.batch * self.shape.seq_len
        return found | {"parameters": n_parameters, "tokens": tokens}

    @torch.no_grad()
    def val_loss(self, summed_loss: Callable[[Tensor, Tensor], Tensor]) -> float:
        """Return the mean loss per token of the validation split."""
        total = 0.0
        for first in range(0, self.val.n_rows, 64):
            rows = self.val.validation(first, min(first + 64, self.val.n_rows))
            total += float(summed_loss(rows[:, :-1], rows[:, 1:]))
        return total / (self.val.n_rows * self.shape.seq_len)


class Start(Race):
    """From the command line to the first training step; the shape is always tiny."""

    def ours(self) -> dict[str, float]:
        out_dir = os.path.join(self.home, f"start{self.seed}")
        return {"first_step": self.our_seconds(out_dir, until="step 00000/[0-9]+ . loss")}

    def nanogpt(self) -> dict[str, float]:
        return {"first_step": self.nanogpt_seconds("", until="iter 0: loss")}


def timed(command: list[str], folder: str, until: str | None) -> float:
    """Return the seconds until a Python program prints a line that matches `until`, or ends."""
    began, lines = time.perf_counter(), []
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = [sys.executable, "-u", *command]
    with subprocess.Popen(command, cwd=folder, text=True, **pipes) as process:
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
    serve({"tokenize": Tokenize, "load": Load, "start": Start, "race": Race})
