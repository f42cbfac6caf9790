"""Sizes and weights of a model in transformers' names, both ways.

Homes: LlamaForCausalLM; with a sliding window MistralForCausalLM; with QK-norm Qwen3ForCausalLM;
with QK-norm and sinks, or with experts, FlintForCausalLM. Parts of one matrix of ours (q, k, v;
gate, up) are matrices of their own there. RoPE rotates the same halves in all.
"""

import inspect
import re

import torch
from torch import Tensor

from configurator import UserError, check, key_types
from model import GPT, ModelConfig

NAMES = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
DENSE = {"mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"], "mlp.down": ["mlp.down_proj"]}
SHARED = {
    "mlp.shared.gate_up": ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"],
    "mlp.shared.down": ["mlp.shared_expert.down_proj"],
}
ATTENTION = {
    "attn_norm": ["input_layernorm"],
    "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.out": ["self_attn.o_proj"],
    "mlp_norm": ["post_attention_layernorm"],
}
QK_NORM = {"attn.q_norm": ["self_attn.q_norm"], "attn.k_norm": ["self_attn.k_norm"]}
# transformers' key -> our field, where the value is the same
SIZES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "head_dim": "d_head",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "seq_len",
    "rms_norm_eps": "rms_eps",
    "tie_word_embeddings": "tied",
}
EXPERTS = {
    "num_experts": "n_expert",
    "num_experts_per_tok": "n_expert_active",
    "moe_intermediate_size": "d_expert",
    "router_aux_loss_coef": "balance_coef",
}
DEFAULTS = {"head_dim": None, "num_key_value_heads": None, "tie_word_embeddings": False}
# What a model must say, or leave unsaid, to be computed by model.py
REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "logit_scale": 1.0,
}
LLAMA, MISTRAL, QWEN3, FLINT = KINDS = (
    *("LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM", "FlintForCausalLM"),
)
# Every layer of a Flint has experts, or none has
ALL_LAYERS = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
SINKS_IN_FILES = (".softmax_offset", ".sinks")
NO_SINK = -1e9  # a sink that takes nothing, for a model without them in Flint


def layout(cfg: ModelConfig) -> dict[str, list[str]]:
    """Return the names in transformers of the parts of each tensor of ours, in their order."""
    parts = ATTENTION | (QK_NORM if cfg.qk_norm else {})
    if not cfg.n_expert:
        parts = parts | DENSE
    elif cfg.shared_expert:
        parts = parts | SHARED
    layer = {f"{name}.weight": [f"{x}.weight" for x in own] for name, own in parts.items()}
    if cfg.n_expert:
        layer["mlp.router.weight"] = ["mlp.gate.weight"]
        layer["mlp.gate_up"] = ["mlp.experts.gate_up_proj"]
        layer["mlp.down"] = ["mlp.experts.down_proj"]
    if cfg.sinks:
        layer["attn.sinks"] = ["self_attn.sinks"]
    names = {name: [own] for name, own in NAMES.items()}
    names["head.weight"] = NAMES["embed.weight"] if cfg.tied else "lm_head.weight"
    names["head.weight"] = [names["head.weight"]]
    for i in range(cfg.n_layer):
        for name, own in layer.items():
            names[f"blocks.{i}.{name}"] = [f"model.layers.{i}.{x}" for x in own]
    return names


def to_ours(tensors: dict[str, Tensor], cfg: ModelConfig, source: str) -> dict[str, Tensor]:
    """Return our state dict of transformers' tensors. Raises UserError for missing or surplus."""
    names = layout(cfg)
    wanted = {name for own in names.values() for name in own}
    given = tensors.keys() - {"lm_head.weight"} if cfg.tied else tensors.keys()
    given = {name for name in given if not name.endswith("rotary_emb.inv_freq")}  # old files
    if given != wanted:
        missing, surplus = sorted(wanted - given)[:3], sorted(given - wanted)[:3]
        raise UserError(f"{source}: weights missing {missing}, surplus {surplus}")
    if cfg.tied:  # one tensor under two names
        del names["head.weight"]
    state = {}
    for name, own in names.items():
        try:
            x = torch.cat([tensors[part].float() for part in own])
        except RuntimeError as error:  # of shapes that do not belong together
            raise UserError(f"{source}: the weights {' + '.join(own)}: {error}") from None
        if name in ("embed.weight", "head.weight"):  # rows of no token go, those of padding come
            padding = x.new_zeros(cfg.padded_vocab - cfg.vocab_size, x.size(1))
            x = torch.cat((x[: cfg.vocab_size], padding))
        state[name] = x
    with torch.device("meta"):
        wanted = {name: x.shape for name, x in GPT(cfg).state_dict().items()}
    for name, x in state.items():
        if x.shape != wanted[name]:
            shapes = f"{tuple(x.shape)}, by config.json {tuple(wanted[name])}"
            raise UserError(f"{source}: the weights {' + '.join(names[name])} have shape {shapes}")
    if cfg.tied:
        state["head.weight"] = state["embed.weight"]
    return state


