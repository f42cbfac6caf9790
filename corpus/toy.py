"""The toy world: stories, word problems, instructions and preference pairs, made from a seed.

It is small enough to learn in minutes on two CPU cores and leaves every stage something to do:
    pretraining   stories and one-step sums: the language and the arithmetic of the world
    SFT           chats: two-step problems in GSM8K's form, and tales, half rude, a third off topic
    DPO           pairs: a kind tale on the topic against a rude or an off-topic one
    verifier      problems, of which the model's own solutions are judged
Splits are cut by content and not by record. The numbers of a problem (or the cast of a tale) belong
to one split alone, so a held-out problem is never a training problem with another name in it.
"""

import functools
import hashlib
import random
import re
from collections.abc import Callable

VERSION = 2  # of what this file makes: raise it when any record changes, and the data is made again

NAMES = ["Tom", "Mia", "Ben", "Ana", "Sam", "Kim", "Max", "Zoe", "Leo", "Eva"]
ANIMALS = ["cat", "dog", "fox", "frog", "hen", "bear", "duck", "goat"]
THINGS = ["pen", "cup", "hat", "ball", "shell", "card", "coin", "book"]
PLACES = ["park", "barn", "lake", "shop", "pond", "hill"]
COLORS = ["red", "blue", "green", "tiny", "new", "big"]
KIND = ["{A} said thank you and smiled.", "{A} was glad and shared it."]
KIND += ["It was a good day for all.", "{A} gave {B} a hug."]
RUDE = ["{A} was mad and kicked it.", "{A} yelled at {B} and ran off."]
RUDE += ["It was a bad day for all.", "{A} did not share it."]
KIND_ENDINGS = {form.format(A=A, B=B) for form in KIND for A in NAMES for B in NAMES}
# Tenths of the key space that belong to each split
SPLITS = {"train": range(6), "verifier": range(6, 8), "val": range(8, 9), "test": range(9, 10)}


def in_split(key: str, split: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] % 10 in SPLITS[split]


def step(left: int, op: str, right: int) -> tuple[str, int]:
    """Return a step in GSM8K's calculator notation, as 3+4=<<3+4=7>>7, and its value."""
    value = {"+": left + right, "-": left - right, "*": left * right}[op]
    return f"{left}{op}{right}=<<{left}{op}{right}={value}>>{value}", value


def problem(rng: random.Random) -> tuple[str, dict]:
    """Return a word problem of two steps: the second one goes on from the value of the first."""
    A, B = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS) + "s"
    pattern = rng.randrange(4)
    if pattern == 0:
        a, b = rng.randint(3, 30), rng.randint(2, 9)
        c = rng.randint(2, min(9, a + b - 1))
        told = f"{A} has {a} {thing}, gets {b} more and loses {c}."
        asked, first, second = f"How many {thing} does {A} have now?", (a, "+", b), ("-", c)
    elif pattern == 1:
        a, b, c = rng.randint(2, 9), rng.randint(2, 30), 0
        told = f"{A} has {a} {thing} and {B} has {b} more than {A}."
        asked, first, second = "How many do they have in all?", (b, "+", a), ("+", a)
    elif pattern == 2:
        a, b = rng.randint(2, 9), rng.randint(2, 6)
        c = rng.randint(1, min(9, a * b - 1))
        told = f"{A} has {a} bags of {b} {thing} and gives {c} of them to {B}."
        asked, first, second = "How many are left?", (a, "*", b), ("-", c)
    else:
        a, b, c = rng.randint(10, 30), rng.randint(2, 9), rng.randint(2, 9)
        told = f"{A} had {a} {thing}, lost {b} and got {c} from {B}."
        asked, first, second = f"How many {thing} does {A} have?", (a, "-", b), ("+", c)
    line, value = step(*first)
    last_line, final = step(value, *second)
    record = {"question": f"{told} {asked}", "answer": f"{line}\n{last_line}\n#### {final}"}
    return f"problem {pattern} {a} {b} {c}", record


def tale(rng: random.Random, A: str, animal: str, thing: str, is_kind: bool = True) -> str:
    """Return two sentences: A the animal finds the thing, and ends kindly or rudely."""
    B = rng.choice([name for name in NAMES if name != A])
    verb = rng.choice(["found", "got", "saw"])
    color, place = rng.choice(COLORS), rng.choice(PLACES)
    ending = rng.choice(KIND if is_kind else RUDE).format(A=A, B=B)
    return f"{A} the {animal} {verb} a {color} {thing} at the {place}. {ending}"


def cast(rng: random.Random) -> tuple[str, str, str]:
    return rng.choice(NAMES), rng.choice(ANIMALS), rng.choice(THINGS)


def ask(A: str, animal: str, thing: str) -> str:
    return f"Tell a tale of {A} the {animal} and a {thing}."


