"""Chats, solutions and pairs as what a task of align.py trains on: ids, with targets and labels.

A document for packing (chat.Packed) has "ids", and per id a target or label, -1 where there is
none. Pairs are not packed: they are padded, each answer in a row of its own.
"""

import torch
from torch import Tensor

from corpus.chat import Pair, render, render_prompt, show_supervised, user_turn
from corpus.tokenizer import Tokenizer


def chat_document(messages: list[dict], tokenizer: Tokenizer) -> dict:
    """Return a conversation as a document whose targets are the assistant's words."""
    ids, supervised = render(messages, tokenizer)
    targets = [token if s else -1 for token, s in zip(ids, supervised, strict=True)]
    return {"ids": ids, "targets": targets}


def describe_chats(documents: list[dict], tokenizer: Tokenizer) -> str:
    """Return which tokens of chats are supervised: a lost mask is seen here or nowhere."""
    n_ids = sum(len(document["ids"]) for document in documents)
    n_targets = sum(t >= 0 for document in documents for t in document["targets"])
    text = show_supervised(documents[0]["ids"], documents[0]["targets"], tokenizer)
    share = f"loss on responses only, {n_targets / n_ids:.0%} of tokens"
    return f"{share}. The first chat, supervised part in [[ ]]:\n  {text}"


def solution_documents(rows: list[dict], tokenizer: Tokenizer, level: str) -> list[dict]:
    """Return sampled solutions, with labels, and then the reference solutions, with targets.

    level: label every token of a sample ("token"), or its last alone ("solution"). One more id
    follows each solution, so that its last token is an input and has a score.
    """
    sampled, references = [], []
    for row in rows:
        prompt = render_prompt(user_turn(row["question"]), tokenizer)
        for solution in row["solutions"]:
            ids = [*prompt, *solution["ids"], tokenizer.eos]
            n_labels = len(solution["ids"]) if level == "token" else 1
            labels = [-1] * (len(ids) - n_labels) + [int(solution["correct"])] * n_labels
            sampled.append({"ids": ids, "targets": [-1] * len(ids), "labels": labels})
        answer = [*tokenizer.encode(row["answer"]), tokenizer.end]
        ids = [*prompt, *answer, tokenizer.eos]
        targets = [-1] * len(prompt) + answer + [-1]
        references.append({"ids": ids, "targets": targets, "labels": [-1] * len(ids)})
    return sampled + references


def describe_solutions(rows: list[dict]) -> str:
    """Return how many solutions are right, and whether there is anything to rerank at all."""
    labels = [[solution["correct"] for solution in row["solutions"]] for row in rows]
    n_right = sum(map(sum, labels))
    n = sum(map(len, labels))
    solved = sum(map(any, labels)) / len(rows)
    counts = f"{len(rows)} problems, {n} solutions, {n_right / n:.1%} right"
    text = f"{counts}; {solved:.1%} of the problems have a right one"
    if solved < 0.02 or n_right == n:
        text += ". NOTE: nothing to rerank, or nearly: all are wrong, or all are right"
    return text


def describe_pairs(pairs: list[Pair]) -> str:
    """Return how long the answers are: length may be all that tells the chosen ones apart."""
    chosen = sum(len(pair.chosen) for pair in pairs) / len(pairs)
    rejected = sum(len(pair.rejected) for pair in pairs) / len(pairs)
    longer = sum(len(pair.chosen) > len(pair.rejected) for pair in pairs) / len(pairs)
    tokens = f"the chosen answer has {chosen:.1f} tokens, the rejected {rejected:.1f}"
    return f"{len(pairs)} pairs; {tokens}, and it is the longer one in {longer:.0%}"


def pair_rows(pairs: list[Pair], width: int, pad: int) -> dict[str, Tensor]:
    """Return idx and targets (2B, width): the B chosen answers, then the rejected, padded right.

    targets are -1 on prompt and padding; lengths (2, B) are the tokens of the answers.
    """
    texts = [(pair.prompt, pair.chosen) for pair in pairs]
    texts += [(pair.prompt, pair.rejected) for pair in pairs]
    idx = torch.full((len(texts), width), pad)
    targets = torch.full_like(idx, -1)
    for row, (prompt, answer) in enumerate(texts):
        ids = torch.tensor(prompt + answer)
        end = len(ids) - 1
        idx[row, :end] = ids[:-1]
        targets[row, len(prompt) - 1 : end] = ids[len(prompt) :]
    lengths = (targets >= 0).sum(-1).view(2, -1)
    return {"idx": idx, "targets": targets, "lengths": lengths}
