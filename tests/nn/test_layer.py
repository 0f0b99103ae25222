"""The attention layer beyond random calls: PyTorch's own attention beside it, formats, packed sequences with gaps,
padding anywhere, overrides."""

import dataclasses
import math

import pytest
import torch
from layer_cases import BACKENDS, layer, qkv, sdpa
from layer_oracle import pairs, slopes

from vicus.nn import DotProductAttention, attention_backends, backends
from vicus.nn._arguments_layer import Sequences
from vicus.nn._masks import alibi_slopes

# --- Beside PyTorch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mask", ["no_mask", "causal", "arbitrary", "bias"])
def test_agrees_with_scaled_dot_product_attention(name, groups, mask):
    tensors = qkv(12, 12, groups=groups, dims=(16, 16), grad=True)
    chosen = torch.rand(2, 4, 12, 12, generator=torch.Generator().manual_seed(1))
    module = layer(4, 16, groups, attn_mask_type="no_mask" if mask == "bias" else mask, attention_backend=name)
    given, options = {}, {}
    if mask == "causal":
        options["is_causal"] = True
    elif mask == "arbitrary":
        given["attention_mask"] = chosen < 0.5  # True hides; in PyTorch, True shows
        options["mask"] = chosen >= 0.5
    elif mask == "bias":
        given = {"core_attention_bias": chosen, "core_attention_bias_type": "post_scale_bias"}
        options["mask"] = chosen
    got, want = module(*tensors, **given), sdpa(*tensors, **options)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    arriving = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    for one, other in zip(*(torch.autograd.grad(x, tensors, arriving) for x in (got, want)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_is_as_near_as_pytorch(name, dtype):
    exact = qkv(65, 65, dims=(32, 32), dtype=torch.float64)
    reduced = [x.to(dtype).requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in reduced]
    module = layer(4, 32, attn_mask_type="causal", attention_backend=name)
    got, near = module(*reduced), sdpa(*reduced, is_causal=True)
    want = sdpa(*exact, is_causal=True)
    arriving = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    floor = torch.finfo(dtype).eps

    def check(one, other, reference):
        limit = 2 * (other.double() - reference).abs().max() + floor * reference.abs().max()
        assert (one.double() - reference).abs().max() <= limit

    check(got, near, want)
    gradients = [
        torch.autograd.grad(y, x, arriving.to(y.dtype)) for y, x in ((got, reduced), (near, reduced), (want, exact))
    ]
    for three in zip(*gradients, strict=True):
        check(*three)


def test_scores_of_half_precision_do_not_overflow():
    q, k, v = (torch.full((1, 3, 1, 64), 60.0, dtype=torch.float16) for _ in range(3))  # q . k is 230400
    module = layer(1, 64, 1, attention_backend="unfused")
    assert torch.equal(module(q, k, v), torch.full((1, 3, 64), 60.0, dtype=torch.float16))


@pytest.mark.parametrize("name", BACKENDS)
def test_autocast(name):
    tensors = qkv()
    module = layer(attention_backend=name)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(*tensors)
        assert "bfloat16" in str(module.explain(*tensors))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), module(*tensors), atol=3e-2, rtol=3e-2)


