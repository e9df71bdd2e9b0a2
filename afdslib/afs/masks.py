"""Gate statistics over training images, and the mask update that removes channels and freezes gates.

Method, section 4.3 and 4.5: q = E[eta], p = Var[pi] (population); m <- 1[q > delta_m]; s <- 1[p > delta_s * q^2];
gamma <- q where s becomes 0. [recall; delta_s and the budget are ours]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from afdslib.afs import macs
from afdslib.afs.convert import gated, layers
from afdslib.afs.graph import depthwise_ties, eval_mode, streams
from afdslib.afs.layer import AFSConvBN
from afdslib.base.checks import choice, number, whole
from afdslib.base.errors import AFDSError, UnreachableError

__all__ = ["LayerStatistics", "MaskReport", "collect_statistics", "update_masks"]


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer's gates over a set of images, (C,), float64 on the CPU."""

    q: Tensor  # mean of eta
    p: Tensor  # population variance of pi
    active_rate: Tensor  # share of images for which each channel is computed
    n: int  # images seen


@dataclass(frozen=True)
class MaskReport:
    """What a mask update did, in channels of all layers."""

    delta_m: float  # the threshold on q (or on the scores); 0 where only channels went that have 0, or none
    macs: macs.MACs | None  # expected ones afterwards; None without a loader
    removed: int  # m = 0
    static: int  # living, with constant gates
    dynamic: int  # living, with gates that depend on the input


class _Welford:
    """Running mean and sum of squared deviations per channel, merged batch by batch (Chan et al. 1983)."""

    def __init__(self, channels: int):
        self.n = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.deviation = torch.zeros(channels, dtype=torch.float64)

    def update(self, batch: Tensor) -> None:
        batch = batch.detach().to("cpu", torch.float64)
        n = batch.shape[0]
        mean = batch.mean(0)
        delta = mean - self.mean
        total = self.n + n
        self.deviation += (batch - mean).square().sum(0) + delta.square() * (self.n * n / total)
        self.mean += delta * (n / total)
        self.n = total


def collect_statistics(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, device: torch.device | str | None = None
) -> dict[str, LayerStatistics]:
    """Gate statistics by layer name, in forward order, over training images, in eval mode and without gradients.

    Args:
        model: an AFS network; its mode is restored.
        loader: batches of (images, labels): the TRAINING images under the test-time transform, never the test set.
        device: where to run; default: where the network is.

    Raises:
        AFDSError: if the network has no AFS layer or the loader is empty.
    """
    found = gated(model)
    home = next(model.parameters()).device
    device = home if device is None else torch.device(device)
    accumulators = {name: tuple(_Welford(layer.m.numel()) for _ in range(3)) for name, layer in found.items()}

    def record(name: str, module: AFSConvBN, args: tuple[Tensor, ...], output: Tensor) -> None:
        gates = module.gates(args[0])
        for accumulator, values in zip(accumulators[name], (gates.pi, gates.eta, gates.active), strict=True):
            accumulator.update(values)

    with ExitStack() as stack, eval_mode(model), torch.no_grad():
        for name, layer in found.items():
            stack.enter_context(layer.register_forward_hook(partial(record, name)))
        stack.callback(model.to, home)
        model.to(device)
        for images, _ in loader:
            model(images.to(device))
    if any(pi.n == 0 for pi, _, _ in accumulators.values()):
        raise AFDSError("no image to collect gate statistics from; the loader is empty")
    return {
        name: LayerStatistics(eta.mean, pi.deviation / pi.n, active.mean, pi.n)
        for name, (pi, eta, active) in accumulators.items()
    }


