"""The comparison in miniature: tuned on validation, shared by workers, the same tables each time."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from afdslib import afs, cli, data, runs, training
from afdslib.base import paths
from afdslib.base.errors import AFDSError, BusyError
from afdslib.experiments import DataSource, DenseRun, FBSRun, NarrowRun, Network, PrunedRun, TransferRun
from afdslib.report import comparison as competitors
from afdslib.runs import MODEL
from afdslib.studies import comparison, profiles, statistics, tuning
from afdslib.studies import protocol as protocol_module
from afdslib.studies.comparison import Comparison, Tuned
from afdslib.studies.protocol import SELECTION_SPACES, Axis, Method, Protocol, protocol, regulariser_space
from afdslib.studies.tuning import Outcome

SPACE = (Axis("lr", 1.0, 0.1, 10.0), Axis("kind", "b", choices=("a", "b", None)))


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """A profile whose every stage takes two steps on 24 images in memory."""
    monkeypatch.setenv("AFDS_HOME", str(tmp_path))
    for name in ("AFDS_RUNS", "AFDS_FIGURES", "AFDS_FRESH"):
        monkeypatch.delenv(name, raising=False)
    sets = {"tiny-source": tiny.splits(0), "tiny-target": tiny.splits(10, shift=1)}
    monkeypatch.setattr(data, "load", lambda name, *_, **__: sets[name])
    step = replace(profiles.get("demo").transfer, steps=2, batch_size=8, log_rows=1)
    return replace(
        profiles.get("demo"),
        source=DataSource("tiny-source"), targets=(DataSource("tiny-target"),),
        network=Network("resnet14", width=tiny.WIDTH),
        source_training=step, afs_training=step, trial=step, transfer=step, tuning=step, macs_images=12,
    )  # fmt: skip


def rules(*methods: str, **kwargs) -> Protocol:
    small = {"trials": 1, "budgets": (1.0, 0.4), "trial_budget": 0.5, "primary_budget": 0.4, "multipliers": (1.0,)}
    return Protocol(tuple(map(Method.parse, methods)), **(small | {"seeds": (0, 1), "rest": 1, "rivals": 1} | kwargs))


def defaults(name, spaces):
    return {axis.name: axis.default for axis in spaces[name]}


# the whole


def test_a_comparison_tunes_on_validation_gives_the_top_rival_all_seeds_and_the_same_tables_twice(profile):
    few = rules("afd+afs", "l2+taylor", "l2+random")
    compared = comparison.run_comparison(profile, rules=few)
    table = pd.read_csv(compared.folder() / "comparison.csv")
    best = statistics.rank_on_validation(table, budget=0.4, seeds=[0])[0]
    other = ({"l2+taylor", "l2+random"} - {best}).pop()
    assert {m: sorted(set(table.seed[table.method == m])) for m in set(table.method)} == {
        "afd+afs": [0, 1], best: [0, 1], other: [0],
    }  # fmt: skip
    times = pd.read_csv(compared.folder() / "times.csv")
    assert list(times.run) == list(table.run) and (times.seconds > 0).all() and (times.source_seconds > 0).all()
    assert (table.source_macs > 0).all() and (table.training_macs > 0).all()
    static = table[(table.budget == 0.4) & (table.selection != "afs")]
    assert static.met.all() and (static.train_macs <= 0.4).all()
    # The competitors' unpruned point is one run, whatever the criterion.
    dense = table[(table.budget == 1) & (table.regulariser == "l2") & (table.seed == 0)]
    assert len(dense) == 2 and dense.run.nunique() == 1

    trials = pd.read_csv(compared.folder() / "trials.csv")
    assert list(trials.stage.value_counts()[["regulariser", "selection", "strength"]]) == [2, 3, 3]
    for id in trials.run:
        assert not any(key.startswith("test") for key in runs.show(id)["result"]["metrics"])
    assert statistics.sentence(table, budget=0.4, seeds=[0]).startswith("AFDS is ")

    ids = {run.id for run in runs.list_runs()}
    written = (compared.folder() / "comparison.csv").read_bytes()
    comparison.run_comparison(profile, rules=few)
    assert {run.id for run in runs.list_runs()} == ids  # nothing computed again
    assert (compared.folder() / "comparison.csv").read_bytes() == written


def test_every_competitor_starts_from_the_plain_source_with_the_source_steps_that_afs_got(profile):
    compared = Comparison(profile, rules("afd+afs", "l2+taylor"))
    chain, kinds = (1.0, 0.5), {}
    for name in SELECTION_SPACES:
        tuned = Tuned(
            Method("l2", name), {axis.name: axis.default for axis in regulariser_space("l2")},
            defaults(name, SELECTION_SPACES),
        )  # fmt: skip
        point = compared.point(tuned, 0, chain, trial=True)
        kinds[name] = type(point)
        assert point.source.optimisation == profile.afs_training and not point.use_test
        plain = point.source.source
        assert plain == compared.source or plain == replace(compared.source, network=plain.network)
        assert point.data == DataSource("tiny-target", seed=0) and runs.from_json(runs.to_json(point)) == point
        total = sum(c.optimisation.steps for c in comparison._chain(point) if isinstance(c, (DenseRun, FBSRun)))
        assert point.budgets[-1] == 0.5 and total <= 4
    assert kinds == {
        "afs": TransferRun, "fbs": FBSRun, "slimming": PrunedRun, "taylor": PrunedRun, "l1": PrunedRun,
        "random": PrunedRun, "width": NarrowRun, "width-kd": NarrowRun,
    }  # fmt: skip


def test_a_budget_that_cannot_be_reached_is_missing_with_its_reason(profile):
    compared = Comparison(profile, rules("afd+afs", "l2+taylor", "l2+width", budgets=(1.0, 1e-4)))
    usual = {m: defaults(m, SELECTION_SPACES) for m in ("taylor", "width")}
    l2 = {axis.name: axis.default for axis in regulariser_space("l2")}
    table = compared.table([(Tuned(Method("l2", m), l2, usual[m]), 0, (1.0, 1e-4)) for m in usual])
    assert table.empty
    assert all("cannot be reached" in m["reason"] and "cost" in m["reason"] for m in table.attrs["missing"])
    ids = len(runs.list_runs())
    assert len(compared.table([(Tuned(Method("l2", "taylor"), l2, usual["taylor"]), 0, (1.0, 1e-4))])) == 0
    assert len(runs.list_runs()) == ids


def test_unknown_methods_and_combinations_are_one_sentence():
    for text, words in {
        "afd": "not of the form", "l3+afs": "unknown regulariser 'l3'", "l2+magic": "unknown selection 'magic'",
    }.items():  # fmt: skip
        with pytest.raises(AFDSError, match=words):
            Method.parse(text)
    with pytest.raises(AFDSError, match="no method"):
        Protocol((), trials=1)
    with pytest.raises(AFDSError, match="search space is empty"):
        Protocol((Method("l2", "afs"),), trials=0)
    assert [Method.parse(m).role for m in ("afd+afs", "l2+afs", "afd+taylor", "l2+taylor")] == [
        "afds", "part", "part", "competitor",
    ]  # fmt: skip


@pytest.mark.parametrize("name", profiles.names())
def test_every_profile_has_a_comparison_with_a_competitor_and_the_primary_budget(name):
    for budget in ("quick", "standard"):
        found = protocol(profiles.get(name, budget))
        assert {m.role for m in found.methods} >= {"afds", "competitor"}
        assert found.primary_budget in found.budgets and found.rest <= len(found.seeds)
        assert len(set(found.methods)) == len(found.methods)


# trials


def test_points_are_the_defaults_and_then_spread_evenly_the_same_each_time():
    drawn = tuning.points(SPACE, 17, seed=3)
    assert drawn == tuning.points(SPACE, 17, seed=3) != tuning.points(SPACE, 17, seed=4)
    assert drawn[0] == {"lr": 1.0, "kind": pytest.approx(0.5)}
    logs = np.log10([p["lr"] for p in drawn[1:]])
    # Of 16 points of a Sobol sequence each quarter of an axis holds about four; random ones would seldom do so.
    assert all(3 <= n <= 5 for n in np.histogram(logs, bins=4, range=(-1, 1))[0])
    assert [tuning._value(SPACE[1], u) for u in (0.0, 0.4, 1.0)] == ["a", "b", None]


def test_an_empty_space_and_trials_of_another_version_or_space_are_one_sentence(tmp_path, monkeypatch):
    def outcome(settings):
        return Outcome(settings["lr"], "")

    for space, count in (((), 3), (SPACE, 0)):
        with pytest.raises(AFDSError, match="empty"):
            tuning.search(tmp_path, "x", space, count, outcome)
    found = tuning.search(tmp_path, "x", SPACE, 3, outcome)
    assert [t.number for t in found] == [0, 1, 2] and found[1].outcome.value == found[1].settings["lr"]
    with pytest.raises(AFDSError, match="another search space"):
        tuning.search(tmp_path, "x", SPACE[:1], 3, outcome)
    monkeypatch.setattr("afdslib.runs.RESULTS_VERSION", 99)
    with pytest.raises(AFDSError, match="RESULTS_VERSION 1, and this is 99"):
        tuning.search(tmp_path, "x", SPACE, 3, outcome)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(AFDSError, match="shared folder.*cannot be used"):
        tuning.search(blocked, "x", SPACE, 3, outcome)


def test_a_trial_that_diverged_is_kept_and_never_chosen():
    trials = [
        tuning.Trial(0, {"a": 1.0}, Outcome(None, "r0", "the loss is nan")),
        tuning.Trial(1, {"a": 2.0}, Outcome(0.5, "r1")),
        tuning.Trial(2, {"a": 3.0}, Outcome(0.5, "r2")),
    ]
    assert comparison._best("x", trials) == {"a": 2.0}
    with pytest.raises(AFDSError, match="every trial of x is missing .the loss is nan"):
        comparison._best("x", trials[:1])


WORKER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import toy_runs
from afdslib import runs
from afdslib.studies import tuning
from afdslib.studies.protocol import Axis

def evaluate(settings):
    config = toy_runs.ToyTrain(name=f"{settings['lr']:.6f}", steps=8, every=1, folder=sys.argv[2], pause=0.05)
    return tuning.Outcome(runs.get_or_run(config).metrics["weight"], "")

found = tuning.search(Path(sys.argv[2]) / "trials", "toy", (Axis("lr", 1.0, 0.1, 10.0),), 5, evaluate)
print(*[t.outcome.value for t in found])
"""


