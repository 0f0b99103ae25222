"""Gradients by engine sm90 where its kernel of keys also sums that of the query: against the oracle, what must not
reach a query, and that nothing races. Needs a GPU of compute capability 9.0."""

import math

import pytest
import torch
from gpu_check import backward, check, forward
from gpu_oracle import seen_table
from gpu_problems import Case, dense, neighborhood, tensors, variations
from gpu_support import alone, needs_gpu
from test_gpu_boxes import HOPPER, friendly, refused, spoil

pytestmark = [needs_gpu, pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")]
RUNS = 200
SUMMED = {
    "dense": dense(500, 700, heads=4, kv=2, dim=128),
    "dense narrow": dense(500, 700, heads=4, kv=2, dim=64),
    "one query": dense(1, 700, heads=4, dim=128),
    "one key": dense(700, 1, "top_left", heads=4, dim=64),
    "causal": dense(700, 1100, "bottom_right", heads=6, kv=2, dim=128, dtype="float16"),
    "causal, more queries": dense(1100, 300, "bottom_right", heads=2, dim=64),
    "sliding": dense(900, 900, left=130, right=17, dim=128),
    "sliding, narrow": dense(900, 900, "bottom_right", left=130, dim=40),
    "odd dims": dense(333, 517, "top_left", heads=3, dim=72, dim_v=40, dtype="float16"),
    "wide values": dense(333, 517, dim=80, dim_v=128),
    "1d": neighborhood((900,), 99, 7, causal=1, heads=4, kv=1, dim=128),
    "2d": neighborhood((61, 75), (20, 33), (4, 3), causal=(0, 1), heads=4, kv=2, dim=128),
    "2d narrow": neighborhood((61, 75), (21, 32), heads=4, dim=64, dtype="float16"),
    "3d": neighborhood((9, 21, 27), (4, 9, 12), (1, 2, 4), causal=(1, 0, 0), heads=2, dim=128),
    "3d wide": neighborhood((6, 20, 20), (3, 10, 10), heads=2, dim=96, dim_v=64),
    "3d narrow": neighborhood((9, 21, 27), (4, 9, 12), (1, 2, 4), causal=(1, 0, 0), heads=4, kv=2, dim=64),
}
# Two kernels there, whatever is allowed.
APART = {
    "dilated": neighborhood((61, 75), (13, 15), dilation=(1, 2), dim=128),
    "more tokens": dense(500, 700, dim=128, additional_tokens=9),
    "narrow, wide values": dense(300, 300, dim=64, dim_v=128),
}


def kernels(p, deterministic):
    """How many kernels of each name a backward call has."""
    t = tensors(Case("", p))
    saved = forward(p, t)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        backward(p, t, saved, deterministic, "sm90")
        torch.cuda.synchronize()
    names = [event.name for event in seen.events()]
    return tuple(names.count(name) for name in ("sm90_backward", "convert"))


@alone  # the profiler sees what others do
@pytest.mark.parametrize("name", [*SUMMED, *APART])
def test_which_kernels(name):
    p = {**SUMMED, **APART}[name]
    assert kernels(p, False) == ((1, 1) if name in SUMMED else (2, 0))
    assert kernels(p, True) == (2, 0)


@pytest.mark.parametrize("name", SUMMED)
def test_against_the_oracle(name):
    for case in variations(Case(name, SUMMED[name], seed=7), 3):
        check(case, ways=(False,), engine="sm90")


@pytest.mark.random_cases(60)
def test_random_problem(seed):
    for case in variations(friendly(seed), 2):
        if not refused(case.problem):
            check(case, ways=(False,), engine="sm90")


def close(x, y):
    """As sums in another order are."""
    return bool((x - y).abs().max() <= 4 * torch.finfo(x.dtype).eps * y.abs().max())


@pytest.mark.parametrize("name", ["dense", "dense narrow", "causal", "2d", "3d"])
def test_runs_differ_in_the_order_of_sums_alone(name):
    p = SUMMED[name]
    t = tensors(Case(name, p, seed=1))
    saved = forward(p, t)
    first = backward(p, t, saved, False, "sm90")
    exact = backward(p, t, saved, True, "sm90")
    assert close(first["query"], exact["query"])
    for _ in range(RUNS):
        again = backward(p, t, saved, False, "sm90")
        assert close(again["query"], exact["query"])
        assert torch.equal(again["key"], first["key"]) and torch.equal(again["value"], first["value"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["causal", "sliding", "sliding, narrow", "1d", "2d", "2d narrow", "3d"])
def test_what_a_query_does_not_see_does_not_reach_its_gradient(name, value):
    p = SUMMED[name]
    t = tensors(Case(name, p, seed=2))
    clean = backward(p, t, forward(p, t), False, "sm90")["query"].flatten(1, len(p.layout))
    for token in (0, p.keys // 2, p.keys - 1):
        bad = {**t, "key": spoil(t["key"], token, value), "value": spoil(t["value"], token, value)}
        got = backward(p, bad, forward(p, bad), False, "sm90")["query"].flatten(1, len(p.layout))
        blind = ~seen_table(p, "cuda")[:, token]
        assert close(got[1:], clean[1:]), "another batch entry"
        if not blind.any():
            continue
        assert torch.isfinite(got[0][blind]).all()
        assert close(got[0][blind], clean[0][blind])
        assert blind.all() or torch.isnan(got[0][~blind]).any()


def test_replays_begin_with_cleared_sums():
    p = SUMMED["2d"]
    t = tensors(Case("replayed", p, seed=5))
    saved = forward(p, t)
    backward(p, t, saved, False, "sm90")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backward(p, t, saved, False, "sm90")
    for _ in range(3):
        t["grad_output"].normal_()
        graph.replay()
        assert close(captured["query"], backward(p, t, saved, True, "sm90")["query"])
