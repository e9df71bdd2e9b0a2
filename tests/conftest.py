import os
from pathlib import Path

import pytest
import torch

from afdslib import cli

# Tiny networks are slower on more threads, and numbers are compared bitwise.
torch.set_num_threads(1)

# These take longest. Begun last, they would leave the other processes without work.
LONGEST = (
    "test_studies_comparison", "test_report", "test_distributed", "test_checks", "test_experiments_afs", "test_export",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    if os.environ.get("AFDS_ROBUST") != "full":  # variants that `make robust` tries
        items[:] = [item for item in items if item.get_closest_marker("exhaustive") is None]
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty project, which is the working folder."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("AFDS_HOME", str(folder))
    for name in ("AFDS_RUNS", "AFDS_FIGURES", "AFDS_FRESH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refused(capsys):
    """Runs a command that must be refused: exit code 2 and one line beside those of progress; gives its sentence."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        code = cli.main(list(arguments))
        output, errors = capsys.readouterr()
        lines = [line for line in errors.splitlines() if not line.startswith(("source", "AFS source", "l2 seed"))]
        assert code == 2 and not output and len(lines) == 1 and lines[0].startswith("afds: "), (code, output, errors)
        return lines[0]

    return run
