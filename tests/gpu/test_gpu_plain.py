"""Attention on a GPU by plain kernels: float32, float64, and half precision with head dims beyond 256; forward and
backward against the oracle, and what is particular to these kernels."""

import math

import gpu_oracle
import pytest
import torch
from gpu_check import backward, check, forward, options
from gpu_problems import ODD_STYLES, STYLES, Case, dense, neighborhood, random_case, tensors
from gpu_support import PRESENT, needs_gpu

import vicus
from vicus import _ops, backends

pytestmark = needs_gpu
EXACT = ("float32", "float64")
LONG = (257, 264, 300, 320, 384, 512)


def fixed() -> list[Case]:
    cases = []

    def add(name, problem, **how):
        cases.append(Case(f"{problem.dtype} {name}", problem, seed=len(cases), **how))

    for dtype in EXACT:
        of = {"dtype": dtype, "heads": 4, "kv": 2}
        for dim, dim_v in ((64, 64), (128, 128), (32, 96), (41, 23), (256, 40), (512, 512), (80, 200), (1, 1)):
            add(f"dense {dim}/{dim_v}", dense(150, 137, dim=dim, dim_v=dim_v, **of))
        add("top left", dense(300, 257, "top_left", **of))
        add("bottom right", dense(300, 457, "bottom_right", heads=4, kv=1, dtype=dtype))
        add("bottom right, rows without keys", dense(300, 157, "bottom_right", dim=32, additional_tokens=3, **of))
        add("sliding", dense(500, 500, left=70, right=33, batch=1, dtype=dtype))
        add("sliding, top left, more", dense(70, 90, "top_left", left=20, additional_tokens=77, **of))
        add("one", dense(1, 1, heads=1, batch=1, dtype=dtype))
        add("one query", dense(1, 400, heads=8, kv=1, dim=128, dtype=dtype))
        add("attention bias", dense(70, 90, attn_bias=True, dim=48, **of))
        for scale in (0.0, -0.3, 4.0):
            add(f"scale {scale}", dense(70, 90, scale=scale, dtype=dtype))
        add("2d", neighborhood((23, 37), (6, 9), (2, 4), (3, 2), (1, 0), dim=40, rpb=True, additional_tokens=9, **of))
        add("3d", neighborhood((7, 11, 13), (3, 4, 5), (2, 1, 3), (2, 2, 1), (1, 0, 0), dim=32, rpb=True, **of))
        add("window 7", neighborhood((56, 56), 7, batch=1, **of))
        add("window 7, 128", neighborhood((28, 28), 7, dim=128, rpb=True, **of))
        for style in (*STYLES[1:], *ODD_STYLES):
            add(style, neighborhood((14, 19), (5, 7), dilation=(2, 1), heads=4, kv=4, dtype=dtype), style=style)
    for dtype in ("bfloat16", "float16"):
        of = {"dtype": dtype, "heads": 4, "kv": 2}
        for dim, dim_v in ((320, 320), (512, 64), (41, 300), (257, 512), (512, 512)):
            add(f"dense {dim}/{dim_v}", dense(150, 137, "top_left", dim=dim, dim_v=dim_v, **of))
        add("2d", neighborhood((13, 17), 5, dilation=(1, 2), dim=320, rpb=True, additional_tokens=5, **of))
        for style in ODD_STYLES:
            add(style, neighborhood((14, 19), (5, 7), dim=264, heads=4, kv=4, dtype=dtype), style=style)
    return cases


@pytest.mark.parametrize("case", fixed() if PRESENT else fixed()[:1], ids=str)
def test_nasty_problem(case):
    print(f"{check(case):.2f} of the error allowed")


@pytest.mark.random_cases(80)
def test_random_problem(seed):
    half = seed % 5 == 4
    case = random_case(seed, head_dims=LONG) if half else random_case(seed, EXACT)
    print(f"VICUS_SEED={seed}: {case!r}")
    print(f"{check(case):.2f} of the error allowed")


# --- What is particular ----------------------------------------------------------------------------------------------


def randn(*shape, dtype):
    return torch.randn(*shape, dtype=torch.float64, device="cuda").to(dtype)


def attend(tensors, scale=None):
    scale = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    return _ops.dense(*tensors, *[None] * 6, 0, 0, 0, -1, -1, scale, [])


