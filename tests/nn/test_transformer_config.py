"""`TransformerConfig`: from arguments, mappings and YAML files; what it says to values that do not fit."""

import builtins
import enum

import pytest
import torch

from vicus.nn import SelfAttention, TransformerConfig

NEMO = """
# A part of a file of NeMo's.
trainer:
  devices: 8
model:
  hidden_size: 64
  num_attention_heads: 8
  num_query_groups: {groups}
  kv_channels: null
  attention_dropout: 0.05
  attention_backend: {backend}
  bias: false
  rotary_percentage: 0.5
  window_size: [128, 0]
"""


@pytest.mark.parametrize(("text", "groups"), [("null", 8), ("1", 1), ("2", 2), ("8", 8)])
@pytest.mark.parametrize("backend", ["auto", "flash", "fused", "unfused"])
def test_yaml(text, groups, backend, tmp_path):
    file = tmp_path / "model.yaml"
    file.write_text(NEMO.format(groups=text, backend=backend))
    for source in (file, str(file), file.read_text()):
        config = TransformerConfig.from_yaml(source)
        assert (config.num_query_groups, config.kv_channels) == (groups, 8)
        assert (config.attention_dropout, config.attention_backend) == (0.05, backend)
        assert (config.add_bias_linear, config.rotary_percent, config.window_size) == (False, 0.5, (128, 0))
    layer = SelfAttention(config)
    assert layer.core_attention.attention_backend == backend
    assert layer.core_attention.num_gqa_groups == groups
    assert layer.linear_qkv.weight.shape == ((8 + 2 * groups) * 8, 64)
    assert TransformerConfig.from_yaml(file, num_query_groups=4).num_query_groups == 4


def test_a_file_of_a_whole_model():
    text = NEMO.format(groups=2, backend="auto") + "  micro_batch_size: 4\n  optim: {name: adam}\n"
    with pytest.raises(
        ValueError, match="configuration key is 'micro_batch_size', 'optim'; allowed: add_bias_linear, "
    ):
        TransformerConfig.from_yaml(text)
    assert TransformerConfig.from_yaml(text, strict=False).num_query_groups == 2
    typing_error = text + "  num_query_group: 4\n"
    hint = r"configuration key is 'num_query_group' \(did you mean 'num_query_groups'\?\); allowed: "
    with pytest.raises(ValueError, match=hint):
        TransformerConfig.from_yaml(typing_error, strict=False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "source is no YAML: "),
        ("- 1\n- 2", "source is a list; allowed: a mapping of names to values"),
        ("hidden_size: 8\n", "num_attention_heads is missing; allowed: an integer >= 1"),
        ("hidden_size: 8\nnum_attention_heads: 4\nparams_dtype: float33", "params_dtype is 'float33'; allowed: a name"),
        ("hidden_size: 8\nnum_attention_heads: eight", "num_attention_heads is 'eight'; allowed: an integer >= 1"),
    ],
)
def test_yaml_that_does_not_fit(text, said):
    with pytest.raises(ValueError) as raised:
        TransformerConfig.from_yaml(text)
    assert str(raised.value).startswith(said)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml"):
        TransformerConfig.from_yaml(tmp_path / "nothing.yaml")
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml"):
        TransformerConfig.from_yaml("nothing.yaml")


def test_yaml_without_pyyaml(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "yaml":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"from_yaml needs PyYAML: pip install 'vicus\[yaml\]'"):
        TransformerConfig.from_yaml("hidden_size: 8\n")
    assert TransformerConfig.from_dict({"hidden_size": 8, "num_attention_heads": 2}).kv_channels == 4


def test_dtypes_by_name():
    values = {"hidden_size": 8, "num_attention_heads": 2, "params_dtype": "bfloat16"}
    config = TransformerConfig.from_dict(values)
    assert config.params_dtype == torch.bfloat16
    assert {p.dtype for p in SelfAttention(config).parameters()} == {torch.bfloat16}
    assert TransformerConfig.from_dict(values | {"params_dtype": "torch.float64"}).params_dtype == torch.float64


def test_backends_as_enums():
    backends = enum.Enum("AttnBackend", ["flash", "fused", "unfused", "local", "auto"])
    for member in backends:
        config = TransformerConfig(8, 2, attention_backend=member)
        assert config.attention_backend == {"local": "unfused"}.get(member.name, member.name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 0}, "hidden_size is 0; allowed: an integer >= 1"),
        ({"num_attention_heads": -4}, "num_attention_heads is -4; allowed: an integer >= 1"),
        (
            {"num_query_groups": 5},
            "num_query_groups is 5; allowed: a divisor of num_attention_heads, 12: 1, 2, 3, 4, 6, 12",
        ),
        ({"num_query_groups": 24}, "num_query_groups is 24; allowed: a divisor of num_attention_heads, 12: "),
        ({"num_query_groups": 0}, "num_query_groups is 0; allowed: an integer >= 1"),
        ({"num_query_groups": -1}, "num_query_groups is -1; allowed: an integer >= 1"),
        ({"num_query_groups": 2.0}, "num_query_groups is 2.0; allowed: an integer >= 1"),
        (
            {"hidden_size": 100},
            "num_attention_heads is 12; allowed: a divisor of hidden_size, 100, where kv_channels is",
        ),
        ({"kv_channels": 0}, "kv_channels is 0; allowed: an integer >= 1"),
        (
            {"tensor_model_parallel_size": 5},
            "tensor_model_parallel_size is 5; allowed: a divisor of num_attention_heads, 12: 1, 2, 3, 4, 6, 12",
        ),
        (
            {"num_query_groups": 3, "tensor_model_parallel_size": 2},
            "tensor_model_parallel_size is 2; allowed: a divisor of num_query_groups, 3: 1, 3",
        ),
        ({"tensor_model_parallel_size": 0}, "tensor_model_parallel_size is 0; allowed: an integer >= 1"),
        ({"attention_dropout": 1.5}, "attention_dropout is 1.5; allowed: a number, 0 <= p < 1"),
        (
            {"attention_backend": "te"},
            "attention_backend is 'te'; allowed: 'auto', 'local', 'flash', 'fused', 'unfused'",
        ),
        ({"softmax_type": "sink"}, "softmax_type is 'sink'; allowed: 'vanilla', 'off-by-one', 'learnable'"),
        ({"normalization": "BatchNorm"}, "normalization is 'BatchNorm'; allowed: 'LayerNorm', 'RMSNorm'"),
        ({"rotary_percent": 0}, "rotary_percent is 0; allowed: a number, 0 < share <= 1"),
        ({"recompute_granularity": "full"}, "recompute_granularity is 'full'; allowed: 'selective'"),
        ({"num_layers": 0}, "num_layers is 0; allowed: an integer >= 1"),
    ],
)
def test_sizes_that_do_not_fit(change, said):
    with pytest.raises(ValueError) as raised:
        TransformerConfig(**{"hidden_size": 96, "num_attention_heads": 12} | change)
    assert str(raised.value).startswith(said)
