"""data.py prepares each stage; bad input ends in words and leaves what was there as it was."""

import datetime
import gzip
import hashlib

import pytest
from corpus_helpers import RANKS, WIKI, jsonl, needs_ranks, parquet, real, request, snapshot
from helpers import REAL, fails

from configurator import UserError
from corpus.records import load_records, prompt_of
from corpus.shards import read_shard
from corpus.sources import STAGES
from corpus.tokenizer import load_tokenizer
from data import DataConfig, main, prepare
from runtime.files import read_jsonl, write_jsonl


@pytest.mark.parametrize(
    "stage, row, least",
    [
        ("sft", {"question": "q", "answer": "a"}, 2),
        ("dpo", {"prompt": "p", "chosen": "c", "rejected": "r"}, 2),
        ("verifier", {"question": "q", "answer": "#### 1"}, 3),
    ],
)
def test_a_data_set_of_one_record_is_refused_in_words(tmp_path, stage, row, least):
    """There is nothing to hold out, and the user must be told so when the data is made.

    A missing file when training begins would come too late.
    """
    write_jsonl(str(tmp_path / "one.jsonl"), [row, row])
    argv = [f"--sources={stage}/one={tmp_path / 'one.jsonl'}", f"--data_dir={tmp_path / 'data'}"]
    words = f"1 usable records of 1 prompts, too few to hold some out .*at least {least} different"
    with pytest.raises(UserError, match=words):
        main(argv)
    assert not (tmp_path / "data" / "one").exists()


SCHEMA_OF = [
    ("sft", {"instruction": "Say {}", "input": "", "output": "So {}"}),
    ("dpo", {"prompt": "Say {}", "chosen": "yes", "rejected": "no"}),
    ("verifier", {"question": "What is {}?", "answer": "#### {}"}),
]


@pytest.mark.parametrize("stage, row", SCHEMA_OF)
def test_records_are_cut_by_prompt_into_disjoint_splits(tmp_path, stage, row, no_network):
    """Two answers to one prompt go the same way.

    Only problems get a part for the verifier; nothing is lost.
    """
    rows = []
    for i in range(300):
        first = {key: text.format(i) for key, text in row.items()}
        answer = next(key for key in ("output", "chosen", "answer") if key in row)
        rows += [first, {**first, answer: "again " + first[answer]}]
    jsonl(tmp_path / "x.jsonl", *rows)
    prepare(request(tmp_path, f"{stage}/mine=x.jsonl"))
    kind = "problems" if stage == "verifier" else stage
    names = ["train", "val"] + ["verifier"] * (stage == "verifier")
    splits = {split: load_records("mine", str(tmp_path / "out"), kind, split) for split in names}
    assert sum(map(len, splits.values())) == 600 and all(splits.values())
    prompts = [{prompt_of(record) for record in part} for part in splits.values()]
    assert len(set.union(*prompts)) == sum(map(len, prompts)) == 300
    share = {split: len(part) / 600 for split, part in splits.items()}
    expected = {"train": 0.95, "val": 0.05}
    if stage == "verifier":
        expected = {"train": 0.7, "val": 0.05, "verifier": 0.25}
    assert share == pytest.approx(expected, abs=0.05)
    assert (tmp_path / "out/mine/problems_verifier.jsonl").exists() == (stage == "verifier")


@pytest.mark.parametrize("n", [2, 12, 40])
def test_a_small_file_of_records_has_something_in_train_and_in_val(tmp_path, n):
    """A notes.jsonl of your own, as in the docstring, must be enough for a stage."""
    jsonl(tmp_path / "notes.jsonl", *({"instruction": f"Say {i}", "output": "a"} for i in range(n)))
    prepare(request(tmp_path, "mine=notes.jsonl", stage="sft"))
    assert all(
        load_records("mine", str(tmp_path / "out"), "sft", split) for split in ("train", "val")
    )


