"""Models and tokenizers of transformers come in unchanged, or are refused in words."""

import json
import os
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from corpus_helpers import quick, shard, snapshot
from exchange_helpers import (
    ANY_TEXT,
    CHATML,
    CHATML_TOKENS,
    SPECIAL_TEXT,
    TEXT,
    check_generation,
    logit_gap,
    save_theirs,
    trained_bpe,
)
from helpers import fails
from hypothesis import given
from safetensors.torch import load_file, save_file

import align
import convert
import eval as evaluation
import sample
import train
from corpus.chat import render, render_prompt
from corpus.tokenizer import SPECIAL, load_tokenizer
from evals.results import read_results
from exchange import template as templates
from exchange.template import read_template
from runtime.checkpoint import load_checkpoint, model_from
from runtime.files import write_jsonl


def bring_in(folder, name: str = "hf", *flags: str) -> dict:
    """Import a folder or file. -> its checkpoint"""
    argv = [f"--from={folder / name}", f"--out_dir={folder / 'run'}", *flags]
    assert convert.main(argv) == 0
    return load_checkpoint(str(folder / "run"))


def small_bpe() -> tokenizers.Tokenizer:
    return trained_bpe(400, CHATML_TOKENS)


def edit(path, **changes):
    """Change keys of a JSON file; a key with the value Ellipsis goes."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: x for key, x in value.items() if x is not ...}))


# ------------------------------------------------------------------------------------------------
# What is refused


CONFIGS = {
    "no architecture": {"architectures": None},
    "another architecture": {"architectures": ["GPT2LMHeadModel"]},
    "architecture of another type": {"architectures": {"a": 1}},
    "attention biases": {"attention_bias": True},
    "MLP biases": {"mlp_bias": True},
    "another activation": {"hidden_act": "gelu"},
    "scaled RoPE": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "scaled RoPE of transformers 5": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    "RoPE by kind of layer": {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
    "RoPE on a part": {"rope_parameters": {"partial_rotary_factor": 0.5}},
    "RoPE as text": {"rope_parameters": "default"},
    "base as text": {"rope_parameters": {"rope_theta": "big"}},
    "base of nothing": {"rope_parameters": {"rope_theta": None}},
    "mixed layers": {"layer_types": ["full_attention", "sliding_attention"]},
    "layers as text": {"layer_types": "full_attention"},
    "width of nothing": {"hidden_size": None},
    "width as text": {"hidden_size": "32"},
    "half a layer": {"num_hidden_layers": 2.5},
    "no layers": {"num_hidden_layers": 0},
    "no width": {"hidden_size": ...},
    "window as text": {"architectures": ["MistralForCausalLM"], "sliding_window": "9"},
    "tied as text": {"tie_word_embeddings": "yes"},
    "a layer too many": {"num_hidden_layers": 3},
    "a layer too few": {"num_hidden_layers": 1},
    "other MLP": {"intermediate_size": 72},
    "other heads": {"num_attention_heads": 8},
}
NAMED = {"a layer too many": "missing", "a layer too few": "surplus", "other MLP": "gate_proj"}
NAMED |= {
    "other heads": "q_proj",
    "RoPE on a part": "partial_rotary_factor",
    "no layers": "n_layer",
}
NAMED |= {"scaled RoPE": "rope_type='linear'", "base as text": "rope_theta='big'"}
NAMED |= {"scaled RoPE of transformers 5": "rope_type='yarn'"}
NAMED |= {"base of nothing": "rope_theta=None", "window as text": "sliding_window='9'"}
NAMED |= {"no architecture": "None", "another architecture": "GPT2LMHeadModel"}
NAMED |= {"architecture of another type": "architecture", "no width": "hidden_size"}


def refused(folder, *words: str) -> None:
    """Assert that hf in the folder is refused in these words, and nothing is written."""
    before = snapshot(folder)
    fails(lambda: bring_in(folder), *words)
    assert snapshot(folder) == before and not (folder / "run").exists()


@pytest.mark.parametrize("fault", CONFIGS)
def test_a_config_without_a_home_is_refused_by_key_and_value(tmp_path, fault):
    """Else the model would be loaded as another one, and only its answers would show it."""
    save_theirs(tmp_path / "hf", small_bpe())
    changes = CONFIGS[fault]
    edit(tmp_path / "hf/config.json", **changes)
    key, value = list(changes.items())[-1]
    words = [NAMED[fault]] if fault in NAMED else [f"{key}=" if "RoPE" not in fault else key]
    refused(
        tmp_path, *words, *([repr(value)] if fault not in NAMED and "RoPE" not in fault else [])
    )


def damage(path, how: str):
    """Damage a file: remove it, cut it in half, or write another content."""
    if how == "removed":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_text(how)


@pytest.mark.parametrize(
    "name, how, words",
    [
        ("config.json", "removed", ["no config.json"]),
        ("config.json", "[]", ["config.json", "no JSON object"]),
        ("config.json", "cut", ["config.json", "no JSON"]),
        ("tokenizer.json", "removed", ["no tokenizer.json"]),
        ("tokenizer.json", "{}", ["tokenizer.json cannot be read"]),
        ("tokenizer.json", "cut", ["tokenizer.json cannot be read"]),
        ("tokenizer_config.json", "[1]", ["tokenizer_config.json"]),
        ("generation_config.json", '{"eos_token_id": "2"}', ["eos_token_id='2'"]),
        ("chat_template.jinja", "{% for", ["chat template", "--template=chat-1"]),
        ("model.safetensors", "removed", ["no model.safetensors"]),
        ("model.safetensors", "cut", ["model.safetensors is damaged"]),
        ("model.safetensors", "", ["model.safetensors is damaged"]),
        ("model.safetensors.index.json", "{}", ["weight_map"]),
        ("model.safetensors.index.json", '{"weight_map": [1]}', ["weight_map"]),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}', ["weight_map"]),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b"}}', ["no b"]),
    ],
)
def test_a_damaged_folder_is_refused_by_file(tmp_path, name, how, words):
    """A copy that broke off is the commonest fault."""
    save_theirs(tmp_path / "hf", small_bpe())
    damage(tmp_path / "hf" / name, how)
    refused(tmp_path, *words)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x: x | {"model.norm.weight": x["model.norm.weight"] * torch.nan}, ["non-finite"]),
        (lambda x: {k: v for k, v in x.items() if "norm" not in k}, ["missing", "norm"]),
        (lambda x: {k: v for k, v in x.items() if "embed" not in k}, ["missing", "embed_tokens"]),
        (
            lambda x: x | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
            ["surplus", "bias"],
        ),
        (lambda x: x | {"model.norm.weight": torch.ones(31)}, ["model.norm.weight", "31"]),
        (lambda x: x | {"model.layers.0.self_attn.q_proj.weight": torch.ones(32)}, ["q_proj"]),
    ],
    ids=["NaN", "missing", "no embedding", "surplus", "short", "flat"],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, words):
    """A model with a random or an idle part must not come to be."""
    save_theirs(tmp_path / "hf", small_bpe())
    path = tmp_path / "hf/model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    refused(tmp_path, *words)


def test_the_tokenizer_of_another_model_is_refused(tmp_path):
    """Its ids would mean other words. A few rows without a token are the maker's padding."""
    save_theirs(tmp_path / "hf", small_bpe())
    (tmp_path / "hf/tokenizer.json").write_text(trained_bpe(300, CHATML_TOKENS).to_str())
    refused(tmp_path, "300 ids", "400 rows", "another model")
    (tmp_path / "hf/tokenizer.json").write_text(trained_bpe(398, CHATML_TOKENS).to_str())
    assert bring_in(tmp_path)["model_config"]["vocab_size"] == 398


