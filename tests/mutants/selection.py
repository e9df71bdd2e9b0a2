"""Faults of the gated layer and of its conversion."""

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from afdslib.afs.layer import AFSConvBN, Gates, select

convert = importlib.import_module("afdslib.afs.convert")  # the package gives the function of that name


def _forward(self: AFSConvBN, x: Tensor, *, scale_of, shift_of) -> Tensor:
    """The layer, written out, with another scale and another shift."""
    gates = self.gates(x)
    scale, shift = scale_of(self, gates), shift_of(self, gates)
    return (scale[..., None, None] * self.norm(self.conv(x)) + shift[..., None, None]).to(x.dtype)


def _layer(scale_of, shift_of) -> AbstractContextManager:
    def forward(self: AFSConvBN, x: Tensor) -> Tensor:
        return _forward(self, x, scale_of=scale_of, shift_of=shift_of)

    return mock.patch.object(AFSConvBN, "forward", forward)


def _unchecked() -> AbstractContextManager:
    """The conversion does not compare its result, or it would refuse the fault by itself."""
    return mock.patch.object(convert, "require_same", lambda *_, **__: None)


def static_layer_outputs_zero() -> AbstractContextManager:
    """With s = 0 a layer outputs 0 instead of gamma * y."""

    def gates(self: AFSConvBN, pooled: Tensor) -> Gates:
        h = nn.functional.linear(pooled, self.predictor.weight, self.predictor.bias).relu()
        pi = select(h, self.m, self.s, self.k)
        return Gates(pi, self.s * pi, self.m * self.s * (pi > 0))

    return mock.patch.object(AFSConvBN, "_gates", gates)


def wrong_channel_count() -> AbstractContextManager:
    """Places of the third convolution are counted from the block's narrow width: 2.5 % are suppressed, not 10 %."""

    def k(self: AFSConvBN) -> int:
        expands = self.width >= 4 * self.conv.in_channels and self.conv.kernel_size == (1, 1)
        count = self.conv.in_channels if expands else self.width
        return self.width - int((1 - self.density) * count + 1e-9)

    return mock.patch.object(AFSConvBN, "k", property(k))


@contextmanager
def extra_relu() -> Iterator[None]:
    """A ReLU at the end of each gated layer, so one before the residual add."""
    original = AFSConvBN.forward
    with _unchecked(), mock.patch.object(AFSConvBN, "forward", lambda self, x: original(self, x).relu()):
        yield


@contextmanager
def batch_norm_keeps_its_affine_part() -> Iterator[None]:
    """The gate multiplies a batch norm that scales and shifts already."""
    original = convert._convert_pair

    def convert_pair(conv: nn.Conv2d, norm: nn.BatchNorm2d, *names: str) -> AFSConvBN:
        layer = original(conv, norm, *names)
        layer.affine = norm.weight.detach().abs()
        return layer

    def scale(layer: AFSConvBN, gates: Gates) -> Tensor:
        return gates.active * gates.eta * layer.affine

    def shift(layer: AFSConvBN, gates: Gates) -> Tensor:
        return gates.active * gates.eta * layer.beta

    with _unchecked(), mock.patch.object(convert, "_convert_pair", convert_pair), _layer(scale, shift):
        yield


def gate_multiplies_the_shift() -> AbstractContextManager:
    """The second half of the same fault alone: eta * (y + beta)."""
    return _layer(lambda layer, g: g.active * g.eta, lambda layer, g: g.active * g.eta * layer.beta)


@contextmanager
def random_predictors() -> Iterator[None]:
    """Predictors start at random, which destroys the pretrained function."""
    original = convert._convert_pair

    def convert_pair(*args) -> AFSConvBN:
        layer = original(*args)
        torch.manual_seed(0)
        layer.predictor.reset_parameters()
        return layer

    with _unchecked(), mock.patch.object(convert, "_convert_pair", convert_pair):
        yield


def removed_channel_keeps_its_shift() -> AbstractContextManager:
    """A channel with m = 0 is beta instead of 0, so it cannot be cut out."""
    return _layer(lambda layer, g: g.active * g.eta, lambda layer, g: layer.beta.expand_as(g.eta))


def removed_channel_is_only_scaled_down() -> AbstractContextManager:
    """The masks scale channels instead of removing them."""
    return _layer(
        lambda layer, g: (0.1 + 0.9 * g.active) * layer.predictor.bias.relu(),
        lambda layer, g: (0.1 + 0.9 * g.active) * layer.beta,
    )


def masks_missing_from_the_state_dict() -> AbstractContextManager:
    original = AFSConvBN.__init__

    def init(self: AFSConvBN, *args, **kwargs) -> None:
        original(self, *args, **kwargs)
        self._non_persistent_buffers_set.update({"m", "s", "gamma"})

    return mock.patch.object(AFSConvBN, "__init__", init)


def gates_ignored() -> AbstractContextManager:
    """The forward pass is that of the plain network: the gates are computed, and nobody looks at them."""

    def constant(layer: AFSConvBN, gates: Gates) -> Tensor:
        return layer.predictor.bias.abs().expand_as(gates.eta)

    return _layer(constant, lambda layer, gates: layer.beta.expand_as(gates.eta))
