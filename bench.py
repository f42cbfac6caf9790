"""How fast this code is beside its peers: the same shapes in turn (A B A B ...) in one process, medians and ratios.

    python bench.py                                                         # ours, beside the machine's matmul peak
    python bench.py --nanogpt=PATH --nanochat=PATH --transformers           # beside checkouts of nanoGPT and nanochat, and Hugging Face's Llama
    python bench.py --tasks=train,memory --shapes=char --nanogpt=PATH       # one part of it

Speed on a shared machine moves by tens of percent from minute to minute; only ratios within one run mean something. Every system
has its own optimizer, in its own default form; parameter counts are printed. Results: one table per task, and JSON lines in --out.
"""
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
import types
from dataclasses import asdict, dataclass

import torch

import configurator
from checkpoint import provenance
from configurator import UserError
from model import GPT, ModelConfig
from optim import make_optimizers
from sample import generate
from train import TrainConfig


@dataclass
class BenchConfig:
    tasks: tuple[str, ...] = ("train", "memory", "generate")  # train, memory, generate
    shapes: tuple[str, ...] = ("char", "gpt2")  # names of SHAPES
    systems: tuple[str, ...] = ()  # which of ours and the peers; none = all there are
    nanogpt: str | None = None  # path of a checkout
    nanochat: str | None = None  # path of a checkout
    transformers: bool = False  # Llama from the installed transformers
    rounds: int = 9  # measurements of each system
    new_tokens: int = 256  # generate: per row
    device: str = "cpu"  # cpu or cuda
    dtype: str = "float32"  # float32 or bfloat16 (autocast)
    compile: bool = False  # torch.compile every system's training step
    threads: int | None = None  # of torch on the CPU
    out: str = "out/bench.jsonl"  # results are appended here

    def __post_init__(self):
        unknown = [s for s in self.shapes if s not in SHAPES] + [t for t in self.tasks if t not in TASKS]
        if unknown:
            raise UserError(f"unknown {', '.join(unknown)}; shapes: {', '.join(SHAPES)}; tasks: {', '.join(TASKS)}")


@dataclass
class Shape:
    n_layer: int
    d_model: int
    n_head: int
    seq_len: int
    batch: int
    vocab: int


SHAPES = {"char": Shape(6, 384, 6, 256, 12, 65), "gpt2": Shape(4, 256, 4, 256, 8, 50304), "tiny": Shape(4, 128, 4, 64, 12, 65),
          "h100": Shape(12, 1024, 16, 1024, 16, 50304)}


# ---------------------------------------------------------------------------------------------------------------------
# Systems: each gives loss(idx, targets), optimizers, and generate(prompts, n) or None

class Ours:
    def __init__(self, cfg: BenchConfig, shape: Shape, optimizer: str = "adamw", **fields):
        self.model = GPT(ModelConfig(vocab_size=shape.vocab, seq_len=shape.seq_len, n_layer=shape.n_layer, n_head=shape.n_head,
                                     d_model=shape.d_model, **fields))
        self.optimizers = make_optimizers(self.model.to(cfg.device), TrainConfig(optimizer=optimizer))

    def loss(self, idx, targets):
        return (self.model(idx, targets) + self.model.balance_loss() * targets.numel()) / targets.numel()

    def generate(self, prompts, n):
        generate(self.model.eval(), prompts, n)


class NanoGPT:
    def __init__(self, cfg: BenchConfig, shape: Shape):
        spec = importlib.util.spec_from_file_location("nanogpt_model", os.path.join(cfg.nanogpt, "model.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.model = module.GPT(module.GPTConfig(block_size=shape.seq_len, vocab_size=shape.vocab, n_layer=shape.n_layer, n_head=shape.n_head,
                                                 n_embd=shape.d_model, dropout=0.0, bias=False)).to(cfg.device)
        self.optimizers = [self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), cfg.device)]

    def loss(self, idx, targets):
        return self.model(idx, targets)[1]

    def generate(self, prompts, n):
        self.model.eval().generate(torch.tensor(prompts, device=next(self.model.parameters()).device), n)


