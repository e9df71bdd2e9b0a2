"""Mutated files, configurations and command lines give a result or one sentence: no traceback, no hang, no stray file.

AFDS_ROBUST=full tries 10,000 mutations, else 300. The number of a failing one is its seed.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import pytest
import tiny
from toy_runs import ToySource, ToyTrain

from afdslib import afs, cli, data, runs
from afdslib.base.errors import AFDSError
from afdslib.inference import bench

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs alarms")]

TRIES = (10_000 if os.environ.get("AFDS_ROBUST") == "full" else 300) // 6
SECONDS = 60
ODD = [
    None, "", " ", -1, 0, 10**30, 1e308, -0.0, True, [], {}, [[]], "x" * 5000, "../x", "/x", "\n", "é\u2028", "nan",
    {"class": "ToyTrain"}, {"float": "x"}, {"float": []}, {"class": None}, {"run": "0" * 12}, [0] * 50,
]  # fmt: skip


def bytes_of(content: bytes, draw: random.Random) -> bytes:
    """A copy with a few bytes changed, cut off, repeated, dropped or put in."""
    changed = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = draw.randrange(len(changed) + 1)
        to = min(len(changed), at + draw.choice([1, 4, 64, 1000]))
        kind = draw.randrange(5)
        if kind == 0:
            changed[at:to] = bytes(byte ^ 1 << draw.randrange(8) for byte in changed[at:to])
        elif kind == 1:
            del changed[at : len(changed) if draw.random() < 0.3 else to]
        elif kind == 2:
            changed[at:at] = changed[at:to]
        elif kind == 3:
            changed[at:at] = draw.randbytes(draw.choice([1, 8, 300]))
        else:
            changed[at:to] = bytes(to - at)
    return bytes(changed)


def json_of(value, draw: random.Random):
    """A copy with one value replaced, dropped or moved, at any depth."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        if draw.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if draw.random() < 0.1:
            return value | {draw.choice(["x", "class", key + "s"]): value[key]}
        return value | {key: json_of(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], json_of(value[at], draw), *value[at + 1 :]]
    return draw.choice(ODD)


