"""The three ways to compute a call of the attention layer. Each says what it takes, in words, and computes it.

`flash`: vicus' own engines, through `vicus.functional`. `fused`: cuDNN, through PyTorch's scaled_dot_product_attention.
`unfused`: two products around a softmax, with the scores in memory; takes everything.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vicus import functional, unfused
from vicus._arguments import FLOATING
from vicus.nn import _masks, _packing
from vicus.nn._arguments_layer import Sequences
from vicus.nn.problem import Problem

__all__ = ["BACKENDS", "Call", "Flash", "Fused", "Unfused"]


@dataclasses.dataclass
class Call:
    """Tensors of one call of an attention layer, checked, heads last.

    Attributes:
        problem: What is asked.
        query: `[B, Sq, H, D]`; packed `[T, H, D]`.
        key: `[B, Sk, Hkv, D]`; packed `[Tkv, Hkv, D]`.
        value: `[B, Sk, Hkv, Dv]`; packed `[Tkv, Hkv, Dv]`.
        scale: Factor of query times key.
        sequences: Where the tokens of the sequences are.
        mask: Bool, broadcastable to `[B, H, Sq, Sk]`, True where a pair is hidden; or None.
        bias: Floating, broadcastable to `[B, H, Sq, Sk]`; or None.
        slopes: Of ALiBi, float32 `[H]` or `[B, H]`; or None.
        sink: Logit that every query sees besides its keys, with value 0: float32 `[H]`; or None.
        dropout_context: Under which random numbers for dropout are drawn.
    """

    problem: Problem
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    sequences: Sequences
    mask: Tensor | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    sink: Tensor | None = None
    dropout_context: Callable[[], Any] = contextlib.nullcontext


class Backend(Protocol):
    """One way to compute."""

    name: ClassVar[str]

    def supports(self, problem: Problem) -> str:
        """Why this backend does not take `problem`, in words; empty when it does."""
        ...

    def run(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """Output, shaped as the query but for the head dim of the value, and the largest score of each head `[H]` where
        the problem wants it."""
        ...


class Flash:
    """vicus' own engines: no scores in memory."""

    name: ClassVar[str] = "flash"

    def supports(self, problem: Problem) -> str:
        """Why the engines do not take `problem`; empty when one does."""
        return self._extras(problem) or self._masks(problem) or self._device(problem)

    def _extras(self, p: Problem) -> str:
        if p.dropout > 0:
            return f"attention_dropout is {p.dropout} while training; the kernels have no dropout"
        if p.softcap > 0:
            return f"softcap is {p.softcap}; the kernels have none"
        if p.softmax_type != "vanilla":
            return f"softmax_type is {p.softmax_type!r}; the kernels have no sinks"
        if p.return_max_logit:
            return "return_max_logit is True; the kernels do not keep the largest score"
        if p.bias_type == "alibi":
            return "core_attention_bias_type is 'alibi'; the kernels have none"
        if p.bias_requires_grad:
            return "the gradient of core_attention_bias is wanted; the kernels have none"
        if p.bias_type != "no_bias" and (p.padding or p.neighborhood is not None):
            what = "sequences of different lengths" if p.padding else "neighborhoods"
            return f"core_attention_bias_type is {p.bias_type!r}; with {what} the kernels have none"
        return ""

    def _masks(self, p: Problem) -> str:
        if p.windowed and not p.causal and not p.bottom_right_diagonal and not p.same_lengths:
            return (
                f"bottom_right_diagonal is False for window_size {p.window_size}; without a causal mask the kernels"
                " count windows from the bottom right corner, which differs unless there are as many keys as queries"
            )
        return ""

    def _device(self, p: Problem) -> str:
        if p.dtype not in FLOATING:
            return f"dtype is {p.dtype}; allowed: {', '.join(map(str, FLOATING))}"
        if p.device == "cpu":
            return ""
        if p.device != "cuda" or p.architecture is None:
            return f"the tensors are on {p.device!r}; allowed: 'cpu', 'cuda'"
        from vicus import backends  # late: it brings FlexAttention along

        return backends.gpu_refuses(p.architecture, p.dtype, max(p.head_dim_qk, p.head_dim_v))

    def run(self, call: Call) -> tuple[Tensor, None]:
        """Computes with `vicus.functional`."""
        p = call.problem
        more: dict[str, Any] = {"scale": call.scale, "deterministic": p.deterministic or None}
        if p.neighborhood is not None:
            n = p.neighborhood
            tensors = (x.unflatten(1, n.layout) for x in (call.query, call.key, call.value))
            windows = (n.kernel_size, n.stride, n.dilation, n.is_causal)
            output = functional.neighborhood_attention(*tensors, *windows, **more)
            return output.flatten(1, len(n.layout)), None
        more["is_causal"] = p.causal
        more["causal_alignment"] = "bottom_right" if p.bottom_right_diagonal else "top_left"
        if p.windowed:
            more["window_size"] = p.window_size
        if p.padding:
            # Without padding there is less to compute; but to take it out, the host has to know the lengths.
            known = p.device == "cpu" or call.sequences.packed is not None or not call.sequences.padded_at_end
            from_the_start = not p.bottom_right_diagonal if p.causal else not p.windowed
            compute = self._padded if from_the_start and not known else self._sequences
            return compute(call, more), None
        bias = call.bias
        if bias is not None and p.bias_type == "pre_scale_bias":
            bias = (bias * call.scale).masked_fill(bias == -torch.inf, -torch.inf)  # whatever the scale
        if call.mask is not None:
            seen = ~call.mask
            bias = seen if bias is None else bias.masked_fill(call.mask, -torch.inf)
        return functional.attention(call.query, call.key, call.value, attn_mask=bias, **more), None

    def _padded(self, call: Call, more: dict[str, Any]) -> Tensor:
        """Sequences that are padded at their end, as they are."""
        valid_q, valid_kv = call.sequences.valid
        padding = ~valid_q[..., None, None]
        query = call.query.masked_fill(padding, 0)  # whatever is there must not reach the gradients of the keys
        output = functional.attention(query, call.key, call.value, key_lengths=valid_kv.sum(-1), **more)
        return output.masked_fill(padding, 0)

    def _sequences(self, call: Call, more: dict[str, Any]) -> Tensor:
        """Sequences of different lengths: their tokens one after the other, without padding or gaps."""
        tensors = (call.query, call.key, call.value)
        if call.sequences.packed is not None:
            packed_q, packed_kv = call.sequences.packed
            tensors = tuple(x[None] for x in tensors)
            lengths = (packed_q.lengths, packed_kv.lengths)
            valid = tuple(
                packed.present(x.shape[1])[None] if packed.gaps else None
                for packed, x in zip(call.sequences.packed, tensors[:2], strict=True)
            )
            longest = (packed_q.longest, packed_kv.longest)
        else:
            valid = call.sequences.valid
            lengths = tuple(x.sum(-1) for x in valid)
            longest = (call.query.shape[1], call.key.shape[1])
        places = (valid[0], valid[1], valid[1])
        query, key, value = (
            x if present is None else _packing.pack(x, present) for x, present in zip(tensors, places, strict=True)
        )
        longest_q, longest_kv = min(longest[0], query.shape[1]), min(longest[1], key.shape[1])
        if longest_q == 0 or longest_kv == 0:  # the engines want queries and keys: zeros, with gradients of zero
            nothing = query[..., :0].sum() + key[:, :0].sum() + value[:, :0].sum()
            output = nothing.expand(*query.shape[:-1], value.shape[-1])
        else:
            output = functional.attention(
                *(query, key, value),
                cumulative_seqlen_Q=_packing.cumulative(lengths[0]),
                cumulative_seqlen_KV=_packing.cumulative(lengths[1]),
                max_seqlen_Q=longest_q,
                max_seqlen_KV=longest_kv,
                **more,
            )
        output = output if valid[0] is None else _packing.unpack(output, valid[0])
        return output if call.sequences.packed is None else output[0]


