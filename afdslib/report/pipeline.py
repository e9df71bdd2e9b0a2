"""Executes the notebooks of the report in order, each as one stage, and renders the last one to HTML.

A stage is finished when its marker `executed/<notebook>.json` holds the stage's key:

    key = sha256(cells of the notebook, its parameters, sources of afdslib, references.bib, key of the stage before)

A changed notebook, parameter or line of the library executes that stage and all later ones again (which is cheap: the
training inside comes from the run store), and an interrupted report goes on after its last finished stage. Kernels run
in the caller's working directory, for a relative `data_dir`.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import secrets
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afdslib.base import paths
from afdslib.base.atomic import atomic_path, write_json, write_text
from afdslib.base.errors import AFDSError
from afdslib.report import layout

__all__ = ["NotebookStage", "convert", "execute", "kernel_manager", "notebooks", "parameters_of", "plan", "render"]

_LAST = "afds-last-cell"


@dataclass(frozen=True)
class NotebookStage:
    """One notebook with the parameters of one profile."""

    notebook: Path
    parameters: dict[str, Any]  # those given for this notebook, converted to the types of its defaults
    key: str  # identity of everything the stage depends on (see the module)
    executed: Path  # the executed copy
    log: Path  # text output of the cells, and the traceback of a failure
    marker: Path  # JSON file with the key, written when the stage is finished

    @property
    def finished(self) -> bool:
        """Whether the stage was finished with just this key."""
        try:
            marker = json.loads(self.marker.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(marker, dict) and marker.get("key") == self.key and self.executed.is_file()


def notebooks(folder: str | Path | None = None) -> list[Path]:
    """The notebooks of the report in their order: `NN_name.ipynb`; without one an AFDSError."""
    folder = Path(folder) if folder is not None else paths.notebooks()
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise AFDSError(f"no notebook named like 01_name.ipynb in {folder}; use a complete checkout or set AFDS_HOME")
    return found


def parameters_of(notebook: str | Path) -> dict[str, Any]:
    """Names and defaults of a notebook's parameters: the plain literals of its one cell tagged `parameters`.

    AFDSError for what is no notebook, has no such cell or several, or a statement that is not `name = literal`.
    """
    node = _read(notebook := Path(notebook))
    cells = [cell for cell in node.cells if "parameters" in cell.metadata.get("tags", []) and cell.cell_type == "code"]
    if len(cells) != 1:
        raise AFDSError(f"{notebook.name} has {len(cells)} code cells tagged 'parameters'; it needs exactly one")
    try:
        statements = ast.parse(cells[0].source).body
    except SyntaxError as error:
        raise AFDSError(f"the parameters cell of {notebook.name} is no Python (line {error.lineno}); mend it") from None
    defaults: dict[str, Any] = {}
    for statement in statements:
        single = [statement.target] if isinstance(statement, ast.AnnAssign) else []
        try:
            (target,) = statement.targets if isinstance(statement, ast.Assign) else single
            defaults[target.id] = ast.literal_eval(statement.value)  # type: ignore[attr-defined]
            json.dumps(defaults)  # sets, bytes and complex numbers cannot be recorded
        except (AttributeError, ValueError, TypeError):
            line = (ast.get_source_segment(cells[0].source, statement) or "?").splitlines()[0]
            form = f"the parameters cell of {notebook.name} may hold only lines like name = literal"
            raise AFDSError(f"{form}, not {line!r}") from None
    return defaults


def convert(name: str, default: Any, value: Any) -> Any:
    """A parameter's value in the type of its default; strings, as the command line gives them, are parsed.

    An integer is taken for a float, a string for nothing but a string. A default of None takes any literal. AFDSError
    where the value does not fit, or is not finite.
    """
    kind, parsed = type(default), value
    if isinstance(value, str) and kind is not str:
        truth = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        try:
            read: dict[type, Callable[[str], Any]] = {
                bool: lambda text: truth.get(text.strip().lower()),
                int: int,
                float: float,
            }
            parsed = read.get(kind, lambda text: ast.literal_eval(text.strip()))(value)
        except (ValueError, SyntaxError):
            parsed = value if default is None else None
    if kind is float and isinstance(parsed, int) and not isinstance(parsed, bool):
        parsed = float(parsed)
    if default is not None and type(parsed) is not kind:
        raise AFDSError(f"parameter {name} = {value!r} must be of type {kind.__name__}, like its default {default!r}")
    if isinstance(parsed, float) and parsed - parsed != 0:
        raise AFDSError(f"parameter {name} = {value!r} must be a finite number")
    return parsed


def plan(
    profile: str, parameters: Mapping[str, Any] | None = None, *, only: Collection[str] | None = None,
    folder: str | Path | None = None
) -> list[NotebookStage]:  # fmt: skip
    """The stages of a profile, checked, in order. Starts nothing and writes nothing.

    Args:
        profile: Goes to every notebook as its parameter `profile` and names the output folder.
        parameters: More values by name, each for every notebook that has a parameter of that name.
        only: The numbers of the notebooks in the folder to execute, such as "06"; by default all.

    Raises:
        AFDSError: A name or number that no notebook has, a value of the wrong type, an unreadable notebook.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", profile):
        raise AFDSError(f"{profile!r} cannot name a profile; use letters, digits, '-', '_' and '.'")
    given = {**(parameters or {}), "profile": profile}
    target, key, known = paths.figures(profile) / "executed", _library_hash(), set[str]()
    stages, numbers = [], [notebook.name[:2] for notebook in notebooks(folder)]
    if missing := sorted(set(only or ()) - set(numbers)):
        raise AFDSError(f"there is no notebook {missing[0]!r}; there are: {', '.join(numbers)}")
    for notebook in notebooks(folder):
        defaults = parameters_of(notebook)
        if "profile" not in defaults:
            raise AFDSError(f"{notebook.name} has no parameter 'profile'; add it to the cell tagged 'parameters'")
        known.update(defaults)
        if only is not None and notebook.name[:2] not in only:
            continue
        values = {name: convert(name, defaults[name], value) for name, value in given.items() if name in defaults}
        cells = [(cell.cell_type, cell.source) for cell in _read(notebook).cells]
        key = hashlib.sha256(json.dumps([key, notebook.name, cells, values], sort_keys=True).encode()).hexdigest()[:16]
        log, marker = (target / f"{notebook.stem}{suffix}" for suffix in (".log", ".json"))
        stages.append(NotebookStage(notebook, values, key, target / notebook.name, log, marker))
    if unknown := sorted(set(given) - known):
        raise AFDSError(f"no notebook has a parameter {unknown[0]!r}; there are: {', '.join(sorted(known))}")
    return stages


