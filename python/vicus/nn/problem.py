"""What an attention layer asks of a backend, without a tensor in it: backends answer to this, and it can be logged."""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from vicus import _arguments
from vicus._arguments import wrong

__all__ = ["Neighborhood", "Problem"]

QKV_FORMATS = ("sbhd", "bshd", "thd")
MASK_TYPES = (
    "no_mask",
    "padding",
    "causal",
    "padding_causal",
    "causal_bottom_right",
    "padding_causal_bottom_right",
    "arbitrary",
)
BIAS_TYPES = ("no_bias", "pre_scale_bias", "post_scale_bias", "alibi")
SOFTMAX_TYPES = ("vanilla", "off-by-one", "learnable")
ATTENTION_TYPES = ("self", "cross")


def one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    """`value`, if it is one of the `allowed` words.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(value, str) or value not in allowed:
        raise wrong(name, repr(value), ", ".join(map(repr, allowed)))
    return value


def mask_type(value: Any, name: str = "attn_mask_type") -> str:
    """The name of a mask: Transformer Engine's words, in either order of "padding" and "causal", or Megatron's enum.

    Args:
        value: A string, or an enum member whose name is one.
        name: Of the argument, for the error.

    Raises:
        ValueError: No mask has this name.
    """
    word = getattr(value, "name", value)
    if isinstance(word, str):
        word = word.replace(",", "_")
        word = "padding_causal" if word == "causal_padding" else word
    return one_of(name, word, MASK_TYPES)


def window(attn_mask_type: str, window_size: Sequence[int] | None) -> tuple[int, int]:
    """The sliding window that goes with a mask, as Transformer Engine reads it.

    Args:
        attn_mask_type: As `mask_type` gives it.
        window_size: Keys (left, right) of the diagonal that a query sees besides the one on it; None for no bound.

    Returns:
        (-1, -1) or (>= 0, >= 0); with causal masks (-1, 0) or (>= 0, 0), to which a window that reaches to the right is
        cut, with a warning.

    Raises:
        ValueError: Another type or value.
    """
    causal = "causal" in attn_mask_type
    if window_size is None:
        return (-1, 0) if causal else (-1, -1)
    allowed = "(-1, 0) or (>= 0, 0)" if causal else "(-1, -1) or (>= 0, >= 0)"
    allowed = f"{allowed} with attn_mask_type {attn_mask_type!r}"
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise wrong("window_size", repr(window_size), allowed)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in window_size):
        raise wrong("window_size", repr(window_size), allowed)
    left, right = window_size
    if (left, right) in ((-1, -1), (-1, 0)):
        fitting = (-1, 0) if causal else (-1, -1)
    elif left >= 0 and (right >= 0 or (causal and right == -1)):
        fitting = (left, 0) if causal else (left, right)
    else:
        raise wrong("window_size", repr(window_size), allowed)
    if fitting != (left, right):
        warnings.warn(f"window_size is {(left, right)}; taken as {fitting}: allowed: {allowed}", stacklevel=3)
    return fitting


@dataclasses.dataclass(frozen=True)
class Neighborhood:
    """What makes an attention layer a neighborhood layer: the arguments of `vicus.neighborhood_attention`.

    Args:
        layout: Tokens per axis, 1 to 3 axes. Their product is the sequence length; the last axis varies fastest.
        kernel_size: Window per axis, an integer for every axis or one per axis.
        stride: Queries that share a window, the same form.
        dilation: Tokens from one key of a window to the next, the same form.
        is_causal: Whether keys after the query are hidden, a bool or one per axis.

    Raises:
        ValueError: A value out of its range.
    """

    layout: tuple[int, ...]
    kernel_size: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    is_causal: bool | tuple[bool, ...] = False

    def __post_init__(self) -> None:
        layout = (self.layout,) if isinstance(self.layout, int) else self.layout
        fits = isinstance(layout, Sequence) and 1 <= len(layout) <= 3
        if not fits or not all(isinstance(n, int) and n >= 1 for n in layout):
            raise wrong("neighborhood.layout", repr(self.layout), "1 to 3 integers >= 1, the tokens per axis")
        mask = _arguments.per_axis(len(layout), self.kernel_size, self.stride, self.dilation, self.is_causal)
        for name, values in zip(("kernel_size", "stride", "dilation", "is_causal"), mask, strict=True):
            object.__setattr__(self, name, values)
        object.__setattr__(self, "layout", tuple(layout))

    @property
    def tokens(self) -> int:
        """Tokens of the layout."""
        return math.prod(self.layout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One call of an attention layer as a backend sees it.

    Attributes:
        device: "cpu", "cuda", or another of PyTorch's device types.
        architecture: Compute capability of the device, (9, 0) for Hopper; None for what is no CUDA device.
        dtype: Of query, key and value, after autocast.
        batch: Sequences.
        num_heads: Query heads.
        num_groups: Key/value heads.
        head_dim_qk: Of query and key.
        head_dim_v: Of value.
        max_seqlen_q: Queries of the longest sequence.
        max_seqlen_kv: Keys of the longest sequence.
        same_lengths: Whether every sequence is known to have as many keys as queries.
        qkv_format: One of "sbhd", "bshd", "thd".
        attn_mask_type: One of Transformer Engine's names.
        window_size: Keys (left, right) of the diagonal, -1 for no bound.
        bottom_right_diagonal: Whether window and ALiBi count from the bottom right corner.
        bias_type: "no_bias", "pre_scale_bias", "post_scale_bias" or "alibi".
        bias_requires_grad: Whether the bias is to be differentiated.
        dropout: Of the attention weights, in effect: 0 outside of training.
        softcap: Bound of the scores, 0 for none.
        softmax_type: "vanilla", "off-by-one" or "learnable".
        return_max_logit: Whether the largest score of each head is wanted.
        differentiable: Whether gradients are wanted.
        deterministic: Whether results must be bit-identical from run to run.
        neighborhood: Windows over a token layout, or None.
        cudnn: Version of cuDNN as PyTorch counts it, 91900 for 9.19; None where there is none.
        cudnn_takes: PyTorch's word on the very tensors; None where it was not asked.
    """

    device: str
    architecture: tuple[int, int] | None = None
    dtype: torch.dtype = torch.bfloat16
    batch: int = 1
    num_heads: int = 1
    num_groups: int = 1
    head_dim_qk: int = 64
    head_dim_v: int = 64
    max_seqlen_q: int = 1
    max_seqlen_kv: int = 1
    same_lengths: bool = True
    qkv_format: str = "sbhd"
    attn_mask_type: str = "no_mask"
    window_size: tuple[int, int] = (-1, -1)
    bottom_right_diagonal: bool = True
    bias_type: str = "no_bias"
    bias_requires_grad: bool = False
    dropout: float = 0.0
    softcap: float = 0.0
    softmax_type: str = "vanilla"
    return_max_logit: bool = False
    differentiable: bool = False
    deterministic: bool = False
    neighborhood: Neighborhood | None = None
    cudnn: int | None = None
    cudnn_takes: bool | None = None

    @property
    def causal(self) -> bool:
        """Whether keys after the diagonal are hidden."""
        return "causal" in self.attn_mask_type

    @property
    def padding(self) -> bool:
        """Whether sequences have lengths of their own: padded, or packed."""
        return "padding" in self.attn_mask_type

    @property
    def windowed(self) -> bool:
        """Whether there is a sliding window besides the mask."""
        return self.window_size not in ((-1, -1), (-1, 0))

    @property
    def kind(self) -> str:
        """What the table of preferences calls the mask: "neighborhood", "window", "causal" or "full"."""
        if self.neighborhood is not None:
            return "neighborhood"
        return "window" if self.windowed else "causal" if self.causal else "full"

    def __str__(self) -> str:
        """The problem in a line: what differs from the usual is named."""
        where = self.device if self.architecture is None else f"sm{self.architecture[0]}{self.architecture[1]}"
        heads = f"heads {self.num_heads}/{self.num_groups}, head dim {self.head_dim_qk}"
        heads += "" if self.head_dim_v == self.head_dim_qk else f"/{self.head_dim_v}"
        tokens = f"{self.qkv_format}, batch {self.batch}, tokens {self.max_seqlen_q}/{self.max_seqlen_kv}"
        named = ("window_size", "bias_type", "dropout", "softcap", "softmax_type", "return_max_logit")
        named = (*named, "differentiable", "deterministic", "neighborhood")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        unusual = [f"{n} {getattr(self, n)}" for n in named if getattr(self, n) != defaults[n]]
        unusual = unusual if self.windowed else [text for text in unusual if not text.startswith("window_size")]
        dtype = str(self.dtype).removeprefix("torch.")
        return ", ".join([where, dtype, tokens, heads, f"mask {self.attn_mask_type}", *unusual])
