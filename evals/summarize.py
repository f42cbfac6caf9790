"""Summaries of dialogues (DialogSum, SAMSum), by ROUGE."""

import numpy as np

from configurator import UserError
from corpus.chat import render_prompt, user_turn
from evals.base import EvalConfig, Row, Subject, read_test_set, task
from evals.stats import mean
from inference.answers import answer_text, stops
from inference.sampling import GREEDY, generate

SUMMARIZE = "Summarize this dialogue in one or two sentences.\n"
REFERENCES = ("summary", "summary1", "summary2", "summary3")  # fields of a record


@task("dialogsum", data="dialogues", files="test.jsonl", settings="n_problems max_new_tokens")
def dialogsum(subject: Subject, stage: str, cfg: EvalConfig) -> list[Row]:
    """Measure greedy summaries by ROUGE-1, 2 and L; a dialogue too long loses its beginning."""
    model, tokenizer = subject.model(stage), subject.tokenizer
    records = read_test_set(cfg, cfg.dialogues)[: cfg.n_problems]
    T = model.cfg.seq_len
    frame = len(render_prompt(user_turn(SUMMARIZE), tokenizer))
    room = T - cfg.max_new_tokens - frame
    if room < 32:
        short = f"seq_len={T} leaves {room} tokens for a dialogue"
        raise UserError(f"{short}: lower --max_new_tokens={cfg.max_new_tokens}")
    dialogues = [tokenizer.encode(record["dialogue"]) for record in records]
    requests = [SUMMARIZE + tokenizer.decode(ids[-room:]) for ids in dialogues]
    prompts = [render_prompt(user_turn(text), tokenizer)[-T:] for text in requests]
    outputs = generate(model, prompts, cfg.max_new_tokens, stops(tokenizer), sampling=GREEDY)
    summaries = {stage: [answer_text(ids, tokenizer) for ids in outputs]}
    if stage == "untrained":
        turns = [record["dialogue"].replace("\r", "").split("\n") for record in records]
        summaries["first three turns"] = [" ".join(part[:3]) for part in turns]
        summaries["longest turn"] = [max(part, key=len) for part in turns]
    n_cut = sum(len(ids) > room for ids in dialogues)
    extra = {"budget_tokens": room, "share_cut": n_cut / len(records)}
    references = [[record[key] for key in REFERENCES if record.get(key)] for record in records]
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
