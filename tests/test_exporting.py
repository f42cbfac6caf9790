"""What goes out comes back bitwise, with the same ids, and nothing is left half-written."""

import json
import os

import pytest
import torch
from corpus_helpers import needs_ranks, quick, real, snapshot
from exchange_helpers import (
    ANY_TEXT,
    HOMES,
    LLAMA,
    SPECIAL_TEXT,
    TEXT,
    check_generation,
    logit_gap,
    random_model,
    real_texts,
    save_chat_model,
    vocabulary,
)
from helpers import BYTE, fails, save_start, tiny
from hypothesis import given

import convert
from corpus.chat import render, render_prompt
from corpus.tokenizer import load_tokenizer
from exchange import exporting
from exchange.exporting import backend_of, tokenizer_files
from exchange.template import dialogues
from runtime.checkpoint import load_checkpoint
from runtime.files import write_atomic, write_jsonl


def to_and_fro(run, folder, *flags: str) -> dict:
    """Export a run and import what came out. -> its checkpoint"""
    assert convert.main([f"--init_from={run}", f"--dest={folder / 'hf'}", *flags]) == 0
    assert convert.main([f"--from={folder / 'hf'}", f"--out_dir={folder / 'back'}"]) == 0
    return load_checkpoint(str(folder / "back"))


@pytest.mark.parametrize("home", HOMES)
def test_what_was_exported_comes_back_bitwise(tmp_path, home):
    """Weights, sizes and their hash: nothing is lost in a home, whatever its names."""
    model = save_chat_model(tmp_path / "run", **HOMES[home])
    back = to_and_fro(tmp_path / "run", tmp_path)
    start, state = load_checkpoint(str(tmp_path / "run")), model.state_dict()
    assert back["model"].keys() == state.keys()
    assert all(torch.equal(back["model"][name], state[name]) for name in state)
    assert back["weights_hash"] == start["weights_hash"] and back["task"] == "sft"
    sizes = {key: start["model_config"][key] for key in back["model_config"]}
    assert back["model_config"] == sizes
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["architectures"][0].removesuffix("ForCausalLM") == home.split()[0].strip(",")


@pytest.mark.parametrize("name", ["byte", "toy", "ranks"])
def test_a_tokenizer_comes_back_with_the_same_ids(tmp_path, name):
    """Texts, chats, what stands before a text and what ends an answer."""
    own = vocabulary(name, tmp_path)
    save_chat_model(tmp_path / "run", own)
    flags = [f"--tokenizer={tmp_path / 'own.tiktoken'}"] if name == "ranks" else []
    spec = to_and_fro(tmp_path / "run", tmp_path, *flags)["tokenizer"]
    back = load_tokenizer(spec["name"], "data", spec)
    assert (back.vocab_size, back.eos, back.bos) == (own.vocab_size, own.eos, own.bos)
    assert (back.pad, back.prefix, back.stops) == (own.pad, own.prefix, own.stops)
    assert back.template.roles == {role: tuple(x) for role, x in own.template.roles.items()}
    for text in (TEXT, SPECIAL_TEXT, ""):
        assert back.encode(text) == own.encode(text) and back.decode(own.encode(text)) == text


BACKENDS = {}


@pytest.mark.parametrize("name", ["byte", "toy", "ranks"])
@given(text=ANY_TEXT)
@quick
def test_any_text_has_the_same_ids(tmp_path_factory, name, text):
    """tokenizer.json is read by another library, with another pattern and other merges."""
    if name not in BACKENDS:
        own = vocabulary(name, tmp_path_factory.mktemp("ranks"))
        BACKENDS[name] = own, backend_of(own)
        BACKENDS[name][1].encode_special_tokens = True
    own, backend = BACKENDS[name]
    assert backend.encode(text, add_special_tokens=False).ids == own.encode(text)
    assert backend.encode(text).ids == own.prefix + own.encode(text)


@pytest.mark.slow
@needs_ranks
def test_gpt2_has_the_same_ids(gpt2):
    """50,256 ranks as merges: the words of the vocabulary itself, and texts of any kind."""
    backend = backend_of(gpt2)
    backend.encode_special_tokens = True

    @given(text=ANY_TEXT)
    @quick
    def holds(text):
        assert backend.encode(text, add_special_tokens=False).ids == gpt2.encode(text)

    holds()
    words = gpt2.decode(range(0, gpt2.n_text, 7)) + TEXT + SPECIAL_TEXT
    assert backend.encode(words, add_special_tokens=False).ids == gpt2.encode(words)


