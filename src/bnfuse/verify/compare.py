"""Comparing two models: both are run on the same inputs, and their outputs measured."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils.data import DistributedSampler

from bnfuse.errors import InputError
from bnfuse.model.alone import one_at_a_time
from bnfuse.model.calls import FORWARD, Call
from bnfuse.model.describe import dtype_name
from bnfuse.model.pytree import map_tensors, tensors
from bnfuse.model.sandbox import run
from bnfuse.model.sharded import gathered, in_shards, sharding
from bnfuse.model.wrappers import unwrap
from bnfuse.verify.comparison import Comparison
from bnfuse.verify.measure import Accumulator
from bnfuse.verify.ranks import joined
from bnfuse.verify.several_calls import SeveralCalls

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def compare(
    before: nn.Module | ExportedProgram,
    after: nn.Module | ExportedProgram,
    inputs: object,
    *,
    group: ProcessGroup | None = None,
) -> Comparison:
    """Run two models on the same inputs in evaluation mode and measure how far their outputs lie apart.

    Both models get the same random state, and each gets its own copy of the inputs on its device. Both are left as they
    were. Outputs are not kept from one batch to the next.

    Args:
        before: the model to compare with, or an exported program.
        after: the model to compare, or an exported program.
        inputs: ONE call or BATCHES of calls.
            One call is a tensor (the only argument), a tuple (positional arguments), a dict (keyword arguments) or a
            ``bnfuse.Call``, which may name another method than forward.
            Anything else that can be iterated, such as a list, a generator or a ``DataLoader``, gives batches. Each
            batch is a tensor, a tuple or list of positional arguments, or a dict. A pair whose second member is an
            integer tensor of shape (N,), where N is the length of the first member's first axis, is
            ``(inputs, labels)``. Such a tensor in a dict under "labels", "label", "targets" or "target" is labels too.
            A model is given what stands there only if its forward has an argument of that name.
            Write one call whose argument is a list as ``([a, b],)``.
        group: the processes that compare together, ``torch.distributed.group.WORLD`` for all of them. Each gives
            batches of its own, as many as it has, none too; each gets the result for the batches of all, the same as
            one process that goes through those of the first rank, then those of the second, and so on. Every member
            must call, and waits for the slowest. None, as WORLD is where no processes were joined: this process
            compares alone, and what it finds is about its own batches.

    Raises:
        InputError: ``before`` or ``after`` is not a module; ``inputs`` has another form or gives no batch (with a
            ``group``: on no rank); or a model does not run on the inputs. With a ``group``, also: another rank failed;
            a ``DistributedSampler`` repeats samples, so that they would count twice; or a model is sharded.

    >>> model = nn.Linear(2, 3)
    >>> compare(model, model, torch.ones(4, 2)).within_tolerance()
    True
    """
    before, after = (model.module() if isinstance(model, ExportedProgram) else model for model in (before, after))
    if group is None:
        measured = _measured(before, after, inputs)
    else:
        # Outside of the lock: while a thread waits for the other ranks, another may compare or fuse.
        models = [model for model in (before, after) if isinstance(model, nn.Module)]
        measured = joined(lambda: _measured(before, after, inputs, together=True), group, models)
    if not measured.batches:
        on_ranks = " on any rank" if group is not None else ""
        raise InputError(f"compare() was given no batch{on_ranks}: the iterable is empty, or it was used up before")
    return measured.finish()


@one_at_a_time
def _measured(before: nn.Module, after: nn.Module, inputs: object, together: bool = False) -> Accumulator:
    """What `compare` measures in this process.

    Args:
        together: whether other processes measure on other batches.
    """
    models = {"before": before, "after": after}
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise InputError(f"compare() takes two modules\n  got:      {name} is a {type(model).__name__}")
        # As one process each: the wrappers of DistributedDataParallel wait for each other at every call.
        models[name] = unwrap(model)[0]
    single = isinstance(inputs, (Tensor, tuple, Mapping, Call))
    batches = [inputs] if single else inputs
    if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes)):
        raise InputError(
            "compare() cannot read its inputs\n"
            "  expected: a tensor, a tuple of arguments, a dict of arguments, or an iterable of batches\n"
            f"  got:      {type(inputs).__name__}"
        )
    if together:
        _check_sampler(inputs)
        _check_shards(models.values())
    accumulator = Accumulator()
    for number, batch in enumerate(batches):
        call, labels = _call_and_labels(batch, single)
        outputs = []
        for name, model in models.items():
            own = call if isinstance(batch, Call) else _without_what_it_does_not_take(model, call)
            try:
                with in_shards(model):
                    output = _run(model, _on_device_of(model, own), number)
                    outputs.append(map_tensors(output, gathered))
            except Exception as error:
                raise InputError(_not_running(name, model, number, single, own, error)) from error
        accumulator.add(outputs[0], outputs[1], labels)
    return accumulator


def _check_shards(models: Iterable[nn.Module]) -> None:
    """Raise InputError if processes would wait for each other in every call: they may have fewer calls than others."""
    for model in models:
        sharded = sharding(model)
        if sharded:
            raise InputError(
                f"{sharded}: its calls wait for the other processes, which may have another number of batches.\n"
                f"Compare before the model is sharded, or without group=, every process on as many batches."
            )


_LABELS = ("labels", "label", "targets", "target")


def _call_and_labels(batch: Any, single: bool) -> tuple[Call, Tensor | None]:
    """The call that a batch makes, and its labels, if it has any: in a pair, or in a dict under a name of theirs."""
    if isinstance(batch, Call):
        return batch, None
    if isinstance(batch, Mapping):
        name = next((name for name in _LABELS if name in batch), None)
        others = {key: value for key, value in batch.items() if key != name}
        return _call(batch), None if name is None else _fitting(batch[name], others)
    if not single and isinstance(batch, (tuple, list)) and len(batch) == 2:
        labels = _fitting(batch[1], batch[0])
        if labels is not None:
            return _call(batch[0]), labels
    return _call(batch), None


def _fitting(labels: Any, inputs: Any) -> Tensor | None:
    """The labels, if they can be labels of the inputs: an integer for each sample."""
    if not isinstance(labels, Tensor):
        return None
    first = tensors(inputs)
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    fits = bool(first) and first[0][1].ndim > 0 and labels.shape == first[0][1].shape[:1]
    return labels if whole and fits else None


def _call(inputs: Any) -> Call:
    if isinstance(inputs, Call):
        return inputs
    if isinstance(inputs, Mapping):
        return Call(**inputs)
    return Call(*inputs) if isinstance(inputs, (tuple, list)) else Call(inputs)


def _without_what_it_does_not_take(model: nn.Module, call: Call) -> Call:
    """The call without labels, unless the model's forward has an argument for them."""
    given = [name for name in _LABELS if name in call.kwargs]
    if not given:
        return call
    try:
        taken = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return call
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values()):
        return call
    dropped = [name for name in given if name not in taken]
    return call.with_inputs(call.args, {name: value for name, value in call.kwargs.items() if name not in dropped})


