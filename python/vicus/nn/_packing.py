"""Sequences of different lengths: padded to one length, or packed one after the other, with or without gaps."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Packed", "pack", "unpack"]


@dataclasses.dataclass(frozen=True)
class Packed:
    """Where the sequences of a packed tensor `[T, ...]` are.

    Attributes:
        starts: First token of each sequence, int `[N]`.
        lengths: Tokens of each sequence, int `[N]`.
        longest: Tokens of the longest one, or more.
        gaps: Whether there may be tokens that belong to no sequence.
    """

    starts: Tensor
    lengths: Tensor
    longest: int
    gaps: bool

    def valid(self) -> Tensor:
        """Bool `[N, longest]`: which tokens there are when every sequence is padded to the longest."""
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths[:, None]

    def _tokens(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sequence, place in it, and whether it is in one, of each of `count` tokens."""
        token = torch.arange(count, device=self.starts.device)
        sequence = torch.searchsorted(self.starts.contiguous(), token, right=True) - 1
        # Of sequences with the same start the last was found: the others are empty.
        sequence = sequence.clamp(min=0)
        place = token - self.starts[sequence]
        return sequence, place, (place >= 0) & (place < self.lengths[sequence])

    def present(self, count: int) -> Tensor:
        """Bool `[count]`: which tokens belong to a sequence."""
        return self._tokens(count)[2]

    def pad(self, x: Tensor) -> Tensor:
        """`[T, ...]` to `[N, longest, ...]`, zeros where there is no token."""
        places = torch.arange(self.longest, device=x.device)
        index = (self.starts[:, None] + places).clamp(max=max(x.shape[0] - 1, 0))
        if x.shape[0] == 0:  # the sum of nothing keeps the result a function of x
            return x.new_zeros(len(self.starts), self.longest, *x.shape[1:]) + x.sum()
        return x[index].masked_fill(~self.valid().view(*index.shape, *(1,) * (x.dim() - 1)), 0)

    def unpad(self, x: Tensor, count: int) -> Tensor:
        """`[N, longest, ...]` back to `[count, ...]`, zeros in the gaps."""
        if self.longest == 0:
            return x.new_zeros(count, *x.shape[2:]) + x.sum()
        sequence, place, present = self._tokens(count)
        taken = x[sequence, place.clamp(0, self.longest - 1)]
        return taken.masked_fill(~present.view(-1, *(1,) * (taken.dim() - 1)), 0)


def pack(x: Tensor, valid: Tensor) -> Tensor:
    """The tokens of `x` `[B, S, ...]` where `valid` `[B, S]` is set, one after the other: `[1, T, ...]`. Waits for the
    device: how many there are decides the shape."""
    return x[valid][None]


def unpack(packed: Tensor, valid: Tensor) -> Tensor:
    """`[1, T, ...]` back to the places of `valid`, zeros elsewhere: `[B, S, ...]`."""
    output = packed.new_zeros(*valid.shape, *packed.shape[2:])
    return output.masked_scatter(valid.view(*valid.shape, *(1,) * (packed.dim() - 2)), packed)


def cumulative(lengths: Tensor) -> Tensor:
    """`[0, l0, l0 + l1, ...]`, int32."""
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
