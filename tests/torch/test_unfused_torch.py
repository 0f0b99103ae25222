"""The unfused operators: values against the oracle, derivatives of every order and mode, tracing, errors."""

import functools
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck

from vicus import functional, legacy, unfused

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
import oracle_unfused
from oracle import Neighborhood, Problem

QK = {1: unfused.na1d_qk, 2: unfused.na2d_qk, 3: unfused.na3d_qk}
AV = {1: unfused.na1d_av, 2: unfused.na2d_av, 3: unfused.na3d_av}
FUSED = {1: functional.na1d, 2: functional.na2d, 3: functional.na3d}


class Case:
    """A problem and its tensors, heads first, float64 unless told otherwise."""

    def __init__(self, problem, seed=0, strided=False, dtype=torch.float64):
        self.problem = problem
        m = problem.mask
        self.rank = len(problem.layout)
        self.mask = {
            "kernel_size": tuple(m.kernel_size),
            "stride": tuple(m.stride),
            "dilation": tuple(m.dilation),
            "is_causal": tuple(map(bool, m.is_causal)),
        }
        generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

        def tensor(name):
            x = torch.randn(problem.shape(name), generator=generator, dtype=torch.float64).to(dtype)
            if name == "rpb":
                return x
            x = x.movedim(-2, 1)
            return x if strided else x.contiguous()

        names = ["query", "key", "value"]
        names += ["additional_keys", "additional_values"] if problem.additional_tokens else []
        names += ["rpb"] if problem.rpb else []
        self.tensors = {name: tensor(name) for name in names}
        slots = int(np.prod(m.kernel_size)) + problem.additional_tokens
        shape = (problem.batch, problem.heads, *problem.layout)
        self.attn = torch.randn(*shape, slots, generator=generator, dtype=torch.float64).to(dtype)
        self.grad_output = torch.randn(*shape, problem.head_dim_v, generator=generator, dtype=torch.float64).to(dtype)

    def qk(self, query, key, additional_keys=None, rpb=None):
        return QK[self.rank](query, key, additional_keys=additional_keys, rpb=rpb, **self.mask)

    def av(self, attn, value, additional_values=None):
        return AV[self.rank](attn, value, additional_values=additional_values, **self.mask)

    @property
    def qk_inputs(self):
        return {n: x for n, x in self.tensors.items() if n in ("query", "key", "additional_keys", "rpb")}

    @property
    def av_inputs(self):
        return {n: x for n, x in self.tensors.items() if n in ("value", "additional_values")}

    def attention(self, tensors):
        """Both halves around a softmax, of leaves in the order of `tensors`."""
        return lambda *x: self._attend(**dict(zip(tensors, x, strict=True)))

    def _attend(self, query, key, value, additional_keys=None, additional_values=None, rpb=None):
        return self.av(self.qk(query, key, additional_keys, rpb).softmax(-1), value, additional_values)


def problem(layout, window, step, dilation, causal, heads=(2, 1), dims=(2, 3), tokens=0, rpb=False, batch=2):
    mask = Neighborhood(list(window), list(step), list(dilation), list(causal))
    return Problem(list(layout), *heads, *dims, mask, "float64", batch, None, tokens, rpb)


PROBLEMS = {
    "1d": problem([5], [3], [1], [1], [0]),
    "1d-everything": problem([7], [3], [2], [2], [1], tokens=2, rpb=True),
    "1d-longer-than-the-axis": problem([4], [6], [1], [1], [0], rpb=True, tokens=1),
    "2d": problem([4, 3], [3, 2], [1, 1], [1, 1], [0, 0], heads=(2, 2)),
    "2d-everything": problem([4, 5], [2, 3], [2, 1], [2, 1], [0, 1], tokens=1, rpb=True),
    "2d-causal": problem([3, 4], [2, 3], [1, 3], [1, 1], [1, 1], heads=(3, 1), rpb=True),
    "3d-everything": problem([2, 3, 4], [2, 2, 3], [1, 2, 1], [1, 1, 2], [1, 0, 0], tokens=1, rpb=True, batch=1),
}
ALL = pytest.mark.parametrize("name", PROBLEMS)


