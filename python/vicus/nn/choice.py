"""Which backend computes a call: what each of them says, what the user permits, and what was measured.

Environment, read whenever a choice is made. Every variable but the last is known under the prefix `NVTE_`, as in
Transformer Engine, and under `VICUS_`, which goes first:

- `NVTE_FLASH_ATTN`, `NVTE_FUSED_ATTN`, `NVTE_UNFUSED_ATTN`: "1" permits a backend, "0" forbids it; nothing forces one.
- `NVTE_ALLOW_NONDETERMINISTIC_ALGO`: "0" excludes what is not deterministic.
- `NVTE_DEBUG`, `NVTE_DEBUG_LEVEL`: with "1" and level "1", which backend was chosen is written to the standard error
  stream; with level "2" also why the others were not. Python's logging has all of it, at its debug level, under the
  name "vicus.nn", whatever these say.
- `VICUS_ATTN_PREFERENCE`: "measured" (the default) prefers what was faster when it was measured, "te" follows the rule
  of Transformer Engine: fused first on Hopper and newer, flash first before.
"""

import contextlib
import contextvars
import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Iterator, Sequence

import torch

from vicus import context
from vicus._arguments import wrong
from vicus.nn import preference
from vicus.nn.backends import BACKENDS
from vicus.nn.problem import Problem, one_of

__all__ = ["Choice", "Verdict", "attention_backends", "choose", "deterministic"]

logger = logging.getLogger("vicus.nn")

NAMES = tuple(backend.name for backend in BACKENDS)
_PREFIXES = ("VICUS_", "NVTE_")

#: What blocks of `attention_backends` say, the innermost last.
_blocks: contextvars.ContextVar[tuple[dict[str, bool], ...]] = contextvars.ContextVar("_blocks", default=())


def _variable(name: str, allowed: Sequence[str]) -> tuple[str, str] | None:
    """Name and value of an environment variable under the first prefix that has one."""
    for prefix in _PREFIXES:
        value = os.environ.get(prefix + name, "")
        if value:
            return prefix + name, one_of(prefix + name, value, allowed)
    return None


def _is(name: str, value: str, allowed: Sequence[str] = ("0", "1")) -> bool:
    found = _variable(name, allowed)
    return found is not None and found[1] == value


@contextlib.contextmanager
def attention_backends(
    *, flash: bool | None = None, fused: bool | None = None, unfused: bool | None = None
) -> Iterator[None]:
    """Permits or forbids backends of attention layers within a block, whatever the environment says of them.

    Belongs to the thread (or task) that runs it. Blocks nest: the innermost one that names a backend counts. Permitting
    forces nothing: a permitted backend still has to take the problem, and to be preferred.

    Args:
        flash: True permits, False forbids, None leaves it to the block or the environment around.
        fused: The same.
        unfused: The same.

    Raises:
        ValueError: A value is neither None nor a bool.
    """
    given = {name: value for name, value in zip(NAMES, (flash, fused, unfused), strict=True) if value is not None}
    for name, value in given.items():
        if not isinstance(value, bool):
            raise wrong(name, repr(value), "True, False, None")
    token = _blocks.set((*_blocks.get(), given))
    try:
        yield
    finally:
        _blocks.reset(token)


def _forbidden(name: str) -> str:
    """What forbids a backend; empty when nothing does."""
    for block in reversed(_blocks.get()):
        if name in block:
            return "" if block[name] else f"forbidden by attention_backends({name}=False)"
    found = _variable(f"{name.upper()}_ATTN", ("0", "1"))
    return "" if found is None or found[1] == "1" else f"forbidden by {found[0]}=0"


