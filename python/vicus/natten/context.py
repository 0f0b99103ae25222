"""`natten.context`: of 0.21, and the switches and questions of 0.17 that have a meaning here."""

import torch

from vicus import context as _context
from vicus.context import *  # noqa: F403

__all__ = [*_context.__all__, "has_bfloat", "has_cuda", "has_fna", "has_fused_na", "has_half"]


def has_cuda() -> bool:
    """Whether PyTorch sees a CUDA device. (CPU tensors are served either way.)"""
    return torch.cuda.is_available()


def has_half(device_index: int | None = None) -> bool:
    """Whether float16 is supported: everywhere. The device is not asked."""
    return True


def has_bfloat(device_index: int | None = None) -> bool:
    """Whether bfloat16 is supported: everywhere. The device is not asked."""
    return True


def has_fused_na(device_index: int | None = None) -> bool:
    """Whether fused neighborhood attention is supported: everywhere. The device is not asked."""
    return True


has_fna = has_fused_na
