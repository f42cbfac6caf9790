"""Optimizers and schedule: Muon for the hidden matrices, AdamW for the rest, a learning rate by share of the horizon.

Sources: Muon kellerjordan.github.io/posts/muon and arXiv 2502.16982, WSD schedule 2404.06395.
"""

import math

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest (semi-)orthogonal matrix by Newton-Schulz: torch.optim.Muon's update, but over all matrices
    of one shape at once and in the fast dtype of the device (bf16 on a CPU without bf16 units costs 16 x; LOG.md).
    Parameters are matrices (m, n) or stacks of them (E, m, n). Coefficients: Keller Jordan's quintic.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, ns_steps=5, dtype=None):
        super().__init__(
            params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, ns_steps=ns_steps)
        )
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                buf = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buf.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buf, group["momentum"])  # Nesterov
                alone = (
                    id(p) if isinstance(p, DTensor) else None
                )  # a model shared out by FSDP may not fit whole: one matrix at a time
                by_shape.setdefault((*p.shape[-2:], alone), []).append((p, update))
            for (rows, columns, _), members in by_shape.items():
                updates = [whole(update).view(-1, rows, columns) for _, update in members]
                sizes = [len(u) for u in updates]
                updates = self.orthogonalize(torch.cat(updates), group["ns_steps"]).split(sizes)
                lr = group["lr"] * math.sqrt(max(1, rows / columns))
                for (p, _), update in zip(members, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(share_of(update.reshape(p.shape).to(p.dtype), p), alpha=-lr)

    def orthogonalize(self, g, steps: int):
        """(n, rows, columns) -> U V^T of each matrix, approximately: singular values end between about 0.7 and 1.2."""
        x = g.to(self.dtype or (torch.bfloat16 if g.is_cuda else torch.float32))
        tall = x.size(-2) > x.size(-1)
        x = x.transpose(-1, -2) if tall else x
        x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
        for _ in range(steps):
            a = x @ x.transpose(-1, -2)
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x.transpose(-1, -2) if tall else x


def whole(x):
    """All of a tensor of which FSDP gave this rank a part."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def share_of(x, like):
    """x as FSDP shares `like` out, or x itself. Every rank has the whole of x: nothing is sent."""
    return (
        distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
        if isinstance(like, DTensor)
        else x
    )


def make_optimizers(model, cfg) -> list[torch.optim.Optimizer]:
    """Muon + AdamW, or AdamW alone; weight decay falls on the hidden matrices only."""
    groups = model.param_groups()
    adamw = [{"params": groups["adamw"], "weight_decay": 0.0}]
    optimizers = []
    if cfg.optimizer == "muon":
        optimizers.append(
            Muon(groups["muon"], cfg.muon_lr, cfg.momentum, cfg.weight_decay, cfg.ns_steps)
        )
    else:
        adamw.append({"params": groups["muon"], "weight_decay": cfg.weight_decay})
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    optimizers.append(
        torch.optim.AdamW(
            adamw, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), eps=1e-10, fused=fused
        )
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_at(step: int, cfg) -> float:
    """Learning rate of a step as a share of its peak; the first is above 0, the last is just above final_lr_frac."""
    warmup, decay = round(cfg.warmup_frac * cfg.max_steps), round(cfg.decay_frac * cfg.max_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if cfg.schedule == "cosine":
        progress = (step - warmup) / max(1, cfg.max_steps - warmup)
        share = (1 + math.cos(math.pi * progress)) / 2
    else:
        share = min(1.0, (cfg.max_steps - step) / max(1, decay))
    return cfg.final_lr_frac + (1 - cfg.final_lr_frac) * share
