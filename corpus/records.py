"""Records: whatever schema comes in, one form goes out; splits that never share a prompt.

SFT     {"messages": [{"role", "content"}, ...]}, ending with the assistant
DPO     {"prompt": messages, "chosen": text, "rejected": text}
verifier, problems of an evaluation     {"question": text, "answer": text ending in #### N}
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable

from configurator import UserError
from corpus import toy
from corpus.chat import user_turn
from corpus.shards import parse_mixture
from runtime.files import read_jsonl


def hh_turns(dialogue: str) -> list[dict]:
    """Return the messages of Anthropic's "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", dialogue)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[who], "content": text.strip()} for who, text in turns]


def with_input(row: dict) -> str:
    """Return Alpaca's instruction, with its input after it where there is one."""
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]


def sft_record(row: dict) -> dict:
    if "messages" in row:
        return {"messages": row["messages"]}
    if "question" in row:
        return toy.chat(row["question"], row["answer"])
    if "chosen" in row and "output" not in row:  # preference data as demonstrations
        return {"messages": hh_turns(row["chosen"])}
    return toy.chat(with_input(row), row["output"])


def dpo_record(row: dict) -> dict | None:
    """Return the pair of a row, or None where its two answers have different prompts."""
    if "conversations" in row:  # LLaMA-Factory
        role = {"human": "user", "gpt": "assistant", "system": "system"}
        turns = row["conversations"]
        prompt = [{"role": role[turn["from"]], "content": turn["value"]} for turn in turns]
        return pair(prompt, row["chosen"]["value"], row["rejected"]["value"])
    if "prompt" in row:
        prompt = row["prompt"] if isinstance(row["prompt"], list) else user_turn(row["prompt"])
        return pair(prompt, row["chosen"], row["rejected"])
    if "instruction" in row:
        return pair(user_turn(with_input(row)), row["chosen"], row["rejected"])
    chosen, rejected = hh_turns(row["chosen"]), hh_turns(row["rejected"])
    if chosen[:-1] != rejected[:-1] or chosen[-1]["role"] != rejected[-1]["role"]:
        return None
    if chosen[-1]["role"] == "user":
        return pair(chosen, "", "")  # the dialogue has no answer, and is dropped for that
    return pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def pair(prompt: list[dict], chosen: str, rejected: str) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def problem_record(row: dict) -> dict:
    return {"question": row["question"], "answer": row["answer"]}


RECORDS = {  # stage -> (function, the schemas that it reads, in words)
    "sft": (sft_record, "messages | instruction[, input], output | question, answer | chosen"),
    "dpo": (dpo_record, "[prompt | conversations | instruction[, input],] chosen, rejected"),
    "verifier": (problem_record, "question, answer"),
}


