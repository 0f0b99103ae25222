"""Engine sm90, the forward pass by boxes and warpgroups, asked for by name: what it takes against the oracle, every
tile, keys in parts, what must hold to the bit. Needs a GPU of compute capability 9.0."""

import dataclasses
import json
import math

import pytest
import torch
from gpu_check import INPUTS, by_engine, check_forward, compare, forward
from gpu_lengths import Case as Lengths
from gpu_lengths import made, wanted
from gpu_oracle import TYPES, seen_table
from gpu_problems import HALF, Case, dense, fixed, neighborhood, random_case, tensors, variations
from gpu_support import needs_gpu
from test_gpu_varlen import PACKED, PADDED, lists, settings

from vicus import _ops

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [needs_gpu, pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")]
ENGINE = by_engine("sm90")
RUNS = 1000


def refused(p) -> str:
    """What of a problem engine sm90 does not take, from its documentation; empty where it takes all."""
    if p.dtype not in HALF:
        return "dtype"
    if p.head_dim % 8 or p.head_dim > 256:
        return "head_dim"
    if p.head_dim_v % 8 or p.head_dim_v > 256:
        return "head_dim_v"
    if p.rpb or p.attn_bias:
        return "rpb"
    if not p.effective_scale > 0:
        return "scale"
    return "dilation" if not p.dense and max(p.mask.dilation) > 8 else ""


def check_or_refuse(case) -> float:
    why = refused(case.problem)
    if not why:
        return check_forward(case, ENGINE)
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=why):
        forward(case.problem, tensors(case), ENGINE)
    return 0.0


@pytest.mark.parametrize("case", fixed() if HOPPER else fixed()[:1], ids=str)
def test_nasty_problem(case):
    check_or_refuse(case)


def friendly(seed):
    """A random problem that the engine takes."""
    case = random_case(seed, head_dims=(16, 24, 32, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256))
    p = dataclasses.replace(case.problem, rpb=False, attn_bias=False)
    return dataclasses.replace(case, problem=dataclasses.replace(p, scale=None if (p.scale or 1) <= 0 else p.scale))


@pytest.mark.random_cases(60)
def test_random_problem(seed):
    for case in variations(friendly(seed), 3):
        check_or_refuse(case)


def report(p, t, how):
    """The kernels of a call."""
    lists_of = () if p.dense else (p.mask.kernel_size, p.mask.stride, p.mask.dilation, p.mask.is_causal)
    mask = [int(n) for values in lists_of for n in values]
    causal = {"none": 0, "top_left": 1, "bottom_right": 2}[p.mask.causal] if p.dense else 0
    lines = torch.ops.vicus.gpu_report(t["query"], t["key"], t["value"], mask, causal, how, False)
    return [json.loads(line) for line in lines[1:]]


# Head dim, rows of query tiles, most and least keys: src/gpu/sm90_shapes.h.
SHAPES = ((64, 192, 128, 48), (64, 128, 176, 48), (64, 64, 176, 48), (128, 128, 176, 48), (128, 64, 176, 48))
SHAPES += ((192, 128, 112, 32), (192, 64, 112, 32), (256, 128, 80, 32), (256, 64, 80, 32))
LINES = [(dim, (rows,), (keys,)) for dim, rows, most, least in SHAPES for keys in range(most, least - 1, -16)]
BOXES = [
    (64, (24, 8), (8, 16)),
    (64, (8, 24), (2, 40)),
    (64, (192, 1), (1, 112)),
    (64, (4, 32), (11, 16)),
    (128, (16, 8), (8, 22)),
    (128, (8, 16), (10, 16)),
    (128, (2, 64), (44, 4)),
    (128, (8, 8), (5, 32)),
    (192, (16, 8), (7, 16)),
    (256, (4, 32), (5, 16)),
    (64, (12, 4, 4), (4, 4, 8)),
    (64, (4, 4, 12), (2, 7, 8)),
    (128, (2, 8, 8), (6, 1, 24)),
    (128, (8, 16, 1), (11, 4, 4)),
    (128, (4, 4, 4), (1, 1, 64)),
    (256, (128, 1, 1), (5, 4, 4)),
]


def tiled(tiles):
    """Options that ask for tiles of queries and keys."""
    return by_engine("sm90", *((*(0,) * (3 - len(tile)), *tile) for tile in tiles))


