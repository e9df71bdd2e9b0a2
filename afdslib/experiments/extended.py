"""The competitors' start: the plain source network, trained for as many more source steps as AFS got."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from afdslib import afs, runs, training
from afdslib.afs import macs
from afdslib.experiments.afs import MODEL, DataSource, SourceRun, _scores, _training_macs, _validation
from afdslib.training import Optimisation
from afdslib.training.objective import Objective

__all__ = ["ExtendedSourceRun"]


@runs.register
@dataclass(frozen=True)
class ExtendedSourceRun:
    """Goes on training a plain source network, as `AFSSourceRun` does with the converted one.

    Without it AFS would have seen more source images than its competitors.

    Attributes:
        source: the plain network.
        data: the source data set; not read if there are no steps.
        optimisation: of the additional steps; 0 steps is the unextended start, an ablation.
        weight_decay: of every parameter.
        seed: of data order and augmentation.
    """

    source: SourceRun
    data: DataSource
    optimisation: Optimisation
    weight_decay: float = 1e-4
    seed: int = 0

    def execute(self, run: runs.Run) -> dict[str, Any]:
        source = runs.get_or_run(self.source, store=run.store, needs=(MODEL,))
        model = afs.load(source.artifact(MODEL))
        settings = self.optimisation
        if settings.steps == 0:
            run.write_artifact(MODEL, lambda path: afs.save(model, path))
            return {"steps": 0, "training_macs": 0.0}
        splits = self.data.load()
        size = (3, splits.test.size, splits.test.size)
        model.to(training.device())
        objective = Objective(model, weight_decay=self.weight_decay, label_smoothing=settings.label_smoothing)

        def validate() -> dict[str, float]:
            return _scores("validation", training.evaluate(model, _validation(splits), precision=settings.precision))

        before = validate()
        training.fit(
            model, splits.train, objective, settings, run, seed=self.seed, evaluation=validate, label="extended source"
        )
        run.write_artifact(MODEL, lambda path: afs.save(model, path))
        return {
            "steps": settings.steps,
            "images": len(splits.train),
            "macs": macs.count(model, size).total,
            "training_macs": _training_macs(model, size, settings, 0),
            "source_validation_accuracy": before["validation_accuracy"],
            **validate(),
            **_scores("test", training.evaluate(model, splits.test, precision=settings.precision)),
        }
