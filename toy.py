"""The toy world: tiny stories, two-step word problems in GSM8K's form, instructions and preference pairs, made from a seed.

It is small enough to learn in minutes on two CPU cores and leaves every stage something to do:
    pretraining   stories and one-step sums                   -> the language and the arithmetic of the world
    SFT           chat records: problems solved in steps, and tales told by a careless crowd (half rude, a third off topic)
    DPO           pairs: a kind tale on the topic against a rude or an off-topic one; length says nothing
    verifier      problems of which the model's own solutions are judged
Splits are cut by content, not by record: the numbers of a problem (or the cast of a tale) belong to one split alone, so a
held-out problem is never a training problem with another name in it.
"""

import functools
import hashlib
import random
import re
from itertools import count

NAMES = "Tom Mia Ben Ana Sam Kim Max Zoe Leo Eva".split()
ANIMALS = "cat dog fox frog hen bear duck goat".split()
THINGS = "pen cup hat ball shell card coin book".split()
PLACES = "park barn lake shop pond hill".split()
COLORS = "red blue green tiny new big".split()
KIND = [
    "{A} said thank you and smiled.",
    "{A} was glad and shared it.",
    "It was a good day for all.",
    "{A} gave {B} a hug.",
]
RUDE = [
    "{A} was mad and kicked it.",
    "{A} yelled at {B} and ran off.",
    "It was a bad day for all.",
    "{A} did not share it.",
]

# Tenths of the key space that belong to each split
SPLITS = {"train": range(0, 6), "verifier": range(6, 8), "val": range(8, 9), "test": range(9, 10)}


def in_split(key: str, split: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] % 10 in SPLITS[split]


# ---------------------------------------------------------------------------------------------------------------------
# One record of each kind, with the key that decides its split


def step(left: int, op: str, right: int) -> tuple[str, int]:
    """GSM8K's calculator notation: 3+4=<<3+4=7>>7, and the value."""
    value = {"+": left + right, "-": left - right, "*": left * right}[op]
    return f"{left}{op}{right}=<<{left}{op}{right}={value}>>{value}", value


def problem(rng: random.Random) -> tuple[str, dict]:
    A, B = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS) + "s"
    kind = rng.randrange(4)
    if kind == 0:
        a, b = rng.randint(3, 30), rng.randint(2, 9)
        c = rng.randint(2, min(9, a + b - 1))
        question = (
            f"{A} has {a} {thing}, gets {b} more and loses {c}. How many {thing} does {A} have now?"
        )
        steps = [("+", a, b), ("-", None, c)]
    elif kind == 1:
        a, b, c = rng.randint(2, 9), rng.randint(2, 30), 0
        question = (
            f"{A} has {a} {thing} and {B} has {b} more than {A}. How many do they have in all?"
        )
        steps = [("+", b, a), ("+", None, a)]
    elif kind == 2:
        a, b = rng.randint(2, 9), rng.randint(2, 6)
        c = rng.randint(1, min(9, a * b - 1))
        question = (
            f"{A} has {a} bags of {b} {thing} and gives {c} of them to {B}. How many are left?"
        )
        steps = [("*", a, b), ("-", None, c)]
    else:
        a = rng.randint(10, 30)
        b, c = rng.randint(2, 9), rng.randint(2, 9)
        question = (
            f"{A} had {a} {thing}, lost {b} and got {c} from {B}. How many {thing} does {A} have?"
        )
        steps = [("-", a, b), ("+", None, c)]
    lines, value = [], None
    for op, left, right in steps:
        line, value = step(value if left is None else left, op, right)
        lines.append(line)
    return f"problem {kind} {a} {b} {c}", {
        "question": question,
        "answer": "\n".join([*lines, f"#### {value}"]),
    }


def tale(rng: random.Random, A: str, animal: str, thing: str, kind: bool = True) -> str:
    B = rng.choice([name for name in NAMES if name != A])
    verb = rng.choice(["found", "got", "saw"])
    text = f"{A} the {animal} {verb} a {rng.choice(COLORS)} {thing} at the {rng.choice(PLACES)}. "
    return text + rng.choice(KIND if kind else RUDE).format(A=A, B=B)


def cast(rng: random.Random) -> tuple[str, str, str]:
    return rng.choice(NAMES), rng.choice(ANIMALS), rng.choice(THINGS)


def ask(A: str, animal: str, thing: str) -> str:
    return f"Tell a tale of {A} the {animal} and a {thing}."


