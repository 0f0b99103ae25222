"""Global switches: what the engines are asked to do, beyond the arguments of a call.

Every setter works in two ways::

    vicus.use_kv_parallelism_in_fused_na(False)         # from now on, in the whole process
    with vicus.use_kv_parallelism_in_fused_na(False):   # in this thread, until the block ends
        ...

A plain call is process wide, as ``torch.use_deterministic_algorithms`` is. A ``with`` block belongs to the thread that
runs it, as ``torch.no_grad`` does: other threads neither see it nor end it, and a thread started inside a block begins
with the process-wide values. A plain call inside a block of the same switch changes that block's value and ends with
it. (``with setter(x)`` is a plain call followed by the entry that takes it back: for those few microseconds other
threads may see ``x``.)

Switches are read when the forward call is made and kept for its backward pass. ``torch.compile`` guards on them, so a
changed switch recompiles; setters cannot be called inside a compiled region.

Names and exceptions follow ``natten.context`` of NATTEN 0.21 and, for ``use_fused_na`` and the autotuner, 0.17.
"""

import logging
from enum import Enum
from typing import Any, Literal

import torch

from vicus._arguments import wrong
from vicus._switches import DEFAULTS, Setting, current, process, thread

__all__ = [
    "MemoryUsagePreference",
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "are_deterministic_algorithms_enabled",
    "backward_flags",
    "disable_autotuner",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
    "get_memory_usage_preference",
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
    "reset",
    "set_memory_usage_preference",
    "use_autotuner",
    "use_deterministic_algorithms",
    "use_fna",
    "use_fused_na",
    "use_kv_parallelism_in_fused_na",
]

logger = logging.getLogger("vicus")


class MemoryUsagePreference(Enum):
    """How much scratch memory the backward pass may use for parallelism over keys."""

    Default = 0
    Strict = 1
    Unrestricted = 2


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise wrong(name, repr(value), "a bool")
    return bool(value)


def reset() -> Setting:
    """Sets every switch to its default."""
    return Setting(**DEFAULTS)


# --- Backward pass ---------------------------------------------------------------------------------------------------


def backward_flags() -> tuple[bool, bool, int]:
    """What an engine is asked for, read on every forward call.

    Returns:
        ``deterministic``: the backward pass must be bit-exact from run to run, by ``use_deterministic_algorithms`` of
        this module or of PyTorch. ``kv_parallelism``: it may split the keys; never true together with the first.
        ``memory_preference``: 0 default, 1 strict, 2 unrestricted.
    """
    deterministic = thread.deterministic
    if deterministic is None:
        deterministic = process.deterministic
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    parallel = thread.kv_parallelism
    if parallel is None:
        parallel = process.kv_parallelism
    memory = thread.memory
    if memory is None:
        memory = process.memory
    return deterministic, parallel and not deterministic, memory


def use_deterministic_algorithms(mode: bool = True) -> Setting:
    """Asks for gradients that are bit-exact from run to run.

    ``torch.use_deterministic_algorithms(True)`` asks for the same. Takes precedence over parallelism over keys.

    Args:
        mode: On or off. Default of the switch: off.

    Raises:
        ValueError: `mode` is no bool.
    """
    return Setting(deterministic=_flag("mode", mode))


def are_deterministic_algorithms_enabled() -> bool:
    """Whether `use_deterministic_algorithms` of this module is on (PyTorch's own switch is not asked)."""
    return current("deterministic")


def use_kv_parallelism_in_fused_na(mode: bool = True) -> Setting:
    """Lets the backward pass of fused operators work on parts of the key sequence at the same time.

    The sum into the gradient of the query is then unordered, and scratch memory is taken (see
    `set_memory_usage_preference`). Off, the backward pass is bit-exact and takes none.

    Args:
        mode: On or off. Default of the switch: on. Ignored, with a warning in the log, when it asks for parallelism
            while PyTorch's deterministic mode is on.

    Raises:
        RuntimeError: Switched on while `use_deterministic_algorithms` of this module is on.
        ValueError: `mode` is no bool.
    """
    mode = _flag("mode", mode)
    if mode and torch.are_deterministic_algorithms_enabled():
        logger.warning("use_kv_parallelism_in_fused_na(True) ignored: torch.use_deterministic_algorithms is on")
        return Setting()
    if mode and are_deterministic_algorithms_enabled():
        raise RuntimeError(
            "parallelism over keys makes the backward pass non-deterministic, and vicus.use_deterministic_algorithms "
            "is on; switch that off first"
        )
    return Setting(kv_parallelism=mode)


