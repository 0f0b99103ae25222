"""Merging of partial attentions against the oracle, and against attention over all keys at once."""

import bridge
import cases
import compare
import memory
import numpy as np
import oracle_unfused
import pytest
import sampling
from hypothesis import strategies as st
from oracle import Dense, Problem


@st.composite
def merges(draw):
    return {
        "parts": draw(st.integers(1, 6)),
        "shape": [draw(st.integers(0, 3)), *draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))],
        "heads": draw(st.integers(1, 4)),
        "dim": draw(st.sampled_from(cases.HEAD_DIMS)),
        "unseen": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "spread": draw(st.sampled_from([1.0, 30.0])),
        "lse_grad": draw(st.booleans()),
        "style": draw(st.sampled_from(memory.STYLES)),
        "seed": draw(st.integers(0, 2**31 - 1)),
    }


def numbered(name, values):
    return {f"{name}{i}": x for i, x in enumerate(values)}


def check_merge(case, dtype_name):
    rng = np.random.default_rng(case["seed"])
    dtype = memory.DTYPES[dtype_name]
    arith = np.float64 if dtype_name == "float64" else np.float32
    lse_dtype = np.dtype(arith)
    rows = [*case["shape"], case["heads"]]
    outputs, lses = [], []
    for _ in range(case["parts"]):
        lse = rng.standard_normal(rows) * case["spread"]
        lse[rng.random(rows) < case["unseen"]] = -np.inf
        out = rng.standard_normal([*rows, case["dim"]])
        out[np.isneginf(lse)] = rng.choice([np.nan, np.inf, 0.0])  # whatever it holds
        outputs.append(memory.put(out, dtype, case["style"], rng))
        lses.append(memory.put(lse, lse_dtype, case["style"], rng))
    inputs = numbered("output", outputs) | numbered("logsumexp", lses)

    def check(name, got, ref, pt, magnitude):
        pt = compare.rounded(pt, got.dtype)
        compare.check_tensor(name, got, ref, pt, arith, magnitude, 1.0 + 2 * case["spread"], case["parts"])

    out = memory.Output([*rows, case["dim"]], dtype, case["style"], rng)
    lse = memory.Output(rows, lse_dtype, case["style"], rng)
    bridge.call("merge_forward", {"parts": case["parts"]}, inputs | {"output": out.view, "logsumexp": lse.view})
    ref, pt = (oracle_unfused.merge_forward(outputs, lses, a) for a in (np.float64, arith))
    for name, x, r, p in (("output", out, ref[0], pt[0]), ("logsumexp", lse, ref[1], pt[1])):
        x.check_guards(name)
        check(name, x.view, r, p, 4.0)

    arriving = {"grad_output": memory.put(rng.standard_normal([*rows, case["dim"]]), dtype, case["style"], rng)}
    if case["lse_grad"]:
        arriving["grad_logsumexp"] = memory.put(rng.standard_normal(rows), lse_dtype, case["style"], rng)
    d_out = [memory.Output([*rows, case["dim"]], dtype, case["style"], rng) for _ in outputs]
    d_lse = [memory.Output(rows, lse_dtype, case["style"], rng) for _ in lses]
    wanted = [rng.random() < 0.8 for _ in outputs]
    arrays = inputs | arriving | numbered("d_logsumexp", [x.view for x in d_lse])
    arrays |= {f"d_output{i}": x.view for i, x in enumerate(d_out) if wanted[i]}
    bridge.call("merge_backward", {"parts": case["parts"]}, arrays)
    refs, pts = (
        oracle_unfused.merge_backward(outputs, lses, arriving["grad_output"], arriving.get("grad_logsumexp"), a)
        for a in (np.float64, arith)
    )
    for i in range(case["parts"]):
        d_lse[i].check_guards("gradient of logsumexp")
        check(f"gradient of logsumexp {i}", d_lse[i].view, refs[1][i], pts[1][i], 16.0 * case["dim"] ** 0.5)
        if wanted[i]:
            d_out[i].check_guards("gradient of output")
            check(f"gradient of output {i}", d_out[i].view, refs[0][i], pts[0][i], 4.0)
        else:
            d_out[i].check_untouched("a gradient nobody asked for")


