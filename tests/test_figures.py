"""The pictures of the README: drawn anew from the kept numbers, and those from result files."""

import re

import numpy as np
import pytest
from helpers import BYTE, ROOT, save_start, tiny

from corpus.shards import write_shard
from docs import figures
from evals.results import append_results
from runtime.files import read_json, write_jsonl

NUMBERS = read_json(str(figures.IMG / "numbers.json"))


def test_every_picture_is_drawn_anew_and_shown(tmp_path):
    """What stands in docs/img is what the code draws, small enough, and some page shows it."""
    paths = figures.draw_all(NUMBERS, str(tmp_path))
    drawn = {path.name for path in tmp_path.iterdir()}
    assert len(paths) == len(drawn) == len(figures.DRAWN)
    assert drawn == {path.name for path in figures.IMG.glob("*.svg")}
    assert all(path.stat().st_size < 200_000 for path in figures.IMG.iterdir())
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    text = "".join(path.read_text() for path in pages)
    assert drawn == {
        name.rpartition("/")[2] for name in re.findall(r"!\[.+?\]\((\S+\.svg)\)", text)
    }


def test_a_picture_is_the_same_each_time(tmp_path):
    """Else every drawing would be a change to commit."""
    for name in ("a", "b"):
        figures.draw_all(NUMBERS, str(tmp_path / name))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def result(task: str, metric: str, protocol: str, model: str, value: float) -> dict:
    return {"task": task, "metric": metric, "protocol": protocol, "model": model, "value": value}


def toy_run(folder, value: float) -> str:
    """Write what a default run leaves, all of it `value`. -> the folder"""
    rows = []
    for task, metric, protocol, *models in figures.BROUGHT.values():
        rows += [result(task, metric, protocol, model, value) for model in models]
    rows.append(result("problems", "exact_match", "greedy", "dpo", value))
    for how in ("majority", "likelihood", "best_of", "oracle"):
        many = [f"{how}@{n}" for n in (1, 2, 4, 8)]
        rows += [result("rerank", "exact_match", protocol, "dpo", value) for protocol in many]
    folder.mkdir()
    append_results(str(folder / "results.jsonl"), rows)
    rewards = {"val_rewards/chosen": value, "val_rewards/rejected": -1.0}
    write_jsonl(str(folder / "dpo" / "metrics.jsonl"), [{"step": 3, **rewards}])
    return str(folder)


def test_numbers_come_from_result_files(tmp_path):
    """Means over the runs that are given, and the curves of the first."""
    found = figures.toy_numbers([toy_run(tmp_path / "a", 0.25), toy_run(tmp_path / "b", 0.75)])
    assert found["brought"]["SFT"] == [[0.25, 0.25], [0.75, 0.75]]
    assert found["choices"]["oracle"] == [0.5] * 4 and found["margins"] == [[3, 0.25, -1.0]]


def test_streams_and_races_are_read(tmp_path):
    """Points stand at the middle of their positions; layers in order."""
    rows = [result("streaming", "loss_at_position", "kept@512 256-511", "base", 3.5)]
    rows += [result("streaming", "loss_at_position", "kept@512 0-255", "base", 4.0)]
    rows += [result("streaming", "first_token_share", f"layer {i}", "base", i / 10) for i in (2, 1)]
    append_results(str(tmp_path / "results.jsonl"), rows)
    found = figures.stream_numbers(str(tmp_path))
    assert found["curves"] == {"kept": [(128, 4.0), (384, 3.5)]}
    assert found["first_token"] == pytest.approx([0.1, 0.2])
    row = {"task": "race", "shape": "tiny", "system": "ours", "seconds_of_each": [2]}
    write_jsonl(str(tmp_path / "race.jsonl"), [row | {"val_loss_of_each": [1.5]}])
    assert figures.race_numbers(str(tmp_path / "race.jsonl")) == {"tiny ours": [[2], [1.5]]}


def test_a_map_is_the_mean_of_the_first_layers_heads(tmp_path):
    """As eval.py keeps it: layers, heads, tokens, and the sink as the last column."""
    maps = [[[[1.0, 0.0, 0.0], [0.2, 0.4, 0.4]], [[0.5, 0.0, 0.5], [0.4, 0.2, 0.4]]], []]
    write_jsonl(str(tmp_path / "attention" / "pretrain_1.jsonl"), [{"maps": maps}])
    found = figures.map_numbers(str(tmp_path))
    assert np.allclose(found, [[0.75, 0.0, 0.25], [0.3, 0.3, 0.4]])


def test_experts_share_all_tokens(tmp_path):
    """An expert that the router never prefers gets none."""
    model = tiny(n_expert=4, n_expert_active=2)
    for block in model.blocks:
        block.mlp.router.weight.data.zero_()  # all scores alike: two of the four are taken
    data = {"data": "text", "data_dir": str(tmp_path / "data")}
    run = save_start(tmp_path / "run", model, train_config=data)
    T = model.cfg.seq_len
    write_shard(str(tmp_path / "data/text/val_000.bin"), np.arange(3 * T + 1) % 250, BYTE)
    layers = figures.expert_numbers(run)
    assert len(layers) == model.cfg.n_layer
    for shares in layers:
        assert sorted(shares) == [0.0, 0.0, 0.5, 0.5]
