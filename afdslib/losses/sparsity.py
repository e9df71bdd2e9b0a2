"""What selection methods add to the loss: L1 on batch norm scales or on gates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from afdslib.losses.term import Batch, Term

__all__ = ["GateL1", "ScaleL1"]


class ScaleL1(Term):
    """Network slimming's term: strength times the sum of |gamma| over all batch norms. 1708.06519."""

    name, label = "slimming", "network slimming"

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        norms = [m for m in batch.model.modules() if isinstance(m, nn.BatchNorm2d) and m.affine]
        value = self.strength * torch.stack([norm.weight.abs().sum() for norm in norms]).sum()
        return value, {self.name: value}


class GateL1(Term):
    """FBS's optional term: strength times the sum over layers and channels of h, mean over the batch. 1810.05331."""

    name, label = "gate_l1", "FBS"

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self._sums: list[Tensor] = []

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        self._sums = []

        def record(layer: Any, args: tuple[Tensor, ...]) -> None:
            with torch.autocast(args[0].device.type, enabled=False):
                pooled = args[0].mean((2, 3), dtype=layer.predictor.weight.dtype)
                h = nn.functional.linear(pooled, layer.predictor.weight, layer.predictor.bias).relu()
                self._sums.append(h.sum(1).mean())

        with ExitStack() as stack:
            for layer in model.modules():
                if isinstance(getattr(layer, "predictor", None), nn.Linear):
                    stack.enter_context(layer.register_forward_pre_hook(record))
            yield

    def __call__(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        value = self.strength * torch.stack(self._sums).sum()
        return value, {self.name: value}
