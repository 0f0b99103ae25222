"""Arguments of dense attention and of merging, on top of those that all operators have (`_arguments`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vicus._arguments import FLOATING, check_kind, check_strided, wrong

_ALIGNMENTS = {"top_left": 1, "bottom_right": 2}


def band(is_causal: bool, causal_alignment: str, window_size: Sequence[int] | None) -> tuple[int, int, int]:
    """The mask of dense attention as the operators take it.

    Args:
        is_causal: Whether keys after the query are hidden.
        causal_alignment: `"top_left"` (key j <= query i) or `"bottom_right"` (j <= i + Sk - Sq).
        window_size: Keys (left, right) of the diagonal that a query sees, -1 for no bound; None for none.

    Returns:
        causal (0 none, 1 top-left, 2 bottom-right), window left, window right.

    Raises:
        ValueError: Another type or value.
    """
    if not isinstance(is_causal, bool):
        raise wrong("is_causal", repr(is_causal), "a bool")
    if causal_alignment not in _ALIGNMENTS:
        raise wrong("causal_alignment", repr(causal_alignment), "'top_left', 'bottom_right'")
    causal = _ALIGNMENTS[causal_alignment] if is_causal else 0
    if window_size is None:
        return causal, -1, -1
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise wrong("window_size", repr(window_size), "two integers >= -1, (left, right)")
    left, right = window_size
    if not isinstance(left, int) or not isinstance(right, int) or left < -1 or right < -1:
        raise wrong("window_size", repr(window_size), "two integers >= -1, (left, right)")
    if causal and right > 0:
        raise wrong("window_size[1]", right, "-1 or 0 with a causal mask")
    return causal, left, right


def attention_bias(query: Tensor, key: Tensor, attn_mask: Tensor | None) -> Tensor | None:
    """The additive form of a mask of dense attention.

    Args:
        query: `[B, Sq, H, D]`.
        key: `[B, Sk, Hkv, D]`.
        attn_mask: bool (True: the query sees the key) or floating (added to the logits), broadcastable to
            `[B, H, Sq, Sk]`; or None.

    Returns:
        Floating `[B or 1, H or 1, Sq, Sk]`, -inf where a key is hidden; or None.

    Raises:
        ValueError: Type, shape or device do not fit.
    """
    if attn_mask is None:
        return None
    if not isinstance(attn_mask, Tensor):
        raise wrong("attn_mask", f"a {type(attn_mask).__name__}", "a torch.Tensor")
    if attn_mask.device != query.device:
        raise wrong("attn_mask.device", attn_mask.device, f"the device of query, {query.device}")
    if attn_mask.dtype not in (torch.bool, *FLOATING):
        raise wrong("attn_mask.dtype", attn_mask.dtype, "bool, float32, float64, bfloat16, float16")
    full = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if len(shape) != 4 or any(got not in (1, size) for got, size in zip(shape, full, strict=True)):
        raise wrong("attn_mask.shape", tuple(attn_mask.shape), f"broadcastable to [B, H, Sq, Sk], {full}")
    if attn_mask.dtype == torch.bool:
        hidden = torch.zeros(attn_mask.shape, dtype=torch.float32, device=attn_mask.device)
        attn_mask = hidden.masked_fill(~attn_mask, -torch.inf)
    return attn_mask.expand(*shape[:2], *full[2:])


def check_key_lengths(query: Tensor, key_lengths: Tensor | None) -> None:
    """Key padding belongs to a checked query.

    Args:
        query: `[B, Sq, H, D]`.
        key_lengths: `[B]`, int32 or int64, or None.

    Raises:
        ValueError: Type, shape or device do not fit. (Their values are checked when the operator runs.)
    """
    if key_lengths is None:
        return
    if not isinstance(key_lengths, Tensor) or key_lengths.dtype not in (torch.int32, torch.int64):
        got = key_lengths.dtype if isinstance(key_lengths, Tensor) else f"a {type(key_lengths).__name__}"
        raise wrong("key_lengths", got, "a torch.Tensor of int32 or int64")
    if key_lengths.device != query.device:
        raise wrong("key_lengths.device", key_lengths.device, f"the device of query, {query.device}")
    if key_lengths.dim() != 1 or key_lengths.shape[0] != query.shape[0]:
        raise wrong("key_lengths.shape", tuple(key_lengths.shape), f"[batch], ({query.shape[0]},)")


def check_packed(
    query: Tensor,
    key: Tensor,
    cumulative: tuple[Tensor | None, Tensor | None],
    longest: tuple[int | None, int | None],
) -> None:
    """Packed variable-length sequences belong to a checked query and key.

    Args:
        query: `[1, all queries, H, D]`.
        key: `[1, all keys, Hkv, D]`.
        cumulative: `cumulative_seqlen_Q` and `cumulative_seqlen_KV`, int32 `[sequences + 1]`.
        longest: `max_seqlen_Q` and `max_seqlen_KV`, tokens of the longest sequence.

    Raises:
        ValueError: One of the four is missing, or a type, shape, device or number does not fit. (The values of the
            lists are checked when the operator runs.)

    Source:
        NATTEN 0.21.
    """
    if any(x is None for x in (*cumulative, *longest)):
        raise ValueError(
            "cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV: some are None; allowed: all four, "
            "or none"
        )
    if query.shape[0] != 1:
        raise wrong("query.shape[0]", query.shape[0], "1: sequences are packed along the tokens, not batched")
    for name, x, tokens in (("max_seqlen_Q", longest[0], query.shape[1]), ("max_seqlen_KV", longest[1], key.shape[1])):
        if not isinstance(x, int) or not 0 <= x <= tokens:
            raise wrong(name, repr(x), f"an integer, 0 to the number of tokens, {tokens}")
    # Asked only where it costs no new compilation.
    if not torch.compiler.is_compiling() and (longest[0] == 0) != (longest[1] == 0):
        raise wrong("max_seqlen_Q, max_seqlen_KV", longest, "both 0, or neither")
    for name, x in (("cumulative_seqlen_Q", cumulative[0]), ("cumulative_seqlen_KV", cumulative[1])):
        if not isinstance(x, Tensor):
            raise wrong(name, f"a {type(x).__name__}", "a torch.Tensor")
        if x.device != query.device:
            raise wrong(f"{name}.device", x.device, f"the device of query, {query.device}")
        if x.dtype != torch.int32:
            raise wrong(f"{name}.dtype", x.dtype, "torch.int32")
        if x.dim() != 1 or x.shape[0] < 2:
            raise wrong(f"{name}.shape", tuple(x.shape), "one dimension, two values at least")
    if cumulative[0].shape[0] != cumulative[1].shape[0]:
        raise wrong("cumulative_seqlen_KV.shape", tuple(cumulative[1].shape), f"{tuple(cumulative[0].shape)}, as for Q")


def merge_parts(outputs: Sequence[Tensor], logsumexps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Parts to be merged, checked.

    Args:
        outputs: Two or more of `[B, *X, H, Dv]`.
        logsumexps: As many of `[B, *X, H]`.

    Returns:
        Both, logsumexps in float32 (float64 where the outputs are).

    Raises:
        ValueError: Fewer than two parts, or parts that do not fit each other.
        NotImplementedError: A tensor is sparse or nested.
    """
    if len(outputs) < 2:
        raise wrong("len(outputs)", len(outputs), "two parts or more")
    if len(outputs) != len(logsumexps):
        raise wrong("len(lse_tensors)", len(logsumexps), f"as many as outputs, {len(outputs)}")
    first = outputs[0]
    for i, (output, lse) in enumerate(zip(outputs, logsumexps, strict=True)):
        check_kind(f"outputs[{i}]", output, first)
        check_strided(f"lse_tensors[{i}]", lse)
        if not 4 <= output.dim() <= 6:
            raise wrong(f"outputs[{i}].shape", tuple(output.shape), "[batch, 1 to 3 token axes, heads, head_dim]")
        if output.shape != first.shape:
            raise wrong(f"outputs[{i}].shape", tuple(output.shape), f"that of outputs[0], {tuple(first.shape)}")
        if lse.shape != first.shape[:-1]:
            raise wrong(
                f"lse_tensors[{i}].shape", tuple(lse.shape), f"[batch, *tokens, heads], {tuple(first.shape[:-1])}"
            )
        if lse.device != first.device or not lse.is_floating_point():
            raise wrong(f"lse_tensors[{i}]", f"{lse.dtype} on {lse.device}", f"floating, on {first.device}")
    if first.dtype not in FLOATING:
        raise wrong("outputs[0].dtype", first.dtype, "float32, float64, bfloat16, float16")
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    return list(outputs), [lse.to(dtype) for lse in logsumexps]
