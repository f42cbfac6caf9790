"""How fast this code is beside its peers, on this machine, now.

    python bench.py                                                            # ours alone, beside the machine's matmul peak
    python bench.py --nanogpt=PATH --nanochat=PATH --transformers              # beside checkouts of nanoGPT and nanochat, and Hugging Face's models
    python bench.py --tasks=race --shapes=tiny,small --nanogpt=PATH --text=tinyshakespeare.txt
    python bench.py config/h100_bench.py --nanogpt=PATH                        # on a GPU: tokens/s, MFU and memory by batch

Each system lives in a process of its own, as its users have it, and the processes take turns (A B A B ...): speed on a shared machine moves by
tens of percent from minute to minute, and only the ratio of neighbours means something. `ratio` is the median over the rounds of
(time of the baseline) / (time of the system). Every system has its own optimizer; parameter counts are printed. A system that cannot run
is left out aloud. One table per task, and JSON lines in --out.
"""

import importlib
import importlib.util
import json
import multiprocessing
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

import configurator
import data
import train
from checkpoint import load_checkpoint, model_from, provenance
from configurator import UserError
from model import GPT, ModelConfig
from optim import make_optimizers
from ranks import Ranks
from sample import generate

HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass
class BenchConfig:
    tasks: tuple[str, ...] = ("train", "generate")  # train, generate, tokenize, load, start, race
    shapes: tuple[str, ...] = ("char", "gpt2")  # names of SHAPES
    systems: tuple[str, ...] = ()  # which of ours and the peers; none = all that can do the task
    baseline: str | None = None  # the system that ratios refer to; None = the first peer
    other: str | None = (
        None  # path of another checkout of this project, to compare two states of it
    )
    nanogpt: str | None = None  # path of a checkout
    nanochat: str | None = None  # path of a checkout
    transformers: bool = False  # Llama and Qwen3 from the installed transformers
    text: str | None = None  # tokenize, start, race: a text file (.txt, .jsonl, .parquet, also .gz)
    tokenizer: str = "gpt2"  # tokenize: gpt2 or the path of a ranks file
    data_dir: str = "data"  # where gpt2's ranks are
    rounds: int = 9  # measurements of each system; race: seeds
    new_tokens: int = 256  # generate: per row
    batches: tuple[
        int, ...
    ] = ()  # rows of a training step, one after the other; none = the shape's own
    device: str = "cpu"  # cpu or cuda
    dtype: str = "float32"  # float32 or bfloat16 (autocast)
    compile: bool = False  # torch.compile every system's training step
    threads: int | None = None  # of torch on the CPU
    out: str = "out/bench.jsonl"  # results are appended here

    def __post_init__(self):
        unknown = [s for s in self.shapes if s not in SHAPES] + [
            t for t in self.tasks if t not in TASKS
        ]
        if unknown:
            raise UserError(
                f"unknown {', '.join(unknown)}; shapes: {', '.join(SHAPES)}; tasks: {', '.join(TASKS)}"
            )
        if not self.text and {"tokenize", "start", "race"} & set(self.tasks):
            raise UserError("tokenize, start and race need a text: --text=FILE")


@dataclass
class Shape:
    n_layer: int
    d_model: int
    n_head: int
    seq_len: int
    batch: int
    vocab: int
    d_ff: int | None = None  # of a SwiGLU; None = 8/3 d_model, with the parameters of nanoGPT's MLP


SHAPES = {
    "char": Shape(6, 384, 6, 256, 12, 65),
    "gpt2": Shape(4, 256, 4, 256, 8, 50304),
    "tiny": Shape(4, 128, 4, 64, 12, 65),
    "small": Shape(6, 192, 6, 256, 16, 65),
    "h100": Shape(12, 1024, 16, 1024, 16, 50304),
    "h100_recipe": Shape(12, 1024, 16, 1024, 32, 50304, 4096),
}
RACE_STEPS = {"tiny": 2000, "small": 250}  # of nanoGPT; ours: config/race_<shape>.py


# ---------------------------------------------------------------------------------------------------------------------
# Systems: each has a model, optimizers, loss(idx, targets) and generate(prompts, n)