def test_records_may_come_as_parquet(tmp_path):
    """Hub data sets are published as .parquet, which may be read for every stage."""
    columns = {"question": [f"q{i}" for i in range(100)], "answer": ["#### 1"] * 100}
    parquet(tmp_path / "x.parquet", columns)
    prepare(request(tmp_path, "verifier/mine=x.parquet"))
    assert len(load_records("mine", str(tmp_path / "out"), "problems", "train")) > 50


def test_the_chats_of_a_folder_with_problems_alone_are_its_problems(tmp_path):
    """SFT on GSM8K: question and answer become a chat."""
    jsonl(tmp_path / "x.jsonl", *({"question": f"q{i}", "answer": "#### 1"} for i in range(100)))
    prepare(request(tmp_path, "verifier/mine=x.jsonl"))
    assert load_records("mine", str(tmp_path / "out"), "sft", "train")[0]["messages"][1] == {
        "role": "assistant",
        "content": "#### 1",
    }
    fails(
        lambda: load_records("mine", str(tmp_path / "out"), "dpo", "train"),
        "mine",
        "dpo",
        "data.py --stage=dpo --sources=mine=FILE",
    )


def test_eval_data_keep_their_form(tmp_path):
    """A test set is not cut, shuffled or cleaned.

    Text stays as it is; problems and labelled sentences become JSON lines.
    """
    (tmp_path / "w.txt").write_text(WIKI)
    jsonl(
        tmp_path / "p.jsonl",
        {"question": "q", "answer": "#### 1"},
        {"question": "q", "answer": "#### 1"},
    )
    (tmp_path / "s.tsv").write_text('sentence\tlabel\na "fine film \t1\nbad \t0\n')
    jsonl(tmp_path / "d.jsonl", {"dialogue": "a", "summary": "b"})
    prepare(request(tmp_path, "w=w.txt", "p=p.jsonl", "s=s.tsv", "d=d.jsonl", stage="eval"))
    out = tmp_path / "out"
    assert (out / "w/test.txt").read_text() == WIKI
    assert (
        load_records("p", str(out), "problems", "test")
        == [{"question": "q", "answer": "#### 1"}] * 2
    )
    assert read_jsonl(str(out / "s/test.jsonl")) == [
        {"sentence": 'a "fine film ', "label": "1"},
        {"sentence": "bad ", "label": "0"},
    ]
    assert read_jsonl(str(out / "d/test.jsonl")) == [{"dialogue": "a", "summary": "b"}]


def test_a_column_that_json_has_no_form_for_is_kept_as_text(tmp_path):
    """Parquet files have dates and bytes beside the fields that an evaluation reads."""
    columns = {"sentence": ["fine"], "label": [1], "on": [datetime.date(2026, 1, 2)], "raw": [b"a"]}
    parquet(tmp_path / "x.parquet", columns)
    prepare(request(tmp_path, "eval/s=x.parquet"))
    (row,) = read_jsonl(str(tmp_path / "out/s/test.jsonl"))
    assert row == {"sentence": "fine", "label": 1, "on": "2026-01-02", "raw": "b'a'"}


def test_what_a_table_of_a_test_set_holds_is_checked_before_it_is_written_as_text(tmp_path):
    """Bytes would be scored as b'...', and NaN inside a list makes a file that nobody can read."""
    columns = {"sentence": ["fine"], "label": [1], "scores": [[0.5, float("nan"), None]]}
    parquet(tmp_path / "x.parquet", columns)
    prepare(request(tmp_path, "eval/s=x.parquet"))
    (row,) = read_jsonl(str(tmp_path / "out/s/test.jsonl"))
    assert row["scores"] == [0.5, None, None]
    parquet(tmp_path / "y.parquet", columns | {"sentence": [b"fine"]})
    fails(lambda: prepare(request(tmp_path, "eval/t=y.parquet")), "record 1", "b'fine'")


def test_the_marks_of_documents_are_no_part_of_a_text_to_evaluate(tmp_path, capsys):
    """Scored as 13 characters, they would be the most surprising words of the text."""
    for name, text in (("a", "one\n<|endoftext|>\ntwo<|endoftext|>three\n"), ("b", "one\n \n")):
        (tmp_path / "x.txt").write_text(text)
        prepare(request(tmp_path, f"eval/{name}=x.txt"))
    assert (tmp_path / "out/a/test.txt").read_text() == "one\n\ntwo\nthree\n"
    assert (tmp_path / "out/b/test.txt").read_text() == "one\n \n"
    assert capsys.readouterr().out.count("2 marks <|endoftext|>") == 1


