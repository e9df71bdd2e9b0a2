"""What notebook 4 and the report show of a comparison, from tables made by hand."""

import itertools

import pandas as pd
import pytest

from afdslib.report import comparison as competitors
from afdslib.report import plots
from afdslib.studies import profiles, statistics
from afdslib.studies.ablations import LABELS, WHOLE
from afdslib.studies.protocol import Method


def table(accuracy):
    """Rows of a comparison; `accuracy` maps (method, budget, seed) to a share."""
    rows = []
    for (key, budget, seed), value in accuracy.items():
        method = Method.parse(key)
        rows.append({
            "target": "t", "method": key, "role": method.role, "regulariser": method.regulariser,
            "selection": method.selection, "seed": seed, "budget": budget, "macs": budget, "test_accuracy": value,
            "validation_accuracy": value
        })  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def compared():
    start = {"afd+afs": 0.60, "l2+taylor": 0.50, "l2+width": 0.70, "l2+width-kd": 0.72}
    found = {}
    for (key, value), budget, seed in itertools.product(start.items(), (1.0, 0.1), (0, 1)):
        found[key, budget, seed] = value - 0.2 * (budget < 1) + 0.02 * seed
    return table(found)


def test_tables_name_methods_and_give_mean_spread_and_paired_difference(compared):
    shown = repr(competitors.accuracy_table(compared)).splitlines()
    assert shown[0].split() == ["method", "1x", "10x"]
    assert shown[1].split("  ")[0] == "AFD + AFS" and "61.0 ± 1.4" in shown[1] and "41.0 ± 1.4" in shown[1]
    paired = repr(competitors.paired_table(statistics.paired_table(compared))).splitlines()
    row = next(line for line in paired if line.startswith("L2 + Taylor"))
    assert "31.0" in row and "+10.0" in row and row.rstrip().endswith("2")
    assert "-12.0" in next(line for line in paired if "with KD" in line)
    known = {"macs_predictors": 0.004, "train_macs": 0.099, "parameters": 12_345, "dynamic": 7, "static": 3}
    shown = competitors.size_table(compared.assign(**known), 0.1)
    assert shown.rows[0] == ["AFD + AFS", "10.00 %", "0.40 %", "9.90 %", "12", "7"] and len(shown.rows) == 4


def test_a_panel_per_selection_with_afds_in_every_other(compared):
    figure = plots.competitors(compared, chance=0.1, title="t")
    axes = [ax for ax in figure.axes if ax.axison]
    assert [ax.get_title(loc="left") for ax in axes] == ["AFS", "Taylor", "narrower networks"]
    assert [len(ax.containers) for ax in axes] == [1, 1, 2]  # with error bars; without any: AFDS in pale
    wide = [[line for line in ax.lines if line.get_linewidth() == 4] for ax in axes]
    assert [len(lines) for lines in wide] == [0, 1, 1] and list(wide[1][0].get_ydata()) == pytest.approx([0.41, 0.61])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["AFDS", "AFD", "L2", "narrower network", "narrower network with KD"]
    assert len({ax.get_xlim() for ax in axes}) == 1 and len({ax.get_ylim() for ax in axes}) == 1


def test_every_line_of_a_panel_has_a_label_and_a_look_of_its_own():
    keys = ("afd+afs", "afd-detached+afs", "l2+width", "afd+width", "l2+width-kd", "afd+width-kd")
    figure = plots.competitors(table({(key, b, 0): 0.5 for key in keys for b in (1.0, 0.1)}))
    for ax in (ax for ax in figure.axes if ax.axison):
        lines = [line for line in ax.lines if line.get_marker() not in ("None", "_") and len(line.get_xdata())]
        looks = {(line.get_color(), str(line._dash_pattern), line.get_marker()) for line in lines}
        assert len(looks) == len(lines) >= 2
    assert {"AFD", "AFD (detached)"} <= {text.get_text() for text in figure.legends[0].get_texts()}


def test_the_paired_figure_has_a_row_per_method_at_its_difference_and_a_panel_per_target(compared):
    found = statistics.paired_table(compared)
    (axis,) = plots.paired(found, title="cifar10-60").axes
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "L2 + narrower network with KD (2)", "L2 + narrower network (2)", "L2 + Taylor (2)"
    ]  # fmt: skip
    assert axis.get_title(loc="left") == "CIFAR-10 (32 px), 60 per class"
    shown = [bar.lines[0].get_xdata()[0] for bar in axis.containers]
    assert shown == pytest.approx([-12, -10, 10])
    limits = [bar.lines[2][0].get_segments()[0][:, 0] for bar in axis.containers]
    assert limits == [pytest.approx([low, high]) for low, high in zip(found.low, found.high, strict=True)]
    assert [len(ax.containers) for ax in plots.paired({"a": found, "b": found[:1]}).axes] == [3, 1]


