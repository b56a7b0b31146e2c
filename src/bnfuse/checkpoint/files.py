"""Fused models as files: a safetensors file of the state dict, with the structure in its metadata.

Metadata of the file, all text (the format of safetensors has no other):

* ``bnfuse``: the structure as JSON (:class:`bnfuse.Structure`),
* ``bnfuse.same``: names that share a tensor with another name, which the file holds once, as JSON,
* ``bnfuse.sha256``: of the names, dtypes, shapes and contents of all tensors.

Nothing in a file is executed: there is no pickle, and names are looked up in the registries of the model alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.checkpoint.structure import Structure, restructured, structure
from bnfuse.errors import CheckpointError
from bnfuse.model import tree
from bnfuse.model.copying import held_tensors, shared_memory
from bnfuse.model.describe import dtype_name, first_few, one_line
from bnfuse.model.wrappers import unwrap
from bnfuse.operators import is_dense

_STRUCTURE, _SAME, _HASH = "bnfuse", "bnfuse.same", "bnfuse.sha256"


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a fused model to a file that :func:`bnfuse.load` reads: its state dict and its structure.

    The file appears complete or not at all. Any tool that reads safetensors reads the weights.

    Args:
        model: what :func:`bnfuse.fuse` gave; it may have been trained on, converted or made part of a larger model
            since. Wrappers (``DataParallel``, ``torch.compile``) are left out.
        path: ends in ``.safetensors``.

    Raises:
        CheckpointError: the ending is another, it is no module, the state dict holds something that such a file
            cannot, or the file cannot be written.
    """
    target = _checked_path(path)
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"save takes the fused model itself, whose structure goes into the file too; got {type(model).__name__}."
        )
    _, save_file = _safetensors(target)
    inner, _ = unwrap(model)
    tensors, same = _distinct(inner.state_dict())
    metadata = {
        "format": "pt",
        _STRUCTURE: json.dumps(structure(inner).to_dict()),
        _SAME: json.dumps(same),
        _HASH: _hash(tensors),
    }
    with _whole_file(target) as scratch:
        try:
            save_file(tensors, str(scratch), metadata)
        except ModuleNotFoundError as error:  # numpy, by way of which safetensors writes, and which it does not ask for
            raise CheckpointError(f"Writing {target} takes {error.name}: run pip install {error.name}") from error
        except Exception as error:  # of several classes, such as for a dtype that the format does not have
            raise CheckpointError(f"{target} cannot be written: {one_line(error)}") from error


