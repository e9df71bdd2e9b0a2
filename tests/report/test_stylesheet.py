"""The report's page: wide things scroll inside their boxes, on paper nothing is cut, and nothing is fetched."""

import json
import re
from html.parser import HTMLParser

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from afdslib.base import paths
from afdslib.report import pipeline, stylesheet


def blocks(css: str) -> tuple[str, dict[str, str]]:
    """Rules outside of any @media, and those inside by condition."""
    css = re.sub(r"/\*.*?\*/", "", css, flags=re.S)
    media: dict[str, str] = {}
    outside, position = "", 0
    for match in re.finditer(r"@media ([^{]+)\{", css):
        depth, end = 1, match.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(css[end], 0)
            end += 1
        media[match.group(1).strip()] = css[match.end() : end - 1]
        outside += css[position : match.start()]
        position = end
    return outside + css[position:], media


class Styles(HTMLParser):
    """Contents of the style elements of a page's head, and the addresses that the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.styles: list[str] = []
        self.fetched: list[str] = []
        self.inside = self.head = False

    def handle_starttag(self, tag, attrs):
        self.head = self.head or tag == "head"
        self.inside = tag == "style" and self.head
        where = dict(attrs).get("href" if tag == "link" else "src") or ""
        if tag in ("link", "script", "img", "iframe") and where and not where.startswith("data:"):
            self.fetched.append(where)

    def handle_endtag(self, tag):
        self.inside = False
        self.head = self.head and tag != "head"

    def handle_data(self, data):
        if self.inside:
            self.styles.append(data)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A report with a wide table, as `pipeline.render` writes it."""
    monkeypatch.setenv("AFDS_HOME", str(tmp_path))
    monkeypatch.delenv("AFDS_FIGURES", raising=False)
    paths.notebooks().mkdir()
    wide = f"|{' a |' * 30}\n|{' --- |' * 30}\n|{' 1 |' * 30}"
    node = new_notebook(cells=[new_markdown_cell(f"# Title\n\n{wide}"), new_code_cell("1")])
    executed = paths.figures("toy") / "executed" / "01_a.ipynb"
    executed.parent.mkdir(parents=True)
    for file in (paths.notebooks() / "01_a.ipynb", executed):
        nbformat.write(node, file)
    executed.with_suffix(".json").write_text(json.dumps({"key": ""}))
    return pipeline.render("toy").read_text(encoding="utf-8")


def test_the_style_is_the_last_one_of_the_head_and_nothing_is_fetched(page):
    found = Styles()
    found.feed(page)
    assert found.styles[-1] == stylesheet.CSS and page.count(stylesheet.CSS) == 1
    assert found.fetched == [] and "url(" not in stylesheet.CSS and "@import" not in stylesheet.CSS
    assert 'name="viewport"' in page  # or a phone shows the page as wide as a desktop's
    assert "<table>" in page and 'class="jp-Notebook"' in page and "jp-RenderedHTMLCommon" in page


def test_wide_things_scroll_on_screens_and_are_whole_on_paper():
    outside, media = blocks(stylesheet.CSS)
    (table,) = re.findall(r"\.jp-RenderedHTMLCommon table \{([^}]*)\}", outside)
    assert "overflow-x: auto" in table and "max-width: 100%" in table and "display: block" in table
    assert re.search(r"\.jp-RenderedImage[^{]*\{ overflow-x: auto", outside)
    assert "max-width: 62rem" in outside
    assert set(media) == {"screen and (max-width: 700px)", "print"}
    (printed,) = re.findall(r"\.jp-RenderedHTMLCommon table \{([^}]*)\}", media["print"])
    assert "display: table" in printed and "overflow: visible" in printed and "break-inside: avoid" in media["print"]
    assert "overflow-x: auto" not in media["print"]


def test_the_style_is_balanced_and_short():
    assert stylesheet.CSS.count("{") == stylesheet.CSS.count("}") and len(stylesheet.CSS.splitlines()) < 100
    assert "</" not in stylesheet.CSS


def test_a_page_without_a_head_is_left_alone():
    assert stylesheet.styled("<p>text</p>") == "<p>text</p>"
    assert stylesheet.styled("<head></head><body></body>").endswith("</style>\n</head><body></body>")