@contextlib.contextmanager
def tells(folder: Path, seed: int):
    """Only an AFDSError in one line may leave the block, within a minute, and nothing new may lie beside `folder`."""
    before = sorted(folder.parent.iterdir())

    def hang(*_):
        pytest.fail(f"try {seed} hangs")

    old = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        yield
    except AFDSError as error:
        assert str(error).strip() and "\n" not in str(error), f"try {seed}: {error!r}"
    except Exception as error:
        raise AssertionError(f"try {seed} ends with {error!r}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert sorted(folder.parent.iterdir()) == before, f"try {seed} wrote beside its folder"


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives(kind, home):
    tree = tiny.tree(home / "tree", train=3, test=2)
    files, file = sorted(tree.rglob("*.png")), home / f"images.{kind}"
    for seed in range(TRIES // 2):
        draw = random.Random(f"{kind}{seed}")
        names = [str(one.relative_to(home)) for one in files]
        if draw.random() < 0.3:
            names[draw.randrange(len(names))] = draw.choice(["../x.png", "/x.png", "tree/../../x.png", "x" * 300])
        if kind == "zip":
            archive = zipfile.ZipFile(file, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
        else:
            archive = tarfile.open(file, draw.choice(["w", "w:gz"]))
        with archive:
            for name, one in zip(names, files, strict=True):
                (archive.write if kind == "zip" else archive.add)(one, name)
        file.write_bytes(bytes_of(file.read_bytes(), draw))
        with tells(home, seed):
            data.load(file, size=16, skip_corrupt=draw.random() < 0.5)
        shutil.rmtree(home / "data", ignore_errors=True)


def test_weight_files(home):
    file = home / "net.safetensors"
    afs.save(tiny.gated(), file)
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for seed in range(TRIES):
        draw = random.Random(seed)
        changed = bytes_of(content[: 8 + length + 100], draw) + content[8 + length + 100 :]
        if draw.random() < 0.6:  # a header that can be read
            spoilt = json_of(header, draw)
            if draw.random() < 0.5:
                said = {key: value for key, value in header["__metadata__"].items() if value[:1] in "[{"}
                meta = {key: json.dumps(json_of(json.loads(value), draw)) for key, value in said.items()}
                spoilt = header | {"__metadata__": header["__metadata__"] | meta}
            text = json.dumps(spoilt).encode()
            changed = len(text).to_bytes(8, "little") + text + content[8 + length :]
        file.write_bytes(changed)
        with tells(home, seed):
            afs.load(file)


def mutated(content: bytes, name: str, draw: random.Random) -> bytes:
    """A file with some bytes changed, or one value of its JSON, or of one line."""
    if name.endswith("csv") or draw.random() < 0.3:
        return bytes_of(content, draw)
    lines = content.decode().splitlines() if name.endswith("jsonl") else [content.decode()]
    at = draw.randrange(len(lines))
    lines[at] = json.dumps(json_of(json.loads(lines[at]), draw), separators=(",", ":"))
    return ("\n".join(lines) + "\n").encode()


def check_files(home: Path, folder: Path, names: list[str], uses: list) -> None:
    """Uses of a folder of which one of the named files is mutated: a more frequent name is mutated more often."""
    whole = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    for seed in range(TRIES):
        draw = random.Random(seed)
        name = draw.choice(names)
        for other, content in whole.items():
            (folder / other).write_bytes(mutated(content, name, draw) if other == name else content)
        for use in uses:
            with tells(home, seed):
                use()


def test_configurations_and_results_of_the_store(home):
    config = ToyTrain(steps=2, source=ToySource())
    first = runs.get_or_run(config)

    def listed():
        shutil.rmtree(home / "data", ignore_errors=True)
        assert len(runs.list_runs()) == 2

    uses = [partial(use, first.id) for use in (runs.show, runs.finished, runs.load_config)]
    uses += [lambda: runs.publish([runs.lookup(config)], "tiny"), listed]
    check_files(home, first.path, ["config.json", "config.json", "result.json", "times.json", "environment.json"], uses)


def test_committed_results(home):
    configs = [ToySource(), ToyTrain(steps=2, source=ToySource(2)), ToyTrain(steps=3)]
    runs.publish([runs.get_or_run(config, store=home / "store") for config in configs], "tiny")
    id = runs.run_id(configs[1])
    uses = [
        lambda: runs.lookup(configs[1]), lambda: runs.show(id), lambda: runs.finished(id)[1].history(),
        lambda: list(runs.records()), runs.list_committed,
        lambda: runs.publish([runs.get_or_run(configs[2], store=home / "store")], "tiny"),
    ]  # fmt: skip
    check_files(home, home / "data/results/tiny", ["runs.jsonl", "runs.jsonl", "curves.csv"], uses)


PLANNED = ["run", "report", "study", "distill"]  # never begun: only what ends in seconds and downloads nothing is
COMMANDS = [
    *PLANNED, "runs", "list", "show", "rm", "resume", "export", "predict", "maps", "data", "bench", "evaluate",
    "doctor",
]  # fmt: skip
WORDS = [
    *COMMANDS, "--run", "--model", "--format", "--out", "onnx", "torch", "net.safetensors", "image.png", "none",
    "--profile", "demo", "mine", "--dry-run", "--set", "lr=x", "x=1", "--data-dir", "--committed", "-1", "1e400", "",
    "0" * 12, "abc", "é", "*", "/nope/x", "--help", "--nope", "--", "-", "--device", "cuda:9", "--top", "--size", "0",
    "\x00", "--part", "comparison", "--finished", "--workers", "--recipe", "resnet18-at", "--data", "tree", "--epochs",
    "1", "--precision", "bf16", "--case", "toy", "--threads", "--width", "0.125",
]  # fmt: skip


def test_command_lines(home, monkeypatch):
    """Whatever the words: 0, or 2 and one line on stderr."""
    monkeypatch.setattr(bench, "CASES", {"toy": lambda settings: iter(())})
    runs.get_or_run(ToyTrain(steps=2))
    afs.save(tiny.network(), home / "net.safetensors")
    (home / "image.png").write_bytes(next(tiny.tree(home / "tree", train=1, test=1).rglob("*.png")).read_bytes())
    before = sorted(home.parent.iterdir())
    for seed in range(TRIES):
        draw = random.Random(seed)
        words = [draw.choice(COMMANDS)] + [draw.choice(WORDS) for _ in range(draw.randrange(7))]
        words[1:1] = ["--dry-run"] if words[0] in PLANNED else []
        output, errors = io.StringIO(), io.StringIO()
        with tells(home, seed), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = cli.main(words)
        lines = [line for line in errors.getvalue().splitlines() if line.startswith("afds: ")]
        assert code == 0 or (code == 2 and len(lines) == 1), (seed, words, code, errors.getvalue())
        assert "Traceback" not in errors.getvalue() + output.getvalue(), (seed, words)
        assert sorted(home.parent.iterdir()) == before, (seed, words)
