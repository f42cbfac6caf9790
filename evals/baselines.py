"""Causal language models of transformers beside ours: a folder becomes a row of every task."""

import inspect
import os
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from configurator import UserError
from corpus.foreign import HUMAN, ForeignTokenizer, plain_template
from corpus.tokenizer import Tokenizer, load_tokenizer
from exchange.importing import PEERS, Found, of_library, tokenizer_spec, without_weights
from runtime.files import reason_of

CONTEXT = 2048  # of a model that names none, as in lm-evaluation-harness


class Baseline(torch.nn.Module):
    """A model of transformers from a folder, with the methods of our GPT that tasks call."""

    def __init__(self, folder: str):
        super().__init__()
        self.model = load_causal(folder)
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        n_kv_head = getattr(config, "num_key_value_heads", None) or heads
        self.cfg = SimpleNamespace(n_layer=config.num_hidden_layers, n_kv_head=n_kv_head)
        self.cfg.d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.cfg.seq_len = getattr(config, "max_position_embeddings", None) or CONTEXT
        self.check_head(folder)

    @torch.no_grad()
    def check_head(self, folder: str) -> None:
        """Raise UserError where the logits are not those of the last layer's states by the head."""
        idx = torch.tensor([[1, 2, 3]])
        wanted = self.model(idx, use_cache=False).logits.float()
        if not torch.allclose(self.logits(self.hidden(idx)), wanted, rtol=1e-3, atol=1e-3):
            kind = type(self.model).__name__
            raise UserError(f"baseline {folder}: {kind} computes more than a head for its logits")

    @property
    def embed(self) -> torch.nn.Module:
        return self.model.get_input_embeddings()

    def new_cache(self, batch: int) -> "Past":
        return Past(self.model, batch, self.cfg.seq_len)

    def hidden(
        self, idx: Tensor, docs: None = None, cache: Any = None, pads: Tensor | None = None
    ) -> Tensor:
        """Return final hidden states (B, T, C) of token ids idx (B, T); pads (B,) at their left."""
        given = {"use_cache": False} if cache is None else cache.inputs(idx, pads)
        return self.model.base_model(idx, **given).last_hidden_state

    def logits(self, x: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(x).float()

    def logprobs(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return log p(target) at every position (B, T); 0 where target < 0."""
        rows, own = x.flatten(0, 1), targets.flatten()
        logp = torch.zeros(own.shape, device=x.device)
        for part in (own >= 0).nonzero().squeeze(1).split(1024):  # all logits would be gigabytes
            logp[part] = -F.cross_entropy(self.logits(rows[part]), own[part], reduction="none")
        return logp.view(targets.shape)


class Past:
    """transformers' own cache, with the methods of our KVCache that stream() calls.

    It does not roll. Beyond the context every id has the last position: what is written there is
    the caller's to cut.
    """

    def __init__(self, model: Any, batch: int, seq_len: int):
        from transformers import DynamicCache

        self.past = DynamicCache(config=model.config)
        self.real = torch.ones(batch, 0, dtype=torch.long, device=model.device)  # 0: padding
        self.last = seq_len - 1
        named = inspect.signature(model.base_model.forward).parameters
        self.has_positions = "position_ids" in named
        self.name = "cache" if "cache" in named else "past_key_values"  # before version 5.24

    def inputs(self, idx: Tensor, pads: Tensor | None) -> dict[str, Any]:
        """Return what a forward pass over the next ids (B, T) is given."""
        new = torch.ones_like(idx)
        if pads is not None:
            new[torch.arange(idx.size(1), device=idx.device) < pads[:, None]] = 0
        self.real = torch.cat((self.real, new), dim=1)
        given = {"attention_mask": self.real, self.name: self.past, "use_cache": True}
        if self.has_positions:
            pos = self.real.cumsum(1)[:, -idx.size(1) :] - 1
            given["position_ids"] = pos.clamp(0, self.last)
        return given

    def keep(self, rows: Tensor) -> None:
        self.past.batch_select_indices(rows)
        self.real = self.real[rows]


def load_causal(folder: str) -> Any:
    """Return transformers' model with every weight from the folder, or raise a UserError."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError(f"baseline {folder} needs the transformers library: {PEERS}") from None
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise UserError(f"baseline {folder} has no config.json: give the folder of a causal LM")
    options = {"local_files_only": True, "trust_remote_code": False, "dtype": torch.float32}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, **options
        )
    except Exception as error:  # whatever the library raises
        raise UserError(f"baseline {folder} cannot be loaded ({reason_of(error)})") from None
    unexpected = info["unexpected_keys"]  # old versions of the library saved a constant
    info["unexpected_keys"] = [key for key in unexpected if not key.endswith(".attn.masked_bias")]
    for what, names in info.items():
        if names:  # from_pretrained alone would go on with random weights
            some = f"{what.replace('_', ' ')} {sorted(map(str, names))[:3]}"
            raise UserError(f"baseline {folder} is not a whole model: {some}")
    return model.eval()


def load_baseline(folder: str, data_dir: str) -> tuple[Baseline, Tokenizer | ForeignTokenizer]:
    """Return the model and the tokenizer of a folder; without a template, chats are plain text."""
    model = Baseline(folder)
    n_rows = model.embed.weight.size(0)
    if os.path.isfile(os.path.join(folder, "tokenizer.json")):
        found = without_weights(folder)
    elif any(os.path.isfile(os.path.join(folder, x)) for x in ("vocab.json", "tokenizer.model")):
        found = found_by_library(folder, model.model)
    else:
        return model, ranks_of_gpt2(folder, n_rows, data_dir)
    if found.jinja is not None:
        try:
            return model, ForeignTokenizer(tokenizer_spec(found, folder, "auto", n_rows)[0])
        except UserError as error:
            print(f"eval: baseline {folder}: {error}; its chats are plain text")
    return model, ForeignTokenizer(tokenizer_spec(found, folder, "plain", n_rows)[0])


def found_by_library(folder: str, model: Any) -> Found:
    """Return the tokenizer of a folder without tokenizer.json, as transformers reads it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return of_library({}, {}, tokenizer, model, folder)
    except Exception as error:  # whatever the library raises
        reason = f"has no tokenizer that can be read: {error}"
        raise UserError(f"baseline {folder} {reason}") from None


def ranks_of_gpt2(folder: str, n_rows: int, data_dir: str) -> Tokenizer:
    """Return GPT-2's tokenizer from its ranks file, for a folder that holds none."""
    tokenizer = load_tokenizer("gpt2", data_dir)
    if n_rows != tokenizer.eos + 1:
        expected = f"expected GPT-2's own vocabulary of {tokenizer.eos + 1}, or a tokenizer.json"
        raise UserError(f"baseline {folder} has {n_rows} ids and no tokenizer, {expected}")
    tokenizer.prefix, tokenizer.pad, tokenizer.stops = [], tokenizer.eos, (tokenizer.eos,)
    tokenizer.template = plain_template(tokenizer.encode, [])
    tokenizer.end, tokenizer.until = tokenizer.template.start[-1], (HUMAN.rstrip(),)
    return tokenizer
