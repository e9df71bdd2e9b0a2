"""The command line: one line and exit code 2 for every mistake, and the run store, notebooks and machine at hand."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from toy_runs import ToySource, ToyTrain

from afdslib import __version__, cli, runs
from afdslib.base import paths
from afdslib.base.errors import AFDSError
from afdslib.report import pipeline
from afdslib.studies import engine, mine, parts, profiles, sweep

RUN = ["run", "--profile", "tiny"]


@pytest.fixture(autouse=True)
def project(home):
    """A project with two notebooks and a study of its own."""
    (home / "notebooks").mkdir()
    for name in ("01_first", "02_last"):
        node = new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}})
        parameters = 'profile = "demo"\nscale = "quick"\ndata_dir = ""\nseeds = 1'
        node.cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), new_code_cell("print(seeds)")]
        nbformat.write(node, home / "notebooks" / f"{name}.ipynb")
    return home


class Chosen(tuple):
    left_out = ()
    committed = False


class Recorded:
    """A plan that says what it is asked for."""

    def __init__(self, profile):
        self.profile = profile
        self.describe, self.show, self.summary = (
            lambda said=said: f"{said} {profile}" for said in ("planned", "shown", "summed up")
        )


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Stand-ins for the study, which record what the command line asks of it."""
    made: list = []

    def get(name, scale="quick", data_dir=""):
        if name != "tiny":
            raise AFDSError(f"there is no profile {name!r}; take tiny")
        return Chosen((name, scale or "quick", data_dir or ""))

    monkeypatch.setattr(profiles, "get", get)
    monkeypatch.setattr(profiles, "show", lambda profile: f"shown {profile}")
    monkeypatch.setattr(sweep, "Study", Recorded)
    monkeypatch.setattr(parts, "Study", Recorded)
    monkeypatch.setattr(engine, "compute", lambda plan, workers: made.append((plan.profile, workers)))
    return made


