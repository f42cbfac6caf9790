"""The benchmark runs, counts what it says it counts, and refuses what it does not know.

Its numbers are no test: docs/log.md.
"""

import json
import signal
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from helpers import ROOT, fails

import configurator
from bench import __main__ as bench
from bench import gpu
from bench.race import Race
from bench.worker import KERNELS, group_of
from configurator import UserError
from corpus import folders
from model import GPT, ModelConfig
from runtime import budget

FLAGS = ["--rounds=2", "--threads=1", "--new_tokens=4"]


def rows_of(tmp_path, *flags: str) -> list[dict]:
    out = tmp_path / "bench.jsonl"
    assert bench.main([*FLAGS, *flags, f"--out={out}"]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    flags = ("--shapes=tiny", "--tasks=train,generate,load,profile", "--systems=ours")
    return rows_of(tmp_path_factory.mktemp("bench"), *flags)


@pytest.fixture
def data_dir(tmp_path):
    """A small toy world."""
    folders.make_toy(folders.ToySizes(stories=200, problems=20, test=5), str(tmp_path / "data"))
    return tmp_path / "data"


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
    assert [row["task"] for row in rows] == ["train", "generate", "load", "profile"]
    keys = {"system", "shape", "commit", "torch", "device", "settings", "peak_mb"}
    assert all(keys <= set(row) for row in rows)
    assert rows[0]["ratio_step"] == rows[1]["ratio_batch_8"] == rows[2]["ratio"] == 1


def test_speeds_follow_from_each_other(rows):
    """A whole step is slower than its forward and backward pass, eight rows faster than one.

    The parameters are the model's.
    """
    train, generate, *_ = rows
    assert 0 < train["step_tok_s"] < train["forward_backward_tok_s"]
    assert 0 < train["of_matmul_peak"] < 1.5
    assert generate["batch_1_tok_s"] < generate["batch_8_tok_s"]
    model = GPT(ModelConfig(vocab_size=65, n_layer=4, d_model=128, n_head=4))
    assert train["parameters"] == model.num_params()


def test_a_profile_finds_the_kernels_of_a_step(rows):
    """Products, attention both ways and the optimizer are known by their names on the CPU too."""
    profile = rows[3]
    assert all(profile[group] > 0 for group in KERNELS)
    names = {
        "void flash_bwd_dq_kernel": "attention, backward",
        "triton_red_fused_1": "element-wise",
    }
    names |= {"flash_fwd_kernel": "attention, forward", "nvjet_tst_128x256": "products"}
    assert {name: group_of(name) for name in names} == names


def test_medians_and_ratios_are_taken_round_by_round():
    """A machine that slows down for all systems alike does not move the ratio."""
    times = {"ours": (1.0, 10.0, 2.0), "nanoGPT": (2.0, 20.0, 3.0)}
    case = bench.Case("load", "tiny", bench.SHAPES["tiny"])
    case.rounds = {name: [{"batch": seconds} for seconds in times[name]] for name in times}
    case.facts = {name: {"peak_mb": 1.0} for name in times}
    ours, peer = bench.summarize(bench.BenchConfig(tasks=("load",)), case)
    assert (ours["batch"], ours["ratio"], ours["range"]) == (2.0, 2.0, "1.50-2.00")
    assert peer["ratio"] == 1


def on_an_h100(monkeypatch, task: str, systems: list[str]) -> tuple:
    """Return settings and a case of the GPU recipe in which every system took 0.2 s a step."""
    monkeypatch.setattr(bench, "device_rates", lambda: budget.CARDS["H100"])
    cfg = configurator.load([str(ROOT / "config" / "h100_bench.py")], bench.BenchConfig)
    case = bench.Case(task, "h100_recipe", bench.SHAPES["h100_recipe"])
    case.rounds = {name: [{"step": 0.2, "forward_backward": 0.1}] * 2 for name in systems}
    case.facts = {name: {"peak_mb": 1.0} for name in systems}
    case.peaks = dict.fromkeys(systems, [989e12 / 2] * 2)
    return cfg, case


def test_the_expected_time_stands_beside_the_measured_one(monkeypatch):
    """On a known card, for a compiled dense model of ours; a peer's and an eager step have none."""
    systems = ["ours", "ours with Muon", "ours without sinks", "ours with recompute"]
    without = ["ours eager", "nanoGPT"]
    rows = bench.summarize(*on_an_h100(monkeypatch, "train", systems + without))
    assert all(row["step_ms"] == 200 and row["mfu"] < 1 for row in rows)
    assert [row["system"] for row in rows if "expected_ms" in row] == systems
    for row in rows[:4]:
        both = row["mfu"] * row["step_ms"], row["expected_mfu"] * row["expected_ms"]
        assert both[0] == pytest.approx(both[1])
    assert row["of_matmul_peak"] == pytest.approx(2 * row["mfu"])
    ours, muon, no_sinks, recompute = (row["expected_ms"] for row in rows[:4])
    assert no_sinks < ours < muon < recompute


def test_a_profile_has_the_expected_groups_below(monkeypatch):
    """Together they are the expected step; the rows of a table need no common keys."""
    cfg, case = on_an_h100(monkeypatch, "profile", ["ours with Muon", "nanoGPT"])
    case.rounds = {name: [dict.fromkeys(KERNELS, 7.0)] for name in case.rounds}
    measured, expected, peer = bench.summarize(cfg, case)
    assert measured["products"] == 7 and peer["system"] == "nanoGPT"
    assert expected["system"] == "ours with Muon, expected"
    parts = bench.expected_parts(cfg, case, "ours with Muon")
    in_all = 1e3 * budget.expected_seconds(parts, budget.CARDS["H100"])
    assert sum(expected[group] for group in KERNELS) == pytest.approx(in_all)
    assert "products" in bench.in_columns([measured, expected, peer])


@pytest.mark.parametrize("device, at_once", [("cpu", 3), ("cuda", 1)])
def test_a_gpu_holds_one_system_at_a_time(monkeypatch, device, at_once):
    """On the CPU they take turns, so all are alive; a GPU's memory is for one of them."""
    alive, most = set(), []

    def answers(cfg, case, system):
        alive.add(system)
        most.append(len(alive))
        if system == "ours eager":
            alive.remove(system)
            raise UserError("ours eager: out of memory")
        yield {}
        for _ in range(cfg.rounds):
            yield {"step": 1.0, "forward_backward": 0.5}
        alive.remove(system)
        yield 1.0

    monkeypatch.setattr(bench, "answers", answers)
    monkeypatch.setattr(bench, "matmul_peak", lambda cfg: 1.0)
    systems = ("ours", "ours eager", "ours without sinks", "ours with Muon")
    cfg = bench.BenchConfig(device=device, systems=systems, rounds=2)
    case = bench.Case("train", "tiny", bench.SHAPES["tiny"])
    bench.take_turns(cfg, case)
    assert max(most) == at_once and not alive
    assert {name: len(rounds) for name, rounds in case.rounds.items()} == {
        name: 2 for name in systems if name != "ours eager"
    }
    assert case.peaks["ours with Muon"] == [1.0, 1.0]


def test_what_takes_long_is_measured_where_it_is_named():
    """A plain run does not take recompute and eager steps beside the same system's."""
    cfg = bench.BenchConfig()
    long = ("ours with recompute", "ours eager")
    assert not {*bench.systems_for(cfg, "train")} & {*long}
    cfg.systems = long
    assert bench.systems_for(cfg, "train") == [*long]


@pytest.mark.slow
def test_the_first_minutes_on_a_card_run_on_the_cpu(tmp_path, data_dir):
    """Every part is written down when it ends, a failed one too, and the next one begins.

    Started again, a part alone is made again and the others stay.
    """
    out = tmp_path / "gpu.json"
    flags = ["--device=cpu", f"--out={out}", f"--data_dir={data_dir}", "--seconds=1200"]
    parts = "--parts=table of nanoGPT,train,profile,table of ours"
    assert gpu.main([*flags, parts]) == 1
    result = json.loads(out.read_text())
    codes = {part: row["exit_code"] for part, row in result.items() if isinstance(row, dict)}
    assert codes == {"train": 0, "profile": 0, "table of nanoGPT": 2, "table of ours": 0}
    assert "no system nanoGPT" in " ".join(result["table of nanoGPT"]["last_lines"])
    losses = [row["loss"] for row in result["train"]["rows"] if "loss" in row]
    assert len(losses) == 3 and result["profile"]["rows"][0]["products"] > 0
    tables = [row["step_tok_s"] for row in result["table of ours"]["rows"]]
    assert len(tables) == 2 and result["torch"]
    assert gpu.main([*flags, "--parts=table of nanoGPT"]) == 1
    assert json.loads(out.read_text())["train"] == result["train"]


def test_a_part_has_the_recipes_data_where_it_is(tmp_path):
    """The flags of a part are keys of its program; an unknown part is an error in words."""
    cfg = gpu.GpuConfig(data_dir=str(tmp_path))
    assert "--data=toy" in gpu.programs(cfg, tmp_path)["train"]
    for name in ("wikitext-103", "tinystories"):
        (tmp_path / name).mkdir()
    parts = gpu.programs(cfg, tmp_path)
    assert "--data=toy" not in parts["train"] and next(iter(parts)) == "tests"
    for part in (part for part in parts if part not in ("tests", "train")):
        settings = configurator.load(parts[part][2:], bench.BenchConfig)
        assert settings.device == "cuda" and settings.compile
        assert settings.shapes == ("h100_recipe",) and settings.systems
    flags = [f"--out={tmp_path}/gpu.json", "--parts=tabel"]
    fails(lambda: gpu.main(flags), "tabel", "table of ours")


def test_a_part_that_does_not_end_is_ended(tmp_path):
    """By SIGTERM first, so that training saves; what it printed before is kept."""
    code = "import time; print('begun', flush=True); time.sleep(100)"
    result = gpu.perform(["-S", "-c", code], 3, tmp_path / "part")
    assert result["exit_code"] == -signal.SIGTERM and result["last_lines"] == ["begun"]


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
