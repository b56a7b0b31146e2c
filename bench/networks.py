"""The networks of the benchmarks: of the zoos, of our own, and synthetic ones of any size."""

from __future__ import annotations

import fnmatch
import importlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from bnfuse.tools.zoo.randomise import randomise_
from bnfuse.tools.zoo.specs import build

IMAGE = (3, 224, 224)


@dataclass(frozen=True)
class Network:
    """A network and what it takes.

    Attributes:
        name: as in ``torchvision:resnet18``.
        factory: builds it with random weights.
        shape: of one input, without the batch.
    """

    name: str
    factory: Callable[[], nn.Module]
    shape: tuple[int, ...] = IMAGE

    def build(self, dead: float = 0.02) -> nn.Module:
        """The network in evaluation mode, its weights from a fixed seed, its norms far from the identity.

        Args:
            dead: the share of gains that are exactly 0.
        """
        torch.manual_seed(0)
        return randomise_(self.factory(), 1, dead).eval()

    def inputs(self, batch: int = 1) -> Tensor:
        """Standard normal, the same in every call."""
        return torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(0))


def zoo(spec: str, shape: tuple[int, ...] = IMAGE) -> Network:
    """A network of a zoo by its SPEC."""
    return Network(spec, lambda: build(spec), shape)


def mlp(width: int = 1024, blocks: int = 6) -> nn.Module:
    """Linear-ReLU-BatchNorm: every norm goes forward into the next linear layer."""
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers += [nn.Linear(width, width), nn.ReLU(), nn.BatchNorm1d(width)]
    return nn.Sequential(*layers, nn.Linear(width, 10))


class _SpeechBlock(nn.Module):
    """Depthwise and pointwise convolution over time, as in QuartzNet, with a shortcut."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        self.pointwise = nn.Conv1d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm1d(channels)
        self.shortcut = nn.Conv1d(channels, channels, 1, bias=False)
        self.shortcut_norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.norm(self.pointwise(self.depthwise(x)))
        return torch.relu(deep + self.shortcut_norm(self.shortcut(x)))


def speech_encoder(channels: int = 256, blocks: int = 8) -> nn.Module:
    """A 1-D convolutional encoder of mel spectrograms: (batch, 80, frames)."""
    stem = [nn.Conv1d(80, channels, 11, stride=2, padding=5, bias=False), nn.BatchNorm1d(channels), nn.ReLU()]
    kernels = [11 + 6 * (index // 2) for index in range(blocks)]
    return nn.Sequential(*stem, *(_SpeechBlock(channels, kernel) for kernel in kernels), nn.Conv1d(channels, 32, 1))


class _VideoBlock(nn.Module):
    """A convolution over space and one over time, as in R(2+1)D, around which the input goes."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.space = nn.Conv3d(inputs, channels, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False)
        self.space_norm = nn.BatchNorm3d(channels)
        self.time = nn.Conv3d(channels, channels, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False)
        self.time_norm = nn.BatchNorm3d(channels)
        self.shortcut = nn.Conv3d(inputs, channels, 1, stride, bias=False)
        self.shortcut_norm = nn.BatchNorm3d(channels)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.time_norm(self.time(torch.relu(self.space_norm(self.space(x)))))
        return torch.relu(deep + self.shortcut_norm(self.shortcut(x)))


def video_network(channels: int = 32) -> nn.Module:
    """A 3-D convolutional classifier: (batch, 3, frames, height, width)."""
    stem = [nn.Conv3d(3, channels, 3, (1, 2, 2), 1, bias=False), nn.BatchNorm3d(channels), nn.ReLU()]
    widths = [channels, channels, 2 * channels, 4 * channels]
    blocks = [_VideoBlock(a, b, 1 if a == b else 2) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


class _SharedHead(nn.Module):
    """One convolution over several levels of a pyramid, with a norm for each level, as in EfficientDet and RTMDet."""

    def __init__(self, channels: int, depth: int, levels: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(depth))
        self.norms = nn.ModuleList(nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(levels)) for _ in range(depth))
        self.predict = nn.Conv2d(channels, 36, 3, padding=1)

    def forward(self, pyramid: list[Tensor]) -> list[Tensor]:
        for convolution, norms in zip(self.convolutions, self.norms, strict=True):
            assert isinstance(norms, nn.ModuleList)
            pyramid = [functional.silu(norm(convolution(x))) for norm, x in zip(norms, pyramid, strict=True)]
        return [self.predict(x) for x in pyramid]


class _Detector(nn.Module):
    def __init__(self, channels: int, depth: int, levels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 8, stride=8, bias=False), nn.BatchNorm2d(channels), nn.SiLU())
        self.levels = levels
        self.head = _SharedHead(channels, depth, levels)

    def forward(self, x: Tensor) -> list[Tensor]:
        pyramid = [self.stem(x)]
        while len(pyramid) < self.levels:
            pyramid.append(functional.max_pool2d(pyramid[-1], 2))
        heads: list[Tensor] = self.head(pyramid)
        return heads


def detector(channels: int = 96, depth: int = 4, levels: int = 4) -> nn.Module:
    """A head that the levels of a pyramid share: (batch, 3, height, width)."""
    return _Detector(channels, depth, levels)