def test_workers_share_trials_and_one_that_is_killed_loses_no_result(tmp_path):
    """Three workers, one killed in a trial: the others take it over from its checkpoint; no trial is computed twice."""
    here = str(Path(__file__).parents[1] / "support")
    env = {**os.environ, "AFDS_RUNS": str(tmp_path / "runs"), "AFDS_HOME": str(tmp_path)}
    command = [sys.executable, "-c", WORKER, here, str(tmp_path)]

    def start():
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE)

    killed = start()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "runs").glob("*/checkpoint.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    others = [start(), start()]
    lines = [process.communicate(timeout=120) for process in others]
    assert [process.returncode for process in others] == [0, 0], lines
    numbers = [[line for line in out.splitlines() if not line.startswith("step")][-1] for out, _ in lines]
    assert numbers[0] == numbers[1] and len(numbers[0].split()) == 5, lines
    started = (tmp_path / "executions.txt").read_text().count("started")
    finished = sum(1 for run in runs.list_runs(tmp_path / "runs") if run.state == "finished")
    assert finished == 5 and started == 6  # the killed one was begun twice, the second time from its checkpoint


def test_a_worker_passes_over_what_another_one_computes_and_publishes_each_result_at_once(profile, monkeypatch):
    from afdslib.studies import workers

    asked, published, real = [], [], runs.get_or_run
    a, b = tiny.SOURCE, replace(tiny.SOURCE, seed=1)

    def get_or_run(config, **options):
        asked.append(config)
        if config == a and asked == [a]:
            assert options == {"wait": False}
            raise BusyError("another process is computing it")
        return real(config, **options)

    monkeypatch.setattr(runs, "get_or_run", get_or_run)
    results = workers.compute([a, b], lambda result: published.append((result.id, len(asked))))
    assert [r.id for r in results] == [runs.run_id(a), runs.run_id(b)] and asked[:3] == [a, b, a]
    assert published[:2] == [(runs.run_id(b), 2), (runs.run_id(a), 3)]


def test_source_networks_of_a_committed_study_are_kept_so_that_it_can_go_on_elsewhere(profile, monkeypatch, tmp_path):
    compared = Comparison(replace(profile, committed=True), rules("afd+afs", "l2+width"))
    compared.networks()
    card = (tmp_path / "data" / "weights" / "demo.md").read_text()
    sources = [compared.afs_source, compared.extended(), compared.extended(0.5)]
    assert all(f"| `{runs.run_id(config)}` |" in card for config in sources)
    monkeypatch.setenv("AFDS_RUNS", str(tmp_path / "empty"))
    for config in sources:
        kept = runs.lookup(config, needs=(MODEL,))
        assert kept is not None and kept.committed and afs.load(kept.artifact(MODEL)) is not None


def test_trials_lie_beside_the_runs_and_settings_are_recorded_as_json(profile):
    compared = Comparison(profile, rules("afd+afs", "l2+taylor"))
    assert compared.journal().parent.parent == paths.runs()
    tuned = Tuned(Method("l2", "taylor"), {"strength": 1e-3, "lr": 2.0}, {"normalise": "mean", "lr": 1.0})
    row = compared._row(tuned, 0, 0.5)
    assert json.loads(row["settings"])["normalise (taylor)"] == "mean" and row["strength"] == 1e-3


def test_the_command_shows_its_rules_and_its_plan_and_refuses_an_unknown_target(capsys):
    assert cli.main(["compare", "--profile", "demo", "--show"]) == 0
    assert json.loads(capsys.readouterr().out)["primary_budget"] == 0.1
    assert cli.main(["compare", "--profile", "imagenet32", "--budget", "standard", "--dry-run"]) == 0
    assert "128 runs" in capsys.readouterr().out
    assert cli.main(["compare", "--profile", "demo", "--target", "x"]) == 2
    assert "no target 'x'; it has digits-5-9-12" in capsys.readouterr().err
    assert cli.main(["compare", "--profile", "demo", "--finished", "--extras"]) == 2
    assert "leave out --trials-only and --extras" in capsys.readouterr().err


def test_ablations_change_one_part_of_afds_each_and_equal_time_gives_the_rival_as_long(profile):
    few = rules("afd+afs", "l2+taylor")
    compared = comparison.run_comparison(profile, rules=few, extras=True)
    table = pd.read_csv(compared.folder() / "ablations.csv")
    changed = {
        "AFS without AFD": {"regulariser.name"},
        "static only": {"delta_s"},
        "dynamic only": {"delta_s"},
        "masks first updated at half a stage": {"first", "freeze_first"},
        "without the source stage": {"source.optimisation.steps"},
        "random predictors": {"source.predictors"},
        "features of the last ConvBN": {"regulariser.features"},
        "detached attention": {"regulariser.attention"},
        "uniform attention": {"regulariser.name"},
        "kept channels in multiples of 8": {"multiple"},
        "kept channels in multiples of 16": {"multiple"},
        "residual streams narrow as a whole": {"stream"},
        "both (AFDS)": set(),
    }
    beside = ("AFD without AFS", "unpruned, as many steps", "L2 + Taylor, unextended start")
    assert dict(table.groupby("variant").size()) == dict.fromkeys((*changed, *beside), 1)

    assert table.run.nunique() == len(table)
    stored = {r.variant: runs.show(r.run) for r in table.itertuples()}
    whole = _flat(stored["both (AFDS)"]["config"])
    for variant, paths_ in changed.items():
        mine = _flat(stored[variant]["config"])
        differ = {key.removesuffix(".float") for key in whole.keys() | mine.keys() if whole.get(key) != mine.get(key)}
        # L2 has a strength of its own.
        assert {key for key in differ if not key.endswith("strength")} == paths_, variant
    # After two steps the constants of "static only" may be huge, and that run has diverged; else no gate is dynamic.
    assert stored["static only"]["result"]["metrics"].get("dynamic", 0) == 0
    assert stored["dynamic only"]["result"]["metrics"]["static"] == 0
    dense = stored[beside[0]]["config"]
    assert dense["class"] == "DenseRun" and dense["regulariser"]["name"] == "afd"
    longer, short = (stored[name]["config"] for name in (beside[1], "both (AFDS)"))
    assert longer["budgets"] == [1.0] and longer["optimisation"]["steps"] == 2 + 2 == 2 * short["optimisation"]["steps"]
    start = stored[beside[2]]["config"]["dense"]["source"]
    assert start["optimisation"]["steps"] == 0 and start["source"]["optimisation"]["steps"] > 0
    main = pd.read_csv(compared.folder() / "comparison.csv")
    ours = main[(main.method == "afd+afs") & (main.seed == 0)].set_index("budget").test_accuracy
    assert table.set_index("variant").test_accuracy["both (AFDS)"] == ours[0.4]

    again = pd.read_csv(compared.folder() / "equal_time.csv")
    kept = json.loads((compared.folder() / "equal_time.json").read_text())
    assert kept["rival"] == "l2+taylor" and set(again.method) == {"l2+taylor"}
    ratio = kept["seconds"]["afd+afs"] / kept["seconds"]["l2+taylor"]
    assert kept["ratio"] == max(0.1, round(ratio, 1)) == again.steps_factor[0]
    steps = runs.show(again.run[0])["config"]["dense"]["optimisation"]["steps"]
    assert steps == max(2, round(kept["ratio"] * profile.transfer.steps))


def _flat(tree, prefix=""):
    found = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: json.dumps(value)}
    return found