def sizes_of(config: dict, source: str) -> dict:
    """Return the fields of ModelConfig, but vocab_size, of a transformers config.json.

    Raises UserError for what has no home in model.py, with the key and its value.
    """
    kinds = config.get("architectures")
    kind = kinds[0] if isinstance(kinds, list) and kinds else kinds
    if kind not in KINDS:
        raise UserError(f"{source}: architecture {kind} is not one of {', '.join(KINDS)}")
    for key, value in REQUIRED.items():
        if config.get(key, value) not in (value, None):
            refuse(source, key, config[key], value)
    config = DEFAULTS | config
    sizes = {name: field_of(config, key, name, source) for key, name in SIZES.items()}
    flint = kind == FLINT
    sizes |= {"qk_norm": kind in (QWEN3, FLINT), "sinks": flint}
    sizes["rope_base"] = rope_base(config, source)
    sizes["sliding_window"] = window_of(config, kind, source)
    if flint and config.get("num_experts"):
        sizes |= {name: field_of(config, key, name, source) for key, name in EXPERTS.items()}
        width = {"shared_expert_intermediate_size": config["moe_intermediate_size"]}
        for key, value in (ALL_LAYERS | width).items():
            if config.get(key) != value:
                refuse(source, key, config.get(key), value)
    return sizes


def field_of(config: dict, key: str, name: str, source: str) -> object:
    """Return the value of a key of config.json, as our field `name` wants it."""
    if key not in config:
        raise UserError(f"{source}: config.json has no {key}")
    kind = key_types(ModelConfig)[name]
    try:
        return check(config[key], kind)
    except ValueError:
        wanted = inspect.formatannotation(kind)
        raise UserError(f"{source}: {key}={config[key]!r} is not of type {wanted}") from None


def refuse(source: str, key: str, value: object, expected: object) -> None:
    raise UserError(f"{source}: {key}={value!r} has no home here, expected {expected!r}")


def rope_base(config: dict, source: str) -> float:
    """Return RoPE's base, from the form of transformers 5 or of those before."""
    found = {"rope_theta": config.get("rope_theta", 10000.0)}
    for key in ("rope_parameters", "rope_scaling"):
        given = config.get(key) or {}
        if not isinstance(given, dict) or any(isinstance(x, dict) for x in given.values()):
            refuse(source, key, given, "one object for all layers")
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default":
            refuse(source, "rope_type", kind, "default")
        if given.get("partial_rotary_factor", 1.0) != 1.0:
            refuse(source, "partial_rotary_factor", given["partial_rotary_factor"], 1.0)
        found |= given
    return field_of(found, "rope_theta", "rope_base", source)


def window_of(config: dict, kind: str, source: str) -> int | None:
    """Return the sliding window of all layers, None where each sees all before it."""
    window = field_of({"sliding_window": None} | config, "sliding_window", "sliding_window", source)
    layers = config.get("layer_types") or []
    if not isinstance(layers, list):
        refuse(source, "layer_types", layers, "a list")
    kinds = set(map(str, layers))
    if len(kinds) > 1:
        refuse(source, "layer_types", sorted(kinds), "layers of one kind")
    if kind == FLINT:  # its full attention has no RoPE
        if kinds != {"sliding_attention"} or window is None:
            refuse(source, "layer_types", sorted(kinds), ["sliding_attention"])
        return None if window == config["max_position_embeddings"] else window
    if kind == QWEN3:
        slides = config.get("use_sliding_window") and window is not None
        if slides and not kinds and config.get("max_window_layers"):
            refuse(source, "max_window_layers", config["max_window_layers"], 0)
        return window if slides and kinds != {"full_attention"} else None
    return window if kind == MISTRAL else None


