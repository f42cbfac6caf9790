"""The report is made of result files and nothing else."""

import os
import re

import pytest
from helpers import fails
from report_helpers import hand_made, leave_out_plots, metrics_rows, row, text_of, write_run

from evals import report
from runtime.files import write_json, write_jsonl
from runtime.logs import write_sealed


@pytest.fixture
def no_plots(monkeypatch):
    leave_out_plots(monkeypatch)


def test_the_report_shows_the_values_of_the_files(tmp_path, no_plots):
    """Rates in percent with their intervals, losses and perplexities as they are."""
    text = text_of(write_run(tmp_path))
    for shown in (
        "5.5610 [5.5110, 5.5860]",
        "1.3720 [1.3220, 1.3970]",
        "41.7 % [36.7, 44.2]",
        "63.3 % [58.3, 65.8]",
        "77.7 % [72.7, 80.2]",
        "48.1 % [43.1, 50.6]",
        "86.1 % [81.1, 88.6]",
        "33.10 [33.05, 33.12]",
        "71.70 [71.65, 71.73]",
        "1.8340 [1.7840, 1.8590]",
        "| AUC of the verifier | 0.692 [0.642, 0.717] |  | 45 solutions |",
        "0.641 [0.591, 0.666]",
        "43.9 % [38.9, 46.4]",
        "How many?",
        "dpo: it is 7",
        "hash-pretrain",
        "hash-verifier",
        "abc1234",
        "6.80M",
        "3.30e+11",
        "8,111",
    ):
        assert shown in text, shown


def test_the_summary_comes_first_with_the_values_of_the_files(tmp_path, no_plots):
    """A row per stage and measure: before, after and n are those of results.jsonl."""
    text = text_of(write_run(tmp_path))
    assert text.index("## What each stage brought") == text.index("## ")
    first = re.search(r"(\| .*\n)+", text)[0].splitlines()
    found = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in first[2:]]

    def value(task, model, protocol, metric="exact_match"):
        wanted = {"task": task, "model": model, "metric": metric, "protocol": protocol}
        (one,) = [r for r in hand_made() if wanted.items() <= r.items()]
        is_rate = metric not in ("val_loss", "auc")
        return f"{100 * one['value']:.1f} %" if is_rate else one["value"], str(one["n"])

    loss = [value("val_loss", model, "windows", "val_loss") for model in ("untrained", "pretrain")]
    auc = [value("rerank", "dpo", how, "auc") for how in ("likelihood", "best_of")]
    greedy = [value("problems", model, "greedy") for model in ("pretrain", "dpo")]
    best, chosen = value("rerank", "dpo", "best_of@4"), value("preference", "dpo", "logprob", RATE)
    tales, dpo = value("tales", "dpo", "sampled", "on_topic_and_kind"), "dpo from pretrain"
    losses, aucs = [f"{x:.4f}" for x, _ in loss], [f"{x:.3f}" for x, _ in auc]
    assert found == [
        ("pretrain from untrained", "val loss (nats/token)", *losses, "", loss[1][1]),
        (dpo, "prefers chosen, log-prob", "", chosen[0], "", chosen[1]),
        (dpo, "tales on topic and kind", "", tales[0], "", tales[1]),
        (dpo, "problems, exact match", greedy[0][0], greedy[1][0], "", greedy[1][1]),
        ("verifier", "AUC, by likelihood and by verifier", *aucs, "", auc[1][1]),
        ("verifier", "problems, greedy and best of 4", greedy[1][0], best[0], "", best[1]),
    ]


RATE = "accuracy"


def test_stages_come_in_the_order_of_the_loop_and_long_tables_are_folded(tmp_path, no_plots):
    """Whoever reads the first screen alone has read what the run brought."""
    write_jsonl(str(tmp_path / "verifier" / "metrics.jsonl"), metrics_rows())
    write_jsonl(str(tmp_path / "other" / "metrics.jsonl"), metrics_rows())
    text = text_of(write_run(tmp_path))
    assert re.findall("^## (.*)", text, re.M) == [
        *("What each stage brought", "Pretraining", "DPO", "The verifier"),
        "The same problems at every stage",
    ]
    folded = re.findall("^<details><summary>(.*)</summary>$", text, re.M)
    assert folded == [
        *("All ways to choose, and calibration", "All measures"),
        *("Word problems, greedily: right answers and kinds of error", "Perplexity by protocol"),
        *("Cost", "Weights"),
    ]
    assert text.count("\n</details>\n") == len(folded)
    shown = re.sub("<details>.*?</details>", "", text, flags=re.S)
    assert "hash-pretrain" not in shown and "8,111" not in shown and "bits per byte" not in shown
    assert text.splitlines()[-1].startswith("<!-- made from ")


