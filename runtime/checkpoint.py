"""Checkpoints: one file each, written whole, read whole, or refused in words (docs/log.md)."""

import glob
import hashlib
import itertools
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from configurator import UserError, as_dict
from model import GPT, ModelConfig
from runtime.files import read_json, reason_of, write_atomic

FORMAT = 2  # of checkpoints; 2: optimizer state by parameter name
NAMES = "ckpt_" + 7 * "[0-9]" + ".pt"  # other files are the user's
KEYS = "model_config weights_hash task"  # of every checkpoint
NEW, SAVED = ".new", ".saved"  # in a run folder: what --force has begun; see replace_run


def weights_hash(state: dict[str, Tensor]) -> str:
    """Return the first 16 hex digits of the sha256 over names and bytes of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def save_checkpoint(path: str, checkpoint: dict) -> str:
    """Write a checkpoint with its weights hash, and return that; never with non-finite weights."""
    state = checkpoint["model"]
    if bad := non_finite(state):
        raise UserError(f"{path} is not written: {bad}. The last good checkpoint stays")
    need = 3 * sum(x.numel() * x.element_size() for x in state.values())
    checkpoint = {"format": FORMAT, "weights_hash": weights_hash(state), **checkpoint}
    write_atomic(path, lambda f: torch.save(checkpoint, f), need)
    return checkpoint["weights_hash"]


def non_finite(state: dict[str, Tensor]) -> str:
    """Say which weights are NaN or infinite; "" where none is."""
    bad = [name for name, x in state.items() if not torch.isfinite(x).all()]
    return f"non-finite weights in {', '.join(bad[:3])}" if bad else ""


def read_checkpoint(path: str, whole: bool = True) -> dict:
    """Return the checkpoint in a file; raise UserError where it is damaged, foreign or newer.

    whole=False: for its settings and hashes; tensors stay in the file, unread and unchecked.
    """
    checkpoint = load_tensors(path, whole)
    known = isinstance(checkpoint, dict) and isinstance(checkpoint.get("format"), int)
    if not known or "model" not in checkpoint:
        raise UserError(f"{path} was not written by this project: it has no format number")
    if checkpoint["format"] > FORMAT:
        versions = f"format {checkpoint['format']}, this code reads {FORMAT}"
        raise UserError(f"{path} was written by a newer version ({versions}): update the code")
    check_keys(path, checkpoint, KEYS)
    if unknown := set(checkpoint["model_config"]) - {f.name for f in fields(ModelConfig)}:
        names = ", ".join(sorted(unknown))
        raise UserError(f"{path} has model settings that this code does not know: {names}")
    if not re.fullmatch(r"\w{1,40}", str(checkpoint["task"])):
        raise UserError(f"{path} is of the task {checkpoint['task']!r}, which is no name")
    if whole:
        if bad := non_finite(checkpoint["model"]):
            raise UserError(f"checkpoint {path} has {bad}: use an earlier one")
        if checkpoint["weights_hash"] != (found := weights_hash(checkpoint["model"])):
            what = f"weights {found}, and says that they are {checkpoint['weights_hash']}"
            raise UserError(f"checkpoint {path} has {what}: use another")
    return checkpoint


def check_keys(path: str, checkpoint: dict, keys: str) -> None:
    """Raise UserError where a checkpoint lacks one of these keys, between blanks."""
    if lacking := [key for key in keys.split() if key not in checkpoint]:
        raise UserError(f"checkpoint {path} lacks {', '.join(lacking)}: use another")


def load_tensors(path: str, whole: bool = True) -> dict:
    """Return what torch.save wrote to a file; whole: after a check of every byte."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type for entry in entries):  # torch.save compresses nothing
                raise UserError(f"{path} is compressed: it may unpack to any size, and is refused")
            if sum(entry.file_size for entry in entries) > os.path.getsize(path):
                raise UserError(f"{path} names more bytes than it has: it is refused")
            if damaged := archive.testzip() if whole else None:  # torch.load does not notice
                raise UserError(f"{path} is damaged (bad CRC in {damaged})")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=not whole)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist") from None
    except pickle.UnpicklingError:  # torch's own words say how to run it all the same
        what = "holds objects that could run code, or is damaged"
        raise UserError(f"{path} is no readable checkpoint: it {what}") from None
    except UserError:
        raise
    except Exception as error:  # whatever the libraries raise at a foreign file
        raise UserError(f"{path} is no readable checkpoint ({reason_of(error)})") from None


def kept_tensors(path: str, shapes: dict[str, tuple]) -> dict[str, Tensor] | None:
    """Return the tensors of these shapes in a file; None where it is missing or (aloud) damaged."""
    if not os.path.exists(path):
        return None
    try:
        found = load_tensors(path)
        items = found.items() if isinstance(found, dict) else []
        if {name: tuple(getattr(x, "shape", ())) for name, x in items} == shapes:
            return found
        reason = f"{path} holds something else"
    except UserError as error:
        reason = error
    print(f"WARNING: {reason}; it is made again", flush=True)
    return None


