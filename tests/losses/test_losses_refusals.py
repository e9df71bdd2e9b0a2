"""What the losses refuse: each with one sentence."""

import math
from collections import OrderedDict

import pytest
import torch
from checks import afd_case
from tiny import maps
from torch import nn

from afdslib.base.errors import AFDSError
from afdslib.losses.afd import AFDLoss, fit_attention
from afdslib.losses.at import at_loss, gradient_at_loss, input_gradient
from afdslib.losses.delta import DELTALoss, channel_weights, fit_classifier
from afdslib.losses.hint import hint_loss
from afdslib.losses.kd import kd_loss
from afdslib.losses.l2sp import L2SP
from afdslib.losses.lwf import lwf_loss
from afdslib.losses.nst import nst_loss
from afdslib.losses.schedules import BetaSchedule

MAP, SINGLE = maps(2, 3, 4, 4), maps(2, 3, 4, 4, dtype=torch.float32)
WITH_GRADIENT = MAP.clone().requires_grad_()
LOGITS, OTHER, TARGET = maps(2, 3), maps(2, 3, seed=1), torch.tensor([0, 2])
FLAGS = torch.ones(3, dtype=torch.bool)
IMAGES, LABELS = torch.zeros(3, 3, 8, 8), torch.arange(3)


def network() -> nn.Module:
    return nn.Sequential(OrderedDict(pool=nn.AvgPool2d(8), flat=nn.Flatten(), fc=nn.Linear(3, 3)))


def delta() -> DELTALoss:
    return DELTALoss({"a": torch.ones(3)})


LOSSES = {"at": at_loss, "nst": nst_loss, "hint": hint_loss, "gradient": gradient_at_loss}
PAIRS = [
    (MAP, maps(3, 3, 4, 4), "holds 2 samples and the teacher's 3"), (MAP[:, :0], MAP, "is empty"),
    (MAP[0], MAP, "(3, 4, 4); give a tensor of (batch, channels, height, width)"),
    (None, MAP, "is NoneType; give a tensor of"), (MAP.int(), MAP, "is of torch.int32; give floating-point numbers"),
    (MAP, MAP.long(), "is of torch.int64"), (MAP * math.nan, MAP, "Student {} holds 96 values"),
    (MAP, MAP * math.inf, "Teacher {} holds 96 values"), (MAP, WITH_GRADIENT * 2, "carries gradients"),
]  # fmt: skip
SOFT = {"kd": lambda s, t: kd_loss(s, t, TARGET), "lwf": lwf_loss}
SOFT_PAIRS = [
    (LOGITS, OTHER[:1], "holds 2 samples and the teacher's 1"), (LOGITS, OTHER[:, :2], "equal shapes"),
    (LOGITS, OTHER.clone().requires_grad_(), "teacher's logits carries gradients"),
    (LOGITS * math.nan, OTHER, "Student logits holds 6 values"), (LOGITS, OTHER * math.inf, "Teacher logits holds 6"),
    (LOGITS[:0], OTHER[:0], "is empty"),
]  # fmt: skip
CASES = [
    (lambda: hint_loss(MAP, maps(2, 5, 4, 4)), "needs equal shapes"),
    (lambda: gradient_at_loss(MAP, maps(2, 3, 2, 2)), "needs equal shapes"),
    (lambda: gradient_at_loss(MAP, WITH_GRADIENT * 2), "gradients; take it with create_graph=False, or detach() it."),
    (lambda: at_loss(MAP, WITH_GRADIENT), "under torch.no_grad()"),
    (lambda: at_loss(MAP, MAP, mode="both"), "mode 'both'"),
    (lambda: at_loss(MAP, MAP, p=0), "exponent p must be a number above 0, got 0"),
    (lambda: at_loss(SINGLE * 1e25, SINGLE), "its inputs are finite, the largest"),
    (lambda: nst_loss(SINGLE * 1e25, SINGLE), "its inputs are finite, the largest"),
    (lambda: nst_loss(SINGLE, SINGLE * 1e25, d=3), "although its inputs are finite"),
    (lambda: nst_loss(MAP, MAP, kernel="cubic"), "kernel 'cubic' is unknown"),
    (lambda: nst_loss(MAP, MAP, d=0), "a whole number of at least 1, got 0"),
    (lambda: nst_loss(MAP, MAP, d=math.nan), "a whole number of at least 1, got nan"),
    (lambda: nst_loss(MAP, MAP, c="x"), "a number of at least 0, got 'x'"),
    (lambda: nst_loss(MAP, MAP, c=math.nan), "a number of at least 0, got nan"),
    (lambda: input_gradient(LOGITS, TARGET, MAP), "requires_grad_"),
    (lambda: input_gradient(LOGITS, TARGET - 100, WITH_GRADIENT), "-100 is none of the 3 classes"),
    (lambda: kd_loss(LOGITS, OTHER, TARGET, T=0), "temperature T must be a number above 0, got 0"),
    (lambda: kd_loss(LOGITS, OTHER, TARGET, T=math.nan), "must be a number above 0, got nan"),
    (lambda: kd_loss(LOGITS, OTHER, TARGET, alpha=1.5), "must be a number in [0, 1], got 1.5"),
    (lambda: kd_loss(LOGITS, OTHER, TARGET[:1]), "one class index per sample"),
    (lambda: kd_loss(LOGITS, OTHER, TARGET.double()), "target is torch.float64 of the shape (2,) for 2 samples"),
    (lambda: kd_loss(LOGITS, OTHER, TARGET.int()), "int64"),
    (lambda: kd_loss(LOGITS, OTHER, LOGITS.softmax(1)), "one class index per sample"),
    (lambda: kd_loss(LOGITS, OTHER, torch.tensor([0, -100])), "target -100 is none of the 3 classes"),
    (lambda: kd_loss(LOGITS, OTHER, TARGET + 1), "target 3 is none of the 3 classes; give one from 0 to 2"),
    (lambda: DELTALoss({}), "was given no layer"),
    (lambda: DELTALoss({"a": torch.tensor([0.5, -0.5])}), "of at least 0"),
    (lambda: delta()({}, {"a": MAP}), "lack a; they hold nothing"),
    (lambda: DELTALoss({"a": torch.ones(2)})({"a": MAP}, {"a": MAP}), "3 channels and DELTA holds 2"),
    (lambda: delta()({"a": MAP / 0}, {"a": MAP}), "Student map of a holds 96 values"),
    (lambda: delta().set_alive({"x": FLAGS}), "channels of x are not"),
    (lambda: delta().set_alive({"a": FLAGS * 1.0}), "channels of a are not 3 flags"),
    (lambda: AFDLoss({"a": (2, 2, 2)}).set_alive({"a": FLAGS}), "channels of a are not 2 flags"),
    (lambda: AFDLoss({"a": (3, 2, 2)}).set_alive({"a": ~FLAGS}), "one set; the layers of AFD"),
    (lambda: channel_weights(network(), ["pool"], [(IMAGES, LABELS - 1)]), "target -1 is none"),
    (lambda: channel_weights(network(), ["layer9"], []), "no layer 'layer9'"),
    (lambda: channel_weights(network(), ["pool"], []), "is empty"),
    (lambda: fit_classifier(network(), [(IMAGES, LABELS + 1)]), "target 3 is none"),
    (lambda: fit_classifier(network(), []), "is empty"),
    (lambda: L2SP(network(), alpha=-1, beta=0), "alpha of L2-SP must be a number of at least 0, got -1"),
    (lambda: L2SP(network(), alpha=1, beta=0), "found no parameter that model and starting point share"),
    (lambda: AFDLoss({}), "at least one"),
    (lambda: AFDLoss({"a": (2, 2, 2)}, attention="both"), "'both'"),
    (lambda: AFDLoss({"a.b": (2, 2, 2), "a_b": (3, 2, 2)}), "a.b, a_b"),
    (lambda: fit_attention(AFDLoss({"a": (2, 2, 2)}), dict, [], 2), "joint"),
    (lambda: BetaSchedule("exponential"), "'exponential' is unknown"),
    (lambda: BetaSchedule("linear", length=11)(0, 10), "takes 11 and the run only 10"),
    (lambda: BetaSchedule("step", milestones=(10,)).check(10), "a milestone at 10 and the run ends at 10"),
    (lambda: BetaSchedule(beta="1000"), "beta of the beta schedule must be a number of at least 0, got '1000'"),
    (lambda: BetaSchedule("step", milestones=("3",)), "a milestone of the beta schedule must be"),
    (lambda: BetaSchedule("step", milestones=5), "milestones of the beta schedule are 5"),
    (lambda: BetaSchedule("step"), "no milestones"),
    (lambda: BetaSchedule("step", milestones=(5, 5)), "increasing"),
    (lambda: BetaSchedule(beta=-1), "beta of the beta schedule must be a number of at least 0, got -1"),
    (lambda: BetaSchedule("linear", length=0), "at least 1"),
]


