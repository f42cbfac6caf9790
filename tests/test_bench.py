"""The benchmark runs, counts what it says it counts, and refuses what it does not know. (Its numbers are no test: LOG.md.)"""

import json

import pytest

import bench
from conftest import fails
from model import GPT, ModelConfig

FLAGS = ["--rounds=2", "--threads=1", "--new_tokens=4"]


def rows_of(tmp_path, *flags: str) -> list[dict]:
    out = tmp_path / "bench.jsonl"
    assert bench.main([*FLAGS, *flags, f"--out={out}"]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return rows_of(
        tmp_path_factory.mktemp("bench"),
        "--shapes=tiny",
        "--tasks=train,generate,load",
        "--systems=ours",
    )


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": f"Document {i} of some plain words. " * 20}) + "\n"
            for i in range(200)
        )
    )
    return path


def test_every_row_says_what_was_measured(rows):
    """Commit, versions and device beside every number; the ratio of the only system to itself is 1."""
    assert [row["task"] for row in rows] == ["train", "generate", "load"]
    assert all(
        {"system", "shape", "commit", "torch", "device", "settings", "peak_mb"} <= set(row)
        for row in rows
    )
    assert rows[0]["ratio_step"] == rows[1]["ratio_batch_8"] == rows[2]["ratio"] == 1


def test_speeds_follow_from_each_other(rows):
    """A whole step is slower than its forward and backward pass, eight rows faster than one, and the parameters are the model's."""
    train, generate, _ = rows
    assert (
        0 < train["step_tok_s"] < train["forward_backward_tok_s"]
        and 0 < train["of_matmul_peak"] < 1.5
    )
    assert generate["batch_1_tok_s"] < generate["batch_8_tok_s"]
    assert (
        train["parameters"]
        == GPT(ModelConfig(vocab_size=65, n_layer=4, d_model=128, n_head=4)).num_params()
    )


def test_medians_and_ratios_are_taken_round_by_round():
    """A machine that slows down for all systems alike does not move the ratio."""
    cfg = bench.BenchConfig(tasks=("load",))
    rounds = {
        "ours": [{"batch": 1.0}, {"batch": 10.0}, {"batch": 2.0}],
        "nanoGPT": [{"batch": 2.0}, {"batch": 20.0}, {"batch": 3.0}],
    }
    ours, peer = bench.summarize(
        cfg,
        "load",
        "tiny",
        bench.SHAPES["tiny"],
        {name: {"peak_mb": 1.0} for name in rounds},
        rounds,
        [],
    )
    assert (ours["batch"], ours["ratio"], ours["range"]) == (2.0, 2.0, "1.50-2.00") and peer[
        "ratio"
    ] == 1


def test_tokenizing_counts_the_bytes_of_the_text(tmp_path, text):
    """Megabytes of text, not of the file around it."""
    (row,) = rows_of(
        tmp_path, "--tasks=tokenize", f"--text={text}", "--tokenizer=byte", "--systems=ours"
    )
    assert row["megabytes"] == pytest.approx(
        sum(len(json.loads(line)["text"]) for line in text.read_text().splitlines()) / 1e6
    )
    assert row["mb_s"] > 0


def test_the_race_measures_the_whole_validation_split(tmp_path, text):
    """A model that knows nothing has the loss of the uniform distribution, over every window of the last tenth."""
    race = bench.Race(
        bench.BenchConfig(tasks=("race",), text=str(text)), "ours", bench.SHAPES["tiny"], "tiny"
    )
    seen = []
    assert race.val_loss(
        lambda idx, targets: seen.append(targets.numel()) or 2.0 * targets.numel()
    ) == pytest.approx(2.0)
    assert sum(seen) == race.val.n_rows * 64 and race.val.n_rows > 50


def test_unknown_names_are_errors_in_words(tmp_path):
    """A peer whose checkout is not given is not silently left out when it was asked for."""
    fails(lambda: bench.main(["--shapes=huge"]), "huge", "char")
    fails(lambda: bench.main(["--tasks=race"]), "--text")
    fails(lambda: bench.main(["--systems=nanoGPT", f"--out={tmp_path}/x"]), "nanoGPT", "ours")


def test_a_system_that_cannot_run_is_left_out_aloud(tmp_path, capsys):
    """The traceback of a peer in another process becomes one line that names the peer; without any system left it is an error."""
    flags = [
        "--tasks=train",
        "--shapes=tiny",
        f"--nanogpt={tmp_path}",
        "--systems=nanoGPT",
        f"--out={tmp_path}/x",
    ]
    fails(lambda: bench.main(flags), "no system", "train", "tiny")
    assert (
        f"left out: nanoGPT, train at tiny: FileNotFoundError: [Errno 2] No such file or directory: '{tmp_path}/model.py'"
        in capsys.readouterr().out
    )


def test_batches_come_one_after_the_other_in_one_table(tmp_path, capsys):
    """Speed and memory by batch, as the GPU recipe asks for."""
    rows = rows_of(tmp_path, "--tasks=train", "--shapes=tiny", "--systems=ours", "--batches=2,4")
    assert [row["batch_rows"] for row in rows] == [2, 4] and capsys.readouterr().out.count(
        "of_matmul_peak"
    ) == 1
