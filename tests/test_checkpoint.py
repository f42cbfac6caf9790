"""Checkpoints: what is saved comes back, and what is damaged is refused in words."""

import errno
import os
import random
import shutil
import signal
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import fails, fork, wait

from configurator import UserError
from model import GPT, ModelConfig
from runtime.checkpoint import (
    FORMAT,
    NEW,
    SAVED,
    beside,
    checkpoint_files,
    load_checkpoint,
    model_from,
    newest_checkpoint,
    open_start,
    read_checkpoint,
    replace_run,
    save_checkpoint,
    weights_hash,
)
from runtime.files import write_json

SMALL = {"vocab_size": 50, "seq_len": 8, "n_layer": 1, "n_head": 2, "d_model": 16, "d_ff": 24}


def small(seed: int = 0, **fields) -> GPT:
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**SMALL | fields))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model


def content(step: int = 0, seed: int = 0, **more) -> dict:
    model = small(seed)
    return {
        "model": model.state_dict(),
        "model_config": asdict(model.cfg),
        "step": step,
        "rng": torch.get_rng_state(),
        "task": "pretrain",
        "tokenizer": {"name": "byte"},
    } | more


def path_of(folder, step: int) -> str:
    return os.path.join(folder, f"ckpt_{step:07d}.pt")


def write(folder, step: int, **more) -> str:
    save_checkpoint(path_of(folder, step), content(step, seed=step, **more))
    return path_of(folder, step)


def overwrite(path, raw: bytes) -> None:
    with open(path, "wb") as f:
        f.write(raw)


def raw_of(path) -> bytes:
    with open(path, "rb") as f:
        return f.read()


# ------------------------------------------------------------------------------------------------
# Files


