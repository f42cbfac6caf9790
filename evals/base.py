"""What every task of an evaluation shares: settings, the models that are measured, result rows."""

import contextlib
import functools
import glob
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from configurator import UserError, require
from corpus.folders import ensure_toy
from corpus.records import load_records, to_records
from corpus.shards import SPLITS, parse_mixture, split_files
from corpus.sources import how_to_make
from corpus.tokenizer import load_tokenizer
from evals.baselines import load_baseline
from evals.results import STAGES, run_folders, trained_weights
from evals.stats import Estimate
from model import GPT, ModelConfig
from runtime.checkpoint import NAMES, load_checkpoint, model_from, weights_hash
from runtime.files import digest, read_jsonl, sha256
from runtime.world import choose_device, choose_dtype

VERSION = 5  # raised when a number changes its meaning
ORDER = (  # in which tasks are run
    *("val_loss", "text_perplexity", "chats", "problems", "preference", "tales", "sst2"),
    *("dialogsum", "few_shot", "samples", "rerank", "published", "streaming", "attention"),
)
NEEDS = {"rerank": "a tuned stage and a verifier", "published": "a tuned stage and a verifier"}
NEEDS |= {"tales": "a tuned stage and the toy world's pairs", "streaming": "a trained stage"}
NEEDS["samples"] = "a stage trained by RL"
CHATS = ("chats", "problems", "preference", "dialogsum")  # what they ask is told as a chat
PROTOCOLS = ("per_line", "tokens", "strided", "words", "bpb")  # see perplexity.py


@dataclass
class EvalConfig:
    """What is evaluated, on which data, and how."""

    out_dir: str = "out/toy"  # of a pipeline, of any runs, or of one stage; results go here
    compare: tuple[str, ...] = ()  # instead: show these folders' results side by side
    data: str = "toy"  # shards whose validation split gives val_loss
    problems: str = "toy"  # word problems with a problems_test.jsonl; "" = none
    pairs: str = "toy"  # preference pairs with dpo_test.jsonl (else dpo_val); "" = none
    chats: str = "toy"  # conversations with an sft_val.jsonl; "" = none
    text: str = ""  # texts for perplexity, e.g. wikitext-2,wikitext-2-valid
    protocols: tuple[str, ...] = ()  # of perplexity (see perplexity.py); none = all
    baselines: tuple[str, ...] = ()  # folders of transformers' causal LMs: rows of every task
    problem_shots: str = ""  # solved problems, for five-shot prompts; "" = none
    published: str = ""  # published solutions of GSM8K's test problems; "" = none
    sst2: str = ""  # SST-2: sentences with labels; "" = none
    shots: str = ""  # SST-2's training sentences, for few-shot prompts; "" = none
    dialogues: str = ""  # dialogues with their summaries (DialogSum, SAMSum); "" = none
    streaming: str = ""  # shards, read in streams of 16 x stream_slots tokens; "" = none
    stream_slots: int | None = None  # tokens that the cache of a stream holds; None = seq_len
    n_streams: int = 64  # streams read
    sentences: str = ""  # sentences for maps of attention, separated by ;; "" = none
    tasks: tuple[str, ...] = ()  # none = all that data and checkpoints allow
    stages: tuple[str, ...] = ()  # runs to measure; none = all, and the untrained weights
    data_dir: str = "data"  # folder of all data, filled by data.py
    tokenizer: str | None = None  # None = the checkpoint's; else a file of the same ranks
    n_samples: int = 8  # solutions per problem for majority, best-of-N and oracle
    temperature: float = 0.8  # of these samples
    max_new_tokens: int = 64  # longest answer
    calculator: bool = False  # work out <<3+4= for the model (Cobbe et al. 2021)
    n_problems: int | None = None  # test problems, sentences, dialogues; None = all
    n_chats: int = 64  # conversations to answer
    seed: int = 0  # of the samples
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # auto, float32, bfloat16
    no_overwrite: bool = False  # skip results that exist
    force: bool = False  # replace results that exist

    def __post_init__(self):
        counts = "n_streams stream_slots max_new_tokens n_problems n_chats"
        choices = {
            "device": ("auto", "cpu", "cuda", "mps"),
            "dtype": ("auto", "float32", "bfloat16"),
        }
        ranges = {"[1, inf)": counts, "[1, 1e4]": "n_samples", "[0, inf)": "temperature seed"}
        require(self, ranges, choices)
        known = {"task": (self.tasks, ORDER), "protocol": (self.protocols, PROTOCOLS)}
        for what, (names, possible) in known.items():
            unknown = ", ".join(name for name in names if name not in possible)
            if unknown:
                raise UserError(f"unknown {what} {unknown}; there are {', '.join(possible)}")
        shared = ("text_perplexity", "sst2", "few_shot", *CHATS)
        if self.baselines and not set(shared) & set(self.tasks or ORDER):
            names = ", ".join(self.baselines)
            raise UserError(f"baselines {names}: they take part in the tasks {', '.join(shared)}")
        if self.problem_shots and self.problems in ("", self.problem_shots):
            given = f"problem_shots={self.problem_shots}, problems={self.problems}"
            raise UserError(f"{given}: give two different sets, to show and to solve")
        if self.no_overwrite and self.force:
            raise UserError("no_overwrite and force exclude each other")


