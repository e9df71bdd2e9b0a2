"""The first paragraph of the report and what it advises, from the committed comparisons and from one made by hand."""

from types import SimpleNamespace

import pandas as pd
import pytest

from afdslib.report import answer, comparison
from afdslib.studies import statistics


@pytest.fixture(scope="module")
def committed():
    return comparison.committed()


def test_the_nearest_study_to_the_papers_own_leads_once_it_has_results(committed):
    names = [c.comparison.profile.name for c in committed]
    assert names == [name for name in comparison.LEADING if name in names] and comparison.LEADING[0] == "dogs"


def test_the_answer_has_sign_size_interval_seeds_and_the_weakest_point(committed):
    said = str(answer.text(committed))
    assert "-2.9 [-3.6, -2.2] on CIFAR-10 (32 px), 60 per class (10 seeds; L2 + narrower network with KD)" in said
    assert "-5.8 [-9.1, -2.4] on 40 classes of Tiny ImageNet (32 px), 60 per class (5 seeds" in said
    assert "the sign is the opposite" in said and "11.07 points" in said and "**The weakest point:**" in said
    assert len(said.split()) < 170 and answer.text([]) == answer.NONE
    assert answer.text([study(0.1)] * 4).count("Stanford Dogs (128 px)") == 3
    scale = answer.scale_text(committed)
    assert ": ResNet-26 of width 0.25, 46 M MACs, from Tiny ImageNet (32 px); 14 methods." in scale


def study(gain: float) -> SimpleNamespace:
    """A study in which AFDS has 50 % and its competitor so much less, with some noise."""
    rows = [
        {"method": method, "role": role, "seed": seed, "budget": budget, "validation_accuracy": value}
        | {"test_accuracy": value + seed / 1000 * (method == "afd+afs")}
        for method, role, value in (("afd+afs", "afds", 0.5), ("l2+taylor", "competitor", 0.5 - gain))
        for seed in range(5) for budget in (1.0, 0.1)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    where = SimpleNamespace(target=SimpleNamespace(title="stanford-dogs-144-30"))
    rules = SimpleNamespace(seeds=range(5), rest=3)
    paired = statistics.paired_table(table)
    return SimpleNamespace(comparison=where, table=table, rules=rules, budget=0.1, rival="l2+taylor", paired=paired)


def test_the_sign_follows_the_intervals():
    assert "AFDS is ahead, too" in answer.text([study(0.1)]) and "+10.2 [" in answer.text([study(0.1)])
    assert "does not settle it" in answer.text([study(-0.002)])
    assert "does not settle it" in answer.text([study(0.1), study(-0.1)])
    assert "on Stanford Dogs (128 px), 30 per class (5 seeds; L2 + Taylor)" in answer.text([study(0.1)])


def test_the_advice_names_what_is_best_where_afds_falls_behind(committed):
    assert "Down to 10x AFDS is within a point of the best competitor." in answer.use_text([study(0.1)])
    assert "Take L2 + Taylor (1x, 10x)." in answer.use_text([study(-0.1)])
    said = answer.use_text(committed)
    assert "Down to 4x AFDS is within a point" in said and "L2 + narrower network with KD (8x, 10x)" in said
    assert "higher mean at 7 of 7 budgets (3 seeds)" in said
    assert "| 10x | L2 + narrower network with KD, 53.6 |" in answer.use_table(committed)
    assert comparison.each(committed, lambda c: "x").startswith("**CIFAR-10 (32 px), 60 per class**\n\nx")


def test_its_figures_have_a_panel_per_study(committed):
    dogs = [study(0.1), *committed]
    assert len(answer.differences(dogs).axes) == len(answer.by_budget(dogs).axes) == len(committed) + 1
    for draw in (answer.differences, answer.by_budget):
        assert draw([]).axes[0].texts[0].get_text() == answer.NONE


def test_why_says_what_became_of_the_attention_and_whether_detaching_it_is_confirmed(committed):
    first, second = answer.why_text(committed).splitlines()
    assert "178 wide in the unpruned network and 5.0 at 10x" in first and "KD: +0.9 [+0.3, +1.6]" in first
    assert "not confirmed here: +0.0 [-9.8, +9.9] points" in second and "+17.7" in second
