"""The C++ library through one C function (tests/bridge), loaded with ctypes, which lets go of the GIL during a call."""

import ctypes
import functools
import json
import os
import pathlib

from oracle import Dense

ROOT = pathlib.Path(__file__).resolve().parents[2]


class VicusError(Exception):
    """An exception of the library: `kind` is its class, `argument` what it names."""

    def __init__(self, kind, argument, text):
        super().__init__(kind, argument, text)  # what makes it again in another process
        self.kind, self.argument, self.text = kind, argument, text

    def __str__(self):
        return f"{self.kind}: {self.text}"


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_char_p),
        ("dims", ctypes.c_int32),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
    )


class View:
    """An array as the library sees it. What numpy cannot express (wrong dtypes, overlaps) is set afterwards."""

    def __init__(self, array):
        self.data = array.ctypes.data
        self.dtype = array.dtype.name
        self.shape = list(array.shape)
        self.strides = [s // array.itemsize for s in array.strides]
        self.keep = array


@functools.cache
def library():
    path = os.environ.get("VICUS_BRIDGE") or str(ROOT / "build" / "tests" / "bridge" / "libvicus_bridge.so")
    if not pathlib.Path(path).exists():
        raise RuntimeError(
            f"VICUS_BRIDGE is {path}; allowed: the libvicus_bridge.so of a build with VICUS_BUILD_TESTS=ON"
        )
    lib = ctypes.CDLL(path)
    lib.vicus_bridge_call.restype = ctypes.c_void_p
    lib.vicus_bridge_call.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Tensor), ctypes.c_int32]
    lib.vicus_bridge_free.argtypes = [ctypes.c_void_p]
    return lib


def call(operation, request=None, arrays=None):
    """Runs one operation. `arrays` maps names to numpy arrays or Views; None values are left out."""
    views = {k: x if isinstance(x, View) else View(x) for k, x in (arrays or {}).items() if x is not None}
    tensors = (_Tensor * max(len(views), 1))()
    for tensor, (name, view) in zip(tensors, views.items(), strict=False):
        tensor.name, tensor.data, tensor.dtype = name.encode(), view.data, view.dtype.encode()
        tensor.dims = len(view.shape)
        tensor.shape = (ctypes.c_int64 * max(len(view.shape), 1))(*view.shape)
        tensor.strides = (ctypes.c_int64 * max(len(view.strides), 1))(*view.strides)
    lib = library()
    answer = lib.vicus_bridge_call(operation.encode(), json.dumps(request or {}).encode(), tensors, len(views))
    try:
        decoded = json.loads(ctypes.string_at(answer))
    finally:
        lib.vicus_bridge_free(answer)
    if "error" in decoded:
        raise VicusError(decoded["error"]["class"], decoded["error"]["argument"], decoded["error"]["text"])
    return decoded["result"]


def mask_json(mask):
    return dict(vars(mask))


def problem_json(problem):
    fields = {k: v for k, v in vars(problem).items() if k != "mask"}
    kind = "dense" if isinstance(problem.mask, Dense) else "neighborhood"
    return fields | {kind: mask_json(problem.mask)}


def request(problem, **options):
    return {"problem": problem_json(problem), "options": options}


@functools.cache
def info():
    return call("info")


def limit_cpu_target(name):
    call("limit_cpu_target", {"name": name})
