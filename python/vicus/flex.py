"""Backend "flex": attention from PyTorch alone, with our masks. It serves devices that no engine of vicus knows.

With ``torch_compile=True``, where `vicus.context` allows it, and inside a region that the caller compiles, this is
PyTorch's FlexAttention: a kernel that Inductor makes, which skips blocks of keys that the mask hides.

Eagerly, FlexAttention computes all scores, masks them, and traces the mask anew on every call that is differentiated.
The same computation is written here in plain operators (`_plain`): it has every derivative and repeats no keys or
values. Its memory is quadratic in the tokens. It also stands in where compiled FlexAttention has no backward pass (CPU,
MPS) or does not know the device.

A difference from the engines: a NaN in a value reaches every query (its weight of zero is multiplied, not skipped).
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
    KEPT_PAIRS,
    Band,
    Bias,
    Ints,
    Order,
    Windows,
    band_blocks,
    blocks_of,
    dense_bias,
    dense_mask,
    fresh,
    kept,
    neighborhood_blocks,
    neighborhood_table,
    packed_sequences,
    rpb_bias,
    table_of,
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


def _has_kernel(torch_compile: bool, *tensors: Tensor | None) -> bool:
    """Whether FlexAttention computes a call on these tensors."""
    if not torch_compile and not torch.compiler.is_compiling():
        return False
    known = _HAS_FLEX_BACKWARD if _trains(*tensors) else _HAS_FLEX
    return tensors[0].device.type in known and not _has_tangent(*tensors)


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: BlockMask,
    bias: Bias | None,
    scale: float,
    torch_compile: bool,
    options: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """FlexAttention. Tensors are heads last, as are the results."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if not _trains(query, key, value):  # FlexAttention asks for requires_grad, whatever the grad mode
        query, key, value = query.detach(), key.detach(), value.detach()
    output, auxiliary = (_compiled() if torch_compile else flex_attention)(
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
    return output.transpose(1, 2), auxiliary.lse.transpose(1, 2)


def _plain(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, bias: Bias | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The same by differentiable operators. `seen` is bool [B or 1, 1, Sq, Sk]."""
    batch, q_len, heads, head_dim = query.shape
    kv_len, heads_kv, head_dim_v = value.shape[1:]
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    # The queries of all heads that share keys are the rows of one product.
    grouped = query.transpose(1, 2).reshape(batch, heads_kv, -1, head_dim).to(work)
    scores = (grouped @ key.permute(0, 2, 3, 1).to(work)).view(batch, heads, q_len, kv_len) * scale
    if bias is not None:
        place = [torch.arange(n, device=query.device) for n in scores.shape]
        scores = bias(scores, *(p.view([-1 if a == axis else 1 for a in range(4)]) for axis, p in enumerate(place)))
    scores = scores.masked_fill(~seen, -math.inf)
    blind = (scores == -math.inf).all(-1, keepdim=True)  # softmax and logsumexp have no derivative there
    scores = scores.masked_fill(blind, 0)
    weights = scores.softmax(-1).masked_fill(blind, 0)
    logsumexp = scores.logsumexp(-1).masked_fill(blind[..., 0], -math.inf)
    output = weights.reshape(batch, heads_kv, -1, kv_len) @ value.transpose(1, 2).to(work)
    output = output.view(batch, heads, q_len, head_dim_v).to(query.dtype)
    return output.transpose(1, 2).contiguous(), logsumexp.transpose(1, 2).contiguous()


def _nothing(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Results where there is no query or no key. They depend on nothing, but autograd finds its inputs."""
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    everywhere = torch.ones((), dtype=torch.bool, device=query.device)
    zero = (query.sum(-1, keepdim=True) + value.sum()).masked_fill(everywhere, 0)
    return zero.expand(*query.shape[:-1], value.shape[-1]).contiguous(), zero[..., 0].to(work) - math.inf


def _with_additional(key: Tensor, additional: Tensor | None) -> Tensor:
    return key if additional is None else torch.cat([key, additional], 1)


def _check(query: Tensor, key: Tensor, value: Tensor, torch_compile: bool) -> None:
    error = unsupported(query, key, value, torch_compile)
    if error is not None:
        raise error


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
    _check(query, key, value, torch_compile)
    _both_or_neither("q_tile_shape, kv_tile_shape", q_tile_shape, kv_tile_shape)
    rank = query.dim() - 3
    q_tile = _checked_tiles("q_tile_shape", q_tile_shape, rank, torch_compile)
    kv_tile = _checked_tiles("kv_tile_shape", kv_tile_shape, rank, torch_compile)
    extra = 0 if additional_keys is None else additional_keys.shape[1]
    if query.numel() == 0 or value.numel() == 0:
        return _nothing(query, value)
    windows = Windows(
        tuple(query.shape[1:-2]), tuple(kernel_size), tuple(stride), tuple(dilation), tuple(map(bool, is_causal))
    )
    kernel = _has_kernel(torch_compile, query, key, value, additional_keys, additional_values, rpb)
    if not kernel:  # it has no blocks
        q_tile = kv_tile = None
    queries, keys = (Order(windows.layout, windows.dilation, tile) for tile in (q_tile, kv_tile))
    bias = None if rpb is None else rpb_bias(queries, keys, rpb, windows.kernel_size, windows.dilation)
    inputs = (
        queries.flatten(query),
        _with_additional(keys.flatten(key), additional_keys),
        _with_additional(keys.flatten(value), additional_values),
    )
    if kernel:
        block, options = _block_and_options(q_tile, kv_tile, _trains(*inputs, rpb))
        blocks = kept(neighborhood_blocks, windows, q_tile, kv_tile, extra, block, query.device)
        output, logsumexp = _kernel(*inputs, blocks, bias, scale, torch_compile, options)
    else:
        small = queries.length * (keys.length + extra) <= KEPT_PAIRS
        seen = (kept if small else fresh)(neighborhood_table, windows, extra, query.device)
        output, logsumexp = _plain(*inputs, seen, bias, scale)
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
    _check(query, key, value, torch_compile)
    _both_or_neither("q_tile_size, kv_tile_size", q_tile_size, kv_tile_size)
    q_tile, kv_tile = (
        _checked_tiles(name, None if size is None else (size,), 1, torch_compile)
        for name, size in (("q_tile_size", q_tile_size), ("kv_tile_size", kv_tile_size))
    )
    q_len, kv_len = query.shape[1], key.shape[1]
    extra = 0 if additional_keys is None else additional_keys.shape[1]
    key, value = _with_additional(key, additional_keys), _with_additional(value, additional_values)
    if query.numel() == 0 or value.numel() == 0:
        return _nothing(query, value)
    bias = None if attn_bias is None or kv_len == 0 else dense_bias(attn_bias, kv_len)
    band = Band(q_len, kv_len, causal, window_left, window_right)
    sequences = None
    if cumulative_seqlen_q is not None:
        sequences = packed_sequences(q_len, kv_len, extra, cumulative_seqlen_q, cumulative_seqlen_kv, causal == 1)
    mask = dense_mask(*band, key_lengths, sequences)
    batches = 1 if key_lengths is None else query.shape[0]
    if not _has_kernel(torch_compile, query, key, value, attn_bias):
        return _plain(query, key, value, table_of(mask, batches, q_len, kv_len + extra, query.device), bias, scale)
    block, options = _block_and_options(q_tile, kv_tile, _trains(query, key, value, attn_bias))
    if key_lengths is None and sequences is None:
        blocks = kept(band_blocks, band, extra, block, query.device)
    else:
        blocks = blocks_of(mask, batches, q_len, kv_len + extra, block, query.device)
    return _kernel(query, key, value, blocks, bias, scale, torch_compile, options)
