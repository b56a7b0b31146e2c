"""Folders of other people's libraries: transformers, and what uses PyTorchModelHubMixin of huggingface_hub.

A fused model says in its configuration how it is built (:mod:`bnfuse.model.pretrained`), so their own
``save_pretrained`` and ``push_to_hub`` write whole folders. Reading one takes bnfuse: without it their loaders refuse
the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from bnfuse.checkpoint.guards import holds_guards, structure_of
from bnfuse.checkpoint.structure import restructure
from bnfuse.errors import CheckpointError
from bnfuse.model.pretrained import CONFIG_KEY, is_hub_mixin, is_transformers


def register_with_transformers() -> None:
    """Let ``from_pretrained`` of transformers load fused models for the rest of this process.

    It then loads a folder that ``save_pretrained`` wrote of a fused model as it loads any other, also through
    ``pipeline`` and the like; folders of other models are loaded as before. A second call does nothing.

    Raises:
        CheckpointError: transformers is not installed, or older than release 5.
    """
    try:
        from bnfuse.checkpoint import quantizer
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{error}: run pip install transformers safetensors") from error
    quantizer.register()


def from_pretrained(cls: type, folder: Any, **settings: Any) -> Any:
    """Load a model from a folder or a repository that ``save_pretrained`` or ``push_to_hub`` wrote of a fused model.

    Args:
        cls: a model class of transformers, one of its Auto classes, or a class that uses ``PyTorchModelHubMixin``, such
            as those of segmentation-models-pytorch.
        folder: as ``cls.from_pretrained`` takes it; of a model that was not fused, this is what is called.
        settings: as ``cls.from_pretrained`` takes them.

    Returns:
        The fused model, in evaluation mode.

    Raises:
        CheckpointError: the class is another, or what is there does not belong to a fused model of this class.
    """
    if isinstance(cls, type) and (is_transformers(cls) or _is_auto(cls)):
        register_with_transformers()
        return cls.from_pretrained(folder, **settings)  # type: ignore[attr-defined]
    if isinstance(cls, type) and is_hub_mixin(cls) and issubclass(cls, nn.Module):
        return _from_hub_mixin(cls, folder, settings)
    raise CheckpointError(
        f"{getattr(cls, '__name__', cls)} is no class of transformers, nor one that uses PyTorchModelHubMixin. "
        f"Write the fused model with bnfuse.save, and read it with bnfuse.load into a freshly built one."
    )


def _is_auto(cls: type) -> bool:
    return any(base.__name__ == "_BaseAutoModelClass" for base in cls.__mro__)


def _from_hub_mixin(cls: Any, folder: Any, settings: dict[str, Any]) -> Any:
    """Load with the class's own code, which meets a model of the right structure.

    A subclass stands in for the class for as long as this takes: between building and filling there is no other place.
    """

    def from_safetensors(_: Any, /, model: nn.Module, file: str, place: str, strict: bool) -> Any:
        fused = holds_guards([file])
        if fused:
            beside = Path(file).with_name("config.json")
            restructure(model, structure_of(_read(beside), CONFIG_KEY, beside))
        return cls._load_as_safetensor(model, file, place, strict or fused)

    def without_structure(stand_in: Any, /, **given: Any) -> Any:
        given.pop(CONFIG_KEY, None)  # it is given to a class that takes any keyword
        return super(made, stand_in)._from_pretrained(**given)

    made: Any = type(
        cls.__name__,
        (cls,),
        {
            "__module__": cls.__module__,
            "_load_as_safetensor": classmethod(from_safetensors),
            "_from_pretrained": classmethod(without_structure),
        },
    )
    model = made.from_pretrained(folder, **settings)
    model.__class__ = cls
    return model


def _read(config: Path) -> object:
    try:
        return json.loads(config.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
