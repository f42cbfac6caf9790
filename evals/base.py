"""What every task of an evaluation shares: settings, the models that are measured, result rows."""

import glob
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from configurator import UserError, require
from corpus.folders import ensure_toy
from corpus.shards import parse_mixture
from corpus.tokenizer import Tokenizer, load_tokenizer
from evals.results import run_folders
from evals.stats import Estimate
from model import GPT, ModelConfig
from runtime.checkpoint import load_checkpoint, model_from, weights_hash
from runtime.files import digest, sha256
from runtime.world import choose_device, choose_dtype

VERSION = 5  # of the tasks: raised when a number changes its meaning
ORDER = (  # in which tasks are run
    *("val_loss", "text_perplexity", "chats", "problems", "preference", "tales", "sst2"),
    *("dialogsum", "rerank", "published", "streaming", "attention"),
)
PROTOCOLS = ("per_line", "tokens", "strided", "words", "bpb")  # of perplexity, see perplexity.py


@dataclass
class EvalConfig:
    """What is evaluated, on which data, and how."""

    out_dir: str = "out/toy"  # a pipeline's folder, one of any runs, or one stage; results go here
    compare: tuple[str, ...] = ()  # evaluate nothing: show these folders' results side by side
    data: str = "toy"  # shards whose validation split gives val_loss
    problems: str = "toy"  # word problems with a problems_test.jsonl; "" = none
    pairs: str = "toy"  # preference pairs with dpo_test.jsonl (else dpo_val); "" = none
    chats: str = "toy"  # conversations with an sft_val.jsonl: loss and form of answers; "" = none
    text: str = ""  # texts for the perplexity protocols, e.g. wikitext-2,wikitext-2-valid
    protocols: tuple[str, ...] = ()  # which of the perplexity protocols; none = all
    baselines: tuple[str, ...] = ()  # folders of transformers' GPT-2, ...: more rows of perplexity
    published: str = ""  # published solutions of GSM8K's test problems, to be judged; "" = none
    sst2: str = ""  # SST-2: sentences with labels; "" = none
    shots: str = ""  # SST-2's training sentences, for few-shot prompts; "" = zero-shot alone
    dialogues: str = ""  # dialogues with their summaries (DialogSum, SAMSum); "" = none
    streaming: str = ""  # shards read as streams of 16 x seq_len tokens (sinks.py); "" = none
    n_streams: int = 64  # of them
    sentences: str = ""  # sentences whose attention maps are kept, separated by ;; "" = none
    tasks: tuple[str, ...] = ()  # which tasks; none = all that the data and checkpoints allow
    data_dir: str = "data"  # where data.py put them
    tokenizer: str | None = None  # None = the checkpoint's; else a ranks file, of the same ranks
    n_samples: int = 8  # solutions per problem for majority, best-of-N and oracle
    temperature: float = 0.8  # of these samples
    max_new_tokens: int = 64  # longest answer
    calculator: bool = False  # work out <<3+4= for the model (Cobbe et al. 2021)
    n_problems: int | None = None  # problems, sentences, dialogues of the test split; None = all
    n_chats: int = 64  # conversations to answer
    seed: int = 0  # of the samples
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # auto, float32, bfloat16
    no_overwrite: bool = False  # skip results that exist
    force: bool = False  # replace results that exist

    def __post_init__(self):
        counts = "n_streams n_samples max_new_tokens n_problems n_chats"
        require(self, {"[1, inf)": counts, "[0, inf)": "temperature seed"})
        refuse_unknown("task", self.tasks, ORDER)
        refuse_unknown("protocol", self.protocols, PROTOCOLS)
        if self.baselines and not (self.text and "text_perplexity" in (self.tasks or ORDER)):
            names = ", ".join(self.baselines)
            raise UserError(f"baselines {names} are rows of the task text_perplexity only: --text=")
        if self.no_overwrite and self.force:
            raise UserError("no_overwrite and force exclude each other")


def refuse_unknown(what: str, names: tuple[str, ...], known: Iterable[str]) -> None:
    """Raise a UserError that lists the names that are not known."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"unknown {what} {', '.join(unknown)}; there are {', '.join(known)}")


@dataclass(frozen=True)
class Row:
    """One number of a task, and what it is the number of."""

    metric: str
    protocol: str
    estimate: Estimate
    split: str = "test"
    model: str | None = None  # a trivial answer's name; None = the stage that is measured
    extra: dict = field(default_factory=dict)  # what else its line in results.jsonl holds

    def as_json(self) -> dict:
        """Return the row's number as its line in results.jsonl holds it."""
        named = {"metric": self.metric, "protocol": self.protocol}
        return named | self.estimate.as_json() | self.extra


