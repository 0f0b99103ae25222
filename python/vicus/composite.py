"""The fused operators as compositions that PyTorch differentiates: any order, forward mode, `torch.func`.

Slower and with the scores in memory (`[B, H, queries, slots]`); the operators use them where their own formulas end:
for derivatives of gradients and for forward-mode tangents. Reduced precision is computed in float32.

Layouts are heads last as in `vicus.functional`. A query that sees no key gives output 0, logsumexp -inf and derivatives
of zero, in every order.
"""

import torch
from torch import Tensor

from vicus import _ops_unfused
from vicus._ops import logsumexp_dtype

Ints = list[int] | tuple[int, ...]


def _heads_first(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`[B, *X, H, D]` as `[B, H, *X, D]`."""
    return None if x is None else x.to(dtype).movedim(-2, 1)


def neighborhood(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    rpb: Tensor | None,
    kernel_size: Ints,
    stride: Ints,
    dilation: Ints,
    is_causal: Ints,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Neighborhood attention of 1 to 3 token axes out of `qk`, a softmax and `av`.

    Args:
        query: `[B, *X, H, D]`, float32, float64, bfloat16 or float16.
        key: `[B, *X, Hkv, D]`, `Hkv` divides `H`.
        value: `[B, *X, Hkv, Dv]`.
        additional_keys: `[B, T, Hkv, D]`, seen by every query, or None.
        additional_values: `[B, T, Hkv, Dv]` or None.
        rpb: Relative positional bias `[H, 2 * w0 - 1, ...]` or None.
        kernel_size: Window per axis.
        stride: Queries that share a window, per axis.
        dilation: Tokens from one key of a window to the next, per axis.
        is_causal: 0 or 1 per axis.
        scale: Factor of query times key.

    Returns:
        Output `[B, *X, H, Dv]` in the dtype of `query`, and logsumexp `[B, *X, H]`, natural logarithm, in float32
        (float64 for float64).
    """
    dtype = logsumexp_dtype(query.dtype)
    query_, key_, value_, keys_, values_ = (
        _heads_first(x, dtype) for x in (query, key, value, additional_keys, additional_values)
    )
    bias = None if rpb is None else rpb.to(dtype)
    mask = (list(kernel_size), list(stride), list(dilation), [int(c) for c in is_causal])
    scores = _ops_unfused.qk(query_ * scale, key_, keys_, bias, *mask)
    output = _ops_unfused.av(scores.softmax(-1), value_, values_, *mask)
    return output.movedim(1, -2).to(query.dtype), scores.logsumexp(-1).movedim(1, -1)


def _visible(
    batch: int,
    queries: int,
    keys: int,
    key_lengths: Tensor | None,
    cumulative_seqlen_q: Tensor | None,
    cumulative_seqlen_kv: Tensor | None,
    causal: int,
    window_left: int,
    window_right: int,
    device: torch.device,
) -> Tensor:
    """Which keys dense attention lets a query see: bool `[B, 1, Sq, Sk]`, by the mask that FlexAttention is given."""
    from vicus import _flex_masks  # late: importing FlexAttention takes long

    sequences = None
    if cumulative_seqlen_q is not None and cumulative_seqlen_kv is not None:
        bounds = cumulative_seqlen_q.to(device), cumulative_seqlen_kv.to(device)
        sequences = _flex_masks.packed_sequences(queries, keys, 0, *bounds, causal == 1)
    lengths = None if key_lengths is None else key_lengths.to(device)
    sees = _flex_masks.dense_mask(queries, keys, causal, window_left, window_right, lengths, sequences)
    entry, i, j = (torch.arange(n, device=device) for n in (batch, queries, keys))
    entry = entry.view(-1, 1, 1, 1)
    return sees(entry, torch.zeros_like(entry), i.view(-1, 1), j).expand(batch, 1, queries, keys)


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    attn_bias: Tensor | None,
    key_lengths: Tensor | None,
    cumulative_seqlen_q: Tensor | None,
    cumulative_seqlen_kv: Tensor | None,
    causal: int,
    window_left: int,
    window_right: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Dense attention out of products and a masked softmax.

    Args:
        query: `[B, Sq, H, D]`, float32, float64, bfloat16 or float16.
        key: `[B, Sk, Hkv, D]`, `Hkv` divides `H`.
        value: `[B, Sk, Hkv, Dv]`.
        additional_keys: `[B, T, Hkv, D]`, seen by every query, or None.
        additional_values: `[B, T, Hkv, Dv]` or None.
        attn_bias: Added to the logits, `[B or 1, H or 1, Sq, Sk]`, -inf hides a key; or None. Differentiable here.
        key_lengths: Real keys of each batch entry `[B]`, integers, or None.
        cumulative_seqlen_q: Bounds of packed sequences `[sequences + 1]`, integers; B is 1 then. Or None.
        cumulative_seqlen_kv: The same for keys.
        causal: 0 none, 1 top-left, 2 bottom-right.
        window_left: Keys to the left of the diagonal, -1 for no bound.
        window_right: Keys to its right, -1 for no bound.
        scale: Factor of query times key.

    Returns:
        Output `[B, Sq, H, Dv]` in the dtype of `query`, and logsumexp `[B, Sq, H]`, natural logarithm, in float32
        (float64 for float64). NaN and Inf in keys, values and queries that the mask shuts out entirely reach nothing.
    """
    batch, queries, heads, _ = query.shape
    keys, heads_kv = key.shape[1], key.shape[2]
    dtype = logsumexp_dtype(query.dtype)
    groups = (batch, heads_kv, heads // heads_kv)
    query_, key_, value_, keys_, values_ = (
        None if x is None else x.to(dtype).transpose(1, 2)
        for x in (query, key, value, additional_keys, additional_values)
    )
    bounds = (key_lengths, cumulative_seqlen_q, cumulative_seqlen_kv)
    seen = _visible(batch, queries, keys, *bounds, causal, window_left, window_right, query.device)
    seen = seen.expand(batch, heads, -1, -1)
    if attn_bias is not None:
        seen = seen & (attn_bias != float("-inf"))
        # A hidden key's -inf would turn a zero gradient into NaN.
        attn_bias = torch.where(seen, attn_bias.to(dtype), 0)
    grouped = seen.unflatten(1, groups[1:])
    unseen_keys = ~grouped.any(dim=2).any(dim=2)
    key_, value_ = (x.masked_fill(unseen_keys[..., None], 0) for x in (key_, value_))
    if keys_ is not None and values_ is not None:
        key_, value_ = torch.cat([key_, keys_], dim=2), torch.cat([value_, values_], dim=2)
        seen = torch.nn.functional.pad(seen, (0, keys_.shape[2]), value=True)
        if attn_bias is not None:
            attn_bias = torch.nn.functional.pad(attn_bias, (0, keys_.shape[2]))
    live = seen.any(-1, keepdim=True)
    query_ = query_.masked_fill(~live, 0)

    # The heads of a group are more rows of one product: keys and values are never repeated.
    scores = (query_ * scale).unflatten(1, groups[1:]).flatten(2, 3) @ key_.transpose(2, 3)
    scores = scores.view(batch, heads, queries, -1)
    if attn_bias is not None:
        scores = scores + attn_bias
    # A row without keys becomes a row of zeros, and its results are selected away: no -inf minus -inf anywhere.
    scores = torch.where(seen, scores, float("-inf")).masked_fill(~live, 0)
    probabilities = scores.softmax(-1).masked_fill(~live, 0)
    output = (probabilities.view(batch, heads_kv, -1, scores.shape[-1]) @ value_).view(batch, heads, queries, -1)
    output = output.masked_fill(~live, 0).transpose(1, 2)
    logsumexp = scores.logsumexp(-1).masked_fill(~live[..., 0], float("-inf")).transpose(1, 2)
    return output.to(query.dtype), logsumexp
