"""Work in a process of its own, made by a fork."""

import os
import threading
from collections.abc import Callable

from tqdm import tqdm

from afdslib.base.errors import AFDSError


def start(work: Callable[[], object]) -> int:
    """Begins `work` in a silent child that exits with 0, or with 2 after an error that the command line tells."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            # A fork shares tqdm's lock with its parent; killed while it holds it, it would stop all later ones.
            tqdm.set_lock(threading.RLock())
            work()
            code = 0
        except AFDSError as error:
            code = 3 if "\n" in str(error) else 2
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    """The exit code of a child, once it has ended; minus the signal's number for one that was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