def test_without_training_the_tables_hold_the_seeds_that_every_method_has(profile, monkeypatch):
    small = rules("afd+afs", "l2+taylor", budgets=(1.0, 0.5, 0.4), seeds=(0, 1, 2), rest=2)
    with pytest.raises(AFDSError, match="not finished; go on with: afds compare --profile demo --budget quick"):
        comparison.run_comparison(profile, rules=small, complete=False)
    compared = Comparison(profile, small)
    compared.trials()
    before = len(runs.list_runs())
    with pytest.raises(AFDSError, match="no seed of the comparison of demo is finished for every method"):
        comparison.run_comparison(profile, rules=small, complete=False)
    for method, seeds in ((Method("afd", "afs"), (0, 1)), (Method("l2", "taylor"), (0,))):
        compared.table([(compared.tuned(method), s, small.budgets[: i + 1]) for s in seeds for i in range(3)])
    whole = compared.point(compared.tuned(Method("afd", "afs")), 0, small.budgets[:2])
    runs.get_or_run(replace(whole, multiple=8))
    computed = len(runs.list_runs())
    assert computed > before
    monkeypatch.setattr(training, "fit", None)
    done = comparison.run_comparison(profile, rules=small, complete=False)
    table = pd.read_csv(done.folder() / "comparison.csv")
    assert set(table.seed) == {0} and set(table.method) == {"afd+afs", "l2+taylor"} and len(table) == 6
    assert len(runs.list_runs()) == computed and "1 paired seed" in done.sentence()
    assert "**Not finished**: 1 of 3 seeds of AFDS." in competitors.Compared(done).unfinished
    ablations = pd.read_csv(done.folder() / "ablations.csv")
    both = [("both (AFDS)", s, b) for b in (0.4, 0.5) for s in (0, 1)]
    found = list(ablations[["variant", "seed", "budget"]].itertuples(index=False, name=None))
    assert found == [*both[:2], ("kept channels in multiples of 8", 0, 0.5), *both[2:]]


