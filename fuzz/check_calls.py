"""The property for networks with several calls: the fused network does on every call what the original does."""

from __future__ import annotations

import copy
import itertools
import math
import traceback
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import bnfuse
from fuzz.check import AMPLIFIED, EXACT, MOVED, ROUNDED, Failed, Snapshot, _is_norm, _Noise, _reported, distance
from fuzz.protocol import Call, CalledProgram

ROUNDING = 1e-5
"""A larger difference than this is never put down to rounding."""


@dataclass
class CallsOutcome:
    """What came of one network.

    Attributes:
        failure: a class of failure that is stable under shrinking, empty if all is well.
        detail: the failure in full, with the call at which it showed.
        calls: how many further calls were compared.
        skipped: True if outputs differ, but no more than rounding alone would make them.
    """

    kind: str
    norms: int = 0
    removed: int = 0
    calls: int = 0
    failure: str = ""
    detail: str = ""
    skipped: bool = False


def check(program: CalledProgram) -> CallsOutcome:
    """Fuse the network on its recorded call, and compare on the others."""
    outcome = CallsOutcome(program.kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _check(program, outcome)
        except Failed as failed:
            outcome.failure, outcome.detail = failed.failure, failed.detail
    return outcome


def _check(program: CalledProgram, outcome: CallsOutcome) -> None:
    model = program.build()
    outcome.norms = _norms(model)
    before = Snapshot(model)
    with _reported("fuse"):
        fused = fuse(program, model)
    outcome.removed = outcome.norms - _norms(fused)
    if not program.in_place:
        before.compare("fuse")
        _ruin(model)
    usual = Run(program, program.build()).call(program.recorded)
    for sequence in ((program.recorded,), *program.further):
        _compare(program, sequence, _fresh(program, fused), outcome, usual)
    if program.trained:
        _check_training(program)


def fuse(program: CalledProgram, model: nn.Module) -> nn.Module:
    """The network fused on its recorded call, and on those that have to be given where the library takes them."""
    _reset(program, model)
    fused: nn.Module = eval(program.fusion, _names(model) | {"bnfuse": bnfuse})
    return fused


def unseen(program: CalledProgram) -> str:
    """What the plan of a network says that was not seen."""
    model = program.build()
    _reset(program, model)
    plan: bnfuse.Plan = eval(program.planning, _names(model) | {"bnfuse": bnfuse})
    return "\n".join(plan.unseen)


def _norms(model: nn.Module) -> int:
    return sum(map(_is_norm, set(model.modules())))


def _ruin(model: nn.Module) -> None:
    """What the caller does with the original afterwards must not matter to the fused network."""
    with torch.no_grad():
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(math.nan)


def _fresh(program: CalledProgram, fused: nn.Module) -> nn.Module:
    if any("forward" in vars(module) for module in fused.modules()):
        net = program.build()  # a copy would run the forward of what it was copied from
        fused = fuse(program, net)
        if not program.in_place:
            _ruin(net)
        return fused
    try:
        return copy.deepcopy(fused)
    except Exception:  # noqa: BLE001 - some hold tensors that cannot be copied
        return fuse(program, program.build())


# Calls --------------------------------------------------------------------------------------------------------------


def _names(net: nn.Module) -> dict[str, Any]:
    """The names that the source of the network and of its calls may use."""
    return type(net).__init__.__globals__ | {"net": net}


def _reset(program: CalledProgram, net: nn.Module) -> None:
    """The memory outside the network, which its copies share, is as it was at first."""
    for name, code in program.memory:
        exec(f"{name} = {code}", type(net).__init__.__globals__)


def _evaluated(call: Call, names: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    names = {**names, "collected": lambda *arguments, **options: (arguments, options)}
    evaluated: tuple[tuple[Any, ...], dict[str, Any]] = eval(f"collected({call.passed})", names)
    return evaluated


class Run:
    """A network on which calls are made one after another."""

    def __init__(self, program: CalledProgram, net: nn.Module) -> None:
        self.net, self.kept = net, program.kept
        _reset(program, net)

    def call(self, call: Call) -> dict[str, Any]:
        """Everything that a call gives: what it returns, what becomes of its arguments, what it keeps elsewhere."""
        with getattr(torch, call.mode)():
            arguments, options = _evaluated(call, _names(self.net))
            found = called(getattr(self.net, call.method) if call.method else self.net, *arguments, **options)
            for expression in self.kept:
                found |= copied(eval(expression, _names(self.net)), expression)
        return found


def called(function: Any, /, *arguments: Any, **options: Any) -> dict[str, Any]:
    """What a call returns, and what has become of its arguments."""
    output = function(*arguments, **options)
    return copied(output, "output") | copied(arguments, "arguments") | copied(options, "options")


def copied(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a value, which later calls do not change."""
    found = leaves(value, path)
    return {place: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for place, leaf in found.items()}


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every tensor, number and text in a value, by where it stands."""
    if isinstance(value, (Tensor, bool, int, float, str)):
        return {path: value}
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, Iterable):
        items = enumerate(value)
    elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)) and not callable(value):
        items = vars(value).items()
    found: dict[str, Any] = {}
    for key, item in items:
        found |= leaves(item, f"{path}[{key!r}]")
    return found


