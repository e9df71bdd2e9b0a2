"""Writes docs/api.md: the public names that are used outside their package, with signature and first paragraph.

make api
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import afdslib

HOME = Path(__file__).resolve().parents[1]
FILE = HOME / "docs" / "api.md"
HEAD = """# The library's public names

Written by `make api` from the docstrings: do not edit. Here are the names that the README, the notebooks, the examples
or another package use, each once, in the first module that gives it; the docstrings themselves (`help(name)`) have
arguments, shapes, errors and sources.
"""


def modules() -> list[ModuleType]:
    """The public modules, packages before what they hold."""
    names = [info.name for info in pkgutil.walk_packages(afdslib.__path__, "afdslib.")]
    public = [name for name in names if not any(part.startswith("_") for part in name.split("."))]
    return [importlib.import_module(name) for name in sorted(public)]


def paragraph(text: str | None) -> str:
    """The first paragraph, as one line."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


class _Text:
    """An annotation that is shown as it was written, without the quotes of one that is not evaluated."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _plain(annotation: Any) -> Any:
    text = getattr(annotation, "__forward_arg__", annotation)
    return _Text(text) if isinstance(text, str) else annotation


def signature(name: str, value: Any) -> str:
    """How a thing is called; of a class its construction, of an exception or a plain value the name."""
    if inspect.isclass(value) and issubclass(value, BaseException) or not callable(value):
        return name
    try:
        found = inspect.signature(value)
    except (ValueError, TypeError):
        return name
    inputs = [p.replace(annotation=_plain(p.annotation)) for p in found.parameters.values()]
    result = inspect.Signature.empty if inspect.isclass(value) else _plain(found.return_annotation)
    text = f"{name}{found.replace(parameters=inputs, return_annotation=result)}"
    # Functions as defaults by their names, without addresses; lambdas and factories as dots.
    text = re.sub(r"<(?:built-in )?function (<lambda>|[\w.]+)(?: at 0x[0-9a-f]+)?>", r"\1", text)
    return text.replace("<lambda>", "...").replace("<factory>", "...")


def comments(module: ModuleType) -> dict[str, str]:
    """The strings that follow assignments at the top of a module: the docstrings of its constants."""
    found = {}
    for one, after in itertools.pairwise(ast.parse(inspect.getsource(module)).body):
        match one, after:
            case (
                ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                found[name] = text
    return found


def words() -> dict[str, set[str]]:
    """The words of each package's code, and under "" those of README, notebooks, examples and the command line."""
    found: dict[str, set[str]] = {}
    for file in (f for folder in ("README.md", "notebooks", "examples", "afdslib") for f in _files(HOME / folder)):
        parts = file.relative_to(HOME).parts
        package = parts[1] if parts[0] == "afdslib" and len(parts) > 2 else ""
        found.setdefault(package, set()).update(re.findall(r"\w+", file.read_text(encoding="utf-8")))
    return found


def _files(place: Path) -> list[Path]:
    return [place] if place.is_file() else [f for kind in ("py", "ipynb", "md") for f in place.rglob(f"*.{kind}")]


def render() -> str:
    """The page."""
    parts, seen, used = [HEAD], set(), words()
    for module in modules():
        lines = []
        package = module.__name__.split(".")[1]
        outside = set().union(*(some for name, some in used.items() if name != package))
        said = comments(module)
        for name in (name for name in getattr(module, "__all__", ()) if name in outside):
            value = getattr(module, name)
            documented = inspect.isclass(value) or inspect.isroutine(value)
            # A constant has no home of its own; it is told where it is assigned.
            if documented and (id(value) in seen or not value.__module__.startswith("afdslib")):
                continue
            if not documented and name not in said:
                continue
            seen.add(id(value))
            text = paragraph(value.__doc__ if documented else said[name])
            shown = signature(name, value) if documented else name
            lines.append(f"- `{shown}`" + (f": {text}" if text else ""))
        if lines:
            parts.append(f"## {module.__name__}\n\n{paragraph(module.__doc__)}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
    print(f"written to {FILE.relative_to(FILE.parents[1])}")
