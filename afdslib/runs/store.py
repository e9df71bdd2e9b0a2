"""The run store: one folder per training run, named by a hash of its whole configuration.

A folder `runs/<id>/` holds `config.json`, `environment.json` (device, versions: recorded, not hashed), `metrics.csv`,
`checkpoint.pt` (until the run is finished), artifacts, `times.json` (wall clock) and `result.json`, which is written
last by an atomic rename: it is the done-marker. A process killed at any moment leaves a folder that is resumed.
Finished results of the real studies are committed (see `afdslib.runs.results`) and found there, too.

    result = runs.get_or_run(Train(lr=0.01))        # trains once, ever
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from afdslib.base import paths
from afdslib.base.atomic import remove_leftovers, write_json
from afdslib.base.errors import AFDSError, BusyError
from afdslib.runs import config as configs
from afdslib.runs.config import Config, run_id
from afdslib.runs.results import Result, committed, read_config, read_json, recorded, records, seconds
from afdslib.runs.run import Run, environment

__all__ = [
    "Summary", "busy", "finished", "folder", "get_or_run", "list_committed", "list_runs", "load_config", "lookup",
    "remove", "require_training", "resume", "show",
]  # fmt: skip

_log = logging.getLogger(__name__)
_ID = re.compile(r"[0-9a-f]{12}")

_executing: ContextVar[Run | None] = ContextVar("executing", default=None)
"""The run whose `execute` is under way here: what it needs is computed inside it, but is no time of its own."""


def get_or_run(
    config: Config, *, store: str | Path | None = None, needs: Sequence[str] = (),
    started: Callable[[], None] | None = None, wait: bool = True,
) -> Result:  # fmt: skip
    """The result of a run, computed if nobody has computed it yet and resumed if somebody started.

    Two processes that ask for the same run do not both compute it: the second waits for the first.

    Args:
        store: The folder of all runs; by default `paths.runs()`.
        needs: Artifacts that the caller will read. A result without them (a committed one) is computed again.
        started: Called right before the run is computed or resumed, and not for one that is finished.
        wait: For another process that is computing it.

    Raises:
        BusyError: Another process is computing it, and `wait` is False.
        AFDSError: A stored file is corrupted, or the store cannot be written.
    """
    if found := lookup(config, store=store, needs=needs):
        return found
    id = run_id(config)
    if committed(id):
        _log.warning("run %s is committed without %s and is computed again", id, ", ".join(needs))
    store, since, outer = folder(store), time.monotonic(), _executing.get()
    try:
        with _locked(store, id, wait=wait):  # it may have been computed while we waited
            return _stored(store, id, needs) or _compute(config, id, store, needs, started)
    finally:
        if outer is not None:
            outer._elsewhere += time.monotonic() - since


def _compute(config: Config, id: str, store: Path, needs: Sequence[str], started: Callable | None) -> Result:
    path = store / id
    with _changing(path, "write"):
        path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        (path / "result.json").unlink(missing_ok=True)  # finished once, but an artifact is gone
        if not (path / "checkpoint.pt").exists():  # killed before the first one: everything will be logged again
            (path / "metrics.csv").unlink(missing_ok=True)
    write_json(path / "config.json", configs.to_json(config))
    write_json(path / "environment.json", environment())
    run = Run(id, path, store)
    if started:
        started()
    token = _executing.set(run)
    try:
        metrics = config.execute(run)
    finally:
        _executing.reset(token)
    run._write_times()
    record = {"id": id, "kind": type(config).__name__, "version": configs.RESULTS_VERSION}
    write_json(path / "result.json", record | {"metrics": _plain(metrics)})
    with _changing(run.checkpoint_path, "delete"):
        run.checkpoint_path.unlink(missing_ok=True)  # of no use now, and as large as all else together
    if result := _stored(store, id, needs):
        return result
    raise AFDSError(f"run {id} ended without writing {', '.join(needs)} to {path}; it cannot be used here")


def lookup(config: Any, *, store: str | Path | None = None, needs: Sequence[str] = ()) -> Result | None:
    """The finished run of a configuration in the store or among the committed results, or None. Computes nothing."""
    id = run_id(config)
    stored = _stored(folder(store), id, needs)
    return stored or next((result for result in committed(id) if result.has(needs)), None)


def busy(config: Any, *, store: str | Path | None = None) -> bool:
    """Whether a process is computing this run now."""
    return _is_locked(folder(store), run_id(config))


def load_config(id: str, *, store: str | Path | None = None) -> Any:
    """Rebuilds the configuration of a run, in the store or among the committed results.

    Raises:
        AFDSError: No such run, a corrupted file, or a configuration that this version of afdslib would name otherwise.
    """
    id = _find(id, store)
    path = folder(store) / id
    results = [] if path.is_dir() else committed(id)
    return configs.from_json(recorded(results[0])["config"]) if results else read_config(path, id)


def resume(id: str, *, store: str | Path | None = None) -> Result:
    """Continues the run `id` (a unique beginning is enough) from its last checkpoint, or returns its result.

    The module that defines its configuration must have been imported; `import afdslib.experiments` imports them all.
    """
    return get_or_run(load_config(id, store=store), store=store)


def finished(id: str, *, store: str | Path | None = None) -> tuple[Any, Result]:
    """Configuration and result of a finished run, in the store or among the committed results; AFDSError if not one."""
    id = _find(id, store)
    if result := _stored(folder(store), id, ()):
        return read_config(result.path, id), result
    for result in committed(id, hidden=True):
        return configs.from_json(recorded(result)["config"]), result
    raise AFDSError(f"run {id} is not finished; finish it first with: afds resume {id}")


@dataclass(frozen=True)
class Summary:
    """One line of `afds runs list`."""

    id: str
    kind: str
    state: str  # "finished", "running", "interrupted" (resumable), "corrupted" or "committed"
    steps: int | None  # optimiser steps taken, as reported by a finished run
    seconds: float | None  # wall clock up to the end or the last checkpoint
    path: Path


def list_runs(store: str | Path | None = None) -> list[Summary]:
    """All runs of a store, oldest first. Runs of unknown kind and corrupted ones are listed, too."""
    found = [path for path in folder(store).glob("*") if _ID.fullmatch(path.name) and path.is_dir()]
    return [_summary(path) for path in sorted(found, key=lambda path: (path.stat().st_mtime, path.name))]


def list_committed() -> list[Summary]:
    """The runs among the committed results, by profile and id."""
    return [
        Summary(r["id"], r["kind"], "committed", _steps(r), r.get("times", {}).get("seconds"), paths.results(profile))
        for profile, r in records()
    ]


def _summary(path: Path) -> Summary:
    id, kind, state, steps = path.name, "?", "interrupted", None
    try:
        kind = str(read_json(path / "config.json", id).get("class", "?"))
        if (path / "result.json").exists():
            state = "finished"
            steps = _steps(read_json(path / "result.json", id))
        elif _is_locked(path.parent, id):
            state = "running"
    except (AFDSError, OSError):
        state = "corrupted"
    return Summary(id, kind, state, steps, seconds(Result(id, {}, path)), path)


def show(id: str, *, store: str | Path | None = None) -> dict[str, Any]:
    """Everything small about a run: state, configuration, metrics, environment, times and files with their bytes."""
    id = _find(id, store)
    path = folder(store) / id
    if not path.is_dir() and (results := committed(id)):
        record = recorded(results[0])
        parts: dict[str, Any] = {key: record.pop(key) for key in ("config", "environment", "times") if key in record}
        return {"id": id, "state": "committed", "path": str(results[0].path), **parts, "result": record, "files": {}}
    files = {file.name: file.stat().st_size for file in sorted(path.glob("*")) if file.is_file()}
    names = [name for name in ("config", "result", "environment", "times") if f"{name}.json" in files]
    parts = {name: read_json(path / f"{name}.json", id) for name in names}
    return {"id": id, "state": _summary(path).state, "path": str(path), **parts, "files": files}


def remove(id: str, *, store: str | Path | None = None) -> Path:
    """Deletes a run's folder, whatever is in it; AFDSError if there is none, or a process is computing it."""
    id = _find(id, store, anywhere=False)
    path = folder(store) / id
    with _locked(path.parent, id, wait=False), _changing(path, "delete"):
        trash = path.with_name(f".{id}.{uuid.uuid4().hex[:8]}.removed")
        os.rename(path, trash)  # gone at once, even if deleting is interrupted
        shutil.rmtree(trash)
    return path


