"""What fusing does to the rounding error of a network in a low precision.

For each network, with randomised norms: the error of the original in float32 (bfloat16) against the original in
float64, the error of the fused network in the same precision against the same reference, and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch
from torch import Tensor

import bnfuse
from bnfuse.model import pytree
from bnfuse.model.sandbox import run
from bnfuse.printing.tables import Column, Table
from bnfuse.printing.text import table_text
from bnfuse.tools.zoo import build, calibrate_, randomise_
from bnfuse.verify.measure import compare_outputs

NETWORKS = (
    "torchvision:resnet50", "torchvision:mobilenet_v3_large", "torchvision:efficientnet_b0", "torchvision:googlenet",
    "torchvision:inception_v3", "torchvision:shufflenet_v2_x1_0", "torchvision:densenet121", "timm:efficientnet_b0",
    "timm:mixnet_s", "timm:levit_128s", "timm:visformer_tiny", "timm:inception_next_atto",
    "timm:convmixer_1024_20_ks9_p14", "timm:resnetv2_18", "timm:repvit_m0_9", "timm:nextvit_small",
    "timm:efficientvit_m0", "timm:swiftformer_xs", "timm:ghostnet_100", "pytorchcv:ibn_resnet50",
    "pytorchcv:channelnet",
)  # fmt: skip


def errors(spec: str, dtype: torch.dtype, size: int) -> tuple[float, float]:
    """Relative L2 error of the original and of the fused network, in a precision, against float64."""
    torch.manual_seed(0)
    original = randomise_(build(spec), 1, dead=0.0).eval()
    x = torch.randn(1, 3, size, size)
    calibrate_(original, torch.cat([x, torch.randn_like(x)]))
    low = original.to(dtype)
    low_x = x.to(dtype)
    fused = bnfuse.fuse(low, low_x, verify=False)
    own, ours = run(low, (low_x,), {}), run(fused, (low_x,), {})
    exact = run(low.double(), (low_x.double(),), {})
    return _error(exact, own), _error(exact, ours)


def _error(exact: object, found: object) -> float:
    """Relative L2 error of the worst output."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    comparison = compare_outputs(exact, pytree.map_tensors(found, wide))
    return max(output.relative_l2 for output in comparison.outputs)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__)
    parser.add_argument("networks", nargs="*", default=NETWORKS, metavar="SPEC")
    parser.add_argument("--size", type=int, default=224, help="height and width of the image (pixels)")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, one image of {options.size}x{options.size}, randomised norms")
    rows: list[tuple[str, ...]] = []
    ratios: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for spec in options.networks:
        cells = [spec]
        for dtype, found in ratios.items():
            own, ours = errors(spec, dtype, options.size)
            found.append(ours / own)
            cells += [f"{own:.1e}", f"{ours:.1e}", f"{ours / own:.2f}"]
        rows.append(tuple(cells))
        print(f"{spec} done", file=sys.stderr)
    medians = [statistics.median(found) for found in ratios.values()]
    rows.append(("median", "", "", f"{medians[0]:.2f}", "", "", f"{medians[1]:.2f}"))
    heads = ["network", *(f"{name} {what}" for name in ("float32", "bfloat16") for what in ("own", "fused", "ratio"))]
    columns = tuple(Column(head, head != "network") for head in heads)
    print(table_text(Table("relative L2 error against float64", columns, tuple(rows))))
    return int(max(medians) > 1.5)


if __name__ == "__main__":
    sys.exit(main())
