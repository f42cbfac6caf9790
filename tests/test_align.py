"""SFT, DPO and verifier: which tokens count, what each loss is, and that kills change nothing."""

import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ASSISTANT, BYTE, END, PAD, ROOT, SYSTEM, USER, fails, save_start, tiny

import align
from configurator import UserError
from corpus.chat import render, render_prompt, user_turn, with_text
from corpus.shards import write_shard
from corpus.tokenizer import CHAT_1
from corpus.toy import chat
from inference import solutions
from inference.scoring import score_solutions
from model import GPT
from runtime.checkpoint import checkpoint_files, load_checkpoint, load_tensors, model_from
from runtime.files import read_jsonl, write_jsonl
from runtime.logs import read_log
from runtime.world import World
from train import LoopConfig, TrainStep

LN2 = math.log(2)


# ------------------------------------------------------------------------------------------------
# Small things that the tests share

CHATS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]},
    {"messages": [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]},
]
PAIRS = [
    {
        "prompt": user_turn(f"question {i}"),
        "chosen": "good " * (1 + i % 3),
        "rejected": "bad" * (1 + i % 4),
    }
    for i in range(9)
]
PROBLEMS = [{"question": f"1+{i}?", "answer": f"1+{i}={1 + i}\n#### {1 + i}"} for i in range(6)]


def world(folder: Path, chats=CHATS, pairs=PAIRS, problems=PROBLEMS) -> str:
    """Records for every mode; the same ones for training and validation. -> data_dir"""
    for split in ("train", "val"):
        write_jsonl(str(folder / "mini" / f"sft_{split}.jsonl"), chats)
        write_jsonl(str(folder / "mini" / f"dpo_{split}.jsonl"), pairs)
    for split in ("verifier", "val"):
        write_jsonl(str(folder / "mini" / f"problems_{split}.jsonl"), problems)
    write_jsonl(
        str(folder / "mini" / "problems_train.jsonl"),
        [{**row, "question": f"SFT: {row['question']}"} for row in problems],
    )
    return str(folder)


def config(tmp_path: Path, mode: str, data_dir: str = "", **changes) -> list:
    """The parts of the configuration: loop, align, mode and, but for sft, sampling."""
    out = tmp_path / mode
    out.mkdir(exist_ok=True)
    values = {
        "mode": mode,
        "init_from": "start",
        "data": "mini",
        "data_dir": data_dir or world(tmp_path / "data"),
        "out_dir": str(out),
        "device": "cpu",
        "dtype": "float32",
        "micro_batch": 4,
        **changes,
    }
    parts = []
    for part in (LoopConfig, align.AlignConfig, *align.MODES[mode]):
        names = [field.name for field in fields(part)]
        parts.append(part(**{name: values.pop(name) for name in names if name in values}))
    assert not values, f"no keys of {mode}: {values}"
    return parts


def build(parts: list, model: GPT):
    setup = align.Setup(model, BYTE, World("cpu", parts[0].dtype), *parts)
    return align.TASKS[setup.align.mode](setup)


def plain_logprobs(model: GPT, ids: list[int]) -> torch.Tensor:
    """log p of every id but the first, by a full log_softmax, with gradients: (n - 1,)"""
    x = model.hidden(torch.tensor([ids[:-1]]))[0]
    logp = F.log_softmax((x @ model.head.weight.T)[:, : model.cfg.vocab_size], dim=-1)
    return logp[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


def gradients(loss: torch.Tensor, model: GPT) -> dict[str, torch.Tensor]:
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    found = {}
    for (name, p), grad in zip(model.named_parameters(), grads, strict=True):
        found[name] = torch.zeros_like(p) if grad is None else grad
    return found


def assert_same_gradients(a: dict, b: dict, atol: float):
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=f"{name} differs")
    assert any(x.abs().max() > 1e-3 for x in a.values()), "gradients are all zero: nothing is shown"


def supervised(batch: dict, key: str) -> list[tuple[tuple[int, ...], int]]:
    """(ids of the document read so far, label) wherever a packed batch has a label of this kind."""
    found = []
    rows = (batch["idx"].tolist(), batch["docs"].tolist(), batch[key].tolist())
    for idx, docs, labels in zip(*rows, strict=True):
        for t, label in enumerate(labels):
            if label >= 0:
                read = [i for i, d in zip(idx[: t + 1], docs[: t + 1], strict=True) if d == docs[t]]
                found.append((tuple(read), label))
    return found


# ------------------------------------------------------------------------------------------------
# Masks, as literal arrays


def test_two_chats_in_one_row_as_literal_arrays(tmp_path):
    """Only the assistant's words and the <|end|> after them are targets, each one place before.

    Padding has no document.
    """
    task = build(config(tmp_path, "sft", seq_len=12), tiny())
    batch = task.batch("val", 0, 1)
    assert batch["idx"].tolist() == [
        [USER, 97, END, ASSISTANT, 98, 99, USER, 100, END, ASSISTANT, 101, PAD]
    ]
    assert batch["targets"].tolist() == [[-1, -1, -1, 98, 99, END, -1, -1, -1, 101, END, -1]]
    assert batch["docs"].tolist() == [[0] * 6 + [1] * 5 + [-1]]
    assert task.units(batch) == 5


def test_every_assistant_turn_of_a_long_chat_is_supervised_and_nothing_else(tmp_path):
    """Of a chat of several turns the model learns all its own, no word of system or user."""
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    chats = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    batch = build(
        config(tmp_path, "sft", world(tmp_path / "data", chats=chats), seq_len=14), tiny()
    ).batch("train", 0, 1)
    assert batch["idx"].tolist() == [
        [SYSTEM, 115, END, USER, 97, END, ASSISTANT, 98, END, USER, 99, END, ASSISTANT, 100]
    ]
    assert batch["targets"].tolist() == [
        [-1, -1, -1, -1, -1, -1, 98, END, -1, -1, -1, -1, 100, END]
    ]


def test_a_pair_as_literal_arrays(tmp_path):
    """Chosen rows come first, padded on the right; targets are the answer and its <|end|> alone."""
    pairs = [{"prompt": user_turn("p"), "chosen": "ab", "rejected": "c"}]
    task = build(config(tmp_path, "dpo", world(tmp_path / "data", pairs=pairs), seq_len=6), tiny())
    batch = task.batch("val", 0, 1)
    assert batch["idx"].tolist() == [
        [USER, 112, END, ASSISTANT, 97, 98],
        [USER, 112, END, ASSISTANT, 99, PAD],
    ]
    assert batch["targets"].tolist() == [[-1, -1, -1, 97, 98, END], [-1, -1, -1, 99, END, -1]]
    assert batch["lengths"].tolist() == [[3], [2]]
    assert batch["reference"].shape == (2, 1) and task.units(batch) == 1


def test_pairs_are_padded_to_the_longest_beside_them_unless_compiled(tmp_path):
    """Compiled code wants one shape; else padding is only work. Losses are the same."""
    model, found = tiny(), []
    for compiled in (False, True):
        task = build(config(tmp_path, "dpo", compile=compiled), model)
        batches = [task.batch("val", i, i + 2) for i in range(0, 8, 2)]
        found.append([task.loss(model, batch)[0].item() for batch in batches])
        widths = [batch["idx"].size(1) for batch in batches]
        longest = [
            max(pair.longest - 1 for pair in task.pairs["val"][i : i + 2]) for i in (0, 2, 4, 6)
        ]
        assert widths == ([task.width] * 4 if compiled else longest) and len(set(longest)) > 1
    assert found[0] == pytest.approx(found[1], rel=1e-5)


QUESTION = (USER, 113, END, ASSISTANT)  # "q"


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """A verifier task of one problem, "q" with the answer "r".

    The sampled solutions are "x" (right) and "yz" (wrong).
    """
    rows = [
        {
            "question": "q",
            "answer": "r",
            "solutions": [
                {"ids": [120, END], "text": "x", "correct": True},
                {"ids": [121, 122, END], "text": "yz", "correct": False},
            ],
        }
    ]
    monkeypatch.setattr(align, "solve", lambda *args: copy.deepcopy(rows))
    parts = config(
        tmp_path,
        "verifier",
        world(tmp_path / "data", problems=[{"question": "q", "answer": "r"}]),
        seq_len=32,
    )
    return build(parts, tiny(score_head=True))


def test_verifier_labels_stand_on_every_token_of_the_solution_the_last_included(judged):
    """The score after a token of the solution judges what has been read.

    Evaluation reads the one after the last token, so that one must be trained; the one after the
    bare question need not be.
    """
    labels = supervised(judged.batch("val", 0, judged.n_val_rows), "labels")
    assert sorted(labels) == sorted(
        [
            ((*QUESTION, 120), 1),
            ((*QUESTION, 120, END), 1),
            ((*QUESTION, 121), 0),
            ((*QUESTION, 121, 122), 0),
            ((*QUESTION, 121, 122, END), 0),
        ]
    )


