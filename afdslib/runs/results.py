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
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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

__all__ = ["MODEL", "Result", "committed", "publish", "recorded", "records", "seconds"]

_RUNS, _CURVES = "runs.jsonl", "curves.csv"
MODEL = "model.safetensors"
"""The artifact that of a committed run may be kept, under the run's id, in data/weights/."""


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

        file = self.path / "metrics.csv"
        text = curve(self.id, self.path) if self.committed else file.read_text("utf-8") if file.exists() else ""
        with _reading(file):
            return pandas.read_csv(io.StringIO(text)) if text else pandas.DataFrame()

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
        file = result.path / "times.json"
        times = recorded(result)["times"] if result.committed else read_json(file, result.id)
        taken = float(times["seconds"])
        return taken if math.isfinite(taken) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ----------------------------------------------------------------------------------------------------------- reading


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
    """One of the two files of a profile as it is now; see `_parse_runs` and `_parse_curves`."""
    try:
        stat = (folder / name).stat()
    except FileNotFoundError:
        return {"environment": {}, "columns": {}, "id": {}} if name == _RUNS else {}
    with _reading(folder / name):
        parse = _parse_runs if name == _RUNS else _parse_curves
        return parse(folder / name, (stat.st_mtime_ns, stat.st_size, stat.st_ino))


@lru_cache(maxsize=16)
def _parse_runs(file: Path, stamp: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """The lines by their first key (id, environment or columns) and its value."""
    parsed: dict[str, dict[str, Any]] = {"environment": {}, "columns": {}, "id": {}}
    for text in _lines(file):
        line = json.loads(text)
        kind, *_ = line
        if not isinstance(key := line.pop(kind), str):
            raise ValueError("no key")
        parsed[kind][key] = line
    for line in parsed["id"].values():
        parts = (line["config"], line.get("metrics", {}), line.get("times", {}))
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError("no record")
    return parsed


@lru_cache(maxsize=16)
def _parse_curves(file: Path, stamp: tuple[int, ...]) -> dict[str, list[str]]:
    """The lines of each run, and under "run" the header."""
    parsed: dict[str, list[str]] = {}
    for line in _lines(file):
        parsed.setdefault(line.partition(",")[0], []).append(line)
    return parsed


def _lines(file: Path) -> list[str]:
    *lines, rest = file.read_text(encoding="utf-8").split("\n")
    if rest or not lines:
        raise ValueError("cut off")
    return lines


def _folders(profile: str | None = None) -> list[Path]:
    return sorted(file.parent for file in paths.results("any").parent.glob(f"{profile or '*'}/{_RUNS}"))


def _record(runs: dict[str, dict[str, Any]], id: str) -> dict[str, Any]:
    """What `publish` recorded of a run: id, kind, version, config, metrics, environment, times."""
    record = {"id": id, **runs["id"][id], "config": _whole(runs, id)}
    record["environment"] = runs["environment"][record["environment"]]["value"]
    record["metrics"] = _unpack(record["metrics"])
    record.pop("columns", None)
    return record


def _whole(runs: dict[str, dict[str, Any]], id: str) -> dict[str, Any]:
    """The whole configuration of a run, as `to_json(config, hashed_only=True)` gave it."""

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) == {"run"}:
                return _whole(runs, value["run"])
            return {key: whole(item) for key, item in value.items()}
        return [whole(item) for item in value] if isinstance(value, list) else value

    return {key: whole(value) for key, value in runs["id"][id]["config"].items()}


