"""Data: makes token shards and records from the hub or from files.

    python data.py --stage=all                                    # every preset, on the login node
    python data.py --stage=pretrain --sources=tinystories:100000  # one preset, capped
    python data.py --stage=sft --sources=mine=notes.jsonl         # a file of your own
    python data.py --sources=pretrain/notes:wikitext=notes.txt    # cut at headings " = Title = "
    python data.py --sources=toy                                  # the built-in world, no network
    python data.py --train_tokenizer=4096 --sources=pretrain/novel=novel.txt

Each source becomes a folder data_dir/NAME (corpus/folders.py). A file is text, in which
<|endoftext|> ends a document, or it has records: .jsonl, .json, .csv, .tsv, .parquet, each also as
.gz; where the name says nothing the content does. Records may have any schema that
corpus/records.py lists under RECORDS. This is the only program that may use the network.

--train_tokenizer=4096 learns 4,096 symbols, the 256 bytes among them, from the text of all sources
of stage pretrain, writes them as data_dir/novel-4096.tiktoken, and prepares the sources with them.
A recipe names the file: tokenizer = "data/novel-4096.tiktoken"; a checkpoint of it finds it there.
"""

import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

import tiktoken

import configurator
from configurator import UserError, require
from corpus.folders import ToySizes, learn_tokenizer, make_folder, make_toy, write_text_shards
from corpus.records import evaluation_set, split_records, to_records
from corpus.sources import PRESETS, STAGES, Source, cut_at_marks, source_rows, texts_of
from corpus.tokenizer import SPECIAL, Tokenizer, load_tokenizer, write_ranks
from runtime.files import digest, holds_records, sha256, write_atomic, write_jsonl
from runtime.program import run

RULES = 2  # by which files are read: raise it when any record changes, and data are made again


@dataclass
class DataConfig:
    """What to prepare."""

    stage: str = "all"  # pretrain, sft, dpo, verifier, eval or all: of the presets, or of your own
    sources: tuple[str, ...] = ()  # [stage/]name[:cap][:format][=file;file]; none = the presets
    data_dir: str = "data"  # each source becomes a folder here
    local_dir: str = "."  # where relative files of the sources lie
    tokenizer: str = "gpt2"  # of text: byte, gpt2, a ranks file, or the run of an imported model
    train_tokenizer: int | None = None  # symbols to learn from the pretraining text, and to use
    seed: int = ToySizes.seed  # of the toy world
    toy_stories: int = ToySizes.stories  # toy world: pretraining documents
    toy_problems: int = ToySizes.problems  # few, so that held-out problems stay hard
    toy_test: int = ToySizes.test  # toy world: problems and pairs to test on
    force: bool = False  # make folders again that are there

    def __post_init__(self):
        bounds = {"[0, inf)": "seed", "[40, inf)": "toy_stories"}
        bounds["[1, inf)"] = "toy_problems toy_test"
        # more than the bytes; with the special ids no more than 16 bits of a shard can name
        bounds[f"[257, {2**16 - len(SPECIAL)}]"] = "train_tokenizer"
        require(self, bounds, {"stage": (*STAGES, "all")})
        if self.train_tokenizer and self.tokenizer != DataConfig.tokenizer:
            both = f"train_tokenizer={self.train_tokenizer} and tokenizer={self.tokenizer!r}"
            raise UserError(f"{both} are two tokenizers: give one of them")


def prepare(cfg: DataConfig) -> None:
    """Make the folder of every source; a folder that was made by the same request is kept."""
    presets = [name for name, preset in PRESETS.items() if cfg.stage in (preset.stage, "all")]
    sources = {}
    for text in cfg.sources or presets:  # all are read before the first is made
        source = Source.parse(text, cfg.stage, cfg.local_dir)
        if (source.stage, source.name) in sources:
            fault = f"source {text!r}: this name was given before"
            raise UserError(f"{fault}. Several files are one source by name=FILE;FILE")
        sources[source.stage, source.name] = source
    tokenizer = functools.cache(lambda: tokenizer_for_preparation(cfg))
    if cfg.train_tokenizer:
        cfg, tokenizer = with_own_tokenizer(cfg, list(sources.values()))
    for source in sources.values():
        prepare_source(source, cfg, tokenizer)


def with_own_tokenizer(cfg: DataConfig, sources: list[Source]) -> tuple[DataConfig, Callable]:
    """Return the configuration with the name of the tokenizer to learn, and what makes it.

    The name is part of every folder's request and holds all that the ranks depend on, so that
    nothing is learnt again where file and folders are there.
    """
    texts = [source for source in sources if source.stage == "pretrain" and source.name != "toy"]
    if not texts:
        where = "--train_tokenizer learns from sources of stage pretrain, and there is none"
        raise UserError(f"{where}: add --sources=pretrain/name=FILE (the toy world has its own)")
    names = "+".join(source.name for source in texts)
    path = os.path.join(cfg.data_dir, f"{names}-{cfg.train_tokenizer}.tiktoken")
    tokenizer = functools.cache(lambda: learn_tokenizer(path, texts, cfg.train_tokenizer))
    if not os.path.isfile(path):
        tokenizer()
    learnt_from = digest([request_of(source, cfg) for source in texts])
    name = f"{os.path.basename(path)} of {learnt_from}"
    return replace(cfg, tokenizer=name, train_tokenizer=None), tokenizer