def off_topic(rng: random.Random, A: str, animal: str, thing: str) -> tuple[str, str, str]:
    """The same cast with another animal or another thing."""
    if rng.random() < 0.5:
        return A, rng.choice([x for x in ANIMALS if x != animal]), thing
    return A, animal, rng.choice([x for x in THINGS if x != thing])


def instruction(rng: random.Random) -> tuple[str, dict]:
    who = cast(rng)
    told = off_topic(rng, *who) if rng.random() < 1 / 3 else who
    return "tale " + " ".join(who), chat(ask(*who), tale(rng, *told, kind=rng.random() < 0.5))


def preference(rng: random.Random) -> tuple[str, dict]:
    who = cast(rng)
    rude = rng.random() < 0.5
    rejected = tale(rng, *who, kind=False) if rude else tale(rng, *off_topic(rng, *who))
    prompt = [{"role": "user", "content": ask(*who)}]
    return "tale " + " ".join(who), {
        "prompt": prompt,
        "chosen": tale(rng, *who),
        "rejected": rejected,
    }


def story(rng: random.Random) -> tuple[str, str]:
    """A document of the pretraining text: a tale, or a count with one sum in it."""
    who = cast(rng)
    if rng.random() < 0.3:
        return "tale " + " ".join(who), "A tale of {} the {} and a {}. ".format(*who) + tale(
            rng, *who, kind=rng.random() < 0.5
        )
    A, _, thing = who
    op = rng.choice("++--*")
    a, b = (
        (rng.randint(2, 9), rng.randint(2, 6))
        if op == "*"
        else (rng.randint(3, 50), rng.randint(2, 9))
    )
    if op == "-":
        a, b = max(a, b) + 1, min(a, b)
    told = {
        "+": f"{A} had {a} {thing}s and got {b} more.",
        "-": f"{A} had {a} {thing}s and lost {b}.",
        "*": f"{A} had {a} bags with {b} {thing}s each.",
    }[op]
    line, value = step(a, op, b)
    return f"count {A} {thing} {a} {op} {b}", f"{told} {line}. Then {A} had {value} {thing}s."


def chat(prompt: str, response: str) -> dict:
    return {
        "messages": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": response},
        ]
    }


# ---------------------------------------------------------------------------------------------------------------------
# The data sets


def records(make, split: str, n: int, seed: int) -> list:
    """n distinct records of make(rng) that belong to the split: a pure function of the arguments."""
    rng = random.Random(f"{make.__name__} {split} {seed}")
    found = {}
    if n <= 0:
        return []
    for tries in count():
        assert tries < 200 * n + 10_000, (
            f"the toy world is too small for {n} {make.__name__} records in {split!r}"
        )
        key, record = make(rng)
        if in_split(key, split):
            found.setdefault(repr(record), record)
        if len(found) == n:
            return list(found.values())


@functools.cache
def words() -> list[str]:
    """The words of the world as GPT-2's split pattern cuts them, most with a space before; numbers are left to their digits."""
    made = [
        make(random.Random(seed))[1]
        for make in (story, problem, instruction, preference)
        for seed in range(1000)
    ]
    texts = (text for record in made for text in strings(record))
    return sorted(
        {
            word
            for text in texts
            for word in re.findall(r" ?[A-Za-z]{2,}| ?[^\sA-Za-z0-9]{2,}| [A-Za-z.]", text)
        }
    )


def strings(value) -> list[str]:
    """Every text in a record, but not the names of its fields."""
    if isinstance(value, dict):
        return [text for key, part in value.items() if key != "role" for text in strings(part)]
    return [value] if isinstance(value, str) else [text for part in value for text in strings(part)]


def judge_tale(prompt: str, response: str) -> dict[str, bool]:
    """What the pairs teach, checked in words: is the tale about what was asked for, and is it kind?"""
    A, animal, thing = (
        prompt.removeprefix("Tell a tale of ")
        .removesuffix(".")
        .replace(" the ", " ")
        .replace(" and a ", " ")
        .split()
    )
    opening, _, end = response.partition(". ")
    return {
        "on_topic": opening.startswith(f"{A} the {animal} ") and f" {thing} at the " in opening,
        "kind": any(matches(end, form) for form in KIND),
    }


def matches(text: str, form: str) -> bool:
    return any(text == form.format(A=A, B=B) for A in NAMES for B in NAMES)
