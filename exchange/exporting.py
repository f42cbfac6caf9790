"""A folder made of a checkpoint, which transformers loads without remote code.

It holds weights, sizes, tokenizer, chat template, and a model card with the results of just these
weights. It is made beside its place and renamed: it is whole, or it is not there.
"""

import glob
import json
import os
import shutil
from functools import partial
from typing import BinaryIO

import tokenizers
from safetensors.torch import save
from tokenizers import decoders, pre_tokenizers, processors
from torch import Tensor

from configurator import UserError, as_dict
from corpus.foreign import ForeignTokenizer, Template, byte_of_symbol
from corpus.tokenizer import SPECIAL, Tokenizer, load_tokenizer
from exchange.weights import config_of, from_ours, home_of
from model import ModelConfig
from runtime.checkpoint import find_checkpoint, model_from
from runtime.files import remove_leftovers, unfinished, write_atomic, write_json
from runtime.logs import read_log

LARGEST = 5_000_000_000  # bytes of a file of weights; more of them go into several files
# The pattern that OpenAI released with GPT-2; corpus/tokenizer.py has a form for another library
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

{about}

## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

{use}

## Results

{results}
"""
CHAT_USE = """`tokenizer.apply_chat_template(messages, add_generation_prompt=True)` gives the ids of
a chat; an answer ends with one of the `eos_token_id` of generation_config.json."""
TEXT_USE = "This model continues text. It was not tuned on chats, and has no chat template."
PREFIX_USE = """`tokenizer(text)` puts `{prefix}` before a text, as in training. A chat has none in
front, and lm-evaluation-harness would count it as a word of the text: give the harness
`--model_args pretrained={name},add_bos_token=False` with `--apply_chat_template` and for
perplexities."""


def export_model(ref: str, folder: str, name: str | None, data_dir: str) -> None:
    """Write what transformers loads into a new folder. Raises UserError, and writes nothing.

    name: of the tokenizer, where the checkpoint's own name does not lead to its ranks.
    """
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists: choose another --dest, or remove it")
    path, checkpoint = find_checkpoint(ref)
    head = {"score_head": True} if checkpoint.get("task") == "verifier" else {}
    kind = home_of(ModelConfig(**checkpoint["model_config"] | head), ref)
    model, spec = model_from(checkpoint), checkpoint["tokenizer"]
    tokenizer = load_tokenizer(name or spec["name"], data_dir, spec)
    files = tokenizer_files(tokenizer, "template" in checkpoint, model.cfg.seq_len)
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": list(tokenizer.stops)}
    ids["pad_token_id"] = tokenizer.pad
    files["generation_config.json"] = ids
    files["config.json"] = config_of(model.cfg, kind) | ids
    files["README.md"] = card(path, checkpoint, tokenizer, folder)
    write_folder(folder, files, from_ours(model.state_dict(), model.cfg, kind))
    about = f"{model.num_params() / 1e6:.1f}M parameters, weights {checkpoint['weights_hash']}"
    print(f"convert: {ref} -> {folder}: {kind}, {about}")
    for matrix in {model.embed.weight, model.head.weight}:
        if matrix[model.cfg.vocab_size :].any():  # as before they were zero from the start
            print("convert: NOTE rows of no token are left out: an import has another weights hash")


def write_folder(folder: str, files: dict[str, str | dict], tensors: dict[str, Tensor]) -> None:
    """Write texts, objects and weights into a new folder, all or nothing."""
    parent = os.path.dirname(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    remove_leftovers(parent)
    new = unfinished(os.path.abspath(folder), "part")
    try:
        write_weights(new, tensors)
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
            data = text.encode(errors="replace")
            write_atomic(os.path.join(new, name), lambda f, data=data: f.write(data))
        os.rename(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_weights(folder: str, tensors: dict[str, Tensor]) -> None:
    """Write model.safetensors, or several files of at most LARGEST bytes and their index."""
    groups = [{}]
    for name, x in tensors.items():
        if groups[-1] and n_bytes(groups[-1] | {name: x}) > LARGEST:
            groups.append({})
        groups[-1][name] = x
    n, place = len(groups), {}
    for i, group in enumerate(groups, 1):
        name = "model.safetensors" if n == 1 else f"model-{i:05}-of-{n:05}.safetensors"
        own = {key: x.contiguous() for key, x in group.items()}
        write = partial(write_tensors, own)
        write_atomic(os.path.join(folder, name), write, n_bytes(own))
        place |= dict.fromkeys(group, name)
    if n > 1:
        index = {"metadata": {"total_size": n_bytes(tensors)}, "weight_map": place}
        write_json(os.path.join(folder, "model.safetensors.index.json"), index)


def n_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors.values())


def write_tensors(tensors: dict[str, Tensor], f: BinaryIO) -> None:
    f.write(save(tensors, {"format": "pt"}))


# ------------------------------------------------------------------------------------------------
# The tokenizer


def tokenizer_files(
    tokenizer: Tokenizer | ForeignTokenizer, is_chat: bool, seq_len: int
) -> dict[str, str | dict]:
    """Return the files of a tokenizer, by name; an imported one gets its own back."""
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": seq_len}
    options["clean_up_tokenization_spaces"] = False
    if isinstance(tokenizer, ForeignTokenizer):
        backend, text = tokenizer.backend, tokenizer.json
        jinja, own = tokenizer.jinja, tokenizer.special_tokens
    else:
        backend = backend_of(tokenizer)
        text, jinja, own = backend.to_str(pretty=True), None, {}
    meanings = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
    options |= {key: backend.id_to_token(token) for key, token in meanings.items()} | own
    files = {"tokenizer.json": text, "tokenizer_config.json": options}
    if is_chat:
        files["chat_template.jinja"] = jinja or jinja_of(tokenizer.template, backend)
    return files


def backend_of(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Return our tokenizer as one of the `tokenizers` library, with the same ids.

    tiktoken merges the two tokens whose sum has the lowest rank, whichever two they are; here each
    such pair is a merge, in the order of the ranks (as transformers' TikTokenConverter does it).
    """
    symbols = {byte: symbol for symbol, byte in byte_of_symbol().items()}
    tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.n_text)]
    texts = {token: "".join(symbols[byte] for byte in token) for token in tokens}
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [(ranks[a], ranks[b], a, b) for a, b in pairs if a in ranks and b in ranks]
        merges += [(texts[a], texts[b]) for *_, a, b in sorted(pairs)]
    vocab = {texts[token]: rank for token, rank in ranks.items()}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=True))
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
    symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, symbols])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(x, normalized=False) for x in SPECIAL])
    if backend.get_vocab_size() != tokenizer.vocab_size:
        what = f"tokenizer {tokenizer.name} has words that are spelled as a special token"
        raise UserError(f"{what}: it has no form for transformers")
    before = " ".join(backend.id_to_token(token) for token in tokenizer.prefix)
    around = [(backend.id_to_token(token), token) for token in tokenizer.prefix]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{before} $A", pair=f"{before} $A {before} $B", special_tokens=around
    )
    return backend


