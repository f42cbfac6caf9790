"""Streams far beyond the training context, and what heads look at.

Each way to read stands against another, and numbers are worked out by hand.
"""

import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from helpers import BYTE, fails, save_start
from helpers import tiny as small

import eval as evaluation
from corpus.shards import write_shard
from evals import report, sinks
from evals.base import EvalConfig, Subject
from evals.results import read_results
from model import GPT
from runtime.files import write_jsonl

T = 8  # training context


def tiny(seed: int = 0, **changes) -> GPT:
    """Return a small model in float64, whose weights are a little larger than those of others."""
    model = small(seed, **{"seq_len": T, **changes})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


def text(n: int = 3, length: int = 3 * T):
    return torch.randint(0, 256, (n, length + 1), generator=torch.Generator().manual_seed(1))


# --------------------------------------------------------------------------------------------------
# The ways to read


@pytest.mark.parametrize("sink", [True, False])
def test_within_the_training_context_all_ways_to_read_are_one(sink):
    """Nothing has been dropped yet.

    From the first dropped token on, rolling must differ from dense, or the cache did not roll.
    """
    model, ids = tiny(sinks=sink), text()
    dense, rolling, recomputed = (
        sinks.cached(model, ids, 3 * T)[0],
        sinks.cached(model, ids, T)[0],
        sinks.recomputed(model, ids, range(3 * T), T)[0],
    )
    plain = torch.nn.functional.cross_entropy(
        model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none"
    )
    assert torch.allclose(dense, plain.double(), atol=1e-5)
    for other in (rolling, recomputed):
        assert (
            torch.allclose(other[:, :T], dense[:, :T], atol=1e-9)
            and (other[:, T:] - dense[:, T:]).abs().mean() > 1e-3
        )


def test_recompute_sees_the_last_context_alone_and_rolling_what_its_keys_remember():
    """One layer's keys know their own token only, so rolling is recompute.

    A second layer's were formed when token 1, now dropped, was there.
    """
    ids, last = text(), 2 * T - 1
    changed = ids.clone()
    changed[:, 1] = (changed[:, 1] + 1) % 256
    for n_layer in (1, 2):
        model = tiny(n_layer=n_layer)
        recomputed = [sinks.recomputed(model, x, [last], T)[0] for x in (ids, changed)]
        rolling = [sinks.cached(model, x, T)[0][:, last : last + 1] for x in (ids, changed)]
        assert torch.equal(*recomputed)
        assert (
            torch.allclose(*rolling, atol=1e-9)
            == torch.allclose(rolling[0], recomputed[0], atol=1e-9)
            == (n_layer == 1)
        )


def test_a_rolling_cache_keeps_its_size():
    """The size is the same however long the stream."""
    model, slots = tiny(), 5
    sizes = {sinks.cached(model, text(1, length), slots)[2] for length in (3, 20, 40)}
    # keys and values x layers x key/value heads x slots x d_head x 8 bytes
    assert sizes == {2 * 2 * 2 * slots * 8 * 8}


# --------------------------------------------------------------------------------------------------
# Attention maps


def remember(seen, module, args, output):
    """Keep what a module was given and what it returned."""
    seen.update(args=args, output=output)


def test_the_maps_are_what_the_forward_pass_used():
    """Weights times values through the output matrix is the module's own output.

    A copy that drifts from the model would show nothing of it.
    """
    for fields in ({}, {"sinks": False}, {"sliding_window": 3}):
        model, ids = tiny(**fields), text(2, T - 1)
        attn, seen = model.blocks[1].attn, {}
        hook = attn.register_forward_hook(functools.partial(remember, seen))
        maps = sinks.attention_maps(model, ids)
        hook.remove()
        args, output = seen["args"], seen["output"]
        v = attn.project(*args[:3])[2].repeat_interleave(2, dim=1)
        again = attn.out((maps[1][..., :-1].double() @ v).transpose(1, 2).flatten(2))
        assert maps.shape == (2, 2, 4, T, T + 1) and torch.allclose(again, output, atol=1e-5)
        assert torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-6)
        assert not model.blocks[0].attn._forward_hooks


