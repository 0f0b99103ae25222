"""Arguments of the operators: what they may be, and one form of each.

Every public function comes through here, so a rule has one text and one exception. Arguments that break a rule raise
ValueError, "<argument> is <got>; allowed: <allowed>"; tensors of a kind that no engine takes (sparse, nested) raise
NotImplementedError, as NATTEN 0.21 does. The core checks its own rules on top of these when an operator runs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vicus.types import KernelSchedule

Axes = tuple[int, ...]
Flags = tuple[bool, ...]

_ENGINES = {"auto": 0, "reference": 1, "cpu": 2, "sm80": 3, "sm90": 4}
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NO_EXTENTS = (0, 0, 0)


def wrong(argument: str, got: Any, allowed: str) -> ValueError:
    """The error of an argument that breaks a rule.

    Args:
        argument: As the caller wrote it, e.g. `kernel_size[1]`.
        got: What it was.
        allowed: What it may be, in words.

    Returns:
        The error, to be raised.
    """
    return ValueError(f"{argument} is {got}; allowed: {allowed}")


# --- Values per axis -------------------------------------------------------------------------------------------------


def _all(values: Sequence, kind: type, least: int) -> bool:
    return all(isinstance(value, kind) and value >= least for value in values)


def _axis_values(name: str, values: Any, rank: int, least: int) -> Axes:
    if isinstance(values, tuple) and len(values) == rank and _all(values, int, least):
        return values
    if isinstance(values, int) and values >= least:
        return (values,) * rank
    if isinstance(values, Sequence) and len(values) == rank and _all(values, int, least):
        return tuple(values)
    raise wrong(name, repr(values), f"an integer >= {least}, or {rank} of them, one per axis")


def _axis_flags(values: Any, rank: int) -> Flags:
    if isinstance(values, bool):
        return (values,) * rank
    if values is None:
        return (False,) * rank
    if isinstance(values, Sequence) and len(values) == rank and _all(values, bool, False):
        return tuple(values)
    raise wrong("is_causal", repr(values), f"a bool, or {rank} of them, one per axis")


def per_axis(
    rank: int, kernel_size: Any, stride: Any = 1, dilation: Any = 1, is_causal: Any = False, *, strict: bool = False
) -> tuple[Axes, Axes, Axes, Flags]:
    """The mask of a neighborhood, one value per token axis.

    Args:
        rank: Token axes, 1 to 3.
        kernel_size: Window: an int for every axis, or a sequence of `rank` ints, each >= 1.
        stride: Queries that share a window, the same form; at most `kernel_size`. None means 1.
        dilation: Tokens from one key of a window to the next, the same form. None means 1.
        is_causal: A bool or a sequence of `rank` bools. None means False.
        strict: NATTEN's stricter rule: `kernel_size` >= 2.

    Returns:
        The four, each a tuple of `rank` values.

    Raises:
        ValueError: Another type, another length, or a value out of range.

    Source:
        Names, forms and strict rules of NATTEN 0.21.
    """
    windows = _axis_values("kernel_size", kernel_size, rank, 2 if strict else 1)
    steps = _axis_values("stride", 1 if stride is None else stride, rank, 1)
    gaps = _axis_values("dilation", 1 if dilation is None else dilation, rank, 1)
    for window, step in zip(windows, steps, strict=True):
        if step > window:
            raise wrong("stride", steps, f"at most kernel_size, {windows}")
    return windows, steps, gaps, _axis_flags(is_causal, rank)


def check_fits(layout: Sequence[int], kernel_size: Axes, dilation: Axes) -> None:
    """NATTEN's stricter rule on sizes: a window never reaches beyond its axis.

    Args:
        layout: Tokens per axis.
        kernel_size: Window per axis.
        dilation: Dilation per axis.

    Raises:
        ValueError: `kernel_size * dilation` exceeds an axis.
    """
    for tokens, window, gap in zip(layout, kernel_size, dilation, strict=True):
        if window * gap > tokens:
            spans = tuple(w * d for w, d in zip(kernel_size, dilation, strict=True))
            raise wrong("kernel_size * dilation", spans, f"at most the token layout, {tuple(layout)}")


# --- Tensors ---------------------------------------------------------------------------------------------------------


def check_strided(name: str, x: Any) -> None:
    """`x` is a tensor that has a shape and strides.

    Raises:
        ValueError: It is no tensor.
        NotImplementedError: It is sparse or nested.
    """
    if not isinstance(x, Tensor):
        raise wrong(name, f"a {type(x).__name__}", "a torch.Tensor")
    if x.is_nested or x.layout is not torch.strided:
        raise NotImplementedError(f"{name} is a sparse or nested tensor; only dense (strided) tensors are supported")


def check_kind(name: str, x: Any, query: Tensor) -> None:
    """`x` is a tensor of the kind of `query`.

    Raises:
        ValueError: It is no tensor, or its device or dtype differs.
        NotImplementedError: It is sparse or nested.
    """
    check_strided(name, x)
    if x.device != query.device:
        raise wrong(f"{name}.device", x.device, f"the device of query, {query.device}")
    if x.dtype != query.dtype:
        raise wrong(f"{name}.dtype", x.dtype, f"the dtype of query, {query.dtype}")


def _check_size(name: str, x: Tensor, dim: int, size: int, of: str) -> None:
    if x.shape[dim] != size:
        raise wrong(f"{name}.shape[{dim}]", x.shape[dim], f"that of {of}, {size}")


def check_tensors(query: Tensor, key: Tensor, value: Tensor, *, dense: bool = False) -> None:
    """Query, key and value belong together.

    Args:
        query: `[B, *X, H, D]` of 1 to 3 token axes; dense `[B, Sq, H, D]`.
        key: `[B, *X, Hkv, D]`, `Hkv` divides `H`; dense `[B, Sk, Hkv, D]`.
        value: `[B, *X, Hkv, Dv]`; dense `[B, Sk, Hkv, Dv]`.
        dense: For dense attention.

    Raises:
        ValueError: Ranks, shapes, dtypes or devices do not fit, or an element type is not supported.
        NotImplementedError: A tensor is sparse or nested.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_kind(name, x, query)
    if query.dtype not in FLOATING:
        raise wrong("query.dtype", query.dtype, "float32, float64, bfloat16, float16")
    dims = query.dim()
    if dims != 4 if dense else dims not in (4, 5, 6):
        shape = "[batch, tokens, heads, head_dim]" if dense else "[batch, 1 to 3 token axes, heads, head_dim]"
        raise wrong("query.shape", tuple(query.shape), shape)
    if key.shape == value.shape == query.shape and 0 not in query.shape[-2:]:
        return  # the usual case
    for name, x in (("key", key), ("value", value)):
        if x.dim() != dims:
            raise wrong(f"{name}.shape", tuple(x.shape), f"as many dimensions as query, {dims}")
        _check_size(name, x, 0, query.shape[0], "query")
    for dim in (1,) if dense else range(1, dims - 2):
        if not dense:
            _check_size("key", key, dim, query.shape[dim], "query")
        _check_size("value", value, dim, key.shape[dim], "key")
    _check_size("key", key, -1, query.shape[-1], "query")
    _check_size("value", value, -2, key.shape[-2], "key")
    if key.shape[-2] < 1 or query.shape[-2] % key.shape[-2] != 0:
        raise wrong("key.shape[-2]", key.shape[-2], f"a divisor of the heads of query, {query.shape[-2]}")
    for name, x in (("query", query), ("value", value)):
        if x.shape[-1] < 1:
            raise wrong(f"{name}.shape[-1]", x.shape[-1], ">= 1")
    if query.shape[-2] < 1:
        raise wrong("query.shape[-2]", query.shape[-2], ">= 1")


