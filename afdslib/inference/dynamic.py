"""Dynamic execution: a gated network that computes, for each image, only the channels that its gates keep.

The gates of a layer need its pooled input only, so they come first; then the convolution runs on the kept output
channels and on the input channels that are not zero. Between the layers of a block only kept channels exist: `Channels`
holds their maps and their numbers, and the last convolution of a block adds its own to the residual stream.

A layer keeps at most k channels, so exactly that many are computed: a selected channel whose importance is 0 gets scale
and shift 0. The shapes are then the same for every image, which kernels that are compiled per shape need. [ours]

Which way is fastest depends on the machine, so `dynamic` measures the ways of every layer on the images it is given,
and the whole network against masking, and takes the fastest.
"""

from __future__ import annotations

import copy
import operator
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from afdslib.afs.channels import Join, Spread
from afdslib.afs.graph import keeps_channels, keeps_channels_call, trace
from afdslib.afs.layer import AFSConvBN
from afdslib.base.errors import AFDSError
from afdslib.inference import kernels

__all__ = ["Choice", "DynamicConvBN", "DynamicNetwork", "dynamic", "ways"]

_KINDS = ("mask", "gather", "group")
# What is read between two measurements, so that weights come from memory as they do in a pass through the network.
_FLUSH_BYTES = 48 * 2**20
# In eval mode these return their input.
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)
# From this many samples on, predictors multiply whole matrices instead of adding up the rows that are needed.
_BAG_SAMPLES = 4
# A way must beat masking by this share to be taken: measurements are noisy, and masking is the safe one.
_MARGIN = 0.03


@dataclass(frozen=True)
class Choice:
    """The way of one layer.

    Attributes:
        layer: its name.
        way: the way taken, of `ways`.
        microseconds: the fastest of the measurements of each way.
    """

    layer: str
    way: str
    microseconds: Mapping[str, float]


# --------------------------------------------------------------------------------------------------- channels of a map


def _offsets(index: Tensor, channels: int) -> Tensor:
    """(B, n) channel numbers to (B * n,) rows of a (B * C, ...) view."""
    if index.shape[0] == 1:
        return index[0]
    return (index + channels * torch.arange(index.shape[0], device=index.device)[:, None]).flatten()


def _put(values: Tensor, index: Tensor, channels: int) -> Tensor:
    """The whole map (B, C, ...) whose other channels are 0."""
    batch, _, *rest = values.shape
    whole = values.new_zeros(batch * channels, *rest)
    return whole.index_copy_(0, _offsets(index, channels), values.flatten(0, 1)).view(batch, channels, *rest)


def _add(whole: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """Adds channels to a map, in place where its memory is in order."""
    whole = whole.contiguous()  # a map in channels-last order has no rows of channels
    batch, channels, *rest = whole.shape
    rows = whole.view(batch * channels, *rest)
    rows.index_add_(0, _offsets(index, channels), values.flatten(0, 1))
    return whole


def _add_copy(whole: Tensor, values: Tensor, index: Tensor) -> Tensor:
    return _add(whole.clone(memory_format=torch.contiguous_format), values, index)


def _take(whole: Tensor, index: Tensor) -> Tensor:
    """The channels (B, n, ...) of a map (B, C, ...)."""
    batch, channels, *rest = whole.shape
    rows = whole.reshape(batch * channels, *rest).index_select(0, _offsets(index, channels))
    return rows.view(batch, index.shape[1], *rest)


def _union(indices: tuple[Tensor, ...], channels: int, places: int) -> Tensor:
    """Numbers of the channels that are in any of the sets, (B, places), filled up with channels that are all zero."""
    active = torch.zeros(indices[0].shape[0], channels, device=indices[0].device)
    for index in indices:
        active.scatter_(1, index, 1.0)
    if places:
        return active.topk(places, dim=1, sorted=False).indices
    return active[0].nonzero().T  # as many as there are; for a single image


def _repeat(index: Tensor, values: Tensor) -> Tensor:
    return index.expand(values.shape[0], -1)


def _look_up(index: Tensor, at: Tensor) -> Tensor:
    return index[at]


def _pool(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3), dtype=torch.promote_types(torch.float32, x.dtype))


# ------------------------------------------------------------------------------------------------------------ one layer


def _is_plain(conv: nn.Module) -> bool:
    return isinstance(conv, nn.Conv2d) and conv.groups == 1 and conv.padding_mode == "zeros"


@torch.no_grad()
def _constant(conv: nn.Conv2d) -> AFSConvBN:
    """A convolution without gates as a selected one whose channels are all static."""
    bare = copy.deepcopy(conv)
    bare.bias = None
    like = conv.weight
    norm = nn.BatchNorm2d(conv.out_channels, affine=False, device=like.device, dtype=like.dtype)
    assert norm.running_var is not None
    norm.running_var.sub_(norm.eps)
    layer = AFSConvBN(bare, norm)
    layer.s.zero_()
    if conv.bias is not None:
        layer.beta.copy_(conv.bias)
    return layer.eval()


