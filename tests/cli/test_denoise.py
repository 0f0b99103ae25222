"""`vicus denoise` as a person uses it: every kind of file, borders, blocks, wrong input.

The oracle `exact` is non-local means by its definition, in float64: it shares nothing with the program, not even the
idea of attention.
"""

import itertools
import json
import os
import subprocess

import numpy as np
import pytest
import soundfile
from PIL import Image
from skimage import data
from skimage.restoration import denoise_nl_means

VICUS = os.environ["VICUS_CLI"]


def run(*arguments):
    return subprocess.run([VICUS, "denoise", *map(str, arguments)], capture_output=True, text=True, timeout=300)


def denoise(source, target, *options):
    """Runs the program, which must succeed; returns its JSON report."""
    done = run(*np.atleast_1d(source), "-o", target, "--json", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def fast_exp(x):
    """scikit-image's approximation of exp: the high word of the double is linear in x (Schraudolph 1999)."""
    high = (1512775.3951951857 * x).astype(np.int32).astype(np.int64) + 1072632447
    return (high << 32).view(np.float64)


def exact(noisy, window, patch, h, like_scikit_image=False):
    """Non-local means of [*axes, channels] by its definition.

    `like_scikit_image` adds what its loops do to colour pictures: a patch whose distance exceeds 5 before its last row
    counts nothing, and exp is approximate.
    """
    noisy = np.asarray(noisy, dtype=np.float64)
    axes, channels = noisy.shape[:-1], noisy.shape[-1]
    half = [p // 2 for p in patch]
    padded = np.pad(noisy, [(p, p) for p in half] + [(0, 0)], mode="reflect")
    weights = {}
    for at in itertools.product(*(range(p) for p in patch)):
        spread = [(i - p // 2) / ((p - 1) / 4) if p > 1 else 0 for i, p in zip(at, patch, strict=True)]
        weights[at] = np.exp(-sum(x * x for x in spread) / 2)
    total = sum(weights.values())

    numerator, denominator = np.zeros_like(noisy), np.zeros(axes)
    for shift in itertools.product(*(range(-(w // 2), w // 2 + 1) for w in window)):
        here = tuple(slice(max(0, -s), min(n, n - s)) for s, n in zip(shift, axes, strict=True))
        there = tuple(slice(max(0, s), min(n, n + s)) for s, n in zip(shift, axes, strict=True))
        if any(s.stop <= s.start for s in here):
            continue
        distance, counts = 0, True
        for at, weight in weights.items():
            if like_scikit_image and at[-1] == 0:
                counts = counts & (distance <= 5 * total * channels * h * h)
            a = padded[tuple(slice(s.start + i, s.stop + i) for s, i in zip(here, at, strict=True))]
            b = padded[tuple(slice(s.start + i, s.stop + i) for s, i in zip(there, at, strict=True))]
            distance = distance + weight * np.sum((a - b) ** 2, axis=-1)
        distance /= total * channels * h * h
        likeness = fast_exp(-np.minimum(distance, 700)) * counts if like_scikit_image else np.exp(-distance)
        numerator[here] += likeness[..., None] * noisy[there]
        denominator[here] += likeness
    return numerator / denominator[..., None]


def noisy_array(shape, sigma, seed):
    """Smooth steps with noise, around an offset."""
    rng = np.random.default_rng(seed)
    clean = sum(np.sin(index / (3 + axis)) for axis, index in enumerate(np.indices(shape)))
    return np.round(clean) * 40 + 128 + rng.normal(scale=sigma, size=shape)


def peak_ratio(clean, picture):
    error = np.mean((np.asarray(clean, dtype=np.float64) - picture) ** 2)
    return 10 * np.log10(255**2 / error)


ARRAYS = [
    ((50,), (11,), (5,), False),
    ((7,), (21,), (15,), False),  # window and patch longer than the signal
    ((1,), (5,), (3,), False),
    ((40, 2), (9,), (3,), True),
    ((19, 23), (7, 7), (5, 5), False),
    ((12, 30), (5, 9), (3, 1), False),
    ((3, 2), (21, 21), (7, 7), False),
    ((14, 11, 3), (9, 9), (3, 3), True),
    ((5, 9, 8), (3, 5, 5), (1, 3, 3), False),
    ((4, 6, 7, 2), (3, 5, 3), (3, 3, 1), True),
]


@pytest.mark.parametrize(("shape", "window", "patch", "channels"), ARRAYS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_array_equals_definition(tmp_path, shape, window, patch, channels, dtype):
    noisy = noisy_array(shape, 10, seed=sum(shape)).astype(dtype)
    np.save(tmp_path / "in.npy", noisy)
    axes = ["--channels-last"] if channels else []
    sizes = ["--window", ",".join(map(str, window)), "--patch", ",".join(map(str, patch))]
    report = denoise(tmp_path / "in.npy", tmp_path / "out.npy", *sizes, "--sigma", 12, "--strength", 15, *axes)
    out = np.load(tmp_path / "out.npy")
    assert out.dtype == dtype
    assert out.shape == shape
    expected = exact(noisy if channels else noisy[..., None], window, patch, 15).reshape(shape)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-4)  # of 255: float32 has 1.5e-5 there
    assert report["runs"][0]["sigma"] == 12
    assert report["runs"][0]["head_dim"] == np.prod(patch) * (shape[-1] if channels else 1) + 1


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_engines(tmp_path, engine):
    noisy = noisy_array((15, 17), 10, seed=3).astype(np.float32)
    np.save(tmp_path / "in.npy", noisy)
    options = ["--window", 7, "--patch", 3, "--h", 9, "--engine", engine]
    report = denoise(tmp_path / "in.npy", tmp_path / "out.npy", *options)
    assert report["runs"][0]["engine"] == engine
    expected = exact(noisy[..., None], (7, 7), (3, 3), 9)[..., 0]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=0, atol=2e-4)


def test_clipped_borders_differ_from_shifted_ones(tmp_path):
    """A window shifted inward would let the corner see columns 0..6; clipped it sees 0..3 only."""
    noisy = np.zeros((1, 16), dtype=np.float32)
    noisy[0, 4:] = 1
    np.save(tmp_path / "in.npy", noisy)
    denoise(tmp_path / "in.npy", tmp_path / "out.npy", "--window", 7, "--patch", 1, "--strength", 10)
    out = np.load(tmp_path / "out.npy")[0]
    assert abs(out[0]) < 1e-6
    assert out[1] > 0.15


@pytest.mark.parametrize(
    ("shape", "sizes", "channels"),
    [((6000,), ["--window", 101, "--patch", 15], False), ((150, 170, 3), ["--window", 9, "--patch", 5], True),
     ((12, 60, 50), ["--window", "3,7,7", "--patch", "3,3,3"], False)],
)  # fmt: skip
def test_blocks_do_not_show(tmp_path, shape, sizes, channels):
    noisy = noisy_array(shape, 12, seed=5).astype(np.float32)
    np.save(tmp_path / "in.npy", noisy)
    options = [*sizes, "--sigma", 12, *(["--channels-last"] if channels else [])]
    whole = denoise(tmp_path / "in.npy", tmp_path / "whole.npy", *options)
    parts = denoise(tmp_path / "in.npy", tmp_path / "parts.npy", *options, "--memory", 1, "--threads", 1)
    assert whole["runs"][0]["blocks"] == 1
    if len(shape) > 1:
        assert parts["runs"][0]["blocks"] > 3
    # Sums in another order: a few roundings of values up to 300.
    np.testing.assert_allclose(np.load(tmp_path / "parts.npy"), np.load(tmp_path / "whole.npy"), rtol=0, atol=2e-4)


def test_repeats_bit_for_bit(tmp_path):
    np.save(tmp_path / "in.npy", noisy_array((60, 64), 12, seed=6).astype(np.float32))
    for name in "ab":
        denoise(tmp_path / "in.npy", tmp_path / f"{name}.npy")
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_weak_noise_is_computed_in_float64(tmp_path):
    """|f|^2 / h^2 is 1e8 here: float32 features would have no digit left."""
    noisy = noisy_array((20, 22), 0.01, seed=1)
    np.save(tmp_path / "in.npy", noisy)
    report = denoise(tmp_path / "in.npy", tmp_path / "out.npy", "--window", 7, "--patch", 3, "--strength", 0.012)
    assert report["runs"][0]["dtype"] == "float64"
    expected = exact(noisy[..., None], (7, 7), (3, 3), 0.012)[..., 0]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=0, atol=5e-4)


def test_against_scikit_image(tmp_path):
    """Equal to non-local means, from which scikit-image differs by its cut-off and its approximate exp only."""
    clean = data.astronaut()[60:108, 180:228].astype(np.float64)
    noisy = clean + np.random.default_rng(2).normal(scale=20, size=clean.shape)
    np.save(tmp_path / "in.npy", noisy)
    denoise(tmp_path / "in.npy", tmp_path / "out.npy", "--window", 11, "--patch", 5, "--sigma", 20, "--channels-last")
    out = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(out, exact(noisy, (11, 11), (5, 5), 20), rtol=0, atol=5e-4)
    same = {"patch_size": 5, "patch_distance": 5, "h": 20}
    peer = denoise_nl_means(noisy, **same, fast_mode=False, preserve_range=True, channel_axis=-1)
    np.testing.assert_allclose(peer, exact(noisy, (11, 11), (5, 5), 20, like_scikit_image=True), rtol=0, atol=1e-6)
    assert abs(peak_ratio(clean, out) - peak_ratio(clean, peer)) < 0.5


MODES = {"L": 1, "RGB": 3, "LA": 1, "RGBA": 3}


@pytest.mark.parametrize("mode", MODES)
def test_png_of_8_bits(tmp_path, mode):
    colours = MODES[mode]
    noisy = np.clip(np.round(noisy_array((18, 21, colours), 15, seed=4)), 0, 255).astype(np.uint8)
    pixels = noisy
    if "A" in mode:
        alpha = np.random.default_rng(0).integers(0, 256, (18, 21, 1), dtype=np.uint8)
        pixels = np.concatenate([noisy, alpha], axis=-1)
    Image.fromarray(pixels.squeeze(-1) if mode == "L" else pixels, mode).save(tmp_path / "in.png", dpi=(300, 300))
    report = denoise(tmp_path / "in.png", tmp_path / "out.png", "--window", 7, "--patch", 3, "--sigma", 15)
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.mode == mode
        assert round(picture.info["dpi"][0]) == 300
        out = np.asarray(picture).reshape(pixels.shape)
    assert report["runs"][0]["shape"] == [18, 21, colours]
    expected = exact(noisy, (7, 7), (3, 3), 15)
    assert np.abs(out[..., :colours] - expected).max() <= 0.5 + 1e-3
    assert np.array_equal(out[..., colours:], pixels[..., colours:])


def test_png_of_16_bits(tmp_path):
    noisy = np.clip(np.round(noisy_array((18, 21), 15, seed=4) * 257), 0, 65535).astype(np.uint16)
    Image.fromarray(noisy).save(tmp_path / "in.png")
    denoise(tmp_path / "in.png", tmp_path / "out.png", "--window", 7, "--patch", 3, "--sigma", 15)
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.mode in ("I;16", "I")
        out = np.asarray(picture).astype(np.float64)
    expected = exact(noisy[..., None], (7, 7), (3, 3), 15 * 257)[..., 0]
    assert np.abs(out - expected).max() <= 0.5 + 0.1


def test_palette_and_bilevel_png(tmp_path):
    rng = np.random.default_rng(8)
    Image.fromarray(rng.integers(0, 256, (9, 10, 3), dtype=np.uint8)).quantize(16).save(tmp_path / "palette.png")
    Image.fromarray(rng.integers(0, 2, (9, 10), dtype=np.uint8) * 255).convert("1").save(tmp_path / "bits.png")
    for name, mode in (("palette", "RGB"), ("bits", "L")):
        denoise(tmp_path / f"{name}.png", tmp_path / "out.png", "--window", 5, "--patch", 3, "--sigma", 40)
        with Image.open(tmp_path / f"{name}.png") as source, Image.open(tmp_path / "out.png") as picture:
            assert picture.mode == mode
            noisy = np.asarray(source.convert(mode)).reshape(9, 10, -1)
            out = np.asarray(picture).reshape(noisy.shape)
        assert np.abs(out - exact(noisy, (5, 5), (3, 3), 40)).max() <= 0.5 + 1e-3


def test_frames(tmp_path):
    noisy = np.clip(np.round(noisy_array((4, 13, 12, 3), 15, seed=9)), 0, 255).astype(np.uint8)
    sources = [tmp_path / f"frame{i}.png" for i in range(4)]
    for frame, path in zip(noisy, sources, strict=True):
        Image.fromarray(frame).save(path)
    (tmp_path / "clean").mkdir()
    denoise(sources, tmp_path / "clean", "--window", "3,5,5", "--patch", "1,3,3", "--sigma", 15)
    expected = exact(noisy, (3, 5, 5), (1, 3, 3), 15)
    for i in range(4):
        with Image.open(tmp_path / "clean" / f"frame{i}.png") as picture:
            assert np.abs(np.asarray(picture) - expected[i]).max() <= 0.5 + 1e-3


@pytest.mark.parametrize(("subtype", "step"), [("PCM_16", 2.0**-15), ("PCM_24", 2.0**-23), ("FLOAT", 2.0**-23)])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav(tmp_path, subtype, step, channels):
    time = np.arange(900) / 8000
    clean = 0.5 * np.sign(np.sin(2 * np.pi * 110 * time))[:, None] * np.array([1.0, 0.6])[:channels]
    noisy = clean + np.random.default_rng(1).normal(scale=0.05, size=clean.shape)
    soundfile.write(tmp_path / "in.wav", noisy, 8000, subtype=subtype)
    noisy, _ = soundfile.read(tmp_path / "in.wav", always_2d=True)
    denoise(tmp_path / "in.wav", tmp_path / "out.wav", "--window", 201, "--patch", 9, "--sigma", 0.06)
    info = soundfile.info(tmp_path / "out.wav")
    assert (info.samplerate, info.channels, info.subtype, info.frames) == (8000, channels, subtype, 900)
    out, _ = soundfile.read(tmp_path / "out.wav", always_2d=True)
    assert np.abs(out - exact(noisy, (201,), (9,), 0.06)).max() <= step + 3e-6
    assert np.std(out - clean) < 0.5 * np.std(noisy - clean)


def test_csv_changes_only_its_columns(tmp_path):
    noisy = noisy_array((80,), 5, seed=2)
    rows = [f"{1.5 * i},label{i}, {noisy[i]:.6f},{1e9 + noisy[i]:.6f}" for i in range(80)]
    (tmp_path / "in.csv").write_text("time,what,value,big\r\n" + "\r\n".join(rows) + "\r\n", newline="")
    options = ["--window", 31, "--patch", 5, "--strength", 8]
    denoise(tmp_path / "in.csv", tmp_path / "out.csv", *options, "--columns", "value,4")
    text = (tmp_path / "out.csv").read_bytes().decode()
    assert text.endswith("\r\n")
    lines = text.split("\r\n")[:-1]
    assert lines[0] == "time,what,value,big"
    expected = exact(noisy[:, None], (31,), (5,), 8)[:, 0]
    for i, line in enumerate(lines[1:]):
        fields = line.split(",")
        assert fields[:2] == rows[i].split(",")[:2]
        assert abs(float(fields[2]) - expected[i]) < 1e-4
        assert abs(float(fields[3]) - 1e9 - expected[i]) < 1e-4


def test_csv_without_header_takes_the_last_column(tmp_path):
    noisy = noisy_array((60,), 5, seed=2)
    text = "\n".join(f"{i}\t{float(noisy[i])!r}" for i in range(60))
    (tmp_path / "in.tsv").write_text(text)
    report = denoise(tmp_path / "in.tsv", tmp_path / "out.tsv", "--window", 31, "--patch", 5, "--strength", 8)
    assert len(report["runs"]) == 1
    out = np.loadtxt(tmp_path / "out.tsv")
    assert np.array_equal(out[:, 0], np.arange(60))
    np.testing.assert_allclose(out[:, 1], exact(noisy[:, None], (31,), (5,), 8)[:, 0], rtol=0, atol=1e-4)


def test_noise_is_estimated_and_removed(tmp_path):
    clean = data.astronaut()[0:128, 160:288]
    for sigma in (10, 25):
        noise = np.random.default_rng(sigma).normal(scale=sigma, size=clean.shape)
        noisy = np.clip(np.rint(clean + noise), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(tmp_path / "in.png")
        report = denoise(tmp_path / "in.png", tmp_path / "out.png")
        assert report["runs"][0]["sigma_estimated"]
        assert abs(report["runs"][0]["sigma"] - sigma) < 0.15 * sigma
        with Image.open(tmp_path / "out.png") as picture:
            assert peak_ratio(clean, np.asarray(picture)) > peak_ratio(clean, noisy) + 4


def test_no_noise_no_change(tmp_path):
    flat = np.full((20, 24, 3), 77, dtype=np.uint8)
    Image.fromarray(flat).save(tmp_path / "in.png")
    report = denoise(tmp_path / "in.png", tmp_path / "out.png")
    assert report["runs"][0]["strength"] == 0
    with Image.open(tmp_path / "out.png") as picture:
        assert np.array_equal(np.asarray(picture), flat)
    assert "no noise" in run(tmp_path / "in.png", "-o", tmp_path / "out.png").stdout


@pytest.fixture
def files(tmp_path):
    """One good and many bad inputs."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(tmp_path / "good.png")
    Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)).save(tmp_path / "wider.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:120])
    (tmp_path / "noise.png").write_bytes(rng.bytes(300))
    np.save(tmp_path / "nan.npy", np.array([1, np.nan, 2, 3], dtype=np.float32))
    np.save(tmp_path / "bytes.npy", np.zeros((4, 4), dtype=np.uint8))
    np.save(tmp_path / "deep.npy", np.zeros((2, 2, 2, 2), dtype=np.float32))
    np.save(tmp_path / "empty.npy", np.zeros((0, 4), dtype=np.float32))
    np.save(tmp_path / "good.npy", rng.normal(size=(9, 9)).astype(np.float32))
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n3\n")
    (tmp_path / "words.csv").write_text("a,b\n1,2\n3,x\n")
    (tmp_path / "good.csv").write_text("a,b\n1,2\n3,4\n")
    (tmp_path / "header.csv").write_text("a,b\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["good.png", "-o", "out.png", "--window", "20"], "--window"),
        (["good.png", "-o", "out.png", "--window", "0"], "--window"),
        (["good.png", "-o", "out.png", "--window", "x"], "--window"),
        (["good.png", "-o", "out.png", "--window", "3,3,3"], "--window"),
        (["good.png", "-o", "out.png", "--patch", "-3"], "--patch"),
        (["good.png", "-o", "out.png", "--sigma", "0"], "--sigma"),
        (["good.png", "-o", "out.png", "--sigma", "nan"], "--sigma"),
        (["good.png", "-o", "out.png", "--strength", "-1"], "--strength"),
        (["good.png", "-o", "out.png", "--memory", "0"], "--memory"),
        (["good.png", "-o", "out.png", "--memory", "1", "--window", "301", "--sigma", "3"], "--memory"),
        (["good.png", "-o", "out.png", "--dtype", "float16"], "--dtype"),
        (["good.png", "-o", "out.png", "--engine", "abacus"], "--engine"),
        (["good.png", "-o", "out.png", "--columns", "a"], "--columns"),
        (["good.png", "-o", "out.png", "--channels-last"], "--channels-last"),
        (["good.png", "-o", "out.jpg"], "--output"),
        (["good.png"], "--output"),
        (["-o", "out.png"], "input"),
        (["good.png", "wider.png", "-o", "."], "input"),
        (["good.png", "good.png", "-o", "."], "input"),
        (["good.png", "wider.png", "-o", "out.png"], "--output"),
        (["good.png", "good.csv", "-o", "."], "input"),
        (["good.csv", "good.csv", "-o", "."], "input"),
        (["cut.png", "-o", "out.png"], "input"),
        (["noise.png", "-o", "out.png"], "input"),
        (["nan.npy", "-o", "out.npy"], "input"),
        (["bytes.npy", "-o", "out.npy"], "input"),
        (["deep.npy", "-o", "out.npy"], "input"),
        (["empty.npy", "-o", "out.npy"], "input"),
        (["good.npy", "-o", "out.png"], "--output"),
        (["ragged.csv", "-o", "out.csv"], "input"),
        (["words.csv", "-o", "out.csv"], "input"),
        (["header.csv", "-o", "out.csv"], "input"),
        (["good.csv", "-o", "out.csv", "--columns", "c"], "--columns"),
        (["good.csv", "-o", "out.csv", "--columns", "3"], "--columns"),
    ],
)
def test_wrong_input(files, arguments, named):
    before = sorted(path.name for path in files.iterdir())
    done = subprocess.run([VICUS, "denoise", *arguments], capture_output=True, text=True, cwd=files, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert named in done.stderr
    assert sorted(path.name for path in files.iterdir()) == before


def test_missing_input_and_directory(files):
    before = sorted(path.name for path in files.iterdir())
    for arguments in (["absent.png", "-o", "out.png"], ["good.png", "-o", "absent/out.png"]):
        done = subprocess.run([VICUS, "denoise", *arguments], capture_output=True, text=True, cwd=files, timeout=60)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert "absent" in done.stderr
    assert sorted(path.name for path in files.iterdir()) == before


def test_help_and_summary(tmp_path):
    assert "--window" in run("--help").stdout
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12), dtype=np.uint8)).save(tmp_path / "in.png")
    done = run(tmp_path / "in.png", "-o", tmp_path / "out.png", "--threads", 2)
    assert done.returncode == 0
    assert "GFLOP/s on 2 threads" in done.stdout
