"""`natten.types`."""

from vicus.types import *  # noqa: F403
