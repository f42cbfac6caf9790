"""What a run says of its time: the steps left, with the validations and saves between them."""

import json
from types import SimpleNamespace

import pytest

from model import GPT, ModelConfig
from runtime import diary
from runtime.world import World

SECONDS = {"step": 2.0, "validation": 30.0, "save": 7.0}


@pytest.mark.parametrize("max_steps, interval, saves", [(40, 10, 5), (43, 10, 20), (30, 6, 7)])
@pytest.mark.parametrize("first", [0, 10, 13])
def test_the_time_left_is_that_of_the_whole_run(
    tmp_path, monkeypatch, max_steps, interval, saves, first
):
    """With validations of 15 steps each, an estimate from steps alone would be off by half.

    It is exact once a validation and a save have been seen.
    """
    now, seen = [0.0], {"validation": False, "save": False}
    monkeypatch.setattr(diary.time, "perf_counter", lambda: now[0])
    model = GPT(ModelConfig(vocab_size=50, seq_len=16, n_layer=1, n_head=2, d_model=16))
    loop = SimpleNamespace(max_steps=max_steps, eval_interval=interval, save_interval=saves)
    task = SimpleNamespace(name="task", metrics=["loss"])
    run = SimpleNamespace(loop=loop, task=task, world=World("cpu"), first=first)
    run.path = lambda name: str(tmp_path / name)
    found = diary.Diary(run, model, 16)

    def pause(what: str):
        with found.clock.paused(what):
            now[0] += SECONDS[what]
        seen[what] = True

    exact = []
    for step in range(first, max_steps + 1):
        if step % interval == 0 or step == max_steps:
            pause("validation")
        if step > first and (step % saves == 0 or step == max_steps):
            pause("save")
        if step == max_steps:
            break
        now[0] += SECONDS["step"]
        found.timed_steps += 1
        found.training(step, {"loss": 1.0}, 1.0, 1.0, 0)
        if all(seen.values()):
            exact.append((len((tmp_path / "metrics.jsonl").read_text().splitlines()) - 1, now[0]))
    rows = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(exact) > 3
    for row, time in exact:
        assert rows[row]["eta_s"] == pytest.approx(now[0] - time)
    assert all(row["step_ms"] == pytest.approx(2000) for row in rows)
