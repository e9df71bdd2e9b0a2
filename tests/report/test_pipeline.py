"""The notebook runner: parameters checked first, no stage finished that is not, resumed where it stopped."""

import errno
import json
import os
import re
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from afdslib.base import paths
from afdslib.base.errors import AFDSError
from afdslib.report import pipeline

PARAMETERS = 'profile = "demo"   # which study\nbudget = "quick"\ndata_dir = ""\nsteps = 2\nlr = 0.1\nshow = False'


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """An empty project in which nothing of the real one is touched."""
    monkeypatch.setenv("AFDS_HOME", str(tmp_path))
    for name in ("AFDS_RUNS", "AFDS_FIGURES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def write(name: str, *cells, parameters: str | None = PARAMETERS) -> Path:
    """A notebook from code strings and cells, the parameters first."""
    node = new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    if parameters is not None:
        node.cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    node.cells += [new_code_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    file = paths.notebooks() / name
    nbformat.write(node, file)
    return file


def no_kernel(monkeypatch) -> None:
    monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **__: pytest.fail("a kernel was started"))


def sentence(info) -> str:
    text = str(info.value)
    assert "\n" not in text and "Traceback" not in text
    return text


def no_echo(_line: str) -> None:
    pass


# parameters


def test_parameters_are_the_literals_of_the_tagged_cell():
    write("01_a.ipynb", parameters="a = 1\nb: float = -0.5  # x = 3\nc = ('x', None)\nd = True")
    assert pipeline.parameters_of(paths.notebooks() / "01_a.ipynb") == {"a": 1, "b": -0.5, "c": ("x", None), "d": True}


@pytest.mark.parametrize(
    "line", ["x = 1 + y", "import os", "x = y = 1", "x, y = 1, 2", "x += 1", "x = {1, 2}", "x: int", "f(1)", "x = [a]"]
)
def test_anything_but_plain_literals_is_refused(line):
    file = write("01_a.ipynb", parameters=f"profile = 'demo'\n{line}")
    with pytest.raises(AFDSError) as info:
        pipeline.parameters_of(file)
    assert "01_a.ipynb" in sentence(info) and repr(line) in sentence(info)


def test_parameters_cell_must_exist_once_and_be_python():
    second = new_code_cell("b = 1", metadata={"tags": ["parameters"]})
    for file, words in (
        (lambda: write("01_a.ipynb", "x = 1", parameters=None), "0 code cells tagged"),
        (lambda: write("01_a.ipynb", second), "2 code cells tagged"),
        (lambda: write("01_a.ipynb", parameters="x = 1\ny = = 2"), "no Python .line 2"),
    ):
        with pytest.raises(AFDSError, match=words):
            pipeline.parameters_of(file())
    (paths.notebooks() / "01_a.ipynb").write_text("{")
    with pytest.raises(AFDSError, match="is not a notebook"):
        pipeline.parameters_of(paths.notebooks() / "01_a.ipynb")


@pytest.mark.parametrize(
    "default, value, expected",
    [
        ("a", "1", "1"), (1, "3", 3), (1, 3, 3), (1.0, "1e-3", 0.001), (1.0, 2, 2.0), (0.5, "2", 2.0),
        (False, "true", True), (True, "No", False), (True, False, False), ([1], "[2, 3]", [2, 3]),
        ((1,), "(2,)", (2,)), (None, "0.5", 0.5),
        (None, "text", "text"), (None, 3, 3)
    ]
)  # fmt: skip
def test_values_take_the_type_of_the_default(default, value, expected):
    converted = pipeline.convert("x", default, value)
    assert converted == expected and type(converted) is type(expected)


@pytest.mark.parametrize(
    "default, value",
    [
        (1, "1.5"), (1, "one"), (1, True), (1, 1.0), (1.0, "fast"), (1.0, "nan"), (1.0, float("inf")), (1.0, False),
        (False, "maybe"), (False, 1), ("a", 1), ("a", None), ([1], "(1,)"), ([1], "x y"), (1.0, "")
    ]
)  # fmt: skip
def test_values_of_another_type_are_refused(default, value):
    with pytest.raises(AFDSError) as info:
        pipeline.convert("x", default, value)
    assert f"parameter x = {value!r}" in sentence(info)


def test_unknown_names_and_wrong_types_are_refused_before_a_kernel_starts(monkeypatch):
    no_kernel(monkeypatch)
    write("01_a.ipynb")
    write("02_b.ipynb", parameters="profile = 'demo'\nonly_here = 1")
    for arguments, words in (
        (("demo", {"stepps": 3}), "no notebook has a parameter 'stepps'; there are: budget, data_dir"),
        (("demo", {"only_here": "x"}), "parameter only_here = 'x' must be of type int"),
        (("../demo",), "cannot name a profile"),
    ):
        with pytest.raises(AFDSError, match=words):
            pipeline.execute(*arguments)
    write("03_c.ipynb", parameters="budget = 'quick'")
    with pytest.raises(AFDSError, match="03_c.ipynb has no parameter 'profile'"):
        pipeline.execute("demo")
    assert not (paths.root() / "figures").exists()


def test_each_notebook_gets_the_parameters_that_it_has():
    with pytest.raises(AFDSError, match="no notebook named like 01_name.ipynb"):
        pipeline.plan("demo")
    write("01_a.ipynb")
    write("02_b.ipynb", parameters="profile = 'x'\nother = 1")
    first, second = pipeline.plan("demo", {"other": "2", "lr": "1"})
    assert first.parameters == {"profile": "demo", "lr": 1.0} and second.parameters == {"profile": "demo", "other": 2}


def test_stage_key_follows_cells_parameters_library_and_the_stages_before(monkeypatch):
    def keys(parameters=None):
        return [stage.key for stage in pipeline.plan("demo", parameters)]

    write("01_a.ipynb", "1")
    write("02_b.ipynb", "2")
    before = keys()
    assert keys() == before and len(set(before)) == 2
    node = nbformat.read(paths.notebooks() / "01_a.ipynb", as_version=4)
    node.cells[1].outputs = [nbformat.v4.new_output("stream", text="1")]
    node.cells[1].execution_count = 7
    nbformat.write(node, paths.notebooks() / "01_a.ipynb")
    assert keys() == before  # stored outputs are no input
    assert all(new != old for new, old in zip(keys({"lr": 1}), before, strict=True))
    write("02_b.ipynb", "3")
    assert keys()[0] == before[0] and keys()[1] != before[1]
    write("01_a.ipynb", "0")
    write("02_b.ipynb", "2")
    assert keys()[1] != before[1]
    write("01_a.ipynb", "1")
    monkeypatch.setattr(pipeline, "_library_hash", lambda: "another")
    assert keys()[0] != before[0]


# execution


@pytest.mark.slow
def test_stages_run_in_order_with_typed_parameters_and_end_in_one_html_file(capsys, monkeypatch):
    """Also: this very interpreter, although another `python3` kernelspec is found first, and no trace of folders."""
    impostor = paths.root() / "jupyter" / "kernels" / "python3"
    impostor.mkdir(parents=True)
    (impostor / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(paths.root() / "jupyter"))
    (paths.notebooks() / "dot.png").write_bytes(b"not really a picture")
    write("01_a.ipynb", "import sys\nprint(sys.executable)", "open('order.txt', 'a').write('a')")
    write(
        "02_b.ipynb",
        "print([profile, budget, data_dir, steps, lr, show])",
        new_markdown_cell("# The end\n![a dot](dot.png) <img src='dot.png'> ![gone](gone.png)"),
        "secret_name = 6 * 7\nprint(f'answer {secret_name}')",
        "open('order.txt', 'a').write('b');",
    )
    write("draft.ipynb", "1 / 0")
    lines: list[str] = []
    report = pipeline.execute("tiny", {"steps": "5", "lr": 1, "show": "yes"}, verbose=True, echo=lines.append)
    assert report == paths.figures("tiny") / "report.html" and (paths.root() / "order.txt").read_text() == "ab"
    executed = report.parent / "executed"
    assert sorted(file.name for file in executed.iterdir()) == [
        f"{stem}.{suffix}" for stem in ("01_a", "02_b") for suffix in ("ipynb", "json", "log")
    ]
    assert (executed / "01_a.log").read_text().strip() == sys.executable
    assert "['tiny', 'quick', '', 5, 1.0, True]" in (executed / "02_b.log").read_text()
    assert "answer 42" in capsys.readouterr().out
    html = report.read_text()
    assert "answer 42" in html and "The end" in html and "AFDS report: tiny" in html and "secret_name" not in html
    assert html.count("data:image/png;base64,bm90IHJlYWxseSBhIHBpY3R1cmU=") == 2
    copy = nbformat.read(executed / "02_b.ipynb", as_version=4)
    counts = [cell.execution_count for cell in copy.cells if cell.cell_type == "code"]
    assert counts == [1, 2, 3, 4, 5]  # the cell added at the end is gone
    assert str(paths.root()) not in (executed / "02_b.ipynb").read_text()
    assert lines[0] == "[1/2] 01_a: log in figures/tiny/executed/01_a.log"
    assert lines[-1] == "report: figures/tiny/report.html"
    # A second call executes nothing, a changed notebook itself, and fresh all.
    given = {"steps": "5", "lr": 1, "show": "yes"}
    with monkeypatch.context() as patch:
        no_kernel(patch)
        pipeline.execute("tiny", given, echo=no_echo)
        report.unlink()
        assert pipeline.render("tiny") == report and report.exists()
    write("02_b.ipynb", "open('order.txt', 'a').write('c')")
    pipeline.execute("tiny", given, echo=no_echo)
    assert (paths.root() / "order.txt").read_text() == "abc"
    pipeline.execute("tiny", given, echo=no_echo, fresh=True)
    assert (paths.root() / "order.txt").read_text() == "abcac"


@pytest.mark.slow
def test_failed_stage_names_notebook_cell_and_log_and_the_next_call_resumes_there():
    write("01_a.ipynb", "open('first.txt', 'a').write('x')")
    bad = "import os\nif not os.path.exists('mended'):\n    raise ValueError('no\\nluck')"
    write("02_b.ipynb", "print('before the fall')", new_markdown_cell("text"), bad, "print('after')")
    write("03_c.ipynb", "print('end')")
    with pytest.raises(AFDSError) as info:
        pipeline.execute("tiny", echo=no_echo)
    text = sentence(info)
    assert text.startswith("02_b.ipynb failed in code cell 3 ('import os'): ValueError: no luck")
    log = paths.root() / re.search(r"see the log (\S+)$", text).group(1)
    assert log.name == "02_b.log" and "before the fall" in log.read_text() and "Traceback" in log.read_text()
    assert not (paths.figures("tiny") / "report.html").exists()
    with pytest.raises(AFDSError, match="no finished report yet"):
        pipeline.render("tiny")
    Path("mended").touch()
    lines: list[str] = []
    pipeline.execute("tiny", echo=lines.append)
    assert lines[0] == "[1/3] 01_a: finished before" and Path("first.txt").read_text() == "x"
    assert "before the fall" in log.read_text() and "Traceback" not in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["import os; os.kill(os.getpid(), 9)", "import sys; sys.exit(0)"])
