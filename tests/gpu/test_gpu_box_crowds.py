"""Gradients of small windows by engine sm90, several blocks on a multiprocessor: against the oracle, what must not
reach a row, and that nothing races. Needs a GPU of compute capability 9.0."""

import math

import pytest
import torch
from gpu_check import backward, check, forward
from gpu_oracle import seen_table
from gpu_problems import Case, neighborhood, tensors, variations
from gpu_support import alone, needs_gpu
from test_gpu_boxes import CROWDS, HOPPER, spoil
from test_gpu_boxes_long import close

pytestmark = [needs_gpu, pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")]
RUNS = 300
na = neighborhood
MEASURED = {
    "2d": na((56, 56), 13, heads=4, batch=16),
    "3d": na((8, 32, 32), (4, 8, 8), heads=8, batch=8),
}
PROBLEMS = {name: p for name, (p, *_) in CROWDS.items()} | {
    "grouped": na((40, 41), (9, 12), heads=8, kv=2, batch=4, additional_tokens=5),
    "narrow values": na((50, 51), 11, (1, 2), heads=4, dim=48, dim_v=16, batch=3, dtype="float16"),
    "3d, dilated": na((8, 33, 31), (4, 6, 7), (2, 1, 3), (1, 2, 2), (0, 1, 1), heads=4, kv=1, dim=32, batch=2),
}


@alone  # the profiler sees what others do
@pytest.mark.parametrize("name", MEASURED)
def test_which_kernels(name):
    t = tensors(Case(name, MEASURED[name]))
    saved = forward(MEASURED[name], t)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        backward(MEASURED[name], t, saved, True, "sm90")
        torch.cuda.synchronize()
    names = [event.name for event in seen.events()]
    assert sum("sm90_backward" in name for name in names) == 2
    assert not any("delta" in name for name in names), "the kernel for queries makes it"


@pytest.mark.parametrize("name", PROBLEMS)
def test_against_the_oracle(name):
    for case in variations(Case(name, PROBLEMS[name], seed=5), 3):
        check(case, ways=(True,), engine="sm90")


@pytest.mark.parametrize("name", ["window 13", "volume, planes", "grouped"])
def test_runs_are_equal_to_the_bit(name):
    t = tensors(Case(name, PROBLEMS[name], seed=1))
    saved = forward(PROBLEMS[name], t)
    first = backward(PROBLEMS[name], t, saved, True, "sm90")
    for _ in range(RUNS):
        again = backward(PROBLEMS[name], t, saved, True, "sm90")
        assert all(torch.equal(x, first[of]) for of, x in again.items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["window 13", "tall tiles", "volume"])
def test_what_a_row_does_not_see_does_not_reach_its_gradients(name, value):
    p = PROBLEMS[name]
    t = tensors(Case(name, p, seed=2)) | {"grad_logsumexp": None}
    clean = {of: x.flatten(1, len(p.layout)) for of, x in backward(p, t, forward(p, t), True, "sm90").items()}
    seen = seen_table(p, "cuda")[:, : p.keys]
    for token in (0, p.keys // 2, p.keys - 1):
        bad = {**t, "key": spoil(t["key"], token, value), "value": spoil(t["value"], token, value)}
        found = backward(p, bad, forward(p, bad), True, "sm90")
        blind = ~seen[:, token]
        apart = ~seen[~blind].any(0)  # keys whose queries are all blind to it
        for of, rows in (("query", blind), ("key", apart), ("value", apart)):
            x, y = found[of].flatten(1, len(p.layout)), clean[of]
            assert torch.equal(x[1:], y[1:]), "another batch entry"
            assert close(x[0][rows], y[0][rows])
