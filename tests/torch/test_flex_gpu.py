"""The backend "flex" on a GPU: FlexAttention compiled, forward and backward, against float64."""

import math
from functools import partial

import pytest
import torch

from vicus import _flex_masks, context, flex

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# layout, (kernel_size, stride, dilation, is_causal), tiles, additional tokens, rpb, dtype
CASES = [
    ((300,), ((31,), (1,), (1,), (False,)), None, 0, False, torch.bfloat16),
    ((300,), ((40,), (7,), (3,), (True,)), ((64,), (64,)), 5, True, torch.float16),
    ((17, 30), ((7, 9), (1, 4), (2, 1), (False, False)), None, 3, False, torch.float32),
    ((17, 30), ((7, 9), (1, 4), (2, 1), (True, False)), ((8, 8), (4, 16)), 0, True, torch.bfloat16),
    ((17, 30), ((7, 9), (1, 4), (1, 1), (False, False)), ((8, 16), (16, 8)), 0, False, torch.bfloat16),
    (
        (6, 9, 10),
        ((3, 5, 4), (1, 2, 1), (1, 1, 2), (True, False, False)),
        ((4, 4, 4), (2, 4, 8)),
        7,
        False,
        torch.float16,
    ),
]
DENSE = [
    {"causal": 1},
    {"causal": 2, "window_left": 50},
    {"window_left": 30, "window_right": 9},
    {"key_lengths": (300, 0)},
    {"causal": 2, "q_tile_size": 64, "kv_tile_size": 64},
]


@pytest.fixture(autouse=True)
def compiling():
    torch.manual_seed(0)
    torch._dynamo.reset()
    with context.allow_flex_compile(backprop=True):
        yield


def results(function, tensors, weights):
    """Output, logsumexp and gradients of a fixed functional of both."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    output, logsumexp = function(*tensors)
    seen = logsumexp != -math.inf
    total = (output * weights.to(output)).sum() + (
        logsumexp.masked_fill(~seen, 0) * weights[..., 0].to(logsumexp)
    ).sum()
    return [output.detach(), logsumexp.detach(), *torch.autograd.grad(total, tensors)]


def assert_close(function, tensors):
    """Compiled, no larger error than twice that of the eager computation at the same precision, plus its rounding."""
    shape = [*tensors[0].shape[:-1], tensors[2].shape[-1]]
    weights = torch.randn(shape, device="cuda", dtype=torch.float64)
    wanted = results(partial(function, torch_compile=False), [x.double() for x in tensors], weights)
    plain = results(partial(function, torch_compile=False), tensors, weights)
    found = results(partial(function, torch_compile=True), tensors, weights)
    for name, f, p, w in zip(
        ("output", "logsumexp", "query", "key", "value", "4", "5", "6"), found, plain, wanted, strict=False
    ):
        assert torch.equal(f == -math.inf, w == -math.inf), name
        f, p, w = (x.double().nan_to_num(neginf=0) for x in (f, p, w))
        floor = torch.finfo(tensors[0].dtype).eps * float(w.abs().max())
        assert float((f - w).abs().max()) <= 2 * float((p - w).abs().max()) + 2 * floor, name


@pytest.mark.parametrize(("layout", "windows", "tiles", "extra", "has_rpb", "dtype"), CASES)
def test_neighborhood(layout, windows, tiles, extra, has_rpb, dtype):
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype)  # noqa: E731
    tensors = [make(2, *layout, 4, 32), make(2, *layout, 2, 32), make(2, *layout, 2, 64)]
    tensors += [make(2, extra, 2, 32), make(2, extra, 2, 64)] if extra else []
    tensors += [make(4, *(2 * w - 1 for w in windows[0]))] if has_rpb else []

    def run(query, key, value, *more, torch_compile):
        more = list(more)
        rpb = more.pop() if has_rpb else None
        additional = more or (None, None)
        return flex.neighborhood(
            query, key, value, *windows, 0.2,
            additional_keys=additional[0], additional_values=additional[1], rpb=rpb,
            q_tile_shape=tiles and tiles[0], kv_tile_shape=tiles and tiles[1], torch_compile=torch_compile,
        )  # fmt: skip

    assert_close(run, tensors)


@pytest.mark.parametrize("arguments", DENSE)
def test_dense(arguments):
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    tensors = [make(2, 200, 6, 64), make(2, 333, 2, 64), make(2, 333, 2, 64)]
    if "key_lengths" in arguments:
        arguments = {"key_lengths": torch.tensor(arguments["key_lengths"], device="cuda")}

    def run(query, key, value, torch_compile):
        return flex.dense(query, key, value, scale=0.125, torch_compile=torch_compile, **arguments)

    assert_close(run, tensors)


def test_blocks_of_a_large_problem_fit():
    # The table of all pairs would take 13 GiB in its smallest form.
    torch.cuda.reset_peak_memory_stats()
    windows = _flex_masks.Windows((30, 48, 80), (18, 24, 24), (1, 1, 1), (1, 1, 1), (False,) * 3)
    device = torch.device("cuda")
    blocks = _flex_masks.neighborhood_blocks(windows, (2, 8, 8), (2, 8, 8), 0, (128, 128), device)
    assert torch.cuda.max_memory_allocated() < 1 << 30
    assert 0 < int(blocks.full_kv_num_blocks.sum()) < int(blocks.kv_num_blocks.sum())