def test_the_sink_share_is_one_minus_the_gate():
    """All scores 0 and a sink of ln 2.

    The i-th query divides 1 among i keys of weight 1 and a sink of weight 2, so the sink has 2 / (i
    + 2). The gate of the fast path, sigmoid(logsumexp - sink), is what is left.
    """
    model = tiny()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.zero_()
            block.attn.sinks.fill_(math.log(2))
    share = sinks.attention_maps(model, text(1, 3))[..., -1]
    want = torch.tensor([2 / 3, 2 / 4, 2 / 5, 2 / 6])
    gate = torch.sigmoid(torch.tensor([1.0, 2.0, 3.0, 4.0]).log() - math.log(2))
    assert torch.allclose(share, want.expand_as(share)) and torch.allclose(1 - gate, want)


def test_entropy_tells_heads_that_look_somewhere_from_heads_that_do_not():
    """Attention that is uniform over what it can see has mean ln i, with and without a sink.

    That is (0 + ln 2 + ln 3 + ln 4) / 4 = 0.7945 for four tokens: the number beside every entropy.
    Attention on the first token alone has 0, three quarters on one token 0.5623 of ln 2 = 0.6931.
    """
    for sink in (True, False):
        model = tiny(sinks=sink)
        with torch.no_grad():
            for block in model.blocks:
                block.attn.qkv.weight.zero_()
        rows = sinks.by_head(sinks.head_numbers(sinks.attention_maps(model, text(1, 3))), sink)
        flat = [row for row in rows if row.metric == "attention_entropy"]
        assert len(flat) == 8
        for row in flat:
            assert row.estimate.value == pytest.approx(0.7945, abs=1e-4) == row.extra["uniform"]
    maps = torch.zeros(1, 1, 1, 4, 5)
    maps[..., 0] = 1
    rows = {row.metric: row for row in sinks.by_head(sinks.head_numbers(maps), False)}
    assert rows["attention_entropy"].estimate.value == 0
    share = rows["first_token_share"]
    assert share.estimate.value == 1
    assert share.extra["uniform"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert sinks.entropy(torch.tensor([[0.375, 0.125, 0.5]]))[0].item() == pytest.approx(
        0.5623, abs=1e-4
    )
    rows = sinks.by_head(
        sinks.head_numbers(sinks.attention_maps(tiny(), text(1, T - 1))), True
    )  # random weights, but not small
    for row in rows:
        if row.metric == "attention_entropy":
            assert row.estimate.value < row.extra["uniform"] - 0.02


def test_shares_leave_out_the_first_queries():
    """The first query has only itself to look at.

    `skip` queries do not count, nor in the baseline.
    """
    maps = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.5, 0.3]]).view(1, 1, 1, 2, 3)
    rows = {row.metric: row for row in sinks.by_head(sinks.head_numbers(maps), True, 1)}
    sink, first = rows["sink_share"], rows["first_token_share"]
    assert sink.estimate.value == pytest.approx(0.3)
    assert sink.extra["uniform"] == pytest.approx(1 / 3)
    assert first.estimate.value == pytest.approx(0.2) and first.extra["uniform"] == 1 / 2
    assert (sink.extra["layer"], sink.extra["head"], sink.estimate.n) == (1, 1, 1)


def test_a_layer_has_the_mean_of_its_heads():
    """Heads of first-token shares 0.2 and 0.6 in one layer, 0.1 and 0.1 in the other."""
    shares = torch.tensor([[0.2, 0.6], [0.1, 0.1]])  # (layers, heads)
    maps = torch.zeros(2, 1, 2, 3, 4)
    maps[..., 0], maps[..., 1] = shares[:, None, :, None], 1 - shares[:, None, :, None]
    rows = sinks.by_layer(sinks.head_numbers(maps), False, 1)
    found = {row.protocol: row for row in rows if row.metric == "first_token_share"}
    values = [found[name].estimate.value for name in ("layer 1", "layer 2")]
    assert len(found) == 2 and values == pytest.approx([0.4, 0.1])
    assert found["layer 1"].extra == {"layer": 1, "uniform": pytest.approx((1 / 2 + 1 / 3) / 2)}


# --------------------------------------------------------------------------------------------------
# The tasks

SENTENCES = "Cats run;2*x,y"
FLAGS = ["--data=", "--problems=", "--pairs=", "--chats=", "--n_streams=2", "--device=cpu"]


