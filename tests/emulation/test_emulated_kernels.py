"""Plans, launch arguments, tensor maps and the text of the kernels of engines sm80 and sm90, without a GPU: forward
and backward on an emulated one, against the oracle of the GPU tests. Problems are small; what they have in common with
large ones is that no axis is a multiple of a tile, and that there are more tiles than one."""

import dataclasses

import emulated
import emulated_unfused
import pytest
import torch
from gpu_lengths import Case as Lengths
from gpu_problems import Case, dense, neighborhood

na, f16, f32 = neighborhood, {"dtype": "float16"}, {"dtype": "float32"}
# Ways of the gradients, and kernels that they have: deterministic, or with atomics.
EXACT = (True, ("forward", "backward_queries", "backward_keys"))
ADDED = (False, ("forward", "backward_keys", "convert"))
BOTH = (EXACT, ADDED)
MIXED = {"step": (2, 1), "dilation": (2, 1), "causal": (0, 1), "kv": 1}

SM80 = [
    ("7 by 7", na((19, 21), 7), (EXACT,)),
    ("13 by 13", na((20, 30), 13, heads=1, **f16), (EXACT,)),
    ("1d", na((300,), 31, step=3, dilation=3, causal=1, dim=40), BOTH),
    ("2d", na((20, 21), (7, 9), dim=32, **MIXED), BOTH),
    ("2d, more tokens", na((20, 21), (7, 9), dim=64, additional_tokens=5, **MIXED), BOTH),
    ("2d, bias", na((20, 21), (7, 9), dim=32, additional_tokens=5, rpb=True, **MIXED), BOTH),
    ("3d", na((6, 9, 11), (3, 5, 4), (1, 2, 1), (1, 1, 2), (1, 0, 0), heads=4, kv=2), (EXACT,)),
    ("3d wide", na((4, 9, 11), (3, 5, 4), heads=1, dim=128), BOTH),
    ("window is the axis", na((64,), 64, batch=1), (EXACT,)),
    ("window beyond the axis", na((50,), 90, causal=1), (EXACT,)),
    ("one token", na((1, 1, 1), 1, batch=3), (EXACT,)),
    ("thin", na((1, 300), (1, 9), **f16), (ADDED,)),
    ("scale below 0", na((60,), 11, scale=-0.4, additional_tokens=3), (EXACT,)),
    ("odd dims", dense(50, 70, kv=1, dim=41, dim_v=23), BOTH),
    ("dense", dense(150, 230, heads=4, kv=2), BOTH),
    ("dense, bottom right", dense(150, 190, "bottom_right", kv=1, dim=128), BOTH),
    ("dense, top left", dense(190, 150, "top_left", **f16), (EXACT,)),
    ("sliding", dense(200, 210, left=40, right=9, dim=192, dim_v=128), (EXACT,)),
    ("dense wide", dense(70, 90, heads=1, dim=256), (EXACT,)),
    ("attention bias", dense(90, 200, "bottom_right", attn_bias=True, additional_tokens=7), (EXACT,)),
    ("no keys", dense(40, 0, additional_tokens=9), (EXACT,)),
]
PLAIN = [
    ("float32, 2d", na((12, 14), (5, 7), step=(1, 2), dilation=(2, 1), kv=1, additional_tokens=5, rpb=True, **f32)),
    ("float32, 3d", na((4, 6, 7), (3, 3, 4), causal=(1, 0, 0), dim=24, **f32)),
    ("float32, 1d", na((150,), 31, dim=128, **f32)),
    ("float32, dense", dense(100, 130, "bottom_right", heads=4, kv=2, **f32)),
    ("float32, odd dims", dense(50, 70, dim=41, dim_v=23, **f32)),
    ("float32, bias", dense(40, 50, attn_bias=True, **f32)),
    ("float64", na((9, 11), (5, 3), dim=16, dtype="float64")),
]
# Additional tokens of long head dims that engine sm80 has no tile for have plain gradients.
PLAINLY = ("sm90_forward", "plain_backward_keys", "plain_backward_additional")
BOXES, FORWARD = ("sm90_forward", "sm90_backward"), ("sm90_forward", "backward_keys")
PARTS = ("sm90_forward", "merge_parts")
SM90 = [
    ("dense", dense(150, 230, heads=4, kv=2, dim=128), BOXES),
    ("dense, bottom right", dense(150, 230, "bottom_right"), BOXES),
    ("dense, rows without keys", dense(200, 90, "bottom_right", kv=1, dim=72, **f16), BOXES),
    ("sliding", dense(150, 150, left=40, right=9, kv=1, dim=192, dim_v=128), BOXES),
    ("dense wide", dense(150, 190, "top_left", dim=256, **f16), BOXES),
    ("dense wide, shared keys", dense(300, 330, heads=4, kv=2, batch=1, dim=256), BOXES),
    ("dense wide, rows without keys", dense(200, 90, "bottom_right", kv=1, dim=160, dim_v=200), BOXES),
    ("dense wide, more tokens", dense(50, 60, heads=1, dim=48, dim_v=208, additional_tokens=3), PLAINLY),
    ("sliding wide", dense(250, 250, left=40, right=9, heads=1, dim=192), BOXES),
    ("2d wide", na((20, 21), (7, 9), additional_tokens=5, dim=256, **MIXED), BOXES),
    ("3d wide", na((6, 9, 11), (3, 5, 4), (1, 2, 1), (1, 1, 2), (1, 0, 0), heads=1, dim=256, **f16), BOXES),
    ("one query", dense(1, 1500, heads=8, kv=2, dim=128, batch=1), PARTS),
    ("1d", na((300,), 31, step=3, dilation=3, causal=1, dim=40), BOXES),
    ("1d, long window", na((400,), 150, heads=1, dim=128, **f16), BOXES),
    ("2d", na((20, 21), (7, 9), additional_tokens=5, **MIXED), BOXES),
    ("2d, large windows", na((24, 40), (17, 20), heads=3, kv=1, batch=1), BOXES),
    ("3d", na((6, 9, 11), (3, 5, 4), (1, 2, 1), (1, 1, 2), (1, 0, 0), dim=128), BOXES),
    ("3d, more tokens", na((5, 9, 10), (3, 4, 5), heads=4, kv=2, additional_tokens=70, **f16), BOXES),
    ("3d, odd eights", na((5, 9, 10), (3, 4, 5), kv=1, dim=72, dim_v=40, additional_tokens=70, **f16), BOXES),
    ("3d wide, odd eights", na((6, 9, 11), (3, 5, 4), heads=2, batch=1, dim=136, dim_v=200), BOXES),
    ("widest dilation", na((90,), 9, dilation=8), FORWARD),
]
# Where the kernel of keys sums the gradient of the query, too.
SUMMED = [
    ("dense", dense(150, 230, heads=4, kv=2, dim=128)),
    ("dense, bottom right", dense(150, 230, "bottom_right")),
    ("dense, rows without keys", dense(200, 90, "bottom_right", kv=1, dim=72, **f16)),
    ("sliding", dense(150, 150, left=40, right=9, kv=1, dim=96, dim_v=40)),
    ("1d", na((300,), 31, step=3, causal=1, dim=40)),
    ("2d", na((20, 21), (7, 9), (2, 1), causal=(0, 1), kv=1, dim=128, **f16)),
    ("2d, narrow", na((20, 21), (7, 9), dim=64)),
    ("3d", na((6, 9, 11), (3, 5, 4), (1, 2, 1), causal=(1, 0, 0), dim=128)),
    ("3d, narrow", na((6, 9, 11), (3, 5, 4), (1, 2, 1), causal=(1, 0, 0), heads=4, kv=2, dim=64, **f16)),
    ("3d, odd eights", na((6, 9, 11), (3, 5, 4), (1, 2, 1), causal=(1, 0, 0), dim=72)),
    ("3d, narrow, odd eights", na((6, 9, 11), (3, 5, 4), (1, 2, 1), heads=4, kv=2, dim=24, dim_v=56, **f16)),
]
# Where several blocks share out the query heads that meet the same keys.
GROUPED = [
    ("causal", dense(300, 290, "bottom_right", heads=6, kv=2, batch=1, dim=128)),
    ("full", dense(150, 230, heads=4, kv=1, dim=40, dim_v=24, **f16)),
    ("1d, dilated", na((300,), 131, step=3, dilation=3, causal=1, heads=8, kv=2, dim=88)),
    ("2d", na((20, 21), (17, 19), (2, 1), causal=(0, 1), heads=4, kv=1, dim=128)),
    ("3d", na((6, 9, 11), (5, 7, 9), (1, 2, 1), causal=(1, 0, 0), heads=4, kv=2, batch=1, dim=128, **f16)),
    ("wide", dense(150, 190, "top_left", heads=3, kv=1, batch=1, dim=192, dim_v=256)),
    ("3d, odd eights", na((6, 9, 11), (5, 7, 9), (1, 2, 1), heads=4, kv=2, batch=1, dim=88, dim_v=104)),
]
TILES = [
    (na((40, 50), 15, dim=64, heads=1), (1, 24, 8), (1, 8, 16)),
    (na((40, 50), 15, dim=64, heads=1, **f16), (1, 4, 32), (1, 11, 16)),
    (na((40, 50), 15, dim=128, heads=1), (1, 16, 8), (1, 8, 22)),
    (na((9, 12, 12), 5, dim=64, heads=1), (12, 4, 4), (4, 4, 8)),
    (na((9, 12, 12), 5, dim=128, heads=1, causal=1), (2, 8, 8), (6, 1, 24)),
    (dense(300, 250, "top_left", dim=256, heads=1), (1, 1, 64), (1, 1, 80)),
    # Rows see whole lines of keys: of all lengths of a line, and where some are shorter than the window.
    (na((9, 17, 10), (5, 6, 8), (1, 2, 3), heads=1, batch=1, dim=128), (8, 16, 1), (6, 1, 8)),
    (na((9, 17, 15), (5, 6, 8), (2, 1, 1), (1, 1, 2), (1, 0, 0), heads=1, batch=1, dim=128), (8, 16, 1), (3, 2, 8)),
    (na((40, 19), (9, 16), causal=(1, 0), heads=1, batch=1, dim=128), (1, 128, 1), (1, 5, 16)),
]
# Tiles of keys that only kernels with several blocks on a multiprocessor have: a warpgroup without one that loads.
CROWDS = {
    "2d": (na((19, 22), 5, heads=1), (1, 8, 8), (1, 2, 16)),
    "2d, several tiles a line": (na((30, 41), (9, 13), heads=4, additional_tokens=35, **MIXED), (1, 16, 4), (1, 4, 8)),
    "2d, grouped": (na((17, 25), 7, (1, 2), heads=4, kv=1, dim=40, **f16), (1, 4, 4), (1, 2, 16)),
    "2d, causal": (na((19, 22), (5, 6), causal=(1, 1), heads=1, additional_tokens=3), (1, 8, 8), (1, 2, 16)),
    "3d": (na((7, 9, 10), (3, 4, 5), heads=1, additional_tokens=40), (4, 4, 4), (2, 2, 8)),
    "3d, mixed": (na((6, 9, 11), (3, 5, 4), (1, 2, 1), (1, 1, 2), (1, 0, 0), dim=48, **f16), (2, 4, 8), (1, 2, 16)),
    "3d, odd eights": (na((6, 9, 11), (3, 5, 4), kv=1, dim=40, dim_v=24), (2, 4, 8), (1, 2, 16)),
}
# Gradients by several blocks on a multiprocessor, whose threads load for themselves.
CROWDED = [
    ("13 by 13", na((19, 30), 13, heads=1, **f16)),
    ("2d", na((20, 21), (7, 9), additional_tokens=5, **MIXED)),
    ("2d, dilated", na((33, 40), (6, 9), (1, 4), (3, 2), (1, 0), heads=4, kv=2, batch=1, dim=40)),
    ("narrow values", na((20, 30), 8, dim=48, dim_v=16, heads=1, additional_tokens=3)),
    ("3d", na((7, 9, 10), (3, 4, 5), heads=1, additional_tokens=70)),
    ("3d, mixed", na((6, 9, 11), (3, 5, 4), (1, 2, 1), (1, 1, 2), (1, 0, 0), heads=4, kv=2, dim=32, **f16)),
    ("3d, odd eights", na((7, 9, 10), (3, 4, 5), dim=56, dim_v=8)),
]
# Small tiles of keys, of which there are enough for several parts.
PARTED = {
    "2d": (na((25, 27), (21, 22), causal=(1, 0), heads=1, batch=1), (1, 8, 8), (1, 6, 8)),
    "2d, grouped": (na((17, 25), (15, 21), heads=2, kv=1, batch=1, additional_tokens=350), (1, 8, 4), (1, 6, 8)),
    "2d, dilated": (na((53, 25), (24, 23), (3, 1), (2, 1), heads=1, batch=1, dim=128, **f16), (1, 4, 16), (1, 3, 16)),
    "3d": (na((6, 12, 13), (5, 9, 12), (2, 1, 1), causal=(0, 0, 1), heads=1, batch=1, dim=128), (4, 4, 4), (2, 4, 6)),
    "3d, more tokens": (na((7, 9, 10), (7, 8, 9), heads=1, batch=1, additional_tokens=90), (4, 4, 4), (1, 6, 8)),
}
LENGTHS = [
    (Lengths(dense(120, 150, "bottom_right", heads=4, kv=2, batch=1), [30, 0, 1, 50, 39], [30, 7, 0, 70, 43])),
    (Lengths(dense(250, 250, "top_left", heads=2, batch=1, dim=128), [130, 3, 117], [130, 3, 117])),
    (Lengths(dense(50, 70, heads=4, kv=2, batch=4, additional_tokens=3), None, [70, 0, 1, 34])),
    (Lengths(dense(50, 70, left=20, right=5, batch=2, dim=128, **f16), None, [70, 13])),
    (Lengths(dense(250, 250, "top_left", kv=1, batch=1, dim=256), [130, 3, 117], [130, 3, 117])),
    (Lengths(dense(50, 70, kv=1, batch=4, dim=192), None, [70, 0, 1, 34])),
]
NAMES = ("packed", "packed, causal", "padded", "padded, sliding", "packed, wide", "padded, wide")
OUTSIDE = [
    ("2d", na((16, 17), 5, heads=1)),
    ("3d", na((5, 8, 9), (3, 5, 4), causal=(1, 0, 0), heads=1, dim=32)),
    ("causal", dense(150, 150, "top_left", heads=1)),
    ("sliding", dense(150, 170, left=30, right=20, heads=1, dim=128)),
    ("sliding wide", dense(150, 170, left=30, right=20, heads=1, dim=256)),
    ("3d, odd eights", na((5, 8, 9), (3, 5, 4), causal=(1, 0, 0), heads=2, batch=1, dim=40, dim_v=72)),
]
STYLES = ("fused", "heads first", "shared", "shifted")


