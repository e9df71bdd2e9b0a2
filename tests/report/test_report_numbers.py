"""No result is typed into the text of notebooks 06 to 08; numbers have their interval, and come from files."""

import re

import nbformat
import pandas as pd
import pytest

from afdslib.base import paths
from afdslib.base.errors import AFDSError
from afdslib.report import numbers, pipeline

NOTEBOOKS = pipeline.notebooks(paths.root() / "notebooks")[-3:]

# Number with unit, as it stands in the text -> why it may be typed.
ALLOWED = {
    "11.07 points": "the abstract's claim [paper], method.md 1",
    "12.51": "an earlier version of the abstract [paper], method.md 1",
    "10x": "the claim's budget [paper], method.md 1",
    "100 %": "what a uniform attention's entropy is by definition",
    "0 %": "what a collapsed attention's entropy is by definition",
    "95 %": "the level of the intervals, fixed beforehand",
    "224 px": "the paper profile's images, a setting",
    "32 px": "the small profile's images, a setting",
    "64 px": "the speed study's images, a setting",
    "0.0025": "an example of the two scales, computed in the same sentence",
    "6.25": "an example of the two scales, computed in the same sentence",
    "90 %": "the share of the plain student's accuracy, a setting",
    "16 x": "the weight of NST's soft term [code], a setting",
}
UNIT = r"(?:%|percent\b|(?:percentage )?points?\b|px\b|ms\b|seconds?\b|minutes?\b|hours?\b|[MG] MACs|[x×](?![\w]))"
RESULT = re.compile(rf"(?<![\w.])[-+−±]?\d+(?:[.,]\d+)?\s*{UNIT}|(?<![\w.])[-+−±]?\d+[.,]\d{{2,}}(?![\w.])")


def results(text: str) -> list[str]:
    """What looks like a result in Markdown: numbers with a unit or several decimals; not in code, formulas, links."""
    text = re.sub(r"arXiv[: ]\d{4}\.\d{5}", " ", text)
    text = re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)", " ", text, flags=re.S)
    return [" ".join(found.split()) for found in RESULT.findall(text)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("it gains 3.1 points", ["3.1 points"]),
        ("11.07 points, 12.51 before", ["11.07 points", "12.51"]),
        ("at 57.4 % and +0.3%", ["57.4 %", "+0.3%"]),
        ("is −2 percentage points and 4.2x faster, 31 ms", ["−2 percentage points", "4.2x", "31 ms"]),
        ("0.573 of the images", ["0.573"]),
        ("`0.573` and $0.123$ and [a](b-1.234)", []),
        ("step 1 of 3, ResNet-101, CIFAR-10, 4500 steps, d = 0.5, arXiv 1612.03928", []),
        ("7x7 maps, version 2.11.0", []),
    ],
)
def test_a_typed_result_is_seen(text, found):
    assert results(text) == found


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_the_notebooks_text_holds_no_typed_result(file):
    cells = [c for c in nbformat.read(file, as_version=4).cells if c.cell_type == "markdown"]
    typed = [(found, cell.source[:60]) for cell in cells for found in results(cell.source) if found not in ALLOWED]
    assert not typed, "take these from a result file or from report.quoted, or allow them with a reason"
    assert all(len(reason.split()) > 3 and results(text) == [text] for text, reason in ALLOWED.items())


def test_a_difference_is_paired_signed_and_has_students_interval():
    one = pd.DataFrame({"seed": [0, 1, 2], "test_accuracy": [0.53, 0.55, 0.60]})
    other = pd.DataFrame({"seed": [2, 1, 0], "test_accuracy": [0.56, 0.52, 0.51]})
    found = numbers.minus(one, other)
    assert str(found) == "+3.0 [+0.5, +5.5] points" and found.n == 3
    assert str(numbers.minus(one[:1], other)) == "+2.0 points"  # one seed has no interval
    assert numbers.minus(one[:1], other[:1]) is None
    assert str(numbers.Number(-0.04, "points", signed=True)) == "+0.0 points"
    with pytest.raises(AFDSError, match="finite"):
        numbers.minus(one.assign(test_accuracy=float("nan")), other)


def test_a_missing_or_damaged_file_is_one_sentence(home):
    with pytest.raises(AFDSError, match=re.escape("toy/none.csv does not exist")):
        numbers.read("toy/none.csv")
    file = paths.results("toy") / "a.csv"
    file.parent.mkdir(parents=True)
    for content in (b"", b"\xff\xfe\x00\x81", b'a,b\n1,2\n1,2,3,"\n'):
        file.write_bytes(content)
        with pytest.raises(AFDSError, match="is no table") as info:
            numbers.read("toy/a.csv")
        assert "\n" not in str(info.value)
