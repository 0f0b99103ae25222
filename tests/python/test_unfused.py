"""qk and av, forward and backward, against the oracle."""

import dataclasses

import bridge
import cases
import compare
import memory
import numpy as np
import oracle_unfused
import pytest
import sampling


def limited(case):
    """Scores are as large as window times tokens: windows stay small enough for an oracle of loops."""
    problem = case.problem
    problem.attn_bias, problem.scale = False, 1.0
    for a, n in enumerate(problem.layout):
        problem.layout[a] = min(n, {1: 60, 2: 9, 3: 5}[len(problem.layout)])
        problem.mask.kernel_size[a] = min(problem.mask.kernel_size[a], {1: 40, 2: 7, 3: 5}[len(problem.layout)])
        problem.mask.stride[a] = min(problem.mask.stride[a], problem.mask.kernel_size[a])
    problem.additional_tokens = min(problem.additional_tokens, 7)
    problem.head_dim, problem.head_dim_v = min(problem.head_dim, 65), min(problem.head_dim_v, 65)
    problem.batch = min(problem.batch, 2)
    return problem


class Call:
    def __init__(self, case):
        self.problem, self.style = limited(case), case.style
        self.rng = np.random.default_rng(case.seed)
        self.dtype = memory.DTYPES[self.problem.dtype]
        self.arith = np.float64 if self.problem.dtype == "float64" else np.float32
        self.request = {"mask": bridge.mask_json(self.problem.mask)}
        self.slots = oracle_unfused.slot_keys(self.problem)
        window = self.slots.shape[1] + self.problem.additional_tokens
        self.scores_shape = (self.problem.batch, self.problem.heads, *self.problem.layout, window)
        self.used = np.ones((self.problem.queries, window), bool)
        self.used[:, : self.slots.shape[1]] = self.slots >= 0
        self.used = np.broadcast_to(self.used.reshape(*self.problem.layout, window), self.scores_shape)

    def tensor(self, name):
        shape = list(self.problem.shape(name))
        if name != "rpb":  # heads first
            shape.insert(1, shape.pop(-2))
        return memory.put(self.rng.standard_normal(shape), self.dtype, self.style, self.rng)

    def run(self, operation, arrays, outputs):
        style = self.style if self.style in memory.STYLES else "sliced"
        out = {n: memory.Output(shape, self.dtype, style, self.rng) for n, shape in outputs.items()}
        bridge.call(operation, self.request, arrays | {n: x.view for n, x in out.items()})
        for name, x in out.items():
            x.check_guards(name)
        return {n: x.view for n, x in out.items()}

    def check(self, what, got, ref, pt, terms):
        """`terms`: how many products one value sums; each is a few units at most."""
        for name, value in got.items():
            finite = np.abs(ref[name][np.isfinite(ref[name])])
            magnitude = np.sqrt(terms) * (1.0 + finite.max(initial=0.0))
            pt_stored = compare.rounded(pt[name], value.dtype)
            compare.check_tensor(f"{what} {name}", value, ref[name], pt_stored, self.arith, magnitude, 1.0, terms)


def check_qk(case):
    call = Call(case)
    problem = call.problem
    names = ["query", "key"] + ["additional_keys"] * bool(problem.additional_tokens) + ["rpb"] * problem.rpb
    inputs = {n: call.tensor(n) for n in names}
    got = call.run("qk_forward", inputs, {"scores": call.scores_shape})
    ref, pt = (oracle_unfused.qk_forward(problem, inputs, a) for a in (np.float64, call.arith))
    assert np.array_equal(np.isneginf(got["scores"]), ~call.used)
    call.check("qk", got, {"scores": ref}, {"scores": pt}, problem.head_dim)

    grad = call.rng.standard_normal(call.scores_shape)
    grad[~call.used] = np.nan  # never read
    grad = memory.put(grad, call.dtype, "sliced", call.rng)
    shapes = {"d_" + n: x.shape for n, x in inputs.items()}
    without_bias = {n: x for n, x in inputs.items() if n != "rpb"}
    got = call.run("qk_backward", without_bias | {"grad_scores": grad}, shapes)
    refs = oracle_unfused.qk_backward(problem, inputs, grad)
    pts = oracle_unfused.qk_backward(problem, inputs, grad, call.arith)
    got = {n.removeprefix("d_"): x for n, x in got.items()}
    call.check("qk gradient of", got, refs, pts, problem.queries * problem.heads * problem.batch)


