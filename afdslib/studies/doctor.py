"""What this machine offers: versions, devices, the kernel, folders and data sets, as rows of a table."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

from afdslib.base import paths

__all__ = ["examine"]

Row = tuple[str, str, str]
"""Subject, verdict ("ok", "missing", "problem" or ""), detail."""

_PACKAGES = ("afdslib", "torch", "torchvision", "lightning", "numpy", "papermill", "nbconvert", "ipykernel")


def examine(data_dir: str | Path | None = None) -> list[Row]:
    """Looks at everything a study needs. Downloads nothing, starts no kernel, leaves no file.

    Args:
        data_dir: A folder with archives or trees to look in, as for `afds run --data-dir`.
    """
    kernel: Row = ("kernel", "ok", "notebooks run in this python, whatever kernelspecs are installed")
    if importlib.util.find_spec("ipykernel") is None:
        kernel = ("kernel", "missing", "install ipykernel in this environment")
    return [*_versions(), *_devices(), kernel, *_folders(), *_data_sets(data_dir)]


def _versions() -> list[Row]:
    rows: list[Row] = [("python", "ok", f"{sys.version.split()[0]} ({sys.executable})")]
    for package in _PACKAGES:
        try:
            rows.append((package, "ok", importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "missing", "install the environment with: make test"))
    return rows


def _devices() -> list[Row]:
    if importlib.util.find_spec("torch") is None:
        return [("device", "missing", "torch is not installed")]
    import torch

    from afdslib.runs import environment

    facts = environment()
    rows: list[Row] = [("cpu", "ok", f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads")]
    for index, name in enumerate(facts["gpus"]):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        rows.append((f"gpu {index}", "ok", f"{name}, {memory:.0f} GiB, CUDA {facts['cuda']}"))
    return rows if facts["gpus"] else [*rows, ("gpu", "", "none; studies run on the CPU")]


def _folders() -> list[Row]:
    rows = []
    folders = {"run store": paths.runs(), "figures": paths.figures("demo").parent, "raw data": paths.raw_data()}
    for name, folder in (folders | {"cache": paths.cache()}).items():
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
            free = shutil.disk_usage(existing).free / 2**30
            rows.append((name, "ok", f"{folder} ({free:.0f} GiB free)"))
        except OSError as error:
            rows.append((name, "problem", f"{folder} cannot be written ({error.strerror}): mend its permissions"))
    if paths.fresh():
        rows.append(("committed results", "", "ignored, as AFDS_FRESH is set"))
    return rows


def _data_sets(data_dir: str | Path | None) -> list[Row]:
    from afdslib.data import catalogue, fetch

    rows: list[Row] = []
    for name in catalogue.NAMES:
        spec = catalogue.SETS[name]
        folders = fetch.places(spec.base, data_dir)
        verdict, detail = ("missing", "") if spec.layouts else ("ok", "embedded in scikit-learn")
        for layout in spec.layouts:
            tree = [folder for folder in folders if all((folder / marker).exists() for marker in layout.markers)]
            files = [fetch.find(remote, folders) for remote in layout.remotes]
            if tree or None not in files:
                verdict, detail = "ok", str(tree[0] if tree else files[0])
                break
            absent = [remote.file for remote, file in zip(layout.remotes, files, strict=True) if file is None]
            detail = f"{', '.join(absent)} (afds data {name})"
        rows.append((name, verdict, detail))
    return rows
