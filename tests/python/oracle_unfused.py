"""Oracle of the operators around the fused one: `qk` and `av` with the scores in memory, and the merge of partial
attentions. Same rules as oracle.py: loops over the definition, float64, nothing shared with the library."""

import itertools
import math

import numpy as np
from oracle import neighborhood_axes, rpb_index


def slot_keys(problem):
    """For every query (row-major) its slots: flat key indices in row-major order over the window, -1 where unused."""
    window = problem.mask.kernel_size
    axes = neighborhood_axes(problem)
    table = []
    for token in itertools.product(*(range(n) for n in problem.layout)):
        row = []
        for slot in itertools.product(*(range(w) for w in window)):
            flat = 0
            for a, n in enumerate(problem.layout):
                seen = axes[a][token[a]]
                if slot[a] >= len(seen):
                    flat = -1
                    break
                flat = flat * n + seen[slot[a]]
            row.append(flat)
        table.append(row)
    return np.asarray(table, dtype=np.int64).reshape(problem.queries, math.prod(window))


def heads_first(problem, tensors, arith):
    """Tensors with tokens flattened: [B, heads, tokens, features]."""
    flat = {}
    for name, x in tensors.items():
        x = np.asarray(x).astype(arith)
        if name != "rpb":
            x = x.reshape(x.shape[0], x.shape[1], -1, x.shape[-1])
        flat[name] = x
    return flat


