"""Preferences: which answer of a pair a model finds likelier, and what it tells by itself."""

import os

import numpy as np

from corpus import toy
from corpus.chat import Pair, drop_too_long, encode_pair, render_prompt, user_turn
from corpus.records import load_records
from evals.base import EvalConfig, Row, Subject, task
from evals.stats import proportion
from inference.sampling import generate
from inference.scoring import pair_logprobs
from model import GPT
from runtime.files import digest


@task("preference", data="pairs", files="dpo_test.jsonl dpo_val.jsonl")
def preference(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Measure how often the chosen answer of a pair has the higher log-prob, or reward."""
    has_test = os.path.exists(os.path.join(cfg.data_dir, cfg.pairs, "dpo_test.jsonl"))
    split = "test" if has_test else "val"
    records = load_records(cfg.pairs, cfg.data_dir, "dpo", split, "pairs")
    tokenizer, space = subject.tokenizers[stage], subject.model(stage).cfg.seq_len
    every = [encode_pair(record, tokenizer) for record in records]
    what = f"eval: pairs of {cfg.pairs}"
    pairs = drop_too_long(every, lambda pair: pair.longest, space, what, subject.log_once)
    subject.note_kept(every, pairs)
    weights = subject.checkpoints[stage]["weights_hash"]
    logp = logprobs_of(subject, weights, subject.model(stage), pairs)  # (n, 2)
    lengths = np.array([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
    values = {"logprob": logp, "logprob_per_token": logp / lengths}
    values |= reward(subject, stage, pairs, logp, lengths)
    shares = {protocol: proportion(x[:, 0] > x[:, 1]) for protocol, x in values.items()}
    results = [Row("accuracy", protocol, share, split) for protocol, share in shares.items()]
    if stage == subject.first:
        tie = lengths[:, 0] == lengths[:, 1]
        hits = proportion(np.where(tie, 0.5, lengths[:, 0] > lengths[:, 1]))
        results.append(Row("accuracy", "length", hits, split, "longer answer wins"))
    return results


def reward(
    subject: Subject, stage: str, pairs: list[Pair], logp: np.ndarray, lengths: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the implicit reward of a DPO run, up to its beta, under "reward" if it is known.

    It is relative to the weights that the run started from. SimPO's has no reference and is a mean
    per token; IPO's is a sum, as TRL logs it. logp, lengths: (n, 2).
    """
    run = subject.checkpoints[stage]
    if run.get("task") != "dpo":
        return {}
    if run["train_config"].get("loss_type") == "simpo":
        return {"reward": logp / lengths}
    start = subject.start_model(stage)
    if start is None:
        print(f"eval: the reward of {stage} is left out: the weights it started from are gone")
        return {}
    weights = run["init_from"]["weights_hash"]
    return {"reward": logp - logprobs_of(subject, weights, start, pairs)}


def logprobs_of(subject: Subject, weights: str, model: GPT, pairs: list[Pair]) -> np.ndarray:
    """Return pair_logprobs() of the model with these weights; a start is often a stage too."""
    key = (weights, digest(pairs))
    if key not in subject.logprobs:
        subject.logprobs[key] = pair_logprobs(model, pairs)
    return subject.logprobs[key]


def tuned_on_toy(subject: Subject, cfg: EvalConfig) -> list[str]:
    """Return the tuned stages; only tales of the toy world can be judged."""
    return subject.tuned if cfg.pairs == "toy" else []


@task("tales", "pairs", "dpo_test.jsonl", "seed", tuned_on_toy)
def tales(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Check what the toy world's pairs teach, on four tales of each held-out cast."""
    tokenizer = subject.tokenizers[stage]
    records = load_records(cfg.pairs, cfg.data_dir, "dpo", "test", "pairs")
    requests = sorted({record["prompt"][0]["content"] for record in records})
    requests = [request for request in requests for _ in range(4)]
    prompts = [render_prompt(user_turn(request), tokenizer) for request in requests]
    seeds = [(cfg.seed, number) for number in range(len(prompts))]
    outputs = generate(subject.model(stage), prompts, 128, tokenizer.stops, seeds)
    verdicts = []
    for request, ids in zip(requests, outputs, strict=True):
        verdict = toy.judge_tale(request, tokenizer.decode(ids[:-1]))  # on_topic, kind
        verdict["on_topic_and_kind"] = all(verdict.values())
        verdicts.append({**verdict, "stop_rate": ids[-1] == tokenizer.end})
    shares = {name: proportion(verdict[name] for verdict in verdicts) for name in verdicts[0]}
    return [Row(metric, "sampled", share) for metric, share in shares.items()]
