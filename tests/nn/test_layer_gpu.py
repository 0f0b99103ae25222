"""The attention layer's backends on a GPU, cuDNN among them."""

import pytest
import torch
from layer_cases import BACKENDS, layer, qkv, sdpa

from vicus.nn import Neighborhood

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("name", ["flash", "fused", "unfused"])
@pytest.mark.parametrize("mask", ["no_mask", "causal"])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("training", [False, True])
def test_backends_agree_on_the_gpu(name, mask, groups, training):
    exact = qkv(256, 256, heads=8, groups=groups, dims=(64, 64), dtype=torch.float64)
    half = [x.to("cuda", torch.bfloat16).requires_grad_(training) for x in exact]
    exact = [x.detach().cpu().double().requires_grad_(training) for x in half]
    module = layer(8, 64, groups, attn_mask_type=mask, attention_backend=name)
    assert module.explain(*half).backend == name, module.explain(*half)
    got, want = module(*half), sdpa(*exact, is_causal=mask == "causal")
    torch.testing.assert_close(got.cpu().double(), want, atol=2e-2, rtol=2e-2)
    if training:
        arriving = torch.randn(want.shape, dtype=torch.float64)
        ours = torch.autograd.grad(got, half, arriving.to(got))
        for one, other in zip(ours, torch.autograd.grad(want, exact, arriving), strict=True):
            torch.testing.assert_close(one.cpu().double(), other, atol=6e-2, rtol=6e-2)


@pytest.mark.parametrize(("name", "p"), [("unfused", 0.5), ("fused", 0.5)])
def test_checkpointing_draws_the_same_numbers_on_the_gpu(name, p):
    results = []
    for checkpoint in (False, True):
        tensors = [x.to("cuda", torch.bfloat16).requires_grad_() for x in qkv(64, 64, dims=(64, 64))]
        torch.manual_seed(7)
        output = layer(4, 64, attention_dropout=p, attention_backend=name)(
            *tensors, checkpoint_core_attention=checkpoint
        )
        results.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name", ["flash", "unfused"])
@pytest.mark.parametrize("mask", ["padding", "padding_causal", "padding_causal_bottom_right"])
def test_padding_on_the_gpu(name, mask):
    tensors = qkv(9, 9, dims=(32, 32))
    bounds = torch.tensor([0, 9, 14], dtype=torch.int32)
    module = layer(4, 32, attn_mask_type=mask, attention_backend=name)
    want = module(*tensors, cu_seqlens_q=bounds)
    with torch.no_grad():
        got = module(*(x.to("cuda", torch.bfloat16) for x in tensors), cu_seqlens_q=bounds.cuda())
    torch.testing.assert_close(got.cpu().float(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", BACKENDS)
def test_neighborhoods_on_the_gpu(name):
    q, k, v = qkv(64, 64, dims=(32, 32))
    module = layer(4, 32, 2, neighborhood=Neighborhood((8, 8), 3), attn_mask_type=None, attention_backend=name)
    want = module(q, k, v)
    with torch.no_grad():
        got = module(*(x.to("cuda", torch.bfloat16) for x in (q, k, v)))
    torch.testing.assert_close(got.cpu().float(), want, atol=2e-2, rtol=2e-2)
