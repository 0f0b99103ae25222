"""The layers beside Megatron Core's own: the same state dict, the same output and gradients, on the CPU."""

import contextlib
import warnings

import pytest
import torch
import torch.distributed

with warnings.catch_warnings():  # that Transformer Engine and Apex are not there
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.common.embeddings import rotary_pos_embedding
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import attention
    from megatron.core.transformer import transformer_config as megatron_config
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnBackend, AttnMaskType
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

from vicus.nn import CrossAttention, RotaryEmbedding, SelfAttention, TransformerConfig, attention_backends

pytestmark = pytest.mark.filterwarnings("ignore:.*(cuda_graph_scope|tp_group)")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """Megatron needs a process group, be it of one."""
    store = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture
def megatron(one_rank, monkeypatch):
    """Megatron on the CPU: three places ask for a GPU that nothing else of it needs."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    tracker = tensor_parallel.get_cuda_rng_tracker()
    monkeypatch.setattr(type(tracker), "fork", lambda self, name="": contextlib.nullcontext())
    parallel_state.get_global_memory_buffer().buffer.clear()


def options(**changes):
    common = {"num_layers": 3, "hidden_size": 48, "num_attention_heads": 8, "attention_dropout": 0.0}
    return common | changes


def theirs(kind, seed, mask, **changes):
    config = megatron_config.TransformerConfig(
        **options(**changes),
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
    )
    torch.manual_seed(seed)
    common = {"core_attention": DotProductAttention, "linear_proj": RowParallelLinear}
    if kind == "self":
        norm = WrappedTorchNorm if config.qk_layernorm else None
        parts = attention.SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear, q_layernorm=norm, k_layernorm=norm, **common
        )
        layer = attention.SelfAttention(config, parts, 1, mask)
    else:
        parts = attention.CrossAttentionSubmodules(
            linear_q=ColumnParallelLinear, linear_kv=ColumnParallelLinear, **common
        )
        layer = attention.CrossAttention(config, parts, 1, mask)
    for parameter in layer.parameters():  # biases are born as zeros, norms as ones
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def causal(tokens):
    return torch.ones(tokens, tokens, dtype=torch.bool).triu(1)[None, None]


def compare(ours, other, inputs, megatron_arguments, our_arguments):
    """Output, bias, and gradients of inputs and parameters."""
    state = {name: value for name, value in other.state_dict().items() if value is not None}
    assert ours.load_state_dict(other.state_dict()).missing_keys == []
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in state.items()
    }
    torch.manual_seed(9)
    results = []
    for layer, more in ((other, megatron_arguments), (ours, our_arguments)):
        taken = [x.clone().requires_grad_() for x in inputs]
        output, bias = layer(*taken, **more)
        named = dict(layer.named_parameters())
        leaves = [*taken, *(named[name] for name in sorted(named) if name != "linear_proj.bias")]
        arriving = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        results.append([output, *torch.autograd.grad(output, leaves, arriving)])
        assert bias is None if "linear_proj.bias" not in named else torch.equal(bias, named["linear_proj.bias"])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(two, one, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("backend", ["flash", "unfused"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_query_groups": 2},
        {"num_query_groups": 1},
        {"num_query_groups": 4, "kv_channels": 10},
        {"num_query_groups": 2, "add_bias_linear": False},
        {"num_query_groups": 2, "add_bias_linear": False, "add_qkv_bias": True},
        {"num_query_groups": 2, "qk_layernorm": True},
        {"num_query_groups": 2, "qk_layernorm": True, "normalization": "RMSNorm", "layernorm_epsilon": 1e-3},
        {"num_query_groups": 2, "softmax_scale": 0.2},
    ],
)
def test_self_attention(changes, backend, megatron):
    other = theirs("self", 0, AttnMaskType.causal, **changes)
    ours = SelfAttention(TransformerConfig(**options(**changes)), 1, AttnMaskType.causal)
    inputs = [torch.randn(11, 2, 48)]
    with attention_backends(flash=backend == "flash", unfused=backend == "unfused"):
        compare(ours, other, inputs, {"attention_mask": causal(11)}, {"attention_mask": None})


def test_arbitrary_masks(megatron):
    other = theirs("self", 0, AttnMaskType.padding, num_query_groups=2)
    ours = SelfAttention(TransformerConfig(**options(num_query_groups=2)), 1, AttnMaskType.arbitrary)
    mask = torch.rand(2, 1, 11, 11) < 0.4
    mask[..., 0] = False  # a row of which all is hidden is another matter there
    compare(ours, other, [torch.randn(11, 2, 48)], {"attention_mask": mask}, {"attention_mask": mask})


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("factor", [None, 4.0])
def test_rotary_embeddings(share, interleaved, factor, megatron):
    changes = {"num_query_groups": 2, "kv_channels": 8, "rotary_interleaved": interleaved}
    more = {"rotary_percent": share, "rotary_interleaved": interleaved, "seq_len_interpolation_factor": factor}
    table = rotary_pos_embedding.RotaryEmbedding(8, use_cpu_initialization=True, rotary_base=5000, **more)
    angles = RotaryEmbedding(8, rotary_base=5000, **more)(11, offset=3)
    torch.testing.assert_close(angles, table.get_emb(11, 3))
    other = theirs("self", 0, AttnMaskType.causal, **changes)
    ours = SelfAttention(TransformerConfig(**options(**changes)))
    inputs = [torch.randn(11, 2, 48)]
    rotary = {"rotary_pos_emb": angles}
    compare(ours, other, inputs, {"attention_mask": causal(11), **rotary}, rotary)


def test_cross_attention(megatron):
    other = theirs("cross", 0, AttnMaskType.padding)
    ours = CrossAttention(TransformerConfig(**options()), 1, AttnMaskType.no_mask)
    inputs, keys = torch.randn(7, 2, 48), torch.randn(9, 2, 48)

    class Reordered(torch.nn.Module):
        """Both inputs first, for the comparison."""

        def __init__(self, layer):
            super().__init__()
            self.layer = layer
            self.named_parameters = layer.named_parameters
            self.state_dict, self.load_state_dict = layer.state_dict, layer.load_state_dict

        def forward(self, hidden, states):
            return self.layer(hidden, None, key_value_states=states)

    compare(Reordered(ours), Reordered(other), [inputs, keys], {}, {})


def test_states_of_fp8_recipes_are_left_alone(megatron):
    other = theirs("self", 0, AttnMaskType.causal, num_query_groups=2)
    state = other.state_dict()
    assert any(name.endswith("_extra_state") for name in state)
    state |= {"linear_qkv._extra_state": torch.zeros(5), "core_attention._extra_state": torch.zeros(5)}
    ours = SelfAttention(TransformerConfig(**options(num_query_groups=2)))
    assert ours.load_state_dict(state) == ([], [])
    assert torch.equal(ours.linear_qkv.weight, other.linear_qkv.weight)
    state["linear_qkv.wieght"] = torch.zeros(5)
    with pytest.raises(RuntimeError, match="wieght"):
        ours.load_state_dict(state)


def test_configurations_mean_the_same(one_rank):
    for changes in ({}, {"num_query_groups": 2}, {"num_query_groups": 1, "kv_channels": 10}):
        one, two = megatron_config.TransformerConfig(**options(**changes)), TransformerConfig(**options(**changes))
        for name in ("num_query_groups", "kv_channels", "num_attention_heads", "hidden_size", "attention_dropout"):
            assert getattr(one, name) == getattr(two, name)
    for backend in AttnBackend:
        config = TransformerConfig(**options(attention_backend=backend))
        assert config.attention_backend == ("unfused" if backend.name == "local" else backend.name)
    defaults = {field: getattr(megatron_config.TransformerConfig, field, None) for field in ("attention_dropout",)}
    assert TransformerConfig.attention_dropout == defaults["attention_dropout"]


def test_initial_weights_have_the_same_deviation(megatron):
    changes = {"hidden_size": 256, "num_query_groups": 2, "num_layers": 8}
    torch.manual_seed(0)
    config = megatron_config.TransformerConfig(
        **options(**changes), use_cpu_initialization=True, gradient_accumulation_fusion=False
    )
    parts = attention.SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=DotProductAttention, linear_proj=RowParallelLinear
    )
    other = attention.SelfAttention(config, parts, 1, AttnMaskType.causal)
    ours = SelfAttention(TransformerConfig(**options(**changes)))
    for name, weight in ours.named_parameters():
        twin = dict(other.named_parameters())[name]
        assert weight.shape == twin.shape
        if name.endswith("bias"):
            assert (weight == 0).all()
            assert (twin == 0).all()
        else:
            assert weight.std().item() == pytest.approx(twin.std().item(), rel=0.03)
