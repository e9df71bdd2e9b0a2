"""Figures as files: saved once per profile and target, shown by notebooks as images."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from afdslib.base import paths
from afdslib.base.atomic import atomic_path
from afdslib.base.text import Text
from afdslib.report.plots.style import STYLE, canvas, for_phone, note, styled

DPI = 150
PHONE = ".phone.png"
"""Suffix of a figure that was drawn again for a phone."""


def shown_width(png: bytes) -> int:
    """The width at which a figure's PNG is shown, in pixels: at 100 per inch, so that it is sharp on a fine screen."""
    return int.from_bytes(png[16:20], "big") * 100 // DPI


def img(name: str, content: str, width: int | None) -> str:
    """A PNG, base64, with its name as the alternative text."""
    size = f' width="{width}"' if width else ""
    return f'<p><img alt="{html.escape(name)}"{size} src="data:image/png;base64,{content}"></p>'


class Picture:
    """A saved figure, the PNG at `path`; a notebook shows it as an image."""

    def __init__(self, path: Path):
        self.path = path

    def __repr__(self) -> str:
        return f"figure {self.path.stem}"

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        content = self.path.read_bytes()
        return content, {"width": shown_width(content)}


class Gallery:
    """Several saved figures, one per target; a notebook shows them below each other."""

    def __init__(self, pictures: Sequence[Picture]):
        self.pictures = list(pictures)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.pictures))

    def _repr_html_(self) -> str:
        images = [(str(picture), *picture._repr_png_()) for picture in self.pictures]
        return "\n".join(img(name, base64.b64encode(png).decode("ascii"), size["width"]) for name, png, size in images)


def _file(profile: str, name: str, target: str = "") -> Path:
    suffix = re.sub(r"[^A-Za-z0-9.]+", "-", f"-{target}") if target else ""
    return paths.figures(profile) / f"{name}{suffix}.png"


def _shown(files: Sequence[Path]) -> Picture | Gallery:
    pictures = [Picture(file) for file in files]
    return pictures[0] if len(pictures) == 1 else Gallery(pictures)


def save(figure: Figure | Mapping[str, Figure], profile: str, name: str) -> Picture | Gallery:
    """Writes a figure, or one per target by its title, to a profile's folder: the same figure gives the same bytes.

    Wide ones are drawn once more for a phone, beside them, which the HTML report shows there.
    """
    figures = figure if isinstance(figure, Mapping) else {"": figure}
    files = [_file(profile, name, target) for target in figures]
    for file, fig in zip(files, figures.values(), strict=True):
        _write(fig, file)
        if (again := for_phone(fig)) is not None:
            _write(again, file.with_suffix(PHONE), colours=64)
    return _shown(files)


def _write(figure: Figure, file: Path, colours: int = 128) -> None:
    drawn = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(drawn, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.08)
    with atomic_path(file) as part:
        # Few colours: less than half of the bytes, in each figure, notebook and report that holds it.
        image = Image.open(drawn).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
        image.save(part, format="PNG", optimize=True, dpi=(DPI, DPI))


def stored(profile: str, name: str, targets: Iterable[str] = ("",)) -> Picture | Gallery | Text:
    """A figure that an earlier notebook saved (see `save`), one per target; else a sentence that there is none."""
    files = [file for target in targets if (file := _file(profile, name, target)).is_file()]
    if not files:
        return Text(f"Figure {name} is not drawn yet; draw it with: afds run --profile {profile}")
    return _shown(files)


@styled
def sentence(text: str) -> Figure:
    """A picture that says why there is nothing to draw."""
    fig, axes = canvas(6.4, 0.9)
    note(axes[0, 0], text)
    return fig
