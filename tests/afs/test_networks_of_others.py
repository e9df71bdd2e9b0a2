"""Networks of other people: weights a layer does not own, in-place operations, odd graphs, what really runs."""

import copy
import math
from contextlib import ExitStack

import pytest
import random_networks as random
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from afdslib import afs, backbones
from afdslib.afs import macs, verify
from afdslib.afs.compact import compact, masks, set_masks
from afdslib.afs.shrink import groups, shrink
from afdslib.base.errors import AFDSError
from afdslib.base.hooks import kept
from afdslib.pruning import choose, scores

SIZE = (3, 16, 16)


def block(inputs: int, outputs: int, kernel: int = 3, **options) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def images(size: int = 16) -> torch.Tensor:
    return random.images(size).float()


class Net(nn.Module):
    """Three blocks and a classifier, put together by a function."""

    def __init__(self, forward=None, **layers: nn.Module):
        super().__init__()
        self.a, self.b, self.c, self.fc = block(3, 8), block(8, 8), block(8, 8), nn.Linear(8, 4)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = forward or (lambda net, x: net.fc(net.c(net.b(net.a(x))).mean((2, 3))))

    def forward(self, x):
        return self._forward(self, x)


def network(forward=None, **layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return random.randomised(Net(forward, **layers), zeros=False).float()


def weight_by_hook(net):
    own = net.c[0].weight
    del net.c[0].weight
    net.c[0].source = own
    net.c[0].register_forward_pre_hook(lambda layer, args: setattr(layer, "weight", layer.source * 1.0))
    net(images())


def weight_rewritten(net):
    original = net.c[0].weight.detach().clone()
    net.c[0].register_forward_pre_hook(lambda layer, args: [layer.weight.data.copy_(original), None][1])


def evaluated_under_prune(net):
    prune.ln_structured(net.c[0], "weight", amount=0.25, n=1, dim=0)
    with torch.no_grad():
        net(images())


SPOILS = {
    "shared": lambda net: setattr(net.c[0], "weight", net.b[0].weight),
    "one storage": lambda net: setattr(net.c[0], "weight", nn.Parameter(net.b[0].weight.data[:])),
    "norms": lambda net: setattr(net.c[1], "weight", net.b[1].weight),
    "pruned": lambda net: prune.l1_unstructured(net.c[0], "weight", amount=0.5),
    "pruned and evaluated": evaluated_under_prune,
    "weight norm": lambda net: parametrizations.weight_norm(net.c[0]),
    "spectral norm": lambda net: nn.utils.spectral_norm(net.c[0]),
    "hook": weight_by_hook,
    "rewritten": weight_rewritten,
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_weights_that_a_layer_does_not_own_are_refused_by_its_name(spoil):
    net = network()
    spoil(net)
    with pytest.raises(AFDSError, match=r"'c\.[01]'") as caught:
        afs.convert(net)
    assert "\n" not in str(caught.value)


def test_kept_tensors_are_copies_hooks_go_and_neighbours_in_one_vector_are_no_shared_weights():
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)).eval(), images()
    with kept({"conv": net[0]}) as outputs, kept({"relu": net[1]}, inputs=True) as inputs:
        net(x)
    assert float(outputs["conv"].detach().min()) < 0
    assert torch.equal(outputs["conv"], net[0](x)) and torch.equal(inputs["relu"], outputs["conv"])
    assert not net[0]._forward_hooks and not net[1]._forward_pre_hooks
    net = network()
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(net.parameters()).detach(), net.parameters())
    torch.testing.assert_close(afs.convert(net)(x), net(x), rtol=1e-4, atol=1e-5)


def test_the_check_leaves_random_numbers_and_statistics_alone_and_forgives_what_overflows_on_both_sides():
    def count(layer, args, out):
        layer.seen.add_(1)

    net = network()
    net.c[1].register_buffer("seen", torch.zeros(()))
    net.c[1].register_forward_hook(count)
    net.train()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    verify.require_same(net, net, "a copy")
    assert torch.equal(torch.get_rng_state(), state) and net.training
    assert all(torch.equal(before[n], v) for n, v in net.state_dict().items())
    with torch.no_grad():
        net.c[1].weight.fill_(1e38)
        net.fc.weight.fill_(1e30)
    assert not bool(afs.convert(net).eval()(images()).isfinite().all())
    other = copy.deepcopy(net)
    with torch.no_grad():
        net.c[1].weight.fill_(1.0), net.fc.weight.fill_(1.0)
    with pytest.raises(AFDSError, match="a copy.*another function"):
        verify.require_same(net, other, "a copy")