def test_verifier_language_model_targets_stand_on_reference_solutions_only(judged):
    """Wrong samples are no texts to imitate: the language-model loss sees nothing sampled."""
    assert supervised(judged.batch("val", 0, judged.n_val_rows), "targets") == [
        (QUESTION, 114),
        ((*QUESTION, 114), END),
    ]


def test_the_last_supervised_label_of_every_document_is_end(tmp_path, judged):
    """A model that is never taught <|end|> never stops: the most reported fault of chat tuning."""
    sft = build(config(tmp_path, "sft", seq_len=12), tiny())
    dpo = build(config(tmp_path, "dpo"), tiny())
    for packed in (sft.packed["train"], judged.packed["train"]):
        last = [
            [t for t in document["targets"] if t >= 0][-1]
            for document in packed.documents
            if max(document["targets"]) >= 0
        ]
        assert last and set(last) == {END}
    rows = dpo.tensors("train", range(len(PAIRS)))["targets"].tolist()
    assert {[t for t in row if t >= 0][-1] for row in rows} == {END} and len(rows) == 2 * len(PAIRS)
    labels = supervised(judged.batch("train", 0, len(judged.packed["train"].rows)), "labels")
    assert {context[len(QUESTION) :] for context, _ in labels} >= {(120,), (121, 122)}


def test_prompts_are_never_supervised(tmp_path, judged):
    """The loss on the question would teach the model to ask.

    Every target is preceded by <|assistant|> and its answer so far.
    """
    sft = build(config(tmp_path, "sft", seq_len=12), tiny())
    dpo = build(config(tmp_path, "dpo"), tiny())
    for batch, key in (
        (sft.batch("train", 0, 1), "targets"),
        (judged.batch("train", 0, judged.n_val_rows), "targets"),
    ):
        contexts = [context for context, _ in supervised(batch, key)]
        assert contexts and all(
            ASSISTANT in context and END not in context[context.index(ASSISTANT) :]
            for context in contexts
        )
    batch = dpo.tensors("train", range(len(PAIRS)))
    chosen = [x[: len(PAIRS)] for x in (batch["idx"], batch["targets"])]
    for idx, targets, pair in zip(*chosen, dpo.pairs["train"], strict=True):
        n = len(pair.prompt)
        assert targets[: n - 1].max() == -1 and targets[n - 1] >= 0 and idx[n - 1] == ASSISTANT


def test_the_shown_sample_marks_exactly_the_supervised_part(tmp_path, capsys):
    """A mask lost in a refactor is seen in the log, if this shows the mask and its share."""
    build(config(tmp_path, "sft", seq_len=12), tiny())
    said = capsys.readouterr().out
    assert "<|user|>a<|end|><|assistant|>[[bc<|end|>]]" in said
    assert f"{5 / 13:.0%} of tokens" in said


# ------------------------------------------------------------------------------------------------
# Packing


@pytest.mark.parametrize("mode,what", [("sft", "chats"), ("dpo", "pairs")])
def test_documents_longer_than_a_row_are_dropped_aloud(tmp_path, capsys, mode, what):
    """A document cut in the middle would be taught without its end.

    One dropped in silence would be missed by nobody.
    """
    chats = [*CHATS, chat("long", "x" * 100)]
    pairs = [*PAIRS, {"prompt": user_turn("long"), "chosen": "y" * 100, "rejected": "z"}]
    task = build(
        config(tmp_path, mode, world(tmp_path / "data", chats=chats, pairs=pairs), seq_len=50),
        tiny(),
    )
    said = capsys.readouterr().out
    n = len(CHATS if mode == "sft" else PAIRS)
    assert f"{mode} train {what}: 1 of {n + 1} are longer than seq_len=50" in said
    assert len(task.packed["train"].documents if mode == "sft" else task.pairs["train"]) == n


def test_a_document_that_fits_exactly_is_kept(tmp_path, capsys):
    """n ids take n - 1 places: the limit itself is no reason to drop."""
    task = build(config(tmp_path, "sft", seq_len=6), tiny())
    assert len(task.packed["train"].documents) == 2 and "dropped" not in capsys.readouterr().out
    with pytest.raises(UserError):
        build(
            config(tmp_path, "sft", world(tmp_path / "other", chats=CHATS[:1]), seq_len=5), tiny()
        )


@pytest.mark.parametrize("mode", ["sft", "dpo"])
def test_nothing_left_after_dropping_is_an_error_in_words(tmp_path, mode):
    """Training on no data must not start; the message gives the number and the length."""
    with pytest.raises(UserError, match=r"all \d+ are longer than seq_len=3"):
        build(config(tmp_path, mode, seq_len=3), tiny())


@pytest.mark.parametrize(
    "changes,atol",
    [
        ({"sinks": True, "n_kv_head": 2}, 1e-10),
        ({"sinks": False, "n_kv_head": 4}, 1e-10),
        ({"sinks": True, "n_kv_head": 1, "sliding_window": 5}, 1e-10),
        ({"n_expert": 4, "d_expert": 32}, 1e-4),  # the router's scores are float32
    ],
)
def test_packed_loss_and_gradients_are_the_sum_of_separate_ones(tmp_path, double, changes, atol):
    """Documents in one row must not see each other, in the loss or in any gradient."""
    chats = [chat("one", "first answer"), chat("second question", "no"), chat("3", "third")]
    model = tiny(**changes)
    task = build(config(tmp_path, "sft", world(tmp_path / "data", chats=chats), seq_len=60), model)
    assert len(task.packed["train"].rows) == 1 and len(task.packed["train"].documents) == 3
    batch = task.batch("train", 0, 1)
    packed = task.loss(model, batch)[1]["loss"]
    separate = 0.0
    for record in chats:
        ids, flags = render(record["messages"], BYTE)
        separate = separate - plain_logprobs(model, ids)[torch.tensor(flags[1:])].sum()
    assert packed.item() == pytest.approx(separate.item(), abs=atol)
    assert_same_gradients(gradients(packed, model), gradients(separate, model), atol)
    naive = model(batch["idx"], batch["targets"])
    assert abs(naive.item() - separate.item()) > 1e-2, (
        "without the document mask the loss would be the same: the test is blind"
    )


def test_hidden_states_without_a_label_get_no_gradient_from_the_losses(double):
    """Neither SFT's likelihood nor DPO's log-probs may push on the prompt or on padding."""
    model = tiny()
    targets = torch.tensor([[-1, -1, 5, 260, -1]])
    for sum_of in (lambda x: model.nll(x, targets), lambda x: model.logprobs(x, targets).sum()):
        x = torch.randn(1, 5, 32, requires_grad=True)
        (grad,) = torch.autograd.grad(sum_of(x), x)
        assert (grad[0].abs().amax(-1) > 0).tolist() == [False, False, True, True, False]


EXPERTS = {"n_expert": 4, "d_expert": 16, "balance_coef": 0.5}


def balance_of(task, model: GPT, batch: dict) -> tuple[float, dict]:
    """Return the balance loss of a training step's batch, and its gradients."""
    _, balance, _ = TrainStep(model, task)(batch)
    return balance.item(), gradients(balance, model)


@pytest.mark.parametrize("mode", ["sft", "dpo", "verifier"])
def test_experts_are_balanced_over_real_tokens(tmp_path, monkeypatch, mode):
    """Short texts in wide rows are mostly padding, one id that must teach the router nothing.

    The loss is that of every text alone, its routing put together.
    """
    model = tiny(score_head=mode == "verifier", **EXPERTS)
    rows = [
        {**row, "solutions": [{"ids": [120, END], "text": "x", "correct": True}]}
        for row in PROBLEMS
    ]
    monkeypatch.setattr(align, "solve", lambda *args: copy.deepcopy(rows))
    monkeypatch.setattr(align.scoring, "scale_scores", lambda *args: None)
    task = build(config(tmp_path, mode, seq_len=64), model)
    batch = task.batch("val", 0, task.n_val_rows)
    narrow, router = balance_of(task, model, batch)
    texts = []
    for idx, docs in zip(batch["idx"], batch["docs"], strict=True):
        texts += [idx[docs == number] for number in docs.unique() if number >= 0]
    routing = [[], []]
    for ids in texts:
        model.hidden(ids[None])
        for block, parts in zip(model.blocks, routing, strict=True):
            parts.append(block.mlp.routing)
    for block, parts in zip(model.blocks, routing, strict=True):
        block.mlp.routing = torch.cat(parts, dim=1)
    alone = model.balance_loss()
    assert narrow == pytest.approx(alone.item(), rel=1e-5)
    assert_same_gradients(router, gradients(alone, model), 1e-5)

    wide = {}
    for name, x in batch.items():
        fill = PAD if name == "idx" else -1
        wide[name] = F.pad(x, (0, 64), value=fill) if x.shape == batch["idx"].shape else x
    padded, more = balance_of(task, model, wide)
    assert padded == pytest.approx(narrow, rel=1e-5)
    assert_same_gradients(router, more, 1e-5)
    assert abs(model.balance_loss().item() - narrow) > 1e-3, "this padding would not be seen"


