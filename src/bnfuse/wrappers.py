"""Wrappers around models (data parallel, compiled): taken off before fusing, put on again after."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse import tree
from bnfuse.errors import InputError


def unwrap(model: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
    """The model inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile`` wrappers.

    Returns:
        The innermost model, and a function that wraps another model in the same way.
    """
    if isinstance(model, nn.DataParallel):
        inner, wrap = unwrap(model.module)
        settings = _settings(model, "device_ids", "output_device", "dim")
        return inner, lambda new: nn.DataParallel(wrap(new), **settings)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        inner, wrap = unwrap(model.module)
        settings = _settings(
            model, "device_ids", "output_device", "dim", "process_group", "find_unused_parameters",
            "gradient_as_bucket_view", "static_graph", "forward_sync_buffers",
        )  # fmt: skip
        return inner, lambda new: nn.parallel.DistributedDataParallel(wrap(new), **settings)
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        inner, wrap = unwrap(model._orig_mod)  # type: ignore[arg-type]
        context = model.dynamo_ctx
        return inner, lambda new: type(model)(wrap(new), context)
    if model._compiled_call_impl is not None:
        return model, _compiled
    return model, lambda new: new


def _settings(wrapper: nn.Module, *names: str) -> dict[str, Any]:
    """The arguments that a wrapper was made with, where it has kept them."""
    known = inspect.signature(type(wrapper).__init__).parameters
    return {name: value for name in names if name in known and (value := getattr(wrapper, name, None)) is not None}


def _compiled(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy that goes further than ``copy.deepcopy``.

    Tensors with a history, which layers compute for themselves and leave as attributes (old-style weight_norm), are
    copied without it; parameters and buffers that share memory share it in the copy too.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, attribute in module.__dict__.items():
            if name not in ("_modules", "_parameters", "_buffers"):
                for _, value in tree.tensors(attribute):
                    if not value.is_leaf:
                        memo[id(value)] = value.detach().clone()
    try:
        with torch.inference_mode(False), torch.no_grad():
            copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}. "
            f"Fuse it in place: bnfuse.fuse(model, inputs, inplace=True)."
        ) from error
    held = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    if any(id(tensor) in held for tensor in (*copied.parameters(), *copied.buffers())):
        raise InputError(
            f"A copy of {type(model).__name__} shares parameters with it (a __deepcopy__ of its own), so it would "
            f"change with the copy. Fuse it in place: bnfuse.fuse(model, inputs, inplace=True)."
        )
    _share_memory(model, copied)
    return copied


def _share_memory(model: nn.Module, copied: nn.Module) -> None:
    groups: dict[int, list[tuple[Tensor, Tensor]]] = {}
    originals = [*model.parameters(), *model.buffers()]
    copies = [*copied.parameters(), *copied.buffers()]
    for original, new in zip(originals, copies, strict=True):
        if original.layout == torch.strided and not nn.parameter.is_lazy(original):
            groups.setdefault(original.untyped_storage()._cdata, []).append((original, new))
    for tensors in groups.values():
        if len(tensors) > 1:
            storage = tensors[0][0].untyped_storage().clone()
            for original, new in tensors:
                view = torch.empty(0, dtype=original.dtype, device=original.device)
                new.data = view.set_(storage, original.storage_offset(), original.shape, original.stride())