def gradients_by_copies(model, x, y):
    """z dL/dz with a network that goes on with copies, so that nothing can change z."""
    outputs = {}
    with ExitStack() as stack:
        for name, layer in afs.layers(model).items():
            hook = lambda m, a, out, name=name: outputs.update({name: out}) or out.clone()  # noqa: E731
            stack.enter_context(layer.register_forward_hook(hook))
        loss = F.cross_entropy(model(x.clone().requires_grad_()), y, reduction="sum")
    pairs = zip(outputs.items(), torch.autograd.grad(loss, list(outputs.values())), strict=True)
    return {n: (z.detach().double() * g.double()).sum((2, 3)).abs().sum(0) / len(y) for (n, z), g in pairs}


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0"])
def test_taylor_importance_of_networks_that_work_in_place(name):
    torch.manual_seed(0)
    plain = torchvision.models.get_model(name, weights=None, num_classes=4)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    model = afs.convert(plain.eval())
    x, y = images(48)[:2], torch.tensor([0, 1])
    wanted, found = gradients_by_copies(model, x, y), afs.taylor_importance(model, [(x, y)])
    for layer, values in wanted.items():
        assert torch.allclose(found[layer], values, rtol=1e-4, atol=1e-4 * float(values.max())), layer


def added_in_place(net, x):
    y = net.a(x)
    y.add_(net.b(y.clone()))
    return net.fc(y.mean((2, 3)))


def rows(flatten):
    return lambda net, x: net.fc(flatten(net.b(net.a(x)))).view(x.size(0), -1, 4).mean(1)


def headed(body):
    return lambda net, x: net.fc(body(net, net.a(x)).mean((2, 3)))


# By name: what the network computes, and its layers beside the three blocks.
ODD = {
    "rows": (rows(lambda y: y.reshape(-1, 8)), {}),
    "flat rows": (rows(lambda y: y.permute(0, 2, 3, 1).flatten(0, 2)), {}),
    "chunk": (
        headed(lambda net, x: torch.cat([x.chunk(2, 1)[0], net.narrow(x.chunk(2, 1)[1])], 1)),
        {"narrow": lambda: block(4, 4)},
    ),
    "broadcast": (
        headed(lambda net, x: net.b(x) + net.one(x) + net.c(x).mean((2, 3), keepdim=True)), {"one": lambda: block(8, 1)}
    ),
    "group norm": (headed(lambda net, x: net.c(net.norm(x))), {"norm": lambda: nn.GroupNorm(2, 8)}),
    "shared prelu": (
        headed(lambda net, x: net.act(net.wide(net.act(x)))), {"act": lambda: nn.PReLU(8), "wide": lambda: block(8, 8)}
    ),
    "shuffle": (headed(lambda net, x: net.b(F.pixel_shuffle(net.more(x), 2))), {"more": lambda: block(8, 32)}),
    "one conv twice": (
        headed(lambda net, x: net.c(net.plain(net.plain(x).relu()))),
        {"plain": lambda: nn.Conv2d(8, 8, 3, padding=1)},
    ),
    "gated by a map": (headed(lambda net, x: net.b(x) * net.c(x).sigmoid()), {}),
}


def odd(name: str) -> nn.Module:
    forward, layers = ODD[name]
    return network(forward, **{layer: make() for layer, make in layers.items()})


@pytest.mark.parametrize("name", ODD)
def test_odd_graphs_are_cut_to_the_same_function_and_counted_as_they_run(name):
    model = afs.convert(odd(name)).eval()
    x = images()
    set_masks(model, {layer: ("s0ss0s0s" * 4)[: len(t)] for layer, t in masks(model).items()})
    small = compact(model, input_size=SIZE)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(x[:1])
    assert macs.expected(small, [(x, None)]).total == counter.get_total_flops() / 2
    assert macs.expected(model, [(x, None)]).total == pytest.approx(counter.get_total_flops() / 2, rel=1e-12)


