"""Features of named layers, and the one place where a teacher is frozen."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from afdslib.afs.layer import AFSConvBN
from afdslib.backbones import stages
from afdslib.base import checks
from afdslib.base.errors import AFDSError
from afdslib.losses.at import input_gradient
from afdslib.losses.term import Pair

__all__ = ["Teacher", "compared_shapes", "feature_names", "feature_shapes", "pair_layers", "taps"]


@contextmanager
def taps(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of named modules during the forward passes inside the block, by hooks that always go.

    Outputs are cloned: what follows a layer may work in place (torchvision's ReLU, and its residual add into the last
    batch norm's output), and the features would be those of another layer. A block's output that is differentiated is
    kept as it is, for a copy changes the order in which its gradients add up; if it is changed in place, the pass is
    refused. [ours]
    """
    features: dict[str, Tensor] = {}
    versions: dict[str, int] = {}
    modules = dict(model.named_modules())

    def record(name: str, module: nn.Module, _: tuple, output: Tensor) -> None:
        single = isinstance(module, AFSConvBN) or next(module.children(), None) is None
        copied = single or not output.requires_grad
        features[name] = output.clone() if copied else output
        if not copied:
            versions[name] = output._version

    def refuse_changed(*_: Any) -> None:
        if changed := [name for name, version in versions.items() if features[name]._version != version]:
            raise AFDSError(f"the output of block {changed[0]!r} is changed in place after it; compare another layer")

    with ExitStack() as hooks:
        for name in names:
            if name not in modules:
                raise AFDSError(f"no layer {name!r} in {type(model).__name__}; see model.named_modules()")
            hooks.enter_context(modules[name].register_forward_hook(partial(record, name)))
        hooks.enter_context(model.register_forward_hook(refuse_changed))
        yield features


def feature_names(model: nn.Module, features: str) -> list[str]:
    """The layers a feature regulariser compares: the last block of each residual stage. [code]

    The features are those of the "block", after the residual add and ReLU [ours], or of its last "convbn", gated in a
    converted network, as in the paper's figure.
    """
    checks.choice("features", features, ("block", "convbn"))
    blocks = stages(model)
    if features == "block":
        return blocks
    last = [max(n for n, _ in model.get_submodule(b).named_children() if n.startswith("conv")) for b in blocks]
    names = [f"{block}.{child}" for block, child in zip(blocks, last, strict=True)]
    gated = [isinstance(model.get_submodule(name), AFSConvBN) for name in names]
    return [n if g else n.replace("conv", "bn") for n, g in zip(names, gated, strict=True)]


def feature_shapes(
    model: nn.Module, names: Iterable[str], input_size: tuple[int, int, int]
) -> dict[str, tuple[int, int, int]]:
    """(C, H, W) of each named layer's output for one image of the given size."""
    parameter = next(model.parameters())
    _, features = Teacher(model, names)(torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    return {name: tuple(x.shape[1:]) for name, x in features.items()}  # type: ignore[misc]


def pair_layers(
    model: nn.Module, teacher: nn.Module, own: Sequence[str], other: Sequence[str], input_size: tuple[int, int, int]
) -> tuple[Pair, ...]:
    """Layers of a student and its teacher, stage by stage; blocks may be of other numbers and widths."""
    if len(own) != len(other):
        raise AFDSError(f"the student has {len(own)} stages and the teacher {len(other)}; use taps 'last' for them")
    shapes = [list(feature_shapes(*of, input_size).values()) for of in ((model, own), (teacher, other))]
    return tuple(map(Pair, own, other, *shapes))


def compared_shapes(network: Any, features: str = "block", side: int = 64) -> dict[str, tuple[int, int, int]]:
    """(C, H, W) of the layers that a feature regulariser compares in an `experiments` Network, for images of a side.

    Weights are not read.
    """
    model: nn.Module = replace(network, weights=None).build(2, 0)
    with torch.autocast("cpu", enabled=False):
        return feature_shapes(model, feature_names(model, features), (3, side, side))


class Teacher:
    """A frozen network in eval mode that gives logits and the features of named layers without gradients.

    It holds a copy, so freezing it changes nothing outside, and it is no nn.Module, so that neither `.train()`
    nor an optimiser can reach it.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] = ()):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.names = list(names)

    def _check(self) -> None:
        """It was frozen when it was made; whoever thawed it since is told."""
        if any(m.training for m in self.model.modules()):
            raise AFDSError("The teacher is in train mode, so its batch norm would learn; call teacher.model.eval().")
        if any(p.requires_grad for p in self.model.parameters()):
            raise AFDSError("The teacher's parameters require gradients; call teacher.model.requires_grad_(False).")

    @torch.enable_grad()
    def input_gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """Gradient of each sample's cross-entropy with respect to its image, (B, 3, H, W), without a graph."""
        self._check()
        images = images.detach().requires_grad_()
        return input_gradient(self.model(images), labels, images, create_graph=False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self._check()
        with taps(self.model, self.names) as features:
            logits = self.model(images)
        return logits, features
