"""Files, tokenizers, shards, the loader, records and preparation. Bad input ends in words and leaves what was there as it was."""

import dataclasses
import errno
import gzip
import hashlib
import json
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import data
from conftest import fails
from configurator import UserError
from data import DataConfig, Mixture, load_tokenizer, prepare, read_shard, write_shard

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("MODERN_LLM_DATA") or ROOT / "../shared/data")
RANKS = REAL / "gpt2.tiktoken"
needs_ranks = pytest.mark.skipif(
    not RANKS.is_file(), reason=f"no GPT-2 ranks at {RANKS} (set MODERN_LLM_DATA)"
)
BYTE, TOY = load_tokenizer("byte"), load_tokenizer("toy")
EOS, SYSTEM, USER, ASSISTANT, END, PAD = range(256, 262)
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def real(name: str) -> str:
    if not (REAL / name).is_file():
        pytest.skip(f"no {name} in {REAL} (set MODERN_LLM_DATA)")
    return str(REAL / name)


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer(real("gpt2.tiktoken"))


def snapshot(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shard(path, tokens, tokenizer=BYTE):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shard(str(path), np.asarray(tokens), tokenizer)
    return path


def foreign(path, tokens, magic=20240520, version=1, count=None):
    """A shard as llm.c's write_datafile writes it: no words but the first three."""
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())
    return path


def request(folder, *sources: str, **keys) -> DataConfig:
    return DataConfig(
        **{
            "sources": sources,
            "data_dir": str(folder / "out"),
            "local_dir": str(folder),
            "tokenizer": "byte",
            **keys,
        }
    )


def tokens_of(path) -> list[int]:
    return read_shard(str(path), BYTE).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_a_write_replaces_the_whole_file(tmp_path):
    """The reader of a file sees the old or the new one; folders on the way are made."""
    path = tmp_path / "deep" / "er" / "x.bin"
    for content in (b"first, and long", b"second"):
        data.write_atomic(str(path), lambda f: f.write(content))
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
    """Half a file under a final name would be trained on; a left-over one would keep the disk full."""
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")

    def full(fd):
        raise error

    monkeypatch.setattr(os, "fsync", full)
    write = {
        "text": lambda: data.write_atomic(str(path), lambda f: f.write(b"new")),
        "jsonl": lambda: data.write_jsonl(str(path), [{"a": 1}]),
        "shard": lambda: write_shard(str(path), np.arange(9), BYTE),
    }[writer]
    fails(write, path, "free", str(error).split("]")[-1].strip())
    assert snapshot(tmp_path) == {"x.bin": b"old"}


def test_a_file_size_limit_ends_in_words_and_leaves_the_old_shard(tmp_path):
    """A real short write (RLIMIT_FSIZE stands for a quota), not a simulated one, half way through the payload."""
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
    fails(lambda: data.write_json(str(tmp_path / "out" / "x.json"), 1), tmp_path / "out" / "x.json")
    assert snapshot(tmp_path) == {"out": b"a file"}


def test_json_lines_round_trip(tmp_path):
    """Any text survives, also line separators that only some readers take for line ends."""
    rows = [{"a": "é\u2028\x85\r\n\x00\ufeff"}, {"b": [1, None, 0.5]}]
    data.write_jsonl(str(tmp_path / "x.jsonl"), rows)
    assert data.read_jsonl(str(tmp_path / "x.jsonl")) == rows


def test_a_json_list_is_read_like_json_lines_also_gzipped(tmp_path):
    """Alpaca is published as one list."""
    rows = [{"a": 1}, {"a": 2}]
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n\n{"a": 2}'))
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    for name in ("x.json", "x.jsonl.gz", "x.json.gz"):
        assert data.read_jsonl(str(tmp_path / name)) == rows


def test_a_byte_order_mark_is_no_content(tmp_path):
    """Windows editors put one before the first record."""
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfhi")
    assert data.read_jsonl(str(tmp_path / "x.jsonl")) == [{"a": 1}]
    prepare(request(tmp_path, "pretrain/x=x.txt"))
    assert tokens_of(tmp_path / "out/x/train_000.bin")[:2] == [104, 105]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("gone.jsonl", None, ["does not exist"]),
        ("x.jsonl", b"", ["is empty"]),
        ("x.jsonl", b'{"a": 1}\n\n{"a": \n', [":3", "JSON"]),
        ("x.json", b'[{"a": 1},', [":1", "JSON"]),
        ("x.jsonl", b'{"a": "\xff"}\n', ["UTF-8"]),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-20], []),
        ("x.jsonl.gz", b'{"a": 1}\n', []),
    ],
    ids=["missing", "empty", "bad JSON line", "bad JSON list", "not UTF-8", "torn gzip", "no gzip"],
)
def test_an_unreadable_records_file_is_named_with_the_cause(tmp_path, name, content, words):
    """The user must find the line without a traceback; a torn download (.gz cut short, or not gzip) is of this kind too."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    fails(lambda: data.read_jsonl(str(tmp_path / name)), tmp_path / name, *words)


def test_a_torn_last_line_of_a_log_is_left_out(tmp_path):
    """A kill tears logs; their reader must go on."""
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n{"st\xff')
    assert data.read_metrics(str(tmp_path / "log.jsonl")) == [{"step": 1}, {"step": 2}]
    assert data.read_metrics(str(tmp_path / "none.jsonl")) == []


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


@given(st.text())
@quick
def test_bytes_round_trip_any_text(text):
    """No text is lost or refused, and every id is an ordinary byte."""
    ids = BYTE.encode(text)
    assert BYTE.decode(ids) == text and all(0 <= i < 256 for i in ids)


@needs_ranks
@given(text=st.text())
@quick
def test_gpt2_round_trips_any_text(gpt2, text):
    """Byte-level BPE loses nothing."""
    assert gpt2.decode(gpt2.encode(text)) == text


def test_the_special_ids_of_bytes():
    """Literal ids: shards and checkpoints depend on them."""
    assert (
        BYTE.eos,
        BYTE.system,
        BYTE.user,
        BYTE.assistant,
        BYTE.end,
        BYTE.pad,
        BYTE.vocab_size,
    ) == (256, 257, 258, 259, 260, 261, 262)


@pytest.mark.parametrize("text", [*data.SPECIAL, "a<|end|>b<|endoftext|><|user|>"])
def test_text_that_spells_a_special_token_never_becomes_it(text):
    """Else a user could end a document or speak as the assistant."""
    assert max(BYTE.encode(text)) < 256
    assert max(i for ids in BYTE.encode_batch([text, text]) for i in ids) < 256
    assert BYTE.decode(BYTE.encode(text)) == text


@pytest.mark.parametrize("text", [*data.SPECIAL, "a<|end|>b<|endoftext|><|user|>"])
def test_text_that_spells_a_special_token_never_becomes_it_in_gpt2(gpt2, text):
    """The same for the BPE, whose library could be asked to allow it."""
    assert (
        max(gpt2.encode(text)) < 50256
        and max(i for ids in gpt2.encode_batch([text, text]) for i in ids) < 50256
    )
    assert gpt2.decode(gpt2.encode(text)) == text


def test_gpt2_ids_are_the_published_ones(gpt2):
    """Known ids of GPT-2, so that its published shards and ours mean the same."""
    assert gpt2.name == "gpt2" and gpt2.vocab_size == 50262
    assert (
        list(gpt2.special.values()) == [50256, 50257, 50258, 50259, 50260, 50261]
        and gpt2.eos == 50256
    )
    assert gpt2.encode("hello world") == [31373, 995]
    assert gpt2.encode("Hello, world!\n") == [15496, 11, 995, 0, 198]
    assert gpt2.decode([50256]) == "<|endoftext|>"


@given(
    text=st.text(st.sampled_from("aB1 \n\t'sé好.!<|>_") | st.characters(exclude_categories=["Cs"]))
)
@quick
def test_gpt2_equals_tiktoken_with_openais_own_pattern(gpt2, text):
    """Our split pattern is a faster rewrite: it must cut the text as the pattern that OpenAI released with GPT-2."""
    import tiktoken

    released = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    reference = REFERENCE.setdefault(
        "gpt2",
        tiktoken.Encoding(
            "ref", pat_str=released, mergeable_ranks=gpt2.bpe._mergeable_ranks, special_tokens={}
        ),
    )
    assert (
        gpt2.encode(text)
        == reference.encode_ordinary(text)
        == gpt2.encode_batch([text])[0].tolist()
    )


REFERENCE = {}


def test_another_tokenizer_than_the_checkpoints_is_an_error(gpt2):
    """Its ids would mean other words; the message names both."""
    fails(lambda: load_tokenizer("byte", expect=gpt2.spec()), "byte", "gpt2", gpt2.hash)
    assert load_tokenizer("byte", expect=BYTE.spec()).spec() == BYTE.spec()


def test_a_tokenizer_that_is_not_there_names_the_path_and_the_way_out(tmp_path):
    """The commonest first mistake on a node without network."""
    fails(
        lambda: load_tokenizer("gpt2", str(tmp_path)),
        tmp_path / "gpt2.tiktoken",
        "--tokenizer=byte",
    )


@pytest.mark.parametrize(
    "content",
    [
        b"not a ranks file\n",
        b"YQ== 0\nYg== 2\n",
        b"YQ== zero\n",
        b"YQ== 0\nYg== 1\n",
        b"\xff\xfe\x00",
        b"",
        b"{}",
    ],
    ids=["prose", "gap", "word for rank", "two bytes only", "binary", "empty", "JSON"],
)
def test_a_wrong_ranks_file_is_an_error(tmp_path, content):
    """Ranks with gaps, or without all 256 bytes, cannot encode every text; better said here than in the middle of a run."""
    (tmp_path / "x.tiktoken").write_bytes(content)
    fails(lambda: load_tokenizer(str(tmp_path / "x.tiktoken")), "x.tiktoken")


@needs_ranks
def test_a_torn_ranks_file_is_not_taken_for_gpt2(tmp_path):
    """Its first ranks alone are a working tokenizer, of other ids: --tokenizer=gpt2 promises GPT-2's."""
    rows = RANKS.read_bytes().splitlines(keepends=True)
    (tmp_path / "gpt2.tiktoken").write_bytes(b"".join(rows[:1000]))
    fails(lambda: load_tokenizer("gpt2", str(tmp_path)), tmp_path / "gpt2.tiktoken")


