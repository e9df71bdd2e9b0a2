"""The competitors' runs: regularisers on pruned networks, FBS's recipe, narrow networks, resumption, sealed trials."""

import copy
import shutil
from dataclasses import replace
from unittest import mock

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

from afdslib import afs, data, runs
from afdslib.afs import macs
from afdslib.afs.shrink import groups, shrink
from afdslib.backbones.inputs import scaled_down, see_at, see_whole
from afdslib.base import hooks
from afdslib.base.errors import AFDSError
from afdslib.experiments import ChannelWeightsRun, DataSource, DenseRun, ExtendedSourceRun, FBSGatesRun, FBSRun
from afdslib.experiments import source as sources
from afdslib.experiments.competitors import KEPT, NarrowRun, PrunedRun, Selection
from afdslib.experiments.stage import OBJECTIVE
from afdslib.losses import TERMS, Batch, DELTALoss, at_loss, lwf_loss
from afdslib.losses.sparsity import GateL1, ScaleL1
from afdslib.pruning import boosted, match_norms, settle
from afdslib.runs import MODEL
from afdslib.training import loop
from afdslib.training.features import Teacher, feature_names, taps
from afdslib.training.kept_channels import matching
from afdslib.training.objective import Objective, Regulariser

SIZE = (3, tiny.SIZE, tiny.SIZE)
STAGE = tiny.settings(3, log_rows=3)
START = ExtendedSourceRun(tiny.SOURCE, DataSource("tiny-source"), tiny.settings(0))
TARGET = DataSource("tiny-target")


def dense(name: str = "l2", strength: float = 1e-3, **kwargs) -> DenseRun:
    return DenseRun(START, TARGET, Regulariser(name, strength), STAGE, macs_images=12, **kwargs)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Shared, so that each dense network is trained once."""
    with tiny.served():
        yield tiny.store(tmp_path_factory.mktemp("store"))


@pytest.mark.parametrize("name", TERMS)
def test_on_a_pruned_network_a_regulariser_compares_the_kept_channels(name):
    """Its term is the formula on the source's kept channels, and 0 (or nearly) for the pruned source itself."""
    source = tiny.network(1, stem="cifar").eval()
    kept = {group.name: tuple(range(0, group.width, 2)) for group in groups(source, SIZE)}
    model = shrink(tiny.network(2, stem="cifar"), kept, SIZE).eval()
    names = feature_names(source, "block")
    channels = matching(source, kept, names, SIZE)
    shapes = {n: tuple(x.shape[1:]) for n, x in Teacher(source, names)(torch.zeros(1, *SIZE))[1].items()}
    weights = {n: torch.rand(shape[0]) for n, shape in shapes.items()}
    objective = Objective(model, Regulariser(name, 0.1), source, SIZE, channels=channels, weights=weights)
    (images, labels), *_ = tiny.batches(4, 4)
    with taps(model, names) as student:
        logits = model(images)
    old, reference = Teacher(source, names)(images)
    loss, terms, _ = objective(model, images, labels)
    reference = {n: x[:, channels.kept[n]] for n, x in reference.items()}
    entropy = nn.functional.cross_entropy(logits, labels)
    if name == "l2":
        expected = torch.zeros(())
    elif name == "l2sp":
        pairs = zip(channels.reference.named_parameters(), model.named_parameters(), strict=True)
        head = sum(p.square().sum() for n, p in model.named_parameters() if n.startswith("fc"))
        distance = sum((p - q).square().sum() for (n, q), (_, p) in pairs if not n.startswith("fc"))
        expected = 0.1 / 2 * distance + 0.01 / 2 * head
    elif name == "lwf":
        with taps(model, ["avgpool"]) as pooled:
            model(images)
        weight = source.fc.weight[:, channels.kept["fc"]]
        expected = 0.1 * lwf_loss(nn.functional.linear(pooled["avgpool"].flatten(1), weight, source.fc.bias), old)
    elif name == "at":
        expected = 0.1 * sum(at_loss(student[n], reference[n]) for n in names)
    else:
        flat = {n: torch.full((s[0],), 1 / s[0]) for n, s in shapes.items()}
        # AFD's attention is uniform at the start, over the living channels.
        even = {n: torch.full((s[0],), 1 / len(channels.kept[n])) for n, s in shapes.items()}
        w = {"delta": weights, "feature-map": flat, "afd": even}[name]
        # C/(2HW) counts the source's channels, so that lambda means the same at every budget.
        factor = {n: s[0] / len(channels.kept[n]) for n, s in shapes.items()}
        loss_of = DELTALoss({n: w[n][channels.kept[n]] * factor[n] for n in names})
        expected = 0.1 * loss_of(student, reference)
    torch.testing.assert_close(loss - entropy, expected, rtol=1e-3, atol=1e-5)
    assert next(iter(terms)) == "cross_entropy" and all(bool(t.isfinite()) for t in terms.values())