@pytest.fixture
def afds(capsys):
    """Runs a command: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()  # what the test itself has printed
        return cli.main(list(arguments)), *capsys.readouterr()

    return run


@pytest.fixture
def executed(monkeypatch):
    """What `pipeline.execute` is called with; no kernel starts."""
    seen: list = []
    monkeypatch.setattr(pipeline, "execute", lambda profile, parameters, **options: seen.append((profile, parameters)))
    return seen


def test_notebooks_that_a_budget_leaves_out_are_executed_by_their_number(afds, monkeypatch):
    asked: list = []
    monkeypatch.setattr(pipeline, "execute", lambda profile, parameters, *, only, **options: asked.append(only))
    monkeypatch.setattr(Chosen, "left_out", ("01",))
    assert "left out of this scale, because it takes hours: --notebook 01" in afds(*RUN)[1]
    assert "left out" not in afds(*RUN, "--notebook", "01")[1] and asked == [{"02"}, {"01"}]


@pytest.mark.parametrize("arguments, told", [
    (["rn"], "No such command 'rn'"), (["run"], "Missing option '--profile'"), (["train"], "No such command 'train'"),
    (["run", "--profile"], "requires an argument"), (["run"], "See: afds run --help"), (["resume", "abc"], "no run in"),
    (["runs", "show"], "See: afds runs show --help"), (["runs", "show", "abc"], "no run in"),
    (["study", "--part", "x"], "unknown part 'x' of a study; known are sweep, comparison"),
    (["publish", "--profile", "tiny"], "are never committed"), ([*RUN, "--nonsense"], "No such option: --nonsense"),
    ([*RUN, "--set", "profil=x", "--dry-run"], "no notebook has a parameter 'profil'"),
    (["run", "--profile", "huge"], "there is no profile 'huge'"), (["data", "unheard-of"], "unheard-of"),
    ([*RUN, "--data-dir", "nowhere"], "the data folder nowhere does not exist"),
    ([*RUN, "--set", "seeds"], "--set 'seeds' is not of the form NAME=VALUE"),
    ([*RUN, "--set", "seeds=1", "--set", "seeds=2"], "seeds is given twice"),
    ([*RUN, "--set", "profile=x"], "profile is given twice"),
    ([*RUN, "--scale", "a", "--set", "scale=b"], "scale is given twice"),
    ([*RUN, "--set", "seeds=many"], "parameter seeds = 'many' must be of type int"),
    ([*RUN, "--set", "sseeds=2"], "no notebook has a parameter 'sseeds'"),
    ([*RUN, "--notebook", "77"], "there is no notebook '77'"), (["runs", "rm", "../../x"], "is not a run id"),
    (["report", "--profile", "tiny"], "profile tiny has no finished report yet"),
    (["study", "--profile", "huge"], "there is no profile 'huge'"),
    (["data", "digits", "--per-class", "many"], "--per-class"), (["data", "digits", "--per-class", "0"], "per_class"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_mistake_is_one_line_on_stderr_and_exit_code_2(refused, arguments, told):
    assert told in refused(*arguments)


def test_operating_system_errors_and_interrupts_have_their_exit_codes_and_bugs_are_not_hidden(afds, monkeypatch):
    denied = PermissionError(13, "Permission denied", "/some/folder")
    monkeypatch.setattr(runs, "list_runs", mock.Mock(side_effect=[denied, KeyboardInterrupt, ZeroDivisionError]))
    assert afds("runs", "list") == (2, "", "afds: Permission denied: /some/folder\n")
    code, _, errors = afds("runs", "list")
    assert code == 130 and errors.count("\n") == 1 and "interrupted" in errors
    with pytest.raises(ZeroDivisionError):
        afds("runs", "list")


def test_help_and_version(afds):
    code, output, _ = afds()
    assert code == 0
    for command in ("run", "study", "publish", "resume", "runs", "data", "report", "doctor"):
        assert f"\n  {command} " in output
    assert afds("--version") == (0, f"afds {__version__}\n", "")


def test_options_and_settings_become_notebook_parameters_and_show_and_dry_run_execute_nothing(afds, executed):
    assert afds(*RUN, "--show")[:2] == (0, "shown ('tiny', 'quick', '')\n")
    options = ("--scale", "standard", "--data-dir", ".", "--dry-run")
    assert afds(*RUN, *options)[:2] == (0, "planned ('tiny', 'standard', '.')\n") and not executed
    assert afds(*RUN, "--scale", "b", "--data-dir", ".", "--set", "seeds=3", "--set", "x=a=b")[0] == 0
    afds(*RUN)
    assert executed == [("tiny", {"scale": "b", "data_dir": ".", "seeds": "3", "x": "a=b"}), ("tiny", {})]


def test_run_executes_the_notebooks_and_report_renders_them_again(afds):
    code, output, errors = afds("run", "--profile", "tiny", "--set", "seeds=41", "--verbose")
    assert code == 0, errors
    assert output.count("41\n") == 2 and "[2/2] 02_last: done" in output
    report = paths.figures("tiny") / "report.html"
    report.unlink()
    assert afds("report", "--profile", "tiny")[:2] == (0, f"{report}\n") and report.exists()
    assert afds("run", "--profile", "tiny", "--set", "seeds=41")[1].count("finished before") == 2


def test_required_training_must_have_happened_in_the_store(afds, refused, executed):
    assert "no training step was taken" in refused(*RUN, "--require-training")
    runs.get_or_run(ToyTrain())
    assert afds(*RUN, "--require-training")[:2] == (0, "training steps: ToyTrain 6\n")
    runs.get_or_run(ToySource(steps=0))
    assert "ToySource took no training step" in refused(*RUN, "--require-training")


def test_study_computes_a_part_or_only_says_what_is_there(afds, calls):
    assert afds("study", "--profile", "tiny", "--workers", "2")[:2] == (0, "summed up ('tiny', 'quick', '')\n")
    assert afds("study", "--profile", "tiny", "--scale", "standard")[0] == 0
    assert calls == [(("tiny", "quick", ""), 2), (("tiny", "standard", ""), None)]
    for option, said in (("--finished", "summed up"), ("--show", "shown"), ("--dry-run", "planned")):
        assert afds("study", "--profile", "tiny", option)[:2] == (0, f"{said} ('tiny', 'quick', '')\n")
    assert len(calls) == 2


def test_the_command_that_is_printed_can_be_pasted(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("AFDS_FIGURES", str(tmp_path / "my figures"))
    point = {"test_accuracy": 0.4, "macs": 1.0}
    file = {"file": "a-0.4.onnx", "precision": "fp32", "bytes": 1, "accuracy": 0.4, "milliseconds": 1.0}
    for name in ("Recipe", "compute"):
        monkeypatch.setattr(mine, name, mock.Mock())
    monkeypatch.setattr(mine, "deliver", lambda recipe: {"points": [point], "files": [file]})
    profile = mock.Mock()
    profile.name = "mine-a"
    cli._train_mine(profile)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("use it: ")]
    assert str(paths.figures("mine-a") / "a-0.4.onnx") in shlex.split(line.removeprefix("use it: "))


def test_runs_are_listed_shown_and_deleted(afds):
    assert afds("runs", "list")[1].endswith(f"0 runs in {paths.runs()}\n")
    code, _, errors = afds("runs", "list", "--require-training")
    assert code == 2 and "no training step was taken" in errors
    first = runs.get_or_run(ToyTrain())
    parent = runs.get_or_run(ToySource())
    (paths.runs() / "0123456789ab").mkdir()
    (paths.runs() / "0123456789ab" / "config.json").write_text('{"class": "Forgotten"}')
    _, output, _ = afds("runs", "list", "--require-training")
    assert afds("runs", "list")[1] in output
    lines = output.splitlines()
    assert lines[0].split() == ["id", "kind", "state", "steps", "time"]
    rows = {line.split()[0]: line.split()[1:4] for line in lines[1:4]}
    assert rows[first.id] == ["ToyTrain", "finished", "6"] and rows[parent.id] == ["ToySource", "finished", "3"]
    assert rows["0123456789ab"] == ["Forgotten", "interrupted", "-"]
    assert lines[-1] == "training steps: ToySource 3, ToyTrain 6"
    assert json.loads(afds("runs", "show", first.id[:5])[1])["result"]["metrics"] == first.metrics
    code, output, _ = afds("runs", "rm", first.id, parent.id, "0123")
    assert code == 0 and output.count("deleted") == 3 and not runs.list_runs()


def test_resume_continues_a_run_and_prints_its_metrics(afds, refused, monkeypatch):
    whole = runs.get_or_run(ToyTrain(), store=paths.root() / "whole")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(runs.Run, "write_artifact", lambda *_: 1 / 0)
        runs.get_or_run(ToyTrain())
    code, output, _ = afds("resume", whole.id[:6])
    assert code == 0 and json.loads(output[output.index("{") :]) == whole.metrics and "step 1\n" not in output
    (paths.runs() / whole.id / "result.json").write_text("{")
    assert f"afds runs rm {whole.id}" in refused("resume", whole.id)


def test_doctor_tells_versions_device_kernel_folders_and_data_which_data_describes(afds):
    rows = {line.split()[0]: line for line in afds("doctor")[1].splitlines()}
    assert rows["python"].split()[2] == sys.version.split()[0] and sys.executable in rows["python"]
    assert "embedded" in rows["digits"] and "missing" in rows["food-101"] and "afds data food-101" in rows["food-101"]
    assert str(paths.runs()) in rows["run"] and "ok" in rows["kernel"] and "cores" in rows["cpu"]
    assert not paths.runs().exists()
    code, output, errors = afds("data", "digits-5-9", "--per-class", "12")
    assert code == 0 and "train" in output and "60" in output.split(), errors


def python(*arguments: str) -> subprocess.Popen:
    """This interpreter with this package, wherever it is started."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *arguments], env=environment, stdout=pipe, stderr=pipe, text=True)