class Ours:
    def __init__(self, cfg: BenchConfig, shape: Shape, optimizer: str = "adamw", **fields):
        Ranks(cfg.device, cfg.dtype)  # its settings of torch are part of the system
        self.model = GPT(
            ModelConfig(
                vocab_size=shape.vocab,
                seq_len=shape.seq_len,
                n_layer=shape.n_layer,
                n_head=shape.n_head,
                d_model=shape.d_model,
                **{"d_ff": shape.d_ff, **fields},
            )
        ).to(cfg.device)
        self.optimizers = make_optimizers(self.model, train.TrainConfig(optimizer=optimizer))

    def loss(self, idx, targets):
        return (
            self.model(idx, targets) + self.model.balance_loss() * targets.numel()
        ) / targets.numel()

    def generate(self, prompts, n):
        generate(self.model.eval(), prompts, n)


class Other(Ours):
    def __init__(self, cfg: BenchConfig, shape: Shape):
        for name in [
            name
            for name, module in sys.modules.items()
            if os.path.dirname(getattr(module, "__file__", None) or "") == HERE
        ]:
            del sys.modules[name]
        sys.path.insert(0, cfg.other)
        for name in ("GPT", "ModelConfig"):
            globals()[name] = getattr(importlib.import_module("model"), name)
        for module, name in (
            ("optim", "make_optimizers"),
            ("sample", "generate"),
            ("ranks", "Ranks"),
        ):
            globals()[name] = getattr(importlib.import_module(module), name)
        super().__init__(cfg, shape)


class NanoGPT:
    def __init__(self, cfg: BenchConfig, shape: Shape):
        module = import_file("nanogpt_model", os.path.join(cfg.nanogpt, "model.py"))
        width = (
            shape.d_ff or 0
        )  # its MLP is 4 d_model wide: what a wider SwiGLU has more goes into more layers
        layers = (
            round(shape.n_layer * (4 * shape.d_model + 3 * width) / (12 * shape.d_model))
            if width
            else shape.n_layer
        )
        self.model = module.GPT(
            module.GPTConfig(
                block_size=shape.seq_len,
                vocab_size=shape.vocab,
                n_layer=layers,
                n_head=shape.n_head,
                n_embd=shape.d_model,
                dropout=0.0,
                bias=False,
            )
        ).to(cfg.device)
        self.optimizers = [self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), cfg.device)]

    def loss(self, idx, targets):
        return self.model(idx, targets)[1]

    def generate(self, prompts, n):
        self.model.eval().generate(
            torch.tensor(prompts, device=next(self.model.parameters()).device), n
        )


class NanoChat:
    def __init__(self, cfg: BenchConfig, shape: Shape):
        sys.path.append(cfg.nanochat)
        from nanochat.gpt import GPT as Theirs, GPTConfig

        config = GPTConfig(
            sequence_len=shape.seq_len,
            vocab_size=shape.vocab,
            n_layer=shape.n_layer,
            n_head=shape.n_head,
            n_kv_head=shape.n_head,
            n_embd=shape.d_model,
            window_pattern="L",
        )
        with torch.device("meta"):
            self.model = Theirs(config)
        self.model.to_empty(device=cfg.device)
        self.model.init_weights()
        self.optimizers = [self.model.setup_optimizer()]

    def loss(self, idx, targets):
        return self.model(idx, targets)

    def generate(self, prompts, n):
        sys.modules.setdefault(
            "rustbpe", types.ModuleType("rustbpe")
        )  # of its tokenizer, which the engine imports and we do not need
        from nanochat.engine import KVCache

        cfg, model = self.model.config, self.model.eval()
        with torch.inference_mode():
            cache = KVCache(
                len(prompts),
                cfg.n_kv_head,
                len(prompts[0]) + n,
                cfg.n_embd // cfg.n_head,
                cfg.n_layer,
                model.get_device(),
                next(model.parameters()).dtype,
            )
            ids = torch.tensor(prompts, device=model.get_device())
            for _ in range(n):
                logits = model(ids, kv_cache=cache)[:, -1]
                ids = torch.multinomial(logits.softmax(-1), 1)


