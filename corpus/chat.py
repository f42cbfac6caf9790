"""Chats as ids: the template, preference pairs, and several documents in one row (packing).

The template is <|user|>...<|end|><|assistant|>...<|end|> with an optional <|system|>...<|end|>
before. Ids are concatenated and never searched for in text, so no text can speak as another role.
"""

import bisect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from configurator import UserError
from corpus.shards import shuffled_index
from corpus.tokenizer import Tokenizer

TEMPLATE = "chat-1"


def render(messages: list[dict], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation and, for each id, whether it is supervised.

    Supervised are the assistant's words and the <|end|> after them. Raises UserError where the
    turns are not [system,] user, assistant, user, assistant, ...
    """
    check_turns(messages)
    ids, supervised = [], []
    for message in messages:
        text = tokenizer.encode(message["content"])
        is_answer = message["role"] == "assistant"
        ids += [getattr(tokenizer, message["role"]), *text, tokenizer.end]
        supervised += [False, *[is_answer] * len(text), is_answer]
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
    return render(messages, tokenizer)[0] + [tokenizer.assistant]


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
    text, inside = "", False
    for token, target in zip(ids, targets, strict=True):
        if (target >= 0) != inside:
            text += "]]" if inside else "[["
            inside = not inside
        text += tokenizer.decode([token])
    return repr(text + "]]" * inside)


def drop_too_long(
    rows: list, length: Callable[[object], int], space: int, what: str, log: Callable[[str], None]
) -> list:
    """Return the rows of at most space tokens; log how many are not. Raises UserError for none."""
    kept = [row for row in rows if length(row) <= space]
    dropped = len(rows) - len(kept)
    too_long = f"longer than seq_len={space} tokens"
    if dropped:
        log(f"{what}: {dropped} of {len(rows)} are {too_long} and dropped")
    if not kept:
        raise UserError(f"{what}: all {len(rows)} are {too_long}: take a larger --seq_len")
    return kept


def pack(lengths: list[int], space: int) -> list[list[int]]:
    """Return groups of items whose lengths sum to at most space, by best-fit decreasing.

    The longest come first, each into the fullest group that still has room for it.
    """
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


class Packed:
    """Packed documents share rows, and attention stays inside a document.

    A document has "ids" and, under other keys, labels: one per id, -1 where there is none. Of n ids
    the first n - 1 are inputs, and the last n - 1 labels are their targets.
    """

    def __init__(self, documents: list[dict], seq_len: int, pad: int, seed: int):
        self.documents, self.seq_len, self.pad, self.seed = documents, seq_len, pad, seed
        self.label_names = [key for key in documents[0] if key != "ids"]
        lengths = [len(document["ids"]) - 1 for document in documents]
        self.rows = pack(lengths, seq_len)  # the numbers of the documents in each row

    def batch(self, numbers: list[int]) -> dict[str, Tensor]:
        """Return rows as tensors (B, T): idx, docs and every kind of label.

        docs is the number of the document within its row. Padding has docs -1 and labels -1.
        """
        shape = (len(numbers), self.seq_len)
        batch = {"idx": torch.full(shape, self.pad), "docs": torch.full(shape, -1)}
        for name in self.label_names:
            batch[name] = torch.full(shape, -1)
        for b, number in enumerate(numbers):
            start = 0
            for place, i in enumerate(self.rows[number]):
                document = self.documents[i]
                ids = torch.tensor(document["ids"])
                end = start + len(ids) - 1
                batch["idx"][b, start:end] = ids[:-1]
                batch["docs"][b, start:end] = place
                for name in self.label_names:
                    batch[name][b, start:end] = torch.tensor(document[name][1:])
                start = end
        return batch

    def shuffled(self, first: int, last: int) -> list[int]:
        """Return the numbers of rows first to last of an endless shuffled sequence."""
        draws = range(first, last)
        return [shuffled_index(draw, len(self.rows), self.seed)[1] for draw in draws]
