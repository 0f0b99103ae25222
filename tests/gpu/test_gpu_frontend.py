"""The PyTorch package with CUDA tensors: public functions, autograd, autocast, torch.compile, layers.

Expected values are those of the CPU engine in float64, which has its own tests against an oracle.
"""

import copy

import pytest
import torch
from gpu_support import needs_gpu

import vicus

pytestmark = needs_gpu
NA = {1: vicus.na1d, 2: vicus.na2d, 3: vicus.na3d}
LAYOUTS = {1: (300,), 2: (24, 31), 3: (6, 10, 12)}
MASKS = {
    "plain": {"kernel_size": 5},
    "step": {"kernel_size": 5, "stride": 2},
    "dilated, causal": {"kernel_size": 3, "dilation": 2, "is_causal": True},
    "scaled": {"kernel_size": 4, "scale": 0.3},
}
DENSE = {
    "full": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "sliding": {"window_size": (20, 7)},
}
# Units of the type that results may be off, of the largest value: sums of a few hundred rounded terms, and for float32
# the error of its exponential.
UNITS = {torch.bfloat16: 8, torch.float16: 8, torch.float32: 32}


def made(layout, dtype, heads=4, kv=2, dim=32, dim_v=32, batch=2):
    torch.manual_seed(0)
    shapes = [(heads, dim), (kv, dim), (kv, dim_v)]
    return [torch.randn(batch, *layout, *shape, device="cuda").to(dtype).requires_grad_() for shape in shapes]


def results(function, tensors, dtype, lse=True):
    """Output, logsumexp and gradients of a fixed functional of both, in float64 on the CPU."""
    found = function(*tensors)
    output, logsumexp = found if lse else (found, None)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype).to(output)
    total = (output * weights).sum()
    if lse:
        total = total + (logsumexp * weights[..., 0].to(logsumexp)).sum()
    grads = torch.autograd.grad(total, tensors)
    kept = [output, *([logsumexp] if lse else []), *grads]
    return [x.detach().double().cpu() for x in kept]


def assert_close(function, tensors, lse=True):
    dtype = tensors[0].dtype
    twins = [x.detach().double().cpu().requires_grad_() for x in tensors]
    found, wanted = results(function, tensors, dtype, lse), results(function, twins, dtype, lse)
    for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
        assert float((x - y).abs().max()) <= UNITS[dtype] * torch.finfo(dtype).eps * max(1.0, float(y.abs().max())), i


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("mask", MASKS)
def test_neighborhood(rank, mask, dtype):
    assert_close(lambda *x: NA[rank](*x, **MASKS[mask], return_lse=True), made(LAYOUTS[rank], dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mask", DENSE)
def test_dense(mask, dtype):
    assert_close(lambda *x: vicus.attention(*x, **DENSE[mask], return_lse=True), made((200,), dtype))


def test_additional_tokens_and_bias():
    tensors = made((20, 21), torch.bfloat16)
    more = [torch.randn(2, 7, 2, 32, device="cuda").bfloat16().requires_grad_() for _ in range(2)]
    rpb = torch.randn(4, 9, 9, device="cuda").bfloat16().requires_grad_()

    def function(q, k, v, keys, values, rpb):
        return vicus.na2d(q, k, v, 5, additional_keys=keys, additional_values=values, rpb=rpb, return_lse=True)

    assert_close(function, [*tensors, *more, rpb])


def test_slices_of_a_projection():
    qkv = torch.randn(2, 16, 18, 3, 4, 32, device="cuda", dtype=torch.bfloat16).requires_grad_()
    assert_close(lambda qkv: vicus.na2d(*qkv.unbind(-3), 5), [qkv], lse=False)


@pytest.mark.parametrize("deterministic", [True, False, None])
def test_deterministic_is_passed_on(deterministic):
    tensors = made((40, 40), torch.bfloat16)
    runs = [results(lambda *x: vicus.na2d(*x, 9, deterministic=deterministic), tensors, torch.bfloat16, False)]
    runs += [results(lambda *x: vicus.na2d(*x, 9, deterministic=deterministic), tensors, torch.bfloat16, False)]
    if deterministic:
        assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
    assert_close(lambda *x: vicus.na2d(*x, 9, deterministic=deterministic), tensors, lse=False)


def test_inference_mode_and_gradients_agree():
    tensors = made((24, 24), torch.bfloat16)
    with torch.inference_mode():
        quiet = [vicus.na2d(*tensors, 7) for _ in range(2)]
    training = vicus.na2d(*tensors, 7)
    for x in quiet:
        torch.testing.assert_close(x, training.detach(), rtol=2e-2, atol=2e-2)


def test_autocast():
    tensors = [x.detach() for x in made((24, 24), torch.float32)]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = vicus.na2d(*tensors, 7)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, vicus.na2d(*(x.bfloat16() for x in tensors), 7))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    def model(q, k, v):
        x = vicus.na2d(q * 1.5, k, v, 7)
        return x + vicus.attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), is_causal=True).view_as(x)

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for side in (20, 23):
        tensors = made((side, 22), torch.bfloat16, kv=4)
        found, wanted = (results(f, tensors, torch.bfloat16, False) for f in (compiled, model))
        for x, y in zip(found, wanted, strict=True):
            assert float((x - y).abs().max()) <= UNITS[torch.bfloat16] * 2**-7 * max(1.0, float(y.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layer(dtype):
    torch.manual_seed(0)
    layer = vicus.NeighborhoodAttention2D(embed_dim=128, num_heads=4, kernel_size=7).cuda().to(dtype)
    x = torch.randn(2, 20, 20, 128, device="cuda", dtype=dtype, requires_grad=True)
    twin, twin_x = copy.deepcopy(layer).cpu().double(), x.detach().cpu().double().requires_grad_()
    found, wanted = layer(x), twin(twin_x)
    found.sum().backward()
    wanted.sum().backward()
    eps = torch.finfo(dtype).eps
    pairs = [(found, wanted), (x.grad, twin_x.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(layer.parameters(), twin.parameters(), strict=True)]
    for ours, theirs in pairs:
        largest = max(1.0, float(theirs.abs().max()))
        assert float((ours.double().cpu() - theirs).abs().max()) <= 8 * eps * largest


def test_gradients_numerically():
    tensors = [x.detach().double().requires_grad_() for x in made((5, 6), torch.float64, heads=2, kv=1, dim=4, dim_v=3)]
    assert torch.autograd.gradcheck(lambda *x: vicus.na2d(*x, 3, dilation=1, return_lse=True), tensors, fast_mode=True)


@pytest.mark.parametrize("call", ["neighborhood", "dense"])
def test_wrong_arguments_are_refused_as_on_the_cpu(call):
    q, k, v = made((8, 8), torch.bfloat16)
    with pytest.raises(ValueError, match="kernel_size"):
        vicus.na2d(q, k, v, 9) if call == "neighborhood" else vicus.na2d(q, k, v, 0)
    with pytest.raises(ValueError, match="device"):
        vicus.na2d(q, k.cpu(), v, 3) if call == "neighborhood" else vicus.attention(
            q.flatten(1, 2), k.flatten(1, 2).cpu(), v.flatten(1, 2)
        )
