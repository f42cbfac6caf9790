"""Alignment: SFT, DPO, RL and the verifier, as four tasks for the one loop in train.py.

--init_from is a run folder, a checkpoint file or a run's name:
    python align.py config/sft.py --init_from=out/toy/pretrain
    python align.py config/dpo.py --init_from=out/toy/sft
    python align.py config/rl_problems.py --init_from=out/toy/sft
    python align.py config/verifier.py --init_from=out/toy/dpo
    torchrun --nproc_per_node=4 align.py config/h100_sft.py --init_from=out/h100/pretrain
"""

import copy
import math
import os
import time
from dataclasses import astuple, dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from configurator import UserError, load, require
from corpus import chat, folders, records, shards
from corpus.tokenizer import Tokenizer, load_tokenizer
from inference import answers, rollouts, scoring
from inference.scoring import policy_loss, preference_loss, sequence_logprobs, verifier_loss
from inference.solutions import Attempts, Calculator, label_by_value, prompt_of, solve, with_room
from model import GPT, ModelConfig
from runtime.budget import check_memory
from runtime.checkpoint import (
    beside,
    checkpoint_files,
    kept_tensors,
    load_checkpoint,
    model_from,
    open_start,
    weights_hash,
)
from runtime.diary import Clock
from runtime.files import digest, read_jsonl, write_atomic, write_json, write_jsonl
from runtime.logs import read_log
from runtime.program import run
from runtime.run_folder import PREEMPTED, is_done
from runtime.world import World
from train import LoopConfig, is_compiled, make_optimizers, train


@dataclass
class AlignConfig:
    """Alignment, in every mode."""

    mode: str = "sft"  # sft, dpo, rl or verifier
    init_from: str = ""  # run folder, checkpoint file or run name to start from
    tokenizer: str | None = None  # None = the checkpoint's; another must have the same ids
    seq_len: int | None = None  # tokens per packed row (dpo: longest pair); None = the checkpoint's
    max_new_tokens: int = 64  # longest solution; also of the answers before and after
    n_answers: int = 32  # sft, dpo, rl: held-out prompts answered before and after; 0 = none

    def __post_init__(self):
        require(self, {"[1, inf)": "seq_len max_new_tokens", "[0, inf)": "n_answers"})
        if not self.init_from:
            raise UserError("init_from is missing: give a run folder or a checkpoint")


@dataclass
class SFTConfig:
    """SFT."""

    replay: float = 0.0  # share of the rows that are pretraining text, against forgetting it
    replay_data: str | None = None  # its shards; None = what the checkpoint was pretrained on

    def __post_init__(self):
        require(self, {"[0, 1)": "replay"})


@dataclass
class DPOConfig:
    """DPO."""

    on_policy: bool = False  # pairs of right and wrong samples for problems, not preference records
    loss_type: str = "sigmoid"  # sigmoid, ipo or simpo
    beta: float = 0.1  # strength of the pull to the reference (ipo: tau)
    label_smoothing: float = 0.0  # share of pairs labelled the wrong way round (cDPO); not for ipo
    rpo_alpha: float = 0.0  # weight of the NLL of the chosen answer, per token (RPO)
    simpo_gamma: float | None = None  # simpo: target margin of the rewards; None = beta / 2
    replay: float = 0.0  # packed rows of SFT's chats per pair, against forgetting them
    replay_data: str | None = None  # these chats; None = what the checkpoint was tuned on

    def __post_init__(self):
        ranges = {"(0, inf)": "beta", "[0, inf)": "rpo_alpha simpo_gamma"}
        ranges |= {"[0, 0.5)": "label_smoothing", "[0, 1]": "replay"}
        require(self, ranges, {"loss_type": ("sigmoid", "ipo", "simpo")})
        if self.loss_type != "simpo" and self.simpo_gamma == 0.5:
            self.simpo_gamma = None  # an older run has it with every loss
        unused = {"sigmoid": ["simpo_gamma"], "ipo": ["simpo_gamma", "label_smoothing"]}
        for key in unused.get(self.loss_type, []):
            if value := getattr(self, key):
                which = f"loss_type={self.loss_type}"
                raise UserError(f"{key}={value} has no meaning for {which}: leave it out")


