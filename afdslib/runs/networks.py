"""What a study keeps: its tables, the results of its runs, and networks with a model card."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import pandas as pd

from afdslib import runs
from afdslib.base import paths
from afdslib.base.atomic import atomic_path, write_text
from afdslib.experiments.afs import MODEL

__all__ = ["Keeper", "keep_network", "keep_networks"]


class Kept(Protocol):
    """A profile, as far as it says what is kept."""

    @property
    def name(self) -> str: ...
    @property
    def budget(self) -> str: ...
    @property
    def committed(self) -> bool: ...


P = TypeVar("P", bound=Kept)


class Keeper(Generic[P]):
    """Of a study: results of real ones are kept as small files to be committed; those of the demo never are."""

    profile: P

    def folder(self) -> Path:
        """Where the tables go: data/results/<profile>/<budget> for real studies, the figures' folder for the demo."""
        p = self.profile
        return paths.results(p.name) / p.budget if p.committed else paths.figures(p.name)

    def _write(self, name: str, table: pd.DataFrame) -> None:
        with atomic_path(self.folder() / f"{name}.csv") as part:
            table.to_csv(part, index=False, float_format="%.6g", lineterminator="\n")

    def _publish(self, result: runs.Result) -> runs.Result:
        if self.profile.committed:
            runs.publish([result], self.profile.name)
        return result


def keep_network(result: runs.Result) -> None:
    """Copies a run's network to data/weights/<run id>.safetensors."""
    kept = paths.weights() / f"{result.id}.safetensors"
    if result.artifact(MODEL) != kept:
        with atomic_path(kept) as part:
            shutil.copyfile(result.artifact(MODEL), part)


CARD = """# Networks of the {title} {profile}, budget {budget}

Written by `{command}`. Load one with `afdslib.afs.load(path)`.

| file (.safetensors) | network | test accuracy | measured MACs |
|---|---|---|---|
{rows}

- **Trained on** {data}.
- **Settings**: `{shown} --show`. Results with device and versions:
  `data/results/{profile}/runs/<id>.json`.
- **For** checking and extending this study. Images of 32 px, normalised with ImageNet's mean and deviation.
- **Not for** any decision about people or safety; the data sets have their own licences and biases.
"""


def keep_networks(
    networks: Sequence[tuple[str, runs.Result]],
    profile: Kept,
    *,
    title: str,
    command: str,
    shown: str,
    data: str,
    suffix: str = "",
) -> Path:
    """Copies networks to data/weights/, beside a card of them all.

    Args:
        networks: name for readers and result, the network among its artifacts.
        profile: whose networks these are.
        title: of the study, in the card's heading.
        command: that writes them.
        shown: the command whose `--show` tells the settings.
        data: what they were trained on.
        suffix: of the card's name after profile and budget.

    Returns:
        The folder.
    """
    rows = []
    for name, result in networks:
        keep_network(result)
        m = result.metrics
        accuracy = f"{m['test_accuracy']:.4f}" if "test_accuracy" in m else "published weights"
        # Points of the sweep store shares of the dense MACs; the sources store MACs.
        macs = f"{m['macs']:.3f} of dense" if "dense_macs" in m else f"{m['macs'] / 1e6:.1f} M" if "macs" in m else ""
        rows.append(f"| `{result.id}` | {name} | {accuracy} | {macs} |")
    card = CARD.format(
        title=title, profile=profile.name, budget=profile.budget, command=command, shown=shown, data=data,
        rows="\n".join(rows),
    )  # fmt: skip
    write_text(paths.weights() / f"{profile.name}-{profile.budget}{suffix}.md", card)
    return paths.weights()
