"""Files are written whole or not at all, and a bad one is named with its cause."""

import builtins
import errno
import gzip
import json
import math
import os
import resource
import signal

import numpy as np
import pytest
from corpus_helpers import parquet, request, shard, snapshot, tokens_of
from helpers import BYTE, fails, fork, wait

from configurator import UserError
from corpus.shards import write_shard
from data import prepare
from runtime.files import read_jsonl, read_rows, write_atomic, write_json, write_jsonl
from runtime.logs import read_log


def test_a_write_replaces_the_whole_file(tmp_path):
    """The reader of a file sees the old or the new one; folders on the way are made."""
    path = tmp_path / "deep" / "er" / "x.bin"

    def write(content: bytes):
        write_atomic(str(path), lambda f: f.write(content))

    for content in (b"first, and long", b"second"):
        write(content)
        assert path.read_bytes() == content and os.listdir(path.parent) == ["x.bin"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "quota"),
        RuntimeError("torch: unexpected pos"),
    ],
)
@pytest.mark.parametrize("writer", ["text", "jsonl", "shard"])
def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch, error, writer):
    """Half a file under a final name would be trained on.

    A left-over one would keep the disk full.
    """
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def full(fd):
        raise error

    def write():
        if writer == "text":
            write_atomic(str(path), lambda f: f.write(b"new"))
        elif writer == "jsonl":
            write_jsonl(str(path), [{"a": 1}])
        else:
            write_shard(str(path), np.arange(9), BYTE)

    monkeypatch.setattr(os, "fsync", full)
    fails(write, path, "free", str(error).split("]")[-1].strip())
    assert snapshot(tmp_path) == {"x.bin": b"old"}