@pytest.mark.parametrize("name", ["lwf", "delta", "at"])
def test_the_new_terms_are_logged_and_add_up_to_the_loss(store, name):
    result = runs.get_or_run(dense(name, 0.1), store=store)
    rows = result.history()
    assert rows.loss.tolist() == pytest.approx((rows.cross_entropy + 0.1 * rows[name]).tolist(), rel=1e-4, abs=1e-5)
    network = macs.count(afs.load(result.artifact(MODEL)), SIZE)
    assert (rows[name] > 0).any() and result.metrics["training_macs"] == network.total * 3 * 8 * (3 + 1)


def test_the_weight_stage_of_delta_goes_on_with_the_next_layer_after_a_kill(store, monkeypatch):
    config, real, weighed = ChannelWeightsRun(START, TARGET, images=6), sources.channel_weights, []
    whole = runs.get_or_run(config, store=store)
    expected = load_file(whole.artifact(sources.WEIGHTS))
    assert all(float(w.sum()) == pytest.approx(1) for w in expected.values()) and whole.metrics["training_macs"] > 0
    shutil.rmtree(whole.path)

    def weigh(model, names, loader, **kwargs):
        weighed.append(*(names if len(weighed) != 2 else ["killed"]))
        if weighed[-1] == "killed":
            raise KeyboardInterrupt
        return real(model, names, loader, **kwargs)

    monkeypatch.setattr(sources, "channel_weights", weigh)
    with pytest.raises(KeyboardInterrupt):
        runs.get_or_run(config, store=store)
    result = runs.get_or_run(config, store=store)
    weights = load_file(result.artifact(sources.WEIGHTS))
    assert all(torch.equal(weights[n], expected[n]) for n in expected) and result.metrics == whole.metrics
    assert sorted(weighed) == sorted([*expected, "killed"])  # each layer once


def test_a_pruned_point_resumes_to_the_same_numbers_with_the_channels_it_chose(store, monkeypatch):
    monkeypatch.setattr(loop.Throttle, "due", lambda self: True)
    config = PrunedRun(dense("afd", 0.01), Selection("taylor"), STAGE, (0.6, 0.4))
    whole = runs.get_or_run(config, store=store)
    files = (MODEL, OBJECTIVE, "metrics.csv", "result.json", KEPT)
    expected = {name: (whole.path / name).read_bytes() for name in files}
    before = runs.get_or_run(config.parent, store=store)
    assert 0.98 * 0.4 <= whole.metrics["train_macs"] <= 0.4 and whole.metrics["macs"] == whole.metrics["train_macs"]
    assert whole.metrics["removed"] > before.metrics["removed"] > 0
    shutil.rmtree(whole.path)
    with tiny.killed(1):
        runs.get_or_run(config, store=store)
    # Chosen once: another machine might rank near ties otherwise.
    monkeypatch.setattr("afdslib.pruning.scores", lambda *a, **k: pytest.fail("chosen again"))
    again = runs.get_or_run(config, store=store)
    assert {name: (again.path / name).read_bytes() for name in files} == expected


def test_what_cannot_be_reached_and_what_follows_it_are_results(store):
    config = PrunedRun(dense(), Selection("l1"), STAGE, (0.01, 0.005))
    for point in (config.parent, config):
        assert "at 100x, the budget 0.01 cannot be reached" in runs.get_or_run(point, store=store).metrics["diverged"]


def test_taylor_scores_are_taken_on_batches_of_mixed_classes_where_asked_for(store):
    seen = []
    for mixed in (False, True, True):
        config = PrunedRun(dense(), Selection("taylor", images=12, mixed=mixed), STAGE, (0.5,))
        with mock.patch("afdslib.pruning.scores", side_effect=KeyboardInterrupt) as scores:
            with pytest.raises(KeyboardInterrupt):
                runs.get_or_run(config, store=store)
        seen.append(torch.cat([images.flatten(1).sum(1) for images, _ in scores.call_args.kwargs["batches"]]))
    still, drawn, again = seen
    assert len(still) == 12 and not torch.equal(still, drawn) and torch.equal(drawn, again)
    assert torch.equal(still.sort().values, drawn.sort().values)


