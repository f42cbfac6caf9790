"""Tokenizers lose no text, and no text can spell a special token."""

import itertools
import re

import numpy as np
import pytest
import tokenizers
from corpus_helpers import RANKS, needs_ranks, quick, real
from helpers import BYTE, fails
from hypothesis import given
from hypothesis import strategies as st

from corpus import tokenizer
from corpus.tokenizer import SPECIAL, load_tokenizer, read_ranks, train_ranks, write_ranks
from runtime.files import read_lines


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
    assert list(BYTE.special.values()) == [256, 257, 258, 259, 260, 261]
    assert (BYTE.eos, BYTE.end, BYTE.pad, BYTE.vocab_size) == (256, 260, 261, 262)
    around = {role: before for role, (before, _) in BYTE.template.roles.items()}
    assert around == {"system": [257], "user": [258], "assistant": [259]}


@pytest.mark.parametrize("text", [*SPECIAL, "a<|end|>b<|endoftext|><|user|>"])
def test_text_that_spells_a_special_token_never_becomes_it(text):
    """Else a user could end a document or speak as the assistant."""
    assert max(BYTE.encode(text)) < 256
    assert max(i for ids in BYTE.encode_batch([text, text]) for i in ids) < 256
    assert BYTE.decode(BYTE.encode(text)) == text


@pytest.mark.parametrize("text", [*SPECIAL, "a<|end|>b<|endoftext|><|user|>"])
def test_text_that_spells_a_special_token_never_becomes_it_in_gpt2(gpt2, text):
    """The same for the BPE, whose library could be asked to allow it."""
    assert (
        max(gpt2.encode(text)) < 50256
        and max(i for ids in gpt2.encode_batch([text, text]) for i in ids) < 50256
    )
    assert gpt2.decode(gpt2.encode(text)) == text


LONG = {
    "spaces": " ",
    "line ends": "\n",
    "wide spaces": "\u3000",
    "mixed white space": " \n\t\r\x0b\x0c\x1c\x85\xa0\u2028",
    "letters": "a",
    "ideographs": "\u597d",
}


@pytest.mark.parametrize("kind", LONG)
def test_a_run_of_a_million_of_any_character_is_encoded_whole(gpt2, kind):
    """tiktoken's regex gives up, by an error that `except Exception` misses in encode()."""
    text = "a" + (LONG[kind] * 1_100_000)[:1_100_000] + "b\ud800"
    ids = gpt2.encode_array(text)
    assert gpt2.decode(ids.tolist()) == text[:-1] + "\ufffd"
    assert ids.dtype == np.uint32 and ids.tolist() == gpt2.encode(text)


@given(
    text=st.text(st.sampled_from("ab \n\t")),
    longest=st.integers(1, 5),
)
@quick
def test_a_text_is_cut_only_inside_white_space_longer_than_the_limit(text, longest):
    """Else ordinary texts would have other ids: a blank before a word belongs to the word."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "LONGEST_BLANK", longest)
        patch.setattr(tokenizer, "LONG_BLANK", re.compile(rf"(?<!\s)\s{{{longest + 1},}}"))
        pieces = tokenizer.cut_long_blanks(text)
    assert "".join(pieces) == text and all(pieces[1:])
    assert all(not re.search(rf"\s{{{longest + 1}}}", piece) for piece in pieces)
    for before, after in itertools.pairwise(pieces):
        assert re.search(rf"\s{{{longest}}}$", before) and after[0].isspace()


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
    """Our split pattern is a faster rewrite.

    It must cut the text as the pattern that OpenAI released with GPT-2.
    """
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
    """Ranks with gaps, or without all 256 bytes, cannot encode every text.

    Better said here than in the middle of a run.
    """
    (tmp_path / "x.tiktoken").write_bytes(content)
    fails(lambda: load_tokenizer(str(tmp_path / "x.tiktoken")), "x.tiktoken")


@needs_ranks
def test_a_torn_ranks_file_is_not_taken_for_gpt2(tmp_path):
    """Its first ranks alone are a working tokenizer, of other ids.

    --tokenizer=gpt2 promises GPT-2's.
    """
    rows = RANKS.read_bytes().splitlines(keepends=True)
    (tmp_path / "gpt2.tiktoken").write_bytes(b"".join(rows[:1000]))
    fails(lambda: load_tokenizer("gpt2", str(tmp_path)), tmp_path / "gpt2.tiktoken")


# --------------------------------------------------------------------------------------------------
# Ranks of one's own

ODD = [
    "It's 12 o'clock, he'll say;  we\u2019ve\t3.14 caf\u00e9s \U0001f642\U0001f642!",
    "\n\n  x\r\n \u597d\u597d\u3002 ",
]


def library(texts: list[str], n_text: int) -> tokenizers.Tokenizer:
    """Return the tokenizers library's own byte-level BPE, trained by it on the same texts."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    how = {"vocab_size": n_text, "min_frequency": 2, "initial_alphabet": alphabet}
    trainer = tokenizers.trainers.BpeTrainer(show_progress=False, **how)
    bpe.train_from_iterator(texts, trainer)
    return bpe


