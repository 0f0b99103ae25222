"""NaN and infinity: outside a query's window they never reach it, inside they do."""

import bridge
import cases
import compare
import memory
import numpy as np
import oracle
import pytest
import sampling


def seen_mask(problem, inputs):
    """[B, Hkv, Sq, Sk]: some query head of the group sees the key."""
    seen = np.zeros((problem.batch, problem.heads_kv, problem.queries, problem.keys), bool)
    for row in oracle.rows(problem, inputs, np.float64):
        seen[row.batch, row.heads_kv, row.query, row.keys] = True
    return seen


def poison(problem, inputs, rng):
    """The inputs with NaN and infinities in a quarter of the keys and values; which (batch, token) these are."""
    spoilt = rng.random((problem.batch, problem.keys)) < 0.25
    changed = dict(inputs)
    for name in ("key", "value"):
        x = np.array(inputs[name], order="C")
        flat = x.reshape(problem.batch, problem.keys, problem.heads_kv, x.shape[-1])
        bad = rng.choice([np.nan, np.inf, -np.inf], size=flat.shape)
        flat[spoilt] = bad[spoilt].astype(x.dtype)
        changed[name] = x
    return changed, spoilt


def values(outputs, problem):
    rows = (problem.batch, problem.queries, problem.heads)
    return [np.array(x.view).reshape(*rows, *x.view.shape[len(problem.layout) + 2 :]) for x in outputs.values()]


def check_forward(case):
    run = compare.Run(case)
    problem = case.problem
    clean = values(run.forward(), problem)
    seen = seen_mask(problem, run.inputs)
    run.inputs, spoilt = poison(problem, run.inputs, run.rng)
    dirty = values(run.forward(), problem)
    # A query head whose window holds no spoilt key has the same bits as before.
    reached = (seen & spoilt[:, None, None, :]).any(axis=-1).transpose(0, 2, 1)
    reached = np.repeat(reached, problem.heads // problem.heads_kv, axis=2)
    for before, after in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(after[~reached], before[~reached])
    # A NaN that every head of a group sees is in its output; infinities may cancel, so ask only of NaN keys.
    keys = np.asarray(run.inputs["key"], np.float64).reshape(
        problem.batch, problem.keys, problem.heads_kv, problem.head_dim
    )
    nan_keys = np.isnan(keys).any(axis=(2, 3))
    if not problem.attn_bias and problem.heads_kv == 1:
        must = (seen[:, 0] & nan_keys[:, None, :]).any(-1)
        assert np.isnan(dirty[0].astype(np.float64)).all(axis=-1)[must].all(), "a NaN inside a window got lost"


def check_backward(case):
    """Spoilt keys, values, queries and arriving gradients only reach gradients of what they see or are seen by."""
    run = compare.Run(case)
    problem = case.problem
    out = run.forward()
    arriving = run.arriving()
    clean = run.backward(out, arriving)
    seen = seen_mask(problem, run.inputs)
    run.inputs, spoilt_keys = poison(problem, run.inputs, run.rng)
    spoilt_queries = run.rng.random((problem.batch, problem.queries)) < 0.1
    rows = (problem.batch, problem.queries)
    for arrays, name in ((run.inputs, "query"), (arriving, "grad_output")):
        x = np.array(arrays[name], order="C")
        x.reshape(*rows, problem.heads, x.shape[-1])[spoilt_queries] = np.nan
        arrays[name] = x
    dirty = run.backward(run.forward(), arriving)
    # Spoilt: a query that is, or sees a key that is; a key that is seen by a spoilt query, or is itself.
    bad_q = spoilt_queries[:, None, :] | (seen & spoilt_keys[:, None, None, :]).any(-1)
    bad_k = spoilt_keys[:, None, :] | (seen & bad_q[..., None]).any(-2)
    bad_q = np.repeat(bad_q.transpose(0, 2, 1), problem.heads // problem.heads_kv, axis=2)
    bad_k = bad_k.transpose(0, 2, 1)
    for name, bad in (("query", bad_q), ("key", bad_k), ("value", bad_k)):
        shape = (*bad.shape, problem.shape(name)[-1])
        before, after = (np.array(x[name].view).reshape(shape) for x in (clean, dirty))
        np.testing.assert_array_equal(after[~bad], before[~bad], err_msg="gradient of " + name)


@pytest.mark.parametrize("dtype", memory.DTYPES)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_forward(kind, dtype):
    sampling.for_cases(f"nan {kind} {dtype}", cases.strategy(kind, dtype), 25, check_forward)


@pytest.mark.parametrize("dtype", memory.DTYPES)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_backward(kind, dtype):
    sampling.for_cases(f"nan backward {kind} {dtype}", cases.strategy(kind, dtype), 25, check_backward)


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_queries_that_see_nothing(engine):
    """Output 0, logsumexp -inf and zero gradients, whatever the arrays hold."""
    mask = oracle.Dense(3, "bottom_right")
    problem = oracle.Problem([7], 2, 1, 5, 4, mask, "float32", 2)
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(problem.shape(n)).astype(np.float32) for n in ("query", "key", "value")}
    arrays["query"][:, :4] = np.nan
    output, lse = np.empty(problem.shape("output"), np.float32), np.empty(problem.shape("logsumexp"), np.float32)
    bridge.call("forward", bridge.request(problem, engine=engine), arrays | {"output": output, "logsumexp": lse})
    assert not output[:, :4].any()
    assert np.isneginf(lse[:, :4]).all()
    assert np.isfinite(output[:, 4:]).all() and np.isfinite(lse[:, 4:]).all()
    grads = {"d_" + n: np.full_like(x, np.nan) for n, x in arrays.items()}
    arriving = {"grad_output": np.ones_like(output), "grad_logsumexp": np.ones_like(lse)}
    arriving["grad_output"][:, :4] = np.inf
    saved = {"output": output, "logsumexp": lse}
    bridge.call("backward", bridge.request(problem, engine=engine), arrays | saved | arriving | grads)
    assert not grads["d_query"][:, :4].any()
    assert all(np.isfinite(x).all() for x in grads.values())