def test_data_that_are_not_there_stop_a_comparison_and_leave_its_tables_alone(profile, monkeypatch):
    few = rules("afd+afs", "l2+width", seeds=(0,))
    compared = comparison.run_comparison(profile, rules=few)
    written = {file.name: file.read_bytes() for file in compared.folder().iterdir()}

    def gone(name, *_, **__):
        raise AFDSError("the data set tiny-target is missing")

    monkeypatch.setattr(data, "load", gone)
    for complete in (True, False):
        with pytest.raises(AFDSError, match="the data set tiny-target is missing"):
            comparison.run_comparison(profile, rules=few, complete=complete)
    assert {file.name: file.read_bytes() for file in compared.folder().iterdir()} == written


def test_a_narrower_network_with_kd_costs_its_teachers_source_too(profile):
    few = rules("afd+afs", "l2+width", "l2+width-kd", seeds=(0,))
    table = pd.read_csv(comparison.run_comparison(profile, rules=few).folder() / "comparison.csv")
    alone, taught = (table[(table.method == m) & (table.budget == 0.4)].iloc[0] for m in ("l2+width", "l2+width-kd"))
    dense = table[(table.method == "l2+width") & (table.budget == 1)].iloc[0]
    assert taught.source_macs == pytest.approx(alone.source_macs + dense.source_macs, rel=1e-5)