def checkpoint_files(folder: str) -> list[str]:
    """Return the paths of a run's checkpoints, newest first."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), NAMES)), reverse=True)


def newest_checkpoint(folder: str, log: Callable = print, whole: bool = True) -> tuple | None:
    """Return path and content of the newest that can be read, else of best.pt; None without any."""
    best = os.path.join(folder, "best.pt")
    files = checkpoint_files(folder) + [best] * os.path.isfile(best)
    for path in files:
        try:
            return path, read_checkpoint(path, whole)
        except UserError as error:
            log(f"WARNING: {error}; trying the one before")
    if files:
        raise UserError(f"none of the {len(files)} checkpoints in {folder} can be read")
    return None


def find_checkpoint(ref: str, whole: bool = True) -> tuple[str, dict]:
    """Return path and content of the checkpoint that a file, a run folder or a run's name means."""
    found = (ref, read_checkpoint(ref, whole)) if os.path.isfile(ref) else None
    for folder, place in itertools.product((ref, os.path.join("out", ref)), ("", SAVED, NEW)):
        found = found or newest_checkpoint(os.path.join(folder, place), whole=whole)
    if found:
        check_keys(*found, "tokenizer")
        return found
    tried = "it is no file, no run folder with ckpt_*.pt or best.pt, and no run under out/"
    raise UserError(f"no checkpoint at {ref!r}: {tried}")


def load_checkpoint(ref: str) -> dict:
    """Return the checkpoint of a file, of a run folder, or of the name of a run under out/."""
    return find_checkpoint(ref)[1]


def open_start(ref: str, folder: str, force: bool) -> tuple[dict, dict]:
    """Return what a run starts from, and its name and hash; UserError if the run replaces it."""
    source, start = find_checkpoint(ref)
    target = os.path.realpath(folder)
    homes = [os.path.dirname(os.path.realpath(source)), os.path.realpath(os.path.dirname(source))]
    inside = target in [os.path.commonpath([home, target]) for home in homes]
    if target in homes or (force and inside):
        what = f"the run would start from {source}, which lies inside its own out_dir {folder}"
        raise UserError(f"{what}: choose another --out_dir, so that the checkpoint stays")
    state = read_json(os.path.join(os.path.dirname(source), "state.json")).get("state", "done")
    if state != "done" and os.environ.get("RANK", "0") == "0":
        where = f"{state} at step {start.get('step', 0)}, not done"
        print(f"NOTE: {ref} is {where}: the run starts from there")
    return start, {"ref": ref, "weights_hash": start["weights_hash"]}


def is_stale(folder: str, start: str) -> bool:
    """Say whether the run in a folder was trained from other weights than a start has now."""
    try:
        origin = find_checkpoint(folder, whole=False)[1].get("init_from")
        now = find_checkpoint(start, whole=False)[1]["weights_hash"]
    except UserError:  # no run yet, or none to start from: the stage itself says so
        return False
    return bool(origin) and origin["weights_hash"] != now


def beside(ref: str, name: str) -> str:
    """Return the folder of this name beside the run that load_checkpoint(ref) would read."""
    run = ref if os.path.exists(ref) else os.path.join("out", ref)
    if os.path.isfile(run):
        run = os.path.dirname(run)
    return os.path.normpath(os.path.join(run, "..", name))


def sizes_of_start(start: dict, sizes: ModelConfig, given: set[str], ref: str) -> ModelConfig:
    """Return a model's sizes, with a seq_len that is given; UserError where another key differs."""
    saved = ModelConfig(**start["model_config"])
    if saved.score_head:
        raise UserError(f"{ref} is a verifier; pretraining goes on from a language model")
    own = {key: value for key, value in as_dict(saved).items() if key in given - {"seq_len"}}
    differ = [f"--{key}={value}" for key, value in own.items() if getattr(sizes, key) != value]
    if differ:
        raise UserError(f"{ref} is a model of another shape: {' '.join(differ)}, or leave it out")
    return replace(saved, seq_len=sizes.seq_len) if "seq_len" in given else saved


def model_from(checkpoint: dict, **changes: object) -> GPT:
    """Return the model of a checkpoint, with all its weights or a UserError.

    changes: fields of ModelConfig; after score_head=True the new head keeps its initial weights.
    """
    model = GPT(ModelConfig(**{**checkpoint["model_config"], **changes}))
    missing, unexpected = model.load_state_dict(checkpoint["model"], strict=False)
    if changes.get("score_head"):
        missing = [key for key in missing if key not in ("score.weight", "score_loglik")]
    if missing or unexpected:
        faults = f"missing {missing}, unexpected {unexpected}"
        raise UserError(f"the checkpoint does not fit its model: {faults}")
    return model


# ------------------------------------------------------------------------------------------------
# --force: the new run lies in NEW inside the folder until it has saved, and the old one is whole.
# After a kill NEW holds a checkpoint, or SAVED is there: then the next start does the rest


def run_files(folder: str) -> list[str]:
    """Return the paths of what makes up a run, its newest checkpoint last."""
    names = ("state.json", "config.json", "metrics.jsonl", "answers.json", "best.pt")
    paths = [os.path.join(folder, name) for name in names]
    return [path for path in paths if os.path.lexists(path)] + checkpoint_files(folder)[::-1]


def replace_run(folder: str) -> None:
    """Put the run in NEW in the place of that in the folder, if it has saved."""
    new, saved = os.path.join(folder, NEW), os.path.join(folder, SAVED)
    if checkpoint_files(new):
        for path in run_files(folder):
            os.remove(path)
        os.rename(new, saved)
    for path in run_files(saved):
        os.rename(path, os.path.join(folder, os.path.basename(path)))
    shutil.rmtree(saved, ignore_errors=True)
