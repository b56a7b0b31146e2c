"""Inputs for models of the zoos: images as small as a model takes them, and whatever else a forward asks for.

Most models take one image. A census is about their structure, so a small image is tried first and the size that the
model declares after it. Those that take something else (a clip, sound, two images, a list) stand in a table.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.model import pytree
from bnfuse.model.describe import shape_text
from bnfuse.model.inputs import candidates, declared_shapes, image_channels

Size = tuple[int, int]
"""Height and width of an image, in pixels."""

Make = Callable[[int, Size, torch.Generator], tuple[Any, ...]]
"""``make(batch, size, generator)``: the positional arguments of a forward."""

SMALL = 96
"""The side of the image that is tried first. Networks halve it up to five times: three pixels are left."""

_LARGER = 32
_COLOURS = 3
_MANY_PIXELS = 160 * 160
"""Of larger images one is enough."""


@dataclass(frozen=True)
class Form:
    """What a kind of model takes.

    Attributes:
        make: its arguments.
        sizes: the sizes to try in turn.
        batch: how many samples.
        options: what its constructor is told, where its own defaults need a package or take long.
    """

    make: Make
    sizes: tuple[Size, ...] = ((SMALL, SMALL),)
    batch: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """Inputs of one call.

    Attributes:
        args: the positional arguments.
        size: height and width of the images in them, (0, 0) where there are none or none can be chosen.
        others: makes other samples, of another batch or size; what tells most first, what runs surely last.
        several: like ``args``, with at least two samples where that is possible.
    """

    args: tuple[Any, ...]
    size: Size
    others: Callable[[int], Iterator[tuple[Any, ...]]]
    several: tuple[Any, ...]

    @property
    def shapes(self) -> str:
        """Such as ``2x3x96x96``."""
        return shapes(self.args)


def shapes(args: object) -> str:
    """The shapes of all tensors in the arguments, such as ``2x3x96x96, 2``."""
    return ", ".join(shape_text(tensor.shape) for _, tensor in pytree.tensors(args))


def image(channels: int) -> Make:
    """One image."""
    return lambda batch, size, generator: (torch.randn(batch, channels, *size, generator=generator),)


def _two_images(batch: int, size: Size, generator: torch.Generator) -> tuple[Any, ...]:
    first = torch.rand(batch, 3, *size, generator=generator) * 2 - 1
    return first, first.roll(2, -1)


def _clip(frames: int) -> Make:
    return lambda batch, size, generator: (torch.randn(batch, 3, frames, *size, generator=generator),)


def _list_of_images(batch: int, size: Size, generator: torch.Generator) -> tuple[Any, ...]:
    return ([torch.rand(3, *size, generator=generator) for _ in range(batch)],)


def _sound(batch: int, size: Size, generator: torch.Generator) -> tuple[Any, ...]:
    features, length = size
    lengths = torch.arange(batch) * -5 + length - 2
    return torch.randn(batch, features, length, generator=generator), lengths


def _window_of_sound(*shape: int, person: tuple[int, ...] = ()) -> Make:
    def make(batch: int, size: Size, generator: torch.Generator) -> tuple[Any, ...]:
        return torch.randn(batch, *shape, generator=generator), torch.full((batch, *person), 3)

    return make


def _masked_flows(batch: int, size: Size, generator: torch.Generator) -> tuple[Any, ...]:
    frames = [torch.randn(batch, 5, channels, *size, generator=generator) for channels in (2, 1)]
    return tuple(frames)


_SOUND = Form(_sound, ((64, 120),), options={"from_audio": False})  # the default needs librosa
# Images are resized to 800 pixels by default, and random weights find nothing above the default scores. Then every
# proposal is a detection, and the second stages run on as many regions as they are told: a few of them tell the same.
_SMALLER = {"min_size": 128, "max_size": 192}
_ONE_STAGE = Form(_list_of_images, ((128, 160),), options={**_SMALLER, "score_thresh": 0.0})
_FEWER = {"rpn_post_nms_top_n_test": 64, "box_detections_per_img": 8}
_TWO_STAGES = Form(_list_of_images, ((128, 160),), options={**_SMALLER, **_FEWER, "box_score_thresh": 0.0})
# Their outputs are 150 times 480 x 480 numbers by default, whatever the image.
_OF_ITS_SIZE = Form(image(3), options={"fixed_size": False})
_HALVED_SIX_TIMES = Form(image(3), ((128, 256),))

TABLE: dict[str, Form] = {
    "torchvision:video.resnet": Form(_clip(8), ((64, 64),)),
    "torchvision:video.s3d": Form(_clip(16), ((224, 224),), batch=2),
    "torchvision:video.mvit": Form(_clip(16), ((224, 224),), batch=1),
    "torchvision:video.swin_transformer": Form(_clip(8), ((64, 64),)),
    "torchvision:detection.ssd*": Form(_list_of_images, ((128, 160),), options={"score_thresh": 0.0}),
    "torchvision:detection.retinanet": _ONE_STAGE,
    "torchvision:detection.fcos": _ONE_STAGE,
    "torchvision:detection.*": _TWO_STAGES,
    "torchvision:optical_flow.raft": Form(_two_images, ((128, 160),)),
    **dict.fromkeys(
        [f"pytorchcv:{family}" for family in ("danet", "deeplabv3", "fastscnn", "fcn8sd", "icnet", "pspnet")],
        _OF_ITS_SIZE,
    ),
    "pytorchcv:lednet": _HALVED_SIX_TIMES,
    "pytorchcv:sinet": _HALVED_SIX_TIMES,
    "pytorchcv:raft": Form(_two_images, ((128, 160),)),
    "pytorchcv:jasper*": _SOUND,
    "pytorchcv:quartznet": _SOUND,
    "pytorchcv:nvpattexp": Form(_window_of_sound(8, 16, 29), ((0, 0),)),
    "pytorchcv:visemenet": Form(_window_of_sound(8, 195, person=(76,)), ((0, 0),)),
    "pytorchcv:voca": Form(_window_of_sound(1, 16, 29), ((0, 0),)),
    "pytorchcv:propainter*": Form(_masked_flows, ((240, 432),), batch=1),
}
"""Whatever is not one image, by zoo and family."""


def form(zoo: str, family: str) -> Form | None:
    """The entry of the table for a family, None for one that takes an image."""
    place = f"{zoo}:{family}"
    return next((form for pattern, form in TABLE.items() if fnmatch.fnmatchcase(place, pattern)), None)


def samples(model: nn.Module, known: Form | None, seed: int = 0) -> Iterator[Sample]:
    """Inputs to try in turn until the model runs.

    Args:
        model: any module.
        known: what it takes, where that is not one image.
        seed: of the values.
    """
    if known is not None:
        for size in known.sizes:
            yield _sample(known.make, known.batch, size, seed, free=0 < size[0] * size[1] <= _MANY_PIXELS)
        return
    declared = _declared_sizes(model)
    first = image_channels(model)
    tried: set[Size] = set()
    for size in dict.fromkeys([*_small(declared, _has_fixed_size(model)), *declared]):
        free = not tried and size not in declared
        tried.add(size)
        batch = 1 if size[0] * size[1] > _MANY_PIXELS else 2
        for channels in dict.fromkeys([first, _COLOURS] if first else []):
            yield _sample(image(channels), batch, size, seed, free)
    for candidate in candidates(model):
        yield _guess(candidate.args, seed)


def _guess(args: tuple[Any, ...], seed: int) -> Sample:
    """Arguments of a shape that was guessed; other samples have other values alone."""
    args = _others_of(args, seed)
    return Sample(args, (0, 0), lambda other: iter([_others_of(args, other)]), args)


def _sample(make: Make, batch: int, size: Size, seed: int, free: bool) -> Sample:
    def others(seed: int) -> Iterator[tuple[Any, ...]]:
        larger = (size[0] + _LARGER, size[1] + _LARGER)
        choices = [(batch + 1, larger), (batch, larger)] if free else []
        for count, side in [*choices, (batch + 1, size), (batch, size)]:
            yield make(count, side, torch.Generator().manual_seed(seed))

    args, several = (make(count, size, torch.Generator().manual_seed(seed)) for count in (batch, max(2, batch)))
    return Sample(args, size, others, several)


def _declared_sizes(model: nn.Module) -> list[Size]:
    """Heights and widths that the model states, those of the whole before those of a part."""
    return list(dict.fromkeys((shape[-2], shape[-1]) for shape, _ in declared_shapes(model) if len(shape) == 3))


def _has_fixed_size(model: nn.Module) -> bool:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return bool(config.get("fixed_input_size")) if isinstance(config, Mapping) else False


def _small(declared: list[Size], fixed: bool) -> list[Size]:
    """A small image of the shape of the declared one; none where the model takes no other size."""
    if fixed:
        return []
    height, width = declared[0] if declared else (1, 1)
    if declared and min(height, width) <= SMALL:
        return []
    return [(SMALL * height // min(height, width), SMALL * width // min(height, width))]


def _others_of(args: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)

    def other(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    changed: tuple[Any, ...] = pytree.map_tensors(args, other)
    return changed
