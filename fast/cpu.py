"""Forms that pay on the CPU in eager mode, where torch has no fused kernel of its own.

Elsewhere, and with fast.ENABLED = False, each is the plain operation that it stands for.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fast

aten = torch.ops.aten


def pays(x: Tensor) -> bool:
    """Say whether x is trained on eagerly on the CPU; without gradients plain forms are faster."""
    eager = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return fast.ENABLED and eager and x.device.type == "cpu"


class FusedRMSNorm(torch.autograd.Function):
    """x / rms(x) * weight in a quarter of F.rms_norm's time.

    The backward pass is LayerNorm's kernel, told that the mean is 0. With n = x / rms(x) and
    g = dout * weight it gives (g - n mean(g n) - mean(g)) / rms(x). The last term belongs to the
    mean that RMSNorm does not take: it is added again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1))
        inverse = mean_square.add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:
        x, weight, inverse = ctx.saved_tensors
        kernel, mean = aten.native_layer_norm_backward, torch.zeros_like(inverse)
        wanted = [True, True, False]
        dx, dweight, _ = kernel(dout, x, [x.size(-1)], mean, inverse, weight, None, wanted)
        mean_term = (dout @ weight).unsqueeze(-1)
        return dx.addcmul_(mean_term, inverse, value=1 / x.size(-1)), dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """F.rms_norm over the last dimension."""
    if pays(x) and x.dtype != torch.bfloat16:
        return FusedRMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, (x.size(-1),), weight, eps=eps)


def split_linear(x: Tensor, weight: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """x @ weight.T, cut into parts of these sizes along the last dimension.

    In training each part is a product of its own, since what follows reads and writes it whole.
    """
    if pays(x):
        return tuple(F.linear(x, w) for w in weight.split(sizes))
    return linear(x, weight).split(sizes, dim=-1)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear; in generation, for up to 8 rows, in the forms that read the weights fastest."""
    n_rows = x.numel() // x.size(-1)
    training = torch.is_grad_enabled() or x.device.type != "cpu" or not fast.ENABLED
    if training or not 1 <= n_rows <= 8 or x.dtype != weight.dtype:
        return F.linear(x, weight)
    rows = x.reshape(n_rows, -1)
    if n_rows == 1 and weight.size(0) % 8 == 0:
        eighths = weight.unflatten(0, (8, -1))
        return torch.bmm(eighths, rows.T.expand(8, -1, 1)).view(*x.shape[:-1], -1)
    y = (weight @ rows.T).T.contiguous()  # the attention kernel wants rows that lie whole
    return y.view(*x.shape[:-1], -1)
