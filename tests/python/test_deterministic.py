"""The same bits in every run, whatever the threads, and when calls run side by side."""

import concurrent.futures
import dataclasses

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


@pytest.mark.parametrize("kind", cases.KINDS)
def test_runs_and_threads(kind):
    def check(case):
        first = everything(with_threads(case, 1))
        assert everything(with_threads(case, 1)) == first, "two runs differ"
        for threads in (2, 3):
            again = everything(with_threads(case, threads))
            assert [n for n in first if again[n] != first[n]] == [], f"1 and {threads} threads differ"

    for dtype in memory.DTYPES:
        sampling.for_cases(f"deterministic {kind} {dtype}", cases.strategy(kind, dtype), 10, check)


def test_larger_problem_with_many_tasks():
    """Batch 1 and one head: all threads share one problem, also in backward."""
    window = oracle.Neighborhood([13, 13], [1, 1], [1, 1], [0, 0])
    for mask, layout in ((window, [40, 40]), (oracle.Dense(1500, "top_left"), [1500])):
        problem = oracle.Problem(layout, 1, 1, 32, 32, mask, "float32")
        case = cases.Case(problem, {"engine": "cpu"}, "contiguous", 1.0, 5)
        first = everything(with_threads(case, 1))
        for threads in (1, 2, 4):
            again = everything(with_threads(case, threads))
            assert [n for n in first if again[n] != first[n]] == [], f"{threads} threads"


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