def from_files(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the tensors of files by their names in transformers' memory.

    A saved Flint has a matrix for each expert, and calls its sinks otherwise.
    """
    found, stacks = {}, {}
    for name, x in tensors.items():
        if part := EXPERT.fullmatch(name):
            stacks.setdefault(part[1], {})[int(part[2]), part[3]] = x
        else:
            found[name.replace(*SINKS_IN_FILES)] = x
    for name, own in stacks.items():
        numbers = sorted({number for number, _ in own})
        try:
            gate_up = [torch.cat((own[i, "gate"], own[i, "up"])) for i in numbers]
            found[f"{name}.gate_up_proj"] = torch.stack(gate_up)
            found[f"{name}.down_proj"] = torch.stack([own[i, "down"] for i in numbers])
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{source}: {name} are not whole and of one shape: {error}") from None
    return found


def to_files(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by their names in files."""
    found = {}
    for name, x in tensors.items():
        stack, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for i, (gate, up) in enumerate(expert.chunk(2) for expert in x):
                found[f"{stack}.{i}.gate_proj.weight"] = gate
                found[f"{stack}.{i}.up_proj.weight"] = up
        elif kind == "down_proj":
            found |= {f"{stack}.{i}.down_proj.weight": expert for i, expert in enumerate(x)}
        else:
            found[name.replace(*SINKS_IN_FILES[::-1])] = x
    return found


def without_idle_sinks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the sinks, where all of them are NO_SINK or, rounded, nearly."""
    sinks = {name: x for name, x in tensors.items() if name.endswith(".sinks")}
    if not all((x < NO_SINK / 2).all() for x in sinks.values()):
        return tensors
    return {name: x for name, x in tensors.items() if name not in sinks}


# ------------------------------------------------------------------------------------------------
# Out


def home_of(cfg: ModelConfig, source: str) -> str:
    """Return the class of transformers that computes such a model, or raise UserError."""
    nowhere = "has no home in transformers; the nearest that has one"
    if cfg.score_head:
        which = "is the language model that it was made from: give --init_from that run"
        raise UserError(f"{source} is a verifier: its score_head {nowhere} {which}")
    if not cfg.n_expert and not cfg.sinks:
        plain = MISTRAL if cfg.sliding_window else LLAMA
        return QWEN3 if cfg.qk_norm else plain
    part = f"n_expert={cfg.n_expert}" if cfg.n_expert else "sinks=True"
    if not cfg.qk_norm:
        other = "n_expert=0 and sinks=False (Llama)"
        which = f"has qk_norm=True (Flint), or {other}"
        raise UserError(f"{source}: qk_norm=False with {part} {nowhere} {which}")
    if cfg.n_expert and not cfg.shared_expert:
        which = "has shared_expert=True (Flint)"
        raise UserError(f"{source}: shared_expert=False with {part} {nowhere} {which}")
    return FLINT


def config_of(cfg: ModelConfig, kind: str) -> dict:
    """Return the config.json of a model in its home."""
    config = {"architectures": [kind], "model_type": kind.removesuffix("ForCausalLM").lower()}
    config |= {"dtype": "float32", "hidden_act": "silu", "attention_bias": False}
    config |= {"vocab_size": cfg.vocab_size}
    config |= {key: getattr(cfg, name) for key, name in SIZES.items()}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": cfg.rope_base}
    window = cfg.sliding_window
    if kind == FLINT:
        window = window or cfg.seq_len
        config |= {key: getattr(cfg, name) for key, name in EXPERTS.items()} | ALL_LAYERS
        config["shared_expert_intermediate_size"] = cfg.d_expert
    if kind == QWEN3:
        config |= {"use_sliding_window": window is not None, "max_window_layers": 0}
    if window is not None:
        config["sliding_window"] = window
    if window is not None and kind != MISTRAL:
        config["layer_types"] = ["sliding_attention"] * cfg.n_layer
    return config


def from_ours(state: dict[str, Tensor], cfg: ModelConfig, kind: str) -> dict[str, Tensor]:
    """Return transformers' tensors of our state dict, without the rows of padding."""
    heads = [n * cfg.d_head for n in (cfg.n_head, cfg.n_kv_head, cfg.n_kv_head)]
    tensors = {}
    for name, own in layout(cfg).items():
        x = state[name]
        if name in ("embed.weight", "head.weight"):
            x = x[: cfg.vocab_size]
        parts = x.split(heads) if name.endswith(".qkv.weight") else x.chunk(len(own))
        tensors |= zip(own, parts, strict=True)
    if kind == FLINT and not cfg.sinks:
        for i in range(cfg.n_layer):
            tensors[f"model.layers.{i}.self_attn.sinks"] = torch.full((cfg.n_head,), NO_SINK)
    return to_files(tensors)
