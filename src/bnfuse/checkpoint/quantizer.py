"""What transformers calls while it loads a folder whose configuration says that the model in it is fused.

A quantizer is the one place where transformers lets others change a model between building it and filling it. Nothing
is quantized: the loaded model is an ordinary one, free to train, to convert and to save.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import transformers
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from bnfuse.checkpoint.guards import holds_guards, structure_of
from bnfuse.checkpoint.structure import CreatedParameter, RemovedNorm, Structure, restructure
from bnfuse.errors import CheckpointError
from bnfuse.model import tree
from bnfuse.model.pretrained import METHOD, without_structure

OLDEST = 5
"""The first release of transformers that asks a quantizer all that it needs to know here."""


class FusedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What stands in the configuration of a fused model.

    Attributes:
        structure: of the model, as JSON.
    """

    def __init__(self, structure: object = None, quant_method: str = METHOD, **_: Any) -> None:
        self.structure, self.quant_method = structure, quant_method


class FusedLoader(HfQuantizer):  # type: ignore[misc]
    """Gives a freshly built model the structure that its configuration says, if the weights are of a fused model."""

    is_trainable = True
    is_compileable = True

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """True: the model is saved as any other."""
        return True

    def preprocess_model(self, model: Any, *_: Any, checkpoint_files: Sequence[str] | None = None, **__: Any) -> None:
        """Change the model before its weights are read."""
        config = model.config
        readable = checkpoint_files and all(file.endswith(".safetensors") for file in checkpoint_files)
        if not readable or holds_guards(checkpoint_files or ()):
            said = structure_of(vars(self.quantization_config), "structure", "config.json")
            restructure(model, fitted(said, model, getattr(model, "base_model_prefix", "")))
        else:  # the configuration of a fused model, but weights of one that is not
            plain = without_structure(config)
            for module in tree.modules(model):
                if module.__dict__.get("config") is config:
                    module.__dict__["config"] = plain

    def postprocess_model(self, model: Any, **_: Any) -> None:
        """Take back what says that the model is quantized."""
        model.__dict__.pop("hf_quantizer", None)


def register() -> None:
    """Let transformers know how fused models are loaded. A second call does nothing.

    Raises:
        CheckpointError: transformers is too old.
    """
    if int(transformers.__version__.partition(".")[0]) < OLDEST:
        raise CheckpointError(
            f"transformers {transformers.__version__} is too old to load fused models from a folder: "
            f"install transformers {OLDEST} or later, or use bnfuse.save and bnfuse.load."
        )
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, FusedConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, FusedLoader)


def fitted(structure: Structure, model: nn.Module, prefix: str) -> Structure:
    """The structure for a model that is the inner part, named ``prefix``, of the one that was saved, or the reverse.

    transformers loads the folder of a classifier into a bare backbone, and that of a backbone into a classifier.
    """
    own = {name for name, _ in tree.named_modules(model)}
    places = [name for placed in structure.placed for name in placed.names]
    made = tuple(f"{name}." for name in places)  # what is inside of these is not there yet
    places += [name for norm in structure.removed for name in norm.names if not name.startswith(made)]
    if not prefix or all(name in own for name in places):
        return structure
    start = f"{prefix}."
    if prefix in own:
        return _renamed(structure, lambda name: start + name)
    return _renamed(structure, lambda name: name.removeprefix(start) if name.startswith(start) else None)


def _renamed(structure: Structure, new_name: Callable[[str], str | None]) -> Structure:
    """The structure under other names, without what has none."""

    def named(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(new for name in names if (new := new_name(name)) is not None)

    placed = [replace(it, names=named(it.names)) for it in structure.placed]
    held = [replace(it, names=named(it.names)) for it in structure.own]
    removed = [RemovedNorm(named(norm.names), norm.kind, norm.keep) for norm in structure.removed]
    created = [CreatedParameter(named(made.names), made.shape, made.dtype) for made in structure.created]
    return replace(
        structure,
        removed=tuple(norm for norm in removed if norm.names),
        created=tuple(made for made in created if made.names),
        out_of_place=named(structure.out_of_place),
        placed=tuple(it for it in placed if it.names),
        own=tuple(it for it in held if it.names),
    )
