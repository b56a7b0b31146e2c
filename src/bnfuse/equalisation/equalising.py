"""The public call: find what is free, choose scales, let the solver carry them through the model, verify the result."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bnfuse.capture.run import Recording
from bnfuse.changes import Changes, Edit
from bnfuse.equalisation import ceilings
from bnfuse.equalisation.families import Families, Family, find_families
from bnfuse.equalisation.noise import Noise
from bnfuse.equalisation.observed import observe
from bnfuse.equalisation.scales import LayerRange, Scales
from bnfuse.errors import InputError, NothingEqualisedWarning, VerificationError
from bnfuse.graph.graph import Kind
from bnfuse.model import tree
from bnfuse.model.alone import one_at_a_time
from bnfuse.model.calls import Call, checked_calls
from bnfuse.model.copying import copy_model
from bnfuse.model.wrappers import checked, unwrap
from bnfuse.planner.options import Options
from bnfuse.planner.problem import Problem, captured
from bnfuse.planner.trying_plans import Trials
from bnfuse.rules import RULES
from bnfuse.solve.network import Network, Refusal
from bnfuse.solve.propagation import Trial
from bnfuse.transaction import fused_copy, rewrite
from bnfuse.verify.equivalence import same_outputs
from bnfuse.verify.reference import Reference

log = logging.getLogger("bnfuse")


@one_at_a_time
def equalise(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    data: Any = None,
    weights: Literal["tensor", "channel"] = "tensor",
    relu6: Literal["keep", "ceilings"] = "keep",
    powers_of_two: bool = False,
    calls: Sequence[Call] = (),
    verify: bool = True,
) -> nn.Module:
    """Rescale the channels inside a model, so that rounding it to 8-bit integers costs less; its outputs stay.

    Every scale that the layers before a tensor take up is undone by the layers after it, through sums, concatenations,
    pooling and whatever else scales pass through (cross-layer equalisation: Nagel, van Baalen, Blankevoort and Welling,
    "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019). Call :func:`bnfuse.fuse`
    first: a batch norm that is folded later brings its own scales along.

    Args:
        model: any module. What counts is its behaviour in evaluation mode.
        example_inputs: as for :func:`bnfuse.fuse`.
        data: inputs of the kind that the model will meet, in the form of ``example_inputs``; some 10 samples do. The
            scales are those with the least predicted noise at the outputs, of weights and activations together, and
            what the activations are like is found out on the data. Without data the example inputs serve; if these
            are inferred, they are random numbers, which tell less.
        weights: "tensor" if every weight will be rounded with one step, "channel" if with one for each output channel.
        relu6: "keep" leaves alone what is bounded from above (``nn.ReLU6``, ``nn.Hardtanh(0, 6)``), which passes no
            scale. "ceilings" gives it a bound per channel: an ``nn.Identity`` before it (a norm that was fused) becomes
            a :class:`bnfuse.equalisation.ceilings.Ceiling`, or the function's module becomes a pair of both. The
            outputs stay the same for all inputs; at run time it is a minimum more for each.
        powers_of_two: round all scales to powers of two. In binary floating point the outputs are then the same to the
            last bit, as long as nothing under- or overflows; it costs a part of the gain.
        calls: as for :func:`bnfuse.fuse`.
        verify: as for :func:`bnfuse.fuse`.

    Returns:
        A copy in evaluation mode, of the same class.

    Raises:
        InputError: as for :func:`bnfuse.fuse`; or ``data`` makes the model run other operators than the example inputs;
            or an argument holds something else.
        VerificationError: the outputs differ.

    Warns:
        NothingEqualisedWarning: no tensor may be rescaled; the text says why.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    >>> uneven = torch.logspace(-1, 1, 8)
    >>> _ = model[0].weight.data.mul_(uneven.reshape(8, 1, 1, 1)), model[2].weight.data.div_(uneven.reshape(1, 8, 1, 1))
    >>> equalised = equalise(model, torch.randn(8, 3, 8, 8))
    >>> rows = [network[0].weight.data.abs().amax((1, 2, 3)) for network in (model, equalised)]
    >>> [bool(size.max() > 10 * size.min()) for size in rows]
    [True, False]
    """
    _check("weights", weights, ("tensor", "channel"))
    _check("relu6", relu6, ("keep", "ceilings"))
    inner, wrap = unwrap(checked(model))
    original = copy_model(inner).eval() if any(module.training for module in tree.modules(inner)) else inner
    with tree.unchanging(original):
        source, where = original, []
        if relu6 == "ceilings":
            where = ceilings.places(original, captured(original, example_inputs).runs[0])
            source = ceilings.insert(copy_model(original), where)
        problem = Problem.of(source, example_inputs, Options(), (), True, checked_calls(calls, source))
        try:
            changes = _changes(problem, data, weights == "channel", bool(where), powers_of_two)
            target = ceilings.level(fused_copy(changes, source), where)
            if verify:
                _verify(changes, where, original, target, problem)
        finally:
            problem.graph.release()
    return wrap(target.eval())


def _check(name: str, given: Any, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        expected = " or ".join(map(repr, allowed))
        raise InputError(f"{name}= takes one of a few words.\n  got:      {given!r}\n  expected: {expected}")


def _changes(problem: Problem, data: Any, per_channel: bool, bounded: bool, powers_of_two: bool) -> Changes:
    """The edits of all weights."""
    network = Network(problem.graph, problem.varying)
    found = find_families(network, problem.main.nodes)
    for name, reason in found.refused.items():
        log.info("%s: its channels keep their scales, %s", name, reason)
    if not found.free:
        _warn(found)
        return Changes()
    scales = Scales(found.free)
    logarithms = _logarithms(problem, network, found, scales, data, per_channel)
    if powers_of_two:
        logarithms = (logarithms / math.log(2)).round() * math.log(2)
    for family, part in zip(found.free, scales.parts(logarithms), strict=True):
        _carry(network, family, (part - part.max() if bounded else part), powers_of_two)
    return Changes(
        edits=tuple(
            Edit(value.names, value.shape, tuple(factors), value.kind is Kind.ABSENT)
            for value, factors in network.edits.items()
        )
    )


def _logarithms(
    problem: Problem, network: Network, found: Families, scales: Scales, data: Any, per_channel: bool
) -> Tensor:
    """The logarithms of the scales."""
    run = problem.main
    if data is not None:
        (run,) = Recording(problem.model, RULES).record(Call.of(data))
    observed = observe(run, found.layers, problem.main)
    layers = [LayerRange(layer, network.content(layer.w), observed.of_weight[layer.w]) for layer in found.layers]
    noise = Noise(scales, layers, observed, per_channel)
    best = noise.least()
    log.info("predicted noise: %.3g before, %.3g after", float(noise(scales.none())), float(noise(best)))
    return best


def _carry(network: Network, family: Family, logarithms: Tensor, powers_of_two: bool) -> None:
    """Demand the scales of a family, and accept what follows."""
    numbers = torch.exp2((logarithms / math.log(2)).round()) if powers_of_two else logarithms.exp()
    trial = Trial(network)
    try:
        trial.run({family.value: family.unit(numbers)})
    except Refusal as refusal:  # numbers that do not fit, where those of the test did
        log.info("%s: its channels keep their scales, %s", family.value.producer, refusal)
    else:
        trial.accept()


def _warn(found: Families) -> None:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in list(found.refused.items())[:3])
    what = (
        f"No tensor of the model may be rescaled ({reasons})." if reasons else "The model has no layers with weights."
    )
    warnings.warn(what, NothingEqualisedWarning, stacklevel=5)


def _verify(
    changes: Changes, where: list[ceilings.Place], original: nn.Module, target: nn.Module, problem: Problem
) -> None:
    """Raise VerificationError unless the model does on all calls what the original did."""

    def in_float64(wide: nn.Module) -> nn.Module:
        rewrite(changes, ceilings.insert(wide, where))
        return wide

    main = problem.main
    reference = Reference(original, *main.call.inputs, output=main.output, gradients=main.gradients)
    verdict = same_outputs(reference, target, in_float64, traces=main.traces, writes=problem.stateful, copied=True)
    if not verdict.equal:
        raise VerificationError(verdict.message) from verdict.error
    failure = Trials(problem.model, problem.further).failure(changes, target)
    if failure is not None:
        raise VerificationError(f"On {failure[0].what}: {failure[1].message}") from failure[1].error