@st.composite
def problems(draw):
    rank = draw(st.integers(1, 3))
    axes = []
    for _ in range(rank):
        n = draw(st.integers(1, (12, 6, 4)[rank - 1]))
        window = draw(st.integers(1, n + 2))
        axes.append((n, window, draw(st.integers(1, window)), draw(st.integers(1, n)), draw(st.integers(0, 1))))
    heads_kv = draw(st.integers(1, 2))
    heads = (heads_kv * draw(st.integers(1, 3)), heads_kv)
    dims = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    return problem(
        *zip(*axes, strict=True),
        heads=heads,
        dims=dims,
        tokens=draw(st.integers(0, 2)),
        rpb=draw(st.booleans()),
        batch=draw(st.integers(1, 2)),
    )


def close(ours, theirs):
    np.testing.assert_allclose(ours.numpy(force=True), theirs, rtol=1e-11, atol=1e-12)


# --- Values ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(problems(), st.booleans())
def test_oracle(p, strided):
    case = Case(p, strided=strided)
    inputs = {n: x.requires_grad_() for n, x in case.qk_inputs.items()}
    scores = case.qk(**inputs)
    arrays = {n: x.numpy(force=True) for n, x in case.tensors.items()}
    close(scores, oracle_unfused.qk_forward(p, arrays))
    scores.backward(case.attn)
    arriving = case.attn.numpy(force=True)
    for name, gradient in oracle_unfused.qk_backward(p, {n: arrays[n] for n in inputs}, arriving).items():
        close(inputs[name].grad, gradient)

    inputs = {"attn": case.attn.requires_grad_()} | {n: x.requires_grad_() for n, x in case.av_inputs.items()}
    output = case.av(**inputs)
    arrays["scores"] = case.attn.numpy(force=True)
    close(output, oracle_unfused.av_forward(p, arrays))
    output.backward(case.grad_output)
    named = {"scores": arrays["scores"]} | {n: arrays[n] for n in case.av_inputs}
    for name, gradient in oracle_unfused.av_backward(p, named, case.grad_output.numpy(force=True)).items():
        close(inputs["attn" if name == "scores" else name].grad, gradient)


@ALL
def test_equals_the_fused_function(name):
    case = Case(PROBLEMS[name])
    t = case.tensors
    scale = 0.3
    halves = case._attend(**(t | {"query": t["query"] * scale}))
    last = {n: x if n == "rpb" else x.movedim(1, -2) for n, x in t.items()}
    p = case.problem
    fits = all(w * d <= n for n, w, d in zip(p.layout, p.mask.kernel_size, p.mask.dilation, strict=True))
    strict = FUSED[case.rank] if fits and min(p.mask.kernel_size) > 1 else functional.neighborhood_attention
    for function in (strict, functional.neighborhood_attention):
        close(halves.movedim(1, -2), function(**last, **case.mask, scale=scale).numpy(force=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    exact, case = Case(PROBLEMS["2d-everything"]), Case(PROBLEMS["2d-everything"], dtype=dtype)
    scores, output = case.qk(**case.qk_inputs), case.av(case.attn, **case.av_inputs)
    assert scores.dtype == output.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(scores.double(), exact.qk(**exact.qk_inputs), rtol=8 * eps, atol=16 * eps)
    torch.testing.assert_close(output.double(), exact.av(exact.attn, **exact.av_inputs), rtol=8 * eps, atol=16 * eps)


def test_no_tokens_in_a_batch():
    q = torch.randn(0, 2, 5, 4, requires_grad=True)
    out = unfused.na1d_av(unfused.na1d_qk(q, q, 3).softmax(-1), q, 3)
    out.sum().backward()
    assert out.shape == q.shape == q.grad.shape


# --- Derivatives -----------------------------------------------------------------------------------------------------


@ALL
def test_first_and_second_derivatives(name):
    case = Case(PROBLEMS[name])
    leaves = [x.requires_grad_() for x in case.tensors.values()]
    function = case.attention(case.tensors)
    fast = case.rank > 1
    assert gradcheck(function, leaves, check_forward_ad=True, fast_mode=fast)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, fast_mode=fast)


@ALL
def test_scores_alone(name):
    """Slots that a softmax would weigh with zero: their scores are -inf, and no derivative leaks out of them."""
    case = Case(PROBLEMS[name])
    inputs = case.qk_inputs
    leaves = [x.requires_grad_() for x in inputs.values()]

    def function(*x):
        scores = case.qk(**dict(zip(inputs, x, strict=True)))
        return torch.where(scores.isneginf(), 0, scores)

    assert gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, fast_mode=True)