class HuggingFace:
    def __init__(self, cfg: BenchConfig, shape: Shape, family: str):
        import transformers

        settings = getattr(transformers, f"{family}Config")(
            vocab_size=shape.vocab,
            hidden_size=shape.d_model,
            intermediate_size=shape.d_ff
            or ModelConfig(d_model=shape.d_model, n_head=shape.n_head).d_ff,
            num_hidden_layers=shape.n_layer,
            num_attention_heads=shape.n_head,
            num_key_value_heads=shape.n_head,
            head_dim=shape.d_model // shape.n_head,
            max_position_embeddings=4 * shape.seq_len,
            tie_word_embeddings=True,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model = getattr(transformers, f"{family}ForCausalLM")(settings).to(cfg.device)
        self.optimizers = [torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)]

    def loss(self, idx, targets):
        return torch.nn.functional.cross_entropy(
            self.model(input_ids=idx).logits.flatten(0, 1), targets.flatten()
        )

    def generate(self, prompts, n):
        self.model.eval().generate(
            torch.tensor(prompts, device=self.model.device),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=True,
        )


SYSTEMS = {
    "ours": Ours,
    "ours without sinks": lambda cfg, shape: Ours(cfg, shape, sinks=False),
    "ours with Muon": lambda cfg, shape: Ours(cfg, shape, "muon"),
    "ours MoE 8 top 2": lambda cfg, shape: Ours(cfg, shape, n_expert=8, shared_expert=False),
    "other": Other,
    "nanoGPT": NanoGPT,
    "nanochat": NanoChat,
    "Llama": lambda cfg, shape: HuggingFace(cfg, shape, "Llama"),
    "Qwen3": lambda cfg, shape: HuggingFace(cfg, shape, "Qwen3"),
}


def import_file(name: str, path: str):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(
        spec
    )  # registered: torch.compile looks it up
    spec.loader.exec_module(module)
    return module


def sync(cfg: BenchConfig):
    if cfg.device == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------------------------------
# Jobs: what a worker process does in each round. round() -> {what was measured: seconds (or a loss)}


class Train:
    """One training step: forward, backward, optimizer."""

    systems = tuple(SYSTEMS)

    def __init__(self, cfg: BenchConfig, name: str, shape: Shape, shape_name: str):
        torch.manual_seed(0)
        self.cfg, self.system = cfg, SYSTEMS[name](cfg, shape)
        self.loss = (
            torch.compile(self.system.loss, dynamic=False) if cfg.compile else self.system.loss
        )
        self.idx, self.targets = torch.randint(
            shape.vocab, (2, shape.batch, shape.seq_len), device=cfg.device
        )
        self.facts = {"parameters": sum(p.numel() for p in self.system.model.parameters())}
        for _ in range(6):  # compilation, and memory touched for the first time
            self.round()

    def round(self) -> dict:
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
        return {"step": time.perf_counter() - began, "forward_backward": middle - began}


class Generate:
    """new_tokens for one row, and for eight, from prompts of 16."""

    systems = tuple(name for name in SYSTEMS if "Muon" not in name)

    def __init__(self, cfg: BenchConfig, name: str, shape: Shape, shape_name: str):
        torch.manual_seed(0)
        self.cfg, self.system, self.shape = cfg, SYSTEMS[name](cfg, shape), shape
        self.facts = {}
        with torch.no_grad():
            self.system.generate(torch.randint(shape.vocab, (2, 16)).tolist(), 4)

    def round(self) -> dict:
        seconds = {}
        for batch in (1, 8):
            prompts = torch.randint(self.shape.vocab, (batch, 16)).tolist()
            began = time.perf_counter()
            with (
                torch.no_grad(),
                torch.autocast(
                    self.cfg.device, torch.bfloat16, enabled=self.cfg.dtype == "bfloat16"
                ),
            ):
                self.system.generate(prompts, self.cfg.new_tokens)
            sync(self.cfg)
            seconds[f"batch_{batch}"] = time.perf_counter() - began
        return seconds


