"""The README: its commands for data of one's own work as they stand."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT

# What makes a run short; it changes no command, only how long each one takes
SHORT = {"train.py": "--max_steps=3 --n_layer=1", "align.py": "--max_steps=2 --n_answers=2"}
SHORT["eval.py"] = "--n_samples=2 --max_new_tokens=24 --n_chats=4"
SHORT["config/verifier.py"] = "--n_problems=20 --n_samples=2 --max_new_tokens=24"


def commands_for_own_data() -> list[str]:
    """Return the commands of the section, without line breaks."""
    text = (ROOT / "README.md").read_text().partition("## Your own data")[2].partition("\n## ")[0]
    return re.findall(r"^    (python .*)$", text.replace(" \\\n", " "), re.M)


def write_files(folder):
    """Write a novel, chats, pairs, problems and an exam as a student would have them."""
    numbers = range(200)
    novel = [f"Chapter {i}. It was a dark night, and the wind of year {i} blew.\n" for i in numbers]
    (folder / "novel.txt").write_text("".join(novel * 5))
    chats = [(f"Who is number {i}?", f"Number {i} is a friend.") for i in numbers]
    records = {"chats": [], "pairs": [], "problems": [], "exam": []}
    for i, (question, answer) in enumerate(chats):
        roles = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        records["chats"].append({"messages": roles})
        records["pairs"].append({"prompt": question, "chosen": answer, "rejected": "No."})
        name = "exam" if i % 10 == 0 else "problems"
        problem = f"What is {i} + 3?", f"{i}+3=<<{i}+3={i + 3}>>{i + 3}\n#### {i + 3}"
        records[name].append(dict(zip(("question", "answer"), problem, strict=True)))
    for name, rows in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_the_way_with_data_of_ones_own_is_what_the_readme_says(tmp_path):
    """A student has a novel, chats, pairs and problems, and no time for a wrong command."""
    write_files(tmp_path)
    (tmp_path / "config").symlink_to(ROOT / "config")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    commands = commands_for_own_data()
    assert len(commands) >= 12
    for command in commands:
        _, *words = shlex.split(command)
        options = [text for name, text in SHORT.items() if name in words]
        program = [str(ROOT / words[0])] if words[0].endswith(".py") else [words[0]]
        result = subprocess.run(
            [sys.executable, *program, *words[1:], *" ".join(options).split()],
            cwd=tmp_path,
            env=environment,
            input="Who is number 7?\n",
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    report = (tmp_path / "out" / "mine" / "report.md").read_text()
    for stage in ("pretrain", "sft", "dpo", "verifier"):
        assert stage in report
    for measure in (
        "val loss",
        "problems, exact match",
        "prefers chosen, reward",
        "## The verifier",
    ):
        assert measure in report
