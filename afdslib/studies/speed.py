"""The network whose time is measured: ResNet-101, trained with AFDS on photographs and pruned by its own masks.

Its masks, not its weights, decide how long it takes, so they are what is written to data/results/speed/: anyone can
time the same network with `afds bench --case networks --masks FILE`. The weights (170 MB) stay in the run store.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from afdslib import afs, runs
from afdslib.afs.compact import masks
from afdslib.base import paths
from afdslib.base.atomic import write_json
from afdslib.base.errors import AFDSError
from afdslib.experiments import AFSSourceRun, DataSource, Network, SourceRun, TransferRun
from afdslib.runs import MODEL
from afdslib.studies import engine
from afdslib.training import Optimisation
from afdslib.training.objective import Regulariser

__all__ = ["Speed", "SpeedPlan"]


@dataclass(frozen=True)
class Speed:
    """What is trained: a plain network on the source data at 5 x `lr`, gates on the same data, then AFDS on the target.

    Attributes:
        source, target, per_class, size: the data sets; small images are enlarged to a side of `size` pixels.
        network, width: backbone, with the stem for photographs, and a factor on its channels.
        transfer_steps, tuning_steps: on the target, unpruned and at each later budget.
        budgets: shares of the dense MACs.
        multiple: kept channels are rounded to a multiple.
        stream: "coupled", residual streams narrow as a whole, or "free".
    """

    name: ClassVar = "speed"
    scale: ClassVar = "quick"
    committed: ClassVar = True
    source: str = "tiny-imagenet-32"
    target: str = "cifar10"
    per_class: int | None = 60
    network: str = "resnet101"
    width: float = 1.0
    size: int = 64
    source_steps: int = 1000
    afs_steps: int = 200
    transfer_steps: int = 400
    tuning_steps: int = 200
    batch_size: int = 32
    lr: float = 0.01
    budgets: tuple[float, ...] = (1.0, 0.5, 0.2, 0.1)
    multiple: int = 16
    stream: str = "coupled"
    precision: str = "bf16"
    seed: int = 0

    def runs(self, data_dir: str | None = None) -> list[TransferRun]:
        """The points of the sweep, in order. Channels go early in a stage, gates become constant late; d stays 1."""
        root = data_dir or ""
        source_data = DataSource(self.source, size=self.size, root=root)
        target_data = DataSource(self.target, per_class=self.per_class, seed=self.seed, size=self.size, root=root)
        network = Network(self.network, width=self.width, zero_init=True)
        plain = SourceRun(source_data, network, self._stage(self.source_steps, 5 * self.lr))
        gated = AFSSourceRun(plain, source_data, self._stage(self.afs_steps, self.lr))
        return [
            TransferRun(
                gated, target_data, Regulariser("afd", 0.01), self._stage(self.transfer_steps, self.lr),
                self._stage(self.tuning_steps, self.lr), self.budgets[: i + 1], delta_s=math.inf, density_floor=1.0,
                macs_images=64, seed=self.seed, multiple=self.multiple, stream=self.stream, first=0.02,
                freeze_first=False,
            )
            for i in range(len(self.budgets))
        ]  # fmt: skip

    def _stage(self, steps: int, lr: float) -> Optimisation:
        return Optimisation(
            steps=steps, batch_size=self.batch_size, lr=lr, schedule="cosine", warmup=0.05, predictor_lr=3.0,
            precision=self.precision, log_rows=2 if steps > 1 else 1,
        )  # fmt: skip


class SpeedPlan(engine.Plan):
    """The runs of the measured network; `publish` writes the masks of each pruned one.

    Args:
        data_dir: where the archives lie.
    """

    part = "speed"

    def __init__(self, data_dir: str | None = None):
        super().__init__(Speed())
        self.data_dir = data_dir

    def batches(self) -> Iterator[list[engine.Cell]]:
        """The points of the sweep."""
        yield [engine.Cell(c, "afds", {"budget": c.budgets[-1]}) for c in self.profile.runs(self.data_dir)]

    def files(self) -> Path:
        """Writes the masks of the finished networks to data/results/speed/.

        A file is JSON with the architecture, the masks ("0" removed, "s" static, "d" dynamic, one letter per channel),
        accuracy, MACs and the run's id.

        Raises:
            AFDSError: a run diverged, or none of the networks is finished.
        """
        written = None
        for cell, result in engine.cells(self):
            if result is not None and "diverged" in result.metrics:
                raise AFDSError(f"the study has no such network: {result.metrics['diverged']}")
            budget = cell.keys["budget"]
            # A published result may have come without its network.
            if budget < 1 and (result := runs.lookup(cell.config, needs=(MODEL,))) is not None:
                written = paths.results("speed") / f"{self.profile.network}-{1 / budget:g}x.json"
                written.parent.mkdir(parents=True, exist_ok=True)
                write_json(written, self._masks(budget, result))
        if written is None:
            raise AFDSError("no pruned network of the part speed is finished here; run: afds study --part speed")
        return written.parent

    def _masks(self, budget: float, result: runs.Result) -> dict[str, Any]:
        known = ("test_accuracy", "validation_accuracy", "macs", "dense_macs", "steps", "removed", "static", "dynamic")
        model, settings = afs.load(result.artifact(MODEL)), runs.to_json(self.profile)
        return {
            "architecture": model.architecture, "masks": masks(model), "budget": budget, "run": result.id,
            "metrics": {key: result.metrics[key] for key in known if key in result.metrics},
            "training": {key: value for key, value in settings.items() if key != "class"},
        }  # fmt: skip
