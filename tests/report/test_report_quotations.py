"""Numbers of others stand in one list; notebooks 06 and 07, the students' tables and the recipes quote nothing else."""

import re

from afdslib.base import paths
from afdslib.report import claims, pipeline, quoted
from afdslib.studies import recipes

# (data, student): method -> top-1 (and top-5), as their sources print them. Nothing else may be quoted.
ACCURACY = {
    ("CIFAR-10", "WRN-16-1"): {"teacher": "93.69", "alone": "91.23", "at": "92.07"},  # AT's paper
    ("CIFAR-100", "WRN-16-2"): {"alone": "73.26", "kd": "74.92", "at": "74.08", "nst": "73.68"},  # RepDistiller
    ("CIFAR-10", "ResNet-20"): {"alone": "92.37", "kd": "92.82", "at": "93.21", "nst": "92.83"},  # the Zoo
}
ERROR = {
    ("ImageNet", "ResNet-18"): {"alone": "30.4/10.8", "at": "29.3/10.0"},  # AT's paper
    ("ImageNet", "Inception-BN"): {"alone": "25.74/8.07", "nst": "24.81/7.55", "nst-poly+kd": "24.34/7.11"},  # NST's
    ("ImageNet", "modified ResNet-50"): {"nst-poly+kd": "21.05/5.56"},  # NST's paper
}
RECIPES = {
    "wrn-16-2": "93.69", "wrn-16-1": "91.23", "wrn-16-1-at": "92.07", "resnet18": "30.4/10.8",
    "resnet18-at": "29.3/10.0", "inception-bn": "25.74/8.07", "inception-bn-nst": "24.81/7.55",
    "inception-bn-nst-kd": "24.34/7.11", "resnet50-senet-nst-kd": "21.05/5.56"
}  # fmt: skip
NOTEBOOKS = [file for file in pipeline.notebooks(paths.root() / "notebooks") if file.name[:2] in ("06", "07")]


def test_the_quotations_are_those_of_the_list_and_no_others():
    found = {
        (q.measure, q.data, re.sub("^the ", "", q.networks.partition(" to ")[2])): q.numbers
        for q in quoted.quotations()
        if q.source
    }
    assert [("quoted.table(study)" in file.read_text(encoding="utf-8")) for file in NOTEBOOKS] == [True, True]
    assert found == {("accuracy", *k): v for k, v in ACCURACY.items()} | {("error", *k): v for k, v in ERROR.items()}


def test_the_students_table_quotes_the_list():
    rows = {"teacher": ("", "wrn-16-2"), "alone": ("", "wrn-16-1"), "at": ("wrn-16-2", "wrn-16-1")}
    numbers = {method: quoted.reported("cifar10", *pair, method) for method, pair in rows.items()}
    assert numbers == ACCURACY["CIFAR-10", "WRN-16-1"]
    assert quoted.reported("cifar10", "wrn-40-2", "wrn-16-1", "at") == quoted.reported("digits", "", "a", "alone") == ""


def test_the_recipes_quote_the_list():
    reported = {name: recipe.reported for name, recipe in recipes.RECIPES.items() if recipe.reported}
    numbers = {name: re.findall(r"\d+\.\d+(?:/\d+\.\d+)?", text) for name, text in reported.items()}
    assert numbers == {name: [number] for name, number in RECIPES.items()}


def test_the_claims_quote_the_list():
    tops = [[text.partition("/")[0] for text in numbers.values()] for numbers in ERROR.values()]
    quoted = [row["quoted"] for row in claims._written()["students"] if "quoted" in row]
    assert quoted == [["91.23", "92.07"], tops[0], tops[1][:2], tops[1][1:]]