def update_masks(
    model: nn.Module,
    statistics: dict[str, LayerStatistics],
    *,
    delta_m: float | None = None,
    delta_s: float = 0.01,
    macs_budget: float | None = None,
    loader: Iterable[tuple[Tensor, Tensor]] | None = None,
    multiple: int = 1,
    stream: str = "free",
    scores: Mapping[str, Tensor] | None = None,
) -> MaskReport:
    """Lowers the masks in place: removes channels with small mean gates and freezes gates that hardly vary.

    With `macs_budget` one threshold for the whole network is bisected on the expected MACs at the present density,
    predictors included. Ties are broken by (q, layer, index). m and s never return to 1, and a layer never loses its
    last channel. [ours]

    Args:
        model: an AFS network.
        statistics: from `collect_statistics` on this network.
        delta_m: channels whose q is at most this are removed.
        delta_s: gates whose variance is at most delta_s * q^2 become the constant q; 0 keeps all dynamic that vary at
            all, infinity makes all static.
        macs_budget: in (0, 1], the share of the dense ungated network's MACs to reach.
        loader: a fixed subset of training images, needed for `macs_budget`; it must give the same images each time. Of
            more than 512 images the search sees about as many, and a few passes over all of them correct it.
        multiple: round each layer's kept channels up to a multiple (never above its width), for kernels that like such
            shapes; the budget is met all the same, by removing more elsewhere.
        stream: "free", every layer decides alone; "coupled", a channel of a residual stream goes from all the layers
            that are added up in it or from none, by the largest of their q (not the mean: where the last batch norms
            of blocks begin at 0, few blocks write to a channel), and the layers that read the stream narrow with it.
            Streams with an addend without gates stay free. [ours] In both cases a layer and the depthwise ones that
            read it decide together, by the smallest of their q; see `graph.depthwise_ties`.
        scores: by layer name, (C,), non-negative: what channels are ranked by instead of q, which then decides about
            freezing alone; with `macs_budget` only. [ours]

    Raises:
        AFDSError: unless exactly one of delta_m and macs_budget is given; for values out of range, a missing loader,
            statistics or scores of another network, or a budget that even one channel per layer exceeds (it names the
            smallest that can be reached).
    """
    found = layers(model)
    ranked = {name: values.q for name, values in statistics.items()} if scores is None else scores
    scored = scores is not None
    _check_arguments(found, statistics, ranked, delta_m, delta_s, macs_budget, loader, multiple, stream, scored)
    ties = depthwise_ties(model)
    units = _units(model, found, stream, ties)
    for names in ties:
        ranked = {**ranked, **dict.fromkeys(names, torch.stack([ranked[name] for name in names]).amin(0))}

    parts = [getattr(layer, part) for layer in found.values() for part in ("m", "s", "gamma", "beta")]
    before = [part.detach().clone() for part in parts]
    try:
        _freeze(found, statistics, delta_s)
        ranking = _ranking(found, ranked, units)
        remove = partial(_remove, found, units, {name: layer.m.clone() for name, layer in found.items()}, multiple)
        if delta_m is not None:
            remove(ranking[: sum(q <= delta_m for q, _, _ in ranking)])
            threshold, measured = float(delta_m), None if loader is None else macs.expected(model, loader)
        else:
            # Gates with q = 0 go with any threshold of at least 0.
            closed = sum(q <= 0 for q, _, _ in ranking) if scores is None else 0
            several = f"{multiple} channels per layer, or all where there are fewer,"
            least = "one channel per layer" if multiple == 1 else several
            removals, measured = _bisect(model, remove, ranking, closed, macs_budget, loader, least)  # type: ignore[arg-type]
            threshold = max(0.0, ranking[removals - 1][0]) if removals else 0.0
    except BaseException:
        # Nothing half done: a refused or interrupted update leaves the masks as they were.
        with torch.no_grad():
            for part, value in zip(parts, before, strict=True):
                part.copy_(value)
        raise
    alive = sum(int(layer.m.sum()) for layer in found.values())
    dynamic = sum(int((layer.m * layer.s).sum()) for layer in found.values())
    width = sum(layer.m.numel() for layer in found.values())
    return MaskReport(threshold, measured, width - alive, alive - dynamic, dynamic)


