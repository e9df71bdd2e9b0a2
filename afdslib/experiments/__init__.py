"""The runs: each is a frozen configuration that knows how to compute itself, and names the runs it needs.

Importing the package imports every kind of run, so that a stored configuration can be rebuilt by the name of its class.
"""

from afdslib.experiments import afs, competitors, delta, extended, student

__all__ = ["afs", "competitors", "delta", "extended", "student"]
