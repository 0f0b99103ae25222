"""How `vicus.context` keeps its switches: a value for the process, and values that blocks of a thread put over it."""

import threading
import weakref
from typing import Any

DEFAULTS: dict[str, Any] = {
    "deterministic": False,
    "kv_parallelism": True,
    "memory": 0,
    "fused_na": True,
    "flex_compile": False,
    "flex_compile_backprop": False,
    "autotune_forward": False,
    "autotune_backward": False,
    "thorough_forward": False,
    "thorough_backward": False,
}


class _Process:
    """The value of every switch that holds for the process."""

    def __init__(self) -> None:
        vars(self).update(DEFAULTS)


class _Thread(threading.local):
    """The value a ``with`` block of this thread gives a switch, or None. Dynamo guards on instance attributes only, so
    each one exists from the start."""

    def __init__(self) -> None:
        vars(self).update(dict.fromkeys(DEFAULTS))


process = _Process()
thread = _Thread()
_lock = threading.Lock()
# Process-wide writes, oldest first, each with a reference to its setting. A write can be taken back, by entering the
# setting as a block, while that setting is alive; writes that nobody can take back any more are merged.
_writes: list[tuple[dict[str, Any], Any]] = [(dict(DEFAULTS), lambda: None)]


def _publish() -> None:
    """Merges final writes and makes `process` what all writes in order give. The caller holds the lock."""
    merged: list[tuple[dict[str, Any], Any]] = []
    for values, alive in _writes:
        if merged and alive() is None and merged[-1][1]() is None:
            merged[-1][0].update(values)
        else:
            merged.append((values, alive))
    _writes[:] = merged
    final: dict[str, Any] = {}
    for values, _ in merged:
        final.update(values)
    vars(process).update(final)  # one value each: readers take no lock


class Setting:
    """What a setter returns: made, it has set the switches; entered, it takes that back and sets them for a block."""

    def __init__(self, **values: Any) -> None:
        self._values = values
        self._blocks: list[dict[str, Any]] = []  # what each entry has to restore, innermost last
        # Switches that a block of this thread holds change there; all others for the process.
        self._replaced = {name: held for name in values if (held := getattr(thread, name)) is not None}
        for name in self._replaced:
            setattr(thread, name, values[name])
        with _lock:
            wide = {name: value for name, value in values.items() if name not in self._replaced}
            _writes.append((wide, weakref.ref(self)))
            _publish()

    def __enter__(self) -> None:
        vars(thread).update(self._replaced)
        self._replaced = {}
        with _lock:
            _writes[:] = [write for write in _writes if write[1]() is not self]
            _publish()
        self._blocks.append({name: getattr(thread, name) for name in self._values})
        vars(thread).update(self._values)

    def __exit__(self, *exception: object) -> None:
        vars(thread).update(self._blocks.pop())


def current(name: str) -> Any:
    """The value of a switch in this thread."""
    held = getattr(thread, name)
    return getattr(process, name) if held is None else held
