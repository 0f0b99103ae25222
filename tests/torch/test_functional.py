"""The public functions: values against a dense masked computation in PyTorch, and how they live with the rest of it:
gradients, autocast, torch.compile, checkpointing, forward mode, threads."""

import copy
import itertools
import pickle
import threading

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import vicus
from vicus import _attend, _ops, functional

NA = {1: vicus.na1d, 2: vicus.na2d, 3: vicus.na3d}
MASKS = [(1, 1, False), (2, 1, True), (1, 2, False), (2, 2, True)]
LAYOUTS = {1: (11,), 2: (6, 7), 3: (4, 5, 4)}


def qkv(layout, *, batch=2, heads=4, heads_kv=2, dim=8, dim_v=6, dtype=torch.float32, grad=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
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


# --- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    ("stride", "dilation", "is_causal"), [(1, 1, False), (2, 1, True), (1, 2, False), (2, 2, True)]
)
def test_neighborhood_is_masked_attention(rank, stride, dilation, is_causal):
    layout = LAYOUTS[rank]
    tensors = qkv(layout, grad=True)
    output, logsumexp = NA[rank](*tensors, 2, stride, dilation, is_causal, return_lse=True)
    mask = seen_by(layout, 2, stride, dilation, is_causal)
    expected, expected_lse = by_hand(*map(flat, tensors), mask)
    torch.testing.assert_close(flat(output), expected)
    torch.testing.assert_close(logsumexp.flatten(1, -2), expected_lse)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((flat(output) * weights).sum() + logsumexp.sum(), tensors)
    theirs = torch.autograd.grad((expected * weights).sum() + expected_lse.sum(), tensors)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_inference_and_training_agree():
    tensors = qkv((6, 7))
    quiet = vicus.na2d(*tensors, 3)
    again = vicus.na2d(*tensors, 3)  # remembered by now
    training = vicus.na2d(*(x.requires_grad_() for x in tensors), 3)
    with torch.no_grad():
        undifferentiated = vicus.na2d(*tensors, 3, return_lse=True)[0]
    for other in (again, training, undifferentiated):
        torch.testing.assert_close(other, quiet, rtol=0, atol=0)
    assert training.requires_grad and not undifferentiated.requires_grad


@pytest.mark.parametrize("kernel_size", [1, (9, 2), (6, 7), 50])
def test_windows_of_any_size(kernel_size):
    tensors = qkv((6, 7))
    output = vicus.neighborhood_attention(*tensors, kernel_size)
    torch.testing.assert_close(flat(output), by_hand(*map(flat, tensors), seen_by((6, 7), kernel_size, 1, 1, 0))[0])


def test_additional_tokens_are_part_of_the_softmax():
    tensors = qkv((6, 7), grad=True)
    extra = [x[:, 0] for x in qkv((1, 5), seed=1)[1:]]
    output, logsumexp = vicus.na2d(*tensors, 3, additional_keys=extra[0], additional_values=extra[1], return_lse=True)
    q, k, v = map(flat, tensors)
    mask = F.pad(seen_by((6, 7), 3, 1, 1, 0), (0, 5), value=True)
    expected, expected_lse = by_hand(q, torch.cat([k, extra[0]], 1), torch.cat([v, extra[1]], 1), mask)
    torch.testing.assert_close(flat(output), expected)
    torch.testing.assert_close(logsumexp.flatten(1, -2), expected_lse)
    two = vicus.merge_attentions(
        [flat(vicus.na2d(*tensors, 3)), vicus.attention(q, *extra)],
        [
            vicus.na2d(*tensors, 3, return_lse=True)[1].flatten(1, 2),
            vicus.attention(q, *extra, return_lse=True)[1],
        ],
    )
    torch.testing.assert_close(two[0], expected)
    torch.testing.assert_close(two[1], expected_lse)


def test_relative_positional_bias():
    tensors = qkv((6, 7))
    rpb = torch.randn(4, 5, 5)
    i = torch.cartesian_prod(torch.arange(6), torch.arange(7))
    offset = i[None] - i[:, None] + 2  # key - query + kernel_size - 1
    bias = rpb[:, offset[..., 0].clamp(0, 4), offset[..., 1].clamp(0, 4)]
    bias = bias.masked_fill(~seen_by((6, 7), 3, 1, 1, 0), -torch.inf)
    expected = by_hand(*map(flat, tensors), bias)[0]
    torch.testing.assert_close(flat(vicus.na2d(*tensors, 3, rpb=rpb)), expected)


