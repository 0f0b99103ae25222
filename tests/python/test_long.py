"""Sequences long enough for many key chunks, blocks and segments; a sample of queries is checked.

The oracle takes minutes for such lengths, so here the mask of a sampled query comes from the oracle and the softmax is
one row of numpy. Gradients of keys are checked through a grad_output that is zero but at the sampled queries.
"""

import bridge
import memory
import ml_dtypes
import numpy as np
import oracle
import pytest
from oracle import Dense, Neighborhood, Problem

LONG = {
    "dense": Problem([2000], 2, 1, 32, 32, Dense(5000), "float32"),
    "causal": Problem([5000], 2, 2, 16, 16, Dense(5000, "top_left"), "float32"),
    "more keys": Problem([1500], 2, 1, 24, 40, Dense(5000, "bottom_right"), "float32"),
    "more queries": Problem([5000], 2, 1, 24, 40, Dense(1500, "bottom_right"), "float32"),
    "sliding": Problem([5000], 2, 1, 17, 17, Dense(5000, "none", 700, 3), "float32", additional_tokens=65),
    "sliding apart": Problem([3000], 1, 1, 17, 17, Dense(5000, "bottom_right", 255, 0), "float32"),
    "lengths": Problem([1000], 2, 1, 16, 16, Dense(5000, "bottom_right", key_lengths=[4999, 700]), "float32", batch=2),
    "packed": Problem(
        [4000],
        2,
        1,
        16,
        16,
        Dense(
            5000, "bottom_right", cumulative_queries=[0, 1, 1, 3000, 4000], cumulative_keys=[0, 900, 1000, 4400, 5000]
        ),
        "float32",
    ),
    "window": Problem([20000], 1, 1, 64, 64, Neighborhood([2049], [1], [1], [0]), "float32"),
    "causal window": Problem([20000], 2, 1, 16, 16, Neighborhood([1000], [3], [1], [1]), "float32"),
    "dilated": Problem([20000], 1, 1, 16, 16, Neighborhood([501], [7], [13], [0]), "float32"),
    "image": Problem([90, 70], 2, 1, 40, 40, Neighborhood([31, 65], [1, 4], [1, 1], [0, 0]), "float32"),
    "film": Problem([12, 30, 30], 1, 1, 32, 32, Neighborhood([9, 15, 29], [1, 2, 1], [1, 1, 1], [1, 0, 0]), "float32"),
    "half": Problem([5000], 1, 1, 64, 64, Dense(5000, "top_left"), "float16"),
    "brain": Problem([5000], 1, 1, 64, 64, Neighborhood([4999], [1], [1], [0]), "bfloat16"),
}


def sampled_rows(problem, batch, queries):
    """Keys of the sampled queries only."""
    m = problem.mask
    if problem.dense and not m.cumulative_queries:
        keys = m.key_lengths[batch] if m.key_lengths else m.keys
        offset = 0 if m.causal == "top_left" else keys - problem.queries
        rows = []
        for i in queries:
            row = np.arange(keys)
            if m.causal != "none":
                row = row[row <= i + offset]
            if m.window_left >= 0:
                row = row[row >= i + offset - m.window_left]
            if m.window_right >= 0:
                row = row[row <= i + offset + m.window_right]
            rows.append(row)
        return rows
    if problem.dense:
        rows = []
        for i in queries:
            s = max(s for s, begin in enumerate(m.cumulative_queries[:-1]) if begin <= i)
            first, last = m.cumulative_keys[s], m.cumulative_keys[s + 1]
            offset = (last - first) - (m.cumulative_queries[s + 1] - m.cumulative_queries[s])
            row = np.arange(last - first)
            if m.causal != "none":
                row = row[row <= i - m.cumulative_queries[s] + offset]
            rows.append(first + row)
        return rows
    axes = oracle.neighborhood_axes(problem)
    rows = []
    for i in queries:
        flat = np.zeros(1, np.int64)
        for a, token in enumerate(np.unravel_index(i, problem.layout)):
            flat = (flat[:, None] * problem.layout[a] + np.asarray(axes[a][token])[None, :]).reshape(-1)
        rows.append(flat)
    return rows


def one_row(problem, x, batch, query, keys, grad):
    """Output, logsumexp and the row's share of every gradient, in float64."""
    q = x["query"][batch, query].reshape(problem.heads_kv, -1, problem.head_dim)
    k, v = x["key"][batch, keys], x["value"][batch, keys]
    if problem.additional_tokens:
        k = np.concatenate([k, x["additional_keys"][batch]])
        v = np.concatenate([v, x["additional_values"][batch]])
    if len(k) == 0:
        return np.zeros((problem.heads, problem.head_dim_v)), np.full(problem.heads, -np.inf), None
    scale = problem.effective_scale
    p, lse = oracle.softmax(scale * (q @ k.transpose(1, 2, 0)))
    out = p @ v.transpose(1, 0, 2)
    do = grad.reshape(out.shape)
    ds = p * (do @ v.transpose(1, 2, 0) - (do * out).sum(-1, keepdims=True))
    share = {
        "query": scale * (ds @ k.transpose(1, 0, 2)).reshape(problem.heads, -1),
        "key": scale * (ds.transpose(0, 2, 1) @ q).transpose(1, 0, 2)[: len(keys)],
        "value": (p.transpose(0, 2, 1) @ do).transpose(1, 0, 2)[: len(keys)],
    }
    return out.reshape(problem.heads, -1), lse.reshape(-1), share