@pytest.mark.parametrize("name", ODD)
def test_static_pruning_of_odd_graphs_gives_the_same_function_or_one_sentence(name):
    net = odd(name)
    try:
        found = groups(net, SIZE)
        small = shrink(net, choose(net, found, scores("l1", net, found), 0.6, SIZE), SIZE)
    except AFDSError as error:
        assert "\n" not in str(error)
    else:
        assert small(images()).shape == (3, 4) and macs.count(small, SIZE).total < macs.count(net, SIZE).total


def test_a_tensor_changed_in_place_and_read_again_and_unknown_letters_of_masks_are_refused():
    with pytest.raises(AFDSError, match="in place"):
        afs.convert(network(added_in_place))
    model = afs.convert(network())
    with pytest.raises(AFDSError, match="'x'"):
        set_masks(model, {name: "x" + text[1:] for name, text in masks(model).items()})


@pytest.mark.parametrize("tail", [lambda y: y.mean((2, 3)), lambda y: F.adaptive_avg_pool2d(y, 1).flatten(1)])
def test_a_classifier_of_convolution_and_batch_norm_keeps_its_classes(tail):
    net = network(lambda net, x: tail(net.head(net.b(net.a(x)))), head=block(8, 4, 1)[:2])
    del net.c, net.fc
    model, loader = afs.convert(net).eval(), [(images(), torch.zeros(3))]
    assert list(afs.layers(model)) == ["a.0", "b.0"]
    afs.set_density(model, 0.5)
    afs.update_masks(model, afs.collect_statistics(model, loader), macs_budget=0.3, loader=loader)
    assert bool((model(images()) != 0).any(0).all())
    found = groups(net, SIZE)
    assert [g.name for g in found] == ["a.0", "b.0"]
    assert shrink(net, choose(net, found, scores("l1", net, found), 0.4, SIZE), SIZE)(images()).shape == (3, 4)


def tokens(net, x):
    return net.fc(F.relu(net.b(net.a(x)).flatten(2).transpose(1, 2) @ net.mix.weight).mean(1))


ZOO = {
    "resnet18": lambda: backbones.build("resnet18", 4, stem="cifar", width=0.125),
    "vgg11_bn": lambda: random.plain("vgg11_bn", 0).float(),
    "mobilenet_v2": lambda: backbones.build("mobilenet_v2", 4, width=0.25),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=4),
    "efficientnet_b0": lambda: torchvision.models.efficientnet_b0(num_classes=4),
    "regnet_x_400mf": lambda: torchvision.models.regnet_x_400mf(num_classes=4),
    "shufflenet_v2_x0_5": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=4),
    "tokens": lambda: network(tokens, mix=nn.Linear(8, 8)),
}


RARE = {"regnet_x_400mf", "mobilenet_v3_small"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.exhaustive] * (n in RARE)) for n in ZOO])
def test_counts_are_what_torch_counts_of_whole_networks_and_of_compact_ones(name):
    torch.manual_seed(0)
    plain, x = ZOO[name]().eval(), images(32)[:1]
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 1.2)

    def executed(network) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x)
        return counter.get_total_flops() / 2

    whole = macs.count(plain, (3, 32, 32))
    assert whole.total == macs.expected(plain, [(x, None)]).total == executed(plain)
    model, loader = afs.convert(plain).eval(), [(x, None)]
    report = afs.update_masks(
        model, afs.collect_statistics(model, loader), macs_budget=0.7, loader=loader, delta_s=math.inf
    )
    small = compact(model, input_size=(3, 32, 32))
    assert executed(small) == pytest.approx(report.macs.total, rel=1e-12) and report.macs.total <= 0.7 * whole.total
    assert macs.expected(small, loader).total == executed(small) == macs.count(small, (3, 32, 32)).total


@pytest.mark.parametrize(("constant", "batches", "passes"), [(False, 2, 1), (True, 2, 1), (False, 150, 4)])
def test_a_mask_update_passes_over_its_images_a_few_times_only(constant, batches, passes):
    class Loader(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    model = afs.convert(network()).eval()
    if not constant:
        random.gated(model.double(), 16).float()
    loader = Loader((images() * (1 + i % 7), None) for i in range(batches))
    statistics = afs.collect_statistics(model, loader)
    loader.passes = 0
    report = afs.update_masks(model, statistics, macs_budget=0.5, loader=loader)
    assert loader.passes <= passes
    assert report.macs == macs.expected(model, loader) and (report.dynamic == 0) == constant
    assert report.macs.total <= 0.5 * macs.count(model, (3, 16, 16)).total
