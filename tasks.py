"""The tasks of an evaluation. Each is a function of the bench (eval.Bench: models, tokenizer, settings) and a stage's name that returns rows:
{metric, protocol, value, low, high, n, items}, where a trivial answer or another model's name may stand under "model"."""

import math
import os
import random
import re
from collections import Counter

import numpy as np

import data
import toy
from configurator import UserError
from model import GPT
from perplexity import PROTOCOLS, perplexity, windows_nll
from problems import (
    CHOSEN_BY,
    RERANKERS,
    auc_interval,
    both_kinds,
    calibration,
    choose,
    discrimination,
    final_answer,
    likelihoods,
    score_solutions,
    taxonomy,
    with_prompts,
)
from sample import generate
from stats import mean, proportion, ratio

# ---------------------------------------------------------------------------------------------------------------------
# Language: shards, texts, conversations


def val_loss(bench, stage: str) -> list[dict]:
    """Nats per token on the validation shards; beside it, for the untrained row, the unigram entropy of the same tokens."""
    model = bench.model(stage)
    rows = data.Mixture(
        bench.cfg.data,
        bench.cfg.data_dir,
        "val",
        model.cfg.seq_len,
        0,
        bench.tokenizer,
        bench.headerless,
    )
    ids = rows.validation(0, min(rows.n_rows, 512)).tolist()
    nll, T = windows_nll(model, [(row, len(row) - 1) for row in ids]), model.cfg.seq_len
    results = [
        {"metric": "val_loss", "protocol": "windows", "split": "val", **ratio(nll, [T] * len(nll))}
    ]
    if stage == "untrained":
        entropy, n = unigram_entropy([token for row in ids for token in row[1:]])
        results.append(
            {
                "model": "unigram entropy",
                "metric": "val_loss",
                "protocol": "windows",
                "split": "val",
                "value": entropy,
                "n": n,
            }
        )
    return results


def unigram_entropy(ids: list[int]) -> tuple[float, int]:
    """nats per id of the best model that knows the frequencies and no context, and the number of ids."""
    return -sum(c / len(ids) * math.log(c / len(ids)) for c in Counter(ids).values()), len(ids)


def text_perplexity(bench, stage: str) -> list[dict]:
    """Every protocol on every text; beside each number, how much of the text stood in the pretraining shards."""
    results, protocols = [], bench.cfg.protocols or PROTOCOLS
    for name in bench.cfg.text.split(","):
        with data.open_text(os.path.join(bench.cfg.data_dir, name, "test.txt")) as f:
            text = f.read()
        overlaps = (
            bench.overlaps(text) if stage in bench.policies else [None, None]
        )  # what a baseline was trained on is not known here
        for row in perplexity(
            bench.model(stage), bench.tokenizers.get(stage, bench.tokenizer), text, protocols
        ):
            results.append(
                {**row, "split": name, "overlap": overlaps[row["protocol"] in ("words", "bpb")]}
            )
        if stage == "untrained" and "tokens" in protocols:
            entropy, n = unigram_entropy(bench.tokenizer.encode(text))
            results.append(
                {
                    "model": "unigrams of the text",
                    "metric": "perplexity",
                    "protocol": "tokens",
                    "split": name,
                    "value": math.exp(entropy),
                    "n": n,
                }
            )
    return results


def chats(bench, stage: str) -> list[dict]:
    """Held-out conversations: nats per token of their last answers, and the habits of the model's own answers in their place."""
    model, tokenizer = bench.model(stage), bench.tokenizer
    records = [
        r["messages"] for r in data.load_records(bench.cfg.chats, bench.cfg.data_dir, "sft", "val")
    ]
    prompts = [data.render_prompt(messages[:-1], tokenizer) for messages in records]
    windows = [
        (prompt + answer, len(answer))
        for prompt, answer in zip(
            prompts, (tokenizer.encode(m[-1]["content"]) + [tokenizer.end] for m in records)
        )
    ]
    windows = bench.fitting(
        windows, lambda window: len(window[0]), f"conversations of {bench.cfg.chats}"
    )[:512]
    prompts = [prompt for prompt in prompts if len(prompt) < model.cfg.seq_len][: bench.cfg.n_chats]
    own = habits(model, tokenizer, prompts, bench.cfg.max_new_tokens)
    return [
        {"metric": metric, "split": "val", **number}
        for metric, number in (
            (
                "response_loss",
                {
                    "protocol": "teacher",
                    **ratio(windows_nll(model, windows), [n for _, n in windows]),
                },
            ),
            ("stop_rate", {"protocol": "greedy", **proportion(own["stop_rate"])}),
            *(
                (metric, {"protocol": "greedy", **mean(own[metric])})
                for metric in ("length", "repetition", "distinct_2")
            ),
        )
    ]


