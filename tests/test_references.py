"""The bibliography holds what the code cites, and the commands that the documentation names exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from afdslib import cli, recipes

ROOT = Path(__file__).parent.parent
BIBLIOGRAPHY = (ROOT / "references.bib").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "from_the_old_code.md").read_text(encoding="utf-8")


def test_every_paper_cited_by_number_is_in_the_bibliography():
    cited = set()
    for file in (ROOT / "afdslib").rglob("*.py"):
        cited |= set(re.findall(r"arXiv[\s:]+(\d{4}\.\d{4,5})", file.read_text(encoding="utf-8")))
    assert len(cited) > 8 and not {one for one in cited if one not in BIBLIOGRAPHY}


def test_entries_are_complete_and_their_keys_unique():
    entries = re.findall(r"^@(\w+)\{(\w+),\n(.*?)^\}", BIBLIOGRAPHY, re.MULTILINE | re.DOTALL)
    assert len(entries) == BIBLIOGRAPHY.count("\n@") > 30
    keys = [key for _, key, _ in entries]
    assert len(set(keys)) == len(keys)
    for _, key, fields in entries:
        names = set(re.findall(r"^  (\w+)\s*=", fields, re.MULTILINE))
        assert {"author", "title", "year"} <= names, key
        assert fields.count("{") == fields.count("}"), key


COMMANDS = sorted(
    {
        text.partition("afdslib.cli ")[2] or text.partition("afds ")[2]
        for text in re.findall(r"`([^`\n]*(?:afdslib\.cli|afds) [^`\n]*)`", GUIDE)
        if "..." not in text
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_guide_is_understood(command):
    name, *arguments = shlex.split(command)
    app = typer.main.get_command(cli.app)
    found = app.commands[name]
    if name == "runs":
        found, arguments = found.commands[arguments[0]], arguments[1:]
    context = found.make_context(name, [*arguments])
    if "recipe" in context.params:
        assert context.params["recipe"] in recipes.RECIPES


def test_the_guide_has_every_command_of_the_old_readmes():
    assert len(COMMANDS) > 15
    for old in (
        "--depth 40 --width 1", "--depth 16 --width 2", "--depth 40 --width 2", "--beta 1e+3", "--alpha 0.9",
        "resnet-34-export.pth", "resnet-18-at-export.pth", "python imagenet.py", "bash init.sh", "config/cfgs.py",
        "python train.py", "pip install -r requirements.txt", "pytorch/tnt",
    ):  # fmt: skip
        assert old in GUIDE, old