class Subject:
    """The models of one evaluation, each loaded when it is first asked for."""

    def __init__(self, cfg: EvalConfig):
        self.device = choose_device(cfg.device)
        self.dtype = choose_dtype(cfg.dtype, self.device)
        stages = load_stages(cfg.out_dir)
        first = next(iter(stages.values()))
        spec = first["tokenizer"]
        self.tokenizer = load_tokenizer(cfg.tokenizer or spec["name"], cfg.data_dir, spec)
        self.headerless = first["train_config"].get("headerless", False)
        self.checkpoints = {"untrained": untrained(first["model_config"]), **stages}
        saved = self.checkpoints.items()
        self.policies = [name for name, run in saved if run.get("task") != "verifier"]
        self.tuned = [name for name in self.policies if name in ("sft", "dpo")]
        self.models = {}
        self.tokenizers = dict.fromkeys(self.checkpoints, self.tokenizer)
        self.overlaps = {}  # of texts with the shards of pretraining, see language.py
        self.announced = set()

    def model(self, stage: str) -> GPT:
        """Return the model of a stage, ready to be measured."""
        if stage not in self.models:
            model = model_from(self.checkpoints[stage])
            self.models[stage] = model.to(self.device, self.dtype).eval()
        return self.models[stage]

    def add(self, name: str, model: torch.nn.Module, tokenizer: Tokenizer) -> None:
        """Add a model that is no stage of ours, with a tokenizer of its own."""
        self.models[name] = model.to(self.device, self.dtype).eval()
        self.tokenizers[name] = tokenizer
        self.checkpoints[name] = {"weights_hash": weights_hash(self.models[name].state_dict())}

    @cached_property
    def seq_len(self) -> int:
        """The context of the last stage, which all texts must fit."""
        return self.model(self.policies[-1]).cfg.seq_len

    def log_once(self, text: str) -> None:
        """Print what every stage would say alike, at the first of them."""
        if text not in self.announced:
            print(text)
        self.announced.add(text)


def load_stages(folder: str) -> dict[str, dict]:
    """Return the newest checkpoint of every run in a folder, or of the folder itself."""
    runs = run_folders(folder, "ckpt_*.pt")
    if runs:
        return {name: load_checkpoint(os.path.join(folder, name)) for name in runs}
    only = load_checkpoint(folder)
    return {only["task"]: only}


def untrained(model_config: dict) -> dict:
    """Return the checkpoint of a model of this shape with its initial weights."""
    model_config = {**model_config, "score_head": False}
    torch.manual_seed(0)
    state = GPT(ModelConfig(**model_config)).state_dict()
    return {"model": state, "model_config": model_config, "weights_hash": weights_hash(state)}


# --------------------------------------------------------------------------------------------------
# Tasks


def judged(subject: Subject, cfg: EvalConfig) -> list[str]:
    """Return the stage whose solutions the verifier judges."""
    return subject.tuned[-1:] if "verifier" in subject.checkpoints else []


Stages = Callable[[Subject, EvalConfig], list[str]]


class Task(NamedTuple):
    """A task by name: its function, and what it reads."""

    name: str
    run: Callable[[Subject, str, EvalConfig], list[Row]]
    data: tuple[str, ...]  # settings that name its data; it is left out where the first is empty
    files: tuple[str, ...]  # patterns of its files in that data's folders
    settings: tuple[str, ...]  # all further settings that decide its numbers
    stages: Stages  # those that it is run for


TASKS: dict[str, Task] = {}


def task(
    name: str,
    data: tuple[str, ...],
    files: tuple[str, ...] = (),
    settings: tuple[str, ...] = (),
    stages: Stages = lambda subject, cfg: subject.policies,
) -> Callable:
    """Register the decorated function as a task; by default it is run for all that write text."""

    def register(run: Callable) -> Callable:
        TASKS[name] = Task(name, run, data, files, settings, stages)
        return run

    return register


def chosen_tasks(cfg: EvalConfig) -> list[Task]:
    """Return the tasks that the settings ask for, in their order; makes the toy world if needed."""
    wanted = [TASKS[name] for name in ORDER if name in (cfg.tasks or ORDER)]
    tasks = [task for task in wanted if getattr(cfg, task.data[0])]
    if cfg.tasks and len(tasks) < len(wanted):
        needs = [f"{x.name} needs --{x.data[0]}=..." for x in wanted if x not in tasks]
        raise UserError(f"a task without data: {', '.join(needs)}")
    names = [getattr(cfg, task.data[0]) for task in tasks if task.files]
    ensure_toy(",".join(names), cfg.data_dir)
    return tasks


def data_hash(task: Task, cfg: EvalConfig) -> str:
    """Return 16 digits that change with the names and the contents of a task's files."""
    paths = []
    for pattern in task.files:
        specs = filter(None, (getattr(cfg, key) for key in task.data))
        for name in (name for spec in specs for name, _ in parse_mixture(spec)):
            paths += glob.glob(os.path.join(glob.escape(cfg.data_dir), name, pattern))
    return digest([[os.path.relpath(path, cfg.data_dir), sha256(path)] for path in sorted(paths)])
