"""Evaluation: every stage of a run under named protocols, one JSON line per number, append-only.

    python eval.py --out_dir=out/toy --no_overwrite            # skips what results.jsonl holds already
    python eval.py --out_dir=out/toy                           # a second time: a new file with a timestamp
    python eval.py --out_dir=out/local --text=wikitext-2,wikitext-2-valid --problems=gsm8k-test --pairs=hh-rlhf

out_dir is the folder of a pipeline (with pretrain/, sft/, dpo/, verifier/ in it) or of a single stage.
"""
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, NamedTuple

import numpy as np
import torch

import configurator
import data
import toy
from checkpoint import checkpoint_files, load_checkpoint, model_from, provenance, weights_hash
from configurator import UserError
from model import GPT, ModelConfig
from perplexity import PROTOCOLS, detokenize, overlap, perplexity, windows_nll
from problems import (CHOSEN_BY, RERANKERS, auc_interval, both_kinds, calibration, choose, discrimination, final_answer, likelihoods, score_solutions, solve,
                      taxonomy, with_prompts)
from sample import generate
from sinks import attention, streaming
from stats import mean, proportion, ratio

STAGES = ("pretrain", "sft", "dpo", "verifier")


@dataclass
class EvalConfig:
    out_dir: str = "out/toy"  # folder of a pipeline or of one stage; results.jsonl is written here
    data: str = "toy"  # shards whose validation split gives val_loss
    problems: str = "toy"  # word problems with a problems_test.jsonl; "" = none
    pairs: str = "toy"  # preference pairs with dpo_test.jsonl (else dpo_val); "" = none
    chats: str = "toy"  # conversations with an sft_val.jsonl: loss, length, repetition and stop rate of the answers; "" = none
    text: str = ""  # texts for the perplexity protocols, e.g. wikitext-2,wikitext-2-valid
    protocols: tuple[str, ...] = ()  # which of the perplexity protocols; none = all
    published: str = ""  # published solutions of GSM8K's test problems, for the verifier to judge; "" = none
    streaming: str = ""  # shards whose validation split is read as streams of 16 x seq_len tokens (sinks.py); "" = none
    n_streams: int = 64  # of them
    sentences: str = ""  # sentences whose attention maps are kept, separated by ; (sinks.py); "" = none
    tasks: tuple[str, ...] = ()  # which tasks; none = all that the data and checkpoints allow
    data_dir: str = "data"  # where data.py put them
    tokenizer: str | None = None  # None = the checkpoint's; else a ranks file, which must be the same
    n_samples: int = 8  # solutions per problem for majority, best-of-N and oracle
    temperature: float = 0.8  # of these samples
    max_new_tokens: int = 64  # longest answer
    calculator: bool = False  # work out <<3+4= for the model (Cobbe et al. 2021)
    n_problems: int | None = None  # problems of the test split; None = all
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
        unnamed = [f"{task} needs --{TASKS[task].data}=..." for task in self.tasks if task in TASKS and not getattr(self, TASKS[task].data)]
        if unnamed:
            raise UserError(f"a task without data: {', '.join(unnamed)}")
        if self.n_streams < 1:
            raise UserError(f"n_streams must be at least 1, got {self.n_streams}")
        odd = [protocol for protocol in self.protocols if protocol not in PROTOCOLS]
        if odd:
            raise UserError(f"unknown protocol {', '.join(odd)}; there are {', '.join(PROTOCOLS)}")
        if self.no_overwrite and self.force:
            raise UserError("no_overwrite and force exclude each other")


# ---------------------------------------------------------------------------------------------------------------------
# Preferences

def pair_ids(record: dict, tokenizer) -> tuple[list[int], list[int], list[int]]:
    """ids of prompt, chosen and rejected answer; the answers end with <|end|>. One prompt, so the two cannot differ in it."""
    return (data.render_prompt(record["prompt"], tokenizer), *(tokenizer.encode(record[key]) + [tokenizer.end] for key in ("chosen", "rejected")))


