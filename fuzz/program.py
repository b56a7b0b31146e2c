"""A network as data: layers, steps, what is returned. It prints as a program, and the program is what runs."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fuzz import layers as vocabulary

if TYPE_CHECKING:
    from typing_extensions import Self

INDENT = "    "


@dataclass(frozen=True)
class Input:
    """One argument of the forward.

    Attributes:
        shape: the first axis is the batch.
        sizes: the axes that may have another size (the positions of an image or of a text).
        high: for indices, one more than the largest; 0 for real numbers.
    """

    name: str
    shape: tuple[int, ...]
    sizes: tuple[int, ...] = ()
    high: int = 0


@dataclass(frozen=True)
class Layer:
    """A module or tensor that the network holds: ``m.name = code``; ``dressing`` is how a norm's numbers are drawn."""

    name: str
    code: str
    dressing: str = ""


@dataclass(frozen=True)
class Step:
    """One line of the forward: ``outputs = code`` with ``$0``, ``$1`` standing for the operands.

    A step without outputs writes to one of its operands.
    """

    outputs: tuple[str, ...]
    code: str
    operands: tuple[str, ...]

    @property
    def expression(self) -> str:
        return re.sub(r"\$(\d)", lambda match: self.operands[int(match[1])], self.code)

    def __str__(self) -> str:
        return f"{', '.join(self.outputs)} = {self.expression}" if self.outputs else self.expression


AnyProgram = TypeVar("AnyProgram", bound="Program")


@dataclass(frozen=True)
class Program:
    """A network.

    Attributes:
        setup: lines that run once the layers are there (tied weights, hooks).
        returned: the last step; its outputs are not used.
    """

    seed: int
    inputs: tuple[Input, ...]
    layers: tuple[Layer, ...]
    setup: tuple[str, ...]
    steps: tuple[Step, ...]
    returned: Step
    tags: frozenset[str] = field(default=frozenset(), compare=False)

    def __str__(self) -> str:
        calls = [
            f"torch.set_default_dtype(torch.float64)\nnet = Net().eval()\nfill(net, {self.seed}, {self.dressings})"
        ]
        for argument in self.inputs:
            if argument.high:
                calls.append(f"{argument.name} = torch.randint(0, {argument.high}, {argument.shape})")
            else:
                calls.append(f"{argument.name} = torch.randn{argument.shape}")
        return "\n".join(["from fuzz.layers import *\n", self.source, *calls])

    @property
    def dressings(self) -> dict[str, str]:
        return {layer.name: layer.dressing for layer in self.layers if layer.dressing not in ("", "positive")}

    @property
    def source(self) -> str:
        made = [f"m.{layer.name} = {layer.code}" for layer in self.layers]
        arguments = ", ".join(["m", *(argument.name for argument in self.inputs)])
        lines = ["class Net(nn.Module):", INDENT + "def __init__(m):", 2 * INDENT + "super().__init__()"]
        lines += [2 * INDENT + line for line in [*made, *self.setup]]
        lines += [INDENT + f"def forward({arguments}):"]
        lines += [2 * INDENT + str(step) for step in self.steps]
        lines += [2 * INDENT + f"return {self.returned.expression}", ""]
        return "\n".join(lines)

    def smaller(self) -> Iterator[Self]:
        """The same network with less of what is not in every network."""
        yield from ()

    def build(self) -> nn.Module:
        """The network, with its contents, in evaluation mode and float64."""
        names: dict[str, Any] = {name: getattr(vocabulary, name) for name in vocabulary.__all__}
        names["__name__"] = "network"
        name = "<network>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)
        exec(compile(self.source, name, "exec"), names)
        with DefaultDtype(torch.float64):
            net: nn.Module = names["Net"]()
            vocabulary.fill(net, self.seed, self.dressings)
        return net.eval()

    def arguments(self, seed: int, batch: int = 0, size: int = 0) -> tuple[Tensor, ...]:
        """Fresh inputs, with ``batch`` more samples and every free axis ``size`` longer."""
        return tuple(arguments(self.inputs, self.seed + seed, batch, size))

    def mentions(self) -> set[str]:
        """The names of the layers that the steps or the setup use."""
        lines = [step.code for step in (*self.steps, self.returned)]
        return {name for line in (*lines, *self.setup) for name in re.findall(r"\bm\.(\w+)", line)}


def arguments(inputs: Iterable[Input], seed: int, batch: int = 0, size: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for argument in inputs:
        shape = [length + size if axis in argument.sizes else length for axis, length in enumerate(argument.shape)]
        shape[0] += batch
        if argument.high:
            made.append(torch.randint(0, argument.high, shape, generator=generator))
        else:
            made.append(torch.randn(shape, generator=generator, dtype=torch.float64))
    return made


class DefaultDtype:
    """Layers are made in this dtype inside."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)
