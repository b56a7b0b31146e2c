"""The vocabulary of the generated programs: layers that PyTorch lacks, and contents for parameters.

``from fuzz.layers import *`` is the first line of every printed program.
"""

from __future__ import annotations

import linecache
import warnings
import zlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torchvision.ops import FrozenBatchNorm2d

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d

__all__ = [
    "BatchConv", "BatchNormAct2d", "BiasBlindConv", "Branched", "Combined", "DetectronFrozenNorm", "DoublingNorm", "F", "FactoredConv",
    "FrozenBatchNorm2d", "FrozenBatchNormAct2d", "MaskedConv", "NormWithActivation", "PartedConv", "ScaledConv", "Scaling",
    "SquashingNorm", "StandardisedConv", "SummedConv", "drawn", "fill", "functional_norm", "lazy_norm", "module", "nn",
    "orthogonal", "parametrised", "pruned", "spectral_norm", "spectral_norm_by_hook", "torch", "weight_norm",
    "weight_norm_by_hook", "with_forward",
]  # fmt: skip

DRESSINGS = (
    "positive", "mixed", "zeros", "dead", "tiny", "huge", "one tiny", "one huge", "small variance",
    "large variance", "unit", "far mean", "equal", "scale",
)  # fmt: skip
"""How the numbers of a norm may be drawn; see :func:`fill`."""

orthogonal = parametrizations.orthogonal
spectral_norm = parametrizations.spectral_norm
weight_norm = parametrizations.weight_norm


def weight_norm_by_hook(layer: nn.Module) -> nn.Module:
    """The old-style weight_norm, which recomputes the weight in a hook."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


def spectral_norm_by_hook(layer: nn.Module) -> nn.Module:
    """The old-style spectral_norm, whose vectors are near those of the weight that the layer was made with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.spectral_norm(layer, n_power_iterations=5)


def parametrised(layer: nn.Module, *codes: str, place: str = "weight") -> nn.Module:
    """A layer whose weight is computed by modules: each code is an expression of w, or of w and a gain, ``m.gain``."""
    for code in codes:
        gain = {"gain": nn.Parameter(torch.ones(1))} if "m.gain" in code else {}
        parametrize.register_parametrization(layer, place, module("w", code, **gain), unsafe=True)
    return layer


_CLASSES: dict[tuple[Any, ...], type[nn.Module]] = {}


def _class(base: type[nn.Module], takes: str, code: str) -> type[nn.Module]:
    """A class with a forward: statements with semicolons between them, of which the last is what it returns."""
    key = (base, takes, code)
    if key not in _CLASSES:
        *lines, last = code.split("; ")
        source = f"def forward(m, {takes}):\n" + "".join(f"    {line}\n" for line in [*lines, f"return {last}"])
        name = f"<forward {len(_CLASSES)}>"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        names = {name: globals()[name] for name in __all__} | {"__name__": "network"}
        exec(compile(source, name, "exec"), names)
        title = "Block" if base is nn.Module else f"Own{base.__name__}"
        _CLASSES[key] = type(title, (base,), {"forward": names["forward"], "__module__": "network"})
    return _CLASSES[key]


def module(takes: str, code: str, /, **parts: Any) -> nn.Module:
    """A module that holds some parts, and its forward.

    ``module("x", "y = m.c(x); F.relu(m.n(y))", c=nn.Conv2d(4, 4, 1), n=nn.BatchNorm2d(4))``
    """
    made = _class(nn.Module, takes, code)()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def with_forward(layer: nn.Module, code: str, /, **parts: Any) -> nn.Module:
    """A layer of a class of its own, with another forward and perhaps further parts."""
    layer.__class__ = _class(type(layer), "x", code)
    for name, part in parts.items():
        setattr(layer, name, part)
    return layer


