"""The one error type for mistakes a user can mend."""

__all__ = ["AFDSError", "BusyError", "DivergedError", "UnreachableError"]


class AFDSError(ValueError):
    """A mistake of the caller, in one sentence: what is wrong, which value, what to do; exit code 2."""


class BusyError(AFDSError):
    """Another process is computing the run that was asked for."""


class DivergedError(AFDSError):
    """The loss of a training is not finite. In a study this is a result: the point is missing, and a table says why."""


class UnreachableError(AFDSError):
    """A budget below what the layers that must stay cost; it names the smallest one. In a study a result, too."""
