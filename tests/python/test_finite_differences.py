"""Gradients of the library against finite differences of the library, in float64: no oracle in between."""

import bridge
import cases
import compare
import numpy as np
import pytest
import sampling


def loss(problem, request, inputs, weights):
    out = {n: np.empty(w.shape) for n, w in weights.items()}
    bridge.call("forward", request, inputs | out)
    return sum((np.where(np.isfinite(x), x, 0.0) * weights[n]).sum() for n, x in out.items())


def check_along_directions(case):
    """The derivative along a random direction of every input at once, and along each input alone."""
    case.style, case.spread = "contiguous", 1.0
    run = compare.Run(case)
    run.with_lse_grad = True
    run.inputs = {n: np.array(x) for n, x in run.inputs.items()}
    if run.problem.rpb:
        run.inputs["rpb"] = run.inputs["rpb"].astype(np.float64)
    out = run.forward()
    arriving = run.arriving()
    grads = {n: x.view for n, x in run.backward(out, arriving).items()}
    weights = {"output": np.array(arriving["grad_output"]), "logsumexp": np.array(arriving["grad_logsumexp"])}
    step = 1e-5
    for names in (*([n] for n in run.gradients), run.gradients):
        direction = {n: run.rng.standard_normal(run.inputs[n].shape) for n in names}
        length = np.sqrt(sum((d**2).sum() for d in direction.values())) or 1.0
        ends = []
        for sign in (1, -1):
            moved = {n: run.inputs[n] + sign * step / length * d for n, d in direction.items()}
            ends.append(loss(run.problem, run.request, run.inputs | moved, weights))
        numeric = (ends[0] - ends[1]) / (2 * step)
        exact = sum((grads[n] * d).sum() for n, d in direction.items()) / length
        size = sum(np.abs(grads[n] * direction[n]).sum() for n in names) / length
        assert numeric == pytest.approx(exact, rel=1e-5, abs=1e-7 * (1 + size)), names


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_along_directions(kind, engine):
    label = f"differences {kind} {engine}"
    sampling.for_cases(label, cases.strategy(kind, "float64", engine), 25, check_along_directions)
