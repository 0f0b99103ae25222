"""The fused operators and `merge`: schemas, shapes under tracing, and derivatives.

Kernels: src/torch/bind.cc. First derivatives are kernels too; derivatives of those go through the compositions of
`vicus.composite`, which cost memory for the scores and exist in every order.

Tensors are heads last, of any strides; a tensor whose last dimension is not contiguous is copied by the kernel.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vicus._library import LIB

Ints = Sequence[int]
MaybeTensors = Sequence[Tensor | None]

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? additional_keys, Tensor? additional_values"
_GRADS = "Tensor grad_output, Tensor? grad_logsumexp"
_RESULTS = "(Tensor output, Tensor logsumexp)"
_MASK = "int[] kernel_size, int[] stride, int[] dilation, int[] is_causal, float scale, int[] options"
_LISTS = "Tensor? attn_bias, Tensor? key_lengths, Tensor? cumulative_seqlen_q, Tensor? cumulative_seqlen_kv"
_LONGEST = "SymInt max_seqlen_q, SymInt max_seqlen_kv"  # of packed sequences; what grids are made of on a GPU
_BAND = f"{_LONGEST}, int causal, int window_left, int window_right, float scale, int[] options"
_PARTS = "Tensor[] outputs, Tensor[] logsumexps"

# Without gradients, extra tensors, options and logsumexp: few arguments, for half the time of a call. `mask` holds
# kernel_size, stride, dilation and is_causal, one value per axis each.
_QKV = "Tensor query, Tensor key, Tensor value"
LIB.define(f"neighborhood_inference({_QKV}, int[] mask, float scale) -> Tensor")
LIB.define(f"dense_inference({_QKV}, int causal, int window_left, int window_right, float scale) -> Tensor")
LIB.define(f"neighborhood({_INPUTS}, Tensor? rpb, {_MASK}) -> {_RESULTS}")
LIB.define(
    f"neighborhood_backward({_GRADS}, {_INPUTS}, Tensor? rpb, Tensor output, Tensor logsumexp, {_MASK}, int wanted)"
    " -> Tensor[]"
)
LIB.define(f"dense({_INPUTS}, {_LISTS}, {_BAND}) -> {_RESULTS}")
LIB.define(
    f"dense_backward({_GRADS}, {_INPUTS}, {_LISTS}, Tensor output, Tensor logsumexp, {_BAND}, int wanted) -> Tensor[]"
)
# For benchmarks and bug reports; `mask` as in neighborhood_inference, empty for dense attention. `lengths`: packed
# sequences, their longest queries and keys; without sequences key lengths.
LIB.define(f"gpu_report({_QKV}, int[] mask, int causal, int[] options, bool backward, int[] lengths=[]) -> str[]")
LIB.define(f"merge({_PARTS}) -> {_RESULTS}")
LIB.define(f"merge_backward({_PARTS}, {_GRADS}) -> Tensor[]")

neighborhood_inference = torch.ops.vicus.neighborhood_inference.default
neighborhood = torch.ops.vicus.neighborhood.default
neighborhood_backward = torch.ops.vicus.neighborhood_backward.default
dense_inference = torch.ops.vicus.dense_inference.default
dense = torch.ops.vicus.dense.default
dense_backward = torch.ops.vicus.dense_backward.default
merge = torch.ops.vicus.merge.default
merge_backward = torch.ops.vicus.merge_backward.default


def logsumexp_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the logsumexp of outputs of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- Shapes under tracing --------------------------------------------------------------------------------------------


def _results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    tokens = query.shape[:-1]
    return (
        query.new_empty([*tokens, value.shape[-1]]),
        query.new_empty(tokens, dtype=logsumexp_dtype(query.dtype)),
    )


def _gradients(wanted: int, of: MaybeTensors) -> list[Tensor]:
    """One gradient per tensor, an empty one where none is wanted. The first tensor is always there."""
    return [x.new_empty(x.shape) if x is not None and wanted >> i & 1 else of[0].new_empty(0) for i, x in enumerate(of)]


@torch.library.register_fake("vicus::neighborhood_inference", lib=LIB)
def _(query, key, value, mask, scale):
    return _results(query, value)[0]


@torch.library.register_fake("vicus::dense_inference", lib=LIB)
def _(query, key, value, causal, window_left, window_right, scale):
    return _results(query, value)[0]


@torch.library.register_fake("vicus::neighborhood", lib=LIB)
def _(query, key, value, *rest):
    return _results(query, value)


@torch.library.register_fake("vicus::neighborhood_backward", lib=LIB)
def _(grad_output, grad_logsumexp, *rest):
    return _gradients(rest[-1], rest[:6])


@torch.library.register_fake("vicus::dense", lib=LIB)
def _(query, key, value, *rest):
    return _results(query, value)


@torch.library.register_fake("vicus::dense_backward", lib=LIB)
def _(grad_output, grad_logsumexp, *rest):
    return _gradients(rest[-1], rest[:5])


@torch.library.register_fake("vicus::merge", lib=LIB)
def _(outputs, logsumexps):
    return _results(outputs[0], outputs[0])


@torch.library.register_fake("vicus::merge_backward", lib=LIB)
def _(outputs, logsumexps, grad_output, grad_logsumexp):
    return [x.new_empty(x.shape) for x in (*outputs, *logsumexps)]


# --- Compositions that PyTorch differentiates (imported when they are needed) ----------------------------------------


def _composite_neighborhood(*args: Any) -> tuple[Tensor, Tensor]:
    from vicus import composite

    return composite.neighborhood(*args)


def _composite_dense(*args: Any) -> tuple[Tensor, Tensor]:
    from vicus import composite

    return composite.dense(*args[:9], *args[11:])  # without the longest sequences, which lists tell


def composite_merge(outputs: Sequence[Tensor], logsumexps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`merge` out of PyTorch's operators: differentiable in any order and mode.

    Args:
        outputs: Parts `[B, *X, H, Dv]` of one dtype.
        logsumexps: Their logsumexps `[B, *X, H]`.

    Returns:
        Output in the dtype of the parts and logsumexp in float32 (float64 for float64). Parts of -inf have weight zero,
        whatever they hold.
    """
    dtype = logsumexp_dtype(outputs[0].dtype)
    lse = torch.stack([x.to(dtype) for x in logsumexps])
    seen = lse > -torch.inf
    # Rows that no part saw have no finite maximum to subtract, and no derivative.
    total = torch.where(seen.any(0), lse, 0.0).logsumexp(0)
    total = torch.where(seen.any(0), total, -torch.inf)
    weights = torch.where(seen, lse - torch.where(seen.any(0), total, 0.0), -torch.inf).exp().unsqueeze(-1)
    parts = torch.where(seen.unsqueeze(-1), torch.stack([x.to(dtype) for x in outputs]), 0.0)
    return (weights * parts).sum(0).to(outputs[0].dtype), total


