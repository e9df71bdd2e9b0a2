"""Results of finished runs, and the two files of a profile in which those of the real studies are committed.

`data/results/<profile>/runs.jsonl` holds a line per run, sorted by id. What many runs share is written once: a nested
configuration that is a run itself is `{"run": id}` and has a line of its own (without metrics if only its descendants
were published); environments and the columns of learning curves have lines of their own above the runs; a dictionary of
dictionaries with the same keys, such as the figures of each layer, is `{"columns": keys, "rows": lists by name}`.
`curves.csv` is the learning curves of all runs in one table; a row ends with its last value.
`publish` is the only writer of both.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afdslib.base import paths
from afdslib.base.atomic import write_text
from afdslib.base.errors import AFDSError
from afdslib.runs import config as configs

if TYPE_CHECKING:
    import pandas

__all__ = ["MODEL", "Result", "committed", "history", "publish", "read_json", "read_result", "records", "seconds"]

_RUNS, _CURVES = "runs.jsonl", "curves.csv"
MODEL = "model.safetensors"
"""The artifact that of a committed run may be kept, under the run's id, in data/weights/."""
_LINE = re.compile(r'\{"(id|environment|columns)":"([0-9a-f]+)",')
_Curves = tuple[list[str], dict[str, list[str]]]  # the header's names after the run's, and the lines of each run


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        id: See `run_id`.
        metrics: What `execute` returned, as read back from JSON: tuples are lists, keys strings, NaN and infinity None.
        path: The run's folder; for a committed result that of its profile, without checkpoint and artifacts.
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

        if self.committed:
            return history(self.id, self.path.name)
        file = self.path / "metrics.csv"
        return pandas.read_csv(file) if file.exists() else pandas.DataFrame()

    def artifact(self, name: str) -> Path:
        """The path of a file that the run wrote.

        Raises:
            AFDSError: The file is not there, as for most committed results.
        """
        file = self._file(name)
        if file.is_file():
            return file
        if self.committed and name == MODEL:
            raise AFDSError(
                f"the network of run {self.id} is not kept as {file}; its history may hold it (git log -- {file} names "
                f"the commit that removed it, and git show 'COMMIT~:./{file.name}' there has it), else train it anew "
                "with AFDS_FRESH=1"
            )
        raise AFDSError(f"run {self.id} has no {name} in {self.path}; recompute it with AFDS_FRESH=1")

    def has(self, names: Sequence[str]) -> bool:
        """Whether all these artifacts are there."""
        return all(self._file(name).is_file() for name in names)

    def _file(self, name: str) -> Path:
        return paths.weights() / f"{self.id}.safetensors" if self.committed and name == MODEL else self.path / name