def is_kv_parallelism_in_fused_na_enabled() -> bool:
    """Whether the backward pass may work on parts of the key sequence at the same time (a deterministic mode that is on
    still prevents it)."""
    return current("kv_parallelism")


def set_memory_usage_preference(
    pref: Literal["default", "strict", "unrestricted"] | MemoryUsagePreference = "default",
) -> Setting:
    """Bounds the scratch memory that parallelism over keys may take.

    ``"default"`` and ``"strict"`` (a smaller bound) count the parallelism that batch and heads already give;
    ``"unrestricted"`` splits as far as the problem allows.

    Args:
        pref: One of the three names, or a `MemoryUsagePreference`.

    Raises:
        ValueError: `pref` is anything else.
    """
    for preference in MemoryUsagePreference:
        if pref == preference.name.lower() or pref is preference:
            return Setting(memory=preference.value)
    raise wrong("pref", repr(pref), "'default', 'strict', 'unrestricted'")


def get_memory_usage_preference() -> MemoryUsagePreference:
    """The preference set by `set_memory_usage_preference`."""
    return MemoryUsagePreference(current("memory"))


def is_memory_usage_default() -> bool:
    """Whether the memory preference is ``"default"``."""
    return get_memory_usage_preference() is MemoryUsagePreference.Default


def is_memory_usage_strict() -> bool:
    """Whether the memory preference is ``"strict"``."""
    return get_memory_usage_preference() is MemoryUsagePreference.Strict


def is_memory_usage_unrestricted() -> bool:
    """Whether the memory preference is ``"unrestricted"``."""
    return get_memory_usage_preference() is MemoryUsagePreference.Unrestricted


# --- Fused or unfused in the modules ---------------------------------------------------------------------------------


def use_fused_na(mode: bool = True, kv_parallel: bool | None = None) -> Setting:
    """Lets the modules use the fused operators (on by default) or the unfused pair of products around a softmax.

    Args:
        mode: On or off.
        kv_parallel: Unless None, also what `use_kv_parallelism_in_fused_na` is set to.

    Raises:
        RuntimeError: `kv_parallel` is true while `use_deterministic_algorithms` of this module is on.
        ValueError: An argument is no bool.
    """
    values = {"fused_na": _flag("mode", mode)}
    if kv_parallel is not None:
        parallel = use_kv_parallelism_in_fused_na(kv_parallel)
        with parallel:  # entering takes it back: one setting then sets, and can take back, both
            values |= parallel._values
    return Setting(**values)


def is_fused_na_enabled() -> bool:
    """Whether the modules use the fused operators."""
    return current("fused_na")


use_fna = use_fused_na
is_fna_enabled = is_fused_na_enabled


# --- Compiling FlexAttention -----------------------------------------------------------------------------------------


def allow_flex_compile(mode: bool = True, backprop: bool = False) -> Setting:
    """Lets ``torch_compile=True`` compile the backend ``"flex"``; without this it is an error.

    vicus tests FlexAttention as PyTorch runs it eagerly; what Inductor makes of it depends on device and version.

    Args:
        mode: Allow it for the forward pass, or forbid it altogether.
        backprop: Allow it also for tensors that require gradients. Needs `mode`.

    Raises:
        ValueError: An argument is no bool.
    """
    mode, backprop = _flag("mode", mode), _flag("backprop", backprop)
    return Setting(flex_compile=mode, flex_compile_backprop=mode and backprop)


def allow_flex_compile_backprop(mode: bool = True) -> Setting:
    """Lets the compiled backend ``"flex"`` run on tensors that require gradients, where `allow_flex_compile` allows
    compiling at all.

    Args:
        mode: Allow or forbid.

    Raises:
        ValueError: `mode` is no bool.
    """
    return Setting(flex_compile_backprop=_flag("mode", mode))