def cases(problems):
    made = [(Case(name, problem, seed=i), *rest) for i, (name, problem, *rest) in enumerate(problems)]
    return [pytest.param(*each, id=each[0].name) for each in made]


@pytest.mark.parametrize(("case", "ways"), cases(SM80))
def test_engine_sm80(elsewhere, case, ways):
    for deterministic, kernels in ways:
        elsewhere(emulated.check, case, "sm80", deterministic, kernels)


@pytest.mark.parametrize("case", cases(PLAIN))
def test_other_types(elsewhere, case):
    elsewhere(emulated.check, case, "sm80", expected=("plain_forward", "plain_backward_keys"))


@pytest.mark.parametrize(("case", "kernels"), cases(SM90))
def test_engine_sm90(elsewhere, case, kernels):
    elsewhere(emulated.check, case, "sm90", expected=kernels)


@pytest.mark.parametrize("case", cases(CROWDED))
def test_gradients_in_crowds_of_engine_sm90(on_two_multiprocessors, case):
    on_two_multiprocessors(emulated.check, case, "sm90", expected=("sm90_backward/128",))


@pytest.mark.parametrize("problem", [na((33, 17), 8), na((4, 33, 9), (2, 6, 6), dim=32, **f16)])
def test_gradients_by_kernels_of_both_engines(on_two_multiprocessors, problem):
    """Of queries by engine sm80, of keys by engine sm90: of small windows, what is fastest."""
    expected = ("backward_queries", "sm90_backward/128")
    on_two_multiprocessors(emulated.check, Case("both", problem), "sm90", expected=expected, gpu=(9, 0, 2, 232448))