@pytest.mark.parametrize("scale", [0.0, 0.7, -1.5])
def test_scale_is_used_as_given(scale):
    tensors = qkv((6, 7))
    mask = seen_by((6, 7), 3, 1, 1, 0)
    torch.testing.assert_close(flat(vicus.na2d(*tensors, 3, scale=scale)), by_hand(*map(flat, tensors), mask, scale)[0])
    q, k, v = map(flat, tensors)
    all_keys = torch.ones(42, 42, dtype=torch.bool)
    torch.testing.assert_close(vicus.attention(q, k, v, scale=scale), by_hand(q, k, v, all_keys, scale)[0])


DENSE_MASKS = {
    "none": ({}, lambda i, j, n: j < n),
    "top-left": ({"is_causal": True}, lambda i, j, n: j <= i),
    "bottom-right": ({"is_causal": True, "causal_alignment": "bottom_right"}, lambda i, j, n: j <= i + n - 5),
    "window": ({"window_size": (2, 1)}, lambda i, j, n: (j >= i + n - 5 - 2) & (j <= i + n - 5 + 1)),
    "causal window": ({"is_causal": True, "window_size": (2, -1)}, lambda i, j, n: (j >= i - 2) & (j <= i)),
}


@pytest.mark.parametrize("name", DENSE_MASKS)
def test_dense_masks(name):
    arguments, sees = DENSE_MASKS[name]
    q = qkv((5,), grad=True)[0]
    k, v = qkv((9,), seed=1, grad=True)[1:]
    mask = sees(torch.arange(5)[:, None], torch.arange(9), 9)
    output, logsumexp = vicus.attention(q, k, v, **arguments, return_lse=True)
    expected, expected_lse = by_hand(q, k, v, mask)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(logsumexp, expected_lse)
    ours, theirs = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (output, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_key_padding():
    q, (k, v) = qkv((5,))[0], qkv((9,), seed=1)[1:]
    lengths = torch.tensor([4, 9])
    mask = (torch.arange(9) < lengths[:, None])[:, None, None]
    torch.testing.assert_close(vicus.attention(q, k, v, key_lengths=lengths), by_hand(q, k, v, mask)[0])
    nothing, lse = vicus.attention(q, k, v, key_lengths=torch.tensor([0, 9]), return_lse=True)
    assert (nothing[0] == 0).all() and (lse[0] == -torch.inf).all()


@pytest.mark.parametrize("shape", [(5, 9), (1, 9), (4, 5, 9), (2, 1, 5, 9), (2, 4, 5, 9)])
def test_attention_mask_of_any_broadcast_shape(shape):
    q, (k, v) = qkv((5,))[0], qkv((9,), seed=1)[1:]
    sees = torch.rand(shape) > 0.3
    sees[..., 0] = True
    torch.testing.assert_close(vicus.attention(q, k, v, attn_mask=sees), by_hand(q, k, v, sees)[0])
    bias = torch.randn(shape, requires_grad=True)
    ours, expected = vicus.attention(q, k, v, attn_mask=bias), by_hand(q, k, v, bias)[0]
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), bias)[0] for x in (ours, expected)))


