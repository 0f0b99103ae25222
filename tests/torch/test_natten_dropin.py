"""`vicus.natten`: every public name of NATTEN 0.21, and `import natten` while it is installed."""

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys

import pytest
import torch

import vicus
import vicus.natten

# What `from natten import *` gives in NATTEN 0.21.
PUBLIC = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "are_deterministic_algorithms_enabled",
    "use_deterministic_algorithms",
    "use_kv_parallelism_in_fused_na",
    "is_kv_parallelism_in_fused_na_enabled",
    "set_memory_usage_preference",
    "get_memory_usage_preference",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "is_flex_compile_allowed",
    "is_flex_compile_backprop_allowed",
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
    "get_bwd_configs_for_cutlass_fmha",
    "get_bwd_configs_for_cutlass_fna",
    "get_configs_for_cutlass_fmha",
    "get_configs_for_cutlass_fna",
    "get_configs_for_cutlass_hopper_fmha",
    "get_bwd_configs_for_cutlass_hopper_fmha",
    "get_configs_for_cutlass_hopper_fna",
    "get_bwd_configs_for_cutlass_hopper_fna",
    "get_bwd_configs_for_cutlass_blackwell_fmha",
    "get_bwd_configs_for_cutlass_blackwell_fna",
    "get_configs_for_cutlass_blackwell_fmha",
    "get_configs_for_cutlass_blackwell_fna",
    "get_configs_for_flex_fmha",
    "get_configs_for_flex_fna",
    "HAS_LIBNATTEN",
    "na1d",
    "na2d",
    "na3d",
    "attention",
    "merge_attentions",
    "__version__",
]
# Of 0.14 to 0.17, at the package and in `natten.functional`.
EARLIER = [
    "use_fused_na",
    "is_fused_na_enabled",
    "use_fna",
    "is_fna_enabled",
    "use_autotuner",
    "disable_autotuner",
    "is_autotuner_enabled",
    "is_autotuner_enabled_for_forward",
    "is_autotuner_enabled_for_backward",
    "has_cuda",
    "has_half",
    "has_bfloat",
    "has_fna",
    "has_fused_na",
]
EARLIER_FUNCTIONS = [f"na{n}d_{half}" for n in (1, 2, 3) for half in ("qk", "av")]
EARLIER_FUNCTIONS += [f"natten{n}d{half}" for n in (1, 2, 3) for half in ("qk", "qkrpb", "av")]
# Parameters of NATTEN 0.21 in order, and their defaults.
MASK = [("kernel_size", ...), ("stride", 1), ("dilation", 1), ("is_causal", False)]
TILES = [(f"{way}{side}_tile_{{}}", None) for way in ("", "backward_") for side in ("q", "kv")]
KERNEL = [
    ("backward_kv_splits", None),
    ("backward_use_pt_reduction", False),
    ("run_persistent_kernel", True),
    ("kernel_schedule", None),
    ("torch_compile", False),
    ("return_lse", False),
]
TENSORS = [("query", ...), ("key", ...), ("value", ...)]
FUSED = [
    *TENSORS,
    *MASK,
    ("scale", None),
    ("additional_keys", None),
    ("additional_values", None),
    ("attention_kwargs", None),
    ("backend", None),
    *((name.format("shape"), default) for name, default in TILES),
    *KERNEL,
]
DENSE = [
    *TENSORS,
    ("is_causal", False),
    ("scale", None),
    *((name, None) for name in ("seqlens_Q", "seqlens_KV", "cumulative_seqlen_Q", "cumulative_seqlen_KV")),
    *((name, None) for name in ("max_seqlen_Q", "max_seqlen_KV", "backend")),
    *((name.format("size"), default) for name, default in TILES),
    *KERNEL,
]
MODULE = [("embed_dim", ...), ("num_heads", ...), *MASK, ("qkv_bias", True), ("qk_scale", None), ("proj_drop", 0.0)]
SIGNATURES = {
    "na1d": FUSED,
    "na2d": FUSED,
    "na3d": FUSED,
    "attention": DENSE,
    "merge_attentions": [("outputs", ...), ("lse_tensors", ...), ("torch_compile", True), ("use_autograd_fix", True)],
    "NeighborhoodAttention1D": MODULE,
    "NeighborhoodAttention2D": MODULE,
    "NeighborhoodAttention3D": MODULE,
}


@pytest.mark.parametrize("name", PUBLIC + EARLIER)
def test_public_name(name):
    assert name in vicus.natten.__all__
    assert getattr(vicus.natten, name) is not None


@pytest.mark.parametrize("name", EARLIER_FUNCTIONS)
def test_earlier_function(name):
    assert callable(getattr(vicus.natten.functional, name))