@ALL
def test_average_alone(name):
    case = Case(PROBLEMS[name])
    leaves = [x.requires_grad_() for x in (case.attn, *case.av_inputs.values())]
    assert gradcheck(case.av, leaves, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(case.av, leaves, check_fwd_over_rev=True, fast_mode=True)


def test_third_derivative():
    case = Case(PROBLEMS["1d-everything"])
    leaves = [x.requires_grad_() for x in case.tensors.values()]
    function = case.attention(case.tensors)

    def gradient(*x):
        return torch.autograd.grad(function(*x).square().sum(), x, create_graph=True)

    # On GPUs PyTorch's own index_add, which sums the bias's terms here, adds in no fixed order.
    assert gradgradcheck(gradient, leaves, fast_mode=True, nondet_tol=1e-10)


@pytest.mark.parametrize("chosen", [["query"], ["key"], ["rpb"], ["value"], ["additional_keys"], ["additional_values"]])
def test_some_tensors_only(chosen):
    case = Case(PROBLEMS["1d-everything"])
    leaves = [case.tensors[n].requires_grad_() for n in chosen]
    rest = {n: x for n, x in case.tensors.items() if n not in chosen}

    def function(*x):
        return case._attend(**rest, **dict(zip(chosen, x, strict=True)))

    assert gradcheck(function, leaves, check_forward_ad=True)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True)


def test_forward_over_reverse_without_a_graph():
    """Tangents that arrive in a backward pass must not be lost where it takes its short way."""
    case = Case(PROBLEMS["2d-everything"])
    function = case.attention(case.tensors)
    leaves = [x.requires_grad_() for x in case.tensors.values()]
    directions = [torch.randn_like(x) for x in leaves]
    first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    wanted = torch.autograd.grad(first, leaves, directions)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, d) for x, d in zip(leaves, directions, strict=True)]
        gradients = torch.autograd.grad(function(*duals).square().sum(), duals)
        for gradient, expected in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(forward_ad.unpack_dual(gradient).tangent, expected)


@pytest.mark.parametrize("name", ["1d-everything", "2d-everything", "2d-causal"])
def test_torch_func(name):
    case = Case(PROBLEMS[name])
    function = case.attention(case.tensors)
    leaves = list(case.tensors.values())

    def loss(*x):
        return function(*x).square().sum()

    at = tuple(range(len(leaves)))
    forward = torch.func.hessian(loss, at)(*leaves)
    backward = torch.func.jacrev(torch.func.jacrev(loss, at), at)(*leaves)
    plain = torch.autograd.functional.hessian(loss, tuple(leaves))
    for row, other, third in zip(forward, backward, plain, strict=True):
        for x, y, z in zip(row, other, third, strict=True):
            torch.testing.assert_close(x, z)
            torch.testing.assert_close(y, z)


@pytest.mark.parametrize("batched", [["query"], ["key", "additional_keys"], ["rpb"], ["query", "key", "value", "rpb"]])
def test_vmap(batched):
    case = Case(PROBLEMS["2d-everything"])
    stacked = {n: torch.stack([x, 2 * x, -x], 1) if n in batched else x for n, x in case.tensors.items()}
    function = case.attention(case.tensors)
    together = torch.func.vmap(function, tuple(1 if n in batched else None for n in stacked))(*stacked.values())
    for i in range(3):
        alone = function(*(x.select(1, i) if n in batched else x for n, x in stacked.items()))
        torch.testing.assert_close(together[i], alone)


# --- Tracing ---------------------------------------------------------------------------------------------------------


@ALL
def test_opcheck(name):
    case = Case(PROBLEMS[name])
    for x in (*case.tensors.values(), case.attn, case.grad_output):
        x.requires_grad_()
    mask = list(map(list, case.mask.values()))
    get = case.tensors.get
    qk = (get("query"), get("key"), get("additional_keys"), get("rpb"))
    av = (case.attn, get("value"), get("additional_values"))
    ops = torch.ops.vicus
    opcheck(ops.qk.default, (*qk, *mask))
    opcheck(ops.qk_backward.default, (*qk, case.attn, *mask, 15))
    opcheck(ops.qk_backward.default, (*qk, case.attn, *mask, 2))
    opcheck(ops.av.default, (*av, *mask))
    opcheck(ops.av_backward.default, (*av, case.grad_output, *mask, 7))
    opcheck(ops.av_backward.default, (*av, case.grad_output, *mask, 4))


