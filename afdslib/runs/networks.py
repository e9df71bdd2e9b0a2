"""Networks of committed profiles that are kept in data/weights/, with one model card per profile."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from afdslib.base import paths
from afdslib.base.atomic import atomic_path, write_text
from afdslib.runs.results import MODEL, Result
from afdslib.runs.store import finished

__all__ = ["keep_networks"]

_CARD = """# Networks of {profile}

Load one with `afdslib.afs.load(path)`. A network whose last column names a commit is in the history only:
`git show COMMIT:data/weights/RUN.safetensors > data/weights/RUN.safetensors`. Without it, a study that starts from it
trains it anew.

| run | network | trained on | test accuracy | MACs | file |
|---|---|---|---|---|---|
{rows}

- **Settings, device and versions** of a network: `afds runs show RUN`.
- **For** checking and extending these studies. Images of 32 px, normalised with ImageNet's mean and deviation.
- **Not for** any decision about people or safety; the data sets have their own licences and biases.
"""


def keep_networks(networks: Iterable[tuple[str, Result]], profile: str) -> Path:
    """Copies networks to data/weights/<run id>.safetensors and adds them to the card of their profile, which it gives.

    `networks` are a name for readers and a result each, the network among its artifacts.
    """
    card = paths.weights() / f"{profile}.md"
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    rows = {id: line for line, id in re.findall(r"^(\| `([0-9a-f]{12})` \|.*)$", text, re.MULTILINE)}
    for name, result in networks:
        kept, source = paths.weights() / f"{result.id}.safetensors", result.artifact(MODEL)
        if source != kept:
            with atomic_path(kept) as part:
                shutil.copyfile(source, part)
        config, m = finished(result.id, store=None if result.committed else result.path.parent)[0], result.metrics
        data = getattr(config.data, "title", config.data.name)
        accuracy = f"{m['test_accuracy']:.4f}" if "test_accuracy" in m else "published weights"
        # Points of the sweep store shares of the dense MACs; the sources store MACs.
        macs = f"{m['macs']:.3f} of dense" if "dense_macs" in m else f"{m['macs'] / 1e6:.1f} M" if "macs" in m else ""
        rows[result.id] = f"| `{result.id}` | {name} | {data} | {accuracy} | {macs} | here |"
    write_text(card, _CARD.format(profile=profile, rows="\n".join(rows.values())))
    return card
