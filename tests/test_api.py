"""The API page is what the docstrings say now, and holds nothing of the machine it was written on."""

import importlib.util
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def api():
    spec = importlib.util.spec_from_file_location("api_page", HERE / ".ci" / "api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(api):
    return api.render()


def test_the_committed_page_is_up_to_date(api, page):
    assert api.FILE.read_text(encoding="utf-8") == page, "write it again with: make api"


def test_every_name_of_another_package_has_a_docstring_and_is_listed_once_without_addresses_and_paths(page):
    rows = [line for line in page.splitlines() if line.startswith("- ")]
    assert len(set(rows)) == len(rows) > 200 and all(re.match(r"- `[^`]+`: \S", row) for row in rows)
    assert not re.search(r"0x[0-9a-f]{4,}|/home/|/usr/|ForwardRef|<function", page)
    assert not re.search(r": '[A-Za-z]+'[,)]", page)
    assert "- `taylor_importance(" in page and "- `collect_statistics(" in page
    assert "propagate(" not in page  # of afs, for afs
    assert (
        "- `convert(model: nn.Module, *, gates: str = 'all') -> nn.Module`: A copy, in the same mode, with selected "
        "convolutions in place of Conv2d-BatchNorm2d pairs: the same function." in page
    )


def test_a_function_is_told_by_its_first_paragraph_alone(api):
    def example(path: "str", *, echo=print) -> "int":
        """Counts
        things.

        Args: none.
        """

    assert api.signature("example", example) == "example(path: str, *, echo=print) -> int"
    assert api.paragraph(example.__doc__) == "Counts things."
    assert api.signature("AFDSError", ValueError) == "AFDSError"
