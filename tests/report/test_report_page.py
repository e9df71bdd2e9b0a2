"""The report's page: wide things scroll inside their boxes, on paper nothing is cut, and nothing is fetched."""

import json
import re

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from afdslib.base import paths
from afdslib.report import layout, pipeline

CSS = layout.STYLE.read_text(encoding="utf-8")


PNG = "iVBORw0KGgo="


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A report with a wide table, a folded section, a figure, and cells of each tag, as `pipeline.render` writes it."""
    monkeypatch.setenv("AFDS_HOME", str(tmp_path))
    monkeypatch.delenv("AFDS_FIGURES", raising=False)
    paths.notebooks().mkdir()
    wide = f"|{' a |' * 30}\n|{' --- |' * 30}\n|{' 1 |' * 30}"
    outputs = [new_output("stream", name=n, text=t) for n, t in (("stdout", "a result"), ("stderr", "step 5/10"))]
    figure = new_output("display_data", data={"image/png": PNG, "text/plain": "figure a<b"})
    cells = [
        new_markdown_cell(f"# Title\n\n{wide}"), new_code_cell("left = 1", outputs=outputs),
        new_markdown_cell("for notebooks alone", metadata={"tags": ["aside"]}),
        new_markdown_cell("## The first part"), new_code_cell("no_output = 2"),
        new_code_cell("seen = 3", outputs=outputs, metadata={"tags": ["shown"]}),
        new_markdown_cell("## Details, folded", metadata={"tags": ["folded"]}), new_code_cell("4", outputs=[figure]),
        new_markdown_cell("### Below"), new_markdown_cell("## The end")
    ]  # fmt: skip
    executed = paths.figures("toy") / "executed" / "01_a.ipynb"
    executed.parent.mkdir(parents=True)
    for file in (paths.notebooks() / "01_a.ipynb", executed):
        nbformat.write(new_notebook(cells=cells), file)
    (paths.figures("toy") / "a<b.phone.png").write_bytes(b"small")
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


def test_tags_say_what_is_shown_what_is_folded_and_the_contents_lead_to_every_section(page):
    main = BeautifulSoup(page, "html.parser").main
    text = main.get_text()
    assert "seen" in text and not any(word in text for word in ("left", "no_output", "for notebooks alone"))
    (box,) = main.find_all("details")
    assert box.summary.get_text() == "Details, folded" and not box.has_attr("open") and box.find("h3") and box.img
    links = {a.get_text(): a["href"] for a in main.nav.find_all("a")}
    assert list(links) == ["The first part", "Details, folded", "The end"]
    assert all(main.find(id=where[1:]) for where in links.values()) and links["Details, folded"] == f"#{box['id']}"
    order = [tag.get_text() for tag in main.find_all(["nav", "h2"])]
    assert order[0] == "The first part" and order[1].startswith("The first part")  # the contents follow the answer


def test_a_phone_gets_the_figure_that_was_drawn_for_it(page):
    image = BeautifulSoup(page, "html.parser").main.picture
    assert image.img["alt"] == "figure a<b" and image.img["src"].endswith(PNG)
    assert image.source["media"] == "(max-width: 700px)" and image.source["srcset"].startswith("data:image/png;base64,")


def test_wide_things_scroll_on_screens_and_are_whole_on_paper():
    screen, wide, phone, printed = re.split(r"@media [^{]+\{", re.sub(r"/\*.*?\*/", "", CSS, flags=re.S))
    (table,) = re.findall(r"\.jp-RenderedHTMLCommon table \{([^}]*)\}", screen)
    assert "overflow-x: auto" in table and "max-width: 100%" in table and "display: block" in table
    assert re.search(r"\.jp-RenderedImage[^{]*\{ overflow-x: auto", screen) and "max-width: 62rem" in screen
    assert "position: fixed" in wide and "picture img" in phone
    (table,) = re.findall(r"\.jp-RenderedHTMLCommon table \{([^}]*)\}", printed)
    assert "display: table" in table and "overflow: visible" in table and "break-inside: avoid" in printed
    assert "overflow-x: auto" not in printed and CSS.count("{") == CSS.count("}")