@pytest.mark.parametrize("dtype", memory.DTYPES)
def test_against_oracle(dtype):
    sampling.for_cases(f"merge {dtype}", merges(), 60, lambda case: check_merge(case, dtype))


def test_spans_of_gradients_may_be_empty():
    rng = np.random.default_rng(1)
    inputs = numbered("output", [rng.standard_normal((1, 4, 2, 3)) for _ in range(2)])
    inputs |= numbered("logsumexp", [rng.standard_normal((1, 4, 2)) for _ in range(2)])
    inputs["grad_output"] = rng.standard_normal((1, 4, 2, 3))
    both = numbered("d_output", [np.full((1, 4, 2, 3), np.nan) for _ in range(2)])
    bridge.call("merge_backward", {"parts": 2, "grad_logsumexps": 0}, inputs | both)
    assert all(np.isfinite(x).all() for x in both.values())
    lses = numbered("d_logsumexp", [np.full((1, 4, 2), np.nan) for _ in range(2)])
    bridge.call("merge_backward", {"parts": 2, "grad_outputs": 0}, inputs | lses)
    assert all(np.isfinite(x).all() for x in lses.values())


def test_split_attention_merges_to_the_whole():
    """Keys cut in three, one part empty: output, logsumexp and all gradients of the whole, to float64 rounding."""
    rng = np.random.default_rng(2)
    problem = Problem([33], 4, 2, 17, 8, Dense(70), "float64", 2)
    case = cases.Case(problem, {"engine": "cpu"}, "contiguous", 1.0, 3)
    run = compare.Run(case)
    run.with_lse_grad = True
    whole = run.forward()
    arriving = run.arriving()
    grads = run.backward(whole, arriving)
    parts = []
    for begin, end in ((0, 1), (1, 1), (1, 70)):
        piece = compare.Run(
            cases.Case(Problem([33], 4, 2, 17, 8, Dense(end - begin), "float64", 2), {}, "sliced", 1.0, 0)
        )
        piece.inputs = {n: x if n == "query" else x[:, begin:end] for n, x in run.inputs.items()}
        parts.append((piece, piece.forward()))
    saved = numbered("output", [x["output"].view for _, x in parts])
    saved |= numbered("logsumexp", [x["logsumexp"].view for _, x in parts])
    merged = {"output": np.empty(problem.shape("output")), "logsumexp": np.empty(problem.shape("logsumexp"))}
    bridge.call("merge_forward", {"parts": 3}, saved | merged)
    for name, x in merged.items():
        np.testing.assert_allclose(x, whole[name].view, rtol=1e-12, atol=1e-13)
    d_out = [rng.standard_normal(problem.shape("output")) for _ in parts]
    d_lse = [rng.standard_normal(problem.shape("logsumexp")) for _ in parts]
    bridge.call(
        "merge_backward", {"parts": 3}, saved | arriving | numbered("d_output", d_out) | numbered("d_logsumexp", d_lse)
    )
    query = np.zeros(problem.shape("query"))
    for i, (name, begin, end) in enumerate((("first", 0, 1), ("empty", 1, 1), ("rest", 1, 70))):
        piece, out = parts[i]
        got = piece.backward(out, {"grad_output": d_out[i], "grad_logsumexp": d_lse[i]})
        query += got["query"].view
        for tensor in ("key", "value"):
            np.testing.assert_allclose(
                got[tensor].view, grads[tensor].view[:, begin:end], rtol=1e-10, atol=1e-12, err_msg=name
            )
    np.testing.assert_allclose(query, grads["query"].view, rtol=1e-10, atol=1e-12)
