"""Calls made once, so that the next ones find everything compiled and loaded."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def warmup(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Gets the GPU kernels of a call ready: call this before the call is captured into a CUDA graph.

    A kernel is compiled for the problem at hand when a machine first needs it, which takes up to a second, and loaded
    when a process first needs it. Neither can happen during a capture: a call that would need it raises there. This
    makes the call once and drops its result; where that requires a gradient, its backward pass is made once, too, and
    no `.grad` is touched. Later calls with tensors of the same shapes, dtypes, device and alignment that require the
    same gradients compile and load nothing. Aligned is what starts at a multiple of 16 bytes, row by row.

    On the CPU there is nothing to compile; the call is made all the same.

    Args:
        function: What will be called: `vicus.na2d`, `vicus.attention`, a module, any function around them.
        *args: Its arguments, with tensors like those of the call that is meant. What they hold does not matter.
        **kwargs: Its keyword arguments.

    Raises:
        RuntimeError: The current stream is being captured already.
        Exception: What the call raises.

    Source:
        vicus.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("warmup is called while the stream is being captured; call it before the capture begins")
    results = [x for x in _tensors(function(*args, **kwargs)) if x.requires_grad]
    inputs = [x for x in _tensors([args, kwargs]) if x.requires_grad]
    if isinstance(function, torch.nn.Module):
        inputs += [x for x in function.parameters() if x.requires_grad]
    if results and inputs:
        torch.autograd.grad(results, inputs, [torch.zeros_like(x) for x in results], allow_unused=True)