def check_additional(
    query: Tensor, key: Tensor, value: Tensor, additional_keys: Tensor | None, additional_values: Tensor | None
) -> None:
    """Additional tokens belong to checked query, key and value.

    Args:
        query: As in `check_tensors`.
        key: As in `check_tensors`.
        value: As in `check_tensors`.
        additional_keys: `[B, T, Hkv, D]` or None.
        additional_values: `[B, T, Hkv, Dv]`, or None with `additional_keys`.

    Raises:
        ValueError: One without the other, or shapes, dtypes or devices do not fit.
        NotImplementedError: A tensor is sparse or nested.
    """
    if (additional_keys is None) != (additional_values is None):
        raise ValueError("additional_keys and additional_values: one is None; allowed: both tensors, or both None")
    if additional_keys is None:
        return
    for name, x, like, of in (
        ("additional_keys", additional_keys, key, "key"),
        ("additional_values", additional_values, value, "value"),
    ):
        check_kind(name, x, query)
        if x.dim() != 4:
            raise wrong(f"{name}.shape", tuple(x.shape), "[batch, tokens, heads_kv, head_dim]")
        for dim in (0, -2, -1):
            _check_size(name, x, dim, like.shape[dim], of)
    _check_size("additional_values", additional_values, 1, additional_keys.shape[1], "additional_keys")


