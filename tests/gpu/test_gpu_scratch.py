"""Scratch memory of gradients is PyTorch's: counted by it, and there while it holds all of the device. Needs a GPU."""

import gc

import pytest
import torch
from gpu_support import alone, needs_gpu

import vicus

pytestmark = [needs_gpu, alone]
MIB = 2**20
SHAPE = (1, 4096, 16, 128)
SUMS = 4 * 4096 * 16 * 128  # float32, as large as the query


def gradients(tensors):
    query, key, value, grad = tensors
    return torch.autograd.grad(vicus.attention(query, key, value), (query, key, value), grad)


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    made = [torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    for tensor in made[:3]:
        tensor.requires_grad_()
    gradients(made)  # compiled
    torch.cuda.synchronize()
    yield made
    del made
    gc.collect()
    torch.cuda.empty_cache()


def test_is_counted_by_pytorch(tensors):
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = gradients(tensors)
    kept = sum(x.numel() * x.element_size() for x in made)
    assert torch.cuda.max_memory_allocated() >= before + kept + SUMS
    del made
    assert torch.cuda.memory_allocated() == before


def test_where_pytorch_holds_the_device(tensors):
    """What it has cached is free for scratch, though the driver has nothing left."""
    expected = gradients(tensors)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    blocks = []
    for size in (64 * MIB, 16 * MIB):
        while torch.cuda.mem_get_info()[0] > size + 8 * MIB:
            blocks.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    assert torch.cuda.mem_get_info()[0] < SUMS
    for _ in range(3):  # for the sums, the output and three gradients
        blocks.pop(0)
    assert torch.cuda.mem_get_info()[0] < SUMS
    found = gradients(tensors)
    torch.cuda.synchronize()
    del blocks  # PyTorch's own kernels are loaded when they are first used
    torch.cuda.empty_cache()
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(a, b)
    assert (found[0] - expected[0]).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * expected[0].abs().max()
