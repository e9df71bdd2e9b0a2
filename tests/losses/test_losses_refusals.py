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

MAP, SINGLE = maps(2, 3, 4, 4), maps(2, 3, 4, 4, dtype=torch.float32)
WITH_GRADIENT = MAP.clone().requires_grad_()
LOGITS, OTHER, TARGET = maps(2, 3), maps(2, 3, seed=1), torch.tensor([0, 2])
FLAGS = torch.ones(3, dtype=torch.bool)
IMAGES, LABELS = torch.zeros(3, 3, 8, 8), torch.arange(3)


def network() -> nn.Module:
    return nn.Sequential(OrderedDict(pool=nn.AvgPool2d(8), flat=nn.Flatten(), fc=nn.Linear(3, 3)))


def delta() -> DELTALoss:
    return DELTALoss({"a": torch.ones(3)})


CASES = {
    # both maps, by each loss that compares them
    "at: samples": (lambda: at_loss(MAP, maps(3, 3, 4, 4)), "holds 2 samples and the teacher's 3"),
    "at: empty": (lambda: at_loss(maps(2, 3, 0, 4), MAP), "is empty"),
    "at: dimensions": (lambda: at_loss(maps(2, 3, 4), MAP), "(batch, channels, height, width)"),
    "at: no tensor": (lambda: at_loss(None, MAP), "The student's feature map is NoneType; give a tensor of"),
    "at: nan": (lambda: at_loss(MAP * math.nan, MAP), "Student map holds 96 values"),
    "at: gradient": (lambda: at_loss(MAP, WITH_GRADIENT), "under torch.no_grad()"),
    "at: mode": (lambda: at_loss(MAP, MAP, mode="both"), "mode 'both'"),
    "at: p": (lambda: at_loss(MAP, MAP, p=0), "exponent p must be a number above 0, got 0"),
    "at: int": (lambda: at_loss(MAP.int(), MAP), "map is of torch.int32; give floating-point"),
    "at: long": (lambda: at_loss(MAP, MAP.long()), "teacher's feature map is of torch.int64"),
    "at: overflow": (lambda: at_loss(SINGLE * 1e25, SINGLE), "its inputs are finite, the largest"),
    "nst: samples": (lambda: nst_loss(MAP, maps(3, 3, 4, 4)), "holds 2 samples and the teacher's 3"),
    "nst: empty": (lambda: nst_loss(maps(2, 0, 4, 4), MAP), "is empty"),
    "nst: inf": (lambda: nst_loss(MAP, MAP * math.inf), "Teacher map holds 96 values"),
    "nst: gradient": (lambda: nst_loss(MAP, WITH_GRADIENT), "carries gradients"),
    "nst: kernel": (lambda: nst_loss(MAP, MAP, kernel="cubic"), "kernel 'cubic' is unknown"),
    "nst: d 0": (lambda: nst_loss(MAP, MAP, d=0), "a whole number of at least 1, got 0"),
    "nst: d 1.5": (lambda: nst_loss(MAP, MAP, d=1.5), "whole number"),
    "nst: d nan": (lambda: nst_loss(MAP, MAP, d=math.nan), "a whole number of at least 1, got nan"),
    "nst: d text": (lambda: nst_loss(MAP, MAP, d="two"), "a whole number of at least 1, got 'two'"),
    "nst: c text": (lambda: nst_loss(MAP, MAP, c="x"), "a number of at least 0, got 'x'"),
    "nst: c nan": (lambda: nst_loss(MAP, MAP, c=math.nan), "a number of at least 0, got nan"),
    "nst: c -1": (lambda: nst_loss(MAP, MAP, c=-1.0), "a number of at least 0"),
    "nst: long": (lambda: nst_loss(MAP.long(), MAP), "is of torch.int64; give floating-point numbers"),
    "nst: overflow": (lambda: nst_loss(SINGLE * 1e25, SINGLE), "its inputs are finite, the largest"),
    "nst: teacher's": (lambda: nst_loss(SINGLE, SINGLE * 1e25, d=3), "although its inputs are finite"),
    "hint: shapes": (lambda: hint_loss(MAP, maps(2, 5, 4, 4)), "needs equal shapes"),
    "hint: samples": (lambda: hint_loss(MAP, maps(3, 3, 4, 4)), "holds 2 samples and the teacher's 3"),
    "hint: empty": (lambda: hint_loss(maps(2, 3, 0, 4), maps(2, 3, 0, 4)), "is empty"),
    "hint: nan": (lambda: hint_loss(MAP * math.nan, MAP), "Student map holds 96 values"),
    "hint: inf": (lambda: hint_loss(MAP, MAP * math.inf), "Teacher map holds 96 values"),
    "hint: gradient": (lambda: hint_loss(MAP, WITH_GRADIENT), "feature map carries gradients"),
    "hint: int": (lambda: hint_loss(MAP, MAP.int()), "is of torch.int32"),
    # input gradients
    "gradient: samples": (lambda: gradient_at_loss(MAP, maps(3, 3, 4, 4)), "holds 2 samples and the teacher's 3"),
    "gradient: shapes": (lambda: gradient_at_loss(MAP, maps(2, 3, 2, 2)), "needs equal shapes"),
    "gradient: dimensions": (lambda: gradient_at_loss(MAP[0], MAP), "The student's input gradient is (3, 4, 4)"),
    "gradient: empty": (lambda: gradient_at_loss(MAP[:0], MAP[:0]), "is empty"),
    "gradient: nan": (lambda: gradient_at_loss(MAP * math.nan, MAP), "Student gradient holds 96 values"),
    "gradient: inf": (lambda: gradient_at_loss(MAP, MAP * math.inf), "Teacher gradient holds 96 values"),
    "gradient: graph": (
        lambda: gradient_at_loss(MAP, WITH_GRADIENT * 2),
        "The teacher's input gradient carries gradients; take it with create_graph=False, or detach() it.",
    ),
    "images": (lambda: input_gradient(LOGITS, TARGET, MAP), "requires_grad_"),
    "images: target": (lambda: input_gradient(LOGITS, TARGET - 100, WITH_GRADIENT), "-100 is none of the 3 classes"),
    # logits and targets
    "kd: T 0": (lambda: kd_loss(LOGITS, OTHER, TARGET, T=0), "temperature T must be a number above 0, got 0"),
    "kd: T -1": (lambda: kd_loss(LOGITS, OTHER, TARGET, T=-1.0), "temperature T must be a number above 0, got -1.0"),
    "kd: T nan": (lambda: kd_loss(LOGITS, OTHER, TARGET, T=math.nan), "must be a number above 0, got nan"),
    "kd: alpha": (lambda: kd_loss(LOGITS, OTHER, TARGET, alpha=1.5), "must be a number in [0, 1], got 1.5"),
    "kd: samples": (lambda: kd_loss(LOGITS, OTHER[:1], TARGET), "holds 2 samples and the teacher's 1"),
    "kd: classes": (lambda: kd_loss(LOGITS, OTHER[:, :2], TARGET), "equal shapes"),
    "kd: gradient": (lambda: kd_loss(LOGITS, OTHER.clone().requires_grad_(), TARGET), "carries gradients"),
    "kd: nan": (lambda: kd_loss(LOGITS, OTHER * math.nan, TARGET), "Teacher logits holds 6 values"),
    "kd: empty": (lambda: kd_loss(LOGITS[:0], OTHER[:0], TARGET), "is empty"),
    "kd: targets": (lambda: kd_loss(LOGITS, OTHER, TARGET[:1]), "one class index per sample"),
    "kd: double": (lambda: kd_loss(LOGITS, OTHER, TARGET.double()), "target is torch.float64 of the shape (2,) for 2"),
    "kd: int": (lambda: kd_loss(LOGITS, OTHER, TARGET.int()), "int64"),
    "kd: shares": (lambda: kd_loss(LOGITS, OTHER, LOGITS.softmax(1)), "one class index per sample"),
    "kd: -100": (lambda: kd_loss(LOGITS, OTHER, torch.tensor([0, -100])), "target -100 is none of the 3 classes"),
    "kd: all -100": (lambda: kd_loss(LOGITS, OTHER, torch.tensor([-100] * 2)), "target -100 is none of the 3 classes"),
    "kd: 3": (lambda: kd_loss(LOGITS, OTHER, TARGET + 1), "target 3 is none of the 3 classes; give indices from 0"),
    "lwf: samples": (lambda: lwf_loss(LOGITS, OTHER[:1]), "holds 2 samples and the teacher's 1"),
    "lwf: classes": (lambda: lwf_loss(LOGITS, OTHER[:, :2]), "equal shapes"),
    "lwf: empty": (lambda: lwf_loss(LOGITS[:0], OTHER[:0]), "is empty"),
    "lwf: nan": (lambda: lwf_loss(LOGITS * math.nan, OTHER), "Student logits holds 6 values"),
    "lwf: gradient": (lambda: lwf_loss(LOGITS, OTHER.clone().requires_grad_()), "teacher's logits carries gradients"),
    # losses over layers
    "delta: no layer": (lambda: DELTALoss({}), "was given no layer"),
    "delta: negative": (lambda: DELTALoss({"a": torch.tensor([0.5, -0.5])}), "of at least 0"),
    "delta: layer": (lambda: delta()({}, {"a": MAP}), "lack a; they hold nothing"),
    "delta: count": (lambda: DELTALoss({"a": torch.ones(2)})({"a": MAP}, {"a": MAP}), "3 channels and DELTA holds 2"),
    "delta: nan": (lambda: delta()({"a": MAP / 0}, {"a": MAP}), "Student map of a holds 96 values"),
    "alive: layer": (lambda: delta().set_alive({"x": FLAGS}), "channels of x are not"),
    "alive: flags": (lambda: delta().set_alive({"a": FLAGS * 1.0}), "channels of a are not 3 flags"),
    "alive: count": (lambda: AFDLoss({"a": (2, 2, 2)}).set_alive({"a": FLAGS}), "channels of a are not 2 flags"),
    "alive: none": (lambda: AFDLoss({"a": (3, 2, 2)}).set_alive({"a": ~FLAGS}), "one set; the layers of AFD"),
    "weights: target": (lambda: channel_weights(network(), ["pool"], [(IMAGES, LABELS - 1)]), "target -1 is none"),
    "weights: layer": (lambda: channel_weights(network(), ["layer9"], []), "no layer 'layer9'"),
    "weights: loader": (lambda: channel_weights(network(), ["pool"], []), "is empty"),
    "classifier: target": (lambda: fit_classifier(network(), [(IMAGES, LABELS + 1)]), "target 3 is none"),
    "classifier: loader": (lambda: fit_classifier(network(), []), "is empty"),
    "l2sp: alpha": (lambda: L2SP(network(), alpha=-1, beta=0), "alpha of L2-SP must be a number of at least 0, got -1"),
    "l2sp: nothing": (lambda: L2SP(network(), alpha=1, beta=0), "found no parameter that model and start"),
    "afd: no layer": (lambda: AFDLoss({}), "at least one"),
    "afd: attention": (lambda: AFDLoss({"a": (2, 2, 2)}, attention="both"), "'both'"),
    "afd: names": (lambda: AFDLoss({"a.b": (2, 2, 2), "a_b": (3, 2, 2)}), "a.b, a_b"),
    "afd: fit": (lambda: fit_attention(AFDLoss({"a": (2, 2, 2)}), dict, [], 2), "joint"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence(case):
    call, words = CASES[case]
    with pytest.raises(AFDSError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)


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
