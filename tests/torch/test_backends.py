"""Names of backends, what they stand for, and tiles: each one that is offered is taken, and changes no result."""

import inspect
import itertools
import logging
import math

import pytest
import torch

from vicus import _library, attention, backends, context, info, na1d, na2d, na3d
from vicus.types import KernelSchedule

NATTEN_KINDS = ["cutlass", "hopper", "blackwell"]


def qkv(*layout, dtype=torch.float32, device="cpu", heads=(4, 2), dims=(8, 6)):
    """Small query, key and value."""
    torch.manual_seed(0)
    shapes = [(2, *layout, heads[0], dims[0]), (2, *layout, heads[1], dims[0]), (2, *layout, heads[1], dims[1])]
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


# --- Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True])
def test_names_on_the_cpu(dense):
    kind, other = ("-fmha", "-fna") if dense else ("-fna", "-fmha")
    query = torch.zeros(1, 4, 1, 8)
    resolve = lambda name: backends.resolve(name, query, dense=dense)  # noqa: E731
    best = info()["engines"][0]
    for name in (None, "", "auto", *(k + kind for k in NATTEN_KINDS)):
        assert resolve(name) == best
    assert resolve("reference") == "reference"
    assert resolve("cpu") == "cpu"
    assert resolve("flex") == resolve("flex" + kind) == "flex"
    for name in ("flex" + other, "cutlass" + other, "cutlass", "Flex", "cuda", 3, ("cpu",)):
        with pytest.raises(NotImplementedError, match=r"backend is .*allowed: 'auto', 'cpu'"):
            resolve(name)


class Elsewhere:
    """Stands for a tensor on a device that no engine knows; names are resolved by the device alone."""

    device = torch.device("cuda", 1)


def test_names_on_a_device_without_an_engine():
    resolve = lambda name: backends.resolve(name, Elsewhere(), dense=False)  # noqa: E731
    assert {resolve(name) for name in (None, "auto", "flex", "flex-fna", "hopper-fna")} == {"flex"}
    for name in ("cpu", "reference"):
        with pytest.raises(RuntimeError, match=f"backend is '{name}', query is on cuda:1"):
            resolve(name)


def test_names_on_a_gpu():
    resolve = lambda name, gpu: backends.resolve(name, Elsewhere(), dense=False, gpu=gpu)  # noqa: E731
    assert {resolve(name, True) for name in (None, "auto", "sm80", "hopper-fna", "cutlass-fna")} == {"sm80"}
    assert {resolve(name, True) for name in ("flex", "flex-fna")} == {"flex"}
    with pytest.raises(RuntimeError, match="backend is 'sm80'; it computes head dims up to 512"):
        resolve("sm80", False)


def test_what_the_gpu_engine_takes(monkeypatch):
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(backends, "_CAPABILITIES", {})

    class OnGpu(Elsewhere):
        is_cuda, dtype, shape = True, torch.bfloat16, (1, 8, 2, 64)

    takes = lambda query: backends.gpu_takes(query, query)  # noqa: E731
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        tensor = OnGpu()
        tensor.dtype = dtype
        assert takes(tensor)
        tensor.shape = (1, 8, 2, 512)
        assert takes(tensor)
        tensor.shape = (1, 8, 2, 513)
        assert not takes(tensor)
    elsewhere = OnGpu()
    elsewhere.is_cuda = False
    assert not takes(elsewhere)
    backends._CAPABILITIES.clear()
    capability = (7, 5)
    assert not takes(OnGpu())


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_the_gpu_engine_takes_is_known_when_a_graph_is_made(monkeypatch, dynamic):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "_CAPABILITIES", {})

    def called(x):
        why = backends.gpu_refuses(backends._capability(x.device), x.dtype, x.shape[-1])
        return x if why else x + 1

    compiled = torch.compile(called, backend="eager", fullgraph=True, dynamic=dynamic)
    assert compiled(torch.zeros(3, 64)).sum() == 3 * 64
    assert compiled(torch.zeros(3, 8192)).sum() == 0


def test_a_machine_without_the_cpu_engine(monkeypatch):
    monkeypatch.setattr(backends, "engines", lambda: ("reference",))
    query = torch.zeros(1, 4, 1, 8)
    assert backends.resolve(None, query, dense=True) == "reference"
    with pytest.raises(RuntimeError, match="this machine runs reference"):
        backends.resolve("cpu", query, dense=True)
    assert not backends.can_run("cpu", query, query, query, dense=True)


