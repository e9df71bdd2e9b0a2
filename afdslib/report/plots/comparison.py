"""Methods side by side: paired differences of the comparison, its trials, and the students of a teacher."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from afdslib.report.plots.style import canvas, drawn_as, labelled, percent, styled
from afdslib.studies.protocol import RECALLED, Method, label_of

ROLES = {"competitor": ("competitor", "#000000", "o"), "part": ("AFD or AFS alone", "#7F7F7F", "s")}
STAGES = {
    "regulariser": "regularisers, on the dense network",
    "selection": "selections, with L2 at its best",
    RECALLED: "AFS with the recalled schedule, which was replaced",
    "strength": "pairs: strength at the endpoint's budget",
}


@styled
def paired(table: pd.DataFrame, *, title: str = "") -> Figure:
    """AFDS minus each other method, seed by seed, with Student's 95 % interval: right of 0, AFDS is the better one.

    Args:
        table: of `statistics.paired_table`: method, role, seeds, difference, low, high, in points.
    """
    fig, ((ax,),) = canvas(6.4, 0.95 + 0.28 * max(2, len(table)), title=title)
    ax.axvline(0, color="#555555", linewidth=0.9)
    names = [f"{Method.parse(r.method).label} ({r.seeds})" for r in table.itertuples()]
    rows = table.assign(name=names, role=[ROLES[role][0] for role in table.role])
    # The median of the two limits and the difference between them is the difference; their range is the interval.
    rows = rows.melt(["name", "role"], ["low", "difference", "high"], value_name="points").dropna()
    roles = [role for role in ROLES.values() if role[0] in set(rows.role)]
    sns.pointplot(
        rows, x="points", y="name", order=names, hue="role", hue_order=[role[0] for role in roles],
        palette=[role[1] for role in roles], markers=[role[2] for role in roles], estimator="median",
        errorbar=("pi", 100), linestyle="none", capsize=0.3, markersize=5, err_kws={"linewidth": 1.4}, ax=ax,
        legend="auto" if len(roles) > 1 else False
    )  # fmt: skip
    ax.set(
        ylabel="", xlabel="AFDS minus the method, points of test accuracy\n(95 % interval; in brackets: paired seeds)"
    )
    if len(roles) > 1:
        sns.move_legend(ax, "upper center", bbox_to_anchor=(0.5, -0.9 / fig.get_figheight()), ncols=2, title=None)
    return fig


def _strip(ax: Axes, table: pd.DataFrame, *, chosen: bool) -> None:
    names = list(dict.fromkeys(table["name"]))
    rows = table.dropna(subset="validation_accuracy")
    common = {"x": "validation_accuracy", "y": "name", "order": names, "jitter": False, "ax": ax}
    sns.stripplot(rows, **common, size=4, color="white", edgecolor="#0072B2", linewidth=1)
    if chosen and len(rows):
        best = rows.loc[rows.groupby("name").validation_accuracy.idxmax()]
        sns.stripplot(best, **common, size=5, color="#D55E00", marker="D", zorder=5)
    for row, name in enumerate(names):
        if lost := int((table["name"] == name).sum() - (rows["name"] == name).sum()):
            ax.annotate(
                f"{lost} without a value", (1, row), xycoords=("axes fraction", "data"), xytext=(-3, 0),
                textcoords="offset points", ha="right", va="center", fontsize=7.5, color="#555555"
            )  # fmt: skip
    ax.set(xlabel="", ylabel="", ylim=(len(names) - 0.5, -0.5))
    ax.set_yticks(range(len(names)), names)  # also where no trial has a value
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.tick_params(labelbottom=True)
    percent(ax.xaxis)


@styled
def competitor_trials(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Every trial's validation accuracy, one row per method and stage; the chosen one is filled.

    Args:
        table: of a comparison's trials: stage, name, validation_accuracy (NaN where there is none).
    """

    def name(row: pd.Series) -> str:
        return Method.parse(row["name"]).label if row.stage == "strength" else label_of(row["name"])

    table = table.assign(name=table.apply(name, axis=1))
    stages = {stage: table[table.stage == stage] for stage in STAGES if (table.stage == stage).any()}
    sizes = [mine["name"].nunique() for mine in stages.values()]
    height = 0.24 * sum(sizes) + 0.75 * len(sizes) + 0.4
    ratios = [size + 0.6 for size in sizes]
    fig, axes = canvas(6.6, height, len(sizes), title=title, sharex=True, height_ratios=ratios)
    for (ax,), (stage, mine) in zip(axes, stages.items(), strict=True):
        _strip(ax, mine, chosen=stage != RECALLED)
        ax.set_title(STAGES[stage])
    axes[-1, 0].set_xlabel("accuracy, validation images (%); the chosen trial is filled")
    return fig


@styled
def student_accuracy(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Test accuracy of every student: a sign per seed, a bar at the median; shaded is the plain student's range.

    Args:
        table: of a study's networks: the rows of one student and teacher.
    """
    students, looks = labelled(table[table.method != "teacher"])
    fig, ((ax,),) = canvas(6.6, 0.42 * len(looks) + 1.2, title=title)
    alone = students[students.method == "alone"].test_accuracy
    if len(alone) > 1:
        ax.axvspan(alone.min(), alone.max(), color="#000000", alpha=0.08, linewidth=0)
    sns.scatterplot(students, x="test_accuracy", y="label", ax=ax, s=48, **drawn_as(looks, lines=False))
    for row, one in enumerate(looks):
        median = students[students.label == one.label].test_accuracy.median()
        ax.plot([median] * 2, [row - 0.33, row + 0.33], color=one.colour, linewidth=2.4)
    for row in table[table.method == "teacher"].itertuples():
        ax.axvline(row.test_accuracy, color="black", linewidth=1, linestyle=(0, (4, 2)))
        ax.annotate(
            f"teacher {row.student}", (row.test_accuracy, 1), xycoords=("data", "axes fraction"), xytext=(-3, 3),
            textcoords="offset points", ha="right", fontsize=8
        )  # fmt: skip
    ax.set_ylim(len(looks) - 0.4, -0.6)
    ax.margins(x=0.06)
    percent(ax.xaxis)
    seeds = students.groupby("method").size()
    many = " to ".join(str(n) for n in dict.fromkeys((seeds.min(), seeds.max())))
    label = f"accuracy, test images (%); {many} seeds, bar: median, shaded: range of the student alone"
    ax.set(xlabel=label, ylabel="")
    return fig
