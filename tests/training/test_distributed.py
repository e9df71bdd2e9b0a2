"""Two CPU processes on a tree of 20 small images train as one process does, in float64, batch norm included."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import two_processes
from PIL import Image
from torch import nn

from afdslib import afs, backbones, runs
from afdslib.base.errors import AFDSError
from afdslib.training import distributed, loop

TESTS = Path(__file__).parents[1] / "support"


def make_tree(folder: Path) -> Path:
    """Three classes, 20 training and 6 test images of 36 to 44 px."""
    random = np.random.RandomState(0)
    for part, counts in (("train", (7, 7, 6)), ("val", (2, 2, 2))):
        for label, count in enumerate(counts):
            place = folder / part / f"class{label}"
            place.mkdir(parents=True)
            for i in range(count):
                pixels = random.randint(0, 130, (36 + 4 * (i % 3), 44, 3), dtype=np.uint8)
                pixels[:, :, label] += 100
                Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def make_teacher(file: Path) -> Path:
    torch.manual_seed(5)
    model = backbones.build("resnet18", 3, width=1 / 8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    afs.save(model, file)
    return file


def launch(folder: Path) -> None:
    """Runs the program in two processes on the CPU. Within this one torchrun would leave its handlers of signals."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AFDS_")},
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "AFDS_HOME": str(folder),
    }  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    fabric = (sys.executable, str(Path(sys.executable).with_name("fabric")), "run", "--devices", "2")
    command = (*fabric, "--accelerator", "cpu", "--main-port", port, str(TESTS / "two_processes.py"), str(folder))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder in which one process and two processes have trained the same students."""
    folder = tmp_path_factory.mktemp("two")
    make_tree(folder / "tree")
    make_teacher(folder / "teacher.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AFDS_HOME", str(folder))
        two_processes.main(folder)
        patch.setattr(loop.Throttle, "due", lambda self: True)
        patch.setattr(loop, "workers", lambda _: 0)
        with tiny.killed(4):
            runs.get_or_run(two_processes.cases(folder)["resumed"], store=folder / "2")
    launch(folder)
    return folder


def said(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def history(folder: Path, processes: int, case: str) -> pd.DataFrame:
    id = said(folder, f"{processes}-0")[case][0]
    return pd.read_csv(folder / str(processes) / id / "metrics.csv")


@pytest.mark.parametrize("case, steps", [("at", 6), ("hint", 6), ("nst", 2), ("resumed", 6)])
def test_two_processes_follow_the_trajectory_of_one(trained, case, steps):
    one, two = (history(trained, processes, case) for processes in (1, 2))
    assert list(one.columns) == list(two.columns) and len(one) == steps
    term = f"{case.replace('resumed', 'at')}_1"
    assert one["loss"].nunique() == one[term].nunique() == len(one) and (one[term] > 1e-3).all()
    for name in one.columns:
        tolerance = 1e-6 if name == "test_loss" else 1e-9  # evaluation sums in float32
        np.testing.assert_allclose(two[name], one[name], rtol=tolerance, atol=1e-12, err_msg=name)
    states = [trained / str(n) / said(trained, f"{n}-0")[case][0] / "model.safetensors" for n in (1, 2)]
    alone, together = (afs.load(state).state_dict() for state in states)
    for name, value in alone.items():  # saved in float32
        torch.testing.assert_close(together[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_all_processes_get_the_result_of_the_first_and_one_run_is_stored(trained):
    first, second = said(trained, "2-0"), said(trained, "2-1")
    assert first == second and first["at"][1]["processes"] == 2 and first["again"] == first["at"]
    assert "a batch of 7 images cannot be divided among 2 processes" in first["odd"]
    ids = {first[case][0] for case in ("at", "hint", "nst", "resumed", "local")}
    assert ids == {run.id for run in runs.list_runs(trained / "2") if run.state == "finished"}
    assert ids == {run.id for run in runs.list_runs(trained / "1") if run.state == "finished"}
    assert not list((trained / "2").glob("*/checkpoint.pt"))
    # Their number matters where each normalises alone.
    one, two = (history(trained, processes, "local")["loss"] for processes in (1, 2))
    assert np.abs(one - two).max() > 1e-3
    np.testing.assert_array_equal(one, history(trained, 1, "at")["loss"])


def test_the_command_line_trains_in_several_processes(trained):
    """The documented command; its single-precision loss is that of the same command without a launcher."""
    losses = []
    for processes in (1, 2):
        printed = json.loads((trained / f"cli-{processes}-0.json").read_text())
        assert printed["processes"] == processes and printed["steps"] == 4
        assert printed["images"] == 20 and 0 <= printed["test_accuracy"] <= printed["test_top5_accuracy"] == 1
        losses.append(pd.read_csv(trained / f"cli{processes}" / printed["id"] / "metrics.csv")["loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert (trained / "cli-2-1.json").read_text() == ""  # one process speaks for all


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dimensions", [(6, 3, 4, 5), (7, 3)], ids=["2d", "1d"])
def test_the_shared_batch_norm_is_torchs_own_in_one_process(monkeypatch, dimensions, momentum):
    """As a group of one: output, gradients and running statistics."""
    monkeypatch.setattr(distributed, "world", lambda: 1)
    kind = nn.BatchNorm2d if len(dimensions) == 4 else nn.BatchNorm1d
    torch.manual_seed(0)
    norm, plain = (kind(3, momentum=momentum).double() for _ in range(2))
    for one in (norm, plain):
        nn.init.constant_(one.weight, 1.7)
    for _ in range(2):
        x = torch.randn(dimensions, dtype=torch.float64) * 2 + 1
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, expected = distributed._synchronised(norm, a), plain(b)
        torch.testing.assert_close(out, expected)
        weights = torch.randn_like(x)
        (out * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close([p.grad for p in norm.parameters()], [p.grad for p in plain.parameters()])
    torch.testing.assert_close(norm.state_dict(), plain.state_dict())
    norm.eval(), plain.eval()
    torch.testing.assert_close(distributed._synchronised(norm, x), plain(x))


def test_shares_are_contiguous_equal_and_complete_and_an_ordinary_program_is_one_process(monkeypatch):
    assert distributed.world() == distributed.launched() == 1 and distributed.rank() == 0 and distributed.leads()
    values, norm = torch.arange(3.0), nn.Sequential(nn.BatchNorm2d(2))
    assert distributed.total(values) is values and distributed.average(values) is values
    assert distributed.share([4, 5, 6]) == [4, 5, 6]
    with distributed.synchronised_norms(norm):
        assert "forward" not in vars(norm[0])
    monkeypatch.setattr(distributed, "world", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(distributed.share(list(range(6))))
    assert parts == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(AFDSError, match="a batch of 7 images cannot be divided among 3 processes"):
        distributed.share(list(range(7)))
