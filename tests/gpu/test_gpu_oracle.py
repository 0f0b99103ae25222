"""The oracle of the GPU tests against the slow one of tests/python, and that the check notices errors. Needs no GPU."""

import dataclasses

import gpu_check
import gpu_oracle
import numpy as np
import oracle
import pytest
import torch
from gpu_problems import Case, fixed, neighborhood, random_case, tensors

SMALL = [case for case in [*fixed(), *(random_case(seed) for seed in range(200))] if case.problem.batch][::5]
SMALL = [case for case in SMALL if case.problem.queries * case.problem.keys * case.problem.heads < 20_000]


def as_float64(case):
    return dataclasses.replace(case, problem=dataclasses.replace(case.problem, dtype="float64"))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_oracles_agree(case):
    case = as_float64(case)
    p, t = case.problem, tensors(case, "cpu")
    got = gpu_oracle.compute(p, {n: x for n, x in t.items() if "grad" not in n}, t["grad_output"], t["grad_logsumexp"])
    arrays = {name: x.numpy() for name, x in t.items() if x is not None}
    output, logsumexp = oracle.forward(p, arrays)
    expected = {"output": output, "logsumexp": logsumexp}
    expected |= oracle.backward(p, arrays, arrays["grad_output"], arrays.get("grad_logsumexp"))
    assert expected.keys() == got.values.keys()
    for name, wanted in expected.items():
        np.testing.assert_allclose(got.values[name].numpy(), wanted, rtol=1e-9, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_peer_keeps_the_rule_and_errors_do_not(dtype):
    case = Case("2d", neighborhood((12, 13), 5, heads=4, kv=2, dim=32, dtype=dtype, additional_tokens=3), seed=1)
    p, t = case.problem, tensors(case, "cpu")
    inputs = {n: x for n, x in t.items() if "grad" not in n}
    arriving = t["grad_output"], t["grad_logsumexp"]
    kind = gpu_oracle.TYPES[dtype]
    ref, peer = (gpu_oracle.compute(p, inputs, *arriving, half=half) for half in (None, kind))
    # One key more or less: window 5 against window 4 at one axis.
    wrong = dataclasses.replace(p, mask=dataclasses.replace(p.mask, kernel_size=[5, 4]))
    other = gpu_oracle.compute(wrong, inputs, *arriving, half=kind)
    for name, x in ref.values.items():
        stored = torch.float32 if name == "logsumexp" else kind
        share = gpu_check.compare(name, peer.values[name].to(stored), x, peer.values[name], ref.noise[name])
        assert share <= 0.5
        with pytest.raises(AssertionError, match=name):
            gpu_check.compare(name, other.values[name].to(stored), x, peer.values[name], ref.noise[name])
