"""Joining what the ranks of a process group have measured, each on batches of its own.

The ranks meet once, when each has measured what it can, and every rank comes there, whether it had batches, none, or
failed. None waits for another that has given up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from bnfuse.errors import InputError
from bnfuse.verify.measure import Accumulator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def joined(measure: Callable[[], Accumulator], group: ProcessGroup, models: Iterable[nn.Module]) -> Accumulator:
    """Measure on every rank of a group, and join the results in the order of the ranks.

    Args:
        measure: measures on this rank.
        models: say which device of this rank is used, where the group's backend cannot send from the processor.

    Returns:
        The same on every rank: what one process would have measured on the batches of the first rank, then on those of
        the second, and so on.

    Raises:
        InputError: it failed on another rank.
        Exception: what ``measure`` raised on this rank.
    """
    _check(group)
    own: Accumulator | str
    failure: Exception | None = None
    try:
        own = measure()
    except Exception as error:  # noqa: BLE001 (whatever it is, the other ranks must hear of it)
        own, failure = f"{type(error).__name__}: {str(error).strip()}", error
    parts: list[Any] = [None] * dist.get_world_size(group)
    with _device_of(models):
        dist.all_gather_object(parts, own, group=group)
    if failure is not None:
        raise failure
    for rank, part in enumerate(parts):
        if not isinstance(part, Accumulator):
            raise InputError(
                f"compare() failed on rank {dist.get_global_rank(group, rank)}, so that no rank has a result\n"
                f"  error:    {part}"
            )
    whole = Accumulator()
    for part in parts:
        whole.join(part)
    return whole


def _check(group: object) -> None:
    if dist.is_available():
        if isinstance(group, dist.ProcessGroup):
            return
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise InputError(
                "compare() was called with a group that this rank is no member of\n"
                "  what to do: call it on the members only"
            )
    raise InputError(
        "compare() takes a process group as group=\n"
        f"  got:      {type(group).__name__}\n"
        "  expected: torch.distributed.group.WORLD, after init_process_group(), or None for this process alone"
    )


def _device_of(models: Iterable[nn.Module]) -> AbstractContextManager[object]:
    """The device that the models are on as the current one, from which NCCL sends; several ranks must not share one."""
    for model in models:
        for parameter in model.parameters():
            if parameter.device.type not in ("cpu", "meta") and parameter.device.index is not None:
                return torch.accelerator.device_index(parameter.device.index)
    return nullcontext()
