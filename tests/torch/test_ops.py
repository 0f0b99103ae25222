"""The fused operators and `merge` as PyTorch sees them: registration, derivatives of every order and mode, strides."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck

from vicus import _ops, composite

MASK = ([3, 3], [1, 2], [1, 2], [0, 1])


def randn(*shape, dtype=torch.float64, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_(grad)


def neighborhood_tensors(extra, dtype=torch.float64, grad=True):
    """Two query heads per key head, Dv != D, odd sizes; with additional tokens and a bias if `extra`."""
    shapes = [(2, 4, 5, 4, 3), (2, 4, 5, 2, 3), (2, 4, 5, 2, 2)]
    if extra:
        shapes += [(2, 2, 2, 3), (2, 2, 2, 2), (4, 5, 5)]
    made = [randn(*shape, dtype=dtype, seed=i, grad=grad) for i, shape in enumerate(shapes)]
    return made + [None] * (6 - len(made))


def dense_tensors(kind, dtype=torch.float64, grad=True):
    """Tensors of `dense`: q, k, v, additional keys and values, bias, key lengths, cumulative lengths of q and kv."""
    if kind == "packed":
        shapes = [(1, 7, 2, 3), (1, 9, 1, 3), (1, 9, 1, 2)]
        q, k, v = (randn(*shape, dtype=dtype, seed=i, grad=grad) for i, shape in enumerate(shapes))
        return [q, k, v, None, None, None, None, torch.tensor([0, 3, 3, 7]), torch.tensor([0, 4, 4, 9])]
    shapes = [(2, 5, 4, 3), (2, 6, 2, 3), (2, 6, 2, 2)]
    q, k, v = (randn(*shape, dtype=dtype, seed=i, grad=grad) for i, shape in enumerate(shapes))
    if kind == "plain":
        return [q, k, v] + [None] * 6
    extra = [randn(2, 2, 2, 3, dtype=dtype, seed=3, grad=grad), randn(2, 2, 2, 2, dtype=dtype, seed=4, grad=grad)]
    return [q, k, v, *extra, randn(1, 4, 5, 6, dtype=dtype, seed=5, grad=False), torch.tensor([0, 4]), None, None]


DENSE = {"plain": (0, 0, 0, -1, -1), "packed": (4, 5, 1, -1, -1), "extra": (0, 0, 2, 2, 0)}


def parts(dtype=torch.float64, grad=True):
    outputs = [randn(2, 3, 2, 2, dtype=dtype, seed=i, grad=grad) for i in range(3)]
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return outputs, [randn(2, 3, 2, dtype=lse_dtype, seed=9 + i, grad=grad) for i in range(3)]


# --- Registration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_neighborhood(extra, dtype):
    tensors = neighborhood_tensors(extra, dtype)
    opcheck(_ops.neighborhood, (*tensors, *MASK, 0.3, []))
    output, logsumexp = (x.detach() for x in _ops.neighborhood(*tensors, *MASK, 0.3, []))
    grads = torch.ones_like(output).requires_grad_(), torch.ones_like(logsumexp)
    opcheck(_ops.neighborhood_backward, (*grads, *tensors, output, logsumexp, *MASK, 0.3, [], 63 if extra else 5))


def test_opcheck_inference():
    q, k, v = neighborhood_tensors(False, torch.float32, grad=False)[:3]
    opcheck(_ops.neighborhood_inference, (q, k, v, [n for values in MASK for n in values], 0.3))
    q, k, v = dense_tensors("plain", torch.float32, grad=False)[:3]
    opcheck(_ops.dense_inference, (q, k, v, 1, 2, 0, 0.3))


@pytest.mark.parametrize("kind", DENSE)
def test_opcheck_dense(kind):
    tensors = dense_tensors(kind, torch.float32)
    opcheck(_ops.dense, (*tensors, *DENSE[kind], 0.3, []))
    output, logsumexp = (x.detach() for x in _ops.dense(*tensors, *DENSE[kind], 0.3, []))
    grads = torch.ones_like(output).requires_grad_(), torch.ones_like(logsumexp)
    wanted = 31 if kind == "extra" else 6
    opcheck(_ops.dense_backward, (*grads, *tensors, output, logsumexp, *DENSE[kind], 0.3, [], wanted))


def test_opcheck_merge():
    outputs, logsumexps = parts(torch.float32)
    opcheck(_ops.merge, (outputs, logsumexps))
    merged = [x.detach().requires_grad_() for x in _ops.merge(outputs, logsumexps)]
    opcheck(_ops.merge_backward, (outputs, logsumexps, *merged))


def test_errors_of_the_core_are_value_errors():
    q = randn(1, 4, 4, 1, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^key\.shape.* is .*; allowed: "):
        _ops.neighborhood_inference(q, q[:, :3], q, [3, 3, 1, 1, 1, 1, 0, 0], 1.0)
    with pytest.raises(ValueError, match=r"^options is 2 values; allowed: "):
        _ops.neighborhood(q, q, q, None, None, None, *MASK, 1.0, [0, 0])
    with pytest.raises(ValueError, match=r"^query\.dtype"):
        _ops.dense_inference(*[torch.zeros(1, 4, 1, 8, dtype=torch.int64)] * 3, 0, -1, -1, 1.0)


# --- Derivatives -----------------------------------------------------------------------------------------------------


def of_tensors(function, tensors):
    """`function` of those tensors only that require gradients."""
    at = [i for i, x in enumerate(tensors) if x is not None and x.requires_grad]

    def inner(*given):
        full = list(tensors)
        for i, x in zip(at, given, strict=True):
            full[i] = x
        return function(full)

    return inner, tuple(tensors[i] for i in at)


@pytest.mark.parametrize("extra", [False, True])
def test_neighborhood_gradients(extra):
    function, given = of_tensors(lambda t: _ops.neighborhood(*t, *MASK, 0.3, []), neighborhood_tensors(extra))
    gradcheck(function, given, fast_mode=True)
    gradgradcheck(function, given, fast_mode=True)


@pytest.mark.parametrize("kind", DENSE)
def test_dense_gradients(kind):
    function, given = of_tensors(lambda t: _ops.dense(*t, *DENSE[kind], 0.3, []), dense_tensors(kind))
    gradcheck(function, given, fast_mode=True)
    gradgradcheck(function, given, fast_mode=True)


def test_merge_gradients():
    outputs, logsumexps = parts()
    n = len(outputs)
    gradcheck(lambda *x: _ops.merge(x[:n], x[n:]), (*outputs, *logsumexps))
    gradgradcheck(lambda *x: _ops.merge(x[:n], x[n:]), (*outputs, *logsumexps))


def test_third_derivative_equals_that_of_the_composite():
    tensors = neighborhood_tensors(True)

    def third(function):
        output, logsumexp = function()
        chosen = [x for x in tensors if x is not None]
        total = output.square().sum() + logsumexp.sin().sum()
        for _ in range(3):
            found = torch.autograd.grad(total, chosen, create_graph=True)
            total = sum(g.square().sum() for g in found)
        return total

    ours = third(lambda: _ops.neighborhood(*tensors, *MASK, 0.3, []))
    composed = third(lambda: composite.neighborhood(*tensors, *MASK, 0.3))
    torch.testing.assert_close(ours, composed)


def test_second_derivatives_where_one_input_comes_from_another():
    x = randn(1, 4, 5, 2, 3)

    def function(x):
        y = x * x.sigmoid()
        return _ops.neighborhood(x, y, y * x, None, None, None, *MASK, 0.3, [])

    gradcheck(function, (x,), fast_mode=True)
    gradgradcheck(function, (x,), fast_mode=True)


@pytest.mark.parametrize("used", ["output", "logsumexp"])
def test_gradient_of_one_result_alone(used):
    tensors = neighborhood_tensors(True)
    chosen = [x for x in tensors if x is not None]
    results = dict(zip(("output", "logsumexp"), _ops.neighborhood(*tensors, *MASK, 0.3, []), strict=True))
    composed = dict(zip(("output", "logsumexp"), composite.neighborhood(*tensors, *MASK, 0.3), strict=True))
    ours = torch.autograd.grad(results[used].sin().sum(), chosen, allow_unused=True)
    theirs = torch.autograd.grad(composed[used].sin().sum(), chosen, allow_unused=True)
    for got, expected, x in zip(ours, theirs, chosen, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(x) if expected is None else expected)


def test_only_wanted_gradients_are_computed():
    tensors = [x if i == 1 else x.detach() if x is not None else None for i, x in enumerate(neighborhood_tensors(True))]
    output, _ = _ops.neighborhood(*tensors, *MASK, 0.3, [])
    node = output.grad_fn
    assert [edge[0] is not None for edge in node.next_functions][:6] == [False, True, False, False, False, False]
    (output * 2).sum().backward()
    assert tensors[1].grad is not None


def test_expanded_and_strided_gradients():
    tensors = neighborhood_tensors(False)
    chosen = tensors[:3]
    output, _ = _ops.neighborhood(*tensors, *MASK, 0.3, [])
    some = randn(*output.shape, seed=7, grad=False)
    for grad in (some[:1, :1, :1, :1, :1].expand_as(output), some.mT.contiguous().mT, some[..., :1].expand_as(output)):
        got = torch.autograd.grad(output, chosen, grad, retain_graph=True)
        expected = torch.autograd.grad(output, chosen, grad.contiguous(), retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


# --- Strides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_strides_do_not_change_results(dtype):
    q, k, v = (x.to(dtype) for x in neighborhood_tensors(False, grad=False)[:3])
    expected = _ops.neighborhood(q, k, v, None, None, None, *MASK, 0.3, [])

    def fused(x):  # a slice of a larger projection
        return torch.cat([x, x + 1], -1)[..., : x.shape[-1]]

    def transposed(x):  # last dimension not contiguous
        return x.mT.contiguous().mT

    for layout in (fused, transposed, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        got = _ops.neighborhood(*(layout(x) for x in (q, k, v)), None, None, None, *MASK, 0.3, [])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_empty_tensors():
    for shape in ((0, 4, 5, 2, 3), (2, 0, 5, 2, 3)):
        q = torch.zeros(shape, requires_grad=True)
        output, logsumexp = _ops.neighborhood(q, q, q, None, None, None, *MASK, 0.3, [])
        assert output.shape == shape and logsumexp.shape == shape[:-1]
        output.sum().backward()
        assert q.grad.shape == shape


# --- Forward mode is the front end's: an operator alone must not drop a tangent silently ------------------------------


def test_operator_refuses_tangents():
    q, k, v = neighborhood_tensors(False)[:3]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises((RuntimeError, NotImplementedError)):
            _ops.neighborhood(dual, k, v, None, None, None, *MASK, 0.3, [])


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("kind", ["neighborhood", *DENSE, "merge"])
def test_tangents_of_gradients(kind, create_graph):
    """Forward over reverse where only what comes after the operator has tangents: gradients are linear in theirs."""
    if kind == "merge":
        outputs, logsumexps = parts()
        results, leaves = _ops.merge(outputs, logsumexps), [*outputs, *logsumexps]
    elif kind == "neighborhood":
        leaves = neighborhood_tensors(True)
        results = _ops.neighborhood(*leaves, *MASK, 0.3, [])
    else:
        tensors = dense_tensors(kind)
        results = _ops.dense(*tensors, *DENSE[kind], 0.3, [])
        leaves = [x for x in tensors if x is not None and x.requires_grad]
    grads = [randn(*x.shape, seed=20, grad=False) for x in results]
    tangents = [randn(*x.shape, seed=21, grad=False) for x in results]
    wanted = torch.autograd.grad(results, leaves, tangents, retain_graph=True)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(g, t) for g, t in zip(grads, tangents, strict=True)]
        found = torch.autograd.grad(results, leaves, duals, create_graph=create_graph)
        for gradient, tangent in zip(found, wanted, strict=True):
            torch.testing.assert_close(forward_ad.unpack_dual(gradient).tangent, tangent)