def require_training(store: str | Path | None = None) -> dict[str, int]:
    """Optimiser steps of the finished runs by kind, where they report "steps"; AFDSError if a kind took none."""
    steps: Counter[str] = Counter()
    for summary in list_runs(store):
        if summary.steps is not None:
            steps[summary.kind] += summary.steps
    idle = sorted(kind for kind, number in steps.items() if number == 0)
    if idle or not steps:
        what = f"{', '.join(idle)} took no training step" if idle else "no training step was taken"
        raise AFDSError(f"{what} in {folder(store)}, so nothing was computed here; start from an empty run store")
    return dict(steps)


def folder(store: str | Path | None = None) -> Path:
    """The folder of all runs: the given one, or `paths.runs()`."""
    return Path(store).expanduser().resolve() if store is not None else paths.runs()


@contextmanager
def _changing(path: Path, what: str) -> Iterator[None]:
    """Turns errors of the file system into one sentence."""
    try:
        yield
    except TimeoutError:  # of a lock that another process holds
        raise
    except OSError as error:
        advice = "mend its permissions or set AFDS_RUNS to another folder"
        raise AFDSError(f"cannot {what} {path}: {error.strerror}; {advice}") from error


def _lock_file(store: Path, id: str) -> Path:
    return store / ".locks" / f"{id}.lock"  # outside the run's folder, which may be deleted under the lock


