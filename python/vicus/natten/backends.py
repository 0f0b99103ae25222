"""`natten.backends`."""

from vicus.backends import *  # noqa: F403
