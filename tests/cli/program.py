"""The program `vicus` as the tests call it, and attention by numpy to compare its files with."""

import itertools
import os
import subprocess

import numpy as np

VICUS = os.environ["VICUS_CLI"]
NONE = "none"


def run(*arguments, cwd=None):
    return subprocess.run([VICUS, *map(str, arguments)], capture_output=True, text=True, timeout=300, cwd=cwd)


def succeed(*arguments, cwd=None):
    """Runs the program, which must succeed and say nothing on standard error; returns its standard output."""
    done = run(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def fail(*arguments, naming, code=2, cwd=None):
    """Runs the program, which must fail with one line on standard error that holds `naming`; returns the line."""
    done = run(*arguments, cwd=cwd)
    assert done.returncode == code, (done.returncode, done.stderr)
    assert done.stdout == ""
    assert done.stderr.endswith("\n")
    assert done.stderr.count("\n") == 1, done.stderr
    assert naming in done.stderr, done.stderr
    return done.stderr


def window(token, length, kernel, stride=1, dilation=1, causal=False):
    """Keys of one axis that `token` sees, straight from the written definition."""
    residue, position = token % dilation, token // dilation
    tokens = list(range(residue, length, dilation))
    size = len(tokens)
    if causal:
        leader = min((position // stride) * stride + stride - 1, size - 1)
        begin, end = max(leader - kernel + 1, 0), position + 1
    else:
        leader = min((position // stride) * stride + stride // 2, size - 1)
        kernel = min(kernel, size)
        begin = min(max(leader - kernel // 2 if kernel < size else 0, 0), size - kernel)
        end = begin + kernel
    return tokens[begin:end]


def neighborhood_mask(layout, kernel, stride=None, dilation=None, causal=None):
    """[queries, keys], True where seen."""
    rank = len(layout)
    stride, dilation, causal = stride or [1] * rank, dilation or [1] * rank, causal or [False] * rank
    count = int(np.prod(layout))
    mask = np.zeros((count, count), bool)
    for query in itertools.product(*map(range, layout)):
        axes = [window(query[a], layout[a], kernel[a], stride[a], dilation[a], causal[a]) for a in range(rank)]
        for key in itertools.product(*axes):
            mask[np.ravel_multi_index(query, layout), np.ravel_multi_index(key, layout)] = True
    return mask


def dense_mask(queries, keys, causal=NONE, left=-1, right=-1):
    i, j = np.arange(queries)[:, None], np.arange(keys)[None, :]
    offset = 0 if causal == "top-left" else keys - queries
    mask = np.ones((queries, keys), bool)
    if causal != NONE:
        mask &= j <= i + offset
    if left >= 0:
        mask &= j >= i + offset - left
    if right >= 0:
        mask &= j <= i + offset + right
    return mask


def attention(query, key, value, mask, scale=None, bias=None, extra_keys=None, extra_values=None):
    """Output and logsumexp in float64. `mask` [Sq, Sk] or [B, 1, Sq, Sk]; `bias` is added to the logits."""
    q, k, v = (np.asarray(x, np.float64).reshape(x.shape[0], -1, *x.shape[-2:]) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if extra_keys is not None:
        k = np.concatenate([k, np.asarray(extra_keys, np.float64)], 1)
        v = np.concatenate([v, np.asarray(extra_values, np.float64)], 1)
    repeat = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, repeat, 2), np.repeat(v, repeat, 2)
    mask = np.broadcast_to(mask, (*mask.shape[:-2], mask.shape[-2], mask.shape[-1]))
    seen = np.ones((*mask.shape[:-1], k.shape[1]), bool)
    seen[..., : mask.shape[-1]] = mask
    logits = scale * np.einsum("bihd,bjhd->bhij", q, k)
    if bias is not None:
        logits[..., : bias.shape[-1]] += bias
    logits = np.where(seen, logits, -np.inf)
    peak = logits.max(-1, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    weight = np.exp(logits - peak)
    total = weight.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + peak)[..., 0].transpose(0, 2, 1)
    output = np.einsum("bhij,bjhe->bihe", weight / np.where(total > 0, total, 1.0), v)
    return output.reshape(*query.shape[:-1], v.shape[-1]), lse.reshape(query.shape[:-1])
