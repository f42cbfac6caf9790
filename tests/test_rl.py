"""RL: the loss on numbers by hand, which answers take part, and that kills change nothing.

The answers of a small random model are right where their first id is even: then half of them are.
"""

import math
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import BYTE, END, ROOT, fails, metrics, save_start, tiny
from test_align import build, config, flags, untimed, world
from test_train import torchrun

import align
from corpus.tokenizer import CHAT_1
from inference import solutions
from inference.rollouts import NOBODY, answer_rows, group_advantages, own_ids, with_signal
from inference.scoring import policy_loss
from inference.solutions import Calculator
from runtime.checkpoint import checkpoint_files, load_checkpoint
from train import TrainStep


def even(ids, answer, ending) -> dict:
    return {"ids": ids, "text": "", "stopped": ending(ids), "correct": ids[0] % 2 == 0}


@pytest.fixture
def even_is_right(monkeypatch):
    monkeypatch.setattr(solutions, "checked", even)


def rl(tmp_path: Path, model=None, **changes) -> align.RL:
    changes = {"n_problems": 4, "n_samples": 3, "max_new_tokens": 6, **changes}
    return build(config(tmp_path, "rl", **changes), model or tiny())


# ------------------------------------------------------------------------------------------------
# The loss


def test_an_advantage_is_the_distance_to_the_mean_of_the_group():
    """Dr. GRPO's by hand, and GRPO's with the unbiased deviation; equal rewards teach nothing."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    plain = [[0.5, -0.5, -0.5, 0.5], [0.0] * 4, [-0.25, -0.25, -0.25, 0.75]]
    assert group_advantages(rewards, scaled=False).tolist() == plain
    deviations = [math.sqrt(1 / 3), 0.0, 0.5]
    for own, wanted, d in zip(group_advantages(rewards, True), plain, deviations, strict=True):
        assert own.tolist() == pytest.approx([x / (d + 1e-4) for x in wanted], rel=1e-5)


def plain_loss(policy, old, reference, advantages, sampled, cfg, longest) -> list[float]:
    """Token by token, in numbers."""
    losses = []
    for row, A in enumerate(advantages.tolist()):
        own = []
        for t in range(policy.size(1)):
            if not sampled[row, t]:
                continue
            p, q = policy[row, t].item(), old[row, t].item()
            r = math.exp(p - q)
            high = cfg.clip if cfg.clip_high is None else cfg.clip_high
            loss = -min(r * A, min(max(r, 1 - cfg.clip), 1 + high) * A)
            if reference is not None:
                d = reference[row, t].item() - p
                loss += cfg.beta * (math.exp(d) - d - 1)
            own.append(loss)
        losses.append(sum(own) / (len(own) if cfg.loss_type == "grpo" else longest))
    return losses


def numbers(seed: int) -> tuple:
    torch.manual_seed(seed)
    policy = -3 * torch.rand(5, 7, dtype=torch.float64)
    old, reference = (policy + 0.5 * torch.randn_like(policy) for _ in range(2))
    sampled = torch.rand(5, 7) < 0.6
    sampled[:, 3] = True
    return policy, old, reference, torch.randn(5, dtype=torch.float64), sampled


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo"])
@pytest.mark.parametrize("clip_high", [None, 0.5])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_loss_is_the_papers_token_by_token(loss_type, clip_high, beta):
    """Value, and what is clipped has no gradient in the direction in which it went."""
    cfg = SimpleNamespace(clip=0.2, clip_high=clip_high, beta=beta, loss_type=loss_type)
    for seed in range(5):
        policy, old, reference, advantages, sampled = numbers(seed)
        some = (old, reference if beta else None, advantages, sampled, cfg, 9)
        policy.requires_grad_()
        loss, means = policy_loss(policy, *some)
        assert loss.tolist() == pytest.approx(plain_loss(policy, *some), rel=1e-9)
        found = torch.autograd.grad(loss.sum(), policy)[0]
        assert (found[~sampled] == 0).all()
        ratio, A = (policy - old).exp(), advantages[:, None].expand_as(policy)
        high = 1 + (0.2 if clip_high is None else clip_high)
        clipped = sampled & (((A > 0) & (ratio > high)) | ((A < 0) & (ratio < 0.8)))
        shares = clipped.sum(1) / sampled.sum(1)
        assert means["clipped"].tolist() == pytest.approx(shares.tolist()) and clipped.any()
        if not beta:
            assert (found[clipped] == 0).all() and (found[sampled & ~clipped] != 0).all()


def test_the_gradient_of_the_first_step_is_the_policy_gradient():
    """With the log-probs of now as the old ones: A times the gradient of log p, by a constant."""
    policy, _, _, advantages, sampled = numbers(0)
    policy.requires_grad_()
    cfg = SimpleNamespace(clip=0.2, clip_high=None, beta=0.0, loss_type="dr_grpo")
    loss, _ = policy_loss(policy, policy.detach(), None, advantages, sampled, cfg, 9)
    found = torch.autograd.grad(loss.sum(), policy)[0]
    torch.testing.assert_close(found, -advantages[:, None] * sampled / 9)


# ------------------------------------------------------------------------------------------------
# The answers of a step


def test_what_the_calculator_wrote_is_not_learned():
    """Its ids follow the = of an open <<, and the model goes on behind >>."""
    text = "2 + 3 = <<2+3=5>>5, and <<5*2=10>>10"
    ids = [*BYTE.encode(text), END]
    own = own_ids(ids, Calculator(BYTE))
    hidden = "".join(chr(a) if b < 0 else " " for a, b in zip(ids, own, strict=True))
    assert hidden.split() == ["5>>", "10>>"]
    assert own_ids(ids, None) == ids


def test_groups_whose_answers_are_all_worth_the_same_are_dropped_aloud(tmp_path, capsys):
    """They have no gradient, and would only cost a pass."""
    parts = config(tmp_path, "rl", n_problems=3, n_samples=2, log_interval=1)
    task = build(parts, tiny())

    def solved(problems, *args):
        answer = {"ids": [65, END], "text": "", "stopped": True}
        return [
            {**row, "solutions": [{**answer, "correct": c == 1, "reward": float(c)} for c in own]}
            for row, own in zip(problems, [(1, 1), (0, 1), (0, 0)], strict=True)
        ]

    task.solved = solved
    batch = task.batch("train", 0, 6)
    assert batch["advantages"].tolist() == [-0.5, 0.5]
    assert batch["accuracy"].tolist() == [1, 1, 0, 1, 0, 0]
    assert batch["signal"][0].item() == pytest.approx(1 / 3)
    out = capsys.readouterr().out
    assert "6 answers to 3 problems, 50.0% right; 2 problems dropped, 1 always solved and 1" in out


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_parts_of_a_step_have_every_answer_with_signal_once(ranks):
    """Whatever the number of ranks and the size of a micro-step, and about as many in each."""
    for n_kept in range(13):
        answers = []
        for i in range(12):
            some = {"prompt": [1] * (i % 5 + 1), "ids": [i, END], "targets": [i, END]}
            answers.append({**some, "advantage": float(i < n_kept)})
        kept = with_signal(answers, ranks)
        for size in (1, 2, 5, 12):
            found = []
            for first in range(0, 12, size):
                last = min(first + size, 12)
                part = kept[-(-first * len(kept) // 12) : -(-last * len(kept) // 12)]
                assert abs(len(part) - (last - first) * n_kept / 12) < 1
                found += part
            assert sorted(answer["ids"][0] for answer in found) == list(range(n_kept))


def test_rows_that_fill_a_batch_up_count_for_nothing():
    answers = [{"prompt": [1, 2], "ids": [3, END], "targets": [3, END], "advantage": 1.0}]
    answers[0]["old"] = torch.tensor([-1.0, -2.0])
    batch = answer_rows([*answers, NOBODY], 6, 0)
    assert batch["targets"].tolist() == [[-1, 3, END, -1, -1, -1], [-1] * 6]
    assert batch["old"].tolist() == [[0, -1, -2, 0, 0, 0], [0] * 6]
    assert batch["advantages"].tolist() == [1, 0]


def gradient(task: align.RL, size: int, step: int = 0) -> torch.Tensor:
    """Return the gradient of a step's mean loss, in micro-steps of a size."""
    model, n = task.setup.model, task.rows_per_step
    model.zero_grad()
    for first in range(step * n, (step + 1) * n, size):
        batch = task.batch("train", first, min(first + size, (step + 1) * n))
        loss, _ = task.loss(model, batch)
        (loss / n).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo"])