def test_notebook_that_ends_early_is_not_finished(end):
    write("01_a.ipynb", "print('alive')", end, "print('never')")
    with pytest.raises(AFDSError) as info:
        pipeline.execute("tiny", echo=no_echo)
    assert "01_a.ipynb failed in code cell 3" in sentence(info) and repr(end) in sentence(info)
    assert ("kernel died" if "kill" in end else "ended before its last cell") in sentence(info)
    assert not pipeline.plan("tiny")[0].finished


def test_two_processes_do_not_write_the_same_folder():
    write("01_a.ipynb")
    with pipeline._only_one("tiny"), pytest.raises(AFDSError, match="another process is executing profile tiny"):
        pipeline.execute("tiny", echo=no_echo)


def test_output_folder_that_cannot_be_written_is_one_sentence(monkeypatch):
    write("01_a.ipynb")
    (paths.root() / "taken").write_text("a file")
    monkeypatch.setenv("AFDS_FIGURES", str(paths.root() / "taken"))
    with pytest.raises(AFDSError) as info:
        pipeline.execute("tiny", echo=no_echo)
    assert "cannot write" in sentence(info) and "taken" in sentence(info)


@pytest.mark.slow
def test_full_disk_is_one_sentence(monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write("01_a.ipynb")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AFDSError, match="cannot write .*No space left"):
        pipeline.execute("tiny", echo=no_echo)
    assert not pipeline.plan("tiny")[0].finished
