"""Schemas: a row of any published form becomes one form; what nobody reads is left in the row.

A null is an empty text. A field of the wrong kind raises UserError. A row that is understood, and
of no use, raises Unusable and is counted.
"""

import json
import re

from configurator import UserError
from corpus import toy

DIALOGUES = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "question", "prompt", "query", "input")
ANSWERS = ("output", "answer", "completion", "response", "chosen")
WEIGHTS = ("weight", "train", "loss_mask", "loss")  # 0: not to be trained on
SUMMARIES = ("summary", "summary1", "summary2", "summary3")  # of one dialogue
TOOLS = ("tool", "function", "function_call", "function_response", "tool_call", "tool_response")
ROLES = dict.fromkeys(("system", "developer"), "system")
ROLES |= dict.fromkeys(("user", "human", "prompter"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant")
ROLES |= dict.fromkeys((*TOOLS, "observation", "ipython"), "tool")
EMPTY = (None, "", [], {}, "[]")  # what a field holds that says nothing
HH_MARK = r"(?:\A\s*|\n\n)(Human|Assistant):"
NO_ANSWER_YET = {"role": "assistant", "content": ""}  # a prompt may end with "\n\nAssistant:"
TEMPLATE_MARK = re.compile(
    r"<[|｜][^\s<>|｜]{1,40}[|｜]>"  # ChatML, Llama 3, Zephyr, DeepSeek, gpt-oss, and our own
    r"|\[/?INST\]|<</?SYS>>|</s>\s*\Z|<(?:start|end)_of_turn>"  # Llama 2, Gemma
    r"|^### ?(?:Human|Assistant|User|Instruction|Response):|\bASSISTANT:",
    re.MULTILINE,
)
# A number that is wholly compared: 5, -0.5, 1,080; not 1/2, 3:30, 1 000 or 1,5
GOLD = re.compile(r"-?(?=\.?[0-9])(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]+)?\.?")


class Unusable(Exception):
    """A row is of no use; the text says why."""


def describe(value: object) -> str:
    return "null" if value is None else repr(value)[:100]


def take(row: dict, *names: str) -> tuple[str, object]:
    """Take the first of these fields that says something, or else the first, out of a row.

    Returns its name and what it held; "" and None where there is none of them.
    """
    there = [name for name in names if name in row]
    first = ([name for name in there if row[name] not in EMPTY] + there + [""])[0]
    return first, row.pop(first, None)


def required(row: dict, *names: str) -> list[object]:
    """Take all of these fields out of a row; return what they held."""
    missing = [name for name in names if name not in row]
    if missing:
        raise UserError(f"it lacks {' and '.join(missing)}")
    return [row.pop(name) for name in names]


def unread(row: dict) -> dict:
    """Return the fields that are left in a row and hold something."""
    return {name: value for name, value in row.items() if value not in EMPTY}


def text_of(value: object, name: str) -> str:
    """Return the text that a field holds, also in parts as OpenAI's."""
    if value is None or isinstance(value, str):
        return value or ""
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind and kind not in ("text", "input_text", "output_text"):
            raise Unusable(f"{name} with a part that is {kind}")
        if not kind or not isinstance(part.get("text"), str):
            raise UserError(f"{name} is {describe(value)}, expected a text")
    return "".join(part["text"] for part in parts)


def texts_in(row: dict, *names: str) -> dict[str, str]:
    """Take all of these fields out of a row; return their texts."""
    values = zip(names, required(row, *names), strict=True)
    return {name: text_of(value, name) for name, value in values}


def from_json(value: object) -> object:
    """Return the list that a text is the JSON of; anything else as it is."""
    try:
        is_list = isinstance(value, str) and value.lstrip().startswith("[")
        return json.loads(value) if is_list else value
    except (ValueError, RecursionError):
        return value


def is_dialogue(text: str) -> bool:
    """Say whether a text carries the marks of both speakers, or begins with one as HH's do."""
    both = len(set(re.findall(HH_MARK, text))) == 2
    return both or text.startswith(("\n\nHuman:", "\n\nAssistant:"))


def hh_turns(dialogue: str) -> list[dict]:
    """Return the messages of Anthropic's "\\n\\nHuman: ...\\n\\nAssistant: ...".

    Text before the first mark is the system's.
    """
    before, *parts = re.split(HH_MARK, dialogue)
    turns = [{"role": "system", "content": before.strip()}] if before.strip() else []
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        turns.append({"role": ROLES[speaker.lower()], "content": text.strip()})
    return turns


def refuse_marks(texts: list[str]) -> None:
    """Raise Unusable where a text holds a mark of a template: it would be learnt as text."""
    for text in texts:
        mark = TEMPLATE_MARK.search(text)
        if mark or is_dialogue(text):
            what = f"the mark {mark[0].strip()[:20]}" if mark else "Human: and Assistant:"
            raise Unusable(f"text with {what} of a chat template")


def check_turns(turns: list[dict]) -> None:
    """Raise Unusable where a conversation cannot be trained on."""
    roles = [turn["role"] for turn in turns]
    silent = {turn["role"] for turn in turns if not turn["content"].strip()}
    if roles[:1] == ["system"]:
        del roles[0]
    if "assistant" in silent or "assistant" not in roles:
        raise Unusable("empty response")
    if roles[0] != "user":
        raise Unusable("does not begin with the user")
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise Unusable("turns not user, assistant, user, ..., assistant")
    if silent:
        raise Unusable("empty question")
    refuse_marks([turn["content"] for turn in turns])


def message(item: object, name: str, row: dict) -> dict:
    """Return a message of a field; what is not read of it goes into the row."""
    rest = dict(item) if isinstance(item, dict) else {}
    _, speaker = take(rest, "role", "from")
    field, content = take(rest, "content", "value", "text")
    role = ROLES.get(str(speaker).lower())
    if role == "tool" or rest.get("tool_calls") or rest.get("function_call"):
        raise Unusable("call of a tool, or its answer")
    if role is None or not field:
        expected = "a message with role (or from) and content (or value)"
        raise UserError(f"{name} holds {describe(item)}, expected {expected}")
    weights = [rest.pop(key) for key in WEIGHTS if rest.get(key) is not None]
    if any(weight not in (0, 1) for weight in weights):
        raise UserError(f"{name} holds a message of weight {weights}, expected 0 or 1")
    if role != "assistant" and any(weights):
        rest[f"weight of the {role}"] = weights
    row |= {f"{name}.{key}": value for key, value in unread(rest).items()}
    turn = {"role": role, "content": text_of(content, f"{name}.{field}")}
    return turn if role != "assistant" or all(weights) else {**turn, "train": False}


def messages_in(value: object, name: str, row: dict) -> list[dict]:
    """Return the messages of a list or of its JSON; a system that says nothing is left out.

    A pair of texts in the list is a question and its answer.
    """
    items = from_json(value) or []
    if not isinstance(items, list):
        raise UserError(f"{name} is {describe(value)}, expected a list of messages")
    turns = []
    for item in items:
        is_pair = isinstance(item, list) and len(item) == 2
        parts = toy.chat(*item)["messages"] if is_pair else [item]
        turns += [message(part, name, row) for part in parts]
    return [turn for turn in turns if turn["role"] != "system" or turn["content"].strip()]


def is_message(item: object) -> bool:
    named = item if isinstance(item, dict) else {}
    speaker = named.get("role", named.get("from"))
    return str(speaker).lower() in ROLES and ("content" in named or "value" in named)


def turns_in(value: object, role: str, name: str, row: dict) -> list[dict]:
    """Return the turns in a field: messages, or a marked dialogue, or the text of one role."""
    items = [value] if isinstance(value, dict) else from_json(value)
    if isinstance(items, list) and items and all(map(is_message, items)):
        return messages_in(items, name, row)
    text = text_of(value, name)
    return hh_turns(text) if is_dialogue(text) else [{"role": role, "content": text}]


def prompt_in(row: dict, *names: str) -> tuple[str, list[dict]]:
    """Take the first of these fields out of a row; return its name and its turns.

    With it goes what else belongs to a prompt: input or context, history and system.
    """
    name, value = take(row, *names)
    if name == "instruction":
        more, text = take(row, "input", "context")
        parts = [text_of(value, name), text_of(text, more)]
        value = "\n\n".join(filter(None, parts))
    turns = []
    if name in DIALOGUES:
        turns = messages_in(value, name, row)
    elif name:
        earlier = messages_in(row.pop("history", None), "history", row)
        turns = earlier + turns_in(value, "user", name, row)
    if all(turn["role"] != "system" for turn in turns):
        field, system = take(row, "system", "system_prompt")
        text = text_of(system, field)
        turns = [{"role": "system", "content": text}] * bool(text.strip()) + turns
    return name, turns


def answered(asked: str, prompt: list[dict], name: str, value: object, row: dict) -> list[dict]:
    """Return the conversation of a prompt (from the field asked) and an answer to it.

    The answer's field may hold the whole conversation.
    """
    turns = turns_in(value, "assistant", name, row)
    if value and not asked and [turn["content"] for turn in turns] == [value]:
        raise UserError(f"{name} is {describe(value)}: a text without a prompt, and no dialogue")
    if prompt[-1:] == [NO_ANSWER_YET]:
        prompt = prompt[:-1]
        turns = [{**turn, "content": turn["content"].strip()} for turn in turns]
    if not turns or turns[0]["role"] == "assistant":
        return prompt + turns
    questions = ["", *(turn["content"].strip() for turn in turns if turn["role"] == "user")]
    if asked and prompt and prompt[-1]["content"].strip() not in questions:
        raise Unusable(f"{name} with another prompt than in {asked}")
    system = [turn for turn in prompt[:1] if turn["role"] == "system"]
    return turns if system == turns[:1] else system + turns


def refuse_marked_rows(row: dict) -> None:
    """Raise where a row as a whole is not to be trained on, or may be a bad example."""
    for name in ("label", "kto_tag"):
        if str(row.get(name)).lower() in ("true", "false"):
            what = f"{name} is {row[name]}: answers marked as good or bad (KTO) are not read"
            raise UserError(f"{what}; keep the good ones, without {name}")
    if any(str(row.get(name)).lower() in ("0", "0.0", "false") for name in WEIGHTS):
        raise Unusable("weight of 0")


def sft_record(row: dict) -> dict:
    """Return a conversation that ends with an answer to be trained on."""
    refuse_marked_rows(row)
    asked, turns = prompt_in(row, *DIALOGUES, *QUESTIONS)
    is_whole = asked in DIALOGUES and turns[-1:] and turns[-1]["role"] == "assistant"
    name, value = ("", None) if is_whole else take(row, *ANSWERS)
    if name:
        turns = answered(asked, turns, name, value, row)
    elif asked not in DIALOGUES:
        raise UserError(f"it has no {', '.join(ANSWERS)}")
    while turns and turns[-1].get("train") is False:
        del turns[-2:]  # what follows the last answer to train on teaches nothing
    check_turns(turns)
    return {"messages": turns}


def dpo_record(row: dict) -> dict:
    """Return two answers to one prompt."""
    refuse_marked_rows(row)
    better, worse = required(row, "chosen", "rejected")
    asked, prompt = prompt_in(row, *QUESTIONS, *DIALOGUES)
    chosen = answered(asked, prompt, "chosen", better, row)
    rejected = answered(asked, prompt, "rejected", worse, row)
    check_turns(chosen)
    check_turns(rejected)
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("answers to different prompts")
    texts = {"chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
    if texts["chosen"] == texts["rejected"]:
        raise Unusable("chosen equals rejected")
    return {"prompt": chosen[:-1], **texts}


def problem_record(row: dict) -> dict:
    """Return a problem whose answer ends in the number that solutions are compared with."""
    texts = texts_in(row, "question", "answer")
    if not all(map(str.strip, texts.values())):
        raise Unusable("empty question or empty response")
    if not GOLD.fullmatch(texts["answer"].partition("#### ")[2].rstrip()):
        raise Unusable("answer that does not end in '#### ' and a number alone")
    refuse_marks(list(texts.values()))
    return texts


def labelled_sentence(row: dict) -> dict:
    """Return the sentence of a row of SST-2, whose label must be known."""
    (label,) = required(row, "label")
    if label not in (0, 1) and str(label).strip() not in ("0", "1"):
        raise UserError(f"label is {describe(label)}, expected 0 (negative) or 1 (positive)")
    texts = texts_in(row, "sentence")
    if not texts["sentence"].strip():
        raise Unusable("empty sentence")
    return texts


def summarized_dialogue(row: dict) -> dict:
    """Return a dialogue and its summaries; those that say nothing are empty."""
    texts = texts_in(row, "dialogue", *(name for name in SUMMARIES if name in row))
    texts = {name: text if text.strip() else "" for name, text in texts.items()}
    if not texts["dialogue"] or sum(map(bool, texts.values())) < 2:
        raise Unusable("empty dialogue or no summary")
    return texts


def judged_solutions(row: dict) -> dict:
    """Return the question of a row of published solutions, each of which has a verdict."""
    texts = texts_in(row, "question")
    sources = [name for name, value in row.items() if isinstance(value, dict)]
    if not sources or not texts["question"].strip():
        raise Unusable("empty question or no solutions")
    for name in sources:
        fields = row.pop(name)
        is_text = isinstance(fields.get("solution"), str)
        if not is_text or fields.get("is_correct") not in (0, 1):
            expected = "solution: a text, is_correct: true or false"
            raise UserError(f"{name} is {describe(fields)}, expected {expected}")
    return texts
