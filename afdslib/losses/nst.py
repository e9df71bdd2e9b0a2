"""Neuron selectivity transfer. Huang, Wang, "Like What You Like", arXiv 1707.01219."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from afdslib.base import checks
from afdslib.base.errors import AFDSError
from afdslib.losses import _checks
from afdslib.losses._maps import full_precision, match_size
from afdslib.losses.term import TRANSFERS, Transfer

__all__ = ["nst_loss"]

# Bytes of kernel matrices held at a time where a kernel needs them entry by entry.
CHUNK_BYTES = 2**23

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def nst_loss(student: Tensor, teacher: Tensor, *, kernel: str = "poly", d: int = 2, c: float = 0.0) -> Tensor:
    """Squared maximum mean discrepancy between the channels of two networks, mean over the batch (equation 8).

    A sample's channels are its points: each map, flattened and divided by its 2-norm (a map that is zero everywhere
    stays a zero point, without gradient). With k the kernel and means over channels,

        mean k(t, t') + mean k(s, s') - 2 mean k(s, t).

    The public code drops the first term, a constant [code]; here it stays, so that equal maps give 0.

    No (B, C, C, HW) tensor is ever built. With S (C, HW) the points, mu their mean and G = S^T S / C, a linear kernel
    gives |mu_s - mu_t|^2, and (x.y + c)^2 gives |G_s - G_t|^2 + 2c |mu_s - mu_t|^2; where the channels are fewer than
    the positions, the Gram matrices S S^T replace G. Other kernels build Gram matrices for a few samples at a time.

    Args:
        student: Features of the layer.
        teacher: The teacher's, without gradient. Of two sizes, the larger is averaged by area to the smaller height and
            width (deterministic; a warning says so). [ours]
        kernel: "poly": (x.y + c)^d; "linear": x.y; "gaussian": exp(-|x-y|^2 / 2 sigma^2) with sigma^2 the mean of
            |s-t|^2 over the sample's student-teacher pairs (the paper's "mean of squared distance of the pairs"
            [recall]; which pairs, and that sigma is differentiated, is [ours]).
        d: Degree of the polynomial, a whole number of at least 1.
        c: Offset of the polynomial, at least 0.

    Shape:
        (B, C, H, W) and (B, C', H', W'); the result is a scalar.

    Raises:
        AFDSError: as `at_loss`; also a map too large for its norm, an unknown kernel, a bad degree or offset.
    """
    if kernel not in ("poly", "linear", "gaussian"):
        raise AFDSError(f"The kernel {kernel!r} is unknown; use 'poly', 'linear' or 'gaussian'.")
    if kernel == "poly":
        checks.whole("the degree d of the polynomial kernel", d, 1)
        checks.number("the offset c of the polynomial kernel", c, least=0)
    _checks.pair(student, teacher, "feature map")
    # Autocast would run the products below in half precision; the terms nearly cancel.
    with torch.autocast(student.device.type, enabled=False):
        maps = match_size(full_precision(student), full_precision(teacher), "Neuron selectivity transfer")
        s, t = map(_points, maps)
        if kernel == "gaussian":
            loss = _InChunks.apply(s, t, _gaussian)
        elif kernel == "linear" or d == 1:
            loss = _mean_gap(s, t)
        elif d == 2:
            loss = _quadratic(s, t) + (2 * c * _mean_gap(s, t) if c != 0 else 0)
        else:
            loss = _InChunks.apply(s, t, lambda x, y, _: (torch.bmm(x, y.mT) + c).pow(d))
    return _checks.finite(loss, student_map=student, teacher_map=teacher)


def _points(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H*W), each row of norm 1 or all zero; NaN where the norm overflows."""
    x = x.flatten(2)
    norm = torch.linalg.vector_norm(x, dim=2, keepdim=True)
    # Not max(norm, eps): its slope of 1/eps would blow up the gradient of channels that are off.
    on = norm > 1e-10
    # An infinite norm would make the point 0, as if the channel were off.
    return x * (on / torch.where(on, norm, 1.0)).masked_fill(norm.isinf(), torch.nan)


def _mean_gap(s: Tensor, t: Tensor) -> Tensor:
    """|mu_s - mu_t|^2, mean over the batch."""
    return (s.mean(1) - t.mean(1)).square().sum(1).mean()


def _quadratic(s: Tensor, t: Tensor) -> Tensor:
    """The squared discrepancy of the kernel (x.y)^2 from the smaller side's Gram matrices."""
    cs, ct, positions = s.shape[1], t.shape[1], s.shape[2]
    if 2 * positions * positions <= cs * cs + cs * ct + ct * ct:
        return (torch.bmm(s.mT, s) / cs - torch.bmm(t.mT, t) / ct).square().sum((1, 2)).mean()
    # Sums in float64: the three terms nearly cancel when the networks agree.
    ss, st, tt = (torch.bmm(x, y.mT).square().double().mean((1, 2)) for x, y in ((s, s), (s, t), (t, t)))
    return (ss + tt - 2 * st).mean().to(s.dtype)


def _gaussian(x: Tensor, y: Tensor, variance: Tensor) -> Tensor:
    distance = x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :] - 2 * torch.bmm(x, y.mT)
    return torch.exp(-distance / (2 * variance[:, None, None]))


def _summed(s: Tensor, t: Tensor, kernel: Kernel) -> Tensor:
    """The summed discrepancies of some samples."""
    # The mean over student-teacher pairs of |s - t|^2, (B,), is 0 only where all points of both networks coincide; the
    # kernel is then 1 everywhere, whatever the width.
    variance = s.square().sum(2).mean(1) + t.square().sum(2).mean(1) - 2 * (s.mean(1) * t.mean(1)).sum(1)
    variance = variance.clamp(min=1e-6)
    ss, st, tt = (kernel(x, y, variance).double().mean((1, 2)) for x, y in ((s, s), (s, t), (t, t)))
    return (ss + tt - 2 * st).sum().to(s.dtype)


class _InChunks(torch.autograd.Function):
    """The mean over samples of the discrepancy, a few samples at a time.

    The gradient is taken in the forward pass, so that one chunk's matrices are all that ever exist.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, kernel: Kernel) -> Tensor:
        batch, channels = s.shape[0], max(s.shape[1], t.shape[1])
        step = max(1, CHUNK_BYTES // (channels * channels * s.element_size()))
        total, gradient = s.new_zeros(()), torch.empty_like(s) if ctx.needs_input_grad[0] else None
        for start in range(0, batch, step):
            part = slice(start, start + step)
            with torch.set_grad_enabled(gradient is not None):
                chunk = s[part].detach().requires_grad_(gradient is not None)
                loss = _summed(chunk, t[part], kernel) / batch
                if gradient is not None:
                    gradient[part] = torch.autograd.grad(loss, chunk)[0]
            total += loss.detach()
        ctx.gradient = gradient
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        return (None if ctx.gradient is None else upstream * ctx.gradient), None, None


@TRANSFERS.register
class NSTTransfer(Transfer):
    """Neuron selectivity transfer to a student."""

    name, label = "nst", "NST"

    def compare(self, student: Tensor, teacher: Tensor, index: int) -> Tensor:
        return nst_loss(student, teacher, kernel=self.config.kernel, d=self.config.degree, c=self.config.offset)
