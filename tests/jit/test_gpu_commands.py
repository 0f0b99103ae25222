"""`vicus attend` and `vicus profile` on a GPU that only keeps a record: what is copied, launched and said."""

import importlib.util
import json
import os
import pathlib
import subprocess

import numpy as np
import pytest
from probe import CLEAN, FAKE_CUDA, FAKE_NVRTC

VICUS = os.environ["VICUS_CLI"]
SHAPE = (2, 20, 30, 4, 64)
BYTES = int(np.prod(SHAPE)) * 2
ATTEND = [
    "attend",
    "-q",
    "q.npy",
    "-k",
    "k.npy",
    "-v",
    "v.npy",
    "--kernel-size",
    "7",
    "--engine",
    "sm80",
    "-o",
    "o.npy",
]
PROBLEM = ["--batch", "2", "--layout", "20", "30", "--heads", "4", "--kernel-size", "7", "--dtype", "float16"]


@pytest.fixture
def place(tmp_path):
    random = np.random.default_rng(0)
    for name in "qkv":
        np.save(tmp_path / f"{name}.npy", random.standard_normal(SHAPE).astype(np.float16))
    return {
        "VICUS_NVRTC": FAKE_NVRTC,
        "VICUS_CACHE_DIR": tmp_path / "cache",
        "VICUS_CUDA_DRIVER": FAKE_CUDA,
        "FAKE_CUDA_LOG": tmp_path / "events",
    }


def run(*arguments, place):
    folder = pathlib.Path(place["FAKE_CUDA_LOG"]).parent
    environment = CLEAN | {name: str(value) for name, value in place.items()}
    return subprocess.run([VICUS, *arguments], capture_output=True, text=True, env=environment, cwd=folder, timeout=300)


def succeed(*arguments, place):
    done = run(*arguments, place=place)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def fail(*arguments, place, naming, code):
    done = run(*arguments, place=place)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    for part in naming:
        assert part in done.stderr, done.stderr


def events(place):
    return pathlib.Path(place["FAKE_CUDA_LOG"]).read_text().splitlines()


def test_attend_copies_there_and_back(place, tmp_path):
    succeed(*ATTEND, "--lse", "l.npy", place=place)
    rows = BYTES // 2 // 64 * 4
    there = [f"allocate {BYTES}", f"to device {BYTES}"] * 3
    assert events(place)[:9] == [*there, f"allocate {BYTES}", f"allocate {rows}", events(place)[8]]
    assert events(place)[8].startswith("launch forward ")
    assert events(place)[9:] == [f"to host {BYTES}", f"to host {rows}", *["free"] * 5]
    output, lse = np.load(tmp_path / "o.npy"), np.load(tmp_path / "l.npy")
    assert (output.shape, output.dtype) == (SHAPE, np.float16)
    assert (lse.shape, lse.dtype) == (SHAPE[:-1], np.float32)
    assert np.isnan(output).all(), "memory of the stand-in, which computes nothing"


def test_profile_times_by_the_clock_of_the_device(place):
    report = json.loads(succeed("profile", *PROBLEM, "--engine", "sm80", "--repeats", "3", "--json", place=place))
    assert report["plan"]["engine"] == "sm80"
    assert "peak_source" not in report
    for name in ("forward", "backward"):
        assert report[name]["repeats"] == 3
        assert report[name]["seconds_median"] == 0.25e-3
        assert "share_of_peak" not in report[name]
    launched = [event.split()[1] for event in events(place) if event.startswith("launch")]
    assert launched.count("forward") == 3 + 2, "and two to warm up"
    assert launched.count("backward_keys") == 3 + 2
    assert events(place).count("free") == sum(event.startswith("allocate") for event in events(place))
    peak = ["--peak-gflops", "1000", "--repeats", "1", "--no-backward"]
    text = succeed("profile", *PROBLEM, "--engine", "sm80", *peak, place=place)
    assert "108 multiprocessors, float16" in text
    assert "1000.0 GFLOP/s (as given)" in text


@pytest.fixture(params=["stand-in", "NVRTC"])
def compiler(request):
    if request.param == "stand-in":
        return FAKE_NVRTC
    spec = importlib.util.find_spec("nvidia")
    libraries = [p for root in spec.submodule_search_locations for p in pathlib.Path(root).glob("**/libnvrtc.so.*")]
    assert libraries, "the Python package nvidia-cuda-nvrtc is not installed"
    return libraries[0].parent


def test_a_shipped_directory_needs_no_compiler(place, compiler, tmp_path):
    # NVRTC opens a second library by its name alone, which sanitizers' dlopen looks for elsewhere.
    with_compiler = place | {"VICUS_NVRTC": compiler, "LD_LIBRARY_PATH": compiler}
    succeed("compile", *PROBLEM, "-o", "kernels", "--backward", "none", place=with_compiler)
    without = place | {"VICUS_NVRTC": tmp_path / "absent", "VICUS_PREBUILT_DIR": tmp_path / "kernels"}
    succeed(*ATTEND, place=without)
    succeed(*ATTEND, "--lse", "l.npy", place=without)
    assert [event for event in events(place) if event.startswith("launch")] == [events(place)[7]] * 2
    assert not (tmp_path / "cache").exists()
    (tmp_path / "o.npy").unlink()
    fail(*ATTEND, "--causal", place=without, naming=["libnvrtc", "VICUS_NVRTC"], code=2)
    assert not (tmp_path / "o.npy").exists()


@pytest.mark.parametrize(
    ("failing", "naming", "code"),
    [
        ("cuInit 100", ["finds no device"], 2),
        ("cuMemAlloc_v2 2", ["cuMemAlloc", f"{BYTES} bytes", "Fake A"], 1),
        ("cuLaunchKernel 700", ["cuLaunchKernel", "CUDA_ERROR_ILLEGAL_ADDRESS", "forward"], 1),
    ],
)
def test_what_the_machine_refuses(place, tmp_path, failing, naming, code):
    fail(*ATTEND, place=place | {"FAKE_CUDA_FAILS": failing}, naming=naming, code=code)
    assert not (tmp_path / "o.npy").exists()


def test_a_machine_without_a_driver(place, tmp_path):
    absent = place | {"VICUS_CUDA_DRIVER": tmp_path / "absent"}
    fail(*ATTEND, place=absent, naming=["there is no CUDA driver"], code=2)
    fail("profile", *PROBLEM, "--engine", "sm80", place=absent, naming=["there is no CUDA driver"], code=2)
    fail("plan", *PROBLEM, "--engine", "sm80", place=absent, naming=["there is no CUDA driver"], code=2)
    plan = json.loads(succeed("plan", *PROBLEM, "--engine", "sm80", "--arch", "sm_90", "--json", place=absent))
    assert plan["forward"]["warps"] >= 1
    fail("plan", *PROBLEM, "--engine", "sm80", "--arch", "sm_91", place=absent, naming=["--arch", "sm_90"], code=2)
