"""Drop-in for NATTEN: its names, out of vicus.

    import vicus.natten as natten

or, for code that cannot be edited, before it is imported,

    import vicus.natten
    vicus.natten.install()      # from here on, `import natten` means this package

The interface is that of NATTEN 0.21 (`__version__`), with the functions, switches and module arguments of 0.14 to 0.17
that published models still use. docs/from-natten.md lists what differs.
"""

from vicus.natten import types, utils
from vicus.natten._install import install, uninstall
from vicus.natten.backends import (
    get_bwd_configs_for_cutlass_blackwell_fmha,
    get_bwd_configs_for_cutlass_blackwell_fna,
    get_bwd_configs_for_cutlass_fmha,
    get_bwd_configs_for_cutlass_fna,
    get_bwd_configs_for_cutlass_hopper_fmha,
    get_bwd_configs_for_cutlass_hopper_fna,
    get_configs_for_cutlass_blackwell_fmha,
    get_configs_for_cutlass_blackwell_fna,
    get_configs_for_cutlass_fmha,
    get_configs_for_cutlass_fna,
    get_configs_for_cutlass_hopper_fmha,
    get_configs_for_cutlass_hopper_fna,
    get_configs_for_flex_fmha,
    get_configs_for_flex_fna,
)
from vicus.natten.context import (
    allow_flex_compile,
    allow_flex_compile_backprop,
    are_deterministic_algorithms_enabled,
    disable_autotuner,
    disable_flex_compile,
    disable_flex_compile_backprop,
    get_memory_usage_preference,
    has_bfloat,
    has_cuda,
    has_fna,
    has_fused_na,
    has_half,
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
from vicus.natten.functional import (
    attention,
    merge_attentions,
    na1d,
    na2d,
    na3d,
)
from vicus.natten.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from vicus.natten.version import __version__

#: There always is a compiled library: the package cannot be imported without one.
HAS_LIBNATTEN = True

__all__ = [
    "HAS_LIBNATTEN",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "__version__",
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "are_deterministic_algorithms_enabled",
    "attention",
    "disable_autotuner",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
    "get_bwd_configs_for_cutlass_blackwell_fmha",
    "get_bwd_configs_for_cutlass_blackwell_fna",
    "get_bwd_configs_for_cutlass_fmha",
    "get_bwd_configs_for_cutlass_fna",
    "get_bwd_configs_for_cutlass_hopper_fmha",
    "get_bwd_configs_for_cutlass_hopper_fna",
    "get_configs_for_cutlass_blackwell_fmha",
    "get_configs_for_cutlass_blackwell_fna",
    "get_configs_for_cutlass_fmha",
    "get_configs_for_cutlass_fna",
    "get_configs_for_cutlass_hopper_fmha",
    "get_configs_for_cutlass_hopper_fna",
    "get_configs_for_flex_fmha",
    "get_configs_for_flex_fna",
    "get_memory_usage_preference",
    "has_bfloat",
    "has_cuda",
    "has_fna",
    "has_fused_na",
    "has_half",
    "install",
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
    "na2d",
    "na3d",
    "set_memory_usage_preference",
    "types",
    "uninstall",
    "use_autotuner",
    "use_deterministic_algorithms",
    "use_fna",
    "use_fused_na",
    "use_kv_parallelism_in_fused_na",
    "utils",
]