def test_text_among_chats_counts_as_real(tmp_path):
    """A row of replayed text has no padding: all its tokens have a part in the balance."""
    rows = {"idx": torch.ones(2, 6).long(), "docs": torch.tensor([[0, 0, 1, 1, -1, -1]] * 2)}
    rows["targets"] = torch.full((2, 6), -1)
    text = torch.arange(7).unsqueeze(0)
    mixed = with_text(rows, text, torch.tensor([False, True, False]))
    assert mixed["docs"].tolist() == [[0, 0, 1, 1, -1, -1], [0] * 6, [0, 0, 1, 1, -1, -1]]
    assert mixed["idx"].tolist() == [[1] * 6, [0, 1, 2, 3, 4, 5], [1] * 6]
    assert mixed["targets"].tolist() == [[-1] * 6, [1, 2, 3, 4, 5, 6], [-1] * 6]


# ------------------------------------------------------------------------------------------------
# DPO


def test_dpo_starts_at_ln_2(tmp_path):
    """Policy and reference are the same weights: every margin is 0 and the loss ln 2."""
    model = tiny()
    task = build(config(tmp_path, "dpo"), model)
    for split in ("train", "val"):
        batch = task.batch(split, 0, len(PAIRS))
        objective, sums = task.loss(model, batch)
        assert objective.item() / task.units(batch) == pytest.approx(LN2, abs=1e-6)
        assert sums["rewards/margins"].item() / len(PAIRS) == pytest.approx(0, abs=1e-5)


# loss of a pair, as the papers write it, from the log-ratios of its answers (chosen, rejected), the
# policy's log-probs and the lengths
PLAIN = {
    "sigmoid": ({}, lambda r, p, n: -F.logsigmoid(0.3 * (r[0] - r[1]))),
    "cDPO": (
        {"label_smoothing": 0.1},
        lambda r, p, n: (
            -0.9 * F.logsigmoid(0.3 * (r[0] - r[1])) - 0.1 * F.logsigmoid(0.3 * (r[1] - r[0]))
        ),
    ),
    "IPO": ({"loss_type": "ipo"}, lambda r, p, n: (r[0] / n[0] - r[1] / n[1] - 1 / 0.6) ** 2),
    "SimPO": (
        {"loss_type": "simpo", "simpo_gamma": 0.4},
        lambda r, p, n: -F.logsigmoid(0.3 * (p[0] / n[0] - p[1] / n[1]) - 0.4),
    ),
    "SimPO with smoothing": (
        {"loss_type": "simpo", "label_smoothing": 0.2, "simpo_gamma": 0.9},
        lambda r, p, n: (
            -0.8 * F.logsigmoid(0.3 * (p[0] / n[0] - p[1] / n[1]) - 0.9)
            - 0.2 * F.logsigmoid(0.9 - 0.3 * (p[0] / n[0] - p[1] / n[1]))
        ),
    ),
    "RPO": (
        {"rpo_alpha": 0.7},
        lambda r, p, n: -F.logsigmoid(0.3 * (r[0] - r[1])) - 0.7 * p[0] / n[0],
    ),
}


def answer_logprobs(model: GPT, prompt: list[int], answers: list) -> list[torch.Tensor]:
    return [plain_logprobs(model, prompt + answer)[-len(answer) :].sum() for answer in answers]


@pytest.mark.parametrize("variant", PLAIN)
def test_loss_and_gradients_equal_those_of_two_models_side_by_side(tmp_path, double, variant):
    """The cached reference, the padding and the chunks are economies, not another method."""
    changes, loss_of = PLAIN[variant]
    start = tiny()
    task = build(config(tmp_path, "dpo", beta=0.3, **changes), start)
    reference, policy = copy.deepcopy(start).requires_grad_(False), tiny(seed=1)
    loss = task.loss(policy, task.batch("val", 0, len(PAIRS)))[0]
    plain = 0.0
    for record in PAIRS:
        prompt = render_prompt(record["prompt"], BYTE)
        answers = [[*record[key].encode(), END] for key in ("chosen", "rejected")]
        logps = answer_logprobs(policy, prompt, answers)
        before = answer_logprobs(reference, prompt, answers)
        ratios = [a - b for a, b in zip(logps, before, strict=True)]
        plain = plain + loss_of(ratios, logps, list(map(len, answers)))
    assert loss.item() == pytest.approx(plain.item(), abs=1e-10)
    assert abs(loss.item() / len(PAIRS) - LN2) > 0.05
    assert_same_gradients(gradients(loss, policy), gradients(plain, policy), 1e-10)


POLICY = torch.tensor([[-5.0, -8.0], [-7.0, -6.0]])  # chosen, rejected x two pairs
REFERENCE = torch.tensor([[-6.0, -7.0], [-6.5, -7.5]])
LENGTHS = torch.tensor([[2, 4], [4, 3]])
MARGINS = [(-5 + 7) - (-6 + 6.5), (-8 + 6) - (-7 + 7.5)]  # 1.5 and -2.5


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def of_kind(**changes):
    cfg = align.DPOConfig(**changes)
    return align.preference_loss(POLICY, REFERENCE, LENGTHS, cfg).tolist()


def test_sigmoid_loss_is_equation_7_of_the_dpo_paper():
    """-log s(beta ((log pi_w - log pi_l) - (log ref_w - log ref_l))), on sums of log-probs."""
    assert of_kind(beta=0.2) == pytest.approx([-log_sigmoid(0.2 * d) for d in MARGINS], rel=1e-6)


def test_label_smoothing_mixes_in_the_swapped_pair():
    """cDPO: with probability e the pair was labelled the wrong way round: (1-e) L(d) + e L(-d)."""
    wanted = [-0.9 * log_sigmoid(0.2 * d) - 0.1 * log_sigmoid(-0.2 * d) for d in MARGINS]
    assert of_kind(beta=0.2, label_smoothing=0.1) == pytest.approx(wanted, rel=1e-6)


def test_ipo_is_a_squared_distance_on_means_per_token():
    """(d - 1 / (2 tau))^2, with log-probs averaged over the answer: long ones do not dominate."""
    d = [(-5 / 2 + 7 / 4) - (-6 / 2 + 6.5 / 4), (-8 / 4 + 6 / 3) - (-7 / 4 + 7.5 / 3)]
    assert of_kind(loss_type="ipo", beta=0.4) == pytest.approx(
        [(x - 1 / (2 * 0.4)) ** 2 for x in d], rel=1e-6
    )


def test_simpo_has_a_target_margin_and_no_reference():
    """-log s(beta (mean log pi_w - mean log pi_l) - gamma): gamma is a margin of the rewards."""
    d = [-5 / 2 + 7 / 4, -8 / 4 + 6 / 3]
    wanted = [-log_sigmoid(2.0 * x - 0.3) for x in d]
    assert of_kind(loss_type="simpo", beta=2.0, simpo_gamma=0.3) == pytest.approx(wanted, rel=1e-6)
    wanted = [-log_sigmoid(2.0 * x - 1.0) for x in d]  # unless given it is half of beta
    assert of_kind(loss_type="simpo", beta=2.0) == pytest.approx(wanted, rel=1e-6)
    cfg = align.DPOConfig(loss_type="simpo")
    losses = [
        align.preference_loss(POLICY, reference, LENGTHS, cfg)
        for reference in (REFERENCE, 5 * REFERENCE)
    ]
    assert torch.equal(*losses), "the reference must not enter"


@pytest.fixture
def by_hand(tmp_path, monkeypatch):
    """task.loss on the literal log-probs and lengths above."""

    def compute(**changes):
        task = build(config(tmp_path, "dpo"), tiny())
        vars(task.cfg).update(changes)
        with monkeypatch.context() as patch:
            patch.setattr(align, "sequence_logprobs", lambda model, batch: POLICY)
            return task.loss(tiny(), {"reference": REFERENCE, "lengths": LENGTHS})

    return compute


