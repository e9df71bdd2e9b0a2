"""Imports run down the floors of the packages, as pyproject.toml has them, and docs/architecture.md names each."""

import re

from importlinter.cli import lint_imports

from afdslib.base import paths


def test_the_page_names_every_package():
    page = (paths.root() / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = {folder.parent.name for folder in (paths.root() / "afdslib").glob("*/__init__.py")}
    assert len(packages) == 12 and set(re.findall(r"^\| \d \| `(\w+)/?", page, re.MULTILINE)) >= packages


def test_no_import_runs_up_or_across(monkeypatch):
    monkeypatch.chdir(paths.root())
    assert lint_imports(no_cache=True) == 0