def check_av(case):
    call = Call(case)
    problem = call.problem
    inputs = {"value": call.tensor("value")}
    if problem.additional_tokens:
        inputs["additional_values"] = call.tensor("additional_values")
    scores = call.rng.standard_normal(call.scores_shape)
    scores[~call.used] = np.nan  # ignored
    inputs["scores"] = memory.put(scores, call.dtype, "sliced", call.rng)
    shape = (problem.batch, problem.heads, *problem.layout, problem.head_dim_v)
    got = call.run("av_forward", inputs, {"output": shape})
    ref, pt = (oracle_unfused.av_forward(problem, inputs, a) for a in (np.float64, call.arith))
    call.check("av", got, {"output": ref}, {"output": pt}, call.slots.shape[1])

    grad = memory.put(call.rng.standard_normal(shape), call.dtype, call.style, call.rng)
    shapes = {"d_" + n: x.shape for n, x in inputs.items()}
    got = call.run("av_backward", inputs | {"grad_output": grad}, shapes)
    assert not np.asarray(got["d_scores"])[~call.used].any()  # unused slots have gradient zero
    refs = oracle_unfused.av_backward(problem, inputs, grad)
    pts = oracle_unfused.av_backward(problem, inputs, grad, call.arith)
    got = {n.removeprefix("d_"): x for n, x in got.items()}
    call.check("av gradient of", got, refs, pts, problem.queries * problem.heads * problem.batch)


@pytest.mark.parametrize("dtype", memory.DTYPES)
@pytest.mark.parametrize("rank", ["1d", "2d", "3d"])
@pytest.mark.parametrize("check", [check_qk, check_av])
def test_against_oracle(check, rank, dtype):
    sampling.for_cases(f"{check.__name__} {rank} {dtype}", cases.strategy(rank, dtype), 25, check)


@pytest.mark.parametrize("rank", ["1d", "2d", "3d"])
def test_halves_make_the_whole(rank):
    """softmax(scale * qk) . av is the fused operator of the same library."""

    def check(case):
        case = dataclasses.replace(case, options={"engine": "cpu"}, style="contiguous", spread=1.0)
        limited(case)
        case.problem.rpb = False
        run = compare.Run(case)
        fused = run.forward()["output"].view
        first = {n: np.moveaxis(np.asarray(x), -2, 1) for n, x in run.inputs.items()}
        call = Call(case)
        qk = {n: first[n] for n in ("query", "key", "additional_keys") if n in first}
        scores = call.run("qk_forward", qk, {"scores": call.scores_shape})["scores"]
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        av = {n: first[n] for n in ("value", "additional_values") if n in first} | {"scores": p}
        shape = (case.problem.batch, case.problem.heads, *case.problem.layout, case.problem.head_dim_v)
        output = call.run("av_forward", av, {"output": shape})["output"]
        np.testing.assert_allclose(np.moveaxis(output, 1, -2), fused, rtol=1e-9, atol=1e-11)

    sampling.for_cases(f"halves {rank}", cases.strategy(rank, "float64"), 30, check)


def test_score_slots():
    def check(case):
        limited(case)
        slots = bridge.call("score_slots", bridge.request(case.problem))
        assert slots == np.prod(case.problem.mask.kernel_size) + case.problem.additional_tokens

    sampling.for_cases("slots", cases.strategy("3d", "float32"), 30, check)
