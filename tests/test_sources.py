"""Sources give their documents whole, whatever form they come in."""

import gzip
import io
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
    quick,
    real,
    request,
    tokens_of,
    write_source,
)
from helpers import BYTE, END, EOS, fails
from hypothesis import given
from hypothesis import strategies as st

from corpus.sources import PRESETS, Source, documents
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
    assert list(documents([" = X = \n", " a \n", " = = Y = = \n", " = Z = \n"], True)) == [
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


def test_spelled_special_tokens_in_text_and_blank_documents_make_no_token(tmp_path):
    """<|endoftext|> alone ends a document; the other names are text. White space is no document."""
    (tmp_path / "x.txt").write_text(
        "a <|endoftext|> b <|end|>\n<|endoftext|>\n \n<|endoftext|>\n\n<|endoftext|>\nlast"
    )
    prepare(request(tmp_path, "pretrain/mine=x.txt"))
    ids = every_token(tmp_path / "out" / "mine")
    assert ids.count(EOS) == 3 and END not in ids


@given(
    docs=st.lists(st.text("ab \n", min_size=1).filter(str.strip), min_size=1, max_size=6),
    breaks=st.lists(st.booleans(), min_size=6, max_size=6),
)
@quick
def test_the_mark_of_gpt2_ends_a_document_wherever_it_stands(docs, breaks):
    """The convention of GPT-2's files: no character of a document is lost but blanks at its ends.

    A mark on a line of its own takes the line's end with it.
    """
    ends = ["<|endoftext|>" + "\n" * on_its_own for on_its_own in breaks]
    text = "".join(doc + end for doc, end in zip(docs, ends, strict=False))
    found = list(filter(str.strip, documents(io.StringIO(text))))
    assert [doc.strip() for doc in found] == [doc.strip() for doc in docs]
    of_record = list(filter(str.strip, documents([text])))
    assert [doc.strip() for doc in of_record] == [doc.strip() for doc in docs]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_a_mark_inside_a_line_ends_a_document_in_every_form(tmp_path, kind):
    """Learnt as 13 characters, it would teach a model to spell the mark and never to stop."""
    texts = ["one<|endoftext|>two", "three<|endoftext|>", "<|endoftext|><|endoftext|>four, five"]
    columns = {"text": texts}
    if kind == "txt":
        (tmp_path / "x.txt").write_text("<|endoftext|>".join(texts))
    elif kind == "csv":
        quoted = "".join(f'"{text}"\r\n' for text in texts)
        (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbftext\r\n" + quoted.encode())
    elif kind == "parquet":
        parquet(tmp_path / "x.parquet", columns)
    else:
        jsonl(tmp_path / "x.jsonl", *({"text": text} for text in texts))
    prepare(request(tmp_path, f"pretrain/mine=x.{kind}"))
    ids = every_token(tmp_path / "out" / "mine")
    assert BYTE.decode(ids).split("<|endoftext|>") == ["one", "two", "three", "four, five", ""]


def test_a_mark_inside_a_line_of_wikitext_ends_an_article(tmp_path):
    """The format wikitext has both headings and marks."""
    lines = [" = A = \n", "one<|endoftext|>two\n", " = B = \n", "three"]
    assert list(documents(lines, True)) == [" = A = \none\n", "two\n", " = B = \nthree\n"]


@pytest.mark.parametrize("whole", [False, True], ids=["a line a record", "one record"])
def test_wikitext_in_records_is_cut_at_headings_too(tmp_path, whole):
    """The hub's own file of WikiText has a line in each record: a line is no document."""
    lines = WIKI.splitlines(keepends=True)
    parquet(tmp_path / "x.parquet", {"text": [WIKI] if whole else lines})
    (tmp_path / "w.txt").write_text(WIKI)
    prepare(request(tmp_path, "pretrain/a:wikitext=x.parquet", "pretrain/b:wikitext=w.txt"))
    prepare(request(tmp_path, "eval/a:wikitext=x.parquet", "eval/b:wikitext=w.txt"))
    out = tmp_path / "out"
    assert every_token(out / "a") == every_token(out / "b")
    assert (out / "a/test.txt").read_text() == (out / "b/test.txt").read_text() == WIKI


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_cap_takes_the_first_documents(tmp_path, kind):
    """name:N is for quick runs: N documents, no more, from the start."""
    prepare(request(tmp_path, f"pretrain/mine:7={write_source(tmp_path, kind)}"))
    ids = every_token(tmp_path / "out" / "mine")
    assert [text.strip() for text in BYTE.decode(ids).split("<|endoftext|>")[:-1]] == TEXTS[:7]


def test_a_parquet_file_without_text_is_an_error(tmp_path):
    """The wrong column, or one that holds no text, in words with what is there."""
    parquet(tmp_path / "x.parquet", {"content": ["a"], "id": [1]})
    said = fails(lambda: prepare(request(tmp_path, "pretrain/mine=x.parquet")), "x.parquet", "text")
    assert "record 1" in said and "'content': 'a'" in said
    parquet(tmp_path / "y.parquet", {"text": [7, 8]})
    fails(
        lambda: prepare(request(tmp_path, "pretrain/mine=y.parquet")),
        "y.parquet",
        "found {'text': 7}",
    )
    parquet(tmp_path / "z.parquet", {"text": [None, None]})
    fails(lambda: prepare(request(tmp_path, "pretrain/mine=z.parquet")), "mine", "no text")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_record_whose_text_is_null_is_dropped_and_counted(tmp_path, kind, capsys):
    """One hole in a million records must neither stop the preparation nor pass in silence."""
    texts = ["one", None, "two", None]
    if kind == "parquet":
        parquet(tmp_path / "x.parquet", {"text": texts})
    else:
        jsonl(tmp_path / "x.jsonl", *({"text": text} for text in texts))
    prepare(request(tmp_path, f"pretrain/mine=x.{kind}"))
    assert f"x.{kind}: 2 of 4 records dropped" in capsys.readouterr().out
    ids = every_token(tmp_path / "out" / "mine")
    assert BYTE.decode(ids) == "one<|endoftext|>two<|endoftext|>"


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
    ("pretrain/mine.7.part=x.txt", {}),
    ("mine:0=x.txt", {"stage": "pretrain"}),
    ("pretrain/toy=x.txt", {}),
    ("sft/mine:wikitext=x.txt", {}),
    ("verifier/mine:plain=x.txt", {}),
]


TWICE = [
    ("pretrain/a=x.txt", "pretrain/a=y.txt"),
    ("pretrain/a=x.txt", "pretrain/a:5=x.txt"),
    ("tinystories", "pretrain/tinystories=x.txt"),
    ("toy", "toy"),
    ("pretrain/a=x.txt", "pretrain/a=x.txt"),
]


@pytest.mark.parametrize("sources", TWICE)
def test_a_name_that_is_given_twice_is_refused_before_anything_is_made(
    tmp_path, sources, no_network
):
    """The second would take the folder of the first, and half of the data would be gone."""
    for name in ("x.txt", "y.txt"):
        (tmp_path / name).write_text(name * 50)
    fails(lambda: prepare(request(tmp_path, *sources)), repr(sources[1]), "before")
    assert not (tmp_path / "out").exists()
    prepare(request(tmp_path, "pretrain/a=x.txt", "eval/a=x.txt"))  # other files of one folder
    assert {"test.txt", "train_000.bin"} <= set(os.listdir(tmp_path / "out" / "a"))


TABLES = {
    "x.csv": 'question,answer\n"what, ""he"" said\nthen?",#### 1\n\nb?,#### 2\n',
    "x.CSV.gz": 'question;answer\r\n"what, ""he"" said\nthen?";#### 1\r\nb?;#### 2\n',
    "x.tsv": 'question\tanswer\nwhat, "he" said\t#### 1\nb?\t#### 2\n',
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("stage", ["sft", "verifier", "eval"])
def test_a_table_with_a_header_is_read_in_every_stage(tmp_path, name, stage):
    """A .csv of a spreadsheet, quoted or with semicolons, is records and never plain text."""
    content = "\ufeff" + TABLES[name] + "c?\t#### 3\n".replace("\t", TABLES[name][8])
    raw = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    prepare(request(tmp_path, f"{stage}/mine={name}"))
    files = (tmp_path / "out" / "mine").glob("*.jsonl")
    text = json.dumps([row for path in files for row in read_jsonl(str(path))])
    asked = 'what, "he" said' + ("" if name == "x.tsv" else "\nthen?")
    assert json.dumps(asked) in text and text.count("?") == 3 - (name == "x.tsv")


def test_a_table_for_pretraining_gives_its_column_text_and_no_other(tmp_path, capsys):
    """Trained on as text, a .csv would teach commas and row numbers."""
    (tmp_path / "x.csv").write_text('id,text\n1,"a, b"\n2,c\n')
    (tmp_path / "y.tsv").write_text("id\ttext\n1\td\n")
    prepare(request(tmp_path, "pretrain/mine=x.csv;y.tsv"))
    ids = every_token(tmp_path / "out" / "mine")
    assert BYTE.decode(ids).split("<|endoftext|>") == ["a, b", "c", "d", ""]
    assert capsys.readouterr().out.count("ignored: id\n") == 2  # once a file
    (tmp_path / "z.csv").write_text("id,story\n1,a\n")
    fails(lambda: prepare(request(tmp_path, "pretrain/z=z.csv")), "z.csv", "story", '"text"')


BAD_TABLES = [
    ("x.csv", "text,b\n1,2\n1,2,3\n", [":3", "3 cells", "text, b"]),
    ("x.csv", 'text,b\n1,"2\n', ["x.csv", "table"]),
    ("x.tsv", "text\tb\n1\n", [":2", "1 cells"]),
    ("x.csv", "text,text\n1,2\n", ["text, text", "twice"]),
    ("x.csv", "\ntext,b\n1,2\n", ["x.csv"]),
    ("x.csv", "Once upon a time, there was\na cat.\n", ["x.csv:2"]),
]


@pytest.mark.parametrize("name, content, words", BAD_TABLES)
@pytest.mark.parametrize("stage", ["pretrain", "sft", "eval"])
def test_a_table_that_does_not_hold_together_is_refused_by_its_line(
    tmp_path, name, content, words, stage
):
    """A cell too many means that a quote is missing: what follows would be other fields."""
    (tmp_path / name).write_text(content)
    fails(lambda: prepare(request(tmp_path, f"{stage}/mine={name}")), *words)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_every_table_of_an_evaluation_is_read(tmp_path, n):
    """Of several files the first alone was read, and the test set was a part of itself."""
    for i in range(n):
        (tmp_path / f"{i}.tsv").write_text(f"sentence\tlabel\nfine {i}\t1\nbad {i}\t0\n")
    files = ";".join(f"{i}.tsv" for i in range(n))
    prepare(request(tmp_path, f"eval/mine={files}"))
    rows = read_jsonl(str(tmp_path / "out/mine/test.jsonl"))
    assert [row["sentence"] for row in rows] == [
        f"{w} {i}" for i in range(n) for w in ("fine", "bad")
    ]


def test_text_and_records_make_no_evaluation_set_together(tmp_path):
    """JSON as a part of the text would change its perplexity; a cap of a text means nothing."""
    (tmp_path / "a.txt").write_text("first")
    jsonl(tmp_path / "b.jsonl", {"dialogue": "a", "summary": "b"})
    for files in ("a.txt;b.jsonl", "b.jsonl;a.txt"):
        fails(
            lambda files=files: prepare(request(tmp_path, f"eval/w={files}")),
            "source w",
            "two sources",
        )
    fails(lambda: prepare(request(tmp_path, "eval/w:9=a.txt")), "cap")
    (tmp_path / "c.txt").write_text("\ufeff \n")
    fails(lambda: prepare(request(tmp_path, "eval/w=c.txt")), "no text")


CONTENT = {  # name of a file -> its content, and whether it holds records
    "notes.md": ("# Notes\n[a link](x)\n", False),
    "book": ("Once upon a time.\n", False),
    "code.py": ("{}\n[1]\n", False),
    "[1] link.rst": ("[1] a note\n{curly}\n", False),
    "lines.txt": ('{"text": "one"}\n{"text": "two"}\n', True),
    "lines.data": ('\n{"text": "one"}\n{"text": "two"}\n', True),
    "list.dump": ('[\n {"text": "one"},\n {"text": "two"}]\n', True),
    "list": ('[{"text": "one"}, {"text": "two"}]', True),
    "lines.json.gz": ('{"text": "one"}\n{"text": "two"}\n', True),
    "lines.NDJSON": ('{"text": "one"}\r\n\r\n{"text": "two"}\r\n', True),
    "list.jsonl": ('\ufeff[{"text": "one"},\n\n{"text": "two"}]\n', True),
}


@pytest.mark.parametrize("name", CONTENT)
def test_the_content_decides_where_the_name_says_nothing(tmp_path, name):
    """JSON under another suffix is never learnt as text, nor text refused for its name."""
    content, are_records = CONTENT[name]
    raw = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    prepare(request(tmp_path, f"pretrain/mine={name}"))
    text = BYTE.decode(every_token(tmp_path / "out" / "mine"))
    assert text == (
        "one<|endoftext|>two<|endoftext|>" if are_records else content + "<|endoftext|>"
    )


def test_what_is_no_text_is_refused_whatever_its_name(tmp_path):
    """Programs, archives and UTF-16 would be learnt as noise."""
    (tmp_path / "x.txt").write_text("a UTF-16 text", encoding="utf-16-le")
    (tmp_path / "y.txt").write_text("another", encoding="utf-16")
    (tmp_path / "z.zip").write_bytes(b"PK\x03\x04\x14\x00\x00\x00text")
    (tmp_path / "folder").mkdir()
    for name in ("x.txt", "y.txt", "z.zip", "folder"):
        for stage in ("pretrain", "sft", "eval"):
            fails(lambda s=stage, n=name: prepare(request(tmp_path, f"{s}/mine={n}")), name)


def test_a_parquet_or_gzip_file_is_known_by_its_first_bytes(tmp_path):
    """Downloads lose their suffixes."""
    parquet(tmp_path / "train-00000", {"text": ["one"]})
    (tmp_path / "more.txt").write_bytes(gzip.compress(b"two"))
    prepare(request(tmp_path, "pretrain/mine=train-00000;more.txt"))
    ids = every_token(tmp_path / "out" / "mine")
    assert BYTE.decode(ids) == "one<|endoftext|>two<|endoftext|>"


def test_the_line_ends_of_windows_are_line_ends(tmp_path):
    """A mark, a heading and a column's name may stand before a carriage return."""
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone\r\n<|endoftext|>\r\ntwo\r\n")
    (tmp_path / "w.txt").write_bytes(WIKI.replace("\n", "\r\n").encode())
    prepare(request(tmp_path, "pretrain/x=x.txt", "pretrain/w:wikitext=w.txt"))
    ids = every_token(tmp_path / "out" / "x")
    assert BYTE.decode(ids) == "one\n<|endoftext|>two\n<|endoftext|>"
    assert every_token(tmp_path / "out" / "w").count(EOS) == 2


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
    articles = list(filter(str.strip, documents(text.splitlines(keepends=True), True)))
    assert 60 <= len(articles) <= 62 and articles[0].startswith(f" = {title} = \n")
    assert "".join(articles).replace("\n", "") == text.replace("\n", "").removeprefix(" ")
