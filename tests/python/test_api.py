"""The rest of the C++ API: problems from tensors, one-call functions, plans, empty problems, information."""

import bridge
import cases
import compare
import memory
import numpy as np
import oracle
import pytest
import sampling
from oracle import Dense, Neighborhood, Problem

ENGINES = ("cpu", "reference")


def test_one_call_functions_give_what_the_planned_call_gives():
    def check(case):
        problem = case.problem
        problem.additional_tokens, problem.rpb, problem.attn_bias = 0, False, False
        case.options = {}
        run = compare.Run(case)
        planned = run.forward()
        out = {"output": np.empty(problem.shape("output"), run.dtype)}
        out["logsumexp"] = np.empty(problem.shape("logsumexp"), compare.lse_dtype(problem))
        request = {"mask": bridge.mask_json(problem.mask)} | ({} if problem.scale is None else {"scale": problem.scale})
        if problem.dense:
            request["mask"]["keys"] = 12345  # taken from the key tensor
        bridge.call("attention" if problem.dense else "neighborhood_attention", request, run.inputs | out)
        for name, x in out.items():
            assert x.tobytes() == planned[name].bytes()

    for kind in cases.KINDS:
        sampling.for_cases(f"one call {kind}", cases.strategy(kind, "float32"), 10, check)


def test_problems_come_from_tensors():
    def check(case):
        problem = case.problem
        inputs = cases.tensors(case, np.random.default_rng(case.seed))
        kind = "dense" if problem.dense else "neighborhood"
        request = {kind: bridge.mask_json(problem.mask)}
        if problem.scale is not None:
            request["scale"] = problem.scale
        inferred = bridge.call("infer", request, inputs)
        assert inferred == bridge.call("validate", {"problem": bridge.problem_json(problem)})
        assert inferred["dtype"] == problem.dtype
        for name, x in inputs.items():
            if name != "attn_bias":
                assert tuple(inferred["shapes"][name]) == x.shape == problem.shape(name)
        assert inferred["scale"] == pytest.approx(problem.effective_scale, rel=1e-15)

    for kind in cases.KINDS:
        sampling.for_cases(f"infer {kind}", cases.strategy(kind, "bfloat16"), 10, check)


def test_defaults_are_filled_in():
    problem = {"layout": 5, "heads": 3, "head_dim": 7, "neighborhood": {"kernel_size": 3}}
    got = bridge.call("validate", {"problem": problem})
    assert (got["heads_kv"], got["head_dim_v"], got["dtype"], got["batch"]) == (3, 7, "float32", 1)
    assert (got["kernel_size"], got["stride"], got["dilation"], got["is_causal"]) == ([3], [1], [1], [0])
    square = bridge.call("validate", {"problem": problem | {"layout": [5, 6, 7]}})
    assert (square["kernel_size"], square["queries"], square["keys"]) == ([3, 3, 3], 210, 210)
    with pytest.raises(bridge.VicusError, match="head_dim"):
        bridge.call("validate", {"problem": {k: v for k, v in problem.items() if k != "head_dim"}})


def test_plans_count_the_mask_exactly():
    def check(case):
        problem = case.problem
        pairs = oracle.mask_pairs(problem)
        for engine in ("auto", *ENGINES):
            options = case.options if engine == "cpu" else {}
            plan = bridge.call("plan", bridge.request(problem, **(options | {"engine": engine})))
            if engine != "auto":
                assert plan["engine"] == engine
            assert plan["mask_pairs"] == pairs
            assert plan["forward_flops"] == 2 * (problem.head_dim + problem.head_dim_v) * pairs
            assert plan["backward_flops"] == 2 * (3 * problem.head_dim + 2 * problem.head_dim_v) * pairs
            assert plan["reason"] and plan["text"].count("\n") >= 2
        work = bridge.call("plan", bridge.request(problem, **case.options))["forward"]["work"]
        assert work["mask_pairs"] == pairs
        assert work["tile_pairs"] >= pairs

    for kind in cases.KINDS:
        if kind != "bias":  # an additive mask hides pairs that no plan knows
            sampling.for_cases(f"plan {kind}", cases.strategy(kind, "float32"), 25, check)


