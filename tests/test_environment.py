"""pyproject.toml, requirements.lock, environment.yml and the installed packages agree."""

import importlib.metadata
import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from afdslib import __version__
from afdslib.base import paths

LINUX = {"sys_platform": "linux", "platform_machine": "x86_64"} | {
    "python_version": "3.11", "python_full_version": "3.11.0"
}  # fmt: skip


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((paths.root() / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def direct(project) -> dict[str, Requirement]:
    """Direct dependencies, those of all extras included, by canonical name."""
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return {canonicalize_name(Requirement(text).name): Requirement(text) for group in groups for text in group}


@pytest.fixture(scope="module")
def entries() -> list[tuple[Requirement, int]]:
    """Every pin of the lock with its number of hashes."""
    text = re.sub(r"^#.*\n", "", (paths.root() / "requirements.lock").read_text(), flags=re.MULTILINE)
    parts = re.split(r"\n(?=\S)", text.strip())
    return [(Requirement(part.split("\\")[0].strip()), part.count("--hash=sha256:")) for part in parts]


@pytest.fixture(scope="module")
def locked(entries) -> dict[str, Version]:
    """Versions on Linux with Python 3.11 by canonical name."""
    pins = [pin for pin, _ in entries if pin.marker is None or pin.marker.evaluate(LINUX)]
    versions = {canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("==")) for pin in pins}
    assert len(versions) == len(pins), "a package is pinned twice"
    return versions


def test_lock_pins_every_package_exactly_with_hashes_and_every_direct_one_in_an_allowed_version(
    entries, direct, locked
):
    assert len(entries) > 50
    for pin, hashes in entries:
        assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), f"{pin} is not pinned"
        assert hashes > 0, f"{pin} has no hash"
    for name, requirement in direct.items():
        assert name in locked, f"{name} is missing from requirements.lock: make lock"
        assert requirement.specifier.contains(locked[name]), f"{name} {locked[name]} is not {requirement.specifier}"


def test_environment_yml_pins_the_direct_dependencies_as_the_lock_does_and_an_allowed_python(direct, locked, project):
    conda = yaml.safe_load((paths.root() / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    assert pip[-1] == "-e ." and "pip" in conda
    assert sorted(pip[:-1]) == sorted(f"{name}=={locked[name]}" for name in direct), "run: make lock"
    (python,) = [entry for entry in conda if str(entry).startswith("python=")]
    assert Requirement(f"python{project['requires-python']}").specifier.contains(python.removeprefix("python="))


def test_installed_packages_are_the_locked_ones_and_make_lock_uses_the_command_that_the_lock_names(
    project, direct, locked
):
    assert project["version"] == __version__ == importlib.metadata.version("afdslib")
    for name in direct:
        assert Version(importlib.metadata.version(name)).public == locked[name].public, f"{name}: make test installs it"
    makefile = re.sub(r"\\\n\s*", "", (paths.root() / "Makefile").read_text())
    header = (paths.root() / "requirements.lock").read_text().splitlines()[1].lstrip("# ")
    used = re.search(r"uv (pip compile .*)", makefile).group(1).replace(" -q", "")
    assert used.split() == header.removeprefix("uv ").split()
