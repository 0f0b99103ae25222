"""Self- and cross-attention with their projections, beside their definition in PyTorch's plain operators."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from vicus.nn import (
    CrossAttention,
    Neighborhood,
    PackedSeqParams,
    RotaryEmbedding,
    SelfAttention,
    TransformerConfig,
    apply_rotary_pos_emb,
)


def config(**changes):
    return TransformerConfig(**{"hidden_size": 48, "num_attention_heads": 6, "attention_dropout": 0.0} | changes)


def scrambled(layer, seed=0):
    torch.manual_seed(seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def by_hand(layer, x, *, causal=True, bias=None):
    """Output of self-attention, head by head out of the rows of its projection."""
    sizes = layer.config
    dim, each = sizes.kv_channels, sizes.num_attention_heads // sizes.num_query_groups
    rows = layer.linear_qkv(x)  # [s, b, rows]
    outputs = []
    for head in range(sizes.num_attention_heads):
        start = head // each * (each + 2) * dim
        part = head % each
        q, k, v = (rows[..., start + n * dim :][..., :dim].transpose(0, 1) for n in (part, each, each + 1))
        scores = q @ k.mT / math.sqrt(dim)
        scores = scores if bias is None else scores + bias[:, head]
        if causal:
            scores = scores.masked_fill(torch.ones(x.shape[0], x.shape[0]).triu(1).bool(), -math.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return F.linear(torch.cat(outputs, -1), layer.linear_proj.weight)


@pytest.mark.parametrize("groups", [None, 3, 2, 1])
@pytest.mark.parametrize("channels", [None, 10])
def test_self_attention(groups, channels):
    layer = scrambled(SelfAttention(config(num_query_groups=groups, kv_channels=channels)))
    x = torch.randn(9, 2, 48, requires_grad=True)
    output, bias = layer(x)
    assert output.shape == (9, 2, 48)
    assert bias is layer.linear_proj.bias
    want = by_hand(layer, x)
    torch.testing.assert_close(output, want, atol=1e-4, rtol=1e-4)
    leaves = [x, layer.linear_qkv.weight, layer.linear_qkv.bias, layer.linear_proj.weight]
    arriving = torch.randn(output.shape)
    for one, two in zip(*(torch.autograd.grad(y, leaves, arriving) for y in (output, want)), strict=True):
        torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)


def test_parameters():
    names = set(dict(SelfAttention(config(num_query_groups=2)).named_parameters()))
    assert names == {"linear_qkv.weight", "linear_qkv.bias", "linear_proj.weight", "linear_proj.bias"}
    few = SelfAttention(
        config(add_bias_linear=False, qk_layernorm=True, normalization="RMSNorm", softmax_type="learnable")
    )
    assert set(dict(few.named_parameters())) == {
        *("linear_qkv.weight", "linear_proj.weight", "q_layernorm.weight", "k_layernorm.weight"),
        "core_attention.softmax_offset",
    }
    assert few(torch.randn(3, 1, 48))[1] is None
    assert {x.device.type for x in SelfAttention(config(), device="meta").parameters()} == {"meta"}


def test_options_reach_the_attention():
    given = {"window_size": (4, 0), "softmax_type": "off-by-one", "softcap": 5.0, "attention_dropout": 0.25}
    core = SelfAttention(config(**given, attention_backend="unfused", softmax_scale=0.5), 3).core_attention
    assert (core.window_size, core.softmax_type, core.softcap, core.attention_dropout) == tuple(given.values())
    assert (core.attention_backend, core.softmax_scale, core.layer_number) == ("unfused", 0.5, 3)
    module = SelfAttention(config(neighborhood={"layout": (3, 4), "kernel_size": 3}))
    assert module.core_attention.neighborhood == Neighborhood((3, 4), 3)
    assert module(torch.randn(12, 2, 48))[0].shape == (12, 2, 48)


def test_attention_bias():
    layer = scrambled(SelfAttention(config(num_query_groups=2)))
    x, bias = torch.randn(7, 2, 48), torch.randn(1, 6, 7, 7, requires_grad=True)
    output, _ = layer(x, attention_bias=bias)
    torch.testing.assert_close(output, by_hand(layer, x, bias=bias), atol=1e-4, rtol=1e-4)
    assert torch.autograd.grad(output.sum(), bias)[0].abs().sum() > 0


@pytest.mark.parametrize("groups", [6, 2])
def test_cross_attention(groups):
    layer = scrambled(CrossAttention(config(num_query_groups=groups)))
    x, y = torch.randn(5, 2, 48), torch.randn(8, 2, 48)
    output, _ = layer(x, key_value_states=y)
    q = layer.linear_q(x).view(5, 2, 6, 8)
    rows = layer.linear_kv(y).view(8, 2, groups, 2, 8)
    q, k, v = (z.permute(1, 2, 0, 3) for z in (q, rows[..., 0, :], rows[..., 1, :]))
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).permute(2, 0, 1, 3).flatten(2)
    torch.testing.assert_close(output, F.linear(want, layer.linear_proj.weight), atol=1e-4, rtol=1e-4)
    padded = torch.arange(8)[None] >= torch.tensor([[8], [5]])
    masks = (torch.zeros(2, 1, 1, 5, dtype=torch.bool), padded[:, None, None])
    module = CrossAttention(config(num_query_groups=groups), attn_mask_type="padding")
    module.load_state_dict(layer.state_dict())
    got, _ = module(x, masks, key_value_states=y)
    torch.testing.assert_close(got[:, 1:], layer(x[:, 1:], key_value_states=y[:5, 1:])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("interleaved", "share"), [(False, 1.0), (True, 1.0), (False, 0.5), (True, 0.5)])
def test_rotary_embeddings_depend_on_distances_alone(interleaved, share):
    rotary = RotaryEmbedding(8, share, interleaved)
    assert rotary.state_dict() == {}
    q, k = torch.randn(1, 1, 1, 8).double(), torch.randn(1, 1, 1, 8).double()

    def product(i, j):
        turned = [apply_rotary_pos_emb(x, rotary(1, offset=n).double(), interleaved) for x, n in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(product(7, 3), product(104, 100), atol=1e-5, rtol=1e-5)
    assert not torch.isclose(product(7, 3), product(7, 4))
    assert torch.equal(apply_rotary_pos_emb(q, rotary(1), interleaved), q)
    if share < 1:
        assert torch.equal(apply_rotary_pos_emb(q, rotary(1, offset=5), interleaved)[..., 4:], q[..., 4:])


def test_rotary_embeddings_by_complex_numbers():
    x = torch.randn(5, 2, 3, 8, dtype=torch.float64)
    turns = torch.polar(
        torch.ones(5, 4).double(), torch.outer(torch.arange(5), 100.0 ** -(torch.arange(4) / 4)).double()
    )
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * turns[:, None, None]
    angles = RotaryEmbedding(8, rotary_interleaved=True, rotary_base=100)(5)
    got = apply_rotary_pos_emb(x, angles.double(), True)
    torch.testing.assert_close(got, torch.view_as_real(turned).flatten(-2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", ["causal", "no_mask", "causal_bottom_right", "padding_causal"])
@pytest.mark.parametrize("gaps", [False, True])
def test_packed_sequences(mask, gaps):
    layer = scrambled(SelfAttention(config(num_query_groups=2), 1, mask))
    x, rotary = torch.randn(13, 1, 48), RotaryEmbedding(8)
    lengths, starts = torch.tensor([0, 3, 5, 9]).int(), torch.tensor([0, 4, 8, 13]).int()
    if not gaps:
        lengths = starts
    given = {"cu_seqlens_q": lengths, "cu_seqlens_kv": lengths, "max_seqlen_q": 5, "max_seqlen_kv": 5}
    if gaps:
        given |= {"cu_seqlens_q_padded": starts, "cu_seqlens_kv_padded": starts}
    packed = PackedSeqParams(**given)
    output, _ = layer(x, packed_seq_params=packed, rotary_pos_emb=rotary(5))
    assert output.shape == (13, 1, 48)
    plain = SelfAttention(layer.config, 1, mask.removeprefix("padding_"))
    plain.load_state_dict(layer.state_dict())
    for start, length in zip(starts[:-1], lengths.diff(), strict=True):
        alone, _ = plain(x[start : start + length], rotary_pos_emb=rotary(int(length)))
        torch.testing.assert_close(output[start : start + length], alone, atol=1e-5, rtol=1e-5)


def test_recomputation_keeps_nothing_and_changes_nothing():
    results = []
    for granularity in (None, "selective"):
        layer = scrambled(SelfAttention(config(recompute_granularity=granularity, attention_backend="unfused")))
        x = torch.randn(33, 2, 48, generator=torch.Generator().manual_seed(1), requires_grad=True)
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t)
        with hooks:
            output, _ = layer(x)
        results.append((output, torch.autograd.grad(output.sum(), x)[0], max(sizes)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] >= 2 * 6 * 33 * 33 > results[1][2]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda m: m(torch.zeros(5, 48)),
            r"hidden_states.shape is \(5, 48\); allowed: \[sequence, batch, hidden_size\]",
        ),
        (lambda m: m(torch.zeros(5, 2, 47)), r"hidden_states.shape is \(5, 2, 47\); allowed: .*, hidden_size 48"),
        (
            lambda m: m(torch.zeros(5, 2, 48), key_value_states=torch.zeros(5, 2, 48)),
            "key_value_states is given; allowed: None",
        ),
        (
            lambda m: m(torch.zeros(5, 2, 48), rotary_pos_emb=torch.zeros(4, 1, 1, 8)),
            r"angles.shape\[0\] is 4; allowed: at least the sequence length, 5",
        ),
        (
            lambda m: m(torch.zeros(5, 2, 48), rotary_pos_emb=torch.zeros(5, 1, 1, 16)),
            r"angles.shape\[-1\] is 16; allowed: at most the head dim, 8",
        ),
        (
            lambda m: m(torch.zeros(5, 2, 48), packed_seq_params=PackedSeqParams()),
            r"hidden_states.shape\[1\] is 2; allowed: 1: sequences are packed",
        ),
        (lambda m: CrossAttention(m.config)(torch.zeros(5, 2, 48)), "key_value_states is None; allowed: a tensor"),
        (lambda m: SelfAttention(m.config, 1, "all"), "attn_mask_type is 'all'; allowed: 'no_mask'"),
        (
            lambda m: SelfAttention(dataclasses.replace(m.config, tensor_model_parallel_size=2)),
            "tp_group is None; allowed: the process group of the 2 ranks of tensor_model_parallel_size",
        ),
        (lambda m: RotaryEmbedding(7), r"kv_channels \* rotary_percent is 7; allowed: an even number >= 2"),
    ],
)
def test_what_does_not_fit(call, said):
    with pytest.raises(ValueError, match=said):
        call(SelfAttention(config()))


RANK = """
import gc, sys, torch, torch.distributed as dist
from vicus.nn import CrossAttention, SelfAttention, TransformerConfig

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
kinds = {SelfAttention: {"linear_qkv.weight": 0, "linear_qkv.bias": 0, "linear_proj.weight": 1},
         CrossAttention: {"linear_q.weight": 0, "linear_q.bias": 0, "linear_kv.weight": 0, "linear_kv.bias": 0,
                          "linear_proj.weight": 1}}