def _check_arguments(
    found: dict[str, AFSConvBN], statistics: Mapping[str, LayerStatistics], ranked: Mapping[str, Tensor],
    delta_m: float | None, delta_s: float, macs_budget: float | None, loader: object, multiple: int, stream: str,
    scored: bool,
) -> None:  # fmt: skip
    """Refuses arguments of `update_masks` that are out of range or of another network."""
    for what, given in (("statistics", {n: v.q for n, v in statistics.items()}), ("scores", ranked)):
        if {name: values.numel() for name, values in given.items()} != {n: x.m.numel() for n, x in found.items()}:
            raise AFDSError(f"the {what} belong to another network; collect them on this one, with afs.layers' names")
    if (delta_m is None) == (macs_budget is None):
        raise AFDSError("give exactly one of delta_m and macs_budget")
    if delta_s != math.inf:
        number("delta_s", delta_s, least=0)
    whole("multiple", multiple, 1)
    choice("stream", stream, ("free", "coupled"))
    if delta_m is not None:
        if scored:
            raise AFDSError("delta_m is a threshold on q; give scores together with macs_budget")
        if delta_m not in (math.inf, -math.inf):
            number("delta_m", delta_m)
    elif loader is None:
        raise AFDSError("macs_budget needs a loader of training images to measure the expected MACs on")
    else:
        number("macs_budget", macs_budget, above=0, most=1)


