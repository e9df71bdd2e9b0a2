"""The one error type for mistakes a user can mend."""

__all__ = ["AFDSError"]


class AFDSError(ValueError):
    """A mistake of the caller, told in one sentence: what is wrong, which value, what to do.

    The command line prints it without a traceback and exits with code 2.
    """
