"""Backends: their names, which one computes a call, and the tiles that it takes.

Names are our engines' ("cpu", "reference", "sm80", "flex", "auto") and those of NATTEN 0.21 ("cutlass-fna",
"hopper-fna", "blackwell-fna", "flex-fna" and, for dense attention, the same with "-fmha"). A NATTEN name that means a
kind of GPU kernel stands for the engine of the device that the tensors are on, so that code which names one runs
anywhere.
"""

import itertools
import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vicus import flex
from vicus._arguments import check_tensors
from vicus._library import engines
from vicus.types import (
    CutlassHopperFmhaForwardConfigType,
    CutlassHopperFnaForwardConfigType,
    FmhaForwardConfigType,
    KernelSchedule,
    QKTileShapeType,
)

__all__ = [
    "can_run",
    "get_bwd_configs_for_cutlass_blackwell_fmha",
    "get_bwd_configs_for_cutlass_blackwell_fna",
    "get_bwd_configs_for_cutlass_fmha",
    "get_bwd_configs_for_cutlass_fna",
    "get_bwd_configs_for_cutlass_hopper_fmha",
    "get_bwd_configs_for_cutlass_hopper_fna",
    "get_configs_for_cutlass_blackwell_fmha",
    "get_configs_for_cutlass_blackwell_fna",
    "get_configs_for_cutlass_fmha",
    "get_configs_for_cutlass_fna",
    "get_configs_for_cutlass_hopper_fmha",
    "get_configs_for_cutlass_hopper_fna",
    "get_configs_for_flex_fmha",
    "get_configs_for_flex_fna",
    "resolve",
    "tile_shapes",
    "tile_sizes",
]

logger = logging.getLogger("vicus")

_GPU_KERNELS = ("cutlass", "hopper", "blackwell")
_ENGINE_DEVICES = ("cpu", "meta")  # meta: shapes only, by the operators that would run

# The core's limits of the GPU engine: the largest head dim by dtype; 0 where it takes none. A table, as torch.compile
# cannot trace the question.
_GPU_HEAD_DIM = {
    dtype: torch.ops.vicus.gpu_head_dim(str(dtype).removeprefix("torch."))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}
_CAPABILITIES: dict[torch.device, tuple[int, int]] = {}  # asked for so far
_CPU_ROWS = 64  # queries of the largest tile of the CPU engine, which also has tiles of half and a quarter of it
_FLEX_TOKENS = (64, 128)  # of a block; smaller ones waste tensor cores, larger ones exceed shared memory


# --- Choice ----------------------------------------------------------------------------------------------------------


def _engine_of(query: Tensor, gpu: bool) -> str:
    if gpu:
        return "sm80"
    return engines()[0] if query.device.type in _ENGINE_DEVICES else "flex"


