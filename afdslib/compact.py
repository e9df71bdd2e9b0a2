"""Compact networks. The module is `afdslib.afs.compact`."""

from afdslib.afs.compact import *  # noqa: F403
