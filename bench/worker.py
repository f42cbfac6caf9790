"""A worker of the benchmark: one system in a process of its own, measured whenever it is asked.

The checkout that it measures stands alone on PYTHONPATH. So `model` and `train` are imported inside
a system only, and nothing of this folder is imported at all.
"""

import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

# In all of this file cfg holds the keys of BenchConfig, and task, system, shape_name and shape.
# A system has a model, optimizers, loss(idx, targets) per token, and generate(prompts, n).


class Ours:
    def __init__(self, cfg: SimpleNamespace, optimizer: str = "adamw", **fields: object) -> None:
        from model import GPT, ModelConfig
        from train import LoopConfig, make_optimizers

        flat = importlib.util.find_spec("inference") is None  # a checkout from before the folders
        self.sampling = importlib.import_module("sample" if flat else "inference.sampling")
        world = importlib.import_module("ranks" if flat else "runtime.world")
        start = world.Ranks if flat else world.World
        start(cfg.device, cfg.dtype)  # its settings of torch are part of the system
        self.model = GPT(ModelConfig(**model_fields(cfg.shape) | fields)).to(cfg.device)
        self.model.recompute = "recompute" in cfg.system
        self.optimizers = make_optimizers(self.model, LoopConfig(optimizer=optimizer))

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        n = targets.numel()
        return (self.model(idx, targets) + self.model.balance_loss() * n) / n

    def generate(self, prompts: Tensor, n: int) -> None:
        self.sampling.generate(self.model.eval(), prompts.tolist(), n)


class NanoGPT:
    def __init__(self, cfg: SimpleNamespace) -> None:
        module = import_file("nanogpt_model", os.path.join(cfg.nanogpt, "model.py"))
        fields = peer_fields(cfg.shape) | {"block_size": cfg.shape.seq_len}
        d_model, d_ff = cfg.shape.d_model, cfg.shape.d_ff
        if d_ff:  # its MLP has 4 d_model: what a wider SwiGLU has more goes into more layers
            fields["n_layer"] = round(cfg.shape.n_layer * (4 * d_model + 3 * d_ff) / (12 * d_model))
        config = module.GPTConfig(**fields, dropout=0.0, bias=False)
        self.model = module.GPT(config).to(cfg.device)
        self.optimizers = [self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), cfg.device)]

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        return self.model(idx, targets)[1]

    def generate(self, prompts: Tensor, n: int) -> None:
        self.model.eval().generate(prompts, n)


