"""A worker of the benchmark: whole training runs to a loss, of this checkout, nanoGPT or nanochat.

Every project is started by the command line that its README gives, with its own recipe, on the same
bytes. A racer has command(seed), the working folder `home`, the environment `env`, and
judged(seed): the trained model, its summed loss, and the tokens it has seen.
"""

import json
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
import tiktoken
import torch
from torch import Tensor, nn

from bench.worker import import_file, serve
from configurator import UserError
from corpus.shards import Mixture, write_shard
from corpus.sources import Source, text_documents
from corpus.tokenizer import load_tokenizer
from runtime.checkpoint import load_checkpoint, model_from

ROOT = Path(__file__).resolve().parent.parent
# Of the peers. Ours stand in config/race_<shape>.py. nanochat: about to the loss of nanoGPT
RACE_STEPS = {"nanoGPT": {"tiny": 2000, "small": 250}, "nanochat": {"tiny": 640, "small": 115}}
FIRST_STEP = {"ours": "step 00000/[0-9]+ . loss", "nanoGPT": "iter 0: loss"}  # what train.py prints
SummedLoss = Callable[[Tensor, Tensor], Tensor]  # idx (B, T), targets (B, T) -> scalar


class Ours:
    def __init__(self, cfg: SimpleNamespace, folder: Path, parts: dict[str, bytes]) -> None:
        self.shape_name, self.folder, self.home, self.env = cfg.shape_name, folder, ROOT, {}

    def command(self, seed: int) -> list[str]:
        command = ["train.py", f"config/race_{self.shape_name}.py", f"--seed={seed}"]
        command += ["--data=race", "--tokenizer=byte", f"--data_dir={self.folder}"]
        return [*command, f"--out_dir={self.folder}/{seed}"]

    def judged(self, seed: int) -> tuple[nn.Module, SummedLoss, int]:
        checkpoint = load_checkpoint(f"{self.folder}/{seed}")
        model = model_from(checkpoint)
        return model, model, checkpoint["step"] * checkpoint["train_config"]["batch_tokens"]


class NanoGPT:
    """Its CPU recipe, of its README. Its symbols are the bytes that occur in the text."""

    def __init__(self, cfg: SimpleNamespace, folder: Path, parts: dict[str, bytes]) -> None:
        self.shape, self.steps = cfg.shape, RACE_STEPS["nanoGPT"][cfg.shape_name]
        self.until_first_step, self.env = cfg.task == "start", {}
        self.home = shutil.copytree(cfg.nanogpt, folder / "nanogpt")
        data = self.home / "data" / "shakespeare_char"
        data.mkdir(parents=True, exist_ok=True)
        symbols = sorted({*parts["train"], *parts["val"]})
        numbers = np.searchsorted(symbols, np.arange(256))
        for split, part in parts.items():
            numbers[np.frombuffer(part, np.uint8)].astype(np.uint16).tofile(data / f"{split}.bin")
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(symbols)}))
        self.numbers = torch.from_numpy(numbers)

    def command(self, seed: int) -> list[str]:
        path, shape = self.home / "train.py", self.shape
        path.write_text(re.sub(r"manual_seed\(\d+", f"manual_seed({seed}", path.read_text()))
        command = "train.py config/train_shakespeare_char.py --device=cpu --compile=False"
        command += f" --block_size={shape.seq_len} --batch_size={shape.batch} --eval_iters=1"
        command += f" --n_embd={shape.d_model} --n_layer={shape.n_layer} --n_head={shape.n_head}"
        if not self.until_first_step:
            steps = self.steps
            command += f" --max_iters={steps} --lr_decay_iters={steps} --eval_interval={steps}"
            command += " --log_interval=100 --dropout=0.0"
        return command.split()

    def judged(self, seed: int) -> tuple[nn.Module, SummedLoss, int]:
        module = import_file("nanogpt_model", f"{self.home}/model.py")
        path = f"{self.home}/out-shakespeare-char/ckpt.pt"
        checkpoint = torch.load(path, weights_only=True)
        model = module.GPT(module.GPTConfig(**checkpoint["model_args"]))
        model.load_state_dict(checkpoint["model"])

        def summed_loss(idx: Tensor, targets: Tensor) -> Tensor:
            return model(self.numbers[idx], self.numbers[targets])[1] * targets.numel()

        return model, summed_loss, self.steps * self.shape.batch * self.shape.seq_len


