"""Exported files: onnxruntime agrees with torch, files say what goes in and comes out, bad ones are one sentence."""

import copy
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import random_networks as random
import tiny
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from afdslib import afs, backbones, cli, runs
from afdslib.afs.compact import compact
from afdslib.backbones.inputs import RAW, set_input
from afdslib.base.errors import AFDSError
from afdslib.data.images import MEAN, STD
from afdslib.inference import export, gates, maps, predict


class Block(nn.Module):
    """Every kind of layer of a gated network, small enough to be exported in a test."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.b, self.bn_b = nn.Conv2d(12, 12, 3, padding=1, groups=4), nn.BatchNorm2d(12)
        self.c, self.bn_c = nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.bn_a(self.a(x)).relu()
        x = (x + self.bn_b(self.b(x))).relu()
        x = (x + self.bn_c(self.c(x))).relu()
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def gated() -> nn.Module:
    """Dynamic channels that compete, static and removed ones, in float32."""
    torch.manual_seed(0)
    model = random.gated(afs.convert(random.randomised(Block(), zeros=False)), 12)
    model.a.m[:2], model.b.m[5:8], model.c.m[0], model.c.m[9:] = 0, 0, 0, 0
    model.a.s[4:6], model.c.s[:] = 0, 0
    afs.set_density(model, 0.5)
    return model.float()


def outputs(file: Path, images: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(export.session(file).run(None, {"image": images.numpy()})[0])


def test_plain_operations_compute_what_the_gates_do(gated):
    for model in (gated.double(), compact(gated.double(), input_size=(3, 12, 12))):
        frozen = gates.inference(model)
        assert random.difference(frozen, model, random.images(12)) <= 1e-12
        assert any(isinstance(m, gates.GatedInference) for m in frozen.modules())
        assert not any(isinstance(m, afs.AFSConvBN) for m in frozen.modules())
    gated.float()


@pytest.mark.slow
def test_an_export_is_checked_on_the_images_that_are_given(tmp_path):
    class Narrow(torch.nn.Module):
        def forward(self, images):
            return (1 / (images.amax((2, 3)) < 0.5).float()).relu()  # finite on dark images only

    with pytest.raises(AFDSError, match="not finite"):
        export.save_onnx(Narrow().eval(), tmp_path / "net.onnx", (3, 8, 8))
    dark = torch.rand(3, 3, 8, 8) / 4
    assert export.save_onnx(Narrow().eval(), tmp_path / "net.onnx", (3, 8, 8), images=dark) == 0


@pytest.mark.parametrize("kind", ["gated", "compact"])
@pytest.mark.slow
def test_onnx_files_agree_with_torch_for_any_batch(gated, kind, tmp_path):
    model = gated if kind == "gated" else compact(gated, input_size=(3, 12, 12), fold_bn=True)
    card = export.Card(tuple("abcde"), 12, 14, network="block")
    worst = export.save_onnx(model, tmp_path / "net.onnx", (3, 12, 12), card=card)
    assert 0 < worst <= export.TOLERANCE
    file = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(file)
    assert [o.version for o in file.opset_import if o.domain == ""] == [export.OPSET]
    said = json.loads({p.key: p.value for p in file.metadata_props}[export.KEY])
    assert said["opset"] == export.OPSET and said["classes"] == list("abcde") and said["resize"] == 14
    for count in (1, 2, 5):
        images = random.images(12, count, seed=count).float()
        found, wanted = outputs(tmp_path / "net.onnx", images), model(images).detach()
        assert found.shape == (count, 5)
        assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]  # weights inside, no rest of writing


@pytest.mark.slow
def test_ties_go_to_the_lowest_index_in_onnxruntime_too(tmp_path):
    torch.manual_seed(0)
    model = afs.convert(random.randomised(Block(), zeros=False)).float().eval()
    for layer in afs.layers(model).values():
        nn.init.ones_(layer.predictor.bias)  # all importances are equal
    afs.set_density(model, 0.25)
    export.save_onnx(model, tmp_path / "net.onnx", (3, 12, 12))
    images = random.images(12).float()
    assert torch.allclose(outputs(tmp_path / "net.onnx", images), model(images).detach(), rtol=1e-4, atol=1e-4)
    wide = afs.convert(backbones.build("resnet14", 3, width=0.5)).eval()  # wide enough for topk to take others
    for layer in afs.layers(wide).values():
        nn.init.zeros_(layer.predictor.weight), nn.init.ones_(layer.predictor.bias)
    afs.set_density(wide, 0.3)
    x = random.images(32).float()
    assert random.difference(gates.inference(wide), wide, x) <= 1e-5


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.slow
def test_what_would_be_wrong_is_refused_in_one_sentence_and_not_written(gated, tmp_path, monkeypatch):
    def refused(model, sentence, **options):
        with pytest.raises(AFDSError, match=sentence) as caught:
            export.save_onnx(model, tmp_path / "net.onnx", (3, 12, 12), **options)
        assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())

    refused(tiny.network(), r"train mode.*model.eval\(\)")
    refused(Branches().eval(), "torch.onnx cannot export Branches")
    refused(gated, "cannot write opset 11 here", opset=11)
    broken = copy.deepcopy(gated)
    broken.fc.weight.data[0, 0] = float("nan")
    refused(broken, "outputs are not finite")
    monkeypatch.setattr(export, "TOLERANCE", 0.0)
    refused(gated, "differ by")
    monkeypatch.undo()
    nan = SimpleNamespace(run=lambda *_: [np.full((1, 5), np.nan, np.float32)])
    monkeypatch.setattr(export, "session", lambda path: nan)
    refused(gated, "differ by")


# the command line


@pytest.fixture
def afds(capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(list(arguments))
        output, errors = capsys.readouterr()
        return code, output, errors

    return run


@pytest.fixture
def refused(afds):
    def run(*arguments: str) -> str:
        code, output, errors = afds(*arguments)
        lines = errors.splitlines()
        assert code == 2 and not output and len(lines) == 1 and lines[0].startswith("afds: "), (code, output, errors)
        return lines[0]

    return run


@pytest.fixture
def trained(home) -> str:
    """The id of a finished run whose network lost a few channels."""
    tiny.store(home)
    id = runs.run_id(tiny.AFS_SOURCE)
    file = home / "runs" / id / runs.MODEL
    model = afs.load(file)
    for layer in afs.layers(model).values():
        layer.m[1:2], layer.s[2:3] = 0, 0
    afs.save(model, file)
    return id


@pytest.fixture
def exported(trained, home) -> Path:
    with tiny.served():
        assert cli.main(["export", "--run", trained[:8], "--format", "torch", "--out", "net.safetensors"]) == 0
    return home / "net.safetensors"


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (24, 20), colour=(200, 20, 20)) -> str:
    Image.new("RGB", size, colour).convert(mode).save(path)
    return str(path)


def probabilities(output: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for line in output.splitlines()[1:]:
        image, name, share = line.rsplit(maxsplit=2)
        assert name in tiny.CLASSES
        found.setdefault(image.strip(), []).append(float(share.rstrip("%")))
    return found


@pytest.mark.slow
def test_a_run_is_exported_in_both_formats_and_both_predict_alike(trained, exported, home, afds):
    with tiny.served():
        code, output, _ = afds("export", "--run", trained, "--format", "onnx")
    assert code == 0 and f"{trained}.onnx" in output and "3 classes, 16 px" in output
    small, model = afs.load(exported), afs.load(home / "runs" / trained / runs.MODEL)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    with safe_open(str(exported), framework="pt") as file:
        card = export.Card.from_json(file.metadata()[export.KEY])
    assert card == export.Card(tiny.CLASSES, 16, 16, MEAN, STD, network="resnet14", run=trained)
    assert predict.load(f"{trained}.onnx")[1].opset == export.OPSET
    image = picture(home / "red.png")
    found = [predict.predict([image], file, top=3)[0][1] for file in (exported, f"{trained}.onnx")]
    assert [name for name, _ in found[0]] == [name for name, _ in found[1]]
    assert np.allclose([p for _, p in found[0]], [p for _, p in found[1]], atol=1e-5)
    # What the masked network says of the image prepared as the test images are.
    pixels = np.asarray(Image.open(image).resize((19, 16), Image.Resampling.BILINEAR).crop((2, 0, 18, 16)))
    x = torch.from_numpy((pixels / 255.0 - np.array(MEAN)) / np.array(STD)).permute(2, 0, 1)[None].float()
    wanted = model(x).softmax(1)[0].sort(descending=True)
    assert [tiny.CLASSES[i] for i in wanted.indices] == [name for name, _ in found[0]]
    assert np.allclose(wanted.values.detach().numpy(), [p for _, p in found[0]], atol=1e-5)
    code, output, _ = afds("predict", image, image, "--model", str(exported), "--top", "2")
    assert code == 0 and output.count("red.png") == 4 and output.splitlines()[0].split()[-1] == "probability"


@pytest.mark.slow
def test_a_run_is_quantised_and_predicts_from_files_and_folders(trained, home, afds, refused):
    assert "the ranges of values come from the training images, which cannot be read" in refused(
        "export", "--run", trained, "--format", "onnx-int8"
    )
    with tiny.served():
        code, output, _ = afds("export", "--run", trained, "--format", "onnx-int8")
    assert code == 0 and f"{trained}.int8.onnx" in output and "3 classes, 16 px, int8" in output
    card = predict.load(f"{trained}.int8.onnx")[1]
    assert card.precision == "int8" and card.run == trained and card.opset == export.OPSET
    weights = onnx.load(f"{trained}.int8.onnx").graph.initializer
    assert any(w.data_type == onnx.TensorProto.INT8 and len(w.dims) == 4 for w in weights) is (len(card.fp32) < 17)
    (home / "photos" / "sub").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4032, 3024), (200, 20, 20)).save(home / "photos" / "camera.jpg", exif=exif)
    picture(home / "photos" / "sub" / "red.png"), (home / "photos" / "notes.txt").write_text("no image")
    code, output, _ = afds("predict", "photos", "--model", f"{trained}.int8.onnx")
    assert code == 0 and set(probabilities(output)) == {"photos/camera.jpg", "photos/sub/red.png"}


@pytest.mark.slow
def test_the_layer_that_int8_loses_stays_in_fp32(gated, tmp_path, monkeypatch):
    file, out = tmp_path / "net.onnx", tmp_path / "int8.onnx"
    export.save_onnx(compact(gated, input_size=(3, 12, 12), fold_bn=True), file, (3, 12, 12))
    layers = [n.name for n in onnx.load(file).graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    batch = (np.random.RandomState(0).randn(8, 3, 12, 12).astype(np.float32), np.zeros(8, int))

    def measured(path, held):
        known = {p.key: p.value for p in onnx.load(path).metadata_props}
        return 1.0 if path == file or layers[1] in json.loads(known[export.KEY])["fp32"] else 0.99

    monkeypatch.setattr(export, "accuracy", measured)
    card = export.save_int8(file, out, [batch], [batch], export.Card(tuple("abcde"), 12, 14))
    assert card.fp32 == (layers[1],) and predict.load(out)[1] == card


def test_a_square_is_scaled_down_at_last_where_the_card_says_so(home):
    card = export.Card(tuple("ab"), 16, 18, (0.0,) * 3, (1 / 255,) * 3, side=8)
    image = picture(home / "red.png", size=(24, 20))
    whole = predict.prepare(image, export.Card(tuple("ab"), 16, 18, (0.0,) * 3, (1 / 255,) * 3))
    assert whole.shape == (3, 16, 16) and np.allclose(predict.prepare(image, card), whole[:, :8, :8])


def test_a_network_that_was_trained_on_raw_pixels_is_exported_so(trained, home):
    file = home / "runs" / trained / runs.MODEL
    model = afs.load(file)
    set_input(model, RAW)
    afs.save(model, file)
    with tiny.served():
        _, card = export.export_run(trained, "torch", home / "raw.safetensors")
    assert card.mean == (0, 0, 0) and card.std == (1 / 255,) * 3
    Image.fromarray(np.full((16, 16, 3), 200, dtype=np.uint8)).save(home / "grey.png")
    assert np.allclose(predict.prepare(str(home / "grey.png"), predict.load(home / "raw.safetensors")[1]), 200)


def test_pictures_of_any_kind_are_classified(exported, home, afds):
    files = {
        "alpha.png": ("RGBA", (24, 20)), "grey.png": ("L", (9, 31)), "cmyk.jpg": ("CMYK", (24, 20)),
        "palette.gif": ("P", (24, 20)), "pixel.png": ("RGB", (1, 1)), "line.png": ("RGB", (1, 90000)),
        "bit.png": ("1", (24, 20)),
    }  # fmt: skip
    for name, (mode, size) in files.items():
        picture(home / name, mode, size)
    deep = np.full((20, 24), 40000, dtype=np.uint16)
    Image.fromarray(deep).save(home / "deep.png")
    names = [*files, "deep.png"]
    code, output, errors = afds("predict", *names, "--model", str(exported))
    assert code == 0 and not errors
    shares = probabilities(output)
    assert set(shares) == set(names) and all(abs(sum(found) - 100) < 0.3 for found in shares.values())
    # Transparency is composited over white, 16 bits become 8, one pixel becomes a plain square.
    transparent = Image.new("RGBA", (24, 20), (200, 20, 20, 0))
    transparent.save(home / "transparent.png")
    white, _ = picture(home / "white.png", colour=(255, 255, 255)), picture(home / "red.png")
    card = predict.load(exported)[1]
    assert np.array_equal(predict.prepare("transparent.png", card), predict.prepare(white, card))
    assert np.array_equal(predict.prepare("pixel.png", card), predict.prepare("red.png", card))
    # A photograph that the camera held sideways is turned, as in training and for maps.
    upright = np.random.RandomState(0).randint(0, 255, (20, 24, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(upright).save(home / "upright.png")
    Image.fromarray(np.rot90(upright)).save(home / "sideways.png", exif=exif)
    assert np.array_equal(predict.prepare("sideways.png", card), predict.prepare("upright.png", card))
    assert np.array_equal(maps.read_image("sideways.png", 16), maps.read_image("upright.png", 16))
    level = (round(40000 / 257) / 255 - np.array(MEAN)) / np.array(STD)
    assert np.allclose(predict.prepare("deep.png", card), level[:, None, None], atol=1e-5)


def test_files_that_are_no_images(exported, home, refused):
    model = ("--model", str(exported))
    picture(home / "good.png")
    (home / "text.jpg").write_text("no image")
    (home / "empty.png").touch()
    (home / "cut.png").write_bytes((home / "good.png").read_bytes()[:60])
    for name in ("text.jpg", "empty.png", "cut.png"):
        assert f"the image {name} cannot be decoded" in refused("predict", "good.png", name, *model)
    assert "there is no image file gone.png" in refused("predict", "gone.png", *model)
    (home / "empty").mkdir()
    assert "there is no image in the folder empty" in refused("predict", "empty", *model)


@pytest.mark.slow
def test_model_files_that_are_damaged_or_foreign(exported, gated, home, refused):
    image = picture(home / "red.png")
    whole = exported.read_bytes()
    for suffix in ("safetensors", "onnx"):
        for number, content in enumerate((b"", b"no network", whole[: len(whole) // 2])):
            file = home / f"bad{number}.{suffix}"
            file.write_bytes(content)
            assert "damaged" in refused("predict", image, "--model", file.name)
    afs.save(afs.load(exported), home / "plain.safetensors")
    assert "plain.safetensors holds no class names" in refused("predict", image, "--model", "plain.safetensors")
    export.save_onnx(gated, home / "plain.onnx", (3, 12, 12))
    assert "plain.onnx holds no class names" in refused("predict", image, "--model", "plain.onnx")
    card = export.Card(tuple("abcde"), 12, 12)
    export.save_onnx(gated, home / "two.onnx", (3, 12, 12), card=card, batch=2)
    assert "two.onnx takes 2 images at a time only" in refused("predict", image, "--model", "two.onnx")
    broken = afs.load(exported)
    next(broken.parameters()).data.fill_(float("nan"))
    said = export.Card(("red", "green", "blue"), 16, 16).to_json()
    afs.save(broken, home / "nan.safetensors", metadata={export.KEY: said})
    assert "outputs that are not finite" in refused("predict", image, "--model", "nan.safetensors")
    (home / "net.pth").write_bytes(b"")
    assert "net.pth is no file of afds export" in refused("predict", image, "--model", "net.pth")
    assert "there is no file gone.onnx" in refused("predict", image, "--model", "gone.onnx")
    for text in ("{}", "[]", "not json", '{"classes": [], "size": 16, "resize": 16}'):
        afs.save(afs.load(exported), home / "odd.safetensors", metadata={export.KEY: text})
        assert "nothing sensible" in refused("predict", image, "--model", "odd.safetensors")
    few = export.Card(("red", "green"), 16, 16).to_json()
    afs.save(afs.load(exported), home / "few.safetensors", metadata={export.KEY: few})
    assert "3 outputs but 2 class names" in refused("predict", image, "--model", "few.safetensors")


def test_runs_that_cannot_be_exported(trained, home, refused):
    other = runs.run_id(tiny.transfer())
    folder = home / "runs" / other
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(runs.to_json(tiny.transfer())))
    assert f"run {other} is not finished" in refused("export", "--run", other)
    assert "one of onnx, onnx-int8, torch, got 'tflite'" in refused("export", "--run", trained, "--format", "tflite")
    assert "is named *.safetensors" in refused("export", "--run", trained, "--format", "torch", "--out", "net.pt")
    assert "begin with 'ffffffffffff'" in refused("export", "--run", "ffffffffffff")
    assert "'nonsense' is not a run id" in refused("export", "--run", "nonsense")
    assert "tiny-source" in refused("export", "--run", trained)  # there is no such data set outside this test
    with tiny.served():
        (home / "file").touch()
        out = os.path.join("file", "net.safetensors")
        assert "the folder file of" in refused("export", "--run", trained, "--format", "torch", "--out", out)
        os.remove(home / "runs" / trained / runs.MODEL)
        assert f"run {trained} has no {runs.MODEL}" in refused("export", "--run", trained)
    result = home / "runs" / trained / "result.json"
    record = json.loads(result.read_text())
    result.write_text(json.dumps({**record, "metrics": {"diverged": "at step 3", "steps": 0}}))
    assert "diverged" in refused("export", "--run", trained)
    assert not list(home.glob("*.onnx")) and not list(home.glob("*.safetensors"))