@pytest.mark.parametrize("case", cases(SUMMED))
def test_sums_of_engine_sm90(elsewhere, case):
    elsewhere(emulated.check, case, "sm90", deterministic=False, expected=("sm90_backward", "convert"))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("case", cases(GROUPED))
def test_groups_in_parts(elsewhere, case, deterministic):
    elsewhere(emulated.check, case, "sm90", deterministic, expected=("sm90_backward", "convert_keys"))


@pytest.mark.parametrize("case", cases(GROUPED))
def test_one_gradient_of_groups(elsewhere, case):
    elsewhere(emulated.check_alone, case, "sm90", expected=("sm90_backward", "convert_keys"))


@pytest.mark.parametrize("case", cases(SUMMED[:3]))
def test_one_gradient(elsewhere, case):
    for engine in ("sm80", "sm90"):
        elsewhere(emulated.check_alone, case, engine)


# So many blocks that they take the heads of a group one after the other.
MANY = [
    ("many", dense(390, 400, "top_left", heads=4, kv=2, batch=2, dim=128)),
    ("many 72", dense(500, 500, "top_left", heads=6, kv=2, batch=2, dim=72, **f16)),
]


@pytest.mark.parametrize("case", cases(GROUPED[:2] + MANY))
def test_groups_on_two_multiprocessors(on_two_multiprocessors, case):
    """Where most blocks begin as others end."""
    on_two_multiprocessors(emulated.check, case, "sm90", deterministic=False, expected=("sm90_backward",))


