"""Self- and cross-attention with their projections, after Megatron Core: the same parameters, the same arrangement of
their rows, activations `[s, b, h]`, output and bias apart. A checkpoint of Megatron's loads unchanged."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vicus._arguments import wrong
from vicus.nn import problem
from vicus.nn._parallel import copied_to_ranks, summed_over_ranks
from vicus.nn.config import TransformerConfig
from vicus.nn.dot_product_attention import DotProductAttention
from vicus.nn.rotary import apply_rotary_pos_emb

__all__ = ["CrossAttention", "PackedSeqParams", "SelfAttention"]


@dataclasses.dataclass
class PackedSeqParams:
    """Where packed sequences are: arguments of `DotProductAttention.forward`. Megatron's class of this name will do."""

    qkv_format: str = "thd"
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_kv: Tensor | None = None
    cu_seqlens_q_padded: Tensor | None = None
    cu_seqlens_kv_padded: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_kv: int | None = None


# What a mask is called when it is that of every packed sequence.
_OF_SEQUENCES = {
    "no_mask": "padding",
    "causal": "padding_causal",
    "causal_bottom_right": "padding_causal_bottom_right",
}
_PACKED = tuple(field.name for field in dataclasses.fields(PackedSeqParams))


class Attention(nn.Module, abc.ABC):
    """What self- and cross-attention share; see `SelfAttention`."""

    def __init__(
        self,
        config: TransformerConfig,
        attention_type: str,
        layer_number: int,
        attn_mask_type: Any,
        get_rng_state_tracker: Callable[[], Any] | None,
        tp_group: Any,
        device: Any,
    ) -> None:
        super().__init__()
        self.config = config
        ranks = config.tensor_model_parallel_size
        if tp_group is None and ranks > 1:
            raise wrong("tp_group", None, f"the process group of the {ranks} ranks of tensor_model_parallel_size")
        if tp_group is not None and tp_group.size() != ranks:
            raise wrong("tp_group.size()", tp_group.size(), f"that of tensor_model_parallel_size, {ranks}")
        self.tp_group = tp_group
        self.layer_number = layer_number
        self.attn_mask_type = problem.mask_type(attn_mask_type)
        self.head_dim = config.kv_channels
        self.heads = config.num_attention_heads // ranks
        self.groups = config.num_query_groups // ranks
        self._factory = {"device": device, "dtype": config.params_dtype}
        self.core_attention = DotProductAttention(
            config.num_attention_heads,
            config.kv_channels,
            config.num_query_groups,
            attention_dropout=config.attention_dropout,
            attn_mask_type=self.attn_mask_type if config.neighborhood is None else "no_mask",
            window_size=config.window_size,
            sequence_parallel=config.sequence_parallel,
            tp_size=ranks,
            get_rng_state_tracker=get_rng_state_tracker,
            layer_number=layer_number,
            attention_type=attention_type,
            softmax_scale=config.softmax_scale,
            softmax_type=config.softmax_type,
            softcap=config.softcap,
            neighborhood=config.neighborhood,
            attention_backend=config.attention_backend,
        ).to(**self._factory)
        self.linear_proj = nn.Linear(
            self.heads * self.head_dim, config.hidden_size, bias=config.add_bias_linear, **self._factory
        )
        config.initialize(self.linear_proj, output=True)

    def _projection(self, heads: int, bias: bool) -> nn.Linear:
        linear = nn.Linear(self.config.hidden_size, heads * self.head_dim, bias=bias, **self._factory)
        self.config.initialize(linear)
        return linear

    @abc.abstractmethod
    def _tensors(self, hidden_states: Tensor, key_value_states: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Query `[s, b, heads, dim]`, key and value `[skv, b, groups, dim]`."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | tuple[Tensor, Tensor] | None = None,
        key_value_states: Tensor | None = None,
        rotary_pos_emb: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends.

        Args:
            hidden_states: `[s, b, hidden_size]`; packed `[t, 1, hidden_size]`.
            attention_mask: As in `DotProductAttention.forward`: True hides. For padding and arbitrary masks.
            key_value_states: Of cross-attention, what the queries look at: `[skv, b, hidden_size]`.
            rotary_pos_emb: Angles of `RotaryEmbedding`, `[s, 1, 1, dim]`, or one for queries and one for keys.
            attention_bias: Added to scaled scores, broadcastable to `[b, h, s, skv]`.
            packed_seq_params: A `PackedSeqParams`, or Megatron's, for packed sequences. Causal masks and no mask are
                then those of each sequence.

        Returns:
            Output `[s, b, hidden_size]` without the bias of the output projection, and that bias `[hidden_size]`, which
            Megatron adds together with dropout; None where there is none.

        Raises:
            ValueError: An argument does not fit.
        """
        for name, x in (("hidden_states", hidden_states), ("key_value_states", key_value_states)):
            if x is not None and (x.dim() != 3 or x.shape[-1] != self.config.hidden_size):
                allowed = f"[sequence, batch, hidden_size], hidden_size {self.config.hidden_size}"
                raise wrong(f"{name}.shape", tuple(x.shape), allowed)
        hidden_states, key_value_states = (
            x if x is None else copied_to_ranks(x, self.tp_group) for x in (hidden_states, key_value_states)
        )
        query, key, value = self._tensors(hidden_states, key_value_states)
        more: dict[str, Any] = {}
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        if packed_seq_params is not None:
            more = {name: getattr(packed_seq_params, name) for name in _PACKED}
        if packed:
            if query.shape[1] != 1:
                raise wrong("hidden_states.shape[1]", query.shape[1], "1: sequences are packed along the tokens")
            query, key, value = (x.squeeze(1) for x in (query, key, value))
            more["attn_mask_type"] = _OF_SEQUENCES.get(self.attn_mask_type, self.attn_mask_type)
        if rotary_pos_emb is not None:
            angles = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb, rotary_pos_emb)
            starts = tuple(
                (more.get(f"cu_seqlens_{name}_padded") if more.get(f"cu_seqlens_{name}_padded") is not None else bounds)
                for name, bounds in (("q", more.get("cu_seqlens_q")), ("kv", more.get("cu_seqlens_kv")))
            )
            query, key = (
                x if table is None else apply_rotary_pos_emb(x, table, self.config.rotary_interleaved, at)
                for x, table, at in zip((query, key), angles, starts if packed else (None, None), strict=True)
            )
        if attention_bias is not None:
            more |= {"core_attention_bias": attention_bias, "core_attention_bias_type": "post_scale_bias"}
        context = self.core_attention(
            *(query, key, value, attention_mask),
            checkpoint_core_attention=self.config.recompute_granularity == "selective" and self.training,
            **more,
        )
        context = context.unsqueeze(1) if packed else context
        return summed_over_ranks(F.linear(context, self.linear_proj.weight), self.tp_group), self.linear_proj.bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Loads, without the states of FP8 recipes that Transformer Engine's layers keep beside their parameters."""
        for name in [key for key in state_dict if key.startswith(prefix) and key.endswith("._extra_state")]:
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *rest)