def test_the_gradient_of_a_step_by_hand_for_any_micro_batch(
    tmp_path, even_is_right, double, loss_type
):
    """The mean over all answers of the step, those of dropped problems too, of A log p."""
    task = rl(tmp_path, tiny().double(), loss_type=loss_type, micro_batch=12)
    found = [gradient(task, size) for size in (12, 5, 1)]
    model, answers = task.setup.model, task.round["answers"]
    rewards = torch.tensor([answer["reward"] for answer in answers]).view(4, 3).double()
    assert 0 < rewards.mean() < 1 and (rewards.std(1) > 0).any()
    advantages = group_advantages(rewards, loss_type == "grpo").flatten()
    total = 0.0
    for answer, advantage in zip(answers, advantages, strict=True):
        ids = torch.tensor([answer["prompt"] + answer["ids"]])
        logp = model.logits(model.hidden(ids[:, :-1]))[0].log_softmax(-1)
        n = len(answer["ids"])
        own = logp[-n:].gather(1, ids[0, -n:, None]).sum()
        total = total - advantage * own / (n if loss_type == "grpo" else 6)
    model.zero_grad()
    (total / 12).backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    for mine in found:
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-9)


def test_a_second_step_compares_with_the_log_probs_of_the_sampling(tmp_path, even_is_right):
    """The same answers, their old log-probs and not those of the weights of now."""
    task = rl(tmp_path, epochs=2)
    first = task.batch("train", 0, 12)
    torch.testing.assert_close(
        first["old"], task.logprobs(task.setup.model, first).detach(), rtol=1e-5, atol=1e-5
    )
    loss, sums = task.loss(task.setup.model, first)
    loss.backward()
    with torch.no_grad():
        for p in task.setup.model.parameters():
            p -= 0.02 * p.grad.sign()
    second = task.batch("train", 12, 24)
    assert all(second[key].equal(x) for key, x in first.items())
    moved, after = task.loss(task.setup.model, second)
    assert moved < loss and after["clipped"] > sums["clipped"] == 0
    task.batch("train", 24, 36)
    assert task.round["number"] == 1


