"""The oracle against hand-worked windows and finite differences: nothing here touches the library."""

import itertools

import numpy as np
import oracle
import oracle_unfused
import pytest
from oracle import Dense, Neighborhood, Problem


def test_windows_by_hand():
    # Window 3, interior and both edges: shifted inward, never shorter.
    assert oracle.axis_keys(5, 3, 1, 1, False) == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
    # An even window has one more key to the left of its leader than to the right.
    assert oracle.axis_keys(6, 4, 1, 1, False)[3] == [1, 2, 3, 4]
    # Stride 2: queries 2 and 3 share the leader 3; causal: the last of the group leads, and ends are clipped.
    assert oracle.axis_keys(7, 3, 2, 1, False)[2] == oracle.axis_keys(7, 3, 2, 1, False)[3] == [2, 3, 4]
    assert oracle.axis_keys(7, 3, 2, 1, True)[2] == [1, 2]
    assert oracle.axis_keys(7, 3, 2, 1, True)[3] == [1, 2, 3]
    # The last group is cut by the axis: query 6 leads itself.
    assert oracle.axis_keys(7, 3, 2, 1, True)[6] == [4, 5, 6]
    # Dilation 3 on 8 tokens: classes of 3, 3 and 2 tokens; the last is shorter than its window: all of it.
    assert oracle.axis_keys(8, 3, 1, 3, False)[4] == [1, 4, 7]
    assert oracle.axis_keys(8, 3, 1, 3, False)[5] == [2, 5]
    assert oracle.axis_keys(8, 3, 1, 3, True)[2] == [2]
    # Longer than the axis.
    assert oracle.axis_keys(3, 9, 5, 1, False) == [[0, 1, 2]] * 3
    assert oracle.axis_keys(3, 9, 5, 1, True) == [[0], [0, 1], [0, 1, 2]]


def test_bands_by_hand():
    assert oracle.band_keys(2, 4, "none", -1, -1) == [[0, 1, 2, 3]] * 2
    assert oracle.band_keys(2, 4, "top_left", -1, -1) == [[0], [0, 1]]
    assert oracle.band_keys(2, 4, "bottom_right", -1, -1) == [[0, 1, 2], [0, 1, 2, 3]]
    assert oracle.band_keys(4, 2, "bottom_right", -1, -1) == [[], [], [0], [0, 1]]
    assert oracle.band_keys(2, 4, "none", 1, 0) == [[1, 2], [2, 3]]
    assert oracle.band_keys(3, 3, "top_left", 1, 5) == [[0], [0, 1], [1, 2]]
    assert oracle.band_keys(2, 0, "none", -1, -1) == [[], []]


def test_visible_keys_by_hand():
    grid = Problem([3, 4], 1, 1, 1, 1, Neighborhood([3, 2], [1, 1], [1, 2], [0, 1]))
    # Row 0 sees rows 0..2; column 2 is position 1 of the even class and sees columns 0 and 2.
    assert oracle.visible_keys(grid, 0)[2] == [0, 2, 4, 6, 8, 10]
    packed = Problem(
        [4], 1, 1, 1, 1, Dense(5, "bottom_right", cumulative_queries=[0, 3, 3, 4], cumulative_keys=[0, 2, 4, 5])
    )
    assert oracle.visible_keys(packed, 0) == [[], [0], [0, 1], [4]]
    padded = Problem([2], 1, 1, 1, 1, Dense(6, "bottom_right", key_lengths=[3, 0]), batch=2)
    assert oracle.visible_keys(padded, 0) == [[0, 1], [0, 1, 2]]
    assert oracle.visible_keys(padded, 1) == [[], []]
    assert oracle.mask_pairs(padded) == 5


def test_softmax_by_hand():
    problem = Problem([2], 1, 1, 1, 1, Dense(2, "top_left"), dtype="float64", scale=1.0)
    tensors = {
        "query": np.array([1.0, 2.0]).reshape(1, 2, 1, 1),
        "key": np.array([0.5, np.log(3.0) / 2]).reshape(1, 2, 1, 1),
        "value": np.array([10.0, 20.0]).reshape(1, 2, 1, 1),
    }
    output, lse = oracle.forward(problem, tensors)
    # Query 1 has logits 1 and log 3: weights e / (e + 3) and 3 / (e + 3).
    np.testing.assert_allclose(output.ravel(), [10.0, (10 * np.e + 60) / (np.e + 3)], rtol=1e-14)
    np.testing.assert_allclose(lse.ravel(), [0.5, np.log(np.e + 3)], rtol=1e-14)