def make_runs(folder, characters: int = 600, end: int | None = None) -> list[str]:
    """Two runs with and without sinks, and text to read. -> flags for eval.py"""
    ids = np.random.default_rng(0).integers(97, 123, characters).astype("<u4")
    if end:
        ids[::end] = BYTE.eos
    write_shard(str(folder / "data" / "book" / "val_000.bin"), ids, BYTE)
    for name in ("sinks", "no_sinks"):
        model = tiny(sinks=name == "sinks", n_head=1, n_kv_head=1).float()
        save_start(folder / "run" / name, model)
    return [f"--out_dir={folder / 'run'}", f"--data_dir={folder / 'data'}", *FLAGS]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Both tasks on both runs, and their report. -> folder, rows"""
    folder = tmp_path_factory.mktemp("sinks")
    argv = make_runs(folder)
    assert (
        evaluation.main(
            [*argv, "--tasks=streaming,attention", "--streaming=book", f"--sentences={SENTENCES}"]
        )
        == 0
    )
    assert report.main([f"--out_dir={folder / 'run'}"]) == 0
    return folder / "run", read_results(str(folder / "run"))


def test_every_run_has_a_curve_to_sixteen_contexts(finished):
    """There is a row per way to read and half context, or whole one for recompute.

    A rolling cache keeps one training context, and four keys twice where they stay; the other all
    sixteen contexts. A model with sinks needs no first tokens.
    """
    _, rows = finished
    for model in ("sinks", "no_sinks"):
        ways = {"rolling": 2 * 2 * T * 32 * 4, "dense": 2 * 2 * 16 * T * 32 * 4}
        if model == "no_sinks":
            ways["kept"] = ways["rolling"] + 2 * 4 * 32 * 4
        for how in (*ways, "recompute"):
            line = [
                r
                for r in rows
                if (r["model"], r["metric"]) == (model, "loss_at_position")
                and r["protocol"].startswith(how)
            ]
            width = T if how == "recompute" else T // 2
            assert [r["position"] for r in line] == list(range(0, 16 * T, width))
            assert all(r["low"] <= r["value"] <= r["high"] for r in line)
            assert (
                line[1]["protocol"] == f"{how} {width}-{2 * width - 1}"
                and line[0]["n"] == 2 * width
                and {r["split"] for r in line} == {"val"}
            )
        own = [r for r in rows if (r["model"], r["metric"]) == (model, "cache_bytes")]
        assert {r["protocol"]: r["value"] for r in own} == ways
    assert {r["model"] for r in rows if r["task"] == "streaming"} == {"sinks", "no_sinks"}
    assert {
        r["model"] for r in rows if r["metric"] == "sink_share" and r["task"] == "streaming"
    } == {"sinks"}


def test_within_the_context_nothing_differs_from_recompute(finished):
    """The yardstick of the comparison beyond it.

    There a difference of 0 would mean that nothing was measured.
    """
    _, rows = finished
    gaps = {
        (r["metric"], r["protocol"], r["model"]): abs(r["value"])
        for r in rows
        if r["protocol"].endswith("- recompute")
    }
    assert len(gaps) == 10 and all(
        (gap < 1e-5) == (key[0] == "loss_within_context") for key, gap in gaps.items()
    )


def test_a_cache_of_fewer_slots_has_rows_and_curves_of_its_own(finished, tmp_path):
    """Streams are 16 times as long as the cache, and no number of whole contexts is touched."""
    folder, before = finished
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    before = [row for row in before if row["task"] == "streaming"]
    write_jsonl(str(run / "results.jsonl"), before)
    argv = [f"--out_dir={run}", f"--data_dir={folder.parent / 'data'}", *FLAGS]
    argv += ["--tasks=streaming", "--streaming=book", "--stream_slots=6"]
    assert evaluation.main(argv) == 0 and report.main([f"--out_dir={run}", "--force"]) == 0
    after = read_results(str(run))
    rows = after[len(before) :]
    assert after[: len(before)] == before
    assert {(row["seq_len"], row["slots"]) for row in rows} == {(T, 6)}
    ways = {row["protocol"].split()[0] for row in rows if row["metric"] == "loss_at_position"}
    assert ways == {"rolling@6", "kept@6", "dense@6", "recompute@6"}

    cfg = EvalConfig(
        out_dir=str(run), data_dir=str(folder.parent / "data"), streaming="book", n_streams=2
    )
    subject = Subject(cfg)
    ids = sinks.streams(subject, "no_sinks", cfg, 16 * 6)[0]
    for way, kept in (("rolling", 0), ("kept", 4)):
        nll = sinks.cached(subject.model("no_sinks"), ids, 6, kept)[0]
        own = [row for row in rows if row["protocol"].startswith(f"{way}@6 ")]
        curve = [row for row in own if row["metric"] == "loss_at_position"]
        curve = {row["position"]: row["value"] for row in curve if row["model"] == "no_sinks"}
        means = nll.double().mean(0).view(-1, 3).mean(1).tolist()
        assert curve == pytest.approx(dict(zip(range(0, 96, 3), means, strict=True)))
    text = (run / "report.md").read_text()
    assert "kept@6 - recompute@6" in text and "rolling - recompute" in text
    assert (run / "streaming.png").read_bytes() != (folder / "streaming.png").read_bytes()


def test_maps_are_kept_for_every_model_and_sentence_and_drawn(finished):
    """The untrained model too: what it shows as well is no finding."""
    folder, rows = finished
    for model in ("untrained", "sinks", "no_sinks"):
        for sentence, text in enumerate(SENTENCES.split(";"), 1):
            kept = json.loads((folder / "attention" / f"{model}_{sentence}.jsonl").read_text())
            assert "".join(kept["tokens"]) == text and np.array(kept["maps"]).shape == (
                2,
                1,
                len(text),
                len(text) + 1,
            )
            assert (folder / f"attention_{model}_{sentence}.png").stat().st_size > 10_000
            whole = [
                r
                for r in rows
                if (r["model"], r["metric"], r["protocol"])
                == (model, "attention_entropy", f"sentence {sentence} layer 1 head 1")
            ]
            assert (
                len(whole) == 1
                and "low" not in whole[0]
                and whole[0]["uniform"]
                == pytest.approx(sum(math.log(i) for i in range(1, len(text) + 1)) / len(text))
            )
    assert (folder / "streaming.png").stat().st_size > 10_000 and "Streams of 16" in (
        folder / "report.md"
    ).read_text()


@pytest.mark.parametrize("end,one_document", [(200, True), (100, False)])
def test_streams_lie_in_one_document_where_any_is_long_enough(tmp_path, end, one_document):
    """128 tokens are asked for.

    What stands before a document's end is of no use after it, and a row says so where it cannot be
    avoided.
    """
    argv = make_runs(tmp_path, 900, end)
    folders = dict(flag.removeprefix("--").split("=") for flag in argv[:2])
    cfg = EvalConfig(**folders, streaming="book", n_streams=4)
    ids, whole = sinks.streams(Subject(cfg), "untrained", cfg, 16 * T)
    assert whole == one_document == bool((ids != BYTE.eos).all()) and ids.size(1) == 16 * T + 1


def test_wrong_requests_are_refused_in_words(tmp_path):
    """Each with the value and what to do, before anything is computed."""
    argv = make_runs(tmp_path, 100)
    fails(
        lambda: evaluation.main([*argv, "--tasks=streaming", "--streaming=book"]),
        "16 x seq_len = 128",
        "100 tokens",
    )
    streaming = [*argv, "--tasks=streaming", "--streaming=book"]
    fails(lambda: evaluation.main([*streaming, "--stream_slots=7"]), "16 x stream_slots = 112")
    fails(lambda: evaluation.main([*streaming, "--stream_slots=9"]), "stream_slots=9", "seq_len=8")
    fails(lambda: evaluation.main([*argv, "--tasks=streaming"]), "streaming needs --streaming=")
    fails(lambda: evaluation.main([*argv, "--tasks=attention"]), "attention needs --sentences=")
    fails(
        lambda: evaluation.main(
            [*argv, "--tasks=attention", "--sentences=far too long a sentence"]
        ),
        "23 tokens",
        "seq_len=8",
        "separated by ;",
    )
    fails(
        lambda: evaluation.main([*argv, "--tasks=attention", "--sentences=x"]), "'x' has 1 tokens"
    )
    fails(
        lambda: evaluation.main([*argv, "--tasks=streaming", "--streaming=book", "--n_streams=0"]),
        "n_streams must be at least 1, got 0",
    )
