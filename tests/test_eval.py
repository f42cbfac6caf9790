"""The program: results that name all that they depend on, and that no accident can spoil."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from corpus_helpers import snapshot
from eval_helpers import ON_REQUEST, make_run, make_stage, results_of
from helpers import fails, save_start, tiny

import eval as evaluation
from configurator import UserError, load
from corpus.tokenizer import load_tokenizer
from evals import stats
from evals.base import ORDER, TASKS, EvalConfig, Row, Subject, load_stages
from evals.results import item_key, read_results, read_stages
from runtime.checkpoint import load_checkpoint, save_checkpoint, weights_hash
from runtime.files import read_jsonl, write_jsonl
from runtime.logs import read_log


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An evaluated run, read only. -> folder, flags"""
    folder = tmp_path_factory.mktemp("eval")
    argv = make_run(folder)
    assert evaluation.main(argv) == 0
    return folder / "run", argv


@pytest.fixture
def run(tmp_path, finished):
    """A run of one's own with two tasks evaluated. -> folder, flags"""
    argv = [*make_run(tmp_path), "--tasks=val_loss,preference"]
    assert evaluation.main(argv) == 0
    return tmp_path / "run", argv


def test_every_result_carries_all_that_is_needed_to_judge_it(finished):
    """A number without protocol, weights and commit is soon the number of something else."""
    folder, _ = finished
    rows = read_results(str(folder))
    fields = {
        "task",
        "model",
        "stage",
        "metric",
        "protocol",
        "version",
        "split",
        "n",
        "value",
        "weights_hash",
        "commit",
        "command",
        "torch",
        "device",
        "seconds",
        "date",
        "settings",
        "step",
        "data_hash",
        "items",
    }
    assert all(fields <= set(row) and row["n"] > 0 for row in rows)
    assert {row["task"] for row in rows} == set(TASKS) - ON_REQUEST
    assert {row["model"] for row in rows} >= {
        "untrained",
        "pretrain",
        "sft",
        "dpo",
        "unigram entropy",
        "longer answer wins",
        "majority class",
        "first three turns",
        "longest turn",
    }
    assert all(
        "low" in row and "high" in row for row in rows if not row["model"].startswith("unigram")
    )
    assert all(
        not row["low"] > row["value"] + 1e-12 and not row["high"] < row["value"] - 1e-12
        for row in rows
        if "low" in row
    )


def test_results_name_the_weights_they_were_computed_with(finished):
    """The hash in a row is that of the checkpoint's tensors, and of nothing else."""
    folder, _ = finished
    rows = read_results(str(folder))
    for stage in ("pretrain", "sft", "dpo"):
        saved = torch.load(folder / stage / "ckpt_0000007.pt", weights_only=True)
        assert {row["weights_hash"] for row in rows if row["stage"] == stage} == {
            weights_hash(saved["model"])
        }
    verifier = weights_hash(
        torch.load(folder / "verifier" / "ckpt_0000007.pt", weights_only=True)["model"]
    )
    assert {row["verifier_hash"] for row in rows if row["task"] == "rerank"} == {verifier}
    assert len({row["weights_hash"] for row in rows}) == 4


def test_the_items_of_a_result_make_up_its_value(finished):
    """Models can be compared item by item only where the value was computed from these items."""
    folder, _ = finished
    rows = [row for row in read_results(str(folder)) if row["task"] not in ("rerank", "published")]
    counted = 0
    for row in rows:
        items = json.loads((folder / row["items"]).read_text()).get(item_key(row))
        if items:
            value = stats.TRANSFORMS[items["transform"]](sum(items["num"]) / sum(items["den"]))
            assert row["value"] == pytest.approx(value, rel=1e-9), row["metric"]
            counted += 1
    assert counted > 0.9 * len(rows)


def test_other_data_of_the_same_name_give_other_results(run):
    """Results are skipped where they exist.

    A file that has changed since is other data, and evaluated again.
    """
    folder, argv = run
    before = len(read_results(str(folder)))
    path = folder.parent / "data" / "toy" / "dpo_test.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert evaluation.main([*argv, "--no_overwrite"]) == 0
    added = read_results(str(folder))[before:]
    assert {row["task"] for row in added} == {"preference"} and {row["n"] for row in added} == {3}


def test_a_folder_of_any_runs_is_evaluated_as_one(tmp_path):
    """A sweep: every run under its own name, beside one untrained row, in the order of the loop."""
    argv = make_run(tmp_path)
    for old, new in (("pretrain", "lr 1e-3"), ("sft", "lr 3e-3")):
        (tmp_path / "run" / old).rename(tmp_path / "run" / new)
    assert evaluation.main([*argv, "--tasks=val_loss"]) == 0
    assert [row["model"] for row in read_results(str(tmp_path / "run"))] == [
        "untrained",
        "unigram entropy",
        "lr 1e-3",
        "lr 3e-3",
        "dpo",
    ]