@dataclass(frozen=True)
class Row:
    """One number of a task, and what it is the number of."""

    metric: str
    protocol: str
    estimate: Estimate
    split: str = "test"
    model: str | None = None  # name of a trivial answer; None = the stage
    extra: dict = field(default_factory=dict)  # further fields of its result


class Subject:
    """The models of one evaluation, each loaded when it is first asked for."""

    def __init__(self, cfg: EvalConfig):
        self.device = choose_device(cfg.device)
        self.dtype = choose_dtype(cfg.dtype, self.device)
        stages = load_stages(cfg.out_dir)
        self.checkpoints = {"untrained": untrained(next(iter(stages.values()))), **stages}
        specs = {name: run["tokenizer"] for name, run in self.checkpoints.items()}
        loaded = {spec["hash"]: spec for spec in specs.values()}  # each once
        for key, spec in loaded.items():
            loaded[key] = load_tokenizer(cfg.tokenizer or spec["name"], cfg.data_dir, spec)
        self.tokenizers = {name: loaded[spec["hash"]] for name, spec in specs.items()}
        saved = self.checkpoints.items()
        self.policies = [name for name, run in saved if run.get("task") != "verifier"]
        self.tuned = [name for name, run in saved if run.get("task") in ("sft", "dpo", "rl")]
        self.starts = {name: find_start(run, self.checkpoints) for name, run in saved}
        if unknown := set(cfg.stages) - set(specs):
            raise UserError(f"unknown stage {min(unknown)}; there are {', '.join(specs)}")
        # the trivial answers are rows of the first that is measured
        self.first = next((x for x in self.policies if x in (cfg.stages or [x])), None)
        self.judges = {}  # verifier -> the policy whose solutions it judges: its start, or the last
        for name in (name for name in stages if name not in self.policies):
            fit = [x for x in self.tuned if self.tokenizers[x] is self.tokenizers[name]]
            start = self.starts[name]
            if fit:
                self.judges[name] = start if start in fit else fit[-1]
        self.models = {}
        self.overlaps = {}  # of texts, see language.py
        self.logprobs = {}  # of pairs, see preferences.py
        self.records = functools.cache(functools.partial(read_records, cfg.data_dir))
        self.log_once = functools.cache(print)  # print, each text once
        self.kept = None  # of the task that runs: a hash of what it kept, if not all
        self.sha256 = functools.cache(sha256)  # of a file that several tasks read
        self.baselines = []
        for folder in cfg.baselines:  # without weights there is no hash
            self.add_baseline(folder, cfg.data_dir)

    def model(self, stage: str) -> GPT:
        if stage not in self.models:
            model = model_from(self.checkpoints[stage])
            self.models[stage] = model.to(self.device, self.dtype).eval()
        return self.models[stage]

    def note_kept(self, rows: list, kept: list) -> None:
        """Remember which rows were not left out: only the same ones can be compared in pairs."""
        there = set(map(str, kept))
        numbers = [number for number, row in enumerate(map(str, rows)) if row in there]
        self.kept = digest(numbers) if len(numbers) < len(rows) else None

    def add_baseline(self, folder: str, data_dir: str) -> None:
        """Add a model that is no stage of ours, under the name of its folder."""
        name = os.path.basename(os.path.abspath(folder))
        if name in self.checkpoints:
            raise UserError(f"baseline {folder}: a row is called {name} already; rename the folder")
        model, self.tokenizers[name] = load_baseline(folder, data_dir)
        self.models[name] = model.to(self.device, self.dtype).eval()
        self.checkpoints[name] = {"weights_hash": weights_hash(self.models[name].state_dict())}
        self.baselines.append(name)

    def start_model(self, stage: str) -> GPT | None:
        """Return the model of the weights that a stage was made from, if they are still there."""
        origin = self.checkpoints[stage].get("init_from") or {"ref": "", "weights_hash": None}
        for name, run in self.checkpoints.items():
            if run["weights_hash"] == origin["weights_hash"]:
                return self.model(name)
        found = find_weights(origin)
        return model_from(found).to(self.device, self.dtype).eval() if found else None

    def pretraining(self, stage: str) -> dict:
        """Return the settings of this stage's pretraining, or of one with its tokenizer, or {}."""
        spec = self.checkpoints[stage]["tokenizer"]
        for run in (self.checkpoints[stage], *self.checkpoints.values()):
            if run.get("task") == "pretrain" and run["tokenizer"] == spec:
                return run["train_config"]
        return {}

    def lineage(self, folder: str) -> dict[str, dict]:
        """Return the weights of every stage, and from which it was made, for results.current."""
        stages = {}
        for name in self.starts:
            run = self.checkpoints[name]
            origin = run.get("init_from") or {"weights_hash": None}
            stages[name] = {"weights_hash": run["weights_hash"], "start": self.starts[name]}
            stages[name]["start_hash"] = origin["weights_hash"]
            stages[name]["trained"] = trained_weights(folder, name)
        return stages


