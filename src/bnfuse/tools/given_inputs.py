"""Inputs as the command line takes them: shapes, with names and dtypes, and files."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.errors import InputError
from bnfuse.model.calls import Call
from bnfuse.model.describe import dtype_name, one_line, shape_text
from bnfuse.model.inputs import random_inputs, token_bound
from bnfuse.model.pytree import map_tensors
from bnfuse.printing.terminal import say

_DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.complex64, torch.complex128,
    )
}  # fmt: skip
_SAVED = (".pt", ".pth")
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
_BYTE = 256


def parse_shape(text: str) -> tuple[int, ...]:
    """Read a shape such as ``1x3x224x224``.

    >>> parse_shape("1x3x224x224")
    (1, 3, 224, 224)

    Args:
        text: positive whole numbers with an ``x`` between them.

    Raises:
        InputError: it is not of that form.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise InputError(f"{text!r} is no shape: write positive whole numbers as in 1x3x224x224")
    return tuple(map(int, text.split("x")))


def given_inputs(texts: Sequence[str], model: nn.Module) -> tuple[Any, ...] | dict[str, Any] | Call:
    """Make the inputs that are described, one text for each argument.

    >>> given_inputs(["2x3", "mask=bool:2x3"], nn.Linear(3, 3)).kwargs["mask"].dtype
    torch.bool

    Args:
        texts: ``SHAPE``, ``DTYPE:SHAPE`` or a file, each also as ``NAME=...`` for a keyword argument. A shape without a
            dtype is of the model's own, whole numbers for one that begins with an embedding. A ``.pt`` or ``.pth`` file
            of torch.save may hold a tensor, a tuple or list of positional arguments, or a dict of keyword arguments;
            of an image come the values of its pixels, 0 to 1, as (1, 3, height, width).
        model: gives the dtype and device.

    Returns:
        The positional arguments, the keyword arguments, or where there are both a call.

    Raises:
        InputError: a text is not of that form, a file cannot be read, or an argument is given twice.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for place, text in enumerate(texts):
        found = re.fullmatch(r"([^\W\d]\w*)=(.+)", text)
        name, value = (found[1], found[2]) if found else (None, text)
        given = _value(value, model, place)
        more: Mapping[str, Any] = {}
        if name is not None:
            more = {name: given}
        elif isinstance(given, Mapping):
            more = given
        elif isinstance(given, tuple | list):
            args += given
        else:
            args.append(given)
        for twice in more.keys() & kwargs.keys():
            raise InputError(f"--input {text}: {twice} is given twice")
        kwargs |= more
    if args and kwargs:
        return Call(*args, **kwargs)
    return kwargs or tuple(args)


def described_tensor(text: str, model: nn.Module, seed: int = 0) -> Tensor:
    """A tensor of random numbers for ``SHAPE`` or ``DTYPE:SHAPE``.

    Args:
        text: what it is like. Whole numbers are below the number of tokens of a model that begins with an embedding,
            else 0 and 1 (of uint8 up to 255).
        model: gives the device, and the dtype where none is written.
        seed: of the numbers.

    Raises:
        InputError: it is not of that form.
    """
    kind, colon, shape = text.rpartition(":")
    if not colon:
        return random_inputs(model, [parse_shape(text)] * (seed + 1), token_bound(model))[-1]
    dtype = _DTYPES.get(kind)
    if dtype is None:
        near = difflib.get_close_matches(kind, _DTYPES, 1)
        hint = f"did you mean {near[0]}?" if near else f"write one of {', '.join(_DTYPES)}"
        raise InputError(f"{kind!r} is no dtype: {hint}")
    size, generator = parse_shape(shape), torch.Generator().manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        made = torch.randn(size, generator=generator, dtype=wide, device="cpu").to(dtype)
    else:
        bound = token_bound(model) or (_BYTE if dtype == torch.uint8 else 2)
        bound = 2 if dtype == torch.bool else min(bound, torch.iinfo(dtype).max + 1)
        made = torch.randint(bound, size, generator=generator, device="cpu").to(dtype)
    return made.to(_like(model).device)


def _value(text: str, model: nn.Module, place: int) -> Any:
    ending = Path(text).suffix.lower()
    if ending in _SAVED:
        return _saved(Path(text), model)
    if ending in _IMAGES:
        return _image(Path(text), model)
    if re.fullmatch(r"\.[a-z]\w*", ending):
        raise InputError(
            f"{text} cannot be read as an input: write a shape as in 1x3x224x224, a file of torch.save "
            f"({', '.join(_SAVED)}) or an image ({', '.join(_IMAGES[:3])})"
        )
    return described_tensor(text, model, place)


def _saved(path: Path, model: nn.Module) -> Any:
    _check_file(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"{path} cannot be read: {type(error).__name__}. Save the inputs alone, tensors in tuples and dicts, with "
            f"torch.save(inputs, {path.name!r})."
        ) from error
    if not isinstance(held, Tensor | tuple | list) and not (
        isinstance(held, Mapping) and all(isinstance(name, str) for name in held)
    ):
        raise InputError(
            f"{path} holds {type(held).__name__}: save a tensor, a tuple of positional arguments or a dict of keyword "
            f"arguments"
        )
    device = _like(model).device
    return map_tensors(held, lambda tensor: tensor.to(device))


def _image(path: Path, model: nn.Module) -> Tensor:
    """The pixels of an image as they are: neither resized nor normalised, which is said on standard error."""
    _check_file(path)
    try:
        image = importlib.import_module("PIL.Image")
    except ModuleNotFoundError as error:
        raise InputError(f"{path} is an image, and reading it takes pillow: run pip install pillow") from error
    try:
        with image.open(path) as opened:
            pixels = opened.convert("RGB")
    except Exception as error:
        raise InputError(f"{path} cannot be read as an image: {one_line(error)}") from error
    values = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8).reshape(pixels.height, pixels.width, 3)
    like = _like(model)
    made = (values.permute(2, 0, 1)[None].double() / (_BYTE - 1)).contiguous().to(like.device, like.dtype)
    say(
        f"{path} is {shape_text(made.shape)} {dtype_name(made.dtype)}, its pixels from 0 to 1, neither resized nor "
        f"normalised"
    )
    return made


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"there is no file {path}")


def _like(model: nn.Module) -> Tensor:
    """A tensor of the model's dtype and device."""
    return random_inputs(model, [(1,)])[0]
