"""What a run may touch while it is computed: checkpoints, the log and the artifacts of its own folder."""

from __future__ import annotations

import csv
import errno
import importlib.metadata
import io
import json
import os
import platform
import re
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from afdslib.base.atomic import atomic_path, write_json, write_text
from afdslib.base.errors import AFDSError

__all__ = ["Run", "environment"]

_OWN_FILES = {"config.json", "environment.json", "metrics.csv", "checkpoint.pt", "times.json", "result.json"}


class Run:
    """What `execute` may touch: checkpoints, the log and artifacts of its folder `path`.

    `store` is the folder of all runs: pass it on when a run needs another one.
    """

    def __init__(self, id: str, path: Path, store: Path) -> None:
        self.id, self.path, self.store = id, path, store
        self.checkpoint_path = path / "checkpoint.pt"  # none before the first save and after the end
        self._rows: list[dict[str, Any]] | None = None  # of metrics.csv; None until it has been read
        self._since = time.monotonic()
        self._elsewhere = 0.0  # seconds in which it waited for runs that it needs; they have times of their own
        self._before = self._read_times()

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last saved state with its tensors on the CPU, or None; AFDSError if it is corrupted or holds code."""
        import torch

        file = self.checkpoint_path
        if not file.exists():
            return None
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()  # torch itself does not compare every checksum
            state = None if damaged else torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception:  # torch.load and zipfile raise many kinds for a damaged file
            state = None
        if not isinstance(state, dict):
            raise AFDSError(f"the checkpoint {file} is corrupted; delete the run with: afds runs rm {self.id}")
        return state

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replaces the checkpoint, with tensors and plain Python data, atomically; AFDSError if the disk is full."""
        self._save(self.checkpoint_path, lambda part: _torch_save(state, part))
        self._write_times()

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Turns the errors of `load_state_dict` into one sentence: the checkpoint belongs to another architecture."""
        try:
            yield
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, AFDSError):
                raise
            detail = textwrap.shorten(str(error), 160, placeholder="...")
            misfit = f"the checkpoint {self.checkpoint_path} does not fit this network ({detail})"
            raise AFDSError(f"{misfit}; delete the run with: afds runs rm {self.id}") from error

    def log(self, row: dict[str, Any]) -> None:
        """Adds scalars by name, with the optimiser step as "step", to `metrics.csv`; missing values stay empty."""
        if "step" not in row:
            raise ValueError("a logged row needs its 'step', or it could not be dropped when a killed run resumes")
        self._write_log([*self._logged(), {key: _cell(value) for key, value in row.items()}])

    def truncate_log(self, step: int) -> None:
        """Drops the rows after `step` (the step of the checkpoint), which the resumed run will log again."""
        if rows := self._logged():
            self._write_log([row for row in rows if float(row["step"]) <= step])

    def _logged(self) -> list[dict[str, Any]]:
        """The whole rows: half a line that a killed process may have left at the end never counts."""
        file = self.path / "metrics.csv"
        if self._rows is None and file.exists():
            text = file.read_text(encoding="utf-8", errors="replace")
            self._rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
        return self._rows or []

    def _write_log(self, rows: list[dict[str, Any]]) -> None:
        text, columns = io.StringIO(), dict.fromkeys(key for row in rows for key in row)
        writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path / "metrics.csv", text.getvalue() if rows else "")
        self._rows = rows

    def artifact(self, name: str) -> Path:
        """Where the file `name` of this run is or will be; ValueError if the store itself uses that name."""
        if not name or Path(name).name != name or name.startswith(".") or name in _OWN_FILES:
            raise ValueError(f"{name!r} cannot name an artifact; use a plain file name other than {sorted(_OWN_FILES)}")
        return self.path / name

    def write_artifact(self, name: str, writer: Callable[[Path], object]) -> Path:
        """Writes a file atomically: `writer(path)` fills a temporary one; AFDSError if the disk is full."""
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


def _torch_save(state: dict[str, Any], path: Path) -> None:
    import torch

    torch.save(state, path)


def _cell(value: Any) -> Any:
    """A scalar for the CSV: tensors and numpy numbers become Python numbers, line breaks never split a row."""
    value = value.item() if hasattr(value, "item") else value
    return re.sub(r"[\r\n]+", " ", value) if isinstance(value, str) else value


def environment() -> dict[str, Any]:
    """Device and versions of this process: recorded with every run, never part of its identity."""
    import torch

    from afdslib.base.cpu import has_bf16_instructions

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    cpu = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpu.read_text("utf-8") if cpu.exists() else "", re.MULTILINE)
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    packages = ("afdslib", "lightning", "numpy", "pandas", "scikit-learn", "torch", "torchvision")
    return {
        "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}",
        "cpu": model.group(1).strip() if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(), "bf16_instructions": has_bf16_instructions(), "threads": torch.get_num_threads(),
        "gpus": gpus, "cuda": torch.version.cuda if gpus else None,
        "versions": {package: version(package) for package in packages},
    }  # fmt: skip