@dataclass
class RLConfig:
    """RL."""

    n_problems: int = 32  # problems of a step
    n_samples: int = 8  # answers to each of them
    temperature: float = 1.0  # of these samples, and of the policy that is trained
    calculator: bool = False  # work out <<3+4= for the model; what it wrote is not learned
    reward: str = "answer"  # right final answers, or the run of a verifier: its probability
    loss_type: str = "dr_grpo"  # dr_grpo or grpo
    epochs: int = 1  # optimizer steps on the same answers
    clip: float = 0.2  # with more epochs: most that a token's ratio to its old probability changes
    clip_high: float | None = None  # the same upwards; None = clip
    beta: float = 0.0  # strength of the pull to the starting weights, by KL; 0 = none

    def __post_init__(self):
        counts = {"[1, 1e6]": "n_problems epochs", "[2, 1e6]": "n_samples"}
        ranges = {"(0, inf)": "temperature", "(0, 1)": "clip", "(0, inf]": "clip_high"}
        ranges["[0, inf)"] = "beta"
        require(self, counts | ranges, {"loss_type": ("dr_grpo", "grpo")})
        if self.epochs == 1 and (self.clip, self.clip_high) != (RLConfig.clip, None):
            given = f"clip={self.clip}, clip_high={self.clip_high}"
            raise UserError(f"{given}: with epochs=1 nothing is clipped; raise epochs")


@dataclass
class VerifierConfig:
    """The verifier."""

    lm_coef: float = 1.0  # weight of the language-model loss on the reference solutions
    level: str = "token"  # label every token of a solution, or the last alone (solution)

    def __post_init__(self):
        require(self, {"[0, inf)": "lm_coef"}, {"level": ("token", "solution")})


@dataclass
class SamplingConfig:
    """Sampled solutions of problems, for the verifier and for dpo with on_policy."""

    n_problems: int | None = None  # problems to sample solutions for; None = all
    n_samples: int = 4  # solutions per problem
    temperature: float = 0.8  # of these samples
    calculator: bool = False  # work out <<3+4= for the model (Cobbe et al. 2021)

    def __post_init__(self):
        require(self, {"[1, 1e6]": "n_problems n_samples", "[0, inf)": "temperature"})


# ------------------------------------------------------------------------------------------------
# The tasks (train.Task says what the loop expects of one)


class Setup(NamedTuple):  # what a task is made from
    model: GPT
    tokenizer: Tokenizer
    world: World
    loop: LoopConfig
    align: AlignConfig
    mode: SFTConfig | DPOConfig | RLConfig | VerifierConfig
    sampling: SamplingConfig | None = None

    @property
    def seq_len(self) -> int:
        return self.align.seq_len or self.model.cfg.seq_len


class PackedTask:  # several documents share a row
    def pack_splits(self, found: dict, what: str, setup: Setup) -> None:
        """Pack the documents {split: [...]} into rows; those longer than a row are dropped."""
        log, T, pad, seed = setup.world.log, setup.seq_len, setup.tokenizer.pad, setup.loop.seed
        self.packed = {}
        for split, rows in found.items():
            name = f"{self.name} {split} {what}"
            self.packed[split] = chat.packed(rows, T, pad, seed, name, log)
        self.tokens_per_row = T
        self.n_val_rows = len(self.packed["val"].rows)
        all_kept = {split: rows.documents for split, rows in self.packed.items()}
        self.fingerprint = digest([all_kept, T])

    def batch(self, split: str, first: int, last: int) -> dict[str, Tensor]:
        packed = self.packed[split]
        return packed.batch(packed.shuffled(first, last))  # of both splits: packing sorts by length