def find_start(run: dict, checkpoints: dict[str, dict]) -> str | None:
    """Return the stage that a run was made from, even if its weights are others by now; or None."""
    origin = run.get("init_from")
    if not origin:
        return None
    for name, other in checkpoints.items():
        if other is not run and other["weights_hash"] == origin["weights_hash"]:
            return name
    ref = origin["ref"].rstrip("/")
    name = os.path.basename(os.path.dirname(ref) if ref.endswith(".pt") else ref)
    return name if name in checkpoints and not find_weights(origin) else None


def find_weights(origin: dict) -> dict | None:
    """Return the checkpoint that a run was made from, if its weights are there under its name."""
    with contextlib.suppress(UserError):
        found = load_checkpoint(origin["ref"])
        if found["weights_hash"] == origin["weights_hash"]:
            return found
    return None


def load_stages(folder: str) -> dict[str, dict]:
    """Return the newest checkpoint of every run in a folder, or of the folder itself.

    They stand in the order of the loop, by what they were trained for and started from.
    """
    names = run_folders(folder, NAMES, "best.pt")
    if "untrained" in names:
        raise UserError(f"{folder}/untrained has the name of the initial weights: rename that run")
    if not names:
        only = load_checkpoint(folder)
        return {only["task"]: only}
    for name in run_folders(folder, "metrics.jsonl"):
        if name not in names:
            print(f"eval: {name} is left out: it has no checkpoint yet")
    runs = {name: load_checkpoint(os.path.join(folder, name)) for name in names}
    for run in runs.values():
        run.pop("optimizers", None)  # twice the weights, and of no use here
    order = [*STAGES, *(run["task"] for run in runs.values())]
    place = {name: (order.index(x["task"]), bool(find_start(x, runs))) for name, x in runs.items()}
    return {name: runs[name] for name in sorted(runs, key=place.get)}


