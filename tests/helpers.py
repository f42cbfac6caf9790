"""What several test files share: small models, checkpoints, expected errors, child processes."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from configurator import UserError
from corpus.tokenizer import load_tokenizer
from model import GPT, ModelConfig
from runtime.checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("MODERN_LLM_DATA") or ROOT / "../shared/data")
BYTE = load_tokenizer("byte")
EOS, SYSTEM, USER, ASSISTANT, END, PAD = range(256, 262)


def fails(call, *words: str) -> str:
    """Return the text of the UserError of call(); it must hold each of the words."""
    with pytest.raises(UserError) as caught:
        call()
    for word in words:
        assert str(word) in str(caught.value)
    return str(caught.value)


def fork(call) -> int:
    """Return the process id of a child that runs call() and exits 0, or 1 where it raises."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            call()
            code = 0
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    """Return the exit code of a child; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def tiny(seed: int = 0, **fields) -> GPT:
    """Return a small model with every parameter random: as initialised, its blocks add nothing."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 262, "seq_len": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2}
    sizes |= {"d_model": 32, "d_ff": 64}
    model = GPT(ModelConfig(**{**sizes, **fields}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return model


def save_start(folder: Path, model: GPT, **changes) -> str:
    """Save a checkpoint as the loop writes it. -> its folder"""
    entries = {
        "model": model.state_dict(),
        "model_config": asdict(model.cfg),
        "train_config": {},
        "step": 7,
        "best": 1.0,
        "task": "pretrain",
        "data": "none",
        "rng": torch.get_rng_state(),
        "optimizers": [],
        "tokenizer": BYTE.spec(),
        **changes,
    }
    save_checkpoint(str(folder / "ckpt_0000007.pt"), entries)
    return str(folder)


@torch.no_grad()
def plain_logprobs(model: GPT, ids: list[int]) -> torch.Tensor:
    """Return log p of every id but the first, by a full log_softmax: (n - 1,)."""
    x = model.hidden(torch.tensor([ids[:-1]]))[0]
    logp = F.log_softmax((x @ model.head.weight.T)[:, : model.cfg.vocab_size], dim=-1)
    return logp[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


def metrics(folder) -> list[dict]:
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(text) for text in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
