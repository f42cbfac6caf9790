"""A model's own Jinja chat template, read as data: the ids around the text of each role.

It is rendered on conversations whose texts are marks, and what stands between the marks is read
off. Then it must equal the template on further conversations, or it is refused: a template may do
more than stand around its texts, as one that drops what an earlier answer thought.
"""

import random
import re
from functools import partial
from types import SimpleNamespace

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from configurator import UserError
from corpus.chat import render
from corpus.foreign import Template

ROLES = ("system", "user", "assistant")
MARKS = {"system": "SYSMARK", "user": "ASKMARK{}", "assistant": "REPLYMARK{}"}
WORDS = [
    "a",
    "red",
    "sun",
    "rose",
    "Rome;",
    "12",
    "(or",
    "13?)",
    "said:",
    "'hello',",
    "then.",
    "<think>",
    "</think>",
]


class Jinja:
    """A Jinja renders conversations as transformers does with the same template."""

    def __init__(self, text: str, special: dict[str, str]):
        env = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        env.globals["raise_exception"] = self.refuse
        self.special = special  # bos_token, eos_token and the like, as text
        self.template = env.from_string(text)

    def refuse(self, message: str) -> None:
        raise jinja2.TemplateError(message)

    def __call__(self, messages: list[dict], prompt: bool = False) -> str:
        given = {"messages": messages, "add_generation_prompt": prompt} | self.special
        return self.template.render(**given)


def conversation(roles: list[str]) -> list[dict]:
    """Return a conversation whose texts are marks, numbered as they come."""
    return [
        {"role": role, "content": MARKS[role].format(place)} for place, role in enumerate(roles)
    ]


def read_template(
    text: str, special: dict[str, str], backend: tokenizers.Tokenizer, name: str
) -> Template:
    """Return a Jinja template as data. Raises UserError where it is not of this kind.

    special: the texts of bos_token, eos_token and so on. backend: must parse special tokens.
    """
    advice = "choose --template=chat-1, our own"
    try:
        jinja = Jinja(text, special)
        pieces = read_pieces(jinja)
        roles = {role: tuple(encode(x, backend) for x in own) for role, own in pieces[1].items()}
        template = Template(name, encode(pieces[0], backend), roles)
        if not roles["assistant"][1]:
            raise ValueError("it does not end an answer")
        as_data = SimpleNamespace(template=template, encode=partial(encode, backend=backend))
        for messages in dialogues("system" in roles):
            whole = jinja(messages)
            if encode(whole, backend) != render(messages, as_data)[0]:
                raise ValueError(f"it is not one of ids around texts: {whole!r}")
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise UserError(f"the chat template of {name} cannot be read ({error}): {advice}") from None
    return template


def encode(text: str, backend: tokenizers.Tokenizer) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def read_pieces(jinja: Jinja) -> tuple[str, dict[str, tuple[str, str]]]:
    """Return what stands before a first turn of the user, and around the text of each role."""
    turns = conversation(["user", "assistant", "user", "assistant"])
    head, after_user, between, _, tail = split_at_marks(jinja(turns), 4)
    _, after_question = split_at_marks(jinja(turns[:1]), 1)
    before_answer = jinja(turns[:1], prompt=True).removeprefix(jinja(turns[:1]))
    if not before_answer or after_user != after_question + before_answer:
        raise ValueError("the generation prompt is not what stands before an answer")
    if not between.startswith(tail):
        raise ValueError("an answer ends otherwise where another turn follows")
    before_question = between.removeprefix(tail)
    if not head.endswith(before_question):
        raise ValueError("the first question begins otherwise than the second")
    roles = {"user": (before_question, after_question), "assistant": (before_answer, tail)}
    start = head.removesuffix(before_question)
    try:
        before_system, after_system, _ = split_at_marks(jinja(conversation(["system", "user"])), 2)
    except (jinja2.TemplateError, ValueError):  # this template knows no system turn
        return start, roles
    if not after_system.endswith(before_question):
        raise ValueError("the question after a system turn begins otherwise")
    roles["system"] = (before_system, after_system.removesuffix(before_question))
    return start, roles


def split_at_marks(text: str, n: int) -> list[str]:
    """Return the parts of a rendered conversation around its n marks."""
    parts = re.split(r"SYSMARK|ASKMARK\d|REPLYMARK\d", text)
    if len(parts) != n + 1:
        raise ValueError("it drops or repeats texts")
    return parts


def dialogues(with_system: bool, n: int = 24) -> list[list[dict]]:
    """Return conversations of one to six turns, a third of them with a system turn."""
    rng = random.Random(0)
    found = []
    for number in range(n):
        roles = ["user", "assistant"] * 3
        roles = roles[: rng.randint(1, 6)]
        if with_system and number % 3 == 0:
            roles = ["system", *roles]
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in roles]
        found.append([{"role": r, "content": text} for r, text in zip(roles, texts, strict=True)])
    return found
