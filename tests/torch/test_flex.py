"""The backend "flex": attention by both of its ways, derivatives, and errors."""

import itertools
import math

import pytest
import torch
from oracle_masks import band_keys, expected, rpb_table, table, windows_table

from vicus import context, flex

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def defaults():
    context.reset()
    torch.manual_seed(0)
    yield
    context.reset()


@pytest.fixture(params=["plain", "kernel"])
def compiled(request, monkeypatch):
    """The argument `torch_compile` for both ways to compute; FlexAttention itself is compiled by no one here."""
    if request.param == "kernel":
        context.allow_flex_compile()
        monkeypatch.setattr(flex, "_compiled", lambda: flex.flex_attention)
    return request.param == "kernel"


# --- Attention -------------------------------------------------------------------------------------------------------


# layout, (kernel_size, stride, dilation, is_causal), tiles, additional tokens, rpb, dtype
CASES = [
    ((17,), ((5,), (2,), (2,), (False,)), None, 0, False, torch.float32),
    ((17,), ((30,), (7,), (3,), (True,)), ((16,), (32,)), 2, True, torch.float32),
    ((6, 7), ((3, 4), (1, 2), (2, 1), (True, False)), None, 3, True, torch.float64),
    ((6, 7), ((3, 4), (1, 2), (2, 1), (True, False)), ((4, 4), (8, 2)), 3, False, torch.float32),
    ((6, 7), ((6, 7), (1, 1), (1, 1), (False, False)), None, 0, False, torch.bfloat16),
    (
        (3, 5, 4),
        ((3, 2, 4), (1, 1, 3), (1, 2, 1), (False, False, True)),
        ((2, 2, 4), (1, 4, 4)),
        0,
        True,
        torch.float32,
    ),
    ((3, 5, 4), ((2, 2, 9), (2, 1, 3), (1, 3, 1), (False, True, False)), None, 1, False, torch.float16),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize(("layout", "windows", "tiles", "extra", "has_rpb", "dtype"), CASES)
def test_neighborhood(layout, windows, tiles, extra, has_rpb, dtype, compiled):
    if compiled and dtype == torch.float64:
        dtype = torch.float32  # the kernel has no other
    make = lambda *shape: torch.randn(*shape).to(dtype)  # noqa: E731
    query, key, value = make(2, *layout, 4, 8), make(2, *layout, 2, 8), make(2, *layout, 2, 6)
    additional = (make(2, extra, 2, 8), make(2, extra, 2, 6)) if extra else (None, None)
    rpb = make(4, *(2 * w - 1 for w in windows[0])) if has_rpb else None
    output, logsumexp = flex.neighborhood(
        query,
        key,
        value,
        *windows,
        0.4,
        additional_keys=additional[0],
        additional_values=additional[1],
        rpb=rpb,
        q_tile_shape=tiles and tiles[0],
        kv_tile_shape=tiles and tiles[1],
        torch_compile=compiled,
    )
    assert output.dtype == dtype
    assert logsumexp.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    flat = [x.flatten(1, len(layout)) for x in (query, key, value)]
    bias = None if rpb is None else rpb_table(rpb, layout, windows[2])
    seen = windows_table(layout, *windows)
    wanted = expected(*flat, seen, 0.4, additional if extra else None, bias)
    assert output.shape == (2, *layout, 4, 6)
    assert logsumexp.shape == (2, *layout, 4)
    assert (output.flatten(1, len(layout)) - wanted[0]).abs().max() < TOLERANCE[dtype]
    assert (logsumexp.flatten(1, len(layout)) - wanted[1]).abs().max() < max(TOLERANCE[dtype], 1e-12) * 4


# causal, window_left, window_right, Sq, Sk, additional tokens
BANDS = [
    (0, -1, -1, 7, 9, 0),
    (1, -1, -1, 7, 9, 2),
    (2, -1, -1, 9, 6, 0),
    (2, 3, -1, 6, 9, 1),
    (0, 2, 1, 9, 7, 0),
    (1, 0, 0, 5, 3, 0),
]
NAMES = ["none", "top_left", "bottom_right"]


def run_dense(shape_q, shape_kv, heads, compiled, **arguments):
    query, key, value = torch.randn(*shape_q, heads, 8), torch.randn(*shape_kv, 2, 8), torch.randn(*shape_kv, 2, 6)
    extra = arguments.pop("extra", 0)
    additional = (
        (torch.randn(shape_kv[0], extra, 2, 8), torch.randn(shape_kv[0], extra, 2, 6)) if extra else (None, None)
    )
    output, logsumexp = flex.dense(
        query,
        key,
        value,
        scale=0.3,
        additional_keys=additional[0],
        additional_values=additional[1],
        torch_compile=compiled,
        **arguments,
    )
    return (query, key, value), additional if extra else None, (output, logsumexp)


def assert_attention(found, tensors, seen, additional=None, bias=None):
    output, logsumexp = expected(*tensors, seen, 0.3, additional, bias)
    assert (found[0] - output).abs().max() < 4e-6
    blind = logsumexp == -math.inf
    assert torch.equal(found[1] == -math.inf, blind)
    assert (found[0][blind] == 0).all()
    assert (found[1][~blind] - logsumexp[~blind]).abs().max() < 4e-6


@pytest.mark.parametrize(("causal", "left", "right", "q_len", "kv_len", "extra"), BANDS)
def test_dense(causal, left, right, q_len, kv_len, extra, compiled):
    tensors, additional, found = run_dense(
        (2, q_len), (2, kv_len), 6, compiled, causal=causal, window_left=left, window_right=right, extra=extra
    )
    assert_attention(found, tensors, table(band_keys(q_len, kv_len, NAMES[causal], left, right), kv_len), additional)


@pytest.mark.parametrize(("causal", "left", "extra"), [(0, -1, 0), (2, -1, 2), (1, 2, 0), (0, 1, 0)])
def test_dense_with_padded_keys(causal, left, extra, compiled):
    lengths = torch.tensor([5, 0, 9, 8], dtype=torch.int32)
    tensors, additional, found = run_dense(
        (4, 6), (4, 9), 2, compiled, causal=causal, window_left=left, key_lengths=lengths, extra=extra
    )
    seen = torch.zeros(4, 1, 6, 9, dtype=torch.bool)
    for entry, length in zip(seen, lengths.tolist(), strict=True):
        entry[0, :, :length] = table(band_keys(6, length, NAMES[causal], left, -1), length)
    assert_attention(found, tensors, seen, additional)


@pytest.mark.parametrize(("causal", "left", "extra"), [(0, -1, 0), (1, -1, 0), (2, -1, 3), (2, 1, 0)])
def test_dense_with_packed_sequences(causal, left, extra, compiled):
    lengths_q, lengths_kv = [3, 0, 5, 2], [4, 2, 0, 6]
    cumulative = [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (lengths_q, lengths_kv)]
    tensors, additional, found = run_dense(
        (1, 10),
        (1, 12),
        4,
        compiled,
        causal=causal,
        window_left=left,
        cumulative_seqlen_q=cumulative[0],
        cumulative_seqlen_kv=cumulative[1],
        extra=extra,
    )
    blocks = [table(band_keys(q, kv, NAMES[causal], left, -1), kv) for q, kv in zip(lengths_q, lengths_kv, strict=True)]
    assert_attention(found, tensors, torch.block_diag(*blocks).bool(), additional)


@pytest.mark.parametrize(("batches", "heads"), [(2, 4), (1, 4), (2, 1)])
def test_dense_with_bias(batches, heads, compiled):
    bias = torch.randn(batches, heads, 5, 7)
    bias[..., 2, :] = -math.inf
    bias[..., 1] = -math.inf
    tensors, additional, found = run_dense((2, 5), (2, 7), 4, compiled, attn_bias=bias)
    assert_attention(found, tensors, torch.ones(5, 7, dtype=torch.bool), additional, bias)


def test_explicit_scale_of_zero_weighs_all_keys_alike():
    query, key, value = torch.randn(3, 1, 5, 2, 4).unbind()
    output, logsumexp = flex.neighborhood(query, key, value, (3,), (1,), (1,), (False,), 0.0)
    assert torch.allclose(logsumexp, torch.full_like(logsumexp, math.log(3)))
    assert torch.allclose(output[0, 2], value[0, 1:4].mean(0))


@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (1, 0, 2, 4)])
def test_empty_problems(shape):
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    output, logsumexp = flex.dense(query, key, value, scale=1.0)
    assert output.shape == shape
    assert logsumexp.shape == shape[:-1]
    output.sum().backward()
    assert query.grad.shape == shape


