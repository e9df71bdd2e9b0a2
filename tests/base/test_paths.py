"""Where files go: an installed copy writes into the user's folders, and no folder is made for a mistyped output."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import afdslib
from afdslib import cli
from afdslib.base.atomic import output_path
from afdslib.base.errors import AFDSError


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the folders' names differ by platform")
@pytest.mark.parametrize("given", [{"XDG_CACHE_HOME": "caches", "XDG_DATA_HOME": "kept"}, {}, {"AFDS_HOME": "own"}])
def test_an_installed_copy_keeps_out_of_site_packages(given, tmp_path):
    site = tmp_path / "site-packages"
    source = Path(afdslib.__file__).parent
    shutil.copytree(source / "base", site / "afdslib" / "base")
    shutil.copy(source / "__init__.py", site / "afdslib")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AFDS_", "XDG_"))}
    env = clean | {"HOME": str(tmp_path), "PYTHONPATH": str(site)} | {k: str(tmp_path / v) for k, v in given.items()}
    code = "from afdslib.base import paths; print(paths.__file__, paths.raw_data(), paths.cache(), paths.runs())"
    out = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True).stdout
    file, *folders = [Path(name).relative_to(tmp_path).as_posix() for name in out.split()]
    caches, kept = ("own/data", "own") if "AFDS_HOME" in given else ("caches/afds", "kept/afds")
    if not given:
        caches, kept = ".cache/afds", ".local/share/afds"
    assert file.startswith("site-packages")
    assert folders == [f"{caches}/raw", f"{caches}/cache", f"{kept}/runs"]


def test_an_output_in_a_missing_folder_is_refused_and_the_folder_not_made(tmp_path, capsys):
    missing = tmp_path / "nope" / "x.png"
    with pytest.raises(AFDSError, match="the folder .*nope of .*x.png does not exist; create it"):
        output_path(missing)
    with pytest.raises(AFDSError, match="is a folder; give the name of the file"):
        output_path(tmp_path)
    assert output_path(tmp_path / "x.png") == tmp_path / "x.png"
    for command in (
        ("maps", "a.pth", "--image", "b.jpg", "--output", str(missing)),
        ("export", "--run", "0123", "--out", str(missing.with_suffix(".onnx"))),
        ("bench", "--out", str(missing.with_suffix(".csv"))),
    ):
        assert cli.main(list(command)) == 2
        assert re.search("nope.* does not exist", err := capsys.readouterr().err) and err.count("\n") == 1
    assert not missing.parent.exists()