def refused(call, words: str) -> None:
    with pytest.raises(AFDSError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "student", "teacher", "words"), [
    *((name, *pair) for name in LOSSES for pair in PAIRS), *((name, *pair) for name in SOFT for pair in SOFT_PAIRS),
])  # fmt: skip
def test_maps_and_logits_that_do_not_fit_are_one_sentence(name, student, teacher, words):
    words = words.format("gradient" if name == "gradient" else "map")
    refused(lambda: (LOSSES | SOFT)[name](student, teacher), words)


@pytest.mark.parametrize(("call", "words"), CASES, ids=[words for _, words in CASES])
def test_bad_input_is_one_sentence(call, words):
    refused(call, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s, t: (s | {"layer1.0": s["layer1.0"][:, :4]}, t), "student features of 'layer1.0'.*make a new one"),
        (lambda s, t: (s, t | {"layer1.0": t["layer1.0"][..., :2]}), "source features of 'layer1.0'"),
        (lambda s, t: ({"layer1.0": s["layer1.0"]}, t), "student's features lack layer2.0"),
        (lambda s, t: (s, {"layer1.0": t["layer1.0"]}), "source's features hold layer1.0 for layer1.0, layer2.0"),
        (lambda s, t: ({n: x[:2] for n, x in s.items()}, t), "holds 2 samples and the teacher's 3"),
    ],
    ids=["channels", "width", "student", "source", "samples"],
)
def test_features_that_an_afd_loss_was_not_made_for_are_refused(change, words):
    loss, student, source = afd_case()
    with pytest.raises(AFDSError, match=words):
        loss(*change(student, source))