def jinja_of(template: Template, backend: tokenizers.Tokenizer) -> str:
    """Return a Jinja chat template that says what a template of ours says."""

    def literal(ids: list[int]) -> str:
        return json.dumps("".join(backend.id_to_token(token) for token in ids))

    lines = ["{%- for message in messages %}"]
    word = "if"
    for role, (before, after) in template.roles.items():
        lines.append(f"    {{%- {word} message['role'] == '{role}' %}}")
        around = f"{literal(before)} + message['content'] + {literal(after)}"
        lines.append(f"        {{{{- {around} }}}}")
        word = "elif"
    lines += ["    {%- else %}", "        {{- raise_exception('no such role') }}"]
    lines += ["    {%- endif %}", "{%- endfor %}", "{%- if add_generation_prompt %}"]
    lines += [f"    {{{{- {literal(template.roles['assistant'][0])} }}}}", "{%- endif %}"]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------
# The model card


def card(path: str, checkpoint: dict, tokenizer: Tokenizer | ForeignTokenizer, folder: str) -> str:
    """Return a model card: what the model is, how to load it, and its results."""
    weights, data = checkpoint["weights_hash"], checkpoint["train_config"].get("data")
    cfg = ModelConfig(**checkpoint["model_config"])
    origin = [f"{key}={value}" for key, value in as_dict(cfg).items()]
    about = [
        f"A language model of Modern LLM: task {checkpoint['task']}, step {checkpoint['step']}"
    ]
    about[0] += f", data {data}." if data else "."
    if source := checkpoint.get("imported_from"):
        about.append(f"Its weights were imported from {source}.")
    about.append(f"Weights {weights} (sha256 of our checkpoint), tokenizer {tokenizer.name}.")
    about += ["Its configuration there:", "", f"    {' '.join(origin)}"]
    name = os.path.basename(os.path.normpath(folder))
    use = [CHAT_USE if "template" in checkpoint else TEXT_USE]
    if tokenizer.prefix:
        use.append(PREFIX_USE.format(prefix=tokenizer.decode(tokenizer.prefix), name=name))
    text = {"name": name, "about": "\n".join(about), "use": "\n\n".join(use)}
    return CARD.format(**text, results=results_table(os.path.dirname(path), weights))


def results_table(folder: str, weights: str) -> str:
    """Return the newest results of these weights alone: of the run, and of the pipeline around."""
    rows = {}
    for place in (os.path.join(folder, ".."), folder):
        for path in sorted(glob.glob(os.path.join(glob.escape(place), "results*.jsonl"))):
            for row in sorted(
                read_log(path), key=lambda row: (row.get("seq", 0), row.get("date", ""))
            ):
                if is_own(row, weights):
                    what = [row["task"], data_of(row), row["split"], row["metric"], row["protocol"]]
                    rows[tuple(what)] = row
    if not rows:
        return "None: eval.py had not measured these weights."
    lines = ["| task | data | split | metric | protocol | value | 95 % interval | n |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for what, row in rows.items():
        bounds = f"{row['low']:.4g} to {row['high']:.4g}" if "low" in row else ""
        lines.append(f"| {' | '.join(what)} | {row['value']:.4g} | {bounds} | {row['n']} |")
    return f"Of the weights {weights}, by `eval.py`.\n\n" + "\n".join(lines)


def is_own(row: dict, weights: str) -> bool:
    """Say whether a row measures these weights: not beside a verifier, not a trivial answer."""
    alone = "verifier_hash" not in row and row.get("model") == row.get("stage")
    return alone and row.get("weights_hash") == weights


def data_of(row: dict) -> str:
    return str(next(iter((row.get("settings") or {"data": ""}).values())))
