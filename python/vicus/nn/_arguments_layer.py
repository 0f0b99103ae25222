"""From the arguments of a call of an attention layer to what a backend computes: checks, layouts, lengths."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vicus import _arguments
from vicus._arguments import wrong
from vicus.nn._packing import Packed

__all__ = [
    "additive_bias",
    "divided",
    "fraction",
    "heads_last",
    "pair_mask",
    "positive",
    "sequences",
    "slopes_of",
]

Pair = tuple[Tensor | None, Tensor | None]


def positive(name: str, value: Any) -> int:
    """`value`, if it is an integer of at least 1.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise wrong(name, repr(value), "an integer >= 1")
    return value


def fraction(name: str, value: Any) -> float:
    """`value`, if it is a probability below 1.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise wrong(name, repr(value), "a number, 0 <= p < 1")
    return float(value)


def divided(name: str, value: int, of: str, total: int) -> int:
    """`total // value`, if that leaves nothing.

    Raises:
        ValueError: It does.
    """
    if total % value != 0:
        divisors = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
        raise wrong(name, value, f"a divisor of {of}, {total}: {divisors}")
    return total // value


def heads_last(
    qkv_format: str, query: Tensor, key: Tensor, value: Tensor, heads: int, groups: int, dims: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as `[B, S, H, D]` or packed `[T, H, D]`, checked, in place.

    Raises:
        ValueError: Ranks, shapes, dtypes or devices do not fit the layer or each other.
        NotImplementedError: A tensor is sparse or nested.
    """
    rank = 3 if qkv_format == "thd" else 4
    shape = {"sbhd": "[s, b, h, d]", "bshd": "[b, s, h, d]", "thd": "[t, h, d]"}[qkv_format]
    named = (("query_layer", query), ("key_layer", key), ("value_layer", value))
    for name, x in named:
        _arguments.check_kind(name, x, query)
        if x.dim() != rank:
            raise wrong(f"{name}.shape", tuple(x.shape), f"{shape} with qkv_format {qkv_format!r}")
    if query.dtype not in _arguments.FLOATING:
        raise wrong("query_layer.dtype", query.dtype, "float32, float64, bfloat16, float16")
    if key.shape[:-1] != value.shape[:-1]:
        raise wrong("value_layer.shape", tuple(value.shape), f"that of key_layer but for the last, {tuple(key.shape)}")
    wanted = ((query, heads, dims[0]), (key, groups, dims[0]), (value, groups, dims[1]))
    for (name, x), (_, count, dim) in zip(named, wanted, strict=True):
        if tuple(x.shape[-2:]) != (count, dim):
            raise wrong(f"{name}.shape", tuple(x.shape), f"{shape} with h = {count}, d = {dim} of this layer")
    if qkv_format == "thd":
        return query, key, value
    if qkv_format == "sbhd":
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    if query.shape[0] != key.shape[0]:
        raise wrong("key_layer's batch", key.shape[0], f"that of query_layer, {query.shape[0]}")
    return query, key, value


def _check_list(name: str, x: Tensor, device: torch.device) -> Tensor:
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64) or x.dim() != 1 or x.shape[0] < 2:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise wrong(name, got, "a torch.Tensor of int32, [batch + 1], that starts with 0 and never decreases")
    if x.device != device:
        raise wrong(f"{name}.device", x.device, f"the device of query_layer, {device}")
    if x.is_cpu and (x[0] != 0 or bool((x.diff() < 0).any())):  # elsewhere, looking would wait for the device
        raise wrong(name, x.tolist(), "a list that starts with 0 and never decreases")
    return x


def _lists(cu_seqlens: Pair, device: torch.device) -> tuple[Tensor, Tensor]:
    both = tuple(
        _check_list(name, x, device) for name, x in zip(("cu_seqlens_q", "cu_seqlens_kv"), cu_seqlens, strict=True)
    )
    if both[0].shape != both[1].shape:
        raise wrong("cu_seqlens_kv.shape", tuple(both[1].shape), f"that of cu_seqlens_q, {tuple(both[0].shape)}")
    return both


