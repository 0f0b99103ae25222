"""Masks as tables, from the oracle of tests/python, and attention under them."""

import itertools
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
from oracle import axis_keys, band_keys

__all__ = ["axis_keys", "band_keys", "expected", "rpb_table", "table", "windows_table"]


def table(rows, keys):
    """Bool [queries, keys] of lists of seen keys."""
    seen = torch.zeros(len(rows), keys, dtype=torch.bool)
    for row, columns in zip(seen, rows, strict=True):
        row[columns] = True
    return seen


def expected(query, key, value, seen, scale, additional=None, bias=None):
    """Float64 attention of flattened tokens [B, S, H, D] under a bool mask [B or 1, H or 1, Sq, Sk]."""
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * scale
    if bias is not None:
        scores = scores + bias.double()
    scores = scores.masked_fill(~seen, -math.inf)
    if additional is not None:
        more_k, more_v = (x.double().transpose(1, 2) for x in additional)
        scores = torch.cat([scores, q @ more_k.repeat_interleave(group, 1).mT * scale], -1)
        v = torch.cat([v, more_v], 2)
    logsumexp = scores.logsumexp(-1)
    weights = torch.nan_to_num(torch.exp(scores - logsumexp[..., None]))
    return (weights @ v.repeat_interleave(group, 1)).transpose(1, 2), logsumexp.transpose(1, 2)


def windows_table(layout, kernel_size, stride, dilation, is_causal):
    seen = torch.ones(1, 1, dtype=torch.bool)
    for n, *axis in zip(layout, kernel_size, stride, dilation, is_causal, strict=True):
        seen = torch.kron(seen, table(axis_keys(n, *axis), n))
    return seen


def rpb_table(rpb, layout, dilation):
    """[H, S, S]: the bias of every pair, 0 where the table has none."""
    tokens = list(itertools.product(*map(range, layout)))
    bias = torch.zeros(rpb.shape[0], len(tokens), len(tokens), dtype=rpb.dtype)
    for (i, q), (j, k) in itertools.product(enumerate(tokens), repeat=2):
        place = [(b - a) // d + (w - 1) // 2 for a, b, d, w in zip(q, k, dilation, rpb.shape[1:], strict=True)]
        if all(0 <= p < w for p, w in zip(place, rpb.shape[1:], strict=True)):
            bias[:, i, j] = rpb[(slice(None), *place)]
    return bias
