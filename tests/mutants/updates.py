"""Faults of the gate statistics, of the mask update and of the MACs."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from afdslib import afs
from afdslib.afs import graph, macs, masks
from afdslib.afs.layer import AFSConvBN
from afdslib.afs.masks import LayerStatistics
from afdslib.training import loop


@contextmanager
def _statistics(collect) -> Iterator[None]:
    with ExitStack() as stack:
        for module in (afs, masks, loop):
            stack.enter_context(mock.patch.object(module, "collect_statistics", collect))
        yield


def statistics_read_before_they_exist() -> AbstractContextManager:
    """The lists are made by the first forward pass after the update that reads them."""

    def collect(model: nn.Module, loader, *, device=None) -> dict[str, LayerStatistics]:
        return {n: torch.stack(x.importances).mean(0) for n, x in afs.layers(model).items()}  # type: ignore[attr-defined]

    return _statistics(collect)


def mean_of_a_list() -> AbstractContextManager:
    """`torch.mean` of a Python list."""

    def collect(model: nn.Module, loader, *, device=None) -> dict[str, LayerStatistics]:
        values: dict[str, list[float]] = {name: [0.5, 1.0] for name in afs.layers(model)}
        return {name: torch.mean(v) for name, v in values.items()}  # type: ignore[arg-type]

    return _statistics(collect)


@contextmanager
def statistics_of_feature_maps() -> Iterator[None]:
    """Means of the layers' outputs in place of those of their gates."""

    def collect(model: nn.Module, loader, *, device=None) -> dict[str, LayerStatistics]:
        means: dict[str, list[Tensor]] = {name: [] for name in afs.layers(model)}
        handles = [
            layer.register_forward_hook(lambda _, __, out, name=name: means[name].append(out.mean((2, 3))))
            for name, layer in afs.layers(model).items()
        ]
        with torch.no_grad():
            for images, _ in loader:
                model(images)
        for handle in handles:
            handle.remove()
        values = {name: torch.cat(v).double() for name, v in means.items()}
        return {n: LayerStatistics(v.mean(0), v.var(0), (v > 0).double().mean(0), len(v)) for n, v in values.items()}

    with _statistics(collect):
        yield


@contextmanager
def masks_per_layer() -> Iterator[None]:
    """m and s are one number per layer: the layer's mean against the threshold."""

    def update(model, statistics, *, delta_m=None, delta_s=0.01, **_) -> masks.MaskReport:
        for name, layer in afs.layers(model).items():
            q, p = statistics[name].q.mean(), statistics[name].p.mean()
            layer.m.fill_(float(q > delta_m))
            layer.s.fill_(float(p > delta_s * q**2))
        return masks.MaskReport(delta_m, None, 0, 0, 0)

    with mock.patch.object(masks, "update_masks", update), mock.patch.object(afs, "update_masks", update):
        yield


def gamma_is_random() -> AbstractContextManager:
    """gamma is drawn once and never updated."""
    original = masks._freeze

    def freeze(found: dict[str, AFSConvBN], statistics, delta_s: float, **options: bool) -> None:
        original(found, statistics, delta_s, **options)
        for layer in found.values():
            layer.gamma.copy_(torch.rand(layer.gamma.shape, generator=torch.Generator().manual_seed(0)))

    return mock.patch.object(masks, "_freeze", freeze)


# MACs


def no_macs_counter() -> AbstractContextManager:
    """The gated network is said to cost what the dense one costs."""

    def counted(self: macs.Meter) -> macs.MACs:
        return macs.count(self.model, self._input_size)  # type: ignore[arg-type]

    return mock.patch.object(macs.Meter, "macs", counted)


def product_of_means() -> AbstractContextManager:
    """Mean active inputs times mean active outputs, as if they were independent over images."""

    def conv_macs(conv: nn.Conv2d, entering: Tensor | None, leaving: Tensor | None, batch: int, shape) -> float:
        inputs = conv.in_channels if entering is None else float(entering.sum(1).mean())
        outputs = conv.out_channels if leaving is None else float(leaving.sum(1).mean())
        return batch * shape[2] * shape[3] * conv.kernel_size[0] * conv.kernel_size[1] * inputs * outputs

    return mock.patch.object(macs, "_conv_macs", conv_macs)


def stream_without_its_shortcut() -> AbstractContextManager:
    """The residual stream's active set is that of one addend instead of the union."""
    return mock.patch.object(graph, "_union", lambda left, right: left)


def predictors_for_free() -> AbstractContextManager:
    """The gates' own cost is left out."""
    original = macs.Meter.macs

    def counted(self: macs.Meter) -> macs.MACs:
        measured = original(self)
        return macs.MACs(measured.total - measured.predictors, measured.by_layer, measured.predictors)

    return mock.patch.object(macs.Meter, "macs", counted)
