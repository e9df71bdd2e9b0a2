"""The common body of all stages on target data: `train_stage`. A run says how it starts and what happens to channels.

Each run is one point of a chain: the network of the point before, or of a source, is tuned at the last of its budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from afdslib import data, runs, training
from afdslib.afs import macs
from afdslib.afs.shrink import groups
from afdslib.backbones.inputs import input_of
from afdslib.base.errors import DivergedError, UnreachableError
from afdslib.data import Splits
from afdslib.experiments.config import DataSource
from afdslib.experiments.measure import gate_metrics, input_size, measure, training_macs
from afdslib.experiments.source import WEIGHTS, AFSSourceRun, ExtendedSourceRun, keep, weights_run
from afdslib.losses.term import TAUGHT, TERMS, Term
from afdslib.runs import MODEL
from afdslib.training import Optimisation
from afdslib.training.kept_channels import Channels
from afdslib.training.objective import Objective, Regulariser

__all__ = ["OBJECTIVE", "Event", "FirstPoint", "Point", "Stage", "train_stage"]

OBJECTIVE = "objective.safetensors"  # what an objective has learnt

Event = Callable[[], dict[str, float]]


@dataclass
class Stage:
    """How a stage starts."""

    model: nn.Module  # the network to train, on the CPU
    reference: nn.Module  # the source network that the regulariser compares it with
    settings: Optimisation
    before: runs.Result | None = None  # the stage before, whose objective goes on
    dense: float = 0.0  # MACs of the dense network; 0 where that is `model`
    forwards: float | None = None  # passes of `model` that the teachers cost per image; None: those of the regulariser
    channels: Channels | None = None  # which of the reference's channels a pruned network still has
    terms: tuple[Term, ...] = ()  # of the loss, beside the regulariser
    smoothing: float | None = None  # of the labels; None as `settings` say
    objective: Objective = field(init=False)  # what is minimised, and the data, once they are there
    splits: Splits = field(init=False)


class Point:
    """A point of a chain. A point that diverges or cannot be reached, or follows such a one, says so as its result.

    Attributes:
        source: the network to start from; also the reference of the regulariser.
        data: the target data set; its seed draws the fitting images.
        regulariser: and its strength.
        seed: of the classifier's initialisation, data order and augmentation.
        use_test: whether the test set is read at the end; trials that choose something must not.
        macs_images: training images whose accuracy and MACs are reported, and on which a budget is met.
        budgets: shares of the dense network's MACs down to this point's.
    """

    source: AFSSourceRun | ExtendedSourceRun
    data: DataSource
    regulariser: Regulariser
    seed: int
    use_test: bool
    macs_images: int
    budgets: tuple[float, ...]
    parent: Any = None  # the point before, if there is one
    gated = False  # whether the network has gates
    measured = True  # whether the point is one of the study's, and not only the start of others
    selection_name = ""  # for the progress display

    @property
    def times(self) -> str:
        """The last budget for readers: "10x"."""
        return f"{1 / self.budgets[-1]:g}x"

    @property
    def taught(self) -> float:
        """Passes of the source per image."""
        return 1.0 if TERMS[self.regulariser.name].needs & TAUGHT else 0.0

    def needs(self) -> Iterable[Any]:
        """The source, the point before, and DELTA's channel weights."""
        return self.source, self.parent, weights_run(self.regulariser, self.source, self.data)

    def execute(self, run: runs.Run) -> dict[str, Any]:
        for before in (self.parent, self.source):
            if before is not None and (reason := runs.get_or_run(before, store=run.store).metrics.get("diverged")):
                return {"diverged": reason, "steps": 0}
        try:
            return train_stage(self, run)
        except (DivergedError, UnreachableError) as error:
            return {"diverged": f"at {self.times}, {error}", "steps": 0}

    def point_before(self, run: runs.Run) -> runs.Result:
        """The result of `parent`, with its network and its objective's state."""
        return runs.get_or_run(self.parent, store=run.store, needs=(MODEL, OBJECTIVE))

    # What a run states.

    def start(self, run: runs.Run, splits: Splits) -> Stage:
        """The network and what it is compared with; the global random numbers are seeded for the objective."""
        raise NotImplementedError

    def select(self, stage: Stage) -> Mapping[int, Event]:
        """What happens to channels before the first step, done here, and after other steps, by their numbers."""
        return {}

    def recalibrate(self, stage: Stage) -> None:
        """Where asked for, batch norms are measured anew once channels have gone."""
        settings = stage.settings
        if settings.recalibrate:
            batches = training.first_batches(stage.splits.train, settings.batch_size, self.seed, settings.recalibrate)
            training.recalibrate(stage.model, batches, settings.precision)

    def settle_budget(self, stage: Stage) -> None:
        """What happens to channels after the last step."""

    def channel_counts(self, stage: Stage) -> dict[str, Any]:
        """How many channels there are, and of which kind."""
        if self.gated:
            return gate_metrics(stage.model, stage.splits, stage.settings)
        channels = sum(group.width for group in groups(stage.model, input_size(stage.splits)))
        return {"density": 1.0, "removed": 0, "static": channels, "dynamic": 0}


