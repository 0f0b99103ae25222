"""What tensor-parallel ranks tell each other: a sum where heads come together, forward and backward."""

from typing import Any

import torch
import torch.distributed
from torch import Tensor

__all__ = ["copied_to_ranks", "summed_over_ranks"]


def _sum(x: Tensor, group: Any) -> Tensor:
    x = x.contiguous().clone()
    torch.distributed.all_reduce(x, group=group)
    return x


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(gradient, ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def copied_to_ranks(x: Tensor, group: Any) -> Tensor:
    """`x`, which all ranks have; its gradient is the sum of theirs. Without a group, `x`."""
    return x if group is None or group.size() == 1 else _Copied.apply(x, group)


def summed_over_ranks(x: Tensor, group: Any) -> Tensor:
    """The sum of what the ranks have; each has its gradient. Without a group, `x`."""
    return x if group is None or group.size() == 1 else _Summed.apply(x, group)