def test_a_base_model_gets_no_chat_template(tmp_path):
    """It would answer by a template that it has never seen."""
    save_start(tmp_path / "run", random_model())
    back = to_and_fro(tmp_path / "run", tmp_path)
    assert not (tmp_path / "hf/chat_template.jinja").exists()
    assert back["task"] == "pretrain" and "template" not in back


def test_weights_above_the_limit_go_into_several_files(tmp_path, monkeypatch):
    """With an index that names the file of each; together they are the same model."""
    monkeypatch.setattr(exporting, "LARGEST", 20_000)
    model = save_chat_model(tmp_path / "run")
    back = to_and_fro(tmp_path / "run", tmp_path)
    files = sorted(tmp_path.glob("hf/model-*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 35_000 for file in files[1:])
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert all(torch.equal(back["model"][name], x) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"qk_norm": False}, ["qk_norm=False", "sinks=True", "qk_norm=True", "sinks=False"]),
        ({**LLAMA, "n_expert": 2}, ["qk_norm=False", "n_expert=2", "qk_norm=True (Flint)"]),
        ({"n_expert": 2, "shared_expert": False}, ["shared_expert=False", "shared_expert=True"]),
        ({"score_head": True}, ["verifier", "score_head", "language model"]),
    ],
    ids=["sinks without QK-norm", "experts without QK-norm", "no shared expert", "verifier"],
)
def test_what_has_no_home_is_refused_with_the_nearest(tmp_path, fields, words):
    """transformers would load it as another model, or not at all."""
    save_start(tmp_path / "run", tiny(**fields))
    fails(lambda: to_and_fro(tmp_path / "run", tmp_path), "no home", *words)
    assert os.listdir(tmp_path) == ["run"]


def test_a_destination_that_exists_is_left_alone(tmp_path):
    """Also an empty one, or a file."""
    save_chat_model(tmp_path / "run")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/notes").write_text("mine")
    before = snapshot(tmp_path)
    fails(lambda: to_and_fro(tmp_path / "run", tmp_path), tmp_path / "hf", "exists", "--dest")
    assert snapshot(tmp_path) == before


def test_an_export_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    """Half a folder would be loaded by others as a whole one."""

    def full(path, write, need=0):
        if path.endswith("README.md"):
            raise OSError(28, "No space left on device", path)
        write_atomic(path, write, need)

    save_chat_model(tmp_path / "run")
    monkeypatch.setattr(exporting, "write_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        to_and_fro(tmp_path / "run", tmp_path)
    assert os.listdir(tmp_path) == ["run"]


def test_the_card_holds_the_results_of_these_weights_alone(tmp_path):
    """Those of other weights, of a verifier and of trivial answers are another model's."""
    save_chat_model(tmp_path / "pipeline/dpo")
    weights = load_checkpoint(str(tmp_path / "pipeline/dpo"))["weights_hash"]
    row = {"model": "dpo", "stage": "dpo", "task": "problems", "split": "test", "n": 321}
    row |= {"metric": "exact_match", "protocol": "greedy", "weights_hash": weights}
    row |= {"settings": {"problems": "toy"}, "value": 0.83, "low": 0.8, "high": 0.86, "date": "2"}
    others = [
        row | {"value": 0.111, "date": "1"},
        row | {"value": 0.222, "weights_hash": "0" * 16, "metric": "stop_rate"},
        row | {"value": 0.333, "verifier_hash": "1" * 16, "protocol": "best_of@8"},
        row | {"value": 0.444, "model": "most common answer"},
    ]
    write_jsonl(str(tmp_path / "pipeline/results.jsonl"), [row, *others])
    to_and_fro(tmp_path / "pipeline/dpo", tmp_path)
    text = (tmp_path / "hf/README.md").read_text()
    wanted = "| problems | toy | test | exact_match | greedy | 0.83 | 0.8 to 0.86 | 321 |"
    assert wanted in text and weights in text
    assert not [value for value in ("111", "222", "333", "444") if f"0.{value}" in text]


def test_rows_of_no_token_are_left_out_and_said(tmp_path, capsys):
    """Checkpoints from before these rows began as zero: their hash does not come back."""
    save_start(tmp_path / "run", tiny())
    back = to_and_fro(tmp_path / "run", tmp_path)
    assert "another weights hash" in capsys.readouterr().out
    assert not back["model"]["embed.weight"][BYTE.vocab_size :].any()


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["nothing given", "--from --out_dir", "--init_from --dest"]),
        (["--init_from=a"], ["--init_from given"]),
        (["--init_from=a", "--dest=b", "--template=chat-1"], ["--template"]),
        (["--from=a", "--out_dir=b", "--dest=c"], ["--dest"]),
        (["--from=a", "--out_dir=b", "--data_dir=c"], ["--data_dir"]),
        (["--init_from=a", "--dest="], ["dest is empty"]),
    ],
)
def test_keys_of_both_ways_are_not_mixed(flags, words):
    """A key that would not be used is named."""
    fails(lambda: convert.main(flags), *words)


