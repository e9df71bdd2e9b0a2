"""Converted networks with random everything: statistics, signs of the scales, gates, masks."""

import torch
from torch import Tensor, nn

from afdslib import afs, backbones


def plain(name: str, seed: int, *, width: float = 1 / 16, stem: str = "imagenet", zeros: bool = True) -> nn.Module:
    """In float64 and eval mode, with negative and zero scales."""
    torch.manual_seed(seed)
    if name == "mobilenet_v2":
        model = backbones.build(name, 5, width=0.25)
    elif name.startswith("vgg"):
        with torch.device("meta"):  # its own classifier has 120 million parameters
            model = backbones.build(name, 5)
        model.classifier = nn.Sequential(nn.Linear(512 * 49, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 5))
        model.features.to_empty(device="cpu")
        for module in model.features:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    else:
        model = backbones.build(name, 5, width=width, stem=stem)
    return randomised(model, zeros=zeros)


def converted(name: str, seed: int, *, gates: str = "all", **options) -> nn.Module:
    """With gates that read the input."""
    return gated(afs.convert(plain(name, seed, **options), gates=gates))


@torch.no_grad()
def randomised(model: nn.Module, *, zeros: bool = True) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.copy_(torch.rand_like(module.weight) + 0.3)
            module.weight[torch.rand(len(module.weight)) < 0.3] *= -1
            if zeros:
                module.weight[1:][torch.rand(len(module.weight) - 1) < 0.1] = 0
            module.bias.normal_(0, 0.3)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
        elif isinstance(module, nn.Linear):
            module.bias.normal_(0, 0.1)  # no output is 0, which any other would equal
    return model.double().eval()


@torch.no_grad()
def gated(model: nn.Module, size: int = 32) -> nn.Module:
    """Gates that vary with the image by about a half, measured layer by layer so that nothing grows without bound."""

    def draw(layer: afs.AFSConvBN, args: tuple[Tensor, ...]) -> None:
        scale = args[0].mean((2, 3)).norm(dim=1).mean().clamp_min(0.1)
        nn.init.normal_(layer.predictor.weight, std=0.5 / float(scale))

    handles = [layer.register_forward_pre_hook(draw) for layer in afs.layers(model).values()]
    model(images(size))
    for handle in handles:
        handle.remove()
    return model


@torch.no_grad()
def masked(model: nn.Module, kind: str = "mixed", keep: float = 0.5) -> nn.Module:
    """Random masks: "mixed" removed, static and dynamic channels, "static", "dynamic" or "single" channels left."""
    for position, layer in enumerate(afs.layers(model).values()):
        width = layer.m.numel()
        alive = torch.rand(width) < keep
        if kind == "single" and position % 2 == 0:
            alive[:] = False
        alive[torch.randint(width, ())] = True
        layer.m.copy_(alive)
        share = {"static": 1.0, "dynamic": 0.0}.get(kind, [0.0, 0.5, 1.0][position % 3])
        frozen = torch.rand(width) < share
        layer.s[frozen] = 0
        layer.gamma[frozen] = torch.rand(width, dtype=layer.gamma.dtype)[frozen] + 0.1
    return model


def images(size: int = 32, count: int = 3, seed: int = 0) -> Tensor:
    """Images whose means differ, so that gates do."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, size, size)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return noise + torch.randn(count, 3, 1, 1, generator=generator, dtype=torch.float64)


@torch.no_grad()
def difference(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    """max|a-b| / max|b|."""
    first, second = a(x), b(x)
    assert 0 < float(second.abs().amax(tuple(range(1, second.dim()))).min()) < 1e6, "the outputs say nothing"
    return float((first - second).abs().max() / second.abs().max())
