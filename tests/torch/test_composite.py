"""The differentiable compositions of the fused operators: values against the oracle, derivatives of every order."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from vicus import composite

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
import oracle
from oracle import Dense, Neighborhood, Problem

CAUSAL = {"none": 0, "top_left": 1, "bottom_right": 2}


def dense(queries, keys, *, batch=2, tokens=0, bias=False, **mask):
    return Problem([queries], 4, 2, 3, 2, Dense(keys, **mask), "float64", batch, 0.7, tokens, False, bias)


def neighborhood(layout, window, step, dilation, causal, tokens=0, rpb=False):
    mask = Neighborhood(list(window), list(step), list(dilation), list(causal))
    return Problem(list(layout), 4, 2, 3, 2, mask, "float64", 2, 0.7, tokens, rpb)


PROBLEMS = {
    "dense": dense(5, 4),
    "top-left": dense(5, 3, causal="top_left"),
    "bottom-right": dense(4, 6, causal="bottom_right"),
    "bottom-right, queries that see nothing": dense(6, 3, causal="bottom_right"),
    "window": dense(4, 7, window_left=1, window_right=0),
    "window of nothing": dense(7, 2, causal="top_left", window_left=1),
    "padded": dense(4, 5, key_lengths=[0, 3]),
    "padded, causal, tokens": dense(4, 5, key_lengths=[0, 3], causal="bottom_right", tokens=2),
    "padded, window": dense(4, 5, key_lengths=[2, 5], window_left=1, window_right=1),
    "packed": dense(6, 5, batch=1, cumulative_queries=[0, 2, 2, 6], cumulative_keys=[0, 0, 3, 5]),
    "packed, causal": dense(
        6, 5, batch=1, cumulative_queries=[0, 2, 2, 6], cumulative_keys=[0, 1, 3, 5], causal="bottom_right"
    ),
    "packed, top-left window, tokens": dense(
        6,
        5,
        batch=1,
        cumulative_queries=[0, 4, 6],
        cumulative_keys=[0, 3, 5],
        causal="top_left",
        window_left=1,
        tokens=1,
    ),
    "bias that hides": dense(5, 4, bias=True, causal="bottom_right"),
    "bias that hides, tokens": dense(5, 4, bias=True, tokens=1),
    "1d": neighborhood([7], [3], [1], [2], [0]),
    "1d longer than the axis": neighborhood([4], [6], [2], [1], [0], rpb=True),
    "2d everything": neighborhood([5, 4], [4, 3], [2, 1], [2, 1], [1, 0], tokens=2, rpb=True),
    "3d": neighborhood([2, 3, 3], [2, 3, 2], [1, 2, 1], [1, 1, 1], [0, 1, 1], rpb=True),
}
NAMES = ["query", "key", "value", "additional_keys", "additional_values", "rpb", "attn_bias"]
ALL = pytest.mark.parametrize("name", PROBLEMS)


def tensors_of(p, seed=0):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    names = ["query", "key", "value"]
    names += ["additional_keys", "additional_values"] if p.additional_tokens else []
    names += ["rpb"] if p.rpb else []
    tensors = {n: torch.randn(p.shape(n), generator=generator, dtype=torch.float64) for n in names}
    if p.attn_bias:
        bias = torch.randn(p.batch, 1, p.queries, p.keys, generator=generator, dtype=torch.float64)
        bias[bias < -0.5] = -math.inf
        bias[0, :, 1] = -math.inf  # a query that sees nothing
        tensors["attn_bias"] = bias
    return tensors


def run(p, tensors):
    m = p.mask
    inputs = [tensors.get(n) for n in NAMES]
    if not p.dense:
        return composite.neighborhood(*inputs[:6], m.kernel_size, m.stride, m.dilation, m.is_causal, p.scale)
    lists = [torch.tensor(x) if x else None for x in (m.key_lengths, m.cumulative_queries, m.cumulative_keys)]
    return composite.dense(*inputs[:5], inputs[6], *lists, CAUSAL[m.causal], m.window_left, m.window_right, p.scale)


def function_of(p, tensors):
    """Of the leaves alone; rows without keys have a logsumexp of -inf, which no finite difference can take."""
    leaves = {n: x.requires_grad_() for n, x in tensors.items() if n != "attn_bias"}

    def function(*x):
        output, logsumexp = run(p, tensors | dict(zip(leaves, x, strict=True)))
        return output, torch.where(logsumexp.isneginf(), 0, logsumexp)

    return function, list(leaves.values())


@ALL
def test_oracle(name):
    p = PROBLEMS[name]
    tensors = tensors_of(p)
    arrays = {n: x.numpy(force=True) for n, x in tensors.items()}
    leaves = {n: x.clone().requires_grad_() for n, x in tensors.items()}
    output, logsumexp = run(p, leaves)
    wanted_output, wanted_logsumexp = oracle.forward(p, arrays)
    np.testing.assert_allclose(output.numpy(force=True), wanted_output, atol=1e-12)
    np.testing.assert_allclose(logsumexp.numpy(force=True), wanted_logsumexp, atol=1e-12)

    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (output, logsumexp)]
    torch.autograd.backward([output, logsumexp], grads)
    for n, wanted in oracle.backward(p, arrays, *(g.numpy(force=True) for g in grads)).items():
        np.testing.assert_allclose(leaves[n].grad.numpy(force=True), wanted, atol=1e-12, err_msg=n)


@ALL
def test_derivatives(name):
    p = PROBLEMS[name]
    function, leaves = function_of(p, tensors_of(p))
    assert gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, fast_mode=True)


@ALL
def test_nothing_seen_is_zero_and_never_nan(name):
    """Three times differentiated, gradients that arrive at dead rows included."""
    p = PROBLEMS[name]
    tensors = tensors_of(p)
    _, leaves = function_of(p, tensors)
    output, logsumexp = run(p, tensors)
    dead = logsumexp.isneginf()
    assert torch.equal(output[dead], torch.zeros_like(output[dead]))
    torch.manual_seed(0)
    order = torch.autograd.grad(
        [output, logsumexp], leaves, [torch.randn_like(output), torch.randn_like(logsumexp)], create_graph=True
    )
    if not p.dense or not p.attn_bias:
        rows = order[0][dead]
        assert torch.equal(rows, torch.zeros_like(rows))
    for _ in range(2):
        assert all(g.isfinite().all() for g in order)
        order = torch.autograd.grad(sum(g.square().sum() for g in order), leaves, create_graph=True)
    assert all(g.isfinite().all() for g in order)


def test_bias_has_a_gradient():
    p = PROBLEMS["bias that hides"]
    tensors = tensors_of(p)
    bias = tensors["attn_bias"].clone().requires_grad_()
    output, logsumexp = run(p, tensors | {"attn_bias": bias})
    (gradient,) = torch.autograd.grad(output.square().sum() + logsumexp[logsumexp.isfinite()].sum(), bias)
    assert gradient.isfinite().all()
    assert torch.equal(gradient[bias.isneginf()], torch.zeros_like(gradient[bias.isneginf()]))
    place = tuple(np.argwhere(gradient.abs().numpy(force=True) > 1e-3)[0])
    step = torch.zeros_like(bias)
    step[place] = 1e-6

    def loss(b):
        output, logsumexp = run(p, tensors | {"attn_bias": b})
        return output.square().sum() + logsumexp[logsumexp.isfinite()].sum()

    with torch.no_grad():
        slope = (loss(bias + step) - loss(bias - step)) / 2e-6
    torch.testing.assert_close(gradient[place], slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["padded", "padded, causal, tokens", "1d", "2d everything"])
def test_what_nobody_sees_reaches_nothing(name):
    """NaN outside every window that is looked at: key padding in `dense`, any token in `neighborhood`."""
    p = PROBLEMS[name]
    clean = tensors_of(p)
    dirty = {n: x.clone() for n, x in clean.items()}
    queries, keys = list(range(p.queries)), list(range(p.keys))
    if p.dense:
        for entry, length in enumerate(p.mask.key_lengths):
            for n in ("key", "value"):
                dirty[n][entry, length:] = math.nan
    else:
        for n in ("query", "key", "value"):
            dirty[n].flatten(1, -3)[:, -1] = math.nan
        seen = oracle.visible_keys(p, 0)
        spoilt = [i for i in queries if p.queries - 1 in (i, *seen[i])]
        queries = [i for i in queries if i not in spoilt]
        keys = [j for j in keys if not any(j in seen[i] for i in spoilt)]
        assert queries and keys
    results = []
    for tensors in (clean, dirty):
        for x in tensors.values():
            x.requires_grad_()
        output, logsumexp = run(p, tensors)
        output, logsumexp = output.flatten(1, -3)[:, queries], logsumexp.flatten(1, -2)[:, queries]
        loss = output.sum() + logsumexp[logsumexp.isfinite()].sum()
        gradients = torch.autograd.grad(loss, [tensors["key"], tensors["value"]])
        results.append([output, logsumexp, *(g.flatten(1, -3)[:, keys] for g in gradients)])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("name", "dtype"), list(itertools.product(["bottom-right", "2d everything"], [torch.bfloat16, torch.float16]))
)
def test_reduced_precision(name, dtype):
    p = PROBLEMS[name]
    rounded = {n: x.to(dtype) for n, x in tensors_of(p).items()}
    output, logsumexp = run(p, rounded)
    exact, exact_logsumexp = run(p, {n: x.double() for n, x in rounded.items()})
    assert output.dtype == dtype
    assert logsumexp.dtype == torch.float32
    torch.testing.assert_close(logsumexp.double(), exact_logsumexp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.double(), exact, atol=1e-5, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["padded, causal, tokens", "packed, causal", "bias that hides", "2d everything"])
def test_torch_func(name):
    p = PROBLEMS[name]
    tensors = tensors_of(p)
    function, leaves = function_of(p, tensors)

    def loss(*x):
        return sum(r.square().sum() for r in function(*x))

    leaves = tuple(x.detach() for x in leaves)
    at = tuple(range(len(leaves)))
    wanted = torch.autograd.functional.hessian(loss, leaves)
    for hessian in (torch.func.hessian(loss, at), torch.func.jacrev(torch.func.jacrev(loss, at), at)):
        for row, other in zip(hessian(*leaves), wanted, strict=True):
            for x, y in zip(row, other, strict=True):
                torch.testing.assert_close(x, y)
    stacked = [torch.stack([x, -2 * x]) for x in leaves]
    together = torch.func.vmap(function)(*stacked)
    for i in range(2):
        for x, y in zip(together, function(*(x[i] for x in stacked)), strict=True):
            torch.testing.assert_close(x[i], y)