def test_rpo_adds_the_mean_nll_of_the_chosen_answer(by_hand):
    """L_DPO - alpha log pi_w / |y_w|: the term that keeps the chosen answer likely."""
    objective, sums = by_hand(beta=0.2, rpo_alpha=0.7)
    wanted = sum(-log_sigmoid(0.2 * d) for d in MARGINS) - 0.7 * (-5 / 2 - 8 / 4)
    assert objective.item() == pytest.approx(wanted, rel=1e-6)
    assert sums["loss"].item() == pytest.approx(wanted, rel=1e-6)


def test_rpo_may_start(tmp_path):
    """The loss with RPO's term need not begin at ln 2: only its DPO part does.

    The program itself recommends --rpo_alpha=1.
    """
    build(config(tmp_path, "dpo", rpo_alpha=1.0), tiny())


def test_metrics_have_the_names_and_signs_users_know_from_trl(by_hand):
    """Rewards are beta (log pi - log ref); an accuracy is 1 where the chosen one is higher."""
    _, sums = by_hand(beta=0.2)
    sums = {key: x.item() for key, x in sums.items()}
    assert list(sums) == align.DPO.metrics
    wanted = {
        "rewards/chosen": 0.2 * (1.0 - 1.0),
        "rewards/rejected": 0.2 * (-0.5 + 1.5),
        "rewards/margins": 0.2 * (1.5 - 2.5),
        "rewards/accuracies": 1.0,
        "logps/chosen": -13.0,
        "logps/rejected": -13.0,
        "loss": sum(-log_sigmoid(0.2 * d) for d in MARGINS),
    }
    assert sums == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_simpo_logs_means_per_token(by_hand):
    """Its loss, its paper and TRL's trainer compare means; by sums a long answer seems the worse.

    The chosen answer of the first pair is likelier by sum, -5 to -7, and not per token.
    """
    _, sums = by_hand(beta=2.0, loss_type="simpo")
    wanted = {
        "rewards/chosen": 2.0 * (-5 / 2 - 8 / 4),
        "rewards/rejected": 2.0 * (-7 / 4 - 6 / 3),
        "rewards/margins": 2.0 * (-5 / 2 + 7 / 4),
        "rewards/accuracies": 0.0,
        "logps/chosen": -5 / 2 - 8 / 4,
        "logps/rejected": -7 / 4 - 6 / 3,
    }
    assert {key: sums[key].item() for key in wanted} == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("beta, alpha, gamma", [(0.1, 0.0, None), (2.5, 0.4, 1.4), (10.0, 0.0, 0)])
def test_simpo_is_right_where_its_margin_is_above_the_target(by_hand, beta, alpha, gamma):
    """What is logged is what is trained on: the loss can be had from the logged margins alone."""
    objective, sums = by_hand(beta=beta, loss_type="simpo", simpo_gamma=gamma, rpo_alpha=alpha)
    target = beta / 2 if gamma is None else gamma
    margins = [beta * (-5 / 2 + 7 / 4), beta * (-8 / 4 + 6 / 3)]
    nll = -sums["logps/chosen"].item()
    wanted = sum(-log_sigmoid(margin - target) for margin in margins) + alpha * nll
    assert sums["rewards/margins"].item() == pytest.approx(sum(margins), rel=1e-5)
    assert objective.item() == pytest.approx(wanted, rel=1e-5)


def test_ipo_logs_rewards_of_whole_answers(by_hand):
    """As TRL's DPO trainer does: its loss takes means per token, its rewards and logps sums."""
    _, sums = by_hand(beta=0.2, loss_type="ipo")
    assert sums["rewards/margins"].item() == pytest.approx(0.2 * sum(MARGINS), rel=1e-5)
    assert sums["logps/chosen"].item() == -13.0


@pytest.mark.parametrize(
    "given",
    [
        {"loss_type": "ipo", "label_smoothing": 0.1},
        {"loss_type": "ipo", "simpo_gamma": 0.3},
        {"loss_type": "sigmoid", "simpo_gamma": 1.0},
    ],
)
def test_a_setting_that_the_loss_does_not_have_is_refused(given):
    """It would have no effect, and whoever sets it believes that it has one."""
    key, value = list(given.items())[1]
    fails(lambda: align.DPOConfig(**given), f"{key}={value}", f"loss_type={given['loss_type']}")


def test_an_older_run_without_simpo_goes_on():
    """Its config.json holds the margin's former default beside every loss, without effect."""
    for kind in ("sigmoid", "ipo"):
        was = align.DPOConfig(loss_type=kind, simpo_gamma=0.5)
        assert was == align.DPOConfig(loss_type=kind)
    assert align.DPOConfig(loss_type="simpo", simpo_gamma=0.5) != align.DPOConfig(loss_type="simpo")


def test_rewards_carry_no_gradient(tmp_path):
    """Metrics are read, never trained on."""
    task, model = build(config(tmp_path, "dpo"), tiny()), tiny()
    _, sums = task.loss(model, task.batch("train", 0, 2))
    assert not any(sums[key].requires_grad for key in sums if key.startswith("rewards/"))


def test_log_probs_count_the_answer_only(tmp_path):
    """With the prompt counted, DPO becomes a weighted SFT on prompts.

    A mask of any negative value is the same mask; the lengths are those of the answers.
    """
    model = tiny()
    task = build(config(tmp_path, "dpo"), model)
    batch = task.tensors("val", range(len(PAIRS)))
    got = align.sequence_logprobs(model, batch)
    for n, record in enumerate(PAIRS):
        prompt = render_prompt(record["prompt"], BYTE)
        for row, key in enumerate(("chosen", "rejected")):
            answer = [*record[key].encode(), END]
            (wanted,) = answer_logprobs(model, prompt, [answer])
            assert got[row, n].item() == pytest.approx(wanted.item(), abs=1e-3)
            assert batch["lengths"][row, n] == len(answer)
    masked = torch.where(batch["targets"] < 0, -7, batch["targets"])
    assert torch.equal(align.sequence_logprobs(model, {**batch, "targets": masked}), got)
    masked[:, 0] = batch["idx"][:, 1]
    assert not torch.equal(align.sequence_logprobs(model, {**batch, "targets": masked}), got)


def files_of(parts: list, kind: str) -> list[str]:
    """Names of the files in the run folder that begin so."""
    return sorted(name for name in os.listdir(parts[0].out_dir) if name.startswith(kind))