class SFT(PackedTask):
    """SFT predicts the assistant's words and the <|end|> after them; some rows may be text."""

    name = "sft"
    metrics: ClassVar = ["loss"]

    def __init__(self, setup: Setup):
        loop, tokenizer, log = setup.loop, setup.tokenizer, setup.world.log
        found = {}
        for split in ("train", "val"):
            rows = records.load_records(loop.data, loop.data_dir, "sft", split)
            found[split] = [chat.chat_document(row["messages"], tokenizer) for row in rows]
        self.prompts = [chat.render_prompt(row["messages"][:-1], tokenizer) for row in rows]  # val
        self.pack_splits(found, "chats", setup)
        log(f"sft: {chat.describe_chats(self.packed['train'].documents, tokenizer)}")
        self.replay, spec = setup.mode.replay, setup.mode.replay_data
        if self.replay:
            T = self.tokens_per_row
            self.text = shards.Mixture(spec, loop.data_dir, "train", T, loop.seed + 1, tokenizer)
            self.fingerprint = digest([self.fingerprint, self.text.fingerprint])
            log(f"sft: {self.replay:.0%} of the rows are text of {spec}, in training alone")

    def batch(self, split: str, first: int, last: int) -> dict[str, Tensor]:
        """Return rows; training row i is text where the whole part of i * replay grows."""
        if split == "val" or not self.replay:
            return super().batch(split, first, last)
        # n_text[i]: how many of the rows before row first + i are text
        n_text = [chat.n_replayed(i, self.replay) for i in range(first, last + 1)]
        is_text = torch.tensor(n_text).diff() > 0  # (B,)
        chats = super().batch("train", first - n_text[0], last - n_text[-1])
        if not is_text.any():
            return chats
        return chat.with_text(chats, self.text.shuffled(n_text[0], n_text[-1]), is_text)

    def units(self, batch: dict) -> Tensor:
        return (batch["targets"] >= 0).sum()

    def loss(self, model: GPT, batch: dict) -> tuple[Tensor, dict]:
        nll = model(batch["idx"], batch["targets"], batch["docs"])
        return nll, {"loss": nll}


