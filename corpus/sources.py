"""Sources: presets of the Hugging Face hub and files of your own, read as documents or rows."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from configurator import UserError
from corpus.tokenizer import SPECIAL
from runtime.files import open_text, read_rows

STAGES = ("pretrain", "sft", "dpo", "verifier", "eval")
FORMATS = ("plain", "wikitext")  # wikitext: documents begin at headings, and eval keeps the text
GRAMMAR = "[stage/]name[:cap][:format][=file;file]"


class Preset(NamedTuple):
    """A Preset is a data set of the hub at a pinned revision, so that it cannot change."""

    stage: str
    repo: str
    revision: str
    split: str
    config: str | None = None
    format: str = "plain"


WIKITEXT = ("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3")
STORIES = ("roneneldan/TinyStories", "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64")
ALPACA = ("tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017")
HH = ("Anthropic/hh-rlhf", "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa")
GSM8K = ("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866")
SST2 = ("stanfordnlp/sst2", "8d51e7e4887a4caaa95b3fbebbf53c0490b58bbb")
DIALOGSUM = ("knkarthick/dialogsum", "a968e7aee0602e257935f1321a02e4287f7d5848")

PRESETS = {
    "wikitext-103": Preset("pretrain", *WIKITEXT, "train", "wikitext-103-raw-v1", "wikitext"),
    "tinystories": Preset("pretrain", *STORIES, "train"),
    "alpaca": Preset("sft", *ALPACA, "train"),
    "hh-rlhf": Preset("dpo", *HH, "train"),
    "gsm8k": Preset("verifier", *GSM8K, "train", "main"),
    "gsm8k-test": Preset("eval", *GSM8K, "test", "main"),
    "wikitext-2": Preset("eval", *WIKITEXT, "test", "wikitext-2-raw-v1", "wikitext"),
    "wikitext-2-valid": Preset("eval", *WIKITEXT, "validation", "wikitext-2-raw-v1", "wikitext"),
    "sst2": Preset("eval", *SST2, "validation"),
    "sst2-train": Preset("eval", *SST2, "train"),
    "dialogsum": Preset("eval", *DIALOGSUM, "test"),
}


@dataclass
class Source:
    """A Source names a data folder and says what it is made from."""

    stage: str
    name: str
    cap: int | None = None  # documents or records to take from the start; None = all
    files: list[str] = field(default_factory=list)  # none = from the hub
    format: str = "plain"

    @classmethod
    def parse(cls, text: str, stage: str, local_dir: str) -> "Source":
        """Return the source that a text of the form GRAMMAR means, with files in local_dir.

        stage: the one of a text that names no stage and no preset.
        """
        head, equals, files = text.partition("=")
        own_stage, _, rest = head.rpartition("/")
        name, *options = rest.split(":")
        cap, format = parse_options(text, options)
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise UserError(f"source {text!r} has no valid name: write {GRAMMAR}")
        known = PRESETS.get(name)
        if known and not files:
            stage = known.stage
        stage = own_stage or stage
        if stage not in STAGES or not (known or equals):
            yours = f"name=FILE with --stage=STAGE or STAGE/name=FILE, of {', '.join(STAGES)}"
            presets = ", ".join(PRESETS)
            raise UserError(f"source {text!r} is neither a preset ({presets}) nor {yours}")
        format = format or (known.format if known else "plain")
        paths = [os.path.join(local_dir, file) for file in files.split(";")] if equals else []
        return cls(stage, name, cap, paths, format)


def parse_options(text: str, options: list[str]) -> tuple[int | None, str | None]:
    """Return the cap and the format among the options after a source's name, each at most once."""
    cap = format = None
    for option in options:
        if option.isdecimal() and cap is None:
            cap = int(option)
        elif option in FORMATS and format is None:
            format = option
        else:
            known = f"a number or one of {', '.join(FORMATS)}, each once"
            raise UserError(f"source {text!r}: {option!r} is not {known}: write {GRAMMAR}")
    return cap, format


def how_to_make(stage: str, name: str) -> str:
    """Return the command that makes a data folder, as advice."""
    is_known = name in PRESETS or name == "toy"
    source = name if is_known else f"{name}=FILE"
    return f"make it with data.py {'' if is_known else f'--stage={stage} '}--sources={source}"


def hub_rows(name: str) -> Iterable[dict]:
    """Return the rows of a preset from the hub. Every failure is a UserError, never a skip."""
    import datasets

    stage, repo, revision, split, config, _ = PRESETS[name]
    try:
        return datasets.load_dataset(repo, config, split=split, revision=revision)
    except Exception as error:  # network, hub, disk: all end the same way
        cause = f"{revision[:12]} ({type(error).__name__}: {str(error)[:200]})"
        advice = f"prepare it with a network, or a local file: --sources={stage}/{name}=FILE"
        raise UserError(f"could not load {repo} {config or ''} at {cause}: {advice}") from None


def source_rows(source: Source) -> list:
    if not source.files:
        return list(hub_rows(source.name))
    return [row for path in source.files for row in read_rows(path)]


def file_kind(path: str) -> str:
    return path.removesuffix(".gz").rpartition(".")[2]


def text_documents(source: Source) -> Iterator[str]:
    """Yield a source's documents: records' "text", or text files cut at their marks."""
    is_wikitext = source.format == "wikitext"
    if not source.files:
        texts = (row["text"] for row in hub_rows(source.name))
        yield from wikitext_articles(texts) if is_wikitext else texts
    for path in source.files:
        if file_kind(path) in ("json", "jsonl", "parquet"):
            yield from record_texts(path)
        else:
            with open_text(path) as lines:
                yield from wikitext_articles(lines) if is_wikitext else marked_documents(lines)


def record_texts(path: str) -> Iterator[str]:
    for number, row in enumerate(read_rows(path), 1):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f'{path}, record {number}: expected a text under "text"')
        yield row["text"]


def marked_documents(lines: Iterable[str]) -> Iterator[str]:
    """Yield the documents between lines that hold <|endoftext|> alone."""
    document = []
    for line in lines:
        if line.strip() == SPECIAL[0]:
            yield "".join(document)
            document = []
        else:
            document.append(line)
    yield "".join(document)


def wikitext_articles(lines: Iterable[str]) -> Iterator[str]:
    """Yield the articles of WikiText, whose headings are lines " = Title = "."""
    article = []
    for line in lines:
        is_mark = line.strip() == SPECIAL[0]
        is_heading = re.fullmatch(r" = [^=](.*[^=])? = \n?", line)
        if article and (is_mark or is_heading):
            yield "".join(article)
            article = []
        if not is_mark:
            complete = line.endswith("\n") or not line  # the hub gives some lines without an end
            article.append(line if complete else line + "\n")
    yield "".join(article)
