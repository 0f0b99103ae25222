"""Backend "flex": PyTorch's FlexAttention with our masks. It serves devices that no engine of vicus knows.

Eager by default: FlexAttention then computes every score and masks afterwards, in memory quadratic in the tokens. With
``torch_compile=True``, where `vicus.context` allows it, Inductor makes a kernel that skips blocks of keys that the mask
hides. Where FlexAttention has no backward pass (CPU, MPS) or does not know the device at all, gradients come from the
same computation written in differentiable PyTorch, which also gives second derivatives.

Differences from the engines: a NaN in a value reaches every query (its weight of zero is multiplied, not skipped), and
eager FlexAttention repeats keys and values for grouped heads in memory.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from vicus import context
from vicus._arguments import wrong
from vicus._flex_masks import (
    BLOCK,
    Bias,
    Ints,
    Mask,
    Order,
    band_blocks,
    blocks_of,
    dense_bias,
    dense_mask,
    neighborhood_blocks,
    packed_sequences,
    rpb_bias,
)

__all__ = ["dense", "neighborhood", "unsupported"]

_HAS_FLEX = ("cuda", "xpu", "hpu", "cpu", "mps")
_HAS_FLEX_BACKWARD = ("cuda", "xpu", "hpu")


# --- What may run ----------------------------------------------------------------------------------------------------


def _trains(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _has_tangent(*tensors: Tensor | None) -> bool:
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def unsupported(query: Tensor, key: Tensor, value: Tensor, torch_compile: bool) -> Exception | None:
    """Why this backend does not take these tensors, as the exception to raise, or None when it does.

    Compiling needs `vicus.context.allow_flex_compile`, and with gradients `allow_flex_compile_backprop` (RuntimeError,
    as in NATTEN 0.21).
    """
    if not query.dtype.is_floating_point or query.dtype.itemsize < 2:
        return wrong("query.dtype", query.dtype, "float32, float64, bfloat16, float16")
    if not torch_compile:
        return None
    if not context.is_flex_compile_allowed():
        return RuntimeError("torch_compile=True needs vicus.allow_flex_compile(): results of Inductor are not tested")
    if _trains(query, key, value):
        if not context.is_flex_compile_backprop_allowed():
            return RuntimeError("torch_compile=True with gradients needs vicus.allow_flex_compile_backprop()")
        if query.device.type not in _HAS_FLEX_BACKWARD:
            return RuntimeError(f"compiled FlexAttention has no backward pass on device type {query.device.type!r}")
    if query.device.type not in _HAS_FLEX:
        return RuntimeError(f"compiled FlexAttention does not know device type {query.device.type!r}")
    if query.dtype == torch.float64:
        return wrong("query.dtype", query.dtype, "float32, bfloat16, float16 with torch_compile")
    if query.device.type != "cpu" and min(query.shape[-1], value.shape[-1]) < 16:
        return wrong("head_dim, head_dim_v", f"{query.shape[-1]}, {value.shape[-1]}", ">= 16 with torch_compile")
    return None


def _both_or_neither(names: str, q_tile: Any, kv_tile: Any) -> None:
    if (q_tile is None) != (kv_tile is None):
        raise wrong(names, f"{q_tile}, {kv_tile}", "both, or both None")


def _checked_tiles(name: str, tiles: Sequence[int] | None, rank: int, compiled: bool) -> Ints | None:
    if tiles is None:
        return None
    if not isinstance(tiles, Sequence) or len(tiles) != rank or any(not isinstance(t, int) or t < 1 for t in tiles):
        raise wrong(name, repr(tiles), f"{rank} positive integers, one per axis")
    size = math.prod(tiles)
    if compiled and (size < 16 or size & (size - 1)):
        raise wrong(name, f"{tuple(tiles)}, {size} tokens", "powers of two from 16 with torch_compile")
    return tuple(tiles)


def _block_and_options(
    q_tile: Ints | None, kv_tile: Ints | None, trains: bool
) -> tuple[tuple[int, int], dict[str, int]]:
    """Block of the mask, and options of the kernel: the tile is its block where the caller gives one."""
    if q_tile is None:
        return (BLOCK, BLOCK), {}
    tile = (math.prod(q_tile), math.prod(kv_tile))
    # Kernels of the backward pass have blocks of up to 128 tokens, which must divide the mask's.
    block = tuple(max(size, BLOCK) for size in tile) if trains else tile
    return block, {"BLOCK_M": tile[0], "BLOCK_N": tile[1]}


# --- Attention -------------------------------------------------------------------------------------------------------


@functools.cache
def _compiled() -> Callable:
    return torch.compile(flex_attention, dynamic=False)


def _plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, bias: Bias | None, scale: float
) -> tuple[Tensor, Tensor]:
    """What FlexAttention computes, in PyTorch's own differentiable operators. Heads first, keys not repeated."""
    batch, heads, q_len, _ = query.shape
    heads_kv, kv_len = key.shape[1:3]
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    place = [torch.arange(n, device=query.device) for n in (batch, heads, q_len, kv_len)]
    index = [p.view([-1 if a == axis else 1 for a in range(4)]) for axis, p in enumerate(place)]
    grouped = query.reshape(batch, heads_kv, heads // heads_kv * q_len, query.shape[-1])
    scores = (grouped.to(work) @ key.to(work).mT).view(batch, heads, q_len, kv_len) * scale
    if bias is not None:
        scores = bias(scores, *index)
    scores = scores.masked_fill(~mask(*index), -math.inf)
    blind = (scores == -math.inf).all(-1, keepdim=True)  # softmax and logsumexp have no derivative there
    scores = scores.masked_fill(blind, 0)
    weights = scores.softmax(-1).masked_fill(blind, 0)
    logsumexp = scores.logsumexp(-1).masked_fill(blind[..., 0], -math.inf)
    output = weights.reshape(batch, heads_kv, -1, kv_len) @ value.to(work)
    return output.view(batch, heads, q_len, value.shape[-1]).to(query.dtype), logsumexp


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: BlockMask,
    bias: Bias | None,
    table: Tensor | None,
    scale: float,
    torch_compile: bool,
    options: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """Query [B, Sq, H, D], key and value [B, Sk, Hkv, D or Dv] -> output [B, Sq, H, Dv], logsumexp [B, Sq, H].

    `table` is what `bias` reads.
    """
    inputs = (query, key, value, table)
    trains = _trains(*inputs)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    known = _HAS_FLEX_BACKWARD if trains else _HAS_FLEX
    if query.device.type not in known or _has_tangent(*inputs):
        output, logsumexp = _plain(query, key, value, blocks.mask_mod, bias, scale)
    else:
        if not trains:  # FlexAttention asks for requires_grad, whatever the grad mode
            query, key, value = query.detach(), key.detach(), value.detach()
        function = _compiled() if torch_compile else flex_attention
        output, auxiliary = function(
            query,
            key,
            value,
            score_mod=bias,
            block_mask=blocks,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=AuxRequest(lse=True),
            # The kernel for a few queries knows no block sparsity.
            kernel_options={"FORCE_USE_FLEX_ATTENTION": True, **options},
        )
        logsumexp = auxiliary.lse
    return output.transpose(1, 2), logsumexp.transpose(1, 2)


def _nothing(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs where there is no query or no key; they depend on nothing, but autograd finds its inputs."""
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    zero = query.sum(-1, keepdim=True) * 0 + value.sum() * 0
    output = zero.expand(*query.shape[:-1], value.shape[-1])
    return output, (zero[..., 0].to(work) - math.inf)


def _with_additional(key: Tensor, additional: Tensor | None) -> Tensor:
    return key if additional is None else torch.cat([key, additional], 1)


def _start(query: Tensor, key: Tensor, value: Tensor, torch_compile: bool) -> bool:
    """Raises what `unsupported` finds. Returns whether a compiled kernel will read the blocks."""
    error = unsupported(query, key, value, torch_compile)
    if error is not None:
        raise error
    return torch_compile or torch.compiler.is_compiling()


def neighborhood(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
    *,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    rpb: Tensor | None = None,
    q_tile_shape: Sequence[int] | None = None,
    kv_tile_shape: Sequence[int] | None = None,
    torch_compile: bool = False,
) -> tuple[Tensor, Tensor]:
    """Neighborhood attention of checked arguments (`vicus.na1d`, `na2d`, `na3d` check them).

    Args:
        query: [B, *X, H, D], X the token layout of 1 to 3 axes.
        key: [B, *X, Hkv, D], Hkv dividing H.
        value: [B, *X, Hkv, Dv].
        kernel_size: Window per axis; longer than the axis means all of it.
        stride: Queries per axis that share a window.
        dilation: Distance per axis of the tokens that see each other.
        is_causal: Per axis, whether keys after the query are hidden.
        scale: Factor of the scores.
        additional_keys: [B, T, Hkv, D], seen by every query in the same softmax.
        additional_values: [B, T, Hkv, Dv].
        rpb: [H, 2 * kernel_size[0] - 1, ...], added to the scores.
        q_tile_shape: Tile per axis. With it, tokens are reordered tile by tile before and after, so that a block of a
            compiled kernel is a box of the layout.
        kv_tile_shape: The same for keys; given exactly when `q_tile_shape` is.
        torch_compile: Compile FlexAttention.

    Returns:
        Output [B, *X, H, Dv] of query's dtype and logsumexp [B, *X, H], natural logarithm, in float32 (float64 for
        float64). A query that sees nothing gives 0 and -inf.

    Raises:
        RuntimeError: `torch_compile` without leave (see `unsupported`).
        ValueError: One tile shape without the other, a wrong one, or a dtype or head_dim that FlexAttention lacks.
    """
    sparse = _start(query, key, value, torch_compile)
    _both_or_neither("q_tile_shape, kv_tile_shape", q_tile_shape, kv_tile_shape)
    rank = query.dim() - 3
    q_tile = _checked_tiles("q_tile_shape", q_tile_shape, rank, torch_compile)
    kv_tile = _checked_tiles("kv_tile_shape", kv_tile_shape, rank, torch_compile)
    extra = 0 if additional_keys is None else additional_keys.shape[1]
    if query.numel() == 0 or value.numel() == 0:
        return _nothing(query, value)
    layout, windows = tuple(query.shape[1:-2]), (tuple(kernel_size), tuple(stride), tuple(dilation), tuple(is_causal))
    build = neighborhood_blocks.__wrapped__ if torch.compiler.is_compiling() else neighborhood_blocks
    block, options = _block_and_options(q_tile, kv_tile, _trains(query, key, value, rpb))
    blocks = build(layout, *windows, q_tile, kv_tile, extra, block, query.device, sparse)
    queries, keys = Order(layout, windows[2], q_tile), Order(layout, windows[2], kv_tile)
    bias = None if rpb is None else rpb_bias(queries, keys, rpb, windows[0], windows[2])
    output, logsumexp = _attend(
        queries.flatten(query),
        _with_additional(keys.flatten(key), additional_keys),
        _with_additional(keys.flatten(value), additional_values),
        blocks,
        bias,
        rpb,
        scale,
        torch_compile,
        options,
    )
    return queries.unflatten(output), queries.unflatten(logsumexp)


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attn_bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cumulative_seqlen_q: Tensor | None = None,
    cumulative_seqlen_kv: Tensor | None = None,
    causal: int = 0,
    window_left: int = -1,
    window_right: int = -1,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    torch_compile: bool = False,
) -> tuple[Tensor, Tensor]:
    """Dense attention of checked arguments (`vicus.attention` checks them).

    Args:
        query: [B, Sq, H, D].
        key: [B, Sk, Hkv, D], Hkv dividing H.
        value: [B, Sk, Hkv, Dv].
        scale: Factor of the scores.
        additional_keys: [B, T, Hkv, D], seen by every query in the same softmax.
        additional_values: [B, T, Hkv, Dv].
        attn_bias: [B or 1, H or 1, Sq, Sk], added to the scores; -inf hides a key.
        key_lengths: Integers [B]: keys of each batch entry that are real.
        cumulative_seqlen_q: Integers [N + 1]: packed sequence n holds queries [n] to [n + 1]; batch is 1.
        cumulative_seqlen_kv: The same for keys.
        causal: 0 none, 1 top-left, 2 bottom-right; of each sequence where there are several.
        window_left: Keys before the aligned position that a query sees, -1 for all.
        window_right: Keys after it, -1 for all.
        q_tile_size: Queries of a block of a compiled kernel.
        kv_tile_size: Its keys; given exactly when `q_tile_size` is.
        torch_compile: Compile FlexAttention.

    Returns:
        Output [B, Sq, H, Dv] and logsumexp [B, Sq, H], as in `neighborhood`.

    Raises:
        RuntimeError: `torch_compile` without leave (see `unsupported`).
        ValueError: One tile size without the other, a wrong one, or a dtype or head_dim that FlexAttention lacks.
    """
    sparse = _start(query, key, value, torch_compile)
    _both_or_neither("q_tile_size, kv_tile_size", q_tile_size, kv_tile_size)
    q_tile, kv_tile = (
        _checked_tiles(name, None if size is None else (size,), 1, torch_compile)
        for name, size in (("q_tile_size", q_tile_size), ("kv_tile_size", kv_tile_size))
    )
    block, options = _block_and_options(q_tile, kv_tile, _trains(query, key, value, attn_bias))
    q_len, kv_len = query.shape[1], key.shape[1]
    extra = 0 if additional_keys is None else additional_keys.shape[1]
    key, value = _with_additional(key, additional_keys), _with_additional(value, additional_values)
    if query.numel() == 0 or value.numel() == 0:
        return _nothing(query, value)
    band = (causal, window_left, window_right)
    if key_lengths is None and cumulative_seqlen_q is None:
        build = band_blocks.__wrapped__ if torch.compiler.is_compiling() else band_blocks
        blocks = build(q_len, kv_len, extra, *band, block, query.device, sparse)
    else:
        sequences = None
        if cumulative_seqlen_q is not None:
            sequences = packed_sequences(q_len, kv_len, extra, cumulative_seqlen_q, cumulative_seqlen_kv, causal == 1)
        mask = dense_mask(q_len, kv_len, *band, key_lengths, sequences)
        batches = 1 if key_lengths is None else query.shape[0]
        blocks = blocks_of(mask, batches, q_len, kv_len + extra, block, query.device, sparse)
    bias = None if attn_bias is None or kv_len == 0 else dense_bias(attn_bias, kv_len)
    return _attend(query, key, value, blocks, bias, attn_bias, scale, torch_compile, options)
