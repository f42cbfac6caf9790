"""Preferences: which answer of a pair a model finds likelier, and what it tells by itself."""

import os

import numpy as np

from corpus import toy
from corpus.chat import drop_too_long, encode_pair, render_prompt, user_turn
from corpus.records import load_records
from evals.base import EvalConfig, Row, Subject, task
from evals.stats import proportion
from inference.answers import stops
from inference.sampling import generate
from inference.scoring import pair_logprobs


@task("preference", data=("pairs",), files=("dpo_test.jsonl", "dpo_val.jsonl"))
def preference(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Measure how often the chosen answer of a pair has the higher log-prob.

    The log-prob is a sum, or a mean per token; for DPO also the reward, relative to SFT. Beside the
    untrained row stands the rule that the longer answer wins.
    """
    has_test = os.path.exists(os.path.join(cfg.data_dir, cfg.pairs, "dpo_test.jsonl"))
    split = "test" if has_test else "val"
    records = load_records(cfg.pairs, cfg.data_dir, "dpo", split)
    pairs = [encode_pair(record, subject.tokenizer) for record in records]
    what = f"eval: pairs of {cfg.pairs}"
    pairs = drop_too_long(pairs, lambda pair: pair.longest, subject.seq_len, what, subject.log_once)
    logp = pair_logprobs(subject.model(stage), pairs)  # (n, 2)
    lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
    values = {"logprob": logp, "logprob_per_token": logp / lengths}
    if stage == "dpo" and "sft" in subject.checkpoints:
        values["reward"] = logp - pair_logprobs(subject.model("sft"), pairs)
    results = []
    for protocol, of_pair in values.items():
        right = proportion(of_pair[:, 0] > of_pair[:, 1])
        results.append(Row("accuracy", protocol, right, split))
    if stage == "untrained":
        tie = lengths[:, 0] == lengths[:, 1]
        hits = proportion(np.where(tie, 0.5, lengths[:, 0] > lengths[:, 1]))
        results.append(Row("accuracy", "length", hits, split, "longer answer wins"))
    return results


def tuned_on_toy(subject: Subject, cfg: EvalConfig) -> list[str]:
    """Return the tuned stages where the pairs are the toy world's, whose tales can be judged."""
    return subject.tuned if cfg.pairs == "toy" else []


@task("tales", ("pairs",), ("dpo_test.jsonl",), ("seed",), tuned_on_toy)
def tales(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Check what the toy world's pairs teach, on tales that are sampled at temperature 1.

    Four tales are told for each of the held-out casts.
    """
    tokenizer = subject.tokenizer
    records = load_records(cfg.pairs, cfg.data_dir, "dpo", "test")
    requests = sorted({record["prompt"][0]["content"] for record in records})
    requests = [request for request in requests for _ in range(4)]
    prompts = [render_prompt(user_turn(request), tokenizer) for request in requests]
    seeds = [(cfg.seed, number) for number in range(len(prompts))]
    outputs = generate(subject.model(stage), prompts, 128, stops(tokenizer), seeds)
    flags = {"on_topic": [], "kind": [], "on_topic_and_kind": [], "stop_rate": []}
    for request, ids in zip(requests, outputs, strict=True):
        verdict = toy.judge_tale(request, tokenizer.decode(ids[:-1]))
        flags["on_topic"].append(verdict["on_topic"])
        flags["kind"].append(verdict["kind"])
        flags["on_topic_and_kind"].append(verdict["on_topic"] and verdict["kind"])
        flags["stop_rate"].append(ids[-1] == tokenizer.end)
    return [Row(metric, "sampled", proportion(values)) for metric, values in flags.items()]
