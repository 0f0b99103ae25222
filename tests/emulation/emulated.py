"""The library on a GPU that is not there: calls through the bridge (tests/bridge), whose kernels run on this machine.

The library finds a stand-in driver and a stand-in NVRTC, and once it has found them a process has no other: tests call
`check` in a process of their own (conftest.py).
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import pathlib
import shutil
import sys
import tempfile

import bridge
import gpu_lengths
import gpu_oracle
import torch
from gpu_compare import compare
from gpu_problems import tensors

HERE = pathlib.Path(__file__).resolve().parent
BUILD = pathlib.Path(os.environ.get("VICUS_BUILD", HERE.parents[1] / "build")) / "tests"
DEVICES = {"sm80": 0, "sm90": 1}  # of the stand-in driver, by the engine that is for them
GUARD = 64  # elements on each side of an output
LOG = pathlib.Path(tempfile.gettempdir()) / f"vicus-launches-{os.getpid()}"
INPUTS = ("query", "key", "value", "additional_keys", "additional_values", "rpb", "attn_bias")


@functools.cache
def driver() -> ctypes.CDLL:
    """The stand-in driver, which the library will find."""
    sources = [path for path in HERE.iterdir() if path.suffix in (".h", ".py")]
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()[:16]
    cache = BUILD / "emulation" / "kernels" / state
    if not cache.exists():  # kernels of another emulation are of no use
        shutil.rmtree(cache.parent, ignore_errors=True)
    os.environ["VICUS_CUDA_DRIVER"] = str(BUILD / "jit" / "libfake_cuda.so")
    os.environ["VICUS_NVRTC"] = str(BUILD / "jit" / "libnvrtc.so.13")
    os.environ["VICUS_CACHE_DIR"] = str(cache)
    torch.set_num_threads(1)  # other tests run beside this
    os.environ["FAKE_CUDA_LOG"] = str(LOG)
    os.environ["FAKE_CUDA_SHARED_BYTES"] = "166912 232448"  # as an A100 and an H100 have
    os.environ["EMULATED_DEVICE"] = str(BUILD / "emulation" / "libemulated_device.so")
    os.environ["FAKE_NVRTC_COMPILER"] = f"'{sys.executable}' '{HERE / 'compile.py'}'"
    return ctypes.CDLL(os.environ["VICUS_CUDA_DRIVER"])


@functools.cache
def context(device: int) -> ctypes.c_void_p:
    made = ctypes.c_void_p()
    assert driver().cuDevicePrimaryCtxRetain(ctypes.byref(made), device) == 0
    return made


@contextlib.contextmanager
def on_device(engine: str, arrays: dict):
    """The device of an engine, which knows the memory of these tensors."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in arrays.values()}
    assert driver().cuCtxPushCurrent_v2(context(DEVICES[engine])) == 0
    try:
        for start, size in storages.items():
            assert driver().cuMemHostRegister_v2(ctypes.c_void_p(start), ctypes.c_size_t(size), 0) == 0
        yield
    finally:
        for start in storages:
            driver().cuMemHostUnregister(ctypes.c_void_p(start))
        driver().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def call(operation: str, engine: str, request: dict, arrays: dict):
    """One operation of the bridge on the device of `engine`. Arrays are tensors or None, by name."""
    present = {name: x for name, x in arrays.items() if x is not None}
    with on_device(engine, present):
        return bridge.call(operation, request, {name: View(x) for name, x in present.items()})


class View(bridge.View):
    """A tensor as the library sees it."""

    def __init__(self, x: torch.Tensor):
        self.data, self.dtype = x.data_ptr(), str(x.dtype).removeprefix("torch.")
        self.shape, self.strides, self.keep = list(x.shape), list(x.stride()), x


def fresh(shape, dtype, turned=0) -> torch.Tensor:
    """An output: NaN, between more of it. That many axes after the batch lie in memory in reverse order."""
    order = [*range(len(shape))]
    order[1 : turned + 1] = order[turned:0:-1]
    count = math.prod(shape)
    made = torch.full((count + 2 * GUARD,), torch.nan, dtype=dtype)[GUARD : GUARD + count]
    return made.view([shape[i] for i in order]).permute(order)  # its own inverse


def untouched(made: torch.Tensor) -> bool:
    """Whether nothing was written beside a fresh tensor."""
    whole = torch.empty(0, dtype=made.dtype).set_(made.untyped_storage())
    return bool(whole[:GUARD].isnan().all() and whole[-GUARD:].isnan().all())


def run(problem, t: dict, engine: str, deterministic=True, turned=False, wanted=INPUTS[:6], **options) -> dict:
    """Output, logsumexp and, by "gradient of NAME", gradients of `wanted`. Tensors by name; options of the plan.

    On the device of `engine` and by that engine, or by what is best for the `gpu` that options name.
    """
    asked = "auto" if "gpu" in options else engine
    request = bridge.request(problem, engine=asked, deterministic=deterministic, **options)
    kind = t["query"].dtype
    lse_type = torch.float64 if kind == torch.float64 else torch.float32
    axes = turned * (len(problem.layout) + 1)  # tokens and heads
    made = {
        "output": fresh(problem.shape("output"), kind, axes),
        "logsumexp": fresh(problem.shape("logsumexp"), lse_type, axes),
    }
    given = {name: t.get(name) for name in INPUTS}
    call("forward", engine, request, given | made)
    grads = {name: fresh(t[name].shape, t[name].dtype) for name in wanted if t.get(name) is not None}
    arriving = {name: t.get(name) for name in ("grad_output", "grad_logsumexp")}
    call("backward", engine, request, given | made | arriving | {f"d_{name}": g for name, g in grads.items()})
    made |= {f"gradient of {name}": g for name, g in grads.items()}
    for name, x in made.items():
        assert untouched(x), f"something was written beside {name}"
    return made


