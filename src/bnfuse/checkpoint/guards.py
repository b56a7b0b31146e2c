"""Reading what a fused model leaves in files of other libraries: guards in the weights, structure in the configuration.

See :mod:`bnfuse.model.pretrained`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from bnfuse.checkpoint.structure import Structure
from bnfuse.errors import CheckpointError
from bnfuse.model.pretrained import GUARD_SHAPE


def holds_guards(files: Sequence[str]) -> bool:
    """Whether safetensors files are those of a fused model."""
    return any(shape == GUARD_SHAPE for file in files for shape in _shapes(file))


def _shapes(file: str) -> Iterator[tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (not a dict)
            yield tuple(opened.get_slice(name).get_shape())


def structure_of(config: object, entry: str, file: str | Path) -> Structure:
    """The structure that stands as JSON in an entry of a configuration.

    Args:
        config: a dictionary.
        file: where it is from, for messages.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    text = config.get(entry) if isinstance(config, dict) else None
    if not isinstance(text, str):
        raise CheckpointError(
            f"The weights are those of a fused model, and {file} does not say how it was fused. "
            f"Write the fused model with bnfuse.save, and read it with bnfuse.load into a freshly built one."
        )
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: its structure of a fused model is no JSON.") from error
    return Structure.from_dict(said)