class Tokenize:
    """From documents in a file to token shards on the disk, as each project's preparation does it."""

    systems = ("ours", "nanoGPT")

    def __init__(self, cfg: BenchConfig, name: str, shape: Shape, shape_name: str):
        self.cfg, self.name = cfg, name
        self.source = data.Source("pretrain", "bench", None, [cfg.text])
        self.tokenizer = data.load_tokenizer(cfg.tokenizer, cfg.data_dir)
        self.facts = {
            "megabytes": sum(len(text.encode()) for text in data.text_documents(self.source)) / 1e6
        }

    def round(self) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            if self.name == "ours":
                data.prepare_text(self.source, folder, self.tokenizer)
            else:
                self.like_nanogpt(folder)
            return {"tokenize": time.perf_counter() - began}

    def like_nanogpt(self, folder: str) -> None:
        """data/openwebtext/prepare.py of nanoGPT: datasets.map with encode_ordinary, one process per core, then a memmap in 1,024 batches."""
        import datasets

        datasets.disable_progress_bars()
        rows = datasets.Dataset.from_generator(
            lambda: ({"text": text} for text in data.text_documents(self.source)), cache_dir=folder
        )

        def process(row):
            ids = [*self.tokenizer.bpe.encode_ordinary(row["text"]), self.tokenizer.eos]
            return {"ids": ids, "len": len(ids)}

        tokenized = rows.map(process, remove_columns=["text"], num_proc=os.cpu_count())
        out = np.memmap(
            os.path.join(folder, "train.bin"), np.uint16, "w+", shape=(sum(tokenized["len"]),)
        )
        place, n = 0, min(1024, len(tokenized))
        for i in range(n):
            part = np.concatenate(
                tokenized.shard(n, i, contiguous=True).with_format("numpy")["ids"]
            )
            out[place : place + len(part)] = part
            place += len(part)
        out.flush()


class Load:
    """One training batch from token shards of 10M tokens."""

    systems = ("ours", "nanoGPT")

    def __init__(self, cfg: BenchConfig, name: str, shape: Shape, shape_name: str):
        self.name, self.shape, self.folder, self.facts, self.rows = (
            name,
            shape,
            tempfile.TemporaryDirectory(),
            {},
            0,
        )
        tokenizer = data.load_tokenizer("byte")
        path = os.path.join(self.folder.name, "bench", "train_000.bin")
        data.write_shard(path, np.random.default_rng(0).integers(0, 256, 10_000_000), tokenizer)
        self.path, self.mixture = (
            path,
            data.Mixture("bench", self.folder.name, "train", shape.seq_len, 0, tokenizer),
        )

    def round(self) -> dict:
        began = time.perf_counter()
        for _ in range(100):
            if self.name == "ours":
                rows = self.mixture.shuffled(self.rows, self.rows + self.shape.batch)
                idx, targets = rows[:, :-1], rows[:, 1:]
                self.rows += self.shape.batch
            else:  # nanoGPT's get_batch
                tokens = np.memmap(self.path, dtype=np.uint16, mode="r")
                starts = torch.randint(len(tokens) - self.shape.seq_len, (self.shape.batch,))
                idx, targets = (
                    torch.stack(
                        [
                            torch.from_numpy(
                                tokens[i + d : i + d + self.shape.seq_len].astype(np.int64)
                            )
                            for i in starts
                        ]
                    )
                    for d in (0, 1)
                )
        return {"batch": (time.perf_counter() - began) / 100}