def load(model: nn.Module, path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> nn.Module:
    """Make a freshly built model the fused one that :func:`bnfuse.save` wrote, in place, without running it.

    What is loaded equals what was saved bit for bit, dtypes included. Parameters become new objects, so make the
    optimiser afterwards; those that are one object under several names stay one.

    Args:
        model: of the same class and settings as the model that was fused; also on the meta device.
        path: what ``save`` wrote.
        device: where the tensors go; None for where those of the model are (of the meta device: the CPU).

    Returns:
        The same model, in evaluation mode.

    Raises:
        CheckpointError: the file is missing, damaged, was not written by bnfuse, or belongs to another model; the model
            is as it was.
    """
    inner, _ = unwrap(model)
    content = read(path)
    undo = restructured(inner, content.structure)
    try:
        _fill(inner, content, None if device is None else torch.device(device))
    except BaseException:
        undo()
        raise
    model.eval()
    return model


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        path: of the file.
        structure: of the fused model.
        tensors: by every name that they have, each in memory of its own.
    """

    path: Path
    structure: Structure
    tensors: dict[str, Tensor]


def holds_structure(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a safetensors file that :func:`bnfuse.save` wrote. One that cannot be read is not."""
    try:
        safe_open, _ = _safetensors(Path(path))
        with safe_open(str(path), "pt") as file:
            return _STRUCTURE in (file.metadata() or {})
    except Exception:  # noqa: BLE001 (whoever reads it says what is wrong)
        return False


def read(path: str | os.PathLike[str]) -> Content:
    """Read and check a file that :func:`bnfuse.save` wrote.

    Raises:
        CheckpointError: it is missing, damaged or of another origin.
    """
    source = _checked_path(path)
    safe_open, _ = _safetensors(source)
    if not source.is_file():
        raise CheckpointError(f"There is no file {source}.")
    try:
        with safe_open(str(source), "pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:  # of several classes
        raise CheckpointError(f"{source} is damaged or no safetensors file: {one_line(error)}") from error
    if _STRUCTURE not in metadata:
        raise CheckpointError(
            f"{source} holds no structure of a fused model. If these are weights of the model as it was before fusing, "
            f"load them with load_state_dict, then fuse."
        )
    if metadata.get(_HASH) != _hash(tensors):
        raise CheckpointError(f"{source} is damaged: its tensors are not those that were saved. Save the model again.")
    try:
        said, same = json.loads(metadata[_STRUCTURE]), json.loads(metadata.get(_SAME, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is damaged: {one_line(error)}") from error
    if not isinstance(same, dict) or not all(isinstance(name, str) and name in tensors for name in same.values()):
        raise CheckpointError(f"{source} is damaged: its list of shared tensors names others than it holds.")
    return Content(source, Structure.from_dict(said), tensors | {name: tensors[other] for name, other in same.items()})


# Writing --------------------------------------------------------------------------------------------------------------


def _distinct(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a state dict, dense and on the CPU, each once; and the further names of those with several."""
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    known: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            raise CheckpointError(
                f"The state dict holds a {type(tensor).__name__} as {name}, and such a file holds plain tensors alone. "
                f"Keep it with torch.save, and bnfuse.structure(model).to_dict() beside it for bnfuse.restructure."
            )
        if not is_dense(tensor) or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(f"{name} has no plain contents (layout {tensor.layout}, device {tensor.device}).")
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        first = known.setdefault(place, name) if tensor.numel() else name
        if first != name:
            same[name] = first
        else:
            tensors[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return tensors, same


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and contents."""
    made = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        made.update(json.dumps([name, dtype_name(tensor.dtype), list(tensor.shape)]).encode())
        made.update(_bytes(tensor))
    return made.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """The contents of a contiguous tensor on the CPU, without a copy."""
    size = tensor.numel() * tensor.element_size()
    return (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""


@contextlib.contextmanager
def _whole_file(target: Path) -> Iterator[Path]:
    """A name to write to beside the target, which takes the target's place if all goes well."""
    target = Path(os.path.realpath(target))
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.chmod(_mode(target))
        scratch.replace(target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {one_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def _mode(target: Path) -> int:
    """The permissions of a file that is replaced, or those that a new one gets."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


# Reading --------------------------------------------------------------------------------------------------------------


def _fill(model: nn.Module, content: Content, device: torch.device | None) -> None:
    """Put the tensors of a file into a model of its structure; if this fails, the model is as it was."""
    own = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    _check_tensors(own, content)
    unsaved = [name for name, buffer in model.named_buffers() if name not in own and buffer.is_meta]
    if unsaved:
        raise CheckpointError(
            f"The model is on the meta device, and {first_few(unsaved)} cannot be filled: no state dict holds it. "
            f"Build the model on a device of its own."
        )
    registries: list[dict[str, Any]] = []
    for module in tree.modules(model):
        registries += [module._parameters, module._buffers]
    before = [(registry, dict(registry)) for registry in registries]
    overlapping = shared_memory(held_tensors(model))
    try:
        state = {name: _placed(content.tensors[name], own[name], device) for name in own}
        model.load_state_dict(state, strict=True, assign=True)
        _share_as_before(before, overlapping)
        _check_equal(model, content)
    except BaseException as error:
        for registry, tensors in before:
            registry.clear()
            registry.update(tensors)
        if isinstance(error, Exception) and not isinstance(error, CheckpointError):
            raise CheckpointError(f"{content.path} does not fit the model: {one_line(error)}") from error
        raise


def _check_tensors(own: Mapping[str, Tensor], content: Content) -> None:
    """Raise CheckpointError if tensors are missing, left over, of another shape, or differ where the model has one."""
    given = content.tensors
    problems = {
        "missing in the file": [name for name in own if name not in given],
        "unknown to the model": [name for name in given if name not in own],
        "of another shape": [
            f"{name} ({tuple(given[name].shape)} in the file, {tuple(tensor.shape)} in the model)"
            for name, tensor in own.items()
            if name in given and given[name].shape != tensor.shape
        ],
    }
    found = [f"  {len(names)} {problem}: {first_few(names)}" for problem, names in problems.items() if names]
    if found:
        raise CheckpointError("\n".join([f"The tensors in {content.path} do not fit the model:", *found]))
    first: dict[int, str] = {}
    for name, tensor in own.items():
        other = first.setdefault(id(tensor), name)
        if other != name and not _equal(given[name], given[other]):
            raise CheckpointError(
                f"{name} and {other} are one tensor in the model, and two in {content.path} that differ. "
                f"Build the model as it was built before fusing."
            )


def _placed(tensor: Tensor, old: Tensor, device: torch.device | None) -> Tensor:
    """A tensor of the file on the device of the model's, with its strides."""
    device = device or (torch.device("cpu") if old.is_meta else old.device)
    if is_dense(old) and not old.is_contiguous() and not old.is_meta:
        return torch.empty_like(old, dtype=tensor.dtype, device=device, requires_grad=False).copy_(tensor)
    return tensor.to(device, copy=True)


def _share_as_before(before: list[tuple[dict[str, Any], dict[str, Any]]], overlapping: Mapping[int, int]) -> None:
    """What was one object under several names is one again; what shared memory gets the contents in its old memory."""
    new: dict[int, Tensor] = {}
    for registry, tensors in before:
        for name, old in tensors.items():
            if old is None or registry.get(name) is old:
                continue
            if id(old) not in new:
                now = registry[name]
                if id(old) in overlapping and not old.is_meta and (old.dtype, old.device) == (now.dtype, now.device):
                    new[id(old)] = _in_old_memory(old, now)
                else:
                    new[id(old)] = now
            registry[name] = new[id(old)]


def _in_old_memory(old: Tensor, now: Tensor) -> Tensor:
    with torch.no_grad():
        old.copy_(now)
    return old


def _check_equal(model: nn.Module, content: Content) -> None:
    """Raise CheckpointError if the model does not hold what the file does, to the bit."""
    for name, tensor in model.state_dict().items():
        if not _equal(tensor.detach().cpu(), content.tensors[name]):
            raise CheckpointError(
                f"{name} is not what was saved: the model changes its state dict while loading, or builds several "
                f"tensors in one memory. Load the state dict yourself, after bnfuse.restructure."
            )


def _equal(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit, NaNs included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)


# The library ----------------------------------------------------------------------------------------------------------


def _checked_path(path: str | os.PathLike[str]) -> Path:
    checked = Path(path)
    if checked.suffix != ".safetensors":
        raise CheckpointError(
            f"A fused model is kept in a file that ends in .safetensors; got {checked}. What `bnfuse fuse -o` wrote "
            f"with torch.save is a dict: bnfuse.restructure(model, found['bnfuse']), then "
            f"load_state_dict(found['state_dict'])."
        )
    return checked


def _safetensors(path: Path) -> tuple[Any, Any]:
    try:
        from safetensors import safe_open
        from safetensors.torch import save_file
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{path} takes safetensors: run pip install safetensors numpy") from error
    return safe_open, save_file
