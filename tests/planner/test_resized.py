"""Other inputs that a model takes: which are tried, which are given up, and how often the model runs."""

from __future__ import annotations

import torch
from bnfuse.planner.larger_inputs import OtherSizes
from support import prepared
from torch import Tensor, nn

import bnfuse
from bnfuse.capture.run import capture


class Counting(nn.Module):
    """Counts its runs; a subclass says what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, 2, 1), nn.BatchNorm2d(3)
        self.table = nn.Parameter(torch.randn(8, 8))

    def run(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def forward(self, x: Tensor) -> Tensor:
        SHAPES.append(tuple(x.shape))
        return self.run(x)


SHAPES: list[tuple[int, ...]] = []


def shapes(model: nn.Module, *size: int) -> list[tuple[int, ...]]:
    SHAPES.clear()
    found = OtherSizes(model, (torch.randn(size),), {})
    taken = [tuple(args[0].shape) for (args, _), _ in found]
    ran = len(SHAPES)
    assert [tuple(args[0].shape) for args, _ in found.inputs()] == taken
    assert len(list(found.graphs())) == len(taken)
    assert len(SHAPES) == ran  # each once
    return taken


def test_every_size_is_taken() -> None:
    taken = shapes(Counting(), 2, 3, 16, 16)
    assert taken == [shape for shape in SHAPES if shape[1] == 3]
    assert taken[:3] == [(3, 3, 17, 17), (3, 3, 32, 32), (3, 3, 18, 18)]


def test_a_table_of_one_size_fits_no_larger_size() -> None:
    class Positions(Counting):
        def run(self, x: Tensor) -> Tensor:
            return super().run(x) + self.table

    assert shapes(Positions(), 2, 3, 16, 16) == [(3, 3, 16, 16)]
    assert SHAPES[:3] == [(3, 3, 17, 17), (3, 3, 16, 16), (2, 3, 17, 17)]
    assert not {(3, 3, 32, 32), (3, 3, 18, 18)} & set(SHAPES)


def test_two_parts_that_do_not_fit_at_an_odd_size_may_fit_at_an_even_one() -> None:
    class Halves(Counting):
        def run(self, x: Tensor) -> Tensor:
            return super().run(x) + x[..., 1::2, 1::2]

    assert (3, 3, 18, 18) in shapes(Halves(), 2, 3, 16, 16)


def test_a_table_from_an_earlier_run_is_a_constant() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.tables: dict[int, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            if y.shape[-1] not in self.tables:
                self.tables[y.shape[-1]] = torch.linspace(0, 1, y.shape[-1], dtype=y.dtype)
            return y * self.tables[y.shape[-1]]

    model, x = prepared(Cached()), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.inference_mode():
        model(x)
    record = capture(model, (x,), {})
    assert not record.traces
    table = record.graph.nodes[-1].inputs[1]
    assert table.independent
    fused = bnfuse.fuse(model, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert capture(Cached().double().eval(), (x,), {}).traces