def test_program_starts_without_the_heavy_packages_and_exits_with_2_and_one_line():
    code = "import sys, afdslib.cli; print([name for name in ('torch', 'lightning', 'pandas') if name in sys.modules])"
    assert python("-c", code).communicate(timeout=60) == ("[]\n", "")
    process = python("-m", "afdslib.cli", "runs", "rm", "no-such-run")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and output == "" and errors.startswith("afds: ") and errors.count("\n") == 1


def test_killed_report_goes_on_after_its_last_finished_notebook(project):
    """SIGKILL while the second notebook runs; its kernel ends, too."""
    last = project / "notebooks" / "02_last.ipynb"
    node = nbformat.read(last, as_version=4)
    code = "import os, pathlib, time\npathlib.Path('kernel').write_text(str(os.getpid()))\n"
    node.cells.append(new_code_cell(f"{code}while not pathlib.Path('go').exists():\n    time.sleep(0.05)"))
    nbformat.write(node, last)
    process = python("-c", "from afdslib.report import pipeline; pipeline.execute('tiny')")
    wait_for(lambda: (project / "kernel").exists() and (project / "kernel").read_text())
    process.kill()
    process.communicate()
    status = Path("/proc", (project / "kernel").read_text(), "status")
    wait_for(lambda: not status.exists() or "\nState:\tZ" in status.read_text())
    assert [stage.finished for stage in pipeline.plan("tiny")] == [True, False]
    (project / "go").touch()
    lines: list[str] = []
    report = pipeline.execute("tiny", echo=lines.append)
    assert lines[0].endswith("01_first: finished before") and report.exists()
    assert not list(report.parent.glob("executed/.*"))


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