def trained(folder, texts: list[str], n_text: int):
    """Return our tokenizer of ranks that are learnt from texts, through its file."""
    write_ranks(str(folder / "own.tiktoken"), train_ranks(texts, n_text))
    return load_tokenizer("own.tiktoken", str(folder))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Return our tokenizer and the library's, both of the same odd texts."""
    texts = [" ".join(f"{word}{i % 7}" for i in range(40)) for word in ODD] * 3
    return trained(tmp_path_factory.mktemp("own"), texts, 300), library(texts, 300)


@given(
    text=st.text(
        st.sampled_from("aeoh'lsv 12.;\t\n\r\u2019\u00e9\u597d\U0001f642<|>_")
        | st.characters(exclude_categories=["Cs"])
    )
)
@quick
def test_learnt_ranks_give_the_ids_of_the_library_that_learnt_them(own, text):
    """tiktoken joins by rank and the library by its list of merges: they must agree."""
    ours, librarys = own
    assert ours.encode(text) == librarys.encode(text).ids
    assert ours.decode(ours.encode(text)) == text


def test_learnt_ranks_agree_with_the_library_on_real_text(tmp_path):
    """Real words have merges that overlap, which short odd texts may lack."""
    lines = list(read_lines(real("wikitext2_raw_valid.txt.gz")))[:1500]
    ours, librarys = trained(tmp_path, lines, 1000), library(lines, 1000)
    text = "".join(read_lines(real("wikitext2_raw_test.txt.gz")))[:300_000]
    ids = ours.encode(text)
    assert ids == librarys.encode(text).ids and ours.decode(ids) == text
    assert len(ids) < len(text.encode()) / 2 and ours.vocab_size == 1000 + len(SPECIAL)


def test_training_gives_the_same_file_each_time_and_with_any_number_of_threads(
    tmp_path, monkeypatch
):
    """The file's hash is in every shard and checkpoint."""
    texts = [f"{a} {b}{a} {b}" for a in "abcdefgh" for b in ("st", "ts", "stst", "\u00e9")] * 3
    for name, parallel in (("a", "true"), ("b", "true"), ("c", "false")):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        (tmp_path / name).mkdir()
        trained(tmp_path / name, texts, 290)
    files = {(tmp_path / name / "own.tiktoken").read_bytes() for name in "abc"}
    assert len(files) == 1


def test_a_text_too_short_for_the_symbols_is_refused_with_the_number_that_it_has():
    """A file named 4096 that holds fewer would make another model than its recipe says."""
    texts = ["the cat sat on the mat, the cat"]
    message = fails(lambda: train_ranks(texts, 4096), "4096", "more text")
    n_most = int(re.search(r"--train_tokenizer=(\d+)", message)[1])
    assert len(train_ranks(texts, n_most)) == n_most > 257
    assert "--train_tokenizer" not in fails(lambda: train_ranks(["ab"], 300), "256 symbols")


@pytest.mark.parametrize("kind", ["spaces", "line ends", "letters", "ideographs"])
def test_training_cuts_a_long_run_of_any_character(kind):
    """The library's time is the square of a run's length: a million would take hours."""
    texts = [(LONG[kind] * 5000)[:5000], "b\ud800b " * 9]
    ranks = train_ranks(texts, 266)
    assert 100 < max(map(len, ranks)) <= 1000 * len("\u597d".encode())


def test_other_ranks_are_never_written_over(tmp_path):
    """A checkpoint whose tokenizer is gone is lost, too."""
    path = str(tmp_path / "own.tiktoken")
    ranks = {**tokenizer.BYTES, b"ab": 256}
    write_ranks(path, ranks)
    write_ranks(path, dict(reversed(ranks.items())))
    fails(lambda: write_ranks(path, {**tokenizer.BYTES, b"ac": 256}), path, "move it away")
    assert read_ranks(path) == ranks


def test_a_ranks_file_is_found_at_its_path_and_else_in_the_data_folder(tmp_path, monkeypatch):
    """A recipe names a path, a checkpoint the file's name; neither may hang on the place."""
    (tmp_path / "elsewhere").mkdir()
    write_ranks(str(tmp_path / "data" / "own.tiktoken"), {**tokenizer.BYTES, b"ab": 256})
    write_ranks(str(tmp_path / "x" / "own.tiktoken"), {**tokenizer.BYTES, b"ac": 256})
    data = str(tmp_path / "data")
    kept = load_tokenizer("own.tiktoken", data)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_tokenizer("data/own.tiktoken", data, kept.spec()).hash == kept.hash
    assert load_tokenizer(str(tmp_path / "x" / "own.tiktoken"), data).hash != kept.hash
    fails(lambda: load_tokenizer("no.tiktoken", data), tmp_path / "data" / "no.tiktoken")