def go_back(output: Any) -> None:
    """Gradients from the sum of all tensors in an output; raises what PyTorch does, also if none has any."""
    tensors = [leaf for leaf in leaves(output).values() if isinstance(leaf, Tensor) and leaf.requires_grad]
    sum((tensor.sum() for tensor in tensors), torch.zeros(())).backward()


def runs(program: CalledProgram) -> bool:
    """True if the network holds a norm and runs on the recorded call, and what it gives is finite."""
    try:
        net = program.build()
        found = Run(program, net).call(program.recorded)
    except Exception:  # noqa: BLE001 - whatever it raises, it cannot be used
        return False
    return bool(found) and _norms(net) > 0 and all(map(_finite, found.values()))


def _finite(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return bool(leaf.isfinite().all())
    return not isinstance(leaf, float) or math.isfinite(leaf)


# Comparison ---------------------------------------------------------------------------------------------------------


def _compare(
    program: CalledProgram, sequence: tuple[Call, ...], fused: nn.Module, outcome: CallsOutcome, usual: dict[str, Any]
) -> None:
    """Compare on calls that follow one another.

    Args:
        usual: what the original gives on the recorded call.
    """
    expected = []
    original = Run(program, program.build())
    for call in sequence:
        try:
            expected.append(original.call(call))
        except Exception:  # noqa: BLE001 - the original does not run; what follows is no fair call either
            break
    tolerance = max([EXACT, *(loss for cast, loss in ROUNDED.items() if cast in program.source)])
    run = Run(program, fused)
    for place, (call, wanted) in enumerate(zip(sequence, expected, strict=False)):
        what = "the recorded call" if sequence == (program.recorded,) else "a further call"
        shown = " then ".join(map(str, sequence[: place + 1]))
        try:
            got = run.call(call)
        except Exception as error:
            name = type(error).__name__
            raise Failed(
                f"crash: the fused network raises {name} at {what}", f"{shown}\n{traceback.format_exc()}"
            ) from error
        outcome.calls += what == "a further call"
        if got.keys() != wanted.keys():
            raise Failed(f"wrong: other outputs at {what}", f"{shown}\ngot {list(got)}, expected {list(wanted)}")
        for path, leaf in wanted.items():
            difference = apart(got[path], leaf) if _finite(leaf) else 0.0
            if difference == math.inf:
                difference = _beside_zeros(got[path], leaf, usual.get(path))
            if difference <= tolerance:
                continue
            if difference < ROUNDING:
                moved = _moved_by_noise(program, sequence[: place + 1], path, leaf)
                if moved > MOVED and difference < AMPLIFIED * moved:
                    outcome.skipped = True
                    return
            raise Failed(f"wrong: the outputs differ at {what}", f"{shown}\n{path} by {difference:.3g}")


def _beside_zeros(a: Any, b: Any, usual: Any) -> float:
    """How far a tensor is from zeros, relative to what is usual in their place; infinite if they are none."""
    if not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in (a, b, usual)):
        return math.inf
    if a.shape != b.shape or a.dtype != b.dtype or b.count_nonzero() or not usual.count_nonzero():
        return math.inf
    return float(a.abs().max() / usual.abs().max())


def apart(a: Any, b: Any) -> float:
    """How far two leaves are apart, relative to the second."""
    if isinstance(b, Tensor):
        return distance(a, b) if isinstance(a, Tensor) else math.inf
    if isinstance(b, float) and isinstance(a, float):
        return abs(a - b) / abs(b) if b else abs(a)
    return 0.0 if type(a) is type(b) and a == b else math.inf


def difference(before: Any, after: Any) -> float:
    """The largest difference of anything in two results; for a printed program."""
    a, b = leaves(after), leaves(before)
    return max((apart(a[path], leaf) for path, leaf in b.items()), default=0.0) if a.keys() == b.keys() else math.inf


def _moved_by_noise(program: CalledProgram, sequence: tuple[Call, ...], path: str, expected: Any) -> float:
    """How far relative noise on every operator's result moves an output."""
    moved = 0.0
    for seed in range(3):
        run = Run(program, program.build())
        found: dict[str, Any] = {}
        with _Noise(torch.Generator().manual_seed(seed)):
            for call in sequence:
                found = run.call(call)
        moved = max(moved, apart(found.get(path), expected))
    return moved


def _check_training(program: CalledProgram) -> None:
    """The original trains after it was fused, if it would have trained before."""
    if _trains(program, fused_before=False) == "" and (error := _trains(program, fused_before=True)):
        raise Failed("wrong: the original does not train once it was fused", error)


def _trains(program: CalledProgram, fused_before: bool) -> str:
    model = program.build()
    if fused_before:
        fuse(program, model)
    model.train()
    arguments, options = _evaluated(program.recorded, _names(model))
    try:
        go_back(model(*arguments, **options))
    except Exception:  # noqa: BLE001 - any exception is the answer
        return traceback.format_exc()
    return ""
