"""geometry.h compiles unchanged under NVRTC. NVRTC compiles without a GPU, so this runs everywhere."""

import ctypes
import importlib.util
import pathlib
import re

import pytest

HEADER = pathlib.Path(__file__).resolve().parents[2] / "include" / "vicus" / "geometry.h"

# Uses every type and function; results are stored so that nothing is thrown away before code generation.
KERNEL = """
#include "vicus/geometry.h"
using namespace vicus::geometry;
static_assert(window(neighborhood_axis(9, 5, 1, false), 4) == Span{2, 7});
static_assert(first_beginning_at(neighborhood_axis(9, 5, 1, false), 3) == 5);
static_assert(kRank == 3 && kMaxLen > 0);
extern "C" __global__ void use_everything(const int* in, long long* out) {
  const int x = in[threadIdx.x], y = in[threadIdx.x + 32];
  const Axis axis = neighborhood_axis(in[0], in[1], in[2], in[3] != 0);
  const Axis dense = band_axis(in[0], in[1], in[2], in[3], in[4]);
  const Span q = tile_span(x, in[5], axis.queries), k = {clamp(y, 0, axis.keys), hi(y, lo(x, axis.keys))};
  const Grid grid = {{axis, dense, axis}};
  const Box qs = {{q, q, k}}, ks = {{k, q, k}};
  const TileCounts tiles = tile_counts(dense, in[6], in[7]);
  long long n = 0;
  n += window(axis, x).begin + hull(axis, q).end + core(axis, q).size() + queries_of(axis, k).end;
  n += queries_of_all(axis, k).end;
  n += window(dense, x).end + intersect(q, k).size() + q.contains(x) + q.contains(k) + (q == k) + k.empty();
  n += classify(axis, q, k) == TileClass::full;
  n += classify(grid, qs, ks) == TileClass::partial;
  n += hull(grid, qs).volume() + queries_of(grid, ks).volume() + intersect(qs, ks).volume();
  n += (qs == ks) + qs.empty();
  n += class_len(x, in[8], y) + token_of(x, in[8], y) + ceil_div(x, in[9]);
  n += mask_pairs(axis) + tile_pairs(axis, in[6], in[7]) + tiles.empty + 2 * tiles.partial + 3 * tiles.full;
  out[threadIdx.x] = n;
}
"""


@pytest.fixture(scope="module")
def nvrtc():
    spec = importlib.util.find_spec("nvidia")
    libraries = [p for root in spec.submodule_search_locations for p in pathlib.Path(root).glob("**/libnvrtc.so.*")]
    assert libraries, "the Python package nvidia-cuda-nvrtc is not installed"
    for builtins in libraries[0].parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins))  # NVRTC opens it by its name alone, which sanitizers' dlopen looks for elsewhere
    return ctypes.CDLL(str(libraries[0]))


def compile_kernel(nvrtc, source, headers, options):
    """Status, log and size of the cubin or PTX."""
    program = ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
    names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
    made = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", len(headers), texts, names)
    assert made == 0
    args = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), args)
    size = ctypes.c_size_t()
    assert nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)) == 0
    log = ctypes.create_string_buffer(size.value)
    assert nvrtc.nvrtcGetProgramLog(program, log) == 0
    code = ctypes.c_size_t()
    get_size = nvrtc.nvrtcGetPTXSize if "compute_" in options[0] else nvrtc.nvrtcGetCUBINSize
    if status == 0:
        assert get_size(program, ctypes.byref(code)) == 0
    assert nvrtc.nvrtcDestroyProgram(ctypes.byref(program)) == 0
    return status, log.value.decode(), code.value


@pytest.mark.parametrize("standard", ["c++17", "c++20"])
@pytest.mark.parametrize("architecture", ["compute_80", "sm_80", "sm_90a"])
def test_compiles_without_a_warning(nvrtc, architecture, standard):
    options = [f"--gpu-architecture={architecture}", f"--std={standard}", "--extra-device-vectorization"]
    status, log, size = compile_kernel(nvrtc, KERNEL, {"vicus/geometry.h": HEADER.read_text()}, options)
    assert status == 0, log
    assert log.strip() == ""
    assert size > 1000


def test_a_broken_header_is_noticed(nvrtc):
    broken = HEADER.read_text().replace("VICUS_GEOM int hi(", "VICUS_GEOM int high(")
    status, log, _ = compile_kernel(nvrtc, KERNEL, {"vicus/geometry.h": broken}, ["--gpu-architecture=sm_80"])
    assert status != 0
    assert "hi" in log


def test_every_function_of_the_header_is_used():
    text = HEADER.read_text()
    for name in re.findall(r"^VICUS_GEOM .*?(\w+)\(", text, re.MULTILINE):
        assert re.search(rf"\b{name}\(", KERNEL), name


def test_the_header_includes_nothing():
    assert not re.search(r"^\s*#\s*(include|import|pragma)\b", HEADER.read_text(), re.MULTILINE)