def test_unknown_protocols_are_an_error_in_words():
    with pytest.raises(UserError, match="unknown protocol per_page; there are per_line"):
        EvalConfig(protocols=("per_page",))


def test_no_overwrite_skips_what_exists_says_so_and_touches_nothing(run, capsys):
    """The same command again is free and ends well."""
    folder, argv = run
    before = snapshot(folder)
    assert evaluation.main([*argv, "--no_overwrite"]) == 0
    assert "nothing to do" in capsys.readouterr().out and snapshot(folder) == before


def test_a_task_names_every_setting_that_it_reads(finished):
    """A number is taken for the same where its settings are.

    One that is read and not named would hand out the number of another.
    """
    _, argv = finished
    more = ["--shots=films-train", "--streaming=toy", "--sentences=Tom", "--n_streams=1"]
    more += ["--problem_shots=shots"]
    cfg = load([*argv, *more], EvalConfig)
    read = set()

    class Recording:
        def __getattr__(self, name):
            read.add(name)
            return getattr(cfg, name)

    # data: for the overlap beside a perplexity
    neutral = {"data_dir", "out_dir", "tokenizer", "device", "dtype", "baselines", "data"}
    subject = Subject(cfg)
    for name in ORDER:
        task = TASKS[name]
        for stage in task.stages(subject, cfg)[-1:] if name != "streaming" else []:
            read.clear()
            task.run(subject, stage, Recording())
            assert read - neutral <= {*task.data, *task.settings}, name


def test_another_setting_evaluates_again_what_it_decides_and_nothing_else(run):
    """Naming a text after the first evaluation must not sample every solution anew."""
    folder, argv = run
    before = len(read_results(str(folder)))
    argv = [*argv[:-1], "--tasks=val_loss,preference,chats", "--no_overwrite"]
    assert evaluation.main([*argv, "--n_chats=2"]) == 0
    assert {row["task"] for row in read_results(str(folder))[before:]} == {"chats"}


def test_problems_that_were_replaced_are_answered_again(run):
    """Old answers must never be counted under the hash of new problems."""
    folder, argv = run
    argv = [*argv[:-1], "--tasks=problems", "--no_overwrite"]
    assert evaluation.main(argv) == 0
    before = len(read_results(str(folder)))
    path = folder.parent / "data" / "toy" / "problems_test.jsonl"
    rows = read_jsonl(str(path))
    rows[0]["question"] = "How many pens are 2 and 2?"
    write_jsonl(str(path), rows)
    assert evaluation.main(argv) == 0
    new = read_results(str(folder))[before:]
    asked = [example["question"] for row in new for example in row.get("examples", [])]
    assert rows[0]["question"] in asked and len({row["data_hash"] for row in new}) == 1


@pytest.mark.parametrize("damage", ["digit", "cut"])
def test_answers_whose_file_has_changed_are_given_again(run, capsys, damage):
    """The cache of answers gave other numbers, silently, when a byte of it was flipped."""
    folder, argv = run
    argv = [*argv[:-1], "--tasks=problems", "--stages=sft"]
    assert evaluation.main(argv) == 0
    (path,) = (folder / "generations").glob("sft_*")
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    changed = whole.replace('"correct": false', '"correct": true', 1)
    path.write_text(changed if damage == "digit" else "".join(lines[1:]))
    assert evaluation.main([*argv, "--force"]) == 0
    assert f"{path} has changed" in capsys.readouterr().out and path.read_text() == whole


def test_rows_that_were_lost_are_measured_again(run):
    """After a full disk 85 of 90 rows were there, and all results were said to exist."""
    folder, argv = run
    path = folder / "results.jsonl"
    whole = {item_key(row) + row["stage"]: row["value"] for row in read_log(str(path))}
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert evaluation.main([*argv, "--no_overwrite"]) == 0
    rows = read_log(str(path))
    assert {item_key(row) + row["stage"]: row["value"] for row in rows} == whole
    assert len(rows) == len(whole)


def test_no_overwrite_adds_only_what_is_missing(run):
    """A new checkpoint in the folder is evaluated, the others are not evaluated again."""
    folder, argv = run
    before = read_results(str(folder))
    os.replace(folder / "dpo" / "ckpt_0000007.pt", folder / "sft" / "ckpt_0000010.pt")
    os.rmdir(folder / "dpo")
    assert evaluation.main([*argv, "--no_overwrite"]) == 0
    after = read_results(str(folder))
    assert after[: len(before)] == before and {row["stage"] for row in after[len(before) :]} == {
        "sft"
    }


