"""Tensors and layers to try, and PyTorch's own attention to compare with."""

import torch
import torch.nn.functional as F

from vicus.nn import DotProductAttention

BACKENDS = ("flash", "unfused")


def qkv(queries=9, keys=7, *, batch=2, heads=4, groups=2, dims=(8, 6), dtype=torch.float32, grad=False, seed=0):
    """Tensors in the format bshd."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(queries, heads, dims[0]), (keys, groups, dims[0]), (keys, groups, dims[1])]
    return [torch.randn(batch, *shape, dtype=dtype, generator=generator).requires_grad_(grad) for shape in shapes]


def layer(heads=4, dims=(8, 6), groups=2, **options):
    return DotProductAttention(heads, dims, groups, **{"qkv_format": "bshd", "attn_mask_type": "no_mask"} | options)


def sdpa(q, k, v, mask=None, **options):
    """PyTorch's attention for tensors in the format bshd."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **options).transpose(1, 2).flatten(2)
