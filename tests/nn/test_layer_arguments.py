"""What the attention layer says to arguments that do not fit: the argument, what it was, what is allowed."""

import re

import pytest
import torch

from vicus.nn import DotProductAttention, Neighborhood

BOUNDS = torch.tensor([0, 4, 10], dtype=torch.int32)


def tensors(queries=6, keys=6, batch=2):
    return torch.randn(batch, queries, 4, 8), torch.randn(batch, keys, 2, 8), torch.randn(batch, keys, 2, 8)


def packed():
    return torch.randn(10, 4, 8), torch.randn(10, 2, 8), torch.randn(10, 2, 8)


def message(error, call):
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


CONSTRUCTOR = [
    ({"num_attention_heads": 0}, "num_attention_heads is 0; allowed: an integer >= 1"),
    ({"num_attention_heads": 4.0}, "num_attention_heads is 4.0; allowed: an integer >= 1"),
    ({"num_gqa_groups": 0}, "num_gqa_groups is 0; allowed: an integer >= 1"),
    ({"num_gqa_groups": -2}, "num_gqa_groups is -2; allowed: an integer >= 1"),
    ({"num_gqa_groups": 3}, "num_gqa_groups is 3; allowed: a divisor of num_attention_heads, 4: 1, 2, 4"),
    ({"tp_size": 3}, "tp_size is 3; allowed: a divisor of num_attention_heads, 4: 1, 2, 4"),
    ({"num_gqa_groups": 2, "tp_size": 4}, "tp_size is 4; allowed: a divisor of num_gqa_groups, 2: 1, 2"),
    ({"kv_channels": 0}, "kv_channels is 0; allowed: an integer >= 1"),
    ({"kv_channels": (8, 0)}, "kv_channels is 0; allowed: an integer >= 1"),
    ({"kv_channels": "8"}, "kv_channels is '8'; allowed: an integer, or two"),
    ({"attention_dropout": 1.0}, "attention_dropout is 1.0; allowed: a number, 0 <= p < 1"),
    ({"attention_dropout": -0.1}, "attention_dropout is -0.1; allowed: a number, 0 <= p < 1"),
    ({"qkv_format": "bhsd"}, "qkv_format is 'bhsd'; allowed: 'sbhd', 'bshd', 'thd'"),
    (
        {"attn_mask_type": "full"},
        "attn_mask_type is 'full'; allowed: 'no_mask', 'padding', 'causal', 'padding_causal', ",
    ),
    ({"attn_mask_type": 7}, "attn_mask_type is 7; allowed: 'no_mask'"),
    ({"window_size": 7}, "window_size is 7; allowed: (-1, 0) or (>= 0, 0) with attn_mask_type 'causal'"),
    ({"window_size": (-2, 0)}, "window_size is (-2, 0); allowed: (-1, 0) or (>= 0, 0) with attn_mask_type 'causal'"),
    ({"window_size": (1.5, 0)}, "window_size is (1.5, 0); allowed: (-1, 0)"),
    (
        {"window_size": (3, -1), "attn_mask_type": "no_mask"},
        "window_size is (3, -1); allowed: (-1, -1) or (>= 0, >= 0) with attn_mask_type 'no_mask'",
    ),
    ({"attention_type": "both"}, "attention_type is 'both'; allowed: 'self', 'cross'"),
    ({"softmax_type": "sink"}, "softmax_type is 'sink'; allowed: 'vanilla', 'off-by-one', 'learnable'"),
    ({"softmax_scale": "1"}, "scale is '1'; allowed: a number, or None"),
    ({"softcap": -1}, "softcap is -1; allowed: a number >= 0, 0 for none"),
    ({"layer_number": 0}, "layer_number is 0; allowed: an integer >= 1"),
    ({"attention_backend": "fast"}, "attention_backend is 'fast'; allowed: 'auto', 'flash', 'fused', 'unfused'"),
    (
        {"neighborhood": Neighborhood((6,), 3), "attn_mask_type": "arbitrary"},
        None,  # refused when it is called: a call may bring its own mask
    ),
    (
        {"neighborhood": {"layout": (2, 3, 4, 5), "kernel_size": 3}},
        "neighborhood.layout is (2, 3, 4, 5); allowed: 1 to 3",
    ),
    (
        {"neighborhood": {"layout": (0,), "kernel_size": 3}},
        "neighborhood.layout is (0,); allowed: 1 to 3 integers >= 1",
    ),
    ({"neighborhood": {"layout": (6,), "kernel_size": 0}}, "kernel_size is 0; allowed: an integer >= 1"),
    ({"neighborhood": {"layout": (6,), "kernel_size": 3, "stride": 4}}, "stride is (4,); allowed: at most kernel_size"),
]


@pytest.mark.parametrize(("change", "text"), CONSTRUCTOR)
def test_constructor(change, text):
    given = {"num_attention_heads": 4, "kv_channels": 8} | change
    if text is None:
        DotProductAttention(**given)
    else:
        assert message(ValueError, lambda: DotProductAttention(**given)).startswith(text)


