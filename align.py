"""Alignment: SFT, DPO and the verifier, as three tasks for the one loop in train.py.

    python align.py config/sft.py --init_from=out/toy/pretrain          # a run folder, a checkpoint file or a run's name
    python align.py config/dpo.py --init_from=out/toy/sft
    python align.py config/verifier.py --init_from=out/toy/dpo
    torchrun --nproc_per_node=4 align.py config/h100_sft.py --init_from=out/h100/pretrain

Sources: DPO arXiv 2305.18290, cDPO ericmitchell.ai/cdpo.pdf, IPO 2310.12036, SimPO 2405.14734, RPO 2404.19733, verifier 2110.14168.
"""

import bisect
import hashlib
import json
import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

import configurator
import data
import problems
import tasks
from checkpoint import checkpoint_files, load_checkpoint, model_from, weights_hash
from configurator import UserError
from model import GPT
from ranks import Ranks
from train import PREEMPTED, LoopConfig, is_done, train


@dataclass
class AlignConfig(LoopConfig):
    mode: str = "sft"  # sft, dpo or verifier
    init_from: str = ""  # run folder, checkpoint file or run name to start from
    tokenizer: str | None = (
        None  # None = the checkpoint's; else toy, byte, gpt2 or a ranks file, which must be the same
    )
    seq_len: int | None = None  # tokens per packed row (dpo: longest pair); None = the checkpoint's
    replay: float = 0.0  # sft: share of the rows that are pretraining text, against forgetting it
    replay_data: str | None = None  # sft: its shards; None = what the checkpoint was pretrained on
    on_policy: bool = False  # dpo: pairs of right and wrong samples for the problems of data, instead of its preference records
    loss_type: str = "sigmoid"  # dpo: sigmoid, ipo or simpo
    beta: float = 0.1  # dpo: strength of the pull to the reference (ipo: tau)
    label_smoothing: float = (
        0.0  # dpo: share of pairs taken to be labelled the wrong way round (cDPO)
    )
    rpo_alpha: float = 0.0  # dpo: weight of the NLL of the chosen answer, per token (RPO)
    simpo_gamma: float = 0.5  # simpo: target margin, as a share of beta
    n_problems: int | None = (
        None  # verifier, on_policy: problems to sample solutions for; None = all
    )
    n_samples: int = 4  # verifier, on_policy: solutions per problem
    temperature: float = 0.8  # verifier, on_policy: of these samples
    calculator: bool = (
        False  # verifier, on_policy: work out <<3+4= for the model (Cobbe et al. 2021)
    )
    max_new_tokens: int = 64  # longest solution; also of the answers shown before and after
    lm_coef: float = 1.0  # verifier: weight of the language-model loss on the reference solutions
    level: str = (
        "token"  # verifier: a label on every token of a solution, or on the last alone (solution)
    )
    n_answers: int = 32  # sft, dpo: held-out prompts answered before and after, for stop rate, length and repetition; 0 = none

    def __post_init__(self):
        super().__post_init__()
        faults = [
            f"{key} must be one of {', '.join(known)}, got {getattr(self, key)!r}"
            for key, known in (
                ("mode", tuple(TASKS)),
                ("loss_type", tuple(DPO_LOSSES)),
                ("level", ("token", "solution")),
            )
            if getattr(self, key) not in known
        ]
        if not self.init_from:
            faults.append("init_from is missing: give the run folder or checkpoint to start from")
        if not 0 <= self.label_smoothing < 0.5:
            faults.append(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if not 0 <= self.replay < 1:
            faults.append(f"replay must be in [0, 1), got {self.replay}")
        if self.beta <= 0:
            faults.append(f"beta must be above 0, got {self.beta}")
        if faults:
            raise UserError("; ".join(faults))


# ---------------------------------------------------------------------------------------------------------------------
# Objectives: pure functions of tensors


def sigmoid_loss(policy, reference, beta: float, smoothing: float = 0.0):
    """DPO, equation 7, with cDPO's label smoothing e: -(1-e) log s(beta d) - e log s(-beta d). Inputs: (2, B) summed log-probs of
    chosen and rejected; d is the policy's log-ratio less the reference's. -> (B,)"""
    d = beta * ((policy[0] - policy[1]) - (reference[0] - reference[1]))
    return -(1 - smoothing) * F.logsigmoid(d) - smoothing * F.logsigmoid(-d)


def ipo_loss(policy, reference, beta: float):
    """IPO, equation 17: (d - 1 / (2 tau))^2, with log-probs averaged per token. (2, B) -> (B,)"""
    return ((policy[0] - policy[1]) - (reference[0] - reference[1]) - 1 / (2 * beta)) ** 2


def simpo_loss(policy, beta: float, gamma: float):
    """SimPO, equation 6: -log s(beta (mean log-prob difference) - gamma), no reference. (2, B) -> (B,)"""
    return -F.logsigmoid(beta * (policy[0] - policy[1] - gamma))


def verifier_loss(scores, labels):
    """Token-level verifier (Cobbe et al. 2021, section 4.1; there with squared error): the sum over all tokens of the sampled
    solutions of the cross-entropy between sigmoid(score) and the solution's label. scores (B, T); labels (B, T) in {0, 1}, -1 = none."""
    return (
        F.binary_cross_entropy_with_logits(
            scores, labels.clamp(min=0).to(scores.dtype), reduction="none"
        )
        * (labels >= 0)
    ).sum()


DPO_LOSSES = {  # name -> loss(policy, reference, lengths, cfg): sums of log-probs (2, B), lengths (2, B) -> (B,)
    "sigmoid": lambda policy, reference, lengths, cfg: sigmoid_loss(
        policy, reference, cfg.beta, cfg.label_smoothing
    ),
    "ipo": lambda policy, reference, lengths, cfg: ipo_loss(
        policy / lengths, reference / lengths, cfg.beta
    ),
    "simpo": lambda policy, reference, lengths, cfg: simpo_loss(
        policy / lengths, cfg.beta, cfg.simpo_gamma
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Packing


def pack(lengths: list[int], space: int) -> list[list[int]]:
    """Best-fit decreasing: groups of items whose lengths sum to at most space, every item in exactly one group."""
    groups, open_groups = [], []  # open_groups: sorted (free space, group number)
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(open_groups, (lengths[item], -1))
        free, number = open_groups.pop(place) if place < len(open_groups) else (space, len(groups))
        assert lengths[item] <= free, f"item of {lengths[item]} tokens does not fit {space}"
        if number == len(groups):
            groups.append([])
        groups[number].append(item)
        bisect.insort(open_groups, (free - lengths[item], number))
    return groups


class Packed:
    """Documents (ids, and per id one label of each kind or -1), packed into rows; attention stays inside a document.

    A document of n ids takes n - 1 places: its first n - 1 ids as inputs, its last n - 1 labels as targets.
    """

    def __init__(self, documents: list[dict], seq_len: int, pad: int, seed: int):
        self.documents, self.seq_len, self.pad, self.seed = documents, seq_len, pad, seed
        self.rows = pack([len(d["ids"]) - 1 for d in documents], seq_len)

    def batch(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        """Rows as tensors (B, T): idx, docs (number of the document in its row, -1 on padding), and every label, -1 = none."""
        labels = [key for key in self.documents[0] if key != "ids"]
        out = {
            key: torch.full((len(numbers), self.seq_len), self.pad if key == "idx" else -1)
            for key in ("idx", "docs", *labels)
        }
        for b, number in enumerate(numbers):
            at = 0
            for k, i in enumerate(self.rows[number]):
                document = self.documents[i]
                end = at + len(document["ids"]) - 1
                out["idx"][b, at:end] = torch.tensor(document["ids"][:-1])
                out["docs"][b, at:end] = k
                for key in labels:
                    out[key][b, at:end] = torch.tensor(document[key][1:])
                at = end
        return out

    def shuffled(self, first: int, last: int) -> list[int]:
        return [
            data.shuffled_index(number, len(self.rows), self.seed)[1]
            for number in range(first, last)
        ]


def fingerprint(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def sampled_solutions(
    cfg: AlignConfig, model: GPT, tokenizer, split: str, ranks: Ranks
) -> list[dict]:
    """Problems of a split with the model's sampled solutions, from the run folder or made now by all ranks together."""
    asked = data.load_records(cfg.data, cfg.data_dir, "problems", split)[: cfg.n_problems]
    trunk = {name: x for name, x in model.state_dict().items() if not name.startswith("score")}
    key = fingerprint(
        [
            weights_hash(trunk),
            asked,
            cfg.n_samples,
            cfg.temperature,
            cfg.max_new_tokens,
            cfg.calculator,
            cfg.seed,
        ]
    )
    path = os.path.join(cfg.out_dir, f"samples_{split}_{key}.jsonl")
    if not os.path.exists(path):
        model.to(ranks.device)
        mine = problems.solve(
            model,
            tokenizer,
            asked[ranks.rank :: ranks.world],
            cfg.n_samples,
            cfg.temperature,
            cfg.max_new_tokens,
            cfg.seed,
            cfg.calculator,
            ranks.print,
        )
        parts = [mine]
        if ranks.world > 1:
            parts = [None] * ranks.world
            dist.all_gather_object(parts, mine)
        if ranks.main:
            data.write_jsonl(path, [row for part in parts for row in part])
        ranks.barrier()
    return data.read_jsonl(path)


class PackedTask:
    """What SFT and verifier share: train and val are Packed."""

    def pack_splits(self, cfg, documents: dict[str, list[dict]], tokenizer):
        self.train, self.val = (
            Packed(documents[split], self.tokens_per_row, tokenizer.pad, cfg.seed)
            for split in ("train", "val")
        )
        self.n_val_rows = len(self.val.rows)
        self.fingerprint = fingerprint([documents, self.tokens_per_row])

    def batch(self, split: str, first: int, last: int) -> dict:
        rows = (
            self.train if split == "train" else self.val
        )  # both shuffled: packing puts the longest documents first
        return rows.batch(rows.shuffled(first, last))


# ---------------------------------------------------------------------------------------------------------------------
# The three tasks (what a task owes the loop: train.train)


class SFT(PackedTask):
    """Next-token prediction on the assistant's words and the <|end|> after them; a share of the training rows may be plain text."""

    name, metrics = "sft", ["loss"]

    def __init__(self, cfg: AlignConfig, model: GPT, tokenizer, ranks: Ranks):
        self.tokens_per_row, self.replay = cfg.seq_len or model.cfg.seq_len, cfg.replay
        documents = {}
        for split in ("train", "val"):
            records = data.load_records(cfg.data, cfg.data_dir, "sft", split)
            chats = [data.render(record["messages"], tokenizer) for record in records]
            chats = data.fitting(
                chats,
                lambda chat: len(chat[0]) - 1,
                self.tokens_per_row,
                f"sft {split} chats",
                ranks.print,
            )
            documents[split] = [
                {"ids": ids, "targets": [i if s else -1 for i, s in zip(ids, supervised)]}
                for ids, supervised in chats
            ]
        self.prompts = [
            data.render_prompt(record["messages"][:-1], tokenizer) for record in records
        ]  # of val, the last split
        ids, targets = documents["train"][0]["ids"], documents["train"][0]["targets"]
        share = sum(t >= 0 for d in documents["train"] for t in d["targets"]) / sum(
            len(d["ids"]) for d in documents["train"]
        )
        ranks.print(
            f"sft: loss on responses only, {share:.0%} of tokens. The first chat, supervised part in [[ ]]:\n  "
            + marked(ids, targets, tokenizer)
        )
        self.pack_splits(cfg, documents, tokenizer)
        ranks.print(
            f"sft: {len(documents['train'])} chats in {len(self.train.rows)} rows of {self.tokens_per_row}, "
            f"{len(documents['val'])} for validation"
        )
        if cfg.replay:
            self.text = data.Mixture(
                cfg.replay_data, cfg.data_dir, "train", self.tokens_per_row, cfg.seed + 1, tokenizer
            )
            self.fingerprint = fingerprint([self.fingerprint, self.text.fingerprint])
            ranks.print(
                f"sft: {cfg.replay:.0%} of the rows are text of {cfg.replay_data}, and the training loss counts it; the validation loss does not"
            )

    def batch(self, split: str, first: int, last: int) -> dict:
        """Row number i of training is replayed text whenever the whole part of i * replay grows there."""
        if split == "val" or not self.replay:
            return super().batch(split, first, last)
        before = [
            math.floor(i * self.replay + 1e-9) for i in range(first, last + 1)
        ]  # texts among the rows before each
        plain = torch.tensor([b > a for a, b in zip(before, before[1:])])
        chats = super().batch("train", first - before[0], last - before[-1])
        batch = {
            key: x.new_zeros(last - first, self.tokens_per_row).masked_scatter(
                ~plain.unsqueeze(1), x
            )
            for key, x in chats.items()
        }
        if plain.any():
            rows = self.text.shuffled(before[0], before[-1])  # (n, T + 1)
            batch["idx"][plain], batch["targets"][plain] = rows[:, :-1], rows[:, 1:]
        return batch

    def units(self, batch: dict):
        return (batch["targets"] >= 0).sum()

    def loss(self, model: GPT, batch: dict):
        nll = model(batch["idx"], batch["targets"], batch["docs"])
        return nll + model.balance_loss() * self.units(batch), {"loss": nll}


def marked(ids: list[int], targets: list[int], tokenizer) -> str:
    """Decoded text with the supervised stretches in [[ ]]."""
    text, inside = "", False
    for token, target in zip(ids, targets):
        if (target >= 0) != inside:
            text += "]]" if inside else "[["
            inside = not inside
        text += tokenizer.decode([token])
    return repr(text + "]]" * inside)


class DPO:
    """Preference pairs. The reference is the starting checkpoint: its log-probs are computed once and kept on disk."""

    name = "dpo"
    metrics = [
        "loss",
        "rewards/accuracies",
        "rewards/margins",
        "rewards/chosen",
        "rewards/rejected",
        "logps/chosen",
        "logps/rejected",
    ]

    def __init__(self, cfg: AlignConfig, model: GPT, tokenizer, ranks: Ranks):
        self.cfg, self.pad = cfg, tokenizer.pad
        longest = cfg.seq_len or model.cfg.seq_len
        self.pairs = {}
        for split in ("train", "val"):
            records = (
                self.sampled_pairs(split, model, tokenizer, ranks)
                if cfg.on_policy
                else data.load_records(cfg.data, cfg.data_dir, "dpo", split)
            )
            pairs = [tasks.pair_ids(record, tokenizer) for record in records]
            self.pairs[split] = data.fitting(
                pairs, lambda pair: pair_length(pair), longest, f"dpo {split} pairs", ranks.print
            )
        self.prompts = [
            data.render_prompt(record["prompt"], tokenizer) for record in records
        ]  # of val, the last split
        used = max(pair_length(pair) for pairs in self.pairs.values() for pair in pairs)
        self.width = min(longest, -(-used // 64) * 64)
        self.tokens_per_row, self.n_val_rows = 2 * self.width, len(self.pairs["val"])
        self.fingerprint = fingerprint(
            [self.pairs, cfg.loss_type == "simpo" or weights_hash(model.state_dict())]
        )  # and the reference
        self.length_audit(ranks)
        self.reference = self.reference_logprobs(model, ranks) if cfg.loss_type != "simpo" else None
        if cfg.force or not checkpoint_files(cfg.out_dir):
            self.check_start(model, ranks)

    def sampled_pairs(self, split: str, model: GPT, tokenizer, ranks: Ranks) -> list[dict]:
        """Right against wrong samples of the starting model, on the problems of SFT and on those that it never saw."""
        rows = [
            row
            for part in (("train", "verifier") if split == "train" else (split,))
            for row in sampled_solutions(self.cfg, model, tokenizer, part, ranks)
        ]
        pairs = [pair for row in rows for pair in data.solution_pairs(row)]
        ranks.print(
            f"dpo {split}: {len(pairs)} pairs of a right and a wrong sample, from {len(rows)} problems x {self.cfg.n_samples} samples"
        )
        if not pairs:
            raise UserError(
                f"no problem of {self.cfg.data} ({split}) has both a right and a wrong sample: take a better model, more --n_samples "
                "or another --temperature"
            )
        return pairs

    def length_audit(self, ranks: Ranks):
        pairs = self.pairs["train"]
        chosen, rejected = (sum(len(pair[k]) for pair in pairs) / len(pairs) for k in (1, 2))
        longer = sum(len(pair[1]) > len(pair[2]) for pair in pairs) / len(pairs)
        ranks.print(
            f"dpo: {len(pairs)} pairs; the chosen answer has {chosen:.1f} tokens, the rejected {rejected:.1f}, "
            f"and it is the longer one in {longer:.0%}"
        )

    def reference_logprobs(self, model: GPT, ranks: Ranks) -> dict[str, torch.Tensor]:
        """{split: (2, n)} summed log-probs under the starting weights, from the run folder or computed now."""
        key = fingerprint(
            [weights_hash(model.state_dict()), self.fingerprint, data.TEMPLATE, self.width]
        )
        path = os.path.join(self.cfg.out_dir, f"reference_{key}.pt")
        if os.path.exists(path):
            ranks.print(f"dpo: reference log-probs from {path}")
            return torch.load(path, weights_only=True)
        model.to(ranks.device)
        reference = {}
        for split, pairs in self.pairs.items():
            share = torch.zeros(2, len(pairs), device=ranks.device)
            for first in range(
                ranks.rank * self.cfg.micro_batch, len(pairs), ranks.world * self.cfg.micro_batch
            ):
                last = min(first + self.cfg.micro_batch, len(pairs))
                tensors = {
                    k: x.to(ranks.device)
                    for k, x in self.tensors(split, range(first, last)).items()
                }
                with torch.no_grad(), ranks.autocast():
                    share[:, first:last] = sequence_logprobs(model, tensors)
            if ranks.world > 1:
                dist.all_reduce(share)
            reference[split] = share.cpu()
        if ranks.main:
            data.write_atomic(path, lambda f: torch.save(reference, f))
            ranks.print(f"dpo: reference log-probs computed, kept in {path}")
        return reference

    def check_start(self, model: GPT, ranks: Ranks):
        """With policy = reference the sigmoid loss is ln 2: anything else means that the two are computed differently."""
        model.to(ranks.device)
        batch = {
            k: x.to(ranks.device)
            for k, x in self.batch("train", 0, min(8, len(self.pairs["train"]))).items()
        }
        with torch.no_grad(), ranks.autocast():
            loss = float(self.preference_loss(sequence_logprobs(model, batch), batch).mean())
        ranks.print(
            f"dpo: {self.cfg.loss_type} loss {loss:.4f} before the first step (ln 2 = {math.log(2):.4f})"
        )
        if self.cfg.loss_type == "sigmoid":
            assert abs(loss - math.log(2)) < (1e-3 if ranks.dtype == torch.float32 else 3e-2), (
                f"DPO starts at {loss}, not at ln 2"
            )

    def tensors(self, split: str, numbers) -> dict[str, torch.Tensor]:
        """idx, targets: (2B, T), the B chosen answers first, padded on the right; targets -1 on prompt and padding."""
        idx = torch.full((2 * len(numbers), self.width), self.pad)
        targets = torch.full_like(idx, -1)
        for row, (number, answer) in enumerate((n, a) for a in (1, 2) for n in numbers):
            prompt, response = self.pairs[split][number][0], self.pairs[split][number][answer]
            ids = torch.tensor(prompt + response)
            idx[row, : len(ids) - 1] = ids[:-1]
            targets[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
        return {"idx": idx, "targets": targets}

    def batch(self, split: str, first: int, last: int) -> dict:
        n = len(self.pairs[split])
        numbers = [
            data.shuffled_index(i, n, self.cfg.seed)[1] if split == "train" else i
            for i in range(first, last)
        ]
        reference = (
            self.reference[split][:, numbers] if self.reference else torch.zeros(2, len(numbers))
        )
        return self.tensors(split, numbers) | {"reference": reference}

    def units(self, batch: dict):
        return batch["reference"].size(1)

    def preference_loss(self, policy, batch: dict) -> torch.Tensor:
        return DPO_LOSSES[self.cfg.loss_type](
            policy, batch["reference"], lengths(batch), self.cfg
        )  # (B,)

    def loss(self, model: GPT, batch: dict):
        policy, reference = sequence_logprobs(model, batch), batch["reference"]  # (2, B)
        loss = self.preference_loss(policy, batch)
        if self.cfg.rpo_alpha:
            loss = loss - self.cfg.rpo_alpha * policy[0] / lengths(batch)[0]
        rewards = self.cfg.beta * (policy - reference).detach()
        return loss.sum() + model.balance_loss() * loss.numel(), {
            "loss": loss.sum(),
            "rewards/accuracies": (rewards[0] > rewards[1]).float().sum(),
            "rewards/margins": (rewards[0] - rewards[1]).sum(),
            "rewards/chosen": rewards[0].sum(),
            "rewards/rejected": rewards[1].sum(),
            "logps/chosen": policy[0].sum(),
            "logps/rejected": policy[1].sum(),
        }

    def notes(self, result: dict, before: dict) -> list[str]:
        """What a reader of the curves would want to be told, in words."""
        notes = []
        if result["val_logps/chosen"] < before.get("val_logps/chosen", -math.inf):
            notes.append(
                "the chosen answers became less likely too: DPO optimises the margin alone; add --rpo_alpha=1 if the text suffers"
            )
        if result["val_rewards/accuracies"] > 0.995:
            notes.append(
                "held-out accuracy is saturated: these pairs may be told apart by something shallow, look at a few"
            )
        if result.get("val_loss", -math.inf) > before.get("val_loss", math.inf):
            notes.append(
                f"the held-out loss rose from {before['val_loss']:.3f} to {result['val_loss']:.3f}: lower --learning_rate, or fewer steps"
            )
        return notes


def pair_length(pair) -> int:
    return len(pair[0]) + max(len(pair[1]), len(pair[2])) - 1


def lengths(batch: dict) -> torch.Tensor:
    """Supervised tokens of each answer, (2, B): chosen, rejected."""
    return (batch["targets"] >= 0).sum(-1).view(2, -1)


def sequence_logprobs(model: GPT, batch: dict) -> torch.Tensor:
    """Summed log-probs of the supervised tokens, (2, B): chosen, rejected."""
    x = model.hidden(batch["idx"])
    return model.logprobs(x, batch["targets"]).sum(-1).view(2, -1)


class Verifier(PackedTask):
    """Scores solutions: trained on the model's own samples, labelled by their final answers, with the language-model loss on the
    reference solutions beside it. Its problems are of a split that SFT never saw; a few percent of it are for validation."""

    name, metrics = "verifier", ["loss", "lm_loss", "accuracy"]

    def __init__(self, cfg: AlignConfig, model: GPT, tokenizer, ranks: Ranks):
        self.cfg, self.tokens_per_row = cfg, cfg.seq_len or model.cfg.seq_len
        documents = {}
        for split, source in (("train", "verifier"), ("val", "val")):
            rows = sampled_solutions(cfg, model, tokenizer, source, ranks)
            documents[split] = [
                self.document(
                    row["question"],
                    solution["ids"],
                    -1,
                    int(solution["correct"]),
                    tokenizer,
                    cfg.level,
                )
                for row in rows
                for solution in row["solutions"]
            ]
            documents[split] += [
                self.document(
                    row["question"],
                    tokenizer.encode(row["answer"]) + [tokenizer.end],
                    1,
                    -1,
                    tokenizer,
                )
                for row in rows
            ]
            documents[split] = data.fitting(
                documents[split],
                lambda d: len(d["ids"]) - 1,
                self.tokens_per_row,
                f"verifier {split} solutions",
                ranks.print,
            )
            labels = [solution["correct"] for row in rows for solution in row["solutions"]]
            oracle = sum(any(s["correct"] for s in row["solutions"]) for row in rows) / len(rows)
            ranks.print(
                f"verifier {split}: {len(rows)} problems, {len(labels)} solutions, {sum(labels) / len(labels):.1%} right; "
                f"{oracle:.1%} of the problems have a right one"
            )
            if oracle < 0.02 or sum(labels) == len(labels):
                ranks.print(
                    "verifier: NOTE there is (nearly) nothing to rerank: the solutions are all wrong, or all right"
                )
            if split == "train":
                self.scale_scores(model.to(ranks.device), tokenizer, rows[:256])
        self.pack_splits(cfg, documents, tokenizer)

    @staticmethod
    @torch.no_grad()
    def scale_scores(model: GPT, tokenizer, rows: list[dict]):
        """Log-likelihoods of long solutions spread over tens of nats: let the scores, their multiples, begin with a deviation of at most 2."""
        problems.likelihoods(model, tokenizer, rows)
        spread = torch.tensor([s["loglik"] for row in rows for s in row["solutions"]]).std(
            correction=0
        )
        model.score_loglik.fill_(1 / max(1.0, float(spread) / 2))

    @staticmethod
    def document(
        question: str, solution: list[int], lm: int, label: int, tokenizer, level: str = "token"
    ) -> dict:
        prompt = data.render_prompt(data.user(question), tokenizer)
        unjudged = len(solution) - 1 if level == "solution" else 0
        return {
            "ids": prompt
            + solution
            + [
                tokenizer.eos
            ],  # one id more, so that the last of the solution is an input and has a score
            "targets": [-1] * len(prompt) + (solution if lm >= 0 else [-1] * len(solution)) + [-1],
            "labels": [-1] * (len(prompt) + 1 + unjudged) + [label] * (len(solution) - unjudged),
        }

    def units(self, batch: dict):
        return (batch["labels"] >= 0).sum()

    def loss(self, model: GPT, batch: dict):
        x = model.hidden(batch["idx"], batch["docs"])
        scores = model.scores(x, batch["idx"], batch["labels"] >= 0)
        loss, lm = verifier_loss(scores, batch["labels"]), model.nll(x, batch["targets"])
        right = (((scores > 0) == (batch["labels"] == 1)) & (batch["labels"] >= 0)).sum()
        return loss + self.cfg.lm_coef * lm + model.balance_loss() * self.units(batch), {
            "loss": loss,
            "lm_loss": lm,
            "accuracy": right,
        }


# ---------------------------------------------------------------------------------------------------------------------
# What tuning did to the answers


def mean_habits(cfg: AlignConfig, task, model: GPT, tokenizer) -> dict[str, float]:
    """Stop rate, length and repetition of greedy answers to held-out prompts."""
    prompts = [prompt for prompt in task.prompts if len(prompt) < model.cfg.seq_len][
        : cfg.n_answers
    ]
    return (
        {
            key: sum(values) / len(values)
            for key, values in tasks.habits(model, tokenizer, prompts, cfg.max_new_tokens).items()
        }
        if prompts
        else {}
    )


def habit_notes(before: dict, after: dict) -> list[str]:
    """What went wrong with the text, in words."""
    notes = []
    if after["stop_rate"] < before["stop_rate"] - 0.1:
        notes.append(
            f"answers stop by themselves less often: {before['stop_rate']:.0%} -> {after['stop_rate']:.0%}"
        )
    if after["repetition"] > before["repetition"] + 0.1:
        notes.append(
            f"the text collapses into repetition: {before['repetition']:.0%} -> {after['repetition']:.0%} of 4-grams are repeated; "
            "lower --learning_rate, raise --beta, or add --rpo_alpha=1"
        )
    if not 0.7 < after["length"] / before["length"] < 1.4:
        notes.append(
            f"the length of answers drifts: {before['length']:.0f} -> {after['length']:.0f} tokens; compare it with the length of the chosen ones"
        )
    return notes


TASKS = {"sft": SFT, "dpo": DPO, "verifier": Verifier}


def main(argv: list[str]) -> int:
    cfg = configurator.load(AlignConfig, argv, quiet=os.environ.get("RANK", "0") != "0")
    data.ensure(cfg.data, cfg.data_dir)
    start = load_checkpoint(cfg.init_from)
    tokenizer = data.load_tokenizer(
        cfg.tokenizer or start["tokenizer"]["name"], cfg.data_dir, start["tokenizer"]
    )
    if start.get("template", data.TEMPLATE) != data.TEMPLATE:
        raise UserError(
            f"{cfg.init_from} was tuned with chat template {start['template']}, this code has {data.TEMPLATE}"
        )
    if (
        cfg.replay and cfg.replay_data is None
    ):  # before the run is compared with what its folder holds
        cfg.replay_data = start["train_config"]["data"]
    with Ranks(cfg.device, cfg.dtype) as ranks:
        if is_done(cfg, ranks):
            return 0
        torch.manual_seed(cfg.seed)
        os.makedirs(cfg.out_dir, exist_ok=True)
        model = model_from(start, **({"score_head": True} if cfg.mode == "verifier" else {}))
        task = TASKS[cfg.mode](cfg, model, tokenizer, ranks)
        task.extra = {
            "tokenizer": tokenizer.spec(),
            "template": data.TEMPLATE,
            "init_from": {"ref": cfg.init_from, "weights_hash": start["weights_hash"]},
        }
        answers = (
            cfg.n_answers and cfg.mode != "verifier" and ranks.main and not cfg.fsdp
        )  # sharded weights cannot be asked from one rank
        before = mean_habits(cfg, task, model.to(ranks.device), tokenizer) if answers else {}
        result = train(cfg, task, model, ranks)
        notes = []
        if cfg.mode == "dpo" and result["state"] == "done":
            first = next(
                (
                    row
                    for row in data.read_metrics(os.path.join(cfg.out_dir, "metrics.jsonl"))
                    if "val_loss" in row
                ),
                {},
            )
            notes += task.notes(result, first)
        if before and result["state"] == "done":
            after = mean_habits(cfg, task, model, tokenizer)
            data.write_json(
                os.path.join(cfg.out_dir, "answers.json"), {"before": before, "after": after}
            )
            ranks.print(
                f"{cfg.mode}: greedy answers to held-out prompts, before -> after: stop by themselves {before['stop_rate']:.0%} -> {after['stop_rate']:.0%}, "
                f"{before['length']:.0f} -> {after['length']:.0f} tokens, repeated 4-grams {before['repetition']:.0%} -> {after['repetition']:.0%}"
            )
            notes += habit_notes(before, after) if cfg.mode == "dpo" else []
        for note in notes:
            ranks.print(f"{cfg.mode}: NOTE {note}")
        return PREEMPTED if result["state"] == "preempted" else 0


if __name__ == "__main__":
    configurator.run(main)
