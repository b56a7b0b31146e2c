"""Running a model leaves no trace and gives the same every time."""

import random

import numpy
import pytest
import torch
from torch import Tensor, nn

from bnfuse.model.sandbox import run
from bnfuse.verify.compare import compare


class Messy(nn.Module):
    """Does everything that a forward should not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Dropout(0.5)
        self.calls = 0
        self.cache: dict[str, Tensor] = {}
        self.seen: list[int] = []
        self.register_buffer("state", torch.zeros(4))
        self.register_buffer("expanded", torch.zeros(1).expand(4))
        self.state: Tensor

    def forward(self, x: Tensor, extra: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        self.calls += 1
        self.cache["x"] = x
        self.seen.append(1)
        self.late = x
        self.state += x.sum(dim=0)
        x += torch.rand(4) + random.random() + float(numpy.random.rand())
        extra.append(x)
        return self.frozen(self.norm(x)), self.state, self.expanded[None] + x


def test_run_leaves_no_trace_and_repeats() -> None:
    model = Messy().train()
    model.frozen.eval()
    x, extra = torch.ones(3, 4), [torch.ones(1)]
    torch.manual_seed(7)
    random.seed(7)
    numpy.random.seed(7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generators = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    first, state, _ = run(model, (x,), {"extra": extra})
    assert model.training
    assert model.norm.training
    assert not model.frozen.training
    assert (model.calls, model.cache, model.seen, len(extra), hasattr(model, "late")) == (0, {}, [], 1, False)
    assert x.eq(1).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert numpy.random.get_state()[1].tolist() == generators[2]
    assert state.eq(3).all(), "an output that lives in a buffer keeps its value"
    torch.rand(3), random.random()
    assert torch.equal(run(model, (x,), {"extra": extra})[0], first)
    assert not torch.equal(run(model, (x,), {"extra": extra}, seed=1)[0], first)
    assert compare(model, model, (x, extra)).within_tolerance()


def test_run_restores_after_an_error() -> None:
    model = Messy().train()
    with pytest.raises(RuntimeError):
        run(model, (torch.ones(3, 5), []), {})
    assert model.training
    assert model.calls == 0
    assert model.state.eq(0).all()
