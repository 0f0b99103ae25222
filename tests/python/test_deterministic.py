"""The same bits in every run, and when calls run side by side.

The planner may choose other tiles for another number of threads, and sums in another order; with the same tiles, who
computes them makes no difference.
"""

import concurrent.futures
import dataclasses

import bridge
import cases
import compare
import memory
import numpy as np
import oracle
import pytest
import sampling


def everything(case):
    """Bytes of all results of a case."""
    run = compare.Run(case)
    out = run.forward()
    grads = run.backward(out, run.arriving())
    return {name: x.bytes() for name, x in (out | grads).items()}


def with_threads(case, threads):
    return dataclasses.replace(case, options=case.options | {"threads": threads})


def tiles(case):
    plan = bridge.call("plan", bridge.request(case.problem, **case.options))
    return plan["forward"], plan["backward"]


def check_threads(case):
    known = []
    for threads in (1, 2, 3, 4):
        now = with_threads(case, threads)
        first = everything(now)
        assert everything(now) == first, f"two runs with {threads} threads differ"
        for other_tiles, other in known:
            if other_tiles == tiles(now):
                wrong = [n for n in first if first[n] != other[n]]
                assert not wrong, f"the same tiles on {threads} and fewer threads differ in {wrong}"
        known.append((tiles(now), first))


@pytest.mark.parametrize("kind", cases.KINDS)
def test_runs_and_threads(kind):
    for dtype in memory.DTYPES:
        sampling.for_cases(f"deterministic {kind} {dtype}", cases.strategy(kind, dtype), 8, check_threads)


@pytest.mark.parametrize("rows", [0, 32])
def test_larger_problem_with_many_tasks(rows):
    """Batch 1 and one head: all threads share one problem, also in backward."""
    window = oracle.Neighborhood([13, 13], [1, 1], [1, 1], [0, 0])
    for mask, layout in ((window, [40, 40]), (oracle.Dense(1500, "top_left"), [1500])):
        problem = oracle.Problem(layout, 1, 1, 32, 32, mask, "float32")
        check_threads(cases.Case(problem, {"engine": "cpu", "rows": rows}, "contiguous", 1.0, 5))


def test_calls_from_many_threads():
    """Plans, forwards and backwards of different problems at once give the bits they give alone."""
    some = []
    for seed in range(sampling.scaled(48)):
        choose = cases.RandomChooser(1000 + seed)
        some.append(cases.case(choose, choose.pick(cases.KINDS), choose.pick(list(memory.DTYPES))))
    alone = [everything(case) for case in some]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            together = list(pool.map(everything, some))
            wrong = [case for case, a, b in zip(some, alone, together, strict=True) if a != b]
            assert not wrong


def test_backward_computes_only_what_is_asked():
    """Any subset of gradients has the bits of the whole set."""

    def check(case):
        run = compare.Run(case)
        out = run.forward()
        arriving = run.arriving()
        whole = run.backward(out, arriving)
        for keep in range(len(run.gradients)):
            names = [run.gradients[keep], *(n for n in run.gradients if np.random.default_rng(keep).random() < 0.3)]
            part = run.backward(out, arriving, list(dict.fromkeys(names)))
            for name, x in part.items():
                assert x.bytes() == whole[name].bytes(), (name, names)

    for kind in cases.KINDS:
        sampling.for_cases(f"subset {kind}", cases.strategy(kind, "float32"), 12, check)


def test_logsumexp_is_optional():
    def check(case):
        run = compare.Run(case)
        assert run.forward(with_lse=False)["output"].bytes() == run.forward()["output"].bytes()

    for kind in cases.KINDS:
        sampling.for_cases(f"no logsumexp {kind}", cases.strategy(kind, "float32"), 10, check)
