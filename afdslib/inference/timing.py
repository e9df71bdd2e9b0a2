"""Times of calls that take turns, the threads they run on, and peak memory."""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["interleave", "on_threads", "peak"]


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
    wait: Callable[[], None] = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    for repeat in range(-warmup, repeats):
        for name, call in variants.items():
            begin = time.perf_counter()
            while time.perf_counter() - begin < before:
                call(repeat + 1)
            wait()
            start = time.perf_counter()
            call(repeat)
            wait()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


@contextmanager
def on_threads(number: int) -> Iterator[None]:
    """Sets torch's number of threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak(target: Callable[..., Callable[[], object]], *arguments: object) -> float | None:
    """MiB that the call which `target(*arguments)` gives adds at its peak in a process of its own; None off Linux."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure_peak, target, arguments).result()


def _measure_peak(target: Callable[..., Callable[[], object]], arguments: tuple) -> float | None:
    torch.set_num_threads(1)
    call = target(*arguments)
    try:
        # Imports may have peaked higher than the call will; Linux can forget that.
        Path("/proc/self/clear_refs").write_text("5")
        held = _kib("VmRSS")
        call()
        return (_kib("VmHWM") - held) / 1024
    except OSError:
        return None


def _kib(what: str) -> int:
    return int(re.findall(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[0])
