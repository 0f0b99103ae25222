"""Kernels of a test's own, compiled and launched as those of the library are."""

import ctypes
import os
import pathlib
import subprocess
import sys
import tempfile

import emulated

HERE = pathlib.Path(__file__).resolve().parent
ARGUMENTS = "namespace vicus::gpu { struct Args { int* out; }; }\n"


def compiled(body: str) -> tuple[bytes, str]:
    """A kernel `test` with this text in its braces: the object, empty where it does not compile, and the log."""
    emulated.driver()
    with tempfile.TemporaryDirectory() as folder:
        text = f'extern "C" __global__ void __launch_bounds__(64) test(const __grid_constant__ Args args) {{ {body} }}'
        (pathlib.Path(folder) / "main.cu").write_text(f"{ARGUMENTS}namespace vicus::gpu {{ {text} }}")
        command = [sys.executable, str(HERE / "compile.py"), folder, "--gpu-architecture=sm_90a"]
        done = subprocess.run(command, env=os.environ, check=False)
        image = (pathlib.Path(folder) / "cubin").read_bytes() if done.returncode == 0 else b""
        return image, (pathlib.Path(folder) / "log").read_text()


def launched(body: str, threads=64, shared=1024) -> tuple[list[int], str]:
    """What it left in 64 ints, and the driver's error."""
    driver, image, log = emulated.driver(), *compiled(body)
    assert image, log
    out = (ctypes.c_int * 64)()
    argument = ctypes.c_void_p(ctypes.addressof(out))
    module, function, error = (ctypes.c_void_p() for _ in range(3))
    assert driver.cuModuleLoadData(ctypes.byref(module), image) == 0
    assert driver.cuModuleGetFunction(ctypes.byref(function), module, b"test") == 0
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
    code = driver.cuLaunchKernel(function, 1, 1, 1, threads, 1, 1, shared, None, arguments, None)
    if code:
        driver.cuGetErrorString(code, ctypes.byref(error))
    return list(out), ctypes.string_at(error.value).decode() if code else ""
