"""A race shows as an error that moves: a thousand runs of a problem give the same bits, beside other work."""

import json

import pytest
import torch
from gpu_check import CAUSAL, backward, forward, options
from gpu_problems import Case, dense, neighborhood, tensors
from gpu_support import PRESENT, needs_gpu

pytestmark = needs_gpu
RUNS = 1000
PROBLEMS = {
    "dense": dense(1500, 1500, heads=8, dim=128, batch=1),
    "dense causal, grouped": dense(1100, 1300, "bottom_right", heads=8, kv=2, dim=64, dtype="float16"),
    "dense wide": dense(700, 900, "top_left", heads=8, dim=256),
    "sliding": dense(2000, 2000, "bottom_right", left=300, right=0, heads=8, dim=128),
    "more tokens": neighborhood((40, 40), (9, 8), heads=8, dim=64, additional_tokens=30),
    "1d causal": neighborhood((3000,), 256, heads=4, kv=1, dim=128, causal=1),
    "2d small": neighborhood((56, 57), 7, heads=8, dim=96),
    "2d": neighborhood((56, 57), 21, heads=8, dim=96),
    "2d step": neighborhood((64, 64), 16, step=16, heads=8, dim=128),
    "3d dilated": neighborhood((12, 36, 36), (5, 11, 11), dilation=(1, 2, 2), heads=8, dim=64, dtype="float16"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_thousand_runs_give_the_same_bits(name):
    p = PROBLEMS[name]
    t = tensors(Case(name, p, seed=11))
    saved = forward(p, t)
    grads = backward(p, t, saved, True)
    others = torch.randn(2, 2048, 2048, device="cuda", dtype=torch.bfloat16)
    beside = torch.cuda.Stream()
    torch.cuda.synchronize()
    moved = torch.zeros((), dtype=torch.bool, device="cuda")
    for run in range(RUNS):
        if run % 3 == 0:  # now and then the multiprocessors are shared, so that blocks start at other times
            with torch.cuda.stream(beside):
                torch.mm(*others)
        again = [*forward(p, t), *(backward(p, t, saved, True).values() if run % 10 == 0 else ())]
        for x, y in zip(again, [*saved, *grads.values()], strict=False):
            moved |= (x != y).any()
    assert not moved


@pytest.mark.skipif(PRESENT and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU")
@pytest.mark.parametrize("name", ["dense", "dense wide", "2d", "2d step", "3d dilated"])
def test_they_are_runs_of_the_engine_for_hopper(name):
    p = PROBLEMS[name]
    t = tensors(Case(name, p))
    m = p.mask
    mask = [] if p.dense else [n for values in (m.kernel_size, m.stride, m.dilation, m.is_causal) for n in values]
    causal = CAUSAL[m.causal] if p.dense else 0
    report = torch.ops.vicus.gpu_report(t["query"], t["key"], t["value"], mask, causal, options(True), False)
    assert json.loads(report[1])["name"].startswith("sm90_forward"), report
