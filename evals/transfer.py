"""Data sets of other tasks: SST-2 by the likelihood of its labels, DialogSum by ROUGE."""

import random

import numpy as np

from configurator import UserError
from corpus.chat import render_prompt, user_turn
from corpus.schemas import SUMMARIES
from corpus.tokenizer import Tokenizer
from evals.base import EvalConfig, Row, Subject, task
from evals.stats import mean, proportion
from inference.answers import Ending, answer_text
from inference.sampling import GREEDY, generate
from inference.scoring import Window, next_logprobs, windows_nll
from model import GPT

ORDERS = 4  # draws of few-shot examples: they decide more than the model
SST2_PROMPT = "{}\nQuestion: Is this sentence positive or negative?\nAnswer:"  # of lm-eval
LABELS = (" negative", " positive")
SUMMARIZE = "Summarize this dialogue in one or two sentences.\n"


@task("sst2", data="sst2 shots", files="test.jsonl", settings="n_problems")
def sst2(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Measure SST-2 without examples and after four of them; calibrated as in arXiv 2102.09690."""
    model, tokenizer = subject.model(stage), subject.tokenizers[stage]
    records = subject.records("sentences", cfg.sst2)[: cfg.n_problems]
    gold = np.array([int(record["label"]) for record in records])
    sentences = [record["sentence"] for record in records] + ["N/A"]
    contexts = {"zero-shot": [""]}  # what stands before the question
    if cfg.shots:
        pool = subject.records("sentences", cfg.shots)
        contexts["4-shot"] = [four_shots(pool, seed) for seed in range(ORDERS)]
    results = []
    for name, texts in contexts.items():
        scores = [label_scores(model, tokenizer, text, sentences) for text in texts]
        if any(own is None for own in scores):
            print(f"eval sst2: {name} is left out: a prompt exceeds seq_len={model.cfg.seq_len}")
            continue
        results.append(accuracy(name, [own[:-1] for own in scores], gold))
        relative = [own[:-1] - own[-1] for own in scores]  # to the sentence "N/A"
        results.append(accuracy(f"{name} calibrated", relative, gold))
    if stage == subject.first:
        majority = proportion(gold == (gold.mean() >= 0.5))
        results.append(Row("accuracy", "zero-shot", majority, model="majority class"))
    return results


def accuracy(protocol: str, scores: list[np.ndarray], gold: np.ndarray) -> Row:
    right = [own.argmax(1) == gold for own in scores]
    estimate = proportion(right[0]) if len(right) == 1 else mean(np.mean(right, axis=0))
    draws = [float(own.mean()) for own in right]
    return Row("accuracy", protocol, estimate, extra={"draws": draws})


def four_shots(pool: list[dict], seed: int) -> str:
    """Return two sentences of each label with their answers, in a random order."""
    rng = random.Random(seed)
    chosen = []
    for label in (0, 1):
        same = [row for row in pool if int(row["label"]) == label]
        if len(same) < 2:
            raise UserError(f"shots: {len(same)} sentences have the label {label}, expected two")
        chosen += rng.sample(same, 2)
    rng.shuffle(chosen)
    shots = ""
    for row in chosen:
        shots += SST2_PROMPT.format(row["sentence"].strip()) + LABELS[int(row["label"])] + "\n\n"
    return shots


def label_scores(
    model: GPT, tokenizer: Tokenizer, before: str, sentences: list[str]
) -> np.ndarray | None:
    """Return log-probs of the labels after each sentence (n, 2); None where one does not fit."""
    windows = []
    for sentence in sentences:
        text = before + SST2_PROMPT.format(sentence.strip())
        prompt = tokenizer.encode(text)
        for label in LABELS:  # its ids are those that follow the prompt's, as in the harness
            ids = [*tokenizer.prefix, *tokenizer.encode(text + label)]
            windows.append(Window(ids, len(ids) - len(tokenizer.prefix) - len(prompt)))
    if max(len(window.ids) for window in windows) > model.cfg.seq_len:
        return None
    labels = [ids[-1] for ids, _ in windows[:2]]
    prompts = [ids[:-1] for ids, _ in windows[::2]]
    single = [Window([*ids, label], 1) for ids in prompts for label in labels]
    if windows == single:  # one pass per sentence is enough
        return next_logprobs(model, prompts, labels)
    return -np.array(windows_nll(model, windows)).reshape(-1, 2)


@task("dialogsum", data="dialogues", files="test.jsonl", settings="n_problems max_new_tokens")
def dialogsum(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Measure greedy summaries by ROUGE-1, 2 and L; a dialogue too long loses its beginning."""
    model, tokenizer = subject.model(stage), subject.tokenizers[stage]
    records = subject.records("dialogues", cfg.dialogues)[: cfg.n_problems]
    T = model.cfg.seq_len
    frame = len(render_prompt(user_turn(SUMMARIZE), tokenizer))
    room = T - cfg.max_new_tokens - frame
    if room < 32:
        short = f"seq_len={T} leaves {room} tokens for a dialogue"
        raise UserError(f"{short}: lower --max_new_tokens={cfg.max_new_tokens}")
    dialogues = [tokenizer.encode(record["dialogue"]) for record in records]
    requests = [SUMMARIZE + tokenizer.decode(ids[-room:]) for ids in dialogues]
    prompts = [render_prompt(user_turn(text), tokenizer)[-T:] for text in requests]
    outputs = generate(model, prompts, cfg.max_new_tokens, Ending(tokenizer), sampling=GREEDY)
    summaries = {stage: [answer_text(ids, tokenizer) for ids in outputs]}
    if stage == subject.first:
        turns = [record["dialogue"].replace("\r", "").split("\n") for record in records]
        summaries["first three turns"] = [" ".join(part[:3]) for part in turns]
        summaries["longest turn"] = [max(part, key=len) for part in turns]
    n_cut = sum(len(ids) > room for ids in dialogues)
    extra = {"budget_tokens": room, "share_cut": n_cut / len(records)}
    references = [[record[key] for key in SUMMARIES if record.get(key)] for record in records]
    results = []
    for name, texts in summaries.items():
        for metric, values in rouge(texts, references).items():
            results.append(Row(metric, "greedy", mean(values), model=name, extra=extra))
    return results


def rouge(texts: list[str], references: list[list[str]]) -> dict[str, list[float]]:
    """Return the F-measures of each text (stemmed, rouge_score), the mean over its references."""
    from rouge_score.rouge_scorer import RougeScorer

    metrics = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(metrics, use_stemmer=True)
    found = {metric: [] for metric in metrics}
    for text, own in zip(texts, references, strict=True):
        scores = [scorer.score(reference, text) for reference in own]
        for metric, values in found.items():
            values.append(float(np.mean([score[metric].fmeasure for score in scores])))
    return found
