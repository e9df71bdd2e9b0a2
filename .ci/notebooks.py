"""Executes the notebooks in place, with their default parameters, and stores what holds on any machine.

    make notebooks
    make notebooks ONLY="04 08"    # on the runs that the last whole execution has left

Kept: outputs and execution counts 1..n. Dropped: stderr, times, and what the machine adds to the metadata.
"""

import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from afdslib.base import paths
from afdslib.base.atomic import write_text
from afdslib.report import pipeline

EXTRA_KEYS = "metadata.papermill cell.metadata.papermill cell.metadata.execution metadata.language_info.version"


def execute(file: Path) -> None:
    """Runs one notebook as nbval does, in its own folder, and writes it back."""
    node = nbformat.read(file, as_version=4)
    NotebookClient(
        node,
        timeout=1800,
        kernel_manager_class=pipeline.kernel_manager(),
        resources={"metadata": {"path": file.parent}},
    ).execute()
    for cell in node.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    node.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    write_text(file, nbformat.writes(node, version=4) + "\n")
    strip = [sys.executable, "-m", "nbstripout", "--keep-output", "--keep-count", "--extra-keys", EXTRA_KEYS]
    subprocess.run([*strip, str(file)], check=True)


for notebook in pipeline.notebooks(paths.notebooks()):
    if sys.argv[1:] and notebook.stem[:2] not in sys.argv[1:]:
        continue
    started = time.monotonic()
    execute(notebook)
    print(f"{notebook.name}: {time.monotonic() - started:.0f} s", flush=True)