@pytest.mark.parametrize(("problem", "queries", "keys"), TILES)
def test_tiles_of_engine_sm90(elsewhere, problem, queries, keys):
    case = Case("tile", problem)
    elsewhere(emulated.check, case, "sm90", expected=("sm90_forward",), tile_q=queries, tile_kv=keys)


@pytest.mark.parametrize("name", CROWDS)
def test_crowds_of_engine_sm90(elsewhere, name):
    problem, queries, keys = CROWDS[name]
    expected = ("sm90_forward/128",)
    elsewhere(emulated.check, Case(name, problem), "sm90", expected=expected, tile_q=queries, tile_kv=keys)


@pytest.mark.parametrize("engine", emulated.DEVICES)
@pytest.mark.parametrize("style", STYLES)
def test_places_in_memory(elsewhere, style, engine):
    for problem in (na((19, 23), 7, heads=4, additional_tokens=3, dim=32), na((4, 9, 10), (3, 4, 5), dim=40)):
        elsewhere(emulated.check, Case(style, problem, style), engine)


@pytest.mark.parametrize("name", PARTED)
@pytest.mark.parametrize("turned", [False, True])
def test_keys_in_parts(elsewhere, name, turned):
    problem, queries, keys = PARTED[name]
    tiles = {"tile_q": queries, "tile_kv": keys}
    elsewhere(emulated.check, Case(name, problem), "sm90", expected=PARTS, turned=turned, **tiles)