def reason_to_drop(record: dict | None) -> str:
    """Say why a record cannot be trained on, or "". Raises AttributeError where a text is none."""
    if record is None:
        return "answers to different prompts"
    if "question" in record:
        complete = record["question"].strip() and record["answer"].strip()
        return "" if complete else "empty question or empty response"
    is_pair = "chosen" in record
    messages = record["prompt"] if is_pair else record["messages"]
    roles = [message["role"] for message in messages]
    texts = [message["content"].strip() for message in messages]
    if is_pair:
        roles.append("assistant")
        texts += [record["chosen"].strip(), record["rejected"].strip()]
    answers = texts[-2:] if is_pair else texts[-1:]
    if not answers or not all(answers):
        return "empty response"
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns[:1] != ["user"]:
        return "does not begin with the user"
    if turns != ["user", "assistant"] * (len(turns) // 2):
        return "turns not user, assistant, user, ..., assistant"
    equal = is_pair and record["chosen"] == record["rejected"]
    return "chosen equals rejected" if equal else ""


def to_records(rows: Iterable, stage: str, where: str) -> list[dict]:
    """Return the records of a stage, each once; print how many were dropped and why."""
    kept, dropped = {}, Counter()
    for number, row in enumerate(rows, 1):
        record, reason = to_record(row, stage, f"{where}, record {number}")
        key = json.dumps(record)
        if reason or key in kept:
            dropped[reason or "duplicate"] += 1
        else:
            kept[key] = record
    if dropped:
        reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
        total = dropped.total()
        print(f"{where}: {total} of {len(kept) + total} records dropped: {reasons}")
    if not kept:
        found = f"no usable {stage} record of {dropped.total()}"
        raise UserError(f"{where}: {found}, expected {RECORDS[stage][1]}")
    return list(kept.values())


def to_record(row: object, stage: str, where: str) -> tuple[dict | None, str]:
    """Return the record of a row, and the reason to drop it or ""."""
    function, schemas = RECORDS[stage]
    try:
        record = function(row)
        return record, reason_to_drop(record)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        fault = f"{where} is not a record for {stage} ({type(error).__name__}: {error})"
        raise UserError(f"{fault}: it has {found}, expected {schemas}") from None


def prompt_of(record: dict) -> str:
    """Return what the records of one prompt share, by which splits are cut."""
    return json.dumps(record.get("question") or record.get("prompt") or record["messages"][:-1])


def split_records(records: list[dict], stage: str, name: str) -> dict[str, list[dict]]:
    """Cut records by a hash of the prompt: 5 % validation; of problems 25 % for the verifier."""
    splits = {"train": [], "val": []} | ({"verifier": []} if stage == "verifier" else {})
    for record in records:
        percent = int(hashlib.sha256(prompt_of(record).encode()).hexdigest(), 16) % 100
        if percent < 5:
            splits["val"].append(record)
        elif percent < 30 and stage == "verifier":
            splits["verifier"].append(record)
        else:
            splits["train"].append(record)
    for part in splits.values():
        if not part:
            take_a_prompt(part, max(splits.values(), key=len))
    lacking = " and ".join(split for split, part in splits.items() if not part)
    if lacking:
        has = f"{len(records)} usable records of {len(set(map(prompt_of, records)))} prompts"
        needs = f"too few to hold some out for {lacking}: at least {len(splits)} different"
        raise UserError(f"source {name}: {has}, {needs}")
    return splits


def take_a_prompt(part: list[dict], largest: list[dict]) -> None:
    """Move the last prompt of the largest part to an empty part, with all of its records."""
    last = prompt_of(largest[-1])
    rest = [record for record in largest if prompt_of(record) != last]
    if rest:
        part += [record for record in largest if prompt_of(record) == last]
        largest[:] = rest


def load_records(spec: str, data_dir: str, kind: str, split: str) -> list[dict]:
    """Return the records of kind sft, dpo or problems from the folders that spec names.

    SFT takes the problems of a folder that has no chats. Raises UserError where a record to train
    on is one of an evaluation set.
    """
    kinds = ["sft", "problems"] if kind == "sft" else [kind]
    rows = []
    for name, _ in parse_mixture(spec):
        paths = [os.path.join(data_dir, name, f"{first}_{split}.jsonl") for first in kinds]
        existing = list(filter(os.path.isfile, paths))
        if not existing:
            hint = f"make them with data.py --sources={name}"
            raise UserError(f"there are no {kind} records at {paths[0]}: {hint}")
        rows += read_jsonl(existing[0])
    if kind == "sft":
        rows = list(map(sft_record, rows))
    if split in ("train", "verifier"):
        refuse_evaluation_problems(rows, spec, data_dir)
    return rows


def refuse_evaluation_problems(rows: list[dict], spec: str, data_dir: str) -> None:
    """Raise UserError where a record asks a question of an evaluation set in data_dir."""
    held_out = {}
    for name in sorted(os.listdir(data_dir)):
        for file in ("problems_test.jsonl", "test.jsonl"):
            path = os.path.join(data_dir, name, file)
            if os.path.isfile(path):
                questions = [row["question"] for row in read_jsonl(path) if "question" in row]
                held_out |= {plain(question): name for question in questions}
    leaked = [question for question in map(question_of, rows) if plain(question) in held_out]
    if leaked:
        folder = os.path.join(data_dir, held_out[plain(leaked[0])])
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
    asked = [message["content"] for message in messages if message["role"] == "user"]
    return asked[0] if asked else ""


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
    return [pair(user_turn(row["question"]), chosen, rejected) for chosen, rejected in both]
