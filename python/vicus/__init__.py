"""vicus: dense and neighborhood attention for PyTorch."""

from vicus import _ops_unfused  # noqa: F401  (its operators exist from here on)
from vicus._library import info
from vicus.functional import attention, merge_attentions, na1d, na2d, na3d, neighborhood_attention

__all__ = [
    "attention",
    "info",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
]
