"""The program `vicus` on a real GPU: attend beside the CPU engine and float64, profile, and a directory of kernels."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

VICUS = os.environ["VICUS_CLI"]


def run(*arguments, cwd=None, **places):
    environment = os.environ | {name: str(place) for name, place in places.items()}
    return subprocess.run([VICUS, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment)


def succeed(*arguments, cwd=None, **places):
    done = run(*arguments, cwd=cwd, **places)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def devices():
    return json.loads(run("info", "--json").stdout)["gpu"]["devices"]


pytestmark = pytest.mark.skipif(not devices(), reason="needs a GPU")

NEIGHBORHOOD = {"q": (2, 20, 31, 4, 64), "k": (2, 20, 31, 2, 64), "v": (2, 20, 31, 2, 32)}
DENSE = {"q": (2, 100, 4, 40), "k": (2, 177, 2, 40), "v": (2, 177, 2, 24)}
ODD = {"q": (1, 100, 2, 41), "k": (1, 177, 2, 41), "v": (1, 177, 2, 23)}
PACKED = {"q": (1, 100, 4, 64), "k": (1, 177, 4, 64), "v": (1, 177, 4, 64)}
EXTRA = {"additional-keys": (2, 5, 2, 64), "additional-values": (2, 5, 2, 32)}
WINDOWS = ["--kernel-size", "7", "8", "--dilation", "1", "2", "--causal", "1", "0"]
CASES = {
    "windows": (NEIGHBORHOOD, WINDOWS),
    "extra tokens and bias": (NEIGHBORHOOD | EXTRA | {"rpb": (4, 13, 15)}, ["--kernel-size", "7", "8"]),
    "dense": (DENSE, ["--dense", "--causal", "bottom-right", "--scale", "0.3"]),
    "additive mask": (DENSE | {"attn-bias": (2, 1, 100, 177)}, ["--dense"]),
    "padded keys": (DENSE, ["--dense", "--causal", "top-left", "--key-lengths", "177,20"]),
    "packed sequences": (
        PACKED,
        ["--dense", "--cumulative-queries", "0,30,31,100", "--cumulative-keys", "0,90,90,177"],
    ),
    "odd head dims": (ODD, ["--dense", "--window-left", "30", "--window-right", "9"]),
}


def write(folder, arrays, dtype):
    """The arrays as files, and the options that name them."""
    random = np.random.default_rng(7)
    options = []
    for name, shape in arrays.items():
        np.save(folder / f"{name}.npy", random.standard_normal(shape).astype(dtype))
        options += [{"q": "-q", "k": "-k", "v": "-v"}.get(name, f"--{name}"), f"{name}.npy"]
    return options


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("case", CASES)
def test_attend_like_the_cpu(tmp_path, case, dtype):
    arrays, mask = CASES[case]

    def attend(engine, storage):
        options = [*write(tmp_path, arrays, dtype), *mask, "--engine", engine, "-o", "o.npy", "--lse", "l.npy"]
        if storage is not dtype:
            for name in arrays:
                np.save(tmp_path / f"{name}.npy", np.load(tmp_path / f"{name}.npy").astype(storage))
        succeed("attend", *options, cwd=tmp_path)
        return np.load(tmp_path / "o.npy").astype(np.float64), np.load(tmp_path / "l.npy").astype(np.float64)

    exact, exact_lse = attend("reference", np.float64)
    cpu, _ = attend("cpu", dtype)
    gpu, lse = attend("sm80", dtype)
    units = 2 if dtype is np.float16 else 8  # the GPU's exponential is good to a few in float32
    floor = units * np.finfo(dtype).eps * np.abs(exact).max()
    unseen = np.isneginf(exact_lse)
    assert (np.isneginf(lse) == unseen).all()
    lse, exact_lse = (np.where(unseen, 0.0, x) for x in (lse, exact_lse))
    assert np.abs(gpu - exact).max() <= 2 * np.abs(cpu - exact).max() + floor
    assert np.abs(lse - exact_lse).max() <= 1e-4 * max(1.0, np.abs(exact_lse).max())


def test_bfloat16_out_of_one_file(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    save_file(
        {name: torch.randn(1, 64, 4, 128).bfloat16() for name in ("query", "key", "value")}, tmp_path / "in.safetensors"
    )
    outputs = {}
    for engine in ("cpu", "sm80"):
        place = f"{engine}.safetensors"
        succeed("attend", "-i", "in.safetensors", "--dense", "--engine", engine, "-o", place, cwd=tmp_path)
        outputs[engine] = load_file(tmp_path / place)["output"].float()
    assert (outputs["cpu"] - outputs["sm80"]).abs().max() <= 2**-7 * outputs["cpu"].abs().max()


def test_profile(tmp_path):
    problem = ["--layout", "56", "56", "--batch", "4", "--heads", "4", "--kernel-size", "7", "--dtype", "bfloat16"]
    report = json.loads(succeed("profile", *problem, "--engine", "sm80", "--json"))
    for name in ("forward", "backward"):
        assert 0 < report[name]["seconds_min"] <= report[name]["seconds_median"]
        # One multiprocessor cannot do this work at once, whatever the clock says.
        assert report[name]["useful_flops_per_second"] < 1e16


def test_kernels_of_this_machine_are_shipped(tmp_path):
    problem = ["--layout", "20", "31", "--batch", "2", "--heads", "4", "--heads-kv", "2", "--head-dim-v", "32"]
    problem += [*WINDOWS, "--dtype", "float16"]
    report = json.loads(succeed("compile", *problem, "-o", tmp_path / "kernels", "--json"))
    here = {f"sm_{device['compute_capability'].replace('.', '')}" for device in devices()}
    assert {kernel["arch"] for kernel in report["kernels"]} == here
    assert all(kernel["spill_bytes"] == 0 for kernel in report["kernels"])
    options = write(tmp_path, NEIGHBORHOOD, np.float16)
    attend = ["attend", *options, *WINDOWS, "--engine", "sm80", "-o", "o.npy"]
    no_compiler = {"VICUS_NVRTC": tmp_path / "absent", "VICUS_CACHE_DIR": tmp_path / "cache"}
    done = run(*attend, cwd=tmp_path, **no_compiler)
    assert done.returncode == 2
    assert "VICUS_NVRTC" in done.stderr
    succeed(*attend, cwd=tmp_path, VICUS_PREBUILT_DIR=tmp_path / "kernels", **no_compiler)
    shipped = pathlib.Path(tmp_path / "o.npy").read_bytes()
    succeed(*attend, cwd=tmp_path)
    assert pathlib.Path(tmp_path / "o.npy").read_bytes() == shipped


def test_a_shipped_directory_serves_pytorch_without_a_compiler(tmp_path):
    """Of one problem, by `vicus compile`; another needs the compiler that is not there."""
    problem = ["--layout", "20", "30", "--heads", "2", "--head-dim", "64", "--kernel-size", "5", "--dtype", "float16"]
    succeed("compile", *problem, "-o", tmp_path / "kernels")
    script = (
        "import sys, torch, vicus; x = torch.ones(1, 20, 30, 2, 64, device='cuda', dtype=torch.float16);"
        "print(float(vicus.na2d(x, x, x, kernel_size=int(sys.argv[1])).double().sum()))"
    )
    places = {
        "VICUS_PREBUILT_DIR": tmp_path / "kernels",
        "VICUS_NVRTC": tmp_path / "absent",
        "VICUS_CACHE_DIR": tmp_path / "cache",
    }
    environment = os.environ | {name: str(place) for name, place in places.items()}

    def attend(kernel_size):
        command = [sys.executable, "-c", script, str(kernel_size)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = attend(5)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 20 * 30 * 2 * 64
    done = attend(7)
    assert done.returncode != 0
    assert "libnvrtc" in done.stderr