class Fused:
    """cuDNN through PyTorch's scaled_dot_product_attention."""

    name: ClassVar[str] = "fused"

    def supports(self, problem: Problem) -> str:
        """Why cuDNN is not asked for `problem`; empty when it is."""
        return self._device(problem) or self._extras(problem) or self._shapes(problem)

    def _device(self, p: Problem) -> str:
        if p.device != "cuda" or p.architecture is None:
            return f"the tensors are on {p.device!r}; cuDNN computes on 'cuda'"
        if p.architecture < (8, 0):
            return f"compute capability is {p.architecture}; cuDNN's attention needs (8, 0) or more"
        if p.cudnn is None or p.cudnn < 90000:
            return f"cuDNN is {p.cudnn}; its attention needs 90000 (9.0) or more"
        if p.dtype not in (torch.float16, torch.bfloat16):
            return f"dtype is {p.dtype}; allowed: torch.float16, torch.bfloat16"
        return ""

    def _extras(self, p: Problem) -> str:
        if p.deterministic:
            return "deterministic results are wanted; PyTorch calls cuDNN's attention not deterministic"
        if p.neighborhood is not None:
            return "neighborhood is given; cuDNN has none"
        if p.softcap > 0:
            return f"softcap is {p.softcap}; PyTorch's interface to cuDNN has none"
        if p.softmax_type != "vanilla":
            return f"softmax_type is {p.softmax_type!r}; PyTorch's interface to cuDNN has no sinks"
        if p.return_max_logit:
            return "return_max_logit is True; PyTorch's interface to cuDNN does not return it"
        if p.bias_type != "no_bias":
            return f"core_attention_bias_type is {p.bias_type!r}; PyTorch's interface to cuDNN takes no bias from here"
        if p.dropout * 16 != int(p.dropout * 16):
            return f"attention_dropout is {p.dropout} while training; cuDNN takes multiples of 1/16"
        return ""

    def _shapes(self, p: Problem) -> str:
        if p.attn_mask_type not in ("no_mask", "causal", "causal_bottom_right") or p.windowed:
            window = f" with window_size {p.window_size}" if p.windowed else ""
            return (
                f"attn_mask_type is {p.attn_mask_type!r}{window}; PyTorch's interface to cuDNN takes 'no_mask' and"
                " 'causal' without a window"
            )
        if p.causal and not p.same_lengths:
            return (
                f"there are {p.max_seqlen_q} queries and {p.max_seqlen_kv} keys; causal masks go to cuDNN when there"
                " are as many of both"
            )
        largest = 256 if p.architecture in ((9, 0), (10, 0)) else 128
        dims = (p.head_dim_qk, p.head_dim_v)
        if max(dims) > largest or any(dim % 8 for dim in dims):
            return f"head dims are {dims}; cuDNN takes multiples of 8 up to {largest} on this architecture"
        if p.max_seqlen_kv < 2 or (p.dropout > 0 and p.max_seqlen_q < 2):
            return f"there are {p.max_seqlen_q} queries and {p.max_seqlen_kv} keys; cuDNN takes 2 and more"
        if p.cudnn_takes is False:
            return "torch.backends.cuda.can_use_cudnn_attention refuses these tensors (its debug=True tells why)"
        return ""

    def run(self, call: Call) -> tuple[Tensor, None]:
        """Computes with cuDNN, and with nothing else."""
        p = call.problem
        query, key, value = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), call.dropout_context():
            output = F.scaled_dot_product_attention(
                *(query, key, value),
                dropout_p=p.dropout,
                is_causal=p.causal,
                scale=call.scale,
                enable_gqa=p.num_heads != p.num_groups,
            )
        return output.transpose(1, 2), None


