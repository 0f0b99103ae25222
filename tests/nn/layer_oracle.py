"""What an attention layer is to compute, sequence by sequence in float64, written from its documentation and sharing no
code with it. Masks are made by loops over single pairs."""

import math

import torch


def sees(i, j, queries, keys, causal, window, bottom_right):
    """Whether query i of a sequence sees key j of it."""
    place = i + (keys - queries if bottom_right else 0)
    if causal and j > place:
        return False
    left, right = window
    return (left < 0 or j >= place - left) and (right < 0 or j <= place + right)


def pairs(queries, keys, causal, window, bottom_right):
    """Bool [queries, keys]."""
    rows = [[sees(i, j, queries, keys, causal, window, bottom_right) for j in range(keys)] for i in range(queries)]
    return torch.tensor(rows, dtype=torch.bool).reshape(queries, keys)


def slopes(heads):
    """Of ALiBi, as its authors give them."""

    def of_power(n):
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(heads).is_integer():
        return of_power(heads)
    closest = 2 ** math.floor(math.log2(heads))
    return of_power(closest) + slopes(2 * closest)[0::2][: heads - closest]


def attend(
    query, key, value, *, scale, seen, softcap=0.0, pre_bias=None, bias=None, alibi=None, bottom_right=True, sink=None
):
    """One sequence: query [Sq, H, D], key [Sk, Hkv, D], value [Sk, Hkv, Dv], `seen` bool [Sq, Sk] or [H, Sq, Sk];
    biases [H, Sq, Sk]; slopes [H]; sink [H]. Output [Sq, H, Dv] and the largest score of each head."""
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    queries, keys = query.shape[0], key.shape[0]
    outputs, largest = [], []
    for h in range(heads):
        scores = query[:, h] @ key[:, h // group].T
        if pre_bias is not None:
            scores = scores + pre_bias[h]
        scores = scores * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[h]
        if alibi is not None:
            i, j = torch.arange(queries)[:, None], torch.arange(keys)[None]
            scores = scores - alibi[h] * (i + (keys - queries if bottom_right else 0) - j).abs()
        rows = []
        visible = seen if seen.dim() == 2 else seen[h]
        for i in range(queries):
            columns = visible[i].nonzero()[:, 0]
            row = scores[i, columns]
            if len(columns) == 0:
                rows.append(value.new_zeros(value.shape[-1]) + 0 * query[i, h].sum())
                continue
            whole = row if sink is None else torch.cat([row, sink[h : h + 1]])
            weights = torch.exp(row - whole.logsumexp(0))
            rows.append(weights @ value[columns, h // group])
        outputs.append(torch.stack(rows) if rows else value.new_zeros(0, value.shape[-1]) + 0 * query.sum())
        shown = scores[visible]
        largest.append(shown.max().item() if len(shown) else -math.inf)
    return torch.stack(outputs, 1), torch.tensor(largest, dtype=torch.float64)
