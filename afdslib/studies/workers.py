"""Several workers, on one machine or on many that share the run store, do one list of runs between them.

Nobody hands out work: a worker passes over what another one is computing (the store's locks say so) and takes the next.
A killed worker's lock is released by the system, so the next one that comes by resumes its run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import torch

from afdslib import runs
from afdslib.base.errors import BusyError
from afdslib.losses import TERMS

__all__ = ["alongside", "compute", "with_needs"]

_log = logging.getLogger(__name__)


def compute(configs: Sequence[Any]) -> list[runs.Result]:
    """This worker's share of some runs and of those they need, then the results, in the order asked for.

    A run is begun when those it needs are finished, so that workers do not wait for each other.
    """
    todo = _missing(with_needs(_missing(configs)))
    while todo:
        idle = True
        for config in todo:
            if runs.lookup(config) is not None or _missing(runs.needs(config)):
                continue
            try:
                runs.get_or_run(config, wait=False)
                idle = False
            except BusyError:
                continue
        todo = _missing(todo)
        if todo and idle:  # waits for the worker of one of them, or takes over if that one is gone
            runs.get_or_run(next((config for config in todo if runs.busy(config)), todo[0]))
            todo = _missing(todo)
    return [runs.get_or_run(config) for config in configs]


def with_needs(configs: Iterable[Any]) -> list[Any]:
    """Some runs and all that they start from, each after those it needs."""
    ordered: dict[Any, None] = {}
    for config in configs:
        if config not in ordered:
            ordered |= dict.fromkeys((*with_needs(runs.needs(config)), config))
    return list(ordered)


def _missing(configs: Iterable[Any]) -> list[Any]:
    return [config for config in configs if runs.lookup(config) is None]


def alongside(work: Callable[..., Any], arguments: tuple[Any, ...], processes: int) -> Any:
    """Runs the same work in this process and in others, which share it through the run store.

    Args:
        work: a function of a module.
        arguments: for each of them.
        processes: in all, one thread each if there are several.

    Returns:
        What it returns here.
    """
    # Started afresh, not forked: a process that has used torch's threads cannot be forked safely.
    context = get_context("spawn")
    # A term of the user's own is known to a process that has imported its module.
    modules = {term.__module__ for term in TERMS.values()} - {"__main__"}
    others: list[Any] = [context.Process(target=_work, args=(work, arguments, modules)) for _ in range(processes - 1)]
    threads = torch.get_num_threads()
    try:
        for process in others:
            process.start()
        if others:
            torch.set_num_threads(1)
        return work(*arguments)
    finally:
        torch.set_num_threads(threads)
        for process in others:
            if process.exitcode:
                _log.warning("a worker ended with exit code %s; the others have done its runs", process.exitcode)
        # What they would still do is done, or this process has failed and the next call goes on.
        for process in others:
            process.terminate()
        for process in others:
            process.join()


def _work(work: Callable[..., Any], arguments: tuple[Any, ...], modules: Iterable[str] = ()) -> None:
    torch.set_num_threads(1)
    for module in modules:
        import_module(module)
    try:
        work(*arguments)
    except (KeyboardInterrupt, ValueError, OSError):
        raise SystemExit(2) from None  # the first process says why