def test_plans_keep_what_was_forced():
    problem = Problem([30, 30], 4, 2, 32, 32, Neighborhood([7, 7], [1, 1], [1, 1], [0, 0]))
    for rows in (16, 32, 64):
        plan = bridge.call("plan", bridge.request(problem, engine="cpu", rows=rows, threads=3))
        assert plan["threads"] == 3
        tile = plan["forward"]["tile"]
        assert tile["rows"] == rows
        assert np.prod(tile["extent"]) * tile["heads"] <= rows
        assert plan["forward"]["scratch_bytes"] < 4 << 20
        assert plan["backward"]["scratch_bytes"] < 4 << 20
    plan = bridge.call("plan", bridge.request(problem, engine="cpu", tile_q=[1, 2, 8], rows=16))
    assert plan["forward"]["tile"]["extent"] == [1, 2, 8]


def empty_problems():
    window = Neighborhood([3, 3], [1, 1], [1, 1], [0, 0])
    yield "no batch, window", Problem([4, 5], 4, 2, 8, 6, window, batch=0, additional_tokens=2, rpb=True)
    yield "no batch, dense", Problem([4], 4, 2, 8, 6, Dense(5), batch=0)
    yield "no queries", Problem([0], 4, 2, 8, 6, Dense(5), batch=2)
    yield "no keys", Problem([4], 4, 2, 8, 6, Dense(0), batch=2)
    yield "no keys but extra ones", Problem([4], 4, 2, 8, 6, Dense(0), batch=2, additional_tokens=3)
    yield "no tokens", Problem([0, 5], 4, 2, 8, 6, window, batch=2, additional_tokens=3)
    yield "nothing packed", Problem([0], 4, 2, 8, 6, Dense(0, cumulative_queries=[0, 0], cumulative_keys=[0, 0]))
    yield "lengths zero", Problem([4], 4, 2, 8, 6, Dense(5, key_lengths=[0, 0]), batch=2)
    yield "one token", Problem([1], 1, 1, 1, 1, Neighborhood([1], [1], [1], [1]))
    yield "one pixel", Problem([1, 1, 1], 2, 1, 3, 2, Neighborhood([5, 5, 5], [2, 2, 2], [3, 3, 3], [0, 0, 0]))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name,problem", list(empty_problems()), ids=lambda x: x if isinstance(x, str) else "")
def test_empty_problems(name, problem, engine):
    for style in memory.STYLES:
        compare.check_case(cases.Case(problem, {"engine": engine}, style, 1.0, 1))


@pytest.mark.parametrize("engine", ENGINES)
def test_values_beyond_any_axis(engine):
    """The longest windows, strides, dilations and band widths mean what they say; longer ones are refused."""
    far = 2**29
    for mask in (
        Neighborhood([far], [1], [1], [0]),
        Neighborhood([far], [far], [1], [1]),
        Neighborhood([far], [far // 3], [2], [0]),
        Neighborhood([3], [2], [far], [0]),
        Dense(9, "none", far, 2),
        Dense(9, "none", 2, far),
        Dense(9, "bottom_right", far, -1),
        Dense(9, "top_left", far - 1, 0),
    ):
        problem = Problem([11], 2, 1, 5, 4, mask, "float32", 2)
        compare.check_case(cases.Case(problem, {"engine": engine}, "contiguous", 1.0, 1))

    json = {k: v for k, v in bridge.problem_json(problem).items() if k != "dense"}
    for name in ("kernel_size", "dilation"):
        wide = {"kernel_size": [3], name: [10**12]}
        with pytest.raises(bridge.VicusError, match=rf"{name}\[0\] is {10**12}; allowed: "):
            bridge.call(
                "validate", {"problem": {k: v for k, v in json.items() if k != "dense"} | {"neighborhood": wide}}
            )


def test_supports_says_why_in_words():
    problem = bridge.problem_json(Problem([4, 5], 4, 2, 8, 6, Neighborhood([3, 3], [1, 1], [1, 1], [0, 0])))
    for engine in ("auto", *ENGINES):
        assert bridge.call("supports", {"problem": problem, "engine": engine}) == ""


def test_information():
    info = bridge.info()
    assert info["version"].count(".") == 2
    assert info["targets"] and set(info["targets"]) <= set(info["targets_built"])
    assert info["threads"] >= 1
    for target in info["targets"]:
        bridge.limit_cpu_target(target)
    bridge.limit_cpu_target("")