class NanoChat:
    """Its scripts/base_train.py, uncompiled. Its tokenizer has the bytes and its special tokens.

    Its loader begins every row with a document and drops what does not fit: so its documents are
    pieces of the text as long as a row, shuffled.
    """

    def __init__(self, cfg: SimpleNamespace, folder: Path, parts: dict[str, bytes]) -> None:
        import pyarrow
        from pyarrow.parquet import write_table

        self.shape, self.steps = cfg.shape, RACE_STEPS["nanochat"][cfg.shape_name]
        self.folder, self.home = folder, shutil.copytree(cfg.nanochat, folder / "nanochat")
        self.env = {"NANOCHAT_BASE_DIR": str(folder), "TORCHDYNAMO_DISABLE": "1"}
        (folder / "base_data_climbmix").mkdir()
        for split, part in parts.items():  # the last file in alphabetical order is for validation
            starts = np.random.default_rng(0).permutation(range(0, len(part), cfg.shape.seq_len))
            pieces = [part[i : i + cfg.shape.seq_len].decode(errors="ignore") for i in starts]
            table = pyarrow.table({"text": pieces})
            write_table(table, folder / "base_data_climbmix" / f"{split}.parquet")
        sys.path.append(str(self.home))
        from nanochat.tokenizer import SPECIAL_TOKENS

        special = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
        ranks = {bytes([byte]): byte for byte in range(256)}
        bpe = tiktoken.Encoding(
            "bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special
        )
        self.bos = special["<|bos|>"]
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(bpe))
        sizes = torch.tensor([1] * 256 + [0] * len(special))
        torch.save(sizes, folder / "tokenizer" / "token_bytes.pt")

    def command(self, seed: int) -> list[str]:
        path, shape = self.home / "nanochat" / "common.py", self.shape
        path.write_text(re.sub(r"manual_seed\(\d+", f"manual_seed({seed}", path.read_text()))
        command = "-m scripts.base_train --device-type=cpu --window-pattern=L"
        command += f" --depth={shape.n_layer} --head-dim={shape.d_model // shape.n_head}"
        command += f" --aspect-ratio={shape.d_model // shape.n_layer}"
        command += f" --max-seq-len={shape.seq_len} --device-batch-size={shape.batch}"
        command += f" --total-batch-size={shape.batch * shape.seq_len}"
        command += f" --num-iterations={self.steps} --model-tag=race"
        command += " --eval-every=-1 --core-metric-every=-1 --sample-every=-1"
        return command.split()

    def judged(self, seed: int) -> tuple[nn.Module, SummedLoss, int]:
        from nanochat.gpt import GPT, GPTConfig

        path = f"{self.folder}/base_checkpoints/race"
        meta = json.loads(Path(f"{path}/meta_{self.steps:06d}.json").read_text())
        model = GPT(GPTConfig(**meta["model_config"]))
        model.init_weights()  # its tables of RoPE are no part of a checkpoint
        weights = torch.load(f"{path}/model_{self.steps:06d}.pt", weights_only=True)
        model.load_state_dict(weights)

        def summed_loss(idx: Tensor, targets: Tensor) -> Tensor:
            bos = torch.full((len(idx), 1), self.bos)  # which its rows begin with
            unjudged = torch.full((len(idx), 1), -1)  # ignored by its loss
            idx, targets = torch.cat([bos, idx], 1), torch.cat([unjudged, targets], 1)
            return model(idx, targets, loss_reduction="sum")

        return model, summed_loss, self.steps * self.shape.batch * self.shape.seq_len


RACERS = {"ours": Ours, "nanoGPT": NanoGPT, "nanochat": NanoChat}


class Race:
    """Training runs from the command line to the last checkpoint, and the loss of that one.

    The loss is over the whole validation split: the last tenth of the text, in windows that do not
    overlap, in nats per byte.
    """

    def __init__(self, cfg: SimpleNamespace) -> None:
        self.T, self.folder = cfg.shape.seq_len, TemporaryDirectory()
        home = Path(self.folder.name)
        text = "\n".join(text_documents(Source("pretrain", "bench", None, [cfg.text]))).encode()
        cut, tokenizer = len(text) * 9 // 10, load_tokenizer("byte")
        parts = {"train": text[:cut], "val": text[cut:]}
        for split, part in parts.items():
            path = home / "race" / f"{split}_000.bin"
            write_shard(str(path), np.frombuffer(part, np.uint8), tokenizer)
        self.val = Mixture("race", str(home), "val", self.T, 0, tokenizer)
        self.racer = RACERS[cfg.system](cfg, home, parts)
        self.env = {"OMP_NUM_THREADS": str(cfg.threads)} if cfg.threads else {}

    def run(self, seed: int, until: str | None = None) -> float:
        """Return the seconds of the training until it prints what matches `until`, or ends."""
        return timed(self.racer.command(seed), self.racer.home, self.env | self.racer.env, until)

    def judge(self, seed: int) -> dict[str, float]:
        """Return the loss of the last checkpoint, its parameters, and the tokens it has seen."""
        model, summed_loss, tokens = self.racer.judged(seed)
        loss, n_parameters = self.val_loss(summed_loss), sum(p.numel() for p in model.parameters())
        return {"val_loss": loss, "parameters": n_parameters, "tokens": tokens}

    @torch.no_grad()
    def val_loss(self, summed_loss: SummedLoss) -> float:
        total = 0.0
        for first in range(0, self.val.n_rows, 64):
            rows = self.val.validation(first, min(first + 64, self.val.n_rows))
            total += float(summed_loss(rows[:, :-1], rows[:, 1:]))
        return total / (self.val.n_rows * self.T)


def race(cfg: SimpleNamespace) -> Iterator[dict]:
    """Measure whole runs; with task=start, until the first training step, at the shape tiny."""
    contest = Race(cfg)
    until = FIRST_STEP[cfg.system] if cfg.task == "start" else None
    yield {}
    for seed in count(1):
        seconds = contest.run(seed, until)
        yield {"first_step": seconds} if until else {"seconds": seconds, **contest.judge(seed)}


def timed(command: list[str], folder: Path, env: dict[str, str], until: str | None) -> float:
    """Return the seconds until a Python program prints a line that matches `until`, or ends."""
    began, lines = time.perf_counter(), []
    command = [sys.executable, "-u", *command]
    pipes = {"stdin": DEVNULL, "stdout": PIPE, "stderr": STDOUT}
    with Popen(command, cwd=folder, env=os.environ | env, text=True, **pipes) as process:
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
    serve({"start": race, "race": race})