class Race:
    """A whole training run from the command line to its last checkpoint, and the loss of that checkpoint over the whole validation split
    (the last tenth of the text, windows that do not overlap). nanoGPT: the CPU recipe of its README.
    """

    systems = ("ours", "nanoGPT")

    def __init__(self, cfg: BenchConfig, name: str, shape: Shape, shape_name: str):
        self.cfg, self.name, self.shape, self.shape_name, self.seed = (
            cfg,
            name,
            shape,
            shape_name,
            0,
        )
        self.folder = tempfile.TemporaryDirectory()
        source = data.Source("pretrain", "bench", None, [cfg.text])
        text = "\n".join(data.text_documents(source)).encode()
        if not text.isascii():
            raise UserError(f"{cfg.text} is not ASCII: a byte would not be a character")
        self.symbols = sorted(set(text))
        tokens = np.frombuffer(text, np.uint8)
        cut = len(tokens) * 9 // 10
        tokenizer = data.load_tokenizer("byte")
        for split, part in (("train", tokens[:cut]), ("val", tokens[cut:])):
            data.write_shard(
                os.path.join(self.folder.name, "data", "race", f"{split}_000.bin"), part, tokenizer
            )
        self.val = data.Mixture(
            "race", os.path.join(self.folder.name, "data"), "val", shape.seq_len, 0, tokenizer
        )
        if name == "nanoGPT":
            self.checkout = shutil.copytree(cfg.nanogpt, os.path.join(self.folder.name, "nanogpt"))
            home = os.path.join(self.checkout, "data", "shakespeare_char")
            os.makedirs(home, exist_ok=True)
            self.numbers = np.zeros(256, np.uint16)
            self.numbers[self.symbols] = range(len(self.symbols))
            self.numbers[tokens[:cut]].tofile(os.path.join(home, "train.bin"))
            self.numbers[tokens[cut:]].tofile(os.path.join(home, "val.bin"))
            with open(os.path.join(home, "meta.pkl"), "wb") as f:
                pickle.dump({"vocab_size": len(self.symbols)}, f)
        self.facts = {}

    def round(self) -> dict:
        self.seed += 1
        return self.ours() if self.name == "ours" else self.nanogpt()

    def ours(self) -> dict:
        out_dir = os.path.join(self.folder.name, f"out{self.seed}")
        seconds = timed(
            [
                os.path.join(HERE, "train.py"),
                os.path.join(HERE, "config", f"race_{self.shape_name}.py"),
                f"--seed={self.seed}",
                "--data=race",
                f"--data_dir={self.folder.name}/data",
                "--tokenizer=byte",
                f"--out_dir={out_dir}",
            ],
            HERE,
        )
        checkpoint = load_checkpoint(out_dir)
        model = model_from(checkpoint)
        return {
            "seconds": seconds,
            "val_loss": self.val_loss(lambda idx, targets: model(idx, targets)),
            "parameters": model.num_params(),
            "tokens": checkpoint["step"] * checkpoint["train_config"]["batch_tokens"],
        }

    def nanogpt(self) -> dict:
        steps, shape = RACE_STEPS[self.shape_name], self.shape
        with (
            open(os.path.join(self.cfg.nanogpt, "train.py")) as f,
            open(os.path.join(self.checkout, "train.py"), "w") as copy,
        ):
            copy.write(f.read().replace("manual_seed(1337", f"manual_seed({self.seed}"))
        seconds = timed(
            [
                "train.py",
                "config/train_shakespeare_char.py",
                "--device=cpu",
                "--compile=False",
                "--eval_iters=1",
                f"--eval_interval={steps}",
                "--log_interval=100",
                f"--block_size={shape.seq_len}",
                f"--batch_size={shape.batch}",
                f"--n_layer={shape.n_layer}",
                f"--n_head={shape.n_head}",
                f"--n_embd={shape.d_model}",
                f"--max_iters={steps}",
                f"--lr_decay_iters={steps}",
                "--dropout=0.0",
            ],
            self.checkout,
        )
        module = import_file("nanogpt_model", os.path.join(self.checkout, "model.py"))
        checkpoint = torch.load(
            os.path.join(self.checkout, "out-shakespeare-char", "ckpt.pt"), weights_only=True
        )
        model = module.GPT(module.GPTConfig(**checkpoint["model_args"]))
        model.load_state_dict(checkpoint["model"])
        numbers = torch.from_numpy(self.numbers.astype(np.int64))
        loss = self.val_loss(
            lambda idx, targets: model(numbers[idx], numbers[targets])[1] * targets.numel()
        )
        return {
            "seconds": seconds,
            "val_loss": loss,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens": steps * shape.batch * shape.seq_len,
        }

    @torch.no_grad()
    def val_loss(self, summed_loss) -> float:
        total = 0.0
        for first in range(0, self.val.n_rows, 64):
            rows = self.val.validation(first, min(first + 64, self.val.n_rows))
            total += float(summed_loss(rows[:, :-1], rows[:, 1:]))
        return total / (self.val.n_rows * self.shape.seq_len)


class Start(Race):
    """From the command line to the first training step."""

    def ours(self) -> dict:
        return {
            "first_step": timed(
                [
                    os.path.join(HERE, "train.py"),
                    os.path.join(HERE, "config", "race_tiny.py"),
                    "--data=race",
                    f"--data_dir={self.folder.name}/data",
                    "--tokenizer=byte",
                    f"--out_dir={self.folder.name}/start{self.seed}",
                ],
                HERE,
                until="step 00000/[0-9]+ . loss",
            )
        }

    def nanogpt(self) -> dict:
        return {
            "first_step": timed(
                [
                    "train.py",
                    "config/train_shakespeare_char.py",
                    "--device=cpu",
                    "--compile=False",
                    "--eval_iters=1",
                    "--block_size=64",
                    "--batch_size=12",
                    "--n_layer=4",
                    "--n_head=4",
                    "--n_embd=128",
                ],
                self.checkout,
                until="iter 0: loss",
            )
        }


