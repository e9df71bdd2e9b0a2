"""Processes that are killed, or whose disk is full or read-only, at any moment: begun again, they end as ever.

Five kinds of work, each as a process of its own. AFDS_ROBUST=full kills each at 20 random moments, else at one or two.
"""

import os
import random
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import disk
import nbformat
import pytest
import tiny
from forked import ended, start
from nbformat.v4 import new_code_cell, new_notebook
from toy_runs import ToySource, ToyTrain

from afdslib import data, runs
from afdslib.base.errors import AFDSError
from afdslib.report import pipeline

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

MOMENTS = 20 if os.environ.get("AFDS_ROBUST") == "full" else 2
CODE, SUPPORT = Path(runs.__file__).parents[2], Path(tiny.__file__).parent
TOYS = [ToyTrain(f"toy{n}", steps=6, every=1, pause=0.01, source=ToySource(n % 3)) for n in range(8)]


def train(home: Path) -> None:
    with tiny.served():
        runs.get_or_run(tiny.transfer(steps=12))


def study(home: Path) -> None:
    """Two workers that share a list of runs through the store, as those of a study do."""
    points = [tiny.transfer(strength=s, budgets=b, steps=4) for s in (0.01, 0.02) for b in ((1.0,), (1.0, 0.5))]

    def work(configs):
        with tiny.served():
            for config in configs:
                runs.get_or_run(config)

    other = start(lambda: work(points[::-1]))
    try:
        work(points)
    finally:
        failed = ended(other)
    if failed:
        raise AFDSError("the other worker failed")


def publish(home: Path) -> None:
    results = [runs.get_or_run(config, store=home / "finished") for config in TOYS]
    for first in range(0, len(results), 2):
        runs.publish(results[first : first + 2], "tiny")


def notebook(home: Path) -> None:
    pipeline.execute("demo", folder=home / "notebooks", echo=lambda _: None)


