"""Times of calls that take turns, and the threads they run on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

__all__ = ["interleave", "on_threads"]


def interleave(
    variants: Mapping[str, Callable[[int], object]], repeats: int, warmup: int = 1, *, before: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each call: in every round each variant once, one after the other.

    Args:
        variants: functions of the round's number, by name, so that each round can use another image.
        repeats: measured rounds.
        warmup: rounds before them, numbered from -warmup.
        before: seconds for which each variant is called before the call that is timed, so that it finds its own weights
            in the caches, as a network that is served does, and no thread of another variant that still spins.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(-warmup, repeats):
        for name, call in variants.items():
            begin = time.perf_counter()
            while time.perf_counter() - begin < before:
                call(repeat + 1)
            _wait()
            start = time.perf_counter()
            call(repeat)
            _wait()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@contextmanager
def on_threads(number: int) -> Iterator[None]:
    """Sets torch's number of threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
