"""Evaluation: every stage of a run under named protocols, one JSON line per number, append-only.

    python eval.py --out_dir=out/toy --no_overwrite            # skips what results.jsonl holds already
    python eval.py --out_dir=out/toy                           # a second time: a new file with a timestamp
    python eval.py --out_dir=out/local --text=wikitext-2,wikitext-2-valid --problems=gsm8k-test --pairs=hh-rlhf
    python eval.py --out_dir=out/local --tasks=text_perplexity --text=wikitext-2 --baselines=models/gpt2,models/distilgpt2

    python eval.py --compare=out/a,out/b                       # two runs side by side: which differences are real

out_dir is the folder of a pipeline (with pretrain/, sft/, dpo/, verifier/ in it), of any runs (a sweep), or of a single stage.
"""

import fcntl
import glob
import hashlib
import json
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch

import configurator
import data
import sinks
import tasks
from checkpoint import load_checkpoint, model_from, provenance, weights_hash
from configurator import UserError
from model import GPT, ModelConfig
from perplexity import PROTOCOLS, Peer, detokenize, overlap
from problems import solve
from tasks import pair_ids

STAGES = ("pretrain", "sft", "dpo", "verifier")


@dataclass
class EvalConfig:
    out_dir: str = "out/toy"  # folder of a pipeline, of any runs, or of one stage; results.jsonl is written here
    compare: tuple[
        str, ...
    ] = ()  # evaluate nothing: print the results of these folders side by side, with paired differences
    data: str = "toy"  # shards whose validation split gives val_loss
    problems: str = "toy"  # word problems with a problems_test.jsonl; "" = none
    pairs: str = "toy"  # preference pairs with dpo_test.jsonl (else dpo_val); "" = none
    chats: str = "toy"  # conversations with an sft_val.jsonl: loss, length, repetition and stop rate of the answers; "" = none
    text: str = ""  # texts for the perplexity protocols, e.g. wikitext-2,wikitext-2-valid
    protocols: tuple[str, ...] = ()  # which of the perplexity protocols; none = all
    baselines: tuple[
        str, ...
    ] = ()  # folders of transformers' GPT-2, DistilGPT-2, ...: further rows of the perplexity protocols
    published: str = (
        ""  # published solutions of GSM8K's test problems, for the verifier to judge; "" = none
    )
    sst2: str = ""  # SST-2: sentences with labels; "" = none
    shots: str = ""  # SST-2's training sentences, for few-shot prompts; "" = zero-shot alone
    dialogues: str = ""  # dialogues with their summaries (DialogSum, SAMSum); "" = none
    streaming: str = ""  # shards whose validation split is read as streams of 16 x seq_len tokens (sinks.py); "" = none
    n_streams: int = 64  # of them
    sentences: str = (
        ""  # sentences whose attention maps are kept, separated by ; (sinks.py); "" = none
    )
    tasks: tuple[str, ...] = ()  # which tasks; none = all that the data and checkpoints allow
    data_dir: str = "data"  # where data.py put them
    tokenizer: str | None = (
        None  # None = the checkpoint's; else a ranks file, which must be the same
    )
    n_samples: int = 8  # solutions per problem for majority, best-of-N and oracle
    temperature: float = 0.8  # of these samples
    max_new_tokens: int = 64  # longest answer
    calculator: bool = False  # work out <<3+4= for the model (Cobbe et al. 2021)
    n_problems: int | None = None  # problems (sentences, dialogues) of the test split; None = all
    n_chats: int = 64  # conversations to answer
    seed: int = 0  # of the samples
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # auto, float32, bfloat16
    no_overwrite: bool = False  # skip results that exist
    force: bool = False  # replace results that exist

    def __post_init__(self):
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown:
            raise UserError(f"unknown task {', '.join(unknown)}; there are {', '.join(TASKS)}")
        unnamed = [
            f"{task} needs --{TASKS[task].data}=..."
            for task in self.tasks
            if task in TASKS and not getattr(self, TASKS[task].data)
        ]
        if unnamed:
            raise UserError(f"a task without data: {', '.join(unnamed)}")
        if self.n_streams < 1:
            raise UserError(f"n_streams must be at least 1, got {self.n_streams}")
        odd = [protocol for protocol in self.protocols if protocol not in PROTOCOLS]
        if odd:
            raise UserError(f"unknown protocol {', '.join(odd)}; there are {', '.join(PROTOCOLS)}")
        if self.baselines and not (self.text and "text_perplexity" in (self.tasks or TASKS)):
            raise UserError(
                f"baselines {', '.join(self.baselines)} are rows of the task text_perplexity only: give it a --text"
            )
        if self.no_overwrite and self.force:
            raise UserError("no_overwrite and force exclude each other")


