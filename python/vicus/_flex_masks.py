"""Masks of the backend "flex": windows and bands as tensor arithmetic, orders of tokens, tables and lists of blocks."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Ints = tuple[int, ...]
Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # batch, head, query and key index -> whether it is seen
Bias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # score, batch, head, query, key -> score

BLOCK = 128  # tokens of a block of the mask where the caller gives no tiles: what FlexAttention is tuned for
_PAIRS = 1 << 22  # (query, key) pairs evaluated at once while blocks are counted
KEPT_PAIRS = 1 << 20  # of the largest table worth keeping


def window_sees(query: Tensor, key: Tensor, length: int, window: int, step: int, dilation: int, causal: bool) -> Tensor:
    """Whether token `query` sees token `key` on one axis: the definition of DESIGN.md, section 1.

    Args:
        query: Integer tensor of tokens; any value outside 0..length-1 sees nothing.
        key: Integer tensor of tokens, broadcast against `query`.
        length: Tokens of the axis.
        window: Keys that a query sees, before causality.
        step: Queries that share a window; the argument `stride` of the operators.
        dilation: Tokens of one residue class are this far apart.
        causal: Whether keys after the query are hidden.

    Returns:
        Bool tensor.
    """
    residue, position = query % dilation, query // dilation
    last = (length - residue - 1) // dilation  # of the positions of this residue class
    group = position // step * step
    if causal:
        begin = torch.minimum(group + step - 1, last) - window + 1
        end = position
    else:
        begin = torch.minimum(group + step // 2, last) - window // 2
        begin = torch.minimum(begin.clamp(min=0), (last + 1 - window).clamp(min=0))
        end = torch.minimum(begin + window - 1, last)
    place = key // dilation
    seen = (place >= begin) & (place <= end) & (key % dilation == residue)
    return seen & (key >= 0) & (query >= 0) & (query < length)


class Order:
    """How the tokens of a layout are laid out in a sequence: row by row, or tile by tile.

    Tile by tile, a box of `tile` tokens of one residue class is contiguous, so that a block of the mask is a box of the
    layout. Incomplete tiles are padded.
    """

    def __init__(self, layout: Ints, dilation: Ints, tile: Ints | None) -> None:
        self.layout, self.dilation, self.tile = layout, dilation, tile
        if tile is None:
            self.length = math.prod(layout)
            return
        self.tiles = tuple(-(-n // (d * t)) for n, d, t in zip(layout, dilation, tile, strict=True))
        self.length = math.prod(self.tiles) * math.prod(tile) * math.prod(dilation)

    def coordinates(self, index: Tensor) -> list[Tensor]:
        """The token at `index` of the sequence, one tensor per axis; a padded one lies outside the layout."""
        if self.tile is None:
            return _unravel(index, self.layout)
        rank = len(self.layout)
        parts = _unravel(index, (*self.dilation, *self.tiles, *self.tile))
        return [
            (parts[rank + axis] * self.tile[axis] + parts[2 * rank + axis]) * self.dilation[axis] + parts[axis]
            for axis in range(rank)
        ]

    def flatten(self, x: Tensor) -> Tensor:
        """[B, *layout, *rest] -> [B, length, *rest], zeros where padded."""
        rank = len(self.layout)
        if self.tile is None:
            return x.flatten(1, rank)
        wanted = [t * e * d for t, e, d in zip(self.tiles, self.tile, self.dilation, strict=True)]
        padding = [(0, w - n) for n, w in zip(self.layout, wanted, strict=True)]
        x = F.pad(x, [0, 0] * (x.dim() - 1 - rank) + [side for pair in reversed(padding) for side in pair])
        split = [e for axis in zip(self.tiles, self.tile, self.dilation, strict=True) for e in axis]
        x = x.reshape(x.shape[0], *split, *x.shape[1 + rank :])
        order = [1 + 3 * axis + part for part in (2, 0, 1) for axis in range(rank)]
        return x.permute(0, *order, *range(1 + 3 * rank, x.dim())).flatten(1, 3 * rank)

    def unflatten(self, x: Tensor) -> Tensor:
        """[B, length, *rest] -> [B, *layout, *rest]: the inverse, without what was padded."""
        rank = len(self.layout)
        if self.tile is None:
            return x.unflatten(1, self.layout)
        x = x.unflatten(1, (*self.dilation, *self.tiles, *self.tile))
        order = [1 + part * rank + axis for axis in range(rank) for part in (1, 2, 0)]
        x = x.permute(0, *order, *range(1 + 3 * rank, x.dim()))
        for axis, n in enumerate(self.layout):
            x = x.flatten(1 + axis, 3 + axis).narrow(1 + axis, 0, n)
        return x


def _unravel(index: Tensor, shape: Sequence[int]) -> list[Tensor]:
    parts = []
    for size in reversed(shape):
        parts.append(index % size)
        index = index // size
    return parts[::-1]


def neighborhood_mask(
    queries: Order, keys: Order, kernel_size: Ints, stride: Ints, dilation: Ints, is_causal: tuple[bool, ...]
) -> Mask:
    """The windows of all axes; keys after those of the layout are additional tokens, which every query sees."""

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key >= 0
        for axis, (i, j) in enumerate(zip(queries.coordinates(query), keys.coordinates(key), strict=True)):
            shape = (queries.layout[axis], kernel_size[axis], stride[axis], dilation[axis], is_causal[axis])
            seen = seen & window_sees(i, j, *shape)
        return seen | (key >= keys.length)

    return mask


def rpb_bias(queries: Order, keys: Order, rpb: Tensor, kernel_size: Ints, dilation: Ints) -> Bias:
    def bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        pairs = zip(queries.coordinates(query), keys.coordinates(key), kernel_size, dilation, strict=True)
        # Pairs that the mask hides may lie outside the table.
        places = [((j - i) // d + w - 1).clamp(0, 2 * w - 2) for i, j, w, d in pairs]
        return score + torch.where(key < keys.length, rpb[(head, *places)].to(score.dtype), 0)

    return bias


def dense_mask(
    q_len: int,
    kv_len: int,
    causal: int,
    window_left: int,
    window_right: int,
    key_lengths: Tensor | None,
    sequences: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> Mask:
    """`sequences`: sequence and aligned position of every query, the same of every key, additional tokens included."""

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if sequences is not None:
            sequence_q, position_q, sequence_kv, position_kv = sequences
            i, j = position_q[query], position_kv[key]
            seen = sequence_q[query] == sequence_kv[key]
        else:
            length = kv_len if key_lengths is None else key_lengths[batch]
            i, j = query + (0 if causal == 1 else length - q_len), key
            seen = key < length
        if causal:
            seen = seen & (j <= i)
        if window_left >= 0:
            seen = seen & (j >= i - window_left)
        if window_right >= 0:
            seen = seen & (j <= i + window_right)
        return seen | (key >= kv_len)

    return mask


def packed_sequences(
    q_len: int, kv_len: int, extra: int, cumulative_q: Tensor, cumulative_kv: Tensor, top_left: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where packed tokens are. A query's position is that of the last key which a causal mask lets it see."""

    def place(length: int, cumulative: Tensor) -> tuple[Tensor, Tensor]:
        token = torch.arange(length, device=cumulative.device, dtype=cumulative.dtype)
        sequence = torch.searchsorted(cumulative[1:].contiguous(), token, right=True)
        sequence = sequence.clamp(max=cumulative.shape[0] - 2)
        return sequence, token - cumulative[sequence]

    sequence_q, position_q = place(q_len, cumulative_q)
    sequence_kv, position_kv = place(kv_len, cumulative_kv)
    if not top_left:
        position_q = position_q + (cumulative_kv.diff() - cumulative_q.diff())[sequence_q]
    return sequence_q, position_q, F.pad(sequence_kv, (0, extra)), F.pad(position_kv, (0, extra))


