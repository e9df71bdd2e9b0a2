"""The run store: one folder per training run, named by a hash of its whole configuration.

    @runs.register
    @dataclass(frozen=True)
    class Train:
        lr: float = 0.1
        parent: Pretrain = Pretrain()               # a nested configuration, here itself a run
        root: str = runs.unhashed("")               # recorded, not part of the identity

        def execute(self, run: runs.Run) -> dict:
            source = runs.get_or_run(self.parent, store=run.store, needs=("model.safetensors",))
            state = run.load_checkpoint()           # None on the first start
            ...
            return {"steps": 100, "accuracy": 0.9}

    result = runs.get_or_run(Train(lr=0.01))        # trains once, ever

A folder `runs/<id>/` holds `config.json`, `environment.json` (device, versions: recorded, not hashed), `metrics.csv`,
`checkpoint.pt` (until the run is finished), artifacts, `times.json` (wall clock) and `result.json`, which is written
last by an atomic rename: it is the done-marker. A process killed at any moment leaves a folder that is resumed.
Finished results of the real studies are committed under `data/results/<profile>/runs/` and found there too.
"""

from __future__ import annotations

import csv
import dataclasses
import errno
import hashlib
import importlib.metadata
import io
import json
import logging
import math
import os
import pickle
import platform
import re
import shutil
import time
import types
import typing
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from afdslib.base import paths
from afdslib.base.atomic import atomic_path, remove_leftovers, write_json, write_text
from afdslib.base.errors import AFDSError, BusyError

if typing.TYPE_CHECKING:
    import pandas

__all__ = [
    "RESULTS_VERSION",
    "Config",
    "Result",
    "Run",
    "Summary",
    "added",
    "busy",
    "computed_steps",
    "environment",
    "finished",
    "folder",
    "from_json",
    "get_or_run",
    "list_runs",
    "load_config",
    "lookup",
    "publish",
    "register",
    "remove",
    "require_training",
    "resume",
    "run_id",
    "seconds",
    "show",
    "steps_by_kind",
    "to_json",
    "unhashed",
]

RESULTS_VERSION = 1
"""Part of every run's identity. Raise it by hand when a change of the code changes the numbers of old runs."""

_log = logging.getLogger(__name__)
_ID = re.compile(r"[0-9a-f]{12}")
_registry: dict[str, type] = {}  # filled by the decorator below, as classes are defined

_ConfigClass = TypeVar("_ConfigClass", bound=type)


class Config(Protocol):
    """A frozen dataclass of str, int, float, bool, None, tuples and nested frozen dataclasses that can be executed."""

    def execute(self, run: Run) -> dict[str, Any]:
        """Computes the run and returns its metrics (JSON-able; training puts its optimiser steps under "steps")."""
        ...


# ---------------------------------------------------------------------------------------------- configurations as JSON


