"""Finds and loads the compiled extension, and tells what it is.

The extension holds the kernels and registers them with PyTorch when it is loaded; schemas are defined in Python
(`_ops`, `_ops_unfused`) through `LIB`. It uses PyTorch's stable ABI only, so one file serves every Python and every
PyTorch since 2.10.
"""

import atexit
import functools
import os
import sys
from pathlib import Path
from typing import Any

import torch

#: The namespace `torch.ops.vicus`.
LIB = torch.library.Library("vicus", "DEF")

_OLDEST_TORCH = (2, 10)


def library_path() -> Path:
    """The extension that is loaded: the one in this package, or the file that `VICUS_LIBRARY` names.

    Returns:
        An absolute path. The file may be missing.

    Source:
        vicus.
    """
    named = os.environ.get("VICUS_LIBRARY")
    if named:
        return Path(named).resolve()
    # An editable installation has two folders: the sources, and the one that holds what was compiled.
    places = [Path(folder) / "_C.so" for folder in sys.modules[__package__].__path__]
    return next((place for place in places if place.is_file()), places[0]).resolve()


def load() -> None:
    """Loads the extension; its kernels are registered with PyTorch from then on.

    Raises:
        ImportError: The extension is missing, or PyTorch is older than 2.10.

    Source:
        vicus.
    """
    running = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if running < _OLDEST_TORCH:
        raise ImportError(f"torch is {torch.__version__}; vicus needs 2.10 or newer")
    path = library_path()
    if not path.is_file():
        raise ImportError(f"{path} is missing; install vicus, or set VICUS_LIBRARY to a built extension")
    torch.ops.load_library(str(path))
    atexit.register(torch.ops.vicus.end_ahead)  # threads that compile need what the end of a process tears down
    if torch.version.cuda:  # the compiler of GPU kernels that PyTorch's own wheels install
        packages = Path(torch.__file__).resolve().parents[1] / "nvidia"
        for folder in (f"cu{torch.version.cuda.split('.')[0]}", "cuda_nvrtc"):
            if (packages / folder / "lib").is_dir():
                torch.ops.vicus.nvrtc_directory(str(packages / folder / "lib"))


@functools.cache
def _build() -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
    version, built_with, built, available = torch.ops.vicus.build_info()
    return version, built_with, tuple(filter(None, built.split(","))), tuple(filter(None, available.split(",")))


def engines() -> tuple[str, ...]:
    """Engines that this machine can run, fastest first.

    Returns:
        Names out of `"cpu"` and `"reference"`. `"cpu"` needs SSE4.2 (x86) or NEON (Arm).

    Source:
        vicus.
    """
    return ("cpu", "reference") if _build()[3] else ("reference",)


def info() -> dict[str, Any]:
    """What this installation is: for bug reports, and to choose an engine.

    Returns:
        A dictionary of
        - `version`: str, of vicus;
        - `torch_built`, `torch`: str, the PyTorch whose headers the extension was compiled with, and the one running;
        - `library`: str, path of the extension;
        - `engines`: tuple of str, what this machine can run, fastest first;
        - `cpu_targets_built`, `cpu_targets`: tuples of str, instruction sets in the extension, and those of them that
          this machine runs, best first (the first is used; the environment variable VICUS_CPU_TARGET picks another);
        - `threads`: int, PyTorch's threads, which the CPU engine uses.

    Source:
        vicus.
    """
    version, built_with, built, available = _build()
    return {
        "version": version,
        "torch_built": built_with,
        "torch": torch.__version__,
        "library": str(library_path()),
        "engines": engines(),
        "cpu_targets_built": built,
        "cpu_targets": available,
        "threads": torch.get_num_threads(),
    }


LIB.define("build_info() -> str[]")
LIB.define("gpu_head_dim(str dtype) -> int")
LIB.define("nvrtc_directory(str directory) -> ()")
LIB.define("end_ahead() -> ()")
load()
