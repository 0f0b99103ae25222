"""The program jit_probe, and the stand-ins for driver and compiler that the tests bring along."""

import os
import pathlib
import subprocess

BUILD = pathlib.Path(os.environ["VICUS_BUILD"]) / "tests" / "jit"
PROBE = BUILD / "jit_probe"
FAKE_CUDA = BUILD / "libfake_cuda.so"
FAKE_NVRTC = BUILD / "libnvrtc.so.13"
KERNEL = 'extern "C" __global__ void copy(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x]; }\n'

# What the machine or the person running the tests has set must not matter.
OURS = (
    "VICUS_CACHE_DIR",
    "VICUS_CACHE_BYTES",
    "VICUS_PREBUILT_DIR",
    "VICUS_NVRTC",
    "VICUS_CUDA_DRIVER",
    "CUDA_HOME",
    "CUDA_PATH",
)
CLEAN = {name: value for name, value in os.environ.items() if name not in OURS}


def start(*arguments, text="", environment, **options):
    """The probe, running, with `text` on its standard input."""
    process = subprocess.Popen(
        [PROBE, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=CLEAN | {name: str(value) for name, value in environment.items()},
        **options,
    )
    process.stdin.write(text)
    process.stdin.close()
    process.stdin = None
    return process


def finish(process):
    """Exit code, and what the probe printed: {name: value}, and the warnings under "warning"."""
    out, err = process.communicate(timeout=120)
    assert err == ""
    out, _, error = out.partition("\nerror ")
    result = {"warning": [], "error": error}
    for line in out.splitlines():
        name, _, value = line.partition(" ")
        if name == "warning":
            result["warning"].append(value)
        else:
            result[name] = value
    return process.returncode, result


def succeed(*arguments, **options):
    code, result = finish(start(*arguments, **options))
    assert code == 0, result
    return result


def fail(*arguments, naming, **options):
    """The error's text, which must hold each of `naming`."""
    code, result = finish(start(*arguments, **options))
    assert code == 1, result
    for part in naming:
        assert part in result["error"], result["error"]
    return result["error"]
