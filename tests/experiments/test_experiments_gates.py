"""Gates replaced: by their own (nothing changes), by those of other images, by constant ones."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from support import tiny

from afdslib import afs, runs
from afdslib.base.errors import AFDSError
from afdslib.experiments import AFSSourceRun, DataSource, TransferRun
from afdslib.experiments.gates import REPLACEMENTS, GatesRun, others, replaced
from afdslib.studies.gates import costs
from afdslib.training.objective import Regulariser


def test_whose_gates_an_image_gets():
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    assert others(labels, same_class=False).tolist() == [1, 2, 3, 4, 5, 0]
    taken = others(labels, same_class=True)
    assert taken.tolist() == [2, 4, 5, 3, 1, 0] and torch.equal(labels[taken], labels)


def test_inside_the_block_the_gates_are_the_given_ones_and_afterwards_its_own():
    model = tiny.gated().eval()
    (images, _), *_ = tiny.batches(4, 4)
    before, found = model(images), afs.layers(model)
    ones = {n: afs.Gates(*(torch.ones(1, layer.m.numel()) for _ in range(3))) for n, layer in found.items()}
    with replaced(model, {n: g._replace(active=torch.zeros_like(g.active)) for n, g in ones.items()}):
        closed = model(images)
    assert torch.equal(closed[0], closed[1]) and not torch.equal(before[0], before[1])  # nothing is computed
    assert torch.equal(model(images), before)


def test_own_gates_change_nothing_and_others_do(tmp_path):
    with tiny.served():
        store = tiny.store(tmp_path)
        source = AFSSourceRun(tiny.SOURCE, DataSource("tiny-source"), tiny.settings(6))
        point = TransferRun(
            source, DataSource("tiny-target"), Regulariser("l2", 1e-3), tiny.settings(6), tiny.settings(3), (1.0,)
        )  # fmt: skip
        trained = runs.get_or_run(point, store=store)
        found = {kind: runs.get_or_run(GatesRun(point, kind), store=store) for kind in REPLACEMENTS}
        again = runs.get_or_run(GatesRun(point, "own", seed=1), store=store)
    assert found["own"].metrics["test_accuracy"] == again.metrics["test_accuracy"]
    assert found["own"].metrics["test_accuracy"] == pytest.approx(trained.metrics["test_accuracy"])
    assert all(0 <= result.metrics["test_accuracy"] <= 1 for result in found.values())
    with pytest.raises(AFDSError, match="gates must be"):
        replace(GatesRun(point, "own"), gates="none")


def test_the_rule_looks_at_the_upper_end_of_the_interval_of_shuffled_gates():
    rows = [
        {"budget": budget, "seed": seed, "variant": variant, "test_accuracy": 0.5 - lost * (1 + 0.1 * seed)}
        for budget, cost in ((1.0, 0.1), (0.1, 0.001))
        for variant, lost in (("own", 0.0), ("mean", 0.002), ("shuffled", cost), ("class", cost / 2))
        for seed in (0, 1, 2)
    ]
    table = costs(pd.DataFrame(rows)).set_index(["budget", "variant"])
    assert table.loc[(1.0, "shuffled"), "cost"] == pytest.approx(0.11)
    assert not table.loc[(1.0, "shuffled"), "disguise"] and table.loc[(0.1, "shuffled"), "disguise"]
    assert not table.loc[(0.1, "mean"), "disguise"] and (table.seeds == 3).all()
