"""The statements that notebooks print are true of the library, and each turns false under its mutant."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import tiny
import torch
from mutants import selection, study
from nbformat.v4 import new_code_cell, new_notebook

from afdslib import afs, runs
from afdslib.report import checks


def transferred(folder, name: str = "afd", strength: float = 0.01, steps: int = 24, **kwargs) -> runs.Result:
    with tiny.served():
        run = tiny.transfer(name, strength, steps=steps, **kwargs)
        return runs.get_or_run(run, store=tiny.store(folder))


@pytest.mark.parametrize(("name", "term"), [("afd", "afd"), ("feature-map", "feature_map")])
def test_a_lambda_of_zero_is_noticed(tmp_path, name, term):
    honest = transferred(tmp_path / "honest", name, steps=3)
    assert checks.adds_up(honest.history(), 0.01, term)
    with study.lambda_is_zero():
        mutant = transferred(tmp_path / "mutant", name, steps=3)
    assert (mutant.history()[term] > 0).all()  # it is measured and logged all the same
    assert not checks.adds_up(mutant.history(), 0.01, term)


def test_a_regulariser_acts_only_if_it_is_configured_logged_and_visible():
    rows = pd.DataFrame({"loss": [1.01, 1.02], "cross_entropy": [1.0, 1.0], "afd": [1.0, 2.0]})
    assert checks.adds_up(rows, 0.01, "afd")
    tiny = pd.DataFrame({"loss": [1.0], "cross_entropy": [1.0], "afd": [1e-9]})
    others = ((rows, 0.02, "afd"), (rows, 0.0, "afd"), (rows, 0.01, "feature_map"), (rows[:0], 0.01, "afd"))
    assert not any(checks.adds_up(*one) for one in (*others, (tiny, 1.0, "afd")))


@pytest.mark.parametrize("kind", ["converted", "dynamic", "pruned"])
def test_ignored_gates_are_noticed(kind):
    model = afs.convert(tiny.network().eval()) if kind == "converted" else tiny.gated().eval()
    if kind == "pruned":
        afs.set_density(model, 0.6)
        afs.update_masks(model, afs.collect_statistics(model, tiny.batches()), macs_budget=0.3, loader=tiny.batches())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.cat([x for x, _ in tiny.batches()])
    assert checks.obeys_gates(model, images)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for mutant in (selection.gates_ignored, selection.removed_channel_keeps_its_shift, selection.extra_relu):
        with mutant():
            assert not checks.obeys_gates(model, images)
    assert checks.obeys_gates(model, images) and not checks.obeys_gates(tiny.network(), images[:1])


def test_shuffled_labels_are_noticed(tmp_path):
    honest = transferred(tmp_path / "honest", "l2", 1e-4)
    assert checks.learns(honest.metrics, 1 / 3, share=0.5)
    # The source networks come from the store: only the target is taught nonsense.
    with tiny.served(), study.target_labels_shuffled():
        mutant = runs.get_or_run(tiny.transfer("l2", 1e-4, steps=24), store=tiny.store(tmp_path / "mutant"))
    assert not checks.learns(mutant.metrics, 1 / 3)


def test_learning_is_judged_by_class_too_and_against_chance():
    lazy = {"test_accuracy": 0.9, "test_mean_class_accuracy": 0.5}
    assert not checks.learns(lazy, 1 / 3, share=0.3) and checks.learns(lazy, 1 / 3, share=0.2)
    assert not checks.learns(lazy, 1 / 2)  # of two classes, 0.5 is guessing
    assert checks.learns({"validation_accuracy": 0.4, "validation_mean_class_accuracy": 0.3}, 0.1, split="validation")


def test_a_sweep_has_learnt_only_if_every_target_has():
    study, row = SimpleNamespace(chance={"t": 1 / 3}), {"target": "t", "test_accuracy": 0.6}
    rows = [row | {"test_mean_class_accuracy": share} for share in (0.6, 0.4)]
    assert checks.sweep_learns(study, pd.DataFrame(rows[:1])) and not checks.sweep_learns(study, pd.DataFrame(rows))
    assert not checks.sweep_learns(study, pd.DataFrame(rows)[:0])


# the notebooks themselves

STATEMENTS = {  # what notices the fault: the notebook and a word of its cell
    "lambda_is_zero": ("03", "checks.regulariser_acts"),
    "target_labels_shuffled": ("03", "checks.sweep_learns"),
    "gates_ignored": ("04", "checks.gates_act"),
}
NEEDED = [("03", "Study(profiles.get"), ("03", "unpruned = study.sweep")]


def cell(number: str, word: str):
    """The only code cell of a stored notebook that holds a word, with its stored output."""
    (file,) = (Path(__file__).parents[2] / "notebooks").glob(f"{number}_*.ipynb")
    (found,) = (c for c in nbformat.read(file, as_version=4).cells if c.cell_type == "code" and word in c.source)
    return found


@pytest.mark.slow
def test_each_fault_fails_the_comparison_of_its_own_cell_and_of_no_other(tmp_path):
    """Cells of the stored notebooks 3 and 4 under nbval; an added first cell puts a small study and the fault in."""
    shutil.copy(Path(__file__).parents[2] / "notebooks" / "conftest.py", tmp_path)
    for fault in STATEMENTS:
        setup = f'import faulty\nkept = faulty.install("{fault}")\nprofile, scale, data_dir = "tiny", "quick", ""'
        node = new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}})
        node.cells = [new_code_cell(setup), *(cell(*where) for where in NEEDED)]
        node.cells.append(new_code_cell("budgets, seed = [1.0, 0.5, 0.2], 0"))
        for one in node.cells:  # what they print is the demo's
            one.metadata["tags"] = ["nbval-ignore-output"]
        node.cells += [cell(*where) for where in STATEMENTS.values()]
        for count, one in enumerate(node.cells, start=1):
            one.execution_count = count
        nbformat.write(node, tmp_path / f"{fault}.ipynb")
    here = Path(__file__).parents[1] / "support"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    environment |= {"OMP_NUM_THREADS": "1", "AFDS_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "--nbval", "--nbval-current-env", "-rf", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    failed = sorted(re.findall(r"^FAILED (\w+)\.ipynb::Cell (\d+)", done.stdout, re.MULTILINE))
    assert failed == sorted((fault, str(4 + i)) for i, fault in enumerate(STATEMENTS)), done.stdout + done.stderr
    assert "3 failed, 18 passed" in done.stdout