def prepare_source(source: Source, cfg: DataConfig, tokenizer: Callable[[], Tokenizer]) -> None:
    def write(folder: str) -> dict:
        if source.stage == "pretrain":
            return write_text_shards(source, folder, tokenizer())
        if source.stage == "eval":
            return prepare_eval(source, folder)
        return prepare_records(source, folder)

    if source.name == "toy":
        sizes = ToySizes(cfg.seed, cfg.toy_stories, cfg.toy_problems, cfg.toy_test)
        make_toy(sizes, cfg.data_dir, cfg.force)
        return
    folder = os.path.join(cfg.data_dir, source.name)
    make_folder(folder, source.stage, request_of(source, cfg), write, cfg.force)


def request_of(source: Source, cfg: DataConfig) -> dict:
    """Return all that the content of a source's folder depends on."""
    files, origin = [], None
    for path in source.files:
        digest = sha256(path)[:16] if os.path.isfile(path) else None
        files.append([os.path.basename(path), digest])
    if not files:
        preset = PRESETS[source.name]
        origin = [preset.repo, preset.config, preset.revision, preset.split]
    request = {"rules": RULES, "stage": source.stage, "cap": source.cap, "format": source.format}
    return request | {"tokenizer": cfg.tokenizer, "files": files, "from": origin}


def prepare_records(source: Source, folder: str) -> dict:
    """Write the JSON lines of a source of records, cut into splits; return counts."""
    records = to_records(source_rows(source)[: source.cap], source.stage, described(source))
    splits = split_records(records, source.stage, source.name)
    kind = "problems" if source.stage == "verifier" else source.stage
    for split, part in splits.items():
        write_jsonl(os.path.join(folder, f"{kind}_{split}.jsonl"), part)
    return {"records": {split: len(part) for split, part in splits.items()}}


def prepare_eval(source: Source, folder: str) -> dict:
    """Write text as test.txt, problems as problems_test.jsonl, other records as test.jsonl."""
    forms = {holds_records(path) for path in source.files}
    if len(forms) > 1:
        raise UserError(f"source {source.name}: text and records together, make two sources of it")
    if source.format == "wikitext" or forms == {False}:
        if source.cap is not None:
            raise UserError(f"source {source.name}: a cap counts records, and this is one text")
        lines = list(cut_at_marks(itertools.chain.from_iterable(texts_of(source))))
        if n_marks := lines.count(None):
            print(f"source {source.name}: {n_marks} marks {SPECIAL[0]} became line ends")
        text = "".join("\n" if line is None else line for line in lines).encode(errors="replace")
        if not text.strip():
            raise UserError(f"source {source.name}: there is no text in it")
        write_atomic(os.path.join(folder, "test.txt"), lambda f: f.write(text))
        return {"bytes": len(text)}
    name, records = evaluation_set(source_rows(source)[: source.cap], described(source))
    text = json.dumps(records, default=str)  # some column may hold dates, or NaN in a list
    records = json.loads(text, parse_constant=lambda _: None)
    write_jsonl(os.path.join(folder, name), records)
    return {"records": len(records)}


def described(source: Source) -> str:
    files = " + ".join(map(os.path.basename, source.files)) or "from the hub"
    return f"{source.name} ({files})"


def tokenizer_for_preparation(cfg: DataConfig) -> Tokenizer:
    """Return the tokenizer, and keep its ranks in data_dir: training nodes need nothing else."""
    kept = os.path.join(cfg.data_dir, "gpt2.tiktoken")
    if cfg.tokenizer == "gpt2" and not os.path.isfile(kept):
        fetch_ranks(kept)
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.data_dir)
    if tokenizer.name != "gpt2":
        kept = os.path.join(cfg.data_dir, tokenizer.name)
    is_path = os.path.isfile(cfg.tokenizer) and tokenizer.name not in ("byte", "toy")
    if is_path and not os.path.isfile(kept):
        with open(cfg.tokenizer, "rb") as source:
            write_atomic(kept, lambda f: shutil.copyfileobj(source, f))
    return tokenizer


def fetch_ranks(path: str) -> None:
    """Write GPT-2's ranks, from tiktoken's cache or from the network, as the file of OpenAI."""
    try:
        ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    except Exception as error:
        cause = f"could not fetch the GPT-2 ranks ({type(error).__name__})"
        raise UserError(f"{cause}: give a local --tokenizer=gpt2.tiktoken") from None
    write_ranks(path, ranks)


def main(argv: list[str]) -> int:
    prepare(configurator.load(argv, DataConfig, quiet=False))
    return 0


if __name__ == "__main__":
    run(main)
