"""Drawing a network from a seed.

The generator runs every step on real tensors as it adds it, so it knows shapes and magnitudes: a step that raises,
or whose result is not finite or far from 1, is not taken. What it leaves is a :class:`fuzz.program.Program`.
"""

from __future__ import annotations

import contextlib
import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fuzz import layers as vocabulary
from fuzz.program import AnyProgram, DefaultDtype, Input, Layer, Program, Step, arguments

LARGEST, SMALLEST = 1e5, 1e-6
"""Magnitudes that the largest element of an activation may have."""

MOST_ELEMENTS = 6000

_GLOBALS = {name: getattr(vocabulary, name) for name in vocabulary.__all__}


class Unfit(Exception):
    """The step cannot be taken here; what was taken before stays."""


Action = Callable[["Builder"], Any]


@dataclass(frozen=True)
class Choice:
    """An operator or block that the generator may take, and how often."""

    name: str
    weight: float
    action: Action


OPERATORS: list[Choice] = []
BLOCKS: list[Choice] = []
STRUCTURES: list[Choice] = []
BRANCHES: list[Choice] = []


def operator(weight: float = 1.0) -> Callable[[Action], Action]:
    """Register a single operator."""
    return _register(OPERATORS, weight)


def block(weight: float = 1.0) -> Callable[[Action], Action]:
    """Register a block of several steps, as they stand in real networks."""
    return _register(BLOCKS, weight)


def _register(choices: list[Choice], weight: float) -> Callable[[Action], Action]:
    def register(action: Action) -> Action:
        choices.append(Choice(action.__name__, weight, action))
        return action

    return register


