"""Drawing a network whose norms go only if its structure changes, or whose branches can be merged.

A kind (:mod:`fuzz.restructured_kinds`) puts shared layers, computed weights or parallel branches into the network,
flat in its forward or in modules of their own. Around it stand the blocks and operators of :mod:`fuzz.generate`.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from fuzz import generate
from fuzz import layers as vocabulary
from fuzz.calls import PLAIN_DRESSINGS, CallBuilder, Variation
from fuzz.check_calls import runs
from fuzz.generate import Spoilt, Unfit
from fuzz.program import DefaultDtype, Layer, Step
from fuzz.protocol import CalledProgram

if TYPE_CHECKING:
    from typing_extensions import Self

KINDS_ASKED = ("True",) * 9 + ("'{0}'",) * 2 + ("['bake', 'untie']", "['merge', 'untie']", "('bake', 'merge', 'clip')")


@dataclass(frozen=True)
class RestructuredProgram(CalledProgram):
    """A network, and what bnfuse may do with it.

    Attributes:
        asked: the kinds of restructuring, as source.
        options: further arguments of ``bnfuse.fuse``, as source.
        training: whether the network is in training mode when bnfuse sees it.
    """

    asked: str = "True"
    options: tuple[str, ...] = ()
    training: bool = False

    @property
    def dressings(self) -> dict[str, str]:
        return {
            place: numbers
            for layer in self.layers
            for place, numbers in dressed(layer.name, layer.dressing).items()
            if numbers not in ("", "positive")
        }

    def arguments_of_fuse(self, restructured: bool = True) -> str:
        asked = (f"restructure={self.asked}",) if restructured else ()
        return ", ".join([f"net, {self.example}", *self.options, *asked])

    @property
    def fusion(self) -> str:
        given = "net.train(), " if self.training else "net, "
        return f"bnfuse.fuse({given}{self.arguments_of_fuse()[5:]})"

    @property
    def planning(self) -> str:
        return f"bnfuse.plan({self.arguments_of_fuse()})"

    def smaller(self) -> Iterator[Self]:
        yield from super().smaller()
        for index, step in enumerate(self.steps):
            flat = self._flat(index, step)
            if flat is not None:
                yield flat
        if self.training:
            yield dataclasses.replace(self, training=False)
        for index in range(len(self.options)):
            yield dataclasses.replace(self, options=self.options[:index] + self.options[index + 1 :])
        for kind in ("'bake'", "'untie'", "'merge'"):
            if self.asked != kind and not re.fullmatch(r"'\w+'", self.asked):
                yield dataclasses.replace(self, asked=kind)

    def _flat(self, index: int, step: Step) -> Self | None:
        """The network with the lines of a module in the place of its call; None where it is no such call."""
        called = re.fullmatch(r"m\.(\w+)\((\$\d(, )?)+\)", step.code)
        layer = next((layer for layer in self.layers if called and layer.name == called[1]), None)
        tree = ast.parse(layer.code, mode="eval").body if layer is not None else None
        if layer is None or not isinstance(tree, ast.Call) or ast.unparse(tree.func) != "module":
            return None
        takes, code = (ast.literal_eval(argument) for argument in tree.args)
        *lines, last = [line.partition(" = ") for line in code.split("; ")]
        numbers = dressed("", layer.dressing)
        made = [
            Layer(str(part.arg), ast.unparse(part.value), numbers.get(f".{part.arg}", "")) for part in tree.keywords
        ]
        names = {part.name for part in made}
        if names & {other.name for other in self.layers} or any(not equals for _, equals, _ in lines):
            return None
        former = dict(zip(takes.split(", "), step.operands, strict=True))
        inside: list[Step] = []
        for outputs, _, expression in lines:
            variables = list(dict.fromkeys(re.findall(r"\b[vx]\d+\b", expression)))
            numbered = re.sub(r"\b[vx]\d+\b", lambda found: f"${variables.index(found[0])}", expression)  # noqa: B023
            inside.append(
                Step(tuple(outputs.split(", ")), numbered, tuple(former.get(name, name) for name in variables))
            )
        given = dict(zip(step.outputs, last[0].split(", "), strict=True))
        after = [_renamed(other, given) for other in self.steps[index + 1 :]]
        return dataclasses.replace(
            self,
            layers=(*(other for other in self.layers if other is not layer), *made),
            setup=tuple(line.replace(f"m.{layer.name}.", "m.") for line in self.setup),
            steps=(*self.steps[:index], *inside, *after),
            returned=_renamed(self.returned, given),
        )


def _renamed(step: Step, names: dict[str, str]) -> Step:
    return dataclasses.replace(step, operands=tuple(names.get(operand, operand) for operand in step.operands))


def dressed(name: str, dressing: str) -> dict[str, str]:
    """How the numbers of each norm in a layer are drawn, by its place; ``"n1=mixed, n2=zeros"`` for norms inside."""
    if "=" not in dressing:
        return {name: dressing}
    pairs = (part.split("=") for part in dressing.split(", "))
    return {f"{name}.{place}": numbers for place, numbers in pairs}


class RestructuredBuilder(CallBuilder):
    """A network in the making."""

    def __init__(self, seed: int, kind: str) -> None:
        super().__init__(seed, kind)
        self.fuse_options: list[str] = []

    def layer(self, prefix: str, code: str, dressing: str = "") -> str:
        """Add a module or tensor; its dressing may be one for each norm inside of it."""
        dressing = ", ".join(_usual(part) for part in dressing.split(", ")) if dressing else ""
        name = self.fresh_name(prefix)
        try:
            with DefaultDtype(torch.float64), torch.no_grad():
                made = eval(code, generate._GLOBALS | {"m": self.live})
                holder = nn.Module()
                setattr(holder, name, made)
                vocabulary.fill(holder, self.seed, dressed(name, dressing))
        except (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
            raise Unfit(str(error)) from error
        if isinstance(made, nn.Module):
            made.eval()
        setattr(self.live, name, made)
        self.layers[name] = Layer(name, code, dressing)
        return f"m.{name}"

    def set_up(self, line: str) -> None:
        """A line that runs once the layers are there, and does now."""
        try:
            self.execute(line)
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise Unfit(str(error)) from error
        self.setup.append(line)

    def wrapped(self, first: int, *takes: str) -> None:
        """Put the steps from the first on into a module of its own, with the layers that only they use."""
        inside = self.steps[first:]
        if not inside or any(not step.outputs for step in inside):
            return
        made = [name for step in inside for name in step.outputs]
        taken = list(dict.fromkeys(x for step in inside for x in step.operands if x not in made))
        given = [name for name in made if name not in {x for step in inside for x in step.operands}]
        names = list(dict.fromkeys(re.findall(r"\bm\.(\w+)", " ".join(step.code for step in inside))))
        others = " ".join(step.code for step in self.steps[:first])
        if not taken or not given or any(name not in self.layers for name in names):
            return
        if any(re.search(rf"\bm\.{name}\b", others) for name in names) or "m.parameters()" in str(inside):
            return
        parts = ", ".join(f"{name}={self.layers[name].code}" for name in names)
        lines = [*map(str, inside), ", ".join(given)]
        dressing = ", ".join(
            f"{place}={numbers}"
            for name in names
            for place, numbers in dressed(name, self.layers[name].dressing).items()
            if numbers
        )
        setup, former = list(self.setup), {name: self.layers.pop(name) for name in names}
        del self.steps[first:]
        for name in made:
            self.variables.pop(name, None)
        self.order = [name for name in self.order if name not in made]
        self.applied = [(layer, x) for layer, x in self.applied if layer[2:] not in former]
        try:
            block = self.layer("b", f"module({', '.join(taken)!r}, {'; '.join(lines)!r}, {parts})", dressing)
            self.setup = (
                [re.sub(rf"\bm\.({'|'.join(names)})\b", rf"{block}.\1", line) for line in setup] if names else setup
            )
            for line in self.setup:
                if block in line:
                    self.execute(line)
            call = f"{block}({', '.join(f'${index}' for index in range(len(taken)))})"
            self.emit(call, *taken, outputs=len(given))
        except (Unfit, RuntimeError, AttributeError, KeyError) as error:
            raise Spoilt from error
        for name in former:
            delattr(self.live, name)

    def finish(self) -> RestructuredProgram:
        plain = super().finish()
        fields = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
        asked = self.one_of(*KINDS_ASKED).format(self.kind.partition("_")[0])
        asked = asked if "mixed" not in asked else "True"
        return RestructuredProgram(**fields, asked=asked, options=tuple(self.fuse_options), training=self.chance(0.25))


def _usual(part: str) -> str:
    place, equals, numbers = part.rpartition("=")
    return place + equals + (numbers if numbers in PLAIN_DRESSINGS else "mixed")


Kind = Callable[[RestructuredBuilder], None]


def draw(seed: int, only: Sequence[str] = ()) -> RestructuredProgram:
    """The network of a seed; the seed modulo the number of kinds is its kind."""
    from fuzz import blocks, operators, restructured_kinds  # noqa: F401 - they register themselves

    kinds = restructured_kinds.KINDS
    kind = list(kinds)[seed % len(kinds)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for attempt in range(300):
            builder = RestructuredBuilder(seed + attempt * 1_000_003, kind)
            with contextlib.suppress(Spoilt, Unfit):
                program = _drawn(builder, kinds[kind])
                if program is not None:
                    return program
    raise RuntimeError(f"no network could be drawn from seed {seed}")


def _drawn(g: RestructuredBuilder, kind: Kind) -> RestructuredProgram | None:
    from fuzz import restructured_kinds

    kind(g)
    for _ in range(g.one_of(0, 0, 1, 1, 2)):
        g.take(generate.BLOCKS if g.chance(0.7) else generate.OPERATORS)
    restructured_kinds.disturb(g)
    for batch, size in ((1, 0), (3, 2)):
        g.vary(Variation(batch, size))
    program = g.finish()
    names = {f"keep=['{layer.name}']" for layer in program.layers}
    options = tuple(option for option in program.options if "keep" not in option or option in names)
    program = dataclasses.replace(program, options=options)
    if not any(layer.dressing for layer in program.layers):
        return None
    return program if runs(program) else None