def flat(problem, x, tokens):
    return np.asarray(x, np.float64).reshape(problem.batch, tokens, *np.shape(x)[-2:])


@pytest.mark.parametrize("name", LONG)
def test_sampled_queries(name):
    problem = LONG[name]
    rng = np.random.default_rng(0)
    dtype = np.dtype(problem.dtype) if problem.dtype != "bfloat16" else __import__("ml_dtypes").bfloat16
    names = ["query", "key", "value"] + ["additional_keys", "additional_values"] * (problem.additional_tokens > 0)
    inputs = {n: rng.standard_normal(problem.shape(n)).astype(dtype) for n in names}
    n = problem.queries
    queries = sorted({0, 1, n // 2, n - 2, n - 1, *rng.integers(0, n, 40).tolist()})
    grad_output = np.zeros(problem.shape("output"), dtype)
    sampled = flat_view(grad_output, problem)
    sampled[:, queries] = rng.standard_normal(sampled[:, queries].shape).astype(dtype)

    out = {"output": np.full(problem.shape("output"), np.nan, dtype)}
    out["logsumexp"] = np.full(problem.shape("logsumexp"), np.nan, np.float32)
    request = bridge.request(problem, engine="cpu", threads=2)
    bridge.call("forward", request, inputs | out)
    grads = {"d_" + n: np.full(problem.shape(n), np.nan, dtype) for n in names}
    bridge.call("backward", request, inputs | out | {"grad_output": grad_output} | grads)

    x = {n: flat(problem, inputs[n], inputs[n].size // (problem.batch * np.prod(inputs[n].shape[-2:]))) for n in names}
    d_out = flat(problem, grad_output, n)
    got = {n: flat(problem, grads["d_" + n], problem.queries if n == "query" else problem.keys) for n in names[:3]}
    want = {n: np.zeros_like(got[n]) for n in got}
    lse = np.asarray(out["logsumexp"]).reshape(problem.batch, n, problem.heads)
    output = flat(problem, out["output"], n)
    unit = 1e-5 if problem.dtype == "float32" else float(__import__("ml_dtypes").finfo(dtype).eps)
    for b in range(problem.batch):
        for i, keys in zip(queries, sampled_rows(problem, b, queries), strict=True):
            ref, ref_lse, share = one_row(problem, x, b, i, keys, d_out[b, i])
            np.testing.assert_allclose(lse[b, i], ref_lse, atol=1e-5, rtol=1e-6)
            np.testing.assert_allclose(output[b, i], ref, atol=2 * unit * max(1e-2, np.abs(ref).max()), rtol=0)
            if share:
                want["query"][b, i] = share["query"]
                want["key"][b, keys] += share["key"]
                want["value"][b, keys] += share["value"]
    for tensor in want:
        largest = np.abs(want[tensor]).max()
        np.testing.assert_allclose(got[tensor], want[tensor], atol=4 * unit * largest, rtol=0, err_msg=tensor)


def flat_view(array, problem):
    return array.reshape(problem.batch, problem.queries, *array.shape[-2:])


# Outputs of this size are stored past the caches, rows that start at a whole vector with other instructions.
STREAMED_BYTES = 4 << 20


@pytest.mark.parametrize("dtype", memory.DTYPES)
@pytest.mark.parametrize("head_dim_v", [64, 40, 33])
@pytest.mark.parametrize("mask", [Neighborhood([5, 5], [1, 1], [1, 1], [0, 0]), Dense(40)], ids=["windows", "dense"])
def test_large_outputs_are_the_same_wherever_they_lie(dtype, head_dim_v, mask):
    kind = memory.DTYPES[dtype]
    tokens = STREAMED_BYTES // (2 * head_dim_v * kind.itemsize) + 1
    layout = [tokens // 50 + 1, 50] if isinstance(mask, Neighborhood) else [tokens]
    problem = Problem(layout, 2, 1, 16, head_dim_v, mask, dtype)
    rng = np.random.default_rng(5)
    inputs = {name: rng.standard_normal(problem.shape(name)).astype(kind) for name in ("query", "key", "value")}
    shape = problem.shape("output")
    size = int(np.prod(shape)) * kind.itemsize
    assert size >= STREAMED_BYTES
    outputs = []
    for offset in (0, kind.itemsize):  # from the start of a cache line, and not aligned to anything
        buffer = np.full(size + 256, memory.POISON, np.uint8)
        start = -buffer.ctypes.data % 64 + 64 + offset
        output = buffer[start : start + size].view(kind).reshape(shape)
        bridge.call("forward", bridge.request(problem), inputs | {"output": output})
        assert (buffer[:start] == memory.POISON).all() and (buffer[start + size :] == memory.POISON).all()
        outputs.append(output)
    np.testing.assert_array_equal(*outputs)
    if problem.dense:  # the first queries in a call that is too small to be streamed
        small = Problem([layout[0] // 8], 2, 1, 16, head_dim_v, mask, dtype)
        output = np.empty(small.shape("output"), kind)
        query = inputs["query"][:, : small.queries]
        bridge.call("forward", bridge.request(small), inputs | {"query": query, "output": output})
        tolerance = 4 * float(ml_dtypes.finfo(kind).eps)
        got, want = (x.astype(np.float64) for x in (outputs[0][:, : small.queries], output))
        np.testing.assert_allclose(got, want, atol=tolerance, rtol=tolerance)