def check_rpb(query: Tensor, rpb: Tensor, kernel_size: Axes) -> None:
    """A relative positional bias belongs to a checked query and its windows.

    Args:
        query: `[B, *X, H, D]`.
        rpb: `[H, 2 * w0 - 1, ...]`, float32, float64 or the dtype of `query`.
        kernel_size: Windows `w`.

    Raises:
        ValueError: Shape, dtype or device do not fit.
    """
    if not isinstance(rpb, Tensor):
        raise wrong("rpb", f"a {type(rpb).__name__}", "a torch.Tensor")
    if rpb.device != query.device:
        raise wrong("rpb.device", rpb.device, f"the device of query, {query.device}")
    if rpb.dtype not in (torch.float32, torch.float64, query.dtype):
        raise wrong("rpb.dtype", rpb.dtype, f"float32, float64 or the dtype of query, {query.dtype}")
    shape = (query.shape[-2], *(2 * w - 1 for w in kernel_size))
    if tuple(rpb.shape) != shape:
        raise wrong("rpb.shape", tuple(rpb.shape), f"[heads, 2 * kernel_size - 1 per axis], {shape}")


# --- Everything else -------------------------------------------------------------------------------------------------


def scale_of(scale: float | None, head_dim: int) -> float:
    """The factor of query times key: `scale` as given, 0.0 too; None means `head_dim ** -0.5`.

    Raises:
        ValueError: `scale` is no number.
    """
    if scale is None:
        return head_dim**-0.5
    if not isinstance(scale, (float, int)):
        raise wrong("scale", repr(scale), "a number, or None")
    return scale


def check_kernel_schedule(schedule: Any) -> None:
    """NATTEN's `kernel_schedule`: a hint for engines that have schedules, checked for all.

    Args:
        schedule: None, `"non"`, `"coop"`, `"pp"`, or a member of NATTEN's enum `KernelSchedule`.

    Raises:
        ValueError: Anything else.
    """
    if schedule is not None and schedule not in ("non", "coop", "pp") and not isinstance(schedule, KernelSchedule):
        raise wrong("kernel_schedule", repr(schedule), "None, 'non', 'coop', 'pp'")


def extents(name: str, values: Any, rank: int) -> tuple[int, int, int]:
    """A tile shape or a number of splits per axis as the core takes it.

    Args:
        name: Of the argument.
        values: None, or one int per axis: a sequence, or an int where there is one axis.
        rank: Token axes.

    Returns:
        Three ints, trailing axes last, zero where the engine is to choose.

    Raises:
        ValueError: Another type or length.

    Source:
        NATTEN 0.21.
    """
    if values is None:
        return _NO_EXTENTS
    if isinstance(values, int):
        values = (values,)
    if not isinstance(values, Sequence) or len(values) != rank or not all(isinstance(v, int) for v in values):
        raise wrong(name, repr(values), f"a sequence of {rank} integers, one per axis")
    return (*_NO_EXTENTS[rank:], *values)


def pack_options(
    engine: str = "auto",
    deterministic: bool = False,
    kv_parallelism: bool = True,
    memory_preference: int = 0,
    kv_splits: tuple[int, int, int] = _NO_EXTENTS,
    q_tile: tuple[int, int, int] = _NO_EXTENTS,
    backward_q_tile: tuple[int, int, int] = _NO_EXTENTS,
    kv_tile: tuple[int, int, int] = _NO_EXTENTS,
) -> tuple[int, ...]:
    """The operators' argument `options` (read by `plan_options` in src/torch/plans.cc).

    Args:
        engine: `"auto"`, `"reference"` or `"cpu"`; of tensors on a GPU `"auto"`, `"sm80"` or `"sm90"`.
        deterministic: Whether gradients must be bit-identical from run to run.
        kv_parallelism: Whether the backward pass may split the keys.
        memory_preference: 0 default, 1 strict, 2 unrestricted.
        kv_splits: Key splits per axis, zeros for the engine's choice.
        q_tile: Query tile of the forward pass, zeros for the engine's choice.
        backward_q_tile: The same for the backward pass.
        kv_tile: Key tile of the forward pass, zeros for the engine's choice.

    Returns:
        Nothing when everything has its default, otherwise 16 integers.
    """
    packed = (
        _ENGINES[engine],
        int(deterministic),
        int(kv_parallelism),
        memory_preference,
        *kv_splits,
        *q_tile,
        *backward_q_tile,
        *kv_tile,
    )
    return () if packed == _DEFAULT_OPTIONS else packed


_DEFAULT_OPTIONS = (0, 0, 1, 0, *_NO_EXTENTS, *_NO_EXTENTS, *_NO_EXTENTS, *_NO_EXTENTS)


def autocasting(kind: str) -> bool:
    """Whether an autocast region of this type of device is entered; "meta" has none, and PyTorch raises when asked."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast(kind: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors in the dtype of the current autocast region, as PyTorch's own attention casts them.

    Args:
        kind: Type of the device, `"cpu"` or `"cuda"`, whose autocast is on.
        tensors: Tensors or None.

    Returns:
        `tensors`, cast where their dtype is float32, float16 or bfloat16.
    """
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )
