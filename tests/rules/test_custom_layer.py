"""Custom layer: networks whose norm stays, with the exact reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule_cases import BACKWARD, FORWARD, Case, Net, Odd, Removal, anything, check, check_goes, fold, norm
from torch import Tensor, nn

import bnfuse
from bnfuse.changes import Changes, Edit
from bnfuse.transaction import rewrite
from bnfuse.units import Unit

CASES = [
    Case(
        lambda: Net(lambda m, x: m.o(m.n(F.silu(x))), o=Odd(), n=anything()),
        FORWARD,
        ["n: forward: handled in o (Odd): its handler takes no units of its input"],
        options={"options": bnfuse.Options(handlers={Odd: fold})},
    ),
    Case(
        lambda: Net(
            lambda m, x: m.n(m.o(x).transpose(1, 2)), o=Odd(), n=norm([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0])
        ),
        BACKWARD,
        ["n: backward: handled in o (Odd): its handler takes units per channel, along axis 1"],
        options={"options": bnfuse.Options(handlers={Odd: fold})},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norm_stays(case: Case) -> None:
    check(case)


REMOVED = [
    Removal(
        lambda: Net(lambda m, x: m.n(m.o(x)), o=Odd(), n=nn.BatchNorm2d(2)),
        ("o",),
        positive=True,
        options={"options": bnfuse.Options(handlers={Odd: fold})},
    ),
]


@pytest.mark.parametrize("case", REMOVED)
def test_norm_goes(case: Removal) -> None:
    check_goes(case)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_handler_gets_tensors_on_the_device_of_its_layer(device: str) -> None:
    given: list[tuple[Any, ...]] = []

    def handler(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
        given.extend((tensor.device.type, tensor.dtype, tuple(tensor.shape)) for tensor in (scale, shift))
        layer.weight.mul_(scale[:, None])

    scale = torch.tensor([2.0, 3.0], dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 2, bias=False, device=device))
    rewrite(Changes(edits=(Edit(("0",), (2,), (Unit(scale, None),), handler=handler),)), model)
    assert given == [(device, torch.float64, (2,))] * 2
    assert scale.tolist() == [2.0, 3.0]