def test_the_template_travels_as_jinja(tmp_path):
    """An export of what was imported gives its own Jinja back, and its own tokenizer.json."""
    save_chat_model(tmp_path / "run")
    to_and_fro(tmp_path / "run", tmp_path)
    assert convert.main([f"--init_from={tmp_path / 'back'}", f"--dest={tmp_path / 'hf2'}"]) == 0
    for name in ("chat_template.jinja", "tokenizer_config.json", "model.safetensors"):
        assert (tmp_path / "hf2" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    texts = [(tmp_path / name / "tokenizer.json").read_text() for name in ("hf", "hf2")]
    assert json.loads(texts[0]) == json.loads(texts[1])


# ------------------------------------------------------------------------------------------------
# Beside transformers


@pytest.mark.peers
@pytest.mark.parametrize("home", HOMES)
def test_transformers_computes_the_same(tmp_path, home, transformers):
    """Logits of any length, and greedy answers to unequal prompts in one batch."""
    model = save_chat_model(tmp_path / "run", **HOMES[home])
    to_and_fro(tmp_path / "run", tmp_path)
    options = {"output_loading_info": True, "local_files_only": True}
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, info = load(tmp_path / "hf", **options)
    assert not any(info.values()), info
    assert logit_gap(model, theirs) < 1e-5
    check_generation(model, theirs)
    assert theirs.generation_config.eos_token_id == list(BYTE.stops)


@pytest.mark.peers
def test_transformers_reads_several_files(tmp_path, monkeypatch, transformers):
    """By the index, as its own large models."""
    monkeypatch.setattr(exporting, "LARGEST", 20_000)
    model = save_chat_model(tmp_path / "run")
    to_and_fro(tmp_path / "run", tmp_path)
    assert (
        logit_gap(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")) < 1e-5
    )


@pytest.mark.peers
@pytest.mark.parametrize("name", ["byte", "toy", "ranks"])
def test_transformers_has_the_same_ids(tmp_path, name, transformers):
    """Of texts, also where they spell special tokens, and of chats by the Jinja template."""
    own = vocabulary(name, tmp_path)
    save_chat_model(tmp_path / "run", own)
    flags = [f"--tokenizer={tmp_path / 'own.tiktoken'}"] if name == "ranks" else []
    to_and_fro(tmp_path / "run", tmp_path, *flags)
    load = transformers.AutoTokenizer.from_pretrained
    theirs, careful = load(tmp_path / "hf"), load(tmp_path / "hf", split_special_tokens=True)
    ends = theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id
    assert ends == (own.bos, own.eos, own.pad)

    @given(text=ANY_TEXT)
    @quick
    def holds(text):
        assert careful(text)["input_ids"] == own.prefix + own.encode(text)
        assert theirs.decode(own.encode(text)) == text

    holds()
    assert careful.encode(SPECIAL_TEXT, add_special_tokens=False) == own.encode(SPECIAL_TEXT)
    for messages in dialogues(with_system=True):
        wanted = render(messages, own)[0]
        assert theirs.apply_chat_template(messages)["input_ids"] == wanted
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert prompt == render_prompt(messages, own)


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy", "gpt2"])
def test_ten_megabytes_of_real_text_have_the_same_ids(tmp_path, name, transformers):
    """News, novels, code and other languages: what is seldom in a text shows up there."""
    own = load_tokenizer(name, real("gpt2.tiktoken").rpartition("/")[0])
    files = tokenizer_files(own, True, 64)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = files[file] if isinstance(files[file], str) else json.dumps(files[file])
        (tmp_path / file).write_text(text)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    for part in real_texts():
        ids = theirs.encode(part, add_special_tokens=False)
        assert ids == own.encode(part), part[:80]