def test_compiling_an_engine_changes_nothing(caplog):
    with caplog.at_level(logging.DEBUG, logger="vicus"):
        backends.resolve(None, torch.zeros(1, 4, 1, 8), dense=True, torch_compile=True)
    assert "torch_compile" in caplog.text


@pytest.mark.parametrize("name", ["auto", "cpu", "reference", "flex", *(k + "-fna" for k in NATTEN_KINDS), "flex-fna"])
def test_every_backend_computes_the_same(name):
    tensors = qkv(6, 7)
    wanted = na2d(*tensors, kernel_size=(3, 5), dilation=(2, 1), is_causal=(False, True), return_lse=True)
    found = na2d(*tensors, kernel_size=(3, 5), dilation=(2, 1), is_causal=(False, True), return_lse=True, backend=name)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() < 4e-6


@pytest.mark.parametrize(
    "name", ["auto", "cpu", "reference", "flex", *(k + "-fmha" for k in NATTEN_KINDS), "flex-fmha"]
)
def test_every_backend_computes_the_same_dense_attention(name):
    tensors = qkv(13)
    wanted = attention(*tensors, is_causal=True, return_lse=True)
    for a, b in zip(attention(*tensors, is_causal=True, return_lse=True, backend=name), wanted, strict=True):
        assert (a - b).abs().max() < 4e-6


def test_unknown_backends_of_operators():
    tensors = qkv(9)
    with pytest.raises(NotImplementedError, match="cutlass-fmha"):
        na1d(*tensors, kernel_size=3, backend="cutlass-fmha")
    with pytest.raises(NotImplementedError, match="cutlass-fna"):
        attention(*tensors, backend="cutlass-fna")


# --- What can run ----------------------------------------------------------------------------------------------------


def test_can_run():
    query, key, value = qkv(9)
    ask = lambda name, *tensors, **more: backends.can_run(name, *tensors, dense=False, **more)  # noqa: E731
    assert ask(None, query, key, value)
    assert ask("flex", query, key, value)
    cases = [
        (ValueError, (query, key[:, :5], value)),
        (ValueError, (query, key.double(), value)),
        (ValueError, (query.int(), key.int(), value.int())),
        (NotImplementedError, (query.to_sparse(), key, value)),
    ]
    for error, tensors in cases:
        assert not ask("cutlass-fna", *tensors)
        assert backends.tile_shapes("cutlass-fna", *tensors) == []
        with pytest.raises(error):
            ask("cutlass-fna", *tensors, raise_error=True)
    with pytest.raises(NotImplementedError, match="'nothing'"):
        ask("nothing", query, key, value)


def test_compiled_flex_can_run_where_it_is_allowed():
    tensors = qkv(16, dims=(16, 16))
    flags = {"dense": False, "torch_compile": True}
    assert not backends.can_run("flex-fna", *tensors, **flags)
    assert backends.get_configs_for_flex_fna(*tensors, torch_compile=True) == []
    assert backends.get_configs_for_flex_fmha(*tensors, True) == []
    with pytest.raises(RuntimeError, match="allow_flex_compile"):
        backends.can_run("flex-fna", *tensors, **flags, raise_error=True)
    with context.allow_flex_compile():
        assert backends.can_run("flex-fna", *tensors, **flags)
        assert backends.get_configs_for_flex_fna(*tensors, torch_compile=True)
        assert backends.get_configs_for_flex_fmha(*tensors, True)


# --- Tiles -----------------------------------------------------------------------------------------------------------

LAYOUTS = [(70,), (3,), (9, 20), (2, 100), (4, 5, 6), (2, 2, 2)]
OPERATORS = {1: na1d, 2: na2d, 3: na3d}


