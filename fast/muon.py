"""Muon over all matrices of one shape at once, with the update of torch.optim.Muon.

Sources: kellerjordan.github.io/posts/muon and arXiv 2502.16982.
"""

import math
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest (semi-)orthogonal matrix by Newton-Schulz iterations.

    Parameters are matrices (m, n) or stacks of them (E, m, n). The iterations run in bf16 on a GPU
    and in float32 on a CPU, where bf16 costs 16 x as much (docs/log.md).
    """

    DEFAULTS: ClassVar = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, "ns_steps": 5}

    def __init__(self, params: list, dtype: torch.dtype | None = None, **settings: float):
        super().__init__(params, self.DEFAULTS | settings)
        self.dtype = dtype  # of the iterations

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for members in self.updates_by_shape(group).values():
                # a model that FSDP shares out may not fit whole: one matrix for each rank at a time
                sharded = isinstance(members[0][0], DTensor)
                at_once = dist.get_world_size() if sharded else len(members)
                for first in range(0, len(members), at_once):
                    self.take_step(members[first : first + at_once], group)

    def updates_by_shape(self, group: dict) -> dict[tuple, list[tuple[Tensor, Tensor]]]:
        """Return {(rows, columns): [(parameter, its Nesterov momentum)]}."""
        by_shape = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(buffer, group["momentum"])
            by_shape.setdefault(p.shape[-2:], []).append((p, update))
        return by_shape

    def take_step(self, members: list[tuple[Tensor, Tensor]], group: dict) -> None:
        """Change parameters of one shape by their orthogonalized updates."""
        rows, columns = members[0][0].shape[-2:]
        updates = [full_tensor(update).view(-1, rows, columns) for _, update in members]
        sizes = [len(update) for update in updates]
        updates = self.shared_out(torch.cat(updates), group["ns_steps"]).split(sizes)
        lr = group["lr"] * math.sqrt(max(1, rows / columns))
        for (p, _), update in zip(members, updates, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(shard_like(update.reshape(p.shape).to(p.dtype), p), alpha=-lr)

    def shared_out(self, g: Tensor, steps: int) -> Tensor:
        """Orthogonalize matrices (n, rows, columns), each on one of the ranks alone."""
        if not dist.is_initialized():
            return self.orthogonalize(g, steps)
        n_ranks = dist.get_world_size()
        each = -(-len(g) // n_ranks)
        own = torch.arange(each, device=g.device) + dist.get_rank() * each
        part = self.orthogonalize(g[own.clamp(max=len(g) - 1)], steps)  # the last again, to be even
        every = part.new_empty(n_ranks * each, *part.shape[1:])
        dist.all_gather_into_tensor(every, part.contiguous())
        return every[: len(g)]

    def orthogonalize(self, g: Tensor, steps: int) -> Tensor:
        """Return U V^T of each matrix of g (n, rows, columns), approximately.

        Singular values end between about 0.7 and 1.2. Coefficients: Keller Jordan's quintic.
        """
        x = g.to(self.dtype or (torch.bfloat16 if g.is_cuda else torch.float32))
        tall = x.size(-2) > x.size(-1)
        x = x.transpose(-1, -2) if tall else x
        x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
        for _ in range(steps):
            a = x @ x.transpose(-1, -2)
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x.transpose(-1, -2) if tall else x


def full_tensor(x: Tensor) -> Tensor:
    """Return all of a tensor of which FSDP gave this rank a shard."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(x: Tensor, like: Tensor) -> Tensor:
    """Return x sharded as FSDP shards `like`; every rank has all of x, so that nothing is sent."""
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
