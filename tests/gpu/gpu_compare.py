"""When a result of a kernel is right: max|got - ref| <= 2 * max|peer - ref| + floor, with `ref` in float64 and `peer`
the same in PyTorch at the kernels' own precision; the floor is UNITS of the stored type at the largest value, and the
oracle's `noise`."""

import math

import torch

# Rounding of a result, in units of its type. float32: sums of thousands of terms, one after the other, and the GPU's
# exponential; float64: the oracle's own sums.
UNITS = {torch.bfloat16: 0.5, torch.float16: 0.5, torch.float32: 32, torch.float64: 64}


def compare(name, got, ref, peer, noise) -> float:
    """The error as a share of what is allowed."""
    assert got.shape == ref.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(ref.shape)}"
    kind, got, peer = got.dtype, got.double(), peer.to(got.dtype).double()
    assert torch.equal(got == -math.inf, ref == -math.inf), f"{name}: -inf elsewhere"
    finite = ref != -math.inf
    got, ref, peer = got[finite], ref[finite], peer[finite]
    if not got.numel():
        return 0.0
    assert torch.isfinite(got).all(), f"{name}: not finite"
    error, allowed = float((got - ref).abs().max()), 2 * float((peer - ref).abs().max())
    if name == "logsumexp":
        allowed += 1e-4 + 1e-6 * float(ref.abs().max())
    else:
        allowed += noise + UNITS[kind] * torch.finfo(kind).eps * float(ref.abs().max())
        allowed += torch.finfo(kind).smallest_normal
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
    return error / allowed