def test_round_trip_returns_every_value(tmp_path):
    """Weights, step, optimizer state, RNG and text come back bitwise; nothing is added but format
    and weights hash."""
    optimizer = {
        "state": {0: {"momentum_buffer": torch.randn(3, 4)}},
        "param_groups": [{"lr": 0.1, "params": [0]}],
    }
    saved = content(
        7,
        optimizers=[optimizer],
        best=float("inf"),
        train_config={"sources": ["a"], "x": None},
        tokenizer={"name": "byte"},
    )
    save_checkpoint(tmp_path / "a.pt", saved)
    found = read_checkpoint(tmp_path / "a.pt")
    assert set(found) == set(saved) | {"format", "weights_hash"}
    assert all(torch.equal(found["model"][key], x) for key, x in saved["model"].items())
    assert torch.equal(
        found["optimizers"][0]["state"][0]["momentum_buffer"],
        optimizer["state"][0]["momentum_buffer"],
    )
    assert torch.equal(found["rng"], saved["rng"])
    assert all(
        found[key] == saved[key]
        for key in ("step", "best", "train_config", "tokenizer", "model_config")
    )
    assert found["weights_hash"] == weights_hash(saved["model"]) == weights_hash(found["model"])


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def zip_of_text(path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")


def bomb(path, marker, **how) -> None:
    torch.save({"format": FORMAT, "model": {}, "x": Bomb(marker)}, path, **how)


def flip_a_bit(path, raw: bytes) -> None:
    half = len(raw) // 2
    overwrite(path, raw[:half] + bytes([raw[half] ^ 1]) + raw[half + 1 :])


DAMAGES = {  # kind -> what is done to (path, its bytes, the marker that a bomb leaves)
    "truncated": lambda path, raw, marker: overwrite(path, raw[: len(raw) // 2]),
    "one byte short": lambda path, raw, marker: overwrite(path, raw[:-1]),
    "empty": lambda path, raw, marker: overwrite(path, b""),
    "zeros": lambda path, raw, marker: overwrite(path, bytes(len(raw))),
    "zeros at the end": lambda path, raw, marker: overwrite(
        path, raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2)
    ),
    "one flipped bit": lambda path, raw, marker: flip_a_bit(path, raw),
    "text": lambda path, raw, marker: overwrite(path, b"<html>404 Not Found</html>\n" * 100),
    "missing": lambda path, raw, marker: os.remove(path),
    "folder": lambda path, raw, marker: (os.remove(path), os.mkdir(path)),
    "pickle bomb": lambda path, raw, marker: bomb(path, marker),
    "old pickle bomb": lambda path, raw, marker: bomb(
        path, marker, _use_new_zipfile_serialization=False
    ),
    "foreign list": lambda path, raw, marker: torch.save([1, 2], path),
    "foreign state dict": lambda path, raw, marker: torch.save(small().state_dict(), path),
    "foreign format": lambda path, raw, marker: torch.save({"format": "pt", "model": {}}, path),
    "foreign zip": lambda path, raw, marker: zip_of_text(path),
    "newer": lambda path, raw, marker: torch.save(
        {**read_checkpoint(path), "format": FORMAT + 1}, path
    ),
}


def damage_of(kind: str, path, marker) -> None:
    DAMAGES[kind](path, raw_of(path), marker)


DAMAGE = {
    "truncated": "no readable",
    "one byte short": "no readable",
    "empty": "no readable",
    "zeros": "no readable",
    "zeros at the end": "no readable",
    "one flipped bit": "damaged",
    "text": "no readable",
    "missing": "does not exist",
    "folder": "no readable",
    "pickle bomb": "no readable",
    "old pickle bomb": "no readable",
    "foreign list": "not written by this project",
    "foreign state dict": "not written by this project",
    "foreign format": "not written by this project",
    "foreign zip": "no readable",
    "newer": f"format {FORMAT + 1}",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_file_that_is_no_good_checkpoint_is_refused_by_name_and_reason(kind, tmp_path):
    """Whatever lies there, the user reads which file and why, no traceback; a pickle in it does not
    run."""
    path, marker = write(tmp_path, 1), tmp_path / "marker"
    damage_of(kind, path, marker)
    text = fails(lambda: read_checkpoint(path), path, DAMAGE[kind])
    assert not marker.exists()
    assert len(text) < 600  # one readable message, not torch's page about weights_only


def test_torch_alone_would_load_the_flipped_bit(tmp_path):
    """The reason for the CRC check: without it the damage of the test above goes unnoticed. If
    torch learns it, drop ours."""
    path = write(tmp_path, 1)
    good = read_checkpoint(path)
    damage_of("one flipped bit", path, None)
    loaded = torch.load(path, weights_only=True)
    assert weights_hash(loaded["model"]) != good["weights_hash"] or not torch.equal(
        loaded["rng"], good["rng"]
    )


def test_no_flipped_byte_anywhere_gives_other_weights_or_a_traceback(tmp_path):
    """Headers, directory and padding of the archive are files too: a flip is refused in words or
    changes nothing."""
    path = write(tmp_path, 1)
    raw, good, refused = raw_of(path), read_checkpoint(path), 0
    places = random.Random(0)
    edges = [
        *range(60),
        *range(len(raw) - 260, len(raw)),
    ]  # the first local header, the directory and its end record
    for place in edges + [places.randrange(len(raw)) for _ in range(200)]:
        overwrite(
            path, raw[:place] + bytes([raw[place] ^ 1 << places.randrange(8)]) + raw[place + 1 :]
        )
        try:
            found = read_checkpoint(path)
        except UserError:
            refused += 1
            continue
        assert (
            weights_hash(found["model"]) == good["weights_hash"] and found["step"] == good["step"]
        ), place
    assert refused > 100


# ------------------------------------------------------------------------------------------------
# The newest good one


def test_newest_checkpoint_falls_back_to_the_one_before_aloud(tmp_path):
    """A damaged newest file costs one interval of training, not the run, and the
    user hears of it."""
    write(tmp_path, 10), write(tmp_path, 20), write(tmp_path, 30)
    damage_of("one flipped bit", path_of(tmp_path, 30), None)
    damage_of("truncated", path_of(tmp_path, 20), None)
    said = []
    path, found = newest_checkpoint(tmp_path, said.append)
    assert path == path_of(tmp_path, 10) and found["step"] == 10
    assert len(said) == 2 and path_of(tmp_path, 30) in said[0] and path_of(tmp_path, 20) in said[1]


def test_newest_checkpoint_orders_by_step_and_ignores_leftovers(tmp_path):
    """Step 100 is newer than 20, whatever was written last; a torn .tmp or best.pt is never "the
    newest"."""
    write(tmp_path, 100), write(tmp_path, 20)
    for name in ("ckpt_0000200.pt.123.tmp", "best.pt", "ckpt_0000300.txt"):
        overwrite(tmp_path / name, b"torn")
    assert newest_checkpoint(tmp_path)[0] == path_of(tmp_path, 100)
    assert checkpoint_files(tmp_path) == [path_of(tmp_path, 100), path_of(tmp_path, 20)]


def test_files_of_the_user_are_no_checkpoints_of_the_run(tmp_path):
    """They are neither taken for the newest nor removed: `keep` counts our own alone."""
    write(tmp_path, 4)
    for name in ("ckpt_step9.pt", "ckpt_0000009_keepme.pt", "ckpt_00000009.pt", "ckpt_latest.pt"):
        save_checkpoint(str(tmp_path / name), content(9))
    assert checkpoint_files(tmp_path) == [path_of(tmp_path, 4)]
    assert load_checkpoint(str(tmp_path))["step"] == 4


@pytest.mark.parametrize("key", ["task", "tokenizer", "model_config", "weights_hash"])
def test_a_checkpoint_without_what_every_program_needs_is_refused_in_words(key, tmp_path):
    path = write(tmp_path, 1)
    found = read_checkpoint(path)
    del found[key]
    torch.save(found, path)
    fails(lambda: load_checkpoint(path), path, "lacks", key)


def test_weights_that_are_not_those_of_their_hash_are_refused(tmp_path):
    """A stored hash was believed: results would stand under the name of other weights."""
    path = write(tmp_path, 1)
    found = read_checkpoint(path)
    found["model"]["embed.weight"][0, 0] += 1
    torch.save(found, path)
    fails(lambda: read_checkpoint(path), path, found["weights_hash"], "use another")


def test_settings_of_a_future_version_are_named(tmp_path):
    path = write(tmp_path, 1)
    found = read_checkpoint(path)
    found["model_config"]["n_hyper"] = 3
    torch.save(found, path)
    fails(lambda: read_checkpoint(path), path, "does not know", "n_hyper")


@pytest.mark.parametrize("task", ["../../../evil", "/etc", "a b", ""])
def test_a_task_that_could_become_a_path_is_refused(tmp_path, task):
    """eval.py makes files of this name: a checkpoint from elsewhere would write outside."""
    path = write(tmp_path, 1)
    found = read_checkpoint(path)
    torch.save({**found, "task": task}, path)
    fails(lambda: read_checkpoint(path), path, repr(task), "no name")


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    """A kilobyte may unpack to all memory; torch.save compresses nothing."""
    path = write(tmp_path, 1)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in parts.items():
            archive.writestr(name, raw + bytes(10_000_000 * name.endswith("/0")))
    assert os.path.getsize(path) < 100_000
    fails(lambda: read_checkpoint(path), path, "is compressed")


def test_the_refusal_of_a_bomb_does_not_say_how_to_run_it(tmp_path):
    """torch's own message names the switch that lets the code run."""
    path = str(tmp_path / "bomb.pt")
    bomb(path, tmp_path / "marker")
    text = fails(lambda: read_checkpoint(path), "could run code")
    assert "weights_only" not in text and "trust" not in text


def test_nothing_there_is_none_and_all_damaged_is_an_error(tmp_path):
    """A new run starts; a run whose files are all broken must not silently start over and delete
    what could be rescued."""
    assert newest_checkpoint(tmp_path) is None and newest_checkpoint(tmp_path / "absent") is None
    for step in (1, 2):
        damage_of("zeros", write(tmp_path, step), None)
    fails(lambda: newest_checkpoint(tmp_path, lambda text: None), "none of the 2", tmp_path)


# ------------------------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused_and_the_old_file_stays(value, tmp_path):
    """One NaN saved over the only good file would end the run for ever."""
    path = write(tmp_path, 1)
    before, bad = raw_of(path), content(1, seed=5)
    bad["model"]["embed.weight"][3, 2] = value
    fails(lambda: save_checkpoint(path, bad), path, "embed.weight")
    assert raw_of(path) == before and os.listdir(tmp_path) == [os.path.basename(path)]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=["torch", "system"],
)
def test_a_full_disk_is_told_with_path_and_sizes_and_leaves_the_old_file(
    error, tmp_path, monkeypatch
):
    """torch reports a full disk as "unexpected pos": the message must name path, megabytes needed
    and free."""
    path = write(tmp_path, 1)
    before = raw_of(path)

    def half_written(value, f):
        f.write(before[: len(before) // 2])
        raise error

    monkeypatch.setattr(torch, "save", half_written)
    fails(
        lambda: save_checkpoint(path, content(1, seed=9)), path, "MB needed", "MB free", "untouched"
    )
    monkeypatch.undo()
    assert raw_of(path) == before and read_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == [os.path.basename(path)]


def test_a_file_size_limit_is_handled_like_a_full_disk(tmp_path):
    """A quota or `ulimit -f` is the real thing, not a mock: torch's own writer fails in the middle
    of the file."""
    import resource

    path = write(tmp_path, 1)
    before, report = raw_of(path), tmp_path / "report"

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, resource.RLIM_INFINITY))
        try:
            save_checkpoint(path, content(1, seed=9))
        except UserError as error:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
            report.write_text(str(error))

    assert wait(fork(child)) == 0
    assert str(path) in report.read_text() and "MB needed" in report.read_text()
    report.unlink()
    assert raw_of(path) == before and os.listdir(tmp_path) == [os.path.basename(path)]


def kill_while_saving(folder, kills: int) -> None:
    """Kill -9, at random moments, a child that saves steps 1, 2, ... in a loop and keeps two files;
    check after each kill."""
    chance, last = random.Random(1), 0
    more = {
        "ballast": torch.zeros(300_000)
    }  # 1.2 MB, so that most of the time is spent within a save

    def child():
        for step in range(last + 1, 100_000):
            write(folder, step, **more)
            for old in checkpoint_files(folder)[2:]:
                os.remove(old)

    torn = 0
    for _ in range(kills):
        pid = fork(child)
        while not any(int(os.path.basename(p)[5:12]) > last for p in checkpoint_files(folder)):
            time.sleep(0.001)  # at least one new file, then anywhere
        time.sleep(chance.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL
        files = checkpoint_files(folder)
        for path in files:  # not only the newest: no file under its final name may be torn
            found = read_checkpoint(path)
            assert (
                found["step"] == int(os.path.basename(path)[5:12])
                and weights_hash(found["model"]) == found["weights_hash"]
            )
        assert files and newest_checkpoint(folder)[1]["step"] > last
        last = newest_checkpoint(folder)[1]["step"]
        torn += any(name.endswith(".tmp") for name in os.listdir(folder))
    assert torn, "no kill fell into a save: the test did not test"


def test_kill_9_at_random_moments_of_saving_leaves_loadable_checkpoints(tmp_path):
    """A preempted node gives no warning: every file under its final name is whole at any moment."""
    kill_while_saving(tmp_path, 10)


@pytest.mark.slow
def test_fifty_kills_while_saving_leave_loadable_checkpoints(tmp_path):
    """The same with more chances to hit the narrow places."""
    kill_while_saving(tmp_path, 50)


# ------------------------------------------------------------------------------------------------
# Hash, model, reference


def test_weights_hash_depends_on_every_name_and_every_byte():
    """The hash stands for the weights in results and resume tests: no change may keep it, no order
    may change it."""
    state = {
        "a": torch.randn(3, 5),
        "b": torch.arange(4),
        "c": torch.randn(2, 2).bfloat16(),
        "empty": torch.zeros(0),
    }
    base = weights_hash(state)
    assert base == weights_hash(dict(reversed(state.items()))) and len(base) == 16
    hashes = {base}
    for name, x in state.items():
        for byte in range(x.numel() * x.element_size()):
            changed = x.clone()
            changed.view(torch.uint8).view(-1)[byte] ^= 1
            hashes.add(weights_hash(state | {name: changed}))
        hashes.add(weights_hash({k + "_" * (k == name): v for k, v in state.items()}))
        hashes.add(weights_hash({k: v for k, v in state.items() if k != name}))
    assert len(hashes) == 1 + sum(x.numel() * x.element_size() + 2 for x in state.values())


def test_weights_hash_is_of_values_not_of_memory_layout():
    """A transposed view holds the same weights as its copy: hash what is saved, not how it lies in
    memory."""
    x = torch.randn(4, 6)
    assert (
        weights_hash({"x": x.t()})
        == weights_hash({"x": x.t().contiguous()})
        != weights_hash({"x": x})
    )


def test_model_from_gives_back_the_same_model():
    """Logits of the loaded model are bitwise those of the saved one."""
    model, idx = small(3), torch.randint(50, (2, 8))
    loaded = model_from({"model": model.state_dict(), "model_config": asdict(model.cfg)})
    assert torch.equal(loaded(idx), model(idx))


@pytest.mark.parametrize("change", ["missing", "extra", "renamed", "prefixed"])
def test_model_from_is_strict_about_keys(change):
    """strict=False with a renamed key trains on from random weights; it must be an error that names
    the key."""
    saved = content()
    state = saved["model"]
    key = next(k for k in state if "qkv" in k)
    match change:
        case "missing":
            del state[key]
        case "extra":
            state["blocks.9.bias"] = torch.zeros(2)
        case "renamed":
            state[key + "2"] = state.pop(key)
        case "prefixed":
            saved["model"] = {"_orig_mod." + k: v for k, v in state.items()}
    fails(lambda: model_from(saved), "blocks.9.bias" if change == "extra" else key)


def test_model_from_refuses_other_shapes():
    """Weights of another width never fit, neither by broadcasting nor in part."""
    saved = content()
    saved["model_config"]["d_ff"] = 32
    with pytest.raises((UserError, RuntimeError), match=r"size mismatch|does not fit"):
        model_from(saved)


def test_score_head_adds_only_its_own_weight():
    """The verifier starts from a language model: all its weights, and a new head; nothing else may
    be missing."""
    saved = content()
    model = model_from(saved, score_head=True)
    assert set(model.state_dict()) - set(saved["model"]) == {"score.weight", "score_loglik"}
    assert all(torch.equal(model.state_dict()[key], x) for key, x in saved["model"].items())
    key = next(k for k in saved["model"] if "qkv" in k)
    del saved["model"][key]
    fails(lambda: model_from(saved, score_head=True), key)
    with_head = content() | {"model": small(score_head=True).state_dict()}
    fails(
        lambda: model_from(with_head), "score.weight"
    )  # and it is not dropped in silence on the way back


def test_load_checkpoint_takes_a_folder_a_file_or_a_run_name(tmp_path, monkeypatch):
    """The three ways people name a run; a folder means its newest good checkpoint."""
    run = tmp_path / "out" / "mine"
    write(run, 1), write(run, 2)
    monkeypatch.chdir(tmp_path)
    assert (
        load_checkpoint(str(run))["step"]
        == load_checkpoint("mine")["step"]
        == load_checkpoint("out/mine")["step"]
        == 2
    )
    assert load_checkpoint(path_of(run, 1))["step"] == 1


def test_load_checkpoint_says_what_it_tried(tmp_path, monkeypatch):
    """A typing error in a name is the usual reason: the message repeats it and says what would have
    been right."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for ref in ("nosuch", "empty", str(tmp_path / "a.pt")):
        fails(lambda ref=ref: load_checkpoint(ref), repr(ref), "file", "folder", "out/")


# ------------------------------------------------------------------------------------------------
# What a run starts from, and what --force replaces


def test_a_folder_with_only_the_best_is_a_checkpoint(tmp_path):
    """Who cleans up keeps best.pt; with others beside it, it is the last one that is tried."""
    save_checkpoint(str(tmp_path / "best.pt"), content(4, seed=4))
    assert load_checkpoint(str(tmp_path))["step"] == 4
    write(tmp_path, 9)
    assert load_checkpoint(str(tmp_path))["step"] == 9
    damage_of("truncated", path_of(tmp_path, 9), None)
    assert load_checkpoint(str(tmp_path))["step"] == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_on_load(value, tmp_path):
    """Every program reads through here; without this sample.py writes noise, eval.py NaN rows."""
    write(tmp_path, 1)
    bad = content(2)
    bad["model"]["embed.weight"][3, 2] = value
    torch.save({"format": FORMAT, "weights_hash": "x", **bad}, path_of(tmp_path, 2))
    fails(lambda: load_checkpoint(path_of(tmp_path, 2)), "non-finite", "embed.weight")
    assert load_checkpoint(str(tmp_path))["step"] == 1


def test_settings_are_read_without_the_tensors(tmp_path):
    """Hashes of a checkpoint of gigabytes are wanted at every start: its tensors stay unread."""
    path = write(tmp_path, 3, init_from={"ref": "a", "weights_hash": "b"})
    found, light = read_checkpoint(path), read_checkpoint(path, whole=False)
    keys = ("step", "weights_hash", "init_from", "model_config")
    assert [light[key] for key in keys] == [found[key] for key in keys]
    damage_of("truncated", path, None)
    fails(lambda: read_checkpoint(path, whole=False), path)


def places(folder) -> dict:
    """Ways to write the name of what lies in a run folder. -> {kind: ref}"""
    (folder / "link").symlink_to(folder / "run")
    (folder / "start.pt").symlink_to(path_of(folder / "run", 1))
    refs = {"itself": folder / "run", "slash": f"{folder}/run/", "link": folder / "link"}
    refs |= {"file": path_of(folder / "run", 1), "best": folder / "run/best.pt"}
    refs |= {"linked file": folder / "start.pt", "up and down": f"{folder}/run/../run/."}
    return {kind: str(ref) for kind, ref in refs.items()}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("out", ["run", "run/", "link", "./link/../run"])
def test_a_run_may_not_replace_what_it_starts_from(tmp_path, out, force):
    """However the two are named; and the advice is never --force, which would lose the source."""
    write(tmp_path / "run", 1)
    save_checkpoint(str(tmp_path / "run/best.pt"), content(1))
    for ref in places(tmp_path).values():
        text = fails(lambda ref=ref: open_start(ref, f"{tmp_path}/{out}", force), "lies inside")
        assert "--force" not in text and "--out_dir" in text
    other = open_start(str(tmp_path / "run"), str(tmp_path / "runs"), force)
    assert other[0]["weights_hash"] == other[1]["weights_hash"]


@pytest.mark.parametrize("state", ["preempted", "running", "failed", "done", None])
def test_a_start_that_is_not_finished_is_named(tmp_path, capsys, state):
    """Its weights may serve, but nobody should take them for those of the whole run."""
    write(tmp_path / "run", 3)
    if state:
        write_json(str(tmp_path / "run" / "state.json"), {"state": state})
    open_start(str(tmp_path / "run"), str(tmp_path / "next"), force=False)
    unfinished = state not in ("done", None)
    assert (f"is {state} at step 3, not done" in capsys.readouterr().out) == unfinished


def test_force_is_refused_above_the_start_too(tmp_path):
    """A folder of runs is not to be started over from one of its runs; without --force it may."""
    write(tmp_path / "all/base", 1)
    fails(lambda: open_start(str(tmp_path / "all/base"), str(tmp_path / "all"), True), "inside")
    assert open_start(str(tmp_path / "all/base"), str(tmp_path / "all"), False)


@pytest.mark.parametrize(
    "ref, wanted",
    [
        ("out/toy/pretrain", "out/toy/sft"),
        ("out/toy/pretrain/", "out/toy/sft"),
        ("toy/pretrain", "out/toy/sft"),
        ("out/toy/pretrain/ckpt_0000001.pt", "out/toy/sft"),
    ],
)
def test_beside_a_run_is_in_the_folder_that_holds_it(tmp_path, monkeypatch, ref, wanted):
    """Of every way to name it."""
    write(tmp_path / "out/toy/pretrain", 1)
    monkeypatch.chdir(tmp_path)
    assert beside(ref, "sft") == wanted
    absolute = beside(str(tmp_path / "out/toy/pretrain"), "sft")
    assert absolute == str(tmp_path / "out/toy/sft")


OLD_RUN = ("state.json", "config.json", "metrics.jsonl", "answers.json", "best.pt")


def old_run(folder) -> dict:
    """Write a run of two checkpoints, with a user's own file. -> name: content"""
    write(folder, 1), write(folder, 2)
    for name in (*OLD_RUN, "notes.txt"):
        (folder / name).write_text(f"old {name}")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def forced_run(folder) -> None:
    """Do what a run under --force does to its folder, up to its first checkpoint."""
    replace_run(folder)
    shutil.rmtree(folder / NEW, ignore_errors=True)
    (folder / NEW).mkdir()
    for name in ("metrics.jsonl", "config.json", "state.json"):
        (folder / NEW / name).write_text(f"new {name}")
    save_checkpoint(str(folder / NEW / "best.pt"), content(9))
    write(folder / NEW, 9)
    replace_run(folder)


CHANGES = ("rename", "remove", "mkdir", "rmdir", "replace")


def dies_after(n: int, call) -> bool:
    """Run call() up to its n-th change of the file system. -> whether it was cut off"""
    with pytest.MonkeyPatch.context() as patch:
        count = iter(range(n))

        def limited(function):
            def change(*args, **keys):
                if next(count, None) is None:
                    raise InterruptedError
                return function(*args, **keys)

            return change

        for name in CHANGES:
            patch.setattr(os, name, limited(getattr(os, name)))
        patch.setattr("pathlib.Path.write_text", limited(Path.write_text))
        patch.setattr("shutil.rmtree", limited(shutil.rmtree))
        try:
            call()
        except (InterruptedError, UserError):
            return True
    return False


def test_a_kill_at_any_moment_of_force_loses_no_run(tmp_path):
    """After any change of the file system, and after any of the repair, one whole run is there.

    It is the old one until the new one has saved, and then the new one with all its files.
    """
    outcomes, before = set(), old_run(tmp_path / "old")
    after = {"notes.txt": before["notes.txt"]}
    for first in range(35):
        for second in range(first % 5, 20, 5):
            folder = tmp_path / f"{first}_{second}"
            shutil.copytree(tmp_path / "old", folder)
            died = dies_after(first, lambda folder=folder: forced_run(folder))
            assert load_checkpoint(str(folder))["step"] in (2, 9)
            dies_after(second, lambda folder=folder: replace_run(folder))
            assert load_checkpoint(str(folder))["step"] in (2, 9)
            replace_run(folder)
            files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
            saved = "ckpt_0000009.pt" in files
            if saved:
                assert not os.path.exists(folder / NEW) and not os.path.exists(folder / SAVED)
                assert files.pop("best.pt") and files.pop("ckpt_0000009.pt")
                logs = ("metrics.jsonl", "config.json", "state.json")
                assert files == after | {name: f"new {name}".encode() for name in logs}
            else:
                assert files == before
            outcomes.add((died, saved))
    assert outcomes == {(True, False), (True, True), (False, True)}
