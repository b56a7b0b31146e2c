"""Sizes and contents that the code reads, and those that only PyTorch or the recorder reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recording import Net, X, operators
from torch import Tensor, nn

from bnfuse.capture.run import capture


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
