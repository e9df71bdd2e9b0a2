"""The rules of the comparison: methods, search spaces, trials, budgets and seeds.

No test number had a say in them; the endpoint and the tests are in `statistics`. The rules, as code keeps them:

- every competitor starts from the plain source trained for as many more source steps as AFS got;
- the same fitting images, augmentation, steps and rounds for all; a static network is pruned at a stage's start, a
  gated one during it;
- a trial holds no test image, and choices look at validation accuracy alone;
- every method gets the same number of trials: the first at the usual settings, the others quasi-random;
- budgets are met on training images after the last step; test MACs and accuracy are reported as they fall.

One thing is uneven, in favour of AFS: after its first trials, when it was mask updates rather than settings that held
it back, its schedule was set by hand on the trial seed's validation images (`Protocol.first_update`), and its trials
were made again. The first ones are kept, as `RECALLED`, and the recalled schedule is a row of the ablations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from afdslib.base.checks import whole
from afdslib.base.errors import AFDSError
from afdslib.losses.term import TERMS, Axis
from afdslib.studies.profile import Profile

__all__ = [
    "AFDS", "SELECTIONS", "SELECTION_SPACES", "Axis", "Method", "Protocol", "label_of", "protocol",
    "regulariser_space", "selection_space",
]  # fmt: skip

LR = Axis("lr", 1.0, 0.3, 3.0)
"""A factor on the learning rate: of the unpruned stage for regularisers, of the later stages for selections."""

NORMALISE = Axis("normalise", "none", choices=("none", "mean"))
PREDICTOR_LR = Axis("predictor_lr", 1.0, 0.1, 10.0)
"""A factor on the predictors' learning rate of each stage."""

SELECTION_SPACES: dict[str, tuple[Axis, ...]] = {
    "afs": (
        Axis("density_exponent", 0.5, choices=(0.0, 0.25, 0.5)), Axis("delta_s", 1e-2, 1e-4, 1.0), PREDICTOR_LR, LR,
    ),
    "fbs": (Axis("gate_bias", 1.0, choices=(1.0, None)), Axis("gate_l1", 1e-7, 1e-9, 1e-4), PREDICTOR_LR, LR),
    "slimming": (Axis("scale_l1", 1e-4, 1e-6, 1e-2), NORMALISE, LR),
    "taylor": (NORMALISE, LR),
    "l1": (Axis("normalise", "mean", choices=("none", "mean")), LR),
    "random": (LR,),
    "image": (LR,),
    "image-kd": (Axis("temperature", 4.0, 1.0, 8.0), Axis("alpha", 0.9, 0.1, 1.0, log=False), LR),
    "width": (LR,),
    "width-kd": (Axis("temperature", 4.0, 1.0, 8.0), Axis("alpha", 0.9, 0.1, 1.0, log=False), LR),
}  # fmt: skip

SELECTIONS = tuple(SELECTION_SPACES)

RECALLED = "selection, recalled schedule"
"""Stage of AFS's first trials in the table of imagenet32; nothing is chosen from them."""


def regulariser_space(name: str, factor: float = 1.0) -> tuple[Axis, ...]:
    """A regulariser's search space: its own settings, with `factor` on the strengths of those that compare features,
    and a factor on the learning rate."""

    def scaled(axis: Axis) -> Axis:
        default = float(axis.default) * factor  # type: ignore[arg-type]
        return replace(axis, default=default, low=axis.low * factor, high=axis.high * factor)

    scales = factor != 1 and "layers" in TERMS[name].needs
    return (*(scaled(axis) if scales and axis.name == "strength" else axis for axis in TERMS[name].space), LR)


def selection_space(name: str, profile: Profile) -> tuple[Axis, ...]:
    """A selection's search space, with the profile's own delta_s in the first trial."""
    space = SELECTION_SPACES[name]
    return tuple(replace(axis, default=profile.delta_s) if axis.name == "delta_s" else axis for axis in space)


_LABELS = {
    "afs": "AFS", "fbs": "FBS", "slimming": "network slimming", "taylor": "Taylor", "l1": "L1 norm",
    "random": "random channels", "width": "narrower network", "width-kd": "narrower network with KD",
    "image": "smaller image", "image-kd": "smaller image with KD",
}  # fmt: skip
_DETACHED = "-detached"


def label_of(name: str) -> str:
    """A regulariser's or selection's name for readers; also of AFD with detached attention, as tables have it.

    Raises:
        AFDSError: an unknown name.
    """
    plain = name.removesuffix(_DETACHED)
    known = TERMS[plain].label if plain in TERMS else _LABELS.get(plain)
    if known is None:
        raise AFDSError(f"no regulariser or selection is called {name!r}")
    return known if plain == name else f"{known} (detached)"


