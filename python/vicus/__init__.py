"""vicus: dense and neighborhood attention for PyTorch."""

from vicus import _library, _ops  # noqa: F401
from vicus._library import info

__all__ = ["info"]