def assert_tiles(pairs, rank, limit):
    assert pairs
    assert len(set(pairs)) == len(pairs)
    for q_tile, kv_tile in pairs:
        assert len(q_tile) == len(kv_tile) == rank
        assert all(type(n) is int and n > 0 for n in q_tile + kv_tile)
        assert math.prod(q_tile) <= limit


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_of_the_engine_are_taken(layout):
    tensors = [x.requires_grad_() for x in qkv(*layout)]
    operator = OPERATORS[len(layout)]
    forward = backends.get_configs_for_cutlass_fna(*tensors)
    backward = backends.get_bwd_configs_for_cutlass_fna(*tensors)
    assert_tiles(forward, len(layout), 64)
    assert_tiles(backward, len(layout), 64)
    exact = operator(*tensors, kernel_size=2)
    gradients = torch.autograd.grad(exact.sum(), tensors)
    for (q, kv), (backward_q, backward_kv) in itertools.islice(zip(forward, reversed(backward), strict=True), 0, 20, 3):
        output = operator(
            *tensors,
            kernel_size=2,
            q_tile_shape=q,
            kv_tile_shape=kv,
            backward_q_tile_shape=backward_q,
            backward_kv_tile_shape=backward_kv,
            backend="cutlass-fna",
        )
        assert (output - exact).abs().max() < 4e-6
        for found, wanted in zip(torch.autograd.grad(output.sum(), tensors), gradients, strict=True):
            assert (found - wanted).abs().max() < 2e-5


def test_schedules_of_hopper_tiles_are_taken():
    tensors = qkv(9, 20)
    for (q, kv), schedule in backends.get_configs_for_cutlass_hopper_fna(*tensors)[::7]:
        assert isinstance(schedule, KernelSchedule)
        na2d(*tensors, 3, q_tile_shape=q, kv_tile_shape=kv, kernel_schedule=schedule, backend="hopper-fna")
    tensors = qkv(90)
    for (q, kv), schedule in backends.get_configs_for_cutlass_hopper_fmha(*tensors):
        assert isinstance(schedule, KernelSchedule)
        attention(*tensors, q_tile_size=q, kv_tile_size=kv, kernel_schedule=schedule, backend="hopper-fmha")


def test_tile_sizes_of_dense_attention_are_taken():
    tensors = qkv(90)
    exact = attention(*tensors)
    pairs = backends.get_configs_for_cutlass_fmha(*tensors)
    assert_tiles([((q,), (kv,)) for q, kv in pairs], 1, 64)
    for q, kv in pairs:
        output = attention(
            *tensors, q_tile_size=q, kv_tile_size=kv, backward_q_tile_size=q, backward_kv_tile_size=kv, backend="cpu"
        )
        assert (output - exact).abs().max() < 4e-6


def test_tiles_of_flex_are_taken():
    tensors = qkv(6, 7)
    exact = na2d(*tensors, kernel_size=3)
    pairs = backends.get_configs_for_flex_fna(*tensors)
    assert_tiles(pairs, 2, 128)
    tensors[0].requires_grad_()  # the path that needs no compilation for each pair of tiles
    for q, kv in pairs[::3]:
        output = na2d(*tensors, kernel_size=3, q_tile_shape=q, kv_tile_shape=kv, backend="flex-fna")
        assert (output - exact).abs().max() < 4e-6
    tensors = qkv(40)
    assert_tiles([((q,), (kv,)) for q, kv in backends.get_configs_for_flex_fmha(*tensors)], 1, 128)
    for q, kv in backends.get_configs_for_flex_fmha(*tensors):
        attention(*tensors, q_tile_size=q, kv_tile_size=kv, backend="flex-fmha")


NAMES = [name for name in backends.__all__ if "configs_for" in name]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_natten_answers(name):
    function = getattr(backends, name)
    assert list(inspect.signature(function).parameters)[:3] == ["query", "key", "value"]
    configs = function(*qkv(40))
    assert isinstance(configs, list)
    assert configs
    first = configs[0]
    if "hopper" in name and "bwd" not in name:
        first, schedule = first
        assert isinstance(schedule, KernelSchedule)
    assert all(isinstance(tile, int if name.endswith("fmha") else tuple) for tile in first)
    if name.endswith("fmha"):
        assert function(*qkv(6, 7)) == []  # dense attention has one token axis


def test_all_names_of_natten_are_there():
    kernels = [f"cutlass{k}_{op}" for k in ("", "_hopper", "_blackwell") for op in ("fna", "fmha")]
    wanted = {f"get_{bwd}configs_for_{k}" for bwd in ("", "bwd_") for k in kernels}
    assert set(NAMES) == wanted | {"get_configs_for_flex_fna", "get_configs_for_flex_fmha"}


def test_tiles_too_large_for_the_engine_are_an_error():
    assert "cpu" in _library.engines()
    with pytest.raises(ValueError, match="64"):
        na1d(*qkv(200), kernel_size=3, q_tile_shape=(128,), kv_tile_shape=(64,))
