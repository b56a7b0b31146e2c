"""Making a failing network small: whatever can be left out while it still fails in the same way is left out."""

from __future__ import annotations

import ast
import dataclasses
import re
import time
from collections.abc import Callable, Iterator

from fuzz.generate import without_unused_layers
from fuzz.program import Program, Step
from fuzz.protocol import CalledProgram

Failing = Callable[[Program], bool]


def shrink(program: Program, failing: Failing, seconds: float = 30.0) -> Program:
    """A smaller program that still fails.

    Args:
        program: one that fails.
        failing: True for a program that runs and fails in the same way.
        seconds: when to stop (s).
    """
    stop = time.monotonic() + seconds
    progress = True
    while progress and time.monotonic() < stop:
        progress = False
        for candidate in _candidates(program):
            if time.monotonic() > stop:
                break
            candidate = without_unused_layers(candidate)
            if candidate == program or not candidate.steps:
                continue
            try:
                fails = failing(candidate)
            except Exception:  # noqa: BLE001 - the candidate does not run
                continue
            if fails:
                program, progress = candidate, True
                break
    return program


def _candidates(program: Program) -> Iterator[Program]:
    """Programs with something left out, the largest savings first."""
    if isinstance(program, CalledProgram):
        yield from program.smaller()
    operands = program.returned.operands
    if len(operands) > 1 or program.returned.code != "$0":
        for operand in operands:
            yield _pruned(dataclasses.replace(program, returned=Step((), "$0", (operand,))))
        for index in range(len(operands)):
            rest = operands[:index] + operands[index + 1 :]
            if rest:
                yield _pruned(_returning(program, rest))
    for index in range(len(program.steps)):
        yield from _without(program, index)
    for index in range(len(program.setup)):
        yield dataclasses.replace(program, setup=program.setup[:index] + program.setup[index + 1 :])
    for index, layer in enumerate(program.layers):
        if layer.dressing not in ("", "positive"):
            plain = dataclasses.replace(layer, dressing="positive")
            yield dataclasses.replace(program, layers=_replaced(program.layers, index, plain))
        for code in _simpler(layer.code):
            yield dataclasses.replace(
                program, layers=_replaced(program.layers, index, dataclasses.replace(layer, code=code))
            )
    for index, step in enumerate(program.steps):
        for code in _simpler_step(step.code):
            changed = dataclasses.replace(step, code=code)
            yield dataclasses.replace(program, steps=_replaced(program.steps, index, changed))


def _replaced(items: tuple, index: int, item: object) -> tuple:  # type: ignore[type-arg]
    return (*items[:index], item, *items[index + 1 :])


def _returning(program: Program, operands: tuple[str, ...]) -> Program:
    code = ", ".join(f"${index}" for index in range(len(operands)))
    return dataclasses.replace(program, returned=Step((), code, operands))


def _without(program: Program, index: int) -> Iterator[Program]:
    """The program without a step: its results are replaced by an operand, or everything that follows from it goes."""
    step = program.steps[index]
    rest = program.steps[:index] + program.steps[index + 1 :]
    if not step.outputs:
        yield dataclasses.replace(program, steps=rest)
        return
    for operand in dict.fromkeys(step.operands):
        names = dict.fromkeys(step.outputs, operand)
        steps = tuple(_renamed(other, names) for other in rest)
        yield dataclasses.replace(program, steps=steps, returned=_renamed(program.returned, names))
    yield from _cut(program, index)


def _cut(program: Program, index: int) -> Iterator[Program]:
    lost = set(program.steps[index].outputs)
    kept = list(program.steps[:index])
    for step in program.steps[index + 1 :]:
        if lost & set(step.operands):
            lost.update(step.outputs)
        else:
            kept.append(step)
    returned = tuple(operand for operand in program.returned.operands if operand not in lost)
    if not returned and kept:
        made = [name for step in kept for name in step.outputs]
        returned = tuple(made[-1:])
    if returned:
        yield _returning(dataclasses.replace(program, steps=tuple(kept)), returned)


def _renamed(step: Step, names: dict[str, str]) -> Step:
    return dataclasses.replace(step, operands=tuple(names.get(operand, operand) for operand in step.operands))


def _pruned(program: Program) -> Program:
    """Without steps whose results nothing reads."""
    steps = list(program.steps)
    while True:
        read = {operand for step in (*steps, program.returned) for operand in step.operands}
        kept = [step for step in steps if not step.outputs or read & set(step.outputs)]
        if len(kept) == len(steps):
            return dataclasses.replace(program, steps=tuple(kept))
        steps = kept


def _simpler(code: str) -> Iterator[str]:
    """The same call with one keyword argument less."""
    try:
        tree = ast.parse(code, mode="eval")
    except SyntaxError:
        return
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        for keyword in list(call.keywords):
            call.keywords.remove(keyword)
            yield ast.unparse(tree)
            call.keywords.append(keyword)


def _simpler_step(code: str) -> Iterator[str]:
    hidden = re.sub(r"\$(\d)", r"operand_\1", code)
    for simpler in _simpler(hidden):
        yield re.sub(r"operand_(\d)", r"$\1", simpler)