def seconds(result: Result) -> float | None:
    """Wall-clock time of a run, all its sessions together; None where it was not kept."""
    try:
        if result.committed:
            return float(_open(result.path / _RUNS).record(result.id)["times"]["seconds"])
        return float(json.loads((result.path / "times.json").read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ----------------------------------------------------------------------------------------------------------- reading


class _Records:
    """The lines of one `runs.jsonl`, each decoded when it is asked for."""

    def __init__(self, file: Path, lines: Sequence[str] = ()) -> None:
        self.file = file
        self.lines: dict[str, dict[str, str]] = {"environment": {}, "columns": {}, "id": {}}
        for line in lines:
            match = _LINE.match(line)
            if match is None:
                raise AFDSError(_corrupted(file))
            self.lines[match[1]][match[2]] = line

    def _decoded(self, kind: str, key: Any) -> dict[str, Any]:
        try:
            value: dict[str, Any] = json.loads(self.lines[kind][key])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise AFDSError(_corrupted(self.file)) from None
        return value

    def config(self, id: str) -> dict[str, Any]:
        """The whole configuration of a run, as `to_json(config, hashed_only=True)` gave it."""
        config = self._decoded("id", id).get("config")
        if not isinstance(config, dict):
            raise AFDSError(_corrupted(self.file))
        return {key: self._whole(value) for key, value in config.items()}

    def _whole(self, value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) == {"run"}:
                return self.config(value["run"])
            return {key: self._whole(item) for key, item in value.items()}
        return [self._whole(item) for item in value] if isinstance(value, list) else value

    def holds(self, id: str) -> bool:
        """Whether the run's result is here, and not only its configuration."""
        return id in self.lines["id"] and '"metrics":' in self.lines["id"][id]

    def record(self, id: str) -> dict[str, Any]:
        """What `publish` recorded: id, kind, version, config, metrics, environment, times."""
        record = self._decoded("id", id)
        if not isinstance(record.get("metrics"), dict) or not isinstance(record.get("kind"), str):
            raise AFDSError(_corrupted(self.file))
        record["metrics"] = _unpack(record["metrics"])
        record["config"] = self.config(id)
        record["environment"] = self._decoded("environment", record.get("environment")).get("value")
        record.pop("columns", None)
        return record

    def columns(self, id: str) -> list[str]:
        """The columns of the run's learning curve in their order; empty if it has none."""
        key = self._decoded("id", id).get("columns") if id in self.lines["id"] else None
        return [] if key is None else list(self._decoded("columns", key)["value"])


def _stamp(file: Path) -> tuple[int, int, int]:
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _lines(file: Path) -> list[str]:
    try:
        *lines, rest = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        rest = "?"
    if rest or not lines:
        raise AFDSError(_corrupted(file))
    return lines


@lru_cache(maxsize=16)
def _read(file: Path, stamp: tuple[int, int, int]) -> _Records:
    return _Records(file, _lines(file))


def _open(file: Path) -> _Records:
    """The records of a file; an empty one if it does not exist."""
    return _read(file, _stamp(file)) if file.exists() else _Records(file)


@lru_cache(maxsize=16)
def _read_curves(file: Path, stamp: tuple[int, int, int]) -> _Curves:
    header, *lines = _lines(file)
    found: dict[str, list[str]] = {}
    for line in lines:
        found.setdefault(line.partition(",")[0], []).append(line)
    return next(csv.reader([header]), [""])[1:], found


def _open_curves(file: Path) -> _Curves:
    return _read_curves(file, _stamp(file)) if file.exists() else ([], {})


def _files(profile: str | None = None) -> list[Path]:
    """The files of committed runs; none with AFDS_FRESH."""
    if os.environ.get("AFDS_FRESH", "") not in ("", "0"):
        return []
    return sorted(paths.results("any").parent.glob(f"{profile or '*'}/{_RUNS}"))


def records(profile: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Profile and record (id, kind, version, config, metrics, environment, times) of each committed run.

    Args:
        profile: Only those of one profile.

    Raises:
        AFDSError: A file is corrupted.
    """
    for file in sorted(paths.results("any").parent.glob(f"{profile or '*'}/{_RUNS}")):
        one = _open(file)
        yield from ((file.parent.name, one.record(id)) for id in one.lines["id"] if one.holds(id))


def committed(id: str) -> tuple[Result, dict[str, Any]] | None:
    """The committed result of a run and its record, or None. AFDS_FRESH hides all of them.

    Raises:
        AFDSError: A file is corrupted.
    """
    for file in _files():
        if _open(file).holds(id):
            record = _open(file).record(id)
            return Result(id, record["metrics"], file.parent), record
    return None


def committed_ids(prefix: str = "") -> list[str]:
    """Ids of the committed results that begin so, sorted."""
    opened = [_open(file) for file in _files()]
    return sorted({id for one in opened for id in one.lines["id"] if id.startswith(prefix) and one.holds(id)})


def history(id: str, profile: str | None = None) -> pandas.DataFrame:
    """The learning curve of a committed run, as it was logged; empty if the run logged none."""
    import pandas

    text = curve(id, profile)
    return pandas.read_csv(io.StringIO(text)) if text else pandas.DataFrame()


def curve(id: str, profile: str | None = None) -> str:
    """The `metrics.csv` of a committed run; empty if there is none."""
    for file in sorted(paths.results("any").parent.glob(f"{profile or '*'}/{_CURVES}")):
        names, lines = _open_curves(file)
        if id in lines:
            rows = [dict(zip(names, next(csv.reader([line]))[1:], strict=False)) for line in lines[id]]
            columns = _open(file.with_name(_RUNS)).columns(id)
            text = io.StringIO()
            writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            return text.getvalue()
    return ""


def read_json(file: Path, id: str) -> dict[str, Any]:
    """A JSON object of a run's folder.

    Raises:
        AFDSError: The file is missing or corrupted.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):  # ValueError: also invalid UTF-8
        value = None
    if not isinstance(value, dict):
        raise AFDSError(_damaged(file, id))
    return value


def read_result(path: Path, id: str) -> dict[str, Any]:
    """The `result.json` of a run's folder; raises as `read_json`."""
    record = read_json(path / "result.json", id)
    if record.get("id") != id or not isinstance(record.get("metrics"), dict) or "kind" not in record:
        raise AFDSError(_damaged(path / "result.json", id))
    return record


def read_config(path: Path, id: str) -> Any:
    """The configuration of a run's folder.

    Raises:
        AFDSError: A missing or corrupted file, or a configuration that this version of afdslib would name otherwise.
    """
    config = configs.from_json(read_json(path / "config.json", id))
    if configs.run_id(config) != id:
        raise AFDSError(f"run {id} was started by another version of afdslib; delete it with: afds runs rm {id}")
    return config


def _damaged(file: Path, id: str) -> str:
    return f"{file} is missing or corrupted; delete the run with: afds runs rm {id}"


def _corrupted(file: Path) -> str:
    return f"{file} is corrupted; restore it with: git checkout -- {file}"


# ----------------------------------------------------------------------------------------------------------- writing


def publish(results: Iterable[Result], profile: str) -> Path:
    """Adds finished results to `data/results/<profile>/runs.jsonl` and `curves.csv`, to be committed.

    Recorded are id, kind, version, configuration (without unhashed fields such as folders), metrics, device, versions
    and wall-clock time. What is there stays: a run that is recorded is passed over (with AFDS_FRESH, which hides the
    committed results, it is replaced), and so is a result that comes from the committed files.

    Returns:
        The file of the runs.

    Raises:
        AFDSError: A file is corrupted or cannot be written.
    """
    import filelock

    folder = paths.results(profile)
    file = folder / _RUNS
    new = {result.id: result for result in results if not result.committed}
    if not new:
        return file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".lock"):
            kept = _open(file) if _files(profile) else None
            _merge(folder, [result for id, result in sorted(new.items()) if kept is None or not kept.holds(id)])
    except OSError as error:
        raise AFDSError(f"cannot write {folder}: {error.strerror}; mend its permissions") from error
    return file


def _merge(folder: Path, results: Sequence[Result]) -> None:
    if not results:
        return
    known = _open(folder / _RUNS)
    lines = {kind: dict(old) for kind, old in known.lines.items()}
    names, curves = _open_curves(folder / _CURVES)
    names, curves = list(names), dict(curves)

    def shared(kind: str, value: Any) -> str:
        """Its key among the values that are written once."""
        key = sha256(_json(value).encode()).hexdigest()[:8]
        lines[kind][key] = f'{{"{kind}":"{key}","value":{_json(value)}}}'
        return key

    def flat(config: Any, top: bool = True) -> Any:
        """The configuration with a reference in place of each nested run, which gets a line of its own."""
        if isinstance(config, list):
            return [flat(item, False) for item in config]
        if not isinstance(config, dict):
            return config
        value = {key: flat(item, False) for key, item in config.items()}
        if top or not configs.is_kind_of_run(configs.known(config.get("class"))):
            return value
        id = configs.id_of(config)
        lines["id"].setdefault(id, f'{{"id":"{id}","config":{_json(value)}}}')
        return {"run": id}

    for result in results:
        record = read_result(result.path, result.id)
        config = configs.to_json(read_config(result.path, result.id), hashed_only=True)
        fields = {"kind": record["kind"], "version": record["version"], "config": flat(config)}
        fields["environment"] = shared("environment", read_json(result.path / "environment.json", result.id))
        if (taken := seconds(result)) is not None:
            fields["times"] = {"seconds": taken}
        curves.pop(result.id, None)
        log = result.path / "metrics.csv"
        if log.exists():
            columns, *rows = list(csv.reader(io.StringIO(log.read_text(encoding="utf-8"))))
            fields["columns"] = shared("columns", columns)
            names += [name for name in columns if name not in names]
            curves[result.id] = [_row(result.id, dict(zip(columns, row, strict=False)), names) for row in rows]
        fields["metrics"] = _pack(record["metrics"])
        text = ",".join(f'"{key}":{_json(value)}' for key, value in fields.items())
        lines["id"][result.id] = f'{{"id":"{result.id}",{text}}}'
    if curves:  # before the runs: a curve without its run counts for nothing
        table = [_row("run", {name: name for name in names}, names)]
        table += [row for id in sorted(curves) for row in curves[id]]
        write_text(folder / _CURVES, "".join(f"{row}\n" for row in table))
    write_text(folder / _RUNS, "".join(f"{line}\n" for kind in lines.values() for _, line in sorted(kind.items())))


def _row(id: str, cells: dict[str, str], names: Sequence[str]) -> str:
    """A line of `curves.csv`: the cells in the order of its columns, up to the last that is filled."""
    values = [id, *(cells.get(name, "") for name in names)]
    while values[-1] == "":
        values.pop()
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def _pack(value: Any) -> Any:
    """JSON data with each dictionary of dictionaries of the same keys as columns and rows."""
    if isinstance(value, list):
        return [_pack(item) for item in value]
    if not isinstance(value, dict):
        return value
    first = next(iter(value.values()), None)
    if len(value) > 1 and isinstance(first, dict) and len(first) > 1:
        if all(isinstance(item, dict) and set(item) == set(first) for item in value.values()):
            columns = sorted(first)
            return {"columns": columns, "rows": {k: [item[c] for c in columns] for k, item in value.items()}}
    return {key: _pack(item) for key, item in value.items()}


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"columns", "rows"}:
        return {key: dict(zip(value["columns"], row, strict=True)) for key, row in value["rows"].items()}
    return {key: _unpack(item) for key, item in value.items()}
