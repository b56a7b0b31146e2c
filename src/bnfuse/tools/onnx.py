"""Exporting a model and its fused copy to ONNX, for those who look at networks in Netron.

The optimiser of torch.onnx.export folds the norms that stand behind a convolution, so that both files would look alike.
It is left out, but for the folding of constants, without which every bias is a handful of operators.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from bnfuse.errors import BnFuseError
from bnfuse.model.calls import FORWARD, Call
from bnfuse.model.copying import copy_model
from bnfuse.model.describe import first_line

logger = logging.getLogger("bnfuse")

_NEEDED = ("onnx", "onnxscript")
"""What torch.onnx.export imports."""


def check(paths: Sequence[Path]) -> None:
    """Look before any work whether models can be exported to these files.

    Raises:
        BnFuseError: a file cannot be written there, or a package is missing.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BnFuseError(f"--onnx needs {' and '.join(missing)}: run pip install 'bnfuse[onnx]'")
    for path in paths:
        if path.suffix != ".onnx":
            raise BnFuseError(f"{path.name} has an ending that is not known: write .onnx")
        if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise BnFuseError(f"{path} cannot be written: there is no such folder, or it is not yours to write to")
    if len({path.resolve() for path in paths}) < len(paths):
        raise BnFuseError("--onnx takes two files: the second model would overwrite the first")


def export(models: Sequence[nn.Module], call: Call, paths: Sequence[Path]) -> None:
    """Export models in evaluation mode, with all norms that they have; they are left as they are.

    Args:
        models: one for each path.
        call: what they are exported for: the sizes of its tensors are those of the files.

    Raises:
        BnFuseError: torch.onnx.export fails on one.
    """
    if call.method != FORWARD:
        raise BnFuseError(f"--onnx exports forward, and the first call is {call.method}")
    for model, path in zip(models, paths, strict=True):
        said = io.StringIO()
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(said):
                warnings.simplefilter("ignore")
                own = copy_model(model).eval()
                _export(own, call, path)
        except Exception as error:
            raise BnFuseError(f"{path} was not written, since torch.onnx.export fails: {first_line(error)}") from error
        logger.info("%s", said.getvalue())


def _export(model: nn.Module, call: Call, path: Path) -> None:
    from onnxscript import optimizer

    program = torch.onnx.export(model, call.args, kwargs=call.kwargs, dynamo=True, optimize=False, verbose=False)
    assert program is not None
    optimizer.fold_constants(program.model)
    optimizer.remove_unused_nodes(program.model)
    program.save(path)


def size(path: Path) -> int:
    """The bytes of an exported model, with the file of weights that stands beside it."""
    beside = path.with_name(f"{path.name}.data")
    return sum(file.stat().st_size for file in (path, beside) if file.is_file())
