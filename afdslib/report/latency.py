"""Measured time of a sweep's networks: their compact copies against the dense network, side by side on this machine.

Times belong to a machine. They are kept beside the sweep's table, never in it, so that the sweep stays reproducible.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd
import torch

from afdslib import afs, runs
from afdslib.afs import macs
from afdslib.afs.compact import compact
from afdslib.base.atomic import atomic_path
from afdslib.experiments.afs import MODEL
from afdslib.inference import bench
from afdslib.inference.export import inference
from afdslib.report.summary import Text

if TYPE_CHECKING:
    from afdslib.studies.sweep import Study

__all__ = ["COLUMNS", "measure", "sentence", "stored", "times"]

COLUMNS = [
    "target", "method", "seed", "budget", "test_accuracy", "macs", "macs_predictors", "computed", "runtime", "batch",
    "median_ms", "q1_ms", "q3_ms", "speedup", "speedup_q1", "speedup_q3", "threads", "device", "run",
]  # fmt: skip
DENSE = "dense"
SETTINGS = bench.Settings(batches=(1, 16), threads=1, repeats=40, warmup=5, steady=0.0)  # one thread, none that spins


def times(study: Study, sweep: pd.DataFrame, *, method: str = "afd") -> pd.DataFrame:
    """The times kept with a study, measured now if there are none of these networks.

    Args:
        study: of the sweep.
        sweep: from `Study.sweep`.
        method: whose networks, of the first seed.

    Returns:
        One row per target, budget and batch size, `COLUMNS`: `macs` and `computed` are shares of the dense MACs, as
        the gates leave them and as the compact network computes them (it computes every dynamic channel); times in
        milliseconds per call, medians with quartiles; `speedup` the dense network's time over this one's, within each
        repeat. A network whose weights are not at hand has no row.
    """
    kept = stored(study, sweep)
    kept = kept[kept.method == method]
    mine = sweep[sweep.method == method]
    wanted = set(mine[mine.seed == mine.groupby("target").seed.transform("min")].run)
    if study.profile.committed and not kept.empty and wanted <= set(kept.run):
        return kept
    found = measure(study, sweep, method=method)
    if study.profile.committed and set(found.run) <= set(kept.run):  # the other networks are not at hand
        return kept
    with atomic_path(study.folder() / "times.csv") as part:
        found.to_csv(part, index=False, float_format="%.6g", lineterminator="\n")
    return found


def stored(study: Study, sweep: pd.DataFrame) -> pd.DataFrame:
    """The times kept with a study; empty if there are none, or if they are of other networks than the sweep's."""
    file = study.folder() / "times.csv"
    kept = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=COLUMNS)
    same = list(kept) == COLUMNS and set(kept.run) <= set(sweep.run)
    return kept if same else pd.DataFrame(columns=COLUMNS)


def measure(
    study: Study, sweep: pd.DataFrame, *, method: str = "afd", settings: bench.Settings | None = None
) -> pd.DataFrame:
    """Times the networks of a method's first seed as they are exported; see `times`.

    Args:
        study: of the sweep.
        sweep: from `Study.sweep`.
        method: whose networks.
        settings: batches, threads, repeats and the runtime. Default: onnxruntime, or torch itself without it and in the
            demo, whose times mean nothing and should be short.
    """
    if settings is None:
        real = study.profile.committed and importlib.util.find_spec("onnxruntime")
        settings = replace(SETTINGS, runtimes=("onnxruntime" if real else "eager",))
    runtime = settings.runtimes[0]
    found = []
    with bench.on_threads(settings.threads):
        device = bench.environment(settings)["device"]
        for title, target in study.targets.items():
            splits = study.target_data[title]
            shape = (3, splits.test.size, splits.test.size)
            network = replace(study.profile.network, weights=None).build(len(splits.classes), 0).eval()
            whole = macs.count(network, shape).total
            models: dict[str, torch.nn.Module] = {DENSE: compact(network, input_size=shape, fold_bn=True)}
            rows = {}
            mine = sweep[(sweep.target == title) & (sweep.method == method)]
            for row in mine[mine.seed == mine.seed.min()].sort_values("budget", ascending=False).itertuples():
                config = study.point_run(method, int(row.seed), budget=float(row.budget), target=target)
                result = runs.lookup(config, needs=(MODEL,))
                if result is None:
                    continue
                small = compact(afs.load(result.artifact(MODEL)).eval(), input_size=shape, fold_bn=True)
                models[f"{row.budget:g}"] = inference(small)
                rows[f"{row.budget:g}"] = row._asdict() | {"computed": macs.count(small, shape).total / whole}
            some = min(max(settings.batches) + settings.repeats, len(splits.test))
            images = splits.test.__getitems__(range(some))[0]
            for batch in settings.batches if rows else ():
                shared = bench.Row("sweep", study.profile.network.name, runtime, min(batch, some), "", DENSE)
                for one in bench.compare(models, settings, shared, {}, images):
                    if one.variant in rows and one.median_ms is not None:
                        facts = {"threads": settings.threads, "device": device, "runtime": runtime}
                        found.append(vars(one) | rows[one.variant] | facts)
    return pd.DataFrame(found, columns=COLUMNS)


def sentence(table: pd.DataFrame, sweep: pd.DataFrame) -> Text:
    """What the clock says of the smallest measured network, in words."""
    if table.empty:
        return Text(
            f"Not measured: the weights of these {len(sweep)} networks are not at hand. Where they are trained, this "
            "notebook measures them."
        )
    lines = []
    for title, rows in table.groupby("target", sort=False):
        for batch, mine in rows.groupby("batch", sort=False):
            last = mine.sort_values("budget").iloc[0]
            skipped = 100 * (last.macs - last.macs_predictors)
            masked = f"{100 * last.computed:.1f} % of the dense MACs"
            if f"{100 * last.computed:.1f}" != f"{skipped:.1f}":
                masked += f", as dynamic channels are computed, then masked; skipped, they would leave {skipped:.1f} %"
            lines.append(
                f"- {title}, batch {batch}: at {1 / last.budget:g}x fewer MACs the network is {last.speedup:.2f}x as "
                f"fast as the dense one (quartiles {last.speedup_q1:.2f} to {last.speedup_q3:.2f}); it computes "
                f"{masked}."
            )
    one = table.iloc[0]
    lines.append(
        f"\n{one.runtime}, {one.threads} thread{'s' if one.threads > 1 else ''}, {one.device}, medians of "
        f"{SETTINGS.repeats} interleaved repeats; the dense network's batch norms are folded too."
    )
    return Text("\n".join(lines))