def test_no_keys():
    query = torch.randn(1, 3, 2, 4, requires_grad=True)
    key = torch.randn(1, 0, 2, 4)
    output, logsumexp = flex.dense(query, key, key, scale=1.0)
    assert (output == 0).all()
    assert (logsumexp == -math.inf).all()
    (output.sum() + logsumexp.exp().sum()).backward()
    assert (query.grad == 0).all()
    more = torch.randn(1, 2, 2, 4)
    bias = torch.zeros(1, 1, 3, 0)
    with torch.no_grad():
        found = flex.dense(query, key, key, scale=1.0, additional_keys=more, additional_values=more, attn_bias=bias)
    wanted = expected(query.detach(), more, more, torch.ones(3, 2, dtype=torch.bool), 1.0)
    assert (found[0] - wanted[0]).abs().max() < 4e-6


# --- Derivatives -----------------------------------------------------------------------------------------------------


def test_derivatives_of_neighborhoods():
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    query, key, value = make(1, 3, 4, 2, 2), make(1, 3, 4, 1, 2), make(1, 3, 4, 1, 3)
    more, rpb = (make(1, 2, 1, 2), make(1, 2, 1, 3)), make(2, 3, 5)

    def function(query, key, value, more_k, more_v, rpb):
        return flex.neighborhood(
            query, key, value, (2, 3), (1, 2), (2, 1), (False, True), 0.7,
            additional_keys=more_k, additional_values=more_v, rpb=rpb, q_tile_shape=(2, 2), kv_tile_shape=(1, 3),
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (query, key, value, *more, rpb), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (query, key, value, *more, rpb))