def deterministic() -> bool:
    """Whether results must be bit-identical from run to run: by PyTorch's switch, vicus' or the environment."""
    return context.backward_flags()[0] or _is("ALLOW_NONDETERMINISTIC_ALGO", "0")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found about one backend.

    Attributes:
        backend: Its name.
        reason: Why it was dropped, in words; empty when it was not.
        chosen: Whether it computes the call.
        preference: Why it stands where it stands among those that were not dropped.
    """

    backend: str
    reason: str
    chosen: bool
    preference: str = ""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backend that computes a call, and why it is the one. Printed, it is a table.

    Attributes:
        problem: What was asked.
        verdicts: One for each backend, those that take the problem first, the preferred one at the top.
    """

    problem: Problem
    verdicts: tuple[Verdict, ...]

    @property
    def backend(self) -> str | None:
        """Name of the chosen backend; None when none is left."""
        return next((verdict.backend for verdict in self.verdicts if verdict.chosen), None)

    @property
    def reasons(self) -> dict[str, str]:
        """By backend, why it was dropped; empty texts for those that were not."""
        return {verdict.backend: verdict.reason for verdict in self.verdicts}

    def __str__(self) -> str:
        """The problem, and a line for each backend."""
        words = [
            (v.backend, "chosen" if v.chosen else "dropped" if v.reason else "possible", v.reason or v.preference)
            for v in self.verdicts
        ]
        return "\n".join([str(self.problem), *(f"  {a:8}{b:10}{c}".rstrip() for a, b, c in words)])


def choose(problem: Problem, only: str = "auto") -> Choice:
    """Chooses a backend.

    Args:
        problem: Of the call; architecture included, so that the choice for any machine can be asked on any other.
        only: Name of the only backend that may be chosen; "auto" for any.

    Returns:
        The choice, with what was found about every backend. Its `backend` is None when none is left.

    Raises:
        ValueError: An environment variable has a value that it may not have.
    """
    forbidden = tuple(_forbidden(name) for name in NAMES)
    choice = _decide(problem, only, forbidden, _is("ATTN_PREFERENCE", "te", ("measured", "te")))
    _log(choice)
    return choice


@functools.lru_cache(maxsize=512)  # of what the user says now: nothing of it is remembered
def _decide(problem: Problem, only: str, forbidden: tuple[str, ...], te: bool) -> Choice:
    reasons = {}
    for backend, reason in zip(BACKENDS, forbidden, strict=True):
        if not reason and only not in ("auto", backend.name):
            reason = f"attention_backend is {only!r}"
        reasons[backend.name] = reason or backend.supports(problem)
    ranks = preference.rank(problem, [name for name in reasons if not reasons[name]], te)
    verdicts = [Verdict(name, "", i == 0, why) for i, (name, why) in enumerate(ranks)]
    verdicts += [Verdict(name, reason, False) for name, reason in reasons.items() if reason]
    return Choice(problem, tuple(verdicts))


def refusal(choice: Choice) -> ValueError:
    """The error of a choice that has no backend left."""
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in choice.reasons.items())
    return ValueError(f"no attention backend takes this call ({choice.problem}):{reasons}")


class _Stderr(logging.StreamHandler):
    """Writes to the stream that is standard error at that moment."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("[%(levelname)-8s| %(name)s]: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


_stderr = _Stderr()


def _log(choice: Choice) -> None:
    if torch.compiler.is_compiling():
        return
    level = _variable("DEBUG_LEVEL", ("0", "1", "2"))
    stderr = int(level[1]) if level is not None and _is("DEBUG", "1") else 0
    if not stderr and not logger.isEnabledFor(logging.DEBUG):
        return
    lines = [(2, f"attention of {choice.problem}")]
    for verdict in choice.verdicts:
        if verdict.reason:
            lines.append((2, f"attention backend {verdict.backend} dropped: {verdict.reason}"))
        else:
            kind, at = ("chosen", 1) if verdict.chosen else ("possible, not preferred", 2)
            lines.append((at, f"attention backend {verdict.backend} {kind}: {verdict.preference}"))
    for at, text in lines:
        logger.debug("%s", text)
        if at <= stderr:
            _stderr.handle(logger.makeRecord(logger.name, logging.DEBUG, __file__, 0, text, (), None))