class DPO:
    """DPO learns from preference pairs; its reference is the model that it starts from."""

    name = "dpo"
    metrics: ClassVar = ["loss", "rewards/accuracies", "rewards/margins", "rewards/chosen"]
    metrics += ["rewards/rejected", "logps/chosen", "logps/rejected"]  # named as in TRL

    def __init__(self, setup: Setup):
        loop = setup.loop
        self.cfg = setup.mode
        self.seed = loop.seed
        self.pad = setup.tokenizer.pad
        log, space = setup.world.log, setup.seq_len
        self.pairs = {}
        for split in ("train", "val"):
            if self.cfg.on_policy:
                rows = sampled_pairs(setup, split)
            else:
                rows = records.load_records(loop.data, loop.data_dir, "dpo", split)
            pairs = [chat.encode_pair(row, setup.tokenizer) for row in rows]
            what = f"dpo {split} pairs"
            kept = chat.drop_too_long(pairs, lambda pair: pair.longest - 1, space, what, log)
            self.pairs[split] = kept
        self.prompts = [pair.prompt for pair in pairs]  # of val
        longest = max(pair.longest - 1 for kept in self.pairs.values() for pair in kept)
        self.width = min(space, -(-longest // 64) * 64)
        self.one_shape = is_compiled(loop, setup.world)
        self.tokens_per_row = 2 * self.width
        self.n_val_rows = len(kept)
        log(f"dpo: {chat.describe_pairs(self.pairs['train'])}")
        has_reference = self.cfg.loss_type != "simpo"
        start = weights_hash(setup.model.state_dict()) if has_reference else True
        self.fingerprint = digest([self.pairs, start])
        self.reference = self.reference_logprobs(setup, start) if has_reference else None
        if self.cfg.replay:
            self.open_chats(setup)
        if self.cfg.loss_type == "sigmoid" and (loop.force or not checkpoint_files(loop.out_dir)):
            self.check_start(setup)

    def open_chats(self, setup: Setup) -> None:
        """Pack the chats that are replayed, as SFT does."""
        loop, spec, log, T = setup.loop, self.cfg.replay_data, setup.world.log, setup.seq_len
        rows = records.load_records(spec, loop.data_dir, "sft", "train")
        chats = [chat.chat_document(row["messages"], setup.tokenizer) for row in rows]
        self.chats = chat.packed(chats, T, self.pad, loop.seed + 1, "dpo chats", log)
        self.fingerprint = digest([self.fingerprint, self.chats.documents])
        self.tokens_per_row += round(self.cfg.replay * T)
        log(f"dpo: {self.cfg.replay:g} rows of chats of {spec} beside each pair, in training alone")

    def reference_logprobs(self, setup: Setup, start: str) -> dict[str, Tensor]:
        """Return {split: (2, n)} log-probs under the starting weights, from the file or new."""
        loop, model, world = setup.loop, setup.model, setup.world
        key = digest([start, self.fingerprint, setup.tokenizer.template.name, self.width])
        path = os.path.join(loop.out_dir, f"reference_{key}.pt")
        world.log(f"dpo: log-probs of the reference in {path}")
        reference = kept_tensors(path, {key: (2, len(kept)) for key, kept in self.pairs.items()})
        if not world.any(reference is None):
            return reference
        model.to(world.device)
        reference, n = {}, loop.micro_batch
        for split, pairs in self.pairs.items():
            logps = torch.zeros(2, len(pairs), device=world.device)
            for first in range(world.rank * n, len(pairs), world.size * n):
                last = min(first + n, len(pairs))
                batch = world.to_device(self.tensors(split, range(first, last)))
                with torch.no_grad(), world.autocast():
                    logps[:, first:last] = sequence_logprobs(model, batch)
            reference[split] = world.all_reduce(logps).cpu()
        if world.main:
            write_atomic(path, lambda f: torch.save(reference, f))
        return reference

    def check_start(self, setup: Setup) -> None:
        """Check that the loss starts at ln 2, as it must where policy = reference."""
        world, n = setup.world, min(8, len(self.pairs["train"]))
        batch = world.to_device(self.batch("train", 0, n))
        with torch.no_grad(), world.autocast():
            policy = sequence_logprobs(setup.model.to(world.device), batch)
            loss = preference_loss(policy, batch["reference"], batch["lengths"], self.cfg)
        loss, ln2 = loss.mean().item(), math.log(2)
        world.log(f"dpo: loss {loss:.4f} before the first step (ln 2 = {ln2:.4f})")
        limit = 1e-3 if world.dtype == torch.float32 else 3e-2
        if world.device.type == "cuda" and abs(loss - ln2) >= limit:
            world.log("dpo: NOTE that is not ln 2: kernels for batches of other shapes differ")
        else:
            assert abs(loss - ln2) < limit, f"DPO starts at {loss}, not at ln 2"

    def tensors(self, split: str, numbers: list | range) -> dict[str, Tensor]:
        """Return idx and targets (2B, T) of pairs, chosen answers first; lengths (2, B)."""
        pairs = [self.pairs[split][number] for number in numbers]
        longest = max(pair.longest for pair in pairs) - 1
        return chat.pair_rows(pairs, self.width if self.one_shape else longest, self.pad)

    def batch(self, split: str, first: int, last: int) -> dict[str, Tensor]:
        numbers = list(range(first, last))
        if split == "train":
            n = len(self.pairs["train"])
            numbers = [shards.shuffled_index(i, n, self.seed)[1] for i in numbers]
        kept = self.reference
        reference = kept[split][:, numbers] if kept else torch.zeros(2, len(numbers))
        batch = {**self.tensors(split, numbers), "reference": reference}
        if split == "train" and self.cfg.replay:
            places = [chat.n_replayed(i, self.cfg.replay) for i in (first, last)]
            chats = self.chats.batch(self.chats.shuffled(*places))
            batch |= {f"chats_{key}": x for key, x in chats.items()}
        return batch

    def units(self, batch: dict) -> int:
        return batch["reference"].size(1)

    def replayed_nll(self, model: GPT, batch: dict) -> Tensor | float:
        """Return the NLL per token of each row of chats, summed; their weight is that of a pair.

        As PPO-ptx mixes pretraining text in (arXiv 2203.02155, equation 2).
        """
        if not len(batch.get("chats_idx", ())):
            return 0.0
        x, targets = model.hidden(batch["chats_idx"], batch["chats_docs"]), batch["chats_targets"]
        nll = -model.logprobs(x, targets).sum(-1) / (targets >= 0).sum(-1).clamp(min=1)
        return nll.sum() / self.cfg.replay

    def loss(self, model: GPT, batch: dict) -> tuple[Tensor, dict]:
        replayed = self.replayed_nll(model, batch)  # before the pairs: a MoE keeps its last routing
        policy = sequence_logprobs(model, batch)  # (2, B)
        reference, lengths = batch["reference"], batch["lengths"]
        loss = preference_loss(policy, reference, lengths, self.cfg)
        if self.cfg.rpo_alpha:  # RPO, arXiv 2404.19733: the NLL of the chosen answer
            loss = loss - self.cfg.rpo_alpha * policy[0] / lengths[0]
        if self.cfg.loss_type == "simpo":  # its log-probs are means per token, as in TRL
            policy, reference = policy / lengths, 0.0
        chosen, rejected = self.cfg.beta * (policy - reference).detach()  # rewards
        right = (chosen > rejected).float()
        values = (loss, right, chosen - rejected, chosen, rejected, *policy)
        sums = {name: x.sum() for name, x in zip(self.metrics, values, strict=True)}
        return sums["loss"] + replayed, sums


class RL:
    """RL learns from its own answers to problems, by what each is worth beside the others."""

    name = "rl"
    val_metrics: ClassVar = ["loss", "reward", "accuracy", "length"]  # of greedy answers

    def __init__(self, setup: Setup):
        self.setup, self.cfg, loop, log = setup, setup.mode, setup.loop, setup.world.log
        cfg, model, tokenizer = setup.mode, setup.model, setup.tokenizer
        self.metrics = [*self.val_metrics, "entropy", "signal", "sampled_per_s", "trained"]
        self.metrics += ["clipped"] + ["kl"] * (cfg.beta > 0)
        if loop.fsdp:
            raise UserError("rl samples from whole weights, which --fsdp shares out: leave it out")
        if loop.batch_tokens != LoopConfig.batch_tokens or setup.align.seq_len:
            given = f"batch_tokens={loop.batch_tokens}, seq_len={setup.align.seq_len}"
            size = "n_problems x n_samples answers of up to max_new_tokens tokens"
            raise UserError(f"{given}: leave both out; a step of rl has {size}")
        self.problems, length = {}, setup.align.max_new_tokens
        for split, sources in {"train": ("train", "verifier"), "val": ("val",)}.items():
            rows = []
            for source in sources:
                rows += records.load_records(loop.data, loop.data_dir, "problems", source)
            self.problems[split] = with_room(model, tokenizer, rows, log)
        if cfg.n_problems > (n := len(self.problems["train"])):
            raise UserError(f"n_problems={cfg.n_problems} of a step, and there are {n} in all")
        self.prompts = [prompt_of(row, tokenizer) for row in self.problems["val"]]
        longest = max(len(prompt_of(row, tokenizer)) for row in self.problems["train"])
        self.width = min(model.cfg.seq_len, longest + length - 1)
        self.one_shape = is_compiled(loop, setup.world)
        self.tokens_per_row, self.n_val_rows = self.width, len(self.problems["val"])
        self.rows_per_step, self.epochs = cfg.n_problems * cfg.n_samples, cfg.epochs
        self.clock = Clock()  # until the loop brings that of the run
        self.judge = None if cfg.reward == "answer" else self.open_judge()
        self.reference = copy.deepcopy(model).to(setup.world.device) if cfg.beta else None
        self.round, self.extra = None, {}
        judged = self.judge and weights_hash(self.judge.state_dict())
        self.fingerprint = digest([self.problems, judged])

    def open_judge(self) -> GPT:
        saved = load_checkpoint(self.cfg.reward)
        if saved.get("task") != "verifier" or saved["tokenizer"] != self.setup.tokenizer.spec():
            what = f"reward={self.cfg.reward!r} is no verifier with the tokenizer of this model"
            raise UserError(f"{what}: give the folder of one, or answer")
        return model_from(saved).to(self.setup.world.device)

    def solved(self, problems: list[dict], number: int, n_samples: int, temperature: float) -> list:
        """Return problems with answers by the weights of now, each with its reward."""
        setup, cfg = self.setup, self.cfg
        settings = (n_samples, temperature, setup.align.max_new_tokens, cfg.calculator)
        attempts = Attempts(*settings, seed=10**6 * setup.loop.seed + number)
        return rollouts.rewarded(writer_of(setup), self.judge, setup.tokenizer, problems, attempts)

    def sample(self, number: int) -> dict:
        """Return the answers of a round, made by all ranks together with the weights of now.

        They depend on the weights, the seed and the number of the round alone.
        """
        cfg, world, tokenizer = self.cfg, self.setup.world, self.setup.tokenizer
        began, known, seed = time.perf_counter(), self.problems["train"], self.setup.loop.seed
        draws = range(number * cfg.n_problems, (number + 1) * cfg.n_problems)
        problems = [known[shards.shuffled_index(i, len(known), seed)[1]] for i in draws]
        own = problems[world.rank :: world.size]
        rows = world.gather(self.solved(own, number, cfg.n_samples, cfg.temperature))
        calculator = Calculator(tokenizer) if cfg.calculator else None
        answers = rollouts.answers_of(rows, tokenizer, calculator, cfg.loss_type == "grpo")
        kept, seconds = rollouts.with_signal(answers, world.size), time.perf_counter() - began
        speed = sum(len(answer["ids"]) for answer in answers) / seconds
        if number * cfg.epochs % self.setup.loop.log_interval < cfg.epochs:
            text = f"{rollouts.describe_answers(answers, cfg.n_samples)}; {speed:,.0f} tok/s"
            world.log(f"rl round {number:05d}: sampled {text}")
        found = {"number": number, "answers": answers, "kept": kept, "speed": speed}
        if cfg.epochs > 1:
            self.remember(kept)
            self.extra["round"] = found  # kept in checkpoints: amid a round the weights are others
        return found

    def remember(self, kept: list[dict]) -> None:
        """Write into the answers the log-probs that they have before the first step."""
        setup = self.setup
        world, n = setup.world, setup.loop.micro_batch
        found = []
        for first in range(world.rank * n, len(kept), world.size * n):
            batch = world.to_device(self.rows(kept[first : first + n], n))
            with torch.no_grad(), world.autocast():
                policy = self.logprobs(setup.model, batch).cpu()
            ours = batch["targets"].cpu() >= 0
            rows = zip(policy, ours, strict=True)
            found += [(first + i, p[own]) for i, (p, own) in enumerate(rows) if own.any()]
        for i, old in world.gather(found):
            kept[i]["old"] = old

    def rows(self, answers: list[dict], n: int) -> dict[str, Tensor]:
        """Return answers as rows; n of them, and as wide as any, where a compiler wants it so."""
        n, width = (n, self.width) if self.one_shape else (1, None)
        fill = [rollouts.NOBODY] * (n - len(answers))
        return rollouts.answer_rows(answers + fill, width, self.setup.tokenizer.pad)

    def logprobs(self, model: GPT, batch: dict) -> Tensor:
        """Return log p(target) (B, T) under the policy that samples at this temperature."""
        return model.logprobs(model.hidden(batch["idx"]) / self.cfg.temperature, batch["targets"])

    def batch(self, split: str, first: int, last: int) -> dict[str, Tensor]:
        """Return a part of a step's answers; of validation, greedy answers by the weights of now.

        The parts share out the answers with signal evenly, whatever was dropped.
        """
        if split == "val":
            rows = self.solved(self.problems["val"][first:last], 0, 1, 0.0)
            return rollouts.columns([row["solutions"][0] for row in rows])
        n = self.rows_per_step
        step = first // n
        number = step // self.cfg.epochs
        if self.round is None or self.round["number"] != number:
            before = self.extra.get("round", {})  # of the checkpoint that a run goes on from
            with self.clock.paused("sampling"):
                self.round = before if before.get("number") == number else self.sample(number)
        found = self.round
        kept, begin = found["kept"], step * n
        a, b = (-(-(i - begin) * len(kept) // n) for i in (first, last))
        some = found["answers"][first - begin : last - begin]
        about = rollouts.columns(some, signal=len(kept) / n, sampled_per_s=found["speed"])
        return self.rows(kept[a:b], last - first) | about

    def units(self, batch: dict) -> int:
        return len(batch["reward"])

    def loss(self, model: GPT, batch: dict) -> tuple[Tensor, dict]:
        sums = {key: batch[key].sum() for key in self.metrics if key in batch}
        if "idx" not in batch:  # validation
            return -sums["reward"], sums | {"loss": -sums["reward"]}
        policy, reference = self.logprobs(model, batch), None
        if self.reference is not None:
            with torch.no_grad():
                reference = self.logprobs(self.reference, batch)
        old, own = batch.get("old", policy.detach()), batch["targets"] >= 0
        settings = self.cfg, self.setup.align.max_new_tokens
        loss, means = policy_loss(policy, old, reference, batch["advantages"], own, *settings)
        kept = batch["signal"][0].clamp(min=1e-9)  # the share of the answers that are in the rows
        sums |= {key: x.sum() / kept for key, x in means.items()}
        sums["trained"] = (batch["docs"] >= 0).sum()
        return loss.sum(), sums | {"loss": loss.detach().sum()}


class Verifier(PackedTask):
    """The verifier learns to score the model's own samples, of problems that SFT never saw."""

    name = "verifier"
    metrics: ClassVar = ["loss", "lm_loss", "accuracy"]
    prompts: ClassVar = []  # its answers are not what it learns

    def __init__(self, setup: Setup):
        self.cfg, tokenizer, world = setup.mode, setup.tokenizer, setup.world
        found = {}
        for split, source in (("train", "verifier"), ("val", "val")):
            rows = sampled_solutions(setup, source)
            found[split] = chat.solution_documents(rows, tokenizer, self.cfg.level)
            world.log(f"verifier {split}: {chat.describe_solutions(rows)}")
            if split == "train":
                with torch.no_grad(), world.autocast():
                    scoring.scale_scores(setup.model.to(world.device), tokenizer, rows[:256])
        self.pack_splits(found, "solutions", setup)

    def units(self, batch: dict) -> Tensor:
        return (batch["labels"] >= 0).sum()

    def loss(self, model: GPT, batch: dict) -> tuple[Tensor, dict]:
        x = model.hidden(batch["idx"], batch["docs"])
        labels = batch["labels"]
        judged = labels >= 0
        scores = model.scores(x, batch["idx"], judged)
        loss = verifier_loss(scores, labels)
        lm_loss = model.nll(x, batch["targets"])
        right = (((scores > 0) == (labels == 1)) & judged).sum()
        sums = {"loss": loss, "lm_loss": lm_loss, "accuracy": right}
        return loss + self.cfg.lm_coef * lm_loss, sums


def writer_of(setup: Setup) -> GPT:
    """Return the model that samples text: its weights are those of now, in the compute dtype."""
    model, dtype = setup.model.to(setup.world.device), setup.world.dtype
    return model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)


def sampled_solutions(setup: Setup, split: str) -> list[dict]:
    """Return the problems of a split with sampled solutions: from the run folder, or made now."""
    loop, cfg, world = setup.loop, setup.sampling, setup.world
    problems = records.load_records(loop.data, loop.data_dir, "problems", split)
    problems = problems[: cfg.n_problems]
    problems = with_room(setup.model, setup.tokenizer, problems, world.log)
    settings = (cfg.n_samples, cfg.temperature, setup.align.max_new_tokens, cfg.calculator)
    attempts = Attempts(*settings, loop.seed)
    weights = setup.model.state_dict()
    trunk = {name: x for name, x in weights.items() if not name.startswith("score")}
    key = digest([weights_hash(trunk), problems, *astuple(attempts)])
    path = os.path.join(loop.out_dir, f"samples_{split}_{key}.jsonl")
    if not os.path.exists(path):
        own = problems[world.rank :: world.size]
        rows = world.gather(solve(writer_of(setup), setup.tokenizer, own, attempts, world.log))
        if world.main:
            write_jsonl(path, rows)
        world.barrier()
    return label_by_value(read_jsonl(path))  # the file has GSM8K's strict rule


def sampled_pairs(setup: Setup, split: str) -> list[dict]:
    """Return right against wrong samples, for the problems of SFT and those it never saw."""
    rows = []
    for source in ("train", "verifier") if split == "train" else (split,):
        rows += sampled_solutions(setup, source)
    pairs = [pair for row in rows for pair in records.solution_pairs(row)]
    of = f"of {len(rows)} problems ({split}) x {setup.sampling.n_samples} samples"
    if not pairs:
        raise UserError(f"none {of} has both a right and a wrong sample: raise --n_samples")
    setup.world.log(f"dpo: {len(pairs)} pairs of a right and a wrong sample, {of}")
    return pairs


def tune(task: SFT | DPO | RL | Verifier, setup: Setup, parts: list, files: list[str]) -> int:
    """Train, and say what that did to the answers, in files too. -> exit code"""
    model, tokenizer, world, loop, align = setup[:5]
    limits = (lambda ids: len(ids) + 1, model.cfg.seq_len)  # an answer has one token or more
    prompts = task.prompts if files else []
    prompts = chat.drop_too_long(prompts, *limits, f"{align.mode} prompts", world.log, needed=False)
    prompts = prompts[: align.n_answers]

    def measure() -> dict[str, float]:
        stats = answers.answer_stats(model, tokenizer, prompts, align.max_new_tokens)
        return {key: sum(values) / len(values) for key, values in stats.items()}

    before, notes = {}, []
    if prompts and world.main:
        model.to(world.device)
        before = measure()
    result = train(loop, task, model, world, parts)
    if result["state"] == "preempted":
        return PREEMPTED
    after = measure() if before else {}
    if files and world.main:
        write_json(os.path.join(loop.out_dir, *files), {"before": before, "after": after})
    if before:
        line, notes = answers.changes(before, after)
        world.log(f"{align.mode}: {line}")
    if align.mode == "dpo":
        rows = read_log(os.path.join(loop.out_dir, "metrics.jsonl"))
        first = next((row for row in rows if "val_loss" in row), {})
        for note in answers.curve_notes(result, first) + notes:
            world.log(f"dpo: NOTE {note}")
    return 0


TASKS = {"sft": SFT, "dpo": DPO, "rl": RL, "verifier": Verifier}
MODES = {"sft": (SFTConfig,), "dpo": (DPOConfig, SamplingConfig)}  # the settings of each
MODES |= {"rl": (RLConfig,), "verifier": (VerifierConfig, SamplingConfig)}


def main(argv: list[str]) -> int:
    quiet = os.environ.get("RANK", "0") != "0"
    parts = load(argv, LoopConfig, AlignConfig, choose=("mode", MODES), quiet=quiet)
    loop, align, mode = parts[:3]
    folders.ensure_toy(loop.data, loop.data_dir)
    if loop.out_dir == LoopConfig.out_dir:  # not given: never where train.py puts its own run
        loop.out_dir = beside(align.init_from, align.mode)
    start, origin = open_start(align.init_from, loop.out_dir, loop.force)
    spec = start["tokenizer"]
    tokenizer = load_tokenizer(align.tokenizer or spec["name"], loop.data_dir, spec)
    chat.check_template(start, tokenizer, align.init_from)
    replay, given = getattr(mode, "replay", 0), getattr(mode, "replay_data", None)
    if given and not replay:
        raise UserError(f"replay_data={given} is not used without a share: give --replay=0.25 too")
    if replay and given is None:
        mode.replay_data = start["train_config"].get("data")  # before it is compared with the run's
        if mode.replay_data is None:
            raise UserError(f"{align.init_from} does not say its data: give --replay_data=NAME")
    # one rank alone cannot ask a sharded model, and a verifier does not answer
    compared = align.n_answers and align.mode != "verifier" and not loop.fsdp
    files = ["answers.json"] if compared else []
    with World(loop.device, loop.dtype) as world:
        if is_done(loop, parts, world, origin, files):
            return 0
        head = {"score_head": True} if align.mode == "verifier" else {}
        cfg = ModelConfig(**start["model_config"] | head)
        check_memory((GPT, make_optimizers), cfg, align.seq_len or cfg.seq_len, loop, world)
        torch.manual_seed(loop.seed)
        os.makedirs(loop.out_dir, exist_ok=True)
        setup = Setup(model_from(start, **head), tokenizer, world, *parts)
        task = TASKS[align.mode](setup)
        task.extra = {"tokenizer": tokenizer.spec(), "init_from": origin}
        task.extra["template"] = tokenizer.template.name
        return tune(task, setup, parts, files)


if __name__ == "__main__":
    run(main, outlives_output=True)