# --- Formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
def test_formats_hold_the_same(name):
    q, k, v = qkv(7, 7)
    module = layer(attn_mask_type="causal", attention_backend=name)
    want = module(q, k, v)
    assert want.shape == (2, 7, 24)
    swapped = [x.transpose(0, 1) for x in (q, k, v)]
    got = module(*swapped, qkv_format="sbhd")
    assert got.shape == (7, 2, 24)
    assert torch.equal(got.transpose(0, 1), want)
    assert torch.equal(module(*(x.contiguous() for x in swapped), qkv_format="sbhd"), got)
    bounds = torch.tensor([0, 7, 14], dtype=torch.int32)
    packed = module(
        *(x.flatten(0, 1) for x in (q, k, v)),
        qkv_format="thd",
        attn_mask_type="padding_causal",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
    )
    assert packed.shape == (14, 24)
    torch.testing.assert_close(packed, want.flatten(0, 1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_slices_of_one_projection_are_taken_in_place(name):
    whole = torch.randn(2, 9, (4 + 2 + 2) * 8, requires_grad=True)
    q, k, v = whole.unflatten(-1, (8, 8)).split((4, 2, 2), -2)
    module = layer(4, 8, attention_backend=name)
    torch.testing.assert_close(module(q, k, v), sdpa(q, k, v), atol=1e-5, rtol=1e-5)
    assert torch.autograd.grad(module(q, k, v).sum(), whole)[0].shape == whole.shape


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("told", [True, False])
def test_gaps_between_packed_sequences(name, told):
    """`[a a a 1 b b 2 2 c c c c 3]`: the digits belong to no sequence."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(13, n, 8, generator=generator).requires_grad_() for n in (4, 2, 2)]
    inside = torch.tensor([0, 1, 2, 4, 5, 8, 9, 10, 11])
    poisoned = [x.detach().clone() for x in tensors]
    for x in poisoned:
        x[[3, 6, 7, 12]] = torch.nan
        x.requires_grad_()
    lengths, starts = (torch.tensor(n, dtype=torch.int32) for n in ([0, 3, 5, 9], [0, 4, 8, 13]))
    module = layer(4, 8, qkv_format="thd", attn_mask_type="padding_causal", attention_backend=name)
    longest = {"max_seqlen_q": 4, "max_seqlen_kv": 64} if told else {}
    got = module(
        *poisoned,
        cu_seqlens_q=lengths,
        cu_seqlens_kv=lengths,
        cu_seqlens_q_padded=starts,
        cu_seqlens_kv_padded=starts,
        **longest,
    )
    want = module(*(x[inside] for x in tensors), cu_seqlens_q=lengths, cu_seqlens_kv=lengths)
    torch.testing.assert_close(got[inside], want, atol=1e-6, rtol=1e-6)
    outside = torch.tensor([3, 6, 7, 12])
    assert (got[outside] == 0).all()
    for one, other in zip(
        torch.autograd.grad(got.sum(), poisoned), torch.autograd.grad(want.sum(), tensors), strict=True
    ):
        torch.testing.assert_close(one[inside], other[inside], atol=1e-5, rtol=1e-5)
        assert (one[outside] == 0).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_tokens_after_the_last_sequence_have_output_zero(name):
    tensors = [torch.randn(10, n, 8) for n in (4, 2, 2)]
    lengths = torch.tensor([0, 3, 7], dtype=torch.int32)
    module = layer(4, 8, qkv_format="thd", attn_mask_type="padding", attention_backend=name)
    got = module(*tensors, cu_seqlens_q=lengths, cu_seqlens_kv=lengths)
    want = module(*(x[:7] for x in tensors), cu_seqlens_q=lengths, cu_seqlens_kv=lengths)
    torch.testing.assert_close(got[:7], want, atol=1e-6, rtol=1e-6)
    assert (got[7:] == 0).all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("mask", ["padding", "padding_causal", "padding_causal_bottom_right"])
def test_padding_anywhere(name, mask):
    """Padded tokens do not count, wherever they are: here at the start, as for generation in batches."""
    q, k, v = qkv(6, 6)
    module = layer(attn_mask_type=mask, window_size=(2, 0 if "causal" in mask else 2), attention_backend=name)
    padded = torch.tensor([[True, True, False, False, False, False], [False] * 6])
    poisoned = [x.masked_fill(padded[..., None, None], torch.nan) for x in (q, k, v)]
    got = module(*poisoned, attention_mask=padded[:, None, None])
    alone = module(*(x[:1, 2:] for x in (q, k, v)), attention_mask=torch.zeros(1, 1, 1, 4, dtype=torch.bool))
    torch.testing.assert_close(got[:1, 2:], alone, atol=1e-6, rtol=1e-6)
    assert (got[0, :2] == 0).all()


@pytest.mark.parametrize("mask", ["padding", "padding_causal"])
@pytest.mark.parametrize("window", [None, (2, 0)])
def test_padding_at_the_end_without_waiting_for_the_device(mask, window, monkeypatch):
    """What the flash backend does with lengths that the host does not know, here on the CPU."""
    window = window if "causal" in mask else None
    asked = []
    real = backends.Flash._padded
    monkeypatch.setattr(backends.Flash, "_padded", lambda *a: asked.append(1) or real(*a))
    module = layer(attn_mask_type=mask, window_size=window, attention_backend="flash")
    tensors = qkv(6, 6)
    padded = torch.arange(6) >= torch.tensor([[6], [4]])
    tensors = [x.masked_fill(padded[..., None, None], torch.nan).requires_grad_() for x in tensors]
    bounds = torch.tensor([0, 6, 10], dtype=torch.int32)
    want = module(*tensors, cu_seqlens_q=bounds)
    assert asked == []
    problem = dataclasses.replace(module.explain(*tensors, cu_seqlens_q=bounds).problem, device="cuda")
    valid = (~padded, ~padded)
    call = backends.Call(problem, *tensors, 8**-0.5, Sequences(2, (6, 6), True, valid))
    got = backends.Flash().run(call)[0].flatten(2)
    assert asked == [1]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    for one, other in zip(*(torch.autograd.grad(x.square().sum(), tensors) for x in (got, want)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_list_of_queries_stands_for_that_of_keys(name):
    q, k, v = qkv(6, 6)
    module = layer(attn_mask_type="padding", attention_backend=name)
    bounds = torch.tensor([0, 4, 10], dtype=torch.int32)
    assert torch.equal(module(q, k, v, cu_seqlens_q=bounds), module(q, k, v, cu_seqlens_q=bounds, cu_seqlens_kv=bounds))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_query_without_keys_has_output_and_gradient_zero(name):
    tensors = qkv(5, 2, grad=True)
    module = layer(attn_mask_type="causal_bottom_right", attention_backend=name)
    got = module(*tensors)
    assert (got[:, :3] == 0).all()
    gradient = torch.autograd.grad(got.sum(), tensors)[0]
    assert (gradient[:, :3] == 0).all()
    assert not any(x.isnan().any() for x in torch.autograd.grad(module(*tensors).sum(), tensors))
    mask = torch.ones(2, 4, 5, 2, dtype=torch.bool)
    mask[1] = False
    hidden = module(*tensors, attn_mask_type="arbitrary", attention_mask=mask)
    assert (hidden[0] == 0).all()
    bias = torch.full((1, 1, 5, 2), -math.inf)
    bias[..., 1:, :] = 0.5
    more = {"core_attention_bias_type": "post_scale_bias", "core_attention_bias": bias, "attn_mask_type": "no_mask"}
    assert (module(*tensors, **more)[:, 0] == 0).all()


# --- Overrides and arguments of the constructor ----------------------------------------------------------------------


def test_a_call_overrides_the_layer():
    tensors = qkv(6, 6)
    module = layer(attn_mask_type="causal", window_size=(2, 0))
    want = layer(attn_mask_type="no_mask", window_size=(1, 3))(*tensors)
    assert torch.equal(module(*tensors, attn_mask_type="no_mask", window_size=(1, 3)), want)
    assert torch.equal(module(*tensors, window_size=(-1, 0)), layer(attn_mask_type="causal")(*tensors))
    again = layer(attn_mask_type="causal")  # its window, (-1, 0), is the mask's and goes with it
    assert torch.equal(again(*tensors, attn_mask_type="no_mask"), layer()(*tensors))


@pytest.mark.parametrize("name", BACKENDS)
def test_masks_and_biases_of_fewer_dimensions(name):
    tensors = qkv(5, 6)
    module = layer(attn_mask_type="arbitrary", attention_backend=name)
    bias, mask = torch.randn(4, 5, 6), torch.rand(5, 6) < 0.3
    mask[:, 0] = False
    more = {"core_attention_bias_type": "post_scale_bias"}
    got = module(*tensors, attention_mask=mask, core_attention_bias=bias, **more)
    want = module(*tensors, attention_mask=mask.expand(2, 4, 5, 6), core_attention_bias=bias[None], **more)
    assert torch.equal(got, want)
    torch.testing.assert_close(got, sdpa(*tensors, mask=bias.masked_fill(mask, -math.inf)), atol=1e-5, rtol=1e-5)


def test_names_of_masks():
    tensors, bounds = qkv(6, 6), torch.tensor([0, 4, 10], dtype=torch.int32)
    want = layer(attn_mask_type="padding_causal")(*tensors, cu_seqlens_q=bounds)
    for name in ("padding,causal", "causal,padding", "causal_padding"):
        assert torch.equal(layer(attn_mask_type=name)(*tensors, cu_seqlens_q=bounds), want)

    class AttnMaskType:
        name = "padding_causal"  # as a member of Megatron's enum

    assert torch.equal(layer(attn_mask_type=AttnMaskType())(*tensors, cu_seqlens_q=bounds), want)


def test_the_mask_is_causal_where_none_is_named():
    tensors = qkv(6, 6)
    assert torch.equal(
        DotProductAttention(4, (8, 6), 2, qkv_format="bshd")(*tensors), layer(attn_mask_type="causal")(*tensors)
    )


@pytest.mark.parametrize(
    ("mask", "given", "taken"),
    [
        ("causal", (3, 2), (3, 0)),
        ("causal", (-1, -1), (-1, 0)),
        ("no_mask", (-1, 0), (-1, -1)),
        ("causal", (3, -1), (3, 0)),
    ],
)
def test_windows_are_cut_to_the_mask_with_a_warning(mask, given, taken):
    with pytest.warns(UserWarning, match="window_size is"):
        assert layer(attn_mask_type=mask, window_size=given).window_size == taken


def test_top_left_windows_of_other_lengths_go_to_unfused():
    tensors = qkv(9, 7)
    module = layer(window_size=(1, 1), bottom_right_diagonal=False)
    assert module.explain(*tensors).backend == "unfused"
    seen = pairs(9, 7, False, (1, 1), False)
    with attention_backends(flash=False):
        torch.testing.assert_close(module(*tensors)[:, :8], sdpa(*tensors, mask=seen)[:, :8], atol=1e-5, rtol=1e-5)
    assert layer(window_size=(1, 1), bottom_right_diagonal=False).explain(*qkv(7, 7)).backend == "flash"


def test_heads_of_a_tensor_parallel_rank():
    module = DotProductAttention(8, 16, 4, tp_size=2, qkv_format="bshd")
    assert module(*qkv(5, 5, heads=4, groups=2, dims=(16, 16))).shape == (2, 5, 64)


def test_slopes_of_alibi_are_the_published_ones():
    for heads in (1, 2, 3, 4, 6, 8, 12, 16, 40):
        torch.testing.assert_close(alibi_slopes(heads).double(), torch.tensor(slopes(heads)).double())
