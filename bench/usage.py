"""A worker that samples from a model of ours and evaluates it, here or in what users have for that.

See tuning.py: one set of weights, one set of ids; a new token counts, padding does not.
"""

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import torch

from bench.tuning import Start
from bench.worker import clock, serve
from configurator import UserError
from evals.base import EvalConfig, Subject
from evals.language import text_perplexity
from evals.perplexity import articles_of
from evals.transfer import sst2
from inference.answers import Ending
from inference.sampling import Ids, generate
from inference.solutions import prompt_of
from runtime.files import open_text, read_jsonl, write_jsonl


def our_writer(start: Start, prompts: list[Ids]) -> Callable:
    model = start.model().to(getattr(torch, start.cfg.dtype)).eval()
    ending = Ending(start.tokenizer)

    def write(n: int, seed: int) -> list[Ids]:
        seeds = [(seed, row) for row in range(len(prompts))]
        return generate(model, prompts, n, ending, seeds)

    return write


def transformers_writer(start: Start, prompts: list[Ids]) -> Callable:
    model = start.theirs()[0].to(getattr(torch, start.cfg.dtype)).eval()
    pad, width = start.tokenizer.pad, max(map(len, prompts))
    n_pads = [width - len(prompt) for prompt in prompts]
    rows = [[pad] * n + prompt for n, prompt in zip(n_pads, prompts, strict=True)]
    given = {"inputs": rows, "attention_mask": [[0] * n + [1] * (width - n) for n in n_pads]}
    given = {key: torch.tensor(x, device=start.cfg.device) for key, x in given.items()}
    given |= {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    given |= {"eos_token_id": list(start.tokenizer.stops), "pad_token_id": pad}

    def write(n: int, seed: int) -> list[Ids]:
        torch.manual_seed(seed)
        return model.generate(**given, max_new_tokens=n)[:, width:].tolist()

    return write


def llama_writer(start: Start, prompts: list[Ids]) -> Callable:
    from llama_cpp import Llama

    if len(prompts) > 1:
        raise UserError("it writes one row here: --batches=1")
    n_threads, n_ids = torch.get_num_threads(), len(prompts[0]) + start.cfg.new_tokens
    model = Llama(start.cfg.gguf, n_ctx=n_ids, n_threads=n_threads, verbose=False)

    def write(n: int, seed: int) -> list[Ids]:
        ids = []
        model.set_seed(seed)
        model.reset()  # else it would keep the prompt of the round before
        for token in model.generate(prompts[0], temp=1.0, top_k=0, top_p=1.0, min_p=0.0):
            ids.append(token)
            if len(ids) == n or token in start.tokenizer.stops:
                break
        return [ids]

    return write


@torch.no_grad()  # as a decorator: a `with` would switch gradients off for whoever asks
def sample(cfg: SimpleNamespace) -> Iterator[dict]:
    """Measure answers to as many problems as a batch has rows, in seconds per new token."""
    start = Start(cfg)
    problems = start.records("verifier")[: cfg.shape.batch]
    writers = {"transformers": transformers_writer, "llama.cpp": llama_writer}
    prompts = [prompt_of(row, start.tokenizer) for row in problems]
    write, stops = writers.get(cfg.system, our_writer)(start, prompts), start.tokenizer.stops
    write(4, 0)
    yield {"prompts": len(prompts), "prompt_tokens": sum(map(len, prompts))}
    for seed in count(1):
        began, n = clock(cfg), 0
        texts = write(cfg.new_tokens, seed)
        seconds = clock(cfg) - began
        for ids in texts:  # what follows the end of a row is padding
            n += next((i for i, token in enumerate(ids, 1) if token in stops), len(ids))
        yield {"token": seconds / n, "new_tokens": n}


def evaluate(cfg: SimpleNamespace) -> Iterator[dict]:
    """Measure SST-2 without examples and the perplexity of wikitext-2, both of data_dir."""
    start = Start(cfg)
    ask = ask_lm_eval(start) if cfg.system == "lm_eval" else ask_ours(start)
    ask("sst2", 4)  # whatever is made once
    yield {}
    while True:
        found = {}
        for task, metric in (("sst2", "accuracy"), ("wikitext", "bits_per_byte")):
            began = clock(cfg)
            found[metric] = ask(task, None)
            found[task] = clock(cfg) - began
        yield found


def ask_ours(start: Start) -> Callable:
    cfg = start.cfg
    settings = {"data": "", "sst2": "sst2", "text": "wikitext-2", "protocols": ("bpb",)}
    settings |= {"out_dir": cfg.model, "data_dir": cfg.data_dir, "device": cfg.device}
    settings = EvalConfig(**settings, dtype=cfg.dtype)
    subject = Subject(settings)
    stage, run = subject.policies[-1], {"sst2": sst2, "wikitext": text_perplexity}

    def ask(task: str, n: int | None) -> float:
        settings.n_problems = n
        return run[task](subject, stage, settings)[0].estimate.value

    return ask


def ask_lm_eval(start: Start) -> Callable:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    cfg, folder = start.cfg, start.home
    with open_text(f"{cfg.data_dir}/wikitext-2/test.txt") as f:
        pages = [{"page": article} for article in articles_of(f.read())]
    rows = read_jsonl(f"{cfg.data_dir}/sst2/test.jsonl")
    sentences = [{**row, "label": int(row["label"])} for row in rows]
    items = {"sst2": sentences, "wikitext": pages}
    files = {"sst2": "glue/sst2/default.yaml", "wikitext": "wikitext/wikitext.yaml"}
    for task, rows in items.items():
        write_jsonl(str(folder / f"{task}.jsonl"), rows)
        own = {"include": str(Path(lm_eval.__file__).parent / "tasks" / files[task])}
        paths = dict.fromkeys(("train", "validation", "test"), str(folder / f"{task}.jsonl"))
        address = {"data_files": paths, "cache_dir": str(folder / "cache")}
        own |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": address}
        (folder / f"{task}.yaml").write_text(json.dumps(own))
    model, tokenizer = start.theirs()
    model = model.to(getattr(torch, cfg.dtype))
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=cfg.shape.batch)
    manager, prefixed = TaskManager(include_defaults=False), {"sst2": lm.add_bos_token}

    def ask(task: str, n: int | None) -> float:
        lm.add_bos_token = prefixed.get(task, False)  # a text's first id is no part of it
        given = {"task_manager": manager, "bootstrap_iters": 0, "limit": n}
        found = lm_eval.simple_evaluate(lm, tasks=[str(folder / f"{task}.yaml")], **given)
        (values,) = found["results"].values()
        return values["acc,none" if task == "sst2" else "bits_per_byte,none"]

    return ask


if __name__ == "__main__":
    serve({"sample": sample, "evaluate": evaluate})
