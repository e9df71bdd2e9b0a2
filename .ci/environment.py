"""Prints environment.yml: the direct dependencies of pyproject.toml as requirements.lock pins them (`make lock`)."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

root = Path(__file__).resolve().parent.parent
project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
platform = {
    "sys_platform": "linux",
    "platform_machine": "x86_64",
    "python_version": "3.11",
    "python_full_version": "3.11.0",
}
locked = {}
for line in re.findall(r"^[a-z0-9][^\\\n]*", (root / "requirements.lock").read_text(), re.MULTILINE):
    pin = Requirement(line)
    if pin.marker is None or pin.marker.evaluate(platform):
        locked[canonicalize_name(pin.name)] = str(pin.specifier)

print("# For conda users: the pins of requirements.lock. Written by `make lock`, checked by tests/test_environment.py.")
print("name: afds\nchannels:\n  - conda-forge\ndependencies:\n  - python=3.11\n  - pip\n  - pip:")
for group in [project["dependencies"], *project["optional-dependencies"].values()]:
    for name in sorted(canonicalize_name(Requirement(text).name) for text in group):
        print(f"      - {name}{locked[name]}")
print("      - -e .")