def cudnn_facts(call: Call) -> Problem:
    """The problem of a call on a CUDA device, with what is to be known of cuDNN for it."""
    p = call.problem
    if not torch.backends.cudnn.is_available():
        return p
    takes = None
    if call.sequences.packed is None:
        query, key, value = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
        grouped = p.num_heads != p.num_groups
        asked = torch.backends.cuda.SDPAParams(query, key, value, None, p.dropout, p.causal, grouped)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            takes = torch.backends.cuda.can_use_cudnn_attention(asked)
    return dataclasses.replace(p, cudnn=torch.backends.cudnn.version(), cudnn_takes=takes)


class Unfused:
    """Product, softmax, product, with the scores in memory. Keys and values are not repeated for grouped heads."""

    name: ClassVar[str] = "unfused"

    def supports(self, problem: Problem) -> str:
        """Nothing is refused."""
        return ""

    def run(self, call: Call) -> tuple[Tensor, Tensor | None]:
        """Computes with PyTorch's operators."""
        p = call.problem
        ours = p.device == "cpu" or (p.device == "cuda" and p.architecture is not None and p.architecture >= (8, 0))
        if p.neighborhood is not None and ours and call.bias is None and call.slopes is None:
            return _windows(call)
        if call.sequences.packed is None:
            return _pairs(call, call.query, call.key, call.value, call.sequences.valid)
        packed_q, packed_kv = call.sequences.packed
        tensors = (packed_q.pad(call.query), packed_kv.pad(call.key), packed_kv.pad(call.value))
        output, largest = _pairs(call, *tensors, (packed_q.valid(), packed_kv.valid()))
        return packed_q.unpad(output, call.query.shape[0]), largest