@ALL
def test_operators_without_the_front_end(name):
    """What `torch.compile` records has the same derivatives, also of the backward operators."""
    case = Case(PROBLEMS[name])
    mask = list(map(list, case.mask.values()))
    get = case.tensors.get
    ops = torch.ops.vicus
    qk = [get("query"), get("key"), get("additional_keys"), get("rpb"), case.attn]
    av = [case.attn, get("value"), get("additional_values"), case.grad_output]
    for op, tensors, wanted in ((ops.qk_backward, qk, 15), (ops.av_backward, av, 7), (ops.qk_backward, qk, 2)):
        leaves = [x.requires_grad_() for x in tensors if x is not None]
        present = [i for i, x in enumerate(tensors) if x is not None]

        def function(*x, op=op, tensors=tensors, wanted=wanted, present=present):
            full = [None] * len(tensors)
            for i, leaf in zip(present, x, strict=True):
                full[i] = leaf
            return tuple(g for g in op(*full, *mask, wanted) if g.numel())

        assert gradcheck(function, leaves, fast_mode=True)
        assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["1d-everything", "2d-everything", "3d-everything"])
def test_compile(name):
    case = Case(PROBLEMS[name], dtype=torch.float32)
    leaves = [x.requires_grad_() for x in case.tensors.values()]
    function = case.attention(case.tensors)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    plain, traced = function(*leaves), compiled(*leaves)
    torch.testing.assert_close(traced, plain)
    gradient = torch.randn_like(plain)
    for x, y in zip(
        torch.autograd.grad(plain, leaves, gradient), torch.autograd.grad(traced, leaves, gradient), strict=True
    ):
        torch.testing.assert_close(x, y)


def test_compile_with_dynamic_sizes():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q: unfused.na2d_qk(q, q, 3, 2), fullgraph=True, dynamic=True, backend=counter)
    for shape in ((5, 2, 7, 9, 4), (3, 2, 6, 11, 4), (4, 2, 8, 8, 4)):
        q = torch.randn(shape)
        torch.testing.assert_close(compiled(q), unfused.na2d_qk(q, q, 3, 2))
    assert counter.frame_count == 1


def test_checkpoint():
    case = Case(PROBLEMS["2d-everything"])
    leaves = [x.requires_grad_() for x in case.tensors.values()]
    function = case.attention(case.tensors)
    once = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    again = torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False)
    for x, y in zip(once, torch.autograd.grad(again.square().sum(), leaves), strict=True):
        assert torch.equal(x, y)


def test_autocast():
    q = torch.randn(1, 2, 6, 4, requires_grad=True)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        scores = unfused.na1d_qk(q, q.bfloat16(), 3, rpb=torch.zeros(2, 5))
        output = unfused.na1d_av(scores.softmax(-1), q, 3)
        assert unfused.na1d_qk(q.double(), q.double(), 3).dtype == torch.float64
    assert scores.dtype == output.dtype == torch.bfloat16
    output.sum().backward()
    assert q.grad.dtype == torch.float32


# --- Errors ----------------------------------------------------------------------------------------------------------

