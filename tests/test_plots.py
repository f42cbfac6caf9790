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
    assert sorted(names) == ["best_of_n.png", "loss_dpo.png", "loss_pretrain.png", "stages.png"]
    for name in names:
        image = matplotlib.image.imread(tmp_path / name)
        assert image.shape[1] == 1200 and (tmp_path / name).stat().st_size < 200_000
        assert (
            min(image.shape[:2]) > 200
            and len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 3
        )
    before = {name: (tmp_path / name).read_bytes() for name in names}
    results = [{**r, "value": 0.3} if "best_of@" in r["protocol"] else r for r in hand_made()]
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


def test_names_beside_their_lines_do_not_cover_each_other():
    """Five ways to choose may end within a point of each other; the highest is named on top."""
    figure, axes = plots.plt.subplots()
    axes.plot([0, 1], [0, 100])
    plots.label_ends(axes, [(50.0, "b", "red"), (49.9, "a", "red"), (50.1, "c", "red")])
    found = {text.get_text(): text.get_position()[1] for text in axes.texts}
    plots.plt.close(figure)
    assert found["b"] - found["a"] > 0.07 < found["c"] - found["b"]
    assert found["b"] == pytest.approx(0.5, abs=0.01)


def test_axes_of_losses_have_plain_numbers(tmp_path, monkeypatch):
    """Nobody reads 6 x 10^-1 as 0.6."""
    kept = []
    monkeypatch.setattr(plots.plt, "close", kept.append)
    rows = [{"step": step, "loss": loss} for step, loss in enumerate((6.0, 2.0, 0.3))]
    plots.plot_loss(rows, str(tmp_path), "sft")
    monkeypatch.undo()
    labels = [label.get_text() for label in kept[0].axes[0].get_yticklabels(which="both")]
    plots.plt.close(kept[0])
    assert {"0.5", "1", "2", "5"} <= set(labels) and not any("10" in x for x in labels[1:-1])
