"""A slow, plain oracle: what every operator means, written from the definition and sharing no code with the library.

Masks are enumerated by Python loops, one query at a time; everything after that is numpy over the keys a query sees, so
a key outside the mask is never touched (selected away, not multiplied by zero). Arithmetic is float64 unless a caller
asks for less: the tests also run this file in float32 to learn how large honest rounding errors are.
"""

import dataclasses
import itertools
import math

import numpy as np


@dataclasses.dataclass
class Neighborhood:
    """Windows, one entry per axis."""

    kernel_size: list
    stride: list
    dilation: list
    is_causal: list


@dataclasses.dataclass
class Dense:
    """`causal` is none, top_left or bottom_right; window bounds of -1 are no bounds; empty lists mean not given."""

    keys: int
    causal: str = "none"
    window_left: int = -1
    window_right: int = -1
    key_lengths: list = dataclasses.field(default_factory=list)
    cumulative_queries: list = dataclasses.field(default_factory=list)
    cumulative_keys: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Problem:
    layout: list
    heads: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    mask: Neighborhood | Dense
    dtype: str = "float32"
    batch: int = 1
    scale: float | None = None
    additional_tokens: int = 0
    rpb: bool = False
    attn_bias: bool = False

    @property
    def dense(self):
        return isinstance(self.mask, Dense)

    @property
    def queries(self):
        return math.prod(self.layout)

    @property
    def keys(self):
        return self.mask.keys if self.dense else self.queries

    @property
    def effective_scale(self):
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def shape(self, name):
        """Shape of the tensor `name`; a gradient has the shape of its tensor."""
        x_keys = [self.keys] if self.dense else list(self.layout)
        shapes = {
            "query": [self.batch, *self.layout, self.heads, self.head_dim],
            "key": [self.batch, *x_keys, self.heads_kv, self.head_dim],
            "value": [self.batch, *x_keys, self.heads_kv, self.head_dim_v],
            "output": [self.batch, *self.layout, self.heads, self.head_dim_v],
            "logsumexp": [self.batch, *self.layout, self.heads],
            "additional_keys": [self.batch, self.additional_tokens, self.heads_kv, self.head_dim],
            "additional_values": [self.batch, self.additional_tokens, self.heads_kv, self.head_dim_v],
        }
        if not self.dense:
            shapes["rpb"] = [self.heads, *(2 * w - 1 for w in self.mask.kernel_size)]
        return tuple(shapes[name])


# --- Masks -----------------------------------------------------------------------------------------------------------


