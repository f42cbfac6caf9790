"""Records: whatever schema comes in, one form goes out; splits that never share a prompt.

SFT     {"messages": [{"role", "content"}, ...]}, ending with the assistant
DPO     {"prompt": messages, "chosen": text, "rejected": text}
verifier, problems of an evaluation     {"question": text, "answer": text ending in #### N}
"""

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable

from configurator import UserError
from corpus import schemas
from corpus.chat import user_turn
from corpus.schemas import Unusable, describe
from corpus.shards import parse_mixture
from corpus.sources import STAGES, check_made, how_to_make
from runtime.files import read_jsonl

SFT = "messages | instruction[, input], output | question, answer | prompt, completion | chosen"
DPO = "[prompt | question | instruction[, input] | messages,] chosen, rejected"
RECORDS = {  # stage, or kind of a test set -> (function, the schemas that it reads, in words)
    "sft": (schemas.sft_record, SFT),
    "dpo": (schemas.dpo_record, DPO),
    "verifier": (schemas.problem_record, "question, answer"),
    "problems": (schemas.problem_record, "question, answer"),
    "sentences": (schemas.labelled_sentence, "sentence, label"),
    "dialogues": (schemas.summarized_dialogue, "dialogue, summary"),
    "published": (schemas.judged_solutions, "question, NAME: {solution, is_correct}"),
}
TEST_SETS = {  # kind -> (fields by which it is known, file), in the order in which they are tried
    "problems": ({"question", "answer"}, "problems_test.jsonl"),
    "sentences": ({"sentence"}, "test.jsonl"),
    "dialogues": ({"dialogue"}, "test.jsonl"),
    "dpo": ({"chosen", "rejected"}, "dpo_test.jsonl"),
    "published": ({"question"}, "test.jsonl"),
}


def to_records(rows: Iterable, kind: str, where: str) -> list[dict]:
    """Return the records of a stage, each once; print what is left out, and why.

    kind: a key of RECORDS. A test set keeps its doubles, and fields that are not read.
    """
    read, expected = RECORDS[kind]
    kept, dropped, ignored = {}, Counter(), {}
    for number, row in enumerate(rows, 1):
        rest = dict(row) if isinstance(row, dict) else {}
        try:
            record = read(rest)
        except Unusable as reason:
            dropped[str(reason)] += 1
            continue
        except UserError as error:
            fault = f"{where}, record {number} is not a record for {kind}: {error}"
            found = ", ".join(row) if isinstance(row, dict) else describe(row)
            raise UserError(f"{fault}. It has {found or 'nothing'}; expected {expected}") from None
        ignored |= schemas.unread(rest)
        if kind in STAGES:
            key = json.dumps(record)
        else:
            key, record = number, row | record
        if key in kept:
            dropped["duplicate"] += 1
        kept[key] = record
    total = len(kept) + dropped.total()
    reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
    if ignored:
        print(f"{where}: ignored: {', '.join(ignored)}")
    if dropped:
        print(f"{where}: {dropped.total()} of {total} records dropped: {reasons}")
    if not kept:
        found = f"no usable {kind} record of {total} ({reasons or 'it is empty'})"
        raise UserError(f"{where}: {found}, expected {expected}")
    return list(kept.values())


def evaluation_set(rows: list, where: str) -> tuple[str, list[dict]]:
    """Return the name of a test set's file, and its records, all of the first one's kind."""
    if not rows:
        raise UserError(f"{where} holds no record")
    first = rows[0] if isinstance(rows[0], dict) else {}
    for kind, (fields, file) in TEST_SETS.items():
        if fields <= set(first):
            return file, to_records(rows, kind, where)
    known = " | ".join(RECORDS[kind][1] for kind in TEST_SETS)
    raise UserError(f"{where}, record 1 has {', '.join(first) or 'no field'}; expected {known}")


def prompt_of(record: dict) -> str:
    """Return what the records of one prompt share, by which splits are cut."""
    return json.dumps(record.get("question") or record.get("prompt") or record["messages"][:-1])


def split_records(records: list[dict], stage: str, name: str) -> dict[str, list[dict]]:
    """Cut records by a hash of the prompt: 5 % validation; of problems 25 % for the verifier."""
    ends = {"val": 5, "verifier": 30 if stage == "verifier" else 5, "train": 100}
    splits = {"train": [], "val": []} | ({"verifier": []} if stage == "verifier" else {})
    for record in records:
        percent = int(hashlib.sha256(prompt_of(record).encode()).hexdigest(), 16) % 100
        splits[next(split for split, end in ends.items() if percent < end)].append(record)
    for part in splits.values():
        if part:
            continue
        largest = max(splits.values(), key=len)
        last = prompt_of(largest[-1])  # it moves with all of its records
        rest = [record for record in largest if prompt_of(record) != last]
        if rest:
            part += [record for record in largest if prompt_of(record) == last]
            largest[:] = rest
    lacking = " and ".join(split for split, part in splits.items() if not part)
    if lacking:
        has = f"{len(records)} usable records of {len(set(map(prompt_of, records)))} prompts"
        needs = f"too few to hold some out for {lacking}: at least {len(splits)} different"
        raise UserError(f"source {name}: {has}, {needs}")
    return splits


