"""Compact networks: the very function of the masked network, in fewer numbers, saved and trained and cut again."""

import pytest
import random_networks as random
import torch
from safetensors import safe_open
from torch import nn

from afdslib import afs, backbones
from afdslib.afs import macs
from afdslib.afs.channels import CutConvBN, GroupedConv2d, Join, Pick, Spread
from afdslib.afs.compact import _cut, compact
from afdslib.base.errors import AFDSError
from afdslib.base.hooks import kept

SIZE = (3, 32, 32)
EXACT = 1e-9


def cut(model: nn.Module, **options) -> nn.Module:
    return compact(model, input_size=SIZE, **options)


def kinds(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


NAMES, MASKS = ("resnet18", "resnet26", "vgg11_bn", "mobilenet_v2"), ("mixed", "static", "dynamic", "single")


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_the_masked_networks(name, masks):
    model = random.masked(random.converted(name, seed=len(masks)), masks)
    afs.set_density(model, (1.0, 0.5)[(NAMES.index(name) + MASKS.index(masks)) % 2])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = random.images()
    for options in ({}, {"fold_bn": True}):
        small = cut(model, **options)
        assert random.difference(small, model, images) <= EXACT
        assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_inception_with_its_branches_side_by_side():
    model = random.masked(random.converted("inception_bn", 0, stem="cifar"))
    assert random.difference(cut(model), model, random.images()) <= EXACT


@pytest.mark.parametrize("seed", range(2))
def test_outputs_equal_with_gates_in_the_blocks_only_and_at_random_densities(seed):
    gates = "all" if seed % 2 else "blocks"
    model = random.masked(random.converted("resnet50", seed, gates=gates, width=1 / 32), keep=0.2 + 0.4 * seed)
    for position, layer in enumerate(afs.layers(model).values()):
        layer.density = (0.1, 0.35, 0.8)[(position + seed) % 3]
    assert random.difference(cut(model), model, random.images()) <= EXACT


class Odd(nn.Module):
    """What a network may also do: grouped convolutions, views, concatenations, sums with numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.b, self.bn_b = nn.Conv2d(12, 18, 3, padding=1, groups=3), nn.BatchNorm2d(18)
        self.c, self.bn_c = nn.Conv2d(12, 18, 1), nn.BatchNorm2d(18)
        self.slope = nn.PReLU(12)
        self.plain = nn.Conv2d(18, 12, 3, groups=2, bias=False)
        self.norm: nn.Module = nn.Identity()  # a batch norm without a convolution, put in after the conversion
        self.twice = nn.Conv2d(12, 12, 1)
        self.scale = nn.Parameter(torch.randn(1, 12, 1, 1))
        self.fc = nn.Linear(36 * 4 + 12, 5)

    def forward(self, x):
        a = self.slope(self.bn_a(self.a(x)))
        b, c = self.bn_b(self.b(a)), self.bn_c(self.c(a))
        both = self.norm(torch.cat([b, c], 1)).relu()
        pooled = nn.functional.adaptive_avg_pool2d(both, 2)
        other = self.plain(b + c).mean((2, 3))
        other = other + (self.twice(a) + self.twice(a * self.scale) + 1).mean((2, 3))
        return self.fc(torch.cat([pooled.view(pooled.size(0), 144), other], 1))


@pytest.mark.parametrize("seed", range(3))
def test_what_cannot_be_cut_is_left_whole(seed):
    torch.manual_seed(seed)
    model = afs.convert(random.randomised(Odd()))
    model.norm = random.randomised(nn.Sequential(nn.BatchNorm2d(36)))[0]
    model = random.masked(random.gated(model, 12), keep=0.4)
    small = compact(model, input_size=(3, 12, 12))
    assert random.difference(small, model, random.images(12)) <= EXACT
    assert small.fc.in_features < 36 * 4 + 12 or "Spread" in kinds(small)
    assert random.difference(compact(small, input_size=(3, 12, 12)), model, random.images(12)) <= EXACT


def test_a_network_whose_output_is_a_map_gives_all_its_channels():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8))
    model = random.masked(random.gated(afs.convert(random.randomised(body)), 12))
    assert random.difference(compact(model, input_size=(3, 12, 12)), model, random.images(12)) <= EXACT


def test_removed_channels_are_gone_everywhere_and_static_layers_are_ordinary():
    model = random.converted("resnet26", 0, width=1 / 8, zeros=False)
    block = model.layer2[1]
    block.conv1.m[:10] = 0
    block.conv2.s.zero_()
    block.conv2.gamma.uniform_(0.1, 1)
    block.conv2.m[5] = 0
    block.conv3.s[:20] = 0
    block.conv3.m[40:] = 0
    small = cut(model)
    first, second, third = (getattr(small.layer2, "1").get_submodule(f"conv{i}") for i in (1, 2, 3))
    assert type(first) is afs.AFSConvBN and first.conv.out_channels == 6 and first.width == 16
    assert first.predictor.out_features == first.m.numel() == first.beta.numel() == len(first.norm.running_mean) == 6
    assert type(second) is nn.Conv2d and (second.in_channels, second.out_channels) == (6, 15)
    norm = getattr(small.layer2, "1").bn2
    assert type(norm) is nn.BatchNorm2d and norm.affine and norm.num_features == 15
    assert type(third) is CutConvBN and third.conv.in_channels == third.predictor.in_features == 15
    # Static channels need no importance: 20 to 39 are dynamic.
    assert third.predictor.out_features == 20 and third.conv.out_channels == 40 and third.width == 64
    joins = [module for module in small.modules() if isinstance(module, Join)]
    assert [join.extra_repr() for join in joins] == ["40 + all of 64"]
    assert not any(type(module) is nn.Identity for module in small.modules())


def test_a_stream_channel_dead_in_every_addend_narrows_the_stream_and_what_reads_it():
    model = random.converted("resnet26", 1, width=1 / 8, zeros=False)
    for names in afs.streams(model):
        for name in names:
            model.get_submodule(name).m[::4] = 0
    small = cut(model)
    assert "Join" not in kinds(small)  # the addends hold the same channels
    assert small.fc.in_features == 3 / 4 * model.fc.in_features
    assert small.layer2.get_submodule("0").conv1.conv.in_channels == 3 / 4 * 32
    assert random.difference(small, model, random.images()) <= EXACT


def test_k_is_kept_through_compactions_and_the_gates_depend_on_the_image():
    model = random.masked(random.converted("resnet26", 0, width=1 / 8), "dynamic", keep=0.8)
    afs.set_density(model, 0.7)
    places = {name: layer.k for name, layer in afs.layers(model).items()}
    small = cut(cut(model))
    assert {name: layer.k for name, layer in afs.layers(small).items()} == places
    afs.set_density(model, 0.5), afs.set_density(small, 0.5)
    assert random.difference(small, model, random.images()) <= EXACT
    with kept(afs.layers(small), inputs=True) as inputs:
        small(random.images())
    active = [layer.gates(inputs[name]).active for name, layer in afs.layers(small).items()]
    assert sum(bool((one != one[0]).any()) for one in active) > len(active) / 2


def test_nothing_removed_gives_an_equal_network():
    model = random.converted("resnet26", 0, zeros=False)
    small = cut(model)
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert random.difference(small, model, random.images()) == 0
    plain = random.randomised(backbones.build("resnet14", 5, width=1 / 16))
    assert random.difference(cut(plain), plain, random.images()) == 0
    folded = cut(plain, fold_bn=True)
    assert random.difference(folded, plain, random.images()) <= EXACT and "BatchNorm2d" not in kinds(folded)


def test_what_cannot_be_compacted_is_refused_in_one_sentence():
    model = random.converted("resnet14", 0)
    for part in (model, model.layer1[0].conv2):
        part.train()
        with pytest.raises(AFDSError, match=r"train mode.*model.eval\(\)"):
            compact(model)
        model.eval()
    model.layer3[0].conv2.m.zero_()
    with pytest.raises(AFDSError, match="every channel of layer 'layer3.0.conv2' is removed"):
        compact(model)


@pytest.mark.parametrize("name", ["resnet26", "mobilenet_v2"])
def test_a_compact_network_is_cut_again_saved_and_loaded(name, tmp_path):
    model = random.masked(random.converted(name, 0), keep=0.7)
    small = random.masked(cut(model), keep=0.7)  # more goes
    smaller = cut(small)
    images = random.images()
    assert random.difference(smaller, small, images) <= EXACT
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in small.parameters())
    file = tmp_path / "small.safetensors"
    afs.save(smaller, file)
    again = afs.load(file)
    assert not again.training and type(again).__name__ == type(smaller).__name__
    assert torch.equal(again(images), smaller(images))
    afs.save(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").stat().st_size == file.stat().st_size
    with safe_open(str(file), framework="pt") as opened:
        assert "pickle" not in str(opened.metadata()) and opened.metadata()["afds"]


def test_a_loaded_compact_network_trains_and_its_remaining_gates_take_mask_updates(tmp_path):
    model = random.masked(random.converted("resnet14", 3), "mixed", keep=0.8)
    afs.save(cut(model), tmp_path / "net.safetensors")
    small = afs.load(tmp_path / "net.safetensors").train()
    optimiser = torch.optim.SGD(small.parameters(), lr=0.01)
    images, labels = random.images(count=6), torch.arange(6) % 5
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(small(images), labels)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in small.parameters() if p.requires_grad)
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    small.eval()
    loader = [(images, labels)]
    before = sum(int(layer.m.sum()) for layer in afs.layers(small).values())
    report = afs.update_masks(small, afs.collect_statistics(small, loader), macs_budget=0.7, loader=loader)
    assert report.macs.total <= 0.7 * macs.count(small, SIZE).total
    assert 0 < sum(int(layer.m.sum()) for layer in afs.layers(small).values()) < before
    assert random.difference(cut(small), small, images) <= EXACT
    backbones.reset_classifier(small, 7)  # another one fits and is saved
    afs.save(small, tmp_path / "net.safetensors")
    assert torch.equal(afs.load(tmp_path / "net.safetensors")(images), small(images))


def test_macs_of_a_compact_network_are_those_of_the_masked_one():
    model = random.masked(random.converted("mobilenet_v2", 0))
    afs.set_density(model, 0.6)
    loader = [(random.images(), None)]
    small = cut(model)
    assert "GroupedConv2d" in kinds(small)
    masked, measured = macs.expected(model, loader), macs.expected(small, loader)
    # A slot that reads zeros, for a depthwise filter whose input is removed, is counted neither here nor there.
    assert measured.total == pytest.approx(masked.total, rel=1e-12)
    assert set(macs.count(small, SIZE).by_layer) == set(macs.count(model, SIZE).by_layer)
    assert macs.count(small, SIZE).total < 0.5 * macs.count(model, SIZE).total


def test_a_damaged_description_is_refused(tmp_path):
    small, file = cut(random.masked(random.converted("resnet14", 0))), tmp_path / "net.safetensors"
    whole = small.architecture
    for damage in ({"masks": {}}, {"masks": None}, {"fold_bn": True}, {"input_size": [3]}):
        small.architecture = {**whole, "compact": [{**whole["compact"][0], **damage}]}
        afs.save(small, file)
        with pytest.raises(AFDSError, match="net.safetensors"):
            afs.load(file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(AFDSError, match="damaged"):
        afs.load(file)


def test_channel_operations_are_what_their_index_says():
    index, places = torch.tensor([0, 2, 5]), torch.tensor([1, 2, 3, 5])
    x, other, whole = (torch.randn(2, width, 4, 4) for width in (3, 4, 6))
    wide, spread = Spread(index, 6)(x), Spread(places, 6)(other)
    assert torch.equal(Pick(index)(wide), x) and float(wide[:, [1, 3, 4]].abs().max()) == 0
    for join, pair, wanted in (
        ((index, places), (x, other), wide + spread), ((places, index), (other, x), wide + spread),
        ((index, None), (x, whole), whole + wide), ((None, index), (whole, x), whole + wide),
    ):  # fmt: skip
        assert torch.equal(Join(6, *join)(*pair), wanted)


def test_a_grouped_convolution_loses_what_each_group_lost():
    conv = nn.Conv2d(12, 8, 3, groups=4, padding=1).double()
    inputs, outputs = torch.tensor([0, 1, 3, 9]), torch.tensor([0, 1, 2, 4, 6])  # group 2 has no input any more
    small = _cut(conv, inputs, outputs)
    assert isinstance(small, GroupedConv2d) and small.conv.groups == 4 and small.conv.in_channels == 8
    x = torch.zeros(2, 12, 5, 5, dtype=torch.float64)
    x[:, inputs] = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert torch.allclose(small(x[:, inputs]), conv(x)[:, outputs], atol=1e-12)


class Block(nn.Module):
    """A residual block, small enough to be compiled in a test."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.bn_b, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.bn_a(self.a(x)).relu()
        return self.fc((x + self.bn_b(self.b(x))).relu().mean((2, 3)))


def test_compact_networks_compile():
    torch.manual_seed(0)
    model = random.gated(afs.convert(random.randomised(Block(), zeros=False)), 12)
    model.a.m[0], model.a.s[1], model.b.m[:3] = 0, 0, 0
    afs.set_density(model, 0.4)
    small = compact(model, input_size=(3, 12, 12))
    assert {"Join", "CutConvBN"} <= kinds(small)
    compiled = torch.compile(small, backend="aot_eager")
    with torch.no_grad():
        for count in (1, 3):
            images = random.images(12, count)
            assert torch.allclose(compiled(images), small(images), atol=1e-12)
