"""MACs of a network: `count` and `expected`. The module is `afdslib.afs.macs`."""

from afdslib.afs.macs import *  # noqa: F403
