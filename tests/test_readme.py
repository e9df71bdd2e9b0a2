"""The example of the README runs as it is printed, with a small network, a small tree and few steps put in."""

import ast
import contextlib
import re
from pathlib import Path

import pytest
import tiny
import torch

from afdslib import afs, runs, training
from afdslib.afs import macs
from afdslib.inference.predict import predict
from afdslib.report import answer, comparison, speed
from afdslib.report import numbers as cited
from afdslib.studies import profiles, statistics
from afdslib.studies.comparison import Comparison

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def example() -> str:
    """The Python block of the section on the library."""
    section = README.split("\n## The library\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    return block


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The names of the example after it has run, and its folder."""
    folder = tmp_path_factory.mktemp("readme")
    tiny.tree(folder / "tree")
    torch.save(tiny.network(classes=7, stem="cifar").state_dict(), folder / "weights.pth")
    stand_ins = {
        '"path/to/imagefolder", size=224': f'"{folder / "tree"}", size={tiny.SIZE}',
        '"resnet50"': '"resnet14"',
        'weights="imagenet"': f'weights="{folder / "weights.pth"}", stem="cifar", width={tiny.WIDTH}',
        "(3, 224, 224)": f"(3, {tiny.SIZE}, {tiny.SIZE})",
        "count=3000": "count=6",
        "step == 1500": "step == 3",
        "(1500, 3000)": "(3, 6)",
    }
    code = example()
    for printed, stand_in in stand_ins.items():
        assert printed in code, printed
        code = code.replace(printed, stand_in)
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setenv("AFDS_HOME", str(folder))
        exec(compile(code, "README.md", "exec"), names)
    return names, folder


def test_it_is_short_its_imports_are_all_used_and_links_lead_to_files():
    lines = [line for line in example().splitlines() if line.strip() and not line.startswith(("import ", "from "))]
    assert len(lines) <= 18 and max(map(len, lines)) <= 120 and len(README.splitlines()) <= 150
    tree = ast.parse(example())
    imported = {a.name for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names}
    assert imported - {"afdslib"} <= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert len(links) >= 3 and all((Path(__file__).parents[1] / link).exists() for link in links)


def test_the_network_meets_the_budget_was_trained_and_is_used_as_the_readme_says(ran):
    names, folder = ran
    assert names["step"] == 6
    model, splits = names["model"], names["splits"]
    measured = training.evaluate(model, splits.statistics, count_macs=True).macs.total
    # It was met at the third step; the gates have moved since.
    assert 0.05 < measured / macs.count(model, (3, tiny.SIZE, tiny.SIZE)).total < 0.25
    assert any(bool((layer.m == 0).any()) for layer in afs.layers(model).values())
    first = tiny.network(classes=7, stem="cifar").conv1.weight
    assert not torch.equal(next(iter(afs.layers(model).values())).conv.weight.abs(), first.abs())
    assert "afds predict --model small.onnx " in README
    ((_, classes),) = predict([folder / "tree" / "test" / "red" / "0.png"], folder / "small.onnx")
    assert sorted(name for name, _ in classes) == sorted(tiny.CLASSES)


def test_the_finding_is_that_of_the_committed_files():
    said = str(answer.text(comparison.committed()))
    assert "-2.9 [-3.6, -2.2] on CIFAR-10 (32 px), 60 per class (10 seeds" in said and "11.07" in said
    assert "-2.9 [-3.6, -2.2]\npoints of test accuracy (95 % interval, 10 seeds)" in README and "+11.07" in README


def test_the_results_table_and_the_sentence_below_the_figure_are_those_of_the_committed_files():
    sweep = cited.read("imagenet32/quick/sweep")
    compared = cited.read("imagenet32/quick/comparison-cifar10-60")
    disjoint = cited.read("imagenet32-disjoint/quick/comparison-tiny-imagenet-32-target40-60")
    for table, budget, methods in (
        (sweep, 0.1, ("l2", "afd")), (sweep, 1.0, ("l2", "afd")),
        (compared, 0.1, ("afd+afs", "delta+taylor", "l2+width-kd")),
        (disjoint, 0.1, ("afd+afs", "delta+taylor", "l2+width")),
    ):  # fmt: skip
        cells = []
        for method in methods:
            values = 100 * table[(table.method == method) & (table.budget == budget)].test_accuracy
            cells.append(f"{values.mean():.1f} ± {values.std():.1f} %")
        assert f"| {' / '.join(cells)} |" in README
    students = cited.read("imagenet32/quick/attention")
    first = students[students.teacher.fillna("wrn-16-2") == "wrn-16-2"]
    medians = [100 * first[first.method == m].test_accuracy.median() for m in ("alone", "at", "kd", "at-kd", "nst")]
    assert f"| {' / '.join(f'{value:.1f}' for value in medians)} % |" in README
    (source,) = (record for _, record in runs.records("imagenet32") if record["id"] == "49ed7a9d7b82")
    assert f"| {100 * source['metrics']['test_accuracy']:.1f} % |" in README
    fast = speed.best(speed.benchmarks())
    fast = fast[(fast.network == "resnet101-10x") & (fast.variant == "compact")].sort_values("batch").faster
    assert f"| {' / '.join(f'{value:.1f}' for value in fast)} times as fast |" in README
    assert "ahead of the narrower networks down to 2x and behind the better of them from 4x on" in README
    means = compared.groupby(["method", "budget"]).test_accuracy.mean().unstack()
    ahead = means.loc["afd+afs"] > means.loc[["l2+width", "l2+width-kd"]].max()
    assert dict(ahead) == {budget: budget >= 0.5 for budget in means.columns}


def test_what_it_says_of_detached_attention_holds_in_the_committed_results():
    assert "made networks better on CIFAR-10 and was not confirmed where source and target\nshare no class" in README
    for profile, better in (("imagenet32", True), ("imagenet32-disjoint", False)):
        compared = comparison.Compared(Comparison(profiles.get(profile, "quick")))
        table = compared.attention
        here = table[(table.budget - 0.1).abs() < 1e-9]
        joint, detached = (statistics.by_seed(here[here.attention == name]) for name in ("joint", "detached"))
        assert (statistics.paired(detached, joint).difference.low > 0) == better
    # The last one, where one seed lost half of its accuracy; settled by importance, it does not.
    assert "one of five seeds lost half of its accuracy to a channel that was removed" in README
    settled = compared.beside["settled"]
    mended = statistics.by_seed(settled[(settled.attention == "detached") & ((settled.budget - 0.1).abs() < 1e-9)])
    assert len(mended) == len(detached) == 5
    assert sum(detached[seed] < 0.52 * value for seed, value in mended.items()) == 1
