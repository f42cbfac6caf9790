"""Evaluation: every stage of a run under named protocols, one JSON line per number, append-only.

    python eval.py --out_dir=out/toy --no_overwrite            # skips what results.jsonl holds already
    python eval.py --out_dir=out/toy                           # a second time: a new file with a timestamp
    python eval.py --out_dir=out/local --text=wikitext-2,wikitext-2-valid --problems=gsm8k-test --pairs=hh-rlhf

out_dir is the folder of a pipeline (with pretrain/, sft/, dpo/, verifier/ in it) or of a single stage.
"""
import fcntl
import hashlib
import json
import math
import os
import re
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

import configurator
import data
import toy
from checkpoint import load_checkpoint, model_from, provenance, weights_hash
from configurator import UserError
from model import GPT, ModelConfig
from sample import Calculator, generate

STAGES = ("pretrain", "sft", "dpo", "verifier")
PROTOCOLS = ("per_line", "tokens", "strided", "words", "bpb")


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
        odd = [protocol for protocol in self.protocols if protocol not in PROTOCOLS]
        if odd:
            raise UserError(f"unknown protocol {', '.join(odd)}; there are {', '.join(PROTOCOLS)}")
        if self.no_overwrite and self.force:
            raise UserError("no_overwrite and force exclude each other")


# ---------------------------------------------------------------------------------------------------------------------
# Statistics

