"""What must hold, as functions: the ordinary tests run them on the library, the tests of the mutants on each fault.

Each takes an empty folder and raises AssertionError with a message that says which statement is broken.
"""

import math
from pathlib import Path

import tiny
import torch
from test_macs import Tiny, brute_force
from torch import Tensor, nn

from afdslib import afs, runs
from afdslib.afs import macs
from afdslib.base.hooks import kept
from afdslib.losses.afd import AFDLoss
from afdslib.studies import profiles
from afdslib.training import features
from afdslib.training.objective import Objective, Regulariser


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return float((a - b).detach().abs().max()) <= tolerance * max(1.0, float(b.detach().abs().max()))


def layer(c_in: int = 3, c: int = 8) -> afs.AFSConvBN:
    """One gated layer with random everything, in float64 and eval mode."""
    torch.manual_seed(0)
    made = afs.AFSConvBN(nn.Conv2d(c_in, c, 3, padding=1, bias=False), nn.BatchNorm2d(c, affine=False)).double()
    nn.init.normal_(made.predictor.weight)
    nn.init.uniform_(made.predictor.bias, 0.5, 1)
    nn.init.normal_(made.beta)
    return made.eval()


def normed(one: afs.AFSConvBN, x: Tensor) -> Tensor:
    """y = norm(conv(x)) by the definition."""
    y = nn.functional.conv2d(x, one.conv.weight, padding=one.conv.padding)
    mean, var = one.norm.running_mean[:, None, None], one.norm.running_var[:, None, None]
    return (y - mean) / (var + one.norm.eps).sqrt()


def static_channel_is_scaled_by_gamma(folder: Path) -> None:
    one = layer()
    one.s[2], one.gamma[2] = 0, 0.7
    x = tiny.maps(4, 3, 6, 6)
    out = one(x)[:, 2]
    assert bool((out != 0).any()), "a static channel is zero"
    assert close(out, (0.7 * normed(one, x) + one.beta[:, None, None])[:, 2]), "a static channel is not gamma * y"


def output_is_the_formula(folder: Path) -> None:
    one = layer()
    one.density, one.m[2], one.s[5], one.gamma[5] = 0.5, 0, 0, 0.3  # of four places the static channel takes one
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    h = (x.mean((2, 3)) @ one.predictor.weight.T + one.predictor.bias).relu() * one.m * one.s
    pi = torch.where(h >= h.topk(3, dim=1).values[:, -1:], h, 0.0)
    eta, active = one.s * pi + (1 - one.s) * one.gamma, one.m * (1 - one.s + one.s * (pi > 0))
    expected = active[..., None, None] * (eta[..., None, None] * normed(one, x) + one.beta[:, None, None])
    assert close(one(x), expected), "the output is not a * (eta * y + beta)"
    assert all(map(close, one.gates(x), (pi, eta, active))), "the gates are not those of the formula"


def removed_channel_is_exactly_zero(folder: Path) -> None:
    one = layer()
    one.m[1] = 0
    one.m[5], one.s[5] = 0, 0
    for training_mode in (False, True):
        out = one.train(training_mode)(torch.randn(4, 3, 6, 6, dtype=torch.float64))
        assert bool((out[:, [1, 5]] == 0).all()), "a removed channel is not zero"
        assert bool((out[:, [0, 2, 3, 4, 6, 7]].abs().amax((0, 2, 3)) > 0).all()), "a living channel is zero"


def density_suppresses_its_share_in_every_layer(folder: Path) -> None:
    """A tenth at d = 0.9, in the wide third convolutions as in the others."""
    model = tiny.gated().eval()
    afs.set_density(model, 0.9)
    for one in afs.layers(model).values():
        nn.init.zeros_(one.predictor.weight)
        nn.init.uniform_(one.predictor.bias, 0.5, 1)  # no channel closes by itself
    with features.taps(model, afs.layers(model)) as outputs, torch.no_grad():
        model(tiny.maps(3, 3, tiny.SIZE, tiny.SIZE).float())
    for name, out in outputs.items():
        suppressed, width = (out.abs().amax((2, 3)) == 0).sum(1).tolist(), out.shape[1]
        wanted = width - math.ceil(0.9 * width - 1e-9)
        assert suppressed == [wanted] * 3, f"{name} suppresses {suppressed[0]} of {width} channels, not {wanted}"


