"""Attention in PyTorch's plain operators under an explicit mask, to compare with; and tensors to try it on."""

import torch


def qkv(layout, *, batch=2, heads=4, heads_kv=2, dim=8, dim_v=6, dtype=torch.float32, grad=False, seed=0):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    shapes = [(heads, dim), (heads_kv, dim), (heads_kv, dim_v)]
    return [
        torch.randn(batch, *layout, *shape, dtype=dtype, generator=generator).requires_grad_(grad) for shape in shapes
    ]


def seen_by(layout, kernel_size, stride, dilation, is_causal):
    """bool [tokens, tokens]: which key a query sees, token by token from the definition."""
    rank = len(layout)

    def axis(n, w, s, d, causal):
        seen = torch.zeros(n, n, dtype=torch.bool)
        for i in range(n):
            r, p = i % d, i // d
            length = -((r - n) // d)
            leader = min((p // s) * s + (s - 1 if causal else s // 2), length - 1)
            begin = max(leader - w + 1, 0) if causal else min(max(leader - w // 2, 0), max(length - w, 0))
            end = p + 1 if causal else min(begin + w, length)
            seen[i, [j * d + r for j in range(begin, end)]] = True
        return seen

    def spread(x):
        return (x,) * rank if isinstance(x, int) else x

    axes = zip(layout, *(spread(x) for x in (kernel_size, stride, dilation, is_causal)), strict=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    for one in axes:
        mask = torch.kron(mask.int(), axis(*one).int()).bool()
    return mask


def by_hand(query, key, value, mask, scale=None):
    """Attention [B, tokens, H, D] with a bool mask or a bias, in PyTorch's plain operators; output and logsumexp."""
    groups = query.shape[-2] // key.shape[-2]
    key, value = (x.repeat_interleave(groups, -2) for x in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    output = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)
    return output, scores.logsumexp(-1).transpose(1, 2)


def flat(x):
    return x.flatten(1, -3)
