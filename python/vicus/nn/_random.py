"""Random numbers of calls that are computed twice."""

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["contexts"]


def contexts(tracker: Any) -> tuple[Any, Any]:
    """Contexts of the first and the second computation of a checkpointed call: both draw the same random numbers."""
    if tracker is None:
        return contextlib.nullcontext(), contextlib.nullcontext()
    return contextlib.nullcontext(), _states(tracker, tracker.get_states())


@contextlib.contextmanager
def _states(tracker: Any, states: Any) -> Iterator[None]:
    """A block in which a tracker of random numbers has `states`."""
    now = tracker.get_states()
    tracker.set_states(states)
    try:
        yield
    finally:
        tracker.set_states(now)
