"""After the last step the channels go that the loss depends on least, and what that changes is told."""

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from afdslib import afs, runs
from afdslib.afs import macs
from afdslib.base.errors import AFDSError
from afdslib.pruning import settle

BATCHES = tiny.batches(12, 12)


def losses(model: nn.Module, batches) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([nn.functional.cross_entropy(model(x), y, reduction="none") for x, y in batches])


@pytest.mark.parametrize("name", ["conv1", "layer2.0.conv2", "layer3.0.downsample.0"])
def test_the_importance_is_the_slope_of_each_images_loss_along_a_channel(name):
    model = tiny.gated(stem="cifar").eval().double()
    batches = [(x.double(), y) for x, y in tiny.batches(12)]  # of unequal lengths
    found, before, small = afs.taylor_importance(model, batches), losses(model, batches), 1e-6
    assert list(found) == list(afs.layers(model)) and found[name].count_nonzero() > 2
    for channel, value in enumerate(found[name].tolist()):
        scale = torch.ones(len(found[name]), dtype=torch.float64)
        scale[channel] -= small
        with afs.layers(model)[name].register_forward_hook(lambda m, a, out, s=scale: out * s[:, None, None]):
            slope = (losses(model, batches) - before).abs().mean() / small
        assert float(slope) == pytest.approx(value, rel=1e-3, abs=1e-8)


def test_the_importance_leaves_a_network_as_it_was_and_says_what_it_needs():
    model = tiny.gated(stem="cifar").train()
    model.layer2.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.requires_grad_(False)
    assert sum(float(v.sum()) for v in afs.taylor_importance(model, BATCHES).values()) > 0
    assert model.training and not model.layer2.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(layer._forward_hooks for layer in afs.layers(model).values())
    with pytest.raises(AFDSError, match="loader is empty"):
        afs.taylor_importance(model, [])
    with pytest.raises(AFDSError, match="has no AFS layer"):
        afs.taylor_importance(tiny.network(), BATCHES)


def test_settling_by_importance_spares_a_channel_of_small_gates_that_the_network_needs():
    model = tiny.gated(stem="cifar").eval()
    afs.set_density(model, 1.0)
    dense = macs.count(model, (3, tiny.SIZE, tiny.SIZE)).total
    afs.update_masks(model, afs.collect_statistics(model, BATCHES), macs_budget=0.8, loader=BATCHES, delta_s=0.0)
    layer, reader = model.layer4[0].conv1, model.layer4[0].conv2.conv
    needed = int(afs.taylor_importance(model, BATCHES)["layer4.0.conv1"].argmax())
    with torch.no_grad():  # a smaller gate, made up for where it is read
        for part in (layer.predictor.weight, layer.predictor.bias, layer.beta):
            part[needed] *= 1e-3
        reader.weight[:, needed] *= 1e3
    statistics = afs.collect_statistics(model, BATCHES)
    scores = afs.taylor_importance(model, BATCHES)
    harm = {}
    for name, chosen in (("q", None), ("taylor", lambda: scores)):
        settled = copy.deepcopy(model)
        share = settle(settled, 0.75, BATCHES, statistics, dense, scores=chosen)
        assert 0.98 * 0.75 <= share <= 0.75
        assert bool(settled.layer4[0].conv1.m[needed]) == (name == "taylor")
        harm[name] = float((losses(settled, BATCHES) - losses(model, BATCHES)).abs().mean())
    assert harm["taylor"] < harm["q"] / 3


def test_scores_rank_channels_and_leave_freezing_to_the_gates():
    model = tiny.gated(stem="cifar").eval()
    statistics = afs.collect_statistics(model, BATCHES)
    settings = {"macs_budget": 0.6, "loader": BATCHES, "delta_s": 0.05}
    q = {name: s.q.clone() for name, s in statistics.items()}
    by_q, by_scores, turned = (copy.deepcopy(model) for _ in range(3))
    afs.update_masks(by_q, statistics, **settings)
    afs.update_masks(by_scores, statistics, scores=q, **settings)
    assert all(torch.equal(v, by_scores.state_dict()[k]) for k, v in by_q.state_dict().items())
    afs.update_masks(turned, statistics, scores={name: 1 / (mean + 1e-3) for name, mean in q.items()}, **settings)
    pairs = list(zip(afs.layers(by_q).values(), afs.layers(turned).values(), strict=True))
    assert all(torch.equal(a.s, b.s) for a, b in pairs) and any(not torch.equal(a.m, b.m) for a, b in pairs)
    with pytest.raises(AFDSError, match="scores belong to another network"):
        afs.update_masks(model, statistics, scores={}, **settings)
    with pytest.raises(AFDSError, match="threshold on q"):
        afs.update_masks(model, statistics, scores=q, delta_m=0.1)
    whole = tiny.transfer(budgets=(1.0, 0.6, 0.4), settle=True)
    other = replace(whole, settle_by="taylor")  # it shares the unpruned network
    assert other.parent.settle_by == "taylor" and other.parent != whole.parent
    assert other.parent.parent == whole.parent.parent and runs.run_id(other) != runs.run_id(whole)
    with pytest.raises(AFDSError, match="settle_by must be one of"):
        replace(whole, settle_by="gates")