# ---------------------------------------------------------------------------------------------------------------------
# Shards


@given(
    tokens=hnp.arrays(
        st.sampled_from([np.uint16, np.int64, np.int32]),
        st.integers(0, 300),
        elements=st.integers(0, 261),
    )
)
@quick
def test_a_shard_gives_back_its_tokens(tmp_path, tokens):
    """Written and read: the same ids, whatever integer type they came in."""
    path = str(tmp_path / "x.bin")
    write_shard(path, tokens, BYTE)
    assert np.array_equal(read_shard(path, BYTE), tokens)


def test_the_header_words_are_those_of_llm_c(tmp_path):
    """Read by hand: 256 int32, magic, version, count; then uint16. llm.c and modded-nanogpt must be able to load ours."""
    raw = shard(tmp_path / "x.bin", [5, 0, 261]).read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[:3].tolist() == [20240520, 1, 3] and len(raw) == 1024 + 2 * 3
    assert np.frombuffer(raw[1024:], "<u2").tolist() == [5, 0, 261]
    assert header[5:7].tolist() == [262, 256] and header[7:8].view("<u4")[0] == zlib.crc32(
        raw[1024:]
    )
    assert not header[8:].any()


def test_a_shard_of_llm_c_loads_as_it_is(tmp_path):
    """FineWeb shards have zeros in our header words: no hash, no checksum to hold them to."""
    path = foreign(tmp_path / "web" / "fineweb_train_000001.bin", range(200))
    assert read_shard(str(path), BYTE).tolist() == list(range(200))
    assert Mixture("web", str(tmp_path), "train", 16, 0, BYTE).n_rows == 12


def test_a_headerless_file_loads_only_with_the_flag(tmp_path):
    """nanoGPT's .bin is bare uint16: read with a header it would lose tokens, so it must be asked for."""
    path = tmp_path / "train.bin"
    np.arange(1000, dtype=np.uint16).tofile(path)
    fails(lambda: read_shard(str(path), BYTE), path, "headerless")
    assert read_shard(str(path), BYTE, headerless=True).tolist() == list(range(1000))
    path.write_bytes(path.read_bytes() + b"\0")
    fails(lambda: read_shard(str(path), BYTE, headerless=True), path, "2001")


def test_the_flag_that_the_hint_names_exists(tmp_path):
    """A hint that cannot be followed is worse than none."""
    import train

    foreign(tmp_path / "x.bin", [1], magic=7)
    flag = re.search(r"--(\w+)", fails(lambda: read_shard(str(tmp_path / "x.bin"), BYTE)))[1]
    assert flag in {field.name for field in dataclasses.fields(train.TrainConfig)}


def edit(offset: int, content: bytes):
    return lambda raw: raw[:offset] + content + raw[offset + len(content) :]


def word(index: int, value: int):
    return edit(4 * index, value.to_bytes(4, "little", signed=True))