def _library_hash() -> str:
    """Changes with every source file of afdslib, not only those in Python, and with the references."""
    folder = Path(__file__).resolve().parents[1]
    files = [file for file in folder.rglob("*") if file.suffix in (".py", ".cpp", ".css", ".toml")]
    files += [file for file in [folder.parent / "references.bib"] if file.is_file()]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.relative_to(folder.parent).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _read(notebook: Path) -> Any:
    import nbformat

    try:
        return nbformat.read(notebook, as_version=4)
    except FileNotFoundError:
        raise AFDSError(f"the notebook {notebook} does not exist; run from a complete checkout") from None
    except (ValueError, KeyError, TypeError, AttributeError, nbformat.ValidationError) as error:
        raise AFDSError(f"{notebook} is not a notebook ({_one_line(error, 80)}); restore it") from error


def execute(
    profile: str, parameters: Mapping[str, Any] | None = None, *, only: Collection[str] | None = None,
    fresh: bool = False, verbose: bool = False, folder: str | Path | None = None, echo: Callable[[str], object] = print
) -> Path | None:  # fmt: skip
    """Executes the stages (see `plan`) that are not finished yet, or all if fresh, then renders the report.

    Args:
        verbose: Pass the cells' text output to stdout while it is written, not only to the log.
        echo: Takes one line at the start and the end of each stage.

    Returns:
        The HTML report, if the last notebook is among those executed.

    Raises:
        AFDSError: A bad parameter (before any kernel starts), a failed stage, another process at work on this profile.
    """
    stages = plan(profile, parameters, only=only, folder=folder)
    with _only_one(profile):
        for number, stage in enumerate(stages, 1):
            name = f"[{number}/{len(stages)}] {stage.notebook.stem}"
            fresh = fresh or not stage.finished
            if not fresh:
                echo(f"{name}: finished before")
                continue
            for later in stages[number - 1 :]:  # what follows is out of date from here on
                try:
                    later.marker.unlink(missing_ok=True)
                except OSError as error:
                    what = f"cannot write {later.marker.parent}: {error.strerror}"
                    raise AFDSError(f"{what}; mend its permissions") from error
            echo(f"{name}: log in {_short(stage.log)}")
            echo(f"{name}: done in {_execute_stage(stage, verbose):.0f} s")
        if stages[-1].notebook != notebooks(folder)[-1]:
            return None
        report = render(profile, folder=folder)
    echo(f"report: {_short(report)}")
    return report


@contextmanager
def _only_one(profile: str) -> Iterator[None]:
    """Holds a lock on the profile's output folder; it lies in the run store, since the output may be committed."""
    import filelock

    name = hashlib.sha256(str(paths.figures(profile)).encode()).hexdigest()[:12]
    file = paths.runs() / ".locks" / f"report-{name}.lock"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(file).acquire(timeout=0)
    except filelock.Timeout:
        raise AFDSError(f"another process is executing profile {profile}; wait for it or set AFDS_FIGURES") from None
    except OSError as error:
        raise AFDSError(f"cannot lock {file}: {error.strerror}; set AFDS_RUNS to a folder you can write") from error
    with lock:
        yield


