"""The unfused operators and the merge of parts on a GPU, forward and backward, against a float64 oracle. Needs a GPU,
PyTorch and the built package, nothing else."""

import math
import os
import random

import pytest
import torch
import unfused_oracle
from gpu_oracle import rpb_places
from gpu_problems import neighborhood
from gpu_support import needs_gpu
from unfused_oracle import assert_close

import vicus
from vicus import unfused

pytestmark = needs_gpu
DEVICE = torch.device("cuda")
SEED = int(os.environ.get("VICUS_SEED", "0"))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
QK = {1: unfused.na1d_qk, 2: unfused.na2d_qk, 3: unfused.na3d_qk}
AV = {1: unfused.na1d_av, 2: unfused.na2d_av, 3: unfused.na3d_av}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(SEED)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # of the oracle; ours has no such switch
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def lse_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def randn(*shape, dtype):
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE).to(dtype)


def check(function, oracle, tensors):
    """Result and gradients of `function(*tensors)` against `oracle(*tensors, dtype=)`."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    result = function(*leaves)
    arriving = randn(*result.shape, dtype=result.dtype)
    found = [result, *torch.autograd.grad(result, [x for x in leaves if x is not None], arriving)]
    expected = []
    for precision in (torch.float64, result.dtype):
        twins = [None if x is None else x.detach().to(precision).requires_grad_() for x in tensors]
        wanted = oracle(*twins, dtype=precision)
        finite = wanted.masked_fill(wanted.detach().isinf(), 0)
        total = (finite * arriving.to(precision).reshape(wanted.shape)).sum()
        expected.append([wanted, *torch.autograd.grad(total, [x for x in twins if x is not None])])
    for i, (got, reference, plain) in enumerate(zip(found, *expected, strict=True)):
        name = "result" if i == 0 else f"gradient {i - 1}"
        assert_close(name, got, reference, plain)


def random_problem(seed):
    choose = random.Random(seed)
    rank = choose.choice([1, 2, 2, 3])
    layout = [choose.randint(2, {1: 50, 2: 13, 3: 6}[rank]) for _ in range(rank)]
    window = [choose.randint(1, min(n + 1, 9)) for n in layout]
    step = [choose.randint(1, w) if choose.random() < 0.4 else 1 for w in window]
    dilation = [choose.randint(1, 3) if choose.random() < 0.4 else 1 for _ in layout]
    return {
        "layout": layout,
        "mask": (window, step, dilation, [choose.random() < 0.3 for _ in layout]),
        "heads": choose.choice([(1, 1), (2, 1), (4, 2), (3, 3)]),
        "dim": choose.choice([64, 32, 24, 41, 7, 1, 128, 520]),
        "dtype": choose.choice(DTYPES),
        "tokens": choose.choice([0, 0, 5]),
        "rpb": choose.random() < 0.5,
    }


FIXED = [
    {
        "layout": layout,
        "mask": mask,
        "heads": (4, 2),
        "dim": dim,
        "dtype": dtype,
        "tokens": 5,
        "rpb": True,
    }
    for dtype in DTYPES
    for layout, mask, dim in [
        ([12, 14], ([5, 7], [1, 1], [1, 1], [False, False]), 64),
        ([5, 6, 7], ([3, 3, 4], [1, 2, 1], [1, 2, 1], [True, False, False]), 24),
        ([37], ([50], [3], [2], [False]), 41),
    ]
]


@pytest.mark.parametrize("problem", [*FIXED, *map(random_problem, range(SEED, SEED + 40))], ids=range(len(FIXED) + 40))
def test_scores_and_averages(problem):
    print(f"VICUS_SEED={SEED}: {problem}")
    layout, mask, (heads, heads_kv), dim, dtype, tokens, rpb = problem.values()
    rank, batch = len(layout), 2
    window, step, dilation, causal = map(tuple, mask)
    index = unfused_oracle.slots(layout, mask, DEVICE)
    pairs = rpb_places(neighborhood(layout, *mask), DEVICE).gather(1, index.clamp(min=0))
    more = {"dilation": dilation, "is_causal": causal, "stride": step}
    query = randn(batch, heads, *layout, dim, dtype=dtype)
    key = randn(batch, heads_kv, *layout, dim, dtype=dtype)
    extra = randn(batch, heads_kv, tokens, dim, dtype=dtype) if tokens else None
    table = randn(heads, *(2 * w - 1 for w in window), dtype=dtype) if rpb else None
    flat = lambda x: x.flatten(2, -2)  # noqa: E731

    def qk(query, key, extra, table):
        return QK[rank](query, key, window, additional_keys=extra, rpb=table, **more)

    def qk_oracle(query, key, extra, table, dtype):
        bias = None if table is None else table.flatten(1)[:, pairs]
        return unfused_oracle.scores(flat(query), flat(key), index, extra, bias, dtype=dtype)

    check(qk, qk_oracle, [query, key, extra, table])

    def av(weights, value, extra):
        return AV[rank](weights, value, window, additional_values=extra, **more)

    def av_oracle(weights, value, extra, dtype):
        return unfused_oracle.average(flat(weights), flat(value), index, extra, dtype=dtype)

    check(av, av_oracle, [randn(batch, heads, *layout, math.prod(window) + tokens, dtype=dtype), key, extra])


def test_any_strides():
    fused = randn(2, 3, 9, 10, 3, 16, dtype=torch.float32)
    query, key, value = (fused[..., i, :] for i in range(3))
    scores = vicus.na2d_qk(query, key, 5)
    assert torch.equal(scores, vicus.na2d_qk(query.contiguous(), key.contiguous(), 5))
    output = vicus.na2d_av(scores.softmax(-1), value, 5)
    assert torch.equal(output, vicus.na2d_av(scores.softmax(-1), value.contiguous(), 5))
    tokens_last = randn(2, 3, 16, 9, 10, dtype=torch.float32).movedim(2, -1)
    assert torch.equal(vicus.na2d_qk(tokens_last, key, 5), vicus.na2d_qk(tokens_last.contiguous(), key, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_reaches_only_what_sees_it(dtype):
    query, key = (randn(1, 1, 20, 20, 8, dtype=dtype) for _ in range(2))
    clean = vicus.na2d_qk(query, key, 5)
    spoiled = key.clone()
    spoiled[0, 0, 7, 9] = torch.nan
    found = vicus.na2d_qk(query, spoiled, 5)
    index = unfused_oracle.slots((20, 20), ((5, 5), (1, 1), (1, 1), (False, False)), DEVICE).reshape(20, 20, 25)
    bad = index == 7 * 20 + 9
    assert found[0, 0][bad].isnan().all() and torch.equal(found[0, 0][~bad], clean[0, 0][~bad])
    weights = clean.softmax(-1)
    averages, wanted = vicus.na2d_av(weights, spoiled, 5)[0, 0], vicus.na2d_av(weights, key, 5)[0, 0]
    touched = bad.any(-1)
    # With tensor cores, rows beside such a row are computed another way.
    rounding = 4 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
    assert averages[touched].isnan().any(-1).all()
    assert torch.allclose(averages[~touched], wanted[~touched], rtol=rounding, atol=rounding)
    grads = torch.zeros_like(spoiled)
    grads[0, 0, 7, 9] = torch.inf
    spread = torch.autograd.grad(vicus.na2d_av(weights, leaf := key.clone().requires_grad_(), 5), leaf, grads)[0][0, 0]
    seen = torch.zeros(400, dtype=torch.bool, device=DEVICE).index_fill(0, index[7, 9], True).view(20, 20)
    assert not spread[seen].isfinite().any() and not spread[~seen].any()


def test_bits_are_the_same_in_every_run():
    query, key = (randn(2, 4, 20, 20, 32, dtype=torch.float32) for _ in range(2))
    table = randn(4, 13, 13, dtype=torch.float32)
    extra = randn(2, 4, 6, 32, dtype=torch.float32)
    grad = randn(2, 4, 20, 20, 55, dtype=torch.float32)

    def run():
        leaves = [x.detach().requires_grad_() for x in (query, key, extra, table)]
        scores = vicus.na2d_qk(*leaves[:2], 7, additional_keys=leaves[2], rpb=leaves[3])
        return [scores, *torch.autograd.grad(scores, leaves, grad)]

    first = run()
    for _ in range(20):
        for a, b in zip(first, run(), strict=True):
            assert torch.equal(a, b)


def test_derivatives_of_every_order():
    query, key = (randn(1, 2, 4, 5, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    table = randn(2, 5, 5, dtype=torch.float64).requires_grad_()
    function = lambda q, k, b: vicus.na2d_av(vicus.na2d_qk(q, k, 3, rpb=b).softmax(-1), k, 3)  # noqa: E731
    assert torch.autograd.gradcheck(function, (query, key, table))
    assert torch.autograd.gradgradcheck(function, (query, key, table))


# --- Merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("parts", "shape", "dim"),
    [(1, (2, 33, 3), 64), (2, (2, 33, 3), 64), (16, (2, 33, 3), 64), (17, (2, 9, 3), 64), (40, (2, 33, 3), 64),
     (3, (2, 3, 4, 5, 2), 41), (2, (1, 9, 2), 520), (2, (70000, 1, 1), 8)],
)  # fmt: skip
def test_merge(dtype, parts, shape, dim):
    outputs = [randn(*shape, dim, dtype=dtype) for _ in range(parts)]
    logsumexps = [2 * randn(*shape, dtype=lse_dtype(dtype)) for _ in range(parts)]
    for output, logsumexp in zip(outputs, logsumexps, strict=True):
        hole = torch.rand(shape, device=DEVICE) < 0.3
        logsumexp[hole] = -torch.inf
        output[hole] = torch.nan
    leaves = [x.requires_grad_() for x in (*outputs, *logsumexps)]
    found = torch.ops.vicus.merge(leaves[:parts], leaves[parts:])
    arriving = [randn(*x.shape, dtype=x.dtype) for x in found]
    arriving[1] = arriving[1].masked_fill(found[1].isinf(), 0)
    results = [*found, *torch.autograd.grad(found, leaves, arriving)]
    expected = []
    for precision in (torch.float64, dtype):
        twins = [x.detach().to(precision).requires_grad_() for x in leaves]
        wanted = unfused_oracle.merged(twins[:parts], twins[parts:], precision)
        total = sum(
            (w.masked_fill(w.isinf(), 0) * a.to(precision)).sum() for w, a in zip(wanted, arriving, strict=True)
        )
        expected.append([*wanted, *(g.nan_to_num(nan=0.0) for g in torch.autograd.grad(total, twins))])
    for i, (got, reference, plain) in enumerate(zip(results, *expected, strict=True)):
        assert_close(f"result {i}", got, reference, plain)
    again = torch.autograd.grad(torch.ops.vicus.merge(leaves[:parts], leaves[parts:]), leaves, arriving)
    assert all(torch.equal(a, b) for a, b in zip(results[2:], again, strict=True))


def test_merging_is_attention_to_all_keys():
    query, key, value = (randn(2, 40, 4, 64, dtype=torch.float32) for _ in range(3))
    parts = [vicus.attention(query, key[:, i : i + 8], value[:, i : i + 8], return_lse=True) for i in range(0, 40, 8)]
    whole = vicus.attention(query, key, value, return_lse=True)
    for got, want in zip(vicus.merge_attentions(*zip(*parts, strict=True)), whole, strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)
