"""Neighborhood attention in two halves, with the scores in memory between them: `qk` before a softmax, `av` after it.

For dropout of attention weights, research on scores, and published models that were written for this form. The fused
functions of `vicus.functional` hold no scores and are faster.

Layouts are heads first. Slots of a window are row-major in ascending order of keys, additional tokens last. A window
with fewer keys than slots (causal, or longer than its axis) leaves the upper slots of that axis unused: `qk` puts -inf
there, `av` ignores them. Scores are not scaled: multiply the query.

Every function is differentiable in any order, in reverse and forward mode, and under `torch.func`.
"""

from torch import Tensor

from vicus import _arguments, _ops_unfused
from vicus.types import CausalArgTypeOrDed, DimensionTypeOrDed

__all__ = [
    "na1d_av",
    "na1d_qk",
    "na2d_av",
    "na2d_qk",
    "na3d_av",
    "na3d_qk",
]


def _prepared(rank: int, *named: tuple[str, Tensor | None]) -> list[Tensor | None]:
    """Tensors of one kind and dtype, as the operators take them, which check shapes.

    The first two are required.
    """
    (name, first), *_ = named
    _arguments.check_kind(name, first, first)
    tensors = [x for _, x in named]
    if _arguments.autocasting(first.device.type):
        tensors = _arguments.autocast(first.device.type, *tensors)
    for i, (name_, _) in enumerate(named[1:], 1):
        if i == 1 or tensors[i] is not None:
            _arguments.check_kind(name_, tensors[i], tensors[0])
    if first.dim() != rank + 3:
        raise _arguments.wrong(f"{name}.shape", tuple(first.shape), f"[batch, heads, {rank} token axes, features]")
    return tensors


def _qk(rank, query, key, kernel_size, dilation, additional_keys, is_causal, rpb, stride) -> Tensor:
    mask = _arguments.per_axis(rank, kernel_size, stride, dilation, is_causal)
    if isinstance(query, Tensor) and isinstance(rpb, Tensor):
        rpb = rpb.to(query.dtype)
    named = (("query", query), ("key", key), ("additional_keys", additional_keys), ("rpb", rpb))
    return _ops_unfused.qk(*_prepared(rank, *named), *mask)


def _av(rank, attn, value, kernel_size, dilation, additional_values, is_causal, stride) -> Tensor:
    mask = _arguments.per_axis(rank, kernel_size, stride, dilation, is_causal)
    if isinstance(attn, Tensor) and isinstance(value, Tensor):
        attn = attn.to(value.dtype)  # a softmax under autocast comes in float32
    named = (("attn", attn), ("value", value), ("additional_values", additional_values))
    return _ops_unfused.av(*_prepared(rank, *named), *mask)


def na1d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: DimensionTypeOrDed,
    dilation: DimensionTypeOrDed = 1,
    additional_keys: Tensor | None = None,
    is_causal: CausalArgTypeOrDed = False,
    rpb: Tensor | None = None,
    stride: DimensionTypeOrDed = 1,
) -> Tensor:
    """Scores of sequences: query times key over each query's window, plus bias.

    Args:
        query: `[B, H, L, D]`, float32, float64, bfloat16 or float16.
        key: `[B, Hkv, L, D]`, `Hkv` divides `H`.
        kernel_size: Window in tokens, one integer or one per axis, at least 1; may exceed the axis.
        dilation: Tokens from one key of a window to the next, one integer or one per axis.
        additional_keys: `[B, Hkv, T, D]`, seen by every query, or None.
        is_causal: Whether keys after the query are hidden, one bool or one per axis.
        rpb: Bias per head and relative position, `[H, 2 * w - 1]`, or None.
        stride: Queries that share a window, one integer or one per axis, at most `kernel_size`.

    Returns:
        `[B, H, L, w + T]`, not scaled, -inf in unused slots.

    Raises:
        ValueError: An argument that breaks these rules.
        NotImplementedError: A tensor is sparse or nested.

    Source:
        NATTEN 0.17; `stride`, causal with `rpb`, grouped heads and long windows are new.
    """
    return _qk(1, query, key, kernel_size, dilation, additional_keys, is_causal, rpb, stride)