def _units(
    model: nn.Module, found: dict[str, AFSConvBN], stream: str, ties: list[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """The layers that lose channels together, in forward order: each alone, those of a residual stream, or ties."""
    coupled = {name: names for names in streams(model) for name in names} if stream == "coupled" else {}
    if stream == "coupled" and not coupled:
        raise AFDSError(
            f"stream='coupled' needs a residual stream whose addends all have gates, and {type(model).__name__} has "
            "none; convert with gates='all', or leave stream='free'"
        )
    for names in ties:
        if not coupled.keys() & set(names):
            coupled |= dict.fromkeys(names, names)
    return list(dict.fromkeys(coupled.get(name, (name,)) for name in found))


@torch.no_grad()
def _freeze(found: dict[str, AFSConvBN], statistics: dict[str, LayerStatistics], delta_s: float) -> None:
    """s <- 1[p > delta_s * q^2]; gamma <- q where s becomes 0.

    A gate that was never open becomes a constant 0 without its beta: rounding or a residual stream may keep such a
    channel after all, and its beta alone would bring it back to life.
    """
    for name, layer in found.items():
        q, p = (t.to(layer.s.device) for t in (statistics[name].q, statistics[name].p))
        freeze = (p <= delta_s * q.square()) if math.isfinite(delta_s) else torch.ones_like(q, dtype=torch.bool)
        freeze &= layer.s > 0
        layer.gamma[freeze] = q.to(layer.gamma)[freeze]
        layer.beta[freeze & (q <= 0)] = 0
        layer.s[freeze] = 0


def _living(found: dict[str, AFSConvBN], unit: tuple[str, ...]) -> Tensor:
    """Channels that live in any of a unit's layers."""
    return torch.stack([found[name].m for name in unit]).amax(0)


def _ranking(
    found: dict[str, AFSConvBN], scores: Mapping[str, Tensor], units: list[tuple[str, ...]]
) -> list[tuple[float, int, int]]:
    """Living channels that may go, least important first; each unit's most important channel is not among them."""
    ranking: list[tuple[float, int, int]] = []
    for position, unit in enumerate(units):
        values = scores[unit[0]].tolist()
        if len(unit) > 1:
            values = torch.stack([scores[name] * found[name].m.cpu() for name in unit]).amax(0).tolist()
        alive = _living(found, unit).tolist()
        channels = sorted((values[c], position, c) for c in range(len(values)) if alive[c])
        ranking += channels[:-1]
    return sorted(ranking)


@torch.no_grad()
def _remove(
    found: dict[str, AFSConvBN],
    units: list[tuple[str, ...]],
    living: dict[str, Tensor],
    multiple: int,
    removals: list[tuple[float, int, int]],
) -> None:
    """Sets the masks to `living` less the removals; each unit keeps a multiple of channels where it can."""
    chosen: dict[int, list[int]] = {}
    for _, position, channel in removals:
        chosen.setdefault(position, []).append(channel)
    for name, layer in found.items():
        layer.m.copy_(living[name])
    for position, unit in enumerate(units):
        channels = chosen.get(position, [])
        kept = int(_living(found, unit).sum()) - len(channels)
        # The last ones chosen are the most important of them, and the first to be kept after all.
        give_back = min(-kept % multiple, len(channels))
        gone = channels[: len(channels) - give_back]
        for name in unit if gone else ():
            found[name].m[torch.tensor(gone, device=found[name].m.device)] = 0


def _spread(loader: Iterable[tuple[Tensor, Tensor]], most: int) -> tuple[list[Tensor], bool]:
    """The loader's batches if they have at most `most` images, else as many evenly spaced ones; whether all."""
    batches: list[Tensor] = []
    images: list[Tensor] = []
    count, step = 0, 1
    for batch, _ in loader:
        batches += [batch] if step == 1 else []
        images += [image.clone() for i, image in enumerate(batch, count) if i % step == 0]
        count += len(batch)
        while len(images) > most:
            images, step, batches = images[::2], 2 * step, []
    if not images:
        raise AFDSError("no image to measure the expected MACs on; the loader is empty")
    return (batches, True) if step == 1 else (list(torch.stack(images).split(64)), False)


def _bisect(
    model: nn.Module,
    remove: Callable[[list[tuple[float, int, int]]], None],
    ranking: list[tuple[float, int, int]],
    fewest: int,
    budget: float,
    loader: Iterable[tuple[Tensor, Tensor]],
    least: str,
) -> tuple[int, macs.MACs]:
    """The smallest number of removals (in ranking order, from `fewest`) that meets the budget, and the MACs then.

    Of many images the search sees some, at a target that a few passes over all of them correct until the budget is met.
    """
    sample, complete = _spread(loader, 512)
    channels, height, width = sample[0].shape[1:]
    dense = macs.count(model, (channels, height, width)).total
    allowed, meter, found = budget * dense, macs.Meter(model), layers(model).values()
    bar = tqdm(desc="mask update", unit="pass", mininterval=1, disable=None)

    def measure(removals: int, images: Iterable[Any]) -> macs.MACs:
        remove(ranking[:removals])
        bar.update()
        # Where every gate is constant, all images cost what the first one does.
        varies = any(bool((layer.m * layer.s).any()) for layer in found)
        seen: Any = images if varies else [(sample[0][:1], None)]
        return macs.expected(model, seen, meter=meter)

    def search(target: float) -> tuple[int, macs.MACs]:
        low, high = fewest, len(ranking)
        best = measure(high, some)
        if best.total > target:
            raise UnreachableError(
                f"macs_budget {budget:g} cannot be reached: {least} still costs {best.total / dense:.4f} of the dense "
                "network; ask for at least that, or gate more layers"
            )
        while low < high:
            middle = (low + high) // 2
            measured = measure(middle, some)
            if measured.total <= target:
                high, best = middle, measured
            else:
                low = middle + 1
        remove(ranking[:high])  # whichever number was measured last
        return high, best

    some = [(images, None) for images in sample]
    target, tried = allowed, set()
    with bar:
        while True:
            removals, estimate = search(target)
            exact = estimate if complete else measure(removals, loader)
            near = complete or exact.total >= 0.998 * allowed or removals in tried
            if near and exact.total <= allowed:
                return removals, exact
            tried.add(removals)
            target = estimate.total * allowed / exact.total
