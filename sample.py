"""Text from a checkpoint, streamed as it is sampled; and the sampling that evaluation and the verifier use.

    python sample.py --checkpoint=out/toy/pretrain --prompt="Tom the cat"       # goes on with the text
    python sample.py --checkpoint=out/toy/dpo                                   # chat in the terminal (an empty line ends it)
    echo "Tell a tale of Tom the cat and a pen." | python sample.py --checkpoint=out/toy/dpo

A checkpoint tuned on chats answers in the template it was tuned with; --chat=False continues plain text instead. Text may grow past
the training context: the cache rolls, and the model sees the last seq_len tokens.
"""

import codecs
import math
import re
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

import configurator
import data
from checkpoint import load_checkpoint, model_from
from configurator import UserError
from model import GPT, KVCache


@dataclass
class SampleConfig:
    checkpoint: str = "out/toy/dpo"  # run folder, checkpoint file or run name
    prompt: str | None = None  # None = chat on a terminal, else what comes on stdin
    chat: bool | None = (
        None  # render the prompt as a user's turn; None = where the checkpoint was tuned on chats
    )
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
        faults = [
            f"{key} must be at least {low}, got {getattr(self, key)}"
            for key, low in (
                ("n_samples", 1),
                ("max_new_tokens", 1),
                ("temperature", 0),
                ("top_k", 1),
            )
            if getattr(self, key) is not None and getattr(self, key) < low
        ]
        faults += [
            f"{key} must be between 0 and 1, got {getattr(self, key)}"
            for key in ("top_p", "min_p")
            if getattr(self, key) is not None and not 0 <= getattr(self, key) <= 1
        ]
        if faults:
            raise UserError("; ".join(faults))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def sample(
    logits,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    draws=None,
):
    """Next ids (B,) from logits (B, vocab). temperature 0 is greedy; top_p keeps the smallest set of that probability, min_p what
    has at least that share of the most likely id's probability (arXiv 2407.01082). draws (B,): the uniform number in [0, 1) that
    decides each row, by inversion of its distribution; None = new ones."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if min_p:
        logits = logits.masked_fill(
            logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf
        )
    if top_k and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p
        beyond[:, 0] = False  # the most likely id always stays
        ordered = ordered.masked_fill(beyond, -math.inf)
        logits = torch.full_like(logits, -math.inf).scatter(1, order, ordered)
    draws = torch.rand(len(logits), device=logits.device) if draws is None else draws
    below = logits.softmax(-1).cumsum(-1)  # (B, vocab)
    draws = draws.to(below).clamp(
        max=1 - 2**-23
    )  # rounding must not carry it to the very end, where ids of probability 0 are
    return torch.searchsorted(below, (draws * below[:, -1]).unsqueeze(1), right=True).squeeze(1)


@torch.no_grad()
def generate(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop: tuple[int, ...] = (),
    seeds=None,
    slots: int | None = None,
    on_token=None,
    calculator=None,
    **sampling,
) -> list[list[int]]:
    """New ids for every prompt, all rows at once with a KV cache; a row ends with its first stop id, which is kept.

    seeds: what decides each row's draws, a number or a tuple of numbers; None = 0, 1, 2, ... A row depends on its prompt and its
    seed alone, not on the rows beside it. slots: size of the cache; by default prompt + max_new_tokens, at most seq_len, beyond
    which it rolls. Longer prompts lose their beginning. on_token(row, id) is called as ids are sampled. calculator: a Calculator,
    whose results are written in place of sampled ids. sampling: see sample().
    """
    if not prompts:
        return []
    device = model.embed.weight.device
    slots = slots or min(model.cfg.seq_len, max(map(len, prompts)) + max_new_tokens)
    prompts = [prompt[-slots:] for prompt in prompts]
    width = max(map(len, prompts))
    pads = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    idx = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    streams = [
        np.random.default_rng(seed)
        for seed in (seeds if seeds is not None else range(len(prompts)))
    ]
    cache = KVCache(model.cfg, len(prompts), slots, device, model.embed.weight.dtype)
    x = model.hidden(idx, cache=cache, pads=pads if pads.any() else None)[:, -1]
    out, rows = (
        [[] for _ in prompts],
        list(range(len(prompts))),
    )  # rows: which output each batch row belongs to
    done, owed = (
        [False] * len(prompts),
        [[] for _ in prompts],
    )  # owed: the calculator's ids that a row has yet to write
    for step in range(max_new_tokens):
        draws = torch.tensor([streams[row].random(dtype=np.float32) for row in rows], device=device)
        ids = sample(model.logits(x), draws=draws, **sampling)
        for i, (row, token) in enumerate(zip(rows, ids.tolist())):
            if done[row]:
                continue
            if owed[row]:
                token = ids[i] = owed[row].pop(0)
            elif calculator is not None:
                owed[row] = calculator(out[row] + [token])
            out[row].append(token)
            done[row] = token in stop
            if on_token is not None:
                on_token(row, token)
        running = [i for i, row in enumerate(rows) if not done[row]]
        if not running or step + 1 == max_new_tokens:
            break
        if len(running) <= 0.8 * len(
            rows
        ):  # drop finished rows now and then: each time costs a copy of the cache
            keep = torch.tensor(running, device=device)
            cache.keep(keep)
            ids, rows = ids[keep], [rows[i] for i in running]
        x = model.hidden(ids.unsqueeze(1), cache=cache)[:, -1]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The calculator (Cobbe et al. 2021): the model writes <<48/2= and is handed 24>>


def arithmetic(text: str) -> float | None:
    """Value of an expression of + - * / // ( ) and decimal numbers; None for anything else, for more than 64 characters, for a
    division by zero and for 10^15 or more."""
    tokens = re.findall(r"\d+\.?\d*|\.\d+|//|\S", text.replace(",", ""))[::-1]  # the next one last

    def operand() -> float:
        token = tokens.pop()
        if token in "+-":
            return operand() if token == "+" else -operand()
        if token != "(":
            return float(token) if token[0] in "0123456789." else math.nan
        value = total()
        return value if tokens.pop() == ")" else math.nan

    def product() -> float:
        value = operand()
        while tokens and tokens[-1] in ("*", "/", "//"):
            sign, right = tokens.pop(), operand()
            value = (
                value * right if sign == "*" else value / right if sign == "/" else value // right
            )
        return value

    def total() -> float:
        value = product()
        while tokens and tokens[-1] in ("+", "-"):
            value = value + product() if tokens.pop() == "+" else value - product()
        return value

    if len(text) > 64:
        return None
    try:
        value = total()
    except (ValueError, IndexError, ZeroDivisionError):
        return None
    return value if not tokens and abs(value) < 1e15 else None


class Calculator:
    """The ids that follow a row's ids so far: the result and >> where they end in an open <<expression=, else none."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, ids: list[int]) -> list[int]:
        if b"=" not in self.tokenizer.bpe.decode_single_token_bytes(ids[-1]):
            return []
        asked = re.search(r"<<([^<>=]*)=$", self.tokenizer.decode(ids[-70:]))
        value = arithmetic(asked[1]) if asked else None
        return (
            []
            if value is None
            else self.tokenizer.encode(
                f"{round(value, 6) + 0.0:.6f}".rstrip("0").rstrip(".") + ">>"
            )
        )


