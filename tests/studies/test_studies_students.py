"""A whole study of students and teachers in miniature; the tables, the order of runs, and what is refused."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny

from afdslib import cli, runs
from afdslib.base.errors import AFDSError
from afdslib.experiments import DataSource, Distillation, Network
from afdslib.inference import bench
from afdslib.losses import BetaSchedule
from afdslib.report import claims, pages, quoted, students
from afdslib.report import plots as figures
from afdslib.studies import engine, results
from afdslib.studies import students as distillation_study
from afdslib.studies.students import DistillationProfile, DistillationStudy, Method, Pair

METHODS = (
    Method("alone", Distillation()),
    Method("at", Distillation("at", BetaSchedule()), (1.0, 100.0)),
    Method("kd", Distillation(hard=0.1, soft=0.9)),
    Method("at-kd", Distillation("at", BetaSchedule("cosine"), hard=0.1, soft=0.9), like="at"),
)
STUDENT, NST, NAME = Network("wrn-10-1"), "selectivity", "mini/quick/attention"


def miniature(**changes) -> DistillationProfile:
    data = DataSource("tiny-source")
    pairs = (
        Pair(Network("wrn-10-2"), STUDENT, ("alone", "at", "kd", "at-kd"), (0, 1)),
        Pair(Network("wrn-16-1"), STUDENT, ("alone", "at"), (0,)),
    )
    profile = DistillationProfile(
        "demo", "quick", "attention", data, data, METHODS, pairs, tiny.settings(3, log_rows=1),
        tiny.settings(4, log_rows=2), tiny.settings(2, log_rows=1), ("alone", "at"), committed=False,
    )  # fmt: skip
    return replace(profile, **changes)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, tiny.served():
        home = tmp_path_factory.mktemp("home")
        patch.setenv("AFDS_HOME", str(home))
        patch.setenv("AFDS_RUNS", str(home / "runs"))
        patch.delenv("AFDS_FIGURES", raising=False)
        patch.delenv("AFDS_FRESH", raising=False)
        made = DistillationStudy(miniature(), workers=1)
        engine.compute(made, 1)
        yield made


def test_every_run_is_computed_once_students_come_seed_by_seed_and_the_table_has_a_row_per_network(study):
    cells = [cell for cell, _ in study.results()]
    assert len({runs.run_id(cell.config) for cell in cells}) == len(cells)
    # The trials choose the students' weight.
    assert [cell.role for cell in cells] == ["teacher"] * 2 + ["trial"] * 2 + ["student"] * 9
    assert [cell.config.seed for cell in cells[4:]] == [0, 0, 0, 0, 1, 1, 1, 1, 0]
    table = study.table()
    assert len(table) == table.run.nunique() == 2 + 8 + 1 and students.stored_like_table(study)
    assert table.test_accuracy.between(0, 1).all()
    assert set(table[table.method == "at"].teacher) == {"wrn-10-2", "wrn-16-1"}
    assert (table[table.method == "at"].weight == study.weight("at")).all()
    assert (table[table.method == "kd"].weight == 0).all()


def test_the_weight_is_the_best_trials_and_the_smaller_one_in_a_tie(study, monkeypatch):
    trials = study.trials()
    best = trials.sort_values(["validation_accuracy", "strength"], ascending=[False, True]).strength.iloc[0]
    assert study.weight("at") == study.weight("at-kd") == best
    again = DistillationStudy(miniature(), workers=1)
    tied = runs.Result("0" * 12, {"validation_accuracy": 0.5}, study.folder())
    monkeypatch.setattr(again, "result", lambda config: tied)
    assert again.weight("at") == 1.0


def test_trials_and_curves_read_no_test_image_and_come_from_runs_of_their_own_where_nothing_is_held_back(study):
    assert students.no_test_in_trials(study)
    assert study.trial_run("at", 1.0).use_test is False and study.curve_run("at").use_test is False
    assert study.trial_run("at", 1.0).seed == study.profile.trial_seed not in study.profile.pairs[0].seeds
    pair = Pair(Network("wrn-10-2"), STUDENT, ("alone",), (0,))
    whole = miniature(data=DataSource("tiny-target"), methods=METHODS[:1], pairs=(pair,), curves=("alone",))
    student, curve = DistillationStudy(whole)._students()
    assert (student.role, curve.role) == ("student", "curve")
    assert curve.config.data.name == "tiny-source" and student.config.data.name == "tiny-target"


def test_an_unfinished_study_shows_what_there_is_and_trains_nothing(study, monkeypatch):
    monkeypatch.setattr(runs, "get_or_run", lambda *_, **__: pytest.fail("something was trained"))
    lookup = runs.lookup
    finished = {runs.run_id(cell.config) for cell, _ in study.results()[:6]}
    monkeypatch.setattr(runs, "lookup", lambda c, **k: lookup(c, **k) if runs.run_id(c) in finished else None)
    part = DistillationStudy(miniature(), complete=False)
    assert len(part.results()) == 6 and len(part.table()) == 4
    finished.remove(study.trials().run[0])
    assert len(DistillationStudy(miniature(), complete=False).results()) == 3  # no student before all trials


def test_reach_measures_against_the_plain_students_final_accuracy(study, monkeypatch):
    accuracies = {"alone": [0.2, 0.4, 0.73, 0.8], "at": [0.2, 0.75, 0.7, 0.8], "kd": [0.2, 0.3, 0.3, 0.3]}
    curves = {n: pd.DataFrame({"step": [1, 2, 3, 4], "validation_accuracy": a}) for n, a in accuracies.items()}
    monkeypatch.setattr(study, "curves", lambda: curves)
    found = study.reach().set_index("method")
    assert found.target.iloc[0] == pytest.approx(0.72)
    assert found.steps["alone"] == 3 and found.steps["at"] == 2 and math.isnan(found.steps["kd"])  # the first time
    text = students.reach_text(study)
    assert "AT: 2, -33 % of them" in text and "KD: never" in text


def test_a_gain_counts_only_beyond_the_larger_range():
    g = students.gain([0.90, 0.91, 0.92], [0.88, 0.885, 0.89])
    assert g.gain == pytest.approx(2.5) and g.spread == pytest.approx(2.0) and g.exceeds is True
    assert students.gain([0.90, 0.93], [0.88, 0.89]).exceeds is False  # 3 points of range hide 3 of gain
    assert students.gain([0.80, 0.81], [0.88, 0.89]).exceeds is True and students.gain([0.8], [0.7]).exceeds is None
    with pytest.raises(AFDSError, match="at least one accuracy"):
        students.gain([], [0.9])


def test_the_tables_say_median_spread_gain_and_only_quoted_numbers(study, monkeypatch):
    table = pd.DataFrame(
        [
            ["", "wrn-16-2", "teacher", 0.0, 0, 0.90], ["", "wrn-16-1", "alone", 0.0, 0, 0.80],
            ["", "wrn-16-1", "alone", 0.0, 1, 0.81], ["wrn-16-2", "wrn-16-1", "at", 100.0, 0, 0.83],
            ["wrn-16-2", "wrn-16-1", "at", 100.0, 1, 0.84], ["wrn-40-1", "wrn-16-1", "at", 100.0, 0, 0.79],
        ],
        columns=["teacher", "student", "method", "weight", "seed", "test_accuracy"],
    )  # fmt: skip
    monkeypatch.setattr(study, "table", lambda: table)
    plain = repr(students.student_table(study))
    assert "92.07" not in plain and "reported" not in plain  # another data set: no empty column
    monkeypatch.setattr(study, "profile", replace(study.profile, data=DataSource("cifar10")))
    rows = {row[0]: row for row in students.student_table(study).rows}
    assert rows["teacher wrn-16-2"][-1] == "93.69" and rows["wrn-16-1, student alone"][-1] == "91.23"
    at = rows["wrn-16-1, AT (wrn-16-2)"]
    assert at == ["wrn-16-1, AT (wrn-16-2)", "100", "83.5", "1.0", "2", "+3.0", "92.07"]
    assert rows["wrn-16-1, AT (wrn-40-1)"][-1] == "" and len(rows) == 4
    text = students.gains_text(study)
    assert "AT** from wrn-16-2 to wrn-16-1: +3.0 points, a gain larger than the spread between seeds (1.0)" in text
    assert "AT** from wrn-40-1 to wrn-16-1: -1.5 points, with one seed, so nothing can be said" in text
    table.loc[table.method == "at", "test_accuracy"] -= 0.2
    assert "-17.0 points, a loss larger than the spread between seeds (1.0)" in students.gains_text(study)
    monkeypatch.setattr(study, "profile", replace(study.profile, study="selectivity"))
    words = quoted.gains_text(study)
    assert "from +0.42 points (NST, CIFAR-100, WRN-40-2 to WRN-16-2) to +1.66 points (KD, CIFAR-100" in words
    assert "differ by up to 1.0 points (median over methods: 1.0); 2 of the quoted gains are larger" in words


def test_steps_are_linear_between_rows_and_steps_saved_are_paired_by_seed():
    def curve(*accuracy):
        return pd.DataFrame({"step": [10, 20, 30, 40], "train_accuracy": [*accuracy, math.nan]})

    for target, steps in ((0.3, 15), (0.1, 10), (0.4, 20), (0.5, 30)):  # the last one if never
        assert students.steps_until(curve(0.2, 0.4, 0.3)[:3], target) == pytest.approx(steps)
    alone = {0: curve(0.2, 0.6, 0.8), 1: curve(0.2, 0.3, 0.4), 2: curve(0.1, 0.1, 0.1)}
    taught = {0: curve(0.5, 0.5, 0.9), 1: curve(0.1, 0.3, 0.3), 7: curve(0.9, 0.9, 0.9)}
    found = students.steps_saved(alone, taught, share=0.5)  # to 0.4 and 0.2: 15 - 10 and 10 - 15
    assert found.n == 2 and found.value == pytest.approx(0) and found.low == pytest.approx(-found.high)
    assert str(students.steps_saved({0: alone[0]}, taught, share=0.5)) == "+5 steps"


def test_how_much_of_the_judging_images_the_teacher_has_seen_is_counted(study, monkeypatch):
    text = students.seen_text(study)
    assert "Of the 12 validation images of the trials the teacher was fitted on 0. It is right on " in text
    assert text.count("Of the 12") == 2  # the curves are those of the reported runs: other images
    load = DataSource.load

    def whole(source):
        """The teacher's data without a part held back, as in the real study."""
        found = load(source)
        return replace(found, train=found.validation) if source.seed == 0 else found

    monkeypatch.setattr(DataSource, "load", whole)
    assert "the teacher was fitted on 12. It is right on" in students.seen_text(study)
    monkeypatch.setattr(students, "_network", lambda *_: None)
    text = students.seen_text(study)
    assert "How right it is on them is not shown: its weights are not stored here." in text and "%" not in text
    monkeypatch.setattr(study, "profile", replace(study.profile, data=DataSource("tiny-source", per_class=8)))
    monkeypatch.setattr(study, "result", lambda config: runs.Result("0" * 12, {"test_accuracy": 0.5}, study.folder()))
    text = students.seen_text(study)
    assert text.startswith("Of the 12 validation images of the trials and learning curves the teacher")
    assert text.count("Of the") == 1


