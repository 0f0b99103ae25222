"""Packed sequences and key padding by lists in the memory of the GPU, against the oracle: one sequence after the other,
each a dense problem of its own. The same calls on the CPU, where lists are part of the problem, show without a GPU that
the pieces are put together rightly."""

import dataclasses
import random

import gpu_check
import gpu_oracle
import pytest
import torch
from gpu_lengths import GRADIENTS, Case, made, wanted
from gpu_problems import dense
from gpu_support import needs_gpu

import vicus
from vicus import _ops

CAUSAL = ("none", "top_left", "bottom_right")
DIMS = ((64, 64), (128, 128), (32, 32), (96, 40), (41, 23), (256, 256), (64, 128))


def lists(case, device):
    """Key lengths, and cumulative lengths of queries and keys: what the operators are given."""
    if not case.packed:
        return torch.tensor(case.k, dtype=torch.int32, device=device), None, None
    cumulative = [torch.tensor([0, *n], device=device).cumsum(0).int() for n in (case.q, case.k)]
    return None, *cumulative


def settings(case, longest=None):
    m = case.problem.mask
    longest = longest or ((max(case.q), max(case.k)) if case.packed else (0, 0))
    mask = gpu_check.CAUSAL[m.causal], m.window_left, m.window_right
    return *longest, *mask, case.problem.effective_scale


def run(case, t, given, deterministic, longest=None, engine="auto"):
    """Results, and gradients by that engine, by name."""
    inputs = [t.get(name) for name in GRADIENTS]
    wanted = sum(1 << i for i, x in enumerate(inputs) if x is not None)
    ways = settings(case, longest)
    with torch.no_grad():
        saved = _ops.dense(*inputs, None, *given, *ways, ())
        grads = _ops.dense_backward(
            *(t["grad_output"], t["grad_logsumexp"], *inputs, None, *given, *saved),
            *(*ways, gpu_check.options(deterministic, engine), wanted),
        )
    return {"output": saved[0], "logsumexp": saved[1]} | {
        f"gradient of {name}": g for name, g in zip(GRADIENTS, grads, strict=True) if name in t
    }


def check(case, device="cuda", ways=(True, False), engine="auto"):
    t = made(case, device)
    ref, noise = wanted(case, t)
    peer, _ = wanted(case, t, gpu_oracle.TYPES[case.problem.dtype])
    for deterministic in ways:
        got = run(case, t, lists(case, device), deterministic, engine=engine)
        assert got.keys() == ref.keys()
        for name, x in got.items():
            what = f"{name}, deterministic {deterministic}" if "gradient" in name else name
            gpu_check.compare(what, x, ref[name], peer[name], noise[name])


def random_case(seed, rest=True, dtypes=("bfloat16", "float16", "bfloat16", "float32", "float64")):
    """`rest`: whether tokens may follow the last packed sequence."""
    draw = random.Random(seed)
    dim, dim_v = draw.choice(DIMS)
    kv = draw.choice((1, 2, 3))
    causal = draw.choice(CAUSAL)
    mask = {
        "causal": causal,
        "left": draw.choice((-1, -1, 0, 17, 200)),
        "right": -1 if causal != "none" else draw.choice((-1, -1, 0, 33)),
        "heads": kv * draw.choice((1, 2, 4)),
        "kv": kv,
        "dim": dim,
        "dim_v": dim_v,
        "dtype": draw.choice(dtypes),
        "additional_tokens": draw.choice((0, 0, 1, 70)),
    }
    longest = draw.choice((5, 60, 300))
    count = draw.randint(1, 7)
    if seed % 3 == 0:
        keys = draw.randint(1, longest)
        lengths = [draw.choice((0, keys, draw.randint(0, keys))) for _ in range(count)]
        return Case(dense(draw.randint(1, longest), keys, batch=count, **mask), None, lengths, seed)
    q, k = ([draw.choice((0, 1, draw.randint(0, longest))) for _ in range(count)] for _ in range(2))
    more = draw.choice((0, 0, 13)) if rest else 0
    q[-1], k[-1] = max(q[-1], 1), max(k[-1], 1)
    return Case(dense(sum(q) + more, sum(k) + more, batch=1, **mask), q, k, seed)


@pytest.mark.parametrize("seed", range(30))
def test_pieces_are_put_together_as_the_cpu_engine_does(seed):
    check(random_case(seed, rest=False, dtypes=("float32", "float64")), "cpu", ways=(True,))


@needs_gpu
@pytest.mark.random_cases(100)
def test_random_lengths(seed):
    check(random_case(seed), engine=("auto", "sm80")[seed % 2])


PACKED = Case(dense(1200, 1500, "bottom_right", heads=8, kv=2, batch=1), [300, 0, 1, 500, 399], [300, 7, 0, 700, 493])
PADDED = Case(dense(500, 700, heads=8, kv=2, batch=4), None, [700, 0, 1, 345])
both = pytest.mark.parametrize("case", [PACKED, PADDED], ids=["packed", "padded"])


