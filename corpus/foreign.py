"""The tokenizer of an imported model, by the `tokenizers` library; chat templates as data.

All of it is in the spec that a checkpoint keeps: the text of tokenizer.json, the ids that have a
meaning, and the chat template. So a checkpoint alone is enough to go on from.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import tokenizers

from configurator import UserError

SPEC_FILE = "tokenizer_spec.json"  # in the run folder of an imported model
MEANINGS = ("eos", "bos", "pad", "stops", "prefix")  # ids that a spec names


class Template(NamedTuple):
    """A chat template holds the ids that stand before and after the text of each role.

    A system turn, if there is one, is the first; without it a conversation begins with start. An
    answer ends with the first id after its text.
    """

    name: str
    start: list[int]
    roles: dict[str, tuple[list[int], list[int]]]


HUMAN, ASSISTANT = "\n\nHuman:\n", "\n\nAssistant:\n"


def plain_template(encode: Callable[[str], list[int]], prefix: list[int]) -> Template:
    """Return turns of plain text as in HH-RLHF, for a model that was trained on no chats.

    Texts begin on a line of their own: most tokenizers then give the whole text the same ids.
    """
    end, *human = encode(HUMAN)
    roles = {
        "system": (prefix, [end]),
        "user": (human, []),
        "assistant": (encode(ASSISTANT), [end]),
    }
    return Template("plain text, Human: and Assistant:", [*prefix, end], roles)


def byte_of_symbol() -> dict[str, int]:
    """Return the byte that each symbol of a byte-level vocabulary stands for (GPT-2's encoder.py).

    Bytes that print stand for themselves, the others for the characters from 256 on.
    """
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printed]
    symbols = [*map(chr, printed), *(chr(256 + i) for i in range(len(hidden)))]
    return dict(zip(symbols, printed + hidden, strict=True))


class ForeignTokenizer:
    """A ForeignTokenizer has the methods of our Tokenizer. No text becomes a special token."""

    def __init__(self, spec: dict):
        try:
            self.backend = tokenizers.Tokenizer.from_str(spec["json"])
            self.kept = {key: spec[key] for key in ("name", "hash", "vocab_size", *MEANINGS)}
            self.template = Template(**spec["template"])
        except (Exception, KeyError) as error:  # the library raises Exception itself
            raise UserError(f"the imported tokenizer cannot be read: {error}") from None
        self.json, self.jinja = spec["json"], spec.get("jinja")
        self.special_tokens = spec.get("special_tokens", {})  # bos_token, ...: their texts
        self.name, self.hash = spec["name"], spec["hash"]
        self.vocab_size, self.stops = spec["vocab_size"], tuple(spec["stops"])
        self.until = tuple(spec.get("until", ()))
        self.eos, self.bos, self.pad = spec["eos"], spec["bos"], spec["pad"]
        self.prefix = list(spec["prefix"])
        self.end = self.template.roles["assistant"][1][0]
        self.backend.encode_special_tokens = True  # as the text that they are
        self.backend.no_truncation()
        self.backend.no_padding()
        is_byte_level = "ByteLevel" in repr(self.backend.decoder)
        self.symbols = byte_of_symbol() if is_byte_level else {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; half a surrogate pair becomes a replacement character."""
        whole = text.encode(errors="replace").decode()
        return self.backend.encode(whole, add_special_tokens=False).ids

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), "<u4")

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, by the library's own threads."""
        whole = [text.encode(errors="replace").decode() for text in texts]
        found = self.backend.encode_batch_fast(whole, add_special_tokens=False)
        return [np.array(item.ids, "<u4") for item in found]

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a token, which may be part of a character."""
        symbols = self.backend.id_to_token(token) or ""
        if symbols and all(symbol in self.symbols for symbol in symbols):
            return bytes(self.symbols[symbol] for symbol in symbols)
        return self.decode([token]).encode()

    def spec(self) -> dict:
        """Return all that a checkpoint keeps: the tokenizer itself."""
        own = {"json": self.json, "jinja": self.jinja, "template": self.template._asdict()}
        own["special_tokens"] = self.special_tokens
        return self.kept | own