def na1d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: DimensionTypeOrDed,
    dilation: DimensionTypeOrDed = 1,
    additional_values: Tensor | None = None,
    is_causal: CausalArgTypeOrDed = False,
    stride: DimensionTypeOrDed = 1,
) -> Tensor:
    """Average of values by the weights of each query's window: the half after `na1d_qk` and a softmax.

    Args:
        attn: Weights `[B, H, L, w + T]`; cast to the dtype of `value`.
        value: `[B, Hkv, L, Dv]`, `Hkv` divides `H`; float32, float64, bfloat16 or float16.
        kernel_size: As in `na1d_qk`.
        dilation: As in `na1d_qk`.
        additional_values: `[B, Hkv, T, Dv]` or None.
        is_causal: As in `na1d_qk`.
        stride: As in `na1d_qk`.

    Returns:
        `[B, H, L, Dv]`.

    Raises:
        ValueError: An argument that breaks these rules.
        NotImplementedError: A tensor is sparse or nested.

    Source:
        NATTEN 0.17; `stride`, grouped heads and long windows are new.
    """
    return _av(1, attn, value, kernel_size, dilation, additional_values, is_causal, stride)


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: DimensionTypeOrDed,
    dilation: DimensionTypeOrDed = 1,
    additional_keys: Tensor | None = None,
    is_causal: CausalArgTypeOrDed = False,
    rpb: Tensor | None = None,
    stride: DimensionTypeOrDed = 1,
) -> Tensor:
    """Scores of images: query times key over each query's window, plus bias.

    Args:
        query: `[B, H, X, Y, D]`, float32, float64, bfloat16 or float16.
        key: `[B, Hkv, X, Y, D]`, `Hkv` divides `H`.
        kernel_size: Window in tokens, one integer or one per axis, at least 1; may exceed the axis.
        dilation: Tokens from one key of a window to the next, one integer or one per axis.
        additional_keys: `[B, Hkv, T, D]`, seen by every query, or None.
        is_causal: Whether keys after the query are hidden, one bool or one per axis.
        rpb: Bias per head and relative position, `[H, 2 * w0 - 1, 2 * w1 - 1]`, or None.
        stride: Queries that share a window, one integer or one per axis, at most `kernel_size`.

    Returns:
        `[B, H, X, Y, w0 * w1 + T]`, not scaled, -inf in unused slots.

    Raises:
        ValueError: An argument that breaks these rules.
        NotImplementedError: A tensor is sparse or nested.

    Source:
        NATTEN 0.17; `stride`, causal with `rpb`, grouped heads and long windows are new.
    """
    return _qk(2, query, key, kernel_size, dilation, additional_keys, is_causal, rpb, stride)


def na2d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: DimensionTypeOrDed,
    dilation: DimensionTypeOrDed = 1,
    additional_values: Tensor | None = None,
    is_causal: CausalArgTypeOrDed = False,
    stride: DimensionTypeOrDed = 1,
) -> Tensor:
    """Average of values by the weights of each query's window: the half after `na2d_qk` and a softmax.

    Args:
        attn: Weights `[B, H, X, Y, w0 * w1 + T]`; cast to the dtype of `value`.
        value: `[B, Hkv, X, Y, Dv]`, `Hkv` divides `H`; float32, float64, bfloat16 or float16.
        kernel_size: As in `na2d_qk`.
        dilation: As in `na2d_qk`.
        additional_values: `[B, Hkv, T, Dv]` or None.
        is_causal: As in `na2d_qk`.
        stride: As in `na2d_qk`.

    Returns:
        `[B, H, X, Y, Dv]`.

    Raises:
        ValueError: An argument that breaks these rules.
        NotImplementedError: A tensor is sparse or nested.

    Source:
        NATTEN 0.17; `stride`, grouped heads and long windows are new.
    """
    return _av(2, attn, value, kernel_size, dilation, additional_values, is_causal, stride)


def na3d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: DimensionTypeOrDed,
    dilation: DimensionTypeOrDed = 1,
    additional_keys: Tensor | None = None,
    is_causal: CausalArgTypeOrDed = False,
    rpb: Tensor | None = None,
    stride: DimensionTypeOrDed = 1,
) -> Tensor:
    """Scores of videos or volumes: query times key over each query's window, plus bias.

    Args:
        query: `[B, H, X, Y, Z, D]`, float32, float64, bfloat16 or float16.
        key: `[B, Hkv, X, Y, Z, D]`, `Hkv` divides `H`.
        kernel_size: Window in tokens, one integer or one per axis, at least 1; may exceed the axis.
        dilation: Tokens from one key of a window to the next, one integer or one per axis.
        additional_keys: `[B, Hkv, T, D]`, seen by every query, or None.
        is_causal: Whether keys after the query are hidden, one bool or one per axis.
        rpb: Bias per head and relative position, `[H, 2 * w0 - 1, 2 * w1 - 1, 2 * w2 - 1]`, or None.
        stride: Queries that share a window, one integer or one per axis, at most `kernel_size`.

    Returns:
        `[B, H, X, Y, Z, w0 * w1 * w2 + T]`, not scaled, -inf in unused slots.

    Raises:
        ValueError: An argument that breaks these rules.
        NotImplementedError: A tensor is sparse or nested.

    Source:
        NATTEN 0.17; `stride`, causal with `rpb`, grouped heads and long windows are new.
    """
    return _qk(3, query, key, kernel_size, dilation, additional_keys, is_causal, rpb, stride)


def na3d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: DimensionTypeOrDed,
    dilation: DimensionTypeOrDed = 1,
    additional_values: Tensor | None = None,
    is_causal: CausalArgTypeOrDed = False,
    stride: DimensionTypeOrDed = 1,
) -> Tensor:
    """Average of values by the weights of each query's window: the half after `na3d_qk` and a softmax.

    Args:
        attn: Weights `[B, H, X, Y, Z, w0 * w1 * w2 + T]`; cast to the dtype of `value`.
        value: `[B, Hkv, X, Y, Z, Dv]`, `Hkv` divides `H`; float32, float64, bfloat16 or float16.
        kernel_size: As in `na3d_qk`.
        dilation: As in `na3d_qk`.
        additional_values: `[B, Hkv, T, Dv]` or None.
        is_causal: As in `na3d_qk`.
        stride: As in `na3d_qk`.

    Returns:
        `[B, H, X, Y, Z, Dv]`.

    Raises:
        ValueError: An argument that breaks these rules.
        NotImplementedError: A tensor is sparse or nested.

    Source:
        NATTEN 0.17; `stride`, grouped heads and long windows are new.
    """
    return _av(3, attn, value, kernel_size, dilation, additional_values, is_causal, stride)
