"""A disk that fails: from some change of a file below a folder on, every one raises an OSError."""

import errno
import os
import sys

ERRORS = {"full": errno.ENOSPC, "read-only": errno.EROFS}
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.truncate")


def install(folder: str, fault: str, first: int) -> None:
    """In this process, after `first` changes below `folder`; a full disk still renames and removes."""
    seen = 0

    def fail(event, arguments):
        nonlocal seen
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and str(arguments[0]).startswith(folder):
            seen += 1
            if seen > first and not (fault == "full" and event in ("os.remove", "os.rename")):
                raise OSError(ERRORS[fault], os.strerror(ERRORS[fault]), arguments[0])

    sys.addaudithook(fail)
