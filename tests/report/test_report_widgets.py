"""The slider shows what the sweep's table and its runs hold."""

from types import SimpleNamespace

import pandas as pd
import pytest

from afdslib.base.errors import AFDSError
from afdslib.report import views as inspection
from afdslib.report import widgets as explorer


@pytest.fixture
def study(monkeypatch):
    def layers(study, method, seed, budgets, target):
        gone = {1.0: 0, 0.1: 3}
        return {b: {"conv": {"channels": 4, "removed": gone[b], "static": 0, "dynamic": 4 - gone[b]}} for b in budgets}

    monkeypatch.setattr(inspection, "layers_by_budget", layers)
    return SimpleNamespace(targets={"t": None})


@pytest.fixture
def sweep():
    rows = [("l2", 0, 1.0, 0.8), ("l2", 1, 1.0, 0.9), ("l2", 0, 0.1, 0.5), ("afd", 0, 1.0, 0.7)]
    table = pd.DataFrame(rows, columns=["method", "seed", "budget", "test_accuracy"])
    return table.assign(target="t", macs=table.budget, parameters=2000)


def test_moving_the_slider_updates_accuracy_macs_and_gates_and_says_what_is_missing(study, sweep):
    box = explorer.explore(study, sweep)
    (slider, menu), line, picture = box.children[0].children, *box.children[1:]
    assert menu.value == "afd" and "70.0 %" in line.value and bytes(picture.value).startswith(b"\x89PNG")
    menu.value = "l2"
    before = bytes(picture.value)
    assert "85.0 %" in line.value and "80.0 to 90.0 over 2 seeds" in line.value and "100.0 % of the dense" in line.value
    slider.value = 0.1
    assert "50.0 %" in line.value and "10.0 % of the dense" in line.value and bytes(picture.value) != before
    menu.value = "afd"  # which has no network there
    assert "no network of 'afd' at 10x" in line.value and bytes(picture.value) == b""
    with pytest.raises(AFDSError, match="no network"):
        explorer.view(study, sweep, "l2", 0.25)
