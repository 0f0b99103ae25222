"""`natten.utils.varlen`."""

from vicus.varlen import generate_varlen_parameters

__all__ = ["generate_varlen_parameters"]
