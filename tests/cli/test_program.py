"""`vicus` with plan, profile, info, help and messages."""

import json
import os
import pathlib
import pty
import subprocess

import numpy as np
import pytest
from program import VICUS, neighborhood_mask, run, succeed

COMMANDS = ["attend", "compile", "denoise", "plan", "profile", "info"]


def test_version():
    assert succeed("--version").strip() == f"vicus {json.loads(succeed('info', '--json'))['version']}"


def test_help_lists_the_commands():
    text = succeed("--help")
    assert all(command in text for command in COMMANDS)
    assert "Examples:" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command):
    text = succeed(command, "--help")
    assert f"vicus {command}" in text.split("Examples:")[1], "the examples call the command"
    assert max(map(len, text.splitlines())) <= 160


@pytest.mark.parametrize("command", ["plan", "profile", "info"])
def test_examples_of_the_help_run(command):
    """The help's examples are complete command lines; profile's are cut short."""
    lines = [line.split() for line in succeed(command, "--help").splitlines() if line.startswith(f"  vicus {command}")]
    assert len(lines) == 2
    for words in lines:
        short = ["--repeats", "1", "--warmup", "0", "--seconds", "0.01"] if command == "profile" else []
        assert succeed(*words[1:], *short)


def test_info():
    info = json.loads(succeed("info", "--json"))
    assert info["cpu"]["target_used"] in info["cpu"]["targets_available"]
    assert set(info["cpu"]["targets_available"]) <= set(info["cpu"]["targets_built"])
    assert info["cpu"]["threads"] >= 1
    assert {"cpu", "sm80", "sm90", "reference"} == set(info["engines"])
    text = succeed("info")
    for word in (info["version"], info["cpu"]["target_used"], info["cache"]["directory"]):
        assert word in text
    for part in (info["gpu"]["driver"], info["gpu"]["compiler"]):
        assert bool(part["problem"]) != bool(part["library"])
        assert (part["problem"] or part["library"]) in text


def test_info_of_the_gpu_runtime(tmp_path, monkeypatch):
    """With the stand-ins of tests/jit for driver and compiler."""
    stand_ins = pathlib.Path(os.environ["VICUS_BUILD"]) / "tests" / "jit"
    driver, compiler = stand_ins / "libfake_cuda.so", stand_ins / "libnvrtc.so.13"
    (tmp_path / "a.vicus").write_bytes(b"x" * (3 << 20))
    (tmp_path / "not ours").write_bytes(b"x" * 1000)
    for name, value in (
        ("CUDA_DRIVER", driver),
        ("NVRTC", compiler),
        ("CACHE_DIR", tmp_path),
        ("CACHE_BYTES", 5 << 20),
        ("PREBUILT_DIR", tmp_path / "shipped"),
    ):
        monkeypatch.setenv(f"VICUS_{name}", str(value))
    info = json.loads(succeed("info", "--json"))
    assert info["gpu"]["driver"] == {"problem": "", "library": str(driver), "version": "13.1"}
    found = {"problem": "", "library": str(compiler), "version": "13.1", "found_in": "VICUS_NVRTC"}
    assert info["gpu"]["compiler"] == found
    assert [(device["name"], device["compute_capability"]) for device in info["gpu"]["devices"]] == [
        ("Fake A", "8.0"),
        ("Fake B", "9.0"),
    ]
    assert info["prebuilt"] == str(tmp_path / "shipped")
    assert info["cache"] == {"directory": str(tmp_path), "kernels": 1, "bytes": 3 << 20, "limit_bytes": 5 << 20}
    text = succeed("info")
    for part in (
        str(driver),
        str(tmp_path / "shipped"),
        "CUDA 13.1",
        "Fake B, compute capability 9.0",
        str(compiler),
        "found in VICUS_NVRTC",
    ):
        assert part in text
    assert f"{tmp_path}: 1 kernels, 3 of at most 5 MiB" in text

    monkeypatch.setenv("VICUS_CUDA_DRIVER", str(tmp_path / "absent"))
    monkeypatch.setenv("VICUS_NVRTC", str(tmp_path / "absent too"))
    text = succeed("info")
    assert "there is no CUDA driver here" in text
    assert "absent too" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.vicus", "not ours"], "looking makes no file"


def test_plan_counts_the_mask():
    arguments = ["--layout", 9, 7, "--heads", 4, "--heads-kv", 2, "--batch", 3, "--head-dim", 8, "--head-dim-v", 5]
    arguments += ["--kernel-size", 4, 3, "--stride", 2, 1, "--dilation", 1, 2, "--causal", 0, 1]
    arguments += ["--additional-tokens", 2]
    plan = json.loads(succeed("plan", *arguments, "--json"))
    mask = neighborhood_mask([9, 7], [4, 3], [2, 1], [1, 2], [False, True])
    pairs = 3 * 4 * (int(mask.sum()) + 2 * 63)
    assert plan["mask_pairs"] == pairs
    assert plan["forward_flops"] == 2 * (8 + 5) * pairs
    assert plan["backward_flops"] == 2 * (3 * 8 + 2 * 5) * pairs
    assert plan["problem"]["mask"] == {
        "kind": "neighborhood",
        "kernel_size": [4, 3],
        "stride": [2, 1],
        "dilation": [1, 2],
        "is_causal": [0, 1],
    }
    assert plan["problem"]["layout"] == [9, 7]
    assert plan["problem"]["scale"] == pytest.approx(8**-0.5)
    assert plan["engine"] == "cpu"
    assert plan["reason"]
    assert plan["forward"]["work"]["ratio"] >= 1
    assert plan["candidates"]


