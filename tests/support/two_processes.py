"""A program for several processes: trains small students in all of them and says what each saw.

    fabric run --devices 2 --accelerator cpu two_processes.py FOLDER

FOLDER holds `tree`, an ImageFolder tree, and `teacher.safetensors`. Each run goes to the store FOLDER/SIZE, where SIZE
is the number of processes; each process writes what it got to FOLDER/SIZE-RANK.json.
"""

import json
import os
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from unittest import mock

import torch

from afdslib import cli
from afdslib.base.errors import AFDSError
from afdslib.experiments import Distillation, Network, Photographs, PhotoRun, Published
from afdslib.losses import BetaSchedule
from afdslib.training import Optimisation, distributed, loop

STEPS = 6


def student(folder: Path) -> PhotoRun:
    """Attention transfer in float64, two epochs of three steps; batch norm in train mode throughout."""
    settings = Optimisation(
        steps=STEPS, batch_size=6, lr=0.05, schedule="milestones", milestones=(0.5,), drop=0.1, nesterov=True,
        precision="fp64", log_rows=STEPS,
    )  # fmt: skip
    method = Distillation("at", BetaSchedule(beta=100.0), soft=1.0)
    data = Photographs(str(folder / "tree"), size=32, augmentation="resnext")
    teacher = Published.of(str(folder / "teacher.safetensors"))
    return PhotoRun(data, Network("resnet18", width=1 / 16), settings, method, teacher, weight_decay=1e-3)


def cases(folder: Path) -> dict[str, PhotoRun]:
    """By name: the student; with trained adapters; with another kind of input; one that a single process began; with
    batch norm left to each process."""
    plain = student(folder)
    return {
        "at": plain,
        "hint": replace(plain, method=Distillation("hint", BetaSchedule(beta=1.0))),
        # At 64 px the compared maps are 2x2; at 32 px they are single points, which all look alike to NST. Only two
        # steps: on six images this deep network magnifies a difference of one rounding a hundredfold in each step.
        "nst": replace(
            plain,
            data=replace(plain.data, size=64),
            optimisation=replace(plain.optimisation, lr=0.005, steps=2, log_rows=2),
            network=Network("inception_bn", width=1 / 16),
            method=Distillation("nst", BetaSchedule(beta=5.0), taps="before-relu"),
        ),
        "resumed": replace(plain, seed=1),
        "local": replace(plain, optimisation=replace(plain.optimisation, sync_norm=False)),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # Loader processes change no image, and starting them would take longer than all else.
    with distributed.joined(), mock.patch.object(loop, "workers", lambda _: 0):
        world, rank = distributed.world(), distributed.rank()
        store = folder / str(world)
        said: dict[str, object] = {}
        with mock.patch.dict(os.environ, {"LT_CLI_USED": "0"}):  # as torchrun starts processes
            for name, config in (cases(folder) | {"again": student(folder)}).items():  # stored by now: nobody computes
                result = distributed.get_or_run(config, store=store)
                said[name] = [result.id, result.metrics]
            if world > 1:
                odd = replace(student(folder), optimisation=replace(student(folder).optimisation, batch_size=7))
                try:
                    distributed.get_or_run(odd, store=store)
                except AFDSError as error:
                    said["odd"] = str(error)
        # The command line, as `fabric run` starts it; it ends the group.
        options = (
            "distill", "--recipe", "resnet18-at", "--data", str(folder / "tree"), "--size", "32", "--width", "0.0625",
            "--teacher", str(folder / "teacher.safetensors"), "--epochs", "2", "--batch-size", "10", "--lr", "0.01",
        )  # fmt: skip
        with mock.patch.dict(os.environ, {"AFDS_RUNS": str(folder / f"cli{world}")}):
            with redirect_stdout(StringIO()) as printed:
                assert cli.main(options) == 0
        (folder / f"cli-{world}-{rank}.json").write_text(printed.getvalue())
        (folder / f"{world}-{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
