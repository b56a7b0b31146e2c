"""Networks of timm with parallel branches: as few layers run as after timm's own reparameterisation, and no norm."""

from __future__ import annotations

import pytest
import timm
import torch
from counting import work
from support import prepared

import bnfuse

QUICK = bnfuse.Options(infer_calls=False)


@pytest.mark.parametrize(
    ("name", "size", "steps"),
    [("repvgg_a0", 64, 22), ("fastvit_t8", 64, 20)],
)
def test_no_more_layers_run_than_after_timms_own_step(name: str, size: int, steps: int) -> None:
    model = prepared(timm.create_model(name))
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    plan = bnfuse.plan(model, x, restructure="merge", options=QUICK)
    assert len(plan.steps) == steps
    assert not plan.kept
    assert len(plan.fused) == sum("BatchNorm" in type(module).__name__ for module in model.modules())
    merged = plan.apply(model)
    assert not any("BatchNorm" in type(module).__name__ for module in merged.modules())
    with torch.inference_mode():
        expected, got = model(x), merged(x)
    assert float((got - expected).norm() / expected.norm()) <= 1e-9
    theirs = timm.utils.reparameterize_model(model.float())
    ours = bnfuse.fuse(model.float(), x.float(), restructure="merge", options=QUICK)
    assert work(ours, x.float())[0] <= work(theirs, x.float())[0]
    assert work(ours, x.float())[2] <= work(theirs, x.float())[2]
    loaded = bnfuse.restructure(timm.create_model(name), bnfuse.structure(ours).to_dict())
    loaded.load_state_dict(ours.state_dict())
    assert torch.equal(loaded.eval()(x.float()), ours(x.float()))