def wilson(hits: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    p = hits / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def proportion(flags) -> dict:
    flags = [bool(flag) for flag in flags]
    low, high = wilson(sum(flags), len(flags))
    return {"value": sum(flags) / len(flags), "low": low, "high": high, "n": len(flags)}


def ratio(numerators, denominators, transform=lambda x: x) -> dict:
    """transform(sum / sum) over independent parts (lines, windows, documents); 95 % interval by 1,000 bootstrap draws of parts."""
    a, b = np.array(numerators, float), np.array(denominators, float)
    draws = np.random.default_rng(0).integers(0, len(a), (1000, len(a)))
    low, high = np.quantile(a[draws].sum(1) / b[draws].sum(1), [0.025, 0.975])
    return {"value": float(transform(a.sum() / b.sum())), "low": float(transform(low)), "high": float(transform(high)), "n": int(b.sum())}


def auc(scores, labels) -> float:
    """Probability that a right solution scores above a wrong one, ties counting half; nan where one kind is missing."""
    scores, labels = np.array(scores, float), np.array(labels, bool)
    if labels.all() or not labels.any():
        return math.nan
    order = np.sort(scores)
    rank = (np.searchsorted(order, scores, "left") + np.searchsorted(order, scores, "right") + 1) / 2
    positive = labels.sum()
    return float((rank[labels].sum() - positive * (positive + 1) / 2) / (positive * (~labels).sum()))


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity: sums of negative log-likelihood over windows

@torch.no_grad()
def windows_nll(model: GPT, windows: list[tuple[list[int], int]], batch: int = 16) -> list[float]:
    """nats of each window: (ids, k) scores the last k of its ids, each given all ids before it in the window."""
    device, nll = model.embed.weight.device, [0.0] * len(windows)
    order = sorted(range(len(windows)), key=lambda i: len(windows[i][0]))
    for first in range(0, len(order), batch):
        numbers = order[first:first + batch]
        width = max(len(windows[i][0]) for i in numbers) - 1
        idx = torch.zeros(len(numbers), width, dtype=torch.long)
        targets = torch.full((len(numbers), width), -1)
        for row, i in enumerate(numbers):
            ids, scored = windows[i]
            end = len(ids) - 1
            idx[row, :end] = torch.tensor(ids[:-1])
            targets[row, end - scored:end] = torch.tensor(ids[len(ids) - scored:])
        logp = model.logprobs(model.hidden(idx.to(device)), targets.to(device))
        for i, value in zip(numbers, logp.sum(-1).tolist()):
            nll[i] = -value
    return nll


def disjoint(ids: list[int], length: int) -> list[tuple[list[int], int]]:
    """Windows of `length` ids; the first id of each has no context and is not scored."""
    parts = [ids[i:i + length] for i in range(0, len(ids), length)]
    return [(part, len(part) - 1) for part in parts if len(part) > 1]


def strided(ids: list[int], length: int, stride: int) -> list[tuple[list[int], int]]:
    """Windows of `length` ids that move by stride: every id but the first is scored once, with as much context as fits."""
    windows, done = [], 1
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        if end > done:
            windows.append((ids[begin:end], end - done))
            done = end
    return windows


def rolling(ids: list[int], length: int, eos: int) -> list[tuple[list[int], int]]:
    """lm-evaluation-harness's rolling windows: all ids scored; the context of a window's first is one id (EOS at the start)."""
    ids = [eos, *ids]
    return [(ids[max(0, min(i, len(ids) - 1 - length)):i + length + 1], len(ids[i + 1:i + length + 1])) for i in range(0, len(ids) - 1, length)]


DETOKENIZE = [  # WikiText's marks back into plain text, after lm-evaluation-harness's wikitext task
    ("s '", "s'"), (r"/' [0-9]/", r"/'[0-9]/"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" : ", ": "), (" ; ", "; "), (" . ", ". "),
    (" ! ", "! "), (" ? ", "? "), (" , ", ", "), ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" " + chr(176) + " ", chr(176)),
    (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")]


def detokenize(text: str) -> str:
    for mark, plain in DETOKENIZE[:11]:
        text = text.replace(mark, plain)
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]"), ("{", "}"), ('"', '"'), ("'", "'")):
        text = re.sub(rf"{opening}\s*([^{closing}]*?)\s*{closing}", lambda m: m[0][0] + m[1] + m[0][-1], text)
    for mark, plain in DETOKENIZE[11:]:
        text = text.replace(mark, plain)
    return text


def perplexity(model: GPT, tokenizer, text: str, protocols: tuple[str, ...] = PROTOCOLS) -> list[dict]:
    """The same text under each protocol (figures of GPT-2 small in brackets, from the threads named in LOG.md):

    per_line  first 100 non-empty lines, each alone, at most 512 ids, first id not scored: exp(nats / ids)  [40.64 on valid]
    tokens    whole text, windows of seq_len, first id of each not scored: exp(nats / ids)                  [29.94 on test]
    strided   the same, windows move by seq_len / 2                                                         [25.2 on test]
    words     per article, detokenised, rolling windows: exp(nats / whitespace words of the original)       [37.37 on test]
    bpb       the same nats / (ln 2 * UTF-8 bytes of the original)
    """
    T = model.cfg.seq_len
    results = []

    def add(protocol, nll, counts, transform=math.exp):
        results.append({"metric": "bits_per_byte" if protocol == "bpb" else "perplexity", "protocol": protocol, **ratio(nll, counts, transform)})

    lines = [line for line in text.split("\n") if line.strip()][:100]
    plain = {"per_line": lambda: [(ids, len(ids) - 1) for ids in (tokenizer.encode(line)[:min(512, T)] for line in lines) if len(ids) > 1],
             "tokens": lambda: disjoint(tokenizer.encode(text), T), "strided": lambda: strided(tokenizer.encode(text), T, T // 2)}
    for protocol in filter(protocols.__contains__, plain):
        windows = plain[protocol]()
        add(protocol, windows_nll(model, windows), [scored for _, scored in windows])
    if "words" in protocols or "bpb" in protocols:
        articles = [article for article in data.wikitext_articles(re.findall(r"[^\n]*\n|[^\n]+", text)) if article.strip()]
        nll = [sum(windows_nll(model, rolling(tokenizer.encode(detokenize(article)), T, tokenizer.eos))) for article in articles]
        if "words" in protocols:
            add("words", nll, [len(re.split(r"\s+", article)) for article in articles])
        if "bpb" in protocols:
            add("bpb", nll, [len(article.encode()) for article in articles], lambda x: x / math.log(2))
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Word problems

def final_answer(text: str) -> str | None:
    """The number after ####, commas removed (GSM8K's strict match); None where there is none."""
    found = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return found[1].replace(",", "").rstrip(".") if found else None


def solve(model: GPT, tokenizer, problems: list[dict], n: int, temperature: float, max_new_tokens: int, seed: int, calculator: bool = False,
          say=print) -> list[dict]:
    """n solutions of every problem, in batches of prompts of similar length: [{question, answer, solutions: [{ids, text, correct}]}].
    A problem's solutions depend on it and the seed alone, not on the other problems or the ranks that share them."""
    rows = [{**problem, "solutions": []} for problem in problems]
    prompts = [data.render_prompt(data.user(row["question"]), tokenizer) for row in rows]
    own_seed = [int(hashlib.sha256(row["question"].encode()).hexdigest()[:8], 16) for row in rows]
    order = [(i, k) for i in sorted(range(len(rows)), key=lambda i: len(prompts[i])) for k in range(n)]
    stop, tool = (tokenizer.end, tokenizer.eos), Calculator(tokenizer) if calculator else None
    began, made, batch = time.perf_counter(), 0, 512
    for first in range(0, len(order), batch):
        part = order[first:first + batch]
        outputs = generate(model, [prompts[i] for i, _ in part], max_new_tokens, stop, [(seed, own_seed[i], k) for i, k in part],
                           calculator=tool, temperature=temperature)
        for (i, _), ids in zip(part, outputs):
            stopped = ids[-1] in stop
            text = tokenizer.decode(ids[:-1] if stopped else ids)
            right = final_answer(text)
            rows[i]["solutions"].append({"ids": ids, "text": text, "stopped": stopped,
                                         "correct": right is not None and right == final_answer(rows[i]["answer"])})
            made += len(ids)
        elapsed, finished = time.perf_counter() - began, first + len(part)
        if finished == len(order) or (first // batch) % 4 == 3:
            say(f"sampled {finished}/{len(order)} solutions | {made / elapsed:,.0f} tok/s | eta {elapsed * (len(order) / finished - 1):.0f} s")
    return rows


def with_prompts(rows: list[dict], tokenizer) -> list[tuple[list[int], dict]]:
    """(ids of prompt and solution, the solution) of every solution."""
    return [(data.render_prompt(data.user(row["question"]), tokenizer) + s["ids"], s) for row in rows for s in row["solutions"]]


@torch.no_grad()
def score_solutions(verifier: GPT, tokenizer, rows: list[dict], batch: int = 128) -> None:
    """Write the verifier's logit at the last token of every solution into it as "score"."""
    items = sorted(with_prompts(rows, tokenizer), key=lambda item: len(item[0]))
    device = verifier.embed.weight.device
    for first in range(0, len(items), batch):
        part = items[first:first + batch]
        width = max(len(ids) for ids, _ in part)
        idx = torch.tensor([ids + [tokenizer.pad] * (width - len(ids)) for ids, _ in part], device=device)
        solution = torch.tensor([[len(ids) - len(s["ids"]) <= t < len(ids) for t in range(width)] for ids, s in part], device=device)
        scores = verifier.scores(verifier.hidden(idx), idx, solution)
        for row, (ids, s) in enumerate(part):
            s["score"] = float(scores[row, len(ids) - 1])


def likelihoods(model: GPT, tokenizer, rows: list[dict]) -> None:
    """Write the log-likelihood of every solution under the model that made it into it as "loglik"."""
    items = with_prompts(rows, tokenizer)
    for (_, s), nll in zip(items, windows_nll(model, [(ids, len(s["ids"])) for ids, s in items], 128)):
        s["loglik"] = -nll


def probability(solution: dict) -> float:
    """The verifier's, that the solution is right: sigmoid(score), without overflow."""
    return (1 + math.tanh(solution["score"] / 2)) / 2


def choose(solutions: list[dict], how: str) -> bool:
    """Whether the answer chosen from the solutions is right. oracle: any is; majority: the most common answer (first seen wins a
    tie); likelihood: the likeliest; best_of: the highest score; weighted: the answer with the largest sum of sigmoid(score)."""
    if how == "oracle":
        return any(s["correct"] for s in solutions)
    if how in CHOSEN_BY:
        return max(solutions, key=lambda s: s[CHOSEN_BY[how]])["correct"]
    votes = Counter()
    for s in solutions:
        votes[final_answer(s["text"])] += 1.0 if how == "majority" else probability(s)
    votes.pop(None, None)  # no answer is no vote
    winner = votes.most_common(1)[0][0] if votes else None
    return any(s["correct"] for s in solutions if final_answer(s["text"]) == winner)


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
        self.cfg, self.models = cfg, {}
        single = not any(os.path.isdir(os.path.join(cfg.out_dir, stage)) for stage in STAGES)
        names = [stage for stage in STAGES if os.path.isdir(os.path.join(cfg.out_dir, stage))]
        folders = {load_checkpoint(cfg.out_dir)["task"]: cfg.out_dir} if single else {s: os.path.join(cfg.out_dir, s) for s in names}
        self.checkpoints = {stage: load_checkpoint(folder) for stage, folder in folders.items()}
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
        self.policies = [stage for stage in self.checkpoints if stage != "verifier"]

    def model(self, stage: str) -> GPT:
        if stage not in self.models:
            self.models[stage] = model_from(self.checkpoints[stage]).to(self.device, self.dtype).eval()
        return self.models[stage]

    def problems(self) -> list[dict]:
        return data.load_records(self.cfg.problems, self.cfg.data_dir, "problems", "test")[:self.cfg.n_problems]

    def pairs(self) -> tuple[str, list]:
        split = "test" if os.path.exists(os.path.join(self.cfg.data_dir, self.cfg.pairs, "dpo_test.jsonl")) else "val"
        pairs = [pair_ids(record, self.tokenizer) for record in data.load_records(self.cfg.pairs, self.cfg.data_dir, "dpo", split)]
        return split, [pair for pair in pairs if len(pair[0]) + max(len(pair[1]), len(pair[2])) <= self.model(self.policies[-1]).cfg.seq_len]

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
    results = []
    for name in bench.cfg.text.split(","):
        with data.open_text(os.path.join(bench.cfg.data_dir, name, "test.txt")) as f:
            results += [{**result, "split": name} for result in perplexity(bench.model(stage), bench.tokenizer, f.read(), bench.cfg.protocols or PROTOCOLS)]
    return results


def greedy(bench: Bench, stage: str) -> list[dict]:
    solutions = [row["solutions"][0] for row in bench.solutions(stage, 1, 0.0)]
    flags = {"exact_match": [s["correct"] for s in solutions], "stop_rate": [s["stopped"] for s in solutions],
             "no_answer": [final_answer(s["text"]) is None for s in solutions]}
    return [{"metric": metric, "protocol": "greedy", **proportion(values)} for metric, values in flags.items()]


def repetition(ids: list[int], n: int = 4) -> float:
    """Share of the n-grams that stood in the same text before."""
    grams = [tuple(ids[i:i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def habits(model: GPT, tokenizer, prompts: list[list[int]], max_new_tokens: int) -> dict[str, list[float]]:
    """How the model answers, greedily: whether each answer stops by itself, its tokens, the share of repeated 4-grams in it."""
    stop = (tokenizer.end, tokenizer.eos)
    answers = generate(model, prompts, max_new_tokens, stop, temperature=0)
    return {"stop_rate": [ids[-1] in stop for ids in answers], "length": [len(ids) for ids in answers], "repetition": [repetition(ids) for ids in answers]}


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
        *((metric, {"protocol": "greedy", **ratio(own[metric], [1] * len(prompts))}) for metric in ("length", "repetition")))]


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
        hits = np.where(lengths[:, 0] == lengths[:, 1], 0.5, lengths[:, 0] > lengths[:, 1]).sum()
        low, high = wilson(hits, len(pairs))
        results.append({"model": "longer answer wins", "metric": "accuracy", "protocol": "length", "value": hits / len(pairs),
                        "low": low, "high": high, "n": len(pairs)})
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


CHOSEN_BY = {"likelihood": "loglik", "best_of": "score"}  # the highest of which field of a solution
RERANKERS = ("majority", "likelihood", "weighted", "best_of", "oracle")


def auc_interval(rows: list[dict], key: str) -> dict:
    """AUC of a field of the solutions; 95 % interval by 200 bootstrap draws of problems."""
    of = lambda numbers: auc(*zip(*((s[key], s["correct"]) for i in numbers for s in rows[i]["solutions"])))
    draws = np.random.default_rng(0).integers(0, len(rows), (200, len(rows)))
    low, high = np.nanquantile([of(draw) for draw in draws], [0.025, 0.975])
    return {"value": of(range(len(rows))), "low": float(low), "high": float(high), "n": sum(len(row["solutions"]) for row in rows)}


def both_kinds(rows: list[dict]) -> bool:
    return len({s["correct"] for row in rows for s in row["solutions"]}) == 2


def discrimination(verifier: GPT, tokenizer, rows: list[dict]) -> list[dict]:
    """AUC over scored solutions: of the likelihood and the verifier; of form alone (it stopped and has an answer), which must not
    separate; of the verifier among solutions of full form; and of the verifier when it is shown the final answer alone."""
    solutions = [s for row in rows for s in row["solutions"]]
    for s in solutions:
        s["form"] = s["stopped"] and final_answer(s["text"]) is not None
    matched = [{**row, "solutions": [s for s in row["solutions"] if s["form"]]} for row in rows]
    matched = [row for row in matched if row["solutions"]]
    bare = [{**row, "solutions": [{"ids": tokenizer.encode(f"#### {final_answer(s['text'])}") + [tokenizer.end], "correct": s["correct"]}
                                  for s in row["solutions"]]} for row in matched]
    score_solutions(verifier, tokenizer, bare)
    cases = [(how, rows, key) for how, key in CHOSEN_BY.items()]
    cases += [("form_alone", rows, "form"), ("best_of_same_form", matched, "score"), ("last_number_alone", bare, "score")]
    return [{"metric": "auc", "protocol": how, **auc_interval(part, key)} for how, part, key in cases if both_kinds(part)]


def calibration(rows: list[dict]) -> list[dict]:
    """Is a score of p right p of the time? Brier score, expected calibration error over tenths, and each tenth with its mean p."""
    solutions = [s for row in rows for s in row["solutions"]]
    p, right = np.array([probability(s) for s in solutions]), np.array([float(s["correct"]) for s in solutions])
    tenth = np.minimum((10 * p).astype(int), 9)
    bins = [(t, p[tenth == t].mean(), right[tenth == t]) for t in range(10) if (tenth == t).any()]
    error = lambda draw: np.abs(np.bincount(tenth[draw], (p - right)[draw], 10)).sum() / len(p)
    draws = [error(draw) for draw in np.random.default_rng(0).integers(0, len(p), (200, len(p)))]  # biased upwards: sampling adds to it
    low, high = np.minimum(np.quantile(draws, 0.025), error(slice(None))), np.quantile(draws, 0.975)
    return [{"metric": "brier", "protocol": "verifier", **ratio((p - right) ** 2, np.ones(len(p)))},
            {"metric": "calibration_error", "protocol": "verifier", "value": float(error(slice(None))), "low": float(low), "high": float(high), "n": len(p)},
            *({"metric": "calibration", "protocol": f"tenth {t}", "predicted": float(mean), **proportion(flags)} for t, mean, flags in bins)]


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


# name: (function, what it needs of the bench, the stages it runs for)
TASKS = {
    "val_loss": (val_loss, lambda b: b.cfg.data, lambda b: b.policies),
    "text_perplexity": (text_perplexity, lambda b: b.cfg.text, lambda b: b.policies),
    "chats": (chats, lambda b: b.cfg.chats, lambda b: b.policies),
    "problems": (greedy, lambda b: b.cfg.problems, lambda b: b.policies),
    "preference": (preference, lambda b: b.cfg.pairs, lambda b: b.policies),
    "tales": (tales, lambda b: b.cfg.pairs == "toy", lambda b: [s for s in b.policies if s in ("sft", "dpo")]),
    "rerank": (rerank, lambda b: b.cfg.problems and "verifier" in b.checkpoints, lambda b: [s for s in b.policies if s in ("sft", "dpo")][-1:]),
    "published": (published, lambda b: b.cfg.published and "verifier" in b.checkpoints, lambda b: [s for s in b.policies if s in ("sft", "dpo")][-1:]),
}
SETTINGS = ("data", "problems", "pairs", "chats", "text", "protocols", "published", "n_samples", "temperature", "max_new_tokens", "calculator",
            "n_problems", "n_chats", "seed")  # that decide a number, and stand beside it
VERSION = 2  # of the tasks: raised when a number changes its meaning


# ---------------------------------------------------------------------------------------------------------------------
# Results: one JSON line per number, append-only

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
    data.ensure(",".join(filter(None, (cfg.data, cfg.problems, cfg.pairs, cfg.chats))), cfg.data_dir)
    if not os.path.isdir(cfg.out_dir):
        raise UserError(f"out_dir {cfg.out_dir!r} does not exist: give the folder of a run")
    existing = read_results(cfg.out_dir)
    fresh = not existing or cfg.no_overwrite or cfg.force
    path = os.path.join(cfg.out_dir, "results.jsonl" if fresh else time.strftime("results_%Y%m%d_%H%M%S.jsonl"))
    bench = Bench(cfg)
    settings = json.loads(json.dumps({key: getattr(cfg, key) for key in SETTINGS}))
    origin, new = provenance(), 0
    for name, (task, needs, stages) in TASKS.items():
        if cfg.tasks and name not in cfg.tasks or not needs(bench):
            continue
        for stage in stages(bench):
            key = {"task": name, "stage": stage, "version": VERSION, "weights_hash": bench.checkpoints[stage]["weights_hash"], "settings": settings}
            if name in ("rerank", "published"):
                key["verifier_hash"] = bench.checkpoints["verifier"]["weights_hash"]
            same = lambda row: all(row.get(k) == v for k, v in key.items())
            if cfg.no_overwrite and any(map(same, existing)):
                continue
            began = time.perf_counter()
            rows = [{"model": stage, "split": "test", **key, "step": bench.checkpoints[stage].get("step", 0), **number} for number in task(bench, stage)]
            seconds = time.perf_counter() - began
            rows = [row | {"seconds": round(seconds, 2), "date": time.strftime("%Y-%m-%d %H:%M:%S"), **origin} for row in rows]
            append_results(path, rows, same if cfg.force else None)
            new += len(rows)
            print(f"eval {name} {stage} ({seconds:.0f} s): " + ", ".join(f"{r['metric']} {r['protocol']} {r['value']:.4g}" for r in rows), flush=True)
    print(f"eval: {new} new results in {path}" if new else f"eval: all results exist in {cfg.out_dir}, nothing to do")
    return 0


if __name__ == "__main__":
    configurator.run(main)
