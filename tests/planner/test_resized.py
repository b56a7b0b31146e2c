"""Calls with inputs of other sizes and contents: which are tried, which are given up, and how often the model runs."""

from __future__ import annotations

import pytest
import torch
from support import prepared
from torch import Tensor, nn

import bnfuse
from bnfuse.capture.run import Recording
from bnfuse.model.calls import Call
from bnfuse.planner import resized
from bnfuse.planner.inferred_calls import CallInference
from bnfuse.planner.options import Options
from bnfuse.planner.problem import Problem
from bnfuse.planner.recorded_calls import CallRecorder
from bnfuse.rules import RULES


class Counting(nn.Module):
    """Notes the sizes that it is given, and looks at them; a subclass says what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, 2, 1), nn.BatchNorm2d(3)
        self.table = nn.Parameter(torch.randn(8, 8))

    def run(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def forward(self, x: Tensor) -> Tensor:
        note(tuple(x.shape))
        return self.run(x)


SHAPES: list[tuple[int, ...]] = []


def note(shape: tuple[int, ...]) -> None:
    """Called by the models: a list that their own code refers to would be put back after every run."""
    SHAPES.append(shape)


ONE_SIDE = [(2, 3, 17, 16), (2, 3, 16, 17)]
"""One of two axes that are alike."""

OF_CHANNELS = [(2, 4, 16, 16), (2, 6, 16, 16), (2, 2, 16, 16)]
"""The channels could be taken apart."""


def shapes(model: nn.Module, *size: int) -> CallRecorder:
    recording = Recording(model.eval(), RULES)
    recording.record(Call(torch.randn(size)))
    SHAPES.clear()
    recorder = CallRecorder(recording, contents=False)
    CallInference(recorder).infer()
    return recorder


def test_sizes_of_both_directions_are_tried() -> None:
    recorder = shapes(Counting(), 2, 3, 16, 16)
    assert SHAPES == [
        (3, 3, 17, 17),
        (2, 3, 32, 32),
        (1, 3, 16, 16),
        (8, 3, 16, 16),
        (2, 3, 8, 8),
        (2, 3, 17, 16),
        (2, 3, 16, 17),
        (2, 4, 16, 16),
        (2, 6, 16, 16),
        (2, 2, 16, 16),
    ]
    assert not recorder.further  # the same everywhere
    assert len(recorder.recording.runs) == 1


def test_a_model_that_looks_at_nothing_is_run_at_no_other_size() -> None:
    class Blind(Counting):
        def forward(self, x: Tensor) -> Tensor:
            note(())
            return self.run(x)

    shapes(Blind(), 2, 3, 16, 16)
    assert not SHAPES


@pytest.mark.parametrize(("another_way", "features"), [(False, 1), (True, 2)])
def test_what_the_first_of_two_methods_does_is_recorded_again_only_if_the_second_goes_another_way(
    another_way: bool, features: int
) -> None:
    class CutInTwo(Counting):
        def forward_features(self, x: Tensor) -> Tensor:
            note((1,))
            y: Tensor = self.conv(x)
            return y

        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            y: Tensor = self.norm(x * 2 if pre_logits and another_way else x)
            return y if pre_logits else y.sin()

        def forward(self, x: Tensor) -> Tensor:
            return self.forward_head(self.forward_features(x))

    SHAPES.clear()
    problem = Problem.of(CutInTwo().eval(), torch.randn(2, 3, 16, 16), Options(), contents=False)
    assert [(1,)] * features == SHAPES
    assert len(problem.recording.runs) == features
    assert problem.norms[0].sites[-1].y.pinned is not None


def test_a_table_of_one_size_fits_hardly_another_size() -> None:
    class Positions(Counting):
        def run(self, x: Tensor) -> Tensor:
            return super().run(x) + self.table

    shapes(Positions(), 2, 3, 16, 16)
    assert SHAPES == [
        (3, 3, 17, 17),
        (2, 3, 17, 17),
        (1, 3, 16, 16),
        (3, 3, 16, 16),
        (8, 3, 16, 16),
        (2, 3, 15, 15),  # which the stride makes the same
        (2, 3, 14, 14),
        (2, 3, 13, 13),
        (2, 3, 17, 16),
        (2, 3, 16, 17),
        (2, 4, 16, 16),
        (2, 6, 16, 16),
        (2, 2, 16, 16),
    ]


def test_two_parts_that_do_not_fit_at_an_odd_size_may_fit_at_an_even_one() -> None:
    class Halves(Counting):
        def run(self, x: Tensor) -> Tensor:
            return super().run(x) + x[..., 1::2, 1::2]

    shapes(Halves(), 2, 3, 16, 16)
    assert (3, 3, 32, 32) in SHAPES


def test_a_run_in_another_way_is_solved_together_with_the_first() -> None:
    class Small(Counting):
        def run(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x) if x.shape[-1] > 8 else torch.relu(self.conv(x)))

    recorder = shapes(Small(), 2, 3, 16, 16)
    assert [further.what for further in recorder.further] == ["smaller"]
    assert len(recorder.recording.runs) == 2


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
    assert Recording(model, RULES).record(Call(x))[0].traces
    with torch.inference_mode():
        model(x)
    (run,) = Recording(model, RULES).record(Call(x))
    assert not run.traces
    assert run.nodes[-1].inputs[1].independent
    fused = bnfuse.fuse(model, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())


@pytest.mark.parametrize("number", [0, 1, 2])
def test_masks_are_filled_emptied_and_moved(number: int) -> None:
    mask = torch.tensor([[True, False, False], [True, True, False]])
    call = resized.revalued(Call(mask, floating=mask.float()), number)
    expected = [torch.ones_like(mask), torch.zeros_like(mask), mask.roll(1, -1)][number]
    assert torch.equal(call.args[0], expected)
    assert torch.equal(call.kwargs["floating"], expected.float())


def test_lists_of_tensors_grow_and_shrink() -> None:
    x = torch.ones(1)
    found = {what: len(call.args[0]) for what, call in resized.with_other_lists(Call([x, x, x]))}
    assert found == {"a longer list": 4, "a shorter list": 2}
    assert not list(resized.with_other_lists(Call(x, [1, 2])))


def test_a_tensor_that_is_passed_twice_is_two_tensors() -> None:
    x = torch.randn(3)
    call = resized.with_separate_inputs(Call(x, [x], other=x))
    assert call is not None
    assert len({id(tensor) for tensor in call.tensors}) == 3
    assert resized.with_separate_inputs(Call(x, x.clone())) is None


def test_other_batches_do_not_take_the_place_of_other_lengths() -> None:
    class Summed(nn.Module):
        """A shift would be counted as often as there are tokens, and the batch says nothing of that."""

        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm, self.last = nn.Embedding(7, 3), nn.BatchNorm1d(3), nn.RNN(3, 4, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.norm(self.embedding(tokens).tanh().mT.contiguous()).mT.contiguous()
            y: Tensor = self.last(x.sum(1, keepdim=True))[0]
            return y

    model, tokens = prepared(Summed()), torch.randint(0, 7, (2, 4))
    fused = bnfuse.fuse(model, tokens)
    for shape in ((2, 4), (2, 8), (2, 3), (1, 5), (5, 1)):
        other = torch.randint(0, 7, shape)
        with torch.no_grad():
            assert (model(other) - fused(other)).abs().max() < 1e-9, shape


class InGroups(nn.Module):
    """Takes the length apart by a number that few lengths divide by."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.conv, self.norm = nn.ConvTranspose1d(2, 2, 3, stride=2), nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(self.widen(x)).unflatten(-1, (-1, 11)).sum(-2))
        return y


