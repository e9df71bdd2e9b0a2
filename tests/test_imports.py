"""Imports run down the floors of the packages; the contract is in pyproject.toml."""

from importlinter.cli import lint_imports


def test_no_import_runs_up_or_across(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    assert lint_imports(no_cache=True) == 0
