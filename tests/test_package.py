"""The package: a source archive and a wheel are built, and the wheel alone does what README.md begins with."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BUILD = "import sys; from hatchling import build; print(getattr(build, sys.argv[1])(sys.argv[2]))"
"""What pip runs; without an environment of its own, so that nothing is downloaded."""

ONE_LINER = """
import sys
installed, source = sys.argv[1:]
sys.path = [installed] + [path for path in sys.path if not path.startswith(source)]
import torch, bnfuse
from torch import nn
assert bnfuse.__file__.startswith(installed), bnfuse.__file__

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())

model, x = build().eval(), torch.randn(2, 3, 8, 8)
model[1].running_mean.normal_(), model[1].running_var.uniform_(0.5, 2)
fused = bnfuse.fuse(model, x)
assert isinstance(fused[1], nn.Identity)
with torch.no_grad():
    torch.testing.assert_close(fused(x), model(x))
    bnfuse.save(fused, f"{installed}/fused.safetensors")
    assert torch.equal(bnfuse.load(build(), f"{installed}/fused.safetensors")(x), fused(x))
print(bnfuse.plan(model, x))

from bnfuse.tools.cli import main
assert main(["plan", "torch.nn:Identity", "--input", "2x3"]) == 0
elsewhere = {name: module.__file__ for name, module in sys.modules.items()
             if name.partition(".")[0] == "bnfuse" and not (module.__file__ or installed).startswith(installed)}
assert not elsewhere, elsewhere
"""


def built(hook: str, source: Path, target: Path) -> Path:
    """Build from a folder into another one."""
    command = [sys.executable, "-c", BUILD, hook, str(target)]
    made = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    return target / made.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("build_sdist", ROOT, tmp_path_factory.mktemp("archive"))


@pytest.fixture(scope="module")
def wheel(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the archive, as pip would where there is no wheel."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    [unpacked] = folder.iterdir()
    return built("build_wheel", unpacked, tmp_path_factory.mktemp("wheel"))


def files(folder: Path) -> set[str]:
    """The files of a folder, by their path from the root, without what Python leaves there."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_archive_holds_what_the_pages_and_the_tests_speak_of(archive: Path) -> None:
    with tarfile.open(archive) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    expected = {"Makefile", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"}
    for folder in ("src/bnfuse", "tests", "bench", "fuzz", "docs"):
        expected |= files(ROOT / folder)
    assert expected - held == set()
    assert len(expected) > 300
    assert {name for name in held if name.startswith((".venv", "build", "dist"))} == set()


def test_the_wheel_holds_the_library_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        held = set(packed.namelist())
        [entries] = [packed.read(name).decode() for name in held if name.endswith("entry_points.txt")]
    about = {name for name in held if ".dist-info/" in name}
    assert held - about == {name.removeprefix("src/") for name in files(ROOT / "src" / "bnfuse")}
    assert "bnfuse/py.typed" in held
    assert "bnfuse = bnfuse.tools.cli:main" in entries


def test_the_wheel_works_where_there_is_no_source(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", str(installed), str(wheel)], check=True)
    made = subprocess.run(
        [sys.executable, "-I", "-c", ONE_LINER, str(installed), str(ROOT / "src")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("Sequential: 1 batch norm, 1 fused, 0 kept\n")
