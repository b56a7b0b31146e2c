"""Example inputs: put into one form when the caller passes them, proposed when not.

A model does not say what it takes. ``candidates`` reads what there is to read, the surest source first: the
input size that a model zoo leaves on its models, then the shapes of the first layers in the order of
registration, with a short list of sizes. A candidate is a proposal; the caller runs the model on each in turn
and keeps the first that works.

The batch is 2, so that the batch axis is not mistaken for an axis of size one; one candidate per source has
batch 1, for models that allow no other.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnfuse.errors import InputError
from bnfuse.model.describe import dtype_name, shape_text

# The sizes behind the batch and channel axes that are tried in turn, by the number of these axes.
_SIZES: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((224,), (1024,), (16000,), (32,)),
    2: tuple((side, side) for side in (224, 32, 299, 64, 28, 256, 384, 512, 96, 128)),
    3: ((16, 112, 112), (16, 224, 224), (32, 32, 32), (64, 64, 64)),
}
# A model that begins with a transposed convolution generates: its input is small.
_TRANSPOSED_SIZES = (4, 1, 8, 32)
_SEQUENCE_LENGTH = 16
_LAYERS_TRIED = 3
_SEED = 0

# Attributes in which models state the height and width of their images.
_SIZE_ATTRIBUTES = ("in_size", "image_size", "img_size", "input_image_size")

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_DATA_LAYERS = (*_CONVOLUTIONS, *_TRANSPOSED, *_NORMS, *_EMBEDDINGS, nn.Linear, nn.RNNBase)


@dataclass(frozen=True)
class Candidate:
    """Inputs that a model may take.

    Attributes:
        args: the positional arguments.
        kwargs: the keyword arguments.
        description: type, shape and source, such as ``float32 2x3x224x224 (timm pretrained_cfg)``.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    description: str


def normalise(example_inputs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put example inputs into the form ``(args, kwargs)``.

    >>> args, kwargs = normalise(torch.zeros(2, 3))
    >>> len(args), kwargs
    (1, {})

    Args:
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping) and all(isinstance(name, str) for name in example_inputs):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Mapping):
        odd = next(name for name in example_inputs if not isinstance(name, str))
        got = f"a dict with the key {odd!r}"
    else:
        kind = type(example_inputs)
        got = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    raise InputError(
        f"example_inputs must be a tensor, a tuple of positional arguments or a dict of keyword arguments; got {got}"
    )


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Propose inputs for ``model``, the likeliest first, made only when asked for.

    The values are random with a seed of their own; type and device are those of the model's first floating
    parameter.

    Args:
        model: any module; it is looked at and never run.

    Yields:
        Candidates with distinct shapes; none when nothing in the model tells a shape, or when a lazy layer
        waits for its first input, since a guess would fix its shape for good.
    """
    if any(is_lazy(parameter) for parameter in model.parameters()):
        return
    repeat = _required_arguments(model)
    seen: set[tuple[tuple[int, ...], int | None]] = set()
    for shape, integers_below, source in _proposals(model):
        if (shape, integers_below) in seen:
            continue
        seen.add((shape, integers_below))
        args = tuple(random_inputs(model, [shape] * repeat, integers_below))
        times = "" if repeat == 1 else f"{repeat} times "
        yield Candidate(args, {}, f"{times}{_type_and_shape(args[0])} ({source})")


def random_inputs(model: nn.Module, shapes: Sequence[Sequence[int]], integers_below: int | None = None) -> list[Tensor]:
    """Make seeded random tensors that fit a model's type and device; the global random state is left alone.

    Args:
        model: its first floating parameter gives type and device.
        shapes: one shape for each tensor.
        integers_below: make whole numbers from 0 up to this bound instead, as token indices are.

    Returns:
        Standard normal tensors, or int64 tensors when ``integers_below`` is given.
    """
    dtype, device = _dtype_and_device(model)
    generator = torch.Generator().manual_seed(_SEED)
    on_cpu: dict[str, Any] = {"generator": generator, "device": "cpu"}
    if integers_below is not None:
        return [torch.randint(integers_below, tuple(shape), **on_cpu).to(device) for shape in shapes]
    return [torch.randn(tuple(shape), **on_cpu).to(device, dtype) for shape in shapes]


def token_bound(model: nn.Module) -> int | None:
    """Return the number of tokens that a model which begins with an embedding knows, else None."""
    first = next(_data_layers(model), None)
    return None if first is None else _integers_below(first)


def _proposals(model: nn.Module) -> Iterator[tuple[tuple[int, ...], int | None, str]]:
    """Yield shapes, the bound of the values where they are integers, and where the shape comes from."""
    for shape, source in declared_shapes(model):
        yield (2, *shape), None, source
        yield (1, *shape), None, source
    names = {module: name or "the model itself" for name, module in model.named_modules()}
    for layer in islice(_data_layers(model), _LAYERS_TRIED):
        source = f"from {names[layer]}, {type(layer).__name__}"
        for shape in _layer_shapes(layer, batch=2) + _layer_shapes(layer, batch=1)[:1]:
            yield shape, _integers_below(layer), source


def declared_shapes(model: nn.Module) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield the input shapes, without the batch, that attributes of the model or of a part of it declare."""
    for module in model.modules():
        for attribute in ("pretrained_cfg", "default_cfg"):
            config = getattr(module, attribute, None)
            size = config.get("input_size") if isinstance(config, Mapping) else None
            if size := _shape(size):
                yield size, f"timm {attribute}"
    channels = image_channels(model)
    if channels is None:
        return
    holders: list[tuple[object, str]] = [(model, name) for name in _SIZE_ATTRIBUTES]
    holders.append((getattr(model, "config", None), "image_size"))  # as Hugging Face models have it
    for holder, attribute in holders:
        size = _shape(getattr(holder, attribute, None))
        if size and len(size) <= 2:
            yield (channels, size[0], size[-1]), f"the model's {attribute}"