def test_context_parallelism_is_refused():
    with pytest.raises(NotImplementedError, match="cp_group is given; allowed: None"):
        DotProductAttention(4, 8, cp_group=object())


def mask(*shape):
    return torch.zeros(shape, dtype=torch.bool)


FORWARD = [
    ({"qkv_format": "hsbd"}, "qkv_format is 'hsbd'; allowed"),
    ({"core_attention_bias_type": "bias"}, "core_attention_bias_type is 'bias'; allowed: 'no_bias', 'pre_scale_bias'"),
    ({"attn_mask_type": "some"}, "attn_mask_type is 'some'; allowed"),
    ({"window_size": (-3, 0)}, "window_size is (-3, 0); allowed: (-1, -1) or (>= 0, >= 0)"),
    (
        {"query_layer": torch.zeros(2, 6, 4)},
        "query_layer.shape is (2, 6, 4); allowed: [b, s, h, d] with qkv_format 'bshd'",
    ),
    (
        {"query_layer": torch.zeros(2, 6, 3, 8)},
        "query_layer.shape is (2, 6, 3, 8); allowed: [b, s, h, d] with h = 4, d = 8",
    ),
    (
        {"key_layer": torch.zeros(2, 6, 4, 8)},
        "value_layer.shape is (2, 6, 2, 8); allowed: that of key_layer but for the",
    ),
    (
        {"key_layer": torch.zeros(2, 6, 2, 9)},
        "key_layer.shape is (2, 6, 2, 9); allowed: [b, s, h, d] with h = 2, d = 8",
    ),
    ({"value_layer": torch.zeros(2, 5, 2, 8)}, "value_layer.shape is (2, 5, 2, 8); allowed: that of key_layer"),
    (
        {"key_layer": torch.zeros(2, 6, 2, 8, dtype=torch.float64)},
        "key_layer.dtype is torch.float64; allowed: the dtype",
    ),
    ({"key_layer": None}, "key_layer is a NoneType; allowed: a torch.Tensor"),
    (
        {"attn_mask_type": "padding"},
        "attention_mask is None; allowed: a bool tensor, or cu_seqlens_q and cu_seqlens_kv",
    ),
    (
        {"attn_mask_type": "padding", "attention_mask": mask(2, 6)},
        "attention_mask is torch.bool (2, 6); allowed: bool [batch, 1, 1, tokens], (2, 1, 1, 6)",
    ),
    (
        {"attn_mask_type": "padding", "attention_mask": (mask(2, 1, 1, 6), mask(2, 1, 1, 5))},
        "attention_mask is torch.bool (2, 1, 1, 5); allowed: bool [batch, 1, 1, tokens], (2, 1, 1, 6)",
    ),
    (
        {"attn_mask_type": "padding", "attention_mask": (mask(2, 1, 1, 6),)},
        "len(attention_mask) is 1; allowed: one mask",
    ),
    (
        {"attn_mask_type": "padding", "attention_mask": mask(2, 1, 1, 6).to("meta")},
        "attention_mask.device is meta; allowed: the device of query_layer, cpu",
    ),
    (
        {"attn_mask_type": "padding", "cu_seqlens_q": BOUNDS[:2]},
        "cu_seqlens_q.shape is (2,); allowed: [batch + 1], (3,)",
    ),
    ({"attn_mask_type": "padding", "cu_seqlens_q": BOUNDS.float()}, "cu_seqlens_q is torch.float32 (3,); allowed"),
    (
        {"attn_mask_type": "padding", "cu_seqlens_q": torch.tensor([0, 7, 10])},
        "cu_seqlens_q is [0, 7, 10]; allowed: lengths of at most 6 tokens",
    ),
    (
        {"attn_mask_type": "padding", "cu_seqlens_q": torch.tensor([0, 5, 4])},
        "cu_seqlens_q is [0, 5, 4]; allowed: a list that starts with 0 and never decreases",
    ),
    (
        {"attn_mask_type": "arbitrary"},
        "attention_mask is a NoneType; allowed: a bool tensor, True where a pair is hidden",
    ),
    (
        {"attn_mask_type": "arbitrary", "attention_mask": mask(2, 3, 6, 6)},
        "attention_mask.shape is (2, 3, 6, 6); allowed: broadcastable to [batch, heads, queries, keys], (2, 4, 6, 6)",
    ),
    (
        {"core_attention_bias": torch.zeros(1, 4, 6, 6)},
        "core_attention_bias is given; allowed: None with core_attention_b",
    ),
    ({"core_attention_bias_type": "pre_scale_bias"}, "core_attention_bias is a NoneType; allowed: a floating tensor"),
    (
        {"core_attention_bias_type": "post_scale_bias", "core_attention_bias": torch.zeros(3, 6, 6)},
        "core_attention_bias.shape is (3, 6, 6); allowed: broadcastable to",
    ),
    ({"alibi_slopes": torch.ones(4)}, "alibi_slopes is given; allowed: None with core_attention_bias_type 'no_bias'"),
    (
        {"core_attention_bias_type": "alibi", "alibi_slopes": torch.ones(3)},
        "alibi_slopes is (3,); allowed: a float32 tensor, [heads] or [batch, heads], (4,) or (2, 4)",
    ),
]


