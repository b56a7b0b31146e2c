"""What a recorded run knows."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnfuse.capture.run import capture
from bnfuse.graph.graph import Graph, Kind


class Net(nn.Module):
    def __init__(self, function: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.layers, *args, **kwargs)


def graph_of(function: Any, *args: Tensor, **layers: nn.Module) -> Graph:
    return capture(Net(function, **layers), args, {}).graph


def operators(graph: Graph) -> list[str]:
    return [node.operator for node in graph.nodes]


X = torch.ones(2, 3, 4, 4)


def test_operators_are_seen_whole() -> None:
    graph = graph_of(lambda m, x: m["n"](m["c"](x)).relu_().flatten(1), X, c=nn.Conv2d(3, 3, 1), n=nn.BatchNorm2d(3))
    assert operators(graph) == ["conv2d", "batch_norm", "relu", "flatten"]
    assert [node.call.path for node in graph.nodes] == ["layers.c", "layers.n", "", ""]


def test_values_are_followed() -> None:
    graph = graph_of(lambda m, x: m["c"](x) + x, X, c=nn.Conv2d(3, 3, 1))
    conv, add = graph.nodes
    assert conv.bound["input"].kind is Kind.INPUT
    assert conv.bound["weight"].names == ("layers.c.weight",)
    assert add.inputs == [conv.outputs[0], conv.bound["input"]]
    assert conv.bound["input"].consumers == [conv, add]
    assert "output" in (add.outputs[0].pinned or "")


def test_what_does_nothing_is_no_operator() -> None:
    graph = graph_of(lambda m, x: m["i"](F.dropout(x * 2, training=False)).contiguous(), X, i=nn.Identity())
    assert operators(graph) == ["mul"]


def test_in_place_makes_a_new_version() -> None:
    graph = graph_of(lambda m, x: (y := x * 2).add_(1) + y, X)
    mul, add, total = graph.nodes
    assert add.written == mul.outputs
    assert total.inputs == [add.outputs[0], add.outputs[0]]
    assert mul.outputs[0].pinned is None


def test_stale_views_are_pinned() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0].zero_()
        return y + 1

    graph = graph_of(function, X)
    assert "another view" in (graph.nodes[0].outputs[0].pinned or "")


def test_tied_and_shared() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    second.bias.data = first.bias.data
    graph = graph_of(lambda m, x: m["b"](m["a"](x)), torch.ones(2, 3), a=first, b=second)
    a, b = graph.nodes
    assert a.bound["weight"] is b.bound["weight"]
    assert a.bound["weight"].names == ("layers.a.weight", "layers.b.weight")
    assert a.bound["bias"] is b.bound["bias"]


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


def looks(function: Any, x: Tensor, **layers: nn.Module) -> bool:
    return capture(Net(function, **layers), (x,), {}).looks


def test_a_size_that_the_code_goes_by_is_noticed_and_one_that_pytorch_checks_is_not() -> None:
    norm = nn.BatchNorm2d(3)
    assert not looks(lambda m, x: m["n"](x), X, n=norm)
    assert looks(lambda m, x: m["n"](x) / x.shape[-1], X, n=norm)
    assert looks(lambda m, x: m["n"](x)[..., : x.size(-1) // 2], X, n=norm)


def test_a_look_of_the_recorder_is_none_of_the_code() -> None:
    def function(layers: Any, x: Tensor) -> Tensor:
        y = layers["c"](x)
        return layers["n"](y) * torch.from_numpy(np.ones(1, np.float32))  # made by no operator

    record = capture(Net(function, c=nn.Conv2d(3, 3, 1), n=nn.BatchNorm2d(3)), (X,), {})
    assert not record.looks
    assert [value.pinned for value in record.graph.nodes[0].outputs] == [None]


def test_a_tensor_from_elsewhere_may_be_handed_to_a_module() -> None:
    two = torch.tensor(2.0)

    def function(layers: Any, x: Tensor) -> Tensor:
        y = layers["c"](x)
        return layers["n"](y) * layers["i"](two)

    record = capture(Net(function, c=nn.Conv2d(3, 3, 1), n=nn.BatchNorm2d(3), i=nn.Identity()), (X,), {})
    assert not record.looks
    assert [value.pinned for value in record.graph.nodes[0].outputs] == [None]


def test_a_size_is_noticed_after_a_layer_that_failed() -> None:
    def try_it(layers: Any, x: Tensor) -> Tensor:
        try:
            return layers["wrong"](x)
        except RuntimeError:
            return layers["right"](x) / x.shape[-1]

    assert looks(try_it, X, wrong=nn.Conv2d(5, 3, 1), right=nn.Conv2d(3, 3, 1))


def test_a_size_is_noticed_after_a_mode_of_the_code_itself() -> None:
    def with_mode(layers: Any, x: Tensor) -> Tensor:
        with torch.device("cpu"):
            y = layers["c"](x)
            return y + torch.ones(y.shape[-1])

    assert looks(with_mode, X, c=nn.Conv2d(3, 3, 1))


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


def test_a_tensor_subclass_keeps_its_own_functions_within_a_layer() -> None:
    class Doubled(nn.Parameter):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with torch._C.DisableTorchFunctionSubclass():
                result = func(*args, **(kwargs or {}))
                return result * 2 if func is torch.nn.functional.linear else result

    layer = nn.Linear(3, 3)
    layer.weight = Doubled(layer.weight.detach())
    expected = layer(X[..., :3])
    record = capture(Net(lambda m, x: m["l"](x), l=layer), (X[..., :3],), {})
    assert torch.equal(record.output, expected)
    assert operators(record.graph) == ["linear", "mul"]


def test_scripted_parts_are_seen() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer releases announce the end of scripting
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    graph = graph_of(lambda m, x: m["s"](x), X, s=scripted)
    assert operators(graph) == ["conv2d", "relu"]
    assert graph.nodes[0].bound["weight"].names == ("layers.s.0.weight",)


def test_keyword_and_nested_inputs() -> None:
    net = Net(lambda m, images, extra: {"sum": images[0] + extra["scale"]})
    graph = capture(net, (), {"images": [X], "extra": {"scale": X}}).graph
    assert [value.kind for value in graph.nodes[0].inputs] == [Kind.INPUT, Kind.INPUT]


def test_hooks_and_modes_are_gone_afterwards() -> None:
    registries = nn.modules.module
    with pytest.raises(Exception, match="does not run"):
        graph_of(lambda m, x: m["c"](x), torch.ones(2, 7, 4, 4), c=nn.Conv2d(3, 3, 1))
    assert not registries._has_any_global_hook()
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.overrides._get_current_function_mode() is None


def test_no_activation_is_kept() -> None:
    import gc
    import weakref

    alive: list[weakref.ref[Tensor]] = []

    def function(m: Any, x: Tensor) -> Tensor:
        y = x * 2
        alive.append(weakref.ref(y))
        return y + 1

    graph = graph_of(function, X)
    gc.collect()
    assert alive[0]() is None
    assert len(graph.nodes) == 2
