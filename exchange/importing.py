"""A run folder made of a transformers folder or of a GGUF file.

A folder is read without transformers: config.json, *.safetensors, tokenizer.json and the chat
template. A GGUF file is opened by transformers, which gives its weights back as float32.
"""

import json
import os
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configurator import UserError, as_dict
from corpus.foreign import HUMAN, SPEC_FILE, ForeignTokenizer, Template, plain_template
from corpus.tokenizer import CHAT_1, SPECIAL, chat_1
from exchange.template import encode, read_template
from exchange.weights import from_files, sizes_of, to_ours, without_idle_sinks
from model import ModelConfig
from runtime.checkpoint import save_checkpoint
from runtime.files import digest, reason_of, write_json

PEERS = "pip install -r requirements-peers.txt"  # has the libraries that are optional
EMBEDDING = "model.embed_tokens.weight"
SURPLUS = 0.01  # rows of the embedding without a token: some makers round their number up


class Found(NamedTuple):
    """What a folder or a file holds, in the words of transformers."""

    config: dict
    tensors: dict[str, Tensor]
    tokenizer: str  # the text of tokenizer.json
    special: dict[str, str]  # bos_token, eos_token, ...: their texts
    jinja: str | None  # the chat template
    stops: list[int]  # ids that end a generation


def import_model(source: str, folder: str, seq_len: int | None, template: str) -> None:
    """Make a run folder of a model in transformers' form. Raises UserError, and writes nothing."""
    if os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise UserError(f"{folder} exists, and is no empty folder: choose another --out_dir")
    found = from_gguf(source) if source.endswith(".gguf") else from_folder(source)
    sizes = sizes_of(found.config, source)
    limit = sizes["seq_len"]
    if seq_len is not None and seq_len > limit:
        raise UserError(f"seq_len={seq_len}: {source} was made for {limit} tokens at most")
    found = found._replace(tensors=from_files(found.tensors, source))
    if EMBEDDING not in found.tensors:
        raise UserError(f"{source}: weights missing {[EMBEDDING]}")
    n_rows = found.tensors[EMBEDDING].size(0)
    spec, is_chat, n_known = tokenizer_spec(found, source, template, n_rows)
    tensors = without_idle_sinks(found.tensors)
    sizes["sinks"] &= len(tensors) == len(found.tensors)
    if (n_new := spec["vocab_size"] - n_known) > 0:
        tensors = with_new_rows(tensors, n_known, n_new)
    cfg = ModelConfig(**sizes | {"vocab_size": spec["vocab_size"], "seq_len": seq_len or limit})
    tokenizer = ForeignTokenizer(spec)
    checkpoint = {"model": to_ours(tensors, cfg, source), "model_config": as_dict(cfg)}
    checkpoint["model_config"]["vocab_size"] = cfg.vocab_size
    checkpoint |= {"train_config": {}, "step": 0, "best": float("inf"), "data": "none"}
    checkpoint |= {"task": "sft" if is_chat else "pretrain", "imported_from": source}
    checkpoint |= {"optimizers": {}, "rng": torch.get_rng_state(), "tokenizer": tokenizer.spec()}
    if is_chat:
        checkpoint["template"] = tokenizer.template.name
    weights = save_checkpoint(os.path.join(folder, "ckpt_0000000.pt"), checkpoint)
    write_json(os.path.join(folder, SPEC_FILE), tokenizer.spec())
    write_json(os.path.join(folder, "state.json"), {"state": "done"})
    n_params = sum(x.numel() for x in set(checkpoint["model"].values())) / 1e6
    about = f"weights {weights}, chat template {tokenizer.template.name}"
    print(f"convert: {source} -> {folder}: {n_params:.1f}M parameters, {about}")


def with_new_rows(tensors: dict[str, Tensor], n_known: int, n_new: int) -> dict[str, Tensor]:
    """Return the tensors with embeddings for n_new further ids: the mean of the known ones."""
    grown = dict(tensors)
    for name in {EMBEDDING, "lm_head.weight"} & tensors.keys():
        x = tensors[name][:n_known].float()
        grown[name] = torch.cat((x, x.mean(0, keepdim=True).expand(n_new, -1)))
    return grown