@pytest.mark.parametrize("how", ["seqlens", "cumulative"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences(how, is_causal):
    lengths_q, lengths_kv = [3, 0, 5], [4, 2, 6]
    q, (k, v) = qkv((8,), batch=1)[0], qkv((12,), batch=1, seed=1)[1:]
    seqlens = [torch.tensor(x, dtype=torch.int32) for x in (lengths_q, lengths_kv)]
    if how == "seqlens":
        output = vicus.attention(q, k, v, is_causal, seqlens_Q=seqlens[0], seqlens_KV=seqlens[1])
    else:
        cumulative = [F.pad(x.cumsum(0, dtype=torch.int32), (1, 0)) for x in seqlens]
        output = vicus.attention(q, k, v, is_causal, None, None, None, *cumulative, 5, 6)
    at = zip(q.split(lengths_q, 1), k.split(lengths_kv, 1), v.split(lengths_kv, 1), strict=True)
    expected = torch.cat([vicus.attention(*one, is_causal) for one in at], 1)
    torch.testing.assert_close(output, expected)


def test_merge_any_number_of_parts():
    q, (k, v) = qkv((5,), grad=True)[0], qkv((12,), seed=1, grad=True)[1:]
    expected, expected_lse = vicus.attention(q, k, v, return_lse=True)
    split = [vicus.attention(q, *part, return_lse=True) for part in zip(k.split(3, 1), v.split(3, 1), strict=True)]
    output, logsumexp = vicus.merge_attentions(*map(list, zip(*split, strict=True)))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(logsumexp, expected_lse)
    ours, theirs = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (output, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_merge_ignores_a_part_that_saw_no_key():
    output = torch.randn(1, 3, 2, 4, requires_grad=True)
    lse = torch.randn(1, 3, 2)
    hidden = torch.full_like(output, torch.nan), torch.full_like(lse, -torch.inf)
    merged, merged_lse = vicus.merge_attentions([output, hidden[0]], [lse, hidden[1]])
    torch.testing.assert_close(merged, output)
    torch.testing.assert_close(merged_lse, lse)
    torch.testing.assert_close(torch.autograd.grad(merged.sum(), output)[0], torch.ones_like(output))
    assert (vicus.merge_attentions([hidden[0]] * 2, [hidden[1]] * 2)[0] == 0).all()


# --- Dtypes and autocast ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_of_results(dtype):
    tensors = [x.to(dtype).requires_grad_() for x in qkv((6, 7))]
    output, logsumexp = vicus.na2d(*tensors, 3, return_lse=True)
    assert output.dtype == dtype
    assert logsumexp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    output.sum().backward()
    assert all(x.grad.dtype == dtype for x in tensors)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_is_that_of_sdpa(grad):
    tensors = qkv((6, 7), heads_kv=4, dim_v=8, grad=grad)
    with torch.autocast("cpu", torch.bfloat16):
        output, logsumexp = vicus.na2d(*tensors, 3, return_lse=True)
        dense = vicus.attention(*map(flat, tensors))
        sdpa = F.scaled_dot_product_attention(*(flat(x).transpose(1, 2) for x in tensors))
        from_float64 = vicus.na2d(*(x.double() for x in tensors), 3)
    assert output.dtype == dense.dtype == sdpa.dtype == torch.bfloat16
    assert logsumexp.dtype == torch.float32
    assert from_float64.dtype == torch.float64
    expected = vicus.na2d(*(x.bfloat16() for x in tensors), 3)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    if grad:
        grads = torch.autograd.grad(output.float().sum(), tensors)
        assert all(g.dtype == torch.float32 for g in grads)


def test_autocast_reaches_no_composition():
    q, k, v = map(flat, qkv((6, 7)))
    bias = torch.randn(42, 42, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        logsumexp = vicus.attention(q, k, v, attn_mask=bias, return_lse=True)[1]
    rounded = (x.bfloat16().float() for x in (q, k, v))
    torch.testing.assert_close(logsumexp, by_hand(*rounded, bias)[1], rtol=1e-5, atol=1e-5)


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("grad", [False, True])
def test_compile_without_breaks_for_any_batch_and_layout(fresh_compiler, grad):
    def function(query, key, value, rpb):
        output, logsumexp = vicus.na2d(query, key, value, (3, 3), dilation=(1, 2), rpb=rpb, return_lse=True)
        return output * 2 + logsumexp.unsqueeze(-1) + vicus.na2d(query, key, value, 3)

    compiled = torch.compile(function, backend=fresh_compiler, fullgraph=True, dynamic=True)
    rpb = torch.randn(4, 5, 5, requires_grad=grad)
    for batch, layout in ((3, (7, 9)), (5, (10, 11)), (6, (12, 13))):  # sizes that agree would be guarded on
        tensors = [*qkv(layout, batch=batch, grad=grad), rpb]
        got, expected = compiled(*tensors), function(*tensors)
        torch.testing.assert_close(got, expected)
        if grad:
            for a, b in zip(*(torch.autograd.grad(x.sin().sum(), tensors) for x in (got, expected)), strict=True):
                torch.testing.assert_close(a, b)
    assert fresh_compiler.frame_count == 1


def test_compile_dense_and_packed(fresh_compiler):
    def function(query, key, value, cumulative):
        packed = vicus.attention(query, key, value, True, None, None, None, cumulative, cumulative, 5, 5)
        masked = vicus.attention(query, key, value, attn_mask=torch.ones(query.shape[1], key.shape[1]).bool())
        return vicus.merge_attentions([packed, masked], [query[..., 0], query[..., 1]])[0]

    compiled = torch.compile(function, backend=fresh_compiler, fullgraph=True, dynamic=True)
    for length in (11, 13):
        tensors = qkv((length,), batch=1, grad=True)
        cumulative = torch.tensor([0, 3, length], dtype=torch.int32)
        got, expected = compiled(*tensors, cumulative), function(*tensors, cumulative)
        torch.testing.assert_close(got, expected)
        for a, b in zip(*(torch.autograd.grad(x.sum(), tensors) for x in (got, expected)), strict=True):
            torch.testing.assert_close(a, b)
    assert fresh_compiler.frame_count == 1


def test_compile_with_inductor():
    torch._dynamo.reset()

    def function(x):  # inductor picks the layouts around the operator
        query, key, value = x.unflatten(-1, (3, 4, 8)).unbind(-3)
        return vicus.na2d(query.relu(), key.sin(), value, 3).flatten(-2).mT.cos()

    x = torch.randn(2, 6, 7, 96, requires_grad=True)
    got, expected = torch.compile(function, fullgraph=True)(x), function(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, expected)))


def test_compile_finds_errors():
    torch._dynamo.reset()
    q, k, v = qkv((6, 7))
    with pytest.raises(Exception, match="kernel_size"):
        torch.compile(lambda: vicus.na2d(q, k, v, 8), backend="eager", fullgraph=True)()


def test_export():
    class Block(torch.nn.Module):
        def forward(self, query, key, value):
            return vicus.na2d(query, key, value, 3)

    tensors = tuple(qkv((6, 7)))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Block(), tensors, dynamic_shapes=({0: batch},) * 3)
    others = qkv((6, 7), batch=5)
    torch.testing.assert_close(program.module()(*others), vicus.na2d(*others, 3))


# --- Meta tensors, checkpointing, forward mode, torch.func, threads --------------------------------------------------


def test_meta_tensors_have_shapes():
    q, k, v = (x.to("meta") for x in qkv((6, 7)))
    output, logsumexp = vicus.na2d(q, k, v, 3, return_lse=True)
    assert output.shape == (2, 6, 7, 4, 6) and logsumexp.shape == (2, 6, 7, 4)
    assert vicus.attention(flat(q), flat(k), flat(v)).device.type == "meta"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    tensors = qkv((6, 7), grad=True)

    def function(*x):
        return vicus.na2d(*x, 3).sin()

    output = checkpoint(function, *tensors, use_reentrant=use_reentrant)
    ours, theirs = (
        torch.autograd.grad(x.sum(), tensors) if not use_reentrant else None for x in (output, function(*tensors))
    )
    if use_reentrant:  # takes no torch.autograd.grad
        output.sum().backward()
        ours = [x.grad for x in tensors]
        theirs = torch.autograd.grad(function(*tensors).sum(), tensors)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_forward_mode_equals_finite_differences(caplog):
    tensors = qkv((4, 5), dtype=torch.float64)
    directions = qkv((4, 5), dtype=torch.float64, seed=3)

    def function(*x):
        output, logsumexp = vicus.na2d(*x, 3, return_lse=True)
        dense, dense_lse = vicus.attention(*map(flat, x), is_causal=True, return_lse=True)
        merged = vicus.merge_attentions([flat(output), dense], [logsumexp.flatten(1, 2), dense_lse])
        return torch.cat([merged[0].flatten(), merged[1].flatten()])

    with caplog.at_level("DEBUG", logger="vicus"), forward_ad.dual_level():
        dual = [forward_ad.make_dual(x, d) for x, d in zip(tensors, directions, strict=True)]
        tangent = forward_ad.unpack_dual(function(*dual)).tangent
    assert "forward-mode" in caplog.text
    step = 1e-6
    ahead, behind = (function(*(x + s * d for x, d in zip(tensors, directions, strict=True))) for s in (step, -step))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)


