"""From the arguments of a call to an operator: checks, autocast, the backend, and which derivatives are asked for."""

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vicus import _arguments, _arguments_dense, _ops, _quick, context
from vicus._quick import Rule

logger = logging.getLogger("vicus")

Result = Tensor | tuple[Tensor, Tensor]
MaybeTensors = tuple[Tensor | None, ...]


def _requires_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _composition(*tensors: Tensor | None) -> str | None:
    """Why these tensors need operators that PyTorch differentiates, or None when the fused ones serve."""
    if torch._C._are_functorch_transforms_active():
        return "transforms of torch.func"
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return None
    dual = any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    return "forward-mode derivatives" if dual else None


def call(op: Any, function: type[torch.autograd.Function], tensors: MaybeTensors, *settings: Any) -> Any:
    """Calls an operator the shortest way that gives the derivatives that are asked for.

    Args:
        op: The operator.
        function: The same for eager calls that are differentiated (`_ops`).
        tensors: Leading arguments.
        settings: The others.
    """
    if torch.compiler.is_compiling():
        return op(*tensors, *settings)
    if _requires_grad(*tensors):
        return function.apply(settings, *tensors)
    return _ops.without_autograd(op, *tensors, *settings)


def _without_autocast(kind: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a composition of operators on tensors that autocast has been through."""
    if not _arguments.autocasting(kind):
        return function(*args, **kwargs)
    with torch.autocast(kind, enabled=False):
        return function(*args, **kwargs)


def _cast(tensors: MaybeTensors) -> MaybeTensors:
    """`tensors` as the autocast region of the first one's device wants them."""
    kind = tensors[0].device.type
    return _arguments.autocast(kind, *tensors) if _arguments.autocasting(kind) else tensors


def _engine(backend: str | None, query: Tensor, dense: bool, torch_compile: bool, gpu: Callable[[], bool]) -> str:
    """ "auto", "cpu", "reference", "sm80" or "flex". `gpu`: whether the GPU engine takes the call."""
    if backend is None and (query.is_cpu or query.is_meta):
        return "auto"
    from vicus import backends

    return backends.resolve(backend, query, dense=dense, torch_compile=torch_compile, gpu=query.is_cuda and gpu())


def _gpu_takes(query: Tensor, value: Tensor) -> bool:
    from vicus import backends

    return backends.gpu_takes(query, value)


def _options(
    engine: str, rank: int, deterministic: bool | None, splits: Any, tiles: tuple[Any, Any, Any, Any], what: str
) -> tuple[int, ...]:
    """The operators' options. `tiles` are queries and keys of the forward pass, then of the backward pass."""
    names = (f"q_tile_{what}", f"kv_tile_{what}", f"backward_q_tile_{what}", f"backward_kv_tile_{what}")
    q_tile, kv_tile, backward_q_tile, _ = (
        _arguments.extents(name, tile, rank) for name, tile in zip(names, tiles, strict=True)
    )
    switched, kv_parallelism, memory = context.backward_flags()
    deterministic = switched if deterministic is None else deterministic
    return _arguments.pack_options(
        "auto" if engine in ("flex", "sm80") else engine,  # the device decides; flex takes no options
        deterministic,
        kv_parallelism and not deterministic,
        memory,
        _arguments.extents("backward_kv_splits", splits, rank),
        q_tile,
        backward_q_tile,
        kv_tile,
    )


def _composite(name: str, why: str, query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    from vicus import composite

    logger.debug("%s: composed of differentiable operators, because of %s", name, why)
    return _without_autocast(query.device.type, getattr(composite, name), query, *args)


def _check_attention_kwargs(kwargs: Mapping[str, Any] | None, query: Tensor) -> None:
    """NATTEN's arguments of the attention to the additional tokens: no other attention is needed here, so they have no
    effect, but a wrong name or backend is an error all the same."""
    if kwargs is None:
        return
    from vicus.functional import attention

    decided = {"query", "key", "value", "is_causal", "scale", "return_lse"}
    allowed = inspect.signature(attention).parameters.keys() - decided
    for name in kwargs:
        if name not in allowed:
            raise TypeError(f"attention_kwargs has {name!r}; allowed: {', '.join(sorted(allowed))}")
    _engine(kwargs.get("backend"), query, True, kwargs.get("torch_compile", False), lambda: True)


def neighborhood(
    rule: Rule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Any,
    stride: Any,
    dilation: Any,
    is_causal: Any,
    scale: float | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    attention_kwargs: Mapping[str, Any] | None,
    backend: str | None,
    q_tile_shape: Any,
    kv_tile_shape: Any,
    backward_q_tile_shape: Any,
    backward_kv_tile_shape: Any,
    backward_kv_splits: Any,
    kernel_schedule: Any,
    torch_compile: bool,
    return_lse: bool,
    rpb: Tensor | None,
    deterministic: bool | None,
) -> Result:
    """Neighborhood attention; `vicus.functional.neighborhood_attention` says what the arguments are."""
    _arguments.check_strided("query", query)
    query, key, value, additional_keys, additional_values = tensors = _cast(
        (query, key, value, additional_keys, additional_values)
    )
    _arguments.check_tensors(query, key, value)
    rank, strict = rule
    axes = query.dim() - 3
    if rank is not None and axes != rank:
        raise _arguments.wrong("query.shape", tuple(query.shape), f"{rank + 3} dimensions, {rank} of them token axes")
    _arguments.check_additional(query, key, value, additional_keys, additional_values)
    _arguments.check_kernel_schedule(kernel_schedule)
    mask = _arguments.per_axis(axes, kernel_size, stride, dilation, is_causal, strict=strict)
    if strict:
        _arguments.check_fits(query.shape[1:-2], mask[0], mask[2])
    if rpb is not None:
        _arguments.check_rpb(query, rpb, mask[0])
        tensors = (*tensors, rpb)
    else:
        tensors = (*tensors, None)
    _check_attention_kwargs(attention_kwargs, query)
    scale = _arguments.scale_of(scale, query.shape[-1])
    engine = _engine(backend, query, False, torch_compile, lambda: _gpu_takes(query, value))
    tiles = (q_tile_shape, kv_tile_shape, backward_q_tile_shape, backward_kv_tile_shape)
    options = _options(engine, axes, deterministic, backward_kv_splits, tiles, "shape")

    if engine == "flex":
        from vicus import flex

        result = _without_autocast(
            query.device.type,
            flex.neighborhood,
            *(query, key, value, *mask, scale),
            additional_keys=additional_keys,
            additional_values=additional_values,
            rpb=rpb,
            q_tile_shape=q_tile_shape,
            kv_tile_shape=kv_tile_shape,
            torch_compile=torch_compile,
        )
    elif why := _composition(*tensors):
        result = _composite("neighborhood", why, *tensors, *mask, scale)
    else:
        lists = [[int(n) for n in values] for values in mask]
        usual = not (return_lse or options or tensors[3] is not None or rpb is not None)
        if usual and not torch.compiler.is_compiling():
            _quick.remember(rule, query, (kernel_size, stride, dilation, is_causal), lists)
        if usual and not _requires_grad(*tensors):
            return _ops.neighborhood_inference(query, key, value, [n for values in lists for n in values], scale)
        result = call(_ops.neighborhood, _ops.NeighborhoodFunction, tensors, *lists, scale, options)
    return result if return_lse else result[0]


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seqlens: tuple[Tensor | None, Tensor | None],
    cumulative: tuple[Tensor | None, Tensor | None],
    longest: tuple[int | None, int | None],
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Cumulative lengths of packed sequences and the longest of them, checked; None and 0 where nothing is packed."""
    if any(x is not None for x in seqlens):
        from vicus import varlen

        return varlen.generate_varlen_parameters(query, key, value, *seqlens)
    if all(x is None for x in cumulative) and not any(longest):
        return None, None, 0, 0
    _arguments_dense.check_packed(query, key, cumulative, longest)
    return *cumulative, *longest


def _for_gpu(lengths: Tensor | None) -> Tensor | None:
    """A list of lengths as the kernels of engine "sm80" read it."""
    return None if lengths is None else lengths.to(torch.int32).contiguous()


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float | None,
    seqlens: tuple[Tensor | None, Tensor | None],
    cumulative: tuple[Tensor | None, Tensor | None],
    longest: tuple[int | None, int | None],
    backend: str | None,
    q_tile_size: int | None,
    kv_tile_size: int | None,
    backward_q_tile_size: int | None,
    backward_kv_tile_size: int | None,
    backward_kv_splits: int | None,
    kernel_schedule: Any,
    torch_compile: bool,
    return_lse: bool,
    causal_alignment: str,
    window_size: tuple[int, int] | None,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    deterministic: bool | None,
) -> Result:
    """Dense attention; `vicus.functional.attention` says what the arguments are."""
    _arguments.check_strided("query", query)
    query, key, value, additional_keys, additional_values = tensors = _cast(
        (query, key, value, additional_keys, additional_values)
    )
    _arguments.check_tensors(query, key, value, dense=True)
    _arguments.check_additional(query, key, value, additional_keys, additional_values)
    cumulative_q, cumulative_kv, *longest = _packed(query, key, value, seqlens, cumulative, longest)
    _arguments_dense.check_key_lengths(query, key_lengths)
    if cumulative_q is not None and (key_lengths is not None or attn_mask is not None):
        raise _arguments.wrong("key_lengths or attn_mask", "given", "None with packed sequences")
    bias = _arguments_dense.attention_bias(query, key, attn_mask)
    _arguments.check_kernel_schedule(kernel_schedule)
    band = _arguments_dense.band(is_causal, causal_alignment, window_size)
    scale = _arguments.scale_of(scale, query.shape[-1])
    engine = _engine(backend, query, True, torch_compile, lambda: _gpu_takes(query, value))
    tiles = (q_tile_size, kv_tile_size, backward_q_tile_size, backward_kv_tile_size)
    options = _options(engine, 1, deterministic, backward_kv_splits, tiles, "size")
    if engine == "sm80":
        key_lengths, cumulative_q, cumulative_kv = map(_for_gpu, (key_lengths, cumulative_q, cumulative_kv))
    lists = (bias, key_lengths, cumulative_q, cumulative_kv)

    if engine == "flex":
        from vicus import flex

        result = _without_autocast(
            query.device.type,
            flex.dense,
            *(query, key, value),
            scale=scale,
            additional_keys=additional_keys,
            additional_values=additional_values,
            attn_bias=bias,
            key_lengths=key_lengths,
            cumulative_seqlen_q=cumulative_q,
            cumulative_seqlen_kv=cumulative_kv,
            causal=band[0],
            window_left=band[1],
            window_right=band[2],
            q_tile_size=q_tile_size,
            kv_tile_size=kv_tile_size,
            torch_compile=torch_compile,
        )
    elif why := "the gradient of attn_mask" if _requires_grad(bias) else _composition(*tensors, bias):
        result = _composite("dense", why, *tensors, *lists, *band, scale)
    elif return_lse or options or _requires_grad(*tensors) or any(x is not None for x in (*tensors[3:], *lists)):
        result = call(_ops.dense, _ops.DenseFunction, (*tensors, *lists), *longest, *band, scale, options)
    else:
        return _ops.dense_inference(query, key, value, *band, scale)
    return result if return_lse else result[0]


def merge(outputs: list[Tensor], logsumexps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Merging of checked parts."""
    if _composition(*outputs, *logsumexps):
        return _without_autocast(outputs[0].device.type, _ops.composite_merge, outputs, logsumexps)
    if _requires_grad(*outputs, *logsumexps):
        return _ops.merge(outputs, logsumexps)
    return _ops.without_autograd(_ops.merge, outputs, logsumexps)
