"""The learning curve of a stage: sums between its rows, the display, and when a checkpoint is due."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from afdslib.base.errors import DivergedError
from afdslib.training import distributed


class Curve:
    """What the steps since the last row of the learning curve gave."""

    def __init__(self) -> None:
        self.happened: dict[str, float] = {}  # what events gave
        self.seen, self.unseen = 0, 0  # images, and steps whose loss was not looked at
        self._names: list[str] = []
        self._steps: list[Tensor] = []
        self._correct: Tensor | int = 0

    def add(self, loss: Tensor, terms: Mapping[str, Tensor], logits: Tensor, labels: Tensor) -> None:
        self._names = ["loss", *terms]
        wide = torch.float64 if loss.dtype == torch.float64 else torch.float32
        self._steps.append(torch.stack([value.detach().to(wide) for value in (loss, *terms.values())]))
        self._correct = self._correct + (logits.detach().argmax(1) == labels).sum()
        self.seen, self.unseen = self.seen + len(labels), self.unseen + 1

    def refuse_non_finite(self, step: int, lr: float) -> None:
        """Averages the unseen steps over processes, and stops a run that diverges at the step and term of it."""
        values = distributed.average(torch.stack(self._steps[-self.unseen :]))
        self._steps[-self.unseen :] = values.unbind()
        unseen, self.unseen = self.unseen, 0
        if bool(values.isfinite().all()):
            return
        index = int((~values.isfinite().all(1)).nonzero()[0])
        known = dict(zip(self._names, values[index].tolist(), strict=True))
        name = next((n for n, value in known.items() if n != "loss" and not math.isfinite(value)), "loss")
        raise DivergedError(
            f"the loss term {name!r} is {known[name]} at step {step - unseen + index + 1} (learning rate {lr:g}); "
            f"lower the learning rate or the term's strength, or use fp32"
        )

    def means(self) -> dict[str, float]:
        """Of the loss, its terms and the training accuracy."""
        right = distributed.average(torch.as_tensor(self._correct, dtype=torch.float64))
        means = torch.stack(self._steps).double().mean(0).tolist()
        return dict(zip(self._names, means, strict=True)) | {"train_accuracy": float(right) / self.seen}


class Throttle:
    """True at most once in so many seconds, so that short runs are not slowed down by checkpoints."""

    def __init__(self, seconds: float):
        self._seconds, self._last = seconds, time.monotonic()

    def due(self) -> bool:
        now = time.monotonic()
        due = now - self._last >= self._seconds
        self._last = now if due else self._last
        return due


class Progress:
    """A tqdm bar in a terminal; elsewhere one line on stderr per row of a long stage, one line for a short one."""

    def __init__(self, label: str, steps: int, start: int, *, silent: bool = False):
        self._label, self._steps, self._silent, self._bar = label, steps, silent, None
        if sys.stderr.isatty() and not silent:
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=start, desc=label, mininterval=1, leave=False)

    def step(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def row(self, row: Mapping[str, float]) -> None:
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{row['loss']:.3f}")
        elif not self._silent and (self._steps > 400 or row["step"] == self._steps):
            known = ("loss", "cross_entropy", "train_accuracy", "validation_accuracy")
            values = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if name in known)
            print(f"{self._label}: step {row['step']}/{self._steps}  {values}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
