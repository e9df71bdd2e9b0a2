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
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from afdslib.base import paths
from afdslib.base.atomic import write_text
from afdslib.base.errors import AFDSError
from afdslib.runs import config as configs

if TYPE_CHECKING:
    import pandas

__all__ = ["MODEL", "Result", "committed", "publish", "recorded", "records", "seconds"]

_RUNS, _CURVES = "runs.jsonl", "curves.csv"
MODEL = "model.safetensors"
"""The artifact that of a committed run may be kept, under the run's id, in data/weights/."""


@dataclass(frozen=True)
class Result:
    """A finished run."""

    id: str
    metrics: dict[str, Any]  # of `execute`, as read from JSON: tuples are lists, keys strings, NaN and infinity None
    path: Path  # its folder; for a committed result that of its profile, without checkpoint and artifacts

    @property
    def committed(self) -> bool:
        """Whether the result comes from `data/results/` and not from the run store."""
        return self.path.name != self.id

    def history(self) -> pandas.DataFrame:
        """The logged rows (learning curves), empty if the run logged none."""
        import pandas

        if self.committed:
            return _curve(self.id, self.path)
        file = self.path / "metrics.csv"
        with _reading(file):
            return pandas.read_csv(file) if file.exists() and file.stat().st_size else pandas.DataFrame()

    def artifact(self, name: str) -> Path:
        """The path of a file that the run wrote; AFDSError if it is not there, as for most committed results."""
        file = self._file(name)
        if file.is_file():
            return file
        if self.committed and name == MODEL:
            raise AFDSError(
                f"the network of run {self.id} is not kept as {file}; git log -- {file} may name the commit that "
                f"removed it (then git show 'COMMIT~:./{file.name}' has it), else train it anew with AFDS_FRESH=1"
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
        times = recorded(result)["times"] if result.committed else read_json(result.path / "times.json", result.id)
        taken = float(times["seconds"])
        return taken if math.isfinite(taken) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns what a damaged file leads to into one sentence."""
    try:
        yield
    except AFDSError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # also invalid UTF-8
        raise AFDSError(f"{file} is corrupted; restore it with: git checkout -- {file}") from error


def _load(folder: Path, name: str) -> dict[str, Any]:
    """Of runs the lines by first key (id, environment, columns) and its value, of curves those of a run or "run"."""
    file = folder / name
    if not file.exists():
        return {"environment": {}, "columns": {}, "id": {}} if name == _RUNS else {}
    stat = file.stat()
    with _reading(file):
        return _parse(file, (stat.st_mtime_ns, stat.st_size, stat.st_ino))


@lru_cache(maxsize=32)
def _parse(file: Path, stamp: tuple[int, ...]) -> dict[str, Any]:
    *lines, rest = file.read_text(encoding="utf-8").split("\n")
    if rest or not lines:
        raise ValueError("cut off")
    parsed: dict[str, Any] = {}
    if file.name == _CURVES:
        for line in lines:
            parsed.setdefault(line.partition(",")[0], []).append(line)
        return parsed
    parsed = {"environment": {}, "columns": {}, "id": {}}
    for entry in map(json.loads, lines):
        kind, *_ = entry
        if not isinstance(key := entry.pop(kind), str):
            raise ValueError("no key")
        parsed[kind][key] = entry
    parts = [part for line in parsed["id"].values() for part in (line["config"], line.get("metrics", {}))]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError("no record")
    return parsed


def _folders(profile: str | None = None) -> list[Path]:
    return sorted(file.parent for file in paths.results("any").parent.glob(f"{profile or '*'}/{_RUNS}"))


def recorded(result: Result) -> dict[str, Any]:
    """The record of a committed result; see `records`."""
    runs, id = _load(result.path, _RUNS), result.id
    with _reading(result.path / _RUNS):
        record = {"id": id, **runs["id"][id], "config": _whole(runs["id"], {"run": id})}
        record["environment"] = runs["environment"][record["environment"]]["value"]
        record["metrics"] = _unpack(record["metrics"])
        record.pop("columns", None)
        if not isinstance(record["kind"], str) or not isinstance(record.get("times", {}), dict):
            raise ValueError("no record")
        return record


def _whole(lines: dict[str, Any], value: Any) -> Any:
    """A configuration with each reference replaced by what it names, as `to_json(config, hashed_only=True)` gave it."""
    if isinstance(value, list):
        return [_whole(lines, item) for item in value]
    if not isinstance(value, dict):
        return value
    value = lines[value["run"]]["config"] if set(value) == {"run"} else value
    return {key: _whole(lines, item) for key, item in value.items()}


def records(profile: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Profile and record (id, kind, version, config, metrics, environment, times) of each committed run."""
    for folder in _folders(profile):
        ids = [id for id, line in _load(folder, _RUNS)["id"].items() if "metrics" in line]
        yield from [(folder.name, recorded(Result(id, {}, folder))) for id in ids]


def committed(prefix: str, profile: str | None = None, *, hidden: bool = False) -> list[Result]:
    """The committed results (of one profile) whose ids begin so; with AFDS_FRESH, none unless `hidden`."""
    results: dict[str, Result] = {}
    for folder in [] if paths.fresh() and not hidden else _folders(profile):
        lines = _load(folder, _RUNS)["id"]
        for id in [prefix] if len(prefix) == 12 else [id for id in lines if id.startswith(prefix)]:
            if "metrics" in lines.get(id, ()):
                with _reading(folder / _RUNS):
                    results.setdefault(id, Result(id, _unpack(lines[id]["metrics"]), folder))
    return list(results.values())


def _curve(id: str, folder: Path) -> pandas.DataFrame:
    """The `metrics.csv` of a committed run; empty if there is none."""
    import pandas

    runs, curves = _load(folder, _RUNS), _load(folder, _CURVES)
    key = runs["id"].get(id, {}).get("columns")
    if key is None or id not in curves:
        return pandas.DataFrame()
    with _reading(folder):
        text = io.StringIO("\n".join([*curves["run"], *curves[id]]))
        return pandas.read_csv(text, index_col=False, dtype={"run": str})[runs["columns"][key]["value"]]


def read_json(file: Path, id: str) -> dict[str, Any]:
    """A JSON object of a run's folder, checked further if it is `result.json`; AFDSError if missing or corrupted."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(value, allow_nan=False)  # infinity and NaN are no JSON
    except (FileNotFoundError, ValueError, RecursionError):  # ValueError: also invalid UTF-8
        value = None
    whole = isinstance(value, dict)
    if whole and file.name == "result.json":
        whole = value.get("id") == id and isinstance(value.get("metrics"), dict) and {"kind", "version"} <= set(value)
    if not whole:
        raise AFDSError(f"{file} is missing or corrupted; delete the run with: afds runs rm {id}")
    return value


def read_config(path: Path, id: str) -> Any:
    """The configuration of a run's folder; AFDSError also if this version of afdslib would name it otherwise."""
    config = configs.from_json(read_json(path / "config.json", id))
    if configs.run_id(config) != id:
        raise AFDSError(f"run {id} was started by another version of afdslib; delete it with: afds runs rm {id}")
    return config


def publish(results: Iterable[Result], profile: str) -> Path:
    """Adds finished results to `data/results/<profile>/runs.jsonl` and `curves.csv`, to be committed.

    Recorded are id, kind, version, configuration (without unhashed fields such as folders), metrics, device, versions
    and wall-clock time. A run that is recorded already is passed over (with AFDS_FRESH, which hides the committed
    results, it is replaced), and so is a result that comes from the committed files. Gives the file of the runs.

    Raises:
        AFDSError: A file is corrupted or cannot be written.
    """
    folder = paths.results(profile)
    file = folder / _RUNS
    new = {result.id: result for result in results if not result.committed}
    try:
        if new:
            folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder / ".lock"):
                _merge(folder, [result for id, result in sorted(new.items()) if not committed(id, profile)])
    except OSError as error:
        raise AFDSError(f"cannot write {folder}: {error.strerror}; mend its permissions") from error
    return file


