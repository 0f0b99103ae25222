"""What the GPU tests share: the mark that skips them where no GPU is, and the memory of the device as bytes."""

import pytest
import torch

LEAST = (8, 0)  # compute capability
PRESENT = torch.cuda.is_available() and torch.cuda.get_device_capability() >= LEAST

needs_gpu = pytest.mark.skipif(not PRESENT, reason="needs an NVIDIA GPU of compute capability 8.0 or more")
#: Tests that want the GPU, or most of its memory, for themselves; `make gpu-test` runs them without others beside them.
alone = pytest.mark.alone


class _Bytes:
    def __init__(self, address, count):
        self.__cuda_array_interface__ = {
            "shape": (count,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def device_bytes(address: int, count: int) -> torch.Tensor:
    """Device memory as it is, whoever it belongs to."""
    return torch.as_tensor(_Bytes(address, count), device="cuda")
