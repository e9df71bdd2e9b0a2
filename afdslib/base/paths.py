"""Every folder of the project and whether committed results are hidden, read from the environment in one place.

The root is `AFDS_HOME`, else the checkout this package lies in, else (an installed copy) the user's data folder for
runs and figures and the user's cache folder for data sets, both named afds, as the platform has them.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

__all__ = ["root", "runs", "raw_data", "cache", "results", "weights", "figures", "fresh", "notebooks"]


def _variable(name: str) -> Path | None:
    return Path(os.environ[name]).expanduser().resolve() if os.environ.get(name) else None


def _project() -> Path | None:
    """`AFDS_HOME`, else the checkout; None for an installed copy."""
    folder = Path(__file__).resolve().parents[2]
    checkout = (folder / "pyproject.toml").is_file() and (folder / "notebooks").is_dir()
    return _variable("AFDS_HOME") or (folder if checkout else None)


def root() -> Path:
    """The project's root folder."""
    return _project() or platformdirs.user_data_path("afds", appauthor=False)


def runs() -> Path:
    """The run store (`AFDS_RUNS`, else `runs/`): not committed."""
    return _variable("AFDS_RUNS") or root() / "runs"


def _data() -> Path:
    project = _project()
    return project / "data" if project else platformdirs.user_cache_path("afds", appauthor=False)


def raw_data() -> Path:
    """Downloaded archives and extracted trees: never modified, never committed."""
    return _data() / "raw"


def cache() -> Path:
    """Decoded image arrays, rebuilt from the raw data at any time."""
    return _data() / "cache"


def results(profile: str) -> Path:
    """Committed results of the real studies of one profile."""
    return root() / "data" / "results" / profile


def weights() -> Path:
    """Committed networks (safetensors) with their model cards."""
    return root() / "data" / "weights"


def figures(profile: str) -> Path:
    """Figures, executed notebooks and the HTML report of one profile (below `AFDS_FIGURES`, else `figures/`)."""
    return (_variable("AFDS_FIGURES") or root() / "figures") / profile


def notebooks() -> Path:
    """The notebooks of the report."""
    return root() / "notebooks"


def fresh() -> bool:
    """Whether AFDS_FRESH is set: then everything is computed anew, as if nothing were committed."""
    return os.environ.get("AFDS_FRESH", "") not in ("", "0")