def test_a_stage_is_compared_with_the_one_it_started_from(tmp_path, no_plots):
    """Two of one start: not the second with the first. What is stale brought nothing."""
    stages = {"pretrain": {"weights_hash": "hash-pretrain"}}
    for name in ("sft", "dpo"):
        start = {"start": "pretrain", "start_hash": "hash-pretrain"}
        stages[name] = {"weights_hash": f"hash-{name}", **start}
    values = {"pretrain": 0.1, "sft": 0.5, "dpo": 0.7}
    rows = [row("problems", name, "exact_match", "greedy", x) for name, x in values.items()]
    write_json(str(tmp_path / "stages.json"), stages)
    folder = write_run(tmp_path, rows)
    words = "| dpo from pretrain | problems, exact match | 10.0 % | 70.0 % |"
    assert words in text_of(folder)
    stages["dpo"]["start_hash"] = "older"
    write_json(str(tmp_path / "stages.json"), stages)
    (tmp_path / "report.md").unlink()
    text = text_of(folder)
    assert "| dpo from" not in text and "| sft from pretrain |" in text


def test_no_number_in_the_report_is_written_by_hand(tmp_path, no_plots):
    """A report once said 40,000 steps of a run of 80,000.

    Three runs that differ in every number have none in common, but 95 (per cent intervals), the 4
    of "samples = 4" and the 7 of the problem shown.
    """
    number = re.compile(r"(?<![\w.+-])\d[\d.,]*")
    texts = []
    for name, scale, n in (("a", 1.0, 40), ("b", 0.8131, 60), ("c", 0.6377, 90)):
        folder = tmp_path / name
        write_run(
            folder, hand_made(scale, n), metrics_rows(scale)[: {"a": 6, "b": 4, "c": 3}[name]]
        )
        text = re.sub("Commit .*? Every", "Every", text_of(str(folder)).replace(str(folder), ""))
        texts.append({found.rstrip(".,") for found in number.findall(text)})
    common = set.intersection(*texts)
    assert len(texts[0]) > 40 and common <= {"95", "4", "7"}, common


@pytest.mark.parametrize(
    "number",
    [
        i
        for i, r in enumerate(hand_made())
        if "@" not in r["protocol"] or r["protocol"].endswith("@4")
    ],
)
def test_a_changed_result_changes_the_report(tmp_path, no_plots, number):
    """Each single value counts: none is taken from elsewhere, none is left out."""
    results = hand_made()
    before = text_of(write_run(tmp_path, results))
    results[number] = {**results[number], "value": 1.07 * results[number]["value"]}
    write_run(tmp_path, results)
    os.remove(tmp_path / "report.md")
    assert text_of(str(tmp_path)) != before


def test_changed_logs_and_samples_change_the_report(tmp_path, no_plots):
    """Cost comes from metrics.jsonl, the shown answers from the stored generations."""
    texts = set()
    for metrics, said in (
        (metrics_rows(), "it is 7"),
        (metrics_rows(1.1), "it is 7"),
        (metrics_rows(), "it is 8"),
    ):
        write_run(tmp_path, metrics=metrics, said=said)
        (tmp_path / "report.md").unlink(missing_ok=True)
        texts.add(text_of(str(tmp_path)))
    assert len(texts) == 3


def test_a_report_is_not_overwritten_unasked(tmp_path, no_plots, capsys):
    """Somebody may have written notes into it: a new one gets a folder of its own.

    --no_overwrite keeps the old one, --force replaces it.
    """
    folder = write_run(tmp_path)
    (tmp_path / "report.md").write_text("mine")
    assert report.main([f"--out_dir={folder}"]) == 0
    (new,) = [name for name in os.listdir(folder) if name.startswith("report_")]
    assert (tmp_path / new / "report.md").read_text().startswith("# Report of") and (
        tmp_path / "report.md"
    ).read_text() == "mine"
    assert report.main([f"--out_dir={folder}", "--no_overwrite"]) == 0
    assert "kept" in capsys.readouterr().out and (tmp_path / "report.md").read_text() == "mine"
    assert report.main([f"--out_dir={folder}", "--force"]) == 0
    assert (tmp_path / "report.md").read_text().startswith("# Report of")


def test_no_results_is_an_error_in_words(tmp_path):
    """An empty report would look like a finished one."""
    fails(lambda: report.main([f"--out_dir={tmp_path}"]), "holds no results: run eval.py")
    assert os.listdir(tmp_path) == []


def test_the_newest_of_equal_results_is_shown(tmp_path, no_plots):
    """After --force or a retrained stage results.jsonl is newer than the files with a timestamp."""
    key = {"task": "val_loss", "model": "pretrain", "metric": "val_loss", "protocol": "windows"}
    folder = write_run(tmp_path, [row(**key, value=1.111, date="2026-01-03 00:00:00")])
    write_jsonl(
        str(tmp_path / "results_20260102_000000.jsonl"),
        [row(**key, value=2.222, date="2026-01-02 00:00:00")],
    )
    text = text_of(folder)
    assert "1.1110" in text and "2.2220" not in text


