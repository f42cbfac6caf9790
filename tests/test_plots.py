"""Plots exist, show something, and follow the numbers."""

import re

import matplotlib.image
import numpy as np
import pytest
from report_helpers import hand_made, metrics_rows, row, text_of, write_run

from evals import plots, report
from runtime.files import write_jsonl


def test_every_image_in_the_report_exists_and_shows_something(tmp_path):
    """A broken link or a blank plot is found by no one but the reader; curves follow numbers."""
    text = text_of(write_run(tmp_path))
    names = re.findall(r"!\[\]\((.*?)\)", text)
    assert sorted(names) == ["best_of_n.png", "loss_dpo.png", "loss_pretrain.png"]
    for name in names:
        image = matplotlib.image.imread(tmp_path / name)
        assert (
            min(image.shape[:2]) > 200
            and len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 3
        )
    before = {name: (tmp_path / name).read_bytes() for name in names}
    results = [{**r, "value": 0.3} if r["protocol"] == "best_of@2" else r for r in hand_made()]
    write_run(tmp_path, results, metrics_rows()[:-2])
    assert report.main([f"--out_dir={tmp_path}", "--force"]) == 0
    assert all((tmp_path / name).read_bytes() != content for name, content in before.items())


def test_a_sweep_gets_its_trade_off_curve(tmp_path):
    """Three runs with answers and plain text get a point each, and the plot follows the numbers."""
    rows = [
        row("chats", model, "response_loss", "teacher", 6 + i / 10, stage=model)
        for i, model in enumerate(("lr1", "lr2", "lr 3, replay"))
    ]
    rows += [
        row(
            "text_perplexity",
            model,
            "perplexity",
            "per_line",
            2000 + 100 * i,
            split="wiki",
            stage=model,
        )
        for i, model in enumerate(("lr1", "lr2", "lr 3, replay"))
    ]
    write_jsonl(str(tmp_path / "lr 3, replay" / "metrics.jsonl"), metrics_rows())
    assert (
        "![](loss_lr_3_replay.png)" in text_of(write_run(tmp_path, rows))
        and (tmp_path / "loss_lr_3_replay.png").exists()
    )
    (tmp_path / "report.md").unlink()
    assert "![](tradeoff.png)" in text_of(write_run(tmp_path, rows))
    before = (tmp_path / "tradeoff.png").read_bytes()
    rows[-1]["value"] *= 2
    write_run(tmp_path, rows)
    assert (
        report.main([f"--out_dir={tmp_path}", "--force"]) == 0
        and (tmp_path / "tradeoff.png").read_bytes() != before
    )


@pytest.mark.parametrize("judged", [False, True])
def test_an_rl_run_gets_its_curves(tmp_path, judged):
    """Samples and greedy answers; where a verifier gives the reward, accuracy beside it."""
    rows = []
    for step in range(6):
        share = {"reward": 0.3 + step / 20 + judged / 10, "accuracy": 0.3 + step / 20}
        rows.append({"step": step, "loss": 0.0, "entropy": 1.0, "signal": 0.5, **share})
        rows[-1]["sampled_per_s"] = 100.0
    rows += [{"step": step, "val_reward": 0.4, "val_accuracy": 0.4} for step in (0, 6)]
    assert plots.plot_rl(rows[:1], str(tmp_path), "rl") == "rl_curves.png"
    assert plots.plot_rl([{"step": 0, "loss": 1.0}], str(tmp_path), "sft") is None
    assert plots.plot_loss(rows, str(tmp_path), "rl") is None
    before = (tmp_path / "rl_curves.png").read_bytes()
    plots.plot_rl(rows, str(tmp_path), "rl")
    assert (tmp_path / "rl_curves.png").read_bytes() != before