def _merge(folder: Path, results: Sequence[Result]) -> None:
    if not results:
        return
    lines = {kind: dict(old) for kind, old in _load(folder, _RUNS).items()}
    curves = dict(_load(folder, _CURVES))
    names = next(csv.reader(curves.pop("run", ["run"])))[1:]

    def shared(kind: str, value: Any) -> str:
        """Its key among the values that are written once."""
        key = sha256(_json(_sorted(value)).encode()).hexdigest()[:8]
        lines[kind][key] = {"value": _sorted(value)}
        return key

    def flat(value: Any, top: bool = False) -> Any:
        """The configuration with a reference in place of each nested run, which gets a line of its own."""
        if isinstance(value, list):
            return [flat(item) for item in value]
        if not isinstance(value, dict):
            return value
        parts = {key: flat(item) for key, item in value.items()}
        if top or not configs.is_kind_of_run(configs.known(value.get("class"))):
            return parts
        id = configs.id_of(value)
        lines["id"].setdefault(id, {"config": _sorted(parts)})
        return {"run": id}

    for result in results:
        record = read_json(result.path / "result.json", result.id)
        config = flat(configs.to_json(read_config(result.path, result.id), hashed_only=True), top=True)
        line = {"kind": record["kind"], "version": record["version"], "config": _sorted(config)}
        line["environment"] = shared("environment", read_json(result.path / "environment.json", result.id))
        if (taken := seconds(result)) is not None:
            line["times"] = {"seconds": taken}
        curves.pop(result.id, None)
        log = result.path / "metrics.csv"
        if log.exists() and log.stat().st_size:
            columns, *rows = list(csv.reader(io.StringIO(log.read_text(encoding="utf-8"))))
            line["columns"] = shared("columns", columns)
            names += [name for name in columns if name not in names]
            cells = [dict(zip(columns, row, strict=False)) for row in rows]
            curves[result.id] = _csv([result.id, *(row.get(name, "") for name in names)] for row in cells)
        lines["id"][result.id] = line | {"metrics": _sorted(_pack(record["metrics"]))}
    if curves:  # before the runs: a curve without its run counts for nothing
        table = [*_csv([["run", *names]]), *(row for id in sorted(curves) for row in curves[id])]
        write_text(folder / _CURVES, "".join(f"{row}\n" for row in table))
    text = [_json({kind: key, **lines[kind][key]}) for kind in lines for key in sorted(lines[kind])]
    write_text(folder / _RUNS, "".join(f"{line}\n" for line in text))


def _csv(rows: Iterable[list[str]]) -> list[str]:
    """Lines of `curves.csv`, each up to the last cell that is filled."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return [line.rstrip(",") for line in text.getvalue().split("\n")[:-1]]


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def _sorted(value: Any) -> Any:
    """JSON data with all keys in order."""
    return json.loads(json.dumps(value, sort_keys=True, allow_nan=False))


def _pack(value: Any) -> Any:
    """JSON data with each dictionary of dictionaries of the same keys as columns and rows."""
    if isinstance(value, list):
        return [_pack(item) for item in value]
    if not isinstance(value, dict):
        return value
    rows = list(value.values())
    if len(rows) > 1 and all(isinstance(row, dict) and len(row) > 1 and set(row) == set(rows[0]) for row in rows):
        columns = sorted(rows[0])
        return {"columns": columns, "rows": {key: [row[c] for c in columns] for key, row in value.items()}}
    return {key: _pack(item) for key, item in value.items()}


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"columns", "rows"}:
        columns, rows = value["columns"], value["rows"]
        return {key: dict(zip(columns, _unpack(row), strict=True)) for key, row in rows.items()}
    return {key: _unpack(item) for key, item in value.items()}