@pytest.mark.parametrize(("change", "text"), FORWARD)
def test_forward(change, text):
    layer = DotProductAttention(4, 8, 2, qkv_format="bshd", attn_mask_type="no_mask")
    given = dict(zip(("query_layer", "key_layer", "value_layer"), tensors(), strict=True)) | change
    assert message(ValueError, lambda: layer(**given)).startswith(text)


THD = [
    (
        {"attn_mask_type": "causal"},
        "attn_mask_type is 'causal'; allowed: 'padding', 'padding_causal', 'padding_causal_b",
    ),
    ({"cu_seqlens_q": None}, "cu_seqlens_q is None; allowed: an int32 tensor [batch + 1] with qkv_format 'thd'"),
    ({"cu_seqlens_kv": None}, "cu_seqlens_kv is None; allowed: an int32 tensor [batch + 1] with qkv_format 'thd'"),
    (
        {"cu_seqlens_kv": torch.tensor([0, 1, 2, 10])},
        "cu_seqlens_kv.shape is (4,); allowed: that of cu_seqlens_q, (3,)",
    ),
    ({"cu_seqlens_q": torch.tensor([0, 4, 11])}, "cu_seqlens_q[-1] is 11; allowed: at most the tokens there are, 10"),
    ({"cu_seqlens_q": torch.tensor([1, 4, 10])}, "cu_seqlens_q is [1, 4, 10]; allowed: a list that starts with 0"),
    ({"cu_seqlens_q_padded": torch.tensor([0, 3, 10])}, "cu_seqlens_q_padded is [0, 3, 10]; allowed: room for lengths"),
    ({"cu_seqlens_q_padded": torch.tensor([0, 5, 12])}, "cu_seqlens_q_padded[-1] is 12; allowed: at most the tokens"),
    ({"cu_seqlens_kv_padded": torch.tensor([0, 10])}, "cu_seqlens_kv_padded.shape is (2,); allowed: (3,)"),
    ({"max_seqlen_q": 5}, "max_seqlen_q is 5; allowed: at least the longest sequence, 6"),
    ({"max_seqlen_kv": 6.5}, "max_seqlen_kv is 6.5; allowed: at least the longest sequence, 6"),
    ({"query_layer": torch.zeros(2, 6, 4, 8)}, "query_layer.shape is (2, 6, 4, 8); allowed: [t, h, d] with qkv_format"),
]


@pytest.mark.parametrize(("change", "text"), THD)
def test_packed_forward(change, text):
    layer = DotProductAttention(4, 8, 2, qkv_format="thd", attn_mask_type="padding_causal")
    given = dict(zip(("query_layer", "key_layer", "value_layer"), packed(), strict=True))
    given |= {"cu_seqlens_q": BOUNDS, "cu_seqlens_kv": BOUNDS} | change
    assert message(ValueError, lambda: layer(**given)).startswith(text)


def test_batches_that_differ():
    layer = DotProductAttention(4, 8, 2, attn_mask_type="no_mask")
    q, k, v = tensors()
    said = message(ValueError, lambda: layer(q, k[:, :5], v[:, :5]))
    assert said == "key_layer's batch is 5; allowed: that of query_layer, 6"


@pytest.mark.parametrize("change", [{"inference_params": object()}, {"fp8_output": True}])
def test_what_is_not_there(change):
    assert "inference_params and fp8_output" in message(
        NotImplementedError, lambda: DotProductAttention(4, 8, 2)(*tensors(), **change)
    )


def test_neighborhoods_refuse_other_masks_and_lengths():
    layer = DotProductAttention(4, 8, 2, qkv_format="bshd", neighborhood=Neighborhood((2, 3), 2))
    assert layer.attn_mask_type == "no_mask"
    assert layer(*tensors()).shape == (2, 6, 32)
    said = message(ValueError, lambda: layer(*tensors(), attn_mask_type="causal"))
    assert said.startswith("attn_mask_type is 'causal' with window_size (-1, 0); allowed: 'no_mask' without a window")
    said = message(ValueError, lambda: layer(*tensors(), window_size=(2, 2)))
    assert said.startswith("attn_mask_type is 'no_mask' with window_size (2, 2); allowed: 'no_mask' without a window")
    said = message(ValueError, lambda: layer(*tensors(6, 5)))
    assert said.startswith(
        "the sequence lengths of query_layer and key_layer is (6, 5); allowed: the tokens of neighbor"
    )


def test_nothing_is_computed_before_arguments_are_checked():
    layer = DotProductAttention(4, 8, 2, qkv_format="bshd")
    for change, _ in FORWARD:
        if "core_attention_bias_type" in change or "alibi_slopes" in change:
            with pytest.raises(ValueError):
                layer.explain(*tensors(), **change)


def test_representation():
    text = repr(DotProductAttention(4, (8, 6), 2, window_size=(3, 0), neighborhood=None))
    assert re.search(r"num_attention_heads=4, num_gqa_groups=2, kv_channels=\(8, 6\), qkv_format='sbhd'", text)
    assert "window_size=(3, 0)" in text
