"""Shards are what their headers say, and rows come in an order that a seed and a number decide."""

import dataclasses
import re
import zlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from corpus_helpers import foreign, quick, shard, snapshot
from helpers import BYTE, fails
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from corpus.shards import Mixture, parse_mixture, read_shard, split_of, write_shard
from corpus.tokenizer import load_tokenizer
from train import PretrainConfig


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
    """llm.c and modded-nanogpt must be able to load our shards.

    Read by hand: 256 int32 with magic, version and count; then uint16.
    """
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
    """nanoGPT's .bin is bare uint16, and would lose tokens if it were read with a header.

    So it must be asked for.
    """
    path = tmp_path / "train.bin"
    np.arange(1000, dtype=np.uint16).tofile(path)
    fails(lambda: read_shard(str(path), BYTE), path, "headerless")
    assert read_shard(str(path), BYTE, headerless=True).tolist() == list(range(1000))
    path.write_bytes(path.read_bytes() + b"\0")
    fails(lambda: read_shard(str(path), BYTE, headerless=True), path, "2001")


def test_the_flag_that_the_hint_names_exists(tmp_path):
    """A hint that cannot be followed is worse than none."""
    foreign(tmp_path / "x.bin", [1], magic=7)
    flag = re.search(r"--(\w+)", fails(lambda: read_shard(str(tmp_path / "x.bin"), BYTE)))[1]
    assert flag in {field.name for field in dataclasses.fields(PretrainConfig)}


@pytest.mark.parametrize("version", [1, 7])
def test_a_shard_of_llm_c_for_llama_3_is_told_from_bare_tokens(tmp_path, version):
    """Its ids are uint32: the hint --headerless would make each of them two wrong tokens."""
    path = foreign(tmp_path / "x.bin", range(300), magic=20240801, version=version)
    said = fails(lambda: read_shard(str(path), BYTE), path, "llama-3", "uint32")
    assert "headerless" not in said
    fails(lambda: read_shard(str(path), BYTE, headerless=True), path, "header")


def test_a_shard_with_a_header_is_not_read_as_bare_tokens(tmp_path):
    """512 tokens of header would be trained on, and the split would still look right."""
    for path in (foreign(tmp_path / "a.bin", range(99)), shard(tmp_path / "b.bin", range(99))):
        fails(lambda path=path: read_shard(str(path), BYTE, headerless=True), path, "header")


NAMES = {
    "train": "train.bin train_000.bin fineweb_train_000001.bin retrieVAL_train_000.bin "
    "train000.bin val-d-isere.train.bin Train_0.bin valley_training_1.bin",
    "val": "val.bin fineweb_val_000000.bin validation.bin trains_val_000.bin restraint.valid.bin "
    "train-delays_val_000.bin train_0_val.bin",
    None: "retrieval_000.bin restrain.bin evaluation.bin test.bin values_0.bin .bin "
    "\u00e9val.bin pretrain_0.bin",
}


@pytest.mark.parametrize("split, names", NAMES.items())
def test_a_shards_split_is_a_whole_word_of_its_name_and_the_last_one(split, names):
    """Training text under a name like retrieVAL would give a validation loss that is too low."""
    assert {split_of(f"/train/val/{name}") for name in names.split()} == {split}


def test_a_folder_gives_each_shard_to_one_split_alone(tmp_path):
    """The data set's own name may hold the word of the other split."""
    for name in ("retrieval_train_000.bin", "train_val_000.bin", "retrieval_000.bin"):
        foreign(tmp_path / "a" / name, range(99))
    found = {split: mixture(tmp_path, split=split).streams[0].paths for split in ("train", "val")}
    assert found == {
        "train": [str(tmp_path / "a" / "retrieval_train_000.bin")],
        "val": [str(tmp_path / "a" / "train_val_000.bin")],
    }


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
    """Each kind of damage is found before the first step, not as a wrong loss.

    The file stays for inspection.
    """
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
    """A link to scratch space that was cleaned is in the listing of the folder, but not there."""
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


def test_the_way_out_of_another_tokenizer_is_one_that_works(tmp_path):
    """No data.py makes the toy world's shards for bytes: other data, or its tokenizer, must do."""
    path = shard(tmp_path / "toy" / "train_000.bin", [1, 2, 3], load_tokenizer("toy"))
    said = fails(lambda: read_shard(str(path), BYTE), "--data", "--tokenizer=byte", "--tokenizer")
    assert "again" not in said


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
    """Resume, and any number of processes, ask for the same rows in other pieces.

    Two loaders and all chunkings must agree.
    """
    numbered(tmp_path, "a", [100, 90]), numbered(tmp_path, "b", [120], 1000)
    whole = mixture(tmp_path, "a*0.7,b*0.3").shuffled(0, 60)
    other = mixture(tmp_path, "a*0.7,b*0.3")
    other.shuffled(1990, 2020)  # an earlier call leaves no trace
    assert torch.equal(other.shuffled(0, 60), whole)
    pieces = [other.shuffled(i, j) for i, j in ((40, 60), (0, 1), (1, 17), (17, 40))]
    assert torch.equal(torch.cat([*pieces[1:], pieces[0]]), whole)
    assert whole.dtype == torch.int64 and whole.shape == (60, 9)
    assert not torch.equal(mixture(tmp_path, "a*0.7,b*0.3", seed=1).shuffled(0, 60), whole)