@needs_gpu
@both
def test_deterministic_to_the_bit(case):
    t, given = made(case, "cuda"), lists(case, "cuda")
    first = run(case, t, given, True)
    for _ in range(10):
        again = run(case, t, given, True)
        assert all(torch.equal(x, first[name]) for name, x in again.items())


@needs_gpu
def test_more_sequences_than_fit_into_one_wave():
    lengths = [n % 40 for n in range(3000)]
    check(Case(dense(sum(lengths), sum(lengths), "top_left", heads=2, batch=1), lengths, lengths), ways=(False,))


@needs_gpu
@both
def test_replayed_with_other_lists(case):
    t, given = made(case, "cuda"), lists(case, "cuda")
    longest = (600, 800) if case.packed else (0, 0)
    run(case, t, given, True, longest)  # every kernel is loaded by now
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case, t, given, True, longest)
    other = (
        dataclasses.replace(case, q=[0, 600, 20, 3, 400], k=[10, 800, 0, 3, 500])  # and tokens of no sequence
        if case.packed
        else dataclasses.replace(case, k=[3, 700, 699, 0])
    )
    for mine, new in zip(given, lists(other, "cuda"), strict=True):
        if mine is not None:
            mine.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    expected = run(other, t, lists(other, "cuda"), True, longest)
    assert all(torch.equal(x, expected[name]) for name, x in captured.items())
    check(other)


@needs_gpu
@pytest.mark.parametrize("seed", range(10))
def test_wrong_lists_touch_nothing_else(seed):
    case = PADDED if seed % 2 else PACKED
    t, draw = made(case, "cuda"), random.Random(seed)
    values = (-5, -(2**31), 2**31 - 1, 100, 700, 1500, 1501, 0)
    wrong = [
        None if x is None else torch.tensor([draw.choice(values) for _ in x], dtype=torch.int32, device="cuda")
        for x in lists(case, "cuda")
    ]
    before = {name: x.clone() for name, x in t.items()}
    for deterministic in (True, False):
        run(case, t, wrong, deterministic, (600, 800) if case.packed else None)
    torch.cuda.synchronize()  # raises where memory was touched that is none
    assert all(torch.equal(x, before[name]) for name, x in t.items())
    check(case)


@needs_gpu
def test_public_function_does_not_wait_and_is_the_operator():
    case = dataclasses.replace(PACKED, problem=dataclasses.replace(PACKED.problem, additional_tokens=0))
    t, (_, q, k) = made(case, "cuda"), lists(case, "cuda")
    tensors = [t[name] for name in GRADIENTS[:3]]
    mask = {"is_causal": True, "causal_alignment": "bottom_right", "return_lse": True}
    cumulative = {"cumulative_seqlen_Q": q, "cumulative_seqlen_KV": k}
    longest = {"max_seqlen_Q": max(case.q), "max_seqlen_KV": max(case.k)}
    expected = run(case, t, lists(case, "cuda"), True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = vicus.attention(*tensors, **cumulative, **longest, **mask, backend="sm80")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got[0], expected["output"]) and torch.equal(got[1], expected["logsumexp"])
    seqlens = {"seqlens_Q": q.diff(), "seqlens_KV": k.diff()}
    short = [tensors[0][:, : sum(case.q)], *(x[:, : sum(case.k)] for x in tensors[1:])]
    assert torch.equal(vicus.attention(*short, **seqlens, **mask)[0], got[0][:, : sum(case.q)])


@needs_gpu
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_public_function_takes_key_lengths(kind):
    t, (lengths, _, _) = made(PADDED, "cuda"), lists(PADDED, "cuda")
    tensors = [t[name] for name in GRADIENTS[:3]]
    wide = torch.stack([lengths, lengths], 1).to(kind)  # a column: not contiguous
    got = vicus.attention(*tensors, key_lengths=wide[:, 0], return_lse=True, backend="sm80")
    expected = run(PADDED, t, (lengths, None, None), True)
    assert torch.equal(got[0], expected["output"]) and torch.equal(got[1], expected["logsumexp"])


@needs_gpu
def test_compiled_for_any_lengths():
    compiled = torch.compile(vicus.attention, fullgraph=True, dynamic=True)
    for seed in (1, 2, 4):
        lengths = [n * seed for n in (30, 0, 50)]
        case = Case(dense(sum(lengths), sum(lengths), heads=4, batch=1), lengths, lengths, seed)
        t, (_, q, k) = made(case, "cuda"), lists(case, "cuda")
        tensors = [t[name] for name in GRADIENTS[:3]]
        packed = {"cumulative_seqlen_Q": q, "cumulative_seqlen_KV": k}
        packed |= {"max_seqlen_Q": max(lengths), "max_seqlen_KV": max(lengths)}
        assert torch.equal(compiled(*tensors, **packed), vicus.attention(*tensors, **packed))
