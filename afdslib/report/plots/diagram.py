"""Our own drawing of AFS and AFD."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from afdslib.report.plots.style import PHONE, canvas, narrow, styled

_FEATURE, _DENSE, _GATE, _LOSS = "#EAF3FA", "#F2F2F2", "#FDEBD0", "#F8D9CC"
_Y, _G, _S, _T = 10, 26, 34.5, 8  # heights: a layer, its gate; the source network, the target network

# Boxes: centre, width, height, text, colour. Arrows: the corners of a line with a head at its end. Labels: place, text.
_AFS_BOXES = (
    (6, _Y, 10, 9, "input x\n(C_in, H, W)", _FEATURE),
    (36, _Y, 16, 9, "convolution, only\nactive channels", _DENSE),
    (57, _Y, 15, 9, "batch norm\nwithout scale, shift", _DENSE),
    (76, _Y, 13, 9, "a · (η · y + β)", _GATE),
    (94, _Y, 10, 9, "output\n(C, H, W)", _FEATURE),
    (17, _G, 13, 9, "global average\npooling", _GATE),
    (36, _G, 16, 9, "h = relu(gap(x) Φ + φ)\npredictor", _GATE),
    (57, _G, 15, 9, "π: the k largest\nof h, per image", _GATE),
    (76, _G, 13, 9, "η = s π + (1−s) γ\nmasks m, s", _GATE),
)
_AFS_ARROWS = (
    [(11, _Y), (28, _Y)], [(44, _Y), (49.5, _Y)], [(64.5, _Y), (69.5, _Y)], [(82.5, _Y), (89, _Y)],
    [(17, _Y), (17, _G - 4.5)], [(23.5, _G), (28, _G)], [(44, _G), (49.5, _G)], [(64.5, _G), (69.5, _G)],
    [(76, _G - 4.5), (76, _Y + 4.5)]
)  # fmt: skip
_AFS_LABELS = (
    (67, _Y + 1, "y", "center"), (77, 18, "scale η, active channels a", "left"),
    (46.5, 18.7, "which channels to compute", "center")
)  # fmt: skip
_AFD_BOXES = (
    (5, 20.5, 8, 9, "image x", _FEATURE),
    (23, _S, 16, 10, "source network\nAFS, frozen", _DENSE),
    (45, _S, 12, 8, "features f_S\n(C, H, W)", _FEATURE),
    (23, _T, 16, 10, "target network\nAFS, trained", _DENSE),
    (45, _T, 12, 8, "features f_T\n(C, H, W)", _FEATURE),
    (70, _S, 22, 10, "attention ρ over channels\nsoftmax(relu(f_S W₁ + b₁) w₂ + b₂)", _GATE),
    (70, 20.5, 20, 9, "R = Σ ρ_c ‖f_T,c − f_S,c‖²", _LOSS),
    (70, _T, 20, 8, "classifier:\ncross-entropy", _LOSS),
    (93, 14.2, 12, 10, "loss =\nCE + λ R\n+ decay", _LOSS),
)
_AFD_ARROWS = (
    [(31, _S), (39, _S)], [(5, 25), (5, _S), (15, _S)], [(31, _T), (39, _T)], [(5, 16), (5, _T), (15, _T)],
    [(51, _S), (59, _S)], [(70, _S - 5), (70, 25)], [(45, _S - 4), (45, 22), (60, 22)],
    [(45, _T + 4), (45, 19), (60, 19)], [(51, _T), (60, _T)], [(80, 20.5), (83.5, 20.5), (83.5, 16), (87, 16)],
    [(80, _T), (83.5, _T), (83.5, 12.5), (87, 12.5)]
)  # fmt: skip
_AFD_LABELS = ((43.5, 26.5, "no gradient", "right"), (71, 27.3, "weights ρ", "left"))


# For a phone a panel is turned: left becomes top, and heights become places across, with room for the text of boxes.
_AFS_TURNED = [0, 5.5, 14.5, 21.5, 30.5, 33], [0, 2, 48, 53, 99, 100]
_AFD_TURNED = [0, 3, 13, 16, 25, 29.5, 39.5, 41], [0, 1, 32, 35, 65, 68, 99, 100]


def _turned(point: tuple[float, float], heights: tuple[list[float], list[float]]) -> tuple[float, float]:
    return float(np.interp(point[1], *heights)), 100 - point[0]


def _arrow(ax: Axes, points: Sequence[tuple[float, float]], style: str | tuple = "-") -> None:
    drawn: dict[str, Any] = {"color": "#333333", "linewidth": 1.3, "linestyle": style}
    if len(points) > 2:
        ax.plot(*zip(*points[:-1], strict=True), solid_capstyle="butt", **drawn)
    head: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0}
    ax.add_patch(FancyArrowPatch(points[-2], points[-1], **head, **drawn))


def _panel(ax: Axes, title: str, turned: tuple, boxes: Sequence, arrows: Sequence, labels: Sequence) -> None:
    ax.set(xlim=(0, 100), ylim=(0, 100 if narrow() else turned[0][-1]))
    ax.set_axis_off()
    ax.set_title(title)
    edge: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=0.8", "edgecolor": "#333333", "linewidth": 1}
    for x, y, w, h, text, colour in boxes:
        corner, far = (x - w / 2, y - h / 2), (x + w / 2, y + h / 2)
        if narrow():
            (left, top), (right, bottom) = _turned(corner, turned), _turned(far, turned)
            corner, far = (left, bottom), (right, top)
            text = "\n".join(textwrap.fill(line, int((right - left) / 1.75)) for line in text.split("\n"))
        w, h = far[0] - corner[0], far[1] - corner[1]
        ax.add_patch(FancyBboxPatch(corner, w, h, facecolor=colour, **edge))
        crowd = max(map(len, text.split("\n"))) / w
        size = 7.5 if narrow() else 9 if crowd < 1.35 else 8.5 if crowd < 1.5 else 7.8
        ax.text(corner[0] + w / 2, corner[1] + h / 2, text, ha="center", va="center", fontsize=size, linespacing=1.35)
    for points, style in arrows:
        _arrow(ax, [_turned(point, turned) for point in points] if narrow() else points, style)
    for x, y, text, side in () if narrow() else labels:
        ax.text(x, y, text, fontsize=8, color="#333333", ha=side, va="baseline" if side == "center" else "center")


@styled
def diagram() -> Figure:
    """AFS in one layer, and AFD between the two networks."""
    width, height, ratios = (PHONE, 10.0, [1, 1]) if narrow() else (10.4, 7.4, [33, 41])
    fig, ((upper,), (lower,)) = canvas(width, height, 2, height_ratios=ratios)
    title = "AFS: gates predicted from a layer's input weight, and skip, the channels of its output"
    arrows = [(points, "-") for points in _AFS_ARROWS]
    dashed = [(57, _G - 4.5), (57, 18), (36, 18), (36, _Y + 4.5)], (0, (4, 2))
    _panel(upper, title, _AFS_TURNED, _AFS_BOXES, [*arrows, dashed], _AFS_LABELS)
    title = "AFD: attention read from source features weights the distance between source and target features"
    _panel(lower, title, _AFD_TURNED, _AFD_BOXES, [(points, "-") for points in _AFD_ARROWS], _AFD_LABELS)
    return fig
