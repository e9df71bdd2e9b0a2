"""The page that a notebook becomes: a table of contents, folded sections, figures for a phone, and no script needed.

Tags of the notebook's cells say what becomes of them: "aside", not in the page; "shown", a code cell with its code;
"folded", a heading of the second level whose section can be opened. Other code cells show their outputs alone.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from afdslib.report.plots.pictures import PHONE, img

__all__ = ["STYLE", "page"]

STYLE = Path(__file__).with_name("report.css")
"""Added to nbconvert's style."""


def page(node: Any, title: str, *, folder: Path, figures: Path) -> str:
    """A notebook as one HTML page that needs nothing from elsewhere.

    Args:
        node: the executed notebook; it is changed.
        title: of the page.
        folder: in which the pictures lie that its text names.
        figures: in which the figures lie, and those that were drawn again for a phone.
    """
    from bs4 import BeautifulSoup
    from nbconvert import HTMLExporter

    node.cells = [cell for cell in node.cells if _in_page(cell)]
    for cell in node.cells:
        if cell.cell_type == "code":  # without the progress of a training, which is in the log
            cell.outputs = [_with_alternative(output) for output in cell.outputs if output.get("name") != "stderr"]
            cell.metadata["transient"] = {"remove_source": "shown" not in _tags(cell)}
    exporter = HTMLExporter(
        embed_images=True, exclude_input_prompt=True, exclude_output_prompt=True, exclude_anchor_links=True
    )
    exporter.mathjax_url = exporter.require_js_url = exporter.jquery_url = ""
    about = {"name": title, "path": str(folder)}
    soup = BeautifulSoup(exporter.from_notebook_node(node, resources={"metadata": about})[0], "html.parser")
    _arrange(soup, ["folded" in _tags(cell) for cell in node.cells])
    for image in soup.find_all("img", alt=re.compile("^figure ")):
        file = figures / f"{str(image['alt']).removeprefix('figure ')}{PHONE}"
        if file.is_file():
            small = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"
            image.wrap(soup.new_tag("picture"))
            image.insert_before(soup.new_tag("source", media="(max-width: 700px)", srcset=small))
    style = f"<style>{STYLE.read_text('utf-8')}</style>\n"  # it comes last and so wins
    return str(soup).replace("</head>", f"{style}</head>", 1)


def _tags(cell: Any) -> list[str]:
    return cell.metadata.get("tags", [])


def _in_page(cell: Any) -> bool:
    return "aside" not in _tags(cell) and (cell.cell_type != "code" or bool(cell.outputs) or "shown" in _tags(cell))


def _arrange(soup: Any, folded: list[bool]) -> None:
    """Puts each folded section into a box, and a table of contents below the first section."""
    contents, box, sections = soup.new_tag("ul"), None, []
    for cell, fold in zip(soup.select("main > .jp-Cell"), folded, strict=True):
        if heading := cell.find("h2"):
            name = re.sub(r"\W+", "-", heading.get_text().lower()).strip("-")
            link = soup.new_tag("a", href=f"#{name}")
            link.string = heading.get_text()
            contents.append(soup.new_tag("li"))
            contents.contents[-1].append(link)
            box = soup.new_tag("details") if fold else None
            sections.append(cell if box is None else box)
            if box is not None:
                cell.insert_before(box)
                box.append(soup.new_tag("summary"))
                box.summary.append(heading.extract())
            (heading if box is None else box)["id"] = name
        if box is not None:
            box.append(cell.extract())
    if sections:
        nav = soup.new_tag("nav", attrs={"aria-label": "Contents"})
        nav.append(contents)
        sections[min(1, len(sections) - 1)].insert_before(nav)


def _with_alternative(output: Any) -> Any:
    """An output whose picture has its name as the alternative text, for readers who do not see it."""
    data = output.get("data", {})
    if "image/png" not in data:
        return output
    content, width = data.pop("image/png"), output.get("metadata", {}).get("image/png", {}).get("width")
    data["text/html"] = img(data.get("text/plain", "figure"), "".join(content.split()), width)
    return output