def test_torch_func():
    tensors = qkv((4, 5), dtype=torch.float64)
    direction = torch.randn_like(tensors[0])

    def loss(*x):
        return vicus.na2d(*x, 3).sin().sum() + vicus.attention(*map(flat, x)).cos().sum()

    leaves = [x.clone().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*tensors), expected, strict=True):
        torch.testing.assert_close(a, b)
    _, tangent = torch.func.jvp(lambda q: loss(q, *tensors[1:]), (tensors[0],), (direction,))
    torch.testing.assert_close(tangent, (expected[0] * direction).sum())


def test_vmap():
    stacked = [torch.stack(x) for x in zip(*(qkv((4, 5), seed=i) for i in range(3)), strict=True)]

    def function(*x):
        return vicus.na2d(*x, 3)

    expected = torch.stack([function(*x) for x in zip(*stacked, strict=True)])
    torch.testing.assert_close(torch.vmap(function)(*stacked), expected)


def test_deterministic_gradients_are_bit_identical():
    tensors = qkv((12, 13), grad=True)
    for arguments in ({"deterministic": True}, {"deterministic": False}, {}):
        runs = [torch.autograd.grad(vicus.na2d(*tensors, 5, **arguments).square().sum(), tensors) for _ in range(2)]
        for a, b in zip(*runs, strict=True):
            assert torch.equal(a, b)