def small_problems():
    window = Neighborhood([3, 2], [2, 1], [1, 2], [0, 1])
    yield "window", Problem([4, 5], 4, 2, 3, 2, window, "float64", 2, 0.7, 2, rpb=True)
    yield "long", Problem([5], 2, 1, 2, 3, Neighborhood([9], [4], [2], [0]), "float64", 1, None, 0, rpb=True)
    yield "bias", Problem([4], 2, 1, 3, 2, Dense(5, "bottom_right"), "float64", 2, None, 1, attn_bias=True)
    yield "lengths", Problem([4], 2, 2, 2, 2, Dense(5, "none", 1, 1, [0, 4]), "float64", 2)
    packed = Dense(7, "bottom_right", cumulative_queries=[0, 4, 4, 6], cumulative_keys=[0, 3, 5, 7])
    yield "packed", Problem([6], 2, 1, 2, 3, packed, "float64", 1, -0.3)


def random_tensors(problem, rng):
    names = ["query", "key", "value"]
    names += ["additional_keys", "additional_values"] if problem.additional_tokens else []
    names += ["rpb"] if problem.rpb else []
    tensors = {name: rng.standard_normal(problem.shape(name)) for name in names}
    if problem.attn_bias:
        bias = rng.standard_normal((1, problem.heads, problem.queries, problem.keys))
        bias[rng.random(bias.shape) < 0.2] = -np.inf
        bias[:, 0, 1] = -np.inf
        tensors["attn_bias"] = bias
    return tensors


def central_difference(loss, x, step=1e-5):
    grad = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        kept = x[index]
        x[index] = kept + step
        above = loss()
        x[index] = kept - step
        grad[index] = (above - loss()) / (2 * step)
        x[index] = kept
    return grad


@pytest.mark.parametrize("name,problem", list(small_problems()), ids=lambda x: x if isinstance(x, str) else "")
def test_gradients_by_finite_differences(name, problem):
    rng = np.random.default_rng(7)
    tensors = random_tensors(problem, rng)
    grad_output = rng.standard_normal(problem.shape("output"))
    grad_lse = rng.standard_normal(problem.shape("logsumexp"))

    def loss():
        output, lse = oracle.forward(problem, tensors)
        return (output * grad_output).sum() + (np.where(lse > -np.inf, lse, 0.0) * grad_lse).sum()

    exact = oracle.backward(problem, tensors, grad_output, grad_lse)
    assert set(exact) == set(tensors) - {"attn_bias"}
    for key, value in exact.items():
        np.testing.assert_allclose(value, central_difference(loss, tensors[key]), rtol=1e-6, atol=1e-8, err_msg=key)
    saved = oracle.forward(problem, tensors)
    for key, value in oracle.backward(problem, tensors, grad_output, grad_lse, saved=saved).items():
        np.testing.assert_allclose(value, exact[key], rtol=1e-10, atol=1e-12, err_msg=key)
    bounds = oracle.magnitudes(problem, tensors, grad_output, grad_lse)
    for key, value in exact.items():
        assert np.abs(value).max() <= bounds[key] * (1 + 1e-12), key


def test_unseen_values_are_not_touched():
    problem = Problem([6], 2, 1, 2, 2, Neighborhood([3], [1], [2], [1]), "float64")
    rng = np.random.default_rng(3)
    tensors = random_tensors(problem, rng)
    clean = oracle.forward(problem, tensors)
    tensors["key"][0, 5], tensors["value"][0, 5] = np.nan, np.inf
    output, lse = oracle.forward(problem, tensors)
    np.testing.assert_array_equal(output[:, :5], clean[0][:, :5])
    np.testing.assert_array_equal(lse[:, :5], clean[1][:, :5])
    assert np.isnan(output[:, 5]).all()


