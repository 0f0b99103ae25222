"""The unfused operators `qk` and `av`: their derivatives, of any order and mode.

Everything but the bias comes from one trilinear form over the slots of a mask,

    F(scores, query, key) = sum over slots of scores[slot] * query[q(slot)] . key[k(slot)]

whose three partial derivatives are `Scores` (by scores: query times key), `Average` (by query: scores times key, the
operator `av`) and `Spread` (by key: scores times query). Derivatives of each are the other two, so backward of backward
and forward mode need no fourth kernel. Additional tokens are slots after those of the window. The bias is linear, and
its slots are read off the operator itself (`_bias_slots`): no window formula is repeated here.

Tensors are heads first (include/vicus/unfused.h), of any strides.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from vicus._library import LIB
from vicus._ops import _wanted, nothing_differentiates
from vicus._unfused_schemas import AV, AV_BACKWARD, QK, QK_BACKWARD, Ints, Mask, scores_shape, tokens

# --- Small parts -----------------------------------------------------------------------------------------------------


def _present(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]


def _sum(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms that are there; None of none."""
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


# --- The bias --------------------------------------------------------------------------------------------------------


def _bias_slots(layout: Ints, mask: Mask, device: torch.device) -> Tensor:
    """Index into one head's flat bias of every query's slots, `[*X, prod(kernel_size)]`, int64; unused slots index one
    past the end. The operator itself tells: it adds a bias that holds its own indices to scores of zero."""
    extents = [2 * w - 1 for w in mask[0]]
    n = math.prod(extents)
    zeros = torch.zeros([1, 1, *layout, 1], dtype=torch.float64, device=device)
    indices = torch.arange(n, dtype=torch.float64, device=device).view(1, *extents)
    slots = QK(zeros, zeros, None, indices, *mask)[0, 0]
    return torch.where(slots < 0, n, slots).long()


def _bias_scores(rpb: Tensor, scores: Tensor, axes: int, mask: Mask) -> Tensor:
    """`rpb` `[..., H, 2 * w0 - 1, ...]` at the slots of `scores` `[B, H, *X, slots]`, zero where it does not reach."""
    slots = _bias_slots(scores.shape[2 : 2 + axes], mask, scores.device)
    flat = torch.nn.functional.pad(rpb.flatten(-axes), (0, 1))
    bias = flat[..., slots].unsqueeze(-axes - 3)
    return torch.nn.functional.pad(bias, (0, scores.shape[-1] - bias.shape[-1]))


def _bias_sums(grad_scores: Tensor, axes: int, mask: Mask) -> Tensor:
    """The transpose of `_bias_scores`: `[H, 2 * w0 - 1, ...]`."""
    slots = _bias_slots(grad_scores.shape[2 : 2 + axes], mask, grad_scores.device)
    extents = [2 * w - 1 for w in mask[0]]
    heads = grad_scores.shape[1]
    terms = grad_scores[..., : math.prod(mask[0])].sum(0).flatten(1)
    sums = terms.new_zeros(heads, math.prod(extents) + 1).index_add(1, slots.flatten(), terms)
    return sums[:, :-1].reshape(heads, *extents)


# --- Batching (torch.func.vmap): one more batch dimension is a longer batch ------------------------------------------


