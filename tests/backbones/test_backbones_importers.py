"""Files of the form of resnet-34-export and resnet-18-at-export, narrow, and the public notebooks' functions."""

import pytest
import torch
import torch.nn.functional as F

from afdslib import backbones
from afdslib.base.errors import AFDSError

PLANES = (4, 8, 16, 32)  # 64 to 512, divided by 16


def _random(generator, *shape):
    return torch.randn(*shape, generator=generator) / max(1, torch.Size(shape[1:]).numel()) ** 0.5


def _folded(blocks):
    """Names and shapes of the teacher's file."""
    generator, state = torch.Generator().manual_seed(0), {}

    def conv(name, outputs, inputs, kernel):
        state[f"{name}.weight"] = _random(generator, outputs, inputs, kernel, kernel)
        state[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.3

    conv("conv0", PLANES[0], 3, 7)
    inputs = PLANES[0]
    for g, count in enumerate(blocks):
        for b in range(count):
            base, outputs = f"group{g}.block{b}", PLANES[g]
            conv(f"{base}.conv0", outputs, inputs, 3)
            conv(f"{base}.conv1", outputs, outputs, 3)
            if b == 0 and g > 0:
                conv(f"{base}.conv_dim", outputs, inputs, 1)
            inputs = outputs
    state["fc.weight"], state["fc.bias"] = _random(generator, 6, inputs), torch.randn(6, generator=generator)
    return state


def _teacher():
    return _folded((3, 4, 6, 3))


def _run_folded(state, x, blocks):
    def conv(x, name, stride=1, pad=0):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride, pad)

    x = F.max_pool2d(conv(x, "conv0", 2, 3).relu(), 3, 2, 1)
    groups = []
    for g, count in enumerate(blocks):
        for b in range(count):
            base, stride = f"group{g}.block{b}.conv", 2 if g > 0 and b == 0 else 1
            out = conv(conv(x, f"{base}0", stride, 1).relu(), f"{base}1", 1, 1)
            x = (out + (conv(x, f"{base}_dim", stride) if stride == 2 else x)).relu()
        groups.append(x)
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"]), groups


def _affine():
    """Names and shapes of the student's file."""
    generator, state = torch.Generator().manual_seed(1), {}

    def affine(name, channels):
        state[f"{name}.a"] = torch.rand(channels, generator=generator) + 0.5
        state[f"{name}.b"] = torch.randn(channels, generator=generator) * 0.3

    state["conv0"] = _random(generator, PLANES[0], 3, 7, 7)
    affine("affine0", PLANES[0])
    inputs = PLANES[0]
    for g, outputs in enumerate(PLANES):
        for b in range(2):
            base = f"group{g}.block{b}"
            if g > 0 or b > 0:
                affine(f"{base}.affine0", inputs)
            affine(f"{base}.affine1", outputs)
            state[f"{base}.conv0"] = _random(generator, outputs, inputs, 3, 3)
            state[f"{base}.conv1"] = _random(generator, outputs, outputs, 3, 3)
            if g > 0 and b == 0:
                state[f"{base}.conv_dim"] = _random(generator, outputs, inputs, 1, 1)
            inputs = outputs
    affine("affine_last", inputs)
    state["fc.weight"], state["fc.bias"] = _random(generator, 6, inputs), torch.randn(6, generator=generator)
    return state


def _run_affine(state, x):
    def affine(x, name):
        return (x * state[f"{name}.a"].view(1, -1, 1, 1) + state[f"{name}.b"].view(1, -1, 1, 1)).relu()

    x = F.max_pool2d(affine(F.conv2d(x, state["conv0"], stride=2, padding=3), "affine0"), 3, 2, 1)
    groups = []
    for g in range(4):
        for b in range(2):
            base, stride = f"group{g}.block{b}", 2 if g > 0 and b == 0 else 1
            opened = x if g == 0 and b == 0 else affine(x, f"{base}.affine0")
            out = F.conv2d(opened, state[f"{base}.conv0"], stride=stride, padding=1)
            out = F.conv2d(affine(out, f"{base}.affine1"), state[f"{base}.conv1"], padding=1)
            x = out + (F.conv2d(opened, state[f"{base}.conv_dim"], stride=2) if stride == 2 else x)
        groups.append(x)
    return F.linear(affine(x, "affine_last").mean((2, 3)), state["fc.weight"], state["fc.bias"]), groups


def _check(model, images, wanted, groups):
    kept = []
    for name in backbones.stages(model):
        model.get_submodule(name).register_forward_hook(lambda _m, _a, out: kept.append(out))
    with torch.no_grad():
        torch.testing.assert_close(model(images), wanted, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(kept, groups, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, blocks", [("resnet34", (3, 4, 6, 3)), ("resnet18", (2, 2, 2, 2))])
def test_the_teachers_file_computes_what_its_notebook_computes(tmp_path, name, blocks):
    state = _folded(blocks)
    torch.save(state, tmp_path / "resnet-export.pth")
    model = backbones.load_export(tmp_path / "resnet-export.pth")
    assert model.architecture == {"name": name, "num_classes": 6, "stem": "imagenet", "width": 1 / 16}
    assert not model.training
    torch.save(model.state_dict(), tmp_path / "own.pt")  # and is rebuilt like any other
    again = backbones.build(**model.architecture, weights=tmp_path / "own.pt").eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(again(images), model(images))
    _check(model, images, *_run_folded(state, images, blocks))


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_the_students_file_computes_what_its_notebook_computes(tmp_path, suffix):
    state = _affine()
    named = {n + suffix if ".conv" in f".{n}" else n: v for n, v in state.items()}
    torch.save(named, tmp_path / "resnet-18-at-export.pth")
    model = backbones.load_export(tmp_path / "resnet-18-at-export.pth")
    assert model.architecture["name"] == "resnet18_preact"
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    _check(model, images, *_run_affine(state, images))


@pytest.mark.parametrize("make, change, words", [
    (_teacher, lambda s: s.pop("group1.block0.conv_dim.bias"), "lacks group1.block0.conv_dim"),
    (_teacher, lambda s: s.pop("group2.block5.conv0.weight"), "3-4-5-3 blocks"),
    (_teacher, lambda s: s.pop("fc.weight"), "lacks conv0.weight or fc.weight"),
    (_teacher, lambda s: s.update(extra=torch.ones(1)), "holds the foreign extra"),
    (_teacher, lambda s: s.update({"conv0.bias": torch.ones(9)}), "shape (9,) for bn1.bias"),
    (_affine, lambda s: s.pop("affine_last.a"), "lacks affine_last.a"),
    (_affine, lambda s: s.pop("group3.block1.conv1"), "lacks group3.block1.conv1"),
    (_affine, lambda s: s.update({"group0.block0.affine0.a": torch.ones(4)}), "foreign group0.block0.affine0.a"),
    (lambda: {"conv1.weight": torch.ones(1)}, lambda s: None, "none of the exports: it holds 0-0-0-0 blocks"),
])  # fmt: skip
def test_missing_and_foreign_names_are_one_sentence(tmp_path, make, change, words):
    state = make()
    change(state)
    torch.save(state, tmp_path / "export.pth")
    with pytest.raises(AFDSError) as caught:
        backbones.load_export(tmp_path / "export.pth")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(AFDSError, match=r"Hickle.*take the \.pth"):  # the older form
        backbones.load_export("resnet-34-export.hkl")
