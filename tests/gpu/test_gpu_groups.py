"""Gradients of keys that several query heads share, by engine sm90 where several blocks sum those of a tile: against
the oracle, the same to the bit each time, and what must not reach a key. Needs a GPU of compute capability 9.0."""

import math

import pytest
import torch
from gpu_check import backward, check, forward
from gpu_oracle import seen_table
from gpu_problems import Case, dense, neighborhood, tensors, variations
from gpu_support import alone, needs_gpu
from test_gpu_boxes import HOPPER, spoil

pytestmark = [needs_gpu, pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")]
RUNS = 30
# So few tiles of keys that blocks share out heads; in the first ones, more blocks than multiprocessors all the same, of
# which some meet queries from the last to the first.
PARTS = {
    "causal": dense(2048, 2048, "top_left", heads=32, kv=8, dim=128, batch=1),
    "causal, narrow": dense(1500, 1700, "bottom_right", heads=24, kv=2, dim=64, dtype="float16"),
    "full": dense(300, 500, heads=12, kv=1, dim=96, dim_v=40),
    "sliding": dense(700, 700, left=130, right=17, heads=6, kv=2, dim=128),
    "wide": dense(500, 600, "top_left", heads=8, kv=2, dim=256),
    "1d, dilated": neighborhood((900,), 199, 7, dilation=3, causal=1, heads=4, kv=1, dim=128),
    "2d": neighborhood((31, 45), (20, 33), (4, 3), causal=(0, 1), heads=4, kv=1, dim=128),
    "3d": neighborhood((9, 15, 17), (5, 9, 12), (1, 2, 4), causal=(1, 0, 0), heads=8, dim=128, dtype="float16", kv=1),
}
# So many that blocks take the heads of a group one after the other, some of them without parts.
MANY = {
    "many": dense(520, 600, "top_left", heads=8, kv=4, dim=128, batch=21),
    "many, narrow": dense(1030, 1030, "bottom_right", heads=12, kv=3, dim=72, batch=17, dtype="float16"),
}
ALL = PARTS | MANY


@alone  # the profiler sees what others do
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("deterministic", [True, False])
def test_blocks_share_out_heads(name, deterministic):
    p = PARTS[name]
    t = tensors(Case(name, p))
    saved = forward(p, t)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        backward(p, t, saved, deterministic, "sm90")
        torch.cuda.synchronize()
    assert [event.name for event in seen.events()].count("convert_keys") == 1


@pytest.mark.parametrize("name", ALL)
def test_against_the_oracle(name):
    for case in variations(Case(name, ALL[name], seed=11), 2):
        check(case, engine="sm90")


@pytest.mark.parametrize("name", ALL)
def test_runs_are_the_same_to_the_bit(name):
    p = ALL[name]
    t = tensors(Case(name, p, seed=1))
    saved = forward(p, t)
    for deterministic in (True, False):
        first = backward(p, t, saved, deterministic, "sm90")
        for _ in range(RUNS):
            again = backward(p, t, saved, deterministic, "sm90")
            assert torch.equal(again["key"], first["key"]) and torch.equal(again["value"], first["value"])
            assert not deterministic or torch.equal(again["query"], first["query"])


@pytest.mark.parametrize("name", PARTS)
def test_one_gradient_alone(name):
    p = PARTS[name]
    t = tensors(Case(name, p, seed=3))
    saved = forward(p, t)
    both = backward(p, t, saved, True, "sm90")
    for only in ("key", "value"):
        assert torch.equal(backward(p, t, saved, True, "sm90", only=(only,))[only], both[only])


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_rows_done_again_are_the_same_to_the_bit(dim):
    """A query of NaN spoils sums of dK that hide it and none of dV: both of a key come from the same sums."""
    p = dense(700, 700, "top_left", heads=8, kv=1, dim=dim, batch=1)
    t = tensors(Case("again", p, seed=5))
    bad = {**t, "query": spoil(t["query"], 0, math.nan)}
    saved = forward(p, bad)
    first = backward(p, bad, saved, True, "sm90")
    assert first["key"][0, 1:].isfinite().all() and first["value"][0, 1:].isfinite().all()
    for _ in range(RUNS):
        again = backward(p, bad, saved, True, "sm90")
        assert all(torch.equal(again[of][0, 1:], first[of][0, 1:]) for of in ("key", "value"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["causal", "causal, narrow", "sliding", "wide", "1d, dilated", "2d", "3d"])
def test_a_query_that_does_not_see_a_key_does_not_reach_its_gradients(name, value):
    p = PARTS[name]
    t = tensors(Case(name, p, seed=2))
    saved = forward(p, t)
    clean = backward(p, t, saved, True, "sm90")
    for token in (0, p.queries // 2):
        bad = {**t, "query": spoil(t["query"], token, value), "grad_output": spoil(t["grad_output"], token, value)}
        got = backward(p, bad, saved, True, "sm90")
        blind = ~seen_table(p, "cuda")[token]
        for of in ("key", "value"):
            found, wanted = (x[of].flatten(1, len(p.layout)) for x in (got, clean))
            assert torch.equal(found[1:], wanted[1:]), "another batch entry"
            close = 4 * torch.finfo(found.dtype).eps * wanted[0].abs().max()
            assert not blind.any() or (found[0][blind] - wanted[0][blind]).abs().max() <= close