def test_the_temperature_is_that_of_the_policy(tmp_path, even_is_right):
    """Log-probs of what was sampled at 0.7 are those of the logits over 0.7."""
    task = rl(tmp_path, temperature=0.7)
    batch, model = task.batch("train", 0, 12), task.setup.model
    logp = (model.logits(model.hidden(batch["idx"])) / 0.7).log_softmax(-1)
    own = batch["targets"].clamp(min=0)
    wanted = logp.gather(2, own[..., None])[..., 0] * (batch["targets"] >= 0)
    torch.testing.assert_close(task.logprobs(model, batch), wanted, rtol=1e-5, atol=1e-5)


def test_validation_is_the_mean_reward_of_greedy_answers(tmp_path, even_is_right):
    task = rl(tmp_path)
    batch = task.batch("val", 0, 6)
    how = solutions.Attempts(1, 0.0, 6)
    rows = solutions.solve(task.setup.model, BYTE, task.problems["val"], how, print)
    right = [row["solutions"][0]["correct"] for row in rows]
    assert batch["accuracy"].tolist() == right
    loss, sums = task.loss(task.setup.model, batch)
    assert sums["reward"] == -loss == sum(right) and set(sums) == set(task.val_metrics)


def test_the_reward_of_a_verifier_is_its_probability(tmp_path, even_is_right):
    judge = tiny(seed=1, score_head=True)
    judge.score_loglik.data.zero_()  # of a random model it makes all certain
    folder = save_start(tmp_path, judge, task="verifier")
    task = rl(tmp_path, reward=folder)
    rows = task.solved(task.problems["train"][:3], 0, 2, 1.0)
    found = [s["reward"] for row in rows for s in row["solutions"]]
    align.scoring.score_solutions(judge, BYTE, rows)
    scores = [s["score"] for row in rows for s in row["solutions"]]
    assert found == pytest.approx([1 / (1 + math.exp(-s)) for s in scores]) and len(set(found)) > 1
    start = save_start(tmp_path / "mini", tiny(), task="sft")
    fails(lambda: rl(tmp_path, reward=start), "no verifier", start)


def test_the_pull_to_the_start_is_zero_at_the_start(tmp_path, even_is_right):
    """And grows with the distance; the reference does not move."""
    task = rl(tmp_path, beta=0.5)
    model, batch = task.setup.model, task.batch("train", 0, 12)
    _, sums = task.loss(model, batch)
    assert sums["kl"].abs() < 1e-6
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    assert task.loss(model, batch)[1]["kl"] > 0.01


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile on the CPU needs a C++ compiler"
)
def test_the_compiled_objective_equals_the_eager_one(tmp_path, even_is_right):
    """A compiler gets batches of one shape, however many answers are dropped."""
    task = rl(tmp_path, compile=True, epochs=2, beta=0.1)
    model, found, shapes = task.setup.model, [], set()
    for step in (TrainStep(model, task), torch.compile(TrainStep(model, task), dynamic=False)):
        model.zero_grad()
        for first in (0, 4, 8):
            batch = task.batch("train", first, first + 4)
            shapes.add(batch["idx"].shape)
            step(batch)[0].backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert shapes == {(4, task.width)}
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"fsdp": True}, ["--fsdp", "leave it out"]),
        ({"batch_tokens": 100}, ["batch_tokens=100", "n_problems x n_samples"]),
        ({"seq_len": 32}, ["seq_len=32", "max_new_tokens"]),
        ({"clip": 0.1}, ["clip=0.1", "epochs=1", "raise epochs"]),
        ({"clip_high": 0.3}, ["clip_high=0.3", "epochs=1"]),
        ({"n_problems": 13}, ["n_problems=13", "12"]),
    ],
)
def test_what_rl_cannot_use_is_refused_in_words(tmp_path, changes, words):
    fails(lambda: rl(tmp_path, **changes), *words)


