"""Naive forms of losses, as the formulas are written: what the losses' time and memory are compared with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afdslib.losses import at_loss, nst_loss
from afdslib.losses.afd import AFDLoss

__all__ = ["loss_pass", "naive_afd", "naive_at", "naive_nst", "nst_pass"]


def naive_at(student: Tensor, teacher: Tensor) -> Tensor:
    """AT sample by sample."""
    total = student.new_zeros(())
    for s, t in zip(student, teacher, strict=True):
        a, b = (x.pow(2).mean(0).flatten() for x in (s, t))
        total = total + (a / a.norm() - b / b.norm()).pow(2).mean()
    return total / len(student)


def naive_nst(student: Tensor, teacher: Tensor) -> Tensor:
    """NST as in the popular implementations: the kernel of all pairs of channels from a (B, C, C, HW) tensor."""
    s, t = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x[:, :, None] * y[:, None]).sum(-1).pow(2).mean()

    return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)


def naive_afd(student: Tensor, source: Tensor, attention: nn.Module) -> Tensor:
    """AFD channel by channel, as the formula sums it."""
    rho = attention(source).softmax(1)
    height, width = student.shape[2:]
    total = student.new_zeros(())
    for channel in range(student.shape[1]):
        distance = (student[:, channel] - source[:, channel]).pow(2).sum((1, 2))
        total = total + (rho[:, channel] * distance).mean()
    return student.shape[1] / (2 * height * width) * total


def loss_pass(name: str, naive: bool, shape: tuple[int, ...]) -> Callable[[], object]:
    """Forward and backward pass of a loss on random maps."""
    torch.manual_seed(0)
    student, source = torch.rand(shape, requires_grad=True), torch.rand(shape)
    afd = AFDLoss({"map": (shape[1], shape[2], shape[3])})
    loss: Any = {
        ("AT", False): at_loss,
        ("AT", True): naive_at,
        ("NST", False): nst_loss,
        ("NST", True): naive_nst,
        ("AFD", False): lambda s, t: afd({"map": s}, {"map": t})["afd"],
        ("AFD", True): partial(naive_afd, attention=afd.attentions["map"]),
    }[name, naive]

    def call() -> None:
        student.grad = None
        loss(student, source).backward()

    few = torch.rand(2, *shape[1:], requires_grad=True)
    loss(few, torch.rand(few.shape)).backward()  # what the first call of all allocates is not the loss's own
    return call


def nst_pass(kernel: str, shape: tuple[int, ...]) -> Callable[[], object]:
    """Forward and backward pass of NST with one kernel on random maps."""
    torch.manual_seed(0)
    student, teacher = torch.rand(shape, requires_grad=True), torch.rand(shape)
    nst_loss(student[:1, :8], teacher[:1, :8], kernel=kernel).backward()  # what the first call of all allocates
    student.grad = None
    return lambda: nst_loss(student, teacher, kernel=kernel).backward()
