"""The bibliography holds what code, notebooks and documentation cite, and the commands that these name exist."""

import re
import shlex
from pathlib import Path

import nbformat
import pytest
import typer

from afdslib import cli
from afdslib.studies import recipes
from afdslib.studies import students as distillation_study

ROOT = Path(__file__).parent.parent
BIBLIOGRAPHY = (ROOT / "references.bib").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "from_the_old_code.md").read_text(encoding="utf-8")
NOTEBOOKS = {
    file.stem: "\n\n".join(cell.source for cell in nbformat.read(file, as_version=4).cells)
    for file in sorted((ROOT / "notebooks").glob("*.ipynb"))
}
SOURCES = [file for suffix in ("py", "toml") for file in (ROOT / "afdslib").rglob(f"*.{suffix}")]
PAGES = [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]
TEXTS = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in (*SOURCES, *PAGES)} | NOTEBOOKS
ENTRIES = re.findall(r"^@\w+\{\w+,\n(.*?)^\}", BIBLIOGRAPHY, re.MULTILINE | re.DOTALL)
VENUES = "ICLR|CVPR|ICCV|ECCV|ICML|NeurIPS|NIPS|BMVC|JMLR"
MONTHS = "January February March April May June July August September October November December".split()


def named(text: str) -> set[tuple[str, str]]:
    """(surname, year) of citations such as "Holm 1979", "He et al. (2016)", "Gao, Xu, "Title", ICLR 2019"."""
    found = set(re.findall(r"\b([A-Z][a-z]+)(?: et al\.?)?,? \(?((?:19|20)\d\d)\b(?![-.]\d)", text))
    who = r"\b([A-Z][a-z]+)(?:, [A-Z][a-z]+| et al\.)+"
    found |= set(re.findall(rf"{who}[^.;\n]{{0,90}}?\b(?:{VENUES}) (\d{{4}})", text))
    return {(name, year) for name, year in found if name not in MONTHS}


def known(name: str, year: str) -> bool:
    who, when = rf"author\s*= \{{[^=]*\b{name}\b", rf"year\s*= \{{{year}\}}"
    return any(re.search(who, entry) and re.search(when, entry) for entry in ENTRIES)


def test_every_paper_cited_by_number_is_in_the_bibliography():
    cited = {one for text in TEXTS.values() for one in re.findall(r"arXiv[\s:]+(\d{4}\.\d{4,5})", text)}
    assert len(cited) > 8 and not {one for one in cited if one not in BIBLIOGRAPHY}
    assert len(NOTEBOOKS) == 8 and any("1612.03928" in text for text in NOTEBOOKS.values())


def test_a_citation_by_name_and_year_is_seen():
    for text, found in {
        "corrected. Holm 1979.": {("Holm", "1979")},
        "(Chan et al. 1983) and He et al. (2016), table 1": {("Chan", "1983"), ("He", "2016")},
        "Zagoruyko, Komodakis, ICLR 2017, 200 epochs": {("Zagoruyko", "2017")},
        "Source: Fang et al., DepGraph, CVPR 2023. [code]": {("Fang", "2023")},
        "in September 2026; CUB-200-2011; ILSVRC 2012; ILSVRC2012_img": set(),
    }.items():
        assert named(text) == found


def test_every_paper_cited_by_name_and_year_is_in_the_bibliography():
    cited = {(*one, where) for where, text in TEXTS.items() for one in named(text)}
    assert {("Holm", "1979"), ("Chan", "1983"), ("Zagoruyko", "2017")} <= {one[:2] for one in cited}
    assert not [one for one in sorted(cited) if not known(*one[:2])]
    # Papers whose code or numbers are quoted under another name.
    for word, entry in {"RepDistiller": "tian2020crd", "BSS": "chen2019bss", "FitNets": "romero2015fitnets"}.items():
        cited = word == "BSS" or any(word in text for text in TEXTS.values())  # BSS is one of DELTA's competitors
        assert cited and f"{{{entry}," in BIBLIOGRAPHY, word


def test_entries_are_complete_and_their_keys_unique():
    entries = re.findall(r"^@\w+\{(\w+),\n(.*?)^\}", BIBLIOGRAPHY, re.MULTILINE | re.DOTALL)
    assert len(dict(entries)) == len(entries) == BIBLIOGRAPHY.count("\n@") > 30
    for key, fields in entries:
        assert {"author", "title", "year"} <= set(re.findall(r"^  (\w+)\s*=", fields, re.MULTILINE)), key
        assert fields.count("{") == fields.count("}"), key


def commands(text: str) -> set[str]:
    """Every command of a text in backticks, without the program's name."""
    found = re.findall(r"`([^`\n]*(?:afdslib\.cli|afds) [^`\n]*)`", text)
    return {one.partition("afdslib.cli ")[2] or one.partition("afds ")[2] for one in found if "..." not in one}


COMMANDS = sorted(commands(GUIDE))
STUDENTS = "\n\n".join(text for name, text in NOTEBOOKS.items() if name[:2] in ("06", "07"))


@pytest.mark.parametrize("command", sorted({*COMMANDS, *commands(STUDENTS)}))
def test_a_command_of_the_guide_or_of_the_students_notebooks_is_understood(command):
    name, *arguments = shlex.split(command)
    found = typer.main.get_command(cli.app).commands[name]
    if name == "runs":
        found, arguments = found.commands[arguments[0]], arguments[1:]
    params = found.make_context(name, [*arguments]).params
    assert params.get("recipe") in {None, *recipes.RECIPES}
    if command in COMMANDS and "--profile paper" in command:  # trains two hundred epochs
        chosen = distillation_study.get(*(params[name] for name in ("part", "profile", "scale")))
        assert chosen.student_training.steps == chosen.teacher_training.steps == 200 * 390
        assert chosen.student_training.batch_size == 128


def test_the_guide_names_the_studies_of_the_paper_profile_and_every_command_of_the_old_readmes():
    assert sum("--profile paper" in one for one in COMMANDS) >= 2
    assert {"distill --recipe scenes-at --data-dir DIR", "distill --recipe cub-at --data-dir DIR"} <= commands(STUDENTS)
    assert len(COMMANDS) > 15
    for old in (
        "--depth 40 --width 1", "--depth 16 --width 2", "--depth 40 --width 2", "--beta 1e+3", "--alpha 0.9",
        "resnet-34-export.pth", "resnet-18-at-export.pth", "python imagenet.py", "bash init.sh", "config/cfgs.py",
        "python train.py", "pip install -r requirements.txt", "pytorch/tnt"
    ):  # fmt: skip
        assert old in GUIDE, old