def test_more_batch_entries_than_a_grid_has_rows():
    inputs = [randn(70000, n, 1, 8, dtype=torch.float32).requires_grad_() for n in (1, 3, 3)]
    grad = randn(70000, 1, 1, 8, dtype=torch.float32)

    def run(part):
        output, _ = attend([x[part] for x in inputs])
        return [output, *torch.autograd.grad(output, inputs, grad[part])]

    first, second, whole = run(slice(0, 30000)), run(slice(30000, 70000)), run(slice(0, 70000))
    assert torch.equal(torch.cat([first[0], second[0]]), whole[0])
    for a, b, c in zip(first[1:], second[1:], whole[1:], strict=True):
        assert torch.equal(a + b, c)


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("spoiled", ["query", "key", "value", "grad_output"])
def test_nan_reaches_only_what_sees_it(dtype, spoiled):
    p = neighborhood((20, 20), 5, heads=1, batch=1, dtype=dtype)
    t = tensors(Case("nan", p, seed=5))
    t["grad_logsumexp"] = None
    seen, at = gpu_oracle.seen_table(p, "cuda"), 7 * 20 + 9

    def run(t):
        saved = forward(p, t)
        gradients = backward(p, t, saved, True)
        return [x.reshape(400, -1) for x in (*saved, *(gradients[name] for name in ("query", "key", "value")))]

    dirty = t | {spoiled: t[spoiled].clone()}
    dirty[spoiled].view(400, -1)[at] = math.inf if spoiled == "value" else math.nan
    here = torch.zeros(400, dtype=torch.bool, device="cuda")
    here[at] = True
    nothing = torch.zeros_like(here)
    queries = seen[:, at] if spoiled in ("key", "value") else here  # whose row has the bad value
    keys = seen[queries].any(0)
    output = nothing if spoiled == "grad_output" else queries
    logsumexp = nothing if spoiled in ("value", "grad_output") else queries
    found = run(dirty)
    # A block that has met such a value does its rows again one by one, in float32 with other roundings.
    near = {"rtol": 0, "atol": 0 if dtype == "float64" else 1e-4}
    for got, want, bad in zip(found, run(t), [output, logsumexp, queries, keys, keys], strict=True):
        torch.testing.assert_close(got[~bad], want[~bad], **near)
    assert (~found[0][output].isfinite()).any(-1).all(), "it was there at all"


@pytest.mark.parametrize("dtype", EXACT)
def test_bits_are_the_same_in_every_run(dtype):
    p = neighborhood((30, 30), 7, (1, 2), causal=(0, 1), heads=4, kv=2, dtype=dtype, additional_tokens=11, rpb=True)
    t = tensors(Case("bits", p, seed=3))
    saved = forward(p, t)
    for deterministic in (True, False):  # there is one way
        gradients = backward(p, t, saved, True)
        for _ in range(10):
            assert all(torch.equal(a, b) for a, b in zip(saved, forward(p, t), strict=True))
            again = backward(p, t, saved, deterministic)
            assert all(torch.equal(x, again[name]) for name, x in gradients.items())


def test_float32_is_the_same_whatever_the_switch_for_tf32_says():
    inputs = [randn(1, 200, 2, 64, dtype=torch.float32) for _ in range(3)]
    exact, before = attend(inputs), torch.backends.cuda.matmul.allow_tf32
    try:
        for switch in (True, False):
            torch.backends.cuda.matmul.allow_tf32 = switch
            assert all(torch.equal(a, b) for a, b in zip(exact, attend(inputs), strict=True))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_gradcheck():
    shapes = [(1, 4, 5, 2, 3), (1, 4, 5, 1, 3), (1, 4, 5, 1, 2), (1, 2, 1, 3), (1, 2, 1, 2), (2, 5, 5)]
    leaves = [randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    mask = ([3, 3], [1, 2], [1, 1], [0, 1])
    assert torch.autograd.gradcheck(lambda *x: _ops.neighborhood(*x, *mask, 0.6, options(True)), leaves, atol=1e-7)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 64), (torch.float64, 64), (torch.bfloat16, 512)])
def test_public_functions_without_gradients_run_here(dtype, dim):
    inputs = [randn(2, 12, 13, 2, dim, dtype=dtype) for _ in range(3)]
    wanted = _ops.neighborhood(*inputs, None, None, None, [5, 5], [1, 1], [1, 1], [0, 0], dim**-0.5, [])
    for backend in (None, "sm80"):
        assert backends.can_run(backend, *inputs, dense=False)
        found = vicus.na2d(*inputs, kernel_size=5, return_lse=True, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    flat = [x.flatten(1, 2) for x in inputs]
    assert torch.equal(vicus.attention(*flat), attend(flat)[0])


def test_head_dims_beyond_the_largest():
    inputs = [randn(1, 8, 1, 520, dtype=torch.float32) for _ in range(3)]
    assert not backends.can_run("sm80", *inputs, dense=True)
    with pytest.raises(RuntimeError, match="up to 512, they are 520 and 520"):
        attend(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_empty_problems(queries, keys, dtype):
    shapes = [(1, queries, 2, 16), (1, keys, 2, 16), (1, keys, 2, 16)]
    leaves = [randn(*shape, dtype=dtype).requires_grad_() for shape in shapes]
    output, logsumexp = attend(leaves)
    assert output.shape == (1, queries, 2, 16) and (output == 0).all()
    assert (logsumexp == -torch.inf).all()
    for gradient, leaf in zip(torch.autograd.grad(output.sum(), leaves), leaves, strict=True):
        assert gradient.shape == leaf.shape and (gradient == 0).all()