def test_every_trial_is_drawn_and_those_without_a_value_are_counted():
    rows = [("regulariser", "l2", 0.4), ("regulariser", "l2", 0.5)]
    rows += [("selection", "afs", None), ("strength", "l2+afs", 0.3)]
    trials = pd.DataFrame(rows, columns=["stage", "name", "validation_accuracy"])
    axes = plots.competitor_trials(trials).axes
    assert [[label.get_text() for label in ax.get_yticklabels()] for ax in axes] == [["L2"], ["AFS"], ["L2 + AFS"]]
    assert [text.get_text() for ax in axes for text in ax.texts] == ["1 without a value"]
    drawn, chosen = (points.get_offsets()[:, 0] for points in axes[0].collections)
    assert list(drawn) == [0.4, 0.5] and list(chosen) == [0.5]


def variants(rows) -> pd.DataFrame:
    """A table of ablations; what starts with another network is no variant of AFDS."""
    table = pd.DataFrame(rows, columns=["variant", "seed", "budget", "test_accuracy"])
    key = table.variant.where(table.variant != LABELS[WHOLE], WHOLE)
    return table.assign(key=key, method=["l2+taylor" if "unextended" in v else "afd+afs" for v in table.variant])


def test_ablations_are_set_against_afds_seed_by_seed_and_lost_seeds_are_counted():
    rows = [("both (AFDS)", 0, 0.1, 0.4), ("both (AFDS)", 1, 0.1, 0.5), ("static only", 0, 0.1, 0.3)]
    rows += [("static only", 1, 0.1, None), ("multiples", 0, 0.25, 0.6), ("both (AFDS)", 0, 0.25, 0.7)]
    rows += [("unpruned", 0, 1.0, 0.5)]
    shown = competitors.ablation_table(variants(rows))
    assert shown.rows == [
        ["both (AFDS)", "10x", "45.0 ± 7.1", "–", "–", "2 of 2"],
        ["static only", "10x", "30.0", "-10.0", "–", "1 of 2"],
        ["multiples", "4x", "60.0", "-10.0", "–", "1 of 1"],
        ["both (AFDS)", "4x", "70.0", "–", "–", "1 of 1"],
        ["unpruned", "1x", "50.0", "+10.0", "–", "1 of 1"],
    ]


def test_p_values_of_the_ablations_are_corrected_within_the_table():
    accuracies = {"both (AFDS)": (0.40, 0.41, 0.42), "a": (0.41, 0.42, 0.50), "b": (0.50, 0.40, 0.10)}
    rows = [(name, seed, 0.1, value) for name, values in accuracies.items() for seed, value in enumerate(values)]
    shown = [row[4] for row in competitors.ablation_table(variants(rows)).rows]
    whole, *others = (dict(enumerate(values)) for values in accuracies.values())
    corrected = statistics.holm([statistics.paired(mine, whole).p for mine in others])
    assert shown == ["–", *(f"{p:.2g}" for p in corrected)] and max(corrected) <= 1


def test_it_is_said_why_a_variant_or_a_point_has_no_network():
    rows = [("random predictors", 0.1, "in the source stage, the loss is nan")] * 2
    rows += [("multiples", 0.25, "out of reach")]
    table = pd.DataFrame(rows, columns=["method", "budget", "reason"])
    shown = competitors.reasons_text(table, str)
    assert "- random predictors at 10x, 2 seeds: in the source stage, the loss is nan\n" in shown
    assert shown.endswith("- multiples at 4x, 1 seed: out of reach") and competitors.reasons_text(table[:0]) == ""
    assert "- AFD + AFS at 4x, 1 seed" in competitors.reasons_text(table[-1:].assign(method="afd+afs"))


def test_a_comparison_that_was_not_run_says_how_to_run_it(tmp_path, monkeypatch):
    monkeypatch.setenv("AFDS_HOME", str(tmp_path))
    none = competitors.Competitors(profiles.get("imagenet32"))
    assert not list(none)
    assert none.sentence().endswith("afds study --profile imagenet32 --scale quick --part comparison --workers 2")
    assert not any((none.accuracy(), none.paired(), none.sizes(), none.costs(), none.missing()))
    assert list(none.figures(lambda *_: pytest.fail("nothing to draw"))) == [""]