# ------------------------------------------------------------------------------------------------
# The tokenizer


def tokenizer_spec(found: Found, source: str, template: str, n_rows: int) -> tuple[dict, bool, int]:
    """Return the spec of ForeignTokenizer, whether the chat template is its own, its old ids."""
    try:
        backend = tokenizers.Tokenizer.from_str(found.tokenizer)
    except Exception as error:  # the library raises no other class
        raise UserError(f"{source}: tokenizer.json cannot be read: {error}") from None
    check_size(backend, n_rows, source)
    backend.encode_special_tokens = False
    name = os.path.basename(os.path.normpath(source)).removesuffix(".gguf")
    is_chat = template == "auto" and found.jinja is not None
    n_known = n_ids(backend)
    is_plain = template == "plain"
    if is_chat:
        template = read_template(found.jinja, found.special, backend, name)
    elif is_plain:
        prefix = backend.encode("", add_special_tokens=True).ids
        template = plain_template(partial(encode, backend=backend), prefix)
    else:
        backend.add_special_tokens([t for t in SPECIAL if backend.token_to_id(t) is None])
        template = chat_1({token: backend.token_to_id(token) for token in SPECIAL})
        why = "has no chat template" if found.jinja is None else "gets another chat template"
        added = f"{n_ids(backend) - n_known} ids are added for it, with the mean embedding"
        print(f"convert: {source} {why}: {CHAT_1} is its template; {added}")
    meanings = meanings_of(found, backend, template.roles["assistant"][1][0])
    special = template
    if is_plain:  # its ids are text, and the first of those after an answer may be inside one
        meanings |= {"stops": meanings["stops"][1:], "until": [HUMAN.rstrip()]}
        special = Template("", [], {})
    text = with_special(backend.to_str(), special, meanings)
    kept = {"json": text, "template": template._asdict(), **meanings}
    kept |= {"jinja": found.jinja if is_chat else None, "special_tokens": found.special}
    kept["vocab_size"] = n_ids(backend)
    return {"name": name, "hash": digest(kept), **kept}, is_chat, n_known


def n_ids(backend: tokenizers.Tokenizer) -> int:
    return max(backend.get_vocab(with_added_tokens=True).values()) + 1


def check_size(backend: tokenizers.Tokenizer, n_rows: int, source: str) -> None:
    """Raise UserError where the tokenizer cannot be the one that the embedding was trained with."""
    n = n_ids(backend)
    if n > n_rows or n < n_rows * (1 - SURPLUS):
        sizes = f"tokenizer.json has {n} ids, the embedding {n_rows} rows"
        raise UserError(f"{source}: {sizes}: this is the tokenizer of another model")


def meanings_of(found: Found, backend: tokenizers.Tokenizer, end: int) -> dict:
    """Return which ids mean the end and the start of a document, padding, the end of an answer."""

    def id_of(key: str) -> int | None:
        text = found.special.get(key)
        return None if text is None else backend.token_to_id(text)

    eos = backend.token_to_id(SPECIAL[0])  # a document's end, where an answer has its own
    if eos is None:
        eos = end if id_of("eos_token") is None else id_of("eos_token")
    bos, pad = id_of("bos_token"), id_of("pad_token")
    if bos is None:  # as lm-evaluation-harness does
        bos = eos if id_of("eos_token") is None else id_of("eos_token")
    meanings = {"eos": eos, "bos": bos, "pad": eos if pad is None else pad}
    meanings["stops"] = list(dict.fromkeys([end, eos, *found.stops]))
    meanings["prefix"] = backend.encode("", add_special_tokens=True).ids
    return meanings


