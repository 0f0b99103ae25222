"""What the unfused operators and merge mean, in PyTorch's plain operators, differentiable: windows are enumerated from
the written definition, and nothing is shared with the library. And when a result is right."""

import itertools

import torch
from gpu_compare import compare
from oracle import axis_keys

# Rounding in units of the storage type, of the largest value of a result: beside what PyTorch's own arithmetic loses.
UNITS = {torch.float64: 4096, torch.float32: 64, torch.bfloat16: 2, torch.float16: 2}


def slots(layout, mask, device):
    """For every query its slots: flat key indices in row-major order over the window, -1 where unused."""
    axes = [axis_keys(n, *axis) for n, *axis in zip(layout, *mask, strict=True)]
    extents = [range(w) for w in mask[0]]
    rows = []
    for token in itertools.product(*map(range, layout)):
        row = []
        for slot in itertools.product(*extents):
            flat = 0
            for n, keys, t, s in zip(layout, axes, token, slot, strict=True):
                flat = flat * n + keys[t][s] if flat >= 0 and s < len(keys[t]) else -1
            row.append(flat)
        rows.append(row)
    return torch.tensor(rows, device=device)


def scores(query, key, index, additional=None, bias=None, unused=-torch.inf, dtype=torch.float64):
    """`qk` of flattened tokens [B, H, S, D]: [B, H, S, slots]. `bias` [H, S, slots] of the window."""
    q, k = query.to(dtype), key.to(dtype)
    group = q.shape[1] // k.shape[1]
    gathered = k.repeat_interleave(group, 1)[:, :, index.clamp(min=0)]
    result = (q[:, :, :, None] * gathered).sum(-1)
    if bias is not None:
        result = result + bias.to(dtype)
    result = result.masked_fill(index < 0, unused)
    if additional is not None:
        result = torch.cat([result, q @ additional.to(dtype).repeat_interleave(group, 1).mT], -1)
    return result


def average(weights, value, index, additional=None, dtype=torch.float64):
    """`av` of flattened tokens: weights [B, H, S, slots], value [B, Hkv, S, D]."""
    w, v = weights.to(dtype), value.to(dtype)
    group, n = w.shape[1] // v.shape[1], index.shape[-1]
    of_window = w[..., :n].masked_fill(index < 0, 0)
    gathered = v.repeat_interleave(group, 1)[:, :, index.clamp(min=0)]
    result = (of_window[..., None] * gathered).sum(-2)
    if additional is not None:
        result = result + w[..., n:] @ additional.to(dtype).repeat_interleave(group, 1)
    return result


def merged(outputs, logsumexps, dtype=torch.float64):
    """Output and logsumexp of parts, differentiable; a part of -inf counts for nothing, whatever it holds."""
    lse = torch.stack([x.to(dtype) for x in logsumexps])
    seen = lse > -torch.inf
    live = seen.any(0)
    top = lse.amax(0).detach().masked_fill(~live, 0)
    weights = torch.exp(lse.masked_fill(~seen, -torch.inf) - top)
    safe = torch.where(live, weights.sum(0), 1)
    parts = torch.stack([x.to(dtype) for x in outputs]).masked_fill(~seen[..., None], 0)
    return ((weights / safe)[..., None] * parts).sum(0), torch.where(live, safe.log() + top, -torch.inf)


def assert_close(name, got, reference, plain):
    """`plain` is the reference once more, at the precision of `got`."""
    wanted = reference.detach().double().reshape(got.shape)
    sizes = wanted[wanted.isfinite()].abs()
    largest = max(1.0, float(sizes.max())) if sizes.numel() else 1.0
    noise = UNITS[got.dtype] * torch.finfo(got.dtype).eps * largest
    compare(name, got.detach(), wanted, plain.detach().reshape(got.shape), noise)
