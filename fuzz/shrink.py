"""Making a failing network small: whatever can be left out while it still fails in the same way is left out."""

from __future__ import annotations

import ast
import copy
import dataclasses
import itertools
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from fuzz.generate import without_unused_layers
from fuzz.program import AnyProgram, Step


def shrink(program: AnyProgram, failing: Callable[[AnyProgram], bool], seconds: float = 30.0) -> AnyProgram:
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


def _candidates(program: AnyProgram) -> Iterator[AnyProgram]:
    """Programs with something left out, the largest savings first."""
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
        for code in (*_parts_left_out(layer.code), *_simpler(layer.code)):
            yield dataclasses.replace(
                program, layers=_replaced(program.layers, index, dataclasses.replace(layer, code=code))
            )
    for index, step in enumerate(program.steps):
        for code in _simpler_step(step.code):
            changed = dataclasses.replace(step, code=code)
            yield dataclasses.replace(program, steps=_replaced(program.steps, index, changed))


_Item = TypeVar("_Item")


def _replaced(items: tuple[_Item, ...], index: int, item: _Item) -> tuple[_Item, ...]:
    return (*items[:index], item, *items[index + 1 :])


def _returning(program: AnyProgram, operands: tuple[str, ...]) -> AnyProgram:
    code = ", ".join(f"${index}" for index in range(len(operands)))
    return dataclasses.replace(program, returned=Step((), code, operands))


def _without(program: AnyProgram, index: int) -> Iterator[AnyProgram]:
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


def _cut(program: AnyProgram, index: int) -> Iterator[AnyProgram]:
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


def _pruned(program: AnyProgram) -> AnyProgram:
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


def _parts_left_out(code: str) -> Iterator[str]:
    """A layer with less inside: a wrapper taken off, a part of a list left out, something left out of a forward."""
    try:
        tree = ast.parse(code, mode="eval")
    except SyntaxError:
        return
    for index, node in enumerate(ast.walk(tree)):
        for smaller in _smaller_nodes(node):
            changed = copy.deepcopy(tree)
            yield ast.unparse(
                _Replacing(next(itertools.islice(ast.walk(changed), index, None)), smaller).visit(changed)
            )


class _Replacing(ast.NodeTransformer):
    """Puts one node in the place of another."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else super().generic_visit(node)


def _smaller_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node of a layer's code."""
    if isinstance(node, ast.Call):
        yield from (part for part in node.args if isinstance(part, ast.Call))
        chain = isinstance(node.func, ast.Name) and node.func.id == "parametrised"
        for index, part in enumerate(node.args):
            if len(node.args) > 1 and (isinstance(part, ast.Call) or (chain and index)):
                yield ast.Call(node.func, [*node.args[:index], *node.args[index + 1 :]], node.keywords)
    elif isinstance(node, ast.List):
        for index in range(len(node.elts)):
            if len(node.elts) > 1:
                yield ast.List([*node.elts[:index], *node.elts[index + 1 :]])
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "(" in node.value:
        for lines in _smaller_forwards(node.value):
            yield ast.Constant(lines)


def _smaller_forwards(code: str) -> Iterator[str]:
    """Statements with an operand in the place of what is made of it."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return
    for index, node in enumerate(ast.walk(tree)):
        operands: list[ast.expr] = []
        if isinstance(node, ast.BinOp):
            operands = [node.left, node.right]
        elif isinstance(node, ast.Call):
            operands = [part for part in node.args if not isinstance(part, ast.Constant)]
        for operand in operands:
            changed = copy.deepcopy(tree)
            old = next(itertools.islice(ast.walk(changed), index, None))
            yield "; ".join(ast.unparse(_Replacing(old, operand).visit(changed)).splitlines())


def _simpler_step(code: str) -> Iterator[str]:
    hidden = re.sub(r"\$(\d)", r"operand_\1", code)
    for simpler in _simpler(hidden):
        yield re.sub(r"operand_(\d)", r"$\1", simpler)
