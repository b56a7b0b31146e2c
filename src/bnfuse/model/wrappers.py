"""What a caller passes as a model: checked, and taken out of its wrappers (data parallel, compiled, one of its own)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from bnfuse.errors import InputError
from bnfuse.model import tree
from bnfuse.model.copying import copy_model, held_tensors
from bnfuse.model.sharded import sharding


def checked(model: object) -> nn.Module:
    """The model itself, if its modules can be replaced and its parameters hold numbers.

    Raises:
        InputError: it is not a module, is scripted, is sharded, or has parameters or buffers without contents.
    """
    if not isinstance(model, nn.Module):
        hint = ""
        if isinstance(model, dict):
            hint = " A state dict holds weights only: build the model, load_state_dict into it, and pass the model."
        if isinstance(model, type):
            raise InputError(f"The model must be a torch.nn.Module; got the class {model.__name__}: make one of it.")
        raise InputError(f"The model must be a torch.nn.Module; got {type(model).__name__}.{hint}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("No module of a scripted or traced model can be replaced: fuse the original, then compile it.")
    sharded = sharding(model)
    if sharded:
        raise InputError(
            f"{sharded}: each process holds a part of the weights only, and no norm can be folded into a part.\n"
            f"Fuse first, then shard: every process comes to the same fused model."
        )
    for key, tensor in held_tensors(model).items():
        if tensor.is_meta or nn.parameter.is_lazy(tensor):
            names = {id(held): name for name, held in (*model.named_parameters(), *model.named_buffers())}
            if tensor.is_meta:
                raise InputError(_holds_no_numbers(model, names[key]))
            raise InputError(f"{names[key]} is not initialised yet: run the model once on real inputs, then fuse it.")
    return model


def _holds_no_numbers(model: nn.Module, absent: str) -> str:
    """What to do about tensors on the meta device, given the name of one."""
    if any(_offloads(getattr(module, HOOK_OF_ACCELERATE, None)) for module in tree.modules(model)):
        return (
            f"{absent} is offloaded: accelerate loads it for each call and drops it again.\n"
            f"Load the weights, fuse, and offload the fused model. Build the model without device_map; or, if its "
            f"weights were loaded before, accelerate.hooks.remove_hook_from_module(model, recurse=True) puts them back."
        )
    if all(parameter.is_meta for parameter in model.parameters()):
        return (
            f"{type(model).__name__} is on the meta device and holds no numbers: load the weights, then fuse.\n"
            f"model.load_state_dict(state, assign=True) puts them in."
        )
    return f"{absent} is on the meta device and holds no numbers: load the weights, then fuse."


HOOK_OF_ACCELERATE = "_hf_hook"
"""The attribute of a module in which accelerate keeps the hook that it has put around the module's forward."""


def _offloads(hook: Any) -> bool:
    """Whether a hook of accelerate's, or one of several in a row, keeps the module's weights elsewhere."""
    return bool(getattr(hook, "offload", False)) or any(map(_offloads, getattr(hook, "hooks", ())))


def unwrap(model: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
    """Take a model out of its ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile`` wrappers, and of an
    object around it that is a module without a forward (``ultralytics.YOLO``).

    Returns:
        The innermost model, and a function that puts another model into wrappers of the same kind.
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
    child = _only_model(model)
    if child is not None:
        inner, wrap = unwrap(child)
        return inner, lambda new: _around(model, child, wrap(new))
    return model, lambda new: new


def _only_model(model: nn.Module) -> nn.Module | None:
    """The child that holds all parameters of a module without a forward, which nobody can call as a module."""
    if type(model).forward is not nn.Module.forward or "forward" in model.__dict__:
        return None
    parameters = {id(parameter) for parameter in model.parameters()}
    for child in model._modules.values():
        if child is not None and parameters and parameters == {id(parameter) for parameter in child.parameters()}:
            return child
    return None


def _around(model: nn.Module, child: nn.Module, new: nn.Module) -> nn.Module:
    """A copy of a module that holds another model in the place of its child, and its parts in the place of the parts
    of the child."""
    by_name = dict(_parts(new))
    stand_ins = {id(old): by_name[name] for name, old in _parts(child) if name in by_name}
    inside = held_tensors(child)
    held = {key: tensor for key, tensor in held_tensors(model).items() if key not in inside}
    return copy_model(model, stand_ins, held)


def _parts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module, parameter and buffer under each of its names."""
    yield from tree.named_modules(model)
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _settings(wrapper: nn.Module, *names: str) -> dict[str, Any]:
    """The constructor's arguments of these names, as far as the wrapper keeps them as attributes."""
    known = inspect.signature(type(wrapper).__init__).parameters
    return {name: value for name in names if name in known and (value := getattr(wrapper, name, None)) is not None}


def _compiled(model: nn.Module) -> nn.Module:
    model.compile()
    return model
