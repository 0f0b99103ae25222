"""Every kind of kernel that the GPU engine plans compiles, without spills and stack, for every kind of GPU.

NVRTC needs no GPU, so this runs everywhere.
"""

import json
import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("VICUS_BUILD", ROOT / "build"))
PARTS = 8
REGISTERS_PER_MULTIPROCESSOR = 65536


@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_compile_without_spills(part, nvrtc_directory, tmp_path):
    # NVRTC opens a second library by its name alone, which sanitizers' dlopen looks for elsewhere.
    places = {"VICUS_NVRTC": nvrtc_directory, "LD_LIBRARY_PATH": nvrtc_directory, "VICUS_CACHE_DIR": tmp_path}
    env = os.environ | {name: str(place) for name, place in places.items()}
    command = [BUILD / "tests" / "gpu" / "gpu_specs", str(part), str(PARTS)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert reports
    for report in reports:
        assert report["spill_bytes"] == 0 and report["stack_bytes"] == 0, report
        assert not report["serialized"], report
        assert report["shared_bytes"] <= report["shared_limit"], report
        threads = report["threads"] * report["blocks_per_multiprocessor"]
        assert report["registers"] * threads <= REGISTERS_PER_MULTIPROCESSOR, report
        assert report.get("work_ratio", 1) >= 1, report
