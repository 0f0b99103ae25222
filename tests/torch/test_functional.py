"""The public functions: values and gradients against a dense masked computation in PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from masked import by_hand, flat, qkv, seen_by
from torch.autograd import gradcheck, gradgradcheck

import vicus

NA = {1: vicus.na1d, 2: vicus.na2d, 3: vicus.na3d}
MASKS = [(1, 1, False), (2, 1, True), (1, 2, False), (2, 2, True)]
LAYOUTS = {1: (11,), 2: (6, 7), 3: (4, 5, 4)}


# --- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    ("stride", "dilation", "is_causal"), [(1, 1, False), (2, 1, True), (1, 2, False), (2, 2, True)]
)
def test_neighborhood_is_masked_attention(rank, stride, dilation, is_causal):
    layout = LAYOUTS[rank]
    tensors = qkv(layout, grad=True)
    output, logsumexp = NA[rank](*tensors, 2, stride, dilation, is_causal, return_lse=True)
    mask = seen_by(layout, 2, stride, dilation, is_causal)
    expected, expected_lse = by_hand(*map(flat, tensors), mask)
    torch.testing.assert_close(flat(output), expected)
    torch.testing.assert_close(logsumexp.flatten(1, -2), expected_lse)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((flat(output) * weights).sum() + logsumexp.sum(), tensors)
    theirs = torch.autograd.grad((expected * weights).sum() + expected_lse.sum(), tensors)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_inference_and_training_agree():
    tensors = qkv((6, 7))
    quiet = vicus.na2d(*tensors, 3)
    again = vicus.na2d(*tensors, 3)  # remembered by now
    training = vicus.na2d(*(x.requires_grad_() for x in tensors), 3)
    with torch.no_grad():
        undifferentiated = vicus.na2d(*tensors, 3, return_lse=True)[0]
    for other in (again, training, undifferentiated):
        torch.testing.assert_close(other, quiet, rtol=0, atol=0)
    assert training.requires_grad and not undifferentiated.requires_grad


def test_second_derivatives():
    tensors = qkv((4, 5), dim=2, dim_v=2, dtype=torch.float64, grad=True)
    extra = [x[:, 0].detach().requires_grad_() for x in qkv((1, 2), dim=2, dim_v=2, dtype=torch.float64, seed=1)[1:]]
    rpb = torch.randn(4, 5, 5, dtype=torch.float64, requires_grad=True)

    def neighborhood(q, k, v, keys, values, rpb):
        more = {"additional_keys": keys, "additional_values": values, "rpb": rpb}
        return vicus.na2d(q, k, v, 3, return_lse=True, **more)

    def dense(q, k, v, keys, values):
        return vicus.attention(flat(q), flat(k), flat(v), True, additional_keys=keys, additional_values=values)

    for function, inputs in ((neighborhood, (*tensors, *extra, rpb)), (dense, (*tensors, *extra))):
        gradcheck(function, inputs, fast_mode=True)
        gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("kernel_size", [1, (9, 2), (6, 7), 50])
def test_windows_of_any_size(kernel_size):
    tensors = qkv((6, 7))
    output = vicus.neighborhood_attention(*tensors, kernel_size)
    torch.testing.assert_close(flat(output), by_hand(*map(flat, tensors), seen_by((6, 7), kernel_size, 1, 1, 0))[0])


def test_additional_tokens_are_part_of_the_softmax():
    tensors = qkv((6, 7), grad=True)
    extra = [x[:, 0] for x in qkv((1, 5), seed=1)[1:]]
    output, logsumexp = vicus.na2d(*tensors, 3, additional_keys=extra[0], additional_values=extra[1], return_lse=True)
    q, k, v = map(flat, tensors)
    mask = F.pad(seen_by((6, 7), 3, 1, 1, 0), (0, 5), value=True)
    expected, expected_lse = by_hand(q, torch.cat([k, extra[0]], 1), torch.cat([v, extra[1]], 1), mask)
    torch.testing.assert_close(flat(output), expected)
    torch.testing.assert_close(logsumexp.flatten(1, -2), expected_lse)
    two = vicus.merge_attentions(
        [flat(vicus.na2d(*tensors, 3)), vicus.attention(q, *extra)],
        [
            vicus.na2d(*tensors, 3, return_lse=True)[1].flatten(1, 2),
            vicus.attention(q, *extra, return_lse=True)[1],
        ],
    )
    torch.testing.assert_close(two[0], expected)
    torch.testing.assert_close(two[1], expected_lse)


def test_relative_positional_bias():
    tensors = qkv((6, 7))
    rpb = torch.randn(4, 5, 5)
    i = torch.cartesian_prod(torch.arange(6), torch.arange(7))
    offset = i[None] - i[:, None] + 2  # key - query + kernel_size - 1
    bias = rpb[:, offset[..., 0].clamp(0, 4), offset[..., 1].clamp(0, 4)]
    bias = bias.masked_fill(~seen_by((6, 7), 3, 1, 1, 0), -torch.inf)
    expected = by_hand(*map(flat, tensors), bias)[0]
    torch.testing.assert_close(flat(vicus.na2d(*tensors, 3, rpb=rpb)), expected)


@pytest.mark.parametrize("scale", [0.0, 0.7, -1.5])
def test_scale_is_used_as_given(scale):
    tensors = qkv((6, 7))
    mask = seen_by((6, 7), 3, 1, 1, 0)
    torch.testing.assert_close(flat(vicus.na2d(*tensors, 3, scale=scale)), by_hand(*map(flat, tensors), mask, scale)[0])
    q, k, v = map(flat, tensors)
    all_keys = torch.ones(42, 42, dtype=torch.bool)
    torch.testing.assert_close(vicus.attention(q, k, v, scale=scale), by_hand(q, k, v, all_keys, scale)[0])


DENSE_MASKS = {
    "none": ({}, lambda i, j, n: j < n),
    "top-left": ({"is_causal": True}, lambda i, j, n: j <= i),
    "bottom-right": ({"is_causal": True, "causal_alignment": "bottom_right"}, lambda i, j, n: j <= i + n - 5),
    "window": ({"window_size": (2, 1)}, lambda i, j, n: (j >= i + n - 5 - 2) & (j <= i + n - 5 + 1)),
    "causal window": ({"is_causal": True, "window_size": (2, -1)}, lambda i, j, n: (j >= i - 2) & (j <= i)),
}


@pytest.mark.parametrize("name", DENSE_MASKS)
def test_dense_masks(name):
    arguments, sees = DENSE_MASKS[name]
    q = qkv((5,), grad=True)[0]
    k, v = qkv((9,), seed=1, grad=True)[1:]
    mask = sees(torch.arange(5)[:, None], torch.arange(9), 9)
    output, logsumexp = vicus.attention(q, k, v, **arguments, return_lse=True)
    expected, expected_lse = by_hand(q, k, v, mask)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(logsumexp, expected_lse)
    ours, theirs = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (output, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_key_padding():
    q, (k, v) = qkv((5,))[0], qkv((9,), seed=1)[1:]
    lengths = torch.tensor([4, 9])
    mask = (torch.arange(9) < lengths[:, None])[:, None, None]
    torch.testing.assert_close(vicus.attention(q, k, v, key_lengths=lengths), by_hand(q, k, v, mask)[0])
    nothing, lse = vicus.attention(q, k, v, key_lengths=torch.tensor([0, 9]), return_lse=True)
    assert (nothing[0] == 0).all() and (lse[0] == -torch.inf).all()


@pytest.mark.parametrize("shape", [(5, 9), (1, 9), (4, 5, 9), (2, 1, 5, 9), (2, 4, 5, 9)])
def test_attention_mask_of_any_broadcast_shape(shape):
    q, (k, v) = qkv((5,))[0], qkv((9,), seed=1)[1:]
    sees = torch.rand(shape) > 0.3
    sees[..., 0] = True
    torch.testing.assert_close(vicus.attention(q, k, v, attn_mask=sees), by_hand(q, k, v, sees)[0])
    bias = torch.randn(shape, requires_grad=True)
    ours, expected = vicus.attention(q, k, v, attn_mask=bias), by_hand(q, k, v, bias)[0]
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), bias)[0] for x in (ours, expected)))


@pytest.mark.parametrize("how", ["seqlens", "cumulative"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences(how, is_causal):
    lengths_q, lengths_kv = [3, 0, 5], [4, 2, 6]
    q, (k, v) = qkv((8,), batch=1)[0], qkv((12,), batch=1, seed=1)[1:]
    seqlens = [torch.tensor(x, dtype=torch.int32) for x in (lengths_q, lengths_kv)]
    if how == "seqlens":
        output = vicus.attention(q, k, v, is_causal, seqlens_Q=seqlens[0], seqlens_KV=seqlens[1])
    else:
        cumulative = [F.pad(x.cumsum(0, dtype=torch.int32), (1, 0)) for x in seqlens]
        output = vicus.attention(q, k, v, is_causal, None, None, None, *cumulative, 5, 6)
    at = zip(q.split(lengths_q, 1), k.split(lengths_kv, 1), v.split(lengths_kv, 1), strict=True)
    expected = torch.cat([vicus.attention(*one, is_causal) for one in at], 1)
    torch.testing.assert_close(output, expected)


def test_merge_any_number_of_parts():
    q, (k, v) = qkv((5,), grad=True)[0], qkv((12,), seed=1, grad=True)[1:]
    expected, expected_lse = vicus.attention(q, k, v, return_lse=True)
    split = [vicus.attention(q, *part, return_lse=True) for part in zip(k.split(3, 1), v.split(3, 1), strict=True)]
    output, logsumexp = vicus.merge_attentions(*map(list, zip(*split, strict=True)))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(logsumexp, expected_lse)
    ours, theirs = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (output, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_merge_ignores_a_part_that_saw_no_key():
    output = torch.randn(1, 3, 2, 4, requires_grad=True)
    lse = torch.randn(1, 3, 2)
    hidden = torch.full_like(output, torch.nan), torch.full_like(lse, -torch.inf)
    merged, merged_lse = vicus.merge_attentions([output, hidden[0]], [lse, hidden[1]])
    torch.testing.assert_close(merged, output)
    torch.testing.assert_close(merged_lse, lse)
    torch.testing.assert_close(torch.autograd.grad(merged.sum(), output)[0], torch.ones_like(output))
    assert (vicus.merge_attentions([hidden[0]] * 2, [hidden[1]] * 2)[0] == 0).all()
