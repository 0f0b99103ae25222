"""Schemas of the unfused operators and the shapes of their results under tracing. Kernels: src/torch/bind.cc."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vicus._library import LIB
from vicus._ops import _gradients as gradients

Ints = Sequence[int]
Mask = tuple[Ints, Ints, Ints, Ints]  # kernel_size, stride, dilation, is_causal

_MASK = "int[] kernel_size, int[] stride, int[] dilation, int[] is_causal"
LIB.define(f"qk(Tensor query, Tensor key, Tensor? additional_keys, Tensor? rpb, {_MASK}) -> Tensor")
LIB.define(
    "qk_backward(Tensor query, Tensor key, Tensor? additional_keys, Tensor? rpb, Tensor grad_scores, "
    f"{_MASK}, int wanted) -> Tensor[]"
)
LIB.define(f"av(Tensor scores, Tensor value, Tensor? additional_values, {_MASK}) -> Tensor")
LIB.define(
    "av_backward(Tensor scores, Tensor value, Tensor? additional_values, Tensor grad_output, "
    f"{_MASK}, int wanted) -> Tensor[]"
)

QK = torch.ops.vicus.qk.default
QK_BACKWARD = torch.ops.vicus.qk_backward.default
AV = torch.ops.vicus.av.default
AV_BACKWARD = torch.ops.vicus.av_backward.default


# --- Shapes under tracing --------------------------------------------------------------------------------------------


def tokens(extra: Tensor | None) -> int:
    return 0 if extra is None else extra.shape[2]


def scores_shape(query: Tensor, extra: Tensor | None, kernel_size: Ints) -> list[int]:
    return [*query.shape[:-1], math.prod(kernel_size) + tokens(extra)]


@torch.library.register_fake("vicus::qk", lib=LIB)
def _(query, key, additional_keys, rpb, kernel_size, stride, dilation, is_causal):
    return query.new_empty(scores_shape(query, additional_keys, kernel_size))


@torch.library.register_fake("vicus::qk_backward", lib=LIB)
def _(query, key, additional_keys, rpb, grad_scores, kernel_size, stride, dilation, is_causal, wanted):
    return gradients(wanted, (query, key, additional_keys, rpb))


@torch.library.register_fake("vicus::av", lib=LIB)
def _(scores, value, additional_values, kernel_size, stride, dilation, is_causal):
    return scores.new_empty([*scores.shape[:-1], value.shape[-1]])


@torch.library.register_fake("vicus::av_backward", lib=LIB)
def _(scores, value, additional_values, grad_output, kernel_size, stride, dilation, is_causal, wanted):
    return gradients(wanted, (scores, value, additional_values))