def test_it_is_said_where_every_weight_comes_from(study, monkeypatch):
    text = students.weights_text(study)
    assert f"Chosen on validation images: AT {study.weight('at'):g} (of 2, which differ by up to " in text
    assert "The weight of AT is taken, untuned, by AT + KD, β decays." in text and "as given" not in text
    single = DistillationStudy(distillation_study.get("selectivity", "demo"))
    monkeypatch.setattr(single, "results", lambda: [])
    text = students.weights_text(single)
    assert text.startswith("Taken as given, with no other value tried: NST, polynomial 5.")
    assert "The weight of NST, polynomial is taken, untuned, by NST, linear; NST, Gaussian; NST + KD; " in text


def test_a_weight_that_hardly_pulls_is_said_and_both_scales_of_beta_give_one_sample_the_same_loss(study):
    log = study.histories()["at"]
    share = float((log.beta * log.filter(like="at_").sum(axis=1) / log.loss).mean())
    assert f"its terms are {100 * share:.2g} % of this student's loss" in students.pull_text(study)
    assert "hardly pull" in students.pull_text(study, hardly=1.0)
    assert "hardly" not in students.pull_text(study, hardly=0.0)
    beta, norm, positions = 1000.0, 0.4, 64
    paper = students.beta_in_paper_scale(beta, norm, positions)
    assert paper == pytest.approx(12.5) and paper / 2 * norm == pytest.approx(beta * norm**2 / positions)


