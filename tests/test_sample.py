"""The program streams what it samples, chats, and refuses in words."""

import io
import subprocess
import sys

import pytest
import torch
from helpers import ASSISTANT, BYTE, ROOT, USER, fails, save_start
from test_model import tiny

import sample as program
from corpus.tokenizer import CHAT_1


@pytest.fixture
def start(tmp_path):
    """Folders of a base model and of a chat model, in bytes."""
    model = tiny(dtype=torch.float32, vocab_size=BYTE.vocab_size, seq_len=32)
    return {
        "base": save_start(tmp_path / "base", model),
        "chat": save_start(tmp_path / "chat", model, template=CHAT_1, task="sft"),
    }


def answers_of(monkeypatch) -> list:
    """What stream() was asked, while it answers "h\u00e9!" and <|end|>, one byte a token."""
    asked = []

    def stream(model, prompts, *settings):
        asked.append(prompts[0])
        for token in (*"h\u00e9!".encode(), BYTE.end):
            yield dict.fromkeys(range(len(prompts)), token)

    monkeypatch.setattr(program, "stream", stream)
    return asked


def test_the_same_seed_prints_the_same_text_and_another_seed_another(start, capsys):
    """The whole program on a real checkpoint: the prompt first, then what was sampled."""
    texts = []
    flags = ["--prompt=ab", "--max_new_tokens=12", "--temperature=1.5", "--device=cpu"]
    for seed in (1, 1, 2):
        argv = [f"--checkpoint={start['base']}", *flags, f"--seed={seed}"]
        assert program.main(argv) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("ab")


def test_what_is_streamed_is_what_was_sampled(start, capsys):
    """Token by token or as a whole: the same text, without the stop token; a count on stderr."""
    flags = ["--prompt=ab", "--max_new_tokens=9", "--device=cpu", "--temperature=0"]
    program.main([f"--checkpoint={start['base']}", *flags])
    streamed = capsys.readouterr()
    program.main([f"--checkpoint={start['base']}", "--n_samples=2", *flags])
    both = capsys.readouterr().out.removeprefix("ab").split("--- ")
    assert (
        both[1].removeprefix("1\n").rstrip()
        == both[2].removeprefix("2\n").rstrip()
        == streamed.out.removeprefix("ab").rstrip()
    )
    assert "[9 tokens" in streamed.err and "cut at max_new_tokens" in streamed.err


def test_a_character_of_several_tokens_is_printed_whole(start, monkeypatch, capsys):
    """Its bytes come one token at a time; half of them would show as a replacement mark."""
    answers_of(monkeypatch)
    program.main([f"--checkpoint={start['chat']}", "--prompt=x"])
    assert capsys.readouterr().out == "h\u00e9!\n"


def test_a_chat_model_gets_the_template_and_a_base_model_plain_text(start, monkeypatch, capsys):
    """The checkpoint decides; --chat overrides it. A document begins after the end of another."""
    asked = answers_of(monkeypatch)
    for name, flags in (
        ("chat", []),
        ("base", []),
        ("chat", ["--chat=False"]),
        ("base", ["--chat"]),
    ):
        program.main([f"--checkpoint={start[name]}", "--prompt=x", *flags])
    templated, plain = [USER, ord("x"), BYTE.end, ASSISTANT], [BYTE.eos, ord("x")]
    assert asked == [templated, plain, plain, templated]


def test_a_conversation_keeps_its_turns_until_an_empty_line(start, monkeypatch, capsys):
    """Every answer sees all turns before it."""
    asked, lines = answers_of(monkeypatch), iter(["one", "two", "", "never read"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert program.main([f"--checkpoint={start['chat']}"]) == 0

    def turn(text):
        return [USER, *text.encode(), BYTE.end, ASSISTANT]

    assert (
        asked == [turn("one"), [*turn("one"), *"h\u00e9!".encode(), BYTE.end, *turn("two")]]
        and next(lines) == "never read"
    )


def test_the_prompt_may_come_on_stdin(start, monkeypatch, capsys):
    """echo ... | python sample.py"""
    asked = answers_of(monkeypatch)
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    program.main([f"--checkpoint={start['chat']}"])
    assert asked == [[USER, *b"from a pipe", BYTE.end, ASSISTANT]]


def test_any_text_is_a_prompt(start, monkeypatch):
    """Neither "None" nor nothing is a wish to read stdin: without the flag stdin is read."""
    asked = answers_of(monkeypatch)
    monkeypatch.setattr(sys, "stdin", io.StringIO("never read"))
    for text in ("", "None", "none", "--chat"):
        program.main([f"--checkpoint={start['base']}", f"--prompt={text}"])
    assert asked == [[BYTE.eos, *text.encode()] for text in ("", "None", "none", "--chat")]
    program.main([f"--checkpoint={start['chat']}", "--prompt=None"])
    assert asked[-1] == [USER, *b"None", BYTE.end, ASSISTANT]
    fails(lambda: program.main([f"--checkpoint={start['chat']}", "--prompt="]), "prompt is empty")


@pytest.mark.parametrize("name, marks", [("base", 1), ("chat", 3)])
@pytest.mark.parametrize("over", [-1, 0, 1, 20])
def test_a_prompt_beyond_the_context_loses_its_beginning_aloud(
    start, monkeypatch, capsys, name, marks, over
):
    """The context has 32 tokens, marks included; what is left is its end, and the loss is told."""
    asked = answers_of(monkeypatch)
    text = "abcdefghijklmnopqrstuvwxyz" * 2
    text = text[: 32 + over - marks]
    program.main([f"--checkpoint={start[name]}", f"--prompt={text}"])
    said = capsys.readouterr().err
    assert len(asked[0]) == min(32, 32 + over)
    assert (f"the first {over} of the prompt's {32 + over} tokens are cut" in said) == (over > 0)
    end = [*text.encode(), BYTE.end, ASSISTANT] if name == "chat" else [*text.encode()]
    assert asked[0][-20:] == end[-20:]


def test_input_that_is_not_utf8_is_refused_in_words(start, tmp_path):
    """A file in another encoding comes through the pipe: one message, no traceback."""
    command = [sys.executable, str(ROOT / "sample.py"), f"--checkpoint={start['chat']}"]
    done = subprocess.run(command, input=b"Gr\xf6\xdfe", capture_output=True)
    assert done.returncode == 2 and b"UTF-8" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--temperature=-1"], ["temperature", "-1"]),
        (["--top_p=1.5", "--n_samples=0"], ["top_p", "n_samples"]),
        (["--prompt= "], ["empty"]),
        (["--checkpoint=nowhere"], ["nowhere"]),
        (["--temperature=1e-40"], ["temperature", "1e-40"]),
        (["--checkpoint="], ["checkpoint is empty"]),
    ],
)
def test_wrong_requests_are_errors_in_words(start, flags, words):
    """A sampler is the first thing people try."""
    fails(lambda: program.main([f"--checkpoint={start['chat']}", "--prompt=x", *flags]), *words)
