"""The quick way from a call to an operator.

Host time of a small call is mostly Python. A call that asks for nothing special (no autocast, no transform, switches
and other arguments at their defaults) goes straight to an operator with few arguments, or where there are gradients to
the autograd function. Rules that the core knows are left to the core, which raises the same ValueError; the others are
looked up.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vicus import _ops, context

#: Token axes that a function takes (None for 1 to 3), and whether NATTEN's stricter rules hold.
Rule = tuple[int | None, bool]

# Masks that kept the rules, by the arguments and the shape they kept them with. Equal keys need not be legal (3.0 == 3,
# True == 1), so the very objects must come back; ints and tuples that come from a literal or a module do.
_seen: dict[tuple, tuple] = {}
_MOST_SEEN = 1024

_USUAL_FLAGS = (False, True, 0)  # `context.backward_flags`, where `options` of an operator may stay empty


@functools.cache
def _gpu_head_dim(device: int, dtype: torch.dtype) -> int:
    from vicus import backends  # late: it brings FlexAttention along

    return backends.gpu_head_dim(torch.device("cuda", device), dtype)


def _is_plain(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_any_autocast_enabled()
    ):
        return False
    if query.is_cpu:
        return key.is_cpu and value.is_cpu
    if not (query.is_cuda and key.is_cuda and value.is_cuda):
        return False
    device = query.get_device()
    if not device == key.get_device() == value.get_device():
        return False
    try:
        return max(query.shape[-1], value.shape[-1]) <= _gpu_head_dim(device, query.dtype)
    except (IndexError, RuntimeError):  # no last dimension; a nested tensor
        return False


def _differentiated(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)


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
) -> Tensor | None:
    """Neighborhood attention of a call that asks for nothing else, if it needs no further look.

    Returns:
        The output, or None: take the long way.
    """
    if not _is_plain(query, key, value):
        return None
    try:
        seen = _seen.get((rule, kernel_size, stride, dilation, is_causal, query.shape))
    except (TypeError, RuntimeError):  # a list; symbolic sizes; a nested tensor
        return None
    if seen is None:
        return None
    windows, steps, gaps, causal, mask, lists, usual_scale = seen
    if windows is not kernel_size or steps is not stride or gaps is not dilation or causal is not is_causal:
        return None
    if scale is None:
        scale = usual_scale
    if type(scale) is not float:
        return None
    if not _differentiated(query, key, value):
        return _ops.neighborhood_inference(query, key, value, mask, scale)
    if context.backward_flags() != _USUAL_FLAGS:
        return None
    return _ops.NeighborhoodFunction.apply((*lists, scale, ()), query, key, value)[0]


def remember(rule: Rule, query: Tensor, given: tuple[Any, Any, Any, Any], lists: list[list[int]]) -> None:
    """Notes that a mask kept the rules.

    Args:
        rule: Of the function that was called.
        query: Of the call.
        given: Kernel size, stride, dilation and causality as they were given.
        lists: The same, one list each.
    """
    if len(_seen) >= _MOST_SEEN:
        _seen.clear()
    try:
        flat = [n for values in lists for n in values]
        _seen[(rule, *given, query.shape)] = (*given, flat, lists, query.shape[-1] ** -0.5)
    except TypeError:  # a list or a symbolic size
        return


def dense(query: Tensor, key: Tensor, value: Tensor, is_causal: Any, scale: float | None) -> Tensor | None:
    """Dense attention of a call that asks for nothing else, if it needs no further look.

    Returns:
        The output, or None: take the long way.
    """
    if not _is_plain(query, key, value) or query.is_nested or query.dim() != 4:
        return None
    if is_causal is not False and is_causal is not True:
        return None
    if scale is None and query.shape[-1] > 0:
        scale = query.shape[-1] ** -0.5
    if type(scale) is not float:
        return None
    if not _differentiated(query, key, value):
        return _ops.dense_inference(query, key, value, int(is_causal), -1, -1, scale)
    if context.backward_flags() != _USUAL_FLAGS:
        return None
    return _ops.DenseFunction.apply((0, 0, int(is_causal), -1, -1, scale, ()), query, key, value)[0]
