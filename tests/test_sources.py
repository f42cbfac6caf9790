"""Sources give their documents whole, whatever form they come in."""

import json
import os
import re

import pytest
from corpus_helpers import (
    TEXTS,
    WIKI,
    documents_of,
    every_token,
    jsonl,
    parquet,
    real,
    request,
    tokens_of,
    write_source,
)
from helpers import BYTE, END, EOS, fails

from corpus.sources import PRESETS, Source, wikitext_articles
from data import prepare
from runtime.files import open_text, read_jsonl


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "jsonl.gz", "json", "parquet"])
def test_every_form_of_text_gives_the_same_documents_each_with_eos(tmp_path, kind, no_network):
    """All documents arrive, whole and once, EOS after each; every 100th is held out."""
    prepare(request(tmp_path, f"pretrain/mine={write_source(tmp_path, kind)}"))
    folder = tmp_path / "out" / "mine"
    assert sorted(text.removesuffix("\n") for text in documents_of(folder)) == sorted(TEXTS)
    assert tokens_of(folder / "train_000.bin")[-1] == EOS == tokens_of(folder / "val_000.bin")[-1]
    assert tokens_of(folder / "val_000.bin").count(EOS) == 2
    counts = json.loads((folder / "manifest_pretrain.json").read_text())["counts"]
    assert counts["documents"] == 250 and counts["tokens"] == {
        s: len(tokens_of(folder / f"{s}_000.bin")) for s in ("train", "val")
    }


def test_several_files_are_one_source(tmp_path):
    """name=a.txt;b.txt: both are read."""
    (tmp_path / "a.txt").write_text("first"), (tmp_path / "b.txt").write_text("second" * 20)
    prepare(request(tmp_path, "pretrain/mine=a.txt;b.txt"))
    ids = every_token(tmp_path / "out" / "mine")
    assert BYTE.decode(ids) == "first<|endoftext|>" + "second" * 20 + "<|endoftext|>"


def test_wikitext_headings_begin_documents(tmp_path):
    """A line " = Title = " begins an article, " = = Section = = " does not.

    No character is lost.
    """
    (tmp_path / "w.txt").write_text(WIKI)
    prepare(request(tmp_path, "pretrain/mine:wikitext=w.txt"))
    ids = every_token(tmp_path / "out" / "mine")
    articles = BYTE.decode(ids).split("<|endoftext|>")
    assert [re.match(r" = (\w+ \w+) = \n", article)[1] for article in articles[:-1]] == [
        "Tom Cat",
        "Mia Dog",
    ]
    assert "".join(articles) == WIKI.removeprefix(" \n")
    assert list(wikitext_articles([" = X = \n", " a \n", " = = Y = = \n", " = Z = \n"])) == [
        " = X = \n a \n = = Y = = \n",
        " = Z = \n",
    ]


def test_a_name_decides_nothing_about_the_form_of_the_text(tmp_path):
    """A file of one's own is cut at headings where its source says so, not where it is named so."""
    (tmp_path / "w.txt").write_text(WIKI)
    prepare(request(tmp_path, "pretrain/my-wikitext-notes=w.txt"))
    ids = every_token(tmp_path / "out" / "my-wikitext-notes")
    assert BYTE.decode(ids) == WIKI + "<|endoftext|>"


@pytest.mark.parametrize(
    "text, cap, format",
    [
        ("wikitext-103", None, "wikitext"),
        ("tinystories:5", 5, "plain"),
        ("pretrain/wikitext-103=w.txt", None, "wikitext"),
        ("pretrain/wikitext-103:plain=w.txt", None, "plain"),
        ("pretrain/mine:9=w.txt", 9, "plain"),
        ("pretrain/mine:wikitext=w.txt", None, "wikitext"),
        ("pretrain/mine:1000:wikitext=w.txt", 1000, "wikitext"),
    ],
)
def test_a_source_has_the_cap_and_the_format_that_it_names_else_its_presets(text, cap, format):
    """A preset's name keeps the preset's format, with local files too."""
    source = Source.parse(text, "all", "here")
    assert (source.stage, source.cap, source.format) == ("pretrain", cap, format)
    assert source.files == (["here/w.txt"] if "=" in text else [])


@pytest.mark.parametrize("options", ["many", "", "-1", "1:2", "wikitext:plain", "1.5", "wiki"])
def test_an_option_that_is_no_number_and_no_format_is_an_error_that_shows_the_form(options):
    """A cap that is ignored would be a run of days instead of minutes."""
    text = f"pretrain/mine:{options}=w.txt"
    fails(lambda: Source.parse(text, "all", "."), text, "[:cap][:format]", "wikitext")


