"""`vicus attend`: arrays in, arrays out, against numpy."""

import ml_dtypes
import numpy as np
import pytest
from program import attention, dense_mask, neighborhood_mask, succeed
from safetensors.numpy import load_file, save_file

TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "float16": 2e-3, "bfloat16": 2e-2}
DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def arrays(layout, heads=2, heads_kv=None, dim=4, dim_v=None, batch=1, dtype=np.float32, keys=None, seed=0):
    random = np.random.default_rng(seed)
    heads_kv, dim_v, kv_layout = heads_kv or heads, dim_v or dim, keys or layout
    make = lambda *shape: random.standard_normal(shape).astype(dtype)  # noqa: E731
    return (
        make(batch, *layout, heads, dim),
        make(batch, *kv_layout, heads_kv, dim),
        make(batch, *kv_layout, heads_kv, dim_v),
    )


def save_npy(folder, **named):
    for name, array in named.items():
        np.save(folder / f"{name}.npy", array)


def attend_npy(folder, query, key, value, *options):
    """Runs attend on .npy files in `folder`; returns output and logsumexp."""
    save_npy(folder, q=query, k=key, v=value)
    before = set(folder.iterdir())
    standard = ["-q", "q.npy", "-k", "k.npy", "-v", "v.npy", "-o", "out.npy", "--lse", "lse.npy"]
    assert succeed("attend", *standard, *options, cwd=folder) == ""
    assert set(folder.iterdir()) - before == {folder / "out.npy", folder / "lse.npy"}, "no temporary file stays"
    return np.load(folder / "out.npy"), np.load(folder / "lse.npy")


def check(result, expected, dtype="float32"):
    (output, lse), (want_output, want_lse) = result, expected
    assert output.shape == want_output.shape
    assert lse.shape == want_lse.shape
    assert lse.dtype == (np.float64 if dtype == "float64" else np.float32)
    np.testing.assert_allclose(output.astype(np.float64), want_output, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    np.testing.assert_allclose(lse, want_lse, atol=1e-4 if dtype != "float64" else 1e-12)


@pytest.mark.parametrize("engine", ["auto", "cpu", "reference"])
@pytest.mark.parametrize(
    ("layout", "kernel", "stride", "dilation", "causal"),
    [
        ([9], [4], [1], [1], [False]),
        ([10], [5], [3], [2], [True]),
        ([5, 6], [3, 4], [1, 2], [2, 1], [False, True]),
        ([3, 4, 5], [2, 3, 3], [1, 1, 2], [1, 2, 1], [True, False, False]),
        ([4, 3], [9, 9], [1, 1], [1, 1], [False, False]),
    ],
)
def test_neighborhood(tmp_path, engine, layout, kernel, stride, dilation, causal):
    q, k, v = arrays(layout, batch=2)
    options = ["--kernel-size", *kernel, "--stride", *stride, "--dilation", *dilation]
    options += ["--causal", *map(int, causal), "--engine", engine, "--threads", 2]
    result = attend_npy(tmp_path, q, k, v, *options)
    check(result, attention(q, k, v, neighborhood_mask(layout, kernel, stride, dilation, causal)))


def test_one_value_for_all_axes(tmp_path):
    q, k, v = arrays([5, 6])
    result = attend_npy(tmp_path, q, k, v, "--kernel-size", 3, "--causal")
    check(result, attention(q, k, v, neighborhood_mask([5, 6], [3, 3], causal=[True, True])))


def test_values_may_be_separated_by_commas(tmp_path):
    q, k, v = arrays([5, 6])
    result = attend_npy(tmp_path, q, k, v, "--kernel-size", "3,5", "--causal", "0,1")
    check(result, attention(q, k, v, neighborhood_mask([5, 6], [3, 5], causal=[False, True])))


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("causal", "left", "right"),
    [("none", -1, -1), ("top-left", -1, -1), ("bottom-right", -1, -1), ("none", 2, 1), ("top-left", 1, -1)],
)
def test_dense(tmp_path, engine, causal, left, right):
    q, k, v = arrays([7], heads=4, heads_kv=2, dim=3, dim_v=5, batch=2, keys=[9])
    options = ["--dense", "--window-left", left, "--window-right", right, "--engine", engine]
    options += [] if causal == "none" else ["--causal", causal]
    result = attend_npy(tmp_path, q, k, v, *options)
    check(result, attention(q, k, v, dense_mask(7, 9, causal, left, right)))


