"""The benchmark runs, counts what it says it counts, and refuses what it does not know.

Its numbers are no test: docs/log.md.
"""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from helpers import ROOT, fails

from bench import __main__ as bench
from bench.jobs import Race
from model import GPT, ModelConfig

FLAGS = ["--rounds=2", "--threads=1", "--new_tokens=4"]


def rows_of(tmp_path, *flags: str) -> list[dict]:
    out = tmp_path / "bench.jsonl"
    assert bench.main([*FLAGS, *flags, f"--out={out}"]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    flags = ("--shapes=tiny", "--tasks=train,generate,load", "--systems=ours")
    return rows_of(tmp_path_factory.mktemp("bench"), *flags)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    rows = [{"text": f"Document {i} of some plain words. " * 20} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_row_says_what_was_measured(rows):
    """Commit, versions and device stand beside every number.

    The ratio of the only system to itself is 1.
    """
    assert [row["task"] for row in rows] == ["train", "generate", "load"]
    keys = {"system", "shape", "commit", "torch", "device", "settings", "peak_mb"}
    assert all(keys <= set(row) for row in rows)
    assert rows[0]["ratio_step"] == rows[1]["ratio_batch_8"] == rows[2]["ratio"] == 1


def test_speeds_follow_from_each_other(rows):
    """A whole step is slower than its forward and backward pass, eight rows faster than one.

    The parameters are the model's.
    """
    train, generate, _ = rows
    assert 0 < train["step_tok_s"] < train["forward_backward_tok_s"]
    assert 0 < train["of_matmul_peak"] < 1.5
    assert generate["batch_1_tok_s"] < generate["batch_8_tok_s"]
    model = GPT(ModelConfig(vocab_size=65, n_layer=4, d_model=128, n_head=4))
    assert train["parameters"] == model.num_params()


def test_medians_and_ratios_are_taken_round_by_round():
    """A machine that slows down for all systems alike does not move the ratio."""
    times = {"ours": (1.0, 10.0, 2.0), "nanoGPT": (2.0, 20.0, 3.0)}
    case = bench.Case("load", "tiny", bench.SHAPES["tiny"])
    case.rounds = {name: [{"batch": seconds} for seconds in times[name]] for name in times}
    case.facts = {name: {"peak_mb": 1.0} for name in times}
    ours, peer = bench.summarize(bench.BenchConfig(tasks=("load",)), case)
    assert (ours["batch"], ours["ratio"], ours["range"]) == (2.0, 2.0, "1.50-2.00")
    assert peer["ratio"] == 1


def test_tokenizing_counts_the_bytes_of_the_text(tmp_path, text):
    """Megabytes are those of the text, not of the file around it."""
    flags = ("--tasks=tokenize", f"--text={text}", "--tokenizer=byte", "--systems=ours")
    (row,) = rows_of(tmp_path, *flags)
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    assert row["megabytes"] == pytest.approx(sum(map(len, documents)) / 1e6)
    assert row["mb_s"] > 0


def test_the_race_measures_the_whole_validation_split(tmp_path, text):
    """A model that knows nothing has the loss of the uniform distribution, over every window."""
    cfg = asdict(bench.BenchConfig(tasks=("race",), text=str(text)))
    case = {"system": "ours", "shape_name": "tiny", "shape": bench.SHAPES["tiny"]}
    race = Race(SimpleNamespace(**cfg, **case))
    seen = []

    def summed_loss(idx, targets):
        seen.append(targets.numel())
        return 2.0 * targets.numel()

    assert race.val_loss(summed_loss) == pytest.approx(2.0)
    assert sum(seen) == race.val.n_rows * 64 and race.val.n_rows > 50


def test_unknown_names_are_errors_in_words(tmp_path):
    """A peer whose checkout is not given is not silently left out when it was asked for."""
    fails(lambda: bench.main(["--shapes=huge"]), "huge", "char")
    fails(lambda: bench.main(["--tasks=race"]), "--text")
    fails(lambda: bench.main(["--systems=nanoGPT", f"--out={tmp_path}/x"]), "nanoGPT", "ours")


def test_numbers_out_of_bounds_are_errors_in_words():
    """No round, no row and no thread would measure nothing."""
    for key in ("rounds", "new_tokens", "batches", "threads"):
        fails(lambda key=key: bench.main([f"--{key}=0"]), f"{key} must be in [1, 1e6], got 0")


def test_a_system_that_cannot_run_is_left_out_aloud(tmp_path, capsys):
    """The traceback of a peer in another process becomes one line that names the peer.

    Without any system left it is an error.
    """
    out = f"--out={tmp_path}/x"
    peer = [f"--nanogpt={tmp_path}", "--systems=nanoGPT"]
    fails(
        lambda: bench.main(["--tasks=train", "--shapes=tiny", *peer, out]),
        "no system",
        "train",
        "tiny",
    )
    error = f"FileNotFoundError: [Errno 2] No such file or directory: '{tmp_path}/model.py'"
    assert f"left out: nanoGPT, train at tiny: {error}" in capsys.readouterr().out


def test_another_checkout_is_measured_with_its_own_modules(tmp_path, capsys):
    """Whatever this checkout holds, `other` is made from the files of the other one."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.py").write_text("raise OSError('the other model')")
    flags = ["--tasks=train", "--shapes=tiny", f"--other={tmp_path}/other", "--systems=ours,other"]
    rows = rows_of(tmp_path, *flags)
    assert [row["system"] for row in rows] == ["ours"]
    assert "left out: other, train at tiny: OSError: the other model" in capsys.readouterr().out
    flags[2] = f"--other={ROOT}"
    ours, other = rows_of(tmp_path, *flags)[1:]
    assert other["system"] == "other" and ours["parameters"] == other["parameters"]


def test_batches_come_one_after_the_other_in_one_table(tmp_path, capsys):
    """Speed and memory are measured by batch, as the GPU recipe asks for."""
    flags = ("--tasks=train", "--shapes=tiny", "--systems=ours", "--batches=2,4")
    rows = rows_of(tmp_path, *flags)
    assert [row["batch_rows"] for row in rows] == [2, 4]
    assert capsys.readouterr().out.count("of_matmul_peak") == 1