def test_derivatives_with_blind_queries():
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    query, key, value = make(1, 5, 2, 2), make(1, 3, 2, 2), make(1, 3, 2, 2)
    bias = torch.randn(1, 1, 5, 3, dtype=torch.float64)
    bias[..., 4, :] = -math.inf

    def function(query, key, value):
        output, logsumexp = flex.dense(query, key, value, scale=0.7, causal=2, attn_bias=bias)
        return output, logsumexp.masked_fill(logsumexp == -math.inf, 0)

    output, logsumexp = function(query, key, value)
    assert (output[0, [0, 1, 4]] == 0).all()
    assert torch.autograd.gradcheck(function, (query, key, value))
    gradients = torch.autograd.grad(output.sum() + logsumexp.sum(), (query, key, value))
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][0, [0, 1, 4]] == 0).all()


def test_tensors_on_a_device_that_flex_attention_does_not_know():
    query, key = torch.empty(2, 6, 5, 4, 8, device="meta"), torch.empty(2, 6, 5, 2, 8, device="meta")
    output, logsumexp = flex.neighborhood(query, key, key, (3, 3), (1, 1), (1, 1), (False, True), 1.0)
    assert output.device.type == logsumexp.device.type == "meta"
    assert output.shape == query.shape
    assert logsumexp.shape == query.shape[:-1]


# --- Compilation and errors ------------------------------------------------------------------------------------------


def test_compiled_callers():
    query, key, value = torch.randn(3, 2, 6, 5, 2, 8).unbind()
    rpb = torch.randn(2, 5, 5)

    def function(query, key, value, rpb):
        a, b = flex.neighborhood(query, key, value, (3, 3), (1, 2), (2, 1), (False, True), 1.0, rpb=rpb)
        c, d = flex.dense(
            query.flatten(1, 2), key.flatten(1, 2), value.flatten(1, 2), scale=1.0, causal=2, window_left=4
        )
        return a, b, c, d

    wanted = function(query, key, value, rpb)
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for found, exact in zip(compiled(query, key, value, rpb), wanted, strict=True):
        assert torch.allclose(found, exact, atol=1e-5)
    query.requires_grad_()
    found = compiled(query, key, value, rpb)
    gradient = torch.autograd.grad([x.sum() for x in found], query)[0]
    exact = torch.autograd.grad([x.sum() for x in function(query, key, value, rpb)], query)[0]
    assert torch.allclose(gradient, exact, atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda q: flex.neighborhood(q, q, q, (3,), (1,), (1,), (False,), 1.0, torch_compile=True),
        lambda q: flex.dense(q, q, q, scale=1.0, torch_compile=True),
    ],
)
def test_compiling_needs_leave(call):
    query = torch.randn(1, 8, 2, 16)
    with pytest.raises(RuntimeError, match="allow_flex_compile"):
        call(query)
    context.allow_flex_compile()
    query.requires_grad_()
    with pytest.raises(RuntimeError, match="allow_flex_compile_backprop"):
        call(query)
    context.allow_flex_compile(backprop=True)
    with pytest.raises(RuntimeError, match="no backward pass on device type 'cpu'"):
        call(query)
    with pytest.raises(ValueError, match=r"torch\.float64"):
        call(query.detach().double())
    context.disable_flex_compile()
    with pytest.raises(RuntimeError, match="allow_flex_compile"):
        call(query)


