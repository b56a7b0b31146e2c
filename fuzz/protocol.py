"""A network with the calls that are made of it: the recorded one, and others that bnfuse is not told of."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import bnfuse
from fuzz.program import INDENT, Program, Step

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Call:
    """A call of the network, or of one of its other public methods.

    Attributes:
        arguments: what is passed by position, as source; it may refer to the network as ``net``.
        options: what is passed by name, as pairs of name and source.
        method: empty for the network itself.
        mode: ``torch.``... in which the call is made.
    """

    arguments: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    method: str = ""
    mode: str = "no_grad"

    @property
    def passed(self) -> str:
        return ", ".join([*self.arguments, *(f"{name}={code}" for name, code in self.options)])

    @property
    def name(self) -> str:
        return f"net.{self.method}" if self.method else "net"

    def __str__(self) -> str:
        return f"{self.name}({self.passed})" + (f" under {self.mode}" if self.mode != "no_grad" else "")


@dataclass(frozen=True)
class Cut(Step):
    """A step that gives its operand another name: what comes before it is a public method of its own.

    Attributes:
        method: its name.
        head: the name of the method that holds what comes after it, if that is a method too.
        repeated: True if the forward does not call the method but holds the same lines.
    """

    method: str = ""
    head: str = ""
    repeated: bool = False


@dataclass(frozen=True)
class CalledProgram(Program):
    """A network and its calls.

    Attributes:
        kind: what makes other calls differ from the recorded one.
        preamble: lines before the class.
        memory: names outside the network that keep something, and the source of what they hold at first.
        positional: the parameters of the forward, if they are not simply the inputs.
        signature: its further parameters, as source.
        methods: further methods, as source.
        ending: lines that run at the end of ``__init__``.
        kept: expressions for what stays after a call and counts as its output.
        recorded: the call that bnfuse is given.
        given: calls of methods with names of their own, which bnfuse can only know if it is given them.
        further: sequences of calls, each of which begins with a new network.
        trained: True if the original has to be able to train after it was fused.
    """

    kind: str = ""
    preamble: tuple[str, ...] = ()
    memory: tuple[tuple[str, str], ...] = ()
    positional: tuple[str, ...] = ()
    signature: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    ending: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    recorded: Call = field(default_factory=Call)
    given: tuple[Call, ...] = ()
    further: tuple[tuple[Call, ...], ...] = ()
    trained: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the forward's parameters, in order."""
        own = self.positional or tuple(argument.name for argument in self.inputs)
        return (*own, *(parameter.partition("=")[0] for parameter in self.signature))

    @property
    def source(self) -> str:
        made = [f"m.{layer.name} = {layer.code}" for layer in self.layers]
        lines = [*self.preamble, *(f"{name} = {code}" for name, code in self.memory)]
        lines += ["", "class Net(nn.Module):", INDENT + "def __init__(m):", 2 * INDENT + "super().__init__()"]
        lines += [2 * INDENT + line for line in [*made, *self.setup, *self.ending]]
        for method in (*self._methods(), *self.methods):
            lines += [INDENT + line for line in method.splitlines()]
        return "\n".join([*lines, ""])

    def _methods(self) -> Iterator[str]:
        """The forward, and the methods that it is cut into."""
        whole: list[str] = []
        part: list[str] = []
        own = self.positional or tuple(argument.name for argument in self.inputs)
        takes, head = own, ""
        for step in self.steps:
            if not isinstance(step, Cut):
                part.append(str(step))
                continue
            options = self._options(part)
            yield _method(step.method, takes, [*options.values()], [*part, f"return {step.operands[0]}"])
            passed = ", ".join([*takes, *(f"{name}={name}" for name in options)])
            whole += [*part, str(step)] if step.repeated else [f"{step.outputs[0]} = m.{step.method}({passed})"]
            part, takes, head = [], step.outputs, step.head
        part.append(f"return {self.returned.expression}")
        if head:
            options = self._options(part)
            yield _method(head, takes, [*options.values()], part)
            passed = ", ".join([*takes, *(f"{name}={name}" for name in options)])
            part = [f"return m.{head}({passed})"]
        yield _method("forward", own, list(self.signature), [*whole, *part])

    def _options(self, lines: list[str]) -> dict[str, str]:
        """The further parameters that some lines mention."""
        names = {parameter.partition("=")[0]: parameter for parameter in self.signature}
        return {name: text for name, text in names.items() if any(re.search(rf"\b{name}\b", line) for line in lines)}

    def mentions(self) -> set[str]:
        lines = "\n".join([*self.methods, *self.ending, *(layer.code for layer in self.layers)])
        return super().mentions() | set(re.findall(r"\bm\.(\w+)", lines))

    def __str__(self) -> str:
        imports = "import bnfuse\nfrom fuzz.check_calls import called, difference\nfrom fuzz.layers import *"
        lines = ["", "def make():", INDENT + "net = Net().eval()"]
        lines += [INDENT + f"fill(net, {self.seed}, {self.dressings})", INDENT + "return net", ""]
        for sequence in self.further or ((self.recorded,),):
            lines += ["", "def calls(net):"]
            lines += [INDENT + f"global {name}\n{INDENT}{name} = {code}" for name, code in self.memory]
            lines += [INDENT + "results = []"]
            for call in sequence:
                indent = INDENT if call.mode == "no_grad" else 2 * INDENT
                lines += [INDENT + f"with torch.{call.mode}():"] * (call.mode != "no_grad")
                lines += [indent + f"results.append(called({', '.join(filter(None, (call.name, call.passed)))}))"]
                lines += [INDENT + f"results.append({expression})" for expression in self.kept]
            lines += [INDENT + "return results", "", "", "net = make()", f"fused = {self.fusion}"]
            if self.ending and not self.in_place:
                lines += ["for tensor in net.parameters():", INDENT + "tensor.data.fill_(0.0)"]
            lines += ["with torch.no_grad():", INDENT + "print(difference(calls(make()), calls(fused)))"]
        if self.trained:
            lines += [f"net.train()({self.recorded.passed}).sum().backward()"]
        return "\n".join([imports, "", self.source, "torch.set_default_dtype(torch.float64)", *lines, ""])

    @property
    def fusion(self) -> str:
        """How ``net`` is fused: mostly by ``bnfuse.fuse``."""
        arguments = f"net, {self.example}{self.given_calls}"
        ways = {
            0: f"bnfuse.fuse({arguments}, inplace=True)",
            1: f"bnfuse.plan({arguments}).apply(net)",
            2: f"bnfuse.fuse({arguments}, verify=False)",
        }
        return ways.get(self.seed % 10, f"bnfuse.fuse({arguments})")

    @property
    def planning(self) -> str:
        """The plan that it is fused by."""
        return f"bnfuse.plan(net, {self.example}{self.given_calls})"

    @property
    def in_place(self) -> bool:
        return "inplace" in self.fusion

    @property
    def example(self) -> str:
        """The recorded call's arguments, as bnfuse takes them."""
        call = self.recorded
        if not call.options:
            return f"({call.passed},)" if call.arguments else "()"
        names = [*zip(self.parameters, call.arguments, strict=False), *call.options]
        return "{" + ", ".join(f"{name!r}: {code}" for name, code in names) + "}"

    @property
    def given_calls(self) -> str:
        calls = [
            f"bnfuse.Call({', '.join(filter(None, (call.passed, f'method={call.method!r}')))})" for call in self.given
        ]
        return f", calls=[{', '.join(calls)}]" if calls and hasattr(bnfuse, "Call") else ""

    def smaller(self) -> Iterator[Self]:
        """The same network with fewer calls, or with less around it."""
        if self.further:
            yield dataclasses.replace(self, further=())
        for index in range(len(self.further)):
            if len(self.further) > 1:
                yield dataclasses.replace(self, further=(self.further[index],))
        for index, sequence in enumerate(self.further):
            for place in range(len(sequence)):
                if len(sequence) > 1:
                    shorter = sequence[:place] + sequence[place + 1 :]
                    yield dataclasses.replace(self, further=_without(self.further, index, shorter))
        for name in ("preamble", "memory", "signature", "methods", "ending", "kept", "given"):
            items: tuple[Any, ...] = getattr(self, name)
            for index in range(len(items)):
                rest: dict[str, Any] = {name: items[:index] + items[index + 1 :]}
                yield dataclasses.replace(self, **rest)


def _without(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    return (*items[:index], item, *items[index + 1 :])


def _method(name: str, takes: tuple[str, ...], options: list[str], lines: list[str]) -> str:
    return f"def {name}({', '.join(['m', *takes, *options])}):\n" + "\n".join(INDENT + line for line in lines)
