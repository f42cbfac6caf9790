"""Text from a checkpoint, streamed as it is sampled.

    python sample.py --checkpoint=out/toy/pretrain --prompt="Tom the cat"   # continues the text
    python sample.py --checkpoint=out/toy/dpo           # chats in the terminal, to an empty line
    echo "Tell a tale of Tom the cat and a pen." | python sample.py --checkpoint=out/toy/dpo

A checkpoint tuned on chats answers in the template it was tuned with; --chat=False continues plain
text instead. Text may outgrow the training context: the cache rolls, and the model sees the last
seq_len tokens. One trained without sinks leans on the first tokens (arXiv 2309.17453): it sees
those four, and four fewer of the last.
"""

import codecs
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

from configurator import UserError, load, require
from corpus.chat import check_template, render_prompt, user_turn
from corpus.tokenizer import load_tokenizer
from inference.answers import answer_text
from inference.sampling import Sampling, stream
from inference.solutions import Calculator
from runtime.checkpoint import load_checkpoint, model_from
from runtime.program import run
from runtime.world import choose_device


@dataclass
class SampleConfig:
    """Sampling from a checkpoint."""

    checkpoint: str = "out/toy/dpo"  # run folder, checkpoint file or run name
    prompt: str | None = None  # left out: chat on a terminal, else what comes on stdin
    chat: bool | None = None  # the prompt is a user's turn; None = if the checkpoint knows chats
    n_samples: int = 1  # answers to the prompt, all sampled at once
    max_new_tokens: int = 256  # of each answer
    temperature: float = 0.8  # 0 = greedy
    top_k: int | None = None  # keep the k most likely ids
    top_p: float | None = None  # keep the smallest set of this probability
    min_p: float | None = None  # keep ids of at least this share of the best id's probability
    seed: int = 0  # of the sampling
    calculator: bool = False  # finish <<3+4= with 7>>, whatever the model would have written
    data_dir: str = "data"  # where the tokenizer's ranks are
    device: str = "auto"  # auto, cpu, cuda, mps

    def __post_init__(self):
        ranges = {"[1, inf)": "max_new_tokens top_k", "[0, inf)": "temperature seed"}
        ranges |= {"[1, 1e4]": "n_samples", "[0, 1]": "top_p min_p"}
        require(self, ranges, {"device": ("auto", "cpu", "cuda", "mps")})


class Sampler:  # a checkpoint that is ready to answer
    def __init__(self, cfg: SampleConfig):
        saved = load_checkpoint(cfg.checkpoint)
        spec = saved["tokenizer"]
        head = {"score_head": True} if saved["task"] == "verifier" else {}
        self.cfg = cfg
        self.model = model_from(saved, **head).to(choose_device(cfg.device)).eval()
        self.tokenizer = load_tokenizer(spec["name"], cfg.data_dir, spec)
        self.chat = cfg.chat if cfg.chat is not None else "template" in saved
        if self.chat:
            check_template(saved, self.tokenizer, cfg.checkpoint)
        self.n_prompts = 0

    def answer(self, ids: list[int]) -> str:
        """Sample and print the answers to a prompt, one alone as it comes. -> the first"""
        cfg, tokenizer, space = self.cfg, self.tokenizer, self.model.cfg.seq_len
        if len(ids) > space:
            cut = f"the first {len(ids) - space} of the prompt's {len(ids)} tokens are cut"
            print(f"[{cut}: the context has {space}]", file=sys.stderr)
            ids = ids[-space:]
        seeds = [(cfg.seed, self.n_prompts, number) for number in range(cfg.n_samples)]
        self.n_prompts += 1
        prompts = [ids] * cfg.n_samples
        end = tokenizer.stops
        sampling = Sampling(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p)
        tool = Calculator(tokenizer) if cfg.calculator else None
        # a character whose bytes are spread over several tokens waits for the last of them
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        rows = [[] for _ in prompts]
        began = time.perf_counter()
        for step in stream(self.model, prompts, cfg.max_new_tokens, end, seeds, sampling, tool):
            for row, token in step.items():
                rows[row].append(token)
                if cfg.n_samples == 1 and token not in end:
                    data = tokenizer.token_bytes(token)
                    print(decoder.decode(data), end="", flush=True)
        n_tokens = sum(map(len, rows))
        speed = n_tokens / (time.perf_counter() - began)
        texts = [answer_text(row, tokenizer) for row in rows]
        if len(texts) > 1:
            numbered = [f"--- {number}\n{text}" for number, text in enumerate(texts, 1)]
            print("\n".join(numbered), end="")
        cut = "" if rows[0][-1] in end else ", cut at max_new_tokens"
        print(f"\n[{n_tokens} tokens, {speed:,.0f} tok/s{cut}]", file=sys.stderr)
        return texts[0]


def converse(sampler: Sampler) -> None:
    """Answer turn by turn, given all turns before, until an empty line or the end of input."""
    messages = []
    with suppress(EOFError):
        while text := input("\n> ").strip():
            messages += user_turn(text)
            answer = sampler.answer(render_prompt(messages, sampler.tokenizer))
            messages.append({"role": "assistant", "content": answer})


def main(argv: list[str]) -> int:
    cfg = load(argv, SampleConfig)
    sampler = Sampler(cfg)
    if cfg.prompt is None and sys.stdin.isatty():
        if not sampler.chat:
            raise UserError("this model continues text: give --prompt or stdin, or set --chat")
        converse(sampler)
        return 0
    text = sys.stdin.read().rstrip("\n") if cfg.prompt is None else cfg.prompt
    if sampler.chat:
        if not text.strip():
            raise UserError("the prompt is empty: give --prompt some text")
        ids = render_prompt(user_turn(text), sampler.tokenizer)
    else:
        print(text, end="")
        tokenizer = sampler.tokenizer
        ids = [*tokenizer.prefix, *tokenizer.encode(text)] or [tokenizer.bos]
    sampler.answer(ids)
    print()
    return 0


if __name__ == "__main__":
    run(main)
