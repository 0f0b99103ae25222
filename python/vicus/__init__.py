"""vicus: dense and neighborhood attention for PyTorch."""

import importlib
import logging
from typing import Any

from vicus._library import info
from vicus._warmup import warmup
from vicus.context import (
    MemoryUsagePreference,
    allow_flex_compile,
    allow_flex_compile_backprop,
    are_deterministic_algorithms_enabled,
    disable_autotuner,
    disable_flex_compile,
    disable_flex_compile_backprop,
    get_memory_usage_preference,
    is_autotuner_enabled,
    is_autotuner_enabled_for_backward,
    is_autotuner_enabled_for_forward,
    is_autotuner_thorough_for_backward,
    is_autotuner_thorough_for_forward,
    is_flex_compile_allowed,
    is_flex_compile_backprop_allowed,
    is_fna_enabled,
    is_fused_na_enabled,
    is_kv_parallelism_in_fused_na_enabled,
    is_memory_usage_default,
    is_memory_usage_strict,
    is_memory_usage_unrestricted,
    set_memory_usage_preference,
    use_autotuner,
    use_deterministic_algorithms,
    use_fna,
    use_fused_na,
    use_kv_parallelism_in_fused_na,
)
from vicus.functional import attention, merge_attentions, na1d, na2d, na3d, neighborhood_attention
from vicus.modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from vicus.unfused import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk
from vicus.varlen import generate_varlen_parameters

logging.getLogger("vicus").addHandler(logging.NullHandler())  # silent until the program configures logging


def __getattr__(name: str) -> Any:
    """`vicus.nn`, when it is first asked for: who calls operators alone does not wait for the layers."""
    if name == "nn":
        return importlib.import_module("vicus.nn")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "MemoryUsagePreference",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "are_deterministic_algorithms_enabled",
    "attention",
    "disable_autotuner",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
    "generate_varlen_parameters",
    "get_memory_usage_preference",
    "info",
    "is_autotuner_enabled",
    "is_autotuner_enabled_for_backward",
    "is_autotuner_enabled_for_forward",
    "is_autotuner_thorough_for_backward",
    "is_autotuner_thorough_for_forward",
    "is_flex_compile_allowed",
    "is_flex_compile_backprop_allowed",
    "is_fna_enabled",
    "is_fused_na_enabled",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "neighborhood_attention",
    "set_memory_usage_preference",
    "use_autotuner",
    "use_deterministic_algorithms",
    "use_fna",
    "use_fused_na",
    "use_kv_parallelism_in_fused_na",
    "warmup",
]
