"""AFS layers by masking: plain operations with constant masks, for exports, compilers and dynamic execution."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from afdslib.afs.compact import fold_norm
from afdslib.afs.layer import AFSConvBN

__all__ = ["GatedInference", "inference"]


class GatedInference(nn.Module):
    """An AFS layer in eval mode by plain operations: the batch norm is folded, the masks and k are constants.

    Shape:
        (B, C_in, H, W) -> (B, C, H', W').
    """

    def __init__(self, layer: AFSConvBN):
        super().__init__()
        self.conv = copy.deepcopy(layer.conv)
        fold_norm(self.conv, layer.norm)
        dynamic = layer.m * layer.s > 0
        static = (layer.m > 0) & ~dynamic
        rows, rest = dynamic.nonzero()[:, 0], (~dynamic).nonzero()[:, 0]
        weight, bias = layer.predictor_weights()
        wide = torch.promote_types(torch.float32, weight.dtype)
        self.places = min(max(layer.k - int(static.sum()), 0), len(rows))
        self.dynamic, self.channels = len(rows), layer.m.numel()
        self.order = nn.Buffer(torch.cat([rows, rest]).argsort())
        self.weight, self.bias = nn.Buffer(weight.detach()[rows].to(wide)), nn.Buffer(bias.detach()[rows].to(wide))
        self.gamma = nn.Buffer(torch.where(static, layer.gamma, 0)[None].to(wide))
        self.active, self.shift = nn.Buffer(static.to(wide)[None]), nn.Buffer(layer.beta.detach().to(wide))

    def forward(self, x: Tensor) -> Tensor:
        scale, active = self._gates(x) if self.places else (self.gamma, self.active)
        shift = (active * self.shift).to(x.dtype)
        return self.conv(x) * scale.to(x.dtype)[:, :, None, None] + shift[:, :, None, None]

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = nn.functional.linear(x.mean((2, 3), dtype=self.weight.dtype), self.weight, self.bias).relu()
        if self.places < self.dynamic:
            # The lowest index must win a tie: ONNX's TopK promises that, torch's does not.
            if torch.compiler.is_exporting():
                largest, index = h.topk(self.places, dim=1)
            else:
                ordered = torch.sort(h, dim=1, descending=True, stable=True)
                largest, index = (t[:, : self.places] for t in ordered)
            h = torch.zeros_like(h).scatter(1, index, largest)
        if self.dynamic == self.channels:
            return h, (h > 0).to(h.dtype)
        h = nn.functional.pad(h, (0, self.channels - self.dynamic)).index_select(1, self.order)
        return h + self.gamma, (h > 0).to(h.dtype) + self.active


@torch.no_grad()
def inference(model: nn.Module) -> nn.Module:
    """A copy of a network in eval mode whose AFS layers are `GatedInference`, for exports and compilers."""
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    for name, layer in [(n, m) for n, m in plain.named_modules() if isinstance(m, AFSConvBN)]:
        plain.set_submodule(name, GatedInference(layer))
    return plain.eval()