def _fold(x: Any, dim: int | None, n: int) -> Any:
    """`[n, B, ...]` as `[n * B, ...]`; what is not batched is repeated."""
    if not isinstance(x, Tensor):
        return x
    return (x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def _folded(function: type[Function]) -> Callable:
    def vmap(info, in_dims, *args):
        n = info.batch_size
        results = function.apply(*(_fold(x, dim, n) for x, dim in zip(args, in_dims, strict=True)))
        several = isinstance(results, tuple)
        results = [None if x is None else x.unflatten(0, (n, -1)) for x in (results if several else (results,))]
        dims = [None if x is None else 0 for x in results]
        return (tuple(results), tuple(dims)) if several else (results[0], dims[0])

    return vmap


# --- The three partial derivatives of the trilinear form -------------------------------------------------------------


def _save(ctx: Any, mask: Mask, *tensors: Tensor | None) -> None:
    ctx.set_materialize_grads(False)
    ctx.mask = mask
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


class Scores(Function):
    """Query times key, zeros in unused slots: `[B, H, *X, slots]`."""

    @staticmethod
    def forward(query, key, extra, *mask):
        # The kernel writes the gradient of scores; of the scores themselves it reads the shape alone.
        shape = scores_shape(query, extra, mask[0])
        like = query.new_empty(shape[-1:]).expand(shape)
        return AV_BACKWARD(like, key, extra, query, *mask, 1)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, extra, *mask = inputs
        _save(ctx, mask, query, key, extra)

    @staticmethod
    def backward(ctx, grad):
        query, key, extra = ctx.saved_tensors
        nothing = [None] * 4
        if grad is None:
            return None, None, None, *nothing
        needs = ctx.needs_input_grad
        grad_query = Average.apply(grad, key, extra, *ctx.mask) if needs[0] else None
        return grad_query, *_spread(grad, query, key, extra, ctx.mask, needs[1:3]), *nothing

    @staticmethod
    def jvp(ctx, query_t, key_t, extra_t, *_):
        query, key, extra = ctx.saved_tensors
        return _scores_tangent(query, key, extra, query_t, key_t, extra_t, ctx.mask)


class Average(Function):
    """Scores times key, which is the operator `av`: `[B, H, *X, D]`."""

    @staticmethod
    def forward(scores, key, extra, *mask):
        return AV(scores, key, extra, *mask)

    @staticmethod
    def setup_context(ctx, inputs, output):
        scores, key, extra, *mask = inputs
        _save(ctx, mask, scores, key, extra)

    @staticmethod
    def backward(ctx, grad):
        nothing = [None] * 4
        if grad is None:
            return None, None, None, *nothing
        scores, key, extra = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if nothing_differentiates():
            return *_present(AV_BACKWARD(scores, key, extra, grad, *ctx.mask, _wanted(needs)), needs), *nothing
        grad_scores = Scores.apply(grad, key, extra, *ctx.mask) if needs[0] else None
        return grad_scores, *_spread(scores, grad, key, extra, ctx.mask, needs[1:]), *nothing

    @staticmethod
    def jvp(ctx, scores_t, key_t, extra_t, *_):
        scores, key, extra = ctx.saved_tensors
        return _average_tangent(scores, key, extra, scores_t, key_t, extra_t, ctx.mask)


class Spread(Function):
    """Scores times query, gathered by key: `[B, heads_kv, *X, D]`, and by additional token `[B, heads_kv, tokens, D]`
    (None without)."""

    @staticmethod
    def forward(scores, query, heads_kv, tokens, *mask):
        batch, _, *layout, width = query.shape
        one = query.new_empty(width)  # of key and tokens the kernel reads the shapes alone
        key = one.expand(batch, heads_kv, *layout, width)
        extra = one.expand(batch, heads_kv, tokens, width) if tokens else None
        _, by_key, by_token = AV_BACKWARD(scores, key, extra, query, *mask, 6)
        return by_key, by_token if tokens else None

    @staticmethod
    def setup_context(ctx, inputs, output):
        scores, query, ctx.heads_kv, ctx.tokens, *mask = inputs
        _save(ctx, mask, scores, query)

    @staticmethod
    def backward(ctx, grad, grad_extra):
        nothing = [None] * 6
        if grad is None and grad_extra is None:
            return None, None, *nothing
        scores, query = ctx.saved_tensors
        grad, grad_extra = _pair(grad, grad_extra, query, ctx.heads_kv, ctx.tokens)
        needs = ctx.needs_input_grad
        grad_scores = Scores.apply(query, grad, grad_extra, *ctx.mask) if needs[0] else None
        grad_query = Average.apply(scores, grad, grad_extra, *ctx.mask) if needs[1] else None
        return grad_scores, grad_query, *nothing

    @staticmethod
    def jvp(ctx, scores_t, query_t, *_):
        scores, query = ctx.saved_tensors
        terms = []
        if scores_t is not None:
            terms.append(Spread.apply(scores_t, query, ctx.heads_kv, ctx.tokens, *ctx.mask))
        if query_t is not None:
            terms.append(Spread.apply(scores, query_t, ctx.heads_kv, ctx.tokens, *ctx.mask))
        by_key, by_token = zip(*terms, strict=True)
        return _sum(*by_key), _sum(*by_token)


for _function in (Scores, Average, Spread):
    _function.vmap = staticmethod(_folded(_function))


def _spread(scores, query, key, extra, mask, needs) -> tuple[Tensor | None, Tensor | None]:
    if not any(needs):
        return None, None
    by_key, by_token = Spread.apply(scores, query, key.shape[1], tokens(extra), *mask)
    return by_key if needs[0] else None, by_token if needs[1] else None


def _pair(key, extra, query, heads_kv, tokens) -> tuple[Tensor, Tensor | None]:
    """A key and its additional tokens when one of them may be missing: zeros then."""
    batch, _, *layout, width = query.shape
    key = query.new_zeros(batch, heads_kv, *layout, width) if key is None else key
    if tokens:
        extra = query.new_zeros(batch, heads_kv, tokens, width) if extra is None else extra
    return key, extra


def _scores_tangent(query, key, extra, query_t, key_t, extra_t, mask) -> Tensor | None:
    by_query = None if query_t is None else Scores.apply(query_t, key, extra, *mask)
    if key_t is None and extra_t is None:
        return by_query
    pair = _pair(key_t, extra_t, query, key.shape[1], tokens(extra))
    return _sum(by_query, Scores.apply(query, *pair, *mask))


def _average_tangent(scores, key, extra, scores_t, key_t, extra_t, mask) -> Tensor | None:
    by_scores = None if scores_t is None else Average.apply(scores_t, key, extra, *mask)
    if key_t is None and extra_t is None:
        return by_scores
    pair = _pair(key_t, extra_t, key, key.shape[1], tokens(extra))
    return _sum(by_scores, Average.apply(scores, *pair, *mask))


# --- The operators ---------------------------------------------------------------------------------------------------


class Qk(Function):
    """The operator `qk`: query times key plus bias, -inf in unused slots."""

    @staticmethod
    def forward(query, key, extra, rpb, *mask):
        return QK(query, key, extra, rpb, *mask)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, extra, rpb, *mask = inputs
        _save(ctx, mask, query, key, extra, rpb)
        ctx.shape = output.shape

    @staticmethod
    def backward(ctx, grad):
        nothing = [None] * 4
        if grad is None:
            return None, None, None, None, *nothing
        query, key, extra, rpb = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if nothing_differentiates():
            return *_present(QK_BACKWARD(query, key, extra, rpb, grad, *ctx.mask, _wanted(needs)), needs), *nothing
        grad_query = Average.apply(grad, key, extra, *ctx.mask) if needs[0] else None
        grad_rpb = _bias_sums(grad, query.dim() - 3, ctx.mask) if needs[3] else None
        return grad_query, *_spread(grad, query, key, extra, ctx.mask, needs[1:3]), grad_rpb, *nothing

    @staticmethod
    def jvp(ctx, query_t, key_t, extra_t, rpb_t, *_):
        query, key, extra, _ = ctx.saved_tensors
        tangent = _scores_tangent(query, key, extra, query_t, key_t, extra_t, ctx.mask)
        if rpb_t is None:
            return tangent
        like = query.new_empty(()).expand(ctx.shape)
        return _sum(tangent, _bias_scores(rpb_t, like, query.dim() - 3, ctx.mask).expand(ctx.shape))

    @staticmethod
    def vmap(info, in_dims, query, key, extra, rpb, *mask):
        n, tensors = info.batch_size, zip((query, key, extra), in_dims, strict=False)
        folded = [_fold(x, dim, n) for x, dim in tensors]
        if in_dims[3] is None:
            return Qk.apply(*folded, rpb, *mask).unflatten(0, (n, -1)), 0
        scores = Qk.apply(*folded, None, *mask)
        bias = _bias_scores(rpb.movedim(in_dims[3], 0), scores, len(mask[0]), mask)
        return scores.unflatten(0, (n, -1)) + bias, 0


def _register(name: str, function: type[Function], backward: Callable | None = None) -> None:
    torch.library.register_autograd(
        f"vicus::{name}", backward or function.backward, setup_context=function.setup_context, lib=LIB
    )


_register("qk", Qk)
_register("av", Average)


def _save_backward_inputs(ctx, inputs, output):
    *tensors, kernel_size, stride, dilation, is_causal, _ = inputs
    _save(ctx, (kernel_size, stride, dilation, is_causal), *tensors)


def _none_if_empty(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Outputs that were not wanted are empty, and so are their gradients."""
    return [None if g is None or g.dim() == 1 else g for g in gradients]


def _pull_back(ctx, scores, query, key, extra, by_scores, by_query, by_key, by_token):
    """Gradients of scores, query, key and additional tokens of the trilinear form, for gradients that arrive at its
    partial derivatives by each of them."""
    mask = ctx.mask
    pair = None
    if by_key is not None or by_token is not None:
        pair = _pair(by_key, by_token, query, key.shape[1], tokens(extra))
    spreads = []
    if by_query is not None:
        spreads.append(Spread.apply(scores, by_query, key.shape[1], tokens(extra), *mask))
    if by_scores is not None:
        spreads.append(Spread.apply(by_scores, query, key.shape[1], tokens(extra), *mask))
    to_key, to_token = zip(*spreads, strict=True) if spreads else ((), ())
    return (
        _sum(
            None if by_query is None else Scores.apply(by_query, key, extra, *mask),
            None if pair is None else Scores.apply(query, *pair, *mask),
        ),
        _sum(
            None if by_scores is None else Average.apply(by_scores, key, extra, *mask),
            None if pair is None else Average.apply(scores, *pair, *mask),
        ),
        _sum(*to_key),
        _sum(*to_token),
    )


def _qk_backward_backward(ctx, grads):
    query, key, extra, _, grad_scores = ctx.saved_tensors
    by_query, by_key, by_token, by_rpb = _none_if_empty(grads)
    to_scores, to_query, to_key, to_extra = _pull_back(
        ctx, grad_scores, query, key, extra, None, by_query, by_key, by_token
    )
    if by_rpb is not None:
        to_scores = _sum(to_scores, _bias_scores(by_rpb, grad_scores, query.dim() - 3, ctx.mask).expand_as(grad_scores))
    return to_query, to_key, to_extra, None, to_scores, *[None] * 5


def _av_backward_backward(ctx, grads):
    scores, value, extra, grad_output = ctx.saved_tensors
    by_scores, by_value, by_token = _none_if_empty(grads)
    to_scores, to_output, to_value, to_extra = _pull_back(
        ctx, scores, grad_output, value, extra, by_scores, None, by_value, by_token
    )
    return to_scores, to_value, to_extra, to_output, *[None] * 5


torch.library.register_autograd(
    "vicus::qk_backward", _qk_backward_backward, setup_context=_save_backward_inputs, lib=LIB
)
torch.library.register_autograd(
    "vicus::av_backward", _av_backward_backward, setup_context=_save_backward_inputs, lib=LIB
)


def qk(query: Tensor, key: Tensor, additional_keys: Tensor | None, rpb: Tensor | None, *mask: Ints) -> Tensor:
    """The operator `qk` with every derivative; arguments are checked by the kernel."""
    call = QK if torch.compiler.is_compiling() else Qk.apply
    return call(query, key, additional_keys, rpb, *mask)


def av(scores: Tensor, value: Tensor, additional_values: Tensor | None, *mask: Ints) -> Tensor:
    """The operator `av` with every derivative; arguments are checked by the kernel."""
    call = AV if torch.compiler.is_compiling() else Average.apply
    return call(scores, value, additional_values, *mask)