def _derivatives_of_gradients(
    composite: Callable[..., tuple[Tensor, ...]],
    inputs: MaybeTensors,
    grads: MaybeTensors,
    wanted: int,
    upstream: MaybeTensors,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Backward of a backward operator.

    The operator computes gradients of `inputs` out of `grads`, those of the results. Here they are computed once more
    through `composite`, and differentiated by both.

    Args:
        composite: Results of `inputs`, out of differentiable operators.
        inputs: Of the forward operator.
        grads: Gradients of its results, None for zero.
        wanted: Bit i is set where the operator computed the gradient of input i.
        upstream: Gradients of those gradients, in the order of `inputs`, None for zero.

    Returns:
        Gradients of `grads` and of `inputs`, None for zero.
    """
    with torch.enable_grad():
        # Aliases, so that only what happens from here on is differentiated, also where one input came from another.
        inputs = [None if x is None else x.view_as(x) if x.requires_grad else x.detach() for x in inputs]
        for i, x in enumerate(inputs):
            if x is not None and wanted >> i & 1 and not x.requires_grad:
                x.requires_grad_()
        grads = [None if g is None else g.view_as(g) if g.requires_grad else g.detach() for g in grads]
        results = composite(*inputs)
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
        chosen = [i for i, x in enumerate(inputs) if x is not None and wanted >> i & 1]
        first = torch.autograd.grad(
            [r for r, _ in pairs],
            [inputs[i] for i in chosen],
            [g.to(r.dtype) for r, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
    terms = [
        (gradient, upstream[i])
        for i, gradient in zip(chosen, first, strict=True)
        if gradient is not None and gradient.requires_grad and upstream[i] is not None
    ]
    sources = [*grads, *inputs]
    at = [i for i, x in enumerate(sources) if x is not None and x.requires_grad]
    result: list[Tensor | None] = [None] * len(sources)
    if terms and at:
        second = torch.autograd.grad(
            [gradient for gradient, _ in terms],
            [sources[i] for i in at],
            [u.to(gradient.dtype) for gradient, u in terms],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        for i, gradient in zip(at, second, strict=True):
            result[i] = gradient
    return result[: len(grads)], result[len(grads) :]


# --- Autograd ---------------------------------------------------------------------------------------------------------


def _wanted(needs: Sequence[bool]) -> int:
    return sum(1 << i for i, need in enumerate(needs) if need)


def _with_tangents(backward: Callable[..., Sequence[Tensor]], grads: MaybeTensors) -> Sequence[Tensor]:
    """Gradients out of those of the results, in which they are linear, with the forward-mode tangents of the latter.

    The kernels know no tangents. (Inputs have none here: those go through the compositions.)
    """
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return backward(*grads)
    pairs = [(None, None) if g is None else forward_ad.unpack_dual(g) for g in grads]
    if all(tangent is None for _, tangent in pairs):
        return backward(*grads)
    primals = backward(*(primal for primal, _ in pairs))
    tangents = backward(*(None if p is None else torch.zeros_like(p) if t is None else t for p, t in pairs))
    return [forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]


def nothing_differentiates() -> bool:
    """Whether nothing may differentiate, or batch, what is computed now."""
    return not (
        torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    )


def without_autograd(op: Any, *args: Any) -> Any:
    """Calls an operator on tensors that nothing differentiates: the Python half of its autograd takes 5 us of 12."""
    if torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _register_fused(
    name: str,
    forward: Any,
    backward: Any,
    composite: Callable[..., tuple[Tensor, Tensor]],
    differentiable: int,
    tensors: int,
    settings: int,
) -> type[torch.autograd.Function]:
    """Autograd of a fused operator and of its backward operator.

    Args:
        name: Of the forward operator.
        forward: The operator.
        backward: The operator of its gradients.
        composite: The same function, differentiable; takes the operator's arguments without `options`.
        differentiable: Leading tensors that have gradients.
        tensors: Leading arguments that are tensors.
        settings: Arguments after them, `options` last.

    Returns:
        The operator once more, for eager calls: what PyTorch makes of a registered formula takes 30 us longer. It takes
        the settings as one argument, then the tensors; those at the end that are None may be left out.
    """
    count = tensors + settings

    def derive(
        ctx: Any, run: Callable[..., Sequence[Tensor]], needs: Sequence[bool], *grads: Tensor | None
    ) -> list[Tensor | None]:
        """Gradients by `run`, the backward operator, of the leading tensors; None where none is needed."""
        if all(g is None for g in grads):
            return [None] * len(needs)
        *inputs, output, logsumexp = ctx.saved_tensors
        grad_output = torch.zeros_like(output) if grads[0] is None else grads[0]
        absent = (None,) * (tensors - len(inputs))
        rest = (*inputs, *absent, output, logsumexp, *ctx.settings, _wanted(needs))
        found = _with_tangents(lambda *grads: run(*grads, *rest), (grad_output, *grads[1:]))
        return [g if need else None for g, need in zip(found, needs, strict=False)]

    def save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:tensors], *output)
        ctx.settings = inputs[tensors:]

    def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = derive(ctx, backward, ctx.needs_input_grad[:differentiable], *grads)
        return *found, *(None,) * (count - differentiable)

    torch.library.register_autograd(f"vicus::{name}", gradients, setup_context=save, lib=LIB)

    def save_backward(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
        ctx.save_for_backward(*inputs[: 2 + tensors])
        ctx.settings, ctx.wanted = inputs[4 + tensors : -1], inputs[-1]

    def gradients_of_gradients(ctx: Any, upstream: list[Tensor | None]) -> tuple[Tensor | None, ...]:
        grads, inputs = ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        rest = (*inputs[differentiable:], *ctx.settings[:-1])
        of_grads, of_inputs = _derivatives_of_gradients(
            lambda *x: composite(*x, *rest), inputs[:differentiable], grads, ctx.wanted, upstream
        )
        # Output and logsumexp are functions of the inputs, which get the whole derivative.
        # PyTorch takes an empty list for a list of tensors, and wants its gradients back as such.
        nothing = [None if not isinstance(x, (list, tuple)) or x else [] for x in ctx.settings]
        return *of_grads, *of_inputs, *(None,) * (tensors - differentiable + 2), *nothing, None

    torch.library.register_autograd(
        f"vicus::{name}_backward", gradients_of_gradients, setup_context=save_backward, lib=LIB
    )

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, settings: tuple, *given: Tensor | None) -> tuple[Tensor, Tensor]:
            results = without_autograd(forward, *given, *(None,) * (tensors - len(given)), *settings)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*given, *results)
            ctx.settings = settings
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            needs = ctx.needs_input_grad[1:]
            run = functools.partial(without_autograd, backward) if nothing_differentiates() else backward
            found = derive(ctx, run, needs[:differentiable], *grads)
            return None, *found, *(None,) * (len(needs) - len(found))

    return Eager


NeighborhoodFunction = _register_fused(
    "neighborhood", neighborhood, neighborhood_backward, _composite_neighborhood, 6, 6, 6
)
DenseFunction = _register_fused("dense", dense, dense_backward, _composite_dense, 5, 9, 7)


def _save_merge(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    outputs, logsumexps = inputs
    ctx.parts = len(outputs)
    ctx.save_for_backward(*outputs, *logsumexps)


def _merge_gradients(ctx: Any, grad_output: Tensor | None, grad_logsumexp: Tensor | None) -> tuple:
    outputs, logsumexps = ctx.saved_tensors[: ctx.parts], ctx.saved_tensors[ctx.parts :]
    if grad_output is None:
        grad_output = torch.zeros_like(outputs[0])
    grads = (grad_output, grad_logsumexp)
    found = _with_tangents(lambda *grads: merge_backward(outputs, logsumexps, *grads), grads)
    return found[: ctx.parts], found[ctx.parts :]


def _save_merge_backward(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    outputs, logsumexps, grad_output, grad_logsumexp = inputs
    ctx.parts = len(outputs)
    ctx.save_for_backward(*outputs, *logsumexps, grad_output, grad_logsumexp)


def _merge_gradients_of_gradients(ctx: Any, upstream: list[Tensor | None]) -> tuple:
    *parts, grad_output, grad_logsumexp = ctx.saved_tensors
    n = ctx.parts
    of_grads, of_parts = _derivatives_of_gradients(
        lambda *x: composite_merge(x[:n], x[n:]), parts, (grad_output, grad_logsumexp), (1 << 2 * n) - 1, upstream
    )
    return of_parts[:n], of_parts[n:], *of_grads


torch.library.register_autograd("vicus::merge", _merge_gradients, setup_context=_save_merge, lib=LIB)
torch.library.register_autograd(
    "vicus::merge_backward", _merge_gradients_of_gradients, setup_context=_save_merge_backward, lib=LIB
)
