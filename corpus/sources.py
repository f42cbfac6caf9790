"""Sources: presets of the Hugging Face hub and files of your own, read as documents or rows."""

import glob
import io
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from configurator import UserError
from corpus.tokenizer import SPECIAL
from runtime.files import holds_records, read_json, read_lines, read_rows, sha256

STAGES = ("pretrain", "sft", "dpo", "verifier", "eval")
# Format plain or wikitext, whose documents begin at headings; for eval it stays a text
GRAMMAR = "[stage/]name[:cap][:format][=file;file]"
SOURCE = (
    r"((?P<stage>\w+)/)?(?P<name>(?!\.)[\w.-]+(?<!\.part)(?<!\.tmp))"
    r"(:(?P<cap>[0-9]+))?(:(?P<format>plain|wikitext))?(=(?P<files>.+))?"
)


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
        if text == "toy":
            return cls("pretrain", "toy")
        found = re.fullmatch(SOURCE, text)
        if not found or found["name"] == "toy":
            rules = "the format is plain or wikitext; .name, name.part, name.tmp and toy are taken"
            raise UserError(f"source {text!r} is not of the form {GRAMMAR}: {rules}")
        name, format, files = found["name"], found["format"], found["files"]
        known = PRESETS.get(name)
        stage = found["stage"] or (known.stage if known and not files else stage)
        if stage not in STAGES or not (known or files):
            yours = f"name=FILE with --stage=STAGE or STAGE/name=FILE, of {', '.join(STAGES)}"
            presets = ", ".join(PRESETS)
            raise UserError(f"source {text!r} is neither a preset ({presets}) nor {yours}")
        if format and stage not in ("pretrain", "eval"):
            raise UserError(f"source {text!r}: {format!r} is for texts, and {stage} has records")
        format = format or (known.format if known else "plain")
        cap = int(found["cap"]) if found["cap"] else None
        paths = [os.path.join(local_dir, file) for file in files.split(";")] if files else []
        return cls(stage, name, cap, paths, format)


def how_to_make(stage: str, name: str) -> str:
    """Return the command that makes a data folder, as advice."""
    is_known = name == "toy" or (name in PRESETS and PRESETS[name].stage == stage)
    source = name if is_known else f"{name}=FILE"
    return f"make it with data.py {'' if is_known else f'--stage={stage} '}--sources={source}"


def read_manifest(path: str) -> tuple[dict | None, dict[str, str]]:
    """Return request and {file: sha256} of a manifest; None and {} where it is damaged or none."""
    manifest = read_json(path)
    digests = manifest.get("sha256")
    if not isinstance(digests, dict):
        return None, {}
    return manifest.get("request"), {os.path.basename(name): it for name, it in digests.items()}


def check_made(paths: list[str], sha256: Callable | None = sha256) -> None:
    """Raise UserError where a file is not what data.py wrote, or its folder is not whole.

    A file that no manifest of its folder names is the user's own. sha256(path) of a file; None
    where something else vouches for its content.
    """
    made = {}
    for folder in {os.path.dirname(path) for path in paths}:
        for manifest in glob.glob(os.path.join(glob.escape(folder), "manifest_*.json")):
            if read_json(manifest).get("unfinished"):
                what = f"{folder} is half replaced: data.py was killed there"
                raise UserError(f"{what}. Run the same data.py command again")
            _, digests = read_manifest(manifest)
            own = {os.path.join(folder, name): digest for name, digest in digests.items()}
            if lacking := [path for path in own if not os.path.exists(path)]:
                names = ", ".join(map(os.path.basename, lacking[:3]))
                what = f"{folder} lacks {names}, which data.py wrote"
                raise UserError(f"{what}. Make it again with data.py, or remove {manifest}")
            made |= own
    for path in paths if sha256 else []:
        if made.get(path) not in (None, sha256(path)):
            what = f"{path} is damaged or was changed: data.py wrote another file"
            own = "If the change is yours, remove the manifest_*.json beside it"
            raise UserError(f"{what}. Make it again with data.py. {own}")


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


def texts_of(source: Source) -> Iterator[Iterator[str]]:
    """Yield the lines of each file; of a file of records the texts, each with a mark as its end."""
    end = "" if source.format == "wikitext" else SPECIAL[0]
    if not source.files:
        yield record_texts(hub_rows(source.name), source.name, end)
    for path in source.files:
        if holds_records(path):
            yield record_texts(read_rows(path), path, end)
        else:
            yield read_lines(path)


def text_documents(source: Source) -> Iterator[str]:
    """Return a source's documents: records' "text", or text files, cut at their marks.

    Those that hold any text, and as many as the source's cap allows.
    """
    is_wikitext = source.format == "wikitext"
    files = texts_of(source)
    if is_wikitext:  # a record is a line or several
        files = (itertools.chain.from_iterable(map(io.StringIO, texts)) for texts in files)
    every = itertools.chain.from_iterable(documents(texts, is_wikitext) for texts in files)
    return itertools.islice(filter(str.strip, every), source.cap)


def record_texts(rows: Iterable, where: str, end: str) -> Iterator[str]:
    """Yield the "text" of each record; print how many have none, and what else they hold."""
    n_null, fields = 0, {}
    for number, row in enumerate(rows, 1):
        text = row.get("text", row) if isinstance(row, dict) else row
        if not isinstance(row, dict) or not isinstance(text, str | None):
            wanted = f'expected a text under "text", found {row!r:.100}'
            raise UserError(f"{where}, record {number}: {wanted}")
        fields |= dict.fromkeys(row)
        n_null += text is None
        yield (text or "") + end
    if n_null:
        print(f'{where}: {n_null} of {number} records dropped: "text" is null')
    fields.pop("text", None)
    if fields:
        print(f"{where}: ignored: {', '.join(fields):.200}")


def cut_at_marks(lines: Iterable[str]) -> Iterator[str | None]:
    """Yield the lines of a text, and None for each <|endoftext|>, which cuts a line."""
    for line in lines:
        texts = line.split(SPECIAL[0])
        for place, text in enumerate(texts):
            if place:
                yield None
            if text.strip() or len(texts) == 1:
                yield text


def documents(lines: Iterable[str], is_wikitext: bool = False) -> Iterator[str]:
    """Yield the documents between the marks; WikiText's begin at lines " = Title = ", too."""
    document = []
    for line in cut_at_marks(lines):
        is_heading = is_wikitext and line and re.fullmatch(r" = [^=](.*[^=])? = \n?", line)
        if document and (line is None or is_heading):
            yield "".join(document)
            document = []
        if line:
            is_torn = is_wikitext and not line.endswith("\n")  # the hub gives some without an end
            document.append(line + "\n" * is_torn)
    yield "".join(document)