def test_the_first_trials_of_afs_are_shown_and_nothing_is_chosen_from_them(profile):
    few = rules("afd+afs", "l2+taylor", trials=2, seeds=(0,))
    compared = Comparison(profile, few)
    assert not (compared.trials().stage == protocol_module.RECALLED).any()
    trial = compared.selection_trials("afs")[1]
    l2 = compared.best_regulariser("l2")
    now = compared.point(Tuned(Method("l2", "afs"), l2, trial.settings), profile.trial_seed, (1.0, 0.5), trial=True)
    before = runs.get_or_run(replace(now, first=0.5, freeze_first=True))
    shown = compared.trials()
    (row,) = shown[shown.stage == protocol_module.RECALLED].itertuples()
    assert (row.name, row.trial, row.run) == ("afs", 1, before.id) and before.id != trial.outcome.run
    assert compared.best_selection("afs") == Comparison(profile, few).best_selection("afs")


def test_a_variant_of_a_study_takes_its_settings_and_rivals_and_tunes_nothing(profile, monkeypatch):
    small = rules("afd+afs", "l2+taylor", "l2+random", "l2+afs", seeds=(0, 1), rest=1, rivals=1)
    monkeypatch.setattr(comparison, "protocol", lambda p: small)
    monkeypatch.setattr(profiles, "get", lambda *_: profile)
    other = replace(profile, name="demo-other", targets=(replace(profile.targets[0], per_class=3),))
    like = replace(small, settings_of="demo", rest=2)
    with pytest.raises(AFDSError, match="finish it first: afds compare --profile demo --budget quick"):
        comparison.run_comparison(other, rules=like)

    original = comparison.run_comparison(profile, rules=small)
    file = original.folder() / "comparison.csv"
    whole = file.read_text()
    table = pd.read_csv(file)
    table[(table.seed == 0) | (table.method != "afd+afs")].to_csv(file, index=False)  # AFDS has a seed to go
    with pytest.raises(AFDSError, match="finish it first"):
        comparison.run_comparison(other, rules=like)
    file.write_text(whole)
    before = {run.id for run in runs.list_runs()}
    done = comparison.run_comparison(other, rules=like)
    table = pd.read_csv(done.folder() / "comparison.csv")
    rival = statistics.rival(pd.read_csv(original.folder() / "comparison.csv"), budget=0.4, seeds=[0])
    assert dict(table.groupby("method").seed.nunique()) == {"afd+afs": 2, rival: 2} and done.sentence()
    assert done.plan().splitlines()[0].endswith("2 methods")
    configs = [runs.show(run.id)["config"] for run in runs.list_runs() if run.id not in before]
    assert all(config["use_test"] for config in configs if "use_test" in config)  # no trial among the new runs
    for method in (Method("afd", "afs"), Method.parse(rival)):
        assert done.tuned(method) == original.tuned(method)
    assert (done.folder() / "trials.csv").read_text() == (original.folder() / "trials.csv").read_text()

    widths = pd.read_csv(done.folder() / "attention.csv")
    assert set(widths.attention) == {"joint"} and set(widths.run) == set(table[table.method == "afd+afs"].run)
    assert not (done.folder() / "settled.csv").exists()
    comparison.run_comparison(other, rules=like, extras=True)
    widths = pd.read_csv(done.folder() / "attention.csv")
    assert dict(widths.groupby("attention").size()) == {"joint": 4, "detached": 4}
    assert ((widths.width >= 1) & (widths.width <= widths.uniform * 1.0001)).all()
    detached, joint = (
        runs.show(widths[widths.attention == kind].run.iloc[0])["config"] for kind in ("detached", "joint")
    )
    assert detached.pop("regulariser") == {**joint.pop("regulariser"), "attention": "detached"} and detached == joint
    assert not (done.folder() / "ablations.csv").exists()

    settled = pd.read_csv(done.folder() / "settled.csv")
    assert dict(settled.groupby("attention").size()) == {"joint": 2, "detached": 2} and set(settled.budget) == {0.4}
    again = runs.show(settled[settled.attention == "detached"].run.iloc[0])["config"]
    before = runs.show(widths[(widths.attention == "detached") & (widths.budget < 1)].run.iloc[0])["config"]
    assert again.pop("settle_by") == "taylor" and before.pop("settle_by", "q") == "q" and again == before
    assert competitors.Compared(done).has("settled")


