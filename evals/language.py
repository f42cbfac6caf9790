"""Language: loss on shards, perplexity of texts, and answers in held-out conversations."""

import math
import os
from collections import Counter
from dataclasses import replace

from configurator import UserError
from corpus.chat import drop_too_long, render_prompt
from corpus.records import load_records
from corpus.shards import Mixture, read_shard
from evals.base import PROTOCOLS, EvalConfig, Row, Subject, data_files, own_policies, task
from evals.perplexity import detokenize, overlap, perplexity
from evals.stats import Estimate, mean, proportion, ratio
from inference.answers import answer_stats
from inference.scoring import Window, windows_nll
from runtime.files import open_text


@task("val_loss", data="data", files="val", stages=own_policies)
def val_loss(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Measure nats per token on the validation shards."""
    model = subject.model(stage)
    T = model.cfg.seq_len
    headerless = subject.pretraining(stage).get("headerless", False)
    rows = Mixture(cfg.data, cfg.data_dir, "val", T, 0, subject.tokenizers[stage], headerless)
    ids = rows.validation(0, min(rows.n_rows, 512)).tolist()
    nll = windows_nll(model, [Window(row, T) for row in ids])
    results = [Row("val_loss", "windows", ratio(nll, [T] * len(nll)), "val")]
    if stage == subject.first:
        entropy = unigram_entropy([token for row in ids for token in row[1:]])
        results.append(Row("val_loss", "windows", entropy, "val", "unigram entropy"))
    return results


def unigram_entropy(ids: list[int]) -> Estimate:
    """Return nats per id of the best model that knows the frequencies and no context."""
    n = len(ids)
    return Estimate(-sum(c / n * math.log(c / n) for c in Counter(ids).values()), n)


@task("text_perplexity", data="text", files="test.txt", settings="protocols")
def text_perplexity(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Measure every protocol on every text, and how much of it stood in the pretraining shards."""
    protocols = cfg.protocols or PROTOCOLS
    results = []
    for name in cfg.text.split(","):
        with open_text(os.path.join(cfg.data_dir, name, "test.txt")) as f:
            text = f.read()
        ours = stage in subject.policies  # a baseline's training data are not known
        marked, plain = overlaps(subject, stage, text, cfg) if ours else (None, None)
        for row in perplexity(subject.model(stage), subject.tokenizers[stage], text, protocols):
            seen = plain if row.protocol in ("words", "bpb") else marked
            results.append(replace(row, split=name, extra={"overlap": seen}))
        if stage == subject.first and "tokens" in protocols:
            entropy = unigram_entropy(subject.tokenizers[stage].encode(text))
            estimate = replace(entropy, value=math.exp(entropy.value))
            results.append(Row("perplexity", "tokens", estimate, name, "unigrams of the text"))
    return results


def overlaps(
    subject: Subject, stage: str, text: str, cfg: EvalConfig
) -> tuple[float | None, float | None]:
    """Return the overlap of a text with the pretraining shards (or None), marked and plain."""
    tokenizer, settings = subject.tokenizers[stage], subject.pretraining(stage)
    mixture, headerless = settings.get("data") or cfg.data, settings.get("headerless", False)
    key = (tokenizer.hash, mixture, text)
    if key not in subject.overlaps:
        paths = data_files([mixture], ["train"], cfg.data_dir)
        shards = [read_shard(path, tokenizer, headerless) for path in paths]
        ids = [tokenizer.encode_array(form) for form in (text, detokenize(text))]
        subject.overlaps[key] = [overlap(x, shards) if shards else None for x in ids]
    return subject.overlaps[key]


@task("chats", data="chats", files="sft_val.jsonl", settings="n_chats max_new_tokens")
def chats(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Measure the loss of the last answers of held-out conversations, and the model's own."""
    model, tokenizer = subject.model(stage), subject.tokenizers[stage]
    prompts, windows = [], []
    for record in load_records(cfg.chats, cfg.data_dir, "sft", "val", "chats"):
        *before, last = record["messages"]
        prompt = render_prompt(before, tokenizer)
        answer = [*tokenizer.encode(last["content"]), tokenizer.end]
        prompts.append(prompt)
        windows.append(Window(prompt + answer, len(answer)))
    what = f"eval: conversations of {cfg.chats}"
    every, space = windows, model.cfg.seq_len
    windows = drop_too_long(every, lambda w: len(w.ids), space, what, subject.log_once)
    subject.note_kept(every, windows)
    windows = windows[:512]
    loss = ratio(windows_nll(model, windows), [window.n_scored for window in windows])
    room = space - (cfg.max_new_tokens if stage in subject.baselines else 1)  # they do not roll
    prompts = [prompt for prompt in prompts if len(prompt) <= room][: cfg.n_chats]
    if not prompts:
        raise UserError(f"{what} leave no room for max_new_tokens={cfg.max_new_tokens}")
    own = answer_stats(model, tokenizer, prompts, cfg.max_new_tokens)
    results = [Row("response_loss", "teacher", loss, "val")]
    results.append(Row("stop_rate", "greedy", proportion(own["stop_rate"]), "val"))
    means = ("length", "repetition", "distinct_2")
    return results + [Row(metric, "greedy", mean(own[metric]), "val") for metric in means]
