"""One style and one look per method: colour, marker and line together, so that a figure also reads in grey."""

from __future__ import annotations

import contextvars
import functools
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from afdslib.base.errors import AFDSError
from afdslib.report.tables import place
from afdslib.studies.protocol import label_of

STYLE: Any = {  # matplotlib's rcParams; the font ships with matplotlib, so figures are the same everywhere
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "legend.frameon": False,
    "legend.fontsize": 8.5, "legend.title_fontsize": 8.5, "lines.linewidth": 1.6, "lines.markersize": 5.5,
    "errorbar.capsize": 3, "image.cmap": "cividis", "figure.facecolor": "white", "savefig.facecolor": "white",
    "svg.hashsalt": "afds"
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How a method is drawn, everywhere: marker and dashes are for readers of grey copies."""

    label: str  # in legends and tables
    colour: str  # of the Okabe-Ito palette, which colour-blind readers can tell apart
    marker: str
    dashes: tuple[float, ...] = ()  # none: a whole line

    @property
    def line(self) -> Any:
        """matplotlib's line style."""
        return (0, self.dashes) if self.dashes else "-"


_BLACK, _ORANGE, _SKY, _GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
_BLUE, _RED, _PINK, _GREY = "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"
_DASH, _DOT, _DASHDOT = (5, 1.5), (1.2, 1.2), (5, 1.5, 1.2, 1.5)

_SIGNS: dict[str, tuple] = {  # regularisers and selections
    "l2": (_BLACK, "o", _DASH), "l2sp": (_ORANGE, "s", _DASHDOT), "feature-map": (_SKY, "^", _DOT), "afd": (_RED, "D"),
    "delta": (_GREEN, "v", _DASH), "lwf": (_BLUE, "P", _DASHDOT), "at": (_PINK, "X"), "fbs": (_BLUE, "h"),
    "slimming": (_PINK, "p", _DASH), "taylor": (_GREEN, "*", _DASHDOT), "l1": (_GREY, "d", _DASHDOT),
    "random": (_GREY, "X", _DOT), "width": (_BLUE, "8", _DOT), "width-kd": (_ORANGE, "H", _DASH)
}  # fmt: skip
STUDENTS = {
    "teacher": Look("teacher", _BLACK, "*"),
    "alone": Look("student alone", _BLACK, "o", _DASH),
    "hint": Look("F-ActT", _ORANGE, "s", _DASHDOT),
    "at": Look("AT", *_SIGNS["at"]),
    "gradient-at": Look("gradient AT", _SKY, "^", _DOT),
    "kd": Look("KD", _GREY, "<", _DASH),
    "at-kd": Look("AT + KD, β decays", _RED, "D"),
    "nst": Look("NST", _GREEN, ">", _DOT),
    "nst-poly": Look("NST, polynomial", _GREEN, ">"),
    "nst-linear": Look("NST, linear", _SKY, "v", _DOT),
    "nst-gaussian": Look("NST, Gaussian", _BLUE, "P", _DASHDOT),
    "nst-poly+kd": Look("NST + KD", _RED, "D"),
    "nst-poly, after ReLU": Look("NST, polynomial, after ReLU", _ORANGE, "s", _DASH),
}
"""Ways of training a student."""

METHODS = {name: Look(label_of(name), *signs) for name, signs in _SIGNS.items()}
METHODS |= {name: STUDENTS[name] for name in ("kd", "nst")}

STATES = {"dynamic": (_BLUE, ""), "static": (_ORANGE, "///"), "removed": ("#E4E4E4", "...")}
"""Channel states: colour and hatch."""


def look(method: str) -> Look:
    """The look of a regulariser, a selection or a way of training a student; AFDSError for a method without one."""
    found = METHODS.get(method) or STUDENTS.get(method)
    if found is None:
        known = ", ".join(dict.fromkeys([*METHODS, *STUDENTS]))
        raise AFDSError(f"no colour and marker for method {method!r}; known are {known}")
    return found


def looks_of(names: Iterable[str]) -> list[Look]:
    """The looks of methods, and of curves that are none, such as the source network's stages."""
    others = ((_BLUE, "o"), (_RED, "D", _DASH), (_GREEN, "^", (1, 1)))
    known = METHODS | STUDENTS
    return [known.get(name) or Look(name, *others[index % len(others)]) for index, name in enumerate(names)]


def labelled(table: pd.DataFrame) -> tuple[pd.DataFrame, list[Look]]:
    """A table with the label of each row's method in a column `label`, and the looks in the table's order."""
    looks = {method: look(method) for method in dict.fromkeys(table.method)}
    return table.assign(label=[looks[method].label for method in table.method]), list(looks.values())


def drawn_as(looks: Iterable[Look], *, lines: bool = True) -> dict[str, Any]:
    """Arguments with which seaborn draws the column `label` of a table by these looks, without a legend of its own."""
    looks = list(looks)
    labels = [one.label for one in looks]
    dashes = {one.label: one.dashes or "" for one in looks}
    return ({"dashes": dashes, "markeredgecolor": "auto"} if lines else {}) | {
        "hue": "label", "style": "label", "hue_order": labels, "style_order": labels, "legend": False,
        "palette": {one.label: one.colour for one in looks}, "markers": {one.label: one.marker for one in looks}
    }  # fmt: skip


def handles(looks: Iterable[Look], **kwargs: Any) -> list[Line2D]:
    """Entries of a legend."""
    return [
        Line2D([], [], color=one.colour, marker=one.marker, linestyle=one.line, label=one.label, **kwargs)
        for one in looks
    ]


PHONE = 3.8
"""Width of a figure for a phone, in inches of 100 pixels."""
_narrow = contextvars.ContextVar("narrow", default=False)


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorator: draws in the report's style, leaves matplotlib's settings as they are, and notes how to draw again."""

    @functools.wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            fig = draw(*args, **kwargs)
        fig.again = functools.partial(draw, *args, **kwargs)  # type: ignore[attr-defined]
        return fig

    return drawn


def narrow() -> bool:
    """Whether a figure is being drawn for a phone."""
    return _narrow.get()


@matplotlib.rc_context(STYLE)
def for_phone(fig: Figure) -> Figure | None:
    """A figure drawn again for a phone, its panels below each other; None for one that is narrow enough as it is."""
    if fig.get_figwidth() <= PHONE or not hasattr(fig, "again"):
        return None
    token = _narrow.set(True)
    try:
        again = fig.again()
    finally:
        _narrow.reset(token)
    again.draw_without_rendering()  # lays the panels out
    for ax in again.axes:
        title, wide, high = ax.get_title(loc="left"), int(ax.bbox.width / 8), int(ax.bbox.height / 7)
        ax.set(xlabel=_wrapped(ax.get_xlabel()), ylabel=_wrapped(ax.get_ylabel(), max(9, high)))
        if len(title) > wide:
            ax.set_title(_wrapped(title, max(20, wide)), loc="left")
        legend = ax.get_legend()
        if legend is not None and legend.get_bbox_to_anchor().x0 > ax.bbox.x0:  # beside the panel: now below it
            _put_below(again, legend)
    for legend in list(again.legends):
        _put_below(again, legend)
    return again


def _wrapped(text: str, width: int = 44) -> str:
    return "\n".join(textwrap.fill(line, width) for line in text.split("\n"))


def _put_below(fig: Figure, legend: Legend) -> None:
    texts, title = [text.get_text() for text in legend.get_texts()], _wrapped(legend.get_title().get_text())
    columns = 1 if max(map(len, texts), default=0) > 18 else 2
    fig.set_figheight(fig.get_figheight() + 0.2 * -(-len(texts) // columns))
    drawn = [handle for handle in legend.legend_handles if handle is not None]
    fig.legend(drawn, texts, loc="outside lower center", ncols=columns, title=title or None)
    legend.remove()


def canvas(
    width: float, height: float, rows: int = 1, columns: int = 1, *, what: str = "", title: str = "",
    stack: bool = True, **kwargs: Any
) -> tuple[Figure, Any]:  # fmt: skip
    """A figure of a size in inches, its title (what is seen, and of which target), and its panels, (rows, columns).

    For a phone it is narrower: its panels stand below each other, or shrink where they shall not be stacked.
    """
    title, shape = place(": ".join(filter(None, (what, title)))), (rows, columns)
    if narrow() and width > PHONE:
        height *= 0.85 * columns if stack else max(0.6, PHONE / width)
        rows, columns = (rows * columns, 1) if stack else shape
        width, title = PHONE, _wrapped(title, 46)
    fig = Figure(figsize=(width, height), layout="constrained")
    if title:
        fig.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    return fig, fig.subplots(rows, columns, squeeze=False, **kwargs).reshape(shape)


def percent(axis: Any) -> None:
    """Ticks of a share in percent."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}"))


def level(ax: Axes, y: float, text: str = "", *, below: bool = False, end: float = 0.995) -> None:
    """A dashed line across a panel, such as chance, with its name at one end."""
    ax.axhline(y, color="#555555", linewidth=0.9, linestyle=(0, (2, 2)))
    ax.annotate(
        text, (end, y), xycoords=("axes fraction", "data"), xytext=(0, -3 if below else 2), textcoords="offset points",
        ha="right" if end > 0.5 else "left", va="top" if below else "bottom", fontsize=8, color="#555555"
    )  # fmt: skip


def note(ax: Axes, text: str) -> None:
    """A sentence in the middle of a panel that has nothing to draw."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, wrap=True)