def timed(command: list[str], folder: str, until: str | None = None) -> float:
    """Seconds until a Python program has printed a line that matches `until`, or has ended."""
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-u", *command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        lines = []
        for text in process.stdout:
            lines.append(text)
            if until and re.search(until, text):
                seconds = time.perf_counter() - began
                process.kill()
                return seconds
    if process.returncode or until:
        raise UserError(f"{' '.join(command)} failed: {''.join(lines[-15:])}")
    return time.perf_counter() - began


TASKS = {
    "train": Train,
    "generate": Generate,
    "tokenize": Tokenize,
    "load": Load,
    "start": Start,
    "race": Race,
}


# ---------------------------------------------------------------------------------------------------------------------
# Taking turns


def peak_memory(cfg: BenchConfig) -> float:
    """Megabytes: of the GPU's allocator, or the high-water mark of this process."""
    if cfg.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    with open("/proc/self/status") as f:
        return int(re.search(r"VmHWM:\s+(\d+) kB", f.read())[1]) / 1024


def work(pipe, cfg: BenchConfig, task: str, system: str, shape_name: str, shape: Shape) -> None:
    """A worker process: sets up its job, then does a round whenever it is asked to; False ends it."""
    try:
        torch.set_num_threads(cfg.threads or torch.get_num_threads())
        torch.randn(64, 64).matmul(
            torch.randn(64, 64)
        )  # thread pools and libraries are no one's memory
        before = peak_memory(cfg)
        job = TASKS[task](cfg, system, shape, shape_name)
        pipe.send(job.facts)
        while pipe.recv():
            pipe.send(job.round())
        pipe.send(peak_memory(cfg) - before)
    except Exception as error:
        pipe.send(
            error
            if isinstance(error, UserError)
            else UserError(f"{system}, {task} at {shape_name}: {type(error).__name__}: {error}")
        )


def systems_for(cfg: BenchConfig, task: str) -> list[str]:
    path = {
        "other": cfg.other,
        "nanoGPT": cfg.nanogpt,
        "nanochat": cfg.nanochat,
        "Llama": cfg.transformers,
        "Qwen3": cfg.transformers,
    }
    there = [name for name in TASKS[task].systems if path.get(name, True)]
    unknown = [name for name in cfg.systems if name not in there]
    if unknown:
        raise UserError(
            f"no system {', '.join(unknown)} for {task} here; there are {', '.join(there)}"
        )
    return list(cfg.systems) or there


def matmul_peak(cfg: BenchConfig) -> float:
    """FLOP/s of a large square product, in the compute dtype."""
    n = 8192 if cfg.device == "cuda" else 1536
    a, b = (torch.randn(n, n, device=cfg.device, dtype=getattr(torch, cfg.dtype)) for _ in range(2))
    a @ b
    sync(cfg)
    began = time.perf_counter()
    a @ b
    sync(cfg)
    return 2 * n**3 / (time.perf_counter() - began)


def take_turns(
    cfg: BenchConfig, task: str, shape_name: str, shape: Shape
) -> tuple[dict[str, dict], dict[str, list[dict]], list[float]]:
    """-> facts of each system, its rounds, and the matmul peak beside every round."""
    context, pipes, workers, facts = multiprocessing.get_context("spawn"), {}, [], {}

    def ask(system: str, another_round: bool):
        pipes[system].send(another_round)
        return answer_of(system)

    def answer_of(system: str):
        answer = pipes[system].recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    try:
        for system in systems_for(cfg, task):
            pipes[system], theirs = context.Pipe()
            workers.append(
                context.Process(
                    target=work,
                    args=(theirs, cfg, task, system, shape_name, shape),
                    daemon=task not in ("tokenize", "race", "start"),
                )
            )
            workers[-1].start()
            try:
                facts[system] = answer_of(system)
            except UserError as error:
                print(f"left out: {error}", flush=True)
                del pipes[system]
        if not pipes:
            raise UserError(f"no system could do {task} at {shape_name}: see above")
        rounds, peaks = {system: [] for system in pipes}, []
        for _ in range(cfg.rounds):
            for system in pipes:
                rounds[system].append(ask(system, True))
            if task == "train":
                peaks.append(matmul_peak(cfg))
        for system in pipes:
            facts[system]["peak_mb"] = ask(system, False)
    finally:
        for pipe in pipes.values():
            pipe.close()
        for worker in workers:
            worker.join(10)  # it removes its temporary files
            worker.terminate()
    return facts, rounds, peaks