@dataclass(frozen=True)
class Method:
    """A regulariser with a selection.

    Attributes:
        regulariser: of `losses.TERMS`.
        selection: of `SELECTIONS`.
        attention: of AFD: "joint", trained with the network, or "detached", trained beforehand.
    """

    regulariser: str
    selection: str
    attention: str = "joint"

    def __post_init__(self) -> None:
        if self.regulariser not in TERMS:
            raise AFDSError(f"unknown regulariser {self.regulariser!r}; known are {', '.join(TERMS)}, and afd-detached")
        if self.selection not in SELECTION_SPACES:
            raise AFDSError(f"unknown selection {self.selection!r}; known are {', '.join(SELECTIONS)}")
        if self.attention not in ("joint", "detached") or (self.attention != "joint" and self.regulariser != "afd"):
            raise AFDSError(f"no attention of {self.regulariser} is {self.attention!r}; AFD's is joint or detached")

    @property
    def transfer(self) -> str:
        """The regulariser with its attention in one word, as tables and the command line have it."""
        return self.regulariser + (_DETACHED if self.attention == "detached" else "")

    @property
    def key(self) -> str:
        """ "afd+afs" and so on, in tables and on the command line."""
        return f"{self.transfer}+{self.selection}"

    @property
    def label(self) -> str:
        """For readers: "L2-SP + Taylor"."""
        return f"{label_of(self.transfer)} + {label_of(self.selection)}"

    @property
    def role(self) -> str:
        """ "afds"; "part" with AFD or AFS alone (or a variant), which are ablations; or "competitor"."""
        if self == AFDS:
            return "afds"
        return "part" if self.regulariser == "afd" or self.selection == "afs" else "competitor"

    @classmethod
    def parse(cls, text: str) -> Method:
        """From "regulariser+selection", where AFD's name may end in "-detached".

        Raises:
            AFDSError: an unknown name, or not of this form.
        """
        regulariser, plus, selection = text.partition("+")
        if not plus:
            raise AFDSError(f"the method {text!r} is not of the form REGULARISER+SELECTION, such as l2sp+taylor")
        plain = regulariser.removesuffix(_DETACHED)
        return cls(plain, selection, "joint" if plain == regulariser else "detached")


AFDS = Method("afd", "afs")
"""AFD with AFS: the method of the paper."""


@dataclass(frozen=True)
class Protocol:
    """How much of the comparison a profile runs.

    Attributes:
        methods: pairs that are compared.
        trials: of each regulariser and of each selection.
        budgets: of the sweep; the first is the unpruned network at its true cost.
        trial_budget: at which selections are tuned, with L2 at its best.
        primary_budget: at which strengths are chosen once more, and of the endpoint.
        multipliers: of a pair's best strength, tried at the primary budget.
        seeds, rest: of AFDS and the top rivals, paired; how many of these seeds the other methods get.
        rivals: how many competitors, best on validation, get all seeds.
        gates_alone: share of the unpruned stage's steps in which FBS tunes its gates alone.
        steps: factor on the profile's steps on the target data.
        epoch_steps: steps per row of the learning curve, after which a killed worker can go on: about an epoch.
        first_update: share of a stage after which AFS removes channels; it freezes gates at the later update. [ours]
        settle_by: what AFS ranks channels by when the budget is met once more after the last step; see `TransferRun`.
        settings_of: a profile whose finished comparison gives the settings and the rivals; nothing is tuned then.
        narrow_between: whether narrower networks, each of which is a training of its own, are made at the budgets
            between the unpruned one and the endpoint, too.
        variant_seeds: seeds of a profile that varies this one; its endpoint is secondary.
        feature_strengths: factor on the strengths of regularisers that compare features, whose size is the network's.
    """

    methods: tuple[Method, ...]
    trials: int
    budgets: tuple[float, ...] = (1.0, 0.5, 0.25, 0.2, 0.125, 0.1, 0.05)
    trial_budget: float = 0.25
    primary_budget: float = 0.1
    multipliers: tuple[float, ...] = (1.0, 0.1, 10.0, 0.0)
    seeds: tuple[int, ...] = tuple(range(10))
    rest: int = 3
    rivals: int = 3
    gates_alone: float = 0.2
    steps: float = 1.0
    epoch_steps: int = 12
    # A static network is cut at a stage's start and has the whole stage to recover. AFD + AFS on imagenet32 (validation
    # of the trial's seed, 100 + 2 x 80 steps): 0.5 as in the recalled procedure, freezing at both updates, 48.3 % at 4x
    # and 43.1 % at 10x; 0.02, freezing at both, 49.6 and 40.4 % (two gates left); freezing later, 49.8 and 47.0 %.
    first_update: float = 0.02
    settle_by: str = "taylor"
    settings_of: str = ""
    narrow_between: bool = True
    variant_seeds: int = 5
    feature_strengths: float = 1.0

    def __post_init__(self) -> None:
        whole("trials", self.trials, 1)
        if not self.methods:
            raise AFDSError("the comparison has no method; name at least one pair such as afd+afs")
        for budget in (self.trial_budget, self.primary_budget):
            if not 0 < budget < 1:
                raise AFDSError(f"budgets of trials must lie between 0 and 1, got {budget!r}")

    @property
    def trial_chain(self) -> tuple[float, ...]:
        """Budgets on the way to the primary one in a trial."""
        return (1.0, self.trial_budget, self.primary_budget)

    @property
    def chain(self) -> tuple[float, ...]:
        """Budgets down to the primary one."""
        return self.budgets[: self.budgets.index(self.primary_budget) + 1]