def test_no_file_of_an_eval_source_is_left_out(tmp_path):
    """Half a test set without a word would be another test set."""
    (tmp_path / "a.txt").write_text("first "), (tmp_path / "b.txt").write_text("second")
    try:
        prepare(request(tmp_path, "w=a.txt;b.txt", stage="eval"))
    except UserError:
        return  # to refuse two files is as good
    assert (tmp_path / "out/w/test.txt").read_text() == "first second"


BAD_SOURCES = {
    "missing file": ("gone.jsonl", None, ["does not exist"]),
    "empty file": ("x.jsonl", b"", ["empty"]),
    "bad JSON": ("x.jsonl", b'{"a"\n', [":1"]),
    "wrong schema": ("x.jsonl", b'{"colour": "red"}\n', ["record 1"]),
    "not UTF-8": ("x.jsonl", b'{"text": "\xff"}\n', ["UTF-8"]),
    "torn gzip": ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9)[:-12], []),
    "blank": ("x.jsonl", b"\n \n", []),
    "no records": ("x.json", b"[]", []),
    "lone surrogate": (
        "x.jsonl",
        b'{"text": "\\ud800", "question": "\\ud800", "answer": "#### 1", "prompt": "q", '
        b'"chosen": "a\\ud800", "rejected": "b", "label": 1}\n' * 2,
        [],
    ),
}


@pytest.mark.parametrize(
    "stage, fault",
    [(stage, fault) for stage in STAGES for fault in BAD_SOURCES],
)
def test_a_bad_source_is_an_error_that_names_it_and_leaves_the_prepared_folder(
    tmp_path, stage, fault
):
    """There is never a traceback, a silent skip or half a folder.

    What was prepared before can still be trained on.
    """
    name, content, words = BAD_SOURCES[fault]
    good = {
        "text": "some text",
        "question": "q",
        "answer": "#### 1",
        "prompt": "p",
        "chosen": "a",
        "rejected": "b",
    }
    jsonl(
        tmp_path / "good.jsonl",
        *({**good, "question": f"q{i}", "prompt": f"p{i}"} for i in range(50)),
    )
    if stage == "sft":
        jsonl(tmp_path / "good.jsonl", *({"question": f"q{i}", "answer": "a"} for i in range(50)))
    prepare(request(tmp_path, f"{stage}/mine=good.jsonl"))
    before = snapshot(tmp_path / "out")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    try:
        prepare(request(tmp_path, f"{stage}/mine={name}"))
    except UserError as error:
        assert ("mine" in str(error) or name in str(error)) and all(
            word in str(error) for word in words
        )
        assert snapshot(tmp_path / "out") == before
    else:
        assert fault == "lone surrogate", "no error"  # replaced by U+FFFD it may be kept
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("stage", ["pretrain", "sft", "eval"])
@pytest.mark.parametrize(
    "name, content",
    [
        ("x.txt", b"caf\xe9 au lait\n"),
        ("x.tsv", b"sentence\tlabel\n\xe9\t1\n"),
        ("x.parquet", b"PAR1 not really"),
        ("x.txt.gz", b"no gzip"),
    ],
    ids=["Latin-1 text", "Latin-1 table", "damaged parquet", "no gzip"],
)
def test_other_bad_files_are_errors_too(tmp_path, stage, name, content):
    """Text of another encoding and a damaged parquet file, for each reader."""
    (tmp_path / name).write_bytes(content)
    fails(lambda: prepare(request(tmp_path, f"{stage}/mine={name}")), name)


def test_an_unknown_stage_of_the_command_lists_the_stages():
    """--stage=train is a likely slip."""
    fails(lambda: DataConfig(stage="train"), "train", *STAGES)


