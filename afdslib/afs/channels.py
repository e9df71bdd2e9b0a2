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
        return None


def _with_zeros(x: Tensor) -> Tensor:
    """One more channel, (B, C, H, W) -> (B, C + 1, H, W)."""
    return nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, 1))


class Spread(ChannelOp):
    """Kept channels back to their places in the full width, else zeros: (B, len(index), ...) -> (B, width, ...)."""

    index: Tensor
    places: Tensor

    def __init__(self, index: Tensor, width: int):
        super().__init__()
        self.width = width
        self.register_buffer("index", index, persistent=False)
        # Of each channel its place among the kept ones, and behind them all for one that is not kept.
        places = torch.full((width,), len(index), device=index.device)
        places[index] = torch.arange(len(index), device=index.device)
        self.register_buffer("places", places, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            # onnxruntime gathers much faster than it scatters; in torch it is the other way round.
            return _with_zeros(x).index_select(1, self.places)
        return x.new_zeros(x.shape[0], self.width, *x.shape[2:]).index_copy(1, self.index, x)

    def channels(self, entering: list[Tensor | None]) -> Tensor | None:
        known = self.index.new_ones(1, len(self.index)).float() if entering[0] is None else entering[0]
        return known.new_zeros(len(known), self.width).index_copy(1, self.index, known)

    def extra_repr(self) -> str:
        return f"{len(self.index)} of {self.width}"


class Pick(ChannelOp):
    """Some channels of a tensor: (B, C, ...) -> (B, len(index), ...)."""

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
        left, right: where the channels of the two addends go; None if one has all of them.

    Shape:
        (B, len(left), H, W), (B, len(right), H, W) -> (B, width, H, W).
    """

    def __init__(self, width: int, left: Tensor | None, right: Tensor | None):
        super().__init__()
        self.width = width
        self.left, self.right = (None if index is None else Spread(index, width) for index in (left, right))

    @property
    def indices(self) -> list[Tensor | None]:
        """The channels of both addends."""
        return [None if spread is None else spread.index for spread in (self.left, self.right)]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        left, right = self.left, self.right
        if torch.compiler.is_exporting():
            return (a if left is None else left(a)) + (b if right is None else right(b))
        if left is not None and (right is None or len(right.index) > len(left.index)):
            a, b, left, right = b, a, right, left
        if left is not None:
            a = left(a)
        return a + b if right is None else a.index_add(1, right.index, b)

    def channels(self, entering: list[Tensor | None]) -> Tensor | None:
        pairs = list(zip((self.left, self.right), entering, strict=True))
        if any(spread is None and known is None for spread, known in pairs):
            return None
        left, right = (known if spread is None else spread.channels([known]) for spread, known in pairs)
        return torch.maximum(left, right)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        left, right = ("all" if index is None else len(index) for index in self.indices)
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

    def forward(self, x: Tensor) -> Tensor:
        if self._pads:
            x = _with_zeros(x)
        y = self.conv(x.index_select(1, self.reads) if self._gathers else x)
        return y.index_select(1, self.writes) if self._selects else y

    def slots(self, entering: Tensor | None, leaving: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sets of input and output channels as sets of the slots of the convolution inside."""
        everything = torch.ones(1, max(self.in_channels, self.out_channels), device=self.reads.device)
        entering = everything[:, : self.in_channels] if entering is None else entering
        leaving = everything[:, : self.out_channels] if leaving is None else leaving
        written = leaving.new_zeros(len(leaving), self.conv.out_channels).index_copy(1, self.writes, leaving)
        return _with_zeros(entering[..., None, None]).flatten(1)[:, self.reads], written


class CutConvBN(AFSConvBN):
    """A selected convolution whose predictor has rows for some channels only; all others are static.

    Args:
        conv, norm, width: as for AFSConvBN.
        rows: the channels that the predictor gives importances for.
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
