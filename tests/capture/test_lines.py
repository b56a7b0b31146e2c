"""Which lines of a model's own code did not run."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

import bnfuse
from bnfuse.capture.lines import LineWatch


class Branches(nn.Module):
    fast = True

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError("no image")
        y = self.conv(x)
        if not self.fast:
            y = y.relu()
            y = y + 1
        return self.norm(y)

    def helper(self, x: Tensor) -> Tensor:
        return x.relu()  # its function did not run at all


def first_line() -> int:
    return Branches.forward.__code__.co_firstlineno


@pytest.mark.skipif(sys.gettrace() is not None, reason="somebody else traces")
def test_lines_that_did_not_run_are_named_once_for_a_block() -> None:
    model = Branches().eval()
    watch = LineWatch(model.modules())
    with watch.watching():
        model(torch.randn(1, 3, 4, 4))
    assert [line for _, line in watch.missed()] == [first_line() + 5]  # no error that was not raised
    assert str(watch) == f"branches of the code that did not run: test_lines.py:{first_line() + 5}"
    assert sys.gettrace() is None
    model.fast = False
    with watch.watching():
        model(torch.randn(1, 3, 4, 4))
    assert str(watch) == ""


def test_a_plan_says_so_and_fuse_does_not_look() -> None:
    model, x = Branches().eval(), torch.randn(1, 3, 4, 4)
    assert any("test_lines.py" in text for text in bnfuse.plan(model, x).unseen)
    assert "not seen: branches" in str(bnfuse.plan(model, x))
    assert not bnfuse.plan(model, x, options=bnfuse.Options(infer_calls=False)).unseen
    assert isinstance(bnfuse.fuse(model, x).norm, nn.Identity)
