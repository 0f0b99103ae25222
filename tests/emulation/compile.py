"""What the stand-in NVRTC (tests/jit/fake_nvrtc.cc) calls: compiles the kernel in a folder for this machine.

    compile.py FOLDER OPTIONS...     main.cu and headers -> cubin, a shared object; log

Environment: EMULATED_DEVICE, the library that has the instructions. CXX, if not g++.
"""

import os
import pathlib
import re
import subprocess
import sys

from translate import entry, translated

HERE = pathlib.Path(__file__).resolve().parent
FLAGS = ("-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-fno-strict-aliasing", "-fvisibility=hidden", "-Wl,-z,defs")


def main() -> int:
    folder, options = pathlib.Path(sys.argv[1]), sys.argv[2:]
    arch = next(re.search(r"sm_(\d+)", option).group(1) for option in options if "architecture" in option)
    files = [path for path in folder.rglob("*") if path.is_file()]
    texts = {path: path.read_text() for path in files}
    for path, text in texts.items():
        path.write_text(translated(text))
    main_file = folder / "main.cu"
    main_file.write_text(main_file.read_text() + entry("".join(texts.values())))
    device = os.environ["EMULATED_DEVICE"]
    command = [os.environ.get("CXX", "g++"), *FLAGS, f"-D__CUDA_ARCH__={arch}0", "-I", str(folder)]
    command += ["-include", str(HERE / "cuda.h"), "-include", str(HERE / "ptx.h"), "-x", "c++", str(main_file)]
    command += ["-x", "none", device, f"-Wl,-rpath,{os.path.dirname(device)}", "-o", str(folder / "cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (folder / "log").write_text(done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