class _TemporalBlock(nn.Module):
    """Weight-normalised dilated convolutions with a shortcut, as in a temporal convolutional network."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        padding = 2 * dilation
        convolutions = [nn.Conv1d(channels, channels, 5, padding=padding, dilation=dilation) for _ in range(2)]
        self.first, self.second = map(parametrizations.weight_norm, convolutions)
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        deep: Tensor = self.second(torch.relu(self.norm(self.first(x))))
        return torch.relu(x + deep)


def temporal_network(channels: int = 64, blocks: int = 6) -> nn.Module:
    """A temporal convolutional network with weight norm: (batch, 64, frames)."""
    return nn.Sequential(*(_TemporalBlock(channels, 2**block) for block in range(blocks)))


def discriminator(channels: int = 32, blocks: int = 4) -> nn.Module:
    """A convolutional discriminator with spectral and batch norms: (batch, 3, height, width)."""
    layers: list[nn.Module] = []
    before = 3
    for width in (channels * 2**block for block in range(blocks)):
        convolution = nn.Conv2d(before, width, 4, stride=2, padding=1)
        layers += [parametrizations.spectral_norm(convolution), nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
        before = width
    return nn.Sequential(*layers, parametrizations.spectral_norm(nn.Conv2d(before, 1, 4)))


def effdet(name: str, size: int) -> Network:
    """A detector of effdet, which may be missing."""

    def made() -> nn.Module:
        package = importlib.import_module("effdet")
        options = {"bench_task": "", "pretrained": False, "pretrained_backbone": False, "image_size": (size, size)}
        model: nn.Module = package.create_model(name, **options)
        return model

    return Network(f"effdet:{name}", made, (3, size, size))


NETWORKS: tuple[Network, ...] = (
    *map(
        zoo,
        (
            "torchvision:resnet18", "torchvision:resnet50", "torchvision:mobilenet_v2",
            "torchvision:mobilenet_v3_large", "torchvision:efficientnet_b0", "timm:efficientnet_b0",
            "torchvision:densenet121", "timm:mixnet_s", "timm:levit_128s", "timm:hrnet_w18_small",
            "timm:convmixer_1024_20_ks9_p14",
        ),
    ),
    Network("own:mlp", mlp, (1024,)),
    Network("own:speech_encoder", speech_encoder, (80, 400)),
    Network("own:video_network", video_network, (3, 8, 112, 112)),
)  # fmt: skip

QUICK: tuple[Network, ...] = (
    zoo("torchvision:mobilenet_v3_small", (3, 64, 64)),
    Network("own:small_mlp", lambda: mlp(64, 3), (64,)),
    Network("own:small_speech_encoder", lambda: speech_encoder(32, 2), (80, 50)),
)


def selected(pattern: str, networks: Sequence[Network]) -> list[Network]:
    """The networks whose name matches."""
    return [network for network in networks if matches(pattern, network.name)]


def matches(pattern: str, name: str) -> bool:
    """Whether the name, with or without the zoo, matches the glob pattern."""
    return any(fnmatch.fnmatchcase(form, pattern) for form in (name, name.partition(":")[2]))


def forward(model: Callable[[Tensor], Any], x: Tensor) -> Any:
    """One forward pass."""
    with torch.inference_mode():
        return model(x)


# Growth -------------------------------------------------------------------------------------------------------------

_CHANNELS = 8


def chain(norms: int) -> nn.Module:
    """So many times convolution, norm, ReLU: (batch, 8, height, width)."""
    layers: list[nn.Module] = []
    for _ in range(norms):
        layers += [nn.Conv2d(_CHANNELS, _CHANNELS, 1, bias=False), nn.BatchNorm2d(_CHANNELS), nn.ReLU()]
    return nn.Sequential(*layers)


class _Branch(nn.Module):
    def __init__(self, weight: float, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.activation = nn.BatchNorm2d(_CHANNELS), activation
        self.convolution = nn.Conv2d(_CHANNELS, _CHANNELS, 1)
        with torch.no_grad():
            self.convolution.weight.mul_(weight)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.convolution(self.activation(self.norm(x)))
        return x + added


def residual_stream(norms: int) -> nn.Module:
    """One tensor that so many branches read and add to, each behind a norm of its own: (batch, 8, height, width).

    The branches weigh less the more they are, so that the sum stays bounded.
    """
    stem, head = nn.Conv2d(_CHANNELS, _CHANNELS, 1), nn.Conv2d(_CHANNELS, _CHANNELS, 1)
    return nn.Sequential(stem, *(_Branch(1 / norms, nn.Identity()) for _ in range(norms)), head)


class _Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def refused_stream(norms: int) -> nn.Module:
    """A residual stream of which no norm can go: behind each is a SiLU, and at the end of the stream it is squared."""
    stem, head = nn.Conv2d(_CHANNELS, _CHANNELS, 1), nn.Conv2d(_CHANNELS, _CHANNELS, 1)
    return nn.Sequential(stem, *(_Branch(1 / norms, nn.SiLU()) for _ in range(norms)), _Square(), head)


class _DenseLayer(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.squeeze = nn.Conv2d(inputs, _CHANNELS, 1, bias=False)
        self.squeeze_norm = nn.BatchNorm2d(_CHANNELS)
        self.convolution = nn.Conv2d(_CHANNELS, _CHANNELS, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(torch.relu(self.norm(x)))
        new: Tensor = self.convolution(torch.relu(self.squeeze_norm(x)))
        return new


class DenseBlock(nn.Module):
    """Every layer reads what all before it have made, as in DenseNet; two norms in each: (batch, 8, height, width)."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_DenseLayer(_CHANNELS * (index + 1)) for index in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        made = [x]
        for layer in self.layers:
            made.append(layer(torch.cat(made, 1)))
        return torch.cat(made, 1)


GROWTH_SHAPE = (_CHANNELS, 4, 4)