def load_records(spec: str, data_dir: str, kind: str, split: str, key: str = "data") -> list[dict]:
    """Return the records of kind sft, dpo or problems from the folders that spec names.

    SFT takes the problems of a folder that has no chats. Raises UserError where a record to train
    on is one of an evaluation set. key: of the configuration, whose value spec is.
    """
    if "*" in spec:
        raise UserError(f"--{key}={spec}: shares are of pretraining text; write name,other")
    kinds = ["sft", "problems"] if kind == "sft" else [kind]
    rows = []
    for name, _ in parse_mixture(spec):
        paths = [os.path.join(data_dir, name, f"{first}_{split}.jsonl") for first in kinds]
        existing = list(filter(os.path.isfile, paths))
        stage = "verifier" if kind == "problems" else kind
        hint = how_to_make("eval" if split == "test" else stage, name)
        if not existing:
            what = f"--{key}={spec}: there are no {kind} records at {paths[0]}"
            raise UserError(f"{what}: {hint}")
        check_made(existing[:1])
        found = read_jsonl(existing[0])
        if kind == "sft" and not all(is_prepared(row, kind) for row in found):
            found = to_records(found, "sft", existing[0])
        for number, row in enumerate(found, 1):
            if not is_prepared(row, kind):
                what = f"{existing[0]}, record {number} has not the form that data.py writes"
                raise UserError(f"{what} ({describe(row)}): {hint}")
        rows += found
    if split in ("train", "verifier"):
        refuse_evaluation_problems(rows, spec, data_dir)
    return rows


def is_prepared(row: object, kind: str) -> bool:
    """Say whether a row has the form that data.py writes for a kind."""
    if not isinstance(row, dict):
        return False
    texts = {"sft": [], "dpo": ["chosen", "rejected"]}.get(kind, ["question", "answer"])
    values = [row.get(name) for name in texts]
    if kind in ("sft", "dpo"):
        turns = row.get("messages" if kind == "sft" else "prompt")
        turns = turns if isinstance(turns, list) and turns else [None]
        values += [turn.get("content") if isinstance(turn, dict) else None for turn in turns]
        values += [turn.get("role") if isinstance(turn, dict) else None for turn in turns]
    return all(isinstance(value, str) for value in values)


def refuse_evaluation_problems(rows: list[dict], spec: str, data_dir: str) -> None:
    """Raise UserError where a record asks a question of an evaluation set in data_dir."""
    held_out = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(data_dir), "*", "*test.jsonl"))):
        try:
            questions = [row.get("question") for row in read_jsonl(path) if isinstance(row, dict)]
        except UserError as error:  # a set that the run does not name must not end it
            print(f"no look for leaks: {error}")
            continue
        texts = filter(lambda question: isinstance(question, str), questions)
        held_out |= dict.fromkeys(map(plain, texts), os.path.dirname(path))
    leaked = [question for question in map(question_of, rows) if plain(question) in held_out]
    if leaked:
        folder = held_out[plain(leaked[0])]
        what = f"{len(leaked)} of {len(rows)} training records of {spec} ask a question of {folder}"
        first = f"The first is {leaked[0][:100]!r}"
        raise UserError(f"{what}, an evaluation set: take them out. {first}")


def plain(text: str) -> str:
    """Return a text as questions are compared: in lower case, with single blanks."""
    return " ".join(text.lower().split())


def question_of(record: dict) -> str:
    """Return the first thing that the user asks in a record of any kind."""
    if record.get("question"):
        return record["question"]
    messages = record.get("messages", record.get("prompt", []))
    return next((turn["content"] for turn in messages if turn["role"] == "user"), "")


def solution_pairs(row: dict) -> list[dict]:
    """Return preference records of a right and a wrong sample of a problem, each text used once.

    row: as inference.solutions.solve returns it. Samples cut at the length limit are no answers.
    """
    right, wrong = {}, {}  # in the order of the samples, each text once
    for solution in row["solutions"]:
        if solution["stopped"] and solution["text"].strip():
            same_kind = right if solution["correct"] else wrong
            same_kind[solution["text"]] = True
    both = zip(right, wrong, strict=False)
    asked = user_turn(row["question"])
    return [{"prompt": asked, "chosen": good, "rejected": bad} for good, bad in both]
