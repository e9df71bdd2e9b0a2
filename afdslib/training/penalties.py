"""What selection methods add to the loss: L1 on the scales or on the gates, and distillation for narrow networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from afdslib.afs.layer import AFSConvBN
from afdslib.losses.kd import soft_kl_loss
from afdslib.training.features import Teacher
from afdslib.training.objective import Penalty

__all__ = ["Distil", "GateL1", "ScaleL1"]


class ScaleL1(Penalty):
    """Network slimming's term: strength times the sum of |gamma| over all batch norms. 1708.06519."""

    def __init__(self, strength: float):
        self.strength = strength

    def add(
        self, loss: Tensor, model: nn.Module, images: Tensor, logits: Tensor, labels: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        scales = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.affine]
        term = self.strength * torch.stack([s.abs().sum() for s in scales]).sum()
        return loss + term, {"slimming": term}


class GateL1(Penalty):
    """FBS's optional term: strength times the sum over layers and channels of h, mean over the batch. 1810.05331."""

    def __init__(self, strength: float):
        self.strength = strength
        self._sums: list[Tensor] = []

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        self._sums = []

        def record(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(layer, AFSConvBN)
            with torch.autocast(args[0].device.type, enabled=False):
                pooled = args[0].mean((2, 3), dtype=torch.float32)
                h = nn.functional.linear(pooled, layer.predictor.weight, layer.predictor.bias).relu()
                self._sums.append(h.sum(1).mean())

        handles = [m.register_forward_pre_hook(record) for m in model.modules() if isinstance(m, AFSConvBN)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(
        self, loss: Tensor, model: nn.Module, images: Tensor, logits: Tensor, labels: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        term = self.strength * torch.stack(self._sums).sum()
        return loss + term, {"gate_l1": term}


class Distil(Penalty):
    """Knowledge distillation: alpha T^2 KL + (1 - alpha) CE, beside whatever regulariser there is. 1503.02531."""

    def __init__(self, teacher: Teacher, *, T: float, alpha: float):
        self.teacher, self.T, self.alpha = teacher, T, alpha

    def add(
        self, loss: Tensor, model: nn.Module, images: Tensor, logits: Tensor, labels: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        teacher_logits, _ = self.teacher.to(images.device, torch.channels_last)(images)
        soft = soft_kl_loss(logits, teacher_logits, T=self.T)
        # The loss so far holds the whole cross-entropy, of which alpha is taken back.
        hard = nn.functional.cross_entropy(logits.float(), labels)
        return loss + self.alpha * (soft - hard), {"kd": soft}