def test_key_lengths_and_rows_without_keys(tmp_path):
    q, k, v = arrays([4], batch=3, keys=[6])
    mask = np.stack([np.broadcast_to(np.arange(6) < n, (1, 4, 6)) for n in (6, 2, 0)])
    output, lse = attend_npy(tmp_path, q, k, v, "--dense", "--key-lengths", 6, 2, 0)
    check((output, lse), attention(q, k, v, mask))
    assert (output[2] == 0).all()
    assert (lse[2] == -np.inf).all()


def test_packed_sequences(tmp_path):
    q, k, v = arrays([7], keys=[9])
    options = ["--dense", "--causal", "bottom-right", "--cumulative-queries", 0, 3, 7, "--cumulative-keys", 0, 4, 9]
    output, lse = attend_npy(tmp_path, q, k, v, *options)
    for queries, keys in ((slice(0, 3), slice(0, 4)), (slice(3, 7), slice(4, 9))):
        part = attention(
            q[:, queries],
            k[:, keys],
            v[:, keys],
            dense_mask(queries.stop - queries.start, keys.stop - keys.start, "bottom-right"),
        )
        check((output[:, queries], lse[:, queries]), part)


def test_attn_bias(tmp_path):
    q, k, v = arrays([5], keys=[6], batch=2)
    bias = np.random.default_rng(1).standard_normal((2, 1, 5, 6)).astype(np.float32)
    bias[0, 0, 2, :4] = -np.inf
    save_npy(tmp_path, bias=bias)
    result = attend_npy(tmp_path, q, k, v, "--dense", "--attn-bias", "bias.npy")
    check(result, attention(q, k, v, np.ones((5, 6), bool), bias=bias.astype(np.float64)))


def test_extra_tokens_and_scale(tmp_path):
    q, k, v = arrays([4, 4])
    extra_k, _, extra_v = (a[:, :3] for a in arrays([3], seed=7))
    save_npy(tmp_path, ek=extra_k, ev=extra_v)
    options = ["--kernel-size", 3, "--additional-keys", "ek.npy", "--additional-values", "ev.npy", "--scale", 0.7]
    result = attend_npy(tmp_path, q, k, v, *options)
    mask = neighborhood_mask([4, 4], [3, 3])
    check(result, attention(q, k, v, mask, 0.7, extra_keys=extra_k, extra_values=extra_v))


def test_scale_zero_is_a_zero(tmp_path):
    q, k, v = arrays([6])
    output, _ = attend_npy(tmp_path, q, k, v, "--dense", "--scale", 0)
    np.testing.assert_allclose(output, np.broadcast_to(v.mean(1, keepdims=True), output.shape), atol=1e-6)


def test_rpb(tmp_path):
    layout, kernel = [4, 5], [3, 2]
    q, k, v = arrays(layout)
    rpb = np.random.default_rng(2).standard_normal((2, 5, 3)).astype(np.float32)
    save_npy(tmp_path, rpb=rpb)
    bias = np.zeros((1, 2, 20, 20))
    for i, j in np.argwhere(neighborhood_mask(layout, kernel)):
        query, key = np.unravel_index(i, layout), np.unravel_index(j, layout)
        bias[0, :, i, j] = rpb[:, key[0] - query[0] + kernel[0] - 1, key[1] - query[1] + kernel[1] - 1]
    result = attend_npy(tmp_path, q, k, v, "--kernel-size", *kernel, "--rpb", "rpb.npy")
    check(result, attention(q, k, v, neighborhood_mask(layout, kernel), bias=bias))


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_dtypes_npy(tmp_path, dtype):
    q, k, v = arrays([8], dtype=DTYPES[dtype])
    options = ["--dtype", "bfloat16"] if dtype == "bfloat16" else []
    output, lse = attend_npy(tmp_path, q, k, v, "--kernel-size", 5, *options)
    if dtype == "bfloat16":
        # numpy forgets the type: np.save wrote '<V2', np.load gives void. The program writes the same as ml_dtypes.
        assert output.dtype == np.dtype("V2")
        output = output.view(ml_dtypes.bfloat16)
    assert output.dtype == DTYPES[dtype]
    check((output, lse), attention(q, k, v, neighborhood_mask([8], [5])), dtype)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_dtypes_safetensors(tmp_path, dtype):
    q, k, v = arrays([8], dtype=DTYPES[dtype])
    save_file({"query": q, "key": k, "value": v}, tmp_path / "in.safetensors", metadata={"from": "a test"})
    options = ["--dense", "-o", "out.safetensors", "--lse", "out.safetensors"]
    assert succeed("attend", "-i", "in.safetensors", *options, cwd=tmp_path) == ""
    result = load_file(tmp_path / "out.safetensors")
    assert set(result) == {"output", "logsumexp"}
    assert result["output"].dtype == DTYPES[dtype]
    check((result["output"], result["logsumexp"]), attention(q, k, v, dense_mask(8, 8)), dtype)