def gpu_refuses(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str:
    """Why the GPU engine "sm80" does not compute a call, in words.

    Args:
        capability: Compute capability of the device.
        dtype: Of query, key and value.
        head_dim: The largest of query and value.

    Returns:
        The reason; empty when it computes it: every dtype and head dims up to 512, as the core says, on devices of
        compute capability 8.0 or more. float32 and float64 are computed in their own precision, whatever PyTorch's
        switch for TF32 says.
    """
    if capability < (8, 0):
        return f"compute capability is {capability}; engine sm80 needs (8, 0) or more"
    largest = _GPU_HEAD_DIM.get(dtype, 0)
    if head_dim > largest:
        return f"head dim is {head_dim}; engine sm80 takes up to {largest} of {dtype}"
    return ""


@torch.compiler.assume_constant_result  # traced, the question itself would become part of the graph
def _capability(device: torch.device) -> tuple[int, int]:
    known = _CAPABILITIES.get(device)
    if known is None:  # PyTorch takes some microseconds to answer
        known = _CAPABILITIES[device] = torch.cuda.get_device_capability(device)
    return known


def gpu_head_dim(device: torch.device, dtype: torch.dtype) -> int:
    """The largest head dim of engine "sm80" on a CUDA device; 0 where it computes none."""
    return 0 if gpu_refuses(_capability(device), dtype, 0) else _GPU_HEAD_DIM.get(dtype, 0)


def gpu_takes(query: Tensor, value: Tensor) -> bool:
    """Whether the GPU engine "sm80" computes a call: whether `gpu_refuses` has nothing against these tensors."""
    if not query.is_cuda:
        return False
    capability, head_dim = _capability(query.device), max(query.shape[-1], value.shape[-1])
    return not gpu_refuses(capability, query.dtype, head_dim)


def resolve(name: str | None, query: Tensor, *, dense: bool, torch_compile: bool = False, gpu: bool = False) -> str:
    """The engine that computes a call.

    Args:
        name: Of a backend; None or "auto" for the fastest engine that knows the device of `query`.
        query: Of the call.
        dense: Whether the call is dense attention ("-fmha" names) or neighborhood attention ("-fna" names).
        torch_compile: As in the call; only "flex" compiles.
        gpu: Whether the GPU engine takes the call (`gpu_takes`).

    Returns:
        "cpu", "reference", "sm80" or "flex".

    Raises:
        NotImplementedError: No backend has this name.
        RuntimeError: An engine of ours was named that does not know the device of `query` or this machine.
    """
    if not name or name == "auto":
        engine = _engine_of(query, gpu)
    else:
        engine = _named(name, query, "-fmha" if dense else "-fna", gpu)
    if torch_compile and engine != "flex":
        logger.debug("torch_compile=True changes nothing: engine %s is compiled already", engine)
    return engine


def _named(name: str, query: Tensor, kind: str, gpu: bool) -> str:
    if name in ("flex", f"flex{kind}"):
        return "flex"
    if name in [f"{kernel}{kind}" for kernel in _GPU_KERNELS]:
        return _engine_of(query, gpu)
    if name == "sm80":
        if not gpu:
            raise RuntimeError(
                "backend is 'sm80'; it computes head dims up to 512 on CUDA devices of capability 8.0 and more, without"
                " gradients"
            )
        return name
    if name not in ("cpu", "reference"):
        known = ["auto", "cpu", "reference", "sm80", "flex", *(f"{kernel}{kind}" for kernel in (*_GPU_KERNELS, "flex"))]
        raise NotImplementedError(f"backend is {name!r}; allowed: {', '.join(map(repr, known))}")
    if query.device.type not in _ENGINE_DEVICES:
        raise RuntimeError(f"backend is {name!r}, query is on {query.device}; engine {name} takes tensors on the CPU")
    if name not in engines():
        raise RuntimeError(f"backend is 'cpu'; this machine runs {', '.join(engines())} (vicus.info() tells more)")
    return name


def can_run(
    backend: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dense: bool,
    torch_compile: bool = False,
    raise_error: bool = False,
) -> bool:
    """Whether a backend takes these tensors.

    Args:
        backend: As in `resolve`.
        query: `[B, *X, H, D]`; dense `[B, Sq, H, D]`.
        key: `[B, *X, Hkv, D]`; dense `[B, Sk, Hkv, D]`.
        value: `[B, *X, Hkv, Dv]`; dense `[B, Sk, Hkv, Dv]`.
        dense: For dense attention.
        torch_compile: As in the call that is meant.
        raise_error: Raise the reason in place of answering False.

    Returns:
        The answer.

    Raises:
        NotImplementedError: No backend has this name (whatever `raise_error`), or a tensor is sparse or nested.
        ValueError: The tensors do not fit each other or the backend.
        RuntimeError: The backend does not know the device, or compiling is not allowed.
    """
    try:
        engine = resolve(backend, query, dense=dense, gpu=query.is_cuda)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        return _answer(error, raise_error)
    try:
        check_tensors(query, key, value, dense=dense)
        if engine == "sm80":
            engine = resolve(backend, query, dense=dense, gpu=gpu_takes(query, value))
    except (RuntimeError, ValueError) as error:  # NotImplementedError is a RuntimeError
        return _answer(error, raise_error)
    return _answer(flex.unsupported(query, key, value, torch_compile) if engine == "flex" else None, raise_error)


def _answer(error: Exception | None, raise_error: bool) -> bool:
    if error is not None and raise_error:
        raise error
    return error is None


# --- Tiles -----------------------------------------------------------------------------------------------------------


def _boxes(layout: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Boxes of powers of two no longer than the layout, rounded up, that hold one of `sizes` tokens, largest first;
    the whole layout where it holds fewer."""
    axes = [[1 << e for e in range(max(n - 1, 0).bit_length() + 1)] for n in layout]
    boxes = [box for box in itertools.product(*axes) if math.prod(box) in sizes]
    boxes.sort(key=lambda box: (-math.prod(box), max(box)))
    return boxes or [tuple(axis[-1] for axis in axes)]


def tile_shapes(
    backend: str | None, query: Tensor, key: Tensor, value: Tensor, *, torch_compile: bool = False
) -> list[QKTileShapeType]:
    """Tiles that neighborhood attention takes for these tensors, forward (`q_tile_shape`, `kv_tile_shape`) and backward
    (`backward_q_tile_shape`, `backward_kv_tile_shape`).

    The CPU engine takes any box of at most 64 queries, and cuts the keys as it needs: the second shape of a pair only
    repeats the first. On a GPU, engine sm90 takes those that it has for the forward pass, and picks by itself
    otherwise. They pick well without being told; this is for code that tries all.

    Args:
        backend: As in `resolve`.
        query: `[B, *X, H, D]`, with the dtype, device and `requires_grad` of the call that is meant.
        key: `[B, *X, Hkv, D]`.
        value: `[B, *X, Hkv, Dv]`.
        torch_compile: For backend "flex".

    Returns:
        Pairs of shapes, one integer per token axis; empty when the backend does not take the tensors.

    Raises:
        NotImplementedError: No backend has this name.
    """
    if not can_run(backend, query, key, value, dense=False, torch_compile=torch_compile):
        return []
    return _pairs(backend, query, dense=False)


def tile_sizes(
    backend: str | None, query: Tensor, key: Tensor, value: Tensor, *, torch_compile: bool = False
) -> list[FmhaForwardConfigType]:
    """Tiles that dense attention takes for these tensors: as `tile_shapes`, pairs of integers (`q_tile_size`,
    `kv_tile_size`, `backward_q_tile_size`, `backward_kv_tile_size`).

    Args:
        backend: As in `resolve`.
        query: `[B, Sq, H, D]`.
        key: `[B, Sk, Hkv, D]`.
        value: `[B, Sk, Hkv, Dv]`.
        torch_compile: For backend "flex".

    Returns:
        Pairs of numbers of tokens; empty when the backend does not take the tensors.

    Raises:
        NotImplementedError: No backend has this name.
    """
    if not can_run(backend, query, key, value, dense=True, torch_compile=torch_compile):
        return []
    return [(q, kv) for (q,), (kv,) in _pairs(backend, query, dense=True)]


def _pairs(backend: str | None, query: Tensor, *, dense: bool) -> list[QKTileShapeType]:
    layout = query.shape[1:-2]
    if resolve(backend, query, dense=dense) == "flex":
        # Tokens are padded to whole tiles, so a tile may be longer than the layout.
        boxes = _boxes([max(_FLEX_TOKENS)] * len(layout), _FLEX_TOKENS)
    else:
        boxes = _boxes(layout, (_CPU_ROWS, _CPU_ROWS // 2, _CPU_ROWS // 4))
    return [(box, box) for box in boxes]


# --- NATTEN's names for the same -------------------------------------------------------------------------------------


def get_configs_for_cutlass_fna(query: Tensor, key: Tensor, value: Tensor) -> list[QKTileShapeType]:
    """`tile_shapes` of backend "cutlass-fna", forward pass."""
    return tile_shapes("cutlass-fna", query, key, value)


def get_bwd_configs_for_cutlass_fna(query: Tensor, key: Tensor, value: Tensor) -> list[QKTileShapeType]:
    """`tile_shapes` of backend "cutlass-fna", backward pass."""
    return tile_shapes("cutlass-fna", query, key, value)


def get_configs_for_cutlass_fmha(query: Tensor, key: Tensor, value: Tensor) -> list[FmhaForwardConfigType]:
    """`tile_sizes` of backend "cutlass-fmha", forward pass."""
    return tile_sizes("cutlass-fmha", query, key, value)


def get_bwd_configs_for_cutlass_fmha(query: Tensor, key: Tensor, value: Tensor) -> list[FmhaForwardConfigType]:
    """`tile_sizes` of backend "cutlass-fmha", backward pass."""
    return tile_sizes("cutlass-fmha", query, key, value)


def get_configs_for_cutlass_hopper_fna(
    query: Tensor, key: Tensor, value: Tensor
) -> list[CutlassHopperFnaForwardConfigType]:
    """`tile_shapes` of backend "hopper-fna", forward pass, each with a `KernelSchedule`."""
    return [(pair, KernelSchedule.NonPersistent) for pair in tile_shapes("hopper-fna", query, key, value)]


def get_bwd_configs_for_cutlass_hopper_fna(query: Tensor, key: Tensor, value: Tensor) -> list[QKTileShapeType]:
    """`tile_shapes` of backend "hopper-fna", backward pass."""
    return tile_shapes("hopper-fna", query, key, value)


def get_configs_for_cutlass_hopper_fmha(
    query: Tensor, key: Tensor, value: Tensor
) -> list[CutlassHopperFmhaForwardConfigType]:
    """`tile_sizes` of backend "hopper-fmha", forward pass, each with a `KernelSchedule`."""
    return [(pair, KernelSchedule.NonPersistent) for pair in tile_sizes("hopper-fmha", query, key, value)]


def get_bwd_configs_for_cutlass_hopper_fmha(query: Tensor, key: Tensor, value: Tensor) -> list[FmhaForwardConfigType]:
    """`tile_sizes` of backend "hopper-fmha", backward pass."""
    return tile_sizes("hopper-fmha", query, key, value)


def get_configs_for_cutlass_blackwell_fna(query: Tensor, key: Tensor, value: Tensor) -> list[QKTileShapeType]:
    """`tile_shapes` of backend "blackwell-fna", forward pass."""
    return tile_shapes("blackwell-fna", query, key, value)


def get_bwd_configs_for_cutlass_blackwell_fna(query: Tensor, key: Tensor, value: Tensor) -> list[QKTileShapeType]:
    """`tile_shapes` of backend "blackwell-fna", backward pass."""
    return tile_shapes("blackwell-fna", query, key, value)


def get_configs_for_cutlass_blackwell_fmha(query: Tensor, key: Tensor, value: Tensor) -> list[FmhaForwardConfigType]:
    """`tile_sizes` of backend "blackwell-fmha", forward pass."""
    return tile_sizes("blackwell-fmha", query, key, value)


def get_bwd_configs_for_cutlass_blackwell_fmha(
    query: Tensor, key: Tensor, value: Tensor
) -> list[FmhaForwardConfigType]:
    """`tile_sizes` of backend "blackwell-fmha", backward pass."""
    return tile_sizes("blackwell-fmha", query, key, value)


def get_configs_for_flex_fna(
    query: Tensor, key: Tensor, value: Tensor, torch_compile: bool = False
) -> list[QKTileShapeType]:
    """`tile_shapes` of backend "flex-fna"; empty with `torch_compile` where compiling is not allowed."""
    return tile_shapes("flex-fna", query, key, value, torch_compile=torch_compile)


def get_configs_for_flex_fmha(
    query: Tensor, key: Tensor, value: Tensor, torch_compile: bool = False
) -> list[FmhaForwardConfigType]:
    """`tile_sizes` of backend "flex-fmha"; empty with `torch_compile` where compiling is not allowed."""
    return tile_sizes("flex-fmha", query, key, value, torch_compile=torch_compile)