class Builder:
    """A network in the making: its steps so far, and the tensors that they gave."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.live = nn.Module()
        self.variables: dict[str, Any] = {"m": self.live}
        self.inputs: list[Input] = []
        self.layers: dict[str, Layer] = {}
        self.setup: list[str] = []
        self.steps: list[Step] = []
        self.read: set[str] = set()
        self.order: list[str] = []
        self.applied: list[tuple[str, Tensor]] = []
        self.numbers = 0
        self.hint = ""  # how the numbers of the next norm had better be drawn

    # Drawing ----------------------------------------------------------------------------------------------------

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def one_of(self, *options: Any) -> Any:
        return self.random.choice(options)

    def weighted(self, **weights: float) -> str:
        return self.random.choices(list(weights), list(weights.values()))[0]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.variables[name].shape)

    def pick(
        self,
        *ranks: int,
        where: Callable[[Tensor], bool] = lambda tensor: True,
        besides: tuple[str, ...] = (),
    ) -> str:
        """A variable of one of the ranks, a recent and unread one more likely. Raises Unfit if there is none."""
        fitting, weights = [], []
        for age, name in enumerate(reversed(self.order)):
            tensor = self.variables[name]
            if name in besides or not tensor.is_floating_point() or (ranks and tensor.dim() not in ranks):
                continue
            if where(tensor):
                fitting.append(name)
                weights.append((1.0 if name in self.read else 5.0) * 0.75**age)
        if not fitting:
            raise Unfit
        return self.random.choices(fitting, weights)[0]

    def alike(self, x: str) -> str:
        """Another variable of the same shape."""
        shape = self.shape(x)
        return self.pick(where=lambda tensor: tuple(tensor.shape) == shape, besides=(x,))

    # Building ---------------------------------------------------------------------------------------------------

    def fresh_name(self, prefix: str) -> str:
        self.numbers += 1
        return f"{prefix}{self.numbers}"

    def input(self, shape: tuple[int, ...], sizes: tuple[int, ...] = (), high: int = 0) -> str:
        argument = Input(f"x{len(self.inputs)}", shape, sizes, high)
        self.inputs.append(argument)
        self.variables[argument.name] = arguments([argument], self.seed)[0]
        self.order.append(argument.name)
        return argument.name

    def layer(self, prefix: str, code: str, dressing: str = "") -> str:
        """Add a module or tensor; returns how the steps refer to it."""
        name = self.fresh_name(prefix)
        try:
            with DefaultDtype(torch.float64), torch.no_grad():
                made = eval(code, _GLOBALS | {"m": self.live})
                holder = nn.Module()
                setattr(holder, name, made)
                vocabulary.fill(holder, self.seed, {name: dressing})
        except (RuntimeError, ValueError, TypeError) as error:
            raise Unfit(str(error)) from error
        if isinstance(made, nn.Module):
            made.eval()
        setattr(self.live, name, made)
        self.layers[name] = Layer(name, code, dressing)
        return f"m.{name}"

    def parameter(self, *shape: int, gain: bool = False) -> str:
        """A parameter, or something else that holds numbers."""
        prefix = "gain" if gain else "p"
        kind = self.weighted(parameter=8, buffer=1.5, unsaved=0.7, constant=0.7)
        size = ", ".join(map(str, shape)) or "()"
        if kind == "parameter":
            return self.layer(prefix, f"nn.Parameter(torch.empty({size}))")
        if kind == "buffer":
            return self.layer(prefix, f"nn.Buffer(torch.empty({size}))")
        if kind == "unsaved":
            return self.layer(prefix, f"nn.Buffer(torch.empty({size}), persistent=False)")
        count = 1
        for length in shape:
            count *= length
        return self.layer("k", f"torch.linspace(0.5, 1.5, {count}).reshape({tuple(shape)})")

    def emit(self, code: str, *operands: str, outputs: int = 1) -> Any:
        """Add a step and run it; returns the name of its result, or a tuple of names, or its operand if it writes."""
        names = tuple(self.fresh_name("v") for _ in range(outputs))
        step = Step(names, code, operands)
        try:
            with torch.no_grad():
                self.execute(str(step))
        except (
            LookupError,
            RuntimeError,
            ValueError,
            TypeError,
            ArithmeticError,
            AssertionError,
            AttributeError,
        ) as error:
            raise Unfit(f"{step}: {error}") from error
        for name in names or operands[:1]:
            if not _sane(self.variables[name]):
                for output in names:
                    del self.variables[output]
                if not names:
                    raise Spoilt
                raise Unfit(f"{step}: insane")
        self.steps.append(step)
        self.read.update(operands)
        self.order += names
        if not names:
            self.read.discard(operands[0])
            return operands[0]
        return names[0] if outputs == 1 else names

    def execute(self, line: str) -> None:
        exec(line, _GLOBALS, self.variables)

    def apply(self, layer: str, x: str) -> str:
        """Call a module on one variable, and remember that it may be called again."""
        y: str = self.emit(f"{layer}($0)", x)
        self.applied.append((layer, self.variables[x]))
        return y

    def take(self, choices: list[Choice]) -> None:
        choice = self.random.choices(choices, [choice.weight for choice in choices])[0]
        with contextlib.suppress(Unfit):
            choice.action(self)

    # Finishing --------------------------------------------------------------------------------------------------

    def finish(self) -> Program:
        """Return what nothing reads, and now and then something from the middle."""
        leaves = [name for name in self.order if name not in self.read]
        made = [name for name in self.order if name.startswith("v")]
        if not made:
            raise Spoilt
        leaves = leaves[-4:] or made[-1:]
        if self.chance(0.1):
            leaves.append(self.random.choice(made))
        code = ", ".join(f"${index}" for index in range(len(leaves)))
        if self.chance(0.15):
            code = "{" + ", ".join(f"'out{index}': ${index}" for index in range(len(leaves))) + "}"
        elif self.chance(0.05):
            code = f"[{code}]"
        elif self.chance(0.05):
            code = f"{{'all': ({code},)}}"
        program = Program(
            self.seed, tuple(self.inputs), tuple(self.layers.values()), tuple(self.setup), tuple(self.steps),
            Step((), code, tuple(leaves)),
        )  # fmt: skip
        return without_unused_layers(program)


class Spoilt(Exception):
    """The network cannot be used; another has to be drawn."""


def _sane(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    if value.numel() == 0 or value.numel() > MOST_ELEMENTS or value.dim() > 6:
        return False
    if not value.is_floating_point():
        return not value.is_complex()
    largest = float(value.abs().max())
    return SMALLEST < largest < LARGEST  # False for NaN


def without_unused_layers(program: AnyProgram) -> AnyProgram:
    """The program without layers that nothing mentions, and without setup lines about layers that are gone."""
    import dataclasses

    held = {layer.name for layer in program.layers}
    setup = tuple(line for line in program.setup if set(re.findall(r"\bm\.(\w+)", line)) <= held)
    stepped = dataclasses.replace(program, setup=()).mentions()
    while True:
        kept = tuple(
            line for line in setup if set(re.findall(r"\bm\.(\w+)", line)) & stepped or line.startswith("m.new")
        )
        trimmed = dataclasses.replace(program, setup=kept)
        used = trimmed.mentions()
        layers = tuple(layer for layer in program.layers if layer.name in used)
        return dataclasses.replace(trimmed, layers=layers)


def draw(seed: int, structures: bool = False, branches: bool = False) -> Program:
    """The network of a seed.

    Args:
        structures: draw shared layers and computed weights too, more often than by chance.
        branches: draw parallel branches too, likewise.
    """
    from fuzz import blocks, operators  # noqa: F401 - they register themselves
    from fuzz import structures as _  # noqa: F401

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _draw(seed, STRUCTURES * structures + BRANCHES * branches)


def _draw(seed: int, further: list[Choice]) -> Program:
    for attempt in range(100):
        builder = Builder(seed if attempt == 0 else seed + attempt * 1_000_003)
        try:
            program = _drawn(builder, further)
            if program is not None:
                return program
        except Spoilt:
            continue
    raise RuntimeError(f"no network could be drawn from seed {seed}")


def _drawn(builder: Builder, further: list[Choice]) -> Program | None:
    from fuzz import blocks

    blocks.begin(builder)
    budget = builder.random.choice((4, 5, 6, 8, 10, 14, 20))
    for _ in range(budget):
        choices = BLOCKS if builder.chance(0.65) else OPERATORS
        builder.take(further if further and builder.chance(0.4) else choices)
        if len(builder.steps) >= budget:
            break
    if not any(layer.dressing for layer in builder.layers.values()):
        builder.take([choice for choice in BLOCKS if choice.name == "layer_and_norm"])
    blocks.disturb(builder)
    program = builder.finish()
    if not any(layer.dressing for layer in program.layers):
        return None
    return program if runs(program) else None


def runs(program: Program) -> bool:
    """True if the network runs on its inputs and what it returns is finite and not all zero."""
    from fuzz.check import tensors_of

    try:
        net = program.build()
        with torch.no_grad():
            results = tensors_of(net(*program.arguments(0)))
    except Exception:  # noqa: BLE001 - whatever it raises, it cannot be used
        return False
    return bool(results) and all(
        bool(result.isfinite().all()) for result in results.values() if result.is_floating_point()
    )
