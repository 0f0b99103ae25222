"""Attention as functions: neighborhood attention of 1 to 3 token axes, dense attention, and merging of parts.

Names, order, defaults and layouts are those of NATTEN 0.21; what it has not comes as keywords after them. Tensors are
heads last and may have any strides (a slice of a fused QKV projection is used in place); a last dimension that is not
contiguous is copied. B is the batch, X the token layout, H heads, Hkv key/value heads, D and Dv head dims.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from vicus import _arguments_dense, _attend, _quick
from vicus.types import CausalArgTypeOrDed, DimensionType, DimensionTypeOrDed, KernelSchedule

__all__ = [
    "attention",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
    "neighborhood_attention_generic",
]

Result = Tensor | tuple[Tensor, Tensor]

_DOC = """{title}

    Each query attends to a window of keys around it, and to the additional tokens, in one softmax.
    {rules}

    Args:
        query: `[B, {X}, H, D]`, float32, float64, bfloat16 or float16.
        key: `[B, {X}, Hkv, D]`. Hkv divides H: query head h reads key head h // (H // Hkv), nothing is repeated.
        value: `[B, {X}, Hkv, Dv]`.
        kernel_size: Window per axis, in tokens: an int for every axis, or one per axis.
        stride: Queries that share a window, per axis; 1 to `kernel_size`.
        dilation: Distance in tokens of neighboring keys of a window, per axis.
        is_causal: Per axis, whether keys after the query are hidden.
        scale: Factor of query times key, used as given (0.0 too); None means `D ** -0.5`.
        additional_keys: `[B, T, Hkv, D]`, tokens that every query sees; or None.
        additional_values: `[B, T, Hkv, Dv]`, given together with `additional_keys`.
        attention_kwargs: NATTEN's arguments of `attention` to the additional tokens. Those are part of the same kernel
            here: names are checked, values have no effect.
        backend: None for the best of the device, or a name of `vicus.backends`, NATTEN's included.
        q_tile_shape: Queries per tile and axis, for engines that take it; None for the engine's choice.
        kv_tile_shape: Keys per tile and axis, likewise.
        backward_q_tile_shape: `q_tile_shape` of the backward pass.
        backward_kv_tile_shape: `kv_tile_shape` of the backward pass.
        backward_kv_splits: Parts per axis into which the backward pass splits the keys; None for the engine's choice.
        backward_use_pt_reduction: Accepted for NATTEN's sake, no effect.
        run_persistent_kernel: Accepted for NATTEN's sake, no effect.
        kernel_schedule: None, "non", "coop" or "pp": a hint to engines that have schedules.
        torch_compile: Compile FlexAttention, where that is the backend (see `vicus.context.allow_flex_compile`).
        return_lse: Whether to return the logsumexp too.
        rpb: Relative positional bias `[H, 2 * kernel_size[0] - 1, ...]`, float32, float64 or the dtype of `query`,
            added to the scaled scores: entry `(key - query) / dilation + kernel_size - 1` per axis.
        deterministic: Whether gradients are bit-identical from run to run; None leaves it to `vicus.context` and
            `torch.use_deterministic_algorithms`.

    Returns:
        Output `[B, {X}, H, Dv]` in the dtype of `query`; with `return_lse` also the logsumexp `[B, {X}, H]`, natural
        logarithm, float32 (float64 for float64). Both are differentiable, in any order and in forward mode.

    Raises:
        ValueError: Shapes, dtypes, devices or values do not fit; the message names the argument and what is allowed.
        NotImplementedError: A sparse or nested tensor, an unknown backend, or one that this machine lacks.
        TypeError: A name in `attention_kwargs` that `attention` does not have.
        RuntimeError: `torch_compile` without leave.

    Source:
        Hassani et al., Neighborhood Attention Transformer (2023) and Generalized Neighborhood Attention (2025);
        arguments of NATTEN 0.21, `rpb` and `deterministic` of vicus.
    """
_STRICT = "A window never reaches beyond its axis: `kernel_size >= 2`, `kernel_size * dilation <= axis`."
_WIDE = "A window may be 1, or longer than its axis: it is then all of the axis."


def _family(name: str, title: str, rank: int | None, strict: bool) -> Callable[..., Result]:
    """Neighborhood attention of `rank` token axes. Only the rank and the rules differ from one function to the next."""
    rule = (rank, strict)

    def function(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: DimensionTypeOrDed,
        stride: DimensionTypeOrDed = 1,
        dilation: DimensionTypeOrDed = 1,
        is_causal: CausalArgTypeOrDed | None = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: DimensionType | None = None,
        kv_tile_shape: DimensionType | None = None,
        backward_q_tile_shape: DimensionType | None = None,
        backward_kv_tile_shape: DimensionType | None = None,
        backward_kv_splits: DimensionType | None = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: str | KernelSchedule | None = None,
        torch_compile: bool = False,
        return_lse: bool = False,
        *,
        rpb: Tensor | None = None,
        deterministic: bool | None = None,
    ) -> Result:
        special = return_lse or not (
            (additional_keys is additional_values is attention_kwargs is backend is kernel_schedule is rpb is None)
            and (q_tile_shape is kv_tile_shape is backward_q_tile_shape is backward_kv_tile_shape is None)
            and backward_kv_splits is None
        )
        if not (special or deterministic):
            output = _quick.neighborhood(rule, query, key, value, kernel_size, stride, dilation, is_causal, scale)
            if output is not None:
                return output
        return _attend.neighborhood(
            *(rule, query, key, value, kernel_size, stride, dilation, is_causal, scale),
            *(additional_keys, additional_values, attention_kwargs, backend, q_tile_shape, kv_tile_shape),
            *(backward_q_tile_shape, backward_kv_tile_shape, backward_kv_splits, kernel_schedule, torch_compile),
            *(return_lse, rpb, deterministic),
        )

    function.__name__ = function.__qualname__ = name
    axes = {None: "*X", 1: "X", 2: "X, Y", 3: "X, Y, Z"}[rank]
    function.__doc__ = _DOC.format(title=title, rules=_STRICT if strict else _WIDE, X=axes)
    return function


na1d = _family("na1d", "1-D neighborhood attention.", 1, True)
na2d = _family("na2d", "2-D neighborhood attention.", 2, True)
na3d = _family("na3d", "3-D neighborhood attention.", 3, True)
neighborhood_attention_generic = _family(
    "neighborhood_attention_generic", "`na1d`, `na2d` or `na3d`, by the rank of the query.", None, True
)
neighborhood_attention = _family(
    "neighborhood_attention", "Neighborhood attention of 1 to 3 token axes, with windows of any size.", None, False
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: str | KernelSchedule | None = None,
    torch_compile: bool = False,
    return_lse: bool = False,
    *,
    causal_alignment: str = "top_left",
    window_size: tuple[int, int] | None = None,
    attn_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    deterministic: bool | None = None,
) -> Result:
    """Dense attention.

    Args:
        query: `[B, Sq, H, D]`, float32, float64, bfloat16 or float16.
        key: `[B, Sk, Hkv, D]`. Hkv divides H: query head h reads key head h // (H // Hkv), nothing is repeated.
        value: `[B, Sk, Hkv, Dv]`.
        is_causal: Whether keys after the query are hidden.
        scale: Factor of query times key, used as given (0.0 too); None means `D ** -0.5`.
        seqlens_Q: Packed sequences: int32 `[N]`, queries of each, one after the other along `Sq`; `B` is 1. Waits for
            the device on every call; see `vicus.varlen.generate_varlen_parameters`.
        seqlens_KV: int32 `[N]`, keys of each, given together with `seqlens_Q`.
        cumulative_seqlen_Q: Packed sequences without waiting: int32 `[N + 1]`, sequence n holds queries
            `cumulative_seqlen_Q[n]` to `cumulative_seqlen_Q[n + 1]`. The last one ends where the tokens do; engine
            "sm80" takes tokens after it, whose output is 0.
        cumulative_seqlen_KV: int32 `[N + 1]`, the same for keys.
        max_seqlen_Q: Queries of the longest sequence; given together with the cumulative lengths.
        max_seqlen_KV: Keys of the longest sequence.
        backend: None for the best of the device, or a name of `vicus.backends`, NATTEN's included.
        q_tile_size: Queries per tile, for engines that take it; None for the engine's choice.
        kv_tile_size: Keys per tile, likewise.
        backward_q_tile_size: `q_tile_size` of the backward pass.
        backward_kv_tile_size: `kv_tile_size` of the backward pass.
        backward_kv_splits: Parts into which the backward pass may split the keys; None for the engine's choice.
        backward_use_pt_reduction: Accepted for NATTEN's sake, no effect.
        run_persistent_kernel: Accepted for NATTEN's sake, no effect.
        kernel_schedule: None, "non", "coop" or "pp": a hint to engines that have schedules.
        torch_compile: Compile FlexAttention, where that is the backend (see `vicus.context.allow_flex_compile`).
        return_lse: Whether to return the logsumexp too.
        causal_alignment: Where the diagonal of `is_causal` is: "top_left" (key j <= query i, as in NATTEN), or
            "bottom_right" (j <= i + Sk - Sq, as in FlashAttention). Of each sequence where there are several.
        window_size: Keys (left, right) of the diagonal that a query sees, -1 for no bound. The diagonal is that of
            `causal_alignment` with `is_causal`, otherwise bottom-right.
        attn_mask: bool (True where a query sees a key) or floating (added to the scaled scores), broadcastable to
            `[B, H, Sq, Sk]`; differentiable where floating, at the cost of the scores in memory. Not with packed
            sequences.
        key_lengths: Key padding: int32 or int64 `[B]`, keys of each batch entry that are real. Not with packed
            sequences. On a GPU nothing waits for the values of this list and of the cumulative ones, so nothing checks
            them: wrong ones make wrong results.
        additional_keys: `[B, T, Hkv, D]`, tokens that every query sees; or None.
        additional_values: `[B, T, Hkv, Dv]`, given together with `additional_keys`.
        deterministic: Whether gradients are bit-identical from run to run; None leaves it to `vicus.context` and
            `torch.use_deterministic_algorithms`.

    Returns:
        Output `[B, Sq, H, Dv]` in the dtype of `query`; with `return_lse` also the logsumexp `[B, Sq, H]`, natural
        logarithm, float32 (float64 for float64). Both are differentiable, in any order and in forward mode. A query
        that sees no key has output 0 and logsumexp -inf.

    Raises:
        ValueError: Shapes, dtypes, devices or values do not fit; the message names the argument and what is allowed.
        NotImplementedError: A sparse or nested tensor, an unknown backend, or one that this machine lacks.
        RuntimeError: `torch_compile` without leave, or `seqlens_Q` inside a region that `torch.compile` compiles.

    Source:
        Vaswani et al., Attention Is All You Need (2017); Dao et al., FlashAttention (2022). Arguments of NATTEN 0.21,
        those after `return_lse` of vicus.
    """
    special = return_lse or not (
        (seqlens_Q is seqlens_KV is cumulative_seqlen_Q is cumulative_seqlen_KV is None)
        and (max_seqlen_Q is max_seqlen_KV is backward_kv_splits is backend is kernel_schedule is None)
        and (q_tile_size is kv_tile_size is backward_q_tile_size is backward_kv_tile_size is None)
        and (window_size is attn_mask is key_lengths is additional_keys is additional_values is None)
        and causal_alignment == "top_left"
    )
    if not (special or deterministic):
        output = _quick.dense(query, key, value, is_causal, scale)
        if output is not None:
            return output
    return _attend.dense(
        *(query, key, value, is_causal, scale),
        *((seqlens_Q, seqlens_KV), (cumulative_seqlen_Q, cumulative_seqlen_KV), (max_seqlen_Q, max_seqlen_KV)),
        *(backend, q_tile_size, kv_tile_size, backward_q_tile_size, backward_kv_tile_size, backward_kv_splits),
        *(kernel_schedule, torch_compile, return_lse, causal_alignment, window_size, attn_mask, key_lengths),
        *(additional_keys, additional_values, deterministic),
    )


def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """Merges attentions of one query to several shares of the keys, as if the keys had been one sequence.

    Exact, and differentiable by every part and its logsumexp in any order and in forward mode; gradients reach query,
    keys and values as if attention had been one call.

    Args:
        outputs: Two parts or more, `[B, *X, H, Dv]` (`[B, S, H, Dv]` in NATTEN), of one dtype and shape.
        lse_tensors: Their logsumexps `[B, *X, H]`, natural logarithm; -inf where a part saw no key.
        torch_compile: Accepted for NATTEN's sake, no effect: there is one kernel for it.
        use_autograd_fix: Accepted for NATTEN's sake, no effect: gradients need no fix.

    Returns:
        Output `[B, *X, H, Dv]` in the dtype of the parts, and logsumexp `[B, *X, H]` in float32 (float64 for float64).

    Raises:
        ValueError: Fewer than two parts, another number of logsumexps, or shapes, dtypes or devices that differ.

    Source:
        Milakov and Gimelshein, Online normalizer calculation for softmax (2018). Arguments of NATTEN 0.21, which takes
        contiguous parts only and writes into them in its backward pass.
    """
    return _attend.merge(*_arguments_dense.merge_parts(outputs, lse_tensors))