@dataclass(frozen=True)
class FirstPoint(Point):
    """A point that starts from a source network."""

    source: Any
    data: DataSource
    regulariser: Regulariser
    optimisation: Optimisation


def train_stage(point: Point, run: runs.Run) -> dict[str, Any]:
    """One stage on target data, from loading what it starts from to its metrics."""
    # The images. Those of a trial, or of a point that nothing is read off, hold no test image.
    splits = point.data.load()
    if not (point.use_test and point.measured):
        splits = data.sealed(splits)
    size = input_size(splits)
    # The network: of a source, or of the point before.
    stage = point.start(run, splits)
    model, settings = stage.model, stage.settings
    splits = splits.normalised(input_of(model))
    # What is minimised; what the objective has learnt in the stage before goes on.
    delta, weights = weights_run(point.regulariser, point.source, point.data), None
    if delta is not None:
        weights = load_file(runs.get_or_run(delta, store=run.store, needs=(WEIGHTS,)).artifact(WEIGHTS))
    objective = stage.objective = Objective(
        model, point.regulariser, stage.reference, size, channels=stage.channels, weights=weights, terms=stage.terms,
        label_smoothing=settings.label_smoothing if stage.smoothing is None else stage.smoothing,
    )  # fmt: skip
    if stage.before is not None:
        state = load_file(stage.before.artifact(OBJECTIVE))
        (objective.load_state_dict if stage.channels is None else objective.inherit)(state)
    model.to(training.device())
    objective.place(training.device())
    # A detached attention is trained before the first step of the first stage. A resumed run has done so.
    steps = settings.steps
    if stage.before is None and (point.regulariser.name, point.regulariser.attention) == ("afd", "detached"):
        steps += settings.steps
        if run.load_checkpoint() is None:
            batches = training.first_batches(splits.train, settings.batch_size, point.seed, settings.steps)
            objective.prepare(batches, len(splits.classes))
    # The steps, and what happens to channels before, between and after them.
    stage.splits, stage.dense = splits, stage.dense or macs.count(model, size).total
    events = point.select(stage)
    training.fit(
        model, splits.train, objective, settings, run, seed=point.seed, events=events,
        label=f"{point.regulariser.name} {point.selection_name} seed {point.seed} at {point.times}".replace("  ", " "),
        monitor=splits.statistics if point.gated else None,
    )  # fmt: skip
    point.settle_budget(stage)
    # What it has become. Nothing is measured of a stage that is no point of the study.
    metrics: dict[str, Any] = {}
    if point.measured:
        budget, images = point.budgets[-1], point.macs_images
        metrics = measure(model, splits, settings, stage.dense, budget, images=images, use_test=point.use_test)
        metrics |= point.channel_counts(stage)
    # The network and what its objective has learnt, for the next point and for readers.
    state = {name: tensor.cpu().contiguous() for name, tensor in objective.state_dict().items()}
    run.write_artifact(OBJECTIVE, lambda path: save_file(state, path))
    keep(run, model)
    forwards = point.taught if stage.forwards is None else stage.forwards
    return metrics | {"steps": steps, "training_macs": training_macs(model, size, settings, forwards)}