def _weights(
    call: Call, scores: Tensor, hidden: Tensor | None, blind: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Softmax of scores `[B, H, ..., keys]` with what belongs to it, dropout included, and the largest score of each
    head where the problem wants it. `blind`: rows of which all is hidden; theirs are the weights of a row that sees
    all, which the caller drops."""
    p = call.problem
    if p.bias_type == "pre_scale_bias":
        scores = scores + call.bias.to(scores.dtype) * call.scale
    if p.softcap > 0:
        scores = p.softcap * torch.tanh(scores / p.softcap)
    if p.bias_type == "post_scale_bias":
        scores = scores + call.bias.to(scores.dtype)
    if call.slopes is not None:
        sizes = scores.shape[2:]
        slopes = call.slopes.to(scores.dtype)
        scores = scores + _masks.alibi_bias(slopes, *sizes, call.sequences.valid, p.bottom_right_diagonal)
    largest = None
    if p.return_max_logit:
        seen = scores.detach() if hidden is None else scores.detach().masked_fill(hidden, -torch.inf)
        over = (0, *range(2, scores.dim()))
        largest = seen.amax(over) if seen.numel() else seen.new_full(seen.shape[1:2], -torch.inf)
    if hidden is not None:
        scores = scores.masked_fill(hidden if blind is None else hidden & ~blind, -torch.inf)
    if call.sink is not None:
        sink = call.sink.to(scores.dtype).view(1, -1, *(1,) * (scores.dim() - 2))
        scores = torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)
    if call.sink is not None:
        weights = weights[..., :-1]
    if p.dropout > 0:
        with call.dropout_context():
            weights = F.dropout(weights, p.dropout)
    return weights, largest


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _pairs(
    call: Call, query: Tensor, key: Tensor, value: Tensor, valid: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Attention over all pairs of `[B, S, H, D]`, hidden ones included."""
    p = call.problem
    call = dataclasses.replace(call, sequences=dataclasses.replace(call.sequences, valid=valid))
    if valid[0] is not None:  # whatever is in the padding, it must not reach a sum, not even as 0 * NaN
        query = query.masked_fill(~valid[0][..., None, None], 0)
        key, value = (x.masked_fill(~valid[1][..., None, None], 0) for x in (key, value))
    batch, queries, heads, _ = query.shape
    keys, groups = key.shape[1:3]
    # The queries of a group are rows of one product with its key: nothing is repeated.
    rows = query.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)
    columns, values = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))
    # Scaled as it accumulates, before it is rounded: a product of float16 could overflow.
    scores = torch.baddbmm(rows.new_zeros(1, 1, 1), rows, columns.mT, beta=0, alpha=call.scale)
    scores = scores.view(batch, heads, queries, keys).to(_precise(query.dtype))
    hidden = _masks.hidden_pairs(p, queries, keys, valid, call.mask, query.device)
    if call.bias is not None:
        blocked = call.bias == -torch.inf
        hidden = blocked if hidden is None else hidden | blocked
        call.bias = call.bias.masked_fill(blocked, 0)
    blind = None if hidden is None else hidden.all(-1, keepdim=True)
    weights, largest = _weights(call, scores, hidden, blind)
    output = torch.bmm(weights.to(value.dtype).reshape(batch * groups, heads // groups * queries, keys), values)
    output = output.view(batch, heads, queries, value.shape[-1]).transpose(1, 2)
    if blind is not None:  # a query that sees no key has output 0, and no gradient
        output = output.masked_fill(blind.transpose(1, 2), 0)
    return output, largest


def _windows(call: Call) -> tuple[Tensor, Tensor | None]:
    """Attention over the pairs of a neighborhood alone."""
    p, n = call.problem, call.problem.neighborhood
    rank = len(n.layout)
    query, key, value = (x.unflatten(1, n.layout).movedim(-2, 1) for x in (call.query, call.key, call.value))
    mask = {"kernel_size": n.kernel_size, "stride": n.stride, "dilation": n.dilation, "is_causal": n.is_causal}
    products = _PRODUCTS[rank]
    scores = products[0](query * call.scale, key, **mask).to(_precise(query.dtype))
    weights, largest = _weights(call, scores, scores == -torch.inf if p.softcap > 0 else None)
    output = products[1](weights.to(value.dtype), value, **mask)
    return output.movedim(1, -2).flatten(1, rank), largest


_PRODUCTS = {
    1: (unfused.na1d_qk, unfused.na1d_av),
    2: (unfused.na2d_qk, unfused.na2d_av),
    3: (unfused.na3d_qk, unfused.na3d_av),
}

#: Every backend, in the order in which they are tried where nothing tells them apart.
BACKENDS: tuple[Backend, ...] = (Flash(), Fused(), Unfused())
