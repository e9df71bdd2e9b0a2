"""Our own drawing of AFS and AFD."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from afdslib.report.plots.style import styled

__all__ = ["diagram"]

_FEATURE, _DENSE, _GATE, _LOSS = "#EAF3FA", "#F2F2F2", "#FDEBD0", "#F8D9CC"


def _box(ax: Axes, x: float, y: float, w: float, h: float, text: str, colour: str, size: float = 9) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (x - w / 2, y - h / 2),
            w,
            h,
            boxstyle="round,pad=0,rounding_size=0.8",
            facecolor=colour,
            edgecolor="#333333",
            linewidth=1,
        )  # fmt: skip
    )
    ax.text(x, y, text, ha="center", va="center", fontsize=size, linespacing=1.35)


def _arrow(ax: Axes, points: list[tuple[float, float]], *, dashed: bool = False, colour: str = "#333333") -> None:
    """A line along the points, with a head at its end."""
    style = (0, (4, 2)) if dashed else "-"
    if len(points) > 2:
        xs, ys = zip(*points[:-1], strict=True)
        ax.plot(xs, ys, color=colour, linewidth=1.3, linestyle=style, solid_capstyle="butt")
    ax.add_patch(
        FancyArrowPatch(
            points[-2],
            points[-1],
            arrowstyle="-|>",
            mutation_scale=11,
            color=colour,
            linewidth=1.3,
            linestyle=style,
            shrinkA=0,
            shrinkB=0,
        )  # fmt: skip
    )


def _label(ax: Axes, x: float, y: float, text: str, **kwargs) -> None:
    ax.text(x, y, text, fontsize=kwargs.pop("fontsize", 8), color=kwargs.pop("color", "#333333"), **kwargs)


def _panel(ax: Axes, title: str, height: float) -> None:
    ax.set_xlim(0, 100)
    ax.set_ylim(0, height)
    ax.set_axis_off()
    ax.set_title(title)


def _afs(ax: Axes) -> None:
    _panel(ax, "AFS: gates predicted from a layer's input weight, and skip, the channels of its output", 33)
    y, gate = 10, 26
    _box(ax, 6, y, 10, 9, "input x\n(C_in, H, W)", _FEATURE)
    _box(ax, 36, y, 16, 9, "convolution, only\nactive channels", _DENSE)
    _box(ax, 57, y, 15, 9, "batch norm\nwithout scale, shift", _DENSE)
    _box(ax, 76, y, 13, 9, "a · (η · y + β)", _GATE)
    _box(ax, 94, y, 10, 9, "output\n(C, H, W)", _FEATURE)
    _box(ax, 17, gate, 13, 9, "global average\npooling", _GATE)
    _box(ax, 36, gate, 16, 9, "h = relu(gap(x) Φ + φ)\npredictor", _GATE, 8.5)
    _box(ax, 57, gate, 15, 9, "π: the k largest\nof h, per image", _GATE)
    _box(ax, 76, gate, 13, 9, "η = s π + (1−s) γ\nmasks m, s", _GATE)
    _arrow(ax, [(11, y), (28, y)])
    _arrow(ax, [(44, y), (49.5, y)])
    _arrow(ax, [(64.5, y), (69.5, y)])
    _label(ax, 67, y + 1, "y", ha="center")
    _arrow(ax, [(82.5, y), (89, y)])
    _arrow(ax, [(17, y), (17, gate - 4.5)])
    _arrow(ax, [(23.5, gate), (28, gate)])
    _arrow(ax, [(44, gate), (49.5, gate)])
    _arrow(ax, [(64.5, gate), (69.5, gate)])
    _arrow(ax, [(76, gate - 4.5), (76, y + 4.5)])
    _label(ax, 77, 18, "scale η, active channels a", va="center")
    _arrow(ax, [(57, gate - 4.5), (57, 18), (36, 18), (36, y + 4.5)], dashed=True)
    _label(ax, 46.5, 18.7, "which channels to compute", ha="center")


def _afd(ax: Axes) -> None:
    _panel(ax, "AFD: attention read from source features weights the distance between source and target features", 41)
    source, target, x0 = 34.5, 8, 5
    _box(ax, x0, 20.5, 8, 9, "image x", _FEATURE)
    networks = ((source, "source network\nAFS, frozen", "f_S"), (target, "target network\nAFS, trained", "f_T"))
    for y, name, tail in networks:
        _box(ax, 23, y, 16, 10, name, _DENSE)
        _box(ax, 45, y, 12, 8, f"features {tail}\n(C, H, W)", _FEATURE)
        _arrow(ax, [(31, y), (39, y)])
        _arrow(ax, [(x0, 20.5 + (4.5 if y > 20 else -4.5)), (x0, y), (15, y)])
    _box(ax, 70, source, 22, 10, "attention ρ over channels\nsoftmax(relu(f_S W₁ + b₁) w₂ + b₂)", _GATE, 7.8)
    _box(ax, 70, 20.5, 20, 9, "R = Σ ρ_c ‖f_T,c − f_S,c‖²", _LOSS)
    _box(ax, 70, target, 20, 8, "classifier:\ncross-entropy", _LOSS)
    _box(ax, 93, 14.2, 12, 10, "loss =\nCE + λ R\n+ decay", _LOSS)
    _arrow(ax, [(51, source), (59, source)])
    _arrow(ax, [(70, source - 5), (70, 25)])
    _arrow(ax, [(45, source - 4), (45, 22), (60, 22)])
    _arrow(ax, [(45, target + 4), (45, 19), (60, 19)])
    _arrow(ax, [(51, target), (60, target)])
    _arrow(ax, [(80, 20.5), (83.5, 20.5), (83.5, 16), (87, 16)])
    _arrow(ax, [(80, target), (83.5, target), (83.5, 12.5), (87, 12.5)])
    _label(ax, 43.5, 26.5, "no gradient", ha="right", va="center")
    _label(ax, 71, 27.3, "weights ρ", va="center")


@styled
def diagram() -> Figure:
    """AFS in one layer, and AFD between the two networks."""
    fig = Figure(figsize=(10.4, 7.4), layout="constrained")
    upper, lower = fig.subplots(2, 1, height_ratios=[33, 41])
    _afs(upper)
    _afd(lower)
    return fig
