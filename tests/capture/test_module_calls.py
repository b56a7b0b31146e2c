"""Which module call runs an operator, and what is left of hooks and modes afterwards."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from recording import Net, X, graph_of, operators
from support import fused_and_checked, prepared, reason
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnfuse.capture.run import capture
from bnfuse.graph.graph import Kind


def test_a_caught_exception_does_not_confuse_the_calls() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError

    def function(m: Any, x: Tensor) -> Tensor:
        try:
            return m["f"](x)
        except ValueError:
            return m["c"](x)

    graph = graph_of(lambda m, x: m["outer"](x) * 2, X, outer=Net(function, f=Failing(), c=nn.Conv2d(3, 3, 1)))
    assert [node.call.path for node in graph.nodes] == ["layers.outer.layers.c", ""]


def test_modes_are_gone_after_an_interrupt_within_a_layer() -> None:
    class Interrupting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.conv2d.default:
                raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    model = Net(lambda m, x: m["c"](x), c=nn.Conv2d(3, 3, 1))
    with Interrupting(), pytest.raises(KeyboardInterrupt):
        capture(model, (X,), {})
    assert not torch._C._len_torch_function_stack()
    assert operators(capture(model, (X,), {}).graph) == ["conv2d"]


def test_hooks_and_modes_are_gone_afterwards() -> None:
    registries = nn.modules.module
    with pytest.raises(Exception, match="does not run"):
        graph_of(lambda m, x: m["c"](x), torch.ones(2, 7, 4, 4), c=nn.Conv2d(3, 3, 1))
    assert not registries._has_any_global_hook()
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.overrides._get_current_function_mode() is None


def test_keyword_and_nested_inputs() -> None:
    net = Net(lambda m, images, extra: {"sum": images[0] + extra["scale"]})
    graph = capture(net, (), {"images": [X], "extra": {"scale": X}}).graph
    assert [value.kind for value in graph.nodes[0].inputs] == [Kind.INPUT, Kind.INPUT]


class Threaded(nn.Module):
    """It calls a layer in a thread, beside a norm that could go into that layer."""

    def __init__(self, of_the_layer: bool) -> None:
        super().__init__()
        self.u, self.n, self.v = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)
        self.of_the_layer = of_the_layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, made = self.u(x), []
        layer, given = (self.u, x) if self.of_the_layer else (self.v, y)
        thread = threading.Thread(target=lambda: made.append(layer(given)))
        thread.start()
        thread.join()
        return self.n(y), made[0]


@pytest.mark.parametrize(("of_the_layer", "owner"), [(True, "u"), (False, "v")])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_another_thread_reads_stays(of_the_layer: bool, owner: str) -> None:
    model = prepared(Threaded(of_the_layer), dead=0.3)
    plan, _ = fused_and_checked(model, torch.randn(2, 2, 4, 4, dtype=torch.float64))
    assert f"{owner} (Conv2d) reads or makes it in a thread of its own" in reason(plan, "n")