def test_a_run_folder_that_exists_is_left_alone(tmp_path):
    """A model in it, or anything else."""
    save_theirs(tmp_path / "hf", small_bpe())
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes").write_text("mine")
    before = snapshot(tmp_path)
    fails(lambda: bring_in(tmp_path), tmp_path / "run", "exists", "--out_dir")
    assert snapshot(tmp_path) == before


def test_a_context_beyond_the_models_own_is_refused(tmp_path):
    """Positions that it never saw; a shorter context is the user's choice."""
    save_theirs(tmp_path / "hf", small_bpe())
    fails(lambda: bring_in(tmp_path, "hf", "--seq_len=65"), "seq_len=65", "64")
    assert bring_in(tmp_path, "hf", "--seq_len=32")["model_config"]["seq_len"] == 32


def test_what_is_no_model_is_refused(tmp_path):
    """A missing folder and a missing file."""
    fails(lambda: bring_in(tmp_path, "nowhere"), "nowhere", "no folder")
    fails(lambda: bring_in(tmp_path, "x.gguf"), "x.gguf does not exist")
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------
# Tokenizers and templates


def test_without_a_chat_template_chat_1_is_added_aloud(tmp_path, capsys):
    """Six ids, or those of them that are not there, with the mean embedding."""
    ours = save_theirs(tmp_path / "hf", small_bpe(), None)
    saved = bring_in(tmp_path)
    out, tokenizer = capsys.readouterr().out, load_tokenizer(str(tmp_path / "run"))
    assert "no chat template" in out and "chat-1" in out and "5 ids are added" in out
    assert saved["task"] == "pretrain" and "template" not in saved
    embedding, known = saved["model"]["embed.weight"], ours.embed.weight[:400]
    assert torch.equal(embedding[:400], known) and saved["model_config"]["vocab_size"] == 405
    assert torch.allclose(embedding[400:405], known.mean(0).expand(5, -1), atol=1e-7)
    ids = render_prompt([{"role": "user", "content": "a<|end|>"}], tokenizer)
    assert ids[0] == tokenizer.backend.token_to_id("<|user|>") and ids.count(tokenizer.end) == 1
    assert tokenizer.eos == 0 and tokenizer.decode(ids[1:-2]) == "a<|end|>"


