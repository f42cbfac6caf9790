"""A worker that tunes a model, by SFT or DPO: in this checkout, or in TRL.

All systems of a case start from the weights of --model and are given the same ids, encoded here. A
step is one pass over the same records, in four micro-steps. Padding does not count as tokens.
"""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from threading import Thread
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import align
from bench.worker import clock, serve
from configurator import UserError
from corpus import chat, records, toy
from corpus.shards import shuffled_index
from corpus.sources import Source, source_rows
from corpus.tokenizer import load_tokenizer
from inference.scoring import sequence_logprobs
from model import GPT
from runtime.checkpoint import find_checkpoint, load_checkpoint, model_from
from runtime.files import write_jsonl
from runtime.world import World
from train import LoopConfig, TrainStep, accumulate, make_optimizers, sizes_of, take_step

ROOT = Path(__file__).resolve().parent.parent
OWN = ("ours", "other")  # how the systems begin that are this project
TOY = {"sft": toy.instruction, "dpo": toy.preference, "verifier": toy.problem}
MICRO_STEPS = 4  # of an optimizer step, in every system
LEARNING_RATE = 2e-5


class Start:
    """What all systems of a case start from: a run's weights and tokenizer, and records."""

    def __init__(self, cfg: SimpleNamespace):
        self.cfg, self.folder = cfg, TemporaryDirectory()
        self.home = Path(self.folder.name)
        spec = find_checkpoint(cfg.model, whole=False)[1]["tokenizer"]
        self.tokenizer = load_tokenizer(spec["name"], cfg.data_dir, spec)
        if not cfg.system.startswith((*OWN, "llama")):  # in a process whose memory is its own
            command = [sys.executable, ROOT / "convert.py", f"--dest={self.home}/exported"]
            command += [f"--init_from={cfg.model}", f"--data_dir={cfg.data_dir}"]
            subprocess.run(command, check=True)

    def model(self) -> GPT:
        return model_from(load_checkpoint(self.cfg.model)).to(self.cfg.device)

    def theirs(self) -> tuple[Any, Any]:
        """Return model and tokenizer as transformers' own."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = self.home / "exported"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.to(self.cfg.device), AutoTokenizer.from_pretrained(folder)

    def records(self, kind: str) -> list[dict]:
        """Return the records of --text, or of the toy world."""
        if not self.cfg.text:
            return toy.records(TOY[kind], "train", 1000, 0)
        rows = source_rows(Source(kind, "bench", None, [self.cfg.text]))
        return records.to_records(rows, kind, self.cfg.text)


# ------------------------------------------------------------------------------------------------
# Tuning


class Work:
    """The records of one optimizer step: each step of each system is a pass over just these."""

    def __init__(self, start: Start):
        self.start, self.kind, shape = start, start.cfg.task, start.cfg.shape
        self.records, self.items, self.n_tokens, n_supervised = [], [], 0, 0
        for record in start.records(self.kind):
            item, texts = self.encode(record)
            lengths = [len(ids) - 1 for ids, _ in texts]
            if max(lengths) <= shape.seq_len:
                self.records.append(record)
                self.items.append(item)
                self.n_tokens += sum(lengths)
                n_supervised += sum(t >= 0 for _, targets in texts for t in targets)
            enough = self.n_tokens >= shape.batch * shape.seq_len
            if enough and len(self.items) % MICRO_STEPS == 0:  # TRL logs means of micro-steps
                break
        else:
            fit = f"{self.n_tokens} tokens of records that fit {shape.seq_len}"
            raise UserError(f"{fit}: fewer than a step has, {shape.batch * shape.seq_len}")
        self.facts = {"records": len(self.items), "supervised": n_supervised / self.n_tokens}

    def encode(self, record: dict) -> tuple:
        """Return a document or a pair, and the ids and the targets of its texts."""
        if self.kind == "sft":
            item = chat.chat_document(record["messages"], self.start.tokenizer)
            return item, [(item["ids"], item["targets"])]
        item = chat.encode_pair(record, self.start.tokenizer)
        asked, *answers = item
        return item, [(asked + own, [-1] * len(asked) + own) for own in answers]


class Padded(align.SFT):
    """SFT with one document a row, padded to the longest of a micro-step."""

    def batch(self, split: str, first: int, last: int) -> dict[str, Tensor]:
        packed = self.packed[split]
        n = len(packed.documents)
        numbers = [shuffled_index(i, n, packed.seed)[1] for i in range(first, last)]
        rows = [[packed.documents[number]] for number in numbers]
        width = max(len(row[0]["ids"]) for row in rows) - 1
        return chat.lay_out(rows, ["targets"], width, packed.pad)

    def loss(self, model: GPT, batch: dict) -> tuple[Tensor, dict]:
        nll = model(batch["idx"], batch["targets"])  # padding stands behind all that is scored
        return nll, {"loss": nll}


class Uncached(align.DPO):
    """DPO that asks its reference in every step."""

    def loss(self, model: GPT, batch: dict) -> tuple[Tensor, dict]:
        if not hasattr(self, "first"):
            self.first = copy.deepcopy(model)
        with torch.no_grad():
            batch = batch | {"reference": sequence_logprobs(self.first, batch)}
        return super().loss(model, batch)


VARIANTS = {"ours without packing": Padded, "ours without cached reference": Uncached}


def all_logprobs(model: GPT, x: Tensor, targets: Tensor) -> Tensor:
    """Return log p(target) (B, T) from the logits of all positions at once."""
    logits = model.logits(x).flatten(0, 1)
    nll = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none")
    return -nll.view(targets.shape)


def our_task(work: Work, model: GPT, world: World, loop: LoopConfig) -> align.SFT | align.DPO:
    start, cfg = work.start, work.start.cfg
    for split, rows in (("train", work.records), ("val", work.records[:1])):
        write_jsonl(str(start.home / "bench" / f"{work.kind}_{split}.jsonl"), rows)
    os.makedirs(loop.out_dir)
    settings = align.AlignConfig(init_from=cfg.model, seq_len=cfg.shape.seq_len)
    mode = align.MODES[work.kind][0]()
    setup = align.Setup(model, start.tokenizer, world, loop, settings, mode)
    if cfg.system == "ours with all logits":
        model.logprobs = partial(all_logprobs, model)
        model.nll = lambda x, targets: -model.logprobs(x, targets).sum()
    return VARIANTS.get(cfg.system, align.TASKS[work.kind])(setup)


def our_steps(work: Work) -> Iterator[dict | float]:
    """Yield the metrics of the first step, then the seconds of further ones, as in train.py."""
    cfg, home = work.start.cfg, str(work.start.home)
    places = {"out_dir": f"{home}/out", "data": "bench", "data_dir": home}
    loop = LoopConfig(**places, optimizer="adamw", learning_rate=LEARNING_RATE)
    loop.micro_batch = -(-len(work.items) // MICRO_STEPS)
    world, model = World(cfg.device, cfg.dtype), work.start.model()
    task = our_task(work, model, world, loop)
    n_rows = len(work.items)
    if isinstance(task, align.PackedTask) and not isinstance(task, Padded):
        n_rows = len(task.packed["train"].rows)
    size = -(-n_rows // MICRO_STEPS)
    module, optimizers = TrainStep(model, task), make_optimizers(model, loop)
    for first in count(0, n_rows):
        began, end = clock(cfg), first + n_rows
        parts = [(row, min(row + size, end)) for row in range(first, end, size)]
        batches = [world.to_device(task.batch("train", *part)) for part in parts]
        sizes = sizes_of(task, batches, world)
        sums = accumulate(module, batches, sizes, world)
        nn.utils.clip_grad_norm_(model.parameters(), loop.grad_clip)
        take_step(optimizers, 1.0)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        means = {key: float(value) / sizes[0] for key, value in sums.items()}
        yield clock(cfg) - began if first else means


def trl_steps(work: Work) -> Iterator[dict | float]:
    """Do the same in TRL's own loop: a thread that waits at the end of every step."""
    from transformers import TrainerCallback

    cfg, ends, turns, callback = work.start.cfg, Queue(), Queue(), TrainerCallback()
    trainer = trl_trainer(work)

    def on_step_end(*args: Any, **keys: Any) -> None:
        ends.put(clock(cfg))
        turns.get()

    def train() -> None:
        try:
            trainer.train()
        except Exception as error:  # whatever the library raises
            ends.put(error)

    callback.on_step_end = on_step_end
    trainer.add_callback(callback)
    Thread(target=train, daemon=True).start()
    for step in count():
        began, end = clock(cfg), ends.get()
        if isinstance(end, Exception):
            raise end
        if step == 1:  # the log of the first step is written after its end
            yield trainer.state.log_history[0]
        elif step:
            yield end - began
        turns.put(None)


