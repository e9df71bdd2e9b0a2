"""A slider over the budgets of a stored sweep: gates by layer, accuracy and MACs. Nothing is computed anew."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import pandas as pd

from afdslib.base.errors import AFDSError
from afdslib.base.text import times
from afdslib.report import plots, views
from afdslib.report.plots.pictures import DPI, shown_width
from afdslib.report.sweep import budgets_of
from afdslib.report.tables import place
from afdslib.studies.statistics import at
from afdslib.studies.sweep import Study

__all__ = ["explore", "view"]


def view(study: Study, sweep: pd.DataFrame, method: str, budget: float) -> tuple[str, bytes]:
    """A line of HTML on one budget of the primary target (test accuracy and measured MACs over the seeds), and a PNG of
    the gates of the first seed; AFDSError where the sweep has no such network."""
    target = next(iter(study.targets))
    rows = at(sweep[(sweep.target == target) & (sweep.method == method)], budget)
    if rows.empty:
        raise AFDSError(f"the sweep has no network of {method!r} at {times(budget)} on {target}")
    accuracy, seed = 100 * rows.test_accuracy, int(rows.seed.min())
    spread = f" ({accuracy.min():.1f} to {accuracy.max():.1f} over {len(rows)} seeds)" if len(rows) > 1 else ""
    text = (
        f"<b>{plots.look(method).label}, {times(budget)}</b> on {place(target)}: "
        f"test accuracy {accuracy.mean():.1f} %{spread}, "
        f"measured MACs {100 * rows.macs.mean():.1f} % of the dense network's, "
        f"{rows.parameters.mean() / 1000:.0f} thousand parameters"
    )
    layers = views.layers_by_budget(study, method, seed, [budget], study.targets[target])
    image = io.BytesIO()
    with matplotlib.rc_context(plots.STYLE):
        plots.channel_states(layers).savefig(image, format="png", dpi=DPI, bbox_inches="tight")
    return text, image.getvalue()


def explore(study: Study, sweep: pd.DataFrame) -> Any:
    """A slider for the budget and a menu for the method of a sweep's table, for JupyterLab.

    Without a front end that shows widgets it prints as its name.
    """
    import ipywidgets as widgets

    budgets, methods = budgets_of(sweep), list(dict.fromkeys(sweep.method))
    budget = widgets.SelectionSlider(options=[(times(b), b) for b in budgets], value=budgets[0], description="budget")
    first = "afd" if "afd" in methods else methods[0]
    named = [(plots.look(m).label, m) for m in methods]
    method = widgets.Dropdown(options=named, value=first, description="method")
    line, picture = widgets.HTML(), widgets.Image(format="png")

    def update(change: object = None) -> None:
        try:
            line.value, picture.value = view(study, sweep, method.value, budget.value)
            picture.width = str(shown_width(picture.value))
        except AFDSError as error:  # a network that diverged
            line.value, picture.value = str(error), b""

    budget.observe(update, names="value")
    method.observe(update, names="value")
    update()
    return widgets.VBox([widgets.HBox([budget, method]), line, picture])