def test_reference_log_probs_are_read_from_the_file_the_second_time(tmp_path):
    """They are paid for once: the second start gets what the file holds, whatever that is."""
    parts, model = config(tmp_path, "dpo", loss_type="ipo"), tiny()
    first = build(parts, model)
    (name,) = files_of(parts, "reference_")
    fresh = align.sequence_logprobs(model, first.tensors("train", range(len(PAIRS)))).detach()
    torch.testing.assert_close(first.reference["train"], fresh, rtol=0, atol=1e-4)
    again = build(parts, model)
    assert all(
        torch.equal(again.reference[split], first.reference[split]) for split in ("train", "val")
    )
    torch.save(
        {split: x + 17 for split, x in first.reference.items()},
        os.path.join(parts[0].out_dir, name),
    )
    assert torch.equal(build(parts, model).reference["val"], first.reference["val"] + 17)
    assert files_of(parts, "reference_") == [name]


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "foreign", "other rows"])
def test_a_damaged_reference_file_is_made_again_aloud(tmp_path, capsys, damage):
    """Other log-probs would be a silent other objective, and a torn file a traceback."""
    parts, model = config(tmp_path, "dpo"), tiny()
    first = build(parts, model).reference
    (name,) = files_of(parts, "reference_")
    path = Path(parts[0].out_dir, name)
    raw = path.read_bytes()
    place = raw.index(first["train"].numpy().tobytes())
    files = {"truncated": raw[: len(raw) // 2], "empty": b""}
    files["flipped"] = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
    if damage in files:
        path.write_bytes(files[damage])
    else:
        torch.save([1, 2] if damage == "foreign" else {"train": torch.zeros(2, 1)}, path)
    again = build(parts, model).reference
    assert all(torch.equal(again[split], first[split]) for split in ("train", "val"))
    assert f"WARNING: {path}" in capsys.readouterr().out
    assert load_tensors(str(path)).keys() == first.keys()


def test_other_weights_or_other_pairs_have_another_reference_file(tmp_path):
    """A stale reference would be a silent other objective."""
    parts = config(tmp_path, "dpo")
    build(parts, tiny())
    build(parts, tiny(seed=1))
    assert len(files_of(parts, "reference_")) == 2
    world(Path(parts[0].data_dir), pairs=PAIRS[1:])
    build(parts, tiny())
    assert len(files_of(parts, "reference_")) == 3


def test_simpo_computes_no_reference(tmp_path):
    """A method without a reference does not pay for one."""
    parts = config(tmp_path, "dpo", loss_type="simpo")
    task = build(parts, tiny())
    assert task.reference is None and not files_of(parts, "reference_")
    assert torch.equal(task.batch("train", 0, 3)["reference"], torch.zeros(2, 3))


def test_a_broken_reference_is_caught_before_the_first_step(tmp_path):
    """If policy and reference are computed differently, the run must not start."""
    parts, model = config(tmp_path, "dpo"), tiny()
    reference = build(parts, model).reference
    reference["train"][0] += 5
    torch.save(reference, os.path.join(parts[0].out_dir, files_of(parts, "reference_")[0]))
    with pytest.raises(AssertionError, match="not at ln 2"):
        build(parts, model)


def test_both_rows_of_a_pair_begin_with_the_same_prompt(tmp_path):
    """The tensors too: row i and row i + B differ after the prompt only."""
    task = build(config(tmp_path, "dpo"), tiny())
    batch = task.batch("train", 0, len(PAIRS))
    # ids before the first supervised one
    prompts = batch["targets"].lt(0).long().cumprod(-1).sum(-1) + 1
    chosen, rejected = batch["idx"].chunk(2)
    assert torch.equal(*prompts.chunk(2))
    for a, b, n in zip(chosen, rejected, prompts[: len(PAIRS)].tolist(), strict=True):
        assert torch.equal(a[:n], b[:n])


def test_a_dpo_run_made_to_collapse_says_so(tmp_path, capsys):
    """A learning rate a thousand times too high: the notes must appear in the run's own output."""
    start = save_start(tmp_path / "start", tiny(), template=CHAT_1, task="sft")
    data_dir = world(tmp_path / "data")
    argv = [f"--init_from={start}", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}"]
    argv += ["--mode=dpo", "--data=mini", "--device=cpu", "--dtype=float32", "--optimizer=adamw"]
    argv += ["--learning_rate=1.0", "--grad_clip=0", "--batch_tokens=1024", "--micro_batch=8"]
    argv += ["--max_steps=30", "--eval_interval=15", "--save_interval=30"]
    assert align.main(argv) == 0
    said = capsys.readouterr().out
    assert "greedy answers to held-out prompts, before -> after" in said
    assert "NOTE the chosen answers became less likely too" in said
    assert "NOTE the text collapses into repetition" in said, said[-1500:]
    assert set(json.loads((tmp_path / "run" / "answers.json").read_text())) == {"before", "after"}


# ------------------------------------------------------------------------------------------------
# Replay, and pairs from samples


def test_replayed_rows_are_whole_rows_of_text_at_their_share_and_chats_are_all_seen(tmp_path):
    """Half of the rows: every second is text, supervised throughout.

    The others are the chats that a run without replay sees.
    """
    data_dir = Path(world(tmp_path / "data"))
    write_shard(str(data_dir / "text" / "train_000.bin"), np.arange(200, dtype="<u4") % 50, BYTE)
    task = build(
        config(tmp_path, "sft", str(data_dir), seq_len=12, replay=0.5, replay_data="text"), tiny()
    )
    plain = build(config(tmp_path, "sft", str(data_dir), seq_len=12), tiny())
    batch, chats = task.batch("train", 0, 8), plain.batch("train", 0, 4)
    for key in chats:
        assert torch.equal(batch[key][::2], chats[key])
    text = {key: x[1::2] for key, x in batch.items()}
    assert torch.equal(text["targets"][:, :-1], text["idx"][:, 1:])
    assert (text["docs"] == 0).all() and text["idx"].max() < 50
    alone = torch.cat([task.batch("train", i, i + 1)["idx"] for i in range(8)])
    assert torch.equal(batch["idx"], alone), "rows depend on the micro-batch"
    val, plain_val = task.batch("val", 0, 1), plain.batch("val", 0, 1)
    assert torch.equal(val["targets"], plain_val["targets"]), "validation counts responses only"
    assert task.fingerprint != plain.fingerprint


def test_dpo_replays_chats_beside_the_pairs(tmp_path):
    """A row of chats for every second pair, each with the weight of a pair's mean NLL.

    The metrics, and validation, are those of the pairs alone.
    """
    data_dir = world(tmp_path / "data")
    plain = build(config(tmp_path, "dpo", data_dir), tiny())
    given = {"replay": 0.5, "replay_data": "mini", "force": True}
    task = build(config(tmp_path, "dpo", data_dir, **given), tiny())
    assert task.fingerprint != plain.fingerprint
    T = tiny().cfg.seq_len
    assert task.tokens_per_row == plain.tokens_per_row + T // 2  # of a pair: a step's tokens count
    assert not any(key.startswith("chats") for key in task.batch("val", 0, 1))
    batch, model = task.batch("train", 0, 4), tiny()
    alone = torch.cat([task.batch("train", i, i + 1)["chats_idx"] for i in range(4)])
    assert len(alone) == 2 and torch.equal(batch["chats_idx"], alone)
    objective, sums = task.loss(model, batch)
    pairs = {key: x for key, x in batch.items() if not key.startswith("chats")}
    without, same_sums = task.loss(model, pairs)
    assert sums == same_sums
    by_hand = 0.0
    for row in range(2):
        one = [batch[f"chats_{key}"][row : row + 1] for key in ("idx", "targets", "docs")]
        by_hand += model(*one) / (one[1] >= 0).sum() / 0.5
    assert objective.item() == pytest.approx((without + by_hand).item(), rel=1e-5)


def test_dpo_replays_what_its_start_was_tuned_on(tmp_path, capsys):
    """Without --replay_data these are the chats of the checkpoint; it alone is refused."""
    start = save_start(tmp_path / "start", tiny(), train_config={"data": "mini"})
    argv = [f"--init_from={start}", f"--data_dir={world(tmp_path / 'data')}"]
    argv += ["--mode=dpo", "--data=mini", "--device=cpu", "--dtype=float32", "--replay=0.25"]
    argv += [
        "--batch_tokens=512",
        "--max_steps=2",
        "--n_answers=0",
        f"--out_dir={tmp_path / 'run'}",
    ]
    for mode in ("sft", "dpo"):
        alone = [f"--mode={mode}", "--replay_data=mini", "--replay=0"]
        fails(lambda alone=alone: align.main([*argv, *alone]), "replay_data=mini is not used")
    assert align.main(argv) == 0
    assert "0.25 rows of chats of mini beside each pair" in capsys.readouterr().out
    assert align.main(argv) == 0 and "is done: nothing to do" in capsys.readouterr().out


def test_a_finished_run_with_replay_started_again_is_done(tmp_path, capsys):
    """What is replayed by default comes from the checkpoint, at the second start too."""
    start = save_start(tmp_path / "start", tiny(), train_config={"data": "text"})
    data_dir = Path(world(tmp_path / "data"))
    write_shard(str(data_dir / "text" / "train_000.bin"), np.arange(200, dtype="<u4") % 50, BYTE)
    argv = [f"--init_from={start}", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}"]
    argv += ["--mode=sft", "--data=mini", "--device=cpu", "--dtype=float32", "--replay=0.5"]
    argv += ["--batch_tokens=128", "--max_steps=2", "--n_answers=0"]
    assert align.main(argv) == 0 and "done at step 2" in capsys.readouterr().out
    assert align.main(argv) == 0 and "is done: nothing to do" in capsys.readouterr().out


def test_dpo_on_its_own_samples(tmp_path, monkeypatch, capsys):
    """Problems become pairs; where every sample is wrong, it says so."""
    monkeypatch.setattr(solutions, "generate", canned(["#### 1", "#### 2", "none"]))
    task = build(config(tmp_path, "dpo", on_policy=True, n_samples=3), tiny())
    texts = {BYTE.decode(pair.chosen[:-1]) for pair in task.pairs["train"]}
    assert texts == {"#### 1", "#### 2"}
    assert "pairs of a right and a wrong sample" in capsys.readouterr().out
    asked = {}
    for split in ("train", "val"):
        prompts = [BYTE.decode(pair.prompt) for pair in task.pairs[split]]
        asked[split] = {prompt.count("SFT: ") for prompt in prompts}
    # SFT's problems and those that it never saw; held-out ones for validation
    assert asked == {"train": {0, 1}, "val": {0}}
    monkeypatch.setattr(solutions, "generate", canned(["#### 99"]))
    with pytest.raises(UserError, match="both a right and a wrong sample"):
        build(config(tmp_path, "dpo", on_policy=True, n_samples=3, seed=5), tiny())


@pytest.mark.parametrize(
    "mode, file",
    [
        ("sft", "problems_test.jsonl"),
        ("rl", "problems_test.jsonl"),
        ("verifier", "problems_test.jsonl"),
        ("verifier", "test.jsonl"),
    ],
)
def test_training_on_an_evaluation_problem_is_refused(tmp_path, mode, file):
    """In another case and spacing too, and where only published solutions are at hand."""
    data_dir = Path(world(tmp_path / "data", chats=[*CHATS, chat(PROBLEMS[3]["question"], "4")]))
    write_jsonl(
        str(data_dir / "exam" / file),
        [{"question": f"  {PROBLEMS[3]['question'].upper()} ", "answer": "#### 4"}],
    )
    words = r"1 of [36] training records of mini ask a question of .*exam"
    with pytest.raises(UserError, match=words):
        build(config(tmp_path, mode, str(data_dir)), tiny(score_head=mode == "verifier"))


# ------------------------------------------------------------------------------------------------
# Verifier


def canned(texts):
    """A generate() that answers every prompt with the next of texts."""

    def generate(model, prompts, *args, **kwargs):
        return [[*texts[i % len(texts)].encode(), END] for i in range(len(prompts))]

    return generate


def test_verifier_loss_is_binary_cross_entropy_over_solution_tokens():
    """-log s(score) where the solution is right, -log s(-score) where it is wrong, summed.

    Unlabelled tokens are out, whatever their score.
    """
    scores = torch.tensor([[2.0, -1.0, 9.0], [0.5, 3.0, -9.0]])
    labels = torch.tensor([[1, 0, -1], [0, 1, -1]])
    wanted = -log_sigmoid(2.0) - log_sigmoid(1.0) - log_sigmoid(-0.5) - log_sigmoid(3.0)
    assert align.verifier_loss(scores, labels).item() == pytest.approx(wanted, rel=1e-6)


def alone(verifier, ids, n_prompt: int):
    """Scores (T,) of one unpacked document whose first n_prompt ids are the prompt."""
    idx = torch.tensor([ids])
    return verifier.scores(verifier.hidden(idx), idx, torch.arange(len(ids))[None] >= n_prompt)[0]


def test_the_verifier_task_adds_both_losses_of_separate_documents(judged):
    """Score loss plus lm_coef times language-model loss; packed documents do not see each other."""
    model = tiny(seed=3, score_head=True)
    batch = judged.batch("val", 0, judged.n_val_rows)
    objective, sums = judged.loss(model, batch)
    bce = 0.0
    for context, label in supervised(batch, "labels"):
        score = alone(model, context, len(QUESTION))[-1].item()
        bce -= log_sigmoid(score if label else -score)
    lm = -plain_logprobs(model, [*QUESTION, 114, END])[-2:].sum().item()
    assert sums["loss"].item() == pytest.approx(bce, rel=1e-4)
    assert sums["lm_loss"].item() == pytest.approx(lm, rel=1e-4)
    assert objective.item() == pytest.approx(bce + lm, rel=1e-4)
    judged.cfg.lm_coef = 0.25
    assert judged.loss(model, batch)[0].item() == pytest.approx(bce + 0.25 * lm, rel=1e-4)


def test_verifier_scores_are_trained_where_evaluation_reads_them(judged):
    """A score read at a token that never had a label would be noise."""
    verifier, solution = tiny(seed=3, score_head=True), {"ids": [121, 122, END], "text": "yz"}
    score_solutions(verifier, BYTE, [{"question": "q", "solutions": [solution]}])
    ids = [*QUESTION, *solution["ids"]]
    scores = alone(verifier, ids, len(QUESTION)).tolist()
    (read,) = [
        t for t, score in enumerate(scores) if score == pytest.approx(solution["score"], abs=1e-5)
    ]
    labels = supervised(judged.batch("train", 0, len(judged.packed["train"].rows)), "labels")
    trained = {context for context, _ in labels}
    assert tuple(ids[: read + 1]) in trained


def test_samples_are_labelled_by_their_final_answer(tmp_path, monkeypatch):
    """Right is what GSM8K counts as right: the number after ####, whatever the way to it."""
    monkeypatch.setattr(solutions, "generate", canned(["nonsense\n#### 1", "1+0=1\n#### 2", "1"]))
    parts = config(
        tmp_path,
        "verifier",
        world(tmp_path / "data", problems=PROBLEMS[:1]),
        n_samples=3,
        seq_len=64,
    )
    task = build(parts, tiny(score_head=True))
    labels = {
        BYTE.decode([i for i in d["ids"] if i < 256]).removeprefix("1+0?"): max(d["labels"])
        for d in task.packed["train"].documents
    }
    assert labels == {"nonsense\n#### 1": 1, "1+0=1\n#### 2": 0, "1": 0, "1+0=1\n#### 1": -1}


def test_samples_are_labelled_by_value(tmp_path, monkeypatch):
    """A right answer in another dress is no wrong one, and a part of a number is no number.

    The file keeps the strict rule, by which generations are counted everywhere.
    """
    right = ["#### 1,234.00", "#### $1234", "#### 1 234", "####1234.", "#### 1,234 apples"]
    wrong = ["1234", "#### 1234-1240", "#### 1234/2", "#### 12:34", "#### 1,23,4", "#### -1234"]
    monkeypatch.setattr(solutions, "generate", canned(right + wrong))
    problems = [{"question": "q", "answer": "#### 1234"}]
    data = world(tmp_path / "data", problems=problems)
    parts = config(tmp_path, "verifier", data, n_samples=len(right + wrong), seq_len=64)
    task = build(parts, tiny(score_head=True))
    labels = {}
    for document in task.packed["train"].documents:
        text = BYTE.decode([i for i in document["ids"] if i < 256]).removeprefix("q")
        labels[text] = max(document["labels"])
    expected = dict.fromkeys(right, 1) | dict.fromkeys(wrong, 0) | {"#### 1234": -1}
    assert labels == expected
    rows = read_jsonl(os.path.join(parts[0].out_dir, files_of(parts, "samples_")[0]))
    strict = {s["text"] for s in rows[0]["solutions"] if s["correct"]}
    assert strict == {"#### 1,234 apples", "#### 1234-1240", "#### 1234/2", "#### 1,23,4"}


@pytest.mark.parametrize("mode", ["verifier", "dpo"])
def test_problems_without_room_for_an_answer_are_left_out_aloud(
    tmp_path, monkeypatch, capsys, mode
):
    """A question that lost its beginning teaches nothing; none that fits is an error in words."""
    monkeypatch.setattr(solutions, "generate", canned(["#### 1", "#### 2"]))
    problems = [
        {"question": f"{'long ' * 15 * (i == 2)}1+{i}?", "answer": f"#### {1 + i}"}
        for i in range(4)
    ]
    how = {"on_policy": True} if mode == "dpo" else {}
    data = world(tmp_path / "data", problems=problems)
    parts = config(tmp_path, mode, data, n_samples=2, **how)
    build(parts, tiny(score_head=mode == "verifier"))
    said = capsys.readouterr().out
    assert "problems: 1 of 4 are longer than seq_len=64 tokens and dropped" in said
    for name in files_of(parts, "samples_"):
        rows = read_jsonl(os.path.join(parts[0].out_dir, name))
        assert len(rows) == 3 and not any("long" in row["question"] for row in rows)
    model = tiny(score_head=mode == "verifier", seq_len=6)
    fails(lambda: build(parts, model), "problems: all 4 are longer than seq_len=6")


def test_samples_are_kept_and_read_by_the_second_start(tmp_path, monkeypatch):
    """A restart must neither pay for the samples again nor train on others."""
    monkeypatch.setattr(solutions, "generate", canned(["#### 1", "#### 2"]))
    parts, model = config(tmp_path, "verifier", n_samples=2), tiny(score_head=True)
    first = build(parts, model)
    files = files_of(parts, "samples_")
    assert len(files) == 2
    assert len(read_jsonl(os.path.join(parts[0].out_dir, files[1]))) == len(PROBLEMS)

    def again(*args, **kwargs):
        raise AssertionError("sampled again")

    monkeypatch.setattr(solutions, "generate", again)
    assert build(parts, model).fingerprint == first.fingerprint
    with pytest.raises(AssertionError, match="sampled again"):
        build(config(tmp_path, "verifier", parts[0].data_dir, n_samples=2, temperature=0.5), model)
    with pytest.raises(AssertionError, match="sampled again"):
        build(parts, tiny(seed=1, score_head=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_samples_come_from_weights_of_the_compute_dtype(tmp_path, monkeypatch, dtype):
    """A token reads every weight once: half the bytes, twice the speed. What is trained stays."""
    used, write = [], canned(["#### 1", "#### 2"])

    def generate(model, *args, **settings):
        used.append(model.embed.weight.dtype)
        return write(model, *args, **settings)

    monkeypatch.setattr(solutions, "generate", generate)
    model = tiny(score_head=True)
    build(config(tmp_path, "verifier", n_samples=2, dtype=dtype), model)
    assert set(used) == {getattr(torch, dtype)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_score_head_is_the_only_new_parameter(tmp_path):
    """The verifier begins as its starting model, and its scores as that one's log-likelihoods."""
    start = load_checkpoint(save_start(tmp_path / "start", tiny()))
    model = model_from(start, score_head=True)
    state = model.state_dict()
    assert set(state) - set(start["model"]) == {"score.weight", "score_loglik"}
    assert all(torch.equal(state[name], x) for name, x in start["model"].items())
    wanted = plain_logprobs(model, [1, 2, 3, 4])[1:].cumsum(0)
    torch.testing.assert_close(alone(model, [1, 2, 3, 4], 2)[2:], wanted)


def test_the_scores_of_long_solutions_begin_small(tmp_path, monkeypatch):
    """Log-likelihoods of -100 taken as logits would be a loss of 100 for every right solution.

    Narrow ones are taken as they are.
    """
    long = "a much longer way to the answer, with words and words\n#### 2"
    monkeypatch.setattr(solutions, "generate", canned(["#### 1", long]))
    model = tiny(score_head=True)
    model.score.weight.data.zero_()
    task = build(config(tmp_path, "verifier", n_samples=2, seq_len=128), model)
    judged = [d for d in task.packed["train"].documents if max(d["labels"]) >= 0]
    scores = []
    for d in judged:
        n = sum(label >= 0 for label in d["labels"])
        scores.append(alone(model, d["ids"][:-1], len(d["ids"]) - 1 - n)[-1].item())
    scores = torch.tensor(scores)
    assert scores.std(correction=0).item() == pytest.approx(2.0, abs=0.01)
    monkeypatch.setattr(solutions, "generate", canned(["#### 1", "#### 2"]))
    fresh = GPT(tiny(score_head=True).cfg)  # every id is about equally likely
    build(config(tmp_path, "verifier", n_samples=2, seq_len=128), fresh)
    assert fresh.score_loglik.item() == 1


@pytest.mark.parametrize(
    "texts,said",
    [(["no"], True), (["#### 1", "#### 2", "#### 3", "#### 4", "#### 5", "#### 6"], False)],
)
def test_nothing_to_rerank_is_said_aloud(tmp_path, monkeypatch, capsys, texts, said):
    """With no right sample, or only right ones, no verifier can help: the user should hear it."""
    monkeypatch.setattr(solutions, "generate", canned(texts))
    build(config(tmp_path, "verifier", n_samples=6), tiny(score_head=True))
    assert ("nothing to rerank" in capsys.readouterr().out) is said


# ------------------------------------------------------------------------------------------------
# The program


def flags(tmp_path: Path, mode: str, **changes) -> list[str]:
    values = {
        "mode": mode,
        "data": "mini",
        "data_dir": tmp_path / "data",
        "init_from": tmp_path / "start",
        "out_dir": tmp_path / f"out_{mode}",
        "device": "cpu",
        "dtype": "float32",
        "max_steps": 4,
        "save_interval": 2,
        "eval_interval": 2,
        "log_interval": 1,
        "batch_tokens": 256,
        "micro_batch": 4,
        "max_new_tokens": 4,
        "optimizer": "adamw",
        **({} if mode == "sft" else {"n_samples": 2}),
        **({"n_problems": 4} if mode == "rl" else {}),
        **changes,
    }
    if mode == "rl":
        values.pop("batch_tokens")
    return [f"--{key}={value}" for key, value in values.items()]


@pytest.mark.parametrize("mode", ["sft", "dpo", "verifier"])
def test_each_mode_leaves_a_checkpoint_that_says_where_it_comes_from(tmp_path, mode):
    """Tokenizer, template and the hash of the starting weights travel with the weights.

    A finished run is left alone.
    """
    world(tmp_path / "data")
    start = load_checkpoint(save_start(tmp_path / "start", tiny()))
    assert align.main(flags(tmp_path, mode)) == 0
    saved = load_checkpoint(str(tmp_path / f"out_{mode}"))
    assert (saved["task"], saved["step"]) == (mode, 4)
    assert (saved["template"], saved["tokenizer"]) == (CHAT_1, BYTE.spec())
    assert saved["init_from"]["weights_hash"] == start["weights_hash"] != saved["weights_hash"]
    model_from(saved)
    out, names = tmp_path / f"out_{mode}", align.TASKS[mode].metrics
    keys = {key for row in read_log(str(out / "metrics.jsonl")) for key in row}
    assert keys >= {*names, *(f"val_{name}" for name in names)}
    before = {path: path.read_bytes() for path in sorted(out.iterdir())}
    assert align.main(flags(tmp_path, mode)) == 0
    assert {path: path.read_bytes() for path in sorted(out.iterdir())} == before


def test_a_resumed_dpo_refuses_a_starting_checkpoint_that_has_changed(tmp_path):
    """The starting weights are the reference: with others the objective would be another."""
    world(tmp_path / "data")
    save_start(tmp_path / "start", tiny())
    align.main(flags(tmp_path, "dpo"))
    os.remove(checkpoint_files(str(tmp_path / "out_dpo"))[0])
    os.remove(tmp_path / "out_dpo" / "state.json")
    save_start(tmp_path / "start", tiny(seed=1))
    with pytest.raises(UserError):
        align.main(flags(tmp_path, "dpo"))


@pytest.mark.parametrize("mode", ["sft", "dpo", "rl", "verifier"])
def test_a_run_is_stale_when_its_start_has_other_weights(tmp_path, mode):
    """Finished or not it is refused by name; --force makes it again, and then it is done."""
    world(tmp_path / "data")
    save_start(tmp_path / "start", tiny())
    assert align.main(flags(tmp_path, mode)) == 0
    old = load_checkpoint(str(tmp_path / f"out_{mode}"))["weights_hash"]
    save_start(tmp_path / "start", tiny(seed=1))
    refused(flags(tmp_path, mode), f"out_{mode}", "stale", "start", "--force")
    os.remove(tmp_path / f"out_{mode}" / "state.json")
    os.remove(checkpoint_files(str(tmp_path / f"out_{mode}"))[0])
    refused(flags(tmp_path, mode), "stale")
    assert align.main([*flags(tmp_path, mode), "--force"]) == 0
    assert load_checkpoint(str(tmp_path / f"out_{mode}"))["weights_hash"] != old
    assert align.main(flags(tmp_path, mode)) == 0


def test_the_start_may_be_named_in_another_way(tmp_path, monkeypatch):
    """A slash, an absolute path, a run's name, its file: the weights count, when a run goes on."""
    world(tmp_path / "data")
    start = tmp_path / "out/start"
    save_start(start, tiny())
    monkeypatch.chdir(tmp_path)
    assert align.main(flags(tmp_path, "sft", init_from="start")) == 0
    out = tmp_path / "out_sft"
    last = load_checkpoint(str(out))["weights_hash"]
    for ref in ("out/start", "out/start/", start, start / "ckpt_0000007.pt", "out/../out/start"):
        os.remove(checkpoint_files(str(out))[0])
        assert align.main(flags(tmp_path, "sft", init_from=ref)) == 0
        assert load_checkpoint(str(out))["weights_hash"] == last
        before = {path: path.read_bytes() for path in out.iterdir()}
        assert align.main(flags(tmp_path, "sft", init_from=ref)) == 0
        assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("given", [[], ["--out_dir=out/pretrain"]])
def test_without_an_out_dir_a_run_goes_beside_its_start(tmp_path, monkeypatch, given):
    """Never to out/pretrain, where train.py's own run may be."""
    world(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    save_start(tmp_path / "out/pretrain", tiny())
    argv = [
        flag for flag in flags(tmp_path, "sft", init_from="out/pretrain") if "out_dir" not in flag
    ]
    before = sorted(os.listdir("out/pretrain"))
    assert align.main(argv + given) == 0
    assert sorted(os.listdir("out/pretrain")) == before
    assert json.loads(Path("out/sft/config.json").read_text())["out_dir"] == "out/sft"


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_stage_over_its_own_start_is_refused_and_changes_nothing(tmp_path, force):
    """--force would delete the checkpoint before the first step; it is never recommended."""
    world(tmp_path / "data")
    save_start(tmp_path / "start", tiny())
    before = {path: path.read_bytes() for path in (tmp_path / "start").iterdir()}
    argv = [*flags(tmp_path, "dpo", out_dir=f"{tmp_path}/start/"), *force]
    with pytest.raises(UserError, match="lies inside its own out_dir") as caught:
        align.main(argv)
    assert "--force" not in str(caught.value)
    assert {path: path.read_bytes() for path in (tmp_path / "start").iterdir()} == before


@pytest.mark.parametrize("mode", ["sft", "dpo"])
def test_done_means_with_the_comparison_of_answers(tmp_path, mode):
    """Killed after its last checkpoint a stage makes up for it; trained is nothing more."""
    world(tmp_path / "data")
    save_start(tmp_path / "start", tiny())
    argv, out = flags(tmp_path, mode), tmp_path / f"out_{mode}"
    assert align.main(argv) == 0
    answered, log = (out / "answers.json").read_bytes(), untimed(out)
    last = load_checkpoint(str(out))["weights_hash"]
    os.remove(out / "answers.json")
    assert align.main(argv) == 0
    assert (out / "answers.json").read_bytes() == answered and untimed(out) == log
    assert load_checkpoint(str(out))["weights_hash"] == last
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert align.main(argv) == 0
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_stage_without_answers_to_compare_is_done_too(tmp_path, capsys):
    """n_answers=0 asks for none, and where no prompt fits there are none: neither runs for ever."""
    world(tmp_path / "data", chats=[chat("long " * 5, "b")] * 4)
    save_start(tmp_path / "start", tiny(seq_len=24))
    for n, name in ((0, "none"), (3, "no room")):
        out = tmp_path / name
        argv = flags(tmp_path, "sft", out_dir=out, n_answers=n, seq_len=64)
        assert align.main(argv) == 0 and (out / "answers.json").exists() == bool(n)
        dropped = "sft prompts: 4 of 4 are longer than seq_len=24"
        assert (dropped in capsys.readouterr().out) == bool(n)
        before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
        assert align.main(argv) == 0
        assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def refused(argv: list[str], *words: str) -> None:
    fails(lambda: align.main(argv), *words)


def test_missing_start_and_unknown_choices_are_errors_in_words(tmp_path):
    """A typing mistake costs a sentence, and is found before anything is loaded."""
    refused(["--mode=sft"], "init_from is missing")
    refused(["--mode=ppo", "--init_from=x"], "mode must be one of sft, dpo, rl, verifier", "'ppo'")
    refused(
        ["--mode=dpo", "--init_from=x", "--loss_type=hinge"],
        "loss_type must be one of sigmoid, ipo, simpo",
        "'hinge'",
    )
    refused(
        ["--mode=dpo", "--init_from=x", "--beta=0", "--label_smoothing=0.5"],
        "beta must be above 0",
        "label_smoothing must be in [0, 0.5)",
    )
    refused(["--mode=dpo", "--init_from=x", "--betta=0.2"], "unknown key 'betta'", "beta")


@pytest.mark.parametrize(
    "mode, flag, words",
    [
        ("sft", "--beta=3", "unknown key 'beta'"),
        ("sft", "--n_samples=2", "unknown key 'n_samples'"),
        ("rl", "--replay=0.5", "unknown key 'replay'"),
        ("verifier", "--rpo_alpha=1", "unknown key 'rpo_alpha'"),
        ("dpo", "--level=token", "unknown key 'level'"),
    ],
)
def test_a_key_of_another_mode_is_refused(mode, flag, words):
    """It would have no effect, and whoever sets it believes that it has one."""
    refused([f"--mode={mode}", "--init_from=x", flag], words)


@pytest.mark.parametrize(
    "mode, flag",
    [
        ("sft", "--replay=1"),
        ("sft", "--seq_len=0"),
        ("sft", "--n_answers=-1"),
        ("dpo", "--simpo_gamma=-1"),
        ("dpo", "--rpo_alpha=-1"),
        ("dpo", "--max_new_tokens=0"),
        ("rl", "--n_samples=1"),
        ("rl", "--temperature=0"),
        ("rl", "--clip=1"),
        ("rl", "--clip_high=0"),
        ("rl", "--epochs=0"),
        ("verifier", "--n_samples=0"),
        ("verifier", "--n_problems=0"),
        ("verifier", "--temperature=-1"),
        ("verifier", "--lm_coef=-1"),
        ("verifier", "--level=word"),
    ],
)
def test_every_number_has_its_bounds(mode, flag):
    """A value that no run can have is found before anything is loaded, and named."""
    key, _, value = flag[2:].partition("=")
    refused([f"--mode={mode}", "--init_from=x", flag], f"{key} must be", value)


def test_a_checkpoint_that_does_not_exist_is_an_error_in_words(tmp_path):
    """The message says where the program has looked."""
    world(tmp_path / "data")
    refused(flags(tmp_path, "sft"), "no checkpoint at", tmp_path / "start")
    assert not (tmp_path / "out_sft").exists()


def test_a_checkpoint_of_another_tokenizer_is_refused(tmp_path):
    """The same id would be another word: the loss would be poor and nothing would say why."""
    world(tmp_path / "data")
    save_start(
        tmp_path / "start",
        tiny(),
        tokenizer={"name": "byte", "hash": "0123456789abcdef", "vocab_size": 262},
    )
    refused(flags(tmp_path, "sft"), "tokenizer", "0123456789abcdef")


def test_a_checkpoint_of_another_template_is_refused(tmp_path):
    """Template of training and of use must agree: a mismatch costs accuracy without a word."""
    world(tmp_path / "data")
    save_start(tmp_path / "start", tiny(), template="chat-0")
    refused(flags(tmp_path, "sft"), "chat-0", CHAT_1)


# ------------------------------------------------------------------------------------------------
# Killed and resumed

TIMES = ("step_ms", "tokens_per_s", "eta_s", "sampled_per_s")


def untimed(folder: Path) -> list[dict]:
    """The metrics without the times."""
    rows = read_log(str(folder / "metrics.jsonl"))
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def last_step(folder: Path) -> int:
    rows = read_log(str(folder / "metrics.jsonl"))
    return max((row["step"] for row in rows), default=-1)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile on the CPU needs a C++ compiler"
)
@pytest.mark.parametrize("mode, recompute", [("sft", True), ("dpo", False), ("verifier", False)])
def test_the_compiled_objective_equals_the_eager_one(tmp_path, monkeypatch, mode, recompute):
    """The H100 recipes compile both as one module: loss and gradients may not change."""
    monkeypatch.setattr(solutions, "generate", canned(["#### 1", "#### 2"]))
    model = tiny(score_head=mode == "verifier")
    changes = {"sft": {}, "dpo": {"rpo_alpha": 1.0}, "verifier": {"n_samples": 2}}[mode]
    task = build(config(tmp_path, mode, seq_len=64, **changes), model)
    model.recompute, batch, found = recompute, task.batch("train", 0, 2), []
    for step in (TrainStep(model, task), torch.compile(TrainStep(model, task), dynamic=False)):
        model.zero_grad()
        objective, *_ = step(batch)
        objective.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([objective.detach(), *grads])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sft", "dpo", "verifier"])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path, mode):
    """kill -9 costs the steps since the last checkpoint and changes nothing else, to the bit."""
    chats = [chat(f"question {i}", "answer " * (1 + i % 5)) for i in range(40)]
    pairs = []
    for n in range(6):
        pairs += [{**pair, "prompt": user_turn(f"{i} {n}")} for i, pair in enumerate(PAIRS)]
    world(tmp_path / "data", chats=chats, pairs=pairs)
    save_start(tmp_path / "start", tiny(d_model=64, seq_len=64))
    options = {
        "max_steps": 20,
        "save_interval": 10,
        "eval_interval": 10,
        "batch_tokens": 2048,
        "optimizer": "muon",
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert align.main(flags(tmp_path, mode, out_dir=whole, **options)) == 0

    command = [
        sys.executable,
        str(ROOT / "align.py"),
        *flags(tmp_path, mode, out_dir=broken, **options),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        limit = time.time() + 120
        while last_step(broken) < 12:
            assert process.poll() is None, process.stderr.read().decode()
            assert time.time() < limit, "too slow"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -9
    assert os.path.basename(checkpoint_files(str(broken))[0]) == "ckpt_0000010.pt"
    assert json.loads((broken / "state.json").read_text())["state"] == "running"

    assert align.main(flags(tmp_path, mode, out_dir=broken, **options)) == 0
    assert untimed(broken) == untimed(whole) and last_step(whole) == 20
    a, b = (load_checkpoint(str(folder)) for folder in (whole, broken))
    assert a["step"] == b["step"] == 20 and a["weights_hash"] == b["weights_hash"]
    assert re.fullmatch("[0-9a-f]{16}", a["weights_hash"])