def compare(kind, parts):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_query_groups": 2, "attention_dropout": 0.0,
             "softmax_type": "learnable"}
    parts["core_attention.softmax_offset"] = 0
    whole = kind(TransformerConfig(**sizes))
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    mine = kind(TransformerConfig(**sizes, tensor_model_parallel_size=2), tp_group=dist.group.WORLD)
    state = {n: x.chunk(2, parts[n])[rank] if n in parts else x for n, x in whole.state_dict().items()}
    mine.load_state_dict(state)
    x, y = torch.randn(7, 2, 48, requires_grad=True), torch.randn(9, 2, 48)
    more = {"key_value_states": y} if kind is CrossAttention else {}
    arriving = torch.randn(7, 2, 48)
    results = []
    for layer in (whole, mine):
        output, bias = layer(x, **more)
        named = {n: p for n, p in layer.named_parameters() if n in parts}
        gradients = torch.autograd.grad(output, [x, *named.values()], arriving)
        results.append((output, bias, gradients[0], dict(zip(named, gradients[1:]))))
    for i in range(3):
        torch.testing.assert_close(results[1][i], results[0][i], atol=1e-4, rtol=1e-4)
    for n, gradient in results[0][3].items():
        torch.testing.assert_close(results[1][3][n], gradient.chunk(2, parts[n])[rank], atol=1e-4, rtol=1e-4)
for kind, parts in kinds.items():
    compare(kind, parts)
# Nothing may hold the group now: its threads would let go of the last tensor while Python ends, which aborts.
gc.collect()
dist.destroy_process_group()
"""


def test_two_ranks_share_the_heads(tmp_path):
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    for rank in ranks:
        _, said = rank.communicate(timeout=300)
        assert rank.returncode == 0, said