def lazy_norm(rank: int, channels: int, **options: Any) -> nn.Module:
    """A lazy batch norm that has seen its first input."""
    norm = {2: nn.LazyBatchNorm1d, 3: nn.LazyBatchNorm1d, 4: nn.LazyBatchNorm2d, 5: nn.LazyBatchNorm3d}[rank](**options)
    norm.eval()(torch.zeros(1, channels, *[1] * (rank - 2)))
    return norm


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ScaledConv(nn.Conv2d):
    """A convolution whose weight has a gain of its own for each output channel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.gain, self.bias, self.stride, self.padding, self.dilation, self.groups)


class MaskedConv(nn.Conv2d):
    """A convolution with a mask of the weight, that is no parameter."""

    mask: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones(self.weight.shape, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * (self.mask * self.weight > -0.1)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class FactoredConv(nn.Module):
    """A convolution whose weight is a product of two factors, and whose bias is computed too."""

    def __init__(
        self, inputs: int, outputs: int, size: int, stride: int = 1, padding: int = 0, bias: bool = True
    ) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.ones(outputs, 2))
        self.v = nn.Parameter(torch.ones(2, inputs * size**2))
        self.b = nn.Parameter(torch.ones(outputs)) if bias else None
        self.options, self.shape = (stride, padding), (outputs, inputs, size, size)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.b is None else self.b.tanh()
        return F.conv2d(x, (self.u @ self.v).reshape(self.shape), bias, *self.options)


class BatchConv(nn.Conv2d):
    """A convolution that folds a norm of its own into its weight, in each call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.inner = nn.BatchNorm2d(self.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner
        assert inner.running_var is not None
        assert inner.running_mean is not None
        factor = inner.weight / torch.sqrt(inner.running_var + inner.eps)
        bias = inner.bias - factor * inner.running_mean
        if self.bias is not None:
            bias = bias + factor * self.bias
        weight = self.weight * factor[:, None, None, None]
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def pruned(layer: nn.Module) -> nn.Module:
    """Every other element of the weight is masked by a hook."""
    assert isinstance(layer.weight, Tensor)
    mask = torch.arange(layer.weight.numel()).reshape(layer.weight.shape) % 2
    prune.custom_from_mask(layer, "weight", mask)
    return layer


class BiasBlindConv(nn.Conv2d):
    """A forward that never reads the bias, as in partial convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)


class PartedConv(nn.Conv2d):
    """A convolution that runs its output channels in two parts, each with its part of the bias."""

    def forward(self, x: Tensor) -> Tensor:
        half = self.out_channels // 2
        parts = []
        for part in (slice(0, half), slice(half, None)):
            bias = None if self.bias is None else self.bias[part]
            parts.append(F.conv2d(x, self.weight[part], bias, self.stride, self.padding, self.dilation))
        return torch.cat(parts, 1)


class SummedConv(nn.Conv2d):
    """A convolution that runs its input channels in two parts, and adds the bias with each."""

    def forward(self, x: Tensor) -> Tensor:
        half = self.in_channels // 2
        parts = [
            F.conv2d(x[:, part], self.weight[:, part], self.bias, self.stride, self.padding, self.dilation)
            for part in (slice(0, half), slice(half, None))
        ]
        return parts[0] + parts[1]


class Scaling(nn.Module):
    """LayerScale."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Combined(nn.Sequential):
    """Layers in turn, with the input added to the result."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return x + y


class Branched(nn.Module):
    """Adds up what branches make of one tensor, in place or not, each with a factor; an activation may follow.

    A branch is a module, or None for the tensor itself.
    """

    def __init__(self, *branches: nn.Module | None, factors: tuple[float, ...], in_place: bool, act: str = "") -> None:
        super().__init__()
        self.branches = nn.ModuleList(branch or nn.Identity() for branch in branches)
        self.factors, self.in_place, self.act = factors, in_place, act

    def forward(self, x: Tensor) -> Tensor:
        made = [branch(x) for branch in self.branches]
        total = made[0] * self.factors[0]
        for y, factor in zip(made[1:], self.factors[1:], strict=True):
            if self.in_place:
                total += y * factor
            else:
                total = y * factor + total if factor > 0 else total - y * -factor
        return getattr(F, self.act)(total) if self.act else total


class DoublingNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class SquashingNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class NormWithActivation(nn.BatchNorm2d):
    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class DetectronFrozenNorm(nn.Module):
    """A frozen norm that calls the function when no gradient is wanted, as detectron2's does."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            bias = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


def functional_norm(x: Tensor, norm: nn.modules.batchnorm._BatchNorm) -> Tensor:
    """A norm whose tensors are handed to the function by other code."""
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, norm.eps)


def drawn(seed: int, shape: tuple[int, ...], high: int = 0) -> Tensor:
    """An argument of a call: normal numbers, or indices below ``high``."""
    generator = torch.Generator().manual_seed(seed)
    if high:
        return torch.randint(0, high, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def fill(net: nn.Module, seed: int, dressings: dict[str, str]) -> None:
    """Give every parameter and buffer contents that depend on the seed and its own name only.

    Weights have a standard deviation of 1/sqrt(fan in), so that activations stay near 1. The norms are far from the
    identity: gains between 0.5 and 1.5, statistics and biases likewise; ``dressings`` names, by the norm's place,
    another way to draw them.
    """
    norms = {}
    for place, module in net.named_modules():
        buffers = module._buffers.keys() | module._parameters.keys()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or "running_var" in buffers:
            norms[place] = module
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if not tensor.is_floating_point() or tensor.numel() == 0:
                continue
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            place, _, role = name.rpartition(".")
            if place in norms:
                tensor.copy_(_dressed(role, dressings.get(place, "positive"), tensor, generator))
            else:
                tensor.copy_(_plain(role, tensor, generator))


def _plain(role: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    if role.startswith(("gamma", "gain", "original0", "weight_g")):
        sign = torch.randint(0, 5, tensor.shape, generator=generator).clamp(0, 1) * 2.0 - 1
        return (0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)) * sign
    normal = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    if role.endswith("mask"):
        return (normal > -0.5).to(torch.float64)
    fan_in = tensor.numel() / tensor.shape[0] if tensor.dim() > 1 else 4.0
    return normal / max(fan_in, 1.0) ** 0.5


def _dressed(role: str, dressing: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    normal = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    if role == "running_var":
        if dressing == "small variance":
            return 10 ** (-9 + 8 * uniform)
        if dressing == "large variance":
            return 10 ** (6 * uniform)
        return torch.ones_like(uniform) if dressing in ("unit", "equal") else 0.5 + 1.5 * uniform
    if role != "weight":  # bias, running_mean
        if dressing == "far mean" and role == "running_mean":
            return 100 * normal
        return torch.zeros_like(normal) if dressing in ("unit", "equal", "scale") else 0.3 * normal
    gain = 0.5 + uniform
    if dressing == "mixed":
        gain *= normal.sign()
    elif dressing == "zeros":
        gain *= normal > 0
    elif dressing == "tiny":
        gain *= 1e-5
    elif dressing == "huge":
        gain *= 1e3
    elif dressing == "one tiny":
        gain.view(-1)[0] *= 1e-11
    elif dressing == "one huge":
        gain.view(-1)[0] *= 1e4
    elif dressing == "dead":
        gain.zero_()
    elif dressing == "unit":
        gain.fill_(1)
    elif dressing == "equal":
        gain.fill_(2)
    return gain
