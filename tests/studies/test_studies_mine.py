"""One's own images: mistakes are told before the first step; a small run ends in a report and an exported network."""

import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from test_report import execute

from afdslib import cli, runs
from afdslib import experiments as stages
from afdslib.base import paths
from afdslib.base.errors import AFDSError
from afdslib.inference.predict import predict
from afdslib.report import pipeline
from afdslib.studies import mine as own_data
from afdslib.studies import profiles
from afdslib.studies.sweep import Study

HERE = Path(__file__).parents[2]
FIGURES = (
    "accuracy_macs", "samples_target-flat", "augmentation-flat", "transfer_curves-flat", "attention-flat",
    "channel_states-flat", "parameters-flat", "confusion-flat",
)  # fmt: skip


def flat(folder: Path, *, count: int = 20) -> Path:
    """A flat ImageFolder tree of small images, a little wider than high."""
    random = np.random.RandomState(0)
    for channel, name in enumerate(tiny.CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.randint(0, 120, (tiny.SIZE, tiny.SIZE + 4, 3))
            pixels[:, :, channel] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A project with published weights, a flat tree and the notebook; stages of three steps."""
    folder = tmp_path_factory.mktemp("project")
    torch.save(tiny.network(classes=7, stem="cifar").state_dict(), folder / "weights.pth")
    flat(folder / "flat")
    shutil.copytree(HERE / "examples" / "own_data", folder / "examples" / "own_data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AFDS_HOME", str(folder))
        patch.chdir(folder)
        for name in ("AFDS_RUNS", "AFDS_FIGURES", "AFDS_FRESH"):
            patch.delenv(name, raising=False)
        patch.setattr(own_data, "STEPS", {"quick": (3, 3, 3), "standard": (4, 4, 4)})
        with mock.patch("afdslib.training.cores", lambda: 1):
            yield folder


def options(home, *, folder="flat", budget=0.45, **kwargs):
    given = {"network": "resnet14", "size": tiny.SIZE} | kwargs
    return own_data.options(home / folder, str(home / "weights.pth"), budget, **given)


COMMAND = ["run", "--profile", "mine", "--source-weights", "weights.pth", "--data-dir", "flat", "--macs-budget", "0.45"]
COMMAND += ["--network", "resnet14", "--size", "16"]


@pytest.fixture(scope="module")
def done(home):
    """The command of the documentation, with the notebook's cells run here instead of in a kernel."""
    said, given = [], []

    def executed(profile, parameters, *, only, fresh, verbose, echo, folder):
        given.append((profile, parameters, only, folder))
        (file,) = pipeline.notebooks(folder)
        text = file.read_text()
        assert text.count('profile = \\"demo\\"') == 1
        file.write_text(text.replace('profile = \\"demo\\"', f'profile = \\"{profile}\\"'))
        said.append(execute(file))

    with mock.patch.object(pipeline, "execute", executed), mock.patch.object(cli, "echo", said.append):
        assert cli.main(COMMAND) == 0
    return said, given


# what is told before the first step


@pytest.mark.parametrize(
    "changed, told",
    [
        (("--data-dir", "nowhere"), "the data folder nowhere does not exist"),
        (("--data-dir", "flat/red"), "no ImageFolder tree of at least two classes"),
        (("--data-dir", None), "the profile mine needs --data-dir, as in: afds run"),
        (("--source-weights", None), "needs --source-weights, as in"),
        (("--source-weights", "absent.pth"), "There is no weight file"),
        (("--macs-budget", None), "needs --macs-budget"),
        (("--macs-budget", "0"), "above 0 and at most 1, not 0"),
        (("--macs-budget", "1.5"), "above 0 and at most 1, not 1.5"),
        (("--macs-budget", "nan"), "above 0 and at most 1, not nan"),
        (("--network", "resnet999"), "'resnet999' is unknown; known are"),
        (("--network", "resnet50"), "these are weights of another network"),
        (("--size", "3"), "--size"),
        (("--scale", "huge"), "unknown scale 'huge'"),
        (("--profile", "demo"), "--source-weights is for --profile mine only"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_with_exit_code_2_and_starts_nothing(home, capsys, changed, told):
    given = dict(zip(COMMAND[1::2], COMMAND[2::2], strict=True)) | dict([changed])
    arguments = [part for name, value in given.items() if value is not None for part in (name, value)]
    before = set(home.rglob("settings.json"))
    with mock.patch.object(pipeline, "execute", side_effect=AssertionError("started")):
        assert cli.main(["run", *arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("afds: ") and errors.count("\n") == 1 and told in errors
    assert set(home.rglob("settings.json")) == before


def test_too_few_images_are_refused(home):
    flat(home / "few", count=2)
    with pytest.raises(AFDSError, match="at least 4 images"):
        options(home, folder="few")


def test_show_and_dry_run_write_nothing(home, capsys):
    before = set(home.rglob("settings.json"))
    for option, words in (("--show", '"budgets"'), ("--dry-run", "budgets: 1, 0.7 of the dense MACs")):
        assert cli.main([*COMMAND, "--macs-budget", "0.7", option]) == 0
        assert words in capsys.readouterr().out
    assert set(home.rglob("settings.json")) == before


# the profile


def test_the_profile_is_two_methods_from_published_weights_at_halved_budgets_without_a_source_step(home):
    o = options(home)
    profile = own_data.mine(o)
    assert (o.stem, o.width) == ("cifar", tiny.WIDTH)  # those of the weight file
    assert profile.network == stages.Network("resnet14", "cifar", tiny.WIDTH, str(home / "weights.pth"))
    assert [c.regulariser.name for c in profile.candidates] == ["l2", "afd"]
    assert len({len(c.strengths) for c in profile.candidates}) == 1  # both are tuned equally long
    assert profile.source_training.steps == profile.afs_training.steps == 0
    assert not profile.committed and profile.left_out == ("06", "07")
    for last, others in {0.2: (0.5, 0.25), 0.45: (), 0.1: (0.5, 0.25, 0.125)}.items():
        assert own_data.mine(replace(o, macs_budget=last)).budgets == (1.0, *others, last)
    assert own_data.mine(replace(o, macs_budget=1.0)).budgets == (1.0,)


def test_the_name_stands_for_options_images_and_weights(home):
    first = options(home)
    assert first.name == options(home).name and first.name.startswith("mine-flat-")
    assert first.name != options(home, budget=0.46).name
    other = tiny.network(1, classes=7, stem="cifar").state_dict()
    torch.save(other, home / "other.pth")
    shutil.copy(home / "weights.pth", home / "kept.pth")
    try:
        shutil.copy(home / "other.pth", home / "weights.pth")
        changed = options(home)
    finally:
        shutil.copy(home / "kept.pth", home / "weights.pth")
    assert changed.name != first.name
    made = [own_data.mine(o) for o in (first, changed)]
    ids = {runs.run_id(stages.SourceRun(p.source, p.network, p.source_training)) for p in made}
    assert len(ids) == 2


def test_a_changed_tree_is_another_profile_and_other_runs(home):
    folder = flat(home / "growing")
    before = options(home, folder="growing")
    own_data.keep(before)
    assert profiles.get(before.name) == own_data.mine(before)
    shutil.copy(folder / "red" / "0.png", folder / "red" / "another.png")
    with pytest.raises(AFDSError, match="have changed since the profile"):
        profiles.get(before.name)
    after = options(home, folder="growing")
    assert after.name != before.name
    assert own_data.mine(after).targets[0] != own_data.mine(before).targets[0]


def test_a_data_source_without_a_hash_of_its_content_keeps_its_identity():
    for content, there in (("", False), ("1", True)):
        assert ("content" in runs.to_json(stages.DataSource("digits", content=content), hashed_only=True)) is there


@pytest.mark.parametrize(
    "name, arguments, told",
    [
        ("mine", {}, "is made from options, by: afds run"),
        ("mine-x-123456", {}, "there is no profile 'mine-x-123456' yet"),
        (None, {"scale": "standard"}, "has its own scale and images"),
        (None, {"data_dir": "."}, "has its own scale and images"),
    ],
)
def test_a_profile_that_cannot_be_had_by_name_is_refused(home, name, arguments, told):
    o = options(home)
    own_data.keep(o)
    with pytest.raises(AFDSError, match=told):
        profiles.get(name or o.name, **arguments)


def test_damaged_settings_are_refused(home):
    o = options(home)
    file = own_data.keep(o)
    for text in ("{", "[]", "{}", file.read_text().replace("0.45", "0.5")):
        file.write_text(text)
        with pytest.raises(AFDSError, match="delete it and give the command again"):
            own_data.get(o.name)
    own_data.keep(o)
    assert own_data.get(o.name) == own_data.mine(o)


# the run


def test_the_command_executes_its_own_notebook_for_the_profile_it_made(done, home):
    name = options(home).name
    assert done[1] == [(name, {}, {"01"}, home / "examples" / "own_data")]
    assert done[0][0] == f"profile {name}"


def test_the_report_has_the_figures_and_its_statements_hold(done, home):
    shown, name = done[0][1], options(home).name
    drawn = [file.stem for file in paths.figures(name).glob("*.png")]
    assert {stem for stem in drawn if ".phone" not in stem} == set(FIGURES)
    assert "every planned network is in the table: True" in shown
    assert "AFD adds strength x regulariser to the loss: True" in shown
    assert "the gates decide, and what they skip is exactly zero: True" in shown
    assert "AFD minus L2" in shown and "**2.22x**, flat" in shown
    sweep = Study(profiles.get(name)).sweep()
    assert sweep.groupby("method").budget.apply(list).to_dict() == {m: [1.0, 0.45] for m in ("l2", "afd")}
    assert (sweep[sweep.budget == 0.45].train_macs <= 0.5).all()


def test_the_exported_network_lies_by_the_report_and_knows_the_classes(done, home):
    file = paths.figures(options(home).name) / "flat-0.45.onnx"
    assert done[0][-1] == f"use it: afds predict --model {file} IMAGE..."
    assert f"network: {file}, by " in done[0][-2] and "of the dense MACs, test accuracy" in done[0][-2]
    ((_, classes),) = predict([home / "flat" / "red" / "0.png"], file)
    assert sorted(name for name, _ in classes) == sorted(tiny.CLASSES)
    assert sum(share for _, share in classes) == pytest.approx(1)


def test_validation_images_choose_the_network_at_the_wanted_budget_and_a_lost_one_is_told():
    names = ("method", "seed", "budget", "validation_accuracy")
    rows = [("l2", 0, 1.0, 0.9), ("l2", 0, 0.2, 0.5), ("afd", 0, 0.2, 0.6), ("afd", 1, 0.2, 0.6)]
    table = pd.DataFrame(rows, columns=names)
    assert own_data.chosen(table, 0.2).to_dict()["method"] == "afd" and own_data.chosen(table, 0.2).seed == 0
    table.attrs["missing"] = [{"reason": "at 50x, too small"}]
    with pytest.raises(AFDSError, match="no network reached 0.02 of the dense MACs .at 50x, too small."):
        own_data.chosen(table, 0.02)


def test_the_notebook_reads_from_top_to_bottom_and_takes_one_parameter():
    (file,) = pipeline.notebooks(HERE / "examples" / "own_data")
    assert pipeline.parameters_of(file) == {"profile": "demo"}
    cells = pipeline._read(file).cells
    assert cells[0].source.startswith("# ") and all(word in cells[1].source for word in ("Needs", "Makes", "Costs"))
    assert all(len(cell.source.splitlines()) <= 12 for cell in cells if cell.cell_type == "code")