def untrained(checkpoint: dict) -> dict:
    """Return the checkpoint of a model of the same shape with its initial weights."""
    model_config = {**checkpoint["model_config"], "score_head": False}
    torch.manual_seed(0)
    state = GPT(ModelConfig(**model_config)).state_dict()
    about = {"model_config": model_config, "tokenizer": checkpoint["tokenizer"]}
    return {"model": state, "weights_hash": weights_hash(state), **about}


def own_policies(subject: Subject, cfg: EvalConfig) -> list[str]:
    """Return the policies alone, for what baselines cannot do."""
    return subject.policies


def judged(subject: Subject, cfg: EvalConfig) -> list[str]:
    """Return the verifiers; each judges the solutions of a policy."""
    return list(subject.judges)


class Task(NamedTuple):
    """A task by name: its function, and what it reads."""

    name: str
    run: Callable[[Subject, str, EvalConfig], list[Row]]
    data: list[str]  # settings that name its data; without the first it is not run
    files: list[str]  # patterns of its files in that data's folders
    settings: list[str]  # all further settings that decide its numbers
    stages: Callable[[Subject, EvalConfig], list[str]]  # those that it is run for


TASKS: dict[str, Task] = {}


def task(
    name: str, data: str, files: str = "", settings: str = "", stages: Callable | None = None
) -> Callable:
    """Register a function as a task, of all policies and baselines; blanks separate names."""
    stages = stages or (lambda subject, cfg: subject.policies + subject.baselines)

    def register(run: Callable) -> Callable:
        TASKS[name] = Task(name, run, data.split(), files.split(), settings.split(), stages)
        return run

    return register


def chosen_tasks(cfg: EvalConfig) -> list[Task]:
    """Return the tasks that the settings ask for, in their order; makes the toy world if needed."""
    wanted = [TASKS[name] for name in ORDER if name in (cfg.tasks or ORDER)]
    tasks = [task for task in wanted if getattr(cfg, task.data[0])]
    if cfg.tasks and len(tasks) < len(wanted):
        needs = [f"{x.name} needs --{x.data[0]}=..." for x in wanted if x not in tasks]
        raise UserError(f"a task without data: {', '.join(needs)}")
    if not tasks:
        raise UserError("nothing to evaluate: all settings that name data are empty")
    specs = [getattr(cfg, task.data[0]) for task in tasks if task.files]
    ensure_toy(",".join(specs), cfg.data_dir)
    return tasks


def read_records(data_dir: str, kind: str, name: str) -> list[dict]:
    """Return the records of a test set; those that cannot be measured are counted aloud."""
    if kind == "problems":
        return to_records(load_records(name, data_dir, kind, "test", kind), kind, name)
    path = os.path.join(data_dir, name, "test.jsonl")
    if not os.path.isfile(path):
        raise UserError(f"there are no {kind} at {path}: {how_to_make('eval', name)}")
    return to_records(read_jsonl(path), kind, name)


def data_files(specs: list[str], patterns: list[str], data_dir: str) -> list[str]:
    """Return the paths of all files that match a pattern in the folders that the specs name.

    The pattern "train" or "val" stands for the shards of that split.
    """
    paths = []
    for spec, pattern in itertools.product(filter(None, specs), patterns):
        for name, _ in parse_mixture(spec):
            folder = os.path.join(data_dir, name)
            if pattern in SPLITS:
                paths += split_files(folder, pattern)
            else:
                paths += glob.glob(os.path.join(glob.escape(folder), pattern))
    return sorted(paths)
