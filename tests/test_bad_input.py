"""Bad input on the command line: one sentence on stderr, exit code 2, nothing half done."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from afdslib import afs, backbones, cli, runs
from afdslib.base import paths
from afdslib.base.errors import AFDSError
from afdslib.experiments import DataSource, Network
from afdslib.studies import profiles
from afdslib.studies.profile import Candidates, Profile
from afdslib.studies.sweep import Study
from afdslib.training import loop
from afdslib.training.objective import Regulariser

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def refused(capsys):
    """Runs a command that must be refused; gives its sentence."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        code = cli.main(list(arguments))
        output, errors = capsys.readouterr()
        lines = [line for line in errors.splitlines() if not line.startswith(("source", "AFS source", "l2 seed"))]
        assert code == 2 and not output and len(lines) == 1 and lines[0].startswith("afds: "), (code, output, errors)
        return lines[0]

    with tiny.served():
        yield run


def small(**changes) -> Profile:
    """A study of seconds on the tiny images."""
    stage = tiny.settings(2, log_rows=2)
    profile = Profile(
        name="small", scale="quick", source=DataSource("tiny-source"), targets=(DataSource("tiny-target"),),
        network=NETWORK, source_training=stage, source_weight_decay=0.0, afs_training=stage,
        candidates=(Candidates(Regulariser("l2", 1e-4), (1e-4,)),), trial=stage, trial_seed=9,
        transfer=stage, tuning=stage, seeds=(0,), budgets=(1.0,), committed=False,
    )  # fmt: skip
    return replace(profile, **changes)


@pytest.fixture
def profile(monkeypatch):
    """`afds study --profile small` with some settings changed; a function makes a setting when it is asked for."""

    def make(**changes) -> None:
        def get(scale):
            return small(**{name: value() if callable(value) else value for name, value in changes.items()})

        monkeypatch.setitem(profiles._PROFILES, "small", get)

    make()
    return make


NETWORK = Network("resnet14", width=tiny.WIDTH)
TRAIN = ("study", "--profile", "small")


