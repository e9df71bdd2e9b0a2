"""The comparison in miniature: tuned on validation, shared by workers, the same tables each time."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import toy_runs
from forked import ended, start

from afdslib import cli, data, runs, training
from afdslib.base import paths
from afdslib.base.errors import AFDSError, BusyError, UnreachableError
from afdslib.experiments import DataSource, DenseRun, FBSRun, NarrowRun, Network, PrunedRun, TransferRun
from afdslib.report import comparison as competitors
from afdslib.studies import ablations, comparison, engine, profiles, results, statistics, tuning, workers
from afdslib.studies import protocol as protocol_module
from afdslib.studies.ablations import Ablations
from afdslib.studies.comparison import Comparison
from afdslib.studies.points import Points, Tuned
from afdslib.studies.protocol import SELECTION_SPACES, Axis, Method, Protocol, protocol, regulariser_space

SPACE = (Axis("lr", 1.0, 0.1, 10.0), Axis("kind", "b", choices=("a", "b", None)))


def defaults(space) -> dict:
    return {axis.name: axis.default for axis in space}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A run store that grows from test to test: what one has trained the next looks up."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def profile(home, monkeypatch, store):
    """A profile whose every stage takes two steps on 24 images in memory, in a project of its own."""
    monkeypatch.setenv("AFDS_RUNS", str(store))
    sets = {"tiny-source": tiny.splits(0), "tiny-target": tiny.splits(10, shift=1)}
    monkeypatch.setattr(data, "load", lambda name, *_, **__: sets[name])
    step = replace(profiles.get("demo").transfer, steps=2, batch_size=8, log_rows=1)
    return replace(
        profiles.get("demo"), source=DataSource("tiny-source"), targets=(DataSource("tiny-target"),),
        network=Network("resnet14", width=tiny.WIDTH), source_training=step, afs_training=step, trial=step,
        transfer=step, tuning=step, macs_images=12,
    )  # fmt: skip


def run(profile, rules) -> Comparison:
    plan = Comparison(profile, rules)
    engine.compute(plan, 1)
    return plan


def rules(*methods: str, **kwargs) -> Protocol:
    small = {"trials": 1, "budgets": (1.0, 0.4), "trial_budget": 0.5, "primary_budget": 0.4, "multipliers": (1.0,),
             "settle_by": "q", "seeds": (0, 1), "rest": 1, "rivals": 1}  # fmt: skip
    return Protocol(tuple(map(Method.parse, methods)), **(small | kwargs))


WHOLE = rules("afd+afs", "l2+taylor", "l2+random")
"""Computed once; others are parts of it."""


def test_a_comparison_tunes_on_validation_gives_the_top_rival_all_seeds_and_the_same_tables_twice(profile):
    compared = run(profile, WHOLE)
    table, rows = compared.table(), compared.rows()
    best = statistics.rank_on_validation(table, budget=0.4, seeds=[0])[0]
    other = ({"l2+taylor", "l2+random"} - {best}).pop()
    assert {m: sorted(set(table.seed[table.method == m])) for m in set(table.method)} == {
        "afd+afs": [0, 1], best: [0, 1], other: [0],
    }  # fmt: skip
    times = results.view(compared.complete(), comparison.TIMES)
    assert list(times.run) == list(table.run) and (times.seconds > 0).all() and (times.source_seconds > 0).all()
    assert (table.source_macs > 0).all() and (table.training_macs > 0).all()
    static = table[(table.budget == 0.4) & (table.selection != "afs")]
    assert static.met.all() and (static.train_macs <= 0.4).all()
    # The competitors' unpruned point is one run, whatever the criterion.
    dense = table[(table.budget == 1) & (table.selection != "afs") & (table.seed == 0)]
    assert len(dense) == 2 and dense.run.nunique() == 1

    trials = compared.trials()
    assert list(trials.stage.value_counts()[["regulariser", "selection", "strength"]]) == [2, 3, 3]
    for id in trials.run:
        assert not any(key.startswith("test") for key in runs.show(id)["result"]["metrics"])
    assert compared.sentence().startswith("AFDS is ") and compared.finished
    assert (table.method == best).any() and compared.rival() == best

    ids = {run.id for run in runs.list_runs()}
    engine.compute(compared, 1)
    assert {run.id for run in runs.list_runs()} == ids  # nothing computed again
    pd.testing.assert_frame_equal(Comparison(profile, WHOLE).rows(), rows)
    assert not list(paths.figures("demo").glob("*")) and not paths.results("demo").exists()  # queries write nothing


def test_every_competitor_starts_from_the_plain_source_with_the_source_steps_that_afs_got(profile):
    compared = Points(profile, rules("afd+afs", "l2+taylor"), profile.targets[0])
    compared._shape = 3, (3, 64, 64)  # of which half the MACs are within reach of smaller images
    chain, kinds = (1.0, 0.5), {}
    for name in SELECTION_SPACES:
        tuned = Tuned(Method("l2", name), defaults(regulariser_space("l2")), defaults(SELECTION_SPACES[name]))
        point = compared.point(tuned, 0, chain, trial=True)
        kinds[name] = type(point)
        assert point.source.optimisation == profile.afs_training and not point.use_test
        plain = point.source.source
        assert plain == profile.source_run or plain == replace(profile.source_run, network=plain.network)
        assert point.data == DataSource("tiny-target", seed=0) and runs.from_json(runs.to_json(point)) == point
        total = sum(c.optimisation.steps for c in comparison._ancestors(point) if isinstance(c, (DenseRun, FBSRun)))
        assert point.budgets[-1] == 0.5 and total <= 4
    assert kinds == {
        "afs": TransferRun, "fbs": FBSRun, "slimming": PrunedRun, "taylor": PrunedRun, "l1": PrunedRun,
        "random": PrunedRun, "width": NarrowRun, "width-kd": NarrowRun, "image": NarrowRun, "image-kd": NarrowRun,
    }  # fmt: skip


def test_a_budget_that_cannot_be_reached_is_missing_with_its_reason(profile):
    compared = Comparison(profile, rules("afd+afs", "l2+taylor", "l2+width", budgets=(1.0, 1e-4)))
    l2, before = defaults(regulariser_space("l2")), len(runs.list_runs())
    compared.tuning = SimpleNamespace(
        why_not=lambda method: "", tuned=lambda method: Tuned(method, l2, defaults(SELECTION_SPACES[method.selection]))
    )
    cell = compared.cell(Method("l2", "width"), 0, (1.0, 1e-4))
    assert cell.config is None and "cannot be reached" in cell.reason and len(runs.list_runs()) == before
    (pruned,) = workers.compute([compared.cell(Method("l2", "taylor"), 0, (1.0, 1e-4)).config])
    assert "cannot be reached" in pruned.metrics["diverged"] and "cost" in pruned.metrics["diverged"]


def test_unknown_methods_and_combinations_are_one_sentence():
    for make, words in (
        (lambda: Method.parse("afd"), "not of the form"), (lambda: Method.parse("l3+afs"), "unknown regulariser 'l3'"),
        (lambda: Method.parse("l2+magic"), "unknown selection 'magic'"), (lambda: Protocol((), trials=1), "no method"),
        (lambda: Protocol((Method("l2", "afs"),), trials=0), "trials must be a whole number of at least 1, got 0"),
    ):  # fmt: skip
        with pytest.raises(AFDSError, match=words):
            make()
    assert [Method.parse(m).role for m in ("afd+afs", "l2+afs", "afd+taylor", "l2+taylor")] == [
        "afds", "part", "part", "competitor",
    ]  # fmt: skip


@pytest.mark.parametrize("name", profiles.names())
def test_every_profile_has_a_comparison_with_a_competitor_and_the_primary_budget(name):
    for scale in ("quick", "standard"):
        found = protocol(profiles.get(name, scale))
        assert {m.role for m in found.methods} >= {"afds", "competitor"}
        assert found.primary_budget in found.budgets and found.rest <= len(found.seeds)
        assert len(set(found.methods)) == len(found.methods)


def test_trials_are_the_defaults_and_then_spread_evenly_the_same_for_every_worker():
    tried = tuning.settings(SPACE, 17, seed=3)
    assert tried == tuning.settings(SPACE, 17, seed=3) != tuning.settings(SPACE, 17, seed=4)
    assert tried[0] == {"lr": 1.0, "kind": "b"} and tried[:5] == tuning.settings(SPACE, 5, seed=3)
    logs = np.log10([one["lr"] for one in tried[1:]])
    # Of 16 points of a Sobol sequence each quarter of an axis holds about four; random ones would seldom do so.
    assert all(3 <= n <= 5 for n in np.histogram(logs, bins=4, range=(-1, 1))[0])
    assert [tuning._value(SPACE[1], u) for u in (0.0, 0.4, 1.0)] == ["a", "b", None]
    for space, count in (((), 3), (SPACE, 0)):
        with pytest.raises(AFDSError, match="empty"):
            tuning.settings(space, count)


def test_a_trial_that_diverged_is_kept_and_never_chosen(monkeypatch):
    found = {"a": {"diverged": "the loss is nan"}, "b": {"validation_accuracy": 0.5}, "c": {"validation_accuracy": 0.5}}
    monkeypatch.setattr(engine, "lookup", lambda config: runs.Result(config, found[config], Path()))
    trials = [({"x": name}, engine.Cell(name, "trial")) for name in "abc"]
    assert tuning._best("x", trials) == {"x": "b"}
    with pytest.raises(UnreachableError, match="every trial of x is missing .the loss is nan"):
        tuning._best("x", trials[:1])
    found["b"]["test_accuracy"] = 0.5
    with pytest.raises(RuntimeError, match="holds test results"):
        tuning._best("x", trials)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_workers_share_runs_and_one_that_is_killed_loses_no_result(tmp_path, monkeypatch):
    """Three workers, one killed in a run: the others take it over from its checkpoint; no run is computed twice."""
    monkeypatch.setenv("AFDS_RUNS", str(tmp_path / "runs"))
    configs = [toy_runs.ToyTrain(name=str(i), steps=8, every=1, folder=str(tmp_path), pause=0.05) for i in range(5)]
    killed = start(lambda: workers.compute(configs))
    deadline = time.monotonic() + 60
    while not list((tmp_path / "runs").glob("*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(killed, signal.SIGKILL)
    others = [start(lambda: workers.compute(configs)) for _ in range(2)]
    assert [ended(child) for child in (killed, *others)] == [-signal.SIGKILL, 0, 0]
    assert [run.state for run in runs.list_runs(tmp_path / "runs")] == ["finished"] * 5
    # The killed one was begun twice, the second time from its checkpoint.
    assert (tmp_path / "executions.txt").read_text().count("started") == 6


def test_a_worker_passes_over_what_another_one_computes(profile, monkeypatch, tmp_path):
    asked, real = [], runs.get_or_run
    a, b = toy_runs.ToyTrain(folder=str(tmp_path)), toy_runs.ToyTrain(name="b", folder=str(tmp_path))

    def get_or_run(config, **options):
        asked.append(config)
        if asked == [a]:
            assert options == {"wait": False}
            raise BusyError("another process is computing it")
        return real(config, **options)

    monkeypatch.setattr(runs, "get_or_run", get_or_run)
    found = workers.compute([a, b])
    assert [r.id for r in found] == [runs.run_id(a), runs.run_id(b)] and asked[:3] == [a, b, a]


def test_a_worker_that_fails_is_reported(caplog):
    workers.alongside(_fail_elsewhere, (os.getpid(),), 2)
    assert "a worker ended with exit code" in caplog.text


def _fail_elsewhere(parent: int) -> None:
    if os.getpid() != parent:
        raise RuntimeError("a fault in a worker")
    deadline = time.monotonic() + 60
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_real_study_is_published_and_a_shorter_table_replaces_nothing(profile, monkeypatch, tmp_path):
    few = replace(WHOLE, methods=WHOLE.methods[:2], seeds=(0,))
    with pytest.raises(AFDSError, match="never committed"):
        engine.publish(run(profile, few))
    with mock.patch.object(data, "load", side_effect=AFDSError("the data set tiny-target is missing")):
        with pytest.raises(AFDSError, match="the data set tiny-target is missing"):
            run(profile, rules("afd+afs", "l2+width", seeds=(0,)))
    real = Comparison(replace(profile, name="imagenet32", committed=True), few)
    file = engine.publish(real)
    assert file == paths.results("imagenet32") / "results.csv" and len(real.table()) == 4
    whole = file.read_text()
    monkeypatch.setenv("AFDS_RUNS", str(tmp_path / "empty"))
    pd.testing.assert_frame_equal(engine.table(real), results.read("imagenet32"))  # from the committed runs alone
    results.write("imagenet32", results.read("imagenet32").head(3))
    assert file.read_text() == whole
    changed = results.read("imagenet32").tail(1).assign(run="000000000000")
    results.write("imagenet32", changed)
    assert len(results.read("imagenet32")) == len(whole.splitlines()) - 1 and "000000000000" in file.read_text()


def test_a_cell_records_its_settings_as_json_and_narrower_networks_can_be_left_out_between_the_ends(profile):
    compared = Comparison(profile, rules("afd+afs", "l2+width", budgets=(1.0, 0.6, 0.4), narrow_between=False))
    assert [compared._wanted(method) for method in compared.methods] == [[0, 1, 2], [0, 2]]
    tuned = Tuned(Method("l2", "taylor"), {"strength": 1e-3, "lr": 2.0}, {"normalise": "mean", "lr": 1.0})
    compared.tuning = SimpleNamespace(why_not=lambda method: "", tuned=lambda method: tuned)
    keys = compared.cell(tuned.method, 0, (1.0, 0.5)).keys
    assert json.loads(keys["settings"])["normalise (taylor)"] == "mean" and keys["strength"] == 1e-3


def test_the_command_shows_its_rules_and_its_plan_and_refuses_an_unknown_target(capsys, profile, monkeypatch):
    part = ("study", "--part", "comparison", "--profile", "demo")
    assert cli.main([*part, "--show"]) == 0
    assert json.loads(capsys.readouterr().out)["primary_budget"] == 0.1
    assert cli.main([*part, "--target", "x"]) == 2
    assert "no target 'x'; it has digits-5-9-30" in capsys.readouterr().err
    assert cli.main(["study", "--target", "x"]) == 2
    assert "--target is for the parts comparison, ablations and gates" in capsys.readouterr().err
    text = engine.dry_run(Comparison(replace(profile, trial_seed=999), rules("afd+afs", "l2+taylor")))
    assert "2 runs, 0 finished, 4 steps to go" in text and "what comes next is not known yet" in text


def test_ablations_change_one_part_of_afds_each_and_equal_time_gives_the_rival_as_long(profile):
    compared = run(profile, replace(WHOLE, methods=WHOLE.methods[:2]))
    first, *_, last = Ablations(compared).batches()
    cells = {cell.keys["variant"]: cell for cell in first}
    fields = {
        "l2": "regulariser.name", "uniform": "regulariser.name", "static": "delta_s", "dynamic": "delta_s",
        "recalled": "first freeze_first", "no-source-stage": "source.optimisation.steps",
        "random-predictors": "source.predictors", "convbn": "regulariser.features",
        "detached": "regulariser.attention", "multiple-8": "multiple", "multiple-16": "multiple", "coupled": "stream",
        ablations.WHOLE: "",
    }  # fmt: skip
    assert len(cells) == len(first) and cells.keys() == {*fields, "dense", "longer", "unextended"}
    configs = {name: runs.to_json(cell.config) for name, cell in cells.items()}
    flat = {name: pd.json_normalize(config).T[0].map(repr).to_dict() for name, config in configs.items()}
    for name, changed in fields.items():
        whole, mine = flat[ablations.WHOLE], flat[name]
        differ = {key.removesuffix(".float") for key in whole.keys() | mine.keys() if whole.get(key) != mine.get(key)}
        # L2 has a strength of its own.
        assert {key for key in differ if not key.endswith("strength")} == set(changed.split()), name
    assert configs["dense"]["class"] == "DenseRun" and configs["dense"]["regulariser"]["name"] == "afd"
    longer, short = configs["longer"], configs[ablations.WHOLE]
    assert longer["budgets"] == [1.0] and longer["optimisation"]["steps"] == 2 + 2 == 2 * short["optimisation"]["steps"]
    start = configs["unextended"]["dense"]["source"]
    assert start["optimisation"]["steps"] == 0 and start["source"]["optimisation"]["steps"] > 0

    trained = ["static", "dynamic", "random-predictors", ablations.WHOLE, "dense", "unextended"]
    workers.compute([cell.config for cell in (*(cells[name] for name in trained), *last)])
    tables = ablations.views(Ablations(compared).rows())
    table = tables["ablations"].set_index("key")
    labels = {name: ablations.LABELS[name] for name in trained} | {"unextended": "L2 + Taylor, unextended start"}
    assert table.variant.to_dict() == labels and table.run.nunique() == len(table)
    metrics = {name: runs.lookup(cells[name].config).metrics for name in trained}
    # After two steps the constants of "static only" may be huge, and that run has diverged; else no gate is dynamic.
    assert metrics["static"].get("dynamic", 0) == metrics["dynamic"]["static"] == 0
    main = compared.table()
    ours = main[(main.method == "afd+afs") & (main.seed == 0)].set_index("budget").test_accuracy
    assert table.test_accuracy[ablations.WHOLE] == ours[0.4]

    again, seconds = tables["equal_time"], results.view(compared.complete(), comparison.TIMES)
    means = seconds[(seconds.budget == 0.4) & (seconds.seed == 0)].set_index("method").seconds
    factor = max(0.1, round(means["afd+afs"] / means["l2+taylor"], 1))
    assert set(again.method) == {"l2+taylor"} and again.steps_factor[0] == factor
    steps = runs.show(again.run[0])["config"]["dense"]["optimisation"]["steps"]
    assert steps == max(2, round(factor * profile.transfer.steps))


def test_without_training_the_tables_hold_the_seeds_that_every_method_has(profile, monkeypatch, tmp_path):
    small = replace(WHOLE, methods=WHOLE.methods[:2], rest=2)
    with monkeypatch.context() as patch:
        patch.setenv("AFDS_RUNS", str(tmp_path / "empty"))
        assert Comparison(profile, small).complete().empty and runs.list_runs() == []
    lost = {cell.config for cell in run(profile, small)._chain(Method.parse("l2+taylor"), 1)}
    lookup, computed = runs.lookup, len(runs.list_runs())
    monkeypatch.setattr(runs, "lookup", lambda config, **k: None if config in lost else lookup(config, **k))
    monkeypatch.setattr(training, "fit", None)
    done = Comparison(profile, small)
    table = done.table()
    assert set(table.seed) == {0} and set(table.method) == {"afd+afs", "l2+taylor"} and len(table) == 4
    assert len(runs.list_runs()) == computed and "1 paired seed" in done.sentence() and not done.finished
    assert "**Not finished**: 1 of 2 seeds of AFDS." in competitors.Compared(done).unfinished
    assert f"go on with: {done.command}" in done.summary()
    with pytest.raises(AFDSError, match="ablations need the comparison, which is not finished; finish it first: afds"):
        list(Ablations(done).batches())
    assert Ablations(done).rows().empty


def test_a_narrower_network_with_kd_costs_its_teachers_source_too(profile):
    table = run(profile, rules("l2+width", "l2+width-kd", seeds=(0,))).table()
    alone, taught = (table[(table.method == m) & (table.budget == 0.4)].iloc[0] for m in ("l2+width", "l2+width-kd"))
    dense = table[(table.method == "l2+width") & (table.budget == 1)].iloc[0]
    assert taught.source_macs == pytest.approx(alone.source_macs + dense.source_macs, rel=1e-5)


def test_a_variant_of_a_study_takes_its_settings_and_rivals_and_tunes_nothing(profile, monkeypatch, tmp_path):
    monkeypatch.setattr(comparison, "protocol", lambda p: WHOLE)
    monkeypatch.setattr(profiles, "get", lambda *_: profile)
    other = replace(profile, name="demo-other", variant_of="demo", targets=(replace(profile.targets[0], per_class=3),))
    like = replace(WHOLE, settings_of="demo", seeds=(0,))
    with monkeypatch.context() as patch:
        patch.setenv("AFDS_RUNS", str(tmp_path / "empty"))
        with pytest.raises(AFDSError, match="finish it first: afds study --profile demo --scale quick --part comp"):
            run(other, like)

    original = run(profile, WHOLE)
    before = {run.id for run in runs.list_runs()}
    done = run(other, like)
    table, rival = done.table(), original.rival()
    assert set(table.method) == {"afd+afs", rival} and len(table) == 4 and done.sentence()
    configs = [runs.show(run.id)["config"] for run in runs.list_runs() if run.id not in before]
    assert all(config["use_test"] for config in configs if "use_test" in config)  # no trial among the new runs
    for method in (Method("afd", "afs"), Method.parse(rival)):
        assert done.tuned(method) == original.tuned(method)
    pd.testing.assert_frame_equal(done.trials(), original.trials())

    widths = competitors.Compared(done).attention
    assert set(widths.attention) == {"joint"} and set(widths.run) == set(table[table.method == "afd+afs"].run)
    engine.compute(Ablations(done), 1)
    extra = competitors.Compared(done)
    widths, settled = extra.attention, extra.beside["settled"]
    assert dict(widths.groupby("attention").size()) == {"joint": 2, "detached": 2}
    assert ((widths.width >= 1) & (widths.width <= widths.uniform * 1.0001)).all()
    detached, joint = (
        runs.show(widths[widths.attention == kind].run.iloc[0])["config"] for kind in ("detached", "joint")
    )
    assert detached.pop("regulariser") == {**joint.pop("regulariser"), "attention": "detached"} and detached == joint
    assert extra.beside["ablations"].empty and extra.beside["equal_time"].empty

    assert list(settled.attention) == ["joint", "detached"] and set(settled.budget) == {0.4}
    again = runs.show(settled[settled.attention == "detached"].run.iloc[0])["config"]
    first = runs.show(widths[(widths.attention == "detached") & (widths.budget < 1)].run.iloc[0])["config"]
    assert again.pop("settle_by") == "taylor" and first.pop("settle_by", "q") == "q" and again == first


def test_the_first_trial_of_afs_is_at_the_profiles_own_settings(profile):
    compared = Comparison(profile, rules("afd+afs", "l2+taylor")).points
    l2, usual = defaults(regulariser_space("l2")), defaults(protocol_module.selection_space("afs", profile))
    point = compared.point(Tuned(Method("l2", "afs"), l2, usual), 0, (1.0, 0.5))
    assert (point.delta_s, point.density_exponent) == (profile.delta_s, 0.5) and profile.delta_s != 0.01
    for mine, theirs in ((point.optimisation, profile.transfer), (point.tuning, profile.tuning)):
        assert (mine.lr, mine.predictor_lr) == (theirs.lr, theirs.predictor_lr)
    faster = compared.point(Tuned(Method("l2", "afs"), l2, usual | {"predictor_lr": 2.0, "lr": 0.5}), 0, (1.0, 0.5))
    assert faster.tuning.predictor_lr == 2 * profile.tuning.predictor_lr and faster.tuning.lr == 0.5 * profile.tuning.lr


def test_a_method_none_of_whose_trials_has_a_value_is_missing_with_the_reason(profile, tmp_path):
    torch.save(tiny.network(classes=7, stem="cifar").state_dict(), tmp_path / "weights.pth")
    none = replace(profile.source_training, steps=0)
    network = Network("resnet14", stem="cifar", width=tiny.WIDTH, weights=str(tmp_path / "weights.pth"))
    published = replace(profile, network=network, source_training=none, afs_training=none)
    compared = run(published, rules("l2+random", "l2+width", seeds=(0,)))
    missing = competitors.Compared(compared).missing
    assert dict(missing.groupby("method").size()) == {"l2+width": 2} and set(compared.table().method) == {"l2+random"}
    assert missing.reason.str.contains("published weights exist at one width only").all()
