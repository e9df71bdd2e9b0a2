"""One's own images: mistakes are told before the first step; a small run ends in a report and an exported network."""

import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
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

HERE = Path(__file__).parents[2]
FIGURES = ("accuracy_cost", "confusion", "mistakes", "samples")


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
        (("--data-dir", "one"), "at least two classes (1 there)"),
        (("--data-dir", "few"), "the class 'red' has 3 images, 3 of them for training, where 5 are needed"),
        (("--source-weights", None), "there are no ImageNet weights"),
        (("--source-weights", "absent.pth"), "There is no weight file"),
        (("--macs-budget", "1e-6"), "the budget 1e-06 cannot be reached: one channel in each layer"),
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
    if changed[1] in ("one", "few") and not (home / changed[1]).exists():
        flat(home / changed[1])
        gone = (home / "one").glob("[!r]*") if changed[1] == "one" else (home / "few" / "red").glob("1?.png")
        for path in gone:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for number in range(3, 10) if changed[1] == "few" else ():
            (home / "few" / "red" / f"{number}.png").unlink()
    given = dict(zip(COMMAND[1::2], COMMAND[2::2], strict=True)) | dict([changed])
    arguments = [part for name, value in given.items() if value is not None for part in (name, value)]
    before = set(home.rglob("settings.json"))
    with mock.patch.object(pipeline, "execute", side_effect=AssertionError("started")):
        assert cli.main(["run", *arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("afds: ") and errors.count("\n") == 1 and told in errors
    assert set(home.rglob("settings.json")) == before


def test_a_dry_run_fetches_nothing_and_names_what_is_missing(home, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", mock.Mock(side_effect=AssertionError("fetched")))
    monkeypatch.setenv("TORCH_HOME", str(home / "hub"))
    given = ["--data-dir", "flat", "--network", "resnet18", "--source-weights", "imagenet", "--size", "16"]
    assert cli.main(["run", "--profile", "mine", *given, "--dry-run"]) == 0
    assert "resnet18-f37072fd.pth, which is fetched from https://" in capsys.readouterr().err


def test_a_video_among_the_photographs_is_named_and_left_out(home):
    (flat(home / "mixed") / "red" / "clip.mp4").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="left out, being no images of a class: 1 file .red/clip.mp4"):
        assert options(home, folder="mixed").images


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(home, capsys, monkeypatch):
    (home / "file").touch()
    monkeypatch.setenv("AFDS_FIGURES", str(home / "file"))
    with mock.patch.object(own_data, "compute", side_effect=AssertionError("started")):
        assert cli.main(COMMAND) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("afds: cannot write") and errors.count("\n") == 1


def test_show_and_dry_run_write_nothing(home, capsys):
    before = set(home.rglob("settings.json"))
    for option, words in (("--show", '"budgets"'), ("--dry-run", "1 runs, 0 finished, 3 steps to go")):
        assert cli.main([*COMMAND, "--macs-budget", "0.7", option]) == 0
        assert words in capsys.readouterr().out
    assert set(home.rglob("settings.json")) == before


# the profile


def test_the_profile_is_one_network_from_published_weights_at_falling_budgets_without_a_source_step(home):
    o = options(home)
    profile = own_data.mine(o)
    assert (o.stem, o.width) == ("cifar", tiny.WIDTH)  # those of the weight file
    assert profile.network == stages.Network("resnet14", "cifar", tiny.WIDTH, str(home / "weights.pth"))
    assert profile.source_training.steps == profile.afs_training.steps == 0
    assert not profile.committed and profile.left_out == ("06", "07")
    for last, others in {0.2: (0.765, 0.585, 0.447, 0.342, 0.262), 0.45: (0.766, 0.587), 0.8: ()}.items():
        assert own_data.mine(replace(o, macs_budget=last)).budgets == (1.0, *others, last)
    alone = own_data.Recipe(own_data.mine(replace(o, macs_budget=1.0)))
    assert alone.ways == {} and alone.chosen == [alone.unpruned]


def test_small_images_are_a_way_down_where_they_are_above_the_budget(home):
    recipe = own_data.Recipe(own_data.mine(replace(options(home, size=128), macs_budget=0.2)))
    assert {side: [run.budgets[-1] for run in chain] for side, chain in recipe.ways.items()} == {
        128: [0.765, 0.585, 0.447, 0.342, 0.262, 0.2], 96: [0.447, 0.342, 0.262, 0.2], 64: [0.2]
    }  # fmt: skip
    assert {run.side for run in recipe.ways[64]} == {64} and recipe.ways[128][0].side == 0


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
    assert done[0][0].startswith(f"profile {name}: resnet14 at 16 px, as this is a CPU")


def test_the_report_has_the_figures_and_its_statements_hold(done, home):
    shown, name = done[0][-1], options(home).name
    drawn = [file.stem for file in paths.figures(name).glob("*.png")]
    assert {stem for stem in drawn if ".phone" not in stem} == set(FIGURES)
    assert "the budget is met: True" in shown and "the file is as accurate as the network: True" in shown
    recipe = own_data.Recipe(profiles.get(name))
    last = runs.lookup(recipe.chosen[-1])
    assert isinstance(recipe.chosen[-1], stages.PrunedRun) and recipe.chosen[-1].unpruned == recipe.unpruned
    assert last.metrics["macs"] <= 0.45 and last.metrics["steps"] == 3
    assert f"{last.metrics['test_accuracy']:.1%}" in shown


def test_the_files_lie_by_the_report_and_know_the_classes_and_the_command_goes_on_where_it_was(done, home):
    folder, recipe = paths.figures(options(home).name), own_data.Recipe(profiles.get(options(home).name))
    said = "\n".join(done[0])
    assert "[5/5] the best one, trained on: right on" in said and "min left" in said
    found = own_data.deliver(recipe)
    assert [(f["file"], f["precision"]) for f in found["files"]] == [
        ("flat-0.45.onnx", "fp32"), ("flat-0.45-int8.onnx", "int8")
    ]  # fmt: skip
    for one in found["files"]:
        file = folder / one["file"]
        assert f"network: {file} ({one['precision']}" in said
        ((_, classes),) = predict([home / "flat" / "red" / "0.png"], file)
        assert sorted(name for name, _ in classes) == sorted(tiny.CLASSES)
        assert sum(share for _, share in classes) == pytest.approx(1)
    again = []
    with mock.patch.object(runs, "get_or_run", side_effect=AssertionError("trained again")):
        own_data.compute(recipe, again.append)
    assert len(again) == 5 and own_data.deliver(recipe) == found


def test_validation_images_choose_the_way_and_one_that_diverged_is_passed_over(home, monkeypatch):
    recipe = own_data.Recipe(own_data.mine(replace(options(home, size=128), macs_budget=0.2)))
    known = {128: {"validation_accuracy": 0.5}, 96: {"diverged": "at 5x, too small"}, 64: {"validation_accuracy": 0.6}}
    found = {id(chain[-1]): mock.Mock(metrics=known[side]) for side, chain in recipe.ways.items()}
    other = mock.Mock(metrics={"validation_accuracy": 0.7})
    monkeypatch.setattr(own_data.engine, "lookup", lambda run: found.get(id(run), other))
    assert recipe.side == 64 and recipe.chosen[-1].side == 64 and recipe.chosen[-1].tuning == recipe.profile.tuning
    for one in found.values():
        one.metrics = {"diverged": "at 5x, too small"}
    with pytest.raises(AFDSError, match="no network reached the budget .at 5x, too small"):
        _ = recipe.side


def test_the_notebook_reads_from_top_to_bottom_and_takes_one_parameter():
    (file,) = pipeline.notebooks(HERE / "examples" / "own_data")
    assert pipeline.parameters_of(file) == {"profile": "demo"}
    cells = pipeline._read(file).cells
    assert cells[0].source.startswith("# ") and all(word in cells[1].source for word in ("Needs", "Makes", "Costs"))
    assert all(len(cell.source.splitlines()) <= 12 for cell in cells if cell.cell_type == "code")