@contextmanager
def _locked(store: Path, id: str, *, wait: bool = True) -> Iterator[None]:
    """Holds the run's lock, which the system releases when the process dies, however it dies."""
    file = _lock_file(store, id)
    lock = filelock.FileLock(file)
    try:
        with _changing(file, "lock"):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
    except filelock.Timeout:
        if not wait:
            raise BusyError(f"run {id} is being computed by another process; stop that one first") from None
        _log.warning("waiting for run %s, which another process is computing", id)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _is_locked(store: Path, id: str) -> bool:
    if not _lock_file(store, id).exists():
        return False
    try:
        with _locked(store, id, wait=False):
            return False
    except BusyError:
        return True
    except AFDSError:  # a read-only store is not being written
        return False


def _stored(store: Path, id: str, needs: Sequence[str]) -> Result | None:
    path = store / id
    if not (path / "result.json").exists() or not all((path / name).is_file() for name in needs):
        return None
    return Result(id, read_json(path / "result.json", id)["metrics"], path)


def _find(id: str, store: str | Path | None, *, anywhere: bool = True) -> str:
    """The one run whose id begins with `id`, in the store, else (`anywhere`) among the committed results."""
    path = folder(store)
    advice = "see the ids with: afds runs list"
    if not re.fullmatch(r"[0-9a-f]{1,12}", id):
        raise AFDSError(f"{id!r} is not a run id; {advice}")
    found = {file.name for file in path.glob(f"{id}*") if _ID.fullmatch(file.name)}
    if anywhere and not found:
        found = {result.id for result in committed(id, hidden=True)}
    if len(found) != 1:
        what = "no run" if not found else f"{len(found)} runs"
        raise AFDSError(f"{what} in {path} begin with {id!r}; {advice}")
    return found.pop()


def _steps(record: dict[str, Any]) -> int | None:
    steps = record["metrics"].get("steps")
    whole = isinstance(steps, (int, float)) and not isinstance(steps, bool) and math.isfinite(steps)
    return int(steps) if whole else None


def _plain(value: Any) -> Any:
    """JSON-able data: numpy and torch numbers and arrays become lists and numbers, NaN and infinity null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        return _plain(value.tolist())
    if value is None or isinstance(value, (bool, int, float, str)):
        return None if isinstance(value, float) and not math.isfinite(value) else value
    raise TypeError(f"a metric is {value!r}, a {type(value).__name__}, which JSON cannot hold")