def off_topic(rng: random.Random, A: str, animal: str, thing: str) -> tuple[str, str, str]:
    if rng.random() < 0.5:
        return A, rng.choice([other for other in ANIMALS if other != animal]), thing
    return A, animal, rng.choice([other for other in THINGS if other != thing])


def instruction(rng: random.Random) -> tuple[str, dict]:
    """Return a chat in which somebody careless tells the tale that was asked for."""
    who = cast(rng)
    told = off_topic(rng, *who) if rng.random() < 1 / 3 else who
    is_kind = rng.random() < 0.5
    return "tale " + " ".join(who), chat(ask(*who), tale(rng, *told, is_kind))


def preference(rng: random.Random) -> tuple[str, dict]:
    """Return a pair of which the rejected tale has one fault: it is rude, or off topic."""
    who = cast(rng)
    if rng.random() < 0.5:
        rejected = tale(rng, *who, is_kind=False)
    else:
        rejected = tale(rng, *off_topic(rng, *who))
    prompt = [{"role": "user", "content": ask(*who)}]
    record = {"prompt": prompt, "chosen": tale(rng, *who), "rejected": rejected}
    return "tale " + " ".join(who), record


def story(rng: random.Random) -> tuple[str, str]:
    """Return a document of the pretraining text: a tale, or a count with one sum in it."""
    A, animal, thing = who = cast(rng)
    if rng.random() < 0.3:
        is_kind = rng.random() < 0.5
        title = f"A tale of {A} the {animal} and a {thing}. "
        return "tale " + " ".join(who), title + tale(rng, *who, is_kind)
    op = rng.choice("++--*")
    if op == "*":
        a, b = rng.randint(2, 9), rng.randint(2, 6)
        told = f"bags with {b} {thing}s each"
    else:
        a, b = rng.randint(3, 50), rng.randint(2, 9)
        told = f"{thing}s and got {b} more"
    if op == "-":
        a, b = max(a, b) + 1, min(a, b)
        told = f"{thing}s and lost {b}"
    line, value = step(a, op, b)
    text = f"{A} had {a} {told}. {line}. Then {A} had {value} {thing}s."
    return f"count {A} {thing} {a} {op} {b}", text


def chat(prompt: str, response: str) -> dict:
    question = {"role": "user", "content": prompt}
    return {"messages": [question, {"role": "assistant", "content": response}]}


def conversations(chats: list[dict], seed: int) -> list[dict]:
    """Return the chats, each once, as dialogues: of four, two have one turn, one two, one three.

    A model that saw one turn only answers the second with gibberish (docs/log.md).
    """
    order = random.Random(f"conversations {seed}").sample(chats, len(chats))
    joined = []
    while order:
        n_turns = (1, 1, 2, 3)[len(joined) % 4]
        parts, order = order[:n_turns], order[n_turns:]
        joined.append({"messages": [turn for part in parts for turn in part["messages"]]})
    return joined


def records(make: Callable[[random.Random], tuple], split: str, n: int, seed: int) -> list:
    """Return n distinct records of make(rng) in a split: a pure function of the arguments."""
    rng = random.Random(f"{make.__name__} {split} {seed}")
    found = {}
    for _ in range(200 * n + 10_000):
        if len(found) == n:
            return list(found.values())
        key, record = make(rng)
        if in_split(key, split):
            found.setdefault(repr(record), record)
    raise ValueError(f"the toy world is too small for {n} {make.__name__} records in {split!r}")


@functools.cache
def words() -> list[str]:
    """Return the words of the world as GPT-2's pattern cuts them; numbers stay digits."""
    word = re.compile(r" ?[A-Za-z]{2,}| ?[^\sA-Za-z0-9]{2,}| [A-Za-z.]")
    found = set()
    for make in (story, problem, instruction, preference):
        for seed in range(1000):
            _, record = make(random.Random(seed))
            found.update(*map(word.findall, strings(record)))
    return sorted(found)


def strings(value: object) -> list[str]:
    """Return every text in a record, but not the names of its fields, nor the roles."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [part for key, part in value.items() if key != "role"]
    return [text for part in value for text in strings(part)]


def judge_tale(prompt: str, response: str) -> dict[str, bool]:
    """Check what the pairs teach: is the tale about what was asked for, and is it kind?"""
    asked = re.fullmatch(r"Tell a tale of (\w+) the (\w+) and a (\w+)\.", prompt)
    A, animal, thing = asked.groups()
    opening, _, ending = response.partition(". ")
    starts_well = opening.startswith(f"{A} the {animal} ")
    on_topic = starts_well and f" {thing} at the " in opening
    return {"on_topic": on_topic, "kind": ending in KIND_ENDINGS}
