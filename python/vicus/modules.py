"""Neighborhood attention as layers: projections of query, key and value, the attention, an output projection.

Constructors take the arguments of NATTEN 0.21 in its order, and by keyword those that earlier releases had. Parameters
are named and shaped as NATTEN's: `qkv.weight`, `qkv.bias`, `proj.weight`, `proj.bias` and, with a bias table, `rpb`.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from vicus import _arguments, context, functional, unfused
from vicus.types import CausalArgTypeOrDed, DimensionTypeOrDed

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]


def _one_of(**given):
    """The value of the one argument of two names that was given; None when neither was."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise TypeError(f"{' and '.join(names)} name the same argument; give one")
    return given[names[0]] if names else None


class NeighborhoodAttentionGeneric(nn.Module):
    """What the layers of every rank share; see `NeighborhoodAttention2D`."""

    na_dim: ClassVar[int]

    def __init__(
        self,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        kernel_size: DimensionTypeOrDed | None = None,
        stride: DimensionTypeOrDed = 1,
        dilation: DimensionTypeOrDed = 1,
        is_causal: CausalArgTypeOrDed = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        num_query_groups: int | None = None,
        attn_drop: float = 0.0,
        rel_pos_bias: bool | None = None,
        bias: bool | None = None,
        dim: int | None = None,
    ) -> None:
        super().__init__()
        embed_dim = _one_of(embed_dim=embed_dim, dim=dim)
        for name, value in (("embed_dim", embed_dim), ("num_heads", num_heads), ("kernel_size", kernel_size)):
            if value is None:
                raise TypeError(f"{type(self).__name__} needs {name}")
        if num_heads < 1 or embed_dim % num_heads != 0:
            raise _arguments.wrong("num_heads", num_heads, f"a divisor of embed_dim, {embed_dim}")
        groups = num_heads if num_query_groups is None else num_query_groups
        if groups < 1 or num_heads % groups != 0:
            raise _arguments.wrong("num_query_groups", groups, f"a divisor of num_heads, {num_heads}")

        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_query_groups = groups
        self.head_dim = embed_dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.kernel_size, self.stride, self.dilation, self.is_causal = _arguments.per_axis(
            self.na_dim, kernel_size, stride, dilation, is_causal, strict=True
        )

        self.qkv = nn.Linear(embed_dim, (num_heads + 2 * groups) * self.head_dim, bias=qkv_bias)
        if _one_of(rel_pos_bias=rel_pos_bias, bias=bias):
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * w - 1 for w in self.kernel_size)))
            nn.init.trunc_normal_(self.rpb, std=0.02, mean=0.0, a=-2.0, b=2.0)
        else:
            self.register_parameter("rpb", None)
        self.attn_drop_rate = attn_drop
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Attends.

        Args:
            x: `[B, *X, embed_dim]`, any floating dtype that the parameters share.

        Returns:
            `[B, *X, embed_dim]`.

        Raises:
            ValueError: `x` has another rank or another last dimension, or an axis is shorter than its window.
        """
        if x.dim() != self.na_dim + 2 or x.shape[-1] != self.embed_dim:
            raise _arguments.wrong(
                "x.shape", tuple(x.shape), f"[batch, {self.na_dim} token axes, embed_dim], embed_dim {self.embed_dim}"
            )
        groups = self.num_query_groups
        # Slices of one product, used in place by the operators: nothing is permuted or copied.
        heads = self.qkv(x).unflatten(-1, (self.num_heads + 2 * groups, self.head_dim))
        query, key, value = heads.split((self.num_heads, groups, groups), dim=-2)
        dropping = self.attn_drop_rate > 0 and self.training
        attend = self._fused if context.is_fused_na_enabled() and not dropping else self._unfused
        return self.proj_drop(self.proj(attend(query, key, value).flatten(-2)))

    def _fused(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _FUSED[self.na_dim](
            query,
            key,
            value,
            kernel_size=self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
            scale=self.scale,
            rpb=self.rpb,
        )

    def _unfused(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        _arguments.check_fits(query.shape[1:-2], self.kernel_size, self.dilation)
        mask = {"kernel_size": self.kernel_size, "dilation": self.dilation}
        more = {"stride": self.stride, "is_causal": self.is_causal}
        qk, av = _UNFUSED[self.na_dim]
        query, key, value = (x.movedim(-2, 1) for x in (query, key, value))
        scores = qk(query * self.scale, key, rpb=self.rpb, **mask, **more)
        return av(self.attn_drop(scores.softmax(-1)), value, **mask, **more).movedim(1, -2)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return (
            f"head_dim={self.head_dim}, num_heads={self.num_heads}, num_query_groups={self.num_query_groups}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}, "
            f"is_causal={self.is_causal}, has_bias={self.rpb is not None}"
        )


_ARGUMENTS = """

    Args:
        embed_dim: Channels of input and output; `head_dim` is `embed_dim / num_heads`. Earlier name: `dim`.
        num_heads: Query heads.
        kernel_size: Window, one integer or one per token axis, at least 2; `kernel_size * dilation` must fit each axis.
        stride: Queries that share a window, one integer or one per axis, 1 to `kernel_size`.
        dilation: Tokens from one key of a window to the next, one integer or one per axis.
        is_causal: Whether keys after the query are hidden, one bool or one per axis.
        qkv_bias: Whether the projection of query, key and value has a bias.
        qk_scale: Factor of query times key; None means `head_dim ** -0.5`. An explicit 0 is a 0.
        proj_drop: Dropout of the output, 0 to 1.
        num_query_groups: Key/value heads, a divisor of `num_heads` (grouped-query attention; 1 is multi-query
            attention). None means `num_heads`. The name is Transformer Engine's and Megatron's.
        attn_drop: Dropout of the attention weights, 0 to 1. While training, it runs the unfused operators, which hold
            the weights in memory.
        rel_pos_bias: Whether to learn a bias per head and relative position, `rpb` `[num_heads, 2 * w0 - 1, ...]`.
            Earlier name: `bias`.

    Raises:
        TypeError: A required argument is missing, or one was given under both of its names.
        ValueError: An argument out of its range.

    Source:
        NATTEN 0.21 (interface; `rel_pos_bias`, `attn_drop` and `dim` from 0.17), Hassani et al., Neighborhood Attention
        Transformer, 2023.
    """


class NeighborhoodAttention1D(NeighborhoodAttentionGeneric):
    na_dim = 1
    __doc__ = "Neighborhood attention over sequences, `[B, L, embed_dim]`." + _ARGUMENTS


class NeighborhoodAttention2D(NeighborhoodAttentionGeneric):
    na_dim = 2
    __doc__ = "Neighborhood attention over images, `[B, H, W, embed_dim]`." + _ARGUMENTS


class NeighborhoodAttention3D(NeighborhoodAttentionGeneric):
    na_dim = 3
    __doc__ = "Neighborhood attention over videos or volumes, `[B, T, H, W, embed_dim]`." + _ARGUMENTS


_FUSED = {1: functional.na1d, 2: functional.na2d, 3: functional.na3d}
_UNFUSED = {
    1: (unfused.na1d_qk, unfused.na1d_av),
    2: (unfused.na2d_qk, unfused.na2d_av),
    3: (unfused.na3d_qk, unfused.na3d_av),
}