# ---------------------------------------------------------------------------------------------------------------------
# The bench, and the tasks that are run on it


def run_folders(folder: str, pattern: str) -> list[str]:
    """Names of the subfolders that hold such a file: the stages in their order, then other runs by name."""
    names = sorted(
        {
            os.path.basename(os.path.dirname(path))
            for path in glob.glob(os.path.join(glob.escape(folder), "*", pattern))
        }
    )
    return sorted(names, key=lambda name: STAGES.index(name) if name in STAGES else len(STAGES))


class Bench:
    """Models, tokenizer and data of one evaluation, loaded when first asked for."""

    def __init__(self, cfg: EvalConfig):
        self.cfg, self.models, self.tokenizers, self.hashes, self.overlap_of, self.told = (
            cfg,
            {},
            {},
            {},
            {},
            set(),
        )
        runs = run_folders(cfg.out_dir, "ckpt_*.pt")
        if runs:
            self.checkpoints = {
                name: load_checkpoint(os.path.join(cfg.out_dir, name)) for name in runs
            }
        else:
            only = load_checkpoint(cfg.out_dir)
            self.checkpoints = {only["task"]: only}
        first = next(iter(self.checkpoints.values()))
        self.tokenizer = data.load_tokenizer(
            cfg.tokenizer or first["tokenizer"]["name"], cfg.data_dir, first["tokenizer"]
        )
        self.headerless = first["train_config"].get("headerless", False)
        device = (
            "cuda"
            if cfg.device == "auto" and torch.cuda.is_available()
            else "cpu"
            if cfg.device == "auto"
            else cfg.device
        )
        self.device = torch.device(device)
        bf16 = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and device == "cuda"
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        torch.manual_seed(0)
        untrained = GPT(ModelConfig(**{**first["model_config"], "score_head": False}))
        self.checkpoints = {
            "untrained": {
                "model": untrained.state_dict(),
                "model_config": {**first["model_config"], "score_head": False},
                "weights_hash": weights_hash(untrained.state_dict()),
            },
            **self.checkpoints,
        }
        self.policies = [
            stage for stage, saved in self.checkpoints.items() if saved.get("task") != "verifier"
        ]

    def model(self, stage: str) -> GPT:
        if stage not in self.models:
            self.models[stage] = (
                model_from(self.checkpoints[stage]).to(self.device, self.dtype).eval()
            )
        return self.models[stage]

    def baselines(self) -> list[str]:
        """Loads the baselines, for without weights there is no hash; -> the names of their folders."""
        names = [os.path.basename(os.path.abspath(folder)) for folder in self.cfg.baselines]
        for name, folder in zip(names, self.cfg.baselines):
            if name in self.checkpoints:
                raise UserError(
                    f"baseline {folder}: a row is called {name} already; rename the folder"
                )
            self.tokenizers[name] = data.load_tokenizer(
                "gpt2", self.cfg.data_dir
            )  # whatever the run's own is
            self.models[name] = (
                Peer(folder, self.tokenizers[name]).to(self.device, self.dtype).eval()
            )
            self.checkpoints[name] = {"weights_hash": weights_hash(self.models[name].state_dict())}
        return names

    def files(self, task: "Task") -> list[str]:
        """The files that a task takes its items from."""
        specs = (
            [getattr(self.cfg, key) for key in task.settings[: task.n_data]] if task.files else []
        )
        names = [name for spec in filter(None, specs) for name, _ in data.parse_mixture(spec)]
        return sorted(
            path
            for name in names
            for pattern in task.files
            for path in glob.glob(os.path.join(glob.escape(self.cfg.data_dir), name, pattern))
        )

    def data_hash(self, task: "Task") -> str:
        """sha256 over names and contents of a task's files, first 16 hex digits."""
        for path in self.files(task):
            if path not in self.hashes:
                self.hashes[path] = data.sha256(path)
        named = [
            [os.path.relpath(path, self.cfg.data_dir), self.hashes[path]]
            for path in self.files(task)
        ]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]

    def problems(self) -> list[dict]:
        return data.load_records(self.cfg.problems, self.cfg.data_dir, "problems", "test")[
            : self.cfg.n_problems
        ]

    def pairs(self) -> tuple[str, list]:
        split = (
            "test"
            if os.path.exists(os.path.join(self.cfg.data_dir, self.cfg.pairs, "dpo_test.jsonl"))
            else "val"
        )
        pairs = [
            pair_ids(record, self.tokenizer)
            for record in data.load_records(self.cfg.pairs, self.cfg.data_dir, "dpo", split)
        ]
        return split, self.fitting(
            pairs,
            lambda pair: len(pair[0]) + max(len(pair[1]), len(pair[2])),
            f"pairs of {self.cfg.pairs}",
        )

    def fitting(self, rows: list, length: Callable, what: str) -> list:
        """Rows that the context holds; the others are counted aloud, at the first stage."""
        say = print if what not in self.told else lambda text: None
        self.told.add(what)
        return data.fitting(
            rows, length, self.model(self.policies[-1]).cfg.seq_len, f"eval: {what}", say
        )

    def overlaps(self, text: str) -> list[float | None]:
        """Share of the 13-token runs of a text, as it stands and detokenised, that stand in the shards of pretraining too; None without shards."""
        if text not in self.overlap_of:
            pretrained = (
                next(
                    (
                        saved["train_config"].get("data")
                        for saved in self.checkpoints.values()
                        if saved.get("task") == "pretrain"
                    ),
                    None,
                )
                or self.cfg.data
            )
            names = [name for name, _ in data.parse_mixture(pretrained)] if pretrained else []
            paths = sorted(
                path
                for name in names
                for path in glob.glob(
                    os.path.join(glob.escape(self.cfg.data_dir), name, "*train*.bin")
                )
            )
            shards = [data.read_shard(path, self.tokenizer, self.headerless) for path in paths]
            self.overlap_of[text] = [
                overlap(self.tokenizer.encode_array(form), shards) if shards else None
                for form in (text, detokenize(text))
            ]
        return self.overlap_of[text]

    def solutions(self, stage: str, n: int, temperature: float) -> list[dict]:
        """Solved test problems; kept beside the results, so that every number can be traced to its text."""
        cfg, seed = self.cfg, self.cfg.seed if temperature else 0
        settings = [
            VERSION,
            n,
            temperature,
            cfg.max_new_tokens,
            seed,
            cfg.problems,
            cfg.n_problems,
            cfg.calculator,
            str(self.dtype),
        ]
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        path = os.path.join(
            cfg.out_dir,
            "generations",
            f"{stage}_{self.checkpoints[stage]['weights_hash']}_{digest}.jsonl",
        )
        if not os.path.exists(path):
            rows = solve(
                self.model(stage),
                self.tokenizer,
                self.problems(),
                n,
                temperature,
                cfg.max_new_tokens,
                seed,
                cfg.calculator,
                lambda text: print(f"eval {stage}: {text}", flush=True),
            )
            data.write_jsonl(path, rows)
        return data.read_jsonl(path)