def test_another_format_of_the_same_file_is_other_data(tmp_path):
    """The request of the manifest must tell the two apart, or the old shards would be kept."""
    (tmp_path / "w.txt").write_text(WIKI)
    prepare(request(tmp_path, "pretrain/mine=w.txt"))
    assert every_token(tmp_path / "out" / "mine").count(EOS) == 1
    prepare(request(tmp_path, "pretrain/mine:wikitext=w.txt"))
    assert every_token(tmp_path / "out" / "mine").count(EOS) == 2


def test_marked_documents_are_separated_under_a_wikitext_name_too(tmp_path):
    """Lines <|endoftext|> separate documents in the format wikitext too.

    A stand-in for WikiText-103 is prepared under its name.
    """
    (tmp_path / "w.txt").write_text("".join(text + "\n<|endoftext|>\n" for text in TEXTS))
    prepare(request(tmp_path, "pretrain/wikitext-103=w.txt"))
    assert len(documents_of(tmp_path / "out" / "wikitext-103")) == 250


def test_spelled_special_tokens_in_text_and_blank_documents_make_no_eos(tmp_path):
    """Only a line of its own separates documents; inside a line <|endoftext|> is text.

    Documents of white space are none.
    """
    (tmp_path / "x.txt").write_text(
        "a <|endoftext|> b <|end|>\n<|endoftext|>\n \n<|endoftext|>\n\n<|endoftext|>\nlast"
    )
    prepare(request(tmp_path, "pretrain/mine=x.txt"))
    ids = every_token(tmp_path / "out" / "mine")
    assert ids.count(EOS) == 2 and END not in ids


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_cap_takes_the_first_documents(tmp_path, kind):
    """name:N is for quick runs: N documents, no more, from the start."""
    prepare(request(tmp_path, f"pretrain/mine:7={write_source(tmp_path, kind)}"))
    ids = every_token(tmp_path / "out" / "mine")
    assert [text.strip() for text in BYTE.decode(ids).split("<|endoftext|>")[:-1]] == TEXTS[:7]


def test_a_parquet_file_without_text_is_an_error(tmp_path):
    """The wrong column, or a column with holes, in words."""
    parquet(tmp_path / "x.parquet", {"content": ["a"]})
    fails(lambda: prepare(request(tmp_path, "pretrain/mine=x.parquet")), "x.parquet", "text")
    parquet(tmp_path / "y.parquet", {"text": ["a", None]})
    fails(lambda: prepare(request(tmp_path, "pretrain/mine=y.parquet")), "y.parquet", "text")


UNKNOWN = [
    ("nosuch", {}),
    ("nosuch", {"stage": "sft"}),
    ("nosuch", {"stage": "pretrain"}),
    ("eval/nosuch", {}),
    ("mine=x.txt", {}),
    ("poetry/mine=x.txt", {}),
    ("../up=x.txt", {}),
    ("mine:many=x.txt", {}),
    (".hidden=x.txt", {}),
    ("mine:0=x.txt", {"stage": "pretrain"}),
]


@pytest.mark.parametrize("source, keys", UNKNOWN)
def test_an_unknown_preset_or_stage_is_an_error_in_words(tmp_path, source, keys, no_network):
    """A misspelt name must list what there is, without a traceback and without the network."""
    (tmp_path / "x.txt").write_text("text")
    fails(
        lambda: prepare(request(tmp_path, source, **keys)),
        re.split("[:=/]", source)[-2 if "=" in source and ":" not in source else 0].strip("."),
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / "up").exists()


