"""How a transformer is configured: the part of Megatron Core's `TransformerConfig` that attention needs; or YAML."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vicus._arguments import wrong
from vicus.nn import _arguments_layer as arguments
from vicus.nn import problem
from vicus.nn.choice import NAMES

__all__ = ["TransformerConfig"]

NORMALIZATIONS = ("LayerNorm", "RMSNorm")
# Where NeMo's and Megatron's files keep the model's keys.
_SECTIONS = ("model", "config", "model_config", "transformer_config")
# Names of NeMo for fields that Megatron calls otherwise.
_ALIASES = {"bias": "add_bias_linear", "rotary_percentage": "rotary_percent"}
_WORDS = {"auto": "auto", "local": "unfused"} | {name: name for name in NAMES}


@dataclasses.dataclass
class TransformerConfig:
    """Sizes and options of attention, checked when it is made. Names and defaults are Megatron Core's.

    Attributes:
        hidden_size: Features of a token.
        num_attention_heads: Query heads.
        num_query_groups: Key/value heads: a divisor of `num_attention_heads`; None for as many (multi-head attention),
            1 for multi-query attention.
        kv_channels: Head dim; None for `hidden_size / num_attention_heads`.
        num_layers: Of the model; the output projections start the smaller for it.
        attention_dropout: Probability that an attention weight is dropped, while training.
        attention_backend: "auto", "flash", "fused", "unfused", or Megatron's "local" (unfused); Megatron's enum too.
        softmax_scale: Factor of query times key; None for one over the root of `kv_channels`.
        softmax_type: "vanilla", "off-by-one" or "learnable" (see `DotProductAttention`).
        softcap: Bound of the scores, 0 for none.
        window_size: Sliding window (left, right), or None.
        neighborhood: Arguments of `Neighborhood`, or None.
        add_bias_linear: Whether the projections have biases.
        add_qkv_bias: Whether the projection to query, key and value has one all the same.
        qk_layernorm: Whether queries and keys are normalized, head by head.
        normalization: "LayerNorm" or "RMSNorm".
        layernorm_epsilon: Of the normalization.
        rotary_percent: Share of the head dim that rotary embeddings turn, above 0 and at most 1.
        rotary_base: Their longest period over 2 pi.
        rotary_interleaved: Whether they turn pairs of neighbors, not first half with second half.
        seq_len_interpolation_factor: What positions are divided by; None for 1.
        tensor_model_parallel_size: Ranks that share the heads.
        sequence_parallel: As in Megatron: random numbers of dropout come from PyTorch's generator then.
        recompute_granularity: None, or "selective": compute the attention again in the backward pass.
        params_dtype: Of the parameters.
        init_method: Initializes weights in place; None for normal numbers of deviation `init_method_std`.
        output_layer_init_method: The same for the output projection; None for normal numbers of deviation
            `init_method_std / sqrt(2 * num_layers)`.
        init_method_std: Deviation.

    Raises:
        ValueError: A size does not fit; the message says what was given and what is allowed.

    Source:
        Megatron Core 0.16 and NeMo (names, defaults, rules); `softcap` and `neighborhood` of vicus.
    """

    hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None = None
    kv_channels: int | None = None
    num_layers: int = 1
    attention_dropout: float = 0.1
    attention_backend: Any = "auto"
    softmax_scale: float | None = None
    softmax_type: str = "vanilla"
    softcap: float = 0.0
    window_size: tuple[int, int] | None = None
    neighborhood: Any = None
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    normalization: str = "LayerNorm"
    layernorm_epsilon: float = 1e-5
    rotary_percent: float = 1.0
    rotary_base: float = 10000
    rotary_interleaved: bool = False
    seq_len_interpolation_factor: float | None = None
    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    recompute_granularity: str | None = None
    params_dtype: torch.dtype = torch.float32
    init_method: Callable[[Tensor], Any] | None = None
    output_layer_init_method: Callable[[Tensor], Any] | None = None
    init_method_std: float = 0.02

    def __post_init__(self) -> None:
        hidden = arguments.positive("hidden_size", self.hidden_size)
        heads = arguments.positive("num_attention_heads", self.num_attention_heads)
        if self.num_query_groups is None:
            self.num_query_groups = heads
        groups = arguments.positive("num_query_groups", self.num_query_groups)
        arguments.divided("num_query_groups", groups, "num_attention_heads", heads)
        if self.kv_channels is None:
            if hidden % heads != 0:
                allowed = f"a divisor of hidden_size, {hidden}, where kv_channels is not given"
                raise wrong("num_attention_heads", heads, allowed)
            self.kv_channels = hidden // heads
        arguments.positive("kv_channels", self.kv_channels)
        arguments.positive("num_layers", self.num_layers)
        ranks = arguments.positive("tensor_model_parallel_size", self.tensor_model_parallel_size)
        arguments.divided("tensor_model_parallel_size", ranks, "num_attention_heads", heads)
        arguments.divided("tensor_model_parallel_size", ranks, "num_query_groups", groups)
        self.attention_dropout = arguments.fraction("attention_dropout", self.attention_dropout)
        word = getattr(self.attention_backend, "name", self.attention_backend)
        self.attention_backend = _WORDS[problem.one_of("attention_backend", word, tuple(_WORDS))]
        problem.one_of("softmax_type", self.softmax_type, problem.SOFTMAX_TYPES)
        problem.one_of("normalization", self.normalization, NORMALIZATIONS)
        if self.recompute_granularity is not None:
            problem.one_of("recompute_granularity", self.recompute_granularity, ("selective",))
        if not isinstance(self.rotary_percent, (int, float)) or not 0 < self.rotary_percent <= 1:
            raise wrong("rotary_percent", repr(self.rotary_percent), "a number, 0 < share <= 1")
        if isinstance(self.window_size, list):
            self.window_size = tuple(self.window_size)

    def initialize(self, linear: nn.Linear, output: bool = False) -> None:
        """Initializes a projection: its weight by `init_method`, or that of outputs; its bias with zeros."""
        method = self.output_layer_init_method if output else self.init_method
        if method is None:
            std = self.init_method_std / (math.sqrt(2 * self.num_layers) if output else 1)
            nn.init.normal_(linear.weight, std=std)
        else:
            method(linear.weight)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, strict: bool = True, **changes: Any) -> "TransformerConfig":
        """A configuration of a mapping's keys.

        Args:
            values: Fields by name; NeMo's "bias" and "rotary_percentage" too. Their section "model" (or "config",
                "model_config", "transformer_config") is taken, where they have one.
            strict: Whether a key that is no field is an error. Otherwise it is ignored, as are the hundred keys of a
                complete file that are none of attention's, unless it looks like a field with a typing error.
            changes: Fields that go before those of the mapping.

        Raises:
            ValueError: An unknown key, a missing field, or a value that does not fit.
        """
        section = next((values[s] for s in _SECTIONS if isinstance(values.get(s), Mapping)), None)
        if section is not None:
            return cls.from_dict(section, strict=strict, **changes)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        given, unknown = {}, []
        for key, value in values.items():
            name = _ALIASES.get(key, key)
            if name in fields:
                given[name] = value
            elif strict or difflib.get_close_matches(str(key), fields, 1, 0.9):
                unknown.append(key)
        if unknown:
            near = {key: difflib.get_close_matches(str(key), fields, 1) for key in unknown}
            hints = [f"{key!r}" + (f" (did you mean {name[0]!r}?)" if name else "") for key, name in near.items()]
            raise wrong("configuration key", ", ".join(hints), ", ".join(sorted(fields)))
        given |= changes
        for name in ("hidden_size", "num_attention_heads"):
            if name not in given:
                raise wrong(name, "missing", "an integer >= 1")
        if isinstance(given.get("params_dtype"), str):
            dtype = getattr(torch, given["params_dtype"].removeprefix("torch."), None)
            if not isinstance(dtype, torch.dtype):
                raise wrong("params_dtype", repr(given["params_dtype"]), "a name of PyTorch's, such as 'bfloat16'")
            given["params_dtype"] = dtype
        return cls(**given)

    @classmethod
    def from_yaml(cls, source: str | Path, *, strict: bool = True, **changes: Any) -> "TransformerConfig":
        """A configuration from a YAML file, with the keys of NeMo's.

        Args:
            source: Path of a file; or its text, which has a line break or a colon followed by a space.
            strict: As in `from_dict`.
            changes: As in `from_dict`.

        Raises:
            ImportError: PyYAML is not installed.
            FileNotFoundError: There is no such file.
            ValueError: The text is no YAML, no mapping, or `from_dict` refuses it.
        """
        try:
            import yaml
        except ImportError as error:
            raise ImportError("from_yaml needs PyYAML: pip install 'vicus[yaml]'") from error
        text = str(source)
        if isinstance(source, Path) or not ("\n" in text or ": " in text):
            text = Path(source).read_text(encoding="utf-8")
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"source is no YAML: {error}") from error
        if not isinstance(values, Mapping):
            raise wrong("source", f"a {type(values).__name__}", "a mapping of names to values")
        return cls.from_dict(values, strict=strict, **changes)
