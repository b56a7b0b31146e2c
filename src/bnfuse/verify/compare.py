"""Comparing two models: both are run on the same inputs, and their outputs measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.errors import InputError
from bnfuse.model.alone import one_at_a_time
from bnfuse.model.calls import FORWARD, Call
from bnfuse.model.describe import dtype_name
from bnfuse.model.pytree import tensors
from bnfuse.model.sandbox import run
from bnfuse.verify.comparison import Comparison
from bnfuse.verify.measure import Accumulator
from bnfuse.verify.several_calls import SeveralCalls


@one_at_a_time
def compare(before: nn.Module, after: nn.Module, inputs: object) -> Comparison:
    """Run two models on the same inputs in evaluation mode and measure how far their outputs lie apart.

    Both models get the same random state, and each gets its own copy of the inputs on its device. Both are left as they
    were. Outputs are not kept from one batch to the next.

    Args:
        before: the model to compare with.
        after: the model to compare.
        inputs: ONE call or BATCHES of calls.
            One call is a tensor (the only argument), a tuple (positional arguments), a dict (keyword arguments) or a
            ``bnfuse.Call``, which may name another method than forward.
            Anything else that can be iterated, such as a list, a generator or a ``DataLoader``, gives batches. Each
            batch is a tensor, a tuple or list of positional arguments, or a dict. A pair whose second member is an
            integer tensor of shape (N,), where N is the length of the first member's first axis, is
            ``(inputs, labels)``.
            Write one call whose argument is a list as ``([a, b],)``.

    Raises:
        InputError: ``before`` or ``after`` is not a module; ``inputs`` has another form or gives no batch; or a model
            does not run on the inputs.

    >>> model = nn.Linear(2, 3)
    >>> compare(model, model, torch.ones(4, 2)).within_tolerance()
    True
    """
    for name, model in (("before", before), ("after", after)):
        if not isinstance(model, nn.Module):
            raise InputError(f"compare() takes two modules\n  got:      {name} is a {type(model).__name__}")
    accumulator = Accumulator()
    single = isinstance(inputs, (Tensor, tuple, Mapping, Call))
    batches = [inputs] if single else inputs
    if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes)):
        raise InputError(
            "compare() cannot read its inputs\n"
            "  expected: a tensor, a tuple of arguments, a dict of arguments, or an iterable of batches\n"
            f"  got:      {type(inputs).__name__}"
        )
    for number, batch in enumerate(batches):
        labels = None if single else _labels(batch)
        call = _call(batch[0] if labels is not None else batch)
        outputs = []
        for name, model in (("before", before), ("after", after)):
            try:
                outputs.append(_run(model, _on_device_of(model, call), number))
            except Exception as error:
                raise InputError(_not_running(name, model, number, single, call, error)) from error
        accumulator.add(outputs[0], outputs[1], labels)
    if not accumulator.batches:
        raise InputError("compare() was given no batch: the iterable is empty, or it was used up before")
    return accumulator.finish()


def _labels(batch: Any) -> Tensor | None:
    """The labels of a batch ``(inputs, labels)``; None if the batch is of another form."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        return None
    labels, first = batch[1], tensors(batch[0])
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    fits = bool(first) and first[0][1].ndim > 0 and labels.shape == first[0][1].shape[:1]
    return labels if whole and fits else None


def _call(inputs: Any) -> Call:
    if isinstance(inputs, Call):
        return inputs
    if isinstance(inputs, Mapping):
        return Call(**inputs)
    return Call(*inputs) if isinstance(inputs, (tuple, list)) else Call(inputs)


def _run(model: nn.Module, call: Call, seed: int) -> Any:
    if call.method == FORWARD:
        return run(model, call.args, call.kwargs, seed)
    return run(SeveralCalls(model, [call]), ([call.inputs],), {}, seed)[0]


def _on_device_of(model: nn.Module, call: Call) -> Call:
    parameter = next(model.parameters(), None)
    return call if parameter is None else call.map(lambda tensor: tensor.to(parameter.device))


def _not_running(name: str, model: nn.Module, number: int, single: bool, call: Call, error: Exception) -> str:
    given = [*tensors(call.args), *tensors(call.kwargs)]
    shapes = ", ".join(f"{path} {tuple(tensor.shape)} {dtype_name(tensor.dtype)}" for path, tensor in given)
    hint = "" if single else "\n  a list is read as batches; pass a list that is one argument as ([a, b],)"
    place = "" if single else f" batch {number} of"
    return (
        f"compare() could not run `{name}` ({type(model).__name__}) on{place} the inputs\n"
        f"  inputs:   {shapes or 'no tensor'}\n"
        f"  error:    {type(error).__name__}: {str(error).strip()}{hint}"
    )