def _is_matmul(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.padding in ((0, 0), "valid") and conv.groups == 1


def _suits_kernel(layer: AFSConvBN) -> bool:
    """Whether our own kernel knows such a layer: a square filter centred on a position."""
    conv = layer.conv
    high, wide = conv.kernel_size
    centred = high == wide and high % 2 == 1 and conv.padding in ((high // 2, wide // 2), "same")
    return centred and conv.stride[0] == conv.stride[1] and conv.dilation == (1, 1) and _has_kernels(conv.weight)


def _has_kernels(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and kernels.available()


def ways(layer: AFSConvBN, *, compact_input: bool, batch: int = 1, own: bool = True) -> list[str]:
    """The ways in which a layer can be computed.

    - "mask": the convolution with all living channels, scaled by the gates.
    - "gather/...": weights of the kept channels are gathered for each sample. "matmul" for 1x1 convolutions; else
      "conv", "last" (the same on channels-last maps) or "unfold" (patches times weights). Weights with two indices are
      gathered by "rows", then columns, or by "pairs" at once. "gather/own/pairs" is our own kernel, for one image in
      float32 on the CPU where a C++ compiler is found.
    - "group/...": the same once for all samples of a batch that keep the same channels.

    Args:
        layer: the layer.
        compact_input: whether its input consists of kept channels only.
        batch: samples at a time.
        own: False to leave out our own kernel, which torch.compile and exports cannot follow.
    """
    conv = layer.conv
    if not _is_plain(conv):
        return ["mask"]
    kernels = ["matmul"] if _is_matmul(conv) else ["conv", "last"]
    if not _is_matmul(conv) and not isinstance(conv.padding, str):
        kernels.append("unfold")
    gathers = ["rows", "pairs"] if compact_input and not _is_matmul(conv) else ["rows"]
    found = [f"{kernel}/{gather}" for kernel in kernels for gather in gathers]
    kinds = ["gather"] + (["group"] if batch > 1 else [])
    first = ["gather/own/pairs"] if own and batch == 1 and _suits_kernel(layer) else []
    return ["mask", *first] + [f"{kind}/{each}" for kind in kinds for each in found]


class DynamicConvBN(nn.Module):
    """A selected convolution with its weights prepared for one way of dynamic execution. It is not trained.

    The batch norm's fixed statistics are folded into weights and bias: W' = W / std, b' = (b - mean) / std.
    Only rows of living channels are kept: static ones first where weights are gathered, else in their order. With
    `relu` our own kernel does the ReLU behind the layer, too.

    Args:
        layer: the layer in eval mode; it is left as it is.
        way: of `ways`.
        compact_input: whether the input consists of some channels only, named by an index.
        ordered: kept channels in ascending order, which "group" needs; otherwise by importance.

    Shape:
        - values: (B, n_in, H, W); index: their channel numbers (B, n_in), or None for all channels
        - pooled: means of the values over positions, (B, n_in); not needed without dynamic channels
        - result: (B, n, H', W') and their channel numbers (B, n), or None if these are all channels in order; from our
          own kernel also the means of the maps over positions, (B, n)
    """

    rows: Tensor
    weight: Tensor
    table: Tensor
    gamma: Tensor
    is_dynamic: Tensor
    dynamic_rows: Tensor
    static_rows: Tensor
    every: Tensor
    phi: Tensor
    phi_bias: Tensor
    bag: Tensor
    terms: Tensor
    static_shift: Tensor

    def __init__(self, layer: AFSConvBN, way: str, *, compact_input: bool, ordered: bool = False):
        super().__init__()
        conv, norm = layer.conv, layer.norm
        kind, *detail = way.split("/")
        self.way, self.kind = way, kind
        self.kernel, self.gather = detail if detail else ("conv", "rows")
        self.compact_input, self.ordered = compact_input, ordered
        self.channels, self.in_channels = conv.out_channels, conv.in_channels
        self.kernel_size = tuple(conv.kernel_size)
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        with torch.no_grad():
            living, dynamic = layer.m > 0, (layer.m > 0) & (layer.s > 0)
            static = living & ~dynamic
            rows = torch.cat([static.nonzero()[:, 0], dynamic.nonzero()[:, 0]])
            self.static, self.dynamic = int(static.sum()), int(dynamic.sum())
            self.places = min(max(0, layer.k - self.static), self.dynamic)
            if kind == "mask":
                rows = living.nonzero()[:, 0]
            statistics = [t.to(conv.weight.dtype) for t in (norm.running_mean, norm.running_var)]  # type: ignore[union-attr]
            scale = (statistics[1] + norm.eps).rsqrt()
            bias = (-statistics[0] if conv.bias is None else conv.bias - statistics[0]) * scale
            weight = (conv.weight * scale[:, None, None, None])[rows].contiguous()
            # (bias, beta) side by side: one look-up per selected channel.
            table = torch.stack([bias, layer.beta], 1)[rows]
            phi, phi_bias = layer.predictor_weights()
        everything = torch.arange(self.channels, device=rows.device)
        self.whole = len(rows) == self.channels and bool((rows == everything).all())
        chosen = rows[dynamic[rows]]
        self.register_buffer("rows", rows)
        self.register_buffer("weight", weight.detach().flatten(2))
        self.register_buffer("table", table.detach())
        self.register_buffer("terms", table.detach().T.contiguous())
        self.register_buffer("is_dynamic", dynamic[rows].to(table.dtype))
        self.register_buffer("gamma", torch.where(dynamic, 0, layer.gamma)[rows].detach().clone())
        wide = torch.promote_types(torch.float32, phi.dtype)
        matrix = phi.detach()[chosen].to(wide)
        # By rows of inputs, so that a predictor that reads few inputs reads few rows; by outputs otherwise.
        by_input = compact_input or self.kernel == "own"
        self.register_buffer("phi", (matrix.T if by_input else matrix).contiguous())
        self.relu = False
        self.register_buffer("phi_bias", phi_bias.detach()[chosen].to(wide))
        self.register_buffer("dynamic_rows", dynamic[rows].nonzero()[:, 0])
        self.register_buffer("every", torch.arange(len(rows), device=rows.device)[None])
        constant = self.gamma[: self.static]
        self.register_buffer("static_shift", table[: self.static, 1] + constant * table[: self.static, 0])
        self.register_buffer("bag", torch.zeros(1, dtype=torch.long, device=rows.device))
        self.register_buffer("static_rows", torch.arange(self.static, device=rows.device)[None])

    # the gates

    def importance(self, pooled: Tensor, index: Tensor | None) -> Tensor:
        """Phi^T gap(x) + phi of the living dynamic channels, (B, dynamic), before the ReLU."""
        if index is None:
            return F.linear(pooled, self.phi.T if self.compact_input else self.phi, self.phi_bias)
        if pooled.shape[0] < _BAG_SAMPLES:
            # The rows of the channels that are there, weighted and added up, without a copy of them.
            bags = [
                F.embedding_bag(i, self.phi, self.bag, mode="sum", per_sample_weights=p)
                for i, p in zip(index.unbind(), pooled.unbind(), strict=True)
            ]
            return (bags[0] if len(bags) == 1 else torch.cat(bags)).add_(self.phi_bias)
        spread = pooled.new_zeros(pooled.shape[0], self.in_channels).scatter_(1, index, pooled)
        return torch.addmm(self.phi_bias, spread, self.phi)

    def select(self, h: Tensor) -> Tensor:
        """Positions of the selected among the dynamic channels, (B, places): the largest, the lowest index on a tie."""
        order = torch.sort(h, dim=1, descending=True, stable=True).indices[:, : self.places]
        return order.sort(dim=1).values if self.ordered else order

    def forward(self, values: Tensor, index: Tensor | None, pooled: Tensor | None) -> tuple[Tensor | None, ...]:
        if self.kind == "mask":
            return self._mask(values, index, pooled)
        if self.kernel == "own":
            return self._own(values, index, pooled)
        if values.shape[0] == 1:
            return self._single(values, index, pooled)
        local, eta, shift = self._kept(values, index, pooled)
        weights = self.weight.view(len(self.rows), self.in_channels, -1)
        if self.kind == "group" and values.shape[0] > 1:
            out = self._groups(values, index, local, eta, shift, weights)
        else:
            parts = []
            for b in range(values.shape[0]):
                inputs = None if index is None else index[b]
                parts.append(self._one(values[b : b + 1], self._gathered(weights, local[b], inputs), eta[b], shift[b]))
            out = parts[0] if len(parts) == 1 else torch.cat(parts)
        kept = self.rows[local.flatten()].view_as(local) if not self.whole else local
        return out, kept

    def _own(self, values: Tensor, index: Tensor | None, pooled: Tensor | None) -> tuple[Tensor, ...]:
        """By our own kernel; the third result are the means of the first over positions."""
        return kernels.gated_conv(
            values, None if index is None else index[0], pooled, phi=self.phi, phi_bias=self.phi_bias,
            weight=self.weight, terms=self.terms, gamma=self.gamma, numbers=self.rows, statics=self.static,
            places=self.places, side=self.kernel_size[0], stride=self.stride[0], relu=self.relu,
        )  # fmt: skip

    def _single(self, values: Tensor, index: Tensor | None, pooled: Tensor | None) -> tuple[Tensor, Tensor]:
        """A batch of one image, with as few calls as will do: at this size calling costs as much as computing."""
        inputs = None if index is None else index[0]
        if self.places:
            assert pooled is not None
            if inputs is None:
                h = torch.addmv(self.phi_bias, self.phi, pooled[0])
            elif torch.compiler.is_exporting():
                # No matrix transposed times a vector: onnxruntime 1.31 multiplies that wrongly.
                h = torch.addmm(self.phi_bias[None], pooled, self.phi.index_select(0, inputs))[0]
            else:
                # The rows of the channels that are there, weighted and added up, without a copy of them.
                h = torch.embedding_bag(self.phi, inputs, self.bag, False, 0, False, pooled[0])[0][0].add_(
                    self.phi_bias
                )
            local = self.every[0, self.static :]
            if self.places < self.dynamic:
                order = torch.sort(h, dim=0, descending=True, stable=True)[1][: self.places]
                if self.ordered:
                    order = order.sort()[0]
                eta = h.index_select(0, order).relu_()
                local = order + self.static if self.static else order
            else:
                eta = h.relu_()
            eta = eta.to(values.dtype)
            bias, beta = self.terms.index_select(1, local).unbind()
            # A selected channel whose importance is 0 is not computed: neither scale nor shift.
            shift = torch.addcmul(eta * bias, eta.sign(), beta)
            if self.static:
                local = torch.cat([self.static_rows[0], local])
                eta, shift = torch.cat([self.gamma[: self.static], eta]), torch.cat([self.static_shift, shift])
        else:
            local, eta, shift = self.every[0, : self.static], self.gamma[: self.static], self.static_shift
        y = self._one(values, self._gathered(self.weight, local, inputs), eta, shift)
        return y, (local if self.whole else self.rows.index_select(0, local))[None]

    def _kept(self, values: Tensor, index: Tensor | None, pooled: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of the kept among the living channels, their scales and shifts, each (B, n)."""
        batch = values.shape[0]
        if not self.places:  # static channels only
            local = self.every[:, : self.static].expand(batch, -1)
            return local, self.gamma.expand(batch, -1)[:, : self.static], self._shift(self.gamma[: self.static], batch)
        assert pooled is not None
        h = self.importance(pooled, index)
        if self.places < self.dynamic:
            order = self.select(h)
            pi = h.gather(1, order).relu_()
            local = order + self.static if self.static else order
        else:
            pi = h.relu_()
            local = self.every[:, self.static :].expand(batch, -1)
        pi = pi.to(values.dtype)
        rows = self.table.index_select(0, local.flatten()).view(batch, -1, 2)
        # A selected channel whose importance is 0 is not computed: neither scale nor shift.
        shift = torch.addcmul(rows[:, :, 1], pi, rows[:, :, 0]).masked_fill_(pi <= 0, 0)
        if self.static:
            constant = self.gamma[: self.static]
            local = torch.cat([self.static_rows.expand(batch, -1), local], 1)
            shift = torch.cat([self._shift(constant, batch), shift], 1)
            pi = torch.cat([constant.expand(batch, -1), pi], 1)
        return local, pi, shift

    def _shift(self, gamma: Tensor, batch: int) -> Tensor:
        table = self.table[: self.static]
        return torch.addcmul(table[:, 1], gamma, table[:, 0]).expand(batch, -1)

    # the convolution

    def _gathered(self, weights: Tensor, outputs: Tensor, inputs: Tensor | None) -> Tensor:
        """Weights (n, n_in, kh * kw) of the kept outputs and the present inputs."""
        if inputs is None:
            return weights.index_select(0, outputs)
        if self.gather == "pairs":
            pairs = (outputs[:, None] * self.in_channels + inputs).flatten()
            return weights.view(-1, weights.shape[2]).index_select(0, pairs).view(len(outputs), len(inputs), -1)
        return weights.index_select(0, outputs).index_select(1, inputs)

    def _one(self, x: Tensor, weight: Tensor, eta: Tensor, shift: Tensor) -> Tensor:
        """One sample: the scale goes where there is less to multiply, to the weights or to the maps."""
        positions = x.shape[2] * x.shape[3] // (self.stride[0] * self.stride[1])
        if weight.shape[1] * weight.shape[2] <= positions:
            return self._convolve(x, weight.mul_(eta[:, None, None]), shift)
        return torch.addcmul(shift[:, None, None], eta[:, None, None], self._convolve(x, weight, None))

    def _groups(
        self, x: Tensor, index: Tensor | None, local: Tensor, eta: Tensor, shift: Tensor, weights: Tensor
    ) -> Tensor:
        """Samples that keep the same channels, and have the same input channels, go through one convolution."""
        patterns = local if index is None else torch.cat([local, index], 1)
        _, group = torch.unique(patterns, dim=0, return_inverse=True)
        numbers = group.tolist()
        out: Tensor | None = None
        for number in dict.fromkeys(numbers):
            members = [b for b, each in enumerate(numbers) if each == number]
            first = members[0]
            weight = self._gathered(weights, local[first], None if index is None else index[first])
            everyone = len(members) == len(numbers)
            which = torch.tensor(members, device=x.device)
            y = self._convolve(x if everyone else x[which], weight, None)
            e, s = (eta, shift) if everyone else (eta[which], shift[which])
            y = torch.addcmul(s[:, :, None, None], e[:, :, None, None], y)
            if everyone:
                return y
            out = y.new_empty(len(x), *y.shape[1:]) if out is None else out
            out[which] = y
        assert out is not None
        return out

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(B, n_in, H, W) and (n, n_in, kh * kw) to (B, n, H', W')."""
        if self.kernel == "matmul":
            if self.stride != (1, 1):
                x = x[:, :, :: self.stride[0], :: self.stride[1]]
            batch, _, height, width = x.shape
            return _multiply(weight[:, :, 0], x.reshape(batch, -1, height * width), bias).view(batch, -1, height, width)
        if self.kernel == "unfold":
            return self._unfold(x, weight, bias)
        kernel = weight.view(*weight.shape[:2], *self.kernel_size)
        if self.kernel == "last":
            x = x.contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x, kernel, bias, self.stride, self.padding, self.dilation)
        return y.contiguous() if self.kernel == "last" else y

    def _unfold(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert not isinstance(self.padding, str)
        (kh, kw), (dh, dw) = self.kernel_size, self.dilation
        padded = F.pad(x, (self.padding[1],) * 2 + (self.padding[0],) * 2)
        windows = padded.unfold(2, (kh - 1) * dh + 1, self.stride[0]).unfold(3, (kw - 1) * dw + 1, self.stride[1])
        patches = windows[..., ::dh, ::dw].permute(0, 1, 4, 5, 2, 3)
        batch, height, width = len(x), patches.shape[4], patches.shape[5]
        y = _multiply(weight.flatten(1), patches.reshape(batch, -1, height * width), bias)
        return y.view(batch, -1, height, width)

    def _mask(self, values: Tensor, index: Tensor | None, pooled: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = values if index is None else _put(values, index, self.in_channels)
        weight = self.weight.view(len(self.rows), -1, *self.kernel_size)
        y = F.conv2d(x, weight, None, self.stride, self.padding, self.dilation)
        batch = values.shape[0]
        eta = self.gamma.expand(batch, -1)
        active = (1 - self.is_dynamic).expand(batch, -1)
        if self.places:
            assert pooled is not None
            h = self.importance(pooled, index)
            if self.places < self.dynamic:
                order = self.select(h)
                pi = torch.zeros_like(h).scatter_(1, order, h.gather(1, order).relu_())
            else:
                pi = h.relu_()
            pi = pi.to(values.dtype)
            if self.dynamic < len(self.rows):
                eta = eta.index_add(1, self.dynamic_rows, pi)
            else:
                eta = pi
            active = active + self.is_dynamic * (eta > 0)
        shift = torch.addcmul(active * self.table[:, 1], eta, self.table[:, 0])
        out = torch.addcmul(shift[:, :, None, None], eta[:, :, None, None], y)
        return out, None if self.whole else self.rows.expand(batch, -1)

    @property
    def outputs(self) -> int | None:
        """How many channels come out, or None for all of them in order."""
        if self.kind == "mask":
            return None if self.whole else len(self.rows)
        return self.static + self.places

    def extra_repr(self) -> str:
        return f"{self.way}, {self.static + self.places} of {self.channels}"


def _multiply(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """(n, m) times (B, m, P), plus a bias per row."""
    if len(x) == 1:
        y = torch.mm(weight, x[0]) if bias is None else torch.addmm(bias[:, None], weight, x[0])
        return y[None]
    y = torch.matmul(weight, x)
    return y if bias is None else y + bias[:, None]


# ---------------------------------------------------------------------------------------------------------- the network


@dataclass
class _Rep:
    """What a node of the dynamic graph stands for.

    Attributes:
        values: the node of the maps (B, n, H, W).
        index: the node of their channel numbers, or None for all channels.
        channels: of the whole map.
        sets: index nodes whose union holds every channel of a whole map that is not zero; None if that is unknown.
        owner: the whole map was made here and nobody else reads it, so it may be written to.
        rectified: the ReLU behind has been done.
        positive: it was done to maps that nothing has been added to since.
    """

    values: fx.Node
    index: fx.Node | None = None
    channels: int = 0
    sets: tuple[fx.Node, ...] | None = None
    owner: bool = False
    rectified: bool = False
    positive: bool = False


def _is_relu(node: fx.Node, module: nn.Module | None) -> bool:
    called = node.op == "call_function" and node.target in (F.relu, torch.relu)
    return isinstance(module, nn.ReLU) or called or (node.op == "call_method" and node.target in ("relu", "relu_"))


class _Builder:
    """Writes the dynamic graph, and computes every node on the given images while it does.

    Args:
        model: the gated network in eval mode.
        images: a batch, on which ways are measured.
        ways: the way of each layer; those that are missing are measured.
        repeats: measurements per way.
        static_shapes: only what has the same shapes for every image.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, ways: Mapping[str, str] | str, repeats: int, static_shapes: bool
    ) -> None:
        self.model, self.images, self.ways = model, images, ways
        self.repeats, self.static_shapes = repeats, static_shapes
        self.source = trace(model)
        self.modules = dict(model.named_modules())
        self.root: dict[str, Any] = {}
        self.graph = fx.Graph()
        self.value: dict[fx.Node, Any] = {}
        self.reps: dict[fx.Node, _Rep] = {}
        self.pooled: dict[fx.Node, fx.Node] = {}
        self.choices: list[Choice] = []
        self.last = {n: user for user in self.source.nodes for n in user.all_input_nodes}
        self._flush = torch.zeros(_FLUSH_BYTES // 4) if images.device.type == "cpu" else None

    @torch.no_grad()
    def build(self) -> fx.GraphModule:
        for node in self.source.nodes:
            if node.op == "placeholder":
                made = self.graph.placeholder(node.name)
                self.value[made] = self.images.contiguous()
                self.reps[node] = _Rep(made, channels=self.images.shape[1])
            elif node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], lambda n: self._whole(n).values))
            elif node.op == "call_module" and isinstance(self.modules[node.target], AFSConvBN):
                self.reps[node] = self._layer(node, self.modules[node.target])
            else:
                self.reps[node] = self._other(node)
        module = fx.GraphModule(self.root, self.graph, "DynamicPlan")
        module.graph.eliminate_dead_code()
        module.recompile()
        return module.eval()

    # nodes

    def _call(self, function: Callable, *args: Any) -> fx.Node:
        node = self.graph.call_function(function, args)
        self.value[node] = function(*self._values(args))
        return node

    def _values(self, args: Any) -> Any:
        return fx.map_arg(args, lambda n: self.value[n])

    def _whole(self, node: fx.Node) -> _Rep:
        """The representation of a node as a whole map."""
        rep = self.reps[node]
        if rep.index is None:
            return rep
        values = self._call(_put, rep.values, rep.index, rep.channels)
        return _Rep(values, None, rep.channels, (rep.index,), owner=True)

    def _pooled(self, rep: _Rep) -> fx.Node:
        """Means over positions, shared by the layers that read the same maps."""
        if rep.values not in self.pooled:
            self.pooled[rep.values] = self._call(_pool, rep.values)
        return self.pooled[rep.values]

    def _other(self, node: fx.Node) -> _Rep:
        """A node that is no selected convolution."""
        inputs = node.all_input_nodes
        if self._is_add(node):
            return self._sum(node)
        module = self.modules[node.target] if node.op == "call_module" else None
        if isinstance(module, Join):
            return self._join(node, module)
        if isinstance(module, Spread):
            rep = self.reps[inputs[0]]
            return _Rep(rep.values, self._moved(rep, module.index), module.width)
        if isinstance(module, nn.Conv2d) and self.reps[inputs[0]].index is not None and _is_plain(module):
            # A layer without gates behind one with gates: it still needs only the channels that are not zero.
            return self._layer(node, _constant(module))
        keeps = keeps_channels(module) if module is not None else keeps_channels_call(node)
        if not keeps or len(inputs) != 1:
            made = self._copy(node, {n: self._whole(n).values for n in inputs})
            value = self.value[made]
            return _Rep(made, channels=value.shape[1] if isinstance(value, Tensor) and value.dim() == 4 else 0)
        # These map zero to zero and leave the channels in their order, so kept channels stay what they are.
        rep = self.reps[inputs[0]]
        done = rep.rectified and _is_relu(node, module)
        if isinstance(module, _NOTHING) or done:
            made = rep.values
        else:
            made = self._copy(node, {inputs[0]: rep.values})
        # The result may be the input's memory, which then has two names: only the last may be written to.
        owner, rep.owner = rep.owner and self.last[inputs[0]] is node, False
        return _Rep(made, rep.index, rep.channels, rep.sets, owner, rep.rectified and not done, rep.positive or done)

    def _rectifies(self, node: fx.Node) -> bool:
        """Whether a ReLU follows, and nothing else reads what it gets."""
        (user, *others) = node.users
        if others:
            return False
        module = self.modules[user.target] if user.op == "call_module" else None
        return _is_relu(user, module) or (isinstance(module, _NOTHING) and self._rectifies(user))

    def _copy(self, node: fx.Node, inputs: Mapping[fx.Node, fx.Node]) -> fx.Node:
        made = self.graph.node_copy(node, lambda n: inputs[n])
        args, kwargs = self._values(made.args), self._values(made.kwargs)
        if node.op == "call_module":
            self.root.setdefault(str(node.target), copy.deepcopy(self.modules[node.target]))
            self.value[made] = self.root[str(node.target)](*args, **kwargs)
        elif node.op == "call_function":
            self.value[made] = node.target(*args, **kwargs)  # type: ignore[operator]
        elif node.op == "call_method":
            self.value[made] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:  # get_attr
            value = self.model
            for part in str(node.target).split("."):
                value = getattr(value, part)
            self.root[str(node.target)] = self.value[made] = value
        return made

    def _is_add(self, node: fx.Node) -> bool:
        names = (operator.add, operator.iadd, torch.add)
        called = node.op == "call_function" and node.target in names
        called = called or (node.op == "call_method" and node.target in ("add", "add_"))
        both = len(node.args) == 2 and all(isinstance(a, fx.Node) and self._is_map(a) for a in node.args)
        return called and both and not node.kwargs

    def _is_map(self, node: fx.Node) -> bool:
        value = self.value[self.reps[node].values]
        return isinstance(value, Tensor) and value.dim() == 4 and self.reps[node].channels > 0

    def _sum(self, node: fx.Node) -> _Rep:
        parts = []
        for argument in node.args:
            rep = self.reps[argument]  # type: ignore[index]
            # The map may be written to if nobody reads it later and it is nobody else's.
            mine = rep.owner and self.last[argument] is node
            parts.append(replace(rep, owner=mine))
        return self._added(*parts, relu=self._rectifies(node))

    def _added(self, first: _Rep, second: _Rep, *, relu: bool) -> _Rep:
        if first.index is not None:
            first, second = second, first
        if second.index is None:
            sets = None if first.sets is None or second.sets is None else first.sets + second.sets
            return _Rep(self._call(torch.add, first.values, second.values), None, first.channels, sets, owner=True)
        if first.index is not None:
            values = self._call(_put, first.values, first.index, first.channels)
            first = _Rep(values, None, first.channels, (first.index,), owner=True)
        sets = None if first.sets is None else (*first.sets, second.index)
        if relu and first.owner and len(self.images) == 1 and not self.static_shapes and _has_kernels(self.images):
            means = self.pooled.get(first.values) if first.positive else None
            both = self._call(kernels.add_relu, first.values, second.values, second.index, means)
            values, means = (self._call(operator.getitem, both, i) for i in range(2))
            self.pooled[values] = means
            return _Rep(values, None, first.channels, sets, owner=True, rectified=True)
        values = self._call(_add if first.owner else _add_copy, first.values, second.values, second.index)
        return _Rep(values, None, first.channels, sets, owner=True)

    def _moved(self, rep: _Rep, index: Tensor | None) -> fx.Node | None:
        """The numbers of a representation's channels in a wider map, in which they have the places of `index`."""
        if index is None:
            return rep.index
        name = f"index_{len(self.root)}"
        self.root[name] = index.clone()
        held = self.graph.get_attr(name)
        self.value[held] = self.root[name]
        if rep.index is None:
            return self._call(_repeat, held, rep.values)
        return self._call(_look_up, held, rep.index)

    def _join(self, node: fx.Node, join: Join) -> _Rep:
        """A residual add of maps that hold different channels."""
        parts = []
        for argument, index in zip(node.args, (join.left, join.right), strict=True):
            rep = self.reps[argument]  # type: ignore[index]
            mine = rep.owner and index is None and self.last[argument] is node
            sets = rep.sets if index is None else None
            positive = rep.positive and index is None
            moved = self._moved(rep, index)
            parts.append(_Rep(rep.values, moved, join.width, sets, mine, positive=positive))
        return self._added(*parts, relu=self._rectifies(node))

    # selected convolutions

    def _layer(self, node: fx.Node, layer: AFSConvBN) -> _Rep:
        name = str(node.target)
        if not bool((layer.m > 0).any()):
            raise AFDSError(f"all channels of {name!r} are removed, so the network computes nothing there")
        (source,) = node.all_input_nodes
        rep = self.reps[source]
        pooled = self._pooled(rep) if bool((layer.m * layer.s > 0).any()) else None
        if not _is_plain(layer.conv):
            # Groups tie inputs to outputs; such a layer stays what it is.
            self.choices.append(Choice(name, "mask", {}))
            made = self._copy(node, {source: self._whole(source).values})
            return _Rep(made, None, layer.m.numel(), owner=True)
        candidates = self._candidates(layer, rep)
        asked = self.ways if isinstance(self.ways, str) else self.ways.get(name)
        times: dict[str, float] = {}
        if asked is not None and isinstance(self.ways, str):
            way = next((c for c in candidates if c.split("/")[0] == asked), "mask")
        elif asked is not None:
            if asked not in candidates:
                raise AFDSError(f"{name!r} cannot be computed by {asked!r}; it can by {', '.join(candidates)}")
            way = asked
        elif len(candidates) == 1:
            way = candidates[0]
        else:
            way, times = self._fastest(layer, rep, pooled, candidates)
        self.choices.append(Choice(name, way, times))
        module, inputs = self._prepared(layer, rep, way, pooled)
        module.relu = module.kernel == "own" and self._rectifies(node)
        self.root[name] = module
        made = self.graph.call_module(name, inputs)
        self.value[made] = module(*self._values(inputs))
        values, index = (self._call(operator.getitem, made, i) for i in range(2))
        if module.relu:  # otherwise something else is done to the maps before they are pooled
            self.pooled[values] = self._call(operator.getitem, made, 2)
        if module.outputs is None:
            return _Rep(values, None, layer.conv.out_channels, owner=True)
        return _Rep(values, index, layer.conv.out_channels, rectified=module.relu)

    def _candidates(self, layer: AFSConvBN, rep: _Rep) -> list[str]:
        own = not self.static_shapes
        found = ways(layer, compact_input=rep.index is not None, batch=len(self.images), own=own)
        if len(found) > 1 and rep.index is None and rep.sets is not None:
            # The input is a whole map of which some channels may be zero: these can be left out.
            places = sum(self.value[index].shape[1] for index in rep.sets)
            if places < rep.channels or (len(self.images) == 1 and not self.static_shapes):
                nonzero = ways(layer, compact_input=True, batch=len(self.images), own=own)
                found += [f"nonzero:{way}" for way in nonzero if way != "mask"]
        return found

    def _prepared(
        self, layer: AFSConvBN, rep: _Rep, way: str, pooled: fx.Node | None
    ) -> tuple[DynamicConvBN, tuple[fx.Node | None, ...]]:
        """The layer's module and the nodes it is called with."""
        nonzero, plain = way.startswith("nonzero:"), way.removeprefix("nonzero:")
        module = DynamicConvBN(
            layer, plain, compact_input=rep.index is not None or nonzero, ordered=len(self.images) > 1
        )
        if not nonzero:
            return module, (rep.values, rep.index, pooled)
        index = self._nonzero(rep)
        values = self._call(_take, rep.values, index)
        picked = None if pooled is None else self._call(torch.gather, pooled, 1, index)
        return module, (values, index, picked)

    def _nonzero(self, rep: _Rep) -> fx.Node:
        assert rep.sets is not None
        places = sum(self.value[index].shape[1] for index in rep.sets)
        return self._call(_union, rep.sets, rep.channels, places if places < rep.channels else 0)

    def _fastest(
        self, layer: AFSConvBN, rep: _Rep, pooled: fx.Node | None, candidates: list[str]
    ) -> tuple[str, dict[str, float]]:
        runs: dict[str, Callable[[], object]] = {}
        for way in candidates:
            module = DynamicConvBN(
                layer,
                way.removeprefix("nonzero:"),
                compact_input=rep.index is not None or way.startswith("nonzero:"),
                ordered=len(self.images) > 1,
            )
            values = self.value[rep.values]
            index = None if rep.index is None else self.value[rep.index]
            means = None if pooled is None else self.value[pooled]
            if way.startswith("nonzero:"):
                runs[way] = self._timed_nonzero(module, rep, values, means)
            else:
                runs[way] = lambda module=module, args=(values, index, means): module(*args)  # type: ignore[misc]
        times = measure(runs, self.repeats, before=self._evict(self.value[rep.values]))
        best = min(times, key=lambda way: times[way] * (1 - _MARGIN if way == "mask" else 1))
        return best, {way: round(seconds * 1e6, 1) for way, seconds in times.items()}

    def _timed_nonzero(
        self, module: DynamicConvBN, rep: _Rep, values: Tensor, means: Tensor | None
    ) -> Callable[[], object]:
        assert rep.sets is not None
        sets = tuple(self.value[index] for index in rep.sets)
        places = sum(index.shape[1] for index in sets)

        def run() -> object:
            index = _union(sets, rep.channels, places if places < rep.channels else 0)
            return module(_take(values, index), index, None if means is None else means.gather(1, index))

        return run

    def _evict(self, values: Tensor) -> Callable[[], None]:
        """Leaves the layer's input in the caches and its weights out of them, as in a pass through the network."""

        def evict() -> None:
            if self._flush is not None:
                self._flush.add_(1)
                values.sum()

        return evict


def measure(
    runs: Mapping[str, Callable[[], object]], repeats: int, *, before: Callable[[], None] | None = None
) -> dict[str, float]:
    """Least seconds of each function: one call to warm up, then all of them in turn, `repeats` times.

    The least and not the median, because other processes can only add time, and a choice must not hang on them.

    Args:
        runs: what is measured, by name.
        repeats: rounds.
        before: called before each measured call, outside its time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            if before is not None:
                before()
            _synchronise()
            start = time.perf_counter()
            run()
            _synchronise()
            seconds[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in seconds.items()}


def _synchronise() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class DynamicNetwork(nn.Module):
    """A gated network whose layers compute only the channels that each image's gates keep. For inference only.

    Attributes:
        choices: the ways of the layers, by batch size.
        seconds: the least over some whole passes, by batch size: "dynamic" (the ways that won layer by layer), "mask"
            (all layers by masking) and "model" (the network itself); the fastest is what is run.
        taken: which of the three is run, by batch size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.plans = nn.ModuleDict()
        self.choices: dict[int, list[Choice]] = {}
        self.seconds: dict[int, dict[str, float]] = {}
        self.taken: dict[int, str] = {}

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        sizes = [int(size) for size in self.plans]
        nearest = min(sizes, key=lambda size: abs(size - images.shape[0]))
        plan = self.plans[str(nearest)]
        if nearest == 1 and len(images) > 1:  # its shapes may hang on the image, so it takes one at a time
            return torch.cat([plan(image) for image in images.split(1)])
        return plan(images)


@torch.no_grad()
def dynamic(
    model: nn.Module,
    *images: Tensor,
    ways: Mapping[str, str] | str | None = None,
    repeats: int = 5,
    static_shapes: bool = False,
) -> DynamicNetwork:
    """A network that gives a gated network's outputs and computes only what its gates keep.

    It is a snapshot: training the model afterwards does not change it. Its outputs equal the masked model's up to
    rounding, unless two importances at the edge of a selection differ by no more than rounding errors.

    Args:
        model: a converted network in eval mode, or what `compact.compact` makes of one.
        images: one batch (B, 3, H, W) for each batch size to prepare; ways are measured on them, so give real ones.
        ways: the ways of some layers, or one way for all layers that know it, instead of measuring. With a way for
            every AFS layer no fall back to masking happens, and only layers without gates behind them are measured.
        repeats: measurements of each way.
        static_shapes: leave out our own kernel and ways whose shapes differ between images, for torch.compile and
            exports.

    Raises:
        AFDSError: without AFS layers or images, in train mode, for ways that a layer does not know, or if all channels
            of a layer are removed.
    """
    if not any(isinstance(module, AFSConvBN) for module in model.modules()):
        raise AFDSError(f"{type(model).__name__} has no AFS layer; convert it with afs.convert first")
    if model.training:
        raise AFDSError("dynamic execution uses the batch norms' fixed statistics; call model.eval() first")
    if not images:
        raise AFDSError(
            "dynamic needs a batch of images for each batch size, to measure the ways of each layer on them"
        )
    if repeats < 1:
        raise AFDSError(f"repeats must be at least 1, got {repeats!r}")
    network = DynamicNetwork()
    for batch in images:
        if batch.dim() != 4 or not len(batch):
            raise AFDSError(f"images must be batches of shape (B, 3, H, W), got {tuple(batch.shape)}")
        _prepare(network, model, batch, ways, repeats, static_shapes)
    return network.eval()


def _prepare(
    network: DynamicNetwork,
    model: nn.Module,
    images: Tensor,
    wanted: Mapping[str, str] | str | None,
    repeats: int,
    static_shapes: bool,
) -> None:
    size = len(images)
    names = [name for name, module in model.named_modules() if isinstance(module, AFSConvBN)]
    if isinstance(wanted, str):
        if wanted not in _KINDS:
            raise AFDSError(f"one way for all layers must be one of {', '.join(_KINDS)}, got {wanted!r}")
        given: Mapping[str, str] | str = wanted
    else:
        given = dict(wanted or {})
        unknown = [name for name in given if name not in names]
        if unknown:
            raise AFDSError(f"a way is given for {unknown[0]!r}, which is no AFS layer; see afs.layers(model)")
    builder = _Builder(model, images, given, repeats, static_shapes)
    plan = builder.build()
    taken = "dynamic"
    if not (isinstance(given, str) or set(names) <= set(given)):
        masked = _Builder(model, images, "mask", repeats, static_shapes).build()
        plans: dict[str, nn.Module] = {"dynamic": plan, "mask": masked, "model": copy.deepcopy(model)}
        times = measure({name: lambda p=p: p(images) for name, p in plans.items()}, max(3, repeats))  # type: ignore[misc]
        # Ways that win alone may lose together: what is run is the fastest of the whole passes.
        taken = min(times, key=lambda name: times[name])
        network.seconds[size], plan = times, plans[taken]  # type: ignore[assignment]
    network.choices[size], network.taken[size] = builder.choices, taken
    network.plans[str(size)] = plan.eval().requires_grad_(False)