class Task(NamedTuple):
    run: Callable  # (bench, stage) -> rows
    settings: tuple[
        str, ...
    ]  # that decide its numbers; the first names its data, and the task is left out where that is empty
    files: tuple[
        str, ...
    ]  # patterns of its files in that data's folder; none where the setting is the data itself
    stages: Callable = lambda bench: bench.policies  # those it is run for
    n_data: int = 1  # how many of its settings, from the first on, name data

    @property
    def data(self) -> str:
        return self.settings[0]


def tuned(bench: Bench) -> list[str]:
    return [stage for stage in bench.policies if stage in ("sft", "dpo")]


def judged(bench: Bench) -> list[str]:
    """The stage whose solutions the verifier judges."""
    return tuned(bench)[-1:] if "verifier" in bench.checkpoints else []


ANSWERS = ("n_problems", "max_new_tokens", "calculator")  # what decides a solution, greedy
TASKS = {
    "val_loss": Task(tasks.val_loss, ("data",), ("*val*.bin",)),
    "text_perplexity": Task(
        tasks.text_perplexity,
        ("text", "protocols"),
        ("test.txt",),
        lambda bench: [*bench.policies, *bench.baselines()],
    ),
    "chats": Task(tasks.chats, ("chats", "n_chats", "max_new_tokens"), ("sft_val.jsonl",)),
    "problems": Task(tasks.greedy, ("problems", *ANSWERS), ("problems_test.jsonl",)),
    "preference": Task(tasks.preference, ("pairs",), ("dpo_test.jsonl", "dpo_val.jsonl")),
    "tales": Task(
        tasks.tales,
        ("pairs", "seed"),
        ("dpo_test.jsonl",),
        lambda bench: tuned(bench) if bench.cfg.pairs == "toy" else [],
    ),
    "sst2": Task(tasks.sst2, ("sst2", "shots", "n_problems"), ("test.jsonl",), n_data=2),
    "dialogsum": Task(
        tasks.dialogsum, ("dialogues", "n_problems", "max_new_tokens"), ("test.jsonl",)
    ),
    "rerank": Task(
        tasks.rerank,
        ("problems", *ANSWERS, "n_samples", "temperature", "seed"),
        ("problems_test.jsonl",),
        judged,
    ),
    "published": Task(tasks.published, ("published", "n_problems"), ("test.jsonl",), judged),
    "streaming": Task(
        sinks.streaming,
        ("streaming", "n_streams"),
        ("*val*.bin",),
        lambda bench: bench.policies[1:],
    ),  # the first is the untrained model
    "attention": Task(sinks.attention, ("sentences",), ()),
}
VERSION = 5  # of the tasks: raised when a number changes its meaning