def _shape(size: object) -> tuple[int, ...] | None:
    """Return a positive number or a sequence of them as a tuple, anything else as None."""
    lengths = size if isinstance(size, tuple | list) else (size,)
    plain = all(isinstance(length, int) and not isinstance(length, bool) and length > 0 for length in lengths)
    return tuple(lengths) if plain else None


def image_channels(model: nn.Module) -> int | None:
    """Return the channels of the images: as the model states them, else those of its first 2d convolution."""
    stated = getattr(model, "in_channels", None)
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    if first is None:
        return None
    return stated if isinstance(stated, int) else first.in_channels


def _data_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Return the layers whose shape tells what data they take, in the order of registration."""
    return (module for module in model.modules() if isinstance(module, _DATA_LAYERS))


def _integers_below(layer: nn.Module) -> int | None:
    return layer.num_embeddings if isinstance(layer, _EMBEDDINGS) else None


def _layer_shapes(layer: nn.Module, batch: int) -> list[tuple[int, ...]]:
    """Return shapes that ``layer`` takes, the likeliest first."""
    if isinstance(layer, _CONVOLUTIONS):
        return [(batch, layer.in_channels, *size) for size in _SIZES[len(layer.kernel_size)]]
    if isinstance(layer, _TRANSPOSED):
        dimensions = len(layer.kernel_size)
        return [(batch, layer.in_channels, *(size,) * dimensions) for size in _TRANSPOSED_SIZES]
    if isinstance(layer, nn.BatchNorm1d):
        return [(batch, layer.num_features), (batch, layer.num_features, _SEQUENCE_LENGTH)]
    if isinstance(layer, _NORMS):
        dimensions = 3 if isinstance(layer, nn.BatchNorm3d) else 2
        return [(batch, layer.num_features, *size) for size in _SIZES[dimensions]]
    if isinstance(layer, nn.Linear):
        return [(batch, layer.in_features), (batch, _SEQUENCE_LENGTH, layer.in_features)]
    if isinstance(layer, nn.RNNBase):
        leading = (batch, _SEQUENCE_LENGTH) if layer.batch_first else (_SEQUENCE_LENGTH, batch)
        return [(*leading, layer.input_size)]
    return [(batch, _SEQUENCE_LENGTH)]  # indices into an embedding


def _required_arguments(model: nn.Module) -> int:
    """Count the positional arguments that ``forward`` demands; for two, the same shape serves twice."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters))


def _dtype_and_device(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    tensors = [*model.parameters(), *model.buffers()]
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    return (torch.float32, torch.device("cpu")) if first is None else (first.dtype, first.device)


def _type_and_shape(tensor: Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {shape_text(tensor.shape)}"
