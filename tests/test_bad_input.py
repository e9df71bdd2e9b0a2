"""Bad input on the command line: one sentence on stderr, exit code 2, nothing half done."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from afdslib import backbones, cli, runs
from afdslib.experiments import DataSource, Network
from afdslib.studies import profiles
from afdslib.studies.profile import Candidates, Profile
from afdslib.training import loop
from afdslib.training.objective import Regulariser

pytestmark = pytest.mark.usefixtures("home")


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
    with tiny.served():
        yield make


NETWORK = Network("resnet14", width=tiny.WIDTH)
TRAIN = ("study", "--profile", "small")


@pytest.mark.parametrize("command", ["run", "study"])
def test_unknown_profiles_and_scales(refused, command, home):
    assert "unknown profile 'huge'; known are demo" in refused(command, "--profile", "huge")
    assert "unknown scale 'all'; known are quick" in refused(command, "--profile", "demo", "--scale", "all")
    assert not (home / "runs").exists() and not (home / "figures").exists()


@pytest.mark.parametrize(("changes", "words"), [
    ({"density_floor": 1.5}, r"density_floor.*\(0, 1\].*1.5"), ({"density_floor": "half"}, "density_floor.*'half'"),
    ({"budgets": (2.0, 1.0)}, "budgets must decrease from 1"), ({"budgets": ("1", "0.5")}, "budgets must decrease"),
    ({"delta_s": -1.0}, "delta_s"), ({"gates": "some"}, "'some'"), ({"network": Network("resnet15")}, "resnet15"),
    ({"candidates": lambda: (Candidates(Regulariser("afd", -1.0), (-1.0,)),)}, "lambda.*-1.0"),
    ({"candidates": lambda: (Candidates(Regulariser("afd", 0.1, features="layer9"), (0.1,)),)}, "'layer9'"),
    ({"transfer": lambda: tiny.settings(batch_size=0)}, "batch_size.*at least 1, got 0"),
    ({"network": Network("resnet14", width=-1.0)}, "width.*-1.0"),
    ({"network": replace(NETWORK, weights="gone.pth")}, "gone.pth"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_settings_of_the_wrong_type_or_out_of_range(refused, profile, changes, words, home):
    profile(**changes)
    sentence = refused(*TRAIN)
    assert re.search(words, sentence), sentence
    assert all(run.state == "interrupted" for run in runs.list_runs()) or "gates" in changes
    assert not list(home.glob("figures/**/*.csv"))


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


def test_a_full_disk_leaves_no_half_file_and_the_next_call_goes_on(refused, profile, home, monkeypatch, capsys):
    def write_some(state, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(loop.Throttle, "due", lambda self: True)
    for place in ("afdslib.afs.io.save_file", "afdslib.runs.run._torch_save"):  # of the network, of the checkpoint
        with monkeypatch.context() as patch:
            patch.setattr(place, write_some)
            assert "No space left on device" in refused(*TRAIN)
        assert not [path for path in home.rglob("*") if path.is_file() and path.read_bytes() == b"half"]
    assert cli.main(list(TRAIN)) == 0 and "test_accuracy" in capsys.readouterr().out
    assert all(run.state == "finished" for run in runs.list_runs())