# ---------------------------------------------------------------------------------------------------------------------
# Results: one JSON line per number, append-only


def item_key(row: dict) -> str:
    """Under which a row's items stand in its items file."""
    return f"{row['model']} {row['metric']} {row['protocol']} {row['split']}"


def read_results(folder: str) -> list[dict]:
    """Rows of every results file of a run, oldest first."""
    names = (
        sorted(n for n in os.listdir(folder) if n.startswith("results") and n.endswith(".jsonl"))
        if os.path.isdir(folder)
        else []
    )
    rows = [row for name in names for row in data.read_metrics(os.path.join(folder, name))]
    return sorted(rows, key=lambda row: row.get("date", ""))


@contextmanager
def results_lock(folder: str):
    with open(os.path.join(folder, ".results_lock"), "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def append_results(path: str, rows: list[dict], replace=None) -> None:
    """All rows in one write under a lock: two evaluations at once lose nothing. replace(row): old rows to drop."""
    with results_lock(os.path.dirname(path)):
        if os.path.exists(path):
            with open(path, "rb") as f:
                torn = not (f.read() or b"\n").endswith(
                    b"\n"
                )  # by a kill: the next row must not be glued to the half one
            if replace is not None or torn:
                data.write_jsonl(
                    path,
                    [row for row in data.read_metrics(path) if replace is None or not replace(row)],
                )
        with open(path, "a") as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows))
            f.flush()
            os.fsync(f.fileno())


def main(argv: list[str]) -> int:
    cfg = configurator.load(EvalConfig, argv)
    if cfg.compare:
        import tables  # which reads what this file writes

        print(tables.compare(list(cfg.compare)))
        return 0
    chosen = {
        name: task
        for name, task in TASKS.items()
        if getattr(cfg, task.data) and (not cfg.tasks or name in cfg.tasks)
    }
    if not os.path.isdir(cfg.out_dir):
        raise UserError(f"out_dir {cfg.out_dir!r} does not exist: give the folder of a run")
    data.ensure(
        ",".join(getattr(cfg, task.data) for task in chosen.values() if task.files), cfg.data_dir
    )
    existing = read_results(cfg.out_dir)
    fresh = not existing or cfg.no_overwrite or cfg.force
    path = os.path.join(
        cfg.out_dir, "results.jsonl" if fresh else time.strftime("results_%Y%m%d_%H%M%S.jsonl")
    )
    bench = Bench(cfg)
    origin, new = provenance(), 0
    for name, task in chosen.items():
        settings = json.loads(json.dumps({key: getattr(cfg, key) for key in task.settings})) | {
            "dtype": str(bench.dtype)
        }
        data_hash = bench.data_hash(task)
        for stage in task.stages(bench):
            key = {
                "task": name,
                "stage": stage,
                "version": VERSION,
                "weights_hash": bench.checkpoints[stage]["weights_hash"],
                "data_hash": data_hash,
                "settings": settings,
            }
            if task.stages is judged:
                key["verifier_hash"] = bench.checkpoints["verifier"]["weights_hash"]
            same = lambda row: all(row.get(k) == v for k, v in key.items())
            if cfg.no_overwrite and any(map(same, existing)):
                continue
            began = time.perf_counter()
            rows = [
                {
                    "model": stage,
                    "split": "test",
                    **key,
                    "step": bench.checkpoints[stage].get("step", 0),
                    **number,
                }
                for number in task.run(bench, stage)
            ]
            seconds = time.perf_counter() - began
            kept = {item_key(row): row.pop("items") for row in rows if "items" in row}
            digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
            items = os.path.join(
                os.path.basename(path).removesuffix(".jsonl").replace("results", "items"),
                f"{name}_{stage}_{digest}.json",
            )
            data.write_json(os.path.join(cfg.out_dir, items), kept)
            rows = [
                row
                | {
                    "items": items,
                    "seconds": round(seconds, 2),
                    "date": time.strftime("%Y-%m-%d %H:%M:%S"),
                    **origin,
                }
                for row in rows
            ]
            append_results(path, rows, same if cfg.force else None)
            new += len(rows)
            shown = [
                f"{r['metric']} {r['protocol']} {r['value']:.4g}"
                for r in rows
                if not {"position", "head"} & r.keys()
            ]  # not every point of a curve
            print(f"eval {name} {stage} ({seconds:.0f} s): {', '.join(shown)}", flush=True)
    print(
        f"eval: {new} new results in {path}"
        if new
        else f"eval: all results exist in {cfg.out_dir}, nothing to do"
    )
    return 0


if __name__ == "__main__":
    configurator.run(main)