def register(cls: _ConfigClass) -> _ConfigClass:
    """Class decorator that lets a stored configuration be rebuilt by its class name.

    Raises:
        TypeError: Not a frozen dataclass, or another class of this name is registered.
    """
    if not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise TypeError(f"{cls.__name__} must be a frozen dataclass to be registered as a configuration")
    known = _registry.setdefault(cls.__name__, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise TypeError(f"a configuration named {cls.__name__} is already registered by {known.__module__}")
    _registry[cls.__name__] = cls  # a reloaded module replaces its own class
    return cls


def unhashed(default: Any) -> Any:
    """A dataclass field that is recorded in `config.json` but is no part of the run's identity (a folder, a device)."""
    return dataclasses.field(default=default, metadata={"hashed": False})


def added(default: Any) -> Any:
    """A dataclass field added after results were published: part of the identity only where it is not its default.

    So the runs that were computed before the field existed keep their names. The default must mean "as before".
    """
    return dataclasses.field(default=default, metadata={"added": True})


def to_json(config: Any, *, hashed_only: bool = False) -> dict[str, Any]:
    """A configuration as JSON: `{"class": name, field: value, ...}`, nested dataclasses alike.

    Integers in fields annotated as float become floats, so `1` and `1.0` are one configuration.

    Args:
        config: A frozen dataclass.
        hashed_only: Leave out the fields made by `unhashed`, and those made by `added` that have their default.

    Raises:
        TypeError: A field holds a value that has no canonical form.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"{config!r} is not a configuration (an instance of a frozen dataclass)")
    hints = _hints(type(config))
    encoded: dict[str, Any] = {"class": type(config).__name__}
    for field in dataclasses.fields(config):
        if hashed_only and not field.metadata.get("hashed", True):
            continue
        if hashed_only and field.metadata.get("added") and getattr(config, field.name) == field.default:
            continue
        where = f"{type(config).__name__}.{field.name}"
        encoded[field.name] = _encode(getattr(config, field.name), hints[field.name], where, hashed_only)
    return encoded


def _encode(value: Any, hint: Any, where: str, hashed_only: bool) -> Any:
    options = _options(hint)
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return float(value) if float in options and int not in options else int(value)
    if isinstance(value, float):
        if math.isnan(value):
            raise TypeError(f"{where} is NaN, which never equals itself and so names no configuration")
        return float(value) if math.isfinite(value) else {"float": "inf" if value > 0 else "-inf"}
    if isinstance(value, tuple):
        hints = _item_hints(options, len(value))
        return [_encode(item, hints[i], f"{where}[{i}]", hashed_only) for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_json(value, hashed_only=hashed_only)
    raise TypeError(f"{where} is a {type(value).__name__}; use str, int, float, bool, None, tuples and dataclasses")


def from_json(data: dict[str, Any], cls: type | None = None) -> Any:
    """Rebuilds what `to_json` wrote.

    Args:
        data: A decoded JSON object with a key "class".
        cls: The class to build; by default the registered class of that name.

    Raises:
        AFDSError: Unknown class or fields.
    """
    name = data.get("class")
    cls = cls or (_registry.get(name) if isinstance(name, str) else None)
    if cls is None:
        raise AFDSError(f"unknown kind of run {name!r}; this version of afdslib does not define it")
    hints = _hints(cls)
    values = {key: value for key, value in data.items() if key != "class"}
    if unknown := sorted(set(values) - {field.name for field in dataclasses.fields(cls) if field.init}):
        raise AFDSError(f"{name} has no field {unknown[0]!r}; another version of afdslib wrote the configuration")
    try:
        return cls(**{key: _decode(value, hints[key]) for key, value in values.items()})
    except TypeError as error:  # a field without a default is missing
        raise AFDSError(f"the configuration of a {name} cannot be rebuilt ({error}); start the run anew") from error


def _decode(value: Any, hint: Any) -> Any:
    options = _options(hint)
    if isinstance(value, list):
        hints = _item_hints(options, len(value))
        return tuple(_decode(item, hints[i]) for i, item in enumerate(value))
    if isinstance(value, dict):
        if set(value) == {"float"}:
            return float(value["float"])
        nested = {option.__name__: option for option in options if isinstance(option, type)}
        return from_json(value, nested.get(str(value.get("class"))))
    if isinstance(value, int) and not isinstance(value, bool) and float in options and int not in options:
        return float(value)
    return value


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError as error:
        raise TypeError(f"annotations of {cls.__name__} cannot be resolved ({error}): define it in a module") from error


def _options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation: `int | None` gives (int, NoneType)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(option for arg in typing.get_args(hint) for option in _options(arg))
    return (hint,)


def _item_hints(options: Sequence[Any], length: int) -> Sequence[Any]:
    """The annotation of each item of a tuple: `tuple[int, ...]`, `tuple[int, float]` or a bare `tuple`."""
    for option in options:
        args = typing.get_args(option) if typing.get_origin(option) is tuple else ()
        if len(args) == 2 and args[1] is Ellipsis:
            return [args[0]] * length
        if len(args) == length and length:
            return args
    return [Any] * length


def run_id(config: Any) -> str:
    """The first 12 hexadecimal digits of the sha256 of class name, all hashed fields and `RESULTS_VERSION`.

    Independent of field order, process, machine and device.
    """
    identity = {"config": to_json(config, hashed_only=True), "version": RESULTS_VERSION}
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        id: See `run_id`.
        metrics: What `execute` returned, as read back from JSON: tuples are lists, keys strings, NaN and infinity None.
        path: The run's folder; for a committed result the folder of its JSON file, without checkpoint and artifacts.
    """

    id: str
    metrics: dict[str, Any]
    path: Path

    @property
    def committed(self) -> bool:
        """Whether the result comes from `data/results/` and not from the run store."""
        return self.path.name != self.id

    def history(self) -> pandas.DataFrame:
        """The logged rows (learning curves), empty if the run logged none."""
        import pandas

        file = self.path / (f"{self.id}.csv" if self.committed else "metrics.csv")
        return pandas.read_csv(file) if file.exists() else pandas.DataFrame()

    def artifact(self, name: str) -> Path:
        """The path of a file that the run wrote.

        Raises:
            AFDSError: The file is not there, as for most committed results.
        """
        file = self._file(name)
        if not file.is_file():
            raise AFDSError(f"run {self.id} has no {name} in {self.path}; recompute it with AFDS_FRESH=1")
        return file

    def has(self, names: Sequence[str]) -> bool:
        """Whether all these artifacts are there."""
        return all(self._file(name).is_file() for name in names)

    def _file(self, name: str) -> Path:
        # Of a committed run only the network may be kept, under the run's id, with the other networks of the studies.
        return paths.weights() / f"{self.id}.safetensors" if self.committed and name == _MODEL else self.path / name


class Run:
    """What `execute` may touch: checkpoints, the log and artifacts of its own folder.

    Attributes:
        id: See `run_id`.
        path: The run's folder.
        store: The folder of all runs; pass it on when a run needs another one.
    """

    def __init__(self, id: str, path: Path, store: Path) -> None:
        self.id = id
        self.path = path
        self.store = store
        self._columns: list[str] | None = None  # of metrics.csv; None until it has been read
        self._since = time.monotonic()
        self._elsewhere = 0.0  # seconds in which it waited for runs that it needs; they have times of their own
        self._before = self._read_times()

    # checkpoints

    @property
    def checkpoint_path(self) -> Path:
        """`checkpoint.pt`; there is none before the first save and after the end."""
        return self.path / "checkpoint.pt"

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last saved state with its tensors on the CPU, or None.

        Raises:
            AFDSError: The file is corrupted, or holds something else than plain data and tensors.
        """
        import torch

        file = self.checkpoint_path
        if not file.exists():
            return None
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()  # torch itself does not compare every checksum
            state = None if damaged else torch.load(file, map_location="cpu", weights_only=True)
        except _DAMAGED:
            state = None
        if not isinstance(state, dict):
            raise AFDSError(f"the checkpoint {file} is corrupted; delete the run with: afds runs rm {self.id}")
        return state

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replaces the checkpoint atomically. `state` holds tensors and plain Python data only.

        Raises:
            AFDSError: The folder cannot be written or is full; the previous checkpoint is kept.
        """
        self._sync_log()  # rows up to this checkpoint must be as durable as the checkpoint
        self._save(self.checkpoint_path, lambda part: _torch_save(state, part))
        self._write_times()

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Turns the errors of `load_state_dict` into one sentence: the checkpoint belongs to another architecture.

        with run.restoring():
            model.load_state_dict(state["model"])
        """
        try:
            yield
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, AFDSError):
                raise
            detail = re.sub(r"\s+", " ", str(error)).strip()
            detail = detail if len(detail) <= 160 else detail[:157] + "..."
            raise AFDSError(
                f"the checkpoint {self.checkpoint_path} does not fit this network ({detail}); "
                f"delete the run with: afds runs rm {self.id}"
            ) from error

    # the log

    def log(self, row: dict[str, Any]) -> None:
        """Appends a row to `metrics.csv`; a new column extends the header, missing values stay empty.

        Args:
            row: Scalars by name, with the optimiser step under "step".
        """
        if "step" not in row:
            raise ValueError("a logged row needs its 'step', or it could not be dropped when a killed run resumes")
        row = {key: _cell(value) for key, value in row.items()}
        if self._columns is None:
            self._columns, _ = self._read_log(repair=True)
        if new := [key for key in row if key not in self._columns]:
            columns, rows = self._read_log()
            self._columns = [*columns, *new]
            self._write_log(self._columns, [*rows, row])
            return
        line = io.StringIO()
        csv.DictWriter(line, self._columns, restval="", lineterminator="\n").writerow(row)
        try:
            with open(self._log_path, "a", encoding="utf-8") as file:
                file.write(line.getvalue())
        except OSError as error:
            self._columns = None  # read and repair it before the next row
            raise AFDSError(
                f"cannot write {self._log_path}: {error.strerror}; free space there or mend its permissions"
            ) from error

    def truncate_log(self, step: int) -> None:
        """Drops the rows after `step` (the step of the checkpoint), which the resumed run will log again."""
        columns, rows = self._read_log()
        self._columns = columns
        if columns:
            self._write_log(columns, [row for row in rows if float(row["step"]) <= step])

    @property
    def _log_path(self) -> Path:
        return self.path / "metrics.csv"

    def _read_log(self, *, repair: bool = False) -> tuple[list[str], list[dict[str, str]]]:
        """Header and whole rows: a killed process may have left half a line at the end, which never counts."""
        if not self._log_path.exists():
            return [], []
        text = self._log_path.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]
        if repair and whole != text:
            write_text(self._log_path, whole)
        reader = csv.DictReader(io.StringIO(whole))
        rows = list(reader)
        return list(reader.fieldnames or []), rows

    def _write_log(self, columns: list[str], rows: Sequence[dict[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self._log_path, text.getvalue())

    def _sync_log(self) -> None:
        if self._log_path.exists():
            with open(self._log_path, "rb+") as file:
                os.fsync(file.fileno())

    # artifacts

    def artifact(self, name: str) -> Path:
        """Where the file `name` of this run is or will be. Write it with `write_artifact`.

        Raises:
            ValueError: Not a plain file name, or one that the store itself uses.
        """
        if not name or Path(name).name != name or name.startswith(".") or name in _OWN_FILES:
            raise ValueError(f"{name!r} cannot name an artifact; use a plain file name other than {sorted(_OWN_FILES)}")
        return self.path / name

    def write_artifact(self, name: str, writer: Callable[[Path], object]) -> Path:
        """Writes a file atomically: `writer(path)` fills a temporary one, which is then renamed.

        Raises:
            AFDSError: The folder cannot be written or is full.
        """
        file = self.artifact(name)
        self._save(file, writer)
        return file

    def _save(self, file: Path, writer: Callable[[Path], object]) -> None:
        with atomic_path(file) as part:
            try:
                writer(part)
            except OSError:
                raise
            except Exception as error:  # torch and safetensors tell a full disk by errors of their own
                if re.search(r"unexpected pos|failed writing|I/O error|No space left", str(error)):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
                raise

    # wall clock

    def _read_times(self) -> dict[str, Any]:
        try:
            times = json.loads((self.path / "times.json").read_text(encoding="utf-8"))
            started = str(times["started"])
            return {"seconds": float(times["seconds"]), "sessions": int(times["sessions"]), "started": started}
        except (OSError, ValueError, KeyError, TypeError):  # absent, or damaged: times are no result
            return {"seconds": 0.0, "sessions": 0, "started": datetime.now(UTC).isoformat(timespec="seconds")}

    def _write_times(self) -> None:
        seconds = self._before["seconds"] + time.monotonic() - self._since - self._elsewhere
        times = {**self._before, "seconds": round(seconds, 3), "sessions": self._before["sessions"] + 1}
        write_json(self.path / "times.json", {**times, "written": datetime.now(UTC).isoformat(timespec="seconds")})


_DAMAGED = (  # what torch.load and zipfile raise for a damaged file
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
)
_MODEL = "model.safetensors"
_OWN_FILES = {"config.json", "environment.json", "metrics.csv", "checkpoint.pt", "times.json", "result.json"}


def _torch_save(state: dict[str, Any], path: Path) -> None:
    import torch

    torch.save(state, path)


def _cell(value: Any) -> Any:
    """A scalar for the CSV: tensors and numpy numbers become Python numbers, line breaks never split a row."""
    value = value.item() if hasattr(value, "item") else value
    return re.sub(r"[\r\n]+", " ", value) if isinstance(value, str) else value


_executing: ContextVar[Run | None] = ContextVar("executing", default=None)
"""The run whose `execute` is under way here: what it needs is computed inside it, but is no time of its own."""


@contextmanager
def _away_from(run: Run | None) -> Iterator[None]:
    """Whatever happens inside is left out of a run's wall-clock time."""
    since = time.monotonic()
    try:
        yield
    finally:
        if run is not None:
            run._elsewhere += time.monotonic() - since


# -------------------------------------------------------------------------------------------------------- the store


def get_or_run(
    config: Config,
    *,
    store: str | Path | None = None,
    needs: Sequence[str] = (),
    started: Callable[[], None] | None = None,
    wait: bool = True,
) -> Result:
    """The result of a run, computed if nobody has computed it yet and resumed if somebody started.

    Two processes that ask for the same run do not both compute it: the second waits for the first.

    Args:
        config: See `Config`.
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
    store = _store(store)
    with _away_from(_executing.get()), _locked(store, id, wait=wait):
        if found := _stored(store, id, needs):  # computed while we waited
            return found
        path = store / id
        _make_folder(path)
        remove_leftovers(path)
        _unlink(path / "result.json")  # finished once, but an artifact is gone: not finished any more
        write_json(path / "config.json", to_json(config))
        write_json(path / "environment.json", environment())
        run = Run(id, path, store)
        if not run.checkpoint_path.exists():  # killed before its first checkpoint: everything will be logged again
            _unlink(path / "metrics.csv")
        if started is not None:
            started()
        token = _executing.set(run)
        try:
            metrics = config.execute(run)
        finally:
            _executing.reset(token)
        run._write_times()
        record = {"id": id, "kind": type(config).__name__, "version": RESULTS_VERSION, "metrics": _plain(metrics)}
        write_json(path / "result.json", record)
        _unlink(run.checkpoint_path)  # of no use now, and as large as all else together
        result = _stored(store, id, needs)
        if result is None:
            raise AFDSError(f"run {id} ended without writing {', '.join(needs)} to {path}; it cannot be used here")
        return result


def lookup(config: Any, *, store: str | Path | None = None, needs: Sequence[str] = ()) -> Result | None:
    """The finished run of a configuration in the store or among the committed results, or None. Computes nothing.

    Raises:
        AFDSError: A result file is corrupted.
    """
    id = run_id(config)
    store = _store(store)
    if found := _stored(store, id, needs):
        return found
    committed = _committed(id)
    return committed if committed and committed.has(needs) else None


def busy(config: Any, *, store: str | Path | None = None) -> bool:
    """Whether a process is computing this run now."""
    return _is_locked(_store(store), run_id(config))


def seconds(result: Result) -> float | None:
    """Wall-clock time of a run, all its sessions together; None where it was not kept."""
    file = result.path / (f"{result.id}.json" if result.committed else "times.json")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return float(record["times"]["seconds"] if result.committed else record["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def publish(result: Result, profile: str, *, store: str | Path | None = None) -> Path:
    """Copies a finished result to `data/results/<profile>/runs/<id>.json`, to be committed, its log beside it.

    Holds id, kind, version, configuration (without unhashed fields such as folders), metrics, device and versions.
    A result that is committed already stays where it is.

    Returns:
        The JSON file.
    """
    target = paths.results(profile) / "runs" / f"{result.id}.json"
    if result.committed:
        return result.path / f"{result.id}.json"
    if _committed_file(result.id) == target:  # computed once more, for an artifact that is not committed
        return target
    record = _read_result(result.path / "result.json", result.id)
    config = load_config(result.id, store=store or result.path.parent)
    record["config"] = to_json(config, hashed_only=True)
    record["environment"] = _read_json(result.path / "environment.json", result.id)
    if (taken := seconds(result)) is not None:
        record["times"] = {"seconds": taken}
    log = result.path / "metrics.csv"
    if log.exists():
        write_text(target.with_suffix(".csv"), log.read_text(encoding="utf-8"))
    write_json(target, record)
    return target


def load_config(id: str, *, store: str | Path | None = None) -> Any:
    """Rebuilds the configuration of a run in the store.

    Raises:
        AFDSError: No such run, a corrupted file, or a configuration that this version of afdslib would name otherwise.
    """
    id = _find(id, store)
    file = _store(store) / id / "config.json"
    config = from_json(_read_json(file, id))
    if run_id(config) != id:
        raise AFDSError(f"run {id} was started by another version of afdslib; delete it with: afds runs rm {id}")
    return config


def resume(id: str, *, store: str | Path | None = None) -> Result:
    """Continues the run `id` (a unique beginning is enough) from its last checkpoint, or returns its result.

    The module that defines its configuration must have been imported.
    """
    return get_or_run(load_config(id, store=store), store=store)


def finished(id: str, *, store: str | Path | None = None) -> tuple[Any, Result]:
    """Configuration and result of a finished run, in the store or among the committed results.

    Raises:
        AFDSError: no such run, several, an unfinished or a corrupted one.
    """
    folder = _store(store)
    known = folder.is_dir() and any((path / "result.json").is_file() for path in folder.glob(f"{id}*"))
    if not known and re.fullmatch(r"[0-9a-f]{1,12}", id):
        files = sorted(paths.results("any").parent.glob(f"*/runs/{id}*.json"))
        if len({file.stem for file in files}) == 1:
            record = _read_result(files[0], files[0].stem, committed=True)
            return from_json(record["config"]), Result(record["id"], record["metrics"], files[0].parent)
    id = _find(id, store)
    result = _stored(folder, id, ())
    if result is None:
        raise AFDSError(f"run {id} is not finished; finish it first with: afds resume {id}")
    return load_config(id, store=store), result


@dataclass(frozen=True)
class Summary:
    """One line of `afds runs list`.

    Attributes:
        state: "finished", "running", "interrupted" (resumable) or "corrupted".
        steps: Optimiser steps taken, as reported by a finished run, else None.
        seconds: Wall clock up to the end or the last checkpoint.
        known: Whether this version of afdslib defines the kind.
    """

    id: str
    kind: str
    state: str
    steps: int | None
    seconds: float | None
    path: Path
    known: bool


def list_runs(store: str | Path | None = None) -> list[Summary]:
    """All runs of a store, oldest first. Runs of unknown kind and corrupted ones are listed, too."""
    folder = _store(store)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _ID.fullmatch(path.name) and path.is_dir()]
    return [_summary(path) for path in sorted(found, key=lambda path: (path.stat().st_mtime, path.name))]


def _summary(path: Path) -> Summary:
    id, kind, state, steps, seconds = path.name, "?", "interrupted", None, None
    try:
        kind = str(_read_json(path / "config.json", id).get("class", "?"))
        if (path / "result.json").exists():
            state = "finished"
            steps = _steps(_read_result(path / "result.json", id))
        elif _is_locked(path.parent, id):
            state = "running"
    except (AFDSError, OSError):
        state = "corrupted"
    try:
        seconds = float(json.loads((path / "times.json").read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return Summary(id, kind, state, steps, seconds, path, kind in _registry)


def show(id: str, *, store: str | Path | None = None) -> dict[str, Any]:
    """Everything small about a run: state, configuration, metrics, environment, times and files with their bytes."""
    id = _find(id, store)
    path = _store(store) / id
    shown: dict[str, Any] = {"id": id, "state": _summary(path).state, "path": str(path)}
    for name in ("config", "result", "environment", "times"):
        if (path / f"{name}.json").exists():
            shown[name] = _read_json(path / f"{name}.json", id)
    files = sorted(path.iterdir()) if path.is_dir() else []
    shown["files"] = {file.name: file.stat().st_size for file in files if file.is_file()}
    return shown


def remove(id: str, *, store: str | Path | None = None) -> Path:
    """Deletes a run's folder, whatever is in it.

    Raises:
        AFDSError: No such run, or a process is computing it.
    """
    id = _find(id, store)
    folder = _store(store)
    with _locked(folder, id, wait=False):
        trash = folder / f".{id}.{uuid.uuid4().hex[:8]}.removed"
        try:
            os.rename(folder / id, trash)  # gone at once, even if deleting is interrupted
            shutil.rmtree(trash)
        except OSError as error:
            raise AFDSError(f"cannot delete {folder / id}: {error.strerror}; mend its permissions") from error
    return folder / id


def steps_by_kind(store: str | Path | None = None) -> dict[str, int]:
    """Optimiser steps of the finished runs of a store, summed by kind of run (kinds that report "steps" only)."""
    total: dict[str, int] = {}
    for summary in list_runs(store):
        if summary.steps is not None:
            total[summary.kind] = total.get(summary.kind, 0) + summary.steps
    return total


def computed_steps(store: str | Path | None = None) -> int:
    """Optimiser steps really taken in a store: 0 tells that every number came from somewhere else."""
    return sum(steps_by_kind(store).values())


def require_training(store: str | Path | None = None) -> dict[str, int]:
    """Optimiser steps by kind, if every kind of training took some.

    Raises:
        AFDSError: Nothing was trained in this store: the numbers came from somewhere else.
    """
    steps = steps_by_kind(store)
    idle = sorted(kind for kind, number in steps.items() if number == 0)
    if idle or not steps:
        what = f"{', '.join(idle)} took no training step" if idle else "no training step was taken"
        raise AFDSError(f"{what} in {_store(store)}, so nothing was computed here; start from an empty run store")
    return steps


def environment() -> dict[str, Any]:
    """Device and versions of this process: recorded with every run, never part of its identity."""
    import torch

    from afdslib.base.bf16 import has_instructions

    versions = {}
    for package in ("afdslib", "lightning", "numpy", "pandas", "scikit-learn", "torch", "torchvision"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "bf16_instructions": has_instructions(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "versions": versions,
    }


def _cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def folder(store: str | Path | None = None) -> Path:
    """The folder of all runs: the given one, or `paths.runs()`."""
    return _store(store)


def _store(store: str | Path | None) -> Path:
    return Path(store).expanduser().resolve() if store is not None else paths.runs()


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AFDSError(
            f"cannot make the folder {path}: {error.strerror}; mend its permissions or set AFDS_RUNS to another folder"
        ) from error


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise AFDSError(f"cannot delete {path}: {error.strerror}; mend the permissions of its folder") from error


def _lock_file(store: Path, id: str) -> Path:
    return store / ".locks" / f"{id}.lock"  # outside the run's folder, which may be deleted under the lock


@contextmanager
def _locked(store: Path, id: str, *, wait: bool = True) -> Iterator[None]:
    """Holds the run's lock, which the system releases when the process dies, however it dies."""
    import filelock

    file = _lock_file(store, id)
    _make_folder(file.parent)
    lock = filelock.FileLock(file)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if not wait:
            raise BusyError(f"run {id} is being computed by another process; stop that one first") from None
        _log.warning("waiting for run %s, which another process is computing", id)
        lock.acquire()
    except OSError as error:
        raise AFDSError(
            f"cannot lock {file}: {error.strerror}; mend its permissions or set AFDS_RUNS to another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _is_locked(store: Path, id: str) -> bool:
    import filelock

    if not _lock_file(store, id).exists():
        return False
    try:
        with filelock.FileLock(_lock_file(store, id), timeout=0):
            return False
    except filelock.Timeout:
        return True
    except OSError:  # a read-only store is not being written
        return False


def _stored(store: Path, id: str, needs: Sequence[str]) -> Result | None:
    path = store / id
    if not (path / "result.json").exists() or not all((path / name).is_file() for name in needs):
        return None
    return Result(id, _read_result(path / "result.json", id)["metrics"], path)


def _committed_file(id: str) -> Path | None:
    if os.environ.get("AFDS_FRESH", "") not in ("", "0"):
        return None
    return next(iter(sorted(paths.results("any").parent.glob(f"*/runs/{id}.json"))), None)


def _committed(id: str) -> Result | None:
    file = _committed_file(id)
    return Result(id, _read_result(file, id, committed=True)["metrics"], file.parent) if file else None


def _read_json(file: Path, id: str, *, committed: bool = False) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        value = None
    except ValueError:  # also invalid UTF-8
        value = None
    if not isinstance(value, dict):
        raise AFDSError(_corrupted(file, id, committed))
    return value


def _read_result(file: Path, id: str, *, committed: bool = False) -> dict[str, Any]:
    record = _read_json(file, id, committed=committed)
    if record.get("id") != id or not isinstance(record.get("metrics"), dict) or "kind" not in record:
        raise AFDSError(_corrupted(file, id, committed))
    return record


def _corrupted(file: Path, id: str, committed: bool) -> str:
    if committed:
        return f"{file} is corrupted; restore it with: git checkout -- {file}"
    return f"{file} is missing or corrupted; delete the run with: afds runs rm {id}"


def _find(id: str, store: str | Path | None) -> str:
    """The one run whose id begins with `id`."""
    folder = _store(store)
    if not re.fullmatch(r"[0-9a-f]{1,12}", id):
        raise AFDSError(f"{id!r} is not a run id; see the ids with: afds runs list")
    found = [path.name for path in folder.glob(f"{id}*") if _ID.fullmatch(path.name)] if folder.is_dir() else []
    if len(found) != 1:
        what = "no run" if not found else f"{len(found)} runs"
        raise AFDSError(f"{what} in {folder} begin with {id!r}; see the ids with: afds runs list")
    return found[0]


def _steps(record: dict[str, Any]) -> int | None:
    steps = record["metrics"].get("steps")
    return int(steps) if isinstance(steps, (int, float)) and not isinstance(steps, bool) else None


def _plain(value: Any) -> Any:
    """JSON-able data: numpy and torch numbers and arrays become lists and numbers, NaN and infinity null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a metric is {value!r}, a {type(value).__name__}, which JSON cannot hold")
