"""Baselines: any causal LM of transformers answers, is scored and is a row as our own models are.

Run it by pytest -m peers.
"""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_helpers import make_run, results_of, save_peer
from helpers import fails

import eval as evaluation
from corpus.chat import encode_pair, render, render_prompt, user_turn
from evals import report, tables
from evals.baselines import Baseline, load_baseline
from evals.results import read_results, read_stages
from inference.answers import Ending
from inference.sampling import GREEDY, Sampling, generate
from inference.scoring import windows_nll

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="no transformers"),
]
KINDS = ("Llama", "GPT2", "Mistral", "Qwen3", "Flint")
CHATML = """{%- if messages[0].role != 'system' %}<|im_start|>system
Be brief<|im_end|>
{% endif %}{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def prompts_of(n_ids: int) -> list[list[int]]:
    draws = np.random.default_rng(0)
    return [draws.integers(0, n_ids, n).tolist() for n in (9, 2, 17, 30, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_to_unequal_prompts_are_transformers_own(kind, tmp_path):
    """Padding on the left, rows that end early and the cache change no id."""
    model = save_peer(tmp_path / "peer", kind)
    peer = Baseline(str(tmp_path / "peer"))
    prompts = prompts_of(256)
    wanted, n = [], 20
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": n, "do_sample": False, "eos_token_id": None}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        wanted.append(out[0, len(prompt) :].tolist())
    assert generate(peer, prompts, n, sampling=GREEDY) == wanted
    stop = (wanted[0][5], wanted[3][9])  # rows leave the batch
    ended = generate(peer, prompts, n, stop, sampling=GREEDY)
    for own, ids in zip(wanted, ended, strict=True):
        first = min((own.index(token) + 1 for token in stop if token in own), default=n)
        assert ids == own[:first]
    assert min(map(len, ended)) < max(map(len, ended))


def test_samples_depend_on_prompt_and_seed_alone(tmp_path):
    """As of our models: the batch around a row changes nothing."""
    save_peer(tmp_path / "peer")
    peer, prompts = Baseline(str(tmp_path / "peer")), prompts_of(256)
    options = {"sampling": Sampling(1.5)}
    together = generate(peer, prompts, 12, seeds=range(5), **options)
    alone = [generate(peer, [prompts[i]], 12, seeds=[i], **options)[0] for i in range(5)]
    assert together == alone and len(set(map(tuple, together))) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_nats_are_transformers_own(kind, tmp_path):
    """Windows of unequal length in one batch have the nats of transformers' own loss."""
    model = save_peer(tmp_path / "peer", kind)
    peer, wanted = Baseline(str(tmp_path / "peer")), []
    windows = [(ids, len(ids) // 2) for ids in prompts_of(256) if len(ids) > 1]
    for ids, n in windows:
        labels = torch.tensor([[-100] * (len(ids) - n) + ids[len(ids) - n :]])
        with torch.no_grad():
            wanted.append(model(torch.tensor([ids]), labels=labels).loss.item() * n)
    assert windows_nll(peer, windows) == pytest.approx(wanted, rel=1e-5)


def test_beyond_its_context_a_baseline_neither_fails_nor_changes_what_is_within(tmp_path):
    """GPT-2 has no position to give there; a longer row must not harm a shorter one."""
    save_peer(tmp_path / "peer", "GPT2", seq_len=32)
    peer, prompts = Baseline(str(tmp_path / "peer")), prompts_of(256)
    long, short = generate(peer, [prompts[3], prompts[0]], 20, sampling=GREEDY)
    assert len(long) == 20 and short == generate(peer, [prompts[0]], 20, sampling=GREEDY)[0]


def test_a_chat_is_told_in_the_models_own_template(tmp_path):
    """A base model without one gets plain text; the ids are those of the whole text."""
    from transformers import AutoTokenizer

    save_peer(tmp_path / "chat", template=CHATML)
    save_peer(tmp_path / "base", prefix=True)
    save_peer(tmp_path / "odd", template="{{ messages[-1].content }}")
    turns = user_turn("Hi, 1+1?")
    _, tokenizer = load_baseline(str(tmp_path / "chat"), "data")
    library = AutoTokenizer.from_pretrained(tmp_path / "chat")
    wanted = library.apply_chat_template(turns, add_generation_prompt=True)
    assert render_prompt(turns, tokenizer) == wanted["input_ids"] and tokenizer.until == ()
    for name in ("base", "odd"):
        _, tokenizer = load_baseline(str(tmp_path / name), "data")
        library = AutoTokenizer.from_pretrained(tmp_path / name)
        text = "\n\nHuman:\nHi, 1+1?\n\nAssistant:\n"
        assert render_prompt(turns, tokenizer) == library.encode(text)
        more = [*turns, {"role": "assistant", "content": "2"}, *turns]
        assert render_prompt(more, tokenizer) == library.encode(f"{text}2{text}")
        told = [{"role": "system", "content": "Be brief"}, *more[:2]]
        assert tokenizer.decode(render(told, tokenizer)[0]).endswith(f"Be brief{text}2\n")
        ending = Ending(tokenizer)
        said = tokenizer.encode("2\n\nBye\n\nHuman:")
        assert [ending(said[:n]) for n in (2, 4, len(said) - 1, len(said))] == [False] * 3 + [True]
        assert ending.text([*said, *tokenizer.encode(" so")]) == "2\n\nBye"
        assert ending([*said[:3], tokenizer.eos]) and not ending([tokenizer.end])
        pair = {"prompt": turns, "chosen": "2", "rejected": "3"}
        assert encode_pair(pair, tokenizer).chosen == tokenizer.encode("2\n")


def test_a_gpt2_folder_of_2019_brings_its_words_in_two_files(tmp_path):
    """vocab.json and merges.txt alone, as the folders of GPT-2 and DistilGPT-2 had them."""
    import json

    save_peer(tmp_path / "peer", "GPT2")
    folder = tmp_path / "peer"
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    for path in [*folder.glob("tokenizer*"), *folder.glob("special*")]:
        path.unlink()
    special = {"<s>": 256, "</s>": 257, "<|im_start|>": 258, "<|endoftext|>": 259}
    (folder / "vocab.json").write_text(json.dumps(vocabulary | special))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    _, tokenizer = load_baseline(str(folder), "data")
    assert tokenizer.decode(tokenizer.encode("Rosé 12")) == "Rosé 12" and tokenizer.eos == 259
    assert tokenizer.prefix == [] and tokenizer.stops[0] == 259


def test_logits_that_are_more_than_a_head_are_refused(tmp_path):
    """A row of another model's numbers must not come to be."""
    from transformers import CohereConfig, CohereForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 99}
    ends = {"intermediate_size": 64, "logit_scale": 0.1, "pad_token_id": 0, "bos_token_id": 1}
    CohereForCausalLM(CohereConfig(**sizes, **ends, eos_token_id=2)).save_pretrained(tmp_path)
    fails(lambda: Baseline(str(tmp_path)), "Cohere", "more than a head")


def test_a_baseline_is_a_row_of_every_task(tmp_path, capsys):
    """Beside the stages of a run, under the same protocols; the report shows it and no gain of it.

    Its template is named; stages.json does not know it; a second evaluation finds all results.
    """
    save_peer(tmp_path / "my-peer", seq_len=256)
    argv = [*make_run(tmp_path), "--shots=films-train", f"--baselines={tmp_path / 'my-peer'}/"]
    argv += ["--no_overwrite", "--stages=pretrain,sft"]
    assert evaluation.main(argv) == 0
    folder = tmp_path / "run"
    rows = read_results(str(folder))
    own = [row for row in rows if row["model"] == "my-peer"]
    named = {"text_perplexity", "chats", "problems", "preference", "sst2", "dialogsum"}
    assert {row["task"] for row in own} == named and all(row["baseline"] for row in own)
    for task in named:
        measured = {(row["metric"], row["protocol"]) for row in results_of(folder, task)}
        mine = {(row["metric"], row["protocol"]) for row in own if row["task"] == task}
        assert measured - mine <= {("accuracy", "length"), ("accuracy", "reward")}, task
    told = {row["template"] for row in own if row["task"] not in ("sst2", "text_perplexity")}
    assert told == {"plain text, Human: and Assistant:"}
    assert not any("baseline" in row for row in rows if row["stage"] != "my-peer")
    assert "my-peer" not in Path(folder / "stages.json").read_text()
    assert read_stages(str(folder), rows)["my-peer"]["stale"] == ""
    text = Path(report.write_report(str(folder), str(folder), 1)).read_text()
    assert re.search(r"\| trivial answer \|.* sft \| my-peer \|", text)
    assert "- my-peer" not in text and "my-peer -" not in text
    assert "my-peer, accuracy, zero-shot" in tables.compare([str(folder), copy_of(folder)])
    capsys.readouterr()
    assert evaluation.main(argv) == 0 and "all results exist" in capsys.readouterr().out


def copy_of(folder: Path) -> str:
    import shutil

    return str(shutil.copytree(folder, f"{folder}-2"))


def test_a_baseline_whose_context_is_too_short_is_left_out_in_words(tmp_path, capsys):
    """The stages are measured all the same."""
    save_peer(tmp_path / "short", seq_len=16)
    argv = [*make_run(tmp_path), f"--baselines={tmp_path / 'short'}", "--stages=sft"]
    assert evaluation.main([*argv, "--tasks=problems,dialogsum,sst2,chats"]) == 0
    out = capsys.readouterr().out
    for task in ("problems", "dialogsum", "sst2", "chats"):
        assert f"eval: {task} of short is left out" in out
        assert {row["stage"] for row in results_of(tmp_path / "run", task)} == {"sft"}