def _pairs(regularisers: tuple[str, ...], selections: tuple[str, ...]) -> tuple[Method, ...]:
    return tuple(Method(r, s) for s in selections for r in regularisers)


_CORE = ("l2", "l2sp", "delta", "afd")
_PROTOCOLS: Mapping[tuple[str, str], Protocol] = {
    # In miniature: several selections and regularisers once, two trials, four seeds of two methods, few steps.
    ("demo", "quick"): Protocol(
        methods=tuple(map(Method.parse, ("afd+afs", "l2+taylor", "l2sp+slimming", "l2+width"))),
        trials=2, budgets=(1.0, 0.25, 0.1), multipliers=(1.0, 0.0), seeds=(0, 1, 2, 3), rest=1, rivals=1, steps=0.6,
        epoch_steps=20,
    ),
    # The grid that the primary endpoint needs, all budgets and seeds, at the profile's few steps.
    ("imagenet32", "quick"): Protocol(
        methods=(*_pairs(_CORE, ("afs", "slimming", "taylor")), *_pairs(("l2",), ("width", "width-kd"))), trials=4,
        settle_by="q",
    ),
    ("imagenet32", "standard"): Protocol(
        methods=(
            *_pairs(_CORE, ("afs", "slimming", "taylor", "fbs")),
            *_pairs(("l2", "afd"), ("l1", "random", "width", "width-kd")),
            *_pairs(("lwf", "feature-map", "at"), ("afs",)), Method("afd", "afs", "detached"),
            *_pairs(("lwf", "feature-map", "at"), ("taylor",)),
        ),
        trials=16, settle_by="q",
    ),
    # Two hours of trials and eight of points on two cores. Three seeds each, five for AFDS and the best two rivals.
    ("dogs", "quick"): Protocol(
        methods=(
            *_pairs(_CORE, ("afs",)), *_pairs(("l2", "delta", "afd"), ("taylor", "slimming")),
            Method("afd", "afs", "detached"), *_pairs(("l2",), ("fbs", "image", "image-kd")),
        ),
        trials=3, budgets=(1.0, 0.5, 0.25, 0.1), multipliers=(1.0, 0.1), seeds=(0, 1, 2, 3, 4), rest=3, rivals=2,
        epoch_steps=50, variant_seeds=3, feature_strengths=0.01,
    ),
    ("paper", "standard"): Protocol(
        methods=_pairs(("l2", "l2sp", "lwf", "delta", "feature-map", "at", "afd"), SELECTIONS), trials=16,
        epoch_steps=250,
    ),
}  # fmt: skip


def protocol(profile: Profile) -> Protocol:
    """The comparison of a profile.

    A scale that has none of its own takes the other one's. A variant such as imagenet32-disjoint asks the endpoint's
    question of other data, with the settings and the rivals of the profile it varies, all at the same few seeds.

    Raises:
        AFDSError: for a profile without one.
    """
    family = profile.variant_of or profile.name
    by_scale = {scale: p for (name, scale), p in _PROTOCOLS.items() if name == family}
    if not by_scale:
        known = ", ".join(dict.fromkeys(name for name, _ in _PROTOCOLS))
        raise AFDSError(f"the profile {profile.name!r} has no comparison; {known} have one")
    rules = by_scale.get(profile.scale, next(iter(by_scale.values())))
    if not profile.variant_of:
        return rules
    seeds = rules.seeds[: rules.variant_seeds]
    return replace(rules, budgets=rules.chain, seeds=seeds, rest=len(seeds), settings_of=family, narrow_between=False)