def test_by_default_a_second_evaluation_goes_into_a_file_of_its_own(run):
    """Nothing that exists is ever overwritten, not even by the same numbers."""
    folder, argv = run
    before = snapshot(folder)
    assert evaluation.main(argv) == 0
    after = snapshot(folder)
    (new,) = {name for name in set(after) - set(before) if not name.startswith("items_")}
    assert (
        re.fullmatch(r"results_\d{8}_\d{6}\.jsonl", new)
        and json.loads(after[new].splitlines()[0])["items"] in after
    )
    assert {name: after[name] for name in before} == before
    values = [
        [json.loads(line)["value"] for line in after[name].splitlines()]
        for name in (new, "results.jsonl")
    ]
    assert values[0] == values[1]


def test_force_replaces_the_same_results_and_no_others(run):
    """Same task, stage, weights and settings: replaced. Anything else in the file: kept."""
    folder, argv = run
    path = str(folder / "results.jsonl")
    old = [{**row, "date": "long ago"} for row in read_log(path)]
    foreign = {**old[0], "weights_hash": "0123456789abcdef", "value": 17.0}
    write_jsonl(path, [foreign, *old])
    assert evaluation.main([*argv[:-1], "--tasks=val_loss", "--force"]) == 0
    rows = read_log(path)
    assert len(rows) == len(old) + 1 and rows[0] == foreign
    assert all((row["date"] == "long ago") is (row["task"] != "val_loss") for row in rows[1:])


def test_a_run_stands_behind_the_one_it_was_made_from(tmp_path):
    """An imported chat model and its SFT are both of the kind sft; the name sft comes first."""
    for name in ("imported", "sft"):
        (tmp_path / name).mkdir()
    save_start(tmp_path / "imported", tiny(), task="sft")
    origin = load_checkpoint(str(tmp_path / "imported"))["weights_hash"]
    origin = {"ref": str(tmp_path / "imported"), "weights_hash": origin}
    save_start(tmp_path / "sft", tiny(seed=1), task="sft", init_from=origin)
    assert list(load_stages(str(tmp_path))) == ["imported", "sft"]


def test_an_evaluation_holds_no_optimizer_state(run):
    """It is twice as large as the weights; four runs of a real model must fit a laptop."""
    folder = str(run[0])
    saved = load_checkpoint(os.path.join(folder, "dpo"))
    assert "optimizers" in saved
    assert all("optimizers" not in stage for stage in load_stages(folder).values())


@pytest.mark.slow
def test_two_evaluations_at_once_and_a_killed_one_leave_whole_results(tmp_path):
    """The same run evaluated by two processes: every number of both is there.

    A third is killed after its first task: what it has written is whole, its items too, and
    --no_overwrite goes on from there.
    """
    argv = make_run(tmp_path)

    def start(*flags):
        command = [sys.executable, evaluation.__file__, *argv, *flags]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    both = [
        start("--tasks=val_loss,chats", "--no_overwrite"),
        start("--tasks=preference,sst2", "--no_overwrite"),
    ]
    assert [process.wait() for process in both] == [0, 0]
    rows = read_results(str(tmp_path / "run"))
    assert Counter(row["task"] for row in rows) == {
        "val_loss": 5,
        "chats": 20,
        "preference": 10,
        "sst2": 9,
    }
    killed = start("--tasks=text_perplexity,problems,dialogsum", "--no_overwrite")
    for line in killed.stdout:
        if line.startswith("eval text_perplexity"):
            break
    killed.kill()
    killed.wait()
    assert evaluation.main([*argv, "--no_overwrite"]) == 0
    rows = read_results(str(tmp_path / "run"))
    keys = [
        (row["task"], row["model"], row["metric"], row["protocol"], row["split"]) for row in rows
    ]
    assert len(keys) == len(set(keys))
    assert {row["task"] for row in rows} == set(TASKS) - ON_REQUEST
    assert all(
        json.loads((tmp_path / "run" / row["items"]).read_text()) is not None for row in rows
    )