class SelfAttention(Attention):
    """Attention of a sequence to itself: multi-head, grouped-query or multi-query, by `config.num_query_groups`.

    Parameters: `linear_qkv.weight` `[(heads + 2 * groups) * kv_channels, hidden_size]`, the rows of each group
    together: those of its query heads, of its key, of its value; `linear_proj.weight`; biases of both; with
    `qk_layernorm` `q_layernorm` and `k_layernorm`; with learnable sinks `core_attention.softmax_offset`.

    Args:
        config: Sizes and options.
        layer_number: Of this layer, from 1.
        attn_mask_type: As in `DotProductAttention`; with `config.neighborhood` there is none but the neighborhood.
        get_rng_state_tracker: As in `DotProductAttention`.
        tp_group: Process group of the ranks that share the heads, where `config.tensor_model_parallel_size` is above 1.
            Each holds the rows of its groups.
        device: Of the parameters.

    Raises:
        ValueError: An argument does not fit.

    Source:
        Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models (2023). Parameters and interface of
        Megatron Core 0.16.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        attn_mask_type: Any = "causal",
        *,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        tp_group: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__(config, "self", layer_number, attn_mask_type, get_rng_state_tracker, tp_group, device)
        self.linear_qkv = self._projection(self.heads + 2 * self.groups, config.add_bias_linear or config.add_qkv_bias)
        self.q_layernorm = self.k_layernorm = None
        if config.qk_layernorm:
            kind = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}[config.normalization]
            self.q_layernorm, self.k_layernorm = (
                kind(self.head_dim, eps=config.layernorm_epsilon, **self._factory) for _ in range(2)
            )

    def _tensors(self, hidden_states: Tensor, key_value_states: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if key_value_states is not None:
            raise wrong("key_value_states", "given", "None: a sequence attends to itself here")
        dim, each = self.head_dim, self.heads // self.groups
        mixed = self.linear_qkv(hidden_states).unflatten(-1, (self.groups, (each + 2) * dim))
        query, key, value = mixed.split((each * dim, dim, dim), -1)
        query = query.unflatten(-1, (each, dim)).flatten(2, 3)
        if self.q_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return query, key, value


class CrossAttention(Attention):
    """Attention of a sequence to another: parameters `linear_q`, `linear_kv` (the rows of each group together: those of
    its key, of its value) and `linear_proj`.

    Args:
        config: Sizes and options. Groups are allowed here, which Megatron refuses.
        layer_number: Of this layer, from 1.
        attn_mask_type: As in `DotProductAttention`.
        get_rng_state_tracker: As in `DotProductAttention`.
        tp_group: As in `SelfAttention`.
        device: Of the parameters.

    Raises:
        ValueError: An argument does not fit.

    Source:
        Parameters and interface of Megatron Core 0.16.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        attn_mask_type: Any = "no_mask",
        *,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        tp_group: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__(config, "cross", layer_number, attn_mask_type, get_rng_state_tracker, tp_group, device)
        self.linear_q = self._projection(self.heads, config.add_bias_linear)
        self.linear_kv = self._projection(2 * self.groups, config.add_bias_linear)

    def _tensors(self, hidden_states: Tensor, key_value_states: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if key_value_states is None:
            raise wrong("key_value_states", None, "a tensor [sequence, batch, hidden_size], which the queries look at")
        query = self.linear_q(hidden_states).unflatten(-1, (self.heads, self.head_dim))
        key, value = self.linear_kv(key_value_states).unflatten(-1, (self.groups, 2 * self.head_dim)).chunk(2, -1)
        return query, key, value
