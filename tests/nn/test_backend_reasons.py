"""What each backend says that it does not take. No GPU is needed: the device is part of the question."""

import dataclasses
import re

import pytest
import torch
from usual_problems import CPU, HOPPER

from vicus.nn import Neighborhood, choice

FLASH = [
    ({"dropout": 0.1}, "attention_dropout is 0.1"),
    ({"softcap": 30.0}, "softcap is 30.0"),
    ({"softmax_type": "learnable"}, "softmax_type is 'learnable'"),
    ({"return_max_logit": True}, "return_max_logit is True"),
    ({"bias_type": "alibi"}, "core_attention_bias_type is 'alibi'"),
    ({"bias_type": "post_scale_bias", "bias_requires_grad": True}, "the gradient of core_attention_bias"),
    ({"bias_type": "post_scale_bias", "attn_mask_type": "padding"}, "with sequences of different lengths"),
    ({"bias_type": "post_scale_bias", "neighborhood": Neighborhood((8192,), 7)}, "with neighborhoods"),
    (
        {"attn_mask_type": "no_mask", "window_size": (9, 9), "same_lengths": False},
        r"bottom_right_diagonal is False for window_size \(9, 9\)",
    ),
    ({"dtype": torch.int8}, "dtype is torch.int8"),
    ({"device": "mps", "architecture": None}, "the tensors are on 'mps'; allowed: 'cpu', 'cuda'"),
    ({"architecture": (7, 5)}, r"compute capability is \(7, 5\)"),
    ({"head_dim_v": 520}, "head dim is 520"),
]
FUSED = [
    ({"device": "cpu", "architecture": None}, "the tensors are on 'cpu'"),
    ({"architecture": (7, 0)}, r"compute capability is \(7, 0\)"),
    ({"cudnn": None}, "cuDNN is None"),
    ({"cudnn": 8907}, "cuDNN is 8907"),
    ({"dtype": torch.float32}, "dtype is torch.float32"),
    ({"deterministic": True}, "deterministic results are wanted"),
    ({"neighborhood": Neighborhood((8192,), 7)}, "neighborhood is given"),
    ({"softcap": 1.0}, "softcap is 1.0"),
    ({"softmax_type": "off-by-one"}, "softmax_type is 'off-by-one'"),
    ({"return_max_logit": True}, "return_max_logit is True"),
    ({"bias_type": "alibi"}, "core_attention_bias_type is 'alibi'"),
    ({"dropout": 0.1}, "attention_dropout is 0.1 while training; cuDNN takes multiples of 1/16"),
    ({"attn_mask_type": "padding_causal"}, "attn_mask_type is 'padding_causal'"),
    ({"attn_mask_type": "arbitrary"}, "attn_mask_type is 'arbitrary'"),
    ({"window_size": (9, 0)}, r"attn_mask_type is 'causal' with window_size \(9, 0\)"),
    ({"max_seqlen_q": 5, "same_lengths": False}, "there are 5 queries and 8192 keys"),
    ({"head_dim_qk": 100}, r"head dims are \(100, 128\)"),
    ({"head_dim_v": 512}, r"head dims are \(128, 512\)"),
    ({"head_dim_qk": 256, "architecture": (8, 0)}, r"head dims are \(256, 128\); cuDNN takes multiples of 8 up to 128"),
    ({"max_seqlen_q": 1, "max_seqlen_kv": 1}, "there are 1 queries and 1 keys"),
    ({"cudnn_takes": False}, "can_use_cudnn_attention refuses these tensors"),
]


@pytest.mark.parametrize(
    ("name", "change", "reason"), [("flash", *case) for case in FLASH] + [("fused", *case) for case in FUSED]
)
def test_reasons(name, change, reason):
    found = choice.choose(dataclasses.replace(HOPPER, **change))
    assert found.reasons["unfused"] == ""
    assert found.backend != name
    assert re.match(f".*{reason}", found.reasons[name])
    assert found.reasons[name][:1].islower() or found.reasons[name].startswith("attention")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"attn_mask_type": "no_mask", "max_seqlen_q": 7, "same_lengths": False},
        {"attn_mask_type": "causal_bottom_right"},
        {"dropout": 0.125},
        {"head_dim_qk": 256, "head_dim_v": 256},
        {"dtype": torch.float16, "num_groups": 1},
        {"cudnn_takes": True},
    ],
)
def test_what_cudnn_takes(change):
    assert choice.choose(dataclasses.replace(HOPPER, **change)).reasons["fused"] == ""


@pytest.mark.parametrize("attn_mask_type", ["no_mask", "padding", "padding_causal_bottom_right", "arbitrary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_the_cpu_engine_takes(attn_mask_type, dtype):
    changed = dataclasses.replace(CPU, attn_mask_type=attn_mask_type, dtype=dtype, differentiable=True)
    assert choice.choose(changed).reasons["flash"] == ""