def _check_sampler(loader: Any) -> None:
    """Raise InputError if a sampler gives the same samples to several ranks, so that all get as many."""
    for holder in (loader, getattr(loader, "batch_sampler", None)):
        sampler = getattr(holder, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            size = len(sampler.dataset)  # type: ignore[arg-type]
            if sampler.total_size > size:
                raise InputError(
                    f"compare() would count samples twice: the DistributedSampler repeats {sampler.total_size - size} "
                    f"of {size}, so that all ranks get as many. Here they may get as many as there are:\n"
                    f"  DataLoader(dataset, sampler=range(dist.get_rank(), len(dataset), dist.get_world_size()))"
                )


def _run(model: nn.Module, call: Call, seed: int) -> Any:
    if call.method == FORWARD:
        return run(model, call.args, call.kwargs, seed)
    return run(SeveralCalls(model, [call]), ([call.inputs],), {}, seed)[0]


def _on_device_of(model: nn.Module, call: Call) -> Call:
    """The call with its tensors on the model's device; where it has several, on the first, unless they are on one."""
    devices = {parameter.device: None for parameter in model.parameters() if not parameter.is_meta}
    if not devices:
        return call
    first = next(iter(devices))
    return call.map(lambda tensor: tensor if tensor.device in devices else tensor.to(first))


def _not_running(name: str, model: nn.Module, number: int, single: bool, call: Call, error: Exception) -> str:
    given = [*tensors(call.args), *tensors(call.kwargs)]
    shapes = ", ".join(f"{path} {tuple(tensor.shape)} {dtype_name(tensor.dtype)}" for path, tensor in given)
    hint = (
        ""
        if single
        else (
            "\n  several batches are read as (inputs, labels) with labels of shape (N,), as dicts or as arguments:"
            "\n  for other labels give the inputs alone, or dicts; for a list that is one argument ([a, b],)"
        )
    )
    place = "" if single else f" batch {number} of"
    return (
        f"compare() could not run `{name}` ({type(model).__name__}) on{place} the inputs\n"
        f"  inputs:   {shapes or 'no tensor'}\n"
        f"  error:    {type(error).__name__}: {str(error).strip()}{hint}"
    )