@given(text=ANY_TEXT)
@quick
def test_no_text_becomes_a_special_token(text):
    """Neither those that the library calls special, nor the chat template's."""
    tokenizer = KEPT["tokenizer"]
    for whole in (text, SPECIAL_TEXT + text):
        ids = tokenizer.encode(whole)
        assert min(ids, default=3) > 2 and tokenizer.decode(ids) == whole
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == whole


def test_texts_are_encoded_together_as_each_alone():
    """By the library's threads, half a surrogate pair included."""
    tokenizer = KEPT["tokenizer"]
    texts = [TEXT, SPECIAL_TEXT, "", "a\ud800"]
    rows = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    assert rows == [tokenizer.encode(text) for text in texts]
    assert rows[3] == tokenizer.encode_array("a?").tolist()


KEPT = {}


@pytest.fixture(scope="module", autouse=True)
def kept(tmp_path_factory):
    """An imported tokenizer, once for all examples."""
    folder = tmp_path_factory.mktemp("kept")
    save_theirs(folder / "hf", small_bpe())
    bring_in(folder)
    KEPT["tokenizer"] = load_tokenizer(str(folder / "run"))


END = "{% endfor %}{% if add_generation_prompt %}"
JINJAS = {
    "ChatML": CHATML,
    "ChatML with a system turn of its own": "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}" + CHATML,
    "Llama 3": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}" + END + "{{ "
    "'<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "Zephyr": "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token "
    "+ '\\n' }}" + END + "{{ '<|assistant|>\\n' }}{% endif %}",
    "chat-1": "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}"
    + END
    + "{{ '<|assistant|>' }}{% endif %}",
    "no system turn": "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}"
    "{% endif %}{{ bos_token }}{% for m in messages %}{{ '<|user|>' if m.role == 'user' else "
    "'<|assistant|>' }}"
    "{{ m.content + eos_token }}" + END + "{{ '<|assistant|>' }}{% endif %}",
}
TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
PROMPT = END + "{{ '<|im_start|>assistant\\n' }}{% endif %}"
OTHERS = {
    "drops what an earlier answer thought": "{% for m in messages %}{{ '<|im_start|>' + m.role + "
    "'\\n' + m.content.split('</think>')[-1] + '<|im_end|>\\n' }}" + PROMPT,
    "puts the system turn into the user's": "{% set s = '' %}{% if messages[0].role == 'system' %}"
    "{% set s = messages[0].content + '\\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (s if loop.first else '') + "
    "m.content + '<|im_end|>\\n' }}" + PROMPT,
    "has no prompt of its own": "{% for m in messages %}{{ '<s>[A] ' + m.content + ' [/A]' if "
    "m.role == 'user' else m.content + '</s>' }}{% endfor %}",
    "goes by the content": "{% for m in messages %}{% if '12' in m.content %}{{ '!' }}{% endif %}"
    + TURN
    + PROMPT,
    "does not end an answer": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + "
    "m.content }}" + PROMPT,
    "drops all but the last turn": "{% for m in messages[-1:] %}" + TURN + PROMPT,
    "counts the turns": "{% for m in messages %}{{ loop.index }}" + TURN + PROMPT,
    "raises late": "{% for m in messages %}{% if loop.index > 4 %}{{ raise_exception('long') }}"
    "{% endif %}" + TURN + PROMPT,
    "calls what is not there": "{{ strftime_now('%d') }}{% for m in messages %}" + TURN + PROMPT,
    "is torn": "{% for m in messages %}{{ m.content",
}
TOKENS = ("<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", *CHATML_TOKENS)
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def backend():
    """A BPE that knows the special tokens of all templates, and cuts after line ends."""
    found = trained_bpe(400, (*TOKENS, *SPECIAL[1:]))
    pattern = r"\s*[\r\n]+| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
    parts = tokenizers.pre_tokenizers
    split = parts.Split(tokenizers.Regex(pattern), "isolated")
    symbols = parts.ByteLevel(add_prefix_space=False, use_regex=False)
    found.pre_tokenizer = parts.Sequence([split, symbols])
    return found


def talks(with_system: bool, n: int = 40) -> list[list[dict]]:
    """Return dialogues of one to six turns, half of them with a system turn."""
    rng, found = random.Random(7), []
    for number in range(n):
        roles = (["user", "assistant"] * 3)[: rng.randint(1, 6)]
        roles = ["system"] * (with_system and number % 2) + roles
        words = [*TEXT.split(), "</think>", "(", "12,5"]
        texts = [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in roles]
        found.append([{"role": r, "content": text} for r, text in zip(roles, texts, strict=True)])
    return found


@pytest.mark.parametrize("name", JINJAS)
def test_a_template_read_off_renders_as_its_jinja(backend, name):
    """Every dialogue, system turns too, whole and as a prompt."""
    found = read_template(JINJAS[name], NAMES, backend, name)
    jinja = templates.Jinja(JINJAS[name], NAMES)
    with_system = name != "no system turn"
    assert ("system" in found.roles) == with_system
    encode = partial(templates.encode, backend=backend)
    tokenizer = SimpleNamespace(template=found, encode=encode)
    for messages in talks(with_system):
        assert render(messages, tokenizer)[0] == encode(jinja(messages))
        if messages[-1]["role"] == "user":
            prompt = render_prompt(messages, tokenizer)
            assert prompt == templates.encode(jinja(messages, prompt=True), backend)


@pytest.mark.parametrize("name", OTHERS)
def test_a_template_of_another_kind_is_refused_in_words(backend, name):
    """What it does to its texts would be lost; our own template is the way out."""
    fails(lambda: read_template(OTHERS[name], NAMES, backend, name), name, "--template=chat-1")


# ------------------------------------------------------------------------------------------------
# After the import


CHATS = [
    {"messages": [{"role": "user", "content": "Tom?"}, {"role": "assistant", "content": "Ana"}]}
]
PAIRS = [
    {"prompt": CHATS[0]["messages"][:1], "chosen": f"good {i}", "rejected": "bad"} for i in range(4)
]
SUMS = [{"question": f"1+{i}?", "answer": f"1+{i}={1 + i}\n#### {1 + i}"} for i in range(4)]


def write_records(folder) -> None:
    """Write records for every stage, of training and validation, and test problems."""
    for split in ("train", "val"):
        write_jsonl(str(folder / f"sft_{split}.jsonl"), CHATS)
        write_jsonl(str(folder / f"dpo_{split}.jsonl"), PAIRS)
    for number, split in enumerate(("verifier", "val", "test")):
        rows = [row | {"question": f"{number}: {row['question']}"} for row in SUMS]
        write_jsonl(str(folder / f"problems_{split}.jsonl"), rows)


def bpe_of(n: int) -> tokenizers.Tokenizer:
    """Return a BPE of n ids; no text reaches those above 400."""
    text = json.loads(small_bpe().to_str())
    text["model"]["vocab"] |= {f"word{i}": i for i in range(400, n)}
    return tokenizers.Tokenizer.from_str(json.dumps(text))


@pytest.mark.parametrize("n", [400, pytest.param(70_000, marks=pytest.mark.slow)])
def test_every_stage_goes_on_from_an_imported_model(tmp_path, capsys, n):
    """SFT, DPO, verifier, evaluation and sampling; above 65,536 ids all but shards."""
    save_theirs(tmp_path / "hf", bpe_of(n), d_model=16, n_layer=1, seq_len=192, d_ff=16)
    saved = bring_in(tmp_path)
    data, out = tmp_path / "data", tmp_path / "out"
    write_records(data / "mini")
    common = [f"--data_dir={data}", "--device=cpu", "--dtype=float32", "--data=mini"]
    loop = [*common, "--max_steps=1", "--batch_tokens=192", "--micro_batch=1"]
    more = {"dpo": ["--n_answers=1", "--max_new_tokens=4"], "sft": ["--n_answers=0"]}
    more["verifier"] = ["--n_samples=2", "--max_new_tokens=4"]
    start = tmp_path / "run"
    for mode in ("sft", "dpo", "verifier"):
        argv = [f"--init_from={start}", f"--out_dir={out / mode}", f"--mode={mode}"]
        assert align.main([*argv, *loop, *more[mode]]) == 0
        tuned = load_checkpoint(str(out / mode))
        assert tuned["tokenizer"] == saved["tokenizer"] and tuned["template"] == saved["template"]
        start = out / mode
    flags = [f"--out_dir={out}", f"--data_dir={data}", "--device=cpu", "--dtype=float32"]
    flags += ["--tasks=problems", "--problems=mini", "--n_problems=2", "--max_new_tokens=4"]
    assert evaluation.main(flags) == 0
    assert {row["stage"] for row in read_results(str(out))} >= {"sft", "dpo"}
    flags = [f"--checkpoint={out / 'dpo'}", "--prompt=Tom?", "--max_new_tokens=4", "--device=cpu"]
    assert sample.main(flags) == 0
    tokenizer, ids = load_tokenizer(str(tmp_path / "run")), np.arange(3, 400)
    if n > 65_536:
        fails(lambda: shard(data / "mini/train_000.bin", ids, tokenizer), n, "uint16")
        return
    for split in ("train", "val"):
        shard(data / f"mini/{split}_000.bin", ids if split == "train" else ids[::-1], tokenizer)
    flags = [f"--init_from={tmp_path / 'run'}", f"--out_dir={out / 'more'}", "--eval_rows=1"]
    assert train.main([*flags, *loop]) == 0
    assert load_checkpoint(str(out / "more"))["tokenizer"] == saved["tokenizer"]


# ------------------------------------------------------------------------------------------------
# Beside transformers


SIZES = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SLIDING = {"sliding_window": 9, "layer_types": ["sliding_attention"] * 2}
NO_EXPERTS = {"num_experts": 0, "mlp_only_layers": [], "head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [], "head_dim": 16}
EXPERTS |= {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
THEIRS = {
    "Llama": {},
    "Llama, tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "head_dim": 16},
    "Llama, all heads": {"num_key_value_heads": 4, "rope_parameters": {"rope_theta": 5e4}},
    "Mistral": {"sliding_window": 9, "head_dim": 8},
    "Mistral, tied, no window": {"sliding_window": None, "tie_word_embeddings": True},
    "Qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "Qwen3, window": {"head_dim": 8, "use_sliding_window": True, "max_window_layers": 0, **SLIDING},
    "Flint": NO_EXPERTS | SLIDING | {"sliding_window": 64},
    "Flint, window": NO_EXPERTS | SLIDING | {"tie_word_embeddings": True},
    "Flint, experts": EXPERTS | SLIDING,
    "Flint, experts, tied": EXPERTS | SLIDING | {"sliding_window": 64, "tie_word_embeddings": True},
}


def save_random(folder, name: str, transformers, shard_size: str = "5GB"):
    """Save a small random model of a class of transformers, and its tokenizer. -> the model"""
    kind = name.partition(",")[0]
    config = getattr(transformers, f"{kind}Config")(**SIZES | THEIRS[name])
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    model.save_pretrained(folder, max_shard_size=shard_size)
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=small_bpe(), **special)
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return model


@pytest.mark.peers
@pytest.mark.parametrize("name", THEIRS)
def test_an_imported_model_is_transformers_own(tmp_path, name, transformers):
    """Logits at every length, and greedy answers to unequal prompts in one batch."""
    theirs = save_random(tmp_path / "hf", name, transformers, "20KB" if "tied" in name else "5GB")
    several = (tmp_path / "hf/model.safetensors.index.json").exists()
    assert several == ("tied" in name)
    ours = model_from(bring_in(tmp_path)).eval()
    assert logit_gap(ours, theirs) < 1e-4
    check_generation(ours, theirs)


@pytest.mark.peers
def test_an_imported_tokenizer_is_transformers_own(tmp_path, transformers):
    """Texts, also those that spell special tokens, and chats of the Jinja template."""
    save_random(tmp_path / "hf", "Llama", transformers)
    bring_in(tmp_path)
    ours = load_tokenizer(str(tmp_path / "run"))
    load = transformers.AutoTokenizer.from_pretrained
    theirs, careful = load(tmp_path / "hf"), load(tmp_path / "hf", split_special_tokens=True)

    @given(text=ANY_TEXT)
    @quick
    def holds(text):
        assert careful.encode(text, add_special_tokens=False) == ours.encode(text)

    holds()
    assert careful.encode(SPECIAL_TEXT, add_special_tokens=False) == ours.encode(SPECIAL_TEXT)
    for messages in talks(True):
        assert theirs.apply_chat_template(messages)["input_ids"] == render(messages, ours)[0]
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert prompt == render_prompt(messages, ours)


@pytest.mark.peers
@pytest.mark.parametrize("name", JINJAS)
def test_a_jinja_renders_as_in_transformers(backend, name, transformers):
    """Its sandbox, its trimming of blocks and its names are those of the library."""
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)
    jinja = templates.Jinja(JINJAS[name], NAMES)
    for messages in talks(name != "no system turn"):
        for prompt in (False, True):
            options = {"add_generation_prompt": prompt, "tokenize": False}
            text = fast.apply_chat_template(messages, chat_template=JINJAS[name], **options)
            assert jinja(messages, prompt) == text


# ------------------------------------------------------------------------------------------------
# GGUF


def write_gguf(path, folder) -> None:
    """Write a transformers folder of a Llama as a GGUF file, in llama.cpp's names."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if text in CHATML_TOKENS else 1 for text in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "mlp.up_proj": "ffn_up"}
    parts |= {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    parts |= {"mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down"}
    parts |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for i in range(config["num_hidden_layers"]):
        names |= {f"model.layers.{i}.{a}": f"blk.{i}.{b}" for a, b in parts.items()}
    for name, x in load_file(folder / "model.safetensors").items():
        x = x.numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbours
            n = heads if "q_proj" in name else kv_heads
            x = x.reshape(n, 2, x.shape[0] // n // 2, -1).swapaxes(1, 2).reshape(x.shape)
        writer.add_tensor(names[name.removesuffix(".weight")] + ".weight", np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.peers
def test_a_gguf_file_is_the_model_that_the_folder_is(tmp_path, transformers):
    """The same weights, sizes and ids by both ways; half a file is refused."""
    pytest.importorskip("gguf")
    save_theirs(tmp_path / "hf", small_bpe(), tied=False)
    write_gguf(tmp_path / "x.gguf", tmp_path / "hf")
    whole = (tmp_path / "x.gguf").read_bytes()
    folder = bring_in(tmp_path)
    (tmp_path / "run").rename(tmp_path / "first")
    file = bring_in(tmp_path, "x.gguf")
    assert file["weights_hash"] == folder["weights_hash"]
    sizes = folder["model_config"] | {"rms_eps": pytest.approx(1e-6)}
    assert file["model_config"] == sizes
    a, b = load_tokenizer(str(tmp_path / "first")), load_tokenizer(str(tmp_path / "run"))
    assert a.encode(TEXT + SPECIAL_TEXT) == b.encode(TEXT + SPECIAL_TEXT)
    assert a.template.roles == b.template.roles and a.stops == b.stops
    for n in (0, 4, 100, len(whole) // 2, len(whole) - 200):
        (tmp_path / "half.gguf").write_bytes(whole[:n])
        before = snapshot(tmp_path)
        argv = [f"--from={tmp_path / 'half.gguf'}", f"--out_dir={tmp_path / 'half'}"]
        fails(lambda argv=argv: convert.main(argv), "half.gguf")
        assert snapshot(tmp_path) == before