def conversion_is_exact(folder: Path) -> None:
    model = tiny.network().double()
    x = torch.randn(5, 3, tiny.SIZE, tiny.SIZE, dtype=torch.float64)
    for mode in (False, True):
        converted = afs.convert(model)
        assert close(converted.train(mode)(x), model.train(mode)(x)), "the converted network is another function"


def statistics_are_those_of_the_gates(folder: Path) -> None:
    model, loader = tiny.gated().eval(), tiny.batches()
    afs.set_density(model, 0.7)
    model.layer1[0].conv2.s[1], model.layer1[0].conv2.gamma[1] = 0, 0.25
    inputs: dict[str, list[Tensor]] = {name: [] for name in afs.layers(model)}
    for images, _ in loader:
        with torch.no_grad(), kept(afs.layers(model), inputs=True) as seen:
            model(images)
        for name, x in seen.items():
            inputs[name].append(x)
    for name, found in afs.collect_statistics(model, loader).items():
        gates = [afs.layers(model)[name].gates(x) for x in inputs[name]]
        pi, eta, active = (torch.cat(parts).detach().double() for parts in zip(*gates, strict=True))
        assert found.q.shape == afs.layers(model)[name].m.shape, "the statistics are not per channel"
        assert close(found.q, eta.mean(0), 1e-9), "q is not the mean of the gates"
        assert close(found.p, pi.var(0, unbiased=False), 1e-9), "p is not the variance of the gates"
        assert close(found.active_rate, active.mean(0)) and found.n == 12, "n or the active rate is wrong"


def masks_are_per_channel(folder: Path) -> None:
    model = tiny.gated().eval()
    statistics = afs.collect_statistics(model, tiny.batches())
    delta_m = float(torch.cat([s.q for s in statistics.values()]).median())
    variation = torch.cat([s.p / s.q.square().clamp_min(1e-12) for s in statistics.values()])
    afs.update_masks(model, statistics, delta_m=delta_m, delta_s=float(variation.median()))
    for mask in ("m", "s"):
        values = [getattr(one, mask) for one in afs.layers(model).values()]
        mixed = [v for v in values if 0 < float(v.sum()) < v.numel()]
        assert len(mixed) > len(values) / 2, f"the mask {mask} is one number per layer"


def gamma_becomes_the_mean_gate(folder: Path) -> None:
    model = tiny.gated().eval()
    statistics = afs.collect_statistics(model, tiny.batches())
    afs.update_masks(model, statistics, delta_m=-1.0, delta_s=math.inf)
    for name, one in afs.layers(model).items():
        assert close(one.gamma.double(), statistics[name].q, 1e-6), f"gamma of {name} is not the mean gate"


def masks_survive_saving(folder: Path) -> None:
    model = tiny.gated().eval()
    afs.set_density(model, 0.5)
    for one in afs.layers(model).values():
        one.m[1], one.s[2], one.gamma[2] = 0, 0, 0.3
    x = torch.randn(2, 3, tiny.SIZE, tiny.SIZE)
    afs.save(model, folder / "net.safetensors")
    again = afs.load(folder / "net.safetensors")
    for (name, one), other in zip(afs.layers(model).items(), afs.layers(again).values(), strict=True):
        for mask in ("m", "s", "gamma", "density"):
            same = torch.equal(*(torch.as_tensor(getattr(layer, mask)) for layer in (one, other)))
            assert same, f"{name} lost its {mask} when it was saved"
    assert torch.equal(again(x), model(x)), "the saved network is another function"