SIZES = st.lists(st.integers(0, 60), min_size=1, max_size=4)


@given(sizes=SIZES, seq_len=st.integers(1, 9), epoch=st.integers(0, 3), seed=st.integers(0, 5))
@quick
def test_an_epoch_visits_each_window_once_inside_its_shard(
    tmp_path_factory, sizes, seq_len, epoch, seed
):
    """No window is lost or doubled.

    Neighbours share exactly one token; none reaches into the next shard.
    """
    folder = tmp_path_factory.mktemp("epoch")
    numbered(folder, "a", sizes)
    expected = [max(0, size - 1) // seq_len for size in sizes]
    if sum(expected) == 0:
        fails(lambda: mixture(folder, seq_len=seq_len), folder / "a", "fewer than seq_len + 1")
        return
    rows = mixture(folder, seq_len=seq_len, seed=seed)
    assert rows.n_rows == sum(expected)
    windows = rows.shuffled(epoch * rows.n_rows, (epoch + 1) * rows.n_rows)
    runs = windows[:, :1] + torch.arange(seq_len + 1)
    assert torch.equal(windows, runs)  # each row is a run of neighbours
    starts, first = sorted(windows[:, 0].tolist()), 0
    for size, count in zip(sizes, expected, strict=True):
        own, starts = starts[:count], starts[count:]
        last = first + size - seq_len - 1  # seq_len + 1 tokens, all of this shard
        assert all(first <= start <= last for start in own)
        assert all(later - start == seq_len for start, later in pairwise(own))
        first += size


def test_epochs_differ_in_order_and_in_the_cut(tmp_path):
    """A second epoch in the same order would repeat the batches.

    The tokens left over at the end get their turn too.
    """
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
    """Each source has its weight in every block of 1,000 rows, not on average.

    Each source still goes through its own epochs in full.
    """
    for number, name in enumerate("abc"):
        numbered(tmp_path, name, [200 + 24 * number], 10_000 * number)
    rows = mixture(tmp_path, spec)
    for block in (0, 3):
        source = rows.shuffled(1000 * block, 1000 * block + 1000)[:, 0] // 10_000
        assert tuple(torch.bincount(source).tolist()) == shares
    numbers = rows.shuffled(0, 1000)[:, 0]
    first_epoch = numbers[numbers < 10_000][: rows.streams[0].n_rows]
    assert len(set(first_epoch.tolist())) == rows.streams[0].n_rows


@given(
    weights=st.lists(
        st.sampled_from([0, 1e-9, 1e-5, 4e-4, 0.001, 0.05, 1 / 3, 1, 7]), min_size=1, max_size=9
    ).filter(any),
    start=st.integers(0, 30),
)
@quick
def test_every_weight_is_drawn_in_its_share_however_small(tmp_path_factory, weights, start):
    """What rounding leaves of a share is carried on, and no row of a source is left out.

    The order stays a pure function of the row number: a later block may be asked for first.
    """
    folder = tmp_path_factory.mktemp("shares")
    names = [f"s{i}" for i in range(len(weights))]
    for number, name in enumerate(names):
        foreign(folder / name / "train_000.bin", np.full(50, number))
    spec = ",".join(f"{name}*{weight}" for name, weight in zip(names, weights, strict=True))
    rows, other = mixture(folder, spec), mixture(folder, spec)
    later = other.draws(start)
    counts, shares = np.zeros(len(weights)), np.array(weights) / sum(weights)
    for block in range(30):
        sources, draws = rows.draws(block)
        for number in range(len(weights)):
            own = draws[sources == number]
            assert own.tolist() == list(range(int(counts[number]), int(counts[number]) + len(own)))
            counts[number] += len(own)
        assert np.abs(counts - shares * 1000 * (block + 1)).max() < max(2, len(weights))
        assert not counts[shares == 0].any()
        if block == start:
            assert np.array_equal(later, (sources, draws))


def test_a_share_of_one_in_2500_is_drawn_eight_times_in_20_000_rows(tmp_path):
    """Rounded to whole rows of 1,000, it was never drawn at all."""
    foreign(tmp_path / "big" / "train_000.bin", np.full(400, 97))
    foreign(tmp_path / "small" / "train_000.bin", np.full(400, 98))
    rows = mixture(tmp_path, "big*0.9996,small*0.0004").shuffled(0, 20_000)
    assert (rows[:, 0] == 98).sum() == 8


ORDERS = {  # crc32 of the first tokens of 3,000 rows
    "a": 3038790042,
    "a*0.7,b*0.3": 2753052518,
    "a*0.001,b*0.9,c*0.099": 2093484060,
}


def test_shares_of_whole_rows_keep_the_order_that_they_always_had(tmp_path):
    """A run that was begun before must go on with the same rows: their sum, weighted by place."""
    for number, name in enumerate("abc"):
        foreign(tmp_path / name / "train_000.bin", np.arange(200 + 24 * number) + 10_000 * number)
    for spec, known in ORDERS.items():
        firsts = mixture(tmp_path, spec, seed=5).shuffled(0, 3000)[:, 0]
        assert zlib.crc32(firsts.numpy().tobytes()) == known


def test_the_sources_of_a_mixture_are_interleaved(tmp_path):
    """A block that gave source after source would be a curriculum nobody asked for."""
    numbered(tmp_path, "a", [300]), numbered(tmp_path, "b", [300], 10_000)
    source = (mixture(tmp_path, "a,b").shuffled(0, 1000)[:, 0] >= 10_000).int()
    assert 400 < (source[1:] != source[:-1]).sum() < 600


def test_weights_are_read_and_scaled_to_one():
    """The README spells mixtures like this."""
    assert parse_mixture("a*0.7,b*0.3") == [
        ("a", pytest.approx(0.7)),
        ("b", pytest.approx(0.3)),
    ]
    assert parse_mixture("a, b") == [("a", 0.5), ("b", 0.5)]
    assert parse_mixture("a*3,b") == [("a", 0.75), ("b", 0.25)]


@pytest.mark.parametrize(
    "spec",
    ["", ",", "a*x", "a*0", "a*-1,b*2", "a*-1", "a*nan", "a*inf,b", "a*0.5*2", "*0.5,a"],
)
def test_bad_weights_are_errors_that_show_the_mixture(spec):
    """A negative or infinite share means nothing.

    It must not surface later as an error of numpy.
    """
    fails(lambda: parse_mixture(spec), repr(spec))


def test_validation_rows_come_once_each_and_the_first_are_a_fair_sample(tmp_path):
    """Every number of processes and every seed must evaluate the same rows.

    In the order of the files the first would all be of one source.
    """
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


LACKING = [
    (lambda folder: None, ["no data", "data.py --stage=pretrain --sources=mine=FILE", "--data"]),
    (lambda folder: folder.mkdir(), ["no train shard", "--stage=pretrain --sources=mine=FILE"]),
    (lambda folder: shard(folder / "val_000.bin", range(99)), ["no train shard"]),
    (lambda folder: shard(folder / "train_000.bin", range(8)), ["8 tokens", "seq_len + 1 = 9"]),
    (lambda folder: shard(folder / "train_000.bin", []), ["0 tokens"]),
]


@pytest.mark.parametrize("make, words", LACKING)
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
    """Resume compares it, so other data must have another one.

    Other data are another mixture, another count or other tokens.
    """
    numbered(tmp_path, "a", [100]), numbered(tmp_path, "b", [100])
    prints = [mixture(tmp_path, spec).fingerprint for spec in ("a", "a,b", "a*0.9,b*0.1")]
    assert mixture(tmp_path).fingerprint == prints[0]
    numbered(tmp_path, "a", [100], first=1)
    prints.append(mixture(tmp_path).fingerprint)
    numbered(tmp_path, "a", [100, 100])
    prints.append(mixture(tmp_path).fingerprint)
    assert len(set(prints)) == 5


PRINTS = {  # whether each share is a whole number of rows -> the digits before shares were carried
    True: {
        "a": "160392768a69fc1c",
        "a*0.7,b*0.3": "cad7b6266522174f",
        "a*0.001,b*0.9,c*0.099": "411a4d3d309a15d5",
        "a*2,b*1,c*1": "94fa4d288d512d60",
        "a,b": "94b640f667684292",
    },
    False: {
        "a*1,b*2": "50b4a96627e55ebf",
        "a,b,c": "956c4d8cbe0cafac",
        "a*0.9996,b*0.0004": "eeab9aeb3f70e349",
        "a*0.9995,b*0.0005": "bff9978d7a7a1ee6",
    },
}


@pytest.mark.parametrize("is_whole", PRINTS)
def test_shares_of_no_whole_rows_alone_have_another_fingerprint_than_before(tmp_path, is_whole):
    """Their rows changed from the second block on: a run begun before must not go on with them."""
    for number, name in enumerate("abc"):
        foreign(tmp_path / name / "train_000.bin", np.arange(200 + 24 * number) + 10_000 * number)
    for spec, before in PRINTS[is_whole].items():
        assert (mixture(tmp_path, spec).fingerprint == before) == is_whole, spec
