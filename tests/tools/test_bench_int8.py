"""The benchmark of 8-bit integers: what it makes of what it has measured, without the packages that it takes."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import int8
from bench.section import Settings
from bnfuse.printing.text import table_text

FOUND = {
    "MobileNetV2": {
        "tensor": {"original": (8.0, 0.5), "fused": (7.5, 0.5), "equalised": (9.0, 0.75), "equalised, ceilings": (14.0, 1.0)},
        "channel": dict.fromkeys(("original", "fused", "equalised", "equalised, ceilings"), (12.0, 1.0)),
    },
    "CREPE": {weights: {"original": (31.5, 1.0), "fused": (30.0, 1.0)} for weights in ("tensor", "channel")},
}  # fmt: skip


def test_targets_are_met_and_missed() -> None:
    assert [(target.text, target.met) for target in int8._targets(FOUND)] == [
        ("MobileNetV2: fused at most 1 dB worse than as it is, -0.5 dB", True),
        ("MobileNetV2: equalised at least 6 dB better, +6.5 dB", True),
        ("CREPE: fused at most 1 dB worse than as it is, -1.5 dB", False),
    ]


def test_the_table_has_a_row_for_each_variant() -> None:
    rows = table_text(int8._table(FOUND)).splitlines()
    [row] = [row for row in rows if row.startswith("MobileNetV2, equalised, ceilings")]
    assert row.split()[3:] == ["14.0", "100", "%", "12.0", "100", "%"]
    assert sum(row.startswith(("MobileNetV2", "CREPE")) for row in rows) == 6


def test_noise_is_told_in_decibels() -> None:
    signal = torch.tensor([[3.0, 4.0]])
    assert int8.sqnr(signal, signal + torch.tensor([[0.0, 0.5]])) == pytest.approx(20.0)


def test_convolutions_that_pad_by_themselves_become_plain_ones() -> None:
    class Padded(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(2, 4, 3, 2, groups=2)
            self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.static_padding(x))

    model, x = nn.Sequential(Padded(), nn.ReLU()), torch.randn(1, 2, 6, 6)
    expected = model(x)
    assert type(int8._plain(model)[0][1]) is nn.Conv2d
    assert torch.equal(model(x), expected)


def test_tones_are_as_the_network_takes_them() -> None:
    for part in int8._tones():
        assert part.shape == (16, 1024)
        torch.testing.assert_close(part.std(1), torch.ones(16))
        assert float(part.mean(1).abs().max()) < 1e-6


def test_without_the_package_there_is_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("torchao"):
            raise ModuleNotFoundError(name=name)
        return there(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert not int8.run(Settings()).tables
    assert "pip install torchao" in capsys.readouterr().err