def pair_logprobs(model: GPT, pairs: list) -> np.ndarray:
    """Summed log-probs (n, 2) of chosen and rejected answers."""
    windows = [(prompt + answer, len(answer)) for prompt, *answers in pairs for answer in answers]
    return -np.array(windows_nll(model, windows, batch=64)).reshape(-1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: each takes the bench and a stage's name, and returns its numbers

class Bench:
    """Models, tokenizer and data of one evaluation, loaded when first asked for."""

    def __init__(self, cfg: EvalConfig):
        self.cfg, self.models, self.hashes, self.seen = cfg, {}, {}, {}
        runs = sorted(entry.name for entry in os.scandir(cfg.out_dir) if entry.is_dir() and checkpoint_files(entry.path))
        runs.sort(key=lambda name: STAGES.index(name) if name in STAGES else len(STAGES))
        if runs:
            self.checkpoints = {name: load_checkpoint(os.path.join(cfg.out_dir, name)) for name in runs}
        else:
            only = load_checkpoint(cfg.out_dir)
            self.checkpoints = {only["task"]: only}
        first = next(iter(self.checkpoints.values()))
        self.tokenizer = data.load_tokenizer(cfg.tokenizer or first["tokenizer"]["name"], cfg.data_dir, first["tokenizer"])
        self.headerless = first["train_config"].get("headerless", False)
        device = "cuda" if cfg.device == "auto" and torch.cuda.is_available() else "cpu" if cfg.device == "auto" else cfg.device
        self.device = torch.device(device)
        bf16 = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and device == "cuda"
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        torch.manual_seed(0)
        untrained = GPT(ModelConfig(**{**first["model_config"], "score_head": False}))
        self.checkpoints = {"untrained": {"model": untrained.state_dict(), "model_config": {**first["model_config"], "score_head": False},
                                          "weights_hash": weights_hash(untrained.state_dict())}, **self.checkpoints}
        self.policies = [stage for stage, saved in self.checkpoints.items() if saved.get("task") != "verifier"]

    def model(self, stage: str) -> GPT:
        if stage not in self.models:
            self.models[stage] = model_from(self.checkpoints[stage]).to(self.device, self.dtype).eval()
        return self.models[stage]

    def files(self, task: "Task") -> list[str]:
        """The files that a task takes its items from."""
        names = [name for name, _ in data.parse_mixture(getattr(self.cfg, task.data))] if task.files else []
        return sorted(path for name in names for pattern in task.files for path in glob.glob(os.path.join(glob.escape(self.cfg.data_dir), name, pattern)))

    def data_hash(self, task: "Task") -> str:
        """sha256 over names and contents of a task's files, first 16 hex digits."""
        for path in self.files(task):
            if path not in self.hashes:
                self.hashes[path] = data.sha256(path)
        named = [[os.path.relpath(path, self.cfg.data_dir), self.hashes[path]] for path in self.files(task)]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]

    def problems(self) -> list[dict]:
        return data.load_records(self.cfg.problems, self.cfg.data_dir, "problems", "test")[:self.cfg.n_problems]

    def pairs(self) -> tuple[str, list]:
        split = "test" if os.path.exists(os.path.join(self.cfg.data_dir, self.cfg.pairs, "dpo_test.jsonl")) else "val"
        pairs = [pair_ids(record, self.tokenizer) for record in data.load_records(self.cfg.pairs, self.cfg.data_dir, "dpo", split)]
        return split, [pair for pair in pairs if len(pair[0]) + max(len(pair[1]), len(pair[2])) <= self.model(self.policies[-1]).cfg.seq_len]

    def overlaps(self, text: str) -> list[float | None]:
        """Share of the 13-token runs of a text, as it stands and detokenised, that stand in the training shards too; None without shards."""
        if text not in self.seen:
            names = [name for name, _ in data.parse_mixture(self.cfg.data)] if self.cfg.data else []
            paths = sorted(path for name in names for path in glob.glob(os.path.join(glob.escape(self.cfg.data_dir), name, "*train*.bin")))
            shards = [data.read_shard(path, self.tokenizer, self.headerless) for path in paths]
            self.seen[text] = [overlap(self.tokenizer.encode_array(form), shards) if shards else None for form in (text, detokenize(text))]
        return self.seen[text]

    def solutions(self, stage: str, n: int, temperature: float) -> list[dict]:
        """Solved test problems; kept beside the results, so that every number can be traced to its text."""
        cfg = self.cfg
        settings = hashlib.sha256(json.dumps([VERSION, n, temperature, cfg.max_new_tokens, cfg.seed, cfg.problems, cfg.n_problems, cfg.calculator, str(self.dtype)]).encode())
        path = os.path.join(cfg.out_dir, "generations", f"{stage}_{self.checkpoints[stage]['weights_hash']}_{settings.hexdigest()[:8]}.jsonl")
        if not os.path.exists(path):
            rows = solve(self.model(stage), self.tokenizer, self.problems(), n, temperature, cfg.max_new_tokens, cfg.seed, cfg.calculator,
                         lambda text: print(f"eval {stage}: {text}", flush=True))
            data.write_jsonl(path, rows)
        return data.read_jsonl(path)


