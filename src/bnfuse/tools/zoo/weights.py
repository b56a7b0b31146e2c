"""Reading weights from files."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.checkpoint.files import holds_structure, load
from bnfuse.checkpoint.structure import restructure
from bnfuse.errors import CheckpointError, SpecError
from bnfuse.model.describe import first_few, one_line, shape_text

ENDINGS = (".safetensors", ".pt", ".pth")
"""Of files that fused weights are saved in."""

STRUCTURE = "bnfuse"
"""The key beside ``state_dict`` under which a file of torch.save holds the structure of a fused model."""


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a file of weights into ``model``.

    Args:
        model: every parameter and buffer of its state dict must be in the file, and the reverse.
        path: a ``.safetensors`` file, or a state dict saved with ``torch.save``. Where the file holds the structure of
            a fused model, ``model`` becomes that.

    Raises:
        SpecError: the file does not exist, holds more than tensors, or does not fit; the message lists the
            first few keys that are missing, left over or of another shape.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors" and holds_structure(path):
            load(model, path)
            return
        state, structure = _read_state_dict(path)
        if structure is not None:
            restructure(model, structure)
    except CheckpointError as error:
        raise SpecError(f"{path}: {error}") from error
    own = {key: tensor for key, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    in_both = [key for key, tensor in state.items() if key in own and isinstance(tensor, Tensor)]
    differing = {
        key: f"{key} ({shape_text(state[key].shape)} in the file, {shape_text(own[key].shape)} in the model)"
        for key in in_both
        if state[key].shape != own[key].shape
    }
    for key in differing:
        del state[key]
    # strict=False, and judged here, because a model's own hooks may rename keys of older files while loading.
    outcome = model.load_state_dict(state, strict=False)
    given = {own[key].data_ptr() for key in in_both}  # a tied tensor may be saved under one name only
    missing = [key for key in outcome.missing_keys if key not in own or own[key].data_ptr() not in given]
    problems = {
        "missing": missing,
        "unknown to the model": outcome.unexpected_keys,
        "of another shape": list(differing.values()),
    }
    found = [f"{len(keys)} {problem}: {first_few(keys)}" for problem, keys in problems.items() if keys]
    if found:
        raise SpecError(f"the weights in {path} do not fit the model: {'; '.join(found)}")


def _read_state_dict(path: Path) -> tuple[MutableMapping[str, Any], Mapping[str, Any] | None]:
    """The state dict in a file, and the structure of a fused model if there is one beside it."""
    if not path.is_file():
        raise SpecError(f"there is no weights file {path}")
    if path.suffix == ".safetensors":
        content = _read_safetensors(path)
    else:
        content = _read_torch_file(path)
    structure = content.get(STRUCTURE) if isinstance(content, Mapping) else None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, MutableMapping) or not all(isinstance(key, str) for key in content):
        raise SpecError(f"{path} holds a {type(content).__name__}, where a state dict was expected")
    # The prefix is left by nn.DataParallel.
    nn.modules.utils.consume_prefix_in_state_dict_if_present(content, "module.")  # type: ignore[arg-type]
    return content, structure if isinstance(structure, Mapping) else None


def _read_safetensors(path: Path) -> object:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise SpecError(f"reading {path} takes safetensors: run pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise SpecError(f"{path} cannot be read as safetensors: {one_line(error)}") from error


def _read_torch_file(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on TorchScript files, which are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None and "TorchScript" not in str(error):
            raise SpecError(
                f"{path} cannot be read as a state dict saved with torch.save: {one_line(error)}"
            ) from error
        what = f"the class {refused[1]}" if refused else "a TorchScript program"
        raise SpecError(
            f"{path} holds {what} and not only tensors, and loading it would run code from the file; save "
            "the weights alone with torch.save(model.state_dict(), FILE), or pass a factory that builds the "
            "trained model as path/to/file.py:factory"
        ) from error