@pytest.mark.parametrize("name", ["one query", "2d"])
def test_places_of_outputs(elsewhere, name):
    problem = next(problem for known, problem, _ in SM90 if known == name)
    elsewhere(emulated.check, Case(name, problem), "sm90", turned=True)


@pytest.mark.parametrize("engine", emulated.DEVICES)
@pytest.mark.parametrize("case", LENGTHS, ids=NAMES)
def test_lists_of_lengths(elsewhere, case, engine):
    # One kernel for all gradients, but with additional tokens.
    summed = BOXES if case.problem.additional_tokens else (*BOXES, "convert")
    ways = BOTH if engine == "sm80" else ((True, BOXES), (False, summed))
    for deterministic, kernels in ways[:1] if case.problem.head_dim > 128 else ways:
        elsewhere(emulated.check_lengths, case, engine, deterministic, kernels)


@pytest.mark.parametrize("engine", emulated.DEVICES)
@pytest.mark.parametrize("case", cases(OUTSIDE))
@pytest.mark.parametrize("deterministic", [True, False])
def test_keys_outside_a_window_have_no_influence(elsewhere, case, engine, deterministic):
    elsewhere(emulated.check_outside, case, engine, deterministic)


def test_keys_outside_a_window_have_no_influence_in_crowds(elsewhere):
    tiles = {"tile_q": (1, 8, 8), "tile_kv": (1, 2, 16)}
    case = Case("2d", na((16, 17), 5, heads=1, batch=1))
    elsewhere(emulated.check_outside, case, "sm90", expected=("sm90_forward/128",), **tiles)


