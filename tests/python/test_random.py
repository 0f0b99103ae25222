"""Random problems of every kind, storage type and CPU target against the oracle, forward and backward."""

import dataclasses

import bridge
import cases
import compare
import memory
import numpy as np
import oracle
import pytest
import sampling


@pytest.fixture(autouse=True)
def any_target():
    yield
    bridge.limit_cpu_target("")


@pytest.mark.parametrize("dtype", memory.DTYPES)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_cpu_engine(kind, dtype):
    sampling.for_cases(f"cpu {kind} {dtype}", cases.strategy(kind, dtype), 90, compare.check_case)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_reference_engine(kind):
    for dtype in memory.DTYPES:
        strategy = cases.strategy(kind, dtype, "reference")
        sampling.for_cases(f"reference {kind} {dtype}", strategy, 15, compare.check_case)


@pytest.mark.parametrize("dtype", memory.DTYPES)
def test_every_target(dtype):
    """The same cases on every instruction set this machine runs."""

    def check(case):
        for target in bridge.info()["targets"]:
            bridge.limit_cpu_target(target)
            compare.check_case(case)

    for kind in cases.KINDS:
        sampling.for_cases(f"targets {kind} {dtype}", cases.strategy(kind, dtype), 8, check)


@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_every_tile_height(kind, rows):
    """The same problem with each height, searched and forced to thin, long and cubic boxes."""
    rank = int(kind[0]) if kind[0].isdigit() else 1
    boxes = {
        1: [[1, 1, 1], [1, 1, rows], [1, 1, rows - 3]],
        2: [[1, 1, rows], [1, rows, 1], [1, 4, 4], [1, 5, 3]],
        3: [[rows, 1, 1], [2, 2, 4], [1, 3, 5], [2, 4, 2]],
    }[rank]

    def check(case):
        for box in [None, *boxes]:
            options = {"engine": "cpu", "rows": rows, "threads": case.options["threads"]}
            if box:
                options["tile_q"] = box
            compare.check_case(dataclasses.replace(case, options=options))

    sampling.for_cases(f"rows {kind} {rows}", cases.strategy(kind, "float32"), 6, check)


@pytest.mark.parametrize("dim", cases.HEAD_DIMS)
def test_every_head_dim(dim):
    """Each head_dim, with an equal and an unequal head_dim_v, in every type."""
    for dtype in memory.DTYPES:
        for dim_v in (dim, 129 - dim if dim < 129 else 5):

            def check(case, dim_v=dim_v):
                case.problem.head_dim, case.problem.head_dim_v = dim, dim_v
                compare.check_case(case)

            for kind in ("2d", "dense"):
                sampling.for_cases(f"dims {kind} {dtype} {dim} {dim_v}", cases.strategy(kind, dtype), 5, check)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stores_round_to_nearest_on_every_target(dtype):
    """A float32 result lies so close to the oracle's that nearly all stored values must be the oracle's, rounded."""
    stored = memory.DTYPES[dtype]
    problem = oracle.Problem([64], 2, 1, 24, 40, oracle.Dense(40), dtype)
    rng = np.random.default_rng(0)
    inputs = {n: rng.standard_normal(problem.shape(n)).astype(stored) for n in ("query", "key", "value")}
    nearest = oracle.forward(problem, inputs)[0].astype(stored)
    for target in bridge.info()["targets"]:
        bridge.limit_cpu_target(target)
        output = np.empty(problem.shape("output"), stored)
        bridge.call("forward", bridge.request(problem, engine="cpu"), inputs | {"output": output})
        assert np.mean(output != nearest) < 0.01, target