@pytest.mark.parametrize("extra", [0, 2])
def test_unfused_halves_make_the_fused_operator(extra):
    mask = Neighborhood([3, 5], [2, 1], [1, 2], [1, 0])
    problem = Problem([4, 5], 4, 2, 3, 2, mask, "float64", 2, 1.0, extra, rpb=True)
    rng = np.random.default_rng(11)
    tensors = random_tensors(problem, rng)
    output, lse = oracle.forward(problem, tensors)
    first = {k: x if k == "rpb" else np.moveaxis(x, -2, 1) for k, x in tensors.items()}
    qk = {k: first[k] for k in ("query", "key", "rpb", "additional_keys") if k in first}
    scores = oracle_unfused.qk_forward(problem, qk)
    assert np.isneginf(scores).any()  # causal rows and the window longer than its class leave slots unused
    top = scores.max(axis=-1, keepdims=True)
    np.testing.assert_allclose(
        (top[..., 0] + np.log(np.exp(scores - top).sum(-1))), np.moveaxis(lse, -1, 1), rtol=1e-12
    )
    p = np.exp(scores - np.moveaxis(lse, -1, 1)[..., None])
    av = {"scores": p, "value": first["value"]}
    if extra:
        av["additional_values"] = first["additional_values"]
    np.testing.assert_allclose(oracle_unfused.av_forward(problem, av), np.moveaxis(output, -2, 1), rtol=1e-12)


def test_unfused_gradients_by_finite_differences():
    problem = Problem([3, 4], 2, 1, 2, 3, Neighborhood([3, 2], [1, 2], [2, 1], [0, 1]), "float64", 1, 1.0, 1, rpb=True)
    rng = np.random.default_rng(5)
    first = {k: x if k == "rpb" else np.moveaxis(x, -2, 1).copy() for k, x in random_tensors(problem, rng).items()}
    qk = {k: first[k] for k in ("query", "key", "rpb", "additional_keys")}
    used = np.isfinite(oracle_unfused.qk_forward(problem, qk))
    grad_scores = np.where(used, rng.standard_normal(used.shape), np.nan)  # unused slots are never read
    for key, value in oracle_unfused.qk_backward(problem, qk, grad_scores).items():
        numeric = central_difference(
            lambda: np.where(used, grad_scores * oracle_unfused.qk_forward(problem, qk), 0.0).sum(), qk[key]
        )
        np.testing.assert_allclose(value, numeric, rtol=1e-6, atol=1e-8, err_msg=key)
    scores = np.where(used, rng.standard_normal(used.shape), 0.0)
    av = {"scores": scores, "value": first["value"], "additional_values": first["additional_values"]}
    grad_output = rng.standard_normal((1, 2, 3, 4, 3))
    for key, value in oracle_unfused.av_backward(problem, av, grad_output).items():
        numeric = central_difference(lambda: (grad_output * oracle_unfused.av_forward(problem, av)).sum(), av[key])
        np.testing.assert_allclose(value, numeric, rtol=1e-6, atol=1e-8, err_msg=key)


def test_merge_is_exact_and_its_gradients_match_finite_differences():
    problem = Problem([5], 2, 2, 3, 2, Dense(9), "float64", 1)
    rng = np.random.default_rng(13)
    tensors = random_tensors(problem, rng)
    whole = oracle.forward(problem, tensors)
    parts = []
    for begin, end in itertools.pairwise([0, 4, 4, 9]):
        part = Problem([5], 2, 2, 3, 2, Dense(end - begin), "float64", 1)
        cut = {k: x if k == "query" else x[:, begin:end] for k, x in tensors.items()}
        parts.append(oracle.forward(part, cut))
    outputs, lses = [list(x) for x in zip(*parts, strict=True)]
    outputs[1][...] = np.nan  # the empty part has weight 0 whatever it holds
    for got, want in zip(oracle_unfused.merge_forward(outputs, lses), whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)
    grad_output, grad_lse = rng.standard_normal(whole[0].shape), rng.standard_normal(whole[1].shape)

    def loss():
        output, lse = oracle_unfused.merge_forward(outputs, lses)
        return (output * grad_output).sum() + (lse * grad_lse).sum()

    d_outputs, d_lses = oracle_unfused.merge_backward(outputs, lses, grad_output, grad_lse)
    for i in (0, 2):
        np.testing.assert_allclose(d_outputs[i], central_difference(loss, outputs[i]), rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(d_lses[i], central_difference(loss, lses[i]), rtol=1e-6, atol=1e-8)
    assert not d_outputs[1].any() and not d_lses[1].any()
