"""A data folder is made whole or not at all, also by several processes and after a kill."""

import functools
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from corpus_helpers import (
    TEXTS,
    documents_of,
    jsonl,
    request,
    snapshot,
    tokens_of,
    write_source,
)
from helpers import BYTE, EOS, ROOT, fails

import data
from configurator import UserError
from corpus import folders, toy
from corpus.chat import render
from corpus.folders import ToySizes, ensure_toy, make_toy
from corpus.records import load_records
from corpus.shards import Mixture
from corpus.tokenizer import load_tokenizer
from data import DataConfig, prepare


@pytest.mark.parametrize("n, length", [(1, 1), (1, 1000), (2, 10), (99, 30)])
def test_validation_is_never_empty(tmp_path, n, length):
    """Of fewer than 100 documents, or one single book, the last twentieth is held out.

    No token is in both parts or lost.
    """
    (tmp_path / "x.txt").write_text("\n<|endoftext|>\n".join("x" * length for _ in range(n)))
    prepare(request(tmp_path, "pretrain/mine=x.txt"))
    train, val = (tokens_of(tmp_path / f"out/mine/{split}_000.bin") for split in ("train", "val"))
    assert len(val) == max(1, len(train + val) // 20) and (train + val).count(EOS) == n
    assert [t for t in train + val if t not in (EOS, 10)] == [120] * n * length


@pytest.mark.parametrize(
    "texts",
    [TEXTS, ["one long document " * 60], ["first " * 20, "second " * 20]],
    ids=["many", "one", "two"],
)
def test_a_source_larger_than_a_shard_becomes_several(tmp_path, monkeypatch, texts):
    """Shards are cut at SHARD_TOKENS, and nothing is lost.

    One document that is larger keeps a validation part, too.
    """
    monkeypatch.setattr(folders, "SHARD_TOKENS", 100)
    jsonl(tmp_path / "x.jsonl", *({"text": text} for text in texts))
    prepare(request(tmp_path, "pretrain/mine=x.jsonl"))
    folder = tmp_path / "out" / "mine"
    assert list(folder.glob("val_*.bin"))
    assert sum(len(tokens_of(path)) for path in folder.glob("*.bin")) == sum(map(len, texts)) + len(
        texts
    )
    assert texts is not TEXTS or len(list(folder.glob("train_*.bin"))) > 10


def test_the_work_per_document_does_not_grow_with_their_number(tmp_path):
    """Twelve times the documents must not take a hundred times the time.

    TinyStories has two million.
    """
    spent = []
    for n in (1000, 12000):
        jsonl(tmp_path / f"{n}.jsonl", *({"text": "ab"} for _ in range(n)))
        start = time.process_time()
        prepare(request(tmp_path, f"pretrain/mine{n}={n}.jsonl"))
        spent.append(time.process_time() - start)
    assert spent[1] < 24 * spent[0], spent


def test_the_manifest_has_the_sha256_of_what_is_there(tmp_path):
    """A later reader can check every file; the request says what it was made from."""
    jsonl(tmp_path / "x.jsonl", *({"question": f"q{i}", "answer": "#### 1"} for i in range(100)))
    write_source(tmp_path, "txt")
    prepare(request(tmp_path, "verifier/mine=x.jsonl", "pretrain/tales:200=x.txt"))
    for name, stage in (("mine", "verifier"), ("tales", "pretrain")):
        folder = tmp_path / "out" / name
        manifest = json.loads((folder / f"manifest_{stage}.json").read_text())
        files = {path.name for path in folder.iterdir()} - {f"manifest_{stage}.json"}
        assert manifest["sha256"] == {
            file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in files
        }
        assert manifest["request"]["stage"] == stage and manifest["request"]["cap"] == (
            200 if name == "tales" else None
        )


def test_a_second_call_keeps_the_folder_and_says_so(tmp_path, capsys):
    """Preparation may stand in every job script: done once, it costs nothing."""
    cfg = request(tmp_path, f"pretrain/mine={write_source(tmp_path, 'txt')}")
    prepare(cfg)
    folder = tmp_path / "out" / "mine"
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    prepare(cfg)
    assert "mine (pretrain) is there already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_a_second_call_after_a_shard_was_lost_makes_it_again(tmp_path):
    """The manifest alone is no data: scratch space is cleaned file by file."""
    cfg = request(tmp_path, f"pretrain/mine={write_source(tmp_path, 'txt')}")
    prepare(cfg)
    before = snapshot(tmp_path / "out")
    (tmp_path / "out/mine/train_000.bin").unlink()
    prepare(cfg)
    assert snapshot(tmp_path / "out") == before


def test_a_changed_source_file_is_prepared_again(tmp_path):
    """Training on the old text of a file with the same name would be a silent mistake."""
    (tmp_path / "x.txt").write_text("old " * 50)
    prepare(request(tmp_path, "pretrain/mine=x.txt"))
    (tmp_path / "x.txt").write_text("new one " * 50)
    prepare(request(tmp_path, "pretrain/mine=x.txt"))
    assert BYTE.decode(tokens_of(tmp_path / "out/mine/train_000.bin")).startswith("new one ")


def test_a_folder_that_was_made_by_other_rules_is_made_again(tmp_path, monkeypatch, capsys):
    """Records that were read before a field was honoured are not what this code would make."""
    (tmp_path / "x.txt").write_text("text " * 50)
    cfg = request(tmp_path, "pretrain/mine=x.txt")
    monkeypatch.setattr(data, "RULES", data.RULES - 1)
    prepare(cfg)
    monkeypatch.undo()
    manifest = tmp_path / "out/mine/manifest_pretrain.json"
    before = json.loads(manifest.read_text())
    del before["request"]["rules"]  # as in the oldest ones
    manifest.write_text(json.dumps(before))
    for _ in range(2):
        prepare(cfg)
        assert json.loads(manifest.read_text())["request"]["rules"] == data.RULES
    assert capsys.readouterr().out.count("is made again: ") == 1


def test_a_smaller_preparation_leaves_no_shards_of_the_larger_one(tmp_path, monkeypatch):
    """The loader takes every train_*.bin of the folder: stale ones would be trained on."""
    monkeypatch.setattr(folders, "SHARD_TOKENS", 500)
    file = write_source(tmp_path, "txt")
    prepare(request(tmp_path, f"pretrain/mine={file}"))
    assert len(list((tmp_path / "out/mine").glob("train_*.bin"))) > 2
    prepare(request(tmp_path, f"pretrain/mine:5={file}"))
    train = [
        token
        for path in sorted((tmp_path / "out/mine").glob("train_*.bin"))
        for token in tokens_of(path)
    ]
    assert "number 6" not in BYTE.decode(train)


def test_an_interrupted_change_is_not_taken_for_the_old_data(tmp_path, monkeypatch):
    """New shards may not stand under the old manifest.

    The old request, asked again, must not be told that all is there.
    """
    (tmp_path / "a.txt").write_text("old " * 50), (tmp_path / "b.txt").write_text("new " * 50)
    prepare(request(tmp_path, "pretrain/mine=a.txt"))
    write = folders.write_json
    monkeypatch.setattr(
        folders, "write_json", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        prepare(request(tmp_path, "pretrain/mine=b.txt"))
    monkeypatch.setattr(folders, "write_json", write)
    prepare(request(tmp_path, "pretrain/mine=a.txt"))
    assert BYTE.decode(tokens_of(tmp_path / "out/mine/train_000.bin")).startswith("old ")


@pytest.mark.parametrize("damage", ["byte", "cut", "longer"])
def test_a_damaged_file_is_made_again_and_not_taken_for_there(tmp_path, capsys, damage):
    """Its name alone says nothing: a flipped byte, a lost half, another writer."""
    jsonl(tmp_path / "x.jsonl", *({"question": f"q{i}", "answer": "#### 1"} for i in range(100)))
    cfg = request(tmp_path, "verifier/mine=x.jsonl")
    prepare(cfg)
    whole = snapshot(tmp_path / "out")
    path = tmp_path / "out" / "mine" / "problems_train.jsonl"
    damage_file(path, damage)
    capsys.readouterr()
    prepare(cfg)
    said = "is made again: problems_train.jsonl is damaged or was changed"
    assert said in capsys.readouterr().out and snapshot(tmp_path / "out") == whole


def damage_file(path, damage: str) -> None:
    raw = path.read_bytes()
    flipped = raw[:40] + bytes([raw[40] ^ 1]) + raw[41:]
    changed = {"byte": flipped, "cut": raw[: len(raw) // 2 + 1], "longer": raw + raw}
    path.write_bytes(changed[damage])


@pytest.mark.parametrize("damage", ["byte", "cut", "longer"])
def test_records_that_data_py_did_not_write_are_not_trained_on(tmp_path, damage):
    """100 of 2,000 lines trained silently. A change of one's own needs the manifest removed."""
    jsonl(tmp_path / "x.jsonl", *({"question": f"q{i}", "answer": "#### 1"} for i in range(100)))
    prepare(request(tmp_path, "verifier/mine=x.jsonl"))
    folder = tmp_path / "out" / "mine"
    damage_file(folder / "problems_train.jsonl", damage)
    train = ("mine", str(tmp_path / "out"), "problems", "train")
    fails(lambda: load_records(*train), "problems_train.jsonl is damaged", "data.py", "manifest_")
    (folder / "manifest_verifier.json").unlink()
    jsonl(folder / "problems_train.jsonl", {"question": "my own", "answer": "#### 2"})
    assert load_records(*train) == [{"question": "my own", "answer": "#### 2"}]


def test_a_folder_that_lost_a_shard_is_not_trained_on(tmp_path, monkeypatch):
    """Of a copy that ended early half the text would be the data, silently."""
    monkeypatch.setattr(folders, "SHARD_TOKENS", 100)
    prepare(request(tmp_path, f"pretrain/mine={write_source(tmp_path, 'txt')}"))
    open_it = functools.partial(Mixture, "mine", str(tmp_path / "out"), "train", 8, 0, BYTE)
    open_it()
    (tmp_path / "out/mine/train_003.bin").unlink()
    fails(open_it, "lacks train_003.bin", "data.py")


def test_a_half_replaced_folder_is_not_trained_on(tmp_path, monkeypatch):
    """New shards beside old ones are no data set. The same request again mends it."""
    monkeypatch.setattr(folders, "SHARD_TOKENS", 100)
    (tmp_path / "a.txt").write_text("old " * 500), (tmp_path / "b.txt").write_text("new " * 500)
    prepare(request(tmp_path, "pretrain/mine=a.txt"))
    with monkeypatch.context() as patch:
        moved, replace = [], os.replace

        def dies(source, target):
            if str(target).endswith(".bin") and ".part" in str(source):
                moved.append(target)
                if len(moved) == 3:
                    raise KeyboardInterrupt
            replace(source, target)

        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare(request(tmp_path, "pretrain/mine=b.txt"))
    open_it = functools.partial(Mixture, "mine", str(tmp_path / "out"), "train", 8, 0, BYTE)
    fails(open_it, "half replaced", "same data.py command")
    prepare(request(tmp_path, "pretrain/mine=b.txt"))
    assert BYTE.decode(open_it().validation(0, 1)[0].tolist()).strip("new ") == ""


@pytest.mark.parametrize("text", ["", "[]", "{", '{"sha256": [1]}', '{"sha256": 3}', "null"])
def test_a_damaged_manifest_vouches_for_nothing(tmp_path, text):
    """It is JSON that people edit: its folder is read as if it had none, without a traceback."""
    prepare(request(tmp_path, f"pretrain/mine={write_source(tmp_path, 'txt')}"))
    (tmp_path / "out/mine/manifest_pretrain.json").write_text(text)
    assert Mixture("mine", str(tmp_path / "out"), "train", 8, 0, BYTE).n_rows > 0


def test_force_makes_a_folder_again_that_is_there(tmp_path, capsys):
    cfg = request(tmp_path, f"pretrain/mine={write_source(tmp_path, 'txt')}")
    prepare(cfg)
    before = snapshot(tmp_path / "out")
    prepare(replace(cfg, force=True))
    assert "is made again: as --force says" in capsys.readouterr().out
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"request": '])
def test_a_damaged_manifest_is_an_error_in_words_or_made_again(tmp_path, content):
    """It is JSON that people edit: no KeyError."""
    cfg = request(tmp_path, f"pretrain/mine={write_source(tmp_path, 'txt')}")
    prepare(cfg)
    path = tmp_path / "out/mine/manifest_pretrain.json"
    path.write_bytes(content)
    try:
        prepare(cfg)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert json.loads(path.read_text())["request"]["stage"] == "pretrain"


KILLED = """
import os, sys, time
import data
def slow(fd):
    print("writing", flush=True)
    time.sleep(60)
os.fsync = slow
data.prepare(data.DataConfig(sources=("pretrain/mine=x.txt",), data_dir="out", tokenizer="byte"))
"""


def test_a_kill_during_preparation_leaves_no_shard_under_its_final_name(tmp_path):
    """After kill -9 there is nothing to load, and the next call completes the work.

    The kill comes after the bytes were written and before they were safe.
    """
    write_source(tmp_path, "txt")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout.readline() == "writing\n"
    finally:
        process.kill()
        process.wait(30)
    left = snapshot(tmp_path / "out")
    assert left and not [name for name in left if name.endswith((".bin", ".json"))]
    fails(
        lambda: Mixture("mine", str(tmp_path / "out"), "train", 16, 0, BYTE),
        "data.py --stage=pretrain --sources=mine=FILE",
    )
    living = tmp_path / "out" / f"other.{os.getppid()}.part"
    living.mkdir()
    prepare(request(tmp_path, "pretrain/mine=x.txt"))
    assert len(documents_of(tmp_path / "out" / "mine")) == 250
    assert sorted(os.listdir(tmp_path / "out")) == ["mine", living.name]


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo", "verifier", "eval"])
def test_a_preparation_that_fails_leaves_no_folder(tmp_path, monkeypatch, stage):
    """A bad record after good shards, a full disk, Ctrl-C or an error of ours may end it."""
    row = {"text": "some text", "question": "q", "answer": "#### 1", "prompt": "p"}
    row |= {"chosen": "a", "rejected": "b"}
    if stage == "sft":
        row = {"question": "q", "answer": "a"}
    rows = [
        {**row, key: f"{i}"} for i in range(200) for key in ("question", "prompt") if key in row
    ]
    jsonl(tmp_path / "good.jsonl", *rows)
    (tmp_path / "bad.jsonl").write_text((tmp_path / "good.jsonl").read_text() + '{"text": \n')
    monkeypatch.setattr(folders, "SHARD_TOKENS", 100)
    monkeypatch.setattr(folders, "BATCH", 9)
    out = tmp_path / "out"
    with pytest.raises(UserError):
        prepare(request(tmp_path, f"{stage}/mine=bad.jsonl"))
    assert not out.exists() or not os.listdir(out)
    for error in (
        OSError(28, "No space left on device"),
        KeyboardInterrupt(),
        AssertionError("ours"),
    ):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr(folders, "sha256", fail)
        with pytest.raises((UserError, type(error))):
            prepare(request(tmp_path, f"{stage}/mine=good.jsonl"))
        assert not os.listdir(out)


def test_nothing_that_an_equally_numbered_process_left_gets_into_a_folder(tmp_path):
    """In a container each start of the program may have the same number."""
    write_source(tmp_path, "txt")
    left = tmp_path / "out" / f"mine.{os.getpid()}@{os.uname().nodename}.part"
    left.mkdir(parents=True)
    (left / "train_001.bin").write_bytes(b"torn")
    prepare(request(tmp_path, "pretrain/mine=x.txt"))
    assert len(list((tmp_path / "out/mine").glob("*.bin"))) == 2


def test_the_tokenizer_of_a_preparation_is_built_once(tmp_path, monkeypatch):
    """GPT-2's takes a second, and there may be many sources; without text there is none."""
    built = []

    def build(*args, **keys):
        built.append(args)
        return BYTE

    monkeypatch.setattr(data, "load_tokenizer", build)
    write_source(tmp_path, "txt")
    prepare(request(tmp_path, "eval/a=x.txt"))
    assert not built
    prepare(request(tmp_path, *(f"pretrain/{name}=x.txt" for name in "abc")))
    assert len(built) == 1


def test_processes_that_prepare_the_same_at_once_end_with_equal_files(tmp_path):
    """Every process of a job may find the toy world missing.

    All succeed, and one whole version is there.
    """
    cfg = request(tmp_path, "toy", toy_stories=80, toy_problems=200)
    children = [
        multiprocessing.get_context("fork").Process(target=prepare, args=(cfg,)) for _ in range(3)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0, 0]
    folder = tmp_path / "out" / "toy"
    digests = json.loads((folder / "manifest_pretrain.json").read_text())["sha256"]
    assert digests == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if "manifest" not in path.name
    }
    assert os.listdir(tmp_path / "out") == ["toy"]


def test_the_toy_world_is_prepared_whole_and_without_network(tmp_path, no_network, capsys):
    """There are shards, and records of every stage that load_records finds.

    ensure_toy makes the world when it is missing, and once.
    """
    cfg = request(tmp_path, "toy", toy_stories=80, toy_problems=300)
    prepare(cfg)
    out = str(tmp_path / "out")
    tokenizer = load_tokenizer("toy")
    assert Mixture("toy", out, "train", 64, 0, tokenizer).n_rows > 10
    assert Mixture("toy", out, "val", 64, 0, tokenizer).n_rows > 0
    splits_of = {
        "sft": ("train", "val"),
        "dpo": ("train", "val", "test"),
        "problems": ("train", "verifier", "val", "test"),
    }
    for kind, splits in splits_of.items():
        for split in splits:
            rows = load_records("toy", out, kind, split)
            assert rows and (kind != "sft" or all(render(row["messages"], BYTE) for row in rows))
    problems = [
        {row["question"] for row in load_records("toy", out, "problems", split)}
        for split in ("train", "verifier", "val", "test")
    ]
    assert len(set.union(*problems)) == sum(map(len, problems))
    before = snapshot(tmp_path)
    capsys.readouterr()
    ensure_toy("toy", out)
    ensure_toy("elsewhere*0.5,other", out)
    assert snapshot(tmp_path) == before


def test_a_toy_world_of_another_version_is_made_again(tmp_path, monkeypatch):
    """Its records have changed, and the old ones must not be trained on; a comment changes none."""
    sizes = ToySizes(stories=80, problems=50, test=5)
    make_toy(sizes, str(tmp_path))
    manifest = tmp_path / "toy" / "manifest_pretrain.json"
    assert json.loads(manifest.read_text())["request"] == {"toy": [0, 80, 50, 5, toy.VERSION]}
    before = manifest.stat().st_mtime_ns
    make_toy(sizes, str(tmp_path))
    assert manifest.stat().st_mtime_ns == before
    monkeypatch.setattr(toy, "VERSION", toy.VERSION + 1)
    make_toy(sizes, str(tmp_path))
    assert json.loads(manifest.read_text())["request"] == {"toy": [0, 80, 50, 5, toy.VERSION]}


def test_a_missing_toy_world_is_made_in_the_sizes_of_data_py(tmp_path, monkeypatch):
    """train.py must find the same world as a run of data.py --sources=toy leaves."""
    asked = []
    monkeypatch.setattr(folders, "make_toy", lambda sizes, data_dir: asked.append(sizes))
    ensure_toy("other*0.5,toy*0.5", str(tmp_path))
    ensure_toy("", str(tmp_path))
    cfg = DataConfig()
    assert asked == [ToySizes(cfg.seed, cfg.toy_stories, cfg.toy_problems, cfg.toy_test)]


@pytest.mark.parametrize(
    "keys", [{"toy_stories": 10}, {"toy_stories": 0}, {"toy_problems": 0}, {"toy_problems": -1}]
)
def test_a_toy_world_of_an_odd_size_is_made_or_refused_in_words(tmp_path, keys):
    """The sizes are keys of the command line: too few must not end in a traceback."""
    try:
        prepare(request(tmp_path, "toy", **{"toy_stories": 80, "toy_problems": 50, **keys}))
    except UserError as error:
        assert next(iter(keys)) in str(error)