@pytest.mark.parametrize("damage", ["missing", "renamed", "shape"])
def test_a_checkpoint_that_does_not_fit_yields_no_results(run, damage):
    """Weights loaded by half are random weights.

    Figures of such a model were once published as results.
    """
    folder, argv = run
    path = folder / "sft" / "ckpt_0000007.pt"
    saved = torch.load(path, weights_only=True)
    name = "blocks.0.attn.qkv.weight"
    weight = saved["model"].pop(name)
    if damage != "missing":
        saved["model"]["model_state." + name if damage == "renamed" else name] = (
            weight[:-1] if damage == "shape" else weight
        )
    saved.pop("weights_hash")
    save_checkpoint(str(path), saved)
    before = read_results(str(folder))
    with pytest.raises((UserError, RuntimeError), match="qkv"):
        evaluation.main([*argv, "--no_overwrite"])
    assert "sft" not in {row["stage"] for row in read_results(str(folder))[len(before) :]}


def test_wrong_requests_are_errors_in_words(tmp_path):
    """A task that does not exist, flags that contradict each other, a folder that is not there."""
    for argv, words in (
        (["--tasks=val_loss,sst3"], "unknown task sst3"),
        (["--force", "--no_overwrite"], "exclude each other"),
        (["--problem_shots=x", "--problems=x"], "two different sets"),
        (["--baselines=gpt2", "--tasks=val_loss,tales"], "baselines gpt2: they take part in"),
        (
            [
                f"--out_dir={tmp_path / 'nowhere'}",
                f"--data_dir={tmp_path}",
                "--data=x",
                "--problems=x",
                "--pairs=x",
            ],
            "does not exist",
        ),
    ):
        with pytest.raises(UserError, match=words):
            evaluation.main(argv)


def test_nothing_is_measured_under_the_name_of_something_else(tmp_path):
    """A run called untrained would replace the initial weights; no data at all is no success."""
    argv = make_run(tmp_path)
    none = ("data", "problems", "pairs", "chats", "text", "published", "sst2", "dialogues")
    fails(lambda: evaluation.main([*argv, *(f"--{key}=" for key in none)]), "nothing to evaluate")
    (tmp_path / "run" / "sft").rename(tmp_path / "run" / "untrained")
    fails(lambda: evaluation.main([*argv, "--tasks=val_loss"]), "rename that run")
    assert not (tmp_path / "run" / "results.jsonl").exists()


def test_a_single_stage_can_be_evaluated_in_its_own_folder(tmp_path):
    """out_dir may be the folder of one stage: its results lie beside its checkpoint."""
    argv = make_run(tmp_path)
    folder = tmp_path / "run" / "sft"
    assert evaluation.main([f"--out_dir={folder}", *argv[1:], "--tasks=preference"]) == 0
    assert {row["stage"] for row in read_results(str(folder))} == {"untrained", "sft"}


