"""Chats, solutions and pairs as ids: rendering, packing, and what align.py trains on.

The tokenizer has the template: the ids around the text of each role. Ids are concatenated and never
searched for in text, so no text can speak as another role.
"""

import bisect
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from configurator import UserError
from corpus.shards import shuffled_index
from corpus.tokenizer import Tokenizer


def check_template(checkpoint: dict, tokenizer: Tokenizer, ref: str) -> None:
    own = tokenizer.template.name
    if (template := checkpoint.get("template", own)) != own:
        raise UserError(f"{ref} was tuned with chat template {template}, its tokenizer has {own}")


def render(messages: list[dict], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Return ids and which are supervised: the assistant's words and the id that ends them.

    An answer with "train": false is context alone.
    """
    check_turns(messages)
    template = tokenizer.template
    ids = [] if messages[0]["role"] == "system" else list(template.start)
    supervised = [False] * len(ids)
    for message in messages:
        if message["role"] not in template.roles:
            raise UserError(f"chat template {template.name} has no {message['role']} turn")
        before, after = template.roles[message["role"]]
        text = tokenizer.encode(message["content"])
        ids += [*before, *text, *after]
        n_answer = 0
        if message["role"] == "assistant" and message.get("train", True):
            n_answer = len(text) + 1  # with the id that ends it
        n_other = len(text) + len(after) - n_answer
        supervised += [False] * len(before) + [True] * n_answer + [False] * n_other
    return ids, supervised


def check_turns(messages: list[dict]) -> None:
    """Raise UserError where the template has no meaning for the order of the roles."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = [("user", "assistant")[i % 2] for i in range(len(turns))]
    if not turns or turns != expected:
        raise UserError(
            "a conversation must be [system,] user, assistant, user, ...; this one is "
            f"{', '.join(roles) or 'empty'}: {str(messages)[:100]}"
        )


def render_prompt(messages: list[dict], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a conversation that the assistant is to continue."""
    return render(messages, tokenizer)[0] + tokenizer.template.roles["assistant"][0]


def user_turn(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


class Pair(NamedTuple):
    """A Pair holds the ids of a prompt and of a better and a worse answer to it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def longest(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def encode_pair(record: dict, tokenizer: Tokenizer) -> Pair:
    """Return the ids of a preference record. No token merges across the end of its prompt."""
    prompt = render_prompt(record["prompt"], tokenizer)
    chosen = [*tokenizer.encode(record["chosen"]), tokenizer.end]
    rejected = [*tokenizer.encode(record["rejected"]), tokenizer.end]
    return Pair(prompt, chosen, rejected)


def show_supervised(ids: list[int], targets: list[int], tokenizer: Tokenizer) -> str:
    """Return the text of some ids as a literal, with the supervised stretches in [[ ]]."""
    text = ""
    tokens = zip(ids, targets, strict=True)
    for is_supervised, group in itertools.groupby(tokens, lambda token: token[1] >= 0):
        part = tokenizer.decode([token for token, _ in group])
        text += f"[[{part}]]" if is_supervised else part
    return repr(text)


def drop_too_long(
    rows: list, length: Callable, space: int, what: str, log: Callable, needed: bool = True
) -> list:
    """Return the rows of at most space tokens; log how many are not. Raises UserError for none."""
    lengths = [length(row) for row in rows]
    kept = [row for row, n in zip(rows, lengths, strict=True) if n <= space]
    longest = max(lengths, default=0)
    too_long = f"longer than seq_len={space} tokens"
    advice = f"the longest has {longest}: train the model with --seq_len={longest} to keep it"
    if needed and not kept:
        raise UserError(f"{what}: all {len(rows)} are {too_long}; {advice}")
    if dropped := len(rows) - len(kept):
        log(f"{what}: {dropped} of {len(rows)} are {too_long} and dropped; {advice}")
    return kept


def pack(lengths: list[int], space: int) -> list[list[int]]:
    """Return groups of items whose lengths sum to at most space, by best-fit decreasing."""
    groups = []
    open_groups = []  # (free space, number of the group), sorted
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        assert length <= space, f"an item of {length} tokens does not fit {space}"
        place = bisect.bisect_left(open_groups, (length, -1))
        if place < len(open_groups):
            free, number = open_groups.pop(place)
        else:
            free, number = space, len(groups)
            groups.append([])
        groups[number].append(item)
        bisect.insort(open_groups, (free - length, number))
    return groups


def lay_out(
    rows: list[list[dict]], label_names: list[str], width: int, pad: int
) -> dict[str, Tensor]:
    """Return idx, docs (number within the row, -1 on padding) and the labels: (B, width) each.

    rows: of documents. One has "ids" and, under other names, labels: one per id, -1 where there is
    none. Of n ids the first n - 1 are inputs, and the last n - 1 labels are their targets.
    """
    shape = (len(rows), width)
    batch = {"idx": torch.full(shape, pad), "docs": torch.full(shape, -1)}
    for name in label_names:
        batch[name] = torch.full(shape, -1)
    for b, row in enumerate(rows):
        start = 0
        for place, document in enumerate(row):
            end = start + len(document["ids"]) - 1
            batch["idx"][b, start:end] = torch.as_tensor(document["ids"][:-1])
            batch["docs"][b, start:end] = place
            for name in label_names:
                batch[name][b, start:end] = torch.as_tensor(document[name][1:])
            start = end
    return batch


def tensors_of(document: dict) -> dict[str, Tensor]:
    return {name: torch.tensor(ids, dtype=torch.int32) for name, ids in document.items()}


class Packed:
    """Packed documents share rows, and attention stays inside a document."""

    def __init__(self, documents: list[dict], seq_len: int, pad: int, seed: int):
        self.documents, self.seq_len, self.pad, self.seed = documents, seq_len, pad, seed
        self.label_names = [key for key in documents[0] if key != "ids"]
        lengths = [len(document["ids"]) - 1 for document in documents]
        self.rows = pack(lengths, seq_len)  # the numbers of the documents in each row
        self.tensors = [tensors_of(document) for document in documents]  # made once: they are slow

    def batch(self, numbers: list[int]) -> dict[str, Tensor]:
        rows = [[self.tensors[i] for i in self.rows[number]] for number in numbers]
        return lay_out(rows, self.label_names, self.seq_len, self.pad)

    def shuffled(self, first: int, last: int) -> list[int]:
        """Return the numbers of rows first to last of an endless shuffled sequence."""
        draws = range(first, last)
        return [shuffled_index(draw, len(self.rows), self.seed)[1] for draw in draws]


def packed(
    documents: list[dict], seq_len: int, pad: int, seed: int, what: str, log: Callable
) -> Packed:
    """Return documents packed into rows; those longer than a row are dropped, and counted."""
    kept = drop_too_long(documents, lambda x: len(x["ids"]) - 1, seq_len, what, log)
    found = Packed(kept, seq_len, pad, seed)
    log(f"{what}: {len(kept)} in {len(found.rows)} rows of {seq_len}")
    return found


def n_replayed(n_rows: int, share: float) -> int:
    """Return how many replayed rows belong to the first n_rows of training."""
    return math.floor(n_rows * share + 1e-9)


def with_text(chats: dict[str, Tensor], rows: Tensor, is_text: Tensor) -> dict[str, Tensor]:
    """Return a batch whose rows are text, rows (texts, T + 1), where is_text (B,), else chats."""
    batch = {}
    for name, x in chats.items():
        batch[name] = x.new_zeros(len(is_text), x.size(1))  # a text is document 0 of its row
        batch[name][~is_text] = x
    batch["idx"][is_text] = rows[:, :-1]
    batch["targets"][is_text] = rows[:, 1:]
    return batch


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
    """Return idx, targets and docs (-1 on padding), chosen answers first, (2B, width) each.

    And the lengths of the answers, (2, B).
    """
    texts = [(pair.prompt, pair.chosen) for pair in pairs]
    texts += [(pair.prompt, pair.rejected) for pair in pairs]
    rows = []
    for prompt, answer in texts:
        rows.append([{"ids": prompt + answer, "targets": [-1] * len(prompt) + answer}])
    batch = lay_out(rows, ["targets"], width, pad)
    return batch | {"lengths": (batch["targets"] >= 0).sum(-1).view(2, -1)}
