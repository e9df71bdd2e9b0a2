"""The statements that notebooks print are true of the library, and each turns false under its mutant."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import tiny
import torch
from mutants import selection, study
from nbformat.v4 import new_code_cell, new_notebook, new_output

from afdslib import afs, checks, inspection, profiles, runs
from afdslib.objectives import Regulariser
from afdslib.profiles import Candidates
from afdslib.stages import DataSource
from afdslib.study import Study


def transferred(folder, name: str = "afd", strength: float = 0.01, steps: int = 24, **kwargs) -> runs.Result:
    with tiny.served():
        run = tiny.transfer(name, strength, steps=steps, **kwargs)
        return runs.get_or_run(run, store=tiny.store(folder))


@pytest.mark.parametrize(("name", "term"), [("afd", "afd"), ("feature-map", "feature_map")])
def test_a_lambda_of_zero_is_noticed(tmp_path, name, term):
    honest = transferred(tmp_path / "honest", name, steps=3)
    assert checks.regulariser_acts(honest.history(), 0.01, term)
    with study.lambda_is_zero():
        mutant = transferred(tmp_path / "mutant", name, steps=3)
    assert (mutant.history()[term] > 0).all()  # it is measured and logged all the same
    assert not checks.regulariser_acts(mutant.history(), 0.01, term)


def test_a_regulariser_acts_only_if_it_is_configured_logged_and_visible():
    rows = pd.DataFrame({"loss": [1.01, 1.02], "cross_entropy": [1.0, 1.0], "afd": [1.0, 2.0]})
    assert checks.regulariser_acts(rows, 0.01, "afd")
    assert not checks.regulariser_acts(rows, 0.02, "afd")
    assert not checks.regulariser_acts(rows, 0.0, "afd")
    assert not checks.regulariser_acts(rows, 0.01, "feature_map")
    assert not checks.regulariser_acts(rows[:0], 0.01, "afd")
    assert not checks.regulariser_acts(pd.DataFrame({"loss": [1.0], "cross_entropy": [1.0], "afd": [1e-9]}), 1.0, "afd")


def networks():
    dynamic = tiny.gated().eval()
    pruned = tiny.gated().eval()
    afs.set_density(pruned, 0.6)
    afs.update_masks(pruned, afs.collect_statistics(pruned, tiny.batches()), macs_budget=0.3, loader=tiny.batches())
    return {"converted": afs.convert(tiny.network().eval()), "dynamic": dynamic, "pruned": pruned}


@pytest.mark.parametrize("kind", ["converted", "dynamic", "pruned"])
def test_ignored_gates_are_noticed(kind):
    model = networks()[kind]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.cat([x for x, _ in tiny.batches()])
    assert checks.gates_act(model, images)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for mutant in (selection.gates_ignored, selection.removed_channel_keeps_its_shift, selection.extra_relu):
        with mutant():
            assert not checks.gates_act(model, images)
    assert checks.gates_act(model, images)


def test_a_network_without_gates_has_none_that_act():
    assert not checks.gates_act(tiny.network(), torch.zeros(1, 3, tiny.SIZE, tiny.SIZE))


def test_shuffled_labels_are_noticed(tmp_path):
    honest = transferred(tmp_path / "honest", "l2", 1e-4)
    assert checks.learns(honest.metrics)
    # The source networks come from the store: only the target is taught nonsense.
    with tiny.served(), study.target_labels_shuffled():
        mutant = runs.get_or_run(tiny.transfer("l2", 1e-4, steps=24), store=tiny.store(tmp_path / "mutant"))
    assert not checks.learns(mutant.metrics)


def test_learning_is_judged_by_class_too():
    confusion = [[90, 0, 0], [10, 0, 0], [0, 0, 0]]
    lazy = {"confusion": confusion, "test_accuracy": 0.9, "test_mean_class_accuracy": 0.5}
    assert not checks.learns(lazy) and checks.learns(lazy, factor=1.4)


# the same of the statements that the notebooks print


@pytest.fixture
def report(tmp_path, monkeypatch) -> Study:
    """A study of AFD at two budgets on the tiny images."""
    monkeypatch.setenv("AFDS_HOME", str(tmp_path))
    monkeypatch.setenv("AFDS_RUNS", str(tiny.store(tmp_path)))
    monkeypatch.delenv("AFDS_FRESH", raising=False)
    stage = tiny.settings(4, log_rows=2)
    profile = profiles.get("demo")
    return Study(
        replace(
            profile, name="tiny", source=tiny.SOURCE.data, targets=(DataSource("tiny-target"),), seeds=(0,),
            network=tiny.SOURCE.network, source_training=tiny.SOURCE.optimisation, afs_training=stage, transfer=stage,
            tuning=stage, budgets=(1.0, 0.5), candidates=(Candidates(Regulariser("afd", 0.01), (0.01,)),),
        ),
        workers=1,
    )  # fmt: skip


def test_the_notebooks_statement_on_lambda_turns_false_without_it(report):
    with tiny.served():
        assert inspection.terms_add_up(report, "afd")
        runs.remove(report.point("afd", 0, 1.0).id)
        with study.lambda_is_zero():
            assert not inspection.terms_add_up(report, "afd")


def test_the_notebooks_statement_on_skipping_turns_false_where_gates_are_ignored(report):
    with tiny.served():
        assert inspection.skips_exactly(report, "afd", 0, 0.5, images=16)
        with selection.gates_ignored():
            assert not inspection.skips_exactly(report, "afd", 0, 0.5, images=16)


# a real notebook

CELLS = [
    "import sys\nimport torch\nfrom afdslib import checks, runs\nimport tiny",
    'with tiny.served():\n    result = runs.get_or_run(tiny.transfer("afd", 0.01, steps=24), store="runs")',
    'print("the regulariser acts:", checks.regulariser_acts(result.history(), 0.01, "afd"))',
    'print("the gates act:", checks.gates_act(tiny.gated(), torch.cat([x for x, _ in tiny.batches()])))',
    'print("the network has learnt:", checks.learns(result.metrics))',
]


def notebook(path: Path) -> None:
    """Three statements, with the outputs that a true report stores."""
    node = new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}})
    for count, source in enumerate(CELLS, start=1):
        said = [source.split('"')[1] + " True\n"] if source.startswith("print") else []
        outputs = [new_output("stream", name="stdout", text=text) for text in said]
        tags = {"tags": ["nbval-ignore-output"]} if "get_or_run" in source else {}  # its progress goes to stderr
        node.cells.append(new_code_cell(source, execution_count=count, outputs=outputs, metadata=tags))
    nbformat.write(node, path)


def test_a_notebook_under_a_mutant_fails_its_comparison(tmp_path):
    """The kernel starts with lambda forced to 0; the notebook is the same. The other statements stay true."""
    notebook(tmp_path / "statements.ipynb")
    tiny.store(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif any('ipykernel' in word for word in sys.orig_argv):\n"
        "    from mutants import study\n    fault = study.lambda_is_zero()\n    fault.__enter__()\n"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(here), str(here.parent)])}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "--nbval", "--nbval-current-env", "statements.ipynb"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 4 passed" in done.stdout and "the regulariser acts: False" in done.stdout, done.stdout
