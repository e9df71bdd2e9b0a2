"""The stored notebooks: their form, their parameters, and that strict nbval has something to compare in each."""

import ast
import re

import nbformat
import pytest

from afdslib.base import paths
from afdslib.report import pipeline

NOTEBOOKS = pipeline.notebooks(paths.root() / "notebooks")


def code_cells(file):
    return [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def compared(cell):
    """Whether strict nbval compares text that this cell printed; the caption of a picture alone does not count."""
    if "nbval-ignore-output" in tags(cell):
        return False
    return any(output.get("name") == "stdout" and output["text"].strip() for output in cell.outputs)


@pytest.fixture(params=NOTEBOOKS, ids=lambda file: file.stem)
def notebook(request):
    return request.param


def test_counts_are_one_to_n_the_kernel_is_python3_and_the_three_parameters_are_the_demos(notebook):
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    metadata = nbformat.read(notebook, as_version=4).metadata
    assert metadata.kernelspec.name == "python3"
    assert set(metadata) == {"kernelspec", "language_info"} and set(metadata.language_info) == {"name"}
    assert pipeline.parameters_of(notebook) == {"profile": "demo", "scale": "quick", "data_dir": ""}


def test_a_title_and_what_it_needs_makes_and_costs_come_before_any_code(notebook):
    first, second, third = nbformat.read(notebook, as_version=4).cells[:3]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert second.cell_type == "markdown" and third.cell_type == "code"
    assert all(word in second.source for word in ("**Needs**", "**Makes**", "**Costs**"))
    assert "afdslib.__version__" in code_cells(notebook)[0].source


def test_cells_are_short_and_hold_no_substance_with_about_one_text_cell_per_idea(notebook):
    for cell in code_cells(notebook):
        assert len(cell.source.splitlines()) <= 12, cell.source
        nodes = list(ast.walk(ast.parse(cell.source)))
        assert not any(isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.While, ast.Try)) for n in nodes), cell.source
        for line in cell.source.splitlines() if "parameters" in tags(cell) else ():
            assert line.count("=") == 1 and "#" in line, line  # no second "=" that papermill would stumble over
    cells = nbformat.read(notebook, as_version=4).cells
    assert sum(cell.cell_type == "markdown" for cell in cells) >= 0.4 * len(code_cells(notebook))
    assert all(cell.source.strip() for cell in cells)


def test_outputs_hold_no_error_stderr_path_time_or_run_id_and_what_must_be_true_is(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", cell.source
            for line in output.get("text", "").splitlines():
                assert not line.endswith("False") or line.startswith("augmented:"), line
            for text in (output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k[:5] == "text/")):
                assert not re.search(r"/(home|root|tmp|work|Users|usr)/|[A-Z]:\\|file://", text), text
                stamp = r"\b\d{4}-\d\d-\d\d\b|\b\d\d:\d\d:\d\d\b|\b[0-9a-f]{12}\b|0x[0-9a-f]{6,}"
                assert not re.search(stamp, text), text


def test_the_eight_notebooks_are_there_and_nbval_compares_cells_in_each_and_thirty_in_all():
    assert [file.name[:2] for file in NOTEBOOKS] == [f"0{number}" for number in range(1, 9)]
    counts = {file.stem: sum(compared(cell) for cell in code_cells(file)) for file in NOTEBOOKS}
    assert min(counts.values()) >= 3 and sum(counts.values()) >= 30, counts


def test_every_cell_shows_something_and_one_that_is_not_compared_makes_nothing_else(notebook):
    """What differs between machines is left out cell by cell; such a cell must not hide a statement."""
    for cell in code_cells(notebook):
        if "nbval-ignore-output" in tags(cell):
            assert len(ast.parse(cell.source).body) == 1 and "print" not in cell.source, cell.source
    silent = [cell.source for cell in code_cells(notebook) if not cell.outputs]
    assert len(silent) == 2, silent  # the parameters, and the study made from them
