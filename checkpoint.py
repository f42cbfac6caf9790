"""Run folders and checkpoints: written beside, fsynced, renamed; read only when the archive's CRC is right and every key fits.

A run folder holds config.json, metrics.jsonl, state.json (running, preempted, done or failed), ckpt_<step>.pt (the newest) and
best.pt (lowest validation loss). What torch.load and torch.save do not promise, and why this file does: LOG.md.
"""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager, suppress

import torch

from configurator import UserError
from data import write_atomic
from model import GPT, ModelConfig

FORMAT = 2  # of checkpoints; 2: optimizer state by parameter name


def weights_hash(state: dict[str, torch.Tensor]) -> str:
    """sha256 over names and bytes of a state dict, first 16 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def save_checkpoint(path: str, checkpoint: dict) -> None:
    """Write a checkpoint dict (see train) with its weights hash. Non-finite weights never replace a good file."""
    state = checkpoint["model"]
    bad = [name for name, x in state.items() if not torch.isfinite(x).all()]
    if bad:
        raise UserError(
            f"{path} is not written: non-finite weights in {', '.join(bad[:3])}. The last good checkpoint stays"
        )
    need = sum(x.numel() * x.element_size() for x in state.values()) * 3
    checkpoint = {"format": FORMAT, "weights_hash": weights_hash(state), **checkpoint}
    write_atomic(path, lambda f: torch.save(checkpoint, f), need)


def read_checkpoint(path: str) -> dict:
    """The checkpoint in a file. Raises UserError where it is missing, truncated, damaged, foreign or from a newer format."""
    try:
        with zipfile.ZipFile(
            path
        ) as archive:  # torch.load does not notice a flipped byte; the archive's CRC does
            damaged = archive.testzip()
        if damaged:
            raise UserError(f"checkpoint {path} is damaged (bad CRC in {damaged})")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist") from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} is no readable checkpoint ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]})"
        ) from None
    if (
        not isinstance(checkpoint, dict)
        or not isinstance(checkpoint.get("format"), int)
        or "model" not in checkpoint
    ):
        raise UserError(f"{path} was not written by this project: it has no format number")
    if checkpoint["format"] > FORMAT:
        raise UserError(
            f"{path} was written by a newer version (format {checkpoint['format']}, this is {FORMAT}): update the code"
        )
    return checkpoint


def checkpoint_files(folder: str) -> list[str]:
    """Checkpoints of a run, newest first."""
    names = (
        [n for n in os.listdir(folder) if n.startswith("ckpt_") and n.endswith(".pt")]
        if os.path.isdir(folder)
        else []
    )
    return [os.path.join(folder, name) for name in sorted(names, reverse=True)]


def newest_checkpoint(folder: str, say=print) -> tuple[str, dict] | None:
    """The newest checkpoint that reads well; damaged ones are passed over aloud. None where there is no file at all."""
    files = checkpoint_files(folder)
    for path in files:
        try:
            return path, read_checkpoint(path)
        except UserError as error:
            say(f"WARNING: {error}; trying the one before")
    if files:
        raise UserError(f"none of the {len(files)} checkpoints in {folder} can be read")
    return None


def load_checkpoint(ref: str) -> dict:
    """The checkpoint that a run folder, a file, or the name of a run under out/ stands for."""
    if os.path.isfile(ref):
        return read_checkpoint(ref)
    for folder in (ref, os.path.join("out", ref)):
        found = newest_checkpoint(folder)
        if found:
            return found[1]
    raise UserError(
        f"no checkpoint at {ref!r}: it is no file, no run folder with ckpt_*.pt, and no run under out/"
    )


def model_from(checkpoint: dict, **changes) -> GPT:
    """The model of a checkpoint, all weights loaded or an error. changes: ModelConfig fields, e.g. score_head=True (the new
    head keeps its initial weights)."""
    model = GPT(ModelConfig(**{**checkpoint["model_config"], **changes}))
    missing, unexpected = model.load_state_dict(checkpoint["model"], strict=False)
    missing = [
        key
        for key in missing
        if not (changes.get("score_head") and key in ("score.weight", "score_loglik"))
    ]
    if missing or unexpected:
        raise UserError(
            f"checkpoint does not fit its model: missing {missing}, unexpected {unexpected}"
        )
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Run folder


def provenance() -> dict:
    """Code and machine of this run."""
    here = os.path.dirname(os.path.abspath(__file__))

    def git(*args):
        with suppress(OSError):  # no git on this machine: unknown
            return subprocess.run(
                ["git", "-C", here, *args], capture_output=True, text=True
            ).stdout.strip()

    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu x{torch.get_num_threads()}"
    )
    return {
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "torch": torch.__version__,
        "device": device,
        "command": " ".join(sys.argv),
    }


@contextmanager
def lock(folder: str):
    """One process per run folder: a second one is refused and told who is there. The lock dies with its process."""
    try:
        os.makedirs(folder, exist_ok=True)
        f = open(os.path.join(folder, ".lock"), "a+")
    except OSError as error:
        raise UserError(
            f"cannot use {folder} as run folder ({error}): choose another --out_dir"
        ) from None
    with f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            raise UserError(
                f"{folder} is in use by {f.read().strip() or 'another process'}: wait for it, or choose another "
                "--out_dir"
            ) from None
        f.truncate(0)
        job = os.environ.get("SLURM_JOB_ID")
        f.write(
            f"process {os.getpid()} on {os.uname().nodename}{f', job {job}' if job else ''}, since {time.ctime()}"
        )
        f.flush()
        yield


def read_state(folder: str) -> str | None:
    """running, preempted, done or failed; None where no run has been."""
    try:
        with open(os.path.join(folder, "state.json")) as f:
            return json.load(f)["state"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
