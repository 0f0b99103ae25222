"""Gradients of packed sequences and key lengths by engine sm90, asked for by name: against the oracle, and what must
not reach a sequence. Needs a GPU of compute capability 9.0."""

import dataclasses
import math
import random

import pytest
import torch
from gpu_problems import HALF, dense
from gpu_support import alone, needs_gpu
from test_gpu_boxes import HOPPER
from test_gpu_varlen import PACKED, PADDED, Case, check, lists, made, random_case, run

pytestmark = [needs_gpu, pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")]
DIMS = ((64, 64), (128, 128), (40, 40), (72, 128), (192, 128), (128, 64), (256, 256), (160, 192))
MIXED = [130, 0, 1, 333, 64, 128, 20], [200, 7, 0, 333, 1, 257, 64]


def by_boxes(case, deterministic, engine="auto"):
    """Whether the kernels of engine sm90 compute the gradients: both of them, or that of keys alone."""
    t, given = made(case, "cuda"), lists(case, "cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        run(case, t, given, deterministic, engine=engine)
        torch.cuda.synchronize()
    names = [event.name for event in seen.events()]
    assert any("backward" in name for name in names), names
    return sum("sm90_backward" in name for name in names) == (2 if deterministic else 1)


def same(name, x, y, deterministic):
    """To the bit, but for what is summed in no fixed order."""
    if deterministic or name != "gradient of query":
        assert torch.equal(x, y)
    elif x.numel():
        assert (x - y).abs().max() <= 4 * torch.finfo(x.dtype).eps * y.abs().max()


CASES = {
    "full": Case(dense(676, 862, heads=4, kv=2, dim=128, batch=1), *MIXED),
    "top left": Case(dense(676, 862, "top_left", heads=2, dim=64, batch=1), *MIXED),
    "bottom right, tokens of none": Case(dense(700, 900, "bottom_right", heads=6, kv=2, dim=128, batch=1), *MIXED),
    "sliding": Case(dense(690, 862, left=70, right=9, heads=3, kv=1, dim=72, dtype="float16", batch=1), *MIXED),
    "sliding, causal, wide": Case(dense(676, 870, "bottom_right", left=100, dim=192, dim_v=128, batch=1), *MIXED),
    "more tokens": Case(dense(676, 862, "top_left", heads=4, kv=2, batch=1, additional_tokens=33), *MIXED),
    "one sequence": Case(dense(900, 900, "bottom_right", dim=128, batch=1), [900], [900]),
    "only single tokens": Case(dense(70, 70, heads=8, kv=1, batch=1), [1] * 70, [1] * 70),
    "whole tiles": Case(dense(640, 640, "top_left", dim=128, batch=1), [128, 256, 256], [128, 256, 256]),
    "no keys at all": Case(dense(300, 5, batch=1), [100, 150, 50], [0, 0, 0]),
    "wide": Case(dense(676, 862, "bottom_right", heads=4, kv=2, dim=256, batch=1), *MIXED),
    "padded": Case(dense(400, 700, heads=4, kv=2, dim=128, batch=5), None, [700, 0, 1, 345, 128]),
    "padded, top left": Case(dense(300, 200, "top_left", heads=4, batch=3, dtype="float16"), None, [200, 0, 77]),
    "padded, bottom right": Case(dense(300, 500, "bottom_right", heads=2, kv=1, batch=3), None, [500, 250, 3]),
    "padded, sliding": Case(dense(300, 300, left=30, right=40, dim=192, dim_v=128, batch=2), None, [300, 100]),
    "padded, wide": Case(dense(300, 300, left=30, right=40, dim=256, dim_v=192, batch=2), None, [300, 100]),
    "padded, more tokens": Case(dense(130, 200, heads=4, kv=2, dim=128, batch=2, additional_tokens=9), None, [0, 190]),
    "padded, one query": Case(dense(1, 1000, heads=8, kv=2, dim=128, batch=4), None, [1000, 999, 0, 1]),
}


@pytest.mark.parametrize("name", CASES)
def test_lengths_of_all_kinds(name):
    check(CASES[name], engine="sm90")


@pytest.mark.random_cases(60)
def test_random_lengths(seed):
    case, (dim, dim_v) = random_case(seed, dtypes=HALF), random.Random(seed).choice(DIMS)
    problem = dataclasses.replace(case.problem, head_dim=dim, head_dim_v=dim_v)
    check(dataclasses.replace(case, problem=problem), ways=(seed % 2 == 0,), engine="sm90")


def test_more_sequences_than_fit_into_one_wave():
    lengths = [n % 40 for n in range(600)]
    case = Case(dense(sum(lengths), sum(lengths), "top_left", heads=2, batch=1), lengths, lengths)
    check(case, ways=(False,), engine="sm90")


@alone  # the profiler sees what others do
def test_taken_where_nothing_is_asked_for():
    lengths = [1500, 0, 1300]
    long = Case(dense(2800, 2800, "top_left", heads=2, batch=1), lengths, lengths)
    assert all(by_boxes(long, way) for way in (True, False))
    assert by_boxes(PADDED, True) and not by_boxes(PADDED, False), "what is in padding would reach sums"
    assert not by_boxes(long, True, "sm80")


@pytest.mark.parametrize("case", [PACKED, PADDED], ids=["packed", "padded"])
@pytest.mark.parametrize("causal", ["none", "bottom_right"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("way", [True, False], ids=["deterministic", "summed"])
def test_neighbours_do_not_reach_each_other(case, causal, dim, way):
    mask = dataclasses.replace(case.problem.mask, causal=causal)
    case = dataclasses.replace(case, problem=dataclasses.replace(case.problem, mask=mask, head_dim=dim, head_dim_v=dim))
    t, given = made(case, "cuda"), lists(case, "cuda")
    clean = run(case, t, given, way, engine="sm90")
    for i, (b, q, k) in enumerate(case.pieces()):
        bad = {name: x.clone() for name, x in t.items()}
        if case.packed:
            for name, x in bad.items():
                x[b, k if name in ("key", "value") else q] = math.nan
        else:
            bad["key"][b, k.stop :] = bad["value"][b, k.stop :] = math.nan
        got = run(case, bad, given, way, engine="sm90")
        for j, (b2, q2, k2) in enumerate(case.pieces()):
            if case.packed and i == j:
                continue
            for name, x in got.items():
                of_keys = name in ("gradient of key", "gradient of value")
                here = slice(None) if not case.packed else k2 if of_keys else q2
                same(name, x[b2, here], clean[name][b2, here], way)
        if not case.packed:
            assert not got["gradient of key"][b, k.stop :].any() and not got["gradient of value"][b, k.stop :].any()


@pytest.mark.parametrize("way", [True, False], ids=["deterministic", "summed"])
def test_memory_that_no_sequence_holds_may_be_anything(way):
    """And its gradients are zeros."""
    problem = dense(1300, 1700, "bottom_right", heads=8, kv=2, dim=128, batch=1)
    case = dataclasses.replace(PACKED, problem=problem)
    t, given = made(case, "cuda"), lists(case, "cuda")
    clean = run(case, t, given, way, engine="sm90")
    for name, x in t.items():
        x[:, sum(case.k if name in ("key", "value") else case.q) :] = math.nan
    got = run(case, t, given, way, engine="sm90")
    for name, x in got.items():
        same(name, x, clean[name], way)
    for name, end in (("query", sum(case.q)), ("key", sum(case.k)), ("value", sum(case.k))):
        assert not got[f"gradient of {name}"][:, end:].any()


@pytest.mark.parametrize("case", [PACKED, PADDED], ids=["packed", "padded"])
def test_replayed_with_other_lists(case):
    t, given = made(case, "cuda"), lists(case, "cuda")
    longest = (600, 800) if case.packed else (0, 0)
    first = run(case, t, given, True, longest, engine="sm90")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case, t, given, True, longest, engine="sm90")
    for other in (
        case,
        dataclasses.replace(case, q=[600, 0, 20, 3, 400], k=[10, 800, 0, 3, 500])
        if case.packed
        else dataclasses.replace(case, k=[3, 700, 699, 0]),
    ):
        for mine, new in zip(given, lists(other, "cuda"), strict=True):
            if mine is not None:
                mine.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        expected = first if other is case else run(other, t, lists(other, "cuda"), True, longest, engine="sm90")
        assert all(torch.equal(x, expected[name]) for name, x in captured.items())