def test_every_listed_name_exists():
    for module in (vicus.natten, vicus.natten.functional, vicus.natten.context, vicus.natten.modules):
        assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    """Same names in the same order with the same defaults; required arguments may be given by either of two names."""
    ours = list(inspect.signature(getattr(vicus.natten, name)).parameters.values())
    wanted = SIGNATURES[name]
    assert [p.name for p in ours[: len(wanted)]] == [n for n, _ in wanted]
    for parameter, (_, default) in zip(ours, wanted, strict=False):
        assert parameter.kind == parameter.POSITIONAL_OR_KEYWORD
        if default is not ...:
            assert parameter.default == default
    assert all(p.default is not p.empty or p.kind == p.VAR_KEYWORD for p in ours[len(wanted) :])


# --- Installing ------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed():
    vicus.natten.install()
    yield
    vicus.natten.uninstall()


@pytest.mark.usefixtures("installed")
def test_import():
    import natten
    import natten.functional as functional
    import natten.utils.varlen
    from natten import NeighborhoodAttention2D, na2d
    from natten.context import is_fna_enabled
    from natten.functional import natten2dqkrpb
    from natten.types import KernelSchedule, NoneType

    assert natten is vicus.natten
    assert natten.HAS_LIBNATTEN is True
    assert functional is vicus.natten.functional is natten.functional
    assert natten.utils.varlen.generate_varlen_parameters is vicus.varlen.generate_varlen_parameters
    assert NeighborhoodAttention2D is vicus.modules.NeighborhoodAttention2D
    assert na2d is vicus.functional.na2d
    assert natten2dqkrpb is vicus.legacy.natten2dqkrpb
    assert is_fna_enabled is vicus.context.is_fna_enabled
    assert KernelSchedule is vicus.types.KernelSchedule
    assert NoneType is type(None)
    # A module has one name of its own, and can still be found by it.
    assert natten.__spec__.name == natten.__name__ == "vicus.natten"
    assert importlib.util.find_spec("vicus.natten").name == "vicus.natten"


@pytest.mark.usefixtures("installed")
def test_how_libraries_look_for_it():
    assert importlib.util.find_spec("natten") is not None
    assert importlib.util.find_spec("natten.functional") is not None
    assert importlib.metadata.version("natten") == vicus.natten.__version__
    assert importlib.metadata.metadata("NATTEN")["Name"] == "natten"
    assert "natten" in {d.name for d in importlib.metadata.distributions()}
    assert "natten" in importlib.metadata.packages_distributions()
    importlib.import_module("natten")
    assert importlib.util.find_spec("natten") is not None
    assert importlib.metadata.version("torch") == torch.__version__


@pytest.mark.usefixtures("installed")
def test_what_is_not_there():
    with pytest.raises(ModuleNotFoundError, match=r"natten\.nonsense"):
        importlib.import_module("natten.nonsense")
    with pytest.raises(ModuleNotFoundError, match="natten_other"):
        importlib.import_module("natten_other")


def test_uninstall():
    vicus.natten.install()
    vicus.natten.install()
    importlib.import_module("natten.functional")
    vicus.natten.uninstall()
    vicus.natten.uninstall()
    assert not [name for name in sys.modules if name.split(".")[0] == "natten"]
    assert sys.modules["vicus.natten"] is vicus.natten


@pytest.fixture
def another(tmp_path, monkeypatch):
    """A package of that name on the path, with metadata, as a real one has."""
    (tmp_path / "natten").mkdir()
    (tmp_path / "natten" / "__init__.py").write_text("__version__ = 'another'\n")
    (tmp_path / "natten-1.2.3.dist-info").mkdir()
    (tmp_path / "natten-1.2.3.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: natten\nVersion: 1.2.3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("natten", None)


@pytest.mark.usefixtures("another")
def test_before_another_natten():
    assert importlib.metadata.version("natten") == "1.2.3"
    vicus.natten.install()
    try:
        assert importlib.import_module("natten") is vicus.natten
        assert importlib.metadata.version("natten") == vicus.natten.__version__
    finally:
        vicus.natten.uninstall()
    assert importlib.import_module("natten").__version__ == "another"
    assert importlib.metadata.version("natten") == "1.2.3"


@pytest.mark.usefixtures("another")
def test_after_another_natten():
    importlib.import_module("natten")
    with pytest.raises(RuntimeError, match="already imported"):
        vicus.natten.install()
    assert importlib.import_module("natten").__version__ == "another"


# --- The README's snippets through the drop-in -----------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
def test_halves_around_a_softmax_equal_the_fused_function():
    import natten

    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 8, 9, 4, 16, dtype=torch.float64).unbind()
    first = (x.permute(0, 3, 1, 2, 4) for x in (query * 16**-0.5, key, value))
    query_, key_, value_ = first
    attn = natten.functional.na2d_qk(query_, key_, kernel_size=3, dilation=2).softmax(dim=-1)
    halves = natten.functional.na2d_av(attn, value_, kernel_size=3, dilation=2)
    fused = natten.na2d(query, key, value, kernel_size=3, dilation=2)
    torch.testing.assert_close(halves.permute(0, 2, 3, 1, 4), fused)