HUB = {  # name: (stage, id, config, split), as published
    "wikitext-103": ("pretrain", "Salesforce/wikitext", "wikitext-103-raw-v1", "train"),
    "tinystories": ("pretrain", "roneneldan/TinyStories", None, "train"),
    "alpaca": ("sft", "tatsu-lab/alpaca", None, "train"),
    "hh-rlhf": ("dpo", "Anthropic/hh-rlhf", None, "train"),
    "gsm8k": ("verifier", "openai/gsm8k", "main", "train"),
    "gsm8k-test": ("eval", "openai/gsm8k", "main", "test"),
    "wikitext-2": ("eval", "Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "wikitext-2-valid": ("eval", "Salesforce/wikitext", "wikitext-2-raw-v1", "validation"),
    "sst2": ("eval", "stanfordnlp/sst2", None, "validation"),
    "sst2-train": ("eval", "stanfordnlp/sst2", None, "train"),
    "dialogsum": ("eval", "knkarthick/dialogsum", None, "test"),
}


COLUMNS = {
    "Salesforce/wikitext": {
        "text": ["", " = Tom Cat = \n", "", " He sat . \n", " = Mia Dog = \n", " She ran . \n"]
    },
    "roneneldan/TinyStories": {"text": TEXTS[:9]},
    "tatsu-lab/alpaca": {
        "instruction": [f"Say {i}" for i in range(60)],
        "input": [""] * 60,
        "output": ["a"] * 60,
        "text": ["..."] * 60,
    },
    "Anthropic/hh-rlhf": {
        "chosen": [f"\n\nHuman: q{i}\n\nAssistant: a" for i in range(60)],
        "rejected": [f"\n\nHuman: q{i}\n\nAssistant: b" for i in range(60)],
    },
    "openai/gsm8k": {"question": [f"q{i}" for i in range(60)], "answer": ["#### 1"] * 60},
    "stanfordnlp/sst2": {"idx": [0, 1], "sentence": ["good ", "bad "], "label": [1, 0]},
    "knkarthick/dialogsum": {"id": ["1"], "dialogue": ["d"], "summary": ["s"], "topic": ["t"]},
}


def test_each_preset_asks_the_hub_for_its_id_config_split_and_pinned_revision(
    tmp_path, monkeypatch, no_network
):
    """A revision is 40 hex digits, or the data could change under a paper's numbers.

    No code of the hub is ever run.
    """
    import datasets

    calls = []

    def load_dataset(path, name=None, **keys):
        calls.append((path, name, keys))
        return datasets.Dataset.from_dict(COLUMNS[path])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert set(PRESETS) == set(HUB)
    for preset, (stage, path, config, split) in HUB.items():
        prepare(request(tmp_path, preset))
        asked_path, asked_config, keys = calls[-1]
        assert (asked_path, asked_config) == (path, config)
        assert set(keys) == {"split", "revision"} and keys["split"] == split
        assert re.fullmatch("[0-9a-f]{40}", keys["revision"])
        manifest = json.loads((tmp_path / "out" / preset / f"manifest_{stage}.json").read_text())
        assert manifest["request"]["from"] == [path, config, keys["revision"], split]
        assert manifest["sha256"]
    assert len(calls) == len(HUB)
    assert len(documents_of(tmp_path / "out" / "tinystories")) == 9
    assert len(read_jsonl(str(tmp_path / "out/gsm8k-test/problems_test.jsonl"))) == 60


def test_all_stages_are_all_presets_and_a_stage_is_its_own(tmp_path, monkeypatch):
    """--stage=all on the login node fetches everything, once; --stage=eval only what eval needs."""
    import datasets

    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda path, name=None, **keys: datasets.Dataset.from_dict(COLUMNS[path]),
    )
    prepare(request(tmp_path, stage="eval"))
    assert set(os.listdir(tmp_path / "out")) == {
        name for name, (stage, *_) in HUB.items() if stage == "eval"
    }
    prepare(request(tmp_path, stage="all"))
    assert set(os.listdir(tmp_path / "out")) == set(HUB)


@pytest.mark.parametrize("preset", ["wikitext-103", "alpaca", "gsm8k-test"])
def test_without_network_the_error_names_a_local_way_that_works(tmp_path, monkeypatch, preset):
    """Never a silent skip; and the hint, followed to the letter, must lead out of it."""
    import datasets

    def unreachable(*args, **keys):
        raise ConnectionError("Couldn't reach the Hugging Face Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    said = fails(
        lambda: prepare(request(tmp_path, preset)), HUB[preset][1], "Couldn't reach", "local file"
    )
    assert not (tmp_path / "out").exists()
    columns = COLUMNS[HUB[preset][1]]
    rows = zip(*columns.values(), strict=True)
    jsonl(tmp_path / "x.jsonl", *(dict(zip(columns, row, strict=True)) for row in rows))
    prepare(request(tmp_path, re.search(r"--sources=(\S+)", said)[1].replace("FILE", "x.jsonl")))
    assert (tmp_path / "out" / preset / f"manifest_{HUB[preset][0]}.json").is_file()


@pytest.mark.parametrize(
    "name, title, last",
    [
        ("wikitext2_raw_valid.txt.gz", "Homarus gammarus", "Gold dollar"),
        ("wikitext2_raw_test.txt.gz", "Robert Boulter", None),
    ],
)
def test_wikitext_2_is_cut_into_its_articles(name, title, last):
    """There are about 60 articles in each, and no character is lost.

    A line of a formula in the test split looks like a heading.
    """
    with open_text(real(name)) as f:
        text = f.read()
    articles = list(filter(str.strip, wikitext_articles(text.splitlines(keepends=True))))
    assert 60 <= len(articles) <= 62 and articles[0].startswith(f" = {title} = \n")
    assert "".join(articles).replace("\n", "") == text.replace("\n", "").removeprefix(" ")