def dense_bias(attn_bias: Tensor, kv_len: int) -> Bias:
    batches, heads = attn_bias.shape[:2]

    def bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        value = attn_bias[batch % batches, head % heads, query, key.clamp(max=kv_len - 1)]
        return score + torch.where(key < kv_len, value.to(score.dtype), 0)

    return bias


# --- Tables and blocks of a mask -------------------------------------------------------------------------------------


def table_of(mask: Mask, batches: int, q_len: int, kv_len: int, device: torch.device) -> Tensor:
    """Every pair of a mask: bool [batches, 1, q_len, kv_len]. `batches` is 1 for one that all entries share."""
    batch, query, key = (torch.arange(n, device=device) for n in (batches, q_len, kv_len))
    batch = batch[:, None, None, None]
    return mask(batch, torch.zeros_like(batch), query[:, None], key).expand(batches, 1, q_len, kv_len)


def blocks_of(
    mask: Mask, batches: int, q_len: int, kv_len: int, block: tuple[int, int], device: torch.device
) -> BlockMask:
    """`mask` with the blocks of keys that each block of queries needs.

    `batches` is 1 for a mask that is the same for all entries.
    """
    if torch.compiler.is_compiling():
        return create_block_mask(mask, batches, None, q_len, kv_len, device, block)
    # As create_block_mask, in steps that keep the table of (query, key) pairs small.
    rows, columns = -(-q_len // block[0]), -(-kv_len // block[1])
    batch, query, key = (torch.arange(n, dtype=torch.int32, device=device) for n in (batches, q_len, kv_len))
    counts = []
    for part in query.split(max(_PAIRS // (batches * block[0] * kv_len), 1) * block[0]):
        seen = mask(batch[:, None, None], torch.zeros_like(batch)[:, None, None], part[:, None], key)
        seen = seen.expand(batches, len(part), kv_len)  # a mask may not depend on all of them
        seen = F.pad(seen, (0, columns * block[1] - kv_len, 0, -len(part) % block[0]))
        counts.append(seen.view(-1, seen.shape[-2] // block[0], block[0], columns, block[1]).sum((2, 4)))
    count = torch.cat(counts, 1).view(-1, 1, rows, columns)
    full = count == block[0] * block[1]
    partial = (count > 0) & ~full

    def listed(wanted: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(wanted.int(), dim=-1, descending=True, stable=True)
        return wanted.sum(-1, dtype=torch.int32), order.int()

    return BlockMask.from_kv_blocks(
        *listed(partial), *listed(full), BLOCK_SIZE=block, mask_mod=mask, seq_lengths=(q_len, kv_len)
    )


def fresh(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` of a cached function, past its cache."""
    return function.__wrapped__(*args)


def kept(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` of a cached function, from its cache where its tensors may outlive the call.

    Tensors of a trace or of a mode that makes other tensors (fake ones, say) may not; nor may those of inference mode,
    which autograd would refuse later, so that is left for a moment.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return fresh(function, *args)
    with torch.inference_mode(False):
        return function(*args)


class Windows(NamedTuple):
    """The mask of a neighborhood: a key of the caches below."""

    layout: Ints
    kernel_size: Ints
    stride: Ints
    dilation: Ints
    is_causal: tuple[bool, ...]


class Band(NamedTuple):
    """The mask of dense attention without lists: a key of the caches below."""

    q_len: int
    kv_len: int
    causal: int
    left: int
    right: int


@functools.lru_cache(maxsize=32)
def neighborhood_blocks(
    windows: Windows,
    q_tile: Ints | None,
    kv_tile: Ints | None,
    extra: int,
    block: tuple[int, int],
    device: torch.device,
) -> BlockMask:
    """Windows over tokens in the order of tiles, `extra` tokens after the keys."""
    queries, keys = (Order(windows.layout, windows.dilation, tile) for tile in (q_tile, kv_tile))
    mask = neighborhood_mask(queries, keys, *windows[1:])
    return blocks_of(mask, 1, queries.length, keys.length + extra, block, device)


@functools.lru_cache(maxsize=32)
def neighborhood_table(windows: Windows, extra: int, device: torch.device) -> Tensor:
    """Windows over tokens row by row, `extra` tokens after the keys."""
    order = Order(windows.layout, windows.dilation, None)
    mask = neighborhood_mask(order, order, *windows[1:])
    return table_of(mask, 1, order.length, order.length + extra, device)


@functools.lru_cache(maxsize=32)
def band_blocks(band: Band, extra: int, block: tuple[int, int], device: torch.device) -> BlockMask:
    """A band, `extra` tokens after the keys."""
    return blocks_of(dense_mask(*band, None, None), 1, band.q_len, band.kv_len + extra, block, device)
