"""Tiny data sets in the layouts of the real ones, made on the spot."""

import functools
import http.server
import io
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Maker:
    """Writes fixtures below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def images(self, base: Path, names: list[str], *, size: tuple[int, int] = (20, 16)) -> Path:
        for seed, name in enumerate(names):
            path = base / name
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(seed, *size).save(path, quality=95)
        return base

    def tree(self, name: str, counts: dict[str, dict[str, int]], *, size: tuple[int, int] = (32, 32)) -> Path:
        """`{"train": {"cat": 3}}` -> name/train/cat/0.jpg..2.jpg."""
        folders = {f"{part}/{one}": count for part, classes in counts.items() for one, count in classes.items()}
        names = [f"{folder}/{i:03d}.jpg".lstrip("/") for folder, count in folders.items() for i in range(count)]
        return self.images(self.folder / name, names, size=size)

    def tar(self, archive: Path, source: Path, *, mode: str = "w", names: list[str] | None = None) -> Path:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive, mode) as tar:
            for name in names or sorted(p.name for p in source.iterdir()):
                tar.add(source / name, arcname=name)
        return archive

    def tar_entry(self, archive: Path, name: str, **fields) -> Path:
        """A tar with one good image and one entry of the given name and TarInfo fields."""
        good = io.BytesIO()
        picture(0).save(good, "PNG")
        with tarfile.open(archive, "w") as tar:
            for entry, content, known in (("a/good.png", good.getvalue(), {}), (name, b"bad", fields)):
                info = tarfile.TarInfo(entry)
                for key, value in known.items():
                    setattr(info, key, value)
                info.size = len(content) if info.isfile() else 0
                tar.addfile(info, io.BytesIO(content) if info.isfile() else None)
        return archive


@pytest.fixture
def make(tmp_path) -> Maker:
    return Maker(tmp_path / "made")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on 127.0.0.1 for a folder: (folder, address)."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as one:
        thread = threading.Thread(target=one.serve_forever, daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{one.server_address[1]}"
        one.shutdown()
        thread.join()