def test_stages_are_known_by_what_they_were_trained_for(tmp_path, capsys):
    """Names say nothing: my_dpo has a reward, my_judge judges, and a second one does so too."""
    argv = make_run(tmp_path)
    names = {"sft": "a_tuned", "dpo": "my_dpo", "verifier": "my_judge"}
    for old, new in names.items():
        (tmp_path / "run" / old).rename(tmp_path / "run" / new)
    dpo = torch.load(tmp_path / "run" / "my_dpo" / "ckpt_0000007.pt", weights_only=True)
    origin = {"ref": "out/gone/dpo", "weights_hash": dpo["weights_hash"]}
    make_stage(tmp_path / "run" / "the_other", 9, "verifier", init_from=origin)
    assert evaluation.main([*argv, "--tasks=rerank,preference"]) == 0
    rows = read_results(str(tmp_path / "run"))
    assert {row["stage"] for row in rows if row["protocol"] == "reward"} == {"my_dpo"}
    assert {row["model"] for row in rows if row["task"] == "rerank"} == {
        "my_dpo judged by my_judge",
        "my_dpo judged by the_other",
    }
    assert len({row["verifier_hash"] for row in rows if row["task"] == "rerank"}) == 2
    assert len({row["items"] for row in rows if row["task"] == "rerank"}) == 2
    assert evaluation.main([*argv, "--tasks=rerank,preference", "--no_overwrite"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_verifier_judges_the_policy_that_it_was_made_from(tmp_path):
    """Not the last one, where it comes from another."""
    argv = make_run(tmp_path)
    sft = torch.load(tmp_path / "run" / "sft" / "ckpt_0000007.pt", weights_only=True)
    origin = {"ref": "sft", "weights_hash": sft["weights_hash"]}
    make_stage(tmp_path / "run" / "of_sft", 9, "verifier", init_from=origin)
    assert evaluation.main([*argv, "--tasks=rerank"]) == 0
    judged = {
        (row["model"], row["verifier_hash"]) for row in results_of(tmp_path / "run", "rerank")
    }
    assert {model for model, _ in judged} == {"sft", "dpo"} and len(judged) == 2


def test_every_run_is_read_with_its_own_tokenizer(tmp_path, capsys):
    """A byte run beside a run of the toy words: each gets the numbers that it has alone."""
    argv = make_run(tmp_path)
    toy = load_tokenizer("toy")
    sizes = {"vocab_size": toy.vocab_size, "seq_len": 64}
    folder = tmp_path / "run" / "of_words"
    config = {"data": "words"}  # shards that are not here
    make_stage(folder, 5, "pretrain", fields=sizes, tokenizer=toy.spec(), train_config=config)
    tasks = "--tasks=text_perplexity,chats,val_loss"
    assert evaluation.main([*argv, tasks]) == 0
    said = capsys.readouterr().out
    assert "val_loss of of_words is left out: shard" in said and "another tokenizer" in said

    def numbers(where, stage):
        rows = [row for row in read_results(str(where)) if row["stage"] == stage]
        return {(row["task"], row["metric"], row["protocol"]): row["value"] for row in rows}

    both = {stage: numbers(tmp_path / "run", stage) for stage in ("of_words", "sft")}
    (tmp_path / "alone").mkdir()
    os.replace(folder, tmp_path / "alone" / "of_words")
    alone = [f"--out_dir={tmp_path / 'alone'}", *argv[1:], "--tasks=text_perplexity,chats"]
    assert evaluation.main(alone) == 0
    assert numbers(tmp_path / "alone", "of_words") == both["of_words"]
    assert evaluation.main([*argv, tasks, "--force"]) == 0
    assert numbers(tmp_path / "run", "sft") == both["sft"] and ("val_loss" in str(both["sft"]))


def test_what_cannot_be_measured_is_an_error_where_it_was_asked_for(tmp_path, capsys):
    """A verifier is missing: said in an evaluation of everything, refused when asked for."""
    argv = make_run(tmp_path)
    (tmp_path / "run" / "verifier").rename(tmp_path / "elsewhere")
    fails(lambda: evaluation.main([*argv, "--tasks=rerank"]), "a tuned stage and a verifier")
    (tmp_path / "run" / "begun").mkdir()
    (tmp_path / "run" / "begun" / "metrics.jsonl").write_text("")
    assert evaluation.main([*argv, "--text=", "--sst2=", "--dialogues=", "--problems="]) == 0
    said = capsys.readouterr().out
    assert "published is left out: it needs a tuned stage and a verifier" in said
    assert "begun is left out: it has no checkpoint yet" in said


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["value", "low", "extra"])
def test_a_number_that_is_not_finite_is_named_and_never_written(tmp_path, capsys, bad, where):
    """results.jsonl is JSON, in which there is no NaN; the other numbers of the task stay."""

    def run(subject, stage, cfg):
        estimate = stats.Estimate(**{"value": 0.5, "n": 3, "low": 0.1, "high": 0.9, where: bad})
        return [Row("accuracy", "logprob", stats.Estimate(0.5, 3)), Row("odd", "x", estimate)]

    def with_extra(subject, stage, cfg):
        rows = [Row("accuracy", "logprob", stats.Estimate(0.5, 3))]
        return [*rows, Row("odd", "x", stats.Estimate(0.5, 3), extra={"share": [bad]})]

    changed = TASKS["preference"]._replace(run=with_extra if where == "extra" else run)
    argv = [*make_run(tmp_path), "--tasks=preference"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "preference", changed)
        assert evaluation.main(argv) == 0
    text = (tmp_path / "run" / "results.jsonl").read_text()
    assert {json.loads(line)["metric"] for line in text.splitlines()} == {"accuracy"}
    assert "NaN" not in text and "Infinity" not in text
    assert "odd x test is left out" in capsys.readouterr().out


def test_a_retrained_start_makes_what_follows_stale(tmp_path, capsys):
    """The reward of a DPO run is against the weights that it began with, or there is none."""
    argv = [*make_run(tmp_path), "--tasks=preference"]
    assert evaluation.main(argv) == 0
    assert "stale" not in capsys.readouterr().out
    make_stage(tmp_path / "run" / "sft", 77, "sft")
    assert evaluation.main([*argv, "--force"]) == 0
    said = capsys.readouterr().out
    assert "dpo is stale: sft has other weights" in said and "verifier is stale" in said
    assert "the reward of dpo is left out" in said
    stages = read_stages(str(tmp_path / "run"), [])
    assert {name for name, stage in stages.items() if stage["stale"]} == {"dpo", "verifier"}
    newest = [row for row in results_of(tmp_path / "run", "preference") if row["stage"] == "dpo"]
    assert "reward" not in {row["protocol"] for row in newest}