def habits(
    model: GPT, tokenizer, prompts: list[list[int]], max_new_tokens: int
) -> dict[str, list[float]]:
    """How the model answers, greedily: whether each answer stops by itself, its tokens, the share of repeated 4-grams in it, and of its
    2-grams the share that no other answer has: 0 where a model says the same to everyone (distinct-2, arXiv 1510.03055, across answers)."""
    stop = (tokenizer.end, tokenizer.eos)
    answers = generate(model, prompts, max_new_tokens, stop, temperature=0)
    grams = [set(zip(ids, ids[1:])) for ids in answers]
    answers_with = Counter(gram for own in grams for gram in own)
    return {
        "stop_rate": [ids[-1] in stop for ids in answers],
        "length": [len(ids) for ids in answers],
        "repetition": [repetition(ids) for ids in answers],
        "distinct_2": [
            sum(answers_with[gram] == 1 for gram in own) / max(1, len(own)) for own in grams
        ],
    }


def repetition(ids: list[int], n: int = 4) -> float:
    """Share of the n-grams that stood in the same text before."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Word problems and the verifier


def greedy(bench, stage: str) -> list[dict]:
    """One greedy answer to every problem: right (strictly: after ####; flexibly: its last number), without an answer, stopped; and what went
    wrong, with examples. The untrained row has the trivial answer beside it."""
    rows = bench.solutions(stage, 1, 0.0)
    flags, examples = taxonomy(rows)
    results = [
        {
            "metric": metric,
            "protocol": "greedy",
            **proportion(values),
            "examples": examples.get(metric, []),
        }
        for metric, values in flags.items()
    ]
    if stage == "untrained":
        answers = [final_answer(row["answer"]) for row in rows]
        common = Counter(answers).most_common(1)[0][0]
        results.append(
            {
                "model": f"always {common}",
                "metric": "exact_match",
                "protocol": "greedy",
                **proportion(answer == common for answer in answers),
            }
        )
    return results


def rerank(bench, stage: str) -> list[dict]:
    """Ways to choose among the first k of the same n_samples solutions, for k = 1, 2, 4, ...; AUC and calibration of the scores."""
    rows = bench.solutions(stage, bench.cfg.n_samples, bench.cfg.temperature)
    score_solutions(bench.model("verifier"), bench.tokenizer, rows)
    likelihoods(bench.model(stage), bench.tokenizer, rows)
    results = [*discrimination(bench.model("verifier"), bench.tokenizer, rows), *calibration(rows)]
    k = 1
    while k <= bench.cfg.n_samples:
        for how in RERANKERS:
            results.append(
                {
                    "metric": "exact_match",
                    "protocol": f"{how}@{k}",
                    **proportion(choose(row["solutions"][:k], how) for row in rows),
                }
            )
        k *= 2
    return results


def published(bench, stage: str) -> list[dict]:
    """GSM8K's published solutions of its test problems by four larger models, judged, never trained on: each source's accuracy, the best of
    the four by likelihood and by verifier, and the AUC over all of them and within each source (sources differ in style and in accuracy)."""
    tokenizer, verifier = bench.tokenizer, bench.model("verifier")
    rows = []
    for record in data.read_jsonl(
        os.path.join(bench.cfg.data_dir, bench.cfg.published, "test.jsonl")
    )[: bench.cfg.n_problems]:
        texts = {
            source: re.sub(r"\nA: (.*)$", r"\n#### \1", value["solution"])
            for source, value in record.items()
            if isinstance(value, dict)
        }
        rows.append(
            {
                "question": record["question"],
                "solutions": [
                    {
                        "source": source,
                        "text": text,
                        "ids": tokenizer.encode(text) + [tokenizer.end],
                        "stopped": True,
                        "correct": record[source]["is_correct"],
                    }
                    for source, text in texts.items()
                ],
            }
        )
    longest = lambda row: max(len(ids) for ids, _ in with_prompts([row], tokenizer))
    kept = bench.fitting(rows, longest, f"problems of {bench.cfg.published}, with their solutions,")
    score_solutions(verifier, tokenizer, kept)
    likelihoods(bench.model(stage), tokenizer, kept)
    of_source = {
        source["source"]: [
            {**row, "solutions": [s for s in row["solutions"] if s["source"] == source["source"]]}
            for row in kept
        ]
        for source in kept[0]["solutions"]
    }
    results = [
        {
            "metric": "exact_match",
            "protocol": how,
            **proportion(choose(row["solutions"], how) for row in kept),
        }
        for how in (*CHOSEN_BY, "oracle")
    ]
    for source, part in of_source.items():
        results.append(
            {
                "metric": "exact_match",
                "protocol": source,
                **proportion(choose(row["solutions"], "oracle") for row in part),
            }
        )
        results += [
            {"metric": "auc", "protocol": f"{how} of {source}", **auc_interval(part, key)}
            for how, key in CHOSEN_BY.items()
            if both_kinds(part)
        ]
    return [*discrimination(verifier, tokenizer, kept), *calibration(kept), *results]


# ---------------------------------------------------------------------------------------------------------------------
# Preferences


def pair_ids(record: dict, tokenizer) -> tuple[list[int], list[int], list[int]]:
    """ids of prompt, chosen and rejected answer; the answers end with <|end|>. One prompt, so the two cannot differ in it."""
    return (
        data.render_prompt(record["prompt"], tokenizer),
        *(tokenizer.encode(record[key]) + [tokenizer.end] for key in ("chosen", "rejected")),
    )


def pair_logprobs(model: GPT, pairs: list) -> np.ndarray:
    """Summed log-probs (n, 2) of chosen and rejected answers."""
    windows = [(prompt + answer, len(answer)) for prompt, *answers in pairs for answer in answers]
    return -np.array(windows_nll(model, windows, batch=64)).reshape(-1, 2)


def preference(bench, stage: str) -> list[dict]:
    """Share of pairs whose chosen answer has the higher log-prob (sum; mean per token), or, for DPO, the higher reward."""
    split, pairs = bench.pairs()
    logp, lengths = (
        pair_logprobs(bench.model(stage), pairs),
        np.array([[len(p[1]), len(p[2])] for p in pairs]),
    )
    results = [
        {"metric": "accuracy", "protocol": protocol, **proportion(values[:, 0] > values[:, 1])}
        for protocol, values in (("logprob", logp), ("logprob_per_token", logp / lengths))
    ]
    if stage == "dpo" and "sft" in bench.checkpoints:
        reward = logp - pair_logprobs(bench.model("sft"), pairs)
        results.append(
            {"metric": "accuracy", "protocol": "reward", **proportion(reward[:, 0] > reward[:, 1])}
        )
    if stage == "untrained":
        hits = np.where(lengths[:, 0] == lengths[:, 1], 0.5, lengths[:, 0] > lengths[:, 1])
        results.append(
            {
                "model": "longer answer wins",
                "metric": "accuracy",
                "protocol": "length",
                **proportion(hits),
            }
        )
    return [{**result, "split": split} for result in results]


def tales(bench, stage: str) -> list[dict]:
    """Toy world: greedy-free check of what the pairs teach, on tales told for held-out casts at temperature 1."""
    prompts = sorted(
        {
            record["prompt"][0]["content"]
            for record in data.load_records(bench.cfg.pairs, bench.cfg.data_dir, "dpo", "test")
        }
    )
    tokenizer, asked = bench.tokenizer, [prompt for prompt in prompts for _ in range(4)]
    outputs = generate(
        bench.model(stage),
        [data.render_prompt(data.user(p), tokenizer) for p in asked],
        128,
        (tokenizer.end, tokenizer.eos),
        [(bench.cfg.seed, number) for number in range(len(asked))],
    )
    verdicts = [toy.judge_tale(p, tokenizer.decode(ids[:-1])) for p, ids in zip(asked, outputs)]
    flags = {
        "on_topic": [v["on_topic"] for v in verdicts],
        "kind": [v["kind"] for v in verdicts],
        "on_topic_and_kind": [v["on_topic"] and v["kind"] for v in verdicts],
        "stop_rate": [ids[-1] == tokenizer.end for ids in outputs],
    }
    return [
        {"metric": metric, "protocol": "sampled", **proportion(values)}
        for metric, values in flags.items()
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Classification and summaries

ORDERS = 4  # draws of few-shot examples
SST2_PROMPT = "{}\nQuestion: Is this sentence positive or negative?\nAnswer:"
LABELS = (" negative", " positive")
SUMMARIZE = "Summarize this dialogue in one or two sentences.\n"


def sst2(bench, stage: str) -> list[dict]:
    """SST-2 by the likelihood of " positive" and " negative" after lm-evaluation-harness's prompt: without examples and after four of the training
    set, the mean over ORDERS draws of them (which four and in which order decides more than the model, arXiv 2102.09690). calibrated: relative
    to the likelihoods after the sentence "N/A" (same paper)."""
    cfg, model, tokenizer = bench.cfg, bench.model(stage), bench.tokenizer
    rows = data.read_jsonl(os.path.join(cfg.data_dir, cfg.sst2, "test.jsonl"))[: cfg.n_problems]
    gold = np.array([int(row["label"]) for row in rows])
    contexts = {"zero-shot": [""]}
    if cfg.shots:
        pool = data.read_jsonl(os.path.join(cfg.data_dir, cfg.shots, "test.jsonl"))
        contexts["4-shot"] = [four_shots(pool, seed) for seed in range(ORDERS)]
    results = []
    for name, texts in contexts.items():
        scores = [
            label_scores(model, tokenizer, text, [row["sentence"] for row in rows] + ["N/A"])
            for text in texts
        ]
        if None in scores:
            print(
                f"eval sst2: {name} prompts are longer than seq_len={model.cfg.seq_len} and left out"
            )
            continue
        for protocol, bias in ((name, 0.0), (f"{name} calibrated", 1.0)):
            right = [(s[:-1] - bias * s[-1]).argmax(1) == gold for s in map(np.array, scores)]
            results.append(
                {
                    "metric": "accuracy",
                    "protocol": protocol,
                    **(proportion(right[0]) if len(right) == 1 else mean(np.mean(right, axis=0))),
                    "draws": [float(r.mean()) for r in right],
                }
            )
    if stage == "untrained":
        results.append(
            {
                "model": "majority class",
                "metric": "accuracy",
                "protocol": "zero-shot",
                **proportion(gold == (gold.mean() >= 0.5)),
            }
        )
    return results


def four_shots(pool: list[dict], seed: int) -> str:
    """Two sentences of each label, in a random order."""
    rng = random.Random(seed)
    chosen = [
        row
        for label in (0, 1)
        for row in rng.sample([row for row in pool if int(row["label"]) == label], 2)
    ]
    rng.shuffle(chosen)
    return "".join(
        f"{SST2_PROMPT.format(row['sentence'].strip())}{LABELS[int(row['label'])]}\n\n"
        for row in chosen
    )


def label_scores(
    model: GPT, tokenizer, before: str, sentences: list[str]
) -> list[list[float]] | None:
    """Log-probs of the two labels after each sentence; None where one does not fit the context."""
    prompts = [
        [tokenizer.eos, *tokenizer.encode(before + SST2_PROMPT.format(sentence.strip()))]
        for sentence in sentences
    ]
    labels = [tokenizer.encode(label) for label in LABELS]
    windows = [(prompt + label, len(label)) for prompt in prompts for label in labels]
    if max(len(ids) for ids, _ in windows) > model.cfg.seq_len:
        return None
    return (-np.array(windows_nll(model, windows, 64)).reshape(-1, 2)).tolist()


def dialogsum(bench, stage: str) -> list[dict]:
    """Summaries of dialogues, greedily: ROUGE-1, 2 and L (F-measure, stemmed, by the rouge_score library), the mean over a dialogue's references.
    Dialogues lose their beginning where they do not fit beside max_new_tokens. Beside the untrained row: the first three turns, the longest turn."""
    cfg, model, tokenizer = bench.cfg, bench.model(stage), bench.tokenizer
    rows = data.read_jsonl(os.path.join(cfg.data_dir, cfg.dialogues, "test.jsonl"))[
        : cfg.n_problems
    ]
    references = [
        [row[key] for key in ("summary", "summary1", "summary2", "summary3") if row.get(key)]
        for row in rows
    ]
    room = (
        model.cfg.seq_len
        - cfg.max_new_tokens
        - len(data.render_prompt(data.user(SUMMARIZE), tokenizer))
    )
    if room < 32:
        raise UserError(
            f"seq_len={model.cfg.seq_len} leaves {room} tokens for a dialogue beside {cfg.max_new_tokens} new ones: lower --max_new_tokens"
        )
    dialogues = [tokenizer.encode(row["dialogue"]) for row in rows]
    prompts = [
        data.render_prompt(data.user(SUMMARIZE + tokenizer.decode(ids[-room:])), tokenizer)[
            -model.cfg.seq_len :
        ]
        for ids in dialogues
    ]
    stop = (tokenizer.end, tokenizer.eos)
    outputs = generate(model, prompts, cfg.max_new_tokens, stop, temperature=0)
    said = {stage: [tokenizer.decode(ids[:-1] if ids[-1] in stop else ids) for ids in outputs]}
    if stage == "untrained":
        turns = [row["dialogue"].replace("\r", "").split("\n") for row in rows]
        said |= {
            "first three turns": [" ".join(part[:3]) for part in turns],
            "longest turn": [max(part, key=len) for part in turns],
        }
    cut = sum(len(ids) > room for ids in dialogues) / len(rows)
    return [
        {
            "model": name,
            "metric": metric,
            "protocol": "greedy",
            **mean(values),
            "budget_tokens": room,
            "share_cut": cut,
        }
        for name, texts in said.items()
        for metric, values in rouge(texts, references).items()
    ]


def rouge(texts: list[str], references: list[list[str]]) -> dict[str, list[float]]:
    """ROUGE F-measures of each text, the mean over its references."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [
        [scorer.score(reference, text) for reference in own] for text, own in zip(texts, references)
    ]
    return {
        name: [float(np.mean([score[name].fmeasure for score in own])) for own in scores]
        for name in names
    }