def _packed_lengths(
    query: Tensor,
    key: Tensor,
    cu_seqlens: Pair,
    cu_seqlens_padded: Pair,
    max_seqlens: tuple[int | None, int | None],
) -> tuple[Packed, Packed]:
    """Where the sequences of packed tensors are.

    Waits for the device, unless it is the CPU, where a longest length is not given.

    Args:
        query: `[T, H, D]`.
        key: `[Tkv, Hkv, D]`.
        cu_seqlens: Lengths, summed up, of queries and of keys.
        cu_seqlens_padded: Where each sequence starts, if there are gaps between them.
        max_seqlens: Tokens of the longest sequence.

    Raises:
        ValueError: A list is missing, or does not fit the tensors.
    """
    for name, x in zip(("cu_seqlens_q", "cu_seqlens_kv"), cu_seqlens, strict=True):
        if x is None:
            raise wrong(name, None, "an int32 tensor [batch + 1] with qkv_format 'thd'")
    lists = _lists(cu_seqlens, query.device)
    packed = []
    for name, cumulative, padded, longest, x in zip(
        ("q", "kv"), lists, cu_seqlens_padded, max_seqlens, (query, key), strict=True
    ):
        lengths, tokens = cumulative.diff(), x.shape[0]
        starts, gaps = cumulative[:-1], False
        if padded is not None and padded is not cumulative:
            _check_list(f"cu_seqlens_{name}_padded", padded, query.device)
            if padded.shape != cumulative.shape:
                raise wrong(f"cu_seqlens_{name}_padded.shape", tuple(padded.shape), f"{tuple(cumulative.shape)}")
            if padded.is_cpu and bool((lengths > padded.diff()).any()):
                raise wrong(f"cu_seqlens_{name}_padded", padded.tolist(), f"room for lengths {lengths.tolist()}")
            starts, gaps = padded[:-1], True
        if x.is_cpu:
            end = int((cumulative if padded is None else padded)[-1])
            if end > tokens:
                which = f"cu_seqlens_{name}" + ("" if padded is None else "_padded")
                raise wrong(f"{which}[-1]", end, f"at most the tokens there are, {tokens}")
            gaps = gaps or end < tokens
        if longest is None:
            longest = int(lengths.max())
        elif not isinstance(longest, int) or longest < 0 or (x.is_cpu and longest < int(lengths.max())):
            allowed = f"at least the longest sequence, {int(lengths.max())}" if x.is_cpu else "an integer >= 0"
            raise wrong(f"max_seqlen_{name}", repr(longest), allowed)
        packed.append(Packed(starts, lengths, longest, gaps))
    return packed[0], packed[1]


def _padding(query: Tensor, key: Tensor, cu_seqlens: Pair, attention_mask: Tensor | Sequence[Tensor] | None) -> Pair:
    """Which tokens of padded sequences are real.

    Args:
        query: `[B, Sq, H, D]`.
        key: `[B, Sk, Hkv, D]`.
        cu_seqlens: Lengths, summed up; of the queries alone where they are also those of the keys. They go first.
        attention_mask: Bool `[B, 1, 1, S]`, True where a token is padding, or one for queries and one for keys.

    Returns:
        Bool `[B, Sq]` and `[B, Sk]`, True where a token is real.

    Raises:
        ValueError: Neither is given, or one does not fit.
    """
    shapes = tuple((x.shape[0], x.shape[1]) for x in (query, key))
    if cu_seqlens[0] is not None:
        lists = _lists((cu_seqlens[0], cu_seqlens[0] if cu_seqlens[1] is None else cu_seqlens[1]), query.device)
        valid = []
        for name, cumulative, (batch, tokens) in zip(("q", "kv"), lists, shapes, strict=True):
            if cumulative.shape[0] != batch + 1:
                raise wrong(f"cu_seqlens_{name}.shape", tuple(cumulative.shape), f"[batch + 1], ({batch + 1},)")
            lengths = cumulative.diff()
            if lengths.is_cpu and bool((lengths > tokens).any()):
                raise wrong(f"cu_seqlens_{name}", cumulative.tolist(), f"lengths of at most {tokens} tokens")
            valid.append(torch.arange(tokens, device=lengths.device) < lengths[:, None])
        return valid[0], valid[1]
    if attention_mask is None:
        raise wrong("attention_mask", None, "a bool tensor, or cu_seqlens_q and cu_seqlens_kv, with padding masks")
    masks = attention_mask if isinstance(attention_mask, (tuple, list)) else (attention_mask, attention_mask)
    if len(masks) != 2:
        raise wrong("len(attention_mask)", len(masks), "one mask for queries and one for keys")
    for mask, (batch, tokens) in zip(masks, shapes, strict=True):
        fits = isinstance(mask, Tensor) and mask.dtype == torch.bool and tuple(mask.shape) == (batch, 1, 1, tokens)
        if not fits:
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            allowed = f"bool [batch, 1, 1, tokens], {(batch, 1, 1, tokens)}, True where a token is padding"
            raise wrong("attention_mask", got, allowed + "; one each for queries and keys where these differ")
        if mask.device != query.device:
            raise wrong("attention_mask.device", mask.device, f"the device of query_layer, {query.device}")
    return ~masks[0][:, 0, 0], ~masks[1][:, 0, 0]


@dataclasses.dataclass(frozen=True)
class Sequences:
    """How many sequences a call has, and where their tokens are.

    Attributes:
        batch: Sequences.
        lengths: Queries and keys of the longest one.
        same: Whether every sequence is known to have as many keys as queries.
        valid: Bool `[B, Sq]` and `[B, Sk]`, True where a token is no padding; or None and None.
        padded_at_end: Whether padding, if any, is known to follow all tokens of its sequence.
        packed: Where the sequences of packed query and key are; or None.
    """

    batch: int
    lengths: tuple[int, int]
    same: bool
    valid: Pair = (None, None)
    padded_at_end: bool = True
    packed: tuple[Packed, Packed] | None = None


