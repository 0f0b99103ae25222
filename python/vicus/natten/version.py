"""The NATTEN release whose interface `vicus.natten` offers; the version of vicus is `vicus.__version__`."""

__version__ = "0.21.6"