def launched() -> list[str]:
    """Of the kernels since the last call of this, in order: names, and "name/threads" of a block."""
    lines = LOG.read_text().splitlines() if LOG.exists() else []
    LOG.unlink(missing_ok=True)
    words = [line.split()[1:3] for line in lines if line.startswith("launch ")]
    return [name for name, threads in words for name in (name, f"{name}/{threads}")]


def compare_all(found: dict, ref, peer, noise) -> float:
    """The largest error as a share of what is allowed."""
    keys = {name: name if name in ref else name.removeprefix("gradient of ") for name in found}
    return max(compare(name, x, *(of[keys[name]] for of in (ref, peer, noise))) for name, x in found.items())


def check(case, engine: str, deterministic=True, expected=(), **options) -> float:
    """Forward and backward against the oracle. Returns the largest error as a share of what is allowed."""
    p, t = case.problem, tensors(case, "cpu")
    launched()
    found = run(p, t, engine, deterministic, **options)
    assert set(expected) <= set(names := launched()), names
    inputs = {name: x for name, x in t.items() if not name.startswith("grad_")}
    arriving = t["grad_output"], t["grad_logsumexp"]
    ref, peer = (gpu_oracle.compute(p, inputs, *arriving, half=half) for half in (None, gpu_oracle.TYPES[p.dtype]))
    return compare_all(found, ref.values, peer.values, ref.noise)


def check_alone(case, engine: str, expected=(), **options) -> None:
    """Each gradient by itself is what it is beside the others, to the bit."""
    p, t = case.problem, tensors(case, "cpu")
    whole = run(p, t, engine, **options)
    for of in ("query", "key", "value"):
        launched()
        name, alone = f"gradient of {of}", run(p, t, engine, wanted=(of,), **options)
        assert of == "query" or set(expected) <= set(names := launched()), names
        assert torch.equal(alone[name], whole[name]), name


def check_lengths(case, engine: str, deterministic=True, expected=()) -> float:
    """The same of packed sequences or padded keys."""
    t, mask = gpu_lengths.made(case, "cpu"), case.problem.mask
    ref, noise = gpu_lengths.wanted(case, t)
    peer, _ = gpu_lengths.wanted(case, t, gpu_oracle.TYPES[case.problem.dtype])
    if case.packed:
        sums = {f"cumulative_{of}": [0, *itertools.accumulate(n)] for of, n in (("queries", case.q), ("keys", case.k))}
        mask = dataclasses.replace(mask, **sums)
    else:
        mask = dataclasses.replace(mask, key_lengths=case.k)
    launched()
    found = run(dataclasses.replace(case.problem, mask=mask), t, engine, deterministic)
    assert set(expected) <= set(names := launched()), names
    return compare_all(found, ref, peer, noise)


def check_outside(case, engine: str, deterministic=True, expected=(), **options) -> None:
    """What is not finite reaches nothing but what sees it: a key of NaN, and the queries that do not see it."""
    p, t = case.problem, tensors(case, "cpu")
    t["grad_logsumexp"] = None
    launched()
    clean = run(p, t, engine, deterministic, **options)
    assert set(expected) <= set(names := launched()), names
    tokens = [token for token in (0, p.keys - 1) if not gpu_oracle.seen_table(p)[:, token].all()]
    assert tokens
    for token in tokens:
        blind = ~gpu_oracle.seen_table(p)[:, token]
        bad = dict(t)
        for name in ("key", "value"):
            bad[name] = t[name].clone()
            bad[name].view(p.batch, p.keys, -1)[:, token] = torch.nan
        # Queries that see it may have any result. They send no gradient, so nobody else's is spoiled.
        bad["grad_output"] = t["grad_output"].clone()
        bad["grad_output"].view(p.batch, p.queries, -1)[:, ~blind] = 0
        found = run(p, bad, engine, deterministic, **options)
        for name in ("output", "logsumexp", "gradient of query"):
            compare_rows(name, *(x[name].view(p.batch, p.queries, -1)[:, blind] for x in (found, clean)))
    for token in (0, p.queries - 1):
        blind = ~gpu_oracle.seen_table(p)[token]
        bad = dict(t)
        for name in ("query", "grad_output"):
            bad[name] = t[name].clone()
            bad[name].view(p.batch, p.queries, -1)[:, token] = torch.nan
        found = run(p, bad, engine, deterministic, **options)
        for name in ("gradient of key", "gradient of value"):
            compare_rows(name, *(x[name].view(p.batch, p.keys, -1)[:, blind] for x in (found, clean)))


def check_heads(case, engine: str, deterministic=True, expected=(), **options) -> None:
    """What is not finite in one head leaves the results of the others as they are."""
    p, t = case.problem, tensors(case, "cpu")
    launched()
    clean = run(p, t, engine, deterministic, **options)
    assert set(expected) <= set(names := launched()), names
    for head in range(p.heads):
        others = [h for h in range(p.heads) if h != head]
        for names in (("key", "value"), ("query", "grad_output")):
            bad = dict(t)
            for name in names:
                bad[name] = t[name].clone()
                bad[name][..., head, :] = torch.nan
            found = run(p, bad, engine, deterministic, **options)
            for name, got in found.items():
                axis = (..., others) if name == "logsumexp" else (..., others, slice(None))
                compare_rows(name, got[axis], clean[name][axis])


def compare_rows(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """Of rows that what is not finite must not reach. Weights of those done again one by one were not rounded."""
    if want.numel() == 0:
        return
    close = 4 * torch.finfo(want.dtype).eps * float(want.abs().max())
    assert ((got.double() - want.double()).abs() <= close).all(), f"{name} of rows that do not see it"