Q = torch.randn(1, 2, 6, 7, 4)
ERRORS = {
    "rank of query": (ValueError, "query", lambda: unfused.na1d_qk(Q, Q, 3)),
    "no key": (ValueError, "key", lambda: unfused.na2d_qk(Q, None, 3)),
    "query is a list": (ValueError, "query", lambda: unfused.na2d_qk([Q], Q, 3)),
    "layout of key": (ValueError, "key", lambda: unfused.na2d_qk(Q, Q[:, :, :5], 3)),
    "heads of key": (ValueError, "heads", lambda: unfused.na2d_qk(Q, Q.repeat(1, 2, 1, 1, 1), 3)),
    "head_dim of key": (ValueError, "shape", lambda: unfused.na2d_qk(Q, Q[..., :3], 3)),
    "dtype of key": (ValueError, "key.dtype", lambda: unfused.na2d_qk(Q, Q.double(), 3)),
    "integers": (ValueError, "dtype", lambda: unfused.na2d_qk(Q.int(), Q.int(), 3)),
    "sparse": (NotImplementedError, "key", lambda: unfused.na2d_qk(Q, Q.to_sparse(), 3)),
    "kernel_size": (ValueError, "kernel_size", lambda: unfused.na2d_qk(Q, Q, 0)),
    "kernel_size per axis": (ValueError, "kernel_size", lambda: unfused.na2d_qk(Q, Q, (3, 3, 3))),
    "dilation": (ValueError, "dilation", lambda: unfused.na2d_qk(Q, Q, 3, 0)),
    "stride": (ValueError, "stride", lambda: unfused.na2d_qk(Q, Q, 3, stride=4)),
    "is_causal": (ValueError, "is_causal", lambda: unfused.na2d_qk(Q, Q, 3, is_causal="yes")),
    "rpb": (ValueError, "rpb", lambda: unfused.na2d_qk(Q, Q, 3, rpb=torch.zeros(2, 5, 7))),
    "additional_keys": (ValueError, "additional_keys", lambda: unfused.na2d_qk(Q, Q, 3, additional_keys=Q)),
    "slots": (ValueError, "shape", lambda: unfused.na2d_av(Q.new_zeros(1, 2, 6, 7, 9), Q, 5)),
    "no tokens for the slots": (ValueError, "shape", lambda: unfused.na2d_av(Q.new_zeros(1, 2, 6, 7, 11), Q, 3)),
    "legacy: even": (ValueError, "kernel_size", lambda: legacy.natten2dqk(Q, Q, 4, 1)),
    "legacy: one": (ValueError, "kernel_size", lambda: legacy.natten2dqk(Q, Q, 1, 1)),
    "legacy: larger than the axis": (ValueError, "kernel_size", lambda: legacy.natten2dqkrpb(Q, Q, None, 3, 3)),
    "legacy: too many sizes": (TypeError, "sizes", lambda: legacy.natten3dqk(Q[None], Q[None], 3, 3, 1)),
    "legacy: half of a form": (TypeError, "sizes", lambda: legacy.natten3dqk(Q, Q, kernel_size_d=3, kernel_size=5)),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    error, argument, call = ERRORS[name]
    with pytest.raises(error, match=argument):
        call()


# --- Earlier names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_legacy_names(rank):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, *(6, 7, 8)[:rank], 4).unbind()
    rpb = torch.randn(2, *[5] * rank)
    qk, qkrpb, av = (getattr(legacy, f"natten{rank}d{what}") for what in ("qk", "qkrpb", "av"))
    scores = QK[rank](q, k, 3, 2, rpb=rpb)
    assert torch.equal(qkrpb(q, k, rpb, 3, 2), scores)
    assert torch.equal(qk(q, k, 3, 2), QK[rank](q, k, 3, 2))
    assert torch.equal(qkrpb(q, k, None, 3, 2), QK[rank](q, k, 3, 2))
    assert torch.equal(av(scores, v, 3, 2), AV[rank](scores, v, 3, 2))
    assert torch.equal(qk(q, k, kernel_size=3, dilation=2), QK[rank](q, k, 3, 2))


def test_legacy_3d_form():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 6, 7, 4).unbind()
    rpb = torch.randn(2, 9, 5, 5)
    scores = unfused.na3d_qk(q, k, (5, 3, 3), (1, 2, 2), rpb=rpb)
    assert torch.equal(legacy.natten3dqkrpb(q, k, rpb, 5, 3, 1, 2), scores)
    named = {"kernel_size_d": 5, "kernel_size": 3, "dilation_d": 1, "dilation": 2}
    assert torch.equal(legacy.natten3dqkrpb(q, k, rpb, **named), scores)
    assert torch.equal(legacy.natten3dqk(q, k, 5, 3, 1, 2), unfused.na3d_qk(q, k, (5, 3, 3), (1, 2, 2)))
    assert torch.equal(legacy.natten3dav(scores, v, 5, 3, 1, 2), unfused.na3d_av(scores, v, (5, 3, 3), (1, 2, 2)))


def test_threads_share_nothing():
    case = Case(PROBLEMS["2d-everything"])
    function = functools.partial(case.qk, **case.qk_inputs)
    expected = function()
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: function(), range(32)):
            assert torch.equal(result, expected)