def test_the_selections_share_the_unpruned_point_but_slimming_has_its_own():
    taylor, random = (PrunedRun(dense(), Selection(n), STAGE, (0.5,)) for n in ("taylor", "random"))
    slimming = PrunedRun(dense(scale_l1=1e-4), Selection("slimming"), STAGE, (0.5,))
    assert taylor.parent == random.parent != slimming.parent
    assert PrunedRun(dense(), Selection("l1"), STAGE, (0.5, 0.2)).parent.budgets == (0.5,)
    weighed = PrunedRun(dense("delta"), Selection("l1"), STAGE, (0.5,))
    assert runs.needs(weighed) == [START, weighed.dense, ChannelWeightsRun(START, TARGET)]
    for wrong in ((), (1.0, 0.5), (0.5, 0.6), (0.5, 0.0), ("a",)):
        with pytest.raises(AFDSError, match="budgets must decrease"):
            PrunedRun(dense(), Selection("l1"), STAGE, wrong)
    with pytest.raises(AFDSError, match="selection must be one of slimming, .* got 'x'"):
        Selection("x")
    model = tiny.network(stem="cifar")
    for weights, words in ((None, "needs its channel weights"), ({"layer1.0": torch.ones(3)}, "do not fit layer")):
        with pytest.raises(AFDSError, match=words):
            Objective(model, Regulariser("delta", 0.1), model, SIZE, weights=weights)


def test_fbs_tunes_its_gates_alone_first_and_meets_budgets_by_density_with_every_channel_alive(store):
    gates = FBSGatesRun(START, TARGET, Regulariser("l2", 0.0), STAGE, gate_l1=1e-6)
    alone = runs.get_or_run(gates, store=store)
    source = boosted(afs.load(runs.get_or_run(START, store=store).artifact(MODEL)))
    tuned = afs.load(alone.artifact(MODEL))
    assert all(float(layer.predictor.bias.detach().min()) == 1 for layer in afs.layers(source).values())
    moved = [n for n, p in tuned.named_parameters() if n[:2] == "fc" or not torch.equal(p, source.get_parameter(n))]
    assert {"predictor" if "predictor" in name else name.split(".")[0] for name in moved} == {"predictor", "fc"}
    result = runs.get_or_run(FBSRun(gates, STAGE, STAGE, (1.0, 0.5), macs_images=12), store=store)
    network = afs.load(result.artifact(MODEL))
    assert all(bool(layer.m.all()) and bool(layer.s.all()) for layer in afs.layers(network).values())
    assert 0.95 * 0.5 <= result.metrics["train_macs"] <= 0.5 and 0 < result.metrics["density"] < 1
    lowered = result.history()["mask_macs"].dropna()
    assert (lowered <= 0.5**0.25 + 1e-9).all() and "gate_l1" in result.history()
    model, x = tiny.network().eval(), torch.randn(4, *SIZE)
    exact, own = boosted(model, bias=None).eval(), boosted(model).eval()
    torch.testing.assert_close(exact(x), model(x), rtol=1e-3, atol=1e-3)  # starts as the trained function
    assert (own(x) - model(x)).abs().max() > 0.1


def test_a_narrow_network_distils_the_tuned_dense_one_and_takes_its_share_of_the_dense_macs(store):
    narrow = replace(START, source=replace(tiny.SOURCE, network=replace(tiny.SOURCE.network, width=1 / 32)))
    options = {"teacher": dense(), "macs_images": 12}
    config = NarrowRun(narrow, TARGET, Regulariser("l2", 1e-3), STAGE, tiny.SOURCE.network, 0.5, **options)
    result = runs.get_or_run(config, store=store)
    network = afs.load(result.artifact(MODEL))
    full = runs.get_or_run(dense(), store=store)
    assert result.metrics["dense_macs"] == full.metrics["dense_macs"]
    assert result.metrics["macs"] == pytest.approx(macs.count(network, SIZE).total / full.metrics["dense_macs"])
    assert "kd" in result.history() and "kd" not in full.history()


