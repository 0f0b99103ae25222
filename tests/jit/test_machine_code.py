"""Real machine code from the real compiler, which needs no GPU."""

import importlib.util
import pathlib

import pytest
from probe import FAKE_CUDA, FAKE_NVRTC, KERNEL, fail, succeed

ARCHITECTURES = [80, 89, 90, 100, 120]
ELF_CUDA = 190


@pytest.fixture(scope="module")
def directory():
    spec = importlib.util.find_spec("nvidia")
    libraries = [p for root in spec.submodule_search_locations for p in pathlib.Path(root).glob("**/libnvrtc.so.*")]
    assert libraries, "the Python package nvidia-cuda-nvrtc is not installed"
    return libraries[0].parent


@pytest.fixture
def place(directory, tmp_path):
    # NVRTC opens a second library by its name alone, which sanitizers' dlopen looks for elsewhere.
    return {"VICUS_NVRTC": directory, "VICUS_CACHE_DIR": tmp_path / "cache", "LD_LIBRARY_PATH": directory}


def test_python_packages_are_enough(directory):
    result = succeed("nvrtc", "--directory", directory, environment={})
    assert result["found_in"] == "the Python packages"
    assert int(result["version"].split(".")[0]) >= 12


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(place, tmp_path, architecture):
    first = succeed("compile", architecture, "--out", tmp_path / "a", text=KERNEL, environment=place)
    assert first["kernel"] == "copy"
    assert 1 <= int(first["registers"]) <= 32
    assert (first["stack"], first["spill_stores"], first["spill_loads"], first["shared"]) == ("0", "0", "0", "0")
    assert first["from_cache"] == "0"
    code = (tmp_path / "a").read_bytes()
    assert code[:4] == b"\x7fELF"
    assert int.from_bytes(code[18:20], "little") == ELF_CUDA
    second = succeed("compile", architecture, "--out", tmp_path / "b", text=KERNEL, environment=place)
    assert second["from_cache"] == "1"
    assert (tmp_path / "b").read_bytes() == code
    assert {**first, **second} == {**second, **{name: first[name] for name in ("kernel", "registers", "bytes")}}


def test_instructions_of_one_architecture(place):
    text = 'extern "C" __global__ void k() { asm volatile("wgmma.fence.sync.aligned;"); }\n'
    succeed("compile", 90, "--specific", text=text, environment=place)
    fail("compile", 90, text=text, environment=place, naming=["wgmma", "sm_90"])


def test_shared_memory_and_geometry(place):
    text = """
#include "vicus/geometry.h"
extern "C" __global__ void hulls(const int* in, int* out) {
  __shared__ int ends[256];
  const auto axis = vicus::geometry::neighborhood_axis(in[0], in[1], in[2], false);
  ends[threadIdx.x] = vicus::geometry::hull(axis, {in[3], in[4]}).end;
  __syncthreads();
  out[threadIdx.x] = ends[255 - threadIdx.x];
}
"""
    report = succeed("compile", 80, text=text, environment=place)
    assert report["kernel"] == "hulls"
    assert report["shared"] == "1024"


def test_stack_and_spills_are_seen(place):
    stack = "float a[300]; for (int i = 0; i < 300; ++i) a[i] = p[i * n]; p[0] = a[n];"
    report = succeed("compile", 80, text=f"__global__ void k(float* p, int n) {{ {stack} }}", environment=place)
    assert int(report["stack"]) >= 1200
    # 160 values alive at once, 32 registers to hold them.
    read = "".join(f"float a{i} = p[{i} * n];" for i in range(160))
    use = "".join(f"p[{i}] = a{i} * a{159 - i};" for i in range(160))
    bound = "__launch_bounds__(1024, 2)"
    report = succeed(
        "compile", 80, text=f"__global__ void {bound} k(float* p, int n) {{ {read} {use} }}", environment=place
    )
    assert int(report["spill_stores"]) > 0
    assert int(report["spill_loads"]) > 0


def test_bad_source(place):
    error = fail(
        "compile", 80, text="int x = undefined_name;\n", environment=place, naming=["kernel.cu(1)", "undefined_name"]
    )
    assert "--gpu-architecture=sm_80" in error
    fail("compile", 80, "--file", "absent.cu", environment=place, naming=["absent.cu"])


def test_architecture_nobody_has(place):
    fail("compile", 70, text=KERNEL, environment=place, naming=["sm_70", "compiles for:", "80, "])


def test_lookup_of_a_loaded_kernel(tmp_path):
    """Counts calls; how long one takes is for the reader (a few hundred nanoseconds)."""
    environment = {"VICUS_CUDA_DRIVER": FAKE_CUDA, "VICUS_NVRTC": FAKE_NVRTC, "VICUS_CACHE_DIR": tmp_path}
    result = succeed("lookup", environment=environment)
    assert int(result["registers"]) == 64 * 20000 * 40