def with_special(text: str, template: object, meanings: dict) -> str:
    """Return tokenizer.json with the tokens that have a meaning called special, as they must be.

    Else a text that spells one would become one.
    """
    loaded = json.loads(text)
    ids = {meanings["eos"], meanings["bos"], meanings["pad"], *meanings["stops"]}
    around = [template.start, *(part for own in template.roles.values() for part in own)]
    ids = ids.union(*around)
    for token in loaded.get("added_tokens") or []:
        token["special"] = token["special"] or token["id"] in ids
    return json.dumps(loaded, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------
# Files


def from_folder(folder: str) -> Found:
    """Return what a transformers folder holds. Raises UserError for what is missing or damaged."""
    found = without_weights(folder)
    return found._replace(tensors=read_tensors(folder))


def without_weights(folder: str) -> Found:
    """Return what a transformers folder holds beside its weights."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is no folder and no .gguf file")
    config = read_object(folder, "config.json")
    if config is None:
        raise UserError(f"{folder} has no config.json: give the folder of a transformers model")
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(path):
        raise UserError(f"{folder} has no tokenizer.json: save it with a fast tokenizer")
    with open(path, encoding="utf-8") as f:
        tokenizer = f.read()
    options = read_object(folder, "tokenizer_config.json") or {}
    stops = (read_object(folder, "generation_config.json") or {}).get("eos_token_id")
    stops = config.get("eos_token_id") if stops is None else stops
    special = {key: text_of(options[key]) for key in options if key.endswith("_token")}
    special = {key: text for key, text in special.items() if text is not None}
    jinja = read_jinja(folder, options)
    return Found(config, {}, tokenizer, special, jinja, as_list(stops, folder))


def as_list(ids: int | list | None, source: str) -> list[int]:
    """Return the ids of eos_token_id, which is one, several or none."""
    found = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(token, int) for token in found):
        raise UserError(f"{source}: eos_token_id={ids!r} is no id and no list of ids")
    return found


def text_of(token: str | dict | None) -> str | None:
    """Return the text of a special token, which some files keep with its options."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def read_object(folder: str, name: str) -> dict | None:
    """Return the object in a JSON file of a folder; None where there is no such file."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: {str(value)[:60]}")
    return value


def read_jinja(folder: str, options: dict) -> str | None:
    """Return the chat template: of chat_template.jinja, or of tokenizer_config.json."""
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as f:
            return f.read()
    own = options.get("chat_template")
    if isinstance(own, list):  # several under names
        named = [item for item in own if isinstance(item, dict) and item.get("name") == "default"]
        own = named[0].get("template") if named else None
    if own is not None and not isinstance(own, str):
        raise UserError(f"{folder}: chat_template={str(own)[:60]!r} is no text")
    return own


def read_tensors(folder: str) -> dict[str, Tensor]:
    """Return the tensors of a folder's safetensors files."""
    names = ["model.safetensors"]
    index = read_object(folder, "model.safetensors.index.json")
    if index is not None:
        place = index.get("weight_map")
        if not isinstance(place, dict) or not all(isinstance(x, str) for x in place.values()):
            raise UserError(f"{folder}: model.safetensors.index.json has no weight_map of names")
        names = sorted(set(place.values()))
    tensors = {}
    for name in names:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise UserError(f"{folder} has no {name}: weights must be safetensors files")
        try:
            with safe_open(path, framework="pt") as f:
                keys = f.keys()
                tensors |= {key: f.get_tensor(key) for key in keys}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or no safetensors file: {error}") from None
    return tensors


def from_gguf(path: str) -> Found:
    """Return what a GGUF file holds, dequantised by transformers."""
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist")
    if not all(map(find_spec, ("transformers", "gguf"))):
        raise UserError(f"{path} needs the libraries transformers and gguf: {PEERS}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = os.path.split(os.path.abspath(path))
    options = {"gguf_file": name, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # whatever the libraries raise at a damaged file
        raise UserError(f"{path} cannot be read ({reason_of(error)})") from None
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return of_library(config, model.state_dict(), tokenizer, model, path)


def of_library(config: dict, tensors: dict, tokenizer: Any, model: Any, source: str) -> Found:
    """Return what transformers' own tokenizer and model say of a source, and these two."""
    texts = tokenizer.special_tokens_map.items()
    special = {key: text for key, text in texts if isinstance(text, str)}
    stops = as_list(model.generation_config.eos_token_id, source)
    backend = tokenizer.backend_tokenizer.to_str()
    return Found(config, tensors, backend, special, tokenizer.chat_template, stops)
