"""The committed report says what the committed results say: it is built anew from them alone, and compared."""

import re
import shutil
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from afdslib.base import paths
from afdslib.report import pipeline

pytestmark = pytest.mark.slow

PROFILE = "imagenet32"
COMMITTED = paths.root() / "figures" / PROFILE / "report.html"


def sayings(html: str) -> list[str]:
    """What a report says: headings, paragraphs, list items, table cells and printed lines, without the cells' times."""
    soup = BeautifulSoup(html, "html.parser")
    for table in soup.find_all("table"):
        if "time of the notebook here" in table.get_text():
            table.decompose()
    for code in soup.select(".jp-InputArea, .highlight, script, style"):
        code.decompose()
    found = soup.find_all(["h1", "h2", "h3", "p", "li", "td", "th", "pre"])
    texts = [re.sub(r"\s+", " ", tag.get_text(" ")).strip() for tag in found]
    return [text for text in texts if text]


def test_the_report_built_from_the_committed_results_says_the_same_and_one_of_a_changed_number_does_not(
    tmp_path, monkeypatch
):
    """In a checkout with an empty run store and without any image."""
    ignored = shutil.ignore_patterns("report.html", "executed")
    shutil.copytree(COMMITTED.parent, tmp_path / "figures" / PROFILE, ignore=ignored)
    monkeypatch.setenv("AFDS_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setenv("AFDS_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("AFDS_FRESH", raising=False)
    rebuilt = pipeline.execute(PROFILE, {"scale": "quick"}, only=["08"], echo=lambda _: None)
    mine, theirs = (sayings(file.read_text(encoding="utf-8")) for file in (rebuilt, COMMITTED))
    assert len(theirs) > 300
    differ = [(a, b) for a, b in zip(mine, theirs, strict=False) if a != b]
    assert mine == theirs, f"write it again: afds run --profile {PROFILE} --notebook 08; first difference: {differ[:1]}"
    number = next(cell for cell in theirs if re.fullmatch(r"\d\d\.\d ± \d\.\d", cell))
    assert sayings(COMMITTED.read_text(encoding="utf-8").replace(number, "99.9 ± 0.1")) != theirs


def test_the_report_embeds_its_pictures_and_stays_below_ten_megabytes():
    text = COMMITTED.read_text(encoding="utf-8")
    images = BeautifulSoup(text, "html.parser").find_all("img")
    assert len(images) > 10 and all(image["src"].startswith("data:image/") for image in images)
    assert not [image["alt"] for image in images if not image["alt"].startswith("figure ")]
    assert Path(COMMITTED).stat().st_size < 10e6