class NanoChat:
    def __init__(self, cfg: SimpleNamespace) -> None:
        sys.path.append(cfg.nanochat)
        from nanochat.gpt import GPT, GPTConfig

        fields = peer_fields(cfg.shape) | {"sequence_len": cfg.shape.seq_len}
        config = GPTConfig(**fields, n_kv_head=cfg.shape.n_head, window_pattern="L")
        self.model = GPT(config).to(cfg.device)
        self.model.init_weights()
        self.optimizers = [self.model.setup_optimizer()]

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        return self.model(idx, targets)

    @torch.inference_mode()
    def generate(self, ids: Tensor, n: int) -> None:
        # Its engine imports its tokenizer, which is not needed here, and that imports rustbpe.
        sys.modules.setdefault("rustbpe", ModuleType("rustbpe"))
        from nanochat.engine import KVCache

        model, cfg = self.model.eval(), self.model.config
        sizes = (cfg.n_kv_head, ids.size(1) + n, cfg.n_embd // cfg.n_head, cfg.n_layer)
        cache = KVCache(len(ids), *sizes, ids.device, next(model.parameters()).dtype)
        for _ in range(n):
            logits = model(ids, kv_cache=cache)[:, -1]
            ids = torch.multinomial(logits.softmax(-1), 1)


class HuggingFace:
    def __init__(self, cfg: SimpleNamespace, family: str) -> None:
        import transformers

        from model import ModelConfig

        shape = cfg.shape
        sizes = {"vocab_size": shape.vocab, "hidden_size": shape.d_model}
        sizes["intermediate_size"] = ModelConfig(**model_fields(shape)).d_ff
        sizes |= {"num_hidden_layers": shape.n_layer, "num_attention_heads": shape.n_head}
        sizes |= {"num_key_value_heads": shape.n_head, "head_dim": shape.d_model // shape.n_head}
        sizes["max_position_embeddings"] = 4 * shape.seq_len
        special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        config = getattr(transformers, f"{family}Config")
        config = config(**sizes, **special, tie_word_embeddings=True)
        self.model = getattr(transformers, f"{family}ForCausalLM")(config).to(cfg.device)
        self.optimizers = [torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)]

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(input_ids=idx).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def generate(self, prompts: Tensor, n: int) -> None:
        self.model.eval().generate(prompts, max_new_tokens=n, min_new_tokens=n, do_sample=True)


def model_fields(shape: SimpleNamespace) -> dict:
    names = ("n_layer", "d_model", "n_head", "seq_len", "d_ff")
    return {"vocab_size": shape.vocab, **{name: getattr(shape, name) for name in names}}


def peer_fields(shape: SimpleNamespace) -> dict:
    fields = {"vocab_size": shape.vocab, "n_embd": shape.d_model}
    return fields | {"n_layer": shape.n_layer, "n_head": shape.n_head}


def import_file(name: str, path: str) -> ModuleType:
    """Import a file as a module. It is registered, for torch.compile looks it up."""
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SYSTEMS = {
    "ours": Ours,
    "ours without sinks": partial(Ours, sinks=False),
    "ours with Muon": partial(Ours, optimizer="muon"),
    "ours MoE 8 top 2": partial(Ours, n_expert=8, shared_expert=False),
    "ours with recompute": Ours,
    "ours eager": Ours,  # also with --compile
    "other": Ours,
    "nanoGPT": NanoGPT,
    "nanochat": NanoChat,
    "Llama": partial(HuggingFace, family="Llama"),
    "Qwen3": partial(HuggingFace, family="Qwen3"),
}
# groups of kernels, by words of their names; the first match
KERNELS = {"attention, backward": "flash.*(bwd|backward)|attention, backward"}
KERNELS |= {"attention, forward": "flash|attention, forward", "AdamW": "adam"}
KERNELS |= {"products": "gemm|nvjet|cutlass|xmma|::(add|b)?mm|product", "element-wise": ""}


def train(cfg: SimpleNamespace) -> Iterator[dict]:
    """Measure training steps: forward, backward, optimizer; for task=profile their kernels."""
    system = SYSTEMS[cfg.system](cfg)
    compiled = cfg.compile and "eager" not in cfg.system
    loss_of = torch.compile(system.loss, dynamic=False) if compiled else system.loss
    size = (2, cfg.shape.batch, cfg.shape.seq_len)
    idx, targets = torch.randint(cfg.shape.vocab, size, device=cfg.device)

    def step() -> dict[str, float]:
        began = clock(cfg)
        with autocast(cfg):
            loss = loss_of(idx, targets)
        loss.backward()
        forward_backward = clock(cfg) - began
        for optimizer in system.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {"step": clock(cfg) - began, "forward_backward": forward_backward}

    for _ in range(6):  # compilation, and memory touched for the first time
        step()
    yield {"parameters": sum(p.numel() for p in system.model.parameters())}
    while True:
        yield kernels_of(step, cfg) if cfg.task == "profile" else step()


def kernels_of(step: Callable, cfg: SimpleNamespace) -> dict[str, float]:
    """Return the milliseconds that a step spends in each group of KERNELS."""
    with torch.profiler.profile() as profiler:
        step()
    ms = dict.fromkeys(KERNELS, 0.0)
    for event in profiler.events():
        if cfg.device == "cpu":
            ms[group_of(event.name)] += event.self_cpu_time_total / 1e3
        elif event.device_type.name == "CUDA" and not event.is_user_annotation:
            ms[group_of(event.name)] += event.self_device_time_total / 1e3
    return ms


def group_of(name: str) -> str:
    """Return the group of a kernel, or of a part of a step as runtime/budget.py names it."""
    return next(group for group, words in KERNELS.items() if re.search(words, name, re.I))


def generate(cfg: SimpleNamespace) -> Iterator[dict]:
    """Measure new_tokens for one row, and for eight, from prompts of 16."""
    system = SYSTEMS[cfg.system](cfg)

    def seconds(batch: int, n: int) -> float:
        prompts = torch.randint(cfg.shape.vocab, (batch, 16), device=cfg.device)
        began = clock(cfg)
        with torch.no_grad(), autocast(cfg):
            system.generate(prompts, n)
        return clock(cfg) - began

    seconds(batch=2, n=4)
    yield {}
    while True:
        yield {f"batch_{batch}": seconds(batch, cfg.new_tokens) for batch in (1, 8)}


def clock(cfg: SimpleNamespace) -> float:
    """Return the time in seconds, after the device has done what it was given."""
    if cfg.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def autocast(cfg: SimpleNamespace) -> torch.autocast:
    return torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.dtype == "bfloat16")


def peak_memory(cfg: SimpleNamespace) -> float:
    """Return megabytes: of the GPU's allocator, or the high-water mark of this process."""
    if cfg.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    with open("/proc/self/status") as f:
        return int(re.search(r"VmHWM:\s+(\d+) kB", f.read())[1]) / 1024


def serve(jobs: dict[str, Callable]) -> None:
    """Start the job described in argv, and measure whenever a line "round" comes in.

    The answers are lines of JSON: facts, then the rounds, at the end megabytes; or an error.
    """
    cfg = json.loads(sys.argv[1], object_hook=lambda fields: SimpleNamespace(**fields))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a system prints is no answer
    try:
        torch.set_num_threads(cfg.threads or torch.get_num_threads())
        torch.randn(64, 64).matmul(torch.randn(64, 64))  # thread pools belong to no system
        before = peak_memory(cfg)
        torch.manual_seed(0)
        job = jobs[cfg.task](cfg)
        print(json.dumps(next(job)), file=answers)
        while sys.stdin.readline() == "round\n":
            print(json.dumps(next(job)), file=answers)
        print(json.dumps(peak_memory(cfg) - before), file=answers)
    except Exception as error:  # whatever goes wrong in one system, the others are measured
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)


if __name__ == "__main__":
    serve({"train": train, "profile": train, "generate": generate})
