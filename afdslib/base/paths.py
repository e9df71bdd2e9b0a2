"""Every folder of the project, derived in one place.

The root is the checkout this package is installed from (an editable install), or the environment variable
`AFDS_HOME`. Notebooks and the command line are run from different working directories, so nothing may depend on it.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["root", "runs", "raw_data", "cache", "results", "weights", "figures", "notebooks"]


def root() -> Path:
    """The project's root folder (`AFDS_HOME`, else the checkout)."""
    home = os.environ.get("AFDS_HOME")
    return Path(home).expanduser().resolve() if home else Path(__file__).resolve().parents[2]


def runs() -> Path:
    """The run store (`AFDS_RUNS`, else `runs/`): not committed."""
    store = os.environ.get("AFDS_RUNS")
    return Path(store).expanduser().resolve() if store else root() / "runs"


def raw_data() -> Path:
    """Downloaded archives and extracted trees: never modified, never committed."""
    return root() / "data" / "raw"


def cache() -> Path:
    """Decoded image arrays, rebuilt from the raw data at any time."""
    return root() / "data" / "cache"


def results(profile: str) -> Path:
    """Committed results of the real studies of one profile."""
    return root() / "data" / "results" / profile


def weights() -> Path:
    """Committed networks (safetensors) with their model cards."""
    return root() / "data" / "weights"


def figures(profile: str) -> Path:
    """Figures, executed notebooks and the HTML report of one profile (below `AFDS_FIGURES`, else `figures/`)."""
    folder = os.environ.get("AFDS_FIGURES")
    return (Path(folder).expanduser().resolve() if folder else root() / "figures") / profile


def notebooks() -> Path:
    """The notebooks of the report."""
    return root() / "notebooks"