def test_npy_header_is_numpys_own(tmp_path):
    q, k, v = arrays([8])
    output, _ = attend_npy(tmp_path, q, k, v, "--dense")
    np.save(tmp_path / "again.npy", output)
    assert (tmp_path / "again.npy").read_bytes() == (tmp_path / "out.npy").read_bytes()


def test_names_in_safetensors(tmp_path):
    q, k, v = arrays([8])
    save_file({"x.q": q, "x.k": k, "x.v": v, "steps": np.arange(3)}, tmp_path / "in.safetensors")
    succeed("attend", "-i", "in.safetensors", "--names", "x.q", "x.k", "x.v", "--dense", "-o", "a.npy", cwd=tmp_path)
    places = [f"in.safetensors:x.{name}" for name in "qkv"]
    operands = ["-q", places[0], "-k", places[1], "-v", places[2]]
    succeed("attend", *operands, "--dense", "-o", "b.safetensors:y", cwd=tmp_path)
    expected, _ = attention(q, k, v, dense_mask(8, 8))
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), expected, atol=1e-5)
    np.testing.assert_allclose(load_file(tmp_path / "b.safetensors")["y"], expected, atol=1e-5)


def test_fortran_order(tmp_path):
    q, k, v = arrays([3, 5], batch=2)
    result = attend_npy(tmp_path, np.asfortranarray(q), np.asfortranarray(k), v, "--kernel-size", 3)
    assert b"'fortran_order': True" in (tmp_path / "q.npy").read_bytes()
    check(result, attention(q, k, v, neighborhood_mask([3, 5], [3, 3])))


def test_long_headers(tmp_path):
    q, k, v = arrays([6])
    for version in ((2, 0), (3, 0)):
        with open(tmp_path / "q2.npy", "wb") as file:
            np.lib.format.write_array(file, q, version=version)
        save_npy(tmp_path, k=k, v=v)
        succeed("attend", "-q", "q2.npy", "-k", "k.npy", "-v", "v.npy", "--dense", "-o", "o.npy", cwd=tmp_path)
        expected, _ = attention(q, k, v, dense_mask(6, 6))
        np.testing.assert_allclose(np.load(tmp_path / "o.npy"), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 6, 2, 4), (1, 1, 1, 1)])
def test_empty_batch_and_one_token(tmp_path, shape):
    x = np.ones(shape, np.float32)
    output, lse = attend_npy(tmp_path, x, x, x, "--kernel-size", 3)
    np.testing.assert_array_equal(output, x)
    assert lse.shape == shape[:-1]


def test_existing_output_is_replaced(tmp_path):
    q, k, v = arrays([6])
    (tmp_path / "out.npy").write_text("old")
    (tmp_path / "lse.npy").write_text("old")
    save_npy(tmp_path, q=q, k=k, v=v)
    operands = ["-q", "q.npy", "-k", "k.npy", "-v", "v.npy"]
    succeed("attend", *operands, "--dense", "-o", "out.npy", "--lse", "lse.npy", cwd=tmp_path)
    check((np.load(tmp_path / "out.npy"), np.load(tmp_path / "lse.npy")), attention(q, k, v, dense_mask(6, 6)))
    assert {p.name for p in tmp_path.iterdir()} == {"q.npy", "k.npy", "v.npy", "out.npy", "lse.npy"}


def test_output_may_replace_an_input(tmp_path):
    q, k, v = arrays([6])
    save_npy(tmp_path, q=q, k=k, v=v)
    succeed("attend", "-q", "q.npy", "-k", "k.npy", "-v", "v.npy", "--dense", "-o", "q.npy", cwd=tmp_path)
    np.testing.assert_allclose(np.load(tmp_path / "q.npy"), attention(q, k, v, dense_mask(6, 6))[0], atol=1e-5)


def test_results_repeat_bit_for_bit(tmp_path):
    q, k, v = arrays([40, 10], heads=4, dim=16)
    first = attend_npy(tmp_path, q, k, v, "--kernel-size", 5)
    (tmp_path / "out.npy").unlink()
    (tmp_path / "lse.npy").unlink()
    second = attend_npy(tmp_path, q, k, v, "--kernel-size", 5)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))