class Mixing(nn.Module):
    """Mixes channels and positions as soon as the length behind the strided layer is more than one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3, padding=1, stride=2), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x).reshape(-1, 4))
        return y


class BeyondAll(nn.Module):
    """Goes another way once an element lies far on one side."""

    def __init__(self, way: str, number: float) -> None:
        super().__init__()
        self.linear, self.norm, self.way, self.number = nn.Linear(3, 3), nn.BatchNorm1d(3), way, number

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        test = getattr(torch, self.way)(x > self.number)
        return self.norm(y) if test else y


@pytest.mark.parametrize(
    ("model", "recorded", "others"),
    [
        (InGroups(), (3, 2, 5), [(3, 2, 16), (2, 2, 27), (1, 2, 5)]),
        (Mixing(), (4, 2, 1), [(4, 2, 2), (4, 2, 3), (1, 2, 7), (2, 2, 16)]),
    ],
    ids=["few lengths fit", "strides hide the change"],
)
def test_numbers_that_fit_few_sizes(model: nn.Module, recorded: tuple[int, ...], others: list[tuple[int, ...]]) -> None:
    model, x = prepared(model), torch.randn(recorded, dtype=torch.float64)
    fused = bnfuse.fuse(model, x)
    with torch.no_grad():
        for shape in others:
            other = torch.randn(shape, dtype=torch.float64)
            assert (model(other) - fused(other)).abs().max() < 1e-9, shape


@pytest.mark.parametrize(("way", "number"), [("all", -10), ("any", 50), ("all", 10), ("any", -50)])
def test_elements_far_on_either_side(way: str, number: float) -> None:
    model = prepared(BeyondAll(way, number))
    x = torch.rand(2, 3, dtype=torch.float64)
    fused = bnfuse.fuse(model, x)
    with torch.no_grad():
        for other in (x, 90 * x + 20, -90 * x - 20, torch.tensor([[-90.0, 1, 90]] * 2, dtype=torch.float64)):
            assert (model(other) - fused(other)).abs().max() < 1e-9


class PerPositive(nn.Module):
    """Divides by a count that is at most one of one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.linear(x) / max(1, int((x.sum(1) > 0).sum())))
        return y


def test_a_count_that_only_a_larger_batch_shows() -> None:
    model = prepared(PerPositive())
    fused = bnfuse.fuse(model, torch.randn(1, 3, dtype=torch.float64))
    other = torch.rand(5, 3, dtype=torch.float64)
    with torch.no_grad():
        assert (model(other) - fused(other)).abs().max() < 1e-9


class Broadcast(nn.Module):
    """Takes its own length, and the one at which a product with a table is a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 3, 4), nn.BatchNorm1d(3)
        self.table = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.tanh())
        y: Tensor = torch.tensordot(self.conv(-x if x.shape[2] == 6 else 1 + x.relu()), self.table, 1)
        return y


def test_a_length_that_fits_by_broadcasting() -> None:
    model = prepared(Broadcast())
    fused = bnfuse.fuse(model, torch.randn(2, 3, 6, dtype=torch.float64))
    with torch.no_grad():
        for length in (6, 4):
            other = torch.randn(2, 3, length, dtype=torch.float64)
            assert (model(other) - fused(other)).abs().max() < 1e-9, length