def test_many_threads():
    tensors = qkv((9, 9), heads=8)
    expected = {w: vicus.na2d(*tensors, w) for w in (2, 3, 5)}
    failures = []

    def work(seed):
        for i in range(20):
            window = (2, 3, 5)[(seed + i) % 3]
            leaves = [x.clone().requires_grad_(seed % 2 == 0) for x in tensors]
            output = vicus.na2d(*leaves, window)
            if seed % 2 == 0:
                output.sum().backward()
            if not torch.equal(output, expected[window]):
                failures.append((seed, window))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_torch_threads_are_used():
    before = torch.get_num_threads()
    tensors = qkv((24, 24), heads=8, dim=32, dim_v=32)
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert vicus.info()["threads"] == count
            results.append(vicus.na2d(*tensors, 7))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_functions_pickle_and_copy():
    for function in (vicus.na1d, vicus.na2d, vicus.na3d, vicus.neighborhood_attention, vicus.attention):
        assert pickle.loads(pickle.dumps(function)) is function
        assert copy.deepcopy(function) is function
        assert function.__module__ == "vicus.functional"


# --- The quick way ---------------------------------------------------------------------------------------------------


def test_quick_way_takes_only_what_it_has_seen(monkeypatch):
    calls = []
    inference = _ops.neighborhood_inference
    monkeypatch.setattr(_attend, "neighborhood", lambda *a, _real=_attend.neighborhood: calls.append(a) or _real(*a))
    tensors = qkv((6, 7))
    window = (3, 3)
    for _ in range(3):
        functional.na2d(*tensors, window)
    assert len(calls) == 1 and inference is _ops.neighborhood_inference
    for bad in ((3.0, 3.0), (3, True), "33"):
        with pytest.raises(ValueError, match="kernel_size"):
            functional.na2d(*tensors, bad)
    for bad in ((0, 0), (1, 0), 1):
        with pytest.raises(ValueError, match="is_causal"):
            functional.na2d(*tensors, window, 1, 1, bad)
    with pytest.raises(ValueError, match="kernel_size"):
        functional.na2d(*(x[:, :2] for x in tensors), window)
    with pytest.raises(ValueError, match="key"):
        functional.na2d(tensors[0], tensors[1][:, :4], tensors[2], window)


def test_remembered_masks_are_bounded():
    for height, width in itertools.product(range(2, 40), range(2, 40)):
        x = torch.empty(0, height, width, 1, 1)
        functional.na2d(x, x, x, 2)
    assert len(_attend._seen) <= _attend._MOST_SEEN