@pytest.mark.parametrize(("dim", "queries", "keys"), LINES + BOXES)
def test_every_tile(dim, queries, keys):
    rank = len(queries)
    how = tiled((queries, keys))
    kind = {"dim": dim, "dtype": HALF[sum(keys) // 16 % 2]}
    if rank == 1:
        p = dense(333, 517, "bottom_right", heads=4, kv=4, **kind)
        more = [dataclasses.replace(p, mask=dataclasses.replace(p.mask, causal="none", window_left=150))]
    else:
        p = (
            neighborhood((45, 51), (13, 30), (1, 3), (1, 2), (0, 1), **kind)
            if rank == 2
            else neighborhood((17, 19, 23), (5, 9, 12), (1, 2, 4), (2, 1, 1), (1, 0, 0), **kind)
        )
        more = [dataclasses.replace(p, mask=dataclasses.replace(p.mask, is_causal=[0] * rank), additional_tokens=37)]
    assert report(p, tensors(Case("", p)), how)[0]["name"].startswith("sm90_forward")
    for i, problem in enumerate([p, *more]):
        check_forward(Case("tile", problem, seed=i), how)


# Several blocks on a multiprocessor, where there are enough of them: tiles of queries and keys, as the planner chooses.
na = neighborhood
mixed = {"additional_tokens": 37, "heads": 8, "kv": 8, "dtype": "float16"}
VOLUME = (2, 4, 8), (1, 5, 16)
CROWDS = {
    "window 13": (na((56, 55), 13, heads=4, batch=8), (8, 8), (4, 20)),
    "window 16": (na((63, 64), 16, heads=8, batch=4), (8, 8), (4, 24)),
    "tall tiles": (na((64, 46), (16, 13), (2, 1), (1, 2), (1, 0), dim=48, batch=4, **mixed), (16, 4), (5, 16)),
    "wide tiles": (na((45, 65), 11, (1, 2), batch=4, dim=64, **mixed), (4, 16), (10, 8)),
    "short tiles": (na((47, 48), 7, causal=(1, 1), heads=4, batch=8, dim=32), (8, 8), (2, 16)),
    "volume": (na((8, 16, 17), (4, 8, 8), heads=4, batch=8), (4, 4, 4), (2, 4, 12)),
    "volume, planes": (na((9, 15, 16), (4, 8, 7), (1, 2, 1), (1, 1, 2), (1, 0, 0), batch=3, **mixed), *VOLUME),
}


@pytest.mark.parametrize("name", CROWDS)
def test_crowd(name):
    p, *tiles = CROWDS[name]
    how = tiled(tiles)
    case = Case(name, p)
    kernel = report(p, tensors(case), how)[0]
    assert kernel["name"].startswith("sm90_forward") and kernel["threads"] == 128
    assert kernel["blocks_per_multiprocessor"] >= 3
    check_forward(case, how)


# Boxes of one column of queries, whose windows are as wide as a tile of keys: rows see whole lines or none of them, but
# in layouts (and classes of a dilation) that are shorter than the window.
WHOLE_LINES = {
    "as long as the axis": (na((12, 30, 24), (7, 9, 24), heads=2, dim=128), (8, 16, 1), (6, 1, 24)),
    "strides": (na((13, 33, 40), (7, 9, 24), (2, 3, 5), heads=4, kv=2, dim=128), (8, 16, 1), (6, 1, 24)),
    "causal": (na((13, 33, 40), (7, 9, 24), causal=(1, 1, 0), dim=128, dtype="float16"), (16, 8, 1), (3, 2, 24)),
    "some too short": (na((12, 30, 47), (7, 9, 24), (1, 1, 2), (1, 1, 2), dim=128), (8, 16, 1), (6, 1, 24)),
    "all too short": (na((12, 30, 20), (7, 9, 24), dim=128), (8, 16, 1), (6, 1, 24)),
    "two axes": (na((90, 70), (30, 32), (1, 2), dim=128), (128, 1), (5, 32)),
}


@pytest.mark.parametrize("name", WHOLE_LINES)
def test_whole_lines(name):
    p, *tiles = WHOLE_LINES[name]
    for variation in variations(Case(name, p), 2):
        check_forward(variation, tiled(tiles))


PARTS = {
    "one query": dense(1, 5000, heads=2, dim=128, batch=1),
    "one query, grouped": dense(1, 3001, "bottom_right", heads=16, kv=2, dim=128),
    "few queries, one key head": dense(7, 4100, "bottom_right", heads=12, kv=1, dim=64, batch=3),
    "five to one": dense(33, 1999, heads=10, kv=2, dim=96, dtype="float16"),
    "narrow values": dense(100, 9000, "bottom_right", dim=128, dim_v=40, batch=1),
    "more tokens": dense(70, 1200, heads=4, kv=1, dim=256, batch=1, additional_tokens=300),
    "only more tokens": dense(3, 0, batch=1, additional_tokens=900),
    "sliding": dense(300, 3000, "bottom_right", left=900, right=0, heads=2, dim=64, batch=1),
    "window": neighborhood((3000,), 2500, heads=1, batch=1, additional_tokens=5),
    "dilated": neighborhood((4100,), 2000, dilation=2, causal=1, heads=1, dim=128, batch=1),
    "2d": neighborhood((40, 43), (36, 35), heads=1, dim=128, batch=1),
    "2d, causal": neighborhood((45, 51), (40, 45), step=(3, 1), causal=(0, 1), heads=1, batch=1),
    "2d, dilated": neighborhood((90, 45), (42, 41), dilation=(2, 1), heads=1, dim=96, batch=1),
    "2d, grouped": neighborhood((57, 58), (50, 51), heads=4, kv=1, dim_v=40, batch=1, additional_tokens=170),
    "3d": neighborhood((9, 17, 23), (9, 17, 20), (2, 1, 3), causal=(1, 0, 0), heads=1, batch=1, dtype="float16"),
    "3d, causal": neighborhood((9, 17, 23), (9, 17, 20), causal=(0, 1, 0), heads=1, dim=128, batch=1),
    "3d, more tokens": neighborhood((6, 13, 15), (6, 12, 11), heads=1, dim=256, batch=1, additional_tokens=300),
}
each_part = pytest.mark.parametrize("name", PARTS)


@each_part
def test_keys_in_parts(name):
    case = Case(name, PARTS[name], seed=3)
    p = case.problem
    if not (p.additional_tokens or (p.dense and p.mask.window_left >= 0)):  # which the report does not know
        assert any(kernel["name"].startswith("merge_parts") for kernel in report(p, tensors(case), ENGINE))
    for variation in variations(case, 4):
        check_forward(variation, ENGINE)


@pytest.mark.parametrize("seed", range(40))
def test_random_parts(seed):
    """Windows of nearly the whole layout, and the smallest tiles of keys, so that a small problem has many."""
    draw = torch.Generator().manual_seed(seed)
    pick = lambda *values: values[int(torch.randint(len(values), (), generator=draw))]  # noqa: E731
    if seed % 2:
        layout, queries = pick((19, 40), (33, 34), (64, 21), (24, 57)), (0, 8, 8)
    else:
        layout, queries = pick((6, 17, 15), (9, 9, 20), (13, 8, 14)), (4, 4, 4)
    window, dim = [pick(n, n - 1, n - 3, n * 3 // 4) for n in layout], pick(64, 128, 80, 192)
    step, causal = [pick(1, 1, 2, w) for w in window], [pick(0, 0, 1) for _ in window]
    dilation = [pick(1, 1, 1, 1, 1, 2) for _ in window]
    kind = {"heads": pick(1, 1, 2), "kv": 1, "dim": dim, "additional_tokens": pick(0, 0, 9, 200), "batch": 1}
    keys = {2: (0, 6, 8), 3: (2, 4, 6)}[len(layout)] if dim <= 128 else {2: (0, 4, 8), 3: (2, 4, 4)}[len(layout)]
    p = neighborhood(layout, window, step, dilation, causal, **kind)
    case = Case("parts", p, style=pick("contiguous", "fused", "heads first"), seed=seed)
    check_forward(case, by_engine("sm90", queries, keys))


@pytest.mark.parametrize("seed", range(40))
def test_folded_heads(seed):
    """Several query heads in a tile, and boxes of several pieces."""
    draw = torch.Generator().manual_seed(seed)
    pick = lambda *values: values[int(torch.randint(len(values), (), generator=draw))]  # noqa: E731
    kind = {"heads": pick(4, 6, 10, 24), "kv": 2, "dim": pick(64, 128, 40), "additional_tokens": pick(0, 0, 9)}
    if seed % 2:
        p = dense(pick(1, 5, 17, 100), pick(40, 555), pick("none", "bottom_right"), **kind)
    elif seed % 4:
        p = neighborhood((pick(50, 700),), pick(5, 40), dilation=pick(1, 5, 7, 8), causal=pick(0, 1), **kind)
    else:
        p = neighborhood((5, pick(3, 40)), pick(3, 5), dilation=(1, pick(1, 3)), **kind)
    check_forward(Case("folded", p, seed=seed), ENGINE)


EXACT = {
    "dense": dense(1000, 1100, "bottom_right", heads=8, dim=128),
    "dense narrow": dense(2000, 2100, heads=8, dim=64),
    "dense wide": dense(700, 900, heads=4, dim=256),
    "2d": neighborhood((70, 71), 30, heads=8, dim=128),
    "3d": neighborhood((8, 20, 24), (5, 8, 9), causal=(1, 0, 0), heads=8, dim=64, additional_tokens=3),
    "crowd": CROWDS["window 13"][0],
    "crowd, 3d": CROWDS["volume, planes"][0],
    "parts": PARTS["one query, grouped"],
    "2d, parts": PARTS["2d, causal"],
    "3d, parts": PARTS["3d"],
    "whole lines": WHOLE_LINES["strides"][0],
}
HOW = {"whole lines": tiled(WHOLE_LINES["strides"][1:])}


@pytest.mark.parametrize("name", EXACT)
def test_every_run_gives_the_same_bits(name):
    """A race shows as a moving error."""
    p = EXACT[name]
    t = tensors(Case(name, p, seed=1))
    how = HOW.get(name, ENGINE)
    first = forward(p, t, how)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(RUNS):
        for x, y in zip(first, forward(p, t, how), strict=True):
            different += (x.view(torch.uint8) != y.view(torch.uint8)).sum()
    assert int(different) == 0


def spoil(x, token, value):
    spoiled = x.clone()
    spoiled.flatten(1, -3)[0, token] = value
    return spoiled


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [*EXACT, "sliding", "dilated"])
def test_what_a_query_does_not_see_does_not_reach_it(name, value):
    p = {**EXACT, **PARTS}[name]
    t, how = tensors(Case(name, p, seed=2)), HOW.get(name, ENGINE)
    clean = [x.double().flatten(1, len(p.layout)) for x in forward(p, t, how)]
    for token in (0, p.keys // 2, p.keys - 1):
        for hurt in (("key",), ("value",), ("key", "value")):
            bad = {**t, **{which: spoil(t[which], token, value) for which in hurt}}
            got = [x.double().flatten(1, len(p.layout)) for x in forward(p, bad, how)]
            blind = ~seen_table(p, "cuda")[:, token]
            for x, y in zip(got, clean, strict=True):
                assert torch.equal(x[1:], y[1:]), "another batch entry"
                assert torch.isfinite(x[0][blind]).all()
                assert (x[0][blind] - y[0][blind]).abs().max() <= 0.02 if blind.any() else True


def listed(case, t, given):
    """The operator with packed sequences or key lengths."""
    with torch.no_grad():
        return _ops.dense(*(t.get(name) for name in INPUTS), None, *given, *settings(case), ENGINE)


@pytest.mark.parametrize("case", [PACKED, PADDED], ids=["packed", "padded"])
@pytest.mark.parametrize("causal", ["none", "bottom_right"])
def test_neighbours_in_a_list_do_not_reach_each_other(case, causal):
    problem = dataclasses.replace(case.problem, mask=dataclasses.replace(case.problem.mask, causal=causal))
    case = dataclasses.replace(case, problem=problem)
    t, given = made(case, "cuda"), lists(case, "cuda")

    clean = listed(case, t, given)
    for i, (b, q, k) in enumerate(case.pieces()):
        bad = {name: x.clone() for name, x in t.items()}
        if case.packed:
            bad["query"][b, q] = bad["key"][b, k] = bad["value"][b, k] = math.nan
        else:
            bad["key"][b, k.stop :] = bad["value"][b, k.stop :] = math.nan
        got = listed(case, bad, given)
        for j, (b2, q2, _) in enumerate(case.pieces()):
            if case.packed and i == j:
                continue
            for x, y in zip(got, clean, strict=True):
                assert torch.equal(x[b2, q2], y[b2, q2]), f"{i} reached {j}"


LISTS = {
    "decoding": (dense(1, 5000, "bottom_right", heads=16, kv=2, dim=128, batch=4), None, [5000, 1, 0, 1234]),
    "few long": (dense(40, 6000, "bottom_right", dim=128, batch=1), [7, 0, 33], [3000, 900, 2100]),
    "more tokens": (dense(200, 900, heads=4, kv=1, batch=2, additional_tokens=33), None, [0, 555]),
    "ragged": (
        dense(900, 700, "bottom_right", left=100, right=0, heads=4, batch=1),
        [250, 1, 0, 649],
        [1, 90, 300, 309],
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists(name):
    case = Lengths(*LISTS[name])
    t, given = made(case, "cuda"), lists(case, "cuda")
    got = dict(zip(("output", "logsumexp"), listed(case, t, given), strict=True))
    ref, noise = wanted(case, t)
    peer, _ = wanted(case, t, TYPES[case.problem.dtype])
    for what, x in got.items():
        compare(what, x, ref[what], peer[what], noise[what])


@pytest.mark.parametrize("name", ["one query, grouped", "sliding", "2d"])
def test_replayed(name):
    p = PARTS[name]
    t = tensors(Case(name, p, seed=5))
    forward(p, t, ENGINE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(p, t, ENGINE)
    t["key"].copy_(torch.randn_like(t["key"]))
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(captured, forward(p, t, ENGINE), strict=True))