def test_the_kernel_is_given_the_blocks_and_only_when_compiled(monkeypatch):
    given = []

    def kernel(*args, **kwargs):
        given.append(kwargs)
        return flex.flex_attention(*args, **kwargs)

    monkeypatch.setattr(flex, "_compiled", lambda: kernel)
    query = torch.randn(1, 16, 16, 2, 16)
    arguments = (query, query, query, (5, 5), (1, 1), (1, 1), (False, False), 1.0)
    eager = flex.neighborhood(*arguments, q_tile_shape=(4, 4), kv_tile_shape=(2, 8))
    assert not given
    context.allow_flex_compile()
    found = flex.neighborhood(*arguments, q_tile_shape=(4, 4), kv_tile_shape=(2, 8), torch_compile=True)
    assert (found[0] - eager[0]).abs().max() < 1e-5
    assert given[0]["block_mask"].BLOCK_SIZE == (16, 16)
    assert 0 < given[0]["block_mask"].sparsity() < 100
    assert given[0]["kernel_options"]["BLOCK_M"] == 16
    flex.dense(*(x.flatten(1, 2) for x in arguments[:3]), scale=1.0, causal=1, torch_compile=True)
    assert given[1]["block_mask"].BLOCK_SIZE == (128, 128)


def test_the_kernel_is_compiled_once(monkeypatch):
    flex._compiled.cache_clear()
    made = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: made.append((function, options)) or function)
    assert flex._compiled() is flex._compiled() is flex.flex_attention
    assert made == [(flex.flex_attention, {"dynamic": False})]
    flex._compiled.cache_clear()


@pytest.mark.parametrize(
    ("tiles", "words"),
    [
        (((4, 4), None), "both, or both None"),
        ((None, (4, 4)), "both, or both None"),
        (((4,), (4, 4)), "q_tile_shape"),
        (((4, 4), (4, 0)), "kv_tile_shape"),
        (((4, 4), 16), "kv_tile_shape"),
        (((4, 2.0), (4, 4)), "q_tile_shape"),
    ],
)
def test_wrong_tiles(tiles, words):
    query = torch.randn(1, 6, 6, 2, 8)
    with pytest.raises(ValueError, match=words):
        flex.neighborhood(
            query,
            query,
            query,
            (3, 3),
            (1, 1),
            (1, 1),
            (False, False),
            1.0,
            q_tile_shape=tiles[0],
            kv_tile_shape=tiles[1],
        )


@pytest.mark.parametrize(
    ("tiles", "words"),
    [((64, None), "both, or both None"), ((0, 64), "q_tile_size"), ((64, (64,)), "kv_tile_size")],
)
def test_wrong_tiles_of_dense_attention(tiles, words):
    query = torch.randn(1, 6, 2, 8)
    with pytest.raises(ValueError, match=words):
        flex.dense(query, query, query, scale=1.0, q_tile_size=tiles[0], kv_tile_size=tiles[1])


def test_compiled_tiles_are_powers_of_two():
    context.allow_flex_compile()
    query = torch.randn(1, 6, 6, 2, 16)
    with pytest.raises(ValueError, match="powers of two"):
        flex.neighborhood(
            query, query, query, (3, 3), (1, 1), (1, 1), (False, False), 1.0,
            q_tile_shape=(3, 8), kv_tile_shape=(4, 4), torch_compile=True,
        )  # fmt: skip


def test_types_that_flex_attention_lacks():
    query = torch.zeros(1, 8, 2, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"torch\.int32"):
        flex.dense(query, query, query, scale=1.0)