class NanoChat:
    def __init__(self, cfg: BenchConfig, shape: Shape):
        if cfg.nanochat not in sys.path:
            sys.path.append(cfg.nanochat)
        from nanochat.gpt import GPT as Theirs, GPTConfig
        config = GPTConfig(sequence_len=shape.seq_len, vocab_size=shape.vocab, n_layer=shape.n_layer, n_head=shape.n_head, n_kv_head=shape.n_head,
                           n_embd=shape.d_model, window_pattern="L")
        with torch.device("meta"):
            self.model = Theirs(config)
        self.model.to_empty(device=cfg.device)
        self.model.init_weights()
        self.optimizers = [self.model.setup_optimizer()]

    def loss(self, idx, targets):
        return self.model(idx, targets)

    def generate(self, prompts, n):
        sys.modules.setdefault("rustbpe", types.ModuleType("rustbpe"))  # of its tokenizer, which the engine imports and we do not need
        from nanochat.engine import KVCache
        cfg, model = self.model.config, self.model.eval()
        with torch.inference_mode():
            cache = KVCache(len(prompts), cfg.n_kv_head, len(prompts[0]) + n, cfg.n_embd // cfg.n_head, cfg.n_layer, model.get_device(),
                            next(model.parameters()).dtype)
            ids = torch.tensor(prompts, device=model.get_device())
            for _ in range(n):
                logits = model(ids, kv_cache=cache)[:, -1]
                ids = torch.multinomial(logits.softmax(-1), 1)


class Llama:
    def __init__(self, cfg: BenchConfig, shape: Shape):
        from transformers import LlamaConfig, LlamaForCausalLM
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=shape.vocab, hidden_size=shape.d_model, intermediate_size=-(-8 * shape.d_model // 192) * 64,
                                                  num_hidden_layers=shape.n_layer, num_attention_heads=shape.n_head, max_position_embeddings=4 * shape.seq_len,
                                                  tie_word_embeddings=True, pad_token_id=None, bos_token_id=None, eos_token_id=None)).to(cfg.device)
        self.optimizers = [torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)]

    def loss(self, idx, targets):
        logits = self.model(input_ids=idx).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def generate(self, prompts, n):
        self.model.eval().generate(torch.tensor(prompts, device=self.model.device), max_new_tokens=n, min_new_tokens=n, do_sample=True)


SYSTEMS = {
    "ours": Ours,
    "ours, no sinks": lambda cfg, shape: Ours(cfg, shape, sinks=False),
    "ours, Muon": lambda cfg, shape: Ours(cfg, shape, "muon"),
    "ours, MoE 8 top 2": lambda cfg, shape: Ours(cfg, shape, n_expert=8, shared_expert=False),
    "nanoGPT": NanoGPT,
    "nanochat": NanoChat,
    "Llama": Llama,
}


def systems(cfg: BenchConfig) -> list[str]:
    there = [name for name in SYSTEMS if name.startswith("ours") or {"nanoGPT": cfg.nanogpt, "nanochat": cfg.nanochat, "Llama": cfg.transformers}[name]]
    unknown = [name for name in cfg.systems if name not in there]
    if unknown:
        raise UserError(f"no system {', '.join(unknown)} here; there are {', '.join(there)}")
    return list(cfg.systems) or there


def sync(cfg: BenchConfig):
    if cfg.device == "cuda":
        torch.cuda.synchronize()


def matmul_peak(cfg: BenchConfig) -> float:
    """FLOP/s of the best of a few square products, in the compute dtype."""
    n = 8192 if cfg.device == "cuda" else 1536
    a, b = (torch.randn(n, n, device=cfg.device, dtype=getattr(torch, cfg.dtype)) for _ in range(2))
    times = []
    for _ in range(8):
        sync(cfg)
        began = time.perf_counter()
        a @ b
        sync(cfg)
        times.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(times)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: each yields rows {"task", "shape", "system", ...}

class Trainer:
    def __init__(self, cfg: BenchConfig, name: str, shape: Shape):
        torch.manual_seed(0)
        self.cfg, self.system = cfg, SYSTEMS[name](cfg, shape)
        self.loss = torch.compile(self.system.loss, dynamic=False) if cfg.compile else self.system.loss
        self.idx, self.targets = torch.randint(shape.vocab, (2, shape.batch, shape.seq_len), device=cfg.device)

    def step(self) -> tuple[float, float]:
        """Seconds of forward + backward, and of the optimizer step."""
        sync(self.cfg)
        began = time.perf_counter()
        with torch.autocast(self.cfg.device, torch.bfloat16, enabled=self.cfg.dtype == "bfloat16"):
            loss = self.loss(self.idx, self.targets)
        loss.backward()
        sync(self.cfg)
        middle = time.perf_counter()
        for optimizer in self.system.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        sync(self.cfg)
        return middle - began, time.perf_counter() - middle


