"""Layers of compact networks: tensors that hold only some of the channels meet, widen, narrow and are convolved.

Every list of channels is sorted, so that a channel's place among the kept ones follows from its number.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from afdslib.afs.layer import AFSConvBN

__all__ = ["ChannelOp", "CutConvBN", "GroupedConv2d", "Join", "Pick", "Spread"]


class ChannelOp(nn.Module):
    """A layer that torch.fx keeps whole, and that says which channels of its output can be other than zero."""

    def channels(self, entering: list[Tensor | None]) -> Tensor | None:
        """The output's set from the inputs' sets; a set is (B, C) with 1 for active, or None for "all channels"."""
        raise NotImplementedError


def _scatter(channels: Tensor, index: Tensor | None, width: int) -> Tensor:
    if index is None:
        return channels
    return channels.new_zeros(channels.shape[0], width).index_copy(1, index, channels)


def _places(index: Tensor | None, width: int) -> Tensor | None:
    """For each of `width` channels its place among the kept ones, and behind them all for one that is not kept."""
    if index is None:
        return None
    places = torch.full((width,), len(index), device=index.device)
    places[index] = torch.arange(len(index), device=index.device)
    return places


def _with_zeros(x: Tensor) -> Tensor:
    """One more channel, (B, C, H, W) -> (B, C + 1, H, W)."""
    return nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, 1))


def _gathered(x: Tensor, places: Tensor | None) -> Tensor:
    return x if places is None else _with_zeros(x).index_select(1, places)


class Spread(ChannelOp):
    """Kept channels back to their places in the full width; the others are zero.

    Shape:
        (B, len(index), ...) -> (B, width, ...).
    """

    index: Tensor
    places: Tensor

    def __init__(self, index: Tensor, width: int):
        super().__init__()
        self.width = width
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("places", _places(index, width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return _gathered(x, self.places)
        return x.new_zeros(x.shape[0], self.width, *x.shape[2:]).index_copy(1, self.index, x)

    def channels(self, entering: list[Tensor | None]) -> Tensor | None:
        known = self.index.new_ones(1, len(self.index)).float() if entering[0] is None else entering[0]
        return _scatter(known, self.index, self.width)

    def extra_repr(self) -> str:
        return f"{len(self.index)} of {self.width}"


class Pick(ChannelOp):
    """Some channels of a tensor.

    Shape:
        (B, C, ...) -> (B, len(index), ...).
    """

    index: Tensor

    def __init__(self, index: Tensor):
        super().__init__()
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index)

    def channels(self, entering: list[Tensor | None]) -> Tensor | None:
        return None if entering[0] is None else entering[0][:, self.index]

    def extra_repr(self) -> str:
        return f"{len(self.index)}"


class Join(ChannelOp):
    """A residual add whose addends hold different channels: each writes only those it has.

    Args:
        width: channels of the sum.
        left: where the channels of the first addend go; None if it has all of them.
        right: the same for the second addend.

    Shape:
        (B, len(left), H, W), (B, len(right), H, W) -> (B, width, H, W).
    """

    left: Tensor | None
    right: Tensor | None
    left_places: Tensor | None
    right_places: Tensor | None

    def __init__(self, width: int, left: Tensor | None, right: Tensor | None):
        super().__init__()
        self.width = width
        for name, index in (("left", left), ("right", right)):
            self.register_buffer(name, index, persistent=False)
            self.register_buffer(f"{name}_places", _places(index, width), persistent=False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            # onnxruntime gathers and adds much faster than it scatters; in torch it is the other way round.
            return _gathered(a, self.left_places) + _gathered(b, self.right_places)
        into, of = self.left, self.right
        if into is not None and (of is None or len(of) > len(into)):
            a, b, into, of = b, a, of, into
        if into is not None:
            a = a.new_zeros(a.shape[0], self.width, *a.shape[2:]).index_copy(1, into, a)
        return a + b if of is None else a.index_add(1, of, b)

    def channels(self, entering: list[Tensor | None]) -> Tensor | None:
        sets = []
        for channels, index in zip(entering, (self.left, self.right), strict=True):
            if channels is None:
                if index is None:
                    return None
                channels = torch.ones(1, len(index), device=index.device)
            sets.append(_scatter(channels, index, self.width))
        return torch.maximum(*sets)

    def extra_repr(self) -> str:
        left, right = ("all" if i is None else str(len(i)) for i in (self.left, self.right))
        return f"{left} + {right} of {self.width}"


class GroupedConv2d(ChannelOp):
    """A grouped convolution with channels cut out of groups unequally, as the masks left them.

    The convolution inside has equal groups; slots that no channel needs read zeros, and what they write is dropped.

    Args:
        conv: the convolution inside.
        in_channels: channels of the input.
        reads: which input channel each slot of `conv` reads; `in_channels` stands for zeros.
        writes: which slot of `conv` gives each output channel.
    """

    reads: Tensor
    writes: Tensor

    def __init__(self, conv: nn.Conv2d, in_channels: int, reads: Tensor, writes: Tensor):
        super().__init__()
        self.conv = conv
        self.in_channels, self.out_channels = in_channels, len(writes)
        self.register_buffer("reads", reads, persistent=False)
        self.register_buffer("writes", writes, persistent=False)
        self._pads = bool((reads == in_channels).any())
        self._gathers = self._pads or not torch.equal(reads.cpu(), torch.arange(in_channels))
        self._selects = not torch.equal(writes.cpu(), torch.arange(conv.out_channels))

    @property
    def weight(self) -> Tensor:
        return self.conv.weight

    @property
    def bias(self) -> Tensor | None:
        return self.conv.bias

    def forward(self, x: Tensor) -> Tensor:
        if self._pads:
            x = _with_zeros(x)
        if self._gathers:
            x = x.index_select(1, self.reads)
        y = self.conv(x)
        return y.index_select(1, self.writes) if self._selects else y

    def channels(self, entering: list[Tensor | None]) -> Tensor | None:
        return None

    def slots(self, entering: Tensor | None, leaving: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sets of input and output channels as sets of the slots of the convolution inside."""
        if entering is None:
            entering = torch.ones(1, self.in_channels, device=self.reads.device)
        if leaving is None:
            leaving = torch.ones(1, self.out_channels, device=self.writes.device)
        read = torch.cat([entering, entering.new_zeros(entering.shape[0], 1)], 1)[:, self.reads]
        return read, _scatter(leaving, self.writes, self.conv.out_channels)


class CutConvBN(AFSConvBN):
    """A selected convolution whose static channels have no row in the predictor.

    Args:
        conv, norm, width: as for AFSConvBN.
        rows: the channels that the predictor gives importances for; all others are static.
    """

    rows: Tensor

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, *, width: int, rows: Tensor):
        super().__init__(conv, norm, width=width)
        like = self.predictor.weight.detach()
        self.predictor = nn.Linear(conv.in_channels, len(rows), device=like.device, dtype=like.dtype)
        self.register_buffer("rows", rows, persistent=False)

    def _importances(self, pooled: Tensor) -> Tensor:
        h = super()._importances(pooled)
        return h.new_zeros(h.shape[0], self.m.numel()).index_copy(1, self.rows, h)

    def predictor_weights(self) -> tuple[Tensor, Tensor]:
        weight, bias = super().predictor_weights()
        channels = self.m.numel()
        whole = weight.new_zeros(channels, weight.shape[1]).index_copy(0, self.rows, weight)
        return whole, bias.new_zeros(channels).index_copy(0, self.rows, bias)
