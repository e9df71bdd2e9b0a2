"""One style and one look per method: colour, marker and line together, so that a figure also reads in grey."""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from afdslib.base import paths
from afdslib.base.atomic import atomic_path
from afdslib.base.errors import AFDSError
from afdslib.base.text import Text

__all__ = [
    "METHODS",
    "STATES",
    "STYLE",
    "Gallery",
    "Look",
    "Picture",
    "look",
    "percent",
    "save",
    "sentence",
    "stored",
    "styled",
]

DPI = 150

STYLE: Any = {  # the names are matplotlib's rcParams
    "font.family": "DejaVu Sans",  # ships with matplotlib, so figures are the same everywhere
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "errorbar.capsize": 3,
    "image.cmap": "cividis",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "afds",
}


@dataclass(frozen=True)
class Look:
    """How a method is drawn, everywhere.

    Attributes:
        label: in legends and tables.
        colour: of the Okabe-Ito palette, which colour-blind readers can tell apart.
        marker, line: a second and a third sign, for readers of grey copies.
    """

    label: str
    colour: str
    marker: str
    line: str | tuple = "-"


_BLACK, _ORANGE, _SKY, _GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
_BLUE, _RED, _PINK, _GREY = "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"
_DASH, _DOT, _DASHDOT = (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5))

METHODS = {
    "l2": Look("L2", _BLACK, "o", _DASH),
    "l2sp": Look("L2-SP", _ORANGE, "s", _DASHDOT),
    "feature-map": Look("feature map", _SKY, "^", _DOT),
    "afd": Look("AFD", _RED, "D", "-"),
    "delta": Look("DELTA", _GREEN, "v", _DASH),
    "lwf": Look("LwF", _BLUE, "P", _DASHDOT),
    "at": Look("AT", _PINK, "X", _DOT),
    "kd": Look("KD", _GREY, "<", _DASH),
    "nst": Look("NST", _GREEN, ">", _DOT),
    "fbs": Look("FBS", _BLUE, "h", "-"),
    "slimming": Look("network slimming", _PINK, "p", _DASH),
    "taylor": Look("Taylor", _GREEN, "*", _DASHDOT),
    "l1": Look("L1 norm", _GREY, "d", _DASHDOT),
    "random": Look("random", _GREY, "x", _DOT),
    "width": Look("narrower network", _BLUE, "8", _DOT),
    "width-kd": Look("narrower network with KD", _ORANGE, "H", _DASH),
}

# Channel states: colour and hatch.
STATES = {"dynamic": (_BLUE, ""), "static": (_ORANGE, "///"), "removed": ("#E4E4E4", "...")}


def look(method: str) -> Look:
    """The look of a method.

    Raises:
        AFDSError: for a method without one.
    """
    if method not in METHODS:
        raise AFDSError(f"no colour and marker for method {method!r}; known are {', '.join(METHODS)}")
    return METHODS[method]


_Draw = TypeVar("_Draw", bound=Callable[..., Figure])


def styled(draw: _Draw) -> _Draw:
    """Decorator: draws in the report's style and leaves matplotlib's global settings as they are."""

    @functools.wraps(draw)
    def wrapper(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper  # type: ignore[return-value]


def percent(axis: Any) -> None:
    """Ticks of a share in percent."""
    axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}"))


def note(ax: Axes, text: str) -> None:
    """A sentence in the middle of a panel that has nothing to draw."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, wrap=True)


def shown_width(png: bytes) -> int:
    """The width at which a figure's PNG is shown, in pixels: at 100 per inch, so that it is sharp on a fine screen."""
    return int.from_bytes(png[16:20], "big") * 100 // DPI


class Picture:
    """A saved figure; a notebook shows it as an image.

    Attributes:
        path: the PNG.
    """

    def __init__(self, path: Path):
        self.path = path

    def __repr__(self) -> str:
        return f"figure {self.path.stem}"

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        content = self.path.read_bytes()
        return content, {"width": shown_width(content)}


class Gallery:
    """Several saved figures, one per target; a notebook shows them below each other.

    Attributes:
        pictures: in the order of the targets.
    """

    def __init__(self, pictures: Sequence[Picture]):
        self.pictures = list(pictures)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.pictures))

    def _repr_html_(self) -> str:
        lines = []
        for picture in self.pictures:
            content, size = picture._repr_png_()
            data = base64.b64encode(content).decode("ascii")
            lines.append(f'<p><img alt="{picture}" width="{size["width"]}" src="data:image/png;base64,{data}"></p>')
        return "\n".join(lines)


def _file(profile: str, name: str, target: str = "") -> Path:
    suffix = re.sub(r"[^A-Za-z0-9.]+", "-", f"-{target}") if target else ""
    return paths.figures(profile) / f"{name}{suffix}.png"


def _shown(files: Sequence[Path]) -> Picture | Gallery:
    pictures = [Picture(file) for file in files]
    return pictures[0] if len(pictures) == 1 else Gallery(pictures)


def save(figure: Figure | Mapping[str, Figure], profile: str, name: str) -> Picture | Gallery:
    """Writes a figure to the profile's folder of figures, atomically: the same figure gives the same bytes.

    Args:
        figure: from one of this package's functions; or one per target, by the target's title.
        profile: the profile's name.
        name: of the file, without suffix; a target's title is added to it.
    """
    figures = figure if isinstance(figure, Mapping) else {"": figure}
    files = [_file(profile, name, target) for target in figures]
    for file, fig in zip(files, figures.values(), strict=True):
        with atomic_path(file) as part, matplotlib.rc_context(STYLE):
            fig.savefig(part, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.08, metadata={"Software": None})
    return _shown(files)


def stored(profile: str, name: str, targets: Iterable[str] = ("",)) -> Picture | Gallery | Text:
    """A figure that an earlier notebook saved, or a sentence that it is not there.

    Args:
        profile: the profile's name.
        name: as it was saved.
        targets: titles of the targets, for a figure of which each target has its own.
    """
    files = [file for target in targets if (file := _file(profile, name, target)).is_file()]
    if not files:
        return Text(f"Figure {name} is not drawn yet; draw it with: afds run --profile {profile}")
    return _shown(files)


@styled
def sentence(text: str) -> Figure:
    """A picture that says why there is nothing to draw."""
    fig = Figure(figsize=(6.4, 0.9), layout="constrained")
    note(fig.subplots(), text)
    return fig