def a_stage_with_a_mask_update_finishes(folder: Path) -> None:
    """The stage meets the very first mask update in the middle of its first epoch, and trains on after it."""
    model, seen = tiny.gated(), []

    def update() -> dict[str, float]:
        seen.append(afs.update_masks(model, afs.collect_statistics(model, tiny.batches()), delta_m=0.3).removed)
        return {"removed": seen[-1]}

    try:
        tiny.fit(folder, model, settings=tiny.settings(3), events={1: update})
    except (AttributeError, TypeError, IndexError) as error:
        raise AssertionError(f"a stage with a mask update does not finish: {error}") from error
    assert len(seen) == 1 and seen[0] > 0, "the mask update did nothing"


def macs_are_those_of_each_image(folder: Path) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        model = afs.convert(Tiny()).eval()
        afs.set_density(model, 0.6)
        for one in afs.layers(model).values():
            nn.init.normal_(one.predictor.weight, std=3)
            nn.init.normal_(one.predictor.bias, 0.1)
            one.m[torch.randint(0, one.m.numel(), (1,))] = 0
            one.s[torch.randint(0, one.m.numel(), (2,))] = 0
        x = torch.randn(9, 3, 8, 8) + torch.randn(9, 3, 1, 1)
        singles = [brute_force(model, image[None]) for image in x]
        assert len({total for total, _ in singles}) > 1
        wanted, predictors = (sum(values) / len(x) for values in zip(*singles, strict=True))
        measured = macs.expected(model, [(x[:4], None), (x[4:], None)])
        assert math.isclose(sum(measured.by_layer.values()), wanted), "MACs are not the mean of what each image costs"
        assert math.isclose(measured.predictors, predictors), "the predictors' MACs are wrong"
        assert math.isclose(measured.total, wanted + predictors), "the predictors are left out of the total"


def slow_afd(loss: AFDLoss, student: dict[str, Tensor], source: dict[str, Tensor]) -> tuple[float, float]:
    """R and the entropy by the formula, one sample and one channel at a time."""
    total = entropy = 0.0
    for name, f_s in source.items():
        f_t, attention = student[name], loss.attentions[name.replace(".", "_")]
        alive = getattr(loss, f"alive_{name.replace('.', '_')}").tolist()
        batch, channels, height, width = f_s.shape
        for b in range(batch):
            logits = []
            for c in range(channels):
                hidden = f_s[b, c].flatten() @ attention.hidden.weight.T + attention.hidden.bias
                logits.append((hidden.relu() @ attention.w2 + attention.b2[c]).item())
            top = max(v for v, a in zip(logits, alive, strict=True) if a)
            weights = [math.exp(v - top) if a else 0.0 for v, a in zip(logits, alive, strict=True)]
            for c, weight in enumerate(weights):
                rho = weight / sum(weights)
                squared = float((f_t[b, c] - f_s[b, c]).square().sum())
                total += channels / (2 * height * width) * rho * squared / batch
                entropy -= rho * math.log(rho) / batch / len(source) if rho else 0.0
    return total, entropy


def afd_case(*, seed: int = 0, batch: int = 3, dtype: torch.dtype = torch.float64):
    """An AFDLoss with random attention and two layers' features: (loss, student, source)."""
    torch.manual_seed(seed)
    shapes = {"layer1.0": (5, 4, 3), "layer2.0": (4, 2, 2)}
    loss = AFDLoss(shapes).to(dtype)
    for parameter in loss.parameters():
        nn.init.normal_(parameter, std=0.5)
    student, source = ({n: torch.randn(batch, *s, dtype=dtype) for n, s in shapes.items()} for _ in range(2))
    return loss, student, source


def afd_is_the_formula(folder: Path) -> None:
    loss, student, source = afd_case()
    measured = float(loss(student, source)["afd"].detach())
    assert math.isclose(measured, slow_afd(loss, student, source)[0], rel_tol=1e-9), "AFD is not the formula's R"


