from pathlib import Path

import pytest
import torch

# Tiny networks are slower on more threads, and numbers are compared bitwise.
torch.set_num_threads(1)

# These take longest. Begun last, they would leave the other processes without work.
LONGEST = (
    "test_studies_comparison", "test_report", "test_distributed", "test_checks", "test_experiments_afs", "test_export",
)  # fmt: skip


def pytest_collection_modifyitems(items):
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