DAMAGE = {
    "empty": (lambda raw: b"", "0 bytes"),
    "shorter than header": (lambda raw: raw[:1000], "1000 bytes"),
    "header only": (lambda raw: raw[:1024], "truncated"),
    "truncated": (lambda raw: raw[:-100], "truncated"),
    "odd byte more": (lambda raw: raw + b"\0", "truncated or damaged"),
    "wrong magic": (word(0, 20240521), "magic 20240521"),
    "big-endian magic": (edit(0, (20240520).to_bytes(4, "big")), "magic"),
    "wrong version": (word(1, 2), "version 2"),
    "count too large": (word(2, 501), "501"),
    "count too small": (word(2, 499), "499"),
    "count negative": (word(2, -1), "-1"),
    "count 0": (word(2, 0), "promises 0"),
    "count 2^31-1": (word(2, 2**31 - 1), "2147483647"),
    "bit flip at the start": (edit(1024, b"\x01"), "checksum"),
    "bit flip in the middle": (edit(1525, b"\x01"), "checksum"),
    "checksum word": (word(7, 1), "checksum"),
    "tokenizer words": (word(3, 1), "another tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_refused_by_name_and_cause(tmp_path, damage):
    """Each kind of damage is found before the first step, not as a wrong loss; the file stays for inspection."""
    change, cause = DAMAGE[damage]
    path = shard(tmp_path / "mine" / "train_000.bin", np.zeros(500, int))
    path.write_bytes(change(path.read_bytes()))
    before = snapshot(tmp_path)
    fails(lambda: read_shard(str(path), BYTE), path, cause)
    fails(lambda: Mixture("mine", str(tmp_path), "train", 16, 0, BYTE), path, cause)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("count", [-1, 0, 499, 501, 2**31 - 1])
def test_a_lying_count_in_a_foreign_shard_is_refused_before_memory_is_asked_for(tmp_path, count):
    """2^31-1 tokens are 4 GB: the size of the file is compared first."""
    path = foreign(tmp_path / "x.bin", range(500), count=count)
    fails(lambda: read_shard(str(path), BYTE), path, f"promises {count} tokens")


def test_a_missing_shard_is_an_error_in_words(tmp_path):
    """Also a link to scratch space that was cleaned: it is in the listing of the folder, but not there."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train_000.bin").symlink_to(tmp_path / "scratch" / "train_000.bin")
    fails(
        lambda: Mixture("mine", str(tmp_path), "train", 16, 0, BYTE),
        tmp_path / "mine" / "train_000.bin",
    )


def test_a_shard_of_another_tokenizer_is_refused(tmp_path, gpt2):
    """Ids of another vocabulary are words of another language."""
    path = shard(tmp_path / "train_000.bin", [1, 2, 3], gpt2)
    fails(lambda: read_shard(str(path), BYTE), path, "another tokenizer", 50262, 262)


@pytest.mark.parametrize("bad", [262, 65_536, 65_537, 2**40, -1])
def test_an_id_that_does_not_fit_is_refused_at_write_time(tmp_path, bad):
    """uint16 would wrap it into another word. The offending id is named, the old shard stays."""
    path = shard(tmp_path / "x.bin", [1, 2])
    before = snapshot(tmp_path)
    fails(lambda: write_shard(str(path), np.array([5, bad, 0]), BYTE), path, f"id {bad}")
    assert snapshot(tmp_path) == before


def test_a_vocabulary_that_uint16_cannot_hold_is_refused(tmp_path):
    """65,536 ids is the most; one more must not be cut silently."""

    class Large:
        vocab_size, hash, eos = 65_536, "large", 0

    write_shard(str(tmp_path / "x.bin"), np.array([65_535]), Large)
    assert read_shard(str(tmp_path / "x.bin"), Large).tolist() == [65_535]
    Large.vocab_size = 65_537
    fails(lambda: write_shard(str(tmp_path / "y.bin"), np.array([1]), Large), 65537, "uint16")
    assert not (tmp_path / "y.bin").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The loader


def numbered(folder, name: str, sizes: list[int], first: int = 0):
    """Foreign shards whose tokens count up, so that a row tells where it was cut."""
    start = first
    for number, size in enumerate(sizes):
        foreign(folder / name / f"train_{number:03d}.bin", np.arange(start, start + size))
        start += size


class Wide:
    """A stand-in for a tokenizer of all 65,536 ids."""

    name, hash, vocab_size = "wide", "wide", 65_536


def mixture(folder, spec="a", seq_len=8, seed=0, split="train"):
    return Mixture(spec, str(folder), split, seq_len, seed, Wide)


def test_the_order_is_a_pure_function_of_seed_and_row_number(tmp_path):
    """Resume, and any number of ranks, ask for the same rows in other pieces: two loaders and all chunkings must agree."""
    numbered(tmp_path, "a", [100, 90]), numbered(tmp_path, "b", [120], 1000)
    whole = mixture(tmp_path, "a*0.7,b*0.3").shuffled(0, 60)
    other = mixture(tmp_path, "a*0.7,b*0.3")
    other.shuffled(1990, 2020)  # an earlier call leaves no trace
    assert torch.equal(other.shuffled(0, 60), whole)
    pieces = [other.shuffled(i, j) for i, j in ((40, 60), (0, 1), (1, 17), (17, 40))]
    assert torch.equal(torch.cat([*pieces[1:], pieces[0]]), whole)
    assert whole.dtype == torch.int64 and whole.shape == (60, 9)
    assert not torch.equal(mixture(tmp_path, "a*0.7,b*0.3", seed=1).shuffled(0, 60), whole)


@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    seq_len=st.integers(1, 9),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 5),
)
@quick
def test_an_epoch_visits_each_window_once_inside_its_shard(
    tmp_path_factory, sizes, seq_len, epoch, seed
):
    """No window is lost or doubled; neighbours share exactly one token; none reaches into the next shard."""
    folder = tmp_path_factory.mktemp("epoch")
    numbered(folder, "a", sizes)
    expected = [max(0, size - 1) // seq_len for size in sizes]
    if sum(expected) == 0:
        fails(lambda: mixture(folder, seq_len=seq_len), folder / "a", "fewer than seq_len + 1")
        return
    rows = mixture(folder, seq_len=seq_len, seed=seed)
    assert rows.n_rows == sum(expected)
    windows = rows.shuffled(epoch * rows.n_rows, (epoch + 1) * rows.n_rows)
    assert torch.equal(
        windows, windows[:, :1] + torch.arange(seq_len + 1)
    )  # each row is a run of neighbours
    starts, first = sorted(windows[:, 0].tolist()), 0
    for size, count in zip(sizes, expected):
        mine, starts = starts[:count], starts[count:]
        assert all(
            first <= start and start + seq_len < first + size for start in mine
        )  # seq_len + 1 tokens, all of this shard
        assert all(later - start == seq_len for start, later in zip(mine, mine[1:]))
        first += size


def test_epochs_differ_in_order_and_in_the_cut(tmp_path):
    """A second epoch in the same order would repeat the batches; the tokens left over at the end get their turn too."""
    numbered(tmp_path, "a", [8 * 20 + 6])
    rows = mixture(tmp_path)
    epochs = [rows.shuffled(20 * e, 20 * e + 20) for e in range(4)]
    assert len({tuple(epoch[:, 0].tolist()) for epoch in epochs}) == 4
    assert len({int(epoch[:, 0].min()) for epoch in epochs}) > 1
    numbered(tmp_path, "b", [8 * 20 + 1])  # nothing left over: the order alone must differ
    rows = mixture(tmp_path, "b")
    assert len({tuple(rows.shuffled(20 * e, 20 * e + 20)[:, 0].tolist()) for e in range(4)}) == 4


@pytest.mark.parametrize(
    "spec, shares",
    [
        ("a*0.7,b*0.3", (700, 300)),
        ("a,b", (500, 500)),
        ("a*2,b*1,c*1", (500, 250, 250)),
        ("a*1,b*2", (333, 667)),
    ],
)
def test_every_thousand_rows_hold_the_exact_shares(tmp_path, spec, shares):
    """Weights are kept in every block of 1,000 rows, not on average; each source still goes through its own epochs in full."""
    for number, name in enumerate("abc"):
        numbered(tmp_path, name, [200 + 24 * number], 10_000 * number)
    rows = mixture(tmp_path, spec)
    for block in (0, 3):
        source = rows.shuffled(1000 * block, 1000 * block + 1000)[:, 0] // 10_000
        assert tuple(torch.bincount(source).tolist()) == shares
    numbers = rows.shuffled(0, 1000)[:, 0]
    first_epoch = numbers[numbers < 10_000][: rows.streams[0].n_rows]
    assert len(set(first_epoch.tolist())) == rows.streams[0].n_rows


def test_the_sources_of_a_mixture_are_interleaved(tmp_path):
    """A block that gave source after source would be a curriculum nobody asked for."""
    numbered(tmp_path, "a", [300]), numbered(tmp_path, "b", [300], 10_000)
    source = (mixture(tmp_path, "a,b").shuffled(0, 1000)[:, 0] >= 10_000).int()
    assert 400 < (source[1:] != source[:-1]).sum() < 600


def test_weights_are_read_and_scaled_to_one():
    """The README's spelling."""
    assert data.parse_mixture("a*0.7,b*0.3") == [
        ("a", pytest.approx(0.7)),
        ("b", pytest.approx(0.3)),
    ]
    assert data.parse_mixture("a, b") == [("a", 0.5), ("b", 0.5)]
    assert data.parse_mixture("a*3,b") == [("a", 0.75), ("b", 0.25)]


@pytest.mark.parametrize(
    "spec", ["", ",", "a*x", "a*0", "a*-1,b*2", "a*-1", "a*nan", "a*inf,b", "a*0.5*2", "*0.5,a"]
)
def test_bad_weights_are_errors_that_show_the_mixture(spec):
    """A negative or infinite share means nothing; it must not surface later as an error of numpy."""
    fails(lambda: data.parse_mixture(spec), repr(spec))


def test_validation_rows_come_once_each_and_the_first_are_a_fair_sample(tmp_path):
    """Every rank count and seed must evaluate the same rows; in the order of the files the first would all be of one source."""
    for name, first in (("a", 0), ("b", 500)):
        foreign(tmp_path / name / "val_000.bin", np.arange(first, first + 320) % 256)
    rows = mixture(tmp_path, "a,b", split="val")
    every = rows.validation(0, rows.n_rows)
    starts = [rows.streams[k].row(i) for k in (0, 1) for i in range(rows.streams[k].n_rows)]
    assert sorted(map(tuple, every.tolist())) == sorted(map(tuple, np.stack(starts).tolist()))
    assert torch.equal(rows.validation(2, 5), every[2:5])
    of_a = {tuple(row) for row in np.stack(starts)[: rows.streams[0].n_rows].tolist()}
    assert (
        8
        <= sum(tuple(row) in of_a for row in every[: rows.n_rows // 2].tolist())
        <= rows.n_rows // 2 - 8
    )


def test_an_id_over_the_vocabulary_in_a_foreign_shard_is_named_when_its_row_is_read(tmp_path):
    """A foreign shard has no checksum; an embedding lookup out of range is unreadable on a GPU."""
    tokens = np.zeros(100, int)
    tokens[42] = 262
    path = foreign(tmp_path / "a" / "train_000.bin", tokens)
    rows = Mixture("a", str(tmp_path), "train", 8, 0, BYTE)
    fails(lambda: rows.shuffled(0, rows.n_rows), path, "id 262", "token 40")
    assert rows.streams[0].row(0).tolist() == [0] * 9  # rows without it can be read


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda folder: None, ["no data", "data.py --sources=mine"]),
        (lambda folder: folder.mkdir(), ["no train shard", "data.py --sources=mine"]),
        (lambda folder: shard(folder / "val_000.bin", range(99)), ["no train shard"]),
        (lambda folder: shard(folder / "train_000.bin", range(8)), ["8 tokens", "seq_len + 1 = 9"]),
        (lambda folder: shard(folder / "train_000.bin", []), ["0 tokens"]),
    ],
)
def test_data_that_is_not_there_or_too_little_is_named_with_the_command(tmp_path, make, words):
    """Found before the first step, with the folder and what makes it."""
    make(tmp_path / "mine")
    fails(lambda: Mixture("mine", str(tmp_path), "train", 8, 0, BYTE), tmp_path / "mine", *words)


def test_exactly_one_window_is_enough(tmp_path):
    """seq_len + 1 tokens are one row: the smallest data that trains."""
    shard(tmp_path / "mine" / "train_000.bin", range(9))
    assert (
        Mixture("mine", str(tmp_path), "train", 8, 0, BYTE).shuffled(0, 2).tolist()
        == [list(range(9))] * 2
    )


def test_the_fingerprint_tells_other_data_apart(tmp_path):
    """Resume compares it: another mixture, another count or other tokens are other data; the same files are the same."""
    numbered(tmp_path, "a", [100]), numbered(tmp_path, "b", [100])
    prints = [mixture(tmp_path, spec).fingerprint for spec in ("a", "a,b", "a*0.9,b*0.1")]
    assert mixture(tmp_path).fingerprint == prints[0]
    numbered(tmp_path, "a", [100], first=1)
    prints.append(mixture(tmp_path).fingerprint)
    numbered(tmp_path, "a", [100, 100])
    prints.append(mixture(tmp_path).fingerprint)
    assert len(set(prints)) == 5


# ---------------------------------------------------------------------------------------------------------------------
# Chat template


def chat(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_a_single_turn_as_literal_ids():
    """Written out by hand: the assistant's words and its <|end|> are supervised, nothing else."""
    ids, supervised = data.render(chat("hi", "yo!"), BYTE)
    assert ids == [258, 104, 105, 260, 259, 121, 111, 33, 260]
    assert [int(s) for s in supervised] == [0, 0, 0, 0, 0, 1, 1, 1, 1]


def test_several_turns_after_a_system_message_as_literal_ids():
    """Every answer of the assistant is supervised, also the earlier ones; system and user turns never are."""
    ids, supervised = data.render(
        [{"role": "system", "content": "S"}, *chat("a", "b", "c", "dé")], BYTE
    )
    assert ids == [257, 83, 260, 258, 97, 260, 259, 98, 260, 258, 99, 260, 259, 100, 195, 169, 260]
    assert [int(s) for s in supervised] == [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]


@given(
    st.lists(st.text(max_size=9), min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0)
)
@quick
def test_the_last_supervised_id_is_the_end_of_the_answer(texts):
    """A model that is not taught to stop never stops; and text can add no special id of its own."""
    ids, supervised = data.render(chat(*texts), BYTE)
    assert len(ids) == len(supervised) and supervised[-1] and ids[-1] == END
    assert sum(i >= 256 for i in ids) == 2 * len(texts)
    assert sum(supervised) == sum(len(text.encode()) + 1 for text in texts[1::2])


def test_a_prompt_is_the_beginning_of_the_whole_conversation():
    """Generation must continue from the very ids that training saw before the answer."""
    prompt = data.render_prompt(data.user("hi"), BYTE)
    assert prompt == [258, 104, 105, 260, 259] == data.render(chat("hi", "yo"), BYTE)[0][:5]


@pytest.mark.parametrize(
    "roles",
    [
        [],
        ["assistant"],
        ["system"],
        ["user", "user"],
        ["user", "assistant", "assistant"],
        ["user", "system"],
        ["system", "system", "user"],
        ["user", "tool"],
    ],
)
def test_turns_out_of_order_are_an_error_that_lists_them(roles):
    """The template has no meaning for them; the message shows what came."""
    fails(
        lambda: data.render([{"role": role, "content": "x"} for role in roles], BYTE),
        ", ".join(roles) or "empty",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Records

HH = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: {}"
HH_PROMPT = chat("Hi.", "Hello.", "Why?")


@pytest.mark.parametrize(
    "stage, row, record",
    [
        (
            "sft",
            {"instruction": "Add", "input": "1 2", "output": "3"},
            {"messages": chat("Add\n\n1 2", "3")},
        ),
        (
            "sft",
            {"instruction": "Add", "input": "", "output": "3", "text": "..."},
            {"messages": chat("Add", "3")},
        ),
        ("sft", {"instruction": "Add", "output": "3"}, {"messages": chat("Add", "3")}),
        ("sft", {"messages": chat("a", "b"), "id": 7}, {"messages": chat("a", "b")}),
        ("sft", {"question": "q", "answer": "#### 1"}, {"messages": chat("q", "#### 1")}),
        (
            "sft",
            {"chosen": HH.format("So."), "rejected": HH.format("No.")},
            {"messages": [*HH_PROMPT, *chat("", "So.")[1:]]},
        ),
        (
            "sft",
            {
                "instruction": "Add",
                "input": "",
                "output": "3",
                "chosen": "3",
                "rejected": "go away",
            },
            {"messages": chat("Add", "3")},
        ),
        (
            "dpo",
            {"chosen": HH.format("So."), "rejected": HH.format("No.")},
            {"prompt": HH_PROMPT, "chosen": "So.", "rejected": "No."},
        ),
        (
            "dpo",
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"prompt": chat("q"), "chosen": "a", "rejected": "b"},
        ),
        (
            "dpo",
            {"prompt": chat("q"), "chosen": "a", "rejected": "b"},
            {"prompt": chat("q"), "chosen": "a", "rejected": "b"},
        ),
        (
            "dpo",
            {"instruction": "i", "input": "x", "output": "a", "chosen": "a", "rejected": "b"},
            {"prompt": chat("i\n\nx"), "chosen": "a", "rejected": "b"},
        ),
        (
            "dpo",
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                ],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            {
                "prompt": [{"role": "system", "content": "s"}, *chat("q")],
                "chosen": "a",
                "rejected": "b",
            },
        ),
        (
            "verifier",
            {"question": "q", "answer": "#### 1", "id": 3},
            {"question": "q", "answer": "#### 1"},
        ),
    ],
)
def test_each_schema_becomes_the_canonical_record(stage, row, record):
    """The published forms that RECORDS names, by hand."""
    assert data.convert([row], stage, "x") == [record]


@pytest.mark.parametrize(
    "stage, row",
    [
        ("sft", {"instruction": "no output"}),
        ("sft", {"prompt": "q", "completion": "a"}),
        ("sft", {"question": "q"}),
        ("sft", {"messages": [{"from": "a"}]}),
        ("sft", {"messages": "text"}),
        ("sft", {"instruction": "q", "output": None}),
        ("sft", {"instruction": None, "output": "a"}),
        ("sft", {"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}),
        ("sft", "text"),
        ("sft", 5),
        ("sft", None),
        ("sft", []),
        ("dpo", {"prompt": "q", "chosen": "a"}),
        ("dpo", {"instruction": "q", "output": "a"}),
        ("dpo", {"chosen": "no dialogue", "rejected": "no dialogue."}),
        ("dpo", {"prompt": "q", "chosen": ["a"], "rejected": ["b"]}),
        ("dpo", {"conversations": [{"from": "alien", "value": "q"}], "chosen": {}, "rejected": {}}),
        ("dpo", {"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}),
        ("verifier", {"instruction": "i", "output": "a"}),
        ("verifier", {"question": "q"}),
        ("verifier", {"question": "q", "answer": None}),
        ("verifier", {"question": 3, "answer": "3"}),
    ],
)
def test_a_row_of_no_known_schema_is_an_error_with_its_place(stage, row):
    """A missing key, or text that is none, is a wrong file, not a record to skip: the second row is named, with what was wanted."""
    good = {
        "sft": {"instruction": "q", "output": "a"},
        "dpo": {"prompt": "q", "chosen": "a", "rejected": "b"},
        "verifier": {"question": "q", "answer": "1"},
    }
    fails(
        lambda: data.convert([good[stage], row], stage, "mine.jsonl"), "mine.jsonl, record 2", stage
    )


@pytest.mark.parametrize(
    "stage, bad, reason",
    [
        ("sft", {"instruction": "q", "output": " \n"}, "empty response"),
        ("sft", {"messages": chat("a", "b", "c", "")}, "empty response"),
        ("sft", {"question": "q", "answer": ""}, "empty response"),
        ("sft", {"messages": chat("", "a", "b")[1:]}, "does not begin with the user"),
        ("sft", {"messages": []}, ""),
        ("sft", {"messages": chat("only a question")}, ""),
        ("sft", {"messages": chat("a", "b", "c")}, ""),
        ("sft", {"messages": [*chat("a", "b"), *chat("", "c")[1:]]}, ""),
        ("sft", {"messages": [{"role": "tool", "content": "x"}, *chat("a", "b")]}, ""),
        ("dpo", {"prompt": "q", "chosen": "", "rejected": "b"}, "empty response"),
        ("dpo", {"prompt": "q", "chosen": "a", "rejected": "\n"}, "empty response"),
        ("dpo", {"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
        (
            "dpo",
            {"chosen": HH.format("a"), "rejected": HH.replace("Why", "How").format("b")},
            "different prompts",
        ),
        (
            "dpo",
            {
                "chosen": "\n\nAssistant: Hi\n\nAssistant: a",
                "rejected": "\n\nAssistant: Hi\n\nAssistant: b",
            },
            "does not begin with the user",
        ),
        ("dpo", {"prompt": chat("q", "a"), "chosen": "b", "rejected": "c"}, ""),
        ("dpo", {"prompt": [], "chosen": "b", "rejected": "c"}, ""),
        ("dpo", {"chosen": HH.format("a\n\nHuman: b"), "rejected": HH.format("a\n\nHuman: c")}, ""),
        ("verifier", {"question": "q", "answer": " "}, "empty response"),
        ("verifier", {"question": "", "answer": "1"}, ""),
    ],
)
def test_a_useless_record_is_dropped_aloud(capsys, stage, bad, reason):
    """Known faults of real data: left out with a printed count and reason, and an error where nothing is left.
    A conversation that render() would refuse, or that supervises nothing at its end, is of this kind: later it would end the run."""
    good = {
        "sft": {"instruction": "fine", "output": "a"},
        "dpo": {"prompt": "fine", "chosen": "a", "rejected": "b"},
        "verifier": {"question": "fine", "answer": "1"},
    }
    assert len(data.convert([good[stage], bad, bad], stage, "mine")) == 1
    said = capsys.readouterr().out
    assert "mine: 2 of 3 records dropped: 2 " in said and reason in said
    fails(lambda: data.convert([bad], stage, "mine"), "mine: no usable", stage)


@pytest.mark.parametrize(
    "stage, row, least",
    [
        ("sft", {"question": "q", "answer": "a"}, 2),
        ("dpo", {"prompt": "p", "chosen": "c", "rejected": "r"}, 2),
        ("verifier", {"question": "q", "answer": "#### 1"}, 3),
    ],
)
def test_a_data_set_of_one_record_is_refused_in_words(tmp_path, stage, row, least):
    """There is nothing to hold out: said when the data is made, not by a missing file when training begins."""
    data.write_jsonl(str(tmp_path / "one.jsonl"), [row, row])
    with pytest.raises(
        UserError,
        match=f"1 usable records of 1 prompts, too few to hold some out .*at least {least} different",
    ):
        data.main(
            [f"--sources={stage}/one={tmp_path / 'one.jsonl'}", f"--data_dir={tmp_path / 'data'}"]
        )
    assert not (tmp_path / "data" / "one").exists()


def test_duplicates_are_kept_once(capsys):
    """The same record twice would weigh double, and could be on both sides of a split."""
    rows = [
        {"question": "q", "answer": "1"},
        {"question": "q", "answer": "2"},
        {"question": "q", "answer": "1", "id": 2},
    ]
    assert len(data.convert(rows, "verifier", "mine")) == 2
    assert "1 of 3 records dropped: 1 duplicate" in capsys.readouterr().out


def test_no_rows_at_all_are_an_error():
    """0 records would train on nothing."""
    fails(lambda: data.convert([], "sft", "mine"), "mine: no usable sft record")


# ---------------------------------------------------------------------------------------------------------------------
# Preparation of local files


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **keys):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def documents_of(folder) -> list[str]:
    """Every document of the shards, in no particular order; each must end with EOS."""
    found = []
    for path in sorted(folder.glob("*.bin")):
        ids = tokens_of(path)
        cuts = [i for i, token in enumerate(ids) if token == EOS]
        found += [BYTE.decode(ids[a:b]) for a, b in zip([0, *[c + 1 for c in cuts]], cuts)]
    return found


TEXTS = [f"Tale number {i}.\nIt has two lines." for i in range(250)]


def write_source(folder, kind: str) -> str:
    marked = "".join(text + "\n<|endoftext|>\n" for text in TEXTS).encode()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(
            pyarrow.table({"text": TEXTS, "id": list(range(250))}), folder / "x.parquet"
        )
    else:
        content = {
            "txt": marked,
            "txt.gz": gzip.compress(marked),
            "jsonl": rows,
            "jsonl.gz": gzip.compress(rows),
            "json": json.dumps([{"text": t} for t in TEXTS]).encode(),
        }
        (folder / f"x.{kind}").write_bytes(content[kind])
    return f"x.{kind}"


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
    ids = tokens_of(tmp_path / "out/mine/train_000.bin") + tokens_of(
        tmp_path / "out/mine/val_000.bin"
    )
    assert BYTE.decode(ids) == "first<|endoftext|>" + "second" * 20 + "<|endoftext|>"


WIKI = " \n = Tom Cat = \n \n He is a cat . \n = = Life = = \n He sat . \n \n = Mia Dog = \n She ran . \n"


def test_wikitext_headings_begin_documents(tmp_path):
    """A line " = Title = " begins an article, " = = Section = = " does not; no character is lost."""
    (tmp_path / "w.txt").write_text(WIKI)
    prepare(request(tmp_path, "pretrain/my-wikitext=w.txt"))
    ids = tokens_of(tmp_path / "out/my-wikitext/train_000.bin") + tokens_of(
        tmp_path / "out/my-wikitext/val_000.bin"
    )
    articles = BYTE.decode(ids).split("<|endoftext|>")
    assert [re.match(r" = (\w+ \w+) = \n", article)[1] for article in articles[:-1]] == [
        "Tom Cat",
        "Mia Dog",
    ]
    assert "".join(articles) == WIKI.removeprefix(" \n")
    assert list(data.wikitext_articles([" = X = \n", " a \n", " = = Y = = \n", " = Z = \n"])) == [
        " = X = \n a \n = = Y = = \n",
        " = Z = \n",
    ]


def test_marked_documents_are_separated_under_a_wikitext_name_too(tmp_path):
    """text_documents promises: by <|endoftext|> lines first. A stand-in for WikiText-103 is prepared under its name."""
    (tmp_path / "w.txt").write_text("".join(text + "\n<|endoftext|>\n" for text in TEXTS))
    prepare(request(tmp_path, "pretrain/wikitext-103=w.txt"))
    assert len(documents_of(tmp_path / "out" / "wikitext-103")) == 250


def test_spelled_special_tokens_in_text_and_blank_documents_make_no_eos(tmp_path):
    """Only a line of its own separates; inside a line it is text. Documents of white space are none."""
    (tmp_path / "x.txt").write_text(
        "a <|endoftext|> b <|end|>\n<|endoftext|>\n \n<|endoftext|>\n\n<|endoftext|>\nlast"
    )
    prepare(request(tmp_path, "pretrain/mine=x.txt"))
    ids = tokens_of(tmp_path / "out/mine/train_000.bin") + tokens_of(
        tmp_path / "out/mine/val_000.bin"
    )
    assert ids.count(EOS) == 2 and END not in ids


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_cap_takes_the_first_documents(tmp_path, kind):
    """name:N is for quick runs: N documents, no more, from the start."""
    prepare(request(tmp_path, f"pretrain/mine:7={write_source(tmp_path, kind)}"))
    ids = tokens_of(tmp_path / "out/mine/train_000.bin") + tokens_of(
        tmp_path / "out/mine/val_000.bin"
    )
    assert [text.strip() for text in BYTE.decode(ids).split("<|endoftext|>")[:-1]] == TEXTS[:7]


@pytest.mark.parametrize("n, length", [(1, 1), (1, 1000), (2, 10), (99, 30)])
def test_validation_is_never_empty(tmp_path, n, length):
    """One single book, or fewer than 100 documents: the last twentieth is held out, and no token is in both or lost."""
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
    """Shards are cut at SHARD_TOKENS; also one document over it keeps a validation part, and nothing is lost."""
    monkeypatch.setattr(data, "SHARD_TOKENS", 100)
    jsonl(tmp_path / "x.jsonl", *({"text": text} for text in texts))
    prepare(request(tmp_path, "pretrain/mine=x.jsonl"))
    folder = tmp_path / "out" / "mine"
    assert list(folder.glob("val_*.bin"))
    assert sum(len(tokens_of(path)) for path in folder.glob("*.bin")) == sum(map(len, texts)) + len(
        texts
    )
    assert texts is not TEXTS or len(list(folder.glob("train_*.bin"))) > 10


def test_the_work_per_document_does_not_grow_with_their_number(tmp_path):
    """TinyStories has two million: twelve times the documents must not take a hundred times the time."""
    spent = []
    for n in (1000, 12000):
        jsonl(tmp_path / f"{n}.jsonl", *({"text": "ab"} for _ in range(n)))
        start = time.process_time()
        prepare(request(tmp_path, f"pretrain/mine{n}={n}.jsonl"))
        spent.append(time.process_time() - start)
    assert spent[1] < 24 * spent[0], spent


@pytest.mark.parametrize(
    "stage, row",
    [
        ("sft", {"instruction": "Say {}", "input": "", "output": "So {}"}),
        ("dpo", {"prompt": "Say {}", "chosen": "yes", "rejected": "no"}),
        ("verifier", {"question": "What is {}?", "answer": "#### {}"}),
    ],
)
def test_records_are_cut_by_prompt_into_disjoint_splits(tmp_path, stage, row, no_network):
    """Two answers to one prompt go the same way; only problems get a part for the verifier; nothing is lost."""
    rows = [
        {
            key: text.format(i)
            + (" again" if key in ("output", "chosen", "answer") and copy else "")
            for key, text in row.items()
        }
        for i in range(300)
        for copy in (0, 1)
    ]
    jsonl(tmp_path / "x.jsonl", *rows)
    prepare(request(tmp_path, f"{stage}/mine=x.jsonl"))
    kind = "problems" if stage == "verifier" else stage
    names = ["train", "val"] + ["verifier"] * (stage == "verifier")
    splits = {
        split: data.load_records("mine", str(tmp_path / "out"), kind, split) for split in names
    }
    assert sum(map(len, splits.values())) == 600 and all(splits.values())
    prompts = [{data.prompt_of(record) for record in part} for part in splits.values()]
    assert len(set.union(*prompts)) == sum(map(len, prompts)) == 300
    share = {split: len(part) / 600 for split, part in splits.items()}
    assert share == pytest.approx(
        {"train": 0.7, "val": 0.05, "verifier": 0.25}
        if stage == "verifier"
        else {"train": 0.95, "val": 0.05},
        abs=0.05,
    )
    assert (tmp_path / "out/mine/problems_verifier.jsonl").exists() == (stage == "verifier")


@pytest.mark.parametrize("n", [2, 12, 40])
def test_a_small_file_of_records_has_something_in_train_and_in_val(tmp_path, n):
    """A notes.jsonl of your own (the docstring's example) must be enough for the stage that reads both."""
    jsonl(tmp_path / "notes.jsonl", *({"instruction": f"Say {i}", "output": "a"} for i in range(n)))
    prepare(request(tmp_path, "mine=notes.jsonl", stage="sft"))
    assert all(
        data.load_records("mine", str(tmp_path / "out"), "sft", split) for split in ("train", "val")
    )


def test_records_may_come_as_parquet(tmp_path):
    """The design allows .jsonl, .json and .parquet for every stage: hub data sets are published so."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"question": [f"q{i}" for i in range(100)], "answer": ["#### 1"] * 100}),
        tmp_path / "x.parquet",
    )
    prepare(request(tmp_path, "verifier/mine=x.parquet"))
    assert len(data.load_records("mine", str(tmp_path / "out"), "problems", "train")) > 50


def test_the_chats_of_a_folder_with_problems_alone_are_its_problems(tmp_path):
    """SFT on GSM8K: question and answer become a chat."""
    jsonl(tmp_path / "x.jsonl", *({"question": f"q{i}", "answer": "#### 1"} for i in range(100)))
    prepare(request(tmp_path, "verifier/mine=x.jsonl"))
    assert data.load_records("mine", str(tmp_path / "out"), "sft", "train")[0]["messages"][1] == {
        "role": "assistant",
        "content": "#### 1",
    }
    fails(
        lambda: data.load_records("mine", str(tmp_path / "out"), "dpo", "train"),
        "mine",
        "dpo",
        "data.py --sources=mine",
    )


def test_eval_data_keep_their_form(tmp_path):
    """Text as it is, problems and labelled sentences as JSON lines; a test set is not cut, shuffled or cleaned."""
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
        data.load_records("p", str(out), "problems", "test")
        == [{"question": "q", "answer": "#### 1"}] * 2
    )
    assert data.read_jsonl(str(out / "s/test.jsonl")) == [
        {"sentence": 'a "fine film ', "label": "1"},
        {"sentence": "bad ", "label": "0"},
    ]
    assert data.read_jsonl(str(out / "d/test.jsonl")) == [{"dialogue": "a", "summary": "b"}]


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
    [
        (stage, fault)
        for stage in data.STAGES
        for fault in BAD_SOURCES
        if (stage, fault) != ("eval", "wrong schema")
    ],
)  # evaluation data keep any form
def test_a_bad_source_is_an_error_that_names_it_and_leaves_the_prepared_folder(
    tmp_path, stage, fault
):
    """Never a traceback, never a silent skip, never half a folder: what was prepared before can still be trained on."""
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


def test_a_parquet_file_without_text_is_an_error(tmp_path):
    """The wrong column, or a column with holes, in words."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "x.parquet")
    fails(lambda: prepare(request(tmp_path, "pretrain/mine=x.parquet")), "x.parquet", "text")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "y.parquet")
    fails(lambda: prepare(request(tmp_path, "pretrain/mine=y.parquet")), "y.parquet", "text")


@pytest.mark.parametrize(
    "source, keys",
    [
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
    ],
)
def test_an_unknown_preset_or_stage_is_an_error_in_words(tmp_path, source, keys, no_network):
    """A misspelt name must list what there is, without a traceback and without the network."""
    (tmp_path / "x.txt").write_text("text")
    fails(
        lambda: prepare(request(tmp_path, source, **keys)),
        re.split("[:=/]", source)[-2 if "=" in source and ":" not in source else 0].strip("."),
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / "up").exists()


def test_an_unknown_stage_of_the_command_lists_the_stages():
    """--stage=train is a likely slip."""
    fails(lambda: DataConfig(stage="train"), "train", *data.STAGES)


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
    """Same name, other content: training on the old text without a word would be a silent mistake."""
    (tmp_path / "x.txt").write_text("old " * 50)
    prepare(request(tmp_path, "pretrain/mine=x.txt"))
    (tmp_path / "x.txt").write_text("new one " * 50)
    prepare(request(tmp_path, "pretrain/mine=x.txt"))
    assert BYTE.decode(tokens_of(tmp_path / "out/mine/train_000.bin")).startswith("new one ")


def test_a_smaller_preparation_leaves_no_shards_of_the_larger_one(tmp_path, monkeypatch):
    """The loader takes every train_*.bin of the folder: stale ones would be trained on."""
    monkeypatch.setattr(data, "SHARD_TOKENS", 500)
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
    """New shards under the old manifest: the old request, asked again, must not be told that all is there."""
    (tmp_path / "a.txt").write_text("old " * 50), (tmp_path / "b.txt").write_text("new " * 50)
    prepare(request(tmp_path, "pretrain/mine=a.txt"))
    write = data.write_json
    monkeypatch.setattr(data, "write_json", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(request(tmp_path, "pretrain/mine=b.txt"))
    monkeypatch.setattr(data, "write_json", write)
    prepare(request(tmp_path, "pretrain/mine=a.txt"))
    assert BYTE.decode(tokens_of(tmp_path / "out/mine/train_000.bin")).startswith("old ")


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
    """kill -9 after the bytes were written and before they were safe: nothing to load, and the next call completes the work."""
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
        "data.py --sources=mine",
    )
    prepare(request(tmp_path, "pretrain/mine=x.txt"))
    assert len(documents_of(tmp_path / "out" / "mine")) == 250


def test_processes_that_prepare_the_same_at_once_end_with_equal_files(tmp_path):
    """Every rank of a job may find the toy world missing: all succeed, and one whole version is there."""
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
    """Shards, and records of every stage that load_records finds; ensure() makes it when it is missing and once."""
    cfg = request(tmp_path, "toy", toy_stories=80, toy_problems=300)
    prepare(cfg)
    out = str(tmp_path / "out")
    assert (
        Mixture("toy", out, "train", 64, 0, TOY).n_rows > 10
        and Mixture("toy", out, "val", 64, 0, TOY).n_rows > 0
    )
    for kind, splits in {
        "sft": ("train", "val"),
        "dpo": ("train", "val", "test"),
        "problems": ("train", "verifier", "val", "test"),
    }.items():
        for split in splits:
            rows = data.load_records("toy", out, kind, split)
            assert rows and (
                kind != "sft" or all(data.render(row["messages"], BYTE) for row in rows)
            )
    problems = [
        {row["question"] for row in data.load_records("toy", out, "problems", split)}
        for split in ("train", "verifier", "val", "test")
    ]
    assert len(set.union(*problems)) == sum(map(len, problems))
    before = snapshot(tmp_path)
    capsys.readouterr()
    data.ensure("toy", out), data.ensure("elsewhere*0.5,other", out)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "keys", [{"toy_stories": 10}, {"toy_stories": 0}, {"toy_problems": 0}, {"toy_problems": -1}]
)
def test_a_toy_world_of_an_odd_size_is_made_or_refused_in_words(tmp_path, keys):
    """The sizes are keys of the command line: too few must not end in a traceback."""
    try:
        prepare(request(tmp_path, "toy", **{"toy_stories": 80, "toy_problems": 50, **keys}))
    except UserError as error:
        assert next(iter(keys)) in str(error)


# ---------------------------------------------------------------------------------------------------------------------
# The hub, without the hub

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
    """A revision is 40 hex digits, or the data could change under a paper's numbers; no code of the hub is ever run."""
    import datasets

    calls = []

    def load_dataset(path, name=None, **keys):
        calls.append((path, name, keys))
        return datasets.Dataset.from_dict(COLUMNS[path])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert set(data.PRESETS) == set(HUB)
    for preset, (stage, path, config, split) in HUB.items():
        prepare(request(tmp_path, preset))
        assert (
            calls[-1][:2] == (path, config)
            and set(calls[-1][2]) == {"split", "revision"}
            and calls[-1][2]["split"] == split
        )
        assert re.fullmatch("[0-9a-f]{40}", calls[-1][2]["revision"])
        manifest = json.loads((tmp_path / "out" / preset / f"manifest_{stage}.json").read_text())
        assert calls[-1][2]["revision"] in manifest["request"]["from"] and manifest["sha256"]
    assert len(calls) == len(HUB)
    assert len(documents_of(tmp_path / "out" / "tinystories")) == 9
    assert len(data.read_jsonl(str(tmp_path / "out/gsm8k-test/problems_test.jsonl"))) == 60


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
    jsonl(tmp_path / "x.jsonl", *(dict(zip(columns, values)) for values in zip(*columns.values())))
    prepare(request(tmp_path, re.search(r"--sources=(\S+)", said)[1].replace("FILE", "x.jsonl")))
    assert (tmp_path / "out" / preset / f"manifest_{HUB[preset][0]}.json").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# The real data, where they are


def renders(record: dict) -> bool:
    try:
        data.render(
            record["messages"]
            if "messages" in record
            else [*record["prompt"], {"role": "assistant", "content": record["chosen"]}],
            BYTE,
        )
    except UserError:
        return False
    return True


def test_alpaca_converts_whole_but_for_its_empty_outputs(capsys):
    """52,002 published records, 28 of them without an answer; no two are equal."""
    rows = data.read_jsonl(real("alpaca_52k.jsonl.gz"))
    kept = data.convert(rows, "sft", "alpaca")
    assert (len(rows), len(kept)) == (52_002, 51_974)
    assert capsys.readouterr().out == "alpaca: 28 of 52002 records dropped: 28 empty response\n"
    assert all(renders(record) for record in kept[::50])


def test_hh_rlhf_pairs_that_are_kept_can_be_rendered(capsys):
    """2,312 published test pairs: 4 have an empty answer, 5 differ before the last turn, 4 more hold two assistant turns in a row."""
    rows = data.read_jsonl(real("hh_rlhf_harmless_base_test.jsonl.gz"))
    kept = data.convert(rows, "dpo", "hh")
    assert len(rows) == 2312
    assert "4 empty response" in capsys.readouterr().out
    assert sum(not renders(record) for record in kept) == 0
    assert len(kept) == 2299


@pytest.mark.parametrize(
    "name, n, kept, why",
    [
        ("preference_raschka_1100.jsonl", 1100, 1094, "6 chosen equals rejected"),
        ("preference_llamafactory_dpo_en.jsonl.gz", 300, 295, "5 duplicate"),
    ],
)
def test_the_preference_files_convert(capsys, name, n, kept, why):
    """Counts as looked up in the files: six pairs are equal in the one, five rows are repeated in the other."""
    rows = data.read_jsonl(real(name))
    records = data.convert(rows, "dpo", "x")
    assert (len(rows), len(records)) == (
        n,
        kept,
    ) and f"{n - kept} of {n} records dropped: {why}\n" in capsys.readouterr().out
    assert all(renders(record) for record in records)


@pytest.mark.parametrize("name, n", [("gsm8k_train.jsonl.gz", 7473), ("gsm8k_test.jsonl", 1319)])
def test_gsm8k_converts_whole(capsys, name, n):
    """The published counts; nothing may be dropped from a benchmark."""
    records = data.convert(data.read_jsonl(real(name)), "verifier", "gsm8k")
    assert (
        len(records) == n
        and all("#### " in record["answer"] for record in records)
        and capsys.readouterr().out == ""
    )


@pytest.mark.parametrize(
    "name, title, last",
    [
        ("wikitext2_raw_valid.txt.gz", "Homarus gammarus", "Gold dollar"),
        ("wikitext2_raw_test.txt.gz", "Robert Boulter", None),
    ],
)
def test_wikitext_2_is_cut_into_its_articles(name, title, last):
    """About 60 articles each (a line of a formula in the test split looks like a heading); no character is lost."""
    with data.open_text(real(name)) as f:
        text = f.read()
    articles = list(filter(str.strip, data.wikitext_articles(text.splitlines(keepends=True))))
    assert 60 <= len(articles) <= 62 and articles[0].startswith(f" = {title} = \n")
    assert "".join(articles).replace("\n", "") == text.replace("\n", "").removeprefix(" ")


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
    """--tokenizer=gpt2 on the login node leaves the very file of OpenAI beside the shards; without network it names another way."""
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