def attention_bias_is_per_channel(folder: Path) -> None:
    """A shared scalar would cancel in the softmax: it could never learn."""
    loss, student, source = afd_case()
    loss(student, source)["afd"].backward()
    for attention in loss.attentions.values():
        assert float(attention.b2.grad.abs().max()) > 1e-6, "the attention's bias b2 gets no gradient"


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def features_are_those_of_this_step(folder: Path) -> None:
    """A regularised step after an evaluation pass computes the loss of a fresh network on the same batch."""
    model, source = tiny.gated().eval(), tiny.gated(1)
    objective = Objective(model, Regulariser("afd", 0.1), source, (3, tiny.SIZE, tiny.SIZE))
    x, y = tiny.images(6).__getitems__(list(range(6)))
    first = objective(model, x, y)[1]["afd"].detach()
    assert hooks(model) == 0, "hooks stay on the network after a training step"
    with torch.no_grad():
        for images, _ in tiny.batches(12, 6, seed=7):
            model(images)
    afs.collect_statistics(model, tiny.batches(4, 4))
    assert hooks(model) == 0, "hooks stay on the network after its statistics were taken"
    assert torch.equal(objective(model, x, y)[1]["afd"].detach(), first), "a step used the features of another pass"


def the_same_seed_gives_the_same_numbers(folder: Path) -> None:
    states = []
    for repeat, seed in enumerate((3, 3, 4)):
        torch.manual_seed(100 + repeat)  # whatever the process drew before
        model = tiny.gated()
        torch.manual_seed(100 + repeat)
        tiny.fit(folder / str(repeat), model, seed=seed, settings=tiny.settings(3))
        states.append(model.fc.weight.detach().clone())
    assert torch.equal(states[0], states[1]), "two runs with one seed differ"
    assert not torch.equal(states[0], states[2]), "another seed changes nothing"


class Unreadable(tiny.data.ArrayImages):
    """A test set that nobody may look into."""

    def __getitems__(self, indices):
        raise AssertionError("a test image was read before the report")


def nothing_is_fitted_or_chosen_on_test_images(folder: Path) -> None:
    """A pruned run without a report at its end meets every stage that fits or chooses something."""
    splits = tiny.splits(10, shift=1)
    splits.test.__class__ = Unreadable
    with tiny.served(splits):
        run = tiny.transfer(budgets=(1.0, 0.5), steps=2, use_test=False)
        metrics = runs.get_or_run(run, store=tiny.store(folder)).metrics
    assert "validation_accuracy" in metrics, "there is nothing to choose by but the test set"
    assert "test_accuracy" not in metrics


def the_source_stage_teaches_the_predictors(folder: Path) -> None:
    for name in ("demo", "imagenet32"):
        assert profiles.get(name).afs_training.steps > 0, f"the profile {name} has no source stage"
    with tiny.served():
        result = runs.get_or_run(tiny.AFS_SOURCE, store=folder)
    model = afs.load(result.path / "model.safetensors")
    for name, one in afs.layers(model).items():
        assert bool((one.predictor.weight != 0).any()), f"the predictor of {name} has learnt nothing on the source data"


def each_budget_is_met_from_the_point_before(folder: Path) -> None:
    store = tiny.store(folder)
    with tiny.served():
        points = [tiny.transfer("l2", 1e-4, budgets=budgets, steps=2) for budgets in ((1.0, 0.5), (1.0, 0.5, 0.25))]
        before, last = (runs.get_or_run(point, store=store) for point in points)
    costs = [before.metrics["train_macs"], last.metrics["train_macs"]]
    # Gates go on moving in the steps after the last update.
    assert costs[0] < 0.55 and costs[1] < 0.28, f"the budget is not lowered: {costs[0]:.2f}, then {costs[1]:.2f}"
    assert last.metrics["removed"] >= before.metrics["removed"] > 0, "no channel is removed"
    networks = [afs.load(result.path / "model.safetensors") for result in (before, last)]
    totals = [macs.expected(network, tiny.batches()).total for network in networks]
    assert totals[1] < totals[0], "the smaller network costs as much as the larger one"
    for one, other in zip(*(afs.layers(network).values() for network in networks), strict=True):
        assert bool((other.m <= one.m).all()), "a channel that was removed has come back"
