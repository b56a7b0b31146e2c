"""Drawing a network together with its calls.

A kind (:mod:`fuzz.kinds`) puts something into the network that goes by more than the recorded call shows. Around it
stand the blocks and operators of :mod:`fuzz.generate`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from fuzz import generate
from fuzz.check_calls import runs
from fuzz.generate import Builder, Spoilt, Unfit
from fuzz.program import Input, Layer, Step
from fuzz.protocol import Call, CalledProgram, Cut

Pack = Callable[[list[str]], list[str]]
"""How the inputs, as source, are passed: ``[a, b]`` becomes the arguments."""

Shape = tuple[int, ...]
Option = str | Callable[[Shape], str]
"""The source of an argument, or a function that gives it from the shape of the first input."""

PLAIN_DRESSINGS = ("", "positive", "mixed", "zeros", "unit", "scale", "equal", "dead")
"""How norms are drawn here: without the extreme numbers, so that what differs is wrong and not rounding."""


@dataclass
class Variation:
    """One further call.

    Attributes:
        batch: how many samples; as many as on the recorded call if 0.
        size: how much longer the free axes are.
        form: the expression that an input is put into.
        options: further arguments by name.
        pack: how the inputs are passed, if not as on the recorded call.
        count: how many inputs, if not as many as on the recorded call.
        arguments: the arguments, where they are not the inputs.
        mode: ``torch.``... in which the call is made.
    """

    batch: int = 0
    size: int = 0
    form: str = "{}"
    options: dict[str, Option] = field(default_factory=dict)
    method: str = ""
    pack: Pack | None = None
    count: int = 0
    arguments: tuple[str, ...] | None = None
    mode: str = "no_grad"


CHOICES = (
    "({1}, {0})[bool({2})]", "({2} and [{0}] or [{1}])[0]", "torch.where(torch.tensor(bool({2})), {0}, {1})",
    "({0}) * bool({2}) + ({1}) * (not ({2}))", "sum([{0}] * bool({2}) + [{1}] * (not ({2})))",
    "{{True: lambda: {0}, False: lambda: {1}}}[bool({2})]()", "next(iter([{0}] if {2} else [{1}]))",
    "torch.lerp({1}, {0}, float(bool({2})))", "[{0} for _ in range(bool({2}))][0] if {2} else {1}",
    "(lambda: {0})() if {2} else (lambda: {1})()",
)  # fmt: skip
"""Other ways to write ``{0} if {2} else {1}``."""


class CallBuilder(Builder):
    """A network in the making, with its calls."""

    def __init__(self, seed: int, kind: str) -> None:
        super().__init__(seed)
        self.kind = kind
        self.live = type("Net", (nn.Module,), {})()
        self.variables = {**generate._GLOBALS, "m": self.live}
        self.preamble: list[str] = []
        self.memory: list[tuple[str, str]] = []
        self.positional: tuple[str, ...] = ()
        self.signature: list[str] = []
        self.methods: list[str] = []
        self.ending: list[str] = []
        self.kept: list[str] = []
        self.final: tuple[str, tuple[str, ...]] | None = None  # what is returned, if it is not simply what is left
        self.sequences: list[tuple[Variation, ...]] = []
        self.given: list[Variation] = []
        self.options: dict[str, Option] = {}
        self.pack: Pack = list
        self.trained = False
        self.drawn = 0

    # What networks of every kind have -----------------------------------------------------------------------------

    def execute(self, line: str) -> None:
        exec(line, self.variables)

    def input(self, shape: Shape, sizes: tuple[int, ...] = (), high: int = 0) -> str:
        argument = Input(f"x{len(self.inputs)}", shape, sizes, high)
        self.inputs.append(argument)
        self.variables[argument.name] = eval(_written(argument, len(self.inputs), shape), self.variables)
        self.order.append(argument.name)
        return argument.name

    def layer(self, prefix: str, code: str, dressing: str = "") -> str:
        return super().layer(prefix, code, dressing if dressing in PLAIN_DRESSINGS else "mixed")

    # What only these have -----------------------------------------------------------------------------------------

    def attribute(self, name: str, code: str) -> str:
        """Something else that the network holds."""
        setattr(self.live, name, eval(code, self.variables))
        self.layers[name] = Layer(name, code)
        return f"m.{name}"

    def remember(self, name: str, code: str, *preamble: str) -> None:
        """Something outside the network that its forward may change."""
        for line in preamble:
            if line not in self.preamble:
                self.preamble.append(line)
                self.execute(line)
        self.memory.append((name, code))
        self.execute(f"{name} = {code}")

    def statement(self, code: str, *operands: str) -> None:
        """A line that gives no variable."""
        step = Step((), code, operands)
        try:
            with torch.no_grad():
                self.execute(str(step))
        except Exception as error:
            raise Unfit(f"{step}: {error}") from error
        self.steps.append(step)

    def parameter_of_forward(self, text: str, recorded: Option | None = None) -> str:
        """A further parameter of the forward, ``name=default`` or ``name``, and what the recorded call passes."""
        name, _, default = text.partition("=")
        self.signature.append(text)
        if recorded is not None:
            self.options[name] = recorded
        shape = self.inputs[0].shape
        self.variables[name] = eval(recorded(shape) if callable(recorded) else recorded or default, self.variables)
        return name

    def holds(self, condition: str, *operands: str) -> bool:
        """Whether a condition holds on the recorded call."""
        try:
            with torch.no_grad():
                return bool(eval(Step((), condition, operands).expression, self.variables))
        except Exception as error:
            raise Unfit(f"{condition}: {error}") from error

    def choose(self, condition: str, now: str, other: str, *operands: str) -> str:
        """A step that is ``now`` on the recorded call, and ``other`` where the condition comes out otherwise."""
        if not self.holds(condition, *operands):
            now, other = other, now
        form = "{0} if {2} else {1}" if self.chance(0.6) else self.one_of(*CHOICES)
        return str(self.emit(form.format(now, other, condition), *operands))

    def cut(self, x: str, method: str, head: str = "", repeated: bool = False) -> str:
        """What was built so far, up to x, is a public method; what follows sees only x."""
        name = self.fresh_name("v")
        self.steps.append(Cut((name,), "$0", (x,), method, head, repeated))
        self.variables[name] = self.variables[x]
        self.order = [name]
        self.applied = []
        return name

    def vary(self, *sequence: Variation) -> None:
        self.sequences.append(sequence)

    # Finishing ----------------------------------------------------------------------------------------------------

    def call(self, variation: Variation, recorded: bool = False) -> Call:
        """A variation as a call, with values of its own."""
        options = {**({} if variation.method else self.options), **variation.options}
        shape = _shape(self.inputs[0], variation.batch, variation.size)
        passed = tuple((name, code(shape) if callable(code) else code) for name, code in options.items())
        if variation.arguments is not None:
            return Call(variation.arguments, passed, variation.method, variation.mode)
        codes = []
        inputs = self.inputs if not variation.count else self.inputs[:1] * variation.count
        for index, argument in enumerate(inputs):
            self.drawn += 1
            seed = index + 1 if recorded else 100 + self.drawn
            code = _written(argument, seed, _shape(argument, variation.batch, variation.size))
            codes.append(code if argument.high else variation.form.format(code))
        return Call(tuple((variation.pack or self.pack)(codes)), passed, variation.method, variation.mode)

    def finish(self) -> CalledProgram:
        plain = super().finish()
        if self.final is not None:
            plain = dataclasses.replace(plain, returned=Step((), *self.final))
        batch = self.inputs[0].shape[0]
        sequences = [
            *self.sequences,
            (Variation(),),
            (Variation(self.one_of(*({1, 2, 5} - {batch}))),),
            (Variation(size=self.one_of(1, 2, 3)),),
            (Variation(self.one_of(1, 2, 5), size=self.one_of(-1, -2)),),
            (Variation(), Variation(self.one_of(1, 2, 5)), Variation()),
        ]
        fields = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
        program = CalledProgram(
            **fields, kind=self.kind, preamble=tuple(self.preamble), memory=tuple(self.memory),
            positional=self.positional, signature=tuple(self.signature), methods=tuple(self.methods),
            ending=tuple(self.ending), kept=tuple(self.kept), recorded=self.call(Variation(), recorded=True),
            given=tuple(map(self.call, self.given)),
            further=tuple(tuple(map(self.call, sequence)) for sequence in sequences), trained=self.trained,
        )  # fmt: skip
        held = {layer.name: layer for layer in self.layers.values()}
        missing = program.mentions() & held.keys() - {layer.name for layer in program.layers}
        kept = {layer.name for layer in program.layers} | missing
        return dataclasses.replace(program, layers=tuple(layer for name, layer in held.items() if name in kept))


def _shape(argument: Input, batch: int, size: int) -> Shape:
    shape = [length + size if axis in argument.sizes else length for axis, length in enumerate(argument.shape)]
    return (batch or shape[0], *shape[1:])


def _written(argument: Input, seed: int, shape: Shape) -> str:
    return f"drawn({seed}, {shape}{f', {argument.high}' if argument.high else ''})"


def begin(g: CallBuilder, *kinds: str, count: int = 1) -> None:
    """The inputs; small, since every network is called a dozen times."""
    kind = g.one_of(*(kinds or ("image", "image", "image", "sequence", "vector", "tokens")))
    batch, channels, size = g.one_of(1, 2, 2, 2, 3, 4), g.one_of(2, 3, 4), g.one_of(4, 5, 6)
    shape, sizes = {
        "image": ((batch, channels, size, size), (2, 3)),
        "sequence": ((batch, channels, size), (2,)),
        "vector": ((batch, channels), ()),
        "tokens": ((batch, size, channels), (1,)),
        "frames": ((batch, g.one_of(2, 3), channels, size, size), (1,)),
        "columns": ((batch, channels, 1), (2,)),
    }[kind]
    for _ in range(count):
        g.input(shape, sizes)


def draw(seed: int) -> CalledProgram:
    """The network of a seed, with its calls; the seed modulo the number of kinds is its kind."""
    from fuzz import blocks, kinds, operators  # noqa: F401 - they register themselves

    names = list(kinds.KINDS)
    kind = names[seed % len(names)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for attempt in range(300):
            builder = CallBuilder(seed + attempt * 1_000_003, kind)
            with contextlib.suppress(Spoilt, Unfit):
                program = _drawn(builder, kinds.KINDS[kind])
                if program is not None:
                    return program
    raise RuntimeError(f"no network could be drawn from seed {seed}")


def _drawn(g: CallBuilder, kind: Callable[[CallBuilder], None]) -> CalledProgram | None:
    kind(g)
    for _ in range(g.one_of(0, 0, 1, 2)):
        g.take(generate.BLOCKS if g.chance(0.6) else generate.OPERATORS)
    program = g.finish()
    if not any(layer.dressing for layer in program.layers):
        return None
    return program if runs(program) else None


def around(g: CallBuilder) -> None:
    """Ordinary blocks before the one that matters."""
    for _ in range(g.one_of(0, 0, 1)):
        g.take(generate.BLOCKS if g.chance(0.6) else generate.OPERATORS)