def test_a_file_size_limit_ends_in_words_and_leaves_the_old_shard(tmp_path):
    """A real short write, not a simulated one, ends half way through the payload.

    RLIMIT_FSIZE stands for a quota.
    """
    path = shard(tmp_path / "train_000.bin", [1, 2, 3])
    before = snapshot(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        with pytest.raises(UserError) as caught:
            write_shard(str(path), np.zeros(50_000, np.int64), BYTE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(path) in str(caught.value) and "0.1 MB needed" in str(caught.value)
    assert snapshot(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_an_error_in_words(tmp_path):
    """A file where a folder is wanted: says which path, and the file is kept."""
    (tmp_path / "out").write_text("a file")
    fails(lambda: write_json(str(tmp_path / "out" / "x.json"), 1), tmp_path / "out" / "x.json")
    assert snapshot(tmp_path) == {"out": b"a file"}


@pytest.mark.parametrize(
    "error",
    [errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOENT, errno.ENAMETOOLONG],
)
def test_only_a_full_disk_is_told_to_be_full(tmp_path, monkeypatch, error):
    """Who may not write there must not go and delete files."""

    def refuse(fd):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", refuse)
    path = tmp_path / "x.json"
    said = fails(lambda: write_json(str(path), 1), path, os.strerror(error), "may write")
    assert "free" not in said and snapshot(tmp_path) == {}


def test_an_interrupted_write_leaves_nothing(tmp_path):
    """Ctrl-C in the middle of a file is no error of the file system, and cleans up as one."""
    (tmp_path / "x.json").write_text("old")

    def interrupt(f):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(str(tmp_path / "x.json"), interrupt)
    assert snapshot(tmp_path) == {"x.json": b"old"}


def dead_process() -> int:
    """Return the number of a process that has ended."""
    pid = fork(lambda: None)
    wait(pid)
    return pid


def test_a_write_removes_what_dead_processes_left_beside_it_and_nothing_else(tmp_path):
    """A killed report leaves a torn picture for ever, each under another name.

    The file of a living process, of another machine or of a user is not ours to remove.
    """
    dead, here = dead_process(), os.uname().nodename
    gone = [f"a.png.{dead}.tmp", f"b.{dead}@{here}.tmp", f"c.{10**30}.tmp", f"[d].e.{dead}.tmp"]
    kept = [f"a.png.{os.getppid()}.tmp", "b.1.tmp", f"c.{dead}@other-{here}.tmp", "d.tmp"]
    kept += [
        f"e.{dead}.txt",
        f"{dead}.tmp",
        "f.x7.tmp",
        f"g.{dead}.tmp.txt",
        f"h.{dead}.part",
    ]
    for name in gone + kept:
        (tmp_path / name).write_text("torn")
    (tmp_path / f"folder.{dead}.part").mkdir()
    (tmp_path / f"folder.{dead}.part" / "train_000.bin").write_text("torn")
    write_json(str(tmp_path / "x.json"), 1)
    assert sorted(os.listdir(tmp_path)) == sorted(["x.json", *kept])


def test_a_write_of_a_killed_process_is_removed_by_the_next(tmp_path):
    """kill -9 in the middle of a file, then another file in the same folder."""

    def die(f):
        f.write(b"half")
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    assert wait(fork(lambda: write_atomic(str(tmp_path / "a.png"), die))) == -signal.SIGKILL
    assert list(snapshot(tmp_path).values()) == [b"half"]
    write_json(str(tmp_path / "b.json"), 1)
    assert os.listdir(tmp_path) == ["b.json"]


def test_json_lines_round_trip(tmp_path):
    """Any text survives, also line separators that only some readers take for line ends."""
    rows = [{"a": "é\u2028\x85\r\n\x00\ufeff"}, {"b": [1, None, 0.5]}]
    write_jsonl(str(tmp_path / "x.jsonl"), rows)
    assert read_jsonl(str(tmp_path / "x.jsonl")) == rows


def test_a_json_list_is_read_like_json_lines_also_gzipped(tmp_path):
    """Alpaca is published as one list."""
    rows = [{"a": 1}, {"a": 2}]
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n\n{"a": 2}'))
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    for name in ("x.json", "x.jsonl.gz", "x.json.gz"):
        assert read_jsonl(str(tmp_path / name)) == rows


FORMS = [
    '{"a": 1}\n{"a": 2}\n',
    '\n\n{"a": 1}\n \n{"a": 2}\n\n',
    '[{"a": 1}, {"a": 2}]',
    '[\n{"a": 1},\n\n{"a": 2}\n]\n',
    '\n [{"a":\n1}, {"a": 2}]',
    '{"a": 1}\r\n{"a": 2}',
    json.dumps([{"a": 1}, {"a": 2}], indent=4),
]


@pytest.mark.parametrize("text", FORMS)
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.ndjson", "x", "x.txt", "x.JSON"])
def test_a_list_and_json_lines_are_told_apart_by_content(tmp_path, text, name):
    """Both suffixes are used for both."""
    (tmp_path / name).write_bytes(text.encode())
    assert list(read_rows(str(tmp_path / name))) == [{"a": 1}, {"a": 2}]


def test_lines_that_are_lists_are_values_each(tmp_path):
    """Only where one list of objects is all of the file, these are the records."""
    for content in ("[1]\n[2, 3]\n", "[[1], 2]\n", '[{"a": 1}]\n[]\n'):
        (tmp_path / "x").write_text(content)
        lines = content.splitlines()
        assert read_jsonl(str(tmp_path / "x")) == [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "text, line",
    [
        ('{"a": 1}\n\n{"a": NaN}\n', 3),
        ('{"a": 1}\n{"a": [-Infinity]}\n', 2),
        ('\n[\n{"a": 1},\n{"a": Infinity}]', 2),  # the list's own line
        ('{"a": 1e999}\n', 1),
        ("{'a': 1}\n", 1),
        ('{"a": \n{"a": 2}\n{"a": 3}\n', 1),
        ('[\n{"a": 1},\n{"a": }\n]\n', 3),
        ("[" * 100_000, 1),
        ('{"a": ' + "9" * 5000 + "}", 1),
    ],
    ids=["NaN", "nested", "in a list", "1e999", "quotes", "torn", "torn list", "depth", "digits"],
)
def test_what_no_strict_reader_takes_for_json_is_refused_by_its_line(tmp_path, text, line):
    """A number that is none would become a label or a score, and the results no JSON."""
    (tmp_path / "x.jsonl").write_text(text)
    fails(lambda: read_jsonl(str(tmp_path / "x.jsonl")), f"x.jsonl:{line} is no JSON")


def test_nan_in_a_parquet_file_is_nothing(tmp_path):
    """pandas writes NaN where a table has a hole; no number that is none comes in."""
    columns = {"a": [0.5, math.nan, -math.inf], "b": ["x", None, "z"]}
    parquet(tmp_path / "x.parquet", columns)
    rows = list(read_rows(str(tmp_path / "x.parquet")))
    assert [row["a"] for row in rows] == [0.5, None, None]
    assert [row["b"] for row in rows] == ["x", None, "z"]


def test_a_cell_of_a_table_may_hold_a_novel(tmp_path):
    """Python's reader of tables stops at 131,072 characters, unless it is told otherwise."""
    novel = "It was, as ever, the best of times.\n" * 9000
    (tmp_path / "x.csv").write_text('id,text\n1,"' + novel + '"\n')
    assert list(read_rows(str(tmp_path / "x.csv"))) == [{"id": "1", "text": novel}]


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    """Permission denied is a message and no traceback, for every reader."""
    path = tmp_path / "x.csv"
    path.write_text("a\n1\n")

    def refuse(*args, **keys):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(builtins, "open", refuse)
    fails(lambda: list(read_rows(str(path))), path, "Permission denied")


def test_a_byte_order_mark_is_no_content(tmp_path):
    """Windows editors put one before the first record."""
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfhi")
    assert read_jsonl(str(tmp_path / "x.jsonl")) == [{"a": 1}]
    prepare(request(tmp_path, "pretrain/x=x.txt"))
    assert tokens_of(tmp_path / "out/x/train_000.bin")[:2] == [104, 105]


UNREADABLE = [
    ("gone.jsonl", None, ["does not exist"]),
    ("x.jsonl", b"", ["is empty"]),
    ("x.jsonl", b'{"a": 1}\n\n{"a": \n', [":3", "JSON"]),
    ("x.json", b'[{"a": 1},', [":1", "JSON"]),
    ("x.jsonl", b'{"a": "\xff"}\n', ["UTF-8"]),
    ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-20], []),
    ("x.jsonl.gz", b'{"a": 1}\n', []),
]


@pytest.mark.parametrize(
    "name, content, words",
    UNREADABLE,
    ids=["missing", "empty", "bad JSON line", "bad JSON list", "not UTF-8", "torn gzip", "no gzip"],
)
def test_an_unreadable_records_file_is_named_with_the_cause(tmp_path, name, content, words):
    """The user must find the line without a traceback.

    A torn download (.gz cut short, or not gzip) is of this kind too.
    """
    if content is not None:
        (tmp_path / name).write_bytes(content)
    fails(lambda: read_jsonl(str(tmp_path / name)), tmp_path / name, *words)


def test_a_torn_last_line_of_a_log_is_left_out(tmp_path):
    """A kill tears logs; their reader must go on."""
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n{"st\xff')
    assert read_log(str(tmp_path / "log.jsonl")) == [{"step": 1}, {"step": 2}]
    assert read_log(str(tmp_path / "none.jsonl")) == []
