"""Random calls of the public fused functions against attention in PyTorch's plain operators, values and gradients."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked import by_hand, flat, qkv, seen_by

import vicus

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}


def compare(result, by_hand_result, tensors, twins, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    arriving = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in by_hand_result]
    result = [x.reshape(y.shape) for x, y in zip(result, by_hand_result, strict=True)]
    for got, want in zip(result, by_hand_result, strict=True):
        torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    got = torch.autograd.grad(result, tensors, arriving)
    want = torch.autograd.grad(by_hand_result, twins, arriving)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=10 * TOLERANCE[dtype], rtol=10 * TOLERANCE[dtype])


def twins_of(tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


heads = st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)])
dims = st.tuples(st.integers(1, 20), st.integers(1, 20))
dtypes = st.sampled_from([torch.float32, torch.float64])
scales = st.one_of(st.none(), st.floats(-1, 1))


@settings(max_examples=150)
@given(st.data(), heads, dims, dtypes, scales, st.integers(0, 2**31))
def test_neighborhood(data, heads, dims, dtype, scale, seed):
    rank = data.draw(st.integers(1, 3))
    layout = [data.draw(st.integers(1, (40, 9, 5)[rank - 1])) for _ in range(rank)]
    windows = [data.draw(st.integers(1, n + 2)) for n in layout]  # longer than the axis, too
    stride = [data.draw(st.integers(1, w)) for w in windows]
    dilation = [data.draw(st.integers(1, 3)) for _ in layout]
    causal = [data.draw(st.booleans()) for _ in layout]
    tensors = qkv(
        layout, heads=heads[0], heads_kv=heads[1], dim=dims[0], dim_v=dims[1], dtype=dtype, grad=True, seed=seed
    )
    result = vicus.neighborhood_attention(
        *tensors, tuple(windows), tuple(stride), tuple(dilation), tuple(causal), scale, return_lse=True
    )
    twins = twins_of(tensors)
    mask = seen_by(layout, windows, stride, dilation, causal)
    compare(result, by_hand(*map(flat, twins), mask, scale), tensors, twins, dtype, seed)


@settings(max_examples=100)
@given(st.data(), heads, dims, dtypes, scales, st.integers(0, 2**31))
def test_dense(data, heads, dims, dtype, scale, seed):
    queries, keys = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    kind = data.draw(st.sampled_from(["none", "top_left", "bottom_right", "sliding"]))
    if kind == "bottom_right":
        keys = max(keys, queries)  # every query sees a key: a row of nothing has no gradient by hand
    sizes = {"heads": heads[0], "heads_kv": heads[1], "dim": dims[0], "dim_v": dims[1], "dtype": dtype, "grad": True}
    query = qkv([queries], seed=seed, **sizes)[0]
    key, value = qkv([keys], seed=seed + 1, **sizes)[1:]
    asked = {}
    row, column = torch.arange(queries)[:, None], torch.arange(keys)[None]
    mask = torch.ones(queries, keys, dtype=torch.bool)
    if kind in ("top_left", "bottom_right"):
        asked = {"is_causal": True, "causal_alignment": kind}
        mask = column <= row + (keys - queries if kind == "bottom_right" else 0)
    elif kind == "sliding":
        left, right = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
        keys_of = row + keys - queries
        mask = (column >= keys_of - left) & (column <= keys_of + right)
        if not mask.any(1).all():
            return
        asked = {"window_size": (left, right)}
    tensors = [query, key, value]
    result = vicus.attention(*tensors, scale=scale, return_lse=True, **asked)
    twins = twins_of(tensors)
    compare(result, by_hand(*twins, mask, scale), tensors, twins, dtype, seed)