def test_keys_outside_a_window_have_no_influence_on_gradients_in_crowds(on_two_multiprocessors):
    case = Case("2d", na((16, 17), 5, heads=1))
    on_two_multiprocessors(emulated.check_outside, case, "sm90", expected=("sm90_backward/128",))


def test_keys_outside_a_window_have_no_influence_in_parts(elsewhere):
    tiles = {"tile_q": (1, 8, 8), "tile_kv": (1, 6, 8)}
    case = Case("2d", na((24, 25), (20, 21), heads=1, batch=1))
    elsewhere(emulated.check_outside, case, "sm90", expected=PARTS, **tiles)


@pytest.mark.parametrize("deterministic", [True, False])
def test_keys_outside_a_window_have_no_influence_in_groups(elsewhere, deterministic):
    case = Case("causal", dense(150, 150, "top_left", heads=4, kv=1))
    kernels = ("sm90_backward", "convert_keys")
    elsewhere(emulated.check_outside, case, "sm90", deterministic, expected=kernels)


@pytest.mark.parametrize("deterministic", [True, False])
def test_heads_have_no_influence_on_each_other(elsewhere, deterministic):
    """On three axes boxes bring features of the next head, too."""
    problem = na((5, 8, 9), (3, 5, 4), heads=3, batch=1, dim=40, dim_v=72)
    elsewhere(emulated.check_heads, Case("heads", problem), "sm90", deterministic, expected=BOXES)


def test_large_logits(elsewhere):
    case = Case("large logits", dataclasses.replace(SM80[0][1], dtype="float16"), spread=12.0)
    for engine in emulated.DEVICES:
        elsewhere(emulated.check, case, engine)


UNFUSED = [
    ((12, 14), ((5, 7), (1, 1), (1, 1), (0, 0)), 64, torch.bfloat16, 5, True, ("unfused_tile_scores",)),
    ((5, 6, 7), ((3, 3, 4), (1, 2, 1), (1, 2, 1), (1, 0, 0)), 24, torch.float16, 0, False, ("unfused_tile_sums",)),
    ((37,), ((50,), (3,), (2,), (0,)), 41, torch.float32, 5, True, ("unfused_scores", "unfused_to_keys")),
]


@pytest.mark.parametrize(("layout", "mask", "dim", "dtype", "tokens", "rpb", "kernels"), UNFUSED)
def test_unfused(elsewhere, layout, mask, dim, dtype, tokens, rpb, kernels):
    check = emulated_unfused.check_unfused
    elsewhere(check, layout, mask, 4, 2, dim, dtype, tokens=tokens, rpb=rpb, expected=kernels)


@pytest.mark.parametrize(("parts", "dim", "dtype"), [(3, 64, torch.bfloat16), (17, 41, torch.float32)])
def test_merge(elsewhere, parts, dim, dtype):
    elsewhere(emulated_unfused.check_merge, parts, (2, 9, 3), dim, dtype)
