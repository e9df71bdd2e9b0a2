"""Configurations whose runs are pure arithmetic: deterministic, resumable, and over in milliseconds."""

import time
from dataclasses import dataclass

from afdslib import runs


@dataclass(frozen=True)
class Schedule:
    lr: float = 0.5
    milestones: tuple[int, ...] = (2, 4)
    decay: float | None = None


@runs.register
@dataclass(frozen=True)
class ToySource:
    steps: int = 3
    seed: int = 0

    def execute(self, run: runs.Run) -> dict:
        weight = 0.1 + self.seed
        for _ in range(self.steps):
            weight = 3.7 * weight * (1 - weight)
        run.write_artifact("model.txt", lambda path: path.write_text(repr(weight)))
        return {"steps": self.steps, "weight": weight}


@runs.register
@dataclass(frozen=True)
class ToyTrain:
    """Iterates the logistic map, which shows a lost or repeated step in every digit."""

    name: str = "toy"
    steps: int = 6
    every: int = 2
    schedule: Schedule = Schedule()
    source: ToySource | None = None
    folder: str = runs.unhashed("")
    pause: float = runs.unhashed(0.0)
    shift: float = runs.added(0.0)

    def execute(self, run: runs.Run) -> dict:
        if self.folder:
            with open(f"{self.folder}/executions.txt", "a") as file:
                file.write("started\n")
        state = run.load_checkpoint()
        if state is None:
            weight = 0.3
            if self.source is not None:
                parent = runs.get_or_run(self.source, store=run.store, needs=("model.txt",))
                weight = float(parent.artifact("model.txt").read_text())
            state = {"step": 0, "weight": weight}
        else:
            run.truncate_log(state["step"])
        step, weight = state["step"], state["weight"]
        while step < self.steps:
            step += 1
            weight = (3.5 + 0.4 * self.schedule.lr) * weight * (1 - weight)
            row = {"step": step, "weight": repr(weight)}
            run.log(row if step % 2 else {**row, "even": True})
            if step % self.every == 0:
                run.save_checkpoint({"step": step, "weight": weight})
            print(f"step {step}", flush=True)
            time.sleep(self.pause)
        run.write_artifact("model.txt", lambda path: path.write_text(repr(weight)))
        return {"steps": self.steps, "weight": weight, "pair": (1, 2)}