def bench_train(cfg: BenchConfig, name: str, shape: Shape) -> list[dict]:
    trainers = {system: Trainer(cfg, system, shape) for system in systems(cfg)}
    times = {system: [] for system in trainers}
    for number in range(cfg.rounds + 2):
        for system, trainer in trainers.items():
            times[system].append(trainer.step())
    peak, rows = matmul_peak(cfg), []
    counter = Ours(cfg, shape).model
    for system, measured in times.items():
        halves, steps = [t[0] for t in measured[2:]], [sum(t) for t in measured[2:]]
        n_tokens = shape.batch * shape.seq_len
        rows.append({"system": system, "parameters": sum(p.numel() for p in trainers[system].system.model.parameters()),
                     "tokens_per_s": n_tokens / statistics.median(steps), "forward_backward_tokens_per_s": n_tokens / statistics.median(halves),
                     "slowest": n_tokens / max(steps), "fastest": n_tokens / min(steps)})
        if "MoE" not in system:  # by the dense model's count of operations
            rows[-1]["share_of_matmul_peak"] = counter.flops_per_token() * rows[-1]["forward_backward_tokens_per_s"] / peak
    return rows


def bench_memory(cfg: BenchConfig, name: str, shape: Shape) -> list[dict]:
    """Peak memory of three training steps beyond that of the imports, each system in a process of its own."""
    rows = []
    for system in systems(cfg):
        arguments = [f"--{key}={value}" for key, value in asdict(cfg).items() if key in ("nanogpt", "nanochat", "transformers", "device", "dtype") and value]
        code = f"import bench, sys; bench.print_memory({system!r}, {name!r}, sys.argv[1:])"
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=os.path.dirname(os.path.abspath(__file__)))
        if done.returncode:
            raise UserError(f"{system} at {name} failed: {done.stderr[-500:]}")
        rows.append({"system": system, "peak_mb": float(done.stdout.split()[-1])})
    return rows


def print_memory(system: str, shape: str, argv: list[str]) -> None:
    cfg = configurator.load(BenchConfig, argv)

    def peak() -> float:
        if cfg.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        with open("/proc/self/status") as f:  # getrusage would carry the parent's peak over
            return int(re.search(r"VmHWM:\s+(\d+) kB", f.read())[1]) / 1024

    torch.randn(64, 64).matmul(torch.randn(64, 64))  # thread pools and libraries
    before, trainer = peak(), Trainer(cfg, system, SHAPES[shape])
    for _ in range(3):
        trainer.step()
    print(peak() - before)


def bench_generate(cfg: BenchConfig, name: str, shape: Shape) -> list[dict]:
    built = {system: SYSTEMS[system](cfg, shape) for system in systems(cfg) if "Muon" not in system}
    n, rows = min(cfg.new_tokens, shape.seq_len - 16), []
    for batch in (1, 8):
        prompts = torch.randint(shape.vocab, (batch, 16)).tolist()
        times = {system: [] for system in built}
        for _ in range(max(2, cfg.rounds // 3)):
            for system, it in built.items():
                sync(cfg)
                began = time.perf_counter()
                with torch.no_grad():
                    it.generate(prompts, n)
                sync(cfg)
                times[system].append(time.perf_counter() - began)
        rows += [{"system": system, "batch": batch, "tokens_per_s": batch * n / statistics.median(t)} for system, t in times.items()]
    return rows


TASKS = {"train": bench_train, "memory": bench_memory, "generate": bench_generate}


def table(rows: list[dict]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    show = lambda v: f"{v:,.3g}" if isinstance(v, float) and v < 10 else f"{v:,.0f}" if isinstance(v, (int, float)) else str(v)
    cells = [keys, *([show(row.get(key, "")) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in cells)


def main(argv: list[str]) -> int:
    cfg = configurator.load(BenchConfig, argv)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)
    for name in cfg.shapes:
        for task in cfg.tasks:
            rows = TASKS[task](cfg, name, SHAPES[name])
            print(f"\n{task}, {name}: {SHAPES[name]}, {cfg.device}, {cfg.dtype}{', compiled' if cfg.compile else ''}\n{table(rows)}", flush=True)
            with open(cfg.out, "a") as f:
                f.writelines(json.dumps({"task": task, "shape": name, **row, "settings": asdict(cfg), **provenance()}) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    configurator.run(main)