def test_plan_of_decoding_on_hopper_says_what_was_considered():
    shape = ["--layout", 1, "--keys", 8192, "--dense", "--heads", 64, "--heads-kv", 8, "--head-dim", 128]
    arguments = ["plan", *shape, "--dtype", "bfloat16", "--engine", "sm90", "--arch", "sm_90"]
    plan = json.loads(succeed(*arguments, "--json"))
    first, *others = plan["candidates"]
    assert first["kv_tile"] == plan["forward"]["kv_tile"] and first["tile"] == plan["forward"]["tile"]
    assert first["key_parts"] == plan["forward"]["key_parts"] > 1
    assert plan["forward"]["scratch_bytes"] == first["key_parts"] * 64 * (128 + 1) * 4
    assert others and all(c["cost"] >= first["cost"] for c in others)
    text = succeed(*arguments)
    assert f"keys in {first['key_parts']} parts" in text and "tiles considered" in text


def test_plan_of_dense_attention():
    arguments = ["--layout", 8, "--keys", 12, "--dense", "--causal", "bottom-right", "--window-left", 5]
    plan = json.loads(succeed("plan", *arguments, "--key-lengths", 12, "--dtype", "bfloat16", "--json"))
    assert plan["problem"]["dtype"] == "bfloat16"
    assert plan["problem"]["mask"]["kind"] == "dense"
    assert plan["problem"]["mask"]["keys"] == 12
    assert plan["problem"]["mask"]["causal"] == "bottom-right"
    assert plan["problem"]["mask"]["window_left"] == 5
    assert plan["problem"]["mask"]["key_lengths"] == [12]
    assert plan["mask_pairs"] == sum(min(i + 4, 11) - max(i + 4 - 5, 0) + 1 for i in range(8))


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_plan_for_a_person(engine):
    text = succeed("plan", "--layout", 56, 56, "--kernel-size", 7, "--engine", engine)
    assert engine in text
    assert len(text.splitlines()) >= 3


def test_nothing_to_compute():
    """An axis without tokens is legal; its report is JSON all the same."""
    arguments = ["--layout", 0, 4, "--kernel-size", 3]
    assert json.loads(succeed("plan", *arguments, "--json"))["mask_pairs"] == 0
    report = json.loads(succeed("profile", *arguments, "--repeats", 1, "--json"))
    assert report["forward"]["useful_flops"] == 0


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "mask",
    [["--kernel-size", 5, "--rpb", "--additional-tokens", 2], ["--dense", "--attn-bias", "--causal", "top-left"]],
)
def test_profile(dtype, mask):
    arguments = ["--layout", 48, "--heads", 2, "--head-dim", 16, "--dtype", dtype, "--repeats", 3, *mask]
    report = json.loads(succeed("profile", *arguments, "--json"))
    assert report["peak_source"] == "measured"
    assert report["peak_flops_per_second"] > 1e8
    for name in ("forward", "backward"):
        row = report[name]
        assert 1 <= row["repeats"] <= 3
        assert 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]
        assert row["useful_flops"] == report["plan"][f"{name}_flops"]
        assert row["useful_flops_per_second"] == pytest.approx(row["useful_flops"] / row["seconds_median"])
        assert row["floor_seconds"] == pytest.approx(row["useful_flops"] / report["peak_flops_per_second"])
        assert row["share_of_peak"] == pytest.approx(row["floor_seconds"] / row["seconds_median"])


def test_profile_with_a_given_peak_and_forward_only():
    arguments = ["--layout", 16, 16, "--kernel-size", 5, "--repeats", 2, "--threads", 1]
    arguments += ["--peak-gflops", 50, "--no-backward"]
    report = json.loads(succeed("profile", *arguments, "--json"))
    assert report["peak_source"] == "given"
    assert report["peak_flops_per_second"] == 50e9
    assert "backward" not in report
    assert report["plan"]["threads"] == 1
    text = succeed("profile", *arguments)
    assert "forward" in text
    assert "backward" not in text
    assert "as given" in text


def test_progress_only_on_a_terminal():
    arguments = [VICUS, "profile", "--layout", "64", "--kernel-size", "5", "--repeats", "3", "--peak-gflops", "10"]
    assert subprocess.run(arguments, capture_output=True, check=True).stderr == b""
    terminal, end = pty.openpty()
    done = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=end)
    os.close(end)
    drawn = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        drawn += piece
    out, _ = done.communicate(timeout=60)
    os.close(terminal)
    assert done.returncode == 0
    assert b"forward" in drawn
    assert b"%" in drawn
    assert drawn.endswith(b"\r\x1b[K"), "the bar is erased"
    assert b"\x1b" not in out


def test_log_level(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 4, 1, 4), np.float32))
    arguments = ["attend", "-q", "x.npy", "-k", "x.npy", "-v", "x.npy", "--dense", "-o", "o.npy"]
    loud = run("--log-level", "debug", *arguments, cwd=tmp_path)
    assert loud.returncode == 0
    assert loud.stderr.startswith("vicus: debug: ")
    assert "engine" in loud.stderr
    after = run(*arguments, "--log-level", "off", cwd=tmp_path)
    assert (after.returncode, after.stderr) == (0, "")


def test_full_disk_is_an_error():
    with open("/dev/full", "w") as full:
        done = subprocess.run([VICUS, "info"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "standard output" in done.stderr