def records(profile: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Profile and record (id, kind, version, config, metrics, environment, times) of each committed run.

    Args:
        profile: Only those of one profile.

    Raises:
        AFDSError: A file is corrupted.
    """
    for folder in _folders(profile):
        runs = _load(folder, _RUNS)
        with _reading(folder / _RUNS):
            found = [_record(runs, id) for id, line in runs["id"].items() if "metrics" in line]
            if not all(isinstance(record.get("kind"), str) for record in found):
                raise ValueError("a run without its kind")
        yield from ((folder.name, record) for record in found)


def committed(prefix: str, profile: str | None = None) -> list[Result]:
    """The committed results (of one profile) whose ids begin so; with AFDS_FRESH, which hides them, none.

    Raises:
        AFDSError: A file is corrupted.
    """
    results: dict[str, Result] = {}
    for folder in [] if os.environ.get("AFDS_FRESH", "") not in ("", "0") else _folders(profile):
        lines = _load(folder, _RUNS)["id"]
        ids = [prefix] if len(prefix) == 12 else [id for id in lines if id.startswith(prefix)]
        for id in ids:
            if "metrics" in lines.get(id, ()):
                with _reading(folder / _RUNS):
                    results.setdefault(id, Result(id, _unpack(lines[id]["metrics"]), folder))
    return list(results.values())


def recorded(result: Result) -> dict[str, Any]:
    """The record of a committed result; see `records`."""
    runs = _load(result.path, _RUNS)
    with _reading(result.path / _RUNS):
        return _record(runs, result.id)


def curve(id: str, folder: Path) -> str:
    """The `metrics.csv` of a committed run; empty if there is none."""
    runs, curves = _load(folder, _RUNS), _load(folder, _CURVES)
    key = runs["id"].get(id, {}).get("columns")
    if key is None or id not in curves:
        return ""
    text = io.StringIO()
    with _reading(folder):
        header, *rows = csv.reader([*curves["run"], *curves[id]])
        writer = csv.DictWriter(text, runs["columns"][key]["value"], "", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(dict(zip(header[1:], row[1:], strict=False)) for row in rows)
    return text.getvalue()


def read_json(file: Path, id: str) -> dict[str, Any]:
    """A JSON object of a run's folder.

    Raises:
        AFDSError: The file is missing or corrupted.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(value, allow_nan=False)  # infinity and NaN are no JSON
    except (FileNotFoundError, ValueError, RecursionError):  # ValueError: also invalid UTF-8
        value = None
    if not isinstance(value, dict):
        raise AFDSError(_damaged(file, id))
    return value


def read_result(path: Path, id: str) -> dict[str, Any]:
    """The `result.json` of a run's folder; raises as `read_json`."""
    record = read_json(path / "result.json", id)
    if record.get("id") != id or not isinstance(record.get("metrics"), dict) or not {"kind", "version"} <= set(record):
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
        record = read_result(result.path, result.id)
        config = flat(configs.to_json(read_config(result.path, result.id), hashed_only=True), top=True)
        line = {"kind": record["kind"], "version": record["version"], "config": _sorted(config)}
        line["environment"] = shared("environment", read_json(result.path / "environment.json", result.id))
        if (taken := seconds(result)) is not None:
            line["times"] = {"seconds": taken}
        curves.pop(result.id, None)
        log = result.path / "metrics.csv"
        if log.exists():
            columns, *rows = list(csv.reader(io.StringIO(log.read_text(encoding="utf-8"))))
            line["columns"] = shared("columns", columns)
            names += [name for name in columns if name not in names]
            cells = [dict(zip(columns, row, strict=False)) for row in rows]
            curves[result.id] = [_row([result.id, *(row.get(name, "") for name in names)]) for row in cells]
        lines["id"][result.id] = line | {"metrics": _sorted(_pack(record["metrics"]))}
    if curves:  # before the runs: a curve without its run counts for nothing
        table = [_row(["run", *names]), *(row for id in sorted(curves) for row in curves[id])]
        write_text(folder / _CURVES, "".join(f"{row}\n" for row in table))
    text = [_json({kind: key, **lines[kind][key]}) for kind in lines for key in sorted(lines[kind])]
    write_text(folder / _RUNS, "".join(f"{line}\n" for line in text))


def _row(cells: list[str]) -> str:
    """A line of `curves.csv`, up to the last cell that is filled."""
    while cells[-1] == "":
        cells.pop()
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()


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
        columns, rows = value["columns"], value["rows"]
        return {key: dict(zip(columns, _unpack(row), strict=True)) for key, row in rows.items()}
    return {key: _unpack(item) for key, item in value.items()}
