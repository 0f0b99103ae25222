"""Attention layers for people who configure models: with the interfaces of Transformer Engine, Megatron Core and NeMo.

`DotProductAttention` chooses a backend for each call (`attention_backends`, `vicus.nn.choice`); `SelfAttention` and
`CrossAttention` put projections around it, as a `TransformerConfig` says.
"""

from vicus.nn.attention import CrossAttention, PackedSeqParams, SelfAttention
from vicus.nn.choice import Choice, Verdict, attention_backends
from vicus.nn.config import TransformerConfig
from vicus.nn.dot_product_attention import DotProductAttention
from vicus.nn.problem import Neighborhood, Problem
from vicus.nn.rotary import RotaryEmbedding, apply_rotary_pos_emb

__all__ = [
    "Choice",
    "CrossAttention",
    "DotProductAttention",
    "Neighborhood",
    "PackedSeqParams",
    "Problem",
    "RotaryEmbedding",
    "SelfAttention",
    "TransformerConfig",
    "Verdict",
    "apply_rotary_pos_emb",
    "attention_backends",
]