def test_narrower_networks_can_be_left_out_between_the_unpruned_one_and_the_endpoint(profile):
    few = rules("afd+afs", "l2+width", budgets=(1.0, 0.6, 0.4), narrow_between=False)
    compared = Comparison(profile, few)
    compared.tuned = lambda method: Tuned(method, {}, {})
    for key, expected in (("l2+width", [1.0, 0.4]), ("afd+afs", [1.0, 0.6, 0.4])):
        assert [budgets[-1] for _, _, budgets in compared._wanted(Method.parse(key), 0)] == expected


def test_the_first_trial_of_afs_is_at_the_profiles_own_settings(profile):
    compared = Comparison(profile, rules("afd+afs", "l2+taylor"))
    space = protocol_module.selection_space("afs", profile)
    l2, usual = ({axis.name: axis.default for axis in axes} for axes in (regulariser_space("l2"), space))
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
    few = rules("afd+afs", "l2+random", "l2+width")
    compared = comparison.run_comparison(published, rules=few)
    missing = pd.read_csv(compared.folder() / "missing.csv")
    assert dict(missing.groupby("method").size()) == {"l2+width": 2}
    assert missing.reason.str.contains("published weights exist at one width only").all()
    table = pd.read_csv(compared.folder() / "comparison.csv")
    assert set(table.method) == {"afd+afs", "l2+random"}
    assert compared.sentence().startswith("AFDS is ")