def test_the_memory_of_nst_is_measured_beside_the_tensor_that_is_not_built(monkeypatch):
    table = students.nst_memory((64, 1024, 14, 14), ())
    assert table.rows == [["one (B, C, C, HW) tensor, never built", "52.6"]]
    for measured, said in ((150.0, "0.16"), (None, "not measured")):
        monkeypatch.setattr(bench, "peak", lambda *_, measured=measured: measured)
        row, avoided = students.nst_memory((16, 256, 14, 14), ("poly",)).rows
        assert row[0] == "NST, polynomial: forward and backward pass" and avoided[1] == "0.8"
        assert row[1] == said


def test_loss_terms_are_put_together_again_and_a_wrong_weight_shows(study, monkeypatch):
    assert all(students.terms_add_up(study, name) for name in ("alone", "at", "kd"))
    assert students.decays(study, "at-kd") and not students.decays(study, "at")
    history = runs.Result.history
    monkeypatch.setattr(runs.Result, "history", lambda run: history(run).assign(loss=lambda log: log.cross_entropy))
    assert not students.terms_add_up(study, "at")


def test_texts_figures_and_maps_of_a_finished_study(study):
    assert "AT" in students.weights_text(study) and "afds study --part attention" in students.command(study)
    assert students.settings(study).rows[0][0] == "data"
    assert students.beta_table(study, images=6).rows[0][0] == "group 1, 16x16"
    view = students.view(study, "alone", "at")
    assert list(view.networks) == ["teacher", "student alone", "AT"]
    for seen in view.networks.values():
        assert all(abs((m**2).sum() - 1) < 1e-5 and m.min() >= 0 for m in seen.stages.values())
    fig = figures.attention_maps(view)
    assert len(fig.get_axes()) == 3 * 5
    rows = students.first_pair(study.table())
    assert set(rows.teacher) == {"", "wrn-10-2"}
    ax = figures.student_accuracy(rows).get_axes()[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["student alone", "AT", "KD", "AT + KD, β decays"]
    curves = figures.student_curves(study.curves(), target=0.3).get_axes()[0]
    assert "validation" in curves.get_ylabel() and len(curves.get_legend().get_texts()) == 2
    trials = study.trials()
    tried = figures.trials(trials, {"at": study.weight("at")}, xlabel="β").get_axes()[0]
    assert tried.get_xscale() == "log"


@pytest.mark.parametrize("name", distillation_study.STUDIES)
@pytest.mark.parametrize("profile", ["demo", "imagenet32", "paper"])
def test_every_profile_names_known_methods_of_different_looks_and_survives_json(name, profile):
    for scale in ("quick", "standard"):
        made = distillation_study.get(name, profile, scale)
        assert json.loads(DistillationStudy(made).show())["study"] == name
        assert made.trial_seed not in {seed for pair in made.pairs for seed in pair.seeds}
        assert all(figures.look(m.name) for m in made.methods) and made.committed == (profile != "demo")
        assert name == NST or [len(m.weights) for m in made.methods if m.name == "at"] == [5]
    looks = [(look.colour, look.marker) for look in figures.STUDENTS.values()]
    shared = {"nst-poly": "nst", "nst-poly+kd": "at-kd", "nst-poly, after ReLU": "hint"}  # of the other notebook
    assert len(set(looks)) == len(looks) - len(shared)
    with pytest.raises(AFDSError, match="no colour and marker for method 'fsp'"):
        figures.look("fsp")


def test_the_real_study_fits_all_training_images_with_three_seeds_and_the_paper_profile_is_the_recipe():
    get = distillation_study.get
    real = get("attention", "imagenet32", "quick")
    assert real.data.per_class == 5000 and real.pairs[0].seeds == (0, 1, 2)
    assert (real.pairs[0].teacher.name, real.pairs[0].student.name) == ("wrn-16-2", "wrn-16-1")
    assert get("attention", "imagenet32-disjoint") == real  # a variant of a profile has its students
    ids = {runs.run_id(DistillationStudy(p).teacher_run(p.pairs[0].teacher)) for p in (real, get(NST, "imagenet32"))}
    assert len(ids) == 1  # both studies share their teacher
    paper = get("attention", "paper", "standard").student_training
    assert paper.steps == 200 * 390 and paper.batch_size == 128 and paper.lr == 0.1 and not paper.nesterov
    rates = np.array([paper.factor(390 * epoch) for epoch in (0, 59, 60, 120, 160)])
    assert rates == pytest.approx([1, 1, 0.2, 0.04, 0.008])


def test_unknown_names_are_one_sentence(capsys):
    for arguments, sentence in {
        ("relations", "demo"): "unknown study 'relations'; known are attention, selectivity",
        ("attention", "cifar"): "unknown profile 'cifar'",
        ("attention", "dogs"): "the profile dogs has no students; demo, imagenet32, paper have some",
        ("attention", "demo", "huge"): "unknown scale 'huge'; known are quick, standard",
    }.items():  # fmt: skip
        with pytest.raises(AFDSError, match=sentence):
            distillation_study.get(*arguments)
    with pytest.raises(AFDSError, match="unknown method 'fsp'; known are alone, at"):
        DistillationStudy(miniature(curves=("fsp",)))
    assert cli.main(["study", "--profile", "demo", "--part", NST, "--show"]) == 0
    assert json.loads(capsys.readouterr().out)["study"] == NST
    assert cli.main(["study", "--profile", "demo", "--part", "relations"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_page_of_a_finished_study(study):
    page = pages.write(study)[0].read_text()
    for words in (
        "afds study --part attention --profile demo", "| teacher wrn-10-2 |", "## β in two scales\n\n| maps |",
        "student alone minus AT: ", "the teacher was fitted on",
    ):  # fmt: skip
        assert words in page
    with pytest.raises(AFDSError, match="networks of the profile demo are never committed"):
        engine.publish(DistillationStudy(study.profile))


def test_networks_of_a_real_study_are_kept_with_a_card_and_the_notebook_measures_as_the_claim(
    study, monkeypatch, tmp_path
):
    monkeypatch.setenv("AFDS_HOME", str(tmp_path))
    engine.publish(DistillationStudy(replace(study.profile, committed=True, name="mini")))
    folder = tmp_path / "data" / "weights"
    card = (folder / "mini.md").read_text()
    ids = [runs.run_id(study.teacher_run(study.profile.pairs[0].teacher))]
    ids += [runs.run_id(study.student_run(study.profile.pairs[0], m, 0)) for m in ("alone", "at")]
    assert all(f"`{id}`" in card and (folder / f"{id}.safetensors").is_file() for id in ids)
    assert {record["id"] for _, record in runs.records("mini")} >= set(ids)
    published, before = (t.set_index("run").test_accuracy.to_dict() for t in (results.named(NAME), study.table()))
    assert published == pytest.approx(before, rel=1e-5)
    told = next(claims.converges_faster([NAME], ("wrn-10-2", "wrn-10-1"))).why
    assert f"- student alone minus AT: {re.search(r': (.*)[.]$', told)[1]}." in students.saved_text(study)
    assert students.saved_text(study).count("\n- ") == 3  # AT, KD, AT + KD; of the first teacher alone
