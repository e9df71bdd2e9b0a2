"""The width of AFD's attention from budget to budget, settling by importance, and what is said of both."""

import math

import pandas as pd
import pytest

from afdslib.experiments import Network
from afdslib.report import plots
from afdslib.studies import ablations

COLUMNS = ["attention", "seed", "budget", "width", "uniform", "macs", "test_accuracy", "run"]


def widths(**accuracies):
    """Seeds of each kind of attention, unpruned and at 10x: accuracies at 10x."""
    ends = {"joint": 5.0, "detached": 50.0}
    rows = []
    for name, values in accuracies.items():
        for seed, value in enumerate(values):
            rows.append((name, seed, 1.0, 90.0, 100.0, 1.0, 0.6, "run"))
            rows.append((name, seed, 0.1, ends[name], 100.0, 0.1, value, "run"))
    return pd.DataFrame(rows, columns=COLUMNS)


def points(**accuracies):
    """Of a comparison at 10x, by method with "_" for "+"."""
    rows = [(m.replace("_", "+"), seed, 0.1, v) for m, values in accuracies.items() for seed, v in enumerate(values)]
    return pd.DataFrame(rows, columns=["method", "seed", "budget", "test_accuracy"])


def test_a_uniform_attention_is_as_wide_as_the_geometric_mean_of_its_layers():
    width = ablations.uniform_width(Network("resnet14", stem="cifar", width=0.25))
    assert width == pytest.approx(math.exp(sum(map(math.log, (64, 128, 256, 512))) / 4))


def test_the_text_has_the_widths_and_the_paired_gain_and_only_what_was_computed():
    table = widths(joint=(0.50, 0.51, 0.52), detached=(0.53, 0.54, 0.56))
    text = ablations.attention_text(table, points(delta_afs=(0.51, 0.52, 0.53)), budget=0.1)
    assert "100 channels" in text and "90 wide in the unpruned network and 5.0 at 10x" in text
    assert "50 wide there" in text and "detached minus joint: +3.3 [+1.9, +4.8] points, 3 paired seeds" in text
    assert "minus AFD, both with AFS: +1.0 [" in text
    text = ablations.attention_text(widths(joint=(0.5, 0.6)), points(l2_taylor=(0.5,)), budget=0.1)
    assert "5.0 at 10x" in text and "detached" not in text and "DELTA" not in text
    assert ablations.attention_text(widths(joint=(0.5,)), points(), budget=0.2) == ""


@pytest.mark.parametrize(
    ("detached", "verdict"), [((0.54, 0.55, 0.57), "is confirmed"), ((0.40, 0.55, 0.60), "is not confirmed")]
)
def test_detached_attention_is_confirmed_by_an_interval_above_zero_once_all_seeds_are_there(detached, verdict):
    table, main = widths(joint=(0.50, 0.51, 0.52), detached=detached), points(l2_taylor=(0.53, 0.53, 0.53))
    text = ablations.confirmation_text(table, main, budget=0.1, rival="l2+taylor", seeds=(0, 1, 2))
    assert verdict in text and "from the best competitor, L2 + Taylor, 3 paired seeds" in text
    text = ablations.confirmation_text(table, main, budget=0.1, rival="l2+taylor", seeds=(0, 1, 2, 3))
    assert text == "Detached attention: 3 of 4 seeds are there, so nothing is said of it yet."


def test_the_figure_shows_both_kinds_at_every_budget():
    table = widths(joint=(0.5, 0.51), detached=(0.53, 0.54))
    figure = plots.attention_width(table, title="t")
    left, right = figure.axes[:2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["joint attention", "detached attention"]
    assert list(left.lines[0].get_ydata()) == [5, 90] and left.get_yscale() == "log"
    lines = [line.get_ydata() for line in right.lines if line.get_marker() == "o"]
    assert list(lines[0]) == pytest.approx([0.535, 0.6])


def frame(name: str, *accuracies: float, column: str = "attention") -> pd.DataFrame:
    rows = [(name, seed, 0.1, value) for seed, value in enumerate(accuracies)]
    return pd.DataFrame(rows, columns=[column, "seed", "budget", "test_accuracy"])


def test_the_text_has_the_gain_and_the_distance_from_the_rival_over_the_seeds_that_are_there():
    before = pd.concat([frame("joint", 0.5, 0.5, 0.5), frame("detached", 0.3, 0.4)])
    main = frame("l2+width", 0.6, 0.6, 0.6, column="method")
    settled = pd.concat([frame("joint", 0.51, 0.52, 0.53), frame("detached", 0.5)])
    text = ablations.settled_text(settled, before, main, budget=0.1, rival="l2+width")
    assert "AFDS gains +2.0 [-0.5, +4.5] points by it, 3 paired seeds (seed by seed +1.0, +2.0, +3.0), and is" in text
    assert "is then -8.0 [-10.5, -5.5] from the best competitor, L2 + narrower network." in text
    assert "detached attention gains +20.0" in text and "1 paired seed (seed by seed +20.0)" in text
    assert "Detached minus joint attention, both so: -1.0" in text
    text = ablations.settled_text(settled[settled.attention == "detached"], before, main, budget=0.1, rival="l2+width")
    assert "AFDS gains" not in text and "by mean gates (two things differ): +0.0" in text
    assert ablations.settled_text(settled.head(0), before, main, budget=0.1, rival="l2+width") == ""