def qk_forward(problem, tensors, arith=np.float64):
    t = heads_first(problem, tensors, arith)
    slots = slot_keys(problem)
    window, group = slots.shape[1], problem.heads // problem.heads_kv
    shape = (problem.batch, problem.heads, problem.queries, window + problem.additional_tokens)
    scores = np.full(shape, -np.inf, arith)
    with np.errstate(all="ignore"):
        for b, h, i in itertools.product(range(problem.batch), range(problem.heads), range(problem.queries)):
            used = np.flatnonzero(slots[i] >= 0)
            keys = slots[i][used]
            q = t["query"][b, h, i]
            scores[b, h, i, used] = t["key"][b, h // group][keys] @ q
            if problem.rpb:
                scores[b, h, i, used] += t["rpb"][h].reshape(-1)[rpb_index(problem, i, keys)]
            if problem.additional_tokens:
                scores[b, h, i, window:] = t["additional_keys"][b, h // group] @ q
    return scores.reshape(problem.batch, problem.heads, *problem.layout, -1)


def qk_backward(problem, tensors, grad_scores, arith=np.float64):
    t = heads_first(problem, tensors, arith)
    g = np.asarray(grad_scores).astype(arith).reshape(problem.batch, problem.heads, problem.queries, -1)
    slots = slot_keys(problem)
    window, group = slots.shape[1], problem.heads // problem.heads_kv
    grad = {name: np.zeros_like(x) for name, x in t.items()}
    if problem.rpb:
        grad["rpb"] = np.zeros(problem.shape("rpb"), arith)
    with np.errstate(all="ignore"):
        for b, h, i in itertools.product(range(problem.batch), range(problem.heads), range(problem.queries)):
            used = np.flatnonzero(slots[i] >= 0)
            keys, q, kv = slots[i][used], t["query"][b, h, i], h // group
            grad["query"][b, h, i] = g[b, h, i, used] @ t["key"][b, kv][keys]
            grad["key"][b, kv][keys] += np.outer(g[b, h, i, used], q)
            if problem.rpb:
                grad["rpb"][h].reshape(-1)[rpb_index(problem, i, keys)] += g[b, h, i, used]
            if problem.additional_tokens:
                grad["query"][b, h, i] += g[b, h, i, window:] @ t["additional_keys"][b, kv]
                grad["additional_keys"][b, kv] += np.outer(g[b, h, i, window:], q)
    return {name: x if name == "rpb" else x.reshape(np.shape(tensors[name])) for name, x in grad.items()}


def av_forward(problem, tensors, arith=np.float64):
    t = heads_first(problem, tensors, arith)
    slots = slot_keys(problem)
    window, group = slots.shape[1], problem.heads // problem.heads_kv
    output = np.zeros((problem.batch, problem.heads, problem.queries, problem.head_dim_v), arith)
    with np.errstate(all="ignore"):
        for b, h, i in itertools.product(range(problem.batch), range(problem.heads), range(problem.queries)):
            used = np.flatnonzero(slots[i] >= 0)
            output[b, h, i] = t["scores"][b, h, i, used] @ t["value"][b, h // group][slots[i][used]]
            if problem.additional_tokens:
                output[b, h, i] += t["scores"][b, h, i, window:] @ t["additional_values"][b, h // group]
    return output.reshape(problem.batch, problem.heads, *problem.layout, problem.head_dim_v)


def av_backward(problem, tensors, grad_output, arith=np.float64):
    t = heads_first(problem, tensors, arith)
    g = np.asarray(grad_output).astype(arith).reshape(problem.batch, problem.heads, problem.queries, -1)
    slots = slot_keys(problem)
    window, group = slots.shape[1], problem.heads // problem.heads_kv
    grad = {name: np.zeros_like(x) for name, x in t.items()}
    with np.errstate(all="ignore"):
        for b, h, i in itertools.product(range(problem.batch), range(problem.heads), range(problem.queries)):
            used = np.flatnonzero(slots[i] >= 0)
            keys, kv = slots[i][used], h // group
            grad["scores"][b, h, i, used] = t["value"][b, kv][keys] @ g[b, h, i]
            grad["value"][b, kv][keys] += np.outer(t["scores"][b, h, i, used], g[b, h, i])
            if problem.additional_tokens:
                grad["scores"][b, h, i, window:] = t["additional_values"][b, kv] @ g[b, h, i]
                grad["additional_values"][b, kv] += np.outer(t["scores"][b, h, i, window:], g[b, h, i])
    return {name: x.reshape(np.shape(tensors[name])) for name, x in grad.items()}


def merge_forward(outputs, logsumexps, arith=np.float64):
    """lse = log(sum exp(lse_i)), output = sum exp(lse_i - lse) * output_i; parts that saw no key are left out."""
    shape = np.shape(outputs[0])
    output, lse = np.zeros(shape, arith), np.full(shape[:-1], -np.inf, arith)
    with np.errstate(all="ignore"):
        for row in np.ndindex(shape[:-1]):
            parts = [i for i in range(len(outputs)) if logsumexps[i][row] != -np.inf]
            if not parts:
                continue
            each = np.asarray([logsumexps[i][row] for i in parts]).astype(arith)
            top = each.max()
            lse[row] = top + np.log(np.exp(each - top).sum())
            for i, part in zip(parts, each, strict=True):
                output[row] += np.exp(part - lse[row]) * np.asarray(outputs[i][row]).astype(arith)
    return output, lse


def merge_backward(outputs, logsumexps, grad_output, grad_lse=None, arith=np.float64):
    output, lse = merge_forward(outputs, logsumexps, arith)
    d_outputs = [np.zeros(np.shape(x), arith) for x in outputs]
    d_lses = [np.zeros(np.shape(x), arith) for x in logsumexps]
    with np.errstate(all="ignore"):
        for row in np.ndindex(lse.shape):
            do = np.asarray(grad_output[row]).astype(arith)
            dl = arith(0) if grad_lse is None else arith(grad_lse[row])
            for i in range(len(outputs)):
                if logsumexps[i][row] == -np.inf:
                    continue
                weight = np.exp(arith(logsumexps[i][row]) - lse[row])
                d_outputs[i][row] = weight * do
                d_lses[i][row] = weight * (do @ (np.asarray(outputs[i][row]).astype(arith) - output[row]) + dl)
    return d_outputs, d_lses