def _execute_stage(stage: NotebookStage, verbose: bool) -> float:
    """Runs one notebook to its end and writes its marker. Returns the seconds it took."""
    import nbformat
    import papermill

    started = time.monotonic()
    token = secrets.token_hex(16)  # of a last, added cell: a killed kernel leaves every cell marked "completed"
    node = _read(stage.notebook)
    node.cells.append(nbformat.v4.new_code_cell(repr(token), metadata={"tags": [_LAST]}))
    source = stage.executed.with_name(f".{stage.notebook.stem}.source.ipynb")
    write_text(source, nbformat.writes(node, version=4))
    try:
        with open(stage.log, "w", encoding="utf-8") as log:
            output: Any = _Tee([log, sys.stdout]) if verbose else log
            papermill.execute_notebook(
                _unformatted(source), _unformatted(stage.executed), parameters=stage.parameters, kernel_name="python3",
                kernel_manager_class=kernel_manager(), progress_bar=False, stdout_file=output, stderr_file=output,
                start_timeout=120, iopub_timeout=60,  # a busy machine is no failure
            )  # fmt: skip
    except OSError as error:
        raise AFDSError(f"cannot write {stage.executed.parent}: {error.strerror or error}; free space there") from error
    except Exception as error:  # whatever stopped the kernel: papermill and nbclient have no common base class
        raise _failure(stage, error) from error
    finally:
        source.unlink(missing_ok=True)
    executed = _read(stage.executed)
    if not any(token in str(output.get("data", "")) for output in executed.cells[-1].get("outputs", [])):
        raise _failure(stage, RuntimeError("the notebook ended before its last cell"))
    # Without the added cell, and the folders and times that papermill notes: executed copies may be committed.
    executed.cells.pop()
    for cell in executed.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
    executed.metadata["papermill"] = {"input_path": stage.notebook.name, "parameters": stage.parameters}
    write_text(stage.executed, nbformat.writes(executed, version=4) + "\n")
    seconds = time.monotonic() - started
    write_json(stage.marker, {"key": stage.key, "parameters": stage.parameters, "seconds": round(seconds, 1)})
    return seconds


def _unformatted(path: Path) -> str:
    """Papermill formats paths like str.format, so braces must be doubled."""
    return str(path.resolve()).replace("{", "{{").replace("}", "}}")


def kernel_manager() -> type:
    """A kernel manager whose only kernel is this interpreter, even if another `python3` kernelspec is installed."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager

    class Manager(AsyncKernelManager):
        def _kernel_spec_manager_default(self) -> KernelSpecManager:
            return KernelSpecManager(parent=self, kernel_dirs=[])  # so only ipykernel's own is found

        def _transport_encryption_default(self) -> str:  # or every kernel warns of plain-text sockets
            return "auto"

    return Manager


class _Tee(list):
    """Text files that are written alike."""

    def write(self, text: str) -> None:
        for file in self:
            file.write(text)
            file.flush()

    def flush(self) -> None:
        """All is written."""


def _failure(stage: NotebookStage, error: Exception) -> AFDSError:
    """One sentence that names notebook, cell and log, into which the whole story goes."""
    from papermill.exceptions import PapermillExecutionError

    number, line = _failed_cell(stage)
    if isinstance(error, PapermillExecutionError):
        what, story = f"{error.ename}: {error.evalue}", str(error)
    elif type(error).__name__ == "DeadKernelError":
        what, story = "the kernel died, often for lack of memory", f"{error}\n"
    else:
        what = story = f"{type(error).__name__}: {error}"
    with suppress(OSError), open(stage.log, "a", encoding="utf-8") as log:  # the disk may be full
        log.write(story)
    cell = f"code cell {number} ({line!r})" if number else "its kernel"
    return AFDSError(f"{stage.notebook.name} failed in {cell}: {_one_line(what)}; see the log {_short(stage.log)}")


def _failed_cell(stage: NotebookStage) -> tuple[int, str]:
    """The number of the last code cell that was started, counted in the source notebook from 1, and its first line."""
    try:
        cells = _read(stage.executed).cells
    except (AFDSError, OSError):
        return 0, ""
    cells = [c for c in cells if c.cell_type == "code" and "injected-parameters" not in c.metadata.get("tags", [])]
    begun = [n for n, cell in enumerate(cells[:-1]) if cell.metadata.get("papermill", {}).get("start_time")]
    if not begun:
        return 0, ""
    return begun[-1] + 1, next((line for line in cells[begun[-1]].source.splitlines() if line.strip()), "")[:60]


def _one_line(error: object, length: int = 300) -> str:
    text = re.sub(r"\s+", " ", re.sub("\x1b\\[[0-9;]*m", "", str(error))).strip()
    return text if len(text) <= length else text[: length - 3] + "..."


def _short(path: Path) -> str:
    """A path relative to the working directory where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def render(profile: str, *, folder: str | Path | None = None) -> Path:
    """Writes `report.html`, the page that `layout` makes of the executed copy of the last notebook."""
    last = notebooks(folder)[-1]
    executed = paths.figures(profile) / "executed" / last.name
    if not executed.is_file() or not executed.with_suffix(".json").is_file():
        raise AFDSError(f"profile {profile} has no finished report yet; execute it with: afds run --profile {profile}")
    report = paths.figures(profile) / "report.html"
    page = layout.page(_read(executed), f"AFDS report: {profile}", folder=last.parent, figures=report.parent)
    with atomic_path(report) as part:
        part.write_text(page, encoding="utf-8")
    return report
