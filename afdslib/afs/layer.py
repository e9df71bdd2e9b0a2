"""The selected convolution: gates predicted from a layer's input decide which of its output channels are computed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from afdslib.base.errors import AFDSError

__all__ = ["AFSConvBN", "Gates", "select"]


class Gates(NamedTuple):
    """The gates of one layer for one batch, each (B, C).

    Attributes:
        pi: selected importances, 0 where a channel is not selected.
        eta: the scale that replaces the batch norm's: s * pi + (1 - s) * gamma.
        active: 1 where the channel is computed for this sample, else 0.
    """

    pi: Tensor
    eta: Tensor
    active: Tensor


def select(h: Tensor, m: Tensor, s: Tensor, k: int) -> Tensor:
    """pi, (B, C): per sample, the largest importances h, (B, C), of the living dynamic channels; the rest is 0.

    Living static channels (m = 1, s = 0 of (C,)) take places first; of the living dynamic ones the min(k - static,
    dynamic) largest stay, found by a stable sort, so that the lowest index wins a tie. The gradient flows through what
    stays. [ours]
    """
    dynamic = m * s
    h = h * dynamic
    if k >= h.shape[1]:
        return h
    # The number of places stays a tensor: reading it would make every step wait for the device.
    places = k - (m * (1 - s)).sum()
    order = torch.sort(torch.where(dynamic > 0, h.detach(), -1.0), dim=1, descending=True, stable=True).indices
    keep = (torch.arange(h.shape[1], device=h.device) < places).to(h.dtype)
    return h * torch.zeros_like(h).scatter_(1, order, keep.expand_as(h))


def _average(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Global average, (B, C), in a precision of its own; of bf16 maps the sum is up to twice as fast as the mean."""
    return x.sum(dim=(2, 3), dtype=dtype) / (x.shape[2] * x.shape[3])


class _ScaleShift(torch.autograd.Function):
    """scale * y + shift with one scale and shift per sample and channel, in float32, kept in y's own precision.

    Autograd's own version keeps float32 copies of whole feature maps: training in bf16 took 2.5 times as long.
    """

    @staticmethod
    def forward(ctx, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(y, scale)
        return torch.addcmul(shift[:, :, None, None], scale[:, :, None, None], y.to(scale.dtype)).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, scale = ctx.saved_tensors
        grad_y = grad * scale[:, :, None, None].to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_scale = (grad * y).sum((2, 3), dtype=scale.dtype) if ctx.needs_input_grad[1] else None
        grad_shift = grad.sum((2, 3), dtype=scale.dtype) if ctx.needs_input_grad[2] else None
        return grad_y, grad_scale, grad_shift


class _PoolThrough(torch.autograd.Function):
    """A feature map and its global average, so that both gradients meet in one pass over the map, not in four."""

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        return x.view_as(x), _average(x, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_x: Tensor | None, grad_pooled: Tensor | None) -> tuple[Tensor | None, None]:
        if grad_pooled is None:
            return grad_x, None
        spread = (grad_pooled / (ctx.shape[2] * ctx.shape[3]))[:, :, None, None]
        if grad_x is None:
            return spread.expand(ctx.shape), None
        return grad_x + spread.to(grad_x.dtype), None


class AFSConvBN(nn.Module):
    """Convolution and batch norm whose output channels are weighted, and skipped, by gates on the input.

    ```
    y(x)   = norm(conv(x))                     batch norm without its affine part          [code: FBS]
    h(x)   = relu(gap(x) Phi + phi)                                                        [code]
    pi(x)  = select_k(h(x))                                                                [code, recall]
    eta(x) = s * pi(x) + (1 - s) * gamma                                                   [recall]
    a(x)   = m * ((1 - s) + s * 1[pi(x) > 0])                                              [ours]
    out    = a(x) * (eta(x) * y(x) + beta)                                                 [code, ours]
    ```

    The masks m and s and the constant gamma are per channel and part of the state_dict; m and s are only ever lowered
    by `afs.update_masks`. A channel with a(x) = 0 is exactly zero. Predictor, selection and scale run in float32
    (float64 in a float64 network) with autocast off.

    Args:
        conv: the convolution to gate; it is used as it is, not copied.
        norm: a batch norm without affine part over the convolution's output channels.
        width: the original number of output channels, from which k is computed; default: the present one.

    Shape:
        (B, C_in, H, W) -> (B, C, H', W').
    """

    m: Tensor
    s: Tensor
    gamma: Tensor

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, *, width: int | None = None):
        super().__init__()
        channels = conv.out_channels
        if norm.affine or norm.num_features != channels or norm.running_mean is None:
            raise AFDSError(
                f"the batch norm of an AFS layer has running statistics of its {channels} channels and no affine part; "
                "convert a network with afs.convert"
            )
        self.conv, self.norm = conv, norm
        like = next(conv.parameters()).detach()
        self.predictor = nn.Linear(conv.in_channels, channels, device=like.device, dtype=like.dtype)
        self.beta = nn.Parameter(like.new_zeros(channels))
        for name in ("m", "s", "gamma"):
            self.register_buffer(name, like.new_ones(channels))
        # The original width, from which k is computed even after channels have been cut out of the layer.
        self.width = channels if width is None else width
        self.density = 1.0

    @property
    def k(self) -> int:
        """Places: ceil(d * C - 1e-9), with C the original width."""
        return math.ceil(self.density * self.width - 1e-9)

    def gates(self, x: Tensor) -> Gates:
        """The gates for a batch of the layer's inputs, (B, C_in, H, W)."""
        with torch.autocast(x.device.type, enabled=False):
            return self._gates(_average(x, self._dtype))

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(torch.float32, self.predictor.weight.dtype)

    def predictor_weights(self) -> tuple[Tensor, Tensor]:
        """The predictor as a matrix (C, C_in) and a bias (C,) over all channels, 0 where it has no row."""
        return self.predictor.weight, self.predictor.bias

    def _importances(self, pooled: Tensor) -> Tensor:
        """h, (B, C), from the pooled input, (B, C_in)."""
        dtype = pooled.dtype
        return nn.functional.linear(pooled, self.predictor.weight.to(dtype), self.predictor.bias.to(dtype)).relu()

    def _gates(self, pooled: Tensor) -> Gates:
        dtype = pooled.dtype
        m, s = self.m.to(dtype), self.s.to(dtype)
        pi = select(self._importances(pooled), m, s, self.k)
        return Gates(pi, s * pi + (1 - s) * self.gamma.to(dtype), m * ((1 - s) + s * (pi > 0).to(dtype)))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x, pooled = _PoolThrough.apply(x, self._dtype)
            gates = self._gates(pooled)
        y = self.conv(x)
        with torch.autocast(x.device.type, enabled=False):
            scale = gates.active * gates.eta
            shift = gates.active * self.beta.to(scale.dtype)
            if self.norm.training:
                y = self.norm(y)
            else:
                # With fixed statistics the batch norm is an affine map too: one pass over the tensor does both.
                mean, variance = (t.to(scale.dtype) for t in (self.norm.running_mean, self.norm.running_var))  # type: ignore[union-attr]
                scale = scale * (variance + self.norm.eps).rsqrt()
                shift = shift - scale * mean
            return _ScaleShift.apply(y, scale, shift)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.density, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.density = float(state)

    def extra_repr(self) -> str:
        return f"k={self.k} of {self.width}, density={self.density:g}"