# ------------------------------------------------------------------------------------------------
# The program


def argv(tmp_path: Path, **changes) -> list[str]:
    options = {"n_problems": 4, "n_samples": 3, "max_new_tokens": 6, "keep": 20, **changes}
    return flags(tmp_path, "rl", n_answers=2, **options)


def begun(tmp_path: Path) -> None:
    world(tmp_path / "data")
    save_start(tmp_path / "start", tiny())


def test_the_reward_rises(tmp_path, even_is_right):
    """From half of the answers to nearly all; the losses of the log are those of the step."""
    begun(tmp_path)
    options = {"n_problems": 12, "n_samples": 8, "max_steps": 20, "eval_interval": 20}
    assert align.main(argv(tmp_path, **options, learning_rate=0.02, micro_batch=96)) == 0
    rows = metrics(tmp_path / "out_rl")
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert sum(rewards[:3]) / 3 < 0.7 and sum(rewards[-3:]) / 3 > 0.9
    val = [row["val_accuracy"] for row in rows if "val_accuracy" in row]
    assert val[-1] > 0.9
    assert all(row["reward"] == row["accuracy"] for row in rows if "reward" in row)
    saved, start = (load_checkpoint(str(tmp_path / name)) for name in ("out_rl", "start"))
    assert (saved["task"], saved["step"], saved["template"]) == ("rl", 20, CHAT_1)
    assert saved["init_from"]["weights_hash"] == start["weights_hash"] != saved["weights_hash"]


def test_the_time_of_a_step_is_without_its_sampling(tmp_path, even_is_right, monkeypatch):
    """Both have a speed of their own, and what is left of the run counts both."""
    begun(tmp_path)
    write, real, slept = align.rollouts.rewarded, time.perf_counter, [0.0]

    def slow(*args) -> list[dict]:
        slept[0] += 1e4
        return write(*args)

    monkeypatch.setattr(time, "perf_counter", lambda: real() + slept[0])
    monkeypatch.setattr(align.rollouts, "rewarded", slow)
    assert align.main(argv(tmp_path, max_steps=4, eval_interval=4, micro_batch=12)) == 0
    rows = [row for row in metrics(tmp_path / "out_rl") if "reward" in row]
    for row in rows:
        assert row["step_ms"] < 1e7
        per_s = row["trained"] * 12 / row["step_ms"] * 1e3
        assert row["tokens_per_s"] == pytest.approx(per_s)
    assert rows[0]["eta_s"] > 3 * 1e4


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_run_goes_on_from_any_checkpoint_to_the_same_weights(tmp_path, even_is_right, epochs):
    """Amid a round too, whose answers were written by weights that are gone."""
    begun(tmp_path)
    options = {"max_steps": 5, "save_interval": 1, "epochs": epochs}
    assert align.main(argv(tmp_path, **options)) == 0
    whole = tmp_path / "out_rl"
    last = load_checkpoint(str(whole))["weights_hash"]
    for kept in range(1, 5):
        broken = tmp_path / f"broken_{kept}"
        shutil.copytree(whole, broken)
        for path in checkpoint_files(str(broken))[: 5 - kept]:
            Path(path).unlink()
        assert align.main(argv(tmp_path, **options, out_dir=broken)) == 0
        assert load_checkpoint(str(broken))["weights_hash"] == last
        assert untimed(broken) == untimed(whole)


def run_on_two(folder: str) -> None:
    solutions.checked = even
    align.main(argv(Path(folder), out_dir=f"{folder}/two", max_steps=3, epochs=2))


def test_two_ranks_have_the_result_of_one(tmp_path, even_is_right):
    """The same answers, whoever writes them, and the same steps."""
    begun(tmp_path)
    assert align.main(argv(tmp_path, max_steps=3, epochs=2)) == 0
    script, tests = tmp_path / "script.py", ROOT / "tests"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(tests)!r}]\n"
        "import torch\ntorch.set_num_threads(1)\n"
        f"import test_rl\ntest_rl.run_on_two({str(tmp_path)!r})\n"
    )
    torchrun(script, cwd=tmp_path)
    mine, other = untimed(tmp_path / "two"), untimed(tmp_path / "out_rl")
    for a, b in zip(mine, other, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    a, b = (load_checkpoint(str(tmp_path / name))["model"] for name in ("two", "out_rl"))
    for name, x in a.items():
        torch.testing.assert_close(x, b[name], rtol=1e-3, atol=1e-5)