def disable_flex_compile() -> Setting:
    """Forbids compiling the backend ``"flex"``, forward and backward (the default)."""
    return allow_flex_compile(False)


def disable_flex_compile_backprop() -> Setting:
    """Forbids compiling the backend ``"flex"`` for tensors that require gradients (the default)."""
    return allow_flex_compile_backprop(False)


def is_flex_compile_allowed() -> bool:
    """Whether the backend ``"flex"`` may be compiled for the forward pass."""
    return current("flex_compile")


def is_flex_compile_backprop_allowed() -> bool:
    """Whether the backend ``"flex"`` may be compiled for tensors that require gradients."""
    return current("flex_compile") and current("flex_compile_backprop")


# --- Autotuner -------------------------------------------------------------------------------------------------------


def use_autotuner(
    forward_pass: bool | None = None,
    backward_pass: bool | None = None,
    thorough_mode_forward: bool | None = None,
    thorough_mode_backward: bool | None = None,
    warmup_steps_forward: int | None = None,
    warmup_steps_backward: int | None = None,
    steps_forward: int | None = None,
    steps_backward: int | None = None,
) -> Setting:
    """Keeps the state that NATTEN 0.17 kept for its autotuner; it changes nothing that is computed.

    vicus picks tiles by exact counts of their work before it runs anything, the same on every call, so there is nothing
    to time. None leaves a value as it is.

    Args:
        forward_pass: State for the forward pass. Ignored, with a warning in the log, when it or `backward_pass` is
            switched on while PyTorch's deterministic mode is on.
        backward_pass: State for the backward pass.
        thorough_mode_forward: State of the thorough search, forward pass.
        thorough_mode_backward: State of the thorough search, backward pass.
        warmup_steps_forward, warmup_steps_backward, steps_forward, steps_backward: Checked and not used.

    Raises:
        RuntimeError: Switched on while `use_deterministic_algorithms` of this module is on.
        ValueError: An argument is neither None nor a bool (an int, for the steps).
    """
    for steps in (warmup_steps_forward, warmup_steps_backward, steps_forward, steps_backward):
        if steps is not None and not isinstance(steps, int):
            raise wrong("steps", repr(steps), "an integer")
    asked = {
        "autotune_forward": ("forward_pass", forward_pass),
        "autotune_backward": ("backward_pass", backward_pass),
        "thorough_forward": ("thorough_mode_forward", thorough_mode_forward),
        "thorough_backward": ("thorough_mode_backward", thorough_mode_backward),
    }
    values = {name: _flag(*given) for name, given in asked.items() if given[1] is not None}
    if values.get("autotune_forward") or values.get("autotune_backward"):
        if torch.are_deterministic_algorithms_enabled():
            logger.warning("use_autotuner ignored: torch.use_deterministic_algorithms is on")
            return Setting()
        if are_deterministic_algorithms_enabled():
            raise RuntimeError("the autotuner cannot be switched on while vicus.use_deterministic_algorithms is on")
    return Setting(**values)


def disable_autotuner() -> Setting:
    """Switches off all that `use_autotuner` switches on."""
    return use_autotuner(False, False, False, False)


def is_autotuner_enabled() -> bool:
    """Whether `use_autotuner` switched on the forward or the backward pass."""
    return current("autotune_forward") or current("autotune_backward")


def is_autotuner_enabled_for_forward() -> bool:
    """Whether `use_autotuner` switched on the forward pass."""
    return current("autotune_forward")


def is_autotuner_enabled_for_backward() -> bool:
    """Whether `use_autotuner` switched on the backward pass."""
    return current("autotune_backward")


def is_autotuner_thorough_for_forward() -> bool:
    """Whether `use_autotuner` asked for a thorough search in the forward pass."""
    return current("thorough_forward")


def is_autotuner_thorough_for_backward() -> bool:
    """Whether `use_autotuner` asked for a thorough search in the backward pass."""
    return current("thorough_backward")