def axis_keys(length, window, step, dilation, causal):
    """For every token of one axis, the tokens it sees, ascending."""
    seen = []
    for token in range(length):
        residue, position = token % dilation, token // dilation
        class_length = -((residue - length) // dilation)  # ceil((length - residue) / dilation)
        win = min(window, class_length)  # longer than the class: the whole class
        if causal:
            leader = min((position // step) * step + step - 1, class_length - 1)
            begin, end = max(leader - win + 1, 0), position + 1
        else:
            leader = min((position // step) * step + step // 2, class_length - 1)
            begin = min(max(leader - win // 2, 0), class_length - win)
            end = begin + win
        seen.append([p * dilation + residue for p in range(begin, end)])
    return seen


def band_keys(queries, keys, causal, left, right):
    """For every query of one dense sequence, the keys it sees, ascending."""
    offset = 0 if causal == "top_left" else keys - queries
    seen = []
    for i in range(queries):
        row = []
        for j in range(keys):
            if causal != "none" and j > i + offset:
                continue
            if left >= 0 and j < i + offset - left:
                continue
            if right >= 0 and j > i + offset + right:
                continue
            row.append(j)
        seen.append(row)
    return seen


def neighborhood_axes(problem):
    m = problem.mask
    return [
        axis_keys(n, m.kernel_size[a], m.stride[a], m.dilation[a], bool(m.is_causal[a]))
        for a, n in enumerate(problem.layout)
    ]


def visible_keys(problem, batch):
    """For every query of one batch entry (row-major), the flat indices of the keys its mask lets through."""
    m = problem.mask
    if not problem.dense:
        axes = neighborhood_axes(problem)
        # Horner's rule over the axes, the last one fastest; the product of ascending lists is row-major and ascending.
        seen = []
        for token in itertools.product(*(range(n) for n in problem.layout)):
            row = []
            for key in itertools.product(*(axes[a][t] for a, t in enumerate(token))):
                flat = 0
                for n, j in zip(problem.layout, key, strict=True):
                    flat = flat * n + j
                row.append(flat)
            seen.append(row)
        return seen
    if m.cumulative_queries:
        seen = []
        for s in range(len(m.cumulative_queries) - 1):
            first = m.cumulative_keys[s]
            rows = band_keys(
                m.cumulative_queries[s + 1] - m.cumulative_queries[s],
                m.cumulative_keys[s + 1] - first,
                m.causal,
                m.window_left,
                m.window_right,
            )
            seen += [[first + j for j in row] for row in rows]
        return seen
    keys = m.key_lengths[batch] if m.key_lengths else m.keys
    return band_keys(problem.queries, keys, m.causal, m.window_left, m.window_right)


def mask_pairs(problem):
    """(query, key) pairs over batch and heads, additional tokens included."""
    pairs = sum(len(row) for b in range(problem.batch) for row in visible_keys(problem, b))
    return problem.heads * (pairs + problem.batch * problem.queries * problem.additional_tokens)


def rpb_index(problem, query, keys):
    """Flat index into one head's bias for every key: (key - query) / dilation + window - 1 per axis."""
    m = problem.mask
    q = np.unravel_index(query, problem.layout)
    k = np.unravel_index(np.asarray(keys, dtype=np.int64), problem.layout)
    flat = np.zeros(len(keys), dtype=np.int64)
    for a in range(len(problem.layout)):
        difference = k[a] - q[a]
        assert np.all(difference % m.dilation[a] == 0)
        flat = flat * (2 * m.kernel_size[a] - 1) + difference // m.dilation[a] + m.kernel_size[a] - 1
    return flat


# --- One query -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """One query, a run of its heads, and the keys they see: K key heads, G query heads on each, n keys."""

    batch: int
    query: int
    heads: slice
    heads_kv: slice
    keys: np.ndarray  # flat indices, additional tokens not among them
    q: np.ndarray  # [K, G, D]
    k: np.ndarray  # [n, K, D], additional tokens last
    v: np.ndarray  # [n, K, Dv]
    bias: np.ndarray | None  # [K, G, n]
    rpb: np.ndarray | None  # flat indices of the window's keys

    def logits(self, scale):
        s = scale * (self.q @ self.k.transpose(1, 2, 0))
        return s if self.bias is None else s + self.bias


def rows(problem, tensors, arith):
    """Every query with the keys it sees. An additive bias may hide different keys from each head: one row per head."""
    group = problem.heads // problem.heads_kv
    t = {name: np.asarray(x).astype(arith) for name, x in tensors.items()}
    query = t["query"].reshape(problem.batch, problem.queries, problem.heads, problem.head_dim)
    key = t["key"].reshape(problem.batch, problem.keys, problem.heads_kv, problem.head_dim)
    value = t["value"].reshape(problem.batch, problem.keys, problem.heads_kv, problem.head_dim_v)
    extra = problem.additional_tokens
    if problem.attn_bias:
        runs = [(slice(h, h + 1), slice(h // group, h // group + 1)) for h in range(problem.heads)]
    else:
        runs = [(slice(0, problem.heads), slice(0, problem.heads_kv))]
    seen = None
    for b in range(problem.batch):
        if seen is None or (problem.dense and problem.mask.key_lengths):
            seen = visible_keys(problem, b)
        for i in range(problem.queries):
            for heads, heads_kv in runs:
                keys = np.asarray(seen[i], dtype=np.int64)
                bias = None
                if problem.attn_bias:
                    full = t["attn_bias"]
                    row = full[min(b, full.shape[0] - 1), min(heads.start, full.shape[1] - 1), i]
                    keys = keys[row[keys] != -np.inf]
                    bias = np.concatenate([row[keys], np.zeros(extra, arith)])[None, None, :]
                index = None
                if problem.rpb:
                    index = rpb_index(problem, i, keys)
                    table = t["rpb"].reshape(problem.heads, -1)[:, index]
                    table = np.concatenate([table, np.zeros((problem.heads, extra), arith)], axis=1)
                    bias = table.reshape(problem.heads_kv, group, -1)
                k, v = key[b, keys][:, heads_kv], value[b, keys][:, heads_kv]
                if extra:
                    k = np.concatenate([k, t["additional_keys"][b][:, heads_kv]])
                    v = np.concatenate([v, t["additional_values"][b][:, heads_kv]])
                q = query[b, i, heads].reshape(heads_kv.stop - heads_kv.start, -1, problem.head_dim)
                yield Row(b, i, heads, heads_kv, keys, q, k, v, bias, index)


def softmax(s):
    """Probabilities and logsumexp over the last axis, which is not empty."""
    top = s.max(axis=-1, keepdims=True)
    e = np.exp(s - top)
    total = e.sum(axis=-1, keepdims=True)
    return e / total, (top + np.log(total))[..., 0]


# --- The operators ---------------------------------------------------------------------------------------------------


def forward(problem, tensors, arith=np.float64):
    """Output and logsumexp in `arith`."""
    output = np.zeros((problem.batch, problem.queries, problem.heads, problem.head_dim_v), arith)
    lse = np.full((problem.batch, problem.queries, problem.heads), -np.inf, arith)
    with np.errstate(all="ignore"):
        for row in rows(problem, tensors, arith):
            if len(row.k) == 0:
                continue
            p, row_lse = softmax(row.logits(arith(problem.effective_scale)))
            output[row.batch, row.query, row.heads] = (p @ row.v.transpose(1, 0, 2)).reshape(-1, problem.head_dim_v)
            lse[row.batch, row.query, row.heads] = row_lse.reshape(-1)
    return output.reshape(problem.shape("output")), lse.reshape(problem.shape("logsumexp"))


def backward(problem, tensors, grad_output, grad_lse=None, arith=np.float64, saved=None):
    """Gradients of all inputs by name.

    Without `saved`, everything follows from the inputs. With `saved` = (output, logsumexp), rounded as a caller stores
    them, probabilities and the row sums come from those, as in every flash backward: the honest low-precision peer.
    """
    names = ["query", "key", "value"]
    names += ["additional_keys", "additional_values"] if problem.additional_tokens else []
    names += ["rpb"] if problem.rpb else []
    grad = {name: np.zeros(problem.shape(name), arith) for name in names}
    flat = {
        "query": grad["query"].reshape(problem.batch, problem.queries, problem.heads, problem.head_dim),
        "key": grad["key"].reshape(problem.batch, problem.keys, problem.heads_kv, problem.head_dim),
        "value": grad["value"].reshape(problem.batch, problem.keys, problem.heads_kv, problem.head_dim_v),
    }
    rows_shape = (problem.batch, problem.queries, problem.heads)
    d_out = np.asarray(grad_output).astype(arith).reshape(*rows_shape, problem.head_dim_v)
    d_lse = np.zeros(rows_shape, arith) if grad_lse is None else np.asarray(grad_lse).astype(arith).reshape(rows_shape)
    if saved is not None:
        out = np.asarray(saved[0]).astype(arith).reshape(d_out.shape)
        lse = np.asarray(saved[1]).astype(arith).reshape(rows_shape)
    scale = arith(problem.effective_scale)
    with np.errstate(all="ignore"):
        for row in rows(problem, tensors, arith):
            if len(row.k) == 0:
                continue
            b, i, kv, n = row.batch, row.query, row.heads_kv, len(row.keys)
            groups = row.q.shape[:2]
            do = d_out[b, i, row.heads].reshape(*groups, -1)
            dp = do @ row.v.transpose(1, 2, 0)
            if saved is None:
                p, _ = softmax(row.logits(scale))
                delta = (p * dp).sum(axis=-1, keepdims=True)
            else:
                p = np.exp(row.logits(scale) - lse[b, i, row.heads].reshape(*groups, 1))
                delta = (do * out[b, i, row.heads].reshape(do.shape)).sum(axis=-1, keepdims=True)
            ds = p * (dp - delta + d_lse[b, i, row.heads].reshape(*groups, 1))
            flat["query"][b, i, row.heads] = scale * (ds @ row.k.transpose(1, 0, 2)).reshape(-1, problem.head_dim)
            dk = scale * (ds.transpose(0, 2, 1) @ row.q).transpose(1, 0, 2)
            dv = (p.transpose(0, 2, 1) @ do).transpose(1, 0, 2)
            flat["key"][b, row.keys, kv] += dk[:n]
            flat["value"][b, row.keys, kv] += dv[:n]
            if problem.additional_tokens:
                grad["additional_keys"][b][:, kv] += dk[n:]
                grad["additional_values"][b][:, kv] += dv[n:]
            if problem.rpb:
                grad["rpb"].reshape(problem.heads, -1)[:, row.rpb] += ds.reshape(problem.heads, -1)[:, :n]
    return grad


def magnitudes(problem, tensors, grad_output=None, grad_lse=None):
    """The same sums with every term made positive: how large the numbers are that rounding errors scale with.

    "logits" bounds the terms of a logit; the other entries bound the terms of the tensors of that name.
    """
    absolute = {name: np.abs(np.asarray(x).astype(np.float64)) for name, x in tensors.items()}
    scale = abs(problem.effective_scale)
    size = {"logits": 1.0, "output": 0.0}
    rows_shape = (problem.batch, problem.queries, problem.heads)
    if grad_output is not None:
        d_out = np.abs(np.asarray(grad_output).astype(np.float64)).reshape(*rows_shape, problem.head_dim_v)
        d_lse = np.zeros(rows_shape) if grad_lse is None else np.abs(np.asarray(grad_lse).astype(np.float64))
        d_lse = d_lse.reshape(rows_shape)
        bounds = {
            "query": 0.0,
            "key": np.zeros((problem.batch, problem.keys, problem.heads_kv, problem.head_dim)),
            "value": np.zeros((problem.batch, problem.keys, problem.heads_kv, problem.head_dim_v)),
            "additional_keys": 0.0,
            "additional_values": 0.0,
            "rpb": 0.0,
        }
    positive = rows(problem, absolute | ({"attn_bias": tensors["attn_bias"]} if problem.attn_bias else {}), np.float64)
    with np.errstate(all="ignore"):
        for row, terms in zip(rows(problem, tensors, np.float64), positive, strict=True):
            if len(row.k) == 0:
                continue
            p, lse = softmax(row.logits(problem.effective_scale))
            terms.bias = None if terms.bias is None else np.abs(terms.bias)
            size["logits"] = max(size["logits"], terms.logits(scale).max(), np.abs(lse).max())
            size["output"] = max(size["output"], (p @ terms.v.transpose(1, 0, 2)).max())
            if grad_output is None:
                continue
            b, kv, n = row.batch, row.heads_kv, len(row.keys)
            do = d_out[b, row.query, row.heads].reshape(*row.q.shape[:2], -1)
            dp = do @ terms.v.transpose(1, 2, 0)
            delta = (p * dp).sum(axis=-1, keepdims=True)
            ds = p * (dp + delta + d_lse[b, row.query, row.heads].reshape(*row.q.shape[:2], 1))
            dk = scale * (ds.transpose(0, 2, 1) @ terms.q).transpose(1, 0, 2)
            dv = (p.transpose(0, 2, 1) @ do).transpose(1, 0, 2)
            bounds["query"] = max(bounds["query"], scale * (ds @ terms.k.transpose(1, 0, 2)).max())
            bounds["key"][b, row.keys, kv] += dk[:n]
            bounds["value"][b, row.keys, kv] += dv[:n]
            if problem.additional_tokens:
                bounds["additional_keys"] += dk[n:].max()
                bounds["additional_values"] += dv[n:].max()
            if problem.rpb and n:
                bounds["rpb"] += ds[..., :n].max()
    if grad_output is not None:
        size.update({name: float(np.max(x, initial=0.0)) for name, x in bounds.items()})
    return size