# ---------------------------------------------------------------------------------------------------------------------
# The program


class Printer:
    """Writes tokens to the screen as they come; a character whose bytes are spread over several tokens waits for the last."""

    def __init__(self, tokenizer, stop: tuple[int, ...]):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.n_tokens = 0

    def __call__(self, row: int, token: int):
        self.n_tokens += 1
        if token not in self.stop:
            print(
                self.decoder.decode(self.tokenizer.bpe.decode_single_token_bytes(token)),
                end="",
                flush=True,
            )


class Sampler:
    """A checkpoint ready to answer."""

    def __init__(self, cfg: SampleConfig):
        saved = load_checkpoint(cfg.checkpoint)
        device = (
            cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        )
        self.cfg, self.model = (
            cfg,
            model_from(saved, **({"score_head": True} if saved["task"] == "verifier" else {}))
            .to(device)
            .eval(),
        )
        self.tokenizer = data.load_tokenizer(
            saved["tokenizer"]["name"], cfg.data_dir, saved["tokenizer"]
        )
        self.chat = cfg.chat if cfg.chat is not None else "template" in saved
        if self.chat and saved.get("template", data.TEMPLATE) != data.TEMPLATE:
            raise UserError(
                f"{cfg.checkpoint} was tuned with chat template {saved['template']}, this code has {data.TEMPLATE}"
            )
        self.n_answers = 0

    def answer(self, ids: list[int]) -> str:
        """Sample, print and return the answer to a prompt; several samples are printed one after the other."""
        cfg, stop = self.cfg, (self.tokenizer.end, self.tokenizer.eos)
        began, printer = time.perf_counter(), Printer(self.tokenizer, stop)
        seeds = [(cfg.seed, self.n_answers, number) for number in range(cfg.n_samples)]
        rows = generate(
            self.model,
            [ids] * cfg.n_samples,
            cfg.max_new_tokens,
            stop,
            seeds,
            on_token=printer if cfg.n_samples == 1 else None,
            calculator=Calculator(self.tokenizer) if cfg.calculator else None,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
            min_p=cfg.min_p,
        )
        self.n_answers += 1
        texts = [self.tokenizer.decode(row[:-1] if row[-1] in stop else row) for row in rows]
        if cfg.n_samples > 1:
            print(
                *(f"--- {number}\n{text}" for number, text in enumerate(texts, 1)), sep="\n", end=""
            )
        n_tokens, seconds = sum(map(len, rows)), time.perf_counter() - began
        print(
            f"\n[{n_tokens} tokens, {n_tokens / seconds:,.0f} tok/s{'' if rows[0][-1] in stop else ', cut at max_new_tokens'}]",
            file=sys.stderr,
        )
        return texts[0]

    def prompt(self, text: str) -> list[int]:
        if self.chat:
            return data.render_prompt(data.user(text), self.tokenizer)
        return [
            self.tokenizer.eos,
            *self.tokenizer.encode(text),
        ]  # a document begins after the end of another


def converse(sampler: Sampler) -> None:
    """Turn by turn until an empty line or the end of input; every answer is given the whole conversation."""
    messages = []
    while True:
        try:
            text = input("\n> ").strip()
        except EOFError:
            return
        if not text:
            return
        messages += data.user(text)
        messages.append(
            {
                "role": "assistant",
                "content": sampler.answer(data.render_prompt(messages, sampler.tokenizer)),
            }
        )


def main(argv: list[str]) -> int:
    cfg = configurator.load(SampleConfig, argv)
    sampler = Sampler(cfg)
    if cfg.prompt is None and sys.stdin.isatty():
        if not sampler.chat:
            raise UserError(
                "this checkpoint continues text: give it some with --prompt=... or on stdin (--chat treats it as a chat model)"
            )
        converse(sampler)
        return 0
    text = sys.stdin.read().rstrip("\n") if cfg.prompt is None else cfg.prompt
    if not text.strip() and sampler.chat:
        raise UserError("the prompt is empty")
    if not sampler.chat:
        print(text, end="")
    sampler.answer(sampler.prompt(text))
    print()
    return 0


if __name__ == "__main__":
    configurator.run(main)