def decode(home: Path) -> None:
    data.load(home / "images.zip", size=16)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """What the work starts from."""
    home = tmp_path_factory.mktemp("prepared")
    tiny.store(home)
    for config in TOYS:
        runs.get_or_run(config, store=home / "finished")
    tree = tiny.tree(home / "tree", train=60)
    with zipfile.ZipFile(home / "images.zip", "w") as archive:
        for file in sorted(tree.rglob("*.png")):
            archive.write(file, file.relative_to(home))
    cells = [
        new_code_cell('profile = "demo"', metadata={"tags": ["parameters"]}),
        new_code_cell("from afdslib import runs\nfrom toy_runs import ToyTrain"),
        new_code_cell("print(runs.get_or_run(ToyTrain(steps=20, pause=0.05)).metrics)"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    (home / "notebooks").mkdir()
    nbformat.write(new_notebook(metadata=kernel, cells=cells), home / "notebooks" / "01_toy.ipynb")
    return home


def result_of(home: Path) -> dict:
    """What must be the same: metrics and logs of the runs, files of committed results, images, outputs of notebooks."""
    results = {}
    for run in runs.list_runs(home / "runs"):
        log, shown = run.path / "metrics.csv", runs.show(run.id, store=home / "runs")
        results[run.id] = (run.state, shown.get("result"), log.exists() and log.read_text())
    for file in sorted([*home.glob("data/results/**/*.jsonl"), *home.glob("data/results/**/*.csv")]):
        results[file.name] = file.read_text()
    for file in home.glob("data/cache/**/images.npy"):
        results[file.name] = file.read_bytes()
    for file in home.glob("figures/demo/executed/*.ipynb"):
        cells = nbformat.read(file, as_version=4).cells
        lines = "".join(o.text for cell in cells for o in cell.get("outputs", ()) if "text" in o).splitlines()
        # A resumed run has fewer steps, and a kernel may outlive its notebook and still compute what is waited for.
        results[file.name] = [line for line in lines if not line.startswith(("step ", "waiting for run "))]
    return results


def finished_of(home: Path) -> dict:
    """The done-markers and the committed lines: none of them may ever be lost or written again."""
    markers = {file: file.stat().st_ino for file in home.glob("runs/*/result.json")}
    return markers | {("published", record["id"]): record["metrics"] for _, record in runs.records("tiny")}


def begin(work, home: Path, prepare=lambda: None) -> int:
    """`work` in a group of processes of its own, whose project is `home`."""

    def child():
        os.setsid()
        os.environ.update(AFDS_HOME=str(home), PYTHONPATH=f"{CODE}:{SUPPORT}")
        for name in ("AFDS_RUNS", "AFDS_FIGURES", "AFDS_FRESH"):
            os.environ.pop(name, None)
        prepare()
        work(home)

    return start(child)


class Case(NamedTuple):
    """A kind of work, its result without interruption, and how long that took."""

    work: Callable[[Path], None]
    expected: dict
    seconds: float


@pytest.fixture(scope="module", params=[train, study, publish, notebook, decode], ids=lambda work: work.__name__)
def case(request, prepared, tmp_path_factory):
    home = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("whole") / "home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AFDS_HOME", str(home))
        began = time.monotonic()
        assert ended(begin(request.param, home)) == 0
        seconds = time.monotonic() - began
        expected = result_of(home)
        assert len(expected) > len(result_of(prepared)) and "interrupted" not in str(expected)
        yield Case(request.param, expected, seconds)


@pytest.fixture
def home(prepared, tmp_path, monkeypatch) -> Path:
    """A fresh project."""
    monkeypatch.setenv("AFDS_HOME", str(tmp_path / "home"))
    return Path(shutil.copytree(prepared, tmp_path / "home"))


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_killed_at_a_random_moment(case, moment, home):
    child = begin(case.work, home)
    time.sleep(random.Random(f"{case.work.__name__}{moment}").uniform(0, case.seconds))
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # before it had a group, or after its end
        os.kill(child, signal.SIGKILL)
    assert ended(child) in (-signal.SIGKILL, 0)
    check_again(case, home)


def check_again(case: Case, home: Path) -> None:
    """Begun again, the work ends as ever, and what was finished stays."""
    before = finished_of(home)
    assert ended(begin(case.work, home)) == 0
    assert before.items() <= finished_of(home).items()
    assert result_of(home) == case.expected


def test_killed_before_any_file_operation(tmp_path):
    """Before the n-th operation on the store, for every n (every fourth in short), then called again."""
    config = ToyTrain(steps=3, source=ToySource())
    whole = runs.get_or_run(config, store=tmp_path / "whole")
    log = (whole.path / "metrics.csv").read_bytes()
    for moment in range(1, 1000, 1 if MOMENTS > 2 else 4):
        folder, counter = tmp_path / f"killed{moment}", iter(range(1, 10**6))

        def watch(event, arguments, moment=moment, folder=folder, counter=counter):
            if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(arguments[0]).startswith(str(folder)):
                if next(counter) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        def work(watch=watch, folder=folder):
            sys.addaudithook(watch)
            runs.get_or_run(config, store=folder)

        code = ended(start(work))
        if code == 0:
            break
        resumed = runs.get_or_run(config, store=folder)
        assert code == -signal.SIGKILL and resumed.metrics == whole.metrics, f"killed before operation {moment}"
        assert (resumed.path / "metrics.csv").read_bytes() == log, f"killed before operation {moment}"
        assert not list(resumed.path.glob(".*")), f"killed before operation {moment}"
    assert 30 < moment < 990


@pytest.mark.parametrize("fault", disk.ERRORS)
@pytest.mark.parametrize("moment", range(max(1, MOMENTS // 4)))
def test_a_disk_that_is_full_or_read_only(case, fault, moment, home):
    """From a random change of a file on every one fails; what was finished stays, and a mended disk gives the rest."""
    first = 0 if fault == "read-only" else random.Random(moment).randrange(30)
    call = f"disk.install({str(home)!r}, {fault!r}, {first})"
    # Python starts the kernel of a notebook by this file; in every other trial it alone has the fault.
    (home / "fault").mkdir()
    (home / "fault" / "sitecustomize.py").write_text(f"import disk\n{call}")

    def prepare():
        os.environ["PYTHONPATH"] += f":{home / 'fault'}"
        if case.work is not notebook or moment % 2:
            disk.install(str(home), fault, first)

    code = ended(begin(case.work, home, prepare))
    assert code in (0, 2) and (code == 2 or fault == "full")
    check_again(case, home)
