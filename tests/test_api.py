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


def test_every_name_has_a_docstring_and_is_listed_once(page):
    rows = [line for line in page.splitlines() if line.startswith("- ")]
    assert len(rows) > 200
    assert not [row for row in rows if not re.match(r"- `[^`]+`: \S", row)]
    assert len(set(rows)) == len(rows)


def test_no_address_path_or_quoted_annotation_is_on_the_page(page):
    assert not re.search(r"0x[0-9a-f]{4,}|/home/|/usr/|ForwardRef|<function", page)
    assert not re.search(r": '[A-Za-z]+'[,)]", page)


def test_a_name_that_only_its_own_package_uses_is_not_listed(page):
    assert "- `taylor_importance(" in page and "- `collect_statistics(" in page
    assert "propagate(" not in page and "eval_mode(" not in page  # of afs, for afs


def test_signature_and_first_paragraph(page):
    assert (
        "- `convert(model: nn.Module, *, gates: str = 'all') -> nn.Module`: A copy, in the same mode, with selected "
        "convolutions in place of Conv2d-BatchNorm2d pairs: the same function." in page
    )
    assert page.index("## afdslib.afs\n") < page.index("- `convert(model: nn.Module") < page.index("## afdslib.afs.cha")


def test_a_function_is_told_by_its_first_paragraph_alone(api):
    def example(path: "str", *, echo=print) -> "int":
        """Counts
        things.

        Args: none.
        """

    assert api.signature("example", example) == "example(path: str, *, echo=print) -> int"
    assert api.paragraph(example.__doc__) == "Counts things."
    assert api.signature("AFDSError", ValueError) == "AFDSError"