@pytest.mark.parametrize("key", ["seed", "toy_stories", "toy_problems", "toy_test"])
def test_every_number_has_bounds(key):
    """A number that means nothing is refused by name, together with all the others."""
    fails(lambda: DataConfig(**{key: -1}), f"{key} must be at least", "got -1")
    fails(lambda: DataConfig(seed=-1, toy_test=0, stage="train"), "seed", "toy_test", "stage")


@needs_ranks
def test_a_local_ranks_file_is_copied_to_the_data_folder_for_training_nodes(tmp_path, no_network):
    """Prepared once with a path, --tokenizer=gpt2 then works where there is nothing else."""
    (tmp_path / "x.txt").write_text("hello world " * 40)
    prepare(request(tmp_path, "pretrain/mine=x.txt", tokenizer=str(RANKS)))
    tokenizer = load_tokenizer("gpt2", str(tmp_path / "out"))
    assert read_shard(str(tmp_path / "out/mine/train_000.bin"), tokenizer)[:2].tolist() == [
        31373,
        995,
    ]


def test_ranks_from_the_cache_of_tiktoken_are_written_as_the_published_file(
    tmp_path, monkeypatch, gpt2
):
    """--tokenizer=gpt2 on the login node leaves the very file of OpenAI beside the shards.

    Without network it names another way.
    """
    import tiktoken

    def unreachable(name):
        raise ConnectionError("no network")

    (tmp_path / "x.txt").write_text("hello world " * 40)
    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    fails(
        lambda: prepare(request(tmp_path, "pretrain/mine=x.txt", tokenizer="gpt2")),
        "GPT-2 ranks",
        "ConnectionError",
        "--tokenizer=",
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: gpt2.bpe)
    prepare(request(tmp_path, "pretrain/mine=x.txt", tokenizer="gpt2"))
    assert (tmp_path / "out" / "gpt2.tiktoken").read_bytes() == RANKS.read_bytes()


@needs_ranks
def test_the_real_eval_text_is_copied_to_the_letter(tmp_path):
    """Perplexity is comparable only on the very text: WikiText-2 test, by its published sha256."""
    real("wikitext2_raw_test.txt.gz")
    prepare(request(tmp_path, f"eval/wikitext-2={(REAL / 'wikitext2_raw_test.txt.gz').resolve()}"))
    digest = hashlib.sha256((tmp_path / "out/wikitext-2/test.txt").read_bytes()).hexdigest()
    assert digest == "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"


# --------------------------------------------------------------------------------------------------
# A tokenizer of one's own

TALES = [
    f"The {a} cat saw the {b} dog. Tale {i}."
    for i, (a, b) in enumerate(zip("abc" * 50, "xy" * 75, strict=True))
]
NAME = "tales+more-275.tiktoken"


def tales(folder, sources=("tales=a.txt", "more=b.jsonl"), **keys) -> DataConfig:
    """Write two files of tales, and return the request that learns 275 symbols from sources."""
    (folder / "a.txt").write_text("<|endoftext|>".join(TALES[:100]))
    jsonl(folder / "b.jsonl", *({"text": text} for text in TALES[100:]))
    keys = {"tokenizer": "gpt2", "train_tokenizer": 275, "stage": "pretrain", **keys}
    return request(folder, *sources, **keys)


def test_one_command_learns_a_tokenizer_from_all_sources_and_prepares_them_with_it(
    tmp_path, no_network
):
    """The ranks stand in the data folder, so that training finds them by path or by name."""
    prepare(tales(tmp_path))
    tokenizer = load_tokenizer(NAME, str(tmp_path / "out"))
    assert (tokenizer.n_text, tokenizer.name) == (275, NAME)
    ids = []
    for split in ("train", "val"):
        ids += read_shard(str(tmp_path / "out" / "tales" / f"{split}_000.bin"), tokenizer).tolist()
    texts = tokenizer.decode(ids).split("<|endoftext|>")
    assert sorted(texts) == sorted([*TALES[:100], ""])
    read_shard(str(tmp_path / "out/more/train_000.bin"), tokenizer)

    assert tokenizer.encode("The cat saw the dog") != list(b"The cat saw the dog")


