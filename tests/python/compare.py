"""Engine against oracle: one case, forward and backward, every tensor by its largest error.

Rule: max|got - ref| <= 2 * max|pt - ref| + floor. `ref` is the float64 oracle, `pt` the oracle in the engine's own
arithmetic (float32, or float64 for float64) on the same stored inputs, rounded to what is stored. The floor covers
cases where `pt` is right by luck: half a unit of the stored type at the largest value, and a few units of arithmetic
on the sum of the absolute terms: more when large logits magnify them, and when many terms are summed (a part of a unit
each; most where all are equal, as broadcast inputs give: every step within a power of two rounds alike then, which
drifts by n / 5.4 units of the sum of n at worst). Products below the normal numbers may vanish.
"""

import bridge
import cases
import memory
import ml_dtypes
import numpy as np
import oracle

# Units of the arithmetic allowed per unit of conditioning; see the docstring. In float64 the peer is the oracle itself
# and shows no error to compare with: sums of hundreds of terms in another order need the room.
ARITHMETIC_UNITS = {np.float32: 1.0, np.float64: 32.0}
TERMS_OF_A_UNIT, EQUAL_TERMS_OF_A_UNIT = 16, 5.4


def epsilon(dtype):
    return float(ml_dtypes.finfo(dtype).eps)


def rounded(x, dtype):
    with np.errstate(all="ignore"):
        return np.asarray(x).astype(dtype)


def check_tensor(name, got, ref, pt, arith, magnitude, logits, terms, equal=False):
    """`magnitude`: largest sum of absolute terms; `terms`: how many there may be; `equal`: they may all be the same."""
    stored = got.dtype
    got, pt = np.asarray(got).astype(np.float64), np.asarray(pt).astype(np.float64)
    assert got.shape == ref.shape, name
    for kind in (np.isnan, np.isposinf, np.isneginf):
        assert np.array_equal(kind(got), kind(ref)), (
            f"{name}: {kind.__name__} differs at {mismatch(kind(got), kind(ref))}"
        )
    finite = np.isfinite(ref)
    if not finite.any():
        return 0.0, 1.0
    got, ref, pt = got[finite], ref[finite], pt[finite]
    error, peer = np.abs(got - ref).max(), np.abs(pt - ref).max()
    units = ARITHMETIC_UNITS[arith] * logits + terms / (EQUAL_TERMS_OF_A_UNIT if equal else TERMS_OF_A_UNIT)
    floor = 0.5 * epsilon(stored) * np.abs(ref).max() + units * epsilon(arith) * magnitude
    floor += float(ml_dtypes.finfo(stored).smallest_subnormal) + 1e4 * float(np.finfo(arith).smallest_normal)
    assert error <= 2 * peer + floor, f"{name}: error {error:.3e}, peer {peer:.3e}, floor {floor:.3e}"
    return error, 2 * peer + floor


def mismatch(got, ref):
    return [tuple(int(i) for i in index) for index in np.argwhere(got != ref)[:5]]


def lse_dtype(problem):
    return memory.DTYPES["float64" if problem.dtype == "float64" else "float32"]


class Run:
    """One case on the engine. Calls check guards; results stay readable."""

    def __init__(self, case):
        self.case, self.problem = case, case.problem
        self.rng = np.random.default_rng(case.seed)
        self.arith = np.float64 if case.problem.dtype == "float64" else np.float32
        self.dtype = memory.DTYPES[case.problem.dtype]
        self.inputs = cases.tensors(case, self.rng)
        self.request = bridge.request(case.problem, **case.options)
        self.with_lse_grad = self.rng.random() < 0.5
        self.gradients = ["query", "key", "value"]
        self.gradients += ["additional_keys", "additional_values"] if self.problem.additional_tokens else []
        self.gradients += ["rpb"] if self.problem.rpb else []

    def _outputs(self, shapes):
        style = cases.output_style(self.case)
        return {name: memory.Output(shape, dtype, style, self.rng) for name, (shape, dtype) in shapes.items()}

    def forward(self, with_lse=True):
        shapes = {"output": (self.problem.shape("output"), self.dtype)}
        if with_lse:
            shapes["logsumexp"] = (self.problem.shape("logsumexp"), lse_dtype(self.problem))
        out = self._outputs(shapes)
        bridge.call("forward", self.request, self.inputs | {name: x.view for name, x in out.items()})
        for name, x in out.items():
            x.check_guards(name)
        return out

    def arriving(self):
        """Gradients that arrive: of the output, and of logsumexp in half of the cases."""
        style = self.case.style
        arriving = {
            "grad_output": memory.put(
                self.rng.standard_normal(self.problem.shape("output")), self.dtype, style, self.rng
            )
        }
        if self.with_lse_grad:
            values = self.rng.standard_normal(self.problem.shape("logsumexp"))
            arriving["grad_logsumexp"] = memory.put(values, lse_dtype(self.problem), style, self.rng)
        return arriving

    def backward(self, saved, arriving, names=None):
        names = self.gradients if names is None else names
        shapes = {n: (self.problem.shape(n), self.inputs[n].dtype) for n in names}
        out = self._outputs(shapes)
        arrays = self.inputs | {"output": saved["output"].view, "logsumexp": saved["logsumexp"].view} | arriving
        bridge.call("backward", self.request, arrays | {"d_" + name: x.view for name, x in out.items()})
        for name, x in out.items():
            x.check_guards("gradient of " + name)
        return out


def check_case(case):
    """Forward and backward of one case. Returns the largest error as a share of what was allowed."""
    run = Run(case)
    problem = case.problem
    out = run.forward()
    arriving = run.arriving()
    grads = run.backward(out, arriving)

    d_out, d_lse = arriving["grad_output"], arriving.get("grad_logsumexp")
    ref_out, ref_lse = oracle.forward(problem, run.inputs)
    pt_out, pt_lse = oracle.forward(problem, run.inputs, run.arith)
    pt_out, pt_lse = rounded(pt_out, run.dtype), rounded(pt_lse, lse_dtype(problem))
    ref = oracle.backward(problem, run.inputs, d_out, d_lse)
    pt = oracle.backward(problem, run.inputs, d_out, d_lse, run.arith, saved=(pt_out, pt_lse))
    size = oracle.magnitudes(problem, run.inputs, d_out, d_lse)

    shares = []

    keys = problem.keys + problem.additional_tokens
    queries = problem.queries * problem.heads // problem.heads_kv
    terms = {"output": keys, "logsumexp": keys, "query": keys, "rpb": problem.batch * problem.queries}

    def check(name, got, ref, pt, magnitude):
        count = terms.get(name.removeprefix("gradient of "), queries)
        equal = case.style == "broadcast"
        error, allowed = check_tensor(name, got, ref, pt, run.arith, magnitude, size["logits"], count, equal)
        shares.append(error / allowed if allowed else 0.0)

    check("output", out["output"].view, ref_out, pt_out, size["output"])
    check("logsumexp", out["logsumexp"].view, ref_lse, pt_lse, 1.0)
    for name, got in grads.items():
        check("gradient of " + name, got.view, ref[name], rounded(pt[name], got.view.dtype), size[name])
    return max(shares, default=0.0)