@pytest.mark.parametrize("command", ["run", "study"])
def test_unknown_profiles_and_scales(refused, command, home):
    assert "unknown profile 'huge'; known are demo" in refused(command, "--profile", "huge")
    assert "unknown scale 'all'; known are quick" in refused(command, "--profile", "demo", "--scale", "all")
    assert not (home / "runs").exists() and not (home / "figures").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"density_floor": 0.0}, r"density_floor.*\(0, 1\].*0.0"),
        ({"density_floor": 1.5}, r"density_floor.*\(0, 1\].*1.5"),
        ({"density_floor": "half"}, "density_floor.*'half'"),
        ({"budgets": (1.0, 0.0)}, "budgets must decrease from 1"),
        ({"budgets": (2.0, 1.0)}, "budgets must decrease from 1"),
        ({"budgets": ("1", "0.5")}, "budgets must decrease from 1"),
        ({"delta_s": -1.0}, "delta_s"),
        ({"candidates": lambda: (Candidates(Regulariser("afd", -1.0), (-1.0,)),)}, "lambda.*-1.0"),
        ({"candidates": lambda: (Candidates(Regulariser("afd", 0.1, features="layer9"), (0.1,)),)}, "'layer9'"),
        ({"transfer": lambda: tiny.settings(batch_size=0)}, "batch_size.*at least 1, got 0"),
        ({"transfer": lambda: tiny.settings(batch_size="8")}, "batch_size.*'8'"),
        ({"transfer": lambda: tiny.settings(steps=-5)}, "steps.*-5"),
        ({"network": Network("resnet15")}, "resnet15"),
        ({"network": Network("resnet14", width=-1.0)}, "width.*-1.0"),
        ({"network": replace(NETWORK, weights="gone.pth")}, "gone.pth"),
        ({"gates": "some"}, "'some'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_of_the_wrong_type_or_out_of_range(refused, profile, changes, words, home):
    profile(**changes)
    sentence = refused(*TRAIN)
    assert re.search(words, sentence), sentence
    assert all(run.state == "interrupted" for run in runs.list_runs()) or "gates" in changes
    assert not list(home.glob("figures/**/*.csv"))


def test_a_budget_that_is_not_in_the_sweep():
    study = Study(small())
    for budget in (0.3, "0.5", None):
        with pytest.raises(AFDSError, match="not in the sweep") as caught:
            study.transfer_run(Regulariser("l2", 0.1), 0, budget=budget)
        assert "\n" not in str(caught.value)


def test_library_calls_of_the_wrong_type(home):
    model = tiny.gated()
    statistics, loader = afs.collect_statistics(model, tiny.batches()), tiny.batches()
    for options, words in (
        ({"macs_budget": "0.5", "loader": loader}, "macs_budget"),
        ({"macs_budget": True, "loader": loader}, "macs_budget"),
        ({"delta_m": "0.5"}, "delta_m"),
        ({"delta_m": 0.5, "delta_s": "0.1"}, "delta_s"),
    ):
        with pytest.raises(AFDSError, match=words):
            afs.update_masks(model, statistics, **options)
    for density in (True, None, "1", 0, 1.01):
        with pytest.raises(AFDSError, match="density"):
            afs.set_density(model, density)


def test_a_class_with_fewer_images_than_per_class(refused, home):
    assert "class '5' has" in refused("data", "digits-5-9", "--per-class", "500")
    for name, count in (("cat", 9), ("dog", 6)):
        (home / "pets" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (32, 32), (i, i, i)).save(home / "pets" / name / f"{i}.png")
    sentence = refused("data", str(home / "pets"), "--per-class", "5")
    assert "the class 'dog' has 4 training images, fewer than per_class=5: ask for at most 4" in sentence


@pytest.mark.parametrize("content", [b"", b"not a network", None], ids=["empty", "text", "another-architecture"])
def test_a_weight_file_that_is_damaged_or_of_another_network(refused, profile, home, content):
    if content is None:
        torch.save(backbones.build("resnet18", 3, width=tiny.WIDTH).state_dict(), home / "net.pth")
    else:
        (home / "net.pth").write_bytes(content)
    network = replace(NETWORK, weights=str(home / "net.pth"))
    profile(network=network, source_training=tiny.settings(0, log_rows=1))
    assert "net.pth" in refused(*TRAIN)
    assert all(run.state == "interrupted" for run in runs.list_runs())


def test_a_loss_that_is_not_finite_names_step_and_term(refused, profile):
    profile(source_training=tiny.settings(6, lr=1e15))
    sentence = refused(*TRAIN)
    assert "'cross_entropy' is" in sentence and " at step " in sentence and "lower the learning rate" in sentence
    assert not any(run.state == "finished" for run in runs.list_runs())


def test_a_checkpoint_of_another_architecture(refused, profile, capsys):
    id = runs.run_id(Study(small()).source_run)
    folder = paths.runs() / id
    folder.mkdir(parents=True)
    other = backbones.build("resnet18", 3, width=tiny.WIDTH)
    runs.Run(id, folder, paths.runs()).save_checkpoint({"step": 1, "model": other.state_dict()})
    before = (folder / "checkpoint.pt").read_bytes()
    sentence = refused(*TRAIN)
    assert "does not fit this network" in sentence and f"afds runs rm {id}" in sentence
    assert (folder / "checkpoint.pt").read_bytes() == before  # nothing is lost
    assert cli.main(["runs", "rm", id]) == 0 and cli.main(list(TRAIN)) == 0  # the study as it is is fine
    assert "test_accuracy" in capsys.readouterr().out


def test_an_output_folder_that_cannot_be_made(refused, profile, home, monkeypatch):
    (home / "file").write_text("in the way")
    monkeypatch.setenv("AFDS_RUNS", str(home / "file" / "runs"))
    sentence = refused(*TRAIN)
    assert "cannot make the folder" in sentence and "AFDS_RUNS" in sentence


@pytest.mark.parametrize("what", ["model", "checkpoint"])
def test_a_full_disk_leaves_no_half_file_and_the_next_call_goes_on(refused, profile, home, monkeypatch, what):
    def write_some(state, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        if what == "model":
            patch.setattr("afdslib.afs.io.save_file", write_some)
        else:
            patch.setattr(loop.Throttle, "due", lambda self: True)
            patch.setattr("afdslib.runs.run._torch_save", write_some)
        assert "No space left on device" in refused(*TRAIN)
    assert not [path for path in home.rglob("*") if path.is_file() and path.read_bytes() == b"half"]
    assert cli.main(list(TRAIN)) == 0
    assert all(run.state == "finished" for run in runs.list_runs())
