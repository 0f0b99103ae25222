"""Several CUDA contexts of one device: the program gpu_contexts makes them through the driver and compares results."""

import os
import subprocess

import torch
from gpu_support import needs_gpu


@needs_gpu
def test_contexts_of_one_device():
    done = subprocess.run([os.environ["VICUS_CONTEXTS"]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    names = [f"{name}, sm80" for name in ("2d", "dense", "float32", "float64")]
    if torch.cuda.get_device_capability() == (9, 0):
        names += ["2d, sm90", "dense, sm90"]
    assert sorted(done.stdout.splitlines()) == sorted(f"{name}: the same everywhere" for name in names)
