"""Plots exist, show something, and follow the numbers."""

import re

import matplotlib.image
import numpy as np
from report_helpers import hand_made, metrics_rows, text_of, write_run

from evals import report
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


def test_a_plot_of_any_run_can_be_linked(tmp_path):
    """A name with blanks and commas would end the link."""
    write_jsonl(str(tmp_path / "lr 3, replay" / "metrics.jsonl"), metrics_rows())
    assert "![](loss_lr_3_replay.png)" in text_of(write_run(tmp_path))
    assert (tmp_path / "loss_lr_3_replay.png").exists()
