"""docs/architecture.md names every package."""

import re

from afdslib.base import paths

ROOT = paths.root()


def test_the_page_names_every_package():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = {folder.parent.name for folder in (ROOT / "afdslib").glob("*/__init__.py")}
    assert len(packages) == 12 and set(re.findall(r"^\| \d \| `(\w+)/?", page, re.MULTILINE)) >= packages
