"""The report's page: wide things scroll inside their boxes, on paper nothing is cut, and nothing is fetched."""

import json
import re

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from afdslib.base import paths
from afdslib.report import pipeline

CSS = pipeline.STYLE.read_text(encoding="utf-8")


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A report with a wide table and a cell's output, as `pipeline.render` writes it."""
    monkeypatch.setenv("AFDS_HOME", str(tmp_path))
    monkeypatch.delenv("AFDS_FIGURES", raising=False)
    paths.notebooks().mkdir()
    wide = f"|{' a |' * 30}\n|{' --- |' * 30}\n|{' 1 |' * 30}"
    outputs = [new_output("stream", name=n, text=t) for n, t in (("stdout", "a result"), ("stderr", "step 5/10"))]
    node = new_notebook(cells=[new_markdown_cell(f"# Title\n\n{wide}"), new_code_cell("1", outputs=outputs)])
    executed = paths.figures("toy") / "executed" / "01_a.ipynb"
    executed.parent.mkdir(parents=True)
    for file in (paths.notebooks() / "01_a.ipynb", executed):
        nbformat.write(node, file)
    executed.with_suffix(".json").write_text(json.dumps({"key": ""}))
    return pipeline.render("toy").read_text(encoding="utf-8")


def test_the_style_is_the_last_of_the_head_nothing_is_fetched_and_what_cells_print_is_there_without_progress(page):
    soup = BeautifulSoup(page, "html.parser")
    assert soup.head.find_all("style")[-1].string == CSS and page.count(CSS) == 1
    fetched = [tag.get("src") or tag.get("href") for tag in soup.find_all(["link", "script", "img", "iframe"])]
    assert not [where for where in fetched if where and not where.startswith("data:")]
    assert not re.search(r"url\(|@import|</", CSS)
    assert 'name="viewport"' in page  # or a phone shows the page as wide as a desktop's
    assert "<table>" in page and 'class="jp-Notebook"' in page and "jp-RenderedHTMLCommon" in page
    assert "a result" in page and "step 5/10" not in page


def test_wide_things_scroll_on_screens_and_are_whole_on_paper():
    screen, phone, printed = re.split(r"@media [^{]+\{", re.sub(r"/\*.*?\*/", "", CSS, flags=re.S))
    (table,) = re.findall(r"\.jp-RenderedHTMLCommon table \{([^}]*)\}", screen)
    assert "overflow-x: auto" in table and "max-width: 100%" in table and "display: block" in table
    assert re.search(r"\.jp-RenderedImage[^{]*\{ overflow-x: auto", screen) and "max-width: 62rem" in screen
    assert "img { width: 640px" in phone  # labels of a figure shrunk to a phone cannot be read
    (table,) = re.findall(r"\.jp-RenderedHTMLCommon table \{([^}]*)\}", printed)
    assert "display: table" in table and "overflow: visible" in table and "break-inside: avoid" in printed
    assert "overflow-x: auto" not in printed and CSS.count("{") == CSS.count("}")