@pytest.mark.parametrize(
    "task", ["val_loss", "problems", "preference", "tales", "text_perplexity", "rerank"]
)
def test_results_of_one_task_alone_make_a_report(tmp_path, task):
    """eval.py --tasks=... is allowed, so its results make a report without the rest."""
    folder = write_run(tmp_path, [r for r in hand_made() if r["task"] == task])
    assert text_of(folder).startswith("# Report of")


def test_errors_are_shown_with_examples(tmp_path, no_plots):
    example = {"question": "2 + 2?", "text": "2+2=5", "answer": "4", "false_equation": "2+2=5"}
    text = text_of(
        write_run(
            tmp_path,
            [row("problems", "sft", "error_arithmetic", "greedy", 0.1, examples=[example])],
        )
    )
    assert "error arithmetic: `2 + 2?` said `2+2=5`, right is 4; false: `2+2=5`" in text


HOSTILE = [
    "```\nrm -rf\n```",
    "a | b\n# Heading",
    "`x` **y** <b>",
    "\r\n---\r\n",
    "\ud800 \x00 \u2028",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_question_or_answer_gets_out_of_its_line(tmp_path, no_plots, text):
    """Fences, headings and rules that stand in a problem would swallow the report behind it."""
    example = {"question": text, "text": text, "answer": "7", "false_equation": text}
    rows = [row("problems", "dpo", "exact_match", "greedy", 0.1, examples=[example])]
    folder = write_run(tmp_path, rows, said=text)
    path = tmp_path / "generations" / "dpo_hash-dpo_settings.jsonl"
    solutions = [{"text": text, "correct": False}]
    write_sealed(str(path), [{"question": text, "answer": text, "solutions": solutions}])
    plain = write_run(tmp_path / "plain", [{**rows[0], "examples": [{**example, **PLAIN}]}])
    found = text_of(folder)
    assert "```" not in found and "<b>" not in re.sub(r"`[^`\n]*`", "", found)
    marks = [line[:1] for line in found.splitlines() if line]
    assert marks == [line[:1] for line in text_of(plain).splitlines() if line]


PLAIN = dict.fromkeys(("question", "text", "false_equation"), "plain")


def test_text_of_any_script_is_shown(tmp_path, no_plots):
    """A report of blanks is of no use to who trains in another language."""
    folder = write_run(tmp_path, said="東京は大きい, größer")
    assert "東京は大きい, größer" in text_of(folder)


def test_samples_and_examples_are_those_of_the_weights_in_the_table(tmp_path, no_plots):
    """A file of older weights may come later by its name; stages stand in the order of the loop."""
    example = {"question": "q", "text": "t", "answer": "1", "false_equation": None}
    rows = []
    for model in ("dpo", "pretrain"):  # evaluated in this order
        for date, weights in (("2", "now"), ("1", "zzz-old")):
            examples = [{**example, "text": f"{model} {weights} erred"}]
            more = {"weights_hash": f"{model}-{weights}", "date": date, "examples": examples}
            rows.append(row("problems", model, "exact_match", "greedy", 0.5, **more))
    folder = write_run(tmp_path, rows)
    for model in ("dpo", "pretrain"):
        for weights in ("now", "zzz-old"):
            said = [{"text": f"{model} {weights} says", "correct": False}]
            problem = {"question": "How many?", "answer": "#### 7", "solutions": said}
            name = f"{model}_{model}-{weights}_1234.jsonl"
            write_sealed(str(tmp_path / "generations" / name), [problem])
    stages = {model: {"weights_hash": f"{model}-now"} for model in ("pretrain", "dpo")}
    write_json(str(tmp_path / "stages.json"), stages)
    text = text_of(folder)
    assert "zzz" not in text and "dpo now erred" in text and "pretrain now erred" not in text
    assert re.search(r"\| trivial answer \| pretrain \| dpo \|", text)
    assert text.index("pretrain now says") < text.index("dpo now says")


def test_what_is_stale_or_was_trained_again_is_named(tmp_path, no_plots):
    """Their numbers are no evidence of what this pipeline does."""
    stages = {}
    for name, start in (("pretrain", None), ("sft", "pretrain"), ("dpo", "sft")):
        stages[name] = {"weights_hash": f"hash-{name}", "start": start}
        stages[name]["start_hash"] = start and f"hash-{start}"
    write_json(str(tmp_path / "stages.json"), stages)
    metric = ("problems", "exact_match", "greedy")
    rows = [row(metric[0], name, *metric[1:], 0.5) for name in stages]
    folder = write_run(tmp_path, rows)
    assert "is stale" not in text_of(folder)
    write_json(str(tmp_path / "pretrain" / "state.json"), {"weights_hash": "newer"})
    (tmp_path / "report.md").unlink()
    text = text_of(folder)
    assert "**pretrain was trained again**" in text and "| trivial answer | sft | dpo |" in text
    assert "**sft is stale**: pretrain has other weights by now" in text
    assert "**dpo is stale**: sft is stale" in text


@pytest.mark.parametrize("alone", [True, False])
def test_runs_without_an_evaluation_get_their_curves(tmp_path, alone):
    """The folder of a pipeline, or of one run: losses and cost are there before any result."""
    write_run(tmp_path, [])
    (tmp_path / "results.jsonl").unlink()
    folder = tmp_path / "pretrain" if alone else tmp_path
    write_json(str(tmp_path / "pretrain" / "state.json"), {"commit": "abc1234", "seconds": 777})
    text = text_of(str(folder))
    assert "no results: run eval.py" in text and "![](loss_pretrain.png)" in text
    assert (folder / "loss_pretrain.png").stat().st_size > 5000
    assert "| pretrain | 4 | 6.80M | 3.30e+11 | 8,111 | 8 | 777 |" in text
    assert ("![](loss_dpo.png)" in text) is not alone and "What each stage brought" not in text


def test_the_cost_is_that_of_training_and_evaluation(tmp_path, no_plots):
    """The seconds of a task stand in each of its rows, and count once; so do those of saving."""
    rows = []
    for i, task in enumerate(("val_loss", "problems")):
        for metric in ("a", "b"):
            more = {"items": f"items/{task}.json", "seconds": 100.0 + i}
            rows.append(row(task, "dpo", metric, "x", 0.5, **more))
    folder = write_run(tmp_path, rows)
    state = {"seconds": 900.0, "process_seconds": 1000.0}  # of the training, of the program
    write_json(str(tmp_path / "dpo" / "state.json"), state)
    text = text_of(folder)
    assert "| evaluation |  |  |  |  |  | 201 |" in text
    assert "| dpo | 4 | 6.80M | 3.30e+11 | 8,111 | 8 | 1000 |" in text
    assert "| all |  |  |  |  |  | 1209 |" in text  # pretrain has no state: its steps


def test_every_verifier_has_its_own_table_and_plots(tmp_path):
    """Two that judge the same policy are not taken for one."""
    rows = [r for r in hand_made() if r["task"] == "rerank"]
    others = [{**r, "model": "dpo judged by v|2", "value": r["value"] / 2} for r in rows]
    text = text_of(write_run(tmp_path, rows + others))
    assert "### dpo, \n" in text and "### dpo judged by v|2, \n" in text
    assert text.count("best_of, samples = 4") == 2
    assert "| AUC of the verifier | 0.692 [0.642, 0.717] |  | 45 solutions |" in text
    assert "| AUC of the verifier | 0.346 [0.642, 0.717] |  | 45 solutions |" in text
    for name in re.findall(r"!\[\]\((best_of_n.*?)\)", text):
        assert (tmp_path / name).stat().st_size > 5000
    assert len(re.findall(r"!\[\]\((best_of_n.*?)\)", text)) == 2


@pytest.mark.parametrize("name", ["$x$", r"$\frac$", "a $b$ 100%"])
def test_a_dollar_in_a_name_is_no_formula(tmp_path, name):
    """matplotlib would typeset it, or end in an error."""
    write_jsonl(str(tmp_path / name / "metrics.jsonl"), metrics_rows())
    assert "![](loss_" in text_of(str(tmp_path))


def test_published_solutions_judged_twice_are_two_rows(tmp_path):
    """Each verifier has its own opinion of the same solutions."""
    rows = []
    for model, value in (("dpo judged by a", 0.61), ("dpo judged by b", 0.72)):
        more = {"stage": "dpo", "verifier_hash": model[-1]}
        rows.append(row("published", model, "auc", "best_of", value, **more))
    text = text_of(write_run(tmp_path / "one", rows[:1]))
    assert re.search(
        r"trivial answer \| dpo judged by a \|\n.*\n\| auc, best_of \| 40 .*0\.610", text
    )
    stages = {name: {"weights_hash": name} for name in "ab"}
    stages["dpo"] = {"weights_hash": "hash-dpo"}
    write_json(str(tmp_path / "two" / "stages.json"), stages)
    text = text_of(write_run(tmp_path / "two", rows))
    assert "| dpo judged by a | dpo judged by b |" in text
    assert re.search(r"\| auc, best_of \| 40 \|  \| 0\.610 \S+ \S+ \| 0\.720", text)
