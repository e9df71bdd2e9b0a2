"""Attention transfer. Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afdslib.base import checks
from afdslib.base.errors import AFDSError
from afdslib.losses import _checks
from afdslib.losses._maps import LayerLoss, full_precision, match_size
from afdslib.losses.delta import FeatureMap
from afdslib.losses.term import TERMS, TRANSFERS, Axis, Batch, TermContext, Transfer

__all__ = ["ATLoss", "at_loss", "attention_map", "gradient_at_loss", "input_gradient"]


def attention_map(features: Tensor, p: float = 2) -> Tensor:
    """vec(mean over channels of |F|^p), p > 0, divided by its 2-norm (section 3.1; the mean over channels is [code]'s).

    Shape:
        (B, C, H, W) -> (B, H*W), each row of norm 1; a map that is zero everywhere stays zero, without gradient.
    """
    return _normalised(_energy(features, p))


def _energy(features: Tensor, p: float) -> Tensor:
    """(B, C, H, W) -> (B, H, W): the mean over channels of |F|^p, of faint maps times a power of two."""
    x = full_precision(features)
    # Of the faintest maps |F|^p would vanish beside 1e-12. The norm takes the factor out again; for other maps it is 1,
    # which changes no bit. It may not be finite itself.
    largest = x.detach().abs().amax((1, 2, 3), keepdim=True)
    faint = (largest > 0) & (largest.pow(p) < 1e-8)
    exponent = torch.where(faint, -torch.frexp(largest).exponent, 0)
    half = torch.div(exponent, 2, rounding_mode="floor")
    x = x * torch.exp2(half.to(x)) * torch.exp2((exponent - half).to(x))
    if p == 2:
        return x.square().mean(1)
    x = x.abs()
    if p >= 1:
        return x.pow(p).mean(1)
    # Below 1 the slope at 0 is infinite; a channel that is off gets none, as behind a ReLU.
    off = x == 0
    return torch.where(off, 0.0, torch.where(off, 1.0, x).pow(p)).mean(1)


def _normalised(energy: Tensor) -> Tensor:
    # 1e-12, not the 1e-6 of [code], so that faint maps are normalised too.
    return F.normalize(energy.flatten(1), dim=1, eps=1e-12)


def at_loss(student: Tensor, teacher: Tensor, *, p: float = 2, mode: str = "code") -> Tensor:
    """Distance of the two attention maps of one layer.

    Per sample, "code" = norm^2 / (H*W) where "paper" = norm of the difference, so the modes need weights of different
    size. For 8x8 maps that differ by a norm of 0.4, "code" is 0.0025 and "paper" 0.4: the code's beta of 1000 weighs
    like 6.25 in the paper's scale (beta = 12.5 before its beta / 2). No weight makes them equal on a batch.

    Args:
        student: Features of the layer.
        teacher: The teacher's, without gradient. Of two sizes, the larger energy |F|^p is averaged by area to the
            smaller height and width (deterministic; a warning says so).
        p: Exponent, above 0.
        mode: "code": mean over batch and positions of the squared difference; "paper": mean over the batch of its
            2-norm (equation 2; beta / 2 belongs to the weight).

    Shape:
        (B, C, H, W) and (B, C', H', W'); the result is a scalar, 0 for maps that are equal up to a positive factor.

    Raises:
        AFDSError: as all losses, for other shapes, whole numbers, an empty map, a teacher with gradient and, on the
            CPU, a loss that is not finite (else it is returned, and the training loop names it).
    """
    if mode not in ("code", "paper"):
        raise AFDSError(f"The mode {mode!r} of attention transfer is unknown; use 'code' or 'paper'.")
    checks.number("the exponent p", p, above=0)
    _checks.pair(student, teacher, "feature map")
    own, other = match_size(_energy(student, p), _energy(teacher, p), "Attention transfer")
    difference = _normalised(own) - _normalised(other)
    norms = difference.square() if mode == "code" else torch.linalg.vector_norm(difference, dim=1)
    return _checks.finite(norms.mean(), student_map=student, teacher_map=teacher)


class ATLoss(LayerLoss):
    """The sum of `at_loss` over the student's layers, each map taken over the channels that the student still has.

    A source of another depth gives its features under its own names, one map per stage in the same order.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(dict.fromkeys(names), "attention transfer")

    def forward(self, student: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> Tensor:
        terms = []
        for name, a, b in self.matched(student, source):
            # Zero channels add nothing to the student's energy, whose scale the norm takes out. A teacher of another
            # width has no counterparts to the student's channels.
            if name in self.partial and a.shape[1] == b.shape[1]:
                b = b.index_select(1, self.alive(name).nonzero().flatten().to(b.device))
            terms.append(at_loss(a, b))
        return torch.stack(terms).sum()


def input_gradient(logits: Tensor, target: Tensor, inputs: Tensor, *, create_graph: bool = True) -> Tensor:
    """Gradient of the batch's summed cross-entropy with respect to each image, (B, 3, H, W).

    In eval mode it is of the sample's own; batch norm in train mode adds the effect on the losses of the others.

    Args:
        logits: Outputs for `inputs`, (B, classes).
        target: Class indices, (B,).
        inputs: The images, with `requires_grad` before the forward pass.
        create_graph: True for the student (the loss is differentiated again), False for the teacher.

    Raises:
        AFDSError: images without gradient; targets as `kd_loss` refuses them.
    """
    if not inputs.requires_grad:
        raise AFDSError("The images carry no gradient; call images.requires_grad_() before the forward pass.")
    _checks.targets(target, logits)
    loss = F.cross_entropy(logits, target, reduction="sum", ignore_index=_checks.NOTHING)
    return torch.autograd.grad(loss, inputs, create_graph=create_graph)[0]


def gradient_at_loss(student_grad: Tensor, teacher_grad: Tensor) -> Tensor:
    """2-norm of the difference of the two networks' input gradients, per sample, mean over the batch (section 3.2).

    The code of this variant was never released; the per-sample norm is our reading. [recall]

    Args:
        student_grad: `input_gradient` of the student, with its graph (double backward), (B, 3, H, W).
        teacher_grad: `input_gradient` of the teacher, `create_graph=False`.
    """
    frozen = "take it with create_graph=False, or detach() it"
    _checks.pair(student_grad, teacher_grad, "input gradient", equal=True, frozen=frozen)
    difference = (full_precision(student_grad) - full_precision(teacher_grad)).flatten(1)
    loss = torch.linalg.vector_norm(difference, dim=1).mean()
    return _checks.finite(loss, student_gradient=student_grad, teacher_gradient=teacher_grad)


@TERMS.register
class AT(FeatureMap):
    """AT as a regulariser: sum over layers of the activation-based distance, in the public code's scale."""

    name, label = "at", "AT"
    space = (Axis("strength", 10.0, 0.1, 1e3),)

    def build(self, context: TermContext) -> nn.Module:
        return ATLoss(context.shapes)


@TRANSFERS.register
class ATTransfer(Transfer):
    """Activation-based attention transfer to a student; in mode "paper" the weight counts half, as in equation 2."""

    name, label = "at", "AT"

    def __init__(self, context: TermContext) -> None:
        super().__init__(context)
        self.weight = 0.5 if self.config.mode == "paper" else 1.0

    def compare(self, student: Tensor, teacher: Tensor, index: int) -> Tensor:
        return at_loss(student, teacher, p=self.config.exponent, mode=self.config.mode)


@TRANSFERS.register
class GradientAT(Transfer):
    """Gradient-based attention transfer to a student, by double backward."""

    name, label = "gradient-at", "gradient AT"
    needs = frozenset({"gradients"})

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.gradients is not None
        value = gradient_at_loss(*batch.gradients())
        return value, {"gradient_at": value}
