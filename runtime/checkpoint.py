"""Checkpoints: one file each, written whole, read whole, or refused in words (docs/log.md)."""

import glob
import hashlib
import os
import zipfile
from collections.abc import Callable

import torch
from torch import Tensor

from configurator import UserError
from model import GPT, ModelConfig
from runtime.files import write_atomic

FORMAT = 2  # of checkpoints; 2: optimizer state by parameter name


def weights_hash(state: dict[str, Tensor]) -> str:
    """Return the first 16 hex digits of the sha256 over names and bytes of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def save_checkpoint(path: str, checkpoint: dict) -> None:
    """Write a checkpoint with its weights hash; non-finite weights never replace a good file."""
    state = checkpoint["model"]
    bad = [name for name, x in state.items() if not torch.isfinite(x).all()]
    if bad:
        names = f"non-finite weights in {', '.join(bad[:3])}"
        raise UserError(f"{path} is not written: {names}. The last good checkpoint stays")
    need = 3 * sum(x.numel() * x.element_size() for x in state.values())
    checkpoint = {"format": FORMAT, "weights_hash": weights_hash(state), **checkpoint}
    write_atomic(path, lambda f: torch.save(checkpoint, f), need)


def read_checkpoint(path: str) -> dict:
    """Return the checkpoint in a file; raise UserError where it is damaged, foreign or newer."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not notice a flipped byte
            damaged = archive.testzip()
        if damaged:
            raise UserError(f"checkpoint {path} is damaged (bad CRC in {damaged})")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist") from None
    except UserError:
        raise
    except Exception as error:  # whatever the libraries raise at a foreign file
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        raise UserError(f"{path} is no readable checkpoint ({reason})") from None
    known = isinstance(checkpoint, dict) and isinstance(checkpoint.get("format"), int)
    if not known or "model" not in checkpoint:
        raise UserError(f"{path} was not written by this project: it has no format number")
    if checkpoint["format"] > FORMAT:
        versions = f"format {checkpoint['format']}, this code reads {FORMAT}"
        raise UserError(f"{path} was written by a newer version ({versions}): update the code")
    return checkpoint


def checkpoint_files(folder: str) -> list[str]:
    """Return the paths of a run's checkpoints, newest first."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), "ckpt_*.pt")), reverse=True)


def newest_checkpoint(folder: str, log: Callable = print) -> tuple[str, dict] | None:
    """Return path and content of the newest checkpoint that can be read; None without a file."""
    files = checkpoint_files(folder)
    for path in files:
        try:
            return path, read_checkpoint(path)
        except UserError as error:
            log(f"WARNING: {error}; trying the one before")
    if files:
        raise UserError(f"none of the {len(files)} checkpoints in {folder} can be read")
    return None


def load_checkpoint(ref: str) -> dict:
    """Return the checkpoint of a file, of a run folder, or of the name of a run under out/."""
    if os.path.isfile(ref):
        return read_checkpoint(ref)
    for folder in (ref, os.path.join("out", ref)):
        found = newest_checkpoint(folder)
        if found:
            return found[1]
    tried = "it is no file, no run folder with ckpt_*.pt, and no run under out/"
    raise UserError(f"no checkpoint at {ref!r}: {tried}")


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