def summarize(
    cfg: BenchConfig, task: str, shape_name: str, shape: Shape, facts, rounds, peaks
) -> list[dict]:
    """One row per system: medians, their ratio to the baseline round by round, and what follows from them."""
    rows = []
    baseline = cfg.baseline or next(
        (name for name in rounds if not name.startswith("ours")), next(iter(rounds))
    )
    with torch.device("meta"):  # operations by the dense model's count; nothing is allocated
        flops = (
            shape.batch
            * shape.seq_len
            * GPT(
                ModelConfig(
                    vocab_size=shape.vocab,
                    seq_len=shape.seq_len,
                    n_layer=shape.n_layer,
                    n_head=shape.n_head,
                    d_model=shape.d_model,
                    d_ff=shape.d_ff,
                )
            ).flops_per_token()
        )
    for system, measured in rounds.items():
        row = {
            "shape": shape_name,
            "batch_rows": shape.batch,
            "system": system,
            **{key: x for key, x in facts[system].items() if key != "peak_mb"},
        }
        for key in measured[0]:
            values = [m[key] for m in measured]
            median = statistics.median(values)
            amount = {
                "step": shape.batch * shape.seq_len,
                "forward_backward": shape.batch * shape.seq_len,
                "batch_1": cfg.new_tokens,
                "batch_8": 8 * cfg.new_tokens,
            }
            if key in amount:
                row[f"{key}_tok_s"] = amount[key] / median
            elif key == "tokenize":
                row["mb_s"] = row["megabytes"] / median
            else:
                row[key] = median
                if task == "race" and key in ("seconds", "val_loss"):
                    row[f"{key}_of_each"] = values
            if (
                key not in ("forward_backward", "val_loss", "parameters", "tokens")
                and baseline in rounds
            ):
                ratios = [theirs[key] / own for theirs, own in zip(rounds[baseline], values)]
                row[f"ratio_{key}" if len(measured[0]) > 1 else "ratio"] = statistics.median(ratios)
                row[f"range_{key}" if len(measured[0]) > 1 else "range"] = (
                    f"{min(ratios):.2f}-{max(ratios):.2f}"
                )
        if task == "train" and "MoE" not in system:
            row["of_matmul_peak"] = statistics.median(
                flops / m["step"] / peak for m, peak in zip(measured, peaks)
            )
            if cfg.device == "cuda" and train.device_peak_flops():
                row["mfu"] = (
                    flops
                    / statistics.median(m["step"] for m in measured)
                    / train.device_peak_flops()
                )
        rows.append({**row, "peak_mb": facts[system]["peak_mb"]})
    return rows


def table(rows: list[dict]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))

    def show(v):
        if isinstance(v, list):
            return " ".join(map(show, v))
        return (
            f"{v:,.3g}"
            if isinstance(v, float) and abs(v) < 10
            else f"{v:,.0f}"
            if isinstance(v, (int, float))
            else str(v)
        )

    cells = [keys, *([show(row.get(key, "")) for key in keys] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells
    )


def main(argv: list[str]) -> int:
    cfg = configurator.load(BenchConfig, argv)
    os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)
    for task in cfg.tasks:
        rows = []
        for name in cfg.shapes if task not in ("tokenize", "start") else ("tiny",):
            for batch in cfg.batches or (SHAPES[name].batch,):
                shape = replace(SHAPES[name], batch=batch)
                print(f"{task}, {name}: {shape}", flush=True)
                found = summarize(cfg, task, name, shape, *take_turns(cfg, task, name, shape))
                with open(cfg.out, "a") as f:
                    f.writelines(
                        json.dumps({"task": task, **row, "settings": asdict(cfg), **provenance()})
                        + "\n"
                        for row in found
                    )
                rows += found
        print(
            f"\n{task}: {cfg.device}, {cfg.dtype}{', compiled' if cfg.compile else ''}\n{table(rows)}\n",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    configurator.run(main)