def sequences(
    query: Tensor,
    key: Tensor,
    qkv_format: str,
    padded: bool,
    attention_mask: Any,
    cu_seqlens: Pair,
    cu_seqlens_padded: Pair,
    max_seqlens: tuple[int | None, int | None],
) -> Sequences:
    """The sequences of a call.

    Args:
        query: `[B, Sq, H, D]`, or packed `[T, H, D]` with `qkv_format` "thd".
        key: `[B, Sk, Hkv, D]` or `[Tkv, Hkv, D]`.
        qkv_format: Of the call.
        padded: Whether the mask is a padding mask.
        attention_mask: As in `DotProductAttention.forward`, as the other arguments.

    Raises:
        ValueError: A list or mask is missing, or does not fit the tensors.
    """
    if qkv_format == "thd":
        packed = _packed_lengths(query, key, cu_seqlens, cu_seqlens_padded, max_seqlens)
        lengths = (packed[0].lengths, packed[1].lengths)
        same = cu_seqlens[0] is cu_seqlens[1] or (query.is_cpu and torch.equal(*lengths))
        return Sequences(lengths[0].shape[0], (packed[0].longest, packed[1].longest), same, packed=packed)
    lengths = (query.shape[1], key.shape[1])
    if not padded:
        return Sequences(query.shape[0], lengths, lengths[0] == lengths[1])
    valid = _padding(query, key, cu_seqlens, attention_mask)
    same = lengths[0] == lengths[1] and query.is_cpu and torch.equal(valid[0].sum(-1), valid[1].sum(-1))
    return Sequences(query.shape[0], lengths, same, valid, padded_at_end=cu_seqlens[0] is not None)


def _of_pairs(name: str, x: Tensor, device: torch.device, full: tuple[int, int, int, int]) -> Tensor:
    """`x` with four dimensions, each 1 or that of `full`."""
    if x.device != device:
        raise wrong(f"{name}.device", x.device, f"the device of query_layer, {device}")
    shape = (1,) * (4 - x.dim()) + tuple(x.shape)
    if len(shape) != 4 or any(got not in (1, size) for got, size in zip(shape, full, strict=True)):
        raise wrong(f"{name}.shape", tuple(x.shape), f"broadcastable to [batch, heads, queries, keys], {full}")
    return x.view(shape)


def pair_mask(attention_mask: Tensor | None, device: torch.device, full: tuple[int, int, int, int]) -> Tensor:
    """The mask of `attn_mask_type` "arbitrary": bool, True where a pair is hidden, broadcastable to `full`.

    Raises:
        ValueError: It is missing, or does not fit.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dtype != torch.bool:
        got = attention_mask.dtype if isinstance(attention_mask, Tensor) else f"a {type(attention_mask).__name__}"
        raise wrong(
            "attention_mask", got, "a bool tensor, True where a pair is hidden, with attn_mask_type 'arbitrary'"
        )
    return _of_pairs("attention_mask", attention_mask, device, full)


def additive_bias(
    bias_type: str, bias: Tensor | None, device: torch.device, full: tuple[int, int, int, int]
) -> Tensor | None:
    """The bias that goes with `bias_type`: floating, broadcastable to `full`; None for "no_bias" and "alibi".

    Raises:
        ValueError: It is missing, not wanted, or does not fit.
    """
    if bias_type in ("no_bias", "alibi"):
        if bias is not None:
            raise wrong("core_attention_bias", "given", f"None with core_attention_bias_type {bias_type!r}")
        return None
    if not isinstance(bias, Tensor) or bias.dtype not in _arguments.FLOATING:
        got = bias.dtype if isinstance(bias, Tensor) else f"a {type(bias).__name__}"
        raise wrong("core_attention_bias", got, f"a floating tensor with core_attention_bias_type {bias_type!r}")
    return _of_pairs("core_attention_bias", bias, device, full)


def slopes_of(bias_type: str, slopes: Tensor | None, device: torch.device, batch: int, heads: int) -> Tensor | None:
    """Slopes of ALiBi, `[H]` or `[B, H]`, the usual ones where none are given; None for other biases.

    Raises:
        ValueError: They are not wanted, or do not fit.
    """
    if bias_type != "alibi":
        if slopes is not None:
            raise wrong("alibi_slopes", "given", f"None with core_attention_bias_type {bias_type!r}")
        return None
    if slopes is None:
        from vicus.nn._masks import alibi_slopes

        return alibi_slopes(heads, device)
    if not isinstance(slopes, Tensor) or tuple(slopes.shape) not in ((heads,), (batch, heads)):
        got = tuple(slopes.shape) if isinstance(slopes, Tensor) else f"a {type(slopes).__name__}"
        raise wrong("alibi_slopes", got, f"a float32 tensor, [heads] or [batch, heads], {(heads,)} or {(batch, heads)}")
    if slopes.device != device or not slopes.is_floating_point():
        raise wrong("alibi_slopes", f"{slopes.dtype} on {slopes.device}", f"float32, on {device}")
    return slopes