def val_loss(bench: Bench, stage: str) -> list[dict]:
    """Nats per token on the validation shards; beside it, for the untrained row, the unigram entropy of the same tokens."""
    model = bench.model(stage)
    rows = data.Mixture(bench.cfg.data, bench.cfg.data_dir, "val", model.cfg.seq_len, 0, bench.tokenizer, bench.headerless)
    ids = rows.validation(0, min(rows.n_rows, 512)).tolist()
    nll, T = windows_nll(model, [(row, len(row) - 1) for row in ids]), model.cfg.seq_len
    results = [{"metric": "val_loss", "protocol": "windows", "split": "val", **ratio(nll, [T] * len(nll))}]
    if stage == "untrained":
        counts = Counter(token for row in ids for token in row[1:])
        total = sum(counts.values())
        entropy = -sum(c / total * math.log(c / total) for c in counts.values())
        results.append({"model": "unigram entropy", "metric": "val_loss", "protocol": "windows", "split": "val", "value": entropy, "n": total})
    return results


def text_perplexity(bench: Bench, stage: str) -> list[dict]:
    """Every protocol on every text; beside each number, how much of the text stood in the pretraining shards."""
    results = []
    for name in bench.cfg.text.split(","):
        with data.open_text(os.path.join(bench.cfg.data_dir, name, "test.txt")) as f:
            text = f.read()
        overlaps = bench.overlaps(text)
        for row in perplexity(bench.model(stage), bench.tokenizer, text, bench.cfg.protocols or PROTOCOLS):
            results.append({**row, "split": name, "overlap": overlaps[row["protocol"] in ("words", "bpb")]})
    return results


def greedy(bench: Bench, stage: str) -> list[dict]:
    """One greedy answer to every problem: right (strictly: after ####; flexibly: its last number), without an answer, stopped; and what went
    wrong, with examples. The untrained row has the trivial answer beside it."""
    rows = bench.solutions(stage, 1, 0.0)
    flags, examples = taxonomy(rows)
    results = [{"metric": metric, "protocol": "greedy", **proportion(values), "examples": examples.get(metric, [])} for metric, values in flags.items()]
    if stage == "untrained":
        answers = [final_answer(row["answer"]) for row in rows]
        common = Counter(answers).most_common(1)[0][0]
        results.append({"model": f"always {common}", "metric": "exact_match", "protocol": "greedy", **proportion(answer == common for answer in answers)})
    return results


