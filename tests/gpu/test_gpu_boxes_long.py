"""Gradients of long head dims by engine sm90, which has a kernel for each of them: against the oracle, what must not
reach a row, and that nothing races. Needs a GPU of compute capability 9.0."""

import dataclasses
import math
import random

import pytest
import torch
from gpu_check import backward, check, forward
from gpu_oracle import seen_table
from gpu_problems import Case, dense, neighborhood, tensors, variations
from gpu_support import alone, needs_gpu
from test_gpu_boxes import HOPPER, friendly, refused, spoil

pytestmark = [needs_gpu, pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")]
RUNS = 200
DIMS = ((256, 256), (192, 192), (160, 256), (256, 64), (48, 208), (176, 240))
LONG = {
    "dense": dense(900, 1100, heads=4, kv=2, dim=256),
    "one query": dense(1, 700, heads=4, dim=256),
    "one key": dense(700, 1, "top_left", heads=4, dim=192),
    "causal": dense(700, 1100, "bottom_right", heads=6, kv=2, dim=256, dtype="float16"),
    "causal, rows without keys": dense(1100, 300, "bottom_right", heads=2, dim=200, dim_v=152),
    "sliding": dense(900, 900, left=130, right=17, dim=256),
    "long values": dense(333, 517, "top_left", heads=3, dim=40, dim_v=200, dtype="float16"),
    "more tokens": dense(500, 700, dim=256, additional_tokens=9),
    "more tokens, plain": dense(100, 170, dim=48, dim_v=208, additional_tokens=9),
    "1d": neighborhood((900,), 99, 7, dilation=2, causal=1, heads=4, kv=1, dim=256),
    "2d": neighborhood((61, 75), (20, 33), (4, 3), causal=(0, 1), heads=4, kv=2, dim=256),
    "2d, dilated": neighborhood((61, 75), (13, 15), dilation=(1, 2), dim=192, additional_tokens=5),
    "3d": neighborhood((9, 21, 27), (4, 9, 12), (1, 2, 4), causal=(1, 0, 0), heads=2, dim=256),
    "3d, small windows": neighborhood((6, 20, 20), (3, 5, 5), dilation=(1, 1, 2), heads=2, dim=208, dtype="float16"),
}


@alone  # the profiler sees what others do
@pytest.mark.parametrize("deterministic", [True, False])
def test_which_kernels(deterministic):
    for p, count in ((LONG["dense"], 3), (LONG["3d"], 3), (dense(300, 300, dim=192, dim_v=128), 2)):
        t = tensors(Case("", p))
        saved = forward(p, t)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            backward(p, t, saved, deterministic, "sm90")
            torch.cuda.synchronize()
        assert sum("sm90_backward" in event.name for event in seen.events()) == count


@pytest.mark.parametrize("name", LONG)
def test_against_the_oracle(name):
    for case in variations(Case(name, LONG[name], seed=7), 3):
        check(case, ways=(True,), engine="sm90")


@pytest.mark.random_cases(60)
def test_random_problem(seed):
    dim, dim_v = random.Random(seed).choice(DIMS)
    for case in variations(friendly(seed), 2):
        case = dataclasses.replace(case, problem=dataclasses.replace(case.problem, head_dim=dim, head_dim_v=dim_v))
        if not refused(case.problem):
            check(case, ways=(seed % 2 == 0,), engine="sm90")


@pytest.mark.parametrize("name", ["dense", "causal", "2d", "3d"])
def test_runs_are_equal_to_the_bit(name):
    p = LONG[name]
    t = tensors(Case(name, p, seed=1))
    saved = forward(p, t)
    first = backward(p, t, saved, True, "sm90")
    for i in range(RUNS):
        again = backward(p, t, saved, i % 2 == 0, "sm90")
        assert all(torch.equal(x, first[name]) for name, x in again.items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["causal", "sliding", "1d", "2d", "3d"])
def test_what_a_row_does_not_see_does_not_reach_its_gradients(name, value):
    p = LONG[name]
    t = tensors(Case(name, p, seed=2)) | {"grad_logsumexp": None}
    clean = backward(p, t, forward(p, t), True, "sm90")
    flat = {of: x.flatten(1, len(p.layout)) for of, x in clean.items()}
    seen = seen_table(p, "cuda")
    for token in (0, p.keys // 2, p.keys - 1):
        bad = {**t, "key": spoil(t["key"], token, value), "value": spoil(t["value"], token, value)}
        found = backward(p, bad, forward(p, bad), True, "sm90")
        found = {of: x.flatten(1, len(p.layout)) for of, x in found.items()}
        blind = ~seen[:, token]
        assert all(torch.equal(x[1:], flat[of][1:]) for of, x in found.items()), "another batch entry"
        assert close(found["query"][0][blind], flat["query"][0][blind])
        # Keys whose queries are all blind to it.
        apart = ~seen[~blind].any(0)
        for of in ("key", "value"):
            assert close(found[of][0][apart], flat[of][0][apart])
        assert blind.all() or torch.isnan(found["query"][0][~blind]).any()


def close(x, y):
    """As sums in another order are: rows that were done again."""
    if not x.numel():
        return True
    return bool((x - y).abs().max() <= 4 * torch.finfo(x.dtype).eps * y.abs().max())


@pytest.mark.parametrize("wanted", [("query",), ("key",), ("value",), ("query", "value")])
def test_gradients_that_are_not_wanted(wanted):
    p = LONG["2d"]
    t = tensors(Case("", p, seed=3)) | {"grad_logsumexp": None}
    saved = forward(p, t)
    every = backward(p, t, saved, True, "sm90")
    some = backward(p, t, saved, True, "sm90", wanted)
    for name, x in some.items():
        assert torch.equal(x, every[name]) if name in wanted else x.numel() == 0
