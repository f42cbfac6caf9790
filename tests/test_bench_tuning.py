"""Tuning, sampling and evaluation beside the peers: the same work in every system.

Its numbers are no test: docs/log.md.
"""

import importlib.util
import json
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from helpers import fails, save_start, tiny
from test_bench import rows_of

from bench import __main__ as bench
from bench import tuning, usage
from corpus.tokenizer import load_tokenizer

WORDS = load_tokenizer("toy")
TEXT = (
    " \n = One = \n \n A cat saw 1 @,@ 000 pens ; it 's well @-@ known . \n = Two = \n \n So . \n"
)
SENTENCES = ["a fine film", "dull and long , 2 hours of it", "no", "it 's all you may want of it"]


def needs(name: str):
    """Mark a test that runs beside a peer."""
    there = importlib.util.find_spec(name)
    return [pytest.mark.peers, pytest.mark.skipif(not there, reason=f"no {name}")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A Llama of the toy world's words, as a run folder."""
    model = tiny(vocab_size=WORDS.vocab_size, seq_len=256, qk_norm=False, sinks=False)
    with torch.no_grad():
        model.embed.weight[WORDS.vocab_size :] = 0
    return save_start(tmp_path_factory.mktemp("run"), model, tokenizer=WORDS.spec())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The two data sets that the task evaluate reads."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("sst2", "wikitext-2"):
        (folder / name).mkdir()
    rows = [{"sentence": text, "label": str(i % 2)} for i, text in enumerate(SENTENCES)]
    (folder / "sst2" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "wikitext-2" / "test.txt").write_text(TEXT)
    return folder


def flags(run: str, task: str, *systems: str) -> list[str]:
    return [f"--tasks={task}", "--shapes=tiny", f"--model={run}", f"--systems={','.join(systems)}"]


def settings(run: str, task: str, system: str = "ours", **changes) -> SimpleNamespace:
    """What a worker is told."""
    cfg = asdict(bench.BenchConfig(tasks=(task,), model=run, **changes))
    shape = SimpleNamespace(**asdict(bench.SHAPES["tiny"]))
    return SimpleNamespace(**cfg, system=system, task=task, shape=shape)


def first_steps(run: str, task: str, systems: tuple[str, ...]) -> list[dict]:
    """Return what each system of ours says of its first step."""
    return [next(tuning.tune(settings(run, task, system))) for system in systems]


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_every_form_of_ours_does_the_same_work(run, task):
    """Packing, few logits and a cached reference are ways to the same numbers."""
    systems = tuple(name for name in bench.TASKS[task] if name.startswith("ours"))
    found = first_steps(run, task, systems)
    assert len(found) == 3 and all(own == pytest.approx(found[0], rel=1e-5) for own in found)
    assert 0.3 < found[0]["supervised"] < 0.9


def test_a_step_has_the_tokens_of_the_shape(run):
    """Records are taken until a step is full; none is longer than a row."""
    work = tuning.Work(tuning.Start(settings(run, "sft")))
    lengths = [len(document["ids"]) - 1 for document in work.items]
    assert work.n_tokens == sum(lengths) and max(lengths) <= 64
    assert 12 * 64 <= work.n_tokens < 12 * 64 + 64


def test_too_few_records_are_an_error_in_words(run, tmp_path):
    """A step with fewer tokens than the shape says would be measured as something else."""
    rows = [{"question": "1 + 1?", "answer": "#### 2"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = settings(run, "sft", text=str(tmp_path / "x.jsonl"))
    fails(lambda: tuning.Work(tuning.Start(cfg)), "fewer than a step has", "768")


def test_a_new_token_counts_up_to_the_end_of_its_row(run):
    """Seconds are per token that somebody wanted: 5 rows of at most 6."""
    cfg = settings(run, "sample", new_tokens=6)
    cfg.shape.batch = 5
    job = usage.sample(cfg)
    assert next(job)["prompts"] == 5
    assert 5 <= next(job)["new_tokens"] <= 30


def test_llama_cpp_writes_one_row_afresh(run, monkeypatch):
    """A stand-in for the library: prompt, seed, temperature 1 and the end of a row reach it."""
    calls = []

    class Llama:
        def __init__(self, path, **keys):
            calls.append((path, keys["n_ctx"] > 8))

        def set_seed(self, seed):
            calls.append(seed)

        def reset(self):
            calls.append("reset")

        def generate(self, prompt, **keys):
            assert prompt and keys == {"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
            yield from (5, 6, WORDS.stops[0], 7)

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    cfg = settings(run, "sample", "llama.cpp", new_tokens=8, gguf="x.gguf")
    cfg.shape.batch = 1
    job = usage.sample(cfg)
    assert next(job)["prompts"] == 1 and next(job)["new_tokens"] == 3
    assert calls == [("x.gguf", True), 0, "reset", 1, "reset"]
    cfg.shape.batch = 2
    fails(lambda: next(usage.sample(cfg)), "one row", "--batches=1")


def test_the_evaluation_asks_both_tasks(run, data):
    """Accuracy is a share of the sentences, and the text's loss is that of every evaluation."""
    job = usage.evaluate(settings(run, "evaluate", data_dir=str(data), device="cpu"))
    assert next(job) == {}
    found = next(job)
    assert found["accuracy"] * len(SENTENCES) in range(5) and found["bits_per_byte"] > 1


def test_a_task_of_a_model_needs_one():
    """Nothing is measured of a model that nobody named."""
    fails(lambda: bench.main(["--tasks=sft"]), "--model=RUN")


PEERS = [
    pytest.param("sft", ("TRL", "TRL with packing"), "first loss", marks=needs("trl")),
    pytest.param(
        "dpo", ("TRL", "TRL with cached reference"), "first logps/chosen", marks=needs("trl")
    ),
    pytest.param("evaluate", ("lm_eval",), "bits_per_byte", marks=needs("lm_eval")),
]


@pytest.mark.parametrize(("task", "peers", "key"), PEERS)
def test_the_peer_does_the_same_work(run, data, tmp_path, task, peers, key):
    """The same weights and ids: so the same loss, log-probs, or figure."""
    rows = rows_of(tmp_path, *flags(run, task, "ours", *peers), f"--data_dir={data}")
    assert [row["system"] for row in rows] == ["ours", *peers]
    assert [row[key] for row in rows] == pytest.approx([rows[0][key]] * len(rows), rel=1e-3)
    if task == "evaluate":
        assert rows[0]["accuracy"] == rows[1]["accuracy"]
    else:
        assert all(row["supervised_tok_s"] < row["tok_s"] for row in rows)


@pytest.mark.peers
@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="no transformers")
def test_transformers_samples_from_the_same_prompts(run, tmp_path):
    """Prompts of unequal length, padded on the left; every row ends by itself or at the limit."""
    rows = rows_of(tmp_path, *flags(run, "sample", "ours", "transformers"), "--batches=3")
    assert [row["system"] for row in rows] == ["ours", "transformers"]
    assert rows[0]["prompt_tokens"] == rows[1]["prompt_tokens"]
    assert all(3 <= row["new_tokens"] <= 12 for row in rows)
