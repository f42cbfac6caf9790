"""lm-evaluation-harness beside us, item by item, by its own tasks on local data: pytest -m peers.

The model is small and random; its head is scaled so that it writes numbers and ends answers.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from eval_helpers import save_peer
from helpers import BYTE, save_start, tiny
from test_peers import MARKED, assert_same, harness, offline

from evals import transfer
from evals.baselines import load_baseline
from evals.few_shot import after_shots, is_right
from exchange.exporting import export_model
from inference.solutions import SHOTS, Attempts, solve

missing = [name for name in ("transformers", "lm_eval") if not importlib.util.find_spec(name)]
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(bool(missing), reason=f"no {' and '.join(missing)}"),
]
WORDS = (" positive", " negative", "Question:", "#### 7", "#### 12.", " 8", "$3,000", "\n", " is")
SENTENCES = ["a fine film", "dull and long , 2 hours of it", "no", "it 's all you may want of it"]
OFFLINE = offline  # a fixture that each test here uses
KINDS = {"Llama": {"prefix": True}, "GPT2": {}, "Qwen3": {}}


def random_peer(folder: Path, kind: str):
    """A folder of transformers, and what we make of it."""
    model = save_peer(folder, kind, seq_len=1024, words=WORDS, **KINDS[kind])
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head *= 0.2
        head[256:260] = 0  # special tokens
        head[257] = -head[260:].mean(0)  # </s>
        head[260:] *= 4
    model.save_pretrained(folder)
    return load_baseline(str(folder), "data")


def exported(folder: Path):
    """A model of ours as it is, and a folder of it."""
    model = tiny(seq_len=1024, tied=False)
    with torch.no_grad():
        model.head.weight *= 0.2
        model.head.weight[256:] = 0
        model.head.weight[list(b"0123456789# \n")] *= 4
    save_start(folder.parent / "run", model)
    export_model(str(folder.parent / "run"), str(folder), None, "data")
    return model.eval(), BYTE


@pytest.fixture(scope="module", params=["ours", *KINDS])
def peer(request, tmp_path_factory):
    """A model and its tokenizer, and the harness's model class on the same weights."""
    pytest.importorskip("accelerate", reason="lm_eval's class imports it")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("peer") / request.param
    ours = request.param == "ours"
    model, tokenizer = exported(folder) if ours else random_peer(folder, request.param)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    library = AutoTokenizer.from_pretrained(folder)
    return model, tokenizer, HFLM(pretrained=theirs, tokenizer=library, batch_size=4)


def samples(lm, task: str, data: dict[str, list[dict]], folder: Path) -> list[dict]:
    """Run a task of the harness, but for its data set's address. -> what it keeps of each item"""
    import lm_eval
    from lm_eval.tasks import TaskManager

    files = {}
    for split, rows in data.items():
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[split] = str(path)
    address = {"data_files": files, "cache_dir": str(folder / "cache")}
    own = {"include": str(Path(lm_eval.__file__).parent / "tasks" / task)}
    own |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": address}
    path = folder / "task.yaml"
    path.write_text(json.dumps(own))
    manager = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(
        lm, tasks=[str(path)], task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    (rows,) = found["samples"].values()
    return sorted(rows, key=lambda row: row["doc_id"])


def test_sst2_is_the_harnesss(peer, tmp_path):
    """Both labels' log-probs after every sentence."""
    model, tokenizer, lm = peer
    rows = [{"sentence": text, "label": i % 2, "idx": i} for i, text in enumerate(SENTENCES)]
    found = samples(lm, "glue/sst2/default.yaml", {"train": rows, "validation": rows}, tmp_path)
    theirs = [[float(own[0][0]) for own in row["resps"]] for row in found]
    ours = transfer.label_scores(model, tokenizer, "", SENTENCES)
    assert ours.tolist() == [pytest.approx(own, rel=1e-4) for own in theirs]
    gold = [row["label"] for row in rows]
    assert [row["acc"] for row in found] == (ours.argmax(1) == gold).tolist()


def test_gsm8k_is_the_harnesss(peer, tmp_path):
    """Five shots, greedy: every prompt, answer, extraction and verdict."""
    model, tokenizer, lm = peer
    pool = [{"question": f"{i} of {i}?", "answer": f"So\n#### {i % 9}"} for i in range(12)]
    problems = [
        {"question": f"What is {n}?", "answer": f"It is\n#### {n}"} for n in (7, 12, 8, 3000)
    ]
    problems += [{**row, "question": f"{row['question']} Now"} for row in problems]
    found = samples(lm, "gsm8k/gsm8k.yaml", {"train": pool, "test": problems}, tmp_path)
    asked, until = after_shots(pool, problems)
    rows = solve(model, tokenizer, asked, Attempts(1, 0.0, 256, until=until), log=lambda text: None)
    texts = [row["solutions"][0]["text"] for row in rows]
    verdicts = []
    for how in ("strict-match", "flexible-extract"):
        theirs = [row for row in found if row["filter"] == how]
        arguments = [row["arguments"][0][0] for row in theirs]
        assert arguments == [row[SHOTS] for row in asked]
        assert [row["resps"][0][0] for row in theirs] == texts
        assert [bool(row["exact_match"]) for row in theirs] == [is_right(row, how) for row in rows]
        verdicts += [row["exact_match"] for row in theirs]
    assert len(set(texts)) > 1 and (tokenizer is BYTE or set(verdicts) == {0.0, 1.0})


def test_wikitext_is_the_harnesss(peer, tmp_path):
    """An id that a tokenizer puts before each text is context, and no part of it."""
    model, tokenizer, lm = peer
    lm.add_bos_token = False
    assert_same(model, tokenizer, MARKED, harness(lm, MARKED, tmp_path))
