"""Exporting both models to ONNX: norms are in the first file and not in the second."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from bnfuse.tools.cli import main

NETWORK = """
import torch
from torch import nn
from bnfuse.tools.zoo import randomise_

def net():
    torch.manual_seed(0)
    return randomise_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Sigmoid()))
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    path = tmp_path / "networks.py"
    path.write_text(NETWORK)
    return f"{path}:net"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find("json") if name in NEEDED else find(name))


NEEDED = ("onnx", "onnxscript")


def test_what_is_missing_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    files = [str(tmp_path / name) for name in ("a.onnx", "b.onnx")]
    assert main(["fuse", "no.such.module:factory", "--onnx", *files]) == 2
    assert "run pip install 'bnfuse[onnx]'" in capsys.readouterr().err


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ("a.onnx", "a.onnx", "would overwrite the first"),
        ("a.onnx", "b.pt", "write .onnx"),
        ("nowhere/a.onnx", "b.onnx", "cannot be written"),
    ],
)
def test_bad_files(before: str, after: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fuse", "no.such.module:factory", "--onnx", str(tmp_path / before), str(tmp_path / after)]) == 2
    assert text in capsys.readouterr().err


def test_both_models(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    files = [tmp_path / "before.onnx", tmp_path / "after.onnx"]
    assert main(["fuse", spec, "--input", "1x3x8x8", "--json", "--onnx", *map(str, files)]) == 0
    assert json.loads(capsys.readouterr().out)["onnx"] == list(map(str, files))
    before, after = (Counter(node.op_type for node in onnx.load(file).graph.node) for file in files)
    assert (before["BatchNormalization"], after["BatchNormalization"]) == (2, 1)
    assert before["Conv"] == after["Conv"] == 1
    assert sum(before.values()) == sum(after.values()) + 1