def test_a_pruned_network_may_see_smaller_images_and_learn_from_the_unpruned_one(store):
    first = PrunedRun(dense(), Selection("taylor"), STAGE, (0.5,), alpha=0.7, temperature=2.0, side=12)
    last = replace(first, dense=first, tuning=replace(STAGE, steps=2))
    assert first.unpruned == last.unpruned == dense()
    for run, steps in ((first, 3), (last, 2)):
        result = runs.get_or_run(run, store=store, needs=(MODEL,))
        model = afs.load(result.artifact(MODEL))
        assert result.metrics["steps"] == steps and model.architecture["side"] == 12
        assert macs.count(model, SIZE).total / result.metrics["dense_macs"] == result.metrics["macs"] <= 0.5
        row = (result.path / "metrics.csv").read_text().splitlines()
        assert float(dict(zip(row[0].split(","), row[1].split(","), strict=True))["kd"]) > 0
    assert see_whole(model) == 12 and see_whole(model) == 0
    x = torch.randn(2, *SIZE)
    seen = see_at(copy.deepcopy(model), 12)(x)
    torch.testing.assert_close(seen, model(scaled_down(x, 12)))


def test_matched_norms_give_the_mean_and_variance_that_they_gave_in_the_larger_network():
    larger = tiny.network(1, stem="cifar").eval()
    found, images = groups(larger, SIZE), torch.randn(8, *SIZE)
    kept = {group.name: tuple(range(0, group.width, 2)) for group in found}
    pruned = shrink(larger, kept, SIZE).eval()
    match_norms(pruned, larger, found, kept, images)
    given: dict[str, list[torch.Tensor]] = {}
    for model in (larger, pruned):
        for name, norm in model.named_modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.register_forward_hook(lambda m, a, out, name=name: given.setdefault(name, []).append(out.clone()))
        model(images)
    for name, (before, after) in given.items():
        places = next(
            [p for root, p in sorted(m.positions) if root in kept[g.name]] for g in found for m in g.members
            if m.layer == name
        )  # fmt: skip
        for moment in (torch.mean, torch.var):
            wanted = moment(before, (0, 2, 3))[places]
            torch.testing.assert_close(moment(after, (0, 2, 3)), wanted, rtol=1e-3, atol=1e-3)


def test_the_penalties_are_their_formulas():
    model, gated = tiny.network().eval(), tiny.gated().eval()
    (images, labels), *_ = tiny.batches(4, 4)
    logits = model(images)
    entropy = nn.functional.cross_entropy(logits, labels)
    loss, terms = ScaleL1(0.5).add(entropy, Batch(model, images, labels, logits))
    scales = sum(float(m.weight.detach().abs().sum()) for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert float(terms["slimming"]) == pytest.approx(0.5 * scales, rel=1e-5) and loss == entropy + terms["slimming"]
    layers, penalty = afs.layers(gated), GateL1(0.5)
    with penalty.watch(gated), hooks.kept(layers, inputs=True) as inputs:
        gated(images)
    expected = sum(float(layers[n].predictor(x.mean((2, 3))).relu().sum(1).mean()) for n, x in inputs.items())
    _, terms = penalty.add(entropy, Batch(gated, images, labels, logits))
    assert float(terms["gate_l1"]) == pytest.approx(0.5 * expected, rel=1e-4)
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_a_settled_budget_is_between_98_and_100_percent_whichever_way_the_gates_moved():
    loader = tiny.batches(12, 12)
    for shift in (-0.05, 0.3):
        model = tiny.gated(stem="cifar").eval()
        dense_macs = macs.count(model, SIZE).total
        afs.set_density(model, 0.6)
        afs.update_masks(model, afs.collect_statistics(model, loader), macs_budget=0.5, loader=loader, delta_s=0.0)
        with torch.no_grad():
            for layer in afs.layers(model).values():
                layer.predictor.bias += shift
        share = settle(model, 0.5, loader, afs.collect_statistics(model, loader), dense_macs)
        assert share == pytest.approx(macs.expected(model, loader).total / dense_macs) and 0.98 * 0.5 <= share <= 0.5


def test_a_trial_holds_no_test_image(store):
    splits = data.sealed(tiny.splits())
    assert splits.test.size == tiny.SIZE and splits.test.classes == tiny.CLASSES and len(splits.test) == 0
    with pytest.raises(RuntimeError, match="a test image was asked for"):
        splits.test.__getitems__([0])
    with mock.patch.object(data, "load", lambda *_, **__: replace(tiny.splits(10, shift=1), test=splits.test)):
        result = runs.get_or_run(dense(use_test=False), store=store)
    assert not any(key.startswith("test") for key in result.metrics) and "confusion" not in result.metrics
    assert runs.run_id(dense(use_test=False)) != runs.run_id(dense())