def test_a_learnt_tokenizer_and_its_folders_are_kept_until_the_request_changes(tmp_path, capsys):
    """A second start has nothing to do; what is missing is made again, bitwise the same."""
    prepare(tales(tmp_path))
    before = snapshot(tmp_path / "out")
    assert "learnt from tales, more" in capsys.readouterr().out
    prepare(tales(tmp_path))
    assert "learnt from" not in capsys.readouterr().out
    (tmp_path / "out" / NAME).unlink(), (tmp_path / "out/more/val_000.bin").unlink()
    prepare(tales(tmp_path))
    assert snapshot(tmp_path / "out") == before


def test_a_text_that_changed_never_takes_a_tokenizer_from_its_checkpoints(tmp_path):
    """Nothing is written; in another folder, or with the file moved away, all is made anew."""
    cfg = tales(tmp_path)
    prepare(cfg)
    before = snapshot(tmp_path / "out")
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(TALES[:60]) + " zebra" * 60)
    fails(lambda: prepare(cfg), NAME, "move it away", "--data_dir")
    assert snapshot(tmp_path / "out") == before
    (tmp_path / "out" / NAME).rename(tmp_path / NAME)
    prepare(cfg)
    tokenizer = load_tokenizer(NAME, str(tmp_path / "out"))
    assert tokenizer.hash != load_tokenizer(str(tmp_path / NAME)).hash
    for name in ("tales", "more"):  # the second source did not change, its ids do
        read_shard(str(tmp_path / "out" / name / "train_000.bin"), tokenizer)


def test_a_tokenizer_learns_from_as_many_documents_as_the_cap_takes(tmp_path):
    """What is not trained on may be someone's test text."""
    prepare(tales(tmp_path, ["tales:40=a.txt"]))
    (tmp_path / "few.txt").write_text("<|endoftext|>".join(TALES[:40]))
    prepare(request(tmp_path, "pretrain/few=few.txt", tokenizer="gpt2", train_tokenizer=275))
    files = [tmp_path / "out" / f"{name}-275.tiktoken" for name in ("tales", "few")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "sources, keys, words",
    [
        (["tales=a.txt"], {"train_tokenizer": 256}, ["train_tokenizer", "257", "65530"]),
        (["tales=a.txt"], {"train_tokenizer": 65531}, ["train_tokenizer", "65530"]),
        (["tales=a.txt"], {"tokenizer": "byte"}, ["two tokenizers", "byte", "275"]),
        (["tales=a.txt"], {"train_tokenizer": 4096}, ["4096", "more text"]),
        (["toy"], {}, ["pretrain", "none"]),
        (["sft/mine=b.jsonl"], {}, ["pretrain", "none"]),
        (["tales=gone.txt"], {}, ["gone.txt", "does not exist"]),
        (["tales=a.txt", "more=bad.txt"], {}, ["bad.txt", "UTF-8"]),
    ],
    ids=["bytes only", "no shard", "two", "short", "toy", "no text", "no file", "no UTF-8"],
)
def test_a_tokenizer_that_cannot_be_learnt_is_refused_and_nothing_is_written(
    tmp_path, sources, keys, words
):
    """Each in words, before any folder is touched."""
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 au lait\n")
    fails(lambda: prepare(tales(tmp_path, sources, **keys)), *words)
    assert not snapshot(tmp_path / "out")


def test_a_ranks_file_given_by_path_is_kept_beside_the_shards_too(tmp_path, no_network):
    """Checkpoints know its name alone, and other machines have the data folder alone."""
    prepare(tales(tmp_path))
    (tmp_path / "else").mkdir()
    (tmp_path / "out" / NAME).rename(tmp_path / "else" / "mine.tiktoken")
    given = str(tmp_path / "else" / "mine.tiktoken")
    prepare(tales(tmp_path, ["tales=a.txt"], tokenizer=given, train_tokenizer=None))
    kept = load_tokenizer("mine.tiktoken", str(tmp_path / "out"))
    assert kept.hash == load_tokenizer(given).hash
    read_shard(str(tmp_path / "out/tales/train_000.bin"), kept)