def repetition(ids: list[int], n: int = 4) -> float:
    """Share of the n-grams that stood in the same text before."""
    grams = [tuple(ids[i:i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def habits(model: GPT, tokenizer, prompts: list[list[int]], max_new_tokens: int) -> dict[str, list[float]]:
    """How the model answers, greedily: whether each answer stops by itself, its tokens, the share of repeated 4-grams in it, and of its
    2-grams the share that no other answer has: 0 where a model says the same to everyone (distinct-2, arXiv 1510.03055, across answers)."""
    stop = (tokenizer.end, tokenizer.eos)
    answers = generate(model, prompts, max_new_tokens, stop, temperature=0)
    grams = [set(zip(ids, ids[1:])) for ids in answers]
    answers_with = Counter(gram for own in grams for gram in own)
    return {"stop_rate": [ids[-1] in stop for ids in answers], "length": [len(ids) for ids in answers], "repetition": [repetition(ids) for ids in answers],
            "distinct_2": [sum(answers_with[gram] == 1 for gram in own) / max(1, len(own)) for own in grams]}


def chats(bench: Bench, stage: str) -> list[dict]:
    """Held-out conversations: nats per token of their last answers, and the habits of the model's own answers in their place."""
    model, tokenizer = bench.model(stage), bench.tokenizer
    records = [r["messages"] for r in data.load_records(bench.cfg.chats, bench.cfg.data_dir, "sft", "val")]
    prompts = [data.render_prompt(messages[:-1], tokenizer) for messages in records]
    windows = [(prompt + answer, len(answer)) for prompt, answer in zip(prompts, (tokenizer.encode(m[-1]["content"]) + [tokenizer.end] for m in records))
               if len(prompt + answer) <= model.cfg.seq_len][:512]
    prompts = [prompt for prompt in prompts if len(prompt) < model.cfg.seq_len][:bench.cfg.n_chats]
    own = habits(model, tokenizer, prompts, bench.cfg.max_new_tokens)
    return [{"metric": metric, "split": "val", **number} for metric, number in (
        ("response_loss", {"protocol": "teacher", **ratio(windows_nll(model, windows), [n for _, n in windows])}),
        ("stop_rate", {"protocol": "greedy", **proportion(own["stop_rate"])}),
        *((metric, {"protocol": "greedy", **mean(own[metric])}) for metric in ("length", "repetition", "distinct_2")))]


def preference(bench: Bench, stage: str) -> list[dict]:
    """Share of pairs whose chosen answer has the higher log-prob (sum; mean per token), or, for DPO, the higher reward."""
    split, pairs = bench.pairs()
    logp, lengths = pair_logprobs(bench.model(stage), pairs), np.array([[len(p[1]), len(p[2])] for p in pairs])
    results = [{"metric": "accuracy", "protocol": protocol, **proportion(values[:, 0] > values[:, 1])}
               for protocol, values in (("logprob", logp), ("logprob_per_token", logp / lengths))]
    if stage == "dpo" and "sft" in bench.checkpoints:
        reward = logp - pair_logprobs(bench.model("sft"), pairs)
        results.append({"metric": "accuracy", "protocol": "reward", **proportion(reward[:, 0] > reward[:, 1])})
    if stage == "untrained":
        hits = np.where(lengths[:, 0] == lengths[:, 1], 0.5, lengths[:, 0] > lengths[:, 1])
        results.append({"model": "longer answer wins", "metric": "accuracy", "protocol": "length", **proportion(hits)})
    return [{**result, "split": split} for result in results]


def tales(bench: Bench, stage: str) -> list[dict]:
    """Toy world: greedy-free check of what the pairs teach, on tales told for held-out casts at temperature 1."""
    prompts = sorted({record["prompt"][0]["content"] for record in data.load_records(bench.cfg.pairs, bench.cfg.data_dir, "dpo", "test")})
    tokenizer, asked = bench.tokenizer, [prompt for prompt in prompts for _ in range(4)]
    outputs = generate(bench.model(stage), [data.render_prompt(data.user(p), tokenizer) for p in asked], 128, (tokenizer.end, tokenizer.eos),
                       [(bench.cfg.seed, number) for number in range(len(asked))])
    verdicts = [toy.judge_tale(p, tokenizer.decode(ids[:-1])) for p, ids in zip(asked, outputs)]
    flags = {"on_topic": [v["on_topic"] for v in verdicts], "kind": [v["kind"] for v in verdicts],
             "on_topic_and_kind": [v["on_topic"] and v["kind"] for v in verdicts], "stop_rate": [ids[-1] == tokenizer.end for ids in outputs]}
    return [{"metric": metric, "protocol": "sampled", **proportion(values)} for metric, values in flags.items()]


def rerank(bench: Bench, stage: str) -> list[dict]:
    """Ways to choose among the first k of the same n_samples solutions, for k = 1, 2, 4, ...; AUC and calibration of the scores."""
    rows = bench.solutions(stage, bench.cfg.n_samples, bench.cfg.temperature)
    score_solutions(bench.model("verifier"), bench.tokenizer, rows)
    likelihoods(bench.model(stage), bench.tokenizer, rows)
    results = [*discrimination(bench.model("verifier"), bench.tokenizer, rows), *calibration(rows)]
    k = 1
    while k <= bench.cfg.n_samples:
        for how in RERANKERS:
            results.append({"metric": "exact_match", "protocol": f"{how}@{k}", **proportion(choose(row["solutions"][:k], how) for row in rows)})
        k *= 2
    return results


def published(bench: Bench, stage: str) -> list[dict]:
    """GSM8K's published solutions of its test problems by four larger models, judged, never trained on: each source's accuracy, the best of
    the four by likelihood and by verifier, and the AUC over all of them and within each source (sources differ in style and in accuracy)."""
    tokenizer, verifier = bench.tokenizer, bench.model("verifier")
    rows = []
    for record in data.read_jsonl(os.path.join(bench.cfg.data_dir, bench.cfg.published, "test.jsonl"))[:bench.cfg.n_problems]:
        texts = {source: re.sub(r"\nA: (.*)$", r"\n#### \1", value["solution"]) for source, value in record.items() if isinstance(value, dict)}
        rows.append({"question": record["question"], "solutions": [
            {"source": source, "text": text, "ids": tokenizer.encode(text) + [tokenizer.end], "stopped": True, "correct": record[source]["is_correct"]}
            for source, text in texts.items()]})
    fits = lambda row: all(len(ids) <= verifier.cfg.seq_len for ids, _ in with_prompts([row], tokenizer))
    kept = list(filter(fits, rows))
    if len(kept) < len(rows):
        print(f"eval published: {len(rows) - len(kept)} of {len(rows)} problems have solutions longer than seq_len={verifier.cfg.seq_len} and are left out")
    if not kept:
        raise UserError(f"no problem of {bench.cfg.published} fits seq_len={verifier.cfg.seq_len}")
    score_solutions(verifier, tokenizer, kept)
    likelihoods(bench.model(stage), tokenizer, kept)
    of_source = {source["source"]: [{**row, "solutions": [s for s in row["solutions"] if s["source"] == source["source"]]} for row in kept]
                 for source in kept[0]["solutions"]}
    results = [{"metric": "exact_match", "protocol": how, **proportion(choose(row["solutions"], how) for row in kept)} for how in (*CHOSEN_BY, "oracle")]
    for source, part in of_source.items():
        results.append({"metric": "exact_match", "protocol": source, **proportion(choose(row["solutions"], "oracle") for row in part)})
        results += [{"metric": "auc", "protocol": f"{how} of {source}", **auc_interval(part, key)} for how, key in CHOSEN_BY.items() if both_kinds(part)]
    return [*discrimination(verifier, tokenizer, kept), *calibration(kept), *results]


class Task(NamedTuple):
    run: Callable  # (bench, stage) -> rows
    data: str  # the setting that names its data; the task is left out where that is empty
    files: tuple[str, ...]  # patterns of its files in that data's folder; none where the setting is the data itself
    stages: Callable = lambda bench: bench.policies  # those it is run for


def tuned(bench: Bench) -> list[str]:
    return [stage for stage in bench.policies if stage in ("sft", "dpo")]


def judged(bench: Bench) -> list[str]:
    """The stage whose solutions the verifier judges."""
    return tuned(bench)[-1:] if "verifier" in bench.checkpoints else []


TASKS = {
    "val_loss": Task(val_loss, "data", ("*val*.bin",)),
    "text_perplexity": Task(text_perplexity, "text", ("test.txt",)),
    "chats": Task(chats, "chats", ("sft_val.jsonl",)),
    "problems": Task(greedy, "problems", ("problems_test.jsonl",)),
    "preference": Task(preference, "pairs", ("dpo_test.jsonl", "dpo_val.jsonl")),
    "tales": Task(tales, "pairs", ("dpo_test.jsonl",), lambda bench: tuned(bench) if bench.cfg.pairs == "toy" else []),
    "rerank": Task(rerank, "problems", ("problems_test.jsonl",), judged),
    "published": Task(published, "published", ("test.jsonl",), judged),
    "streaming": Task(streaming, "streaming", ("*val*.bin",), lambda bench: bench.policies[1:]),  # the first is the untrained model
    "attention": Task(attention, "sentences", ()),
}
SETTINGS = ("data", "problems", "pairs", "chats", "text", "protocols", "published", "n_samples", "temperature", "max_new_tokens", "calculator",
            "n_problems", "n_chats", "streaming", "n_streams", "sentences", "seed")  # that decide a number, and stand beside it
VERSION = 3  # of the tasks: raised when a number changes its meaning


# ---------------------------------------------------------------------------------------------------------------------
# Results: one JSON line per number, append-only

def item_key(row: dict) -> str:
    """Under which a row's items stand in its items file."""
    return f"{row['model']} {row['metric']} {row['protocol']} {row['split']}"


def read_results(folder: str) -> list[dict]:
    """Rows of every results file of a run, oldest first."""
    names = sorted(n for n in os.listdir(folder) if n.startswith("results") and n.endswith(".jsonl")) if os.path.isdir(folder) else []
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
                torn = not (f.read() or b"\n").endswith(b"\n")  # by a kill: the next row must not be glued to the half one
            if replace is not None or torn:
                data.write_jsonl(path, [row for row in data.read_metrics(path) if replace is None or not replace(row)])
        with open(path, "a") as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows))
            f.flush()
            os.fsync(f.fileno())


def main(argv: list[str]) -> int:
    cfg = configurator.load(EvalConfig, argv)
    data.ensure(",".join(filter(None, (cfg.data, cfg.problems, cfg.pairs, cfg.chats, cfg.streaming))), cfg.data_dir)
    if not os.path.isdir(cfg.out_dir):
        raise UserError(f"out_dir {cfg.out_dir!r} does not exist: give the folder of a run")
    existing = read_results(cfg.out_dir)
    fresh = not existing or cfg.no_overwrite or cfg.force
    path = os.path.join(cfg.out_dir, "results.jsonl" if fresh else time.strftime("results_%Y%m%d_%H%M%S.jsonl"))
    bench = Bench(cfg)
    settings = json.loads(json.dumps({key: getattr(cfg, key) for key in SETTINGS}))
    origin, new = provenance(), 0
    for name, task in TASKS.items():
        if cfg.tasks and name not in cfg.tasks or not getattr(cfg, task.data):
            continue
        for stage in task.stages(bench):
            key = {"task": name, "stage": stage, "version": VERSION, "weights_hash": bench.checkpoints[stage]["weights_hash"],
                   "data_hash": bench.data_hash(task), "settings": settings}
            if task.stages is judged:
                key["verifier_hash"] = bench.checkpoints["verifier"]["weights_hash"]
            same = lambda row: all(row.get(k) == v for k, v in key.items())
            if cfg.no_overwrite and any(map(same, existing)):
                continue
            began = time.perf_counter()
            rows = [{"model": stage, "split": "test", **key, "step": bench.checkpoints[stage].get("step", 0), **number} for number in task.run(bench, stage)]
            seconds = time.perf_counter() - began
            kept = {item_key(row): row.pop("items") for row in rows if "items" in row}
            items = os.path.join("items", f"{name}_{stage}_{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json")
            data.write_json(os.path.join(cfg.out_dir, items), kept)
            rows = [row | {"items": items, "seconds": round(seconds, 2), "date": time.strftime("%Y-%m-%d %H:%M:%S"), **origin} for row in rows]
            append_results(path, rows, same if cfg.force else None)
            new += len(rows)
            print(f"eval {name} {stage} ({seconds:.0f} s): " + ", ".join(f"{r['metric']} {r['protocol']} {r['value']:.4g}" for r in rows if not {"position", "head"} & r.keys()), flush=True)
    print(f"eval: {new} new results in {path}" if new else f"eval: all results exist in {cfg.out_dir}, nothing to do")
    return 0


if __name__ == "__main__":
    configurator.run(main)