def trl_trainer(work: Work) -> Any:
    import datasets
    import trl

    class Ready(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset  # of ids already

    cfg, n, n_ids = work.start.cfg, len(work.items), work.start.cfg.shape.seq_len + 1
    if work.kind == "dpo":
        rows = [{f"{name}_ids": x for name, x in item._asdict().items()} for item in work.items]
        own = {"precompute_ref_log_probs": cfg.system == "TRL with cached reference"}
        settings, kind = trl.DPOConfig, Ready
        given = {} if own["precompute_ref_log_probs"] else {"ref_model": work.start.theirs()[0]}
    else:
        labels = [[t if t >= 0 else -100 for t in item["targets"]] for item in work.items]
        ids = [item["ids"] for item in work.items]
        rows = [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]
        own, given = {"packing": cfg.system == "TRL with packing"}, {}
        settings, kind = trl.SFTConfig, trl.SFTTrainer
        n = len(chat.pack(list(map(len, ids)), n_ids)) if own["packing"] else n
    own |= {"per_device_train_batch_size": -(-n // MICRO_STEPS), "max_length": n_ids}
    own |= {"gradient_accumulation_steps": MICRO_STEPS, "max_steps": 10**6, "report_to": "none"}
    own |= {"learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant"}
    own |= {"gradient_checkpointing": False, "use_cpu": cfg.device == "cpu"}
    own |= {"bf16": cfg.dtype == "bfloat16", "save_strategy": "no", "disable_tqdm": True}
    own |= {"logging_first_step": True, "output_dir": f"{work.start.home}/out"}
    model, tokenizer = work.start.theirs()
    given |= {"args": settings(**own), "train_dataset": datasets.Dataset.from_list(rows)}
    return kind(model, **given, processing_class=tokenizer)


def tune(cfg: SimpleNamespace) -> Iterator[dict]:
    """Measure optimizer steps of SFT or DPO, in seconds per token of the records."""
    work = Work(Start(cfg))
    steps = our_steps(work) if cfg.system.startswith(OWN) else trl_steps(work)
    key = "loss" if cfg.task == "sft" else "logps/chosen"
    yield {**work.facts, f"first {key}": next(steps)[key]}  # the same in all systems
    next(steps)  # memory has been touched, and the optimizer has its state
    for seconds in steps:
        yield {"token": seconds / work.n_tokens}


if __name__ == "__main__":
    serve({"sft": tune, "dpo": tune})
