"""How much memory fusing needs: by how much the resident memory of a fresh process grows at its peak.

Each figure comes from a process of its own, which builds the network, does the same once with a tiny one, so that
everything is loaded, and then has Linux forget the peak so far.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bnfuse
from bench.child import child
from bench.networks import Network, forward, matches, zoo
from bench.rivals import fx_fused
from bench.section import Section, Settings, Target, progress
from bnfuse.printing.tables import Column, Table

MIB = 2**20
EXTRA_LIMIT = 64 * MIB

NETWORK = zoo("torchvision:resnet152")
QUICK = zoo("torchvision:resnet18", (3, 64, 64))

FORWARD, COPY = "forward pass", "deepcopy"
IN_PLACE, COPYING = "fuse(inplace=True, verify=False)", "fuse(verify=False)"
WORK: dict[str, Callable[[nn.Module, Tensor], object]] = {
    FORWARD: forward,
    COPY: lambda model, x: copy.deepcopy(model),
    IN_PLACE: lambda model, x: bnfuse.fuse(model, x, inplace=True, verify=False),
    COPYING: lambda model, x: bnfuse.fuse(model, x, verify=False),
    "fuse(inplace=True)": lambda model, x: bnfuse.fuse(model, x, inplace=True),
    "fuse()": lambda model, x: bnfuse.fuse(model, x),
    "torch.fx fuse": lambda model, x: fx_fused(model),
}

_CLEAR_PEAK = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Finding:
    """Bytes: of the model's parameters and buffers, and by how much each work raises the peak in every process."""

    network: str
    model: int
    peaks: dict[str, list[int]]

    def peak(self, work: str) -> float:
        return statistics.median(self.peaks[work])

    def extra(self, work: str) -> float:
        """Beyond one forward pass."""
        return self.peak(work) - self.peak(FORWARD)

    def to_dict(self) -> dict[str, Any]:
        return {"network": self.network, "model bytes": self.model, "peak bytes": self.peaks}


def run(settings: Settings) -> Section:
    """Measure one large network."""
    network = QUICK if settings.quick else NETWORK
    if not matches(settings.networks, network.name):
        return Section(())
    if not _CLEAR_PEAK.exists():
        return Section((), [Target("memory of fusing (Linux alone tells)", None)])
    repeat = settings.repeat or (1 if settings.quick else 3)
    peaks: dict[str, list[int]] = {work: [] for work in WORK}
    model = 0
    for number in range(repeat):
        for work in WORK:
            progress(f"memory [{number + 1}/{repeat}] {network.name}: {work}")
            with child("bench.memory", network.name, work, str(settings.threads)) as process:
                model, peak = map(int, process.ask().split())
            peaks[work].append(peak)
    return report(Finding(network.name, model, peaks))


def report(finding: Finding) -> Section:
    """Table, targets and data of what was measured."""
    rows = tuple(
        (
            work,
            f"{finding.peak(work) / MIB:.1f}",
            f"{(max(peaks) - min(peaks)) / MIB:.1f}",
            f"{finding.extra(work) / MIB:+.1f}",
            f"{finding.extra(work) / finding.model:+.2f}",
        )
        for work, peaks in finding.peaks.items()
    )
    heads = ("peak, MiB", "max - min", "beyond a forward pass", "in models")
    columns = (Column("work"), *(Column(head, True) for head in heads))
    count = len(finding.peaks[FORWARD])
    table = Table(
        f"Memory: growth of the resident memory, {finding.network} of {finding.model / MIB:.1f} MiB "
        f"(medians of {count} processes)",
        columns,
        rows,
    )
    targets = [
        _target(f"{IN_PLACE} beyond one forward pass", finding.extra(IN_PLACE), EXTRA_LIMIT),
        _target(
            f"{COPYING} beyond that and the size of the model", finding.extra(COPYING) - finding.model, EXTRA_LIMIT
        ),
    ]
    return Section([table], targets, finding.to_dict())


def _target(what: str, found: float, limit: float) -> Target:
    return Target(f"{what} at most {limit / MIB:g} MiB: {found / MIB:.1f} MiB", found <= limit)


def measure(network: Network, work: str) -> tuple[int, int]:
    """In a process of its own: bytes of the model, and by how much the work raises the peak."""
    tiny = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    WORK[work](tiny, torch.randn(1, 3, 8, 8))
    model, x = network.build(), network.inputs()
    gc.collect()
    _give_back()
    _CLEAR_PEAK.write_text("5")
    before = _kibibytes("VmRSS")
    result = WORK[work](model, x)
    peak = _kibibytes("VmHWM")
    del result
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    return size, 1024 * (peak - before)


def _give_back() -> None:
    """Hand memory that was freed back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _kibibytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])


def main(arguments: list[str]) -> None:
    name, work, threads = arguments
    torch.set_num_threads(int(threads))
    network = next(network for network in (NETWORK, QUICK) if network.name == name)
    print(*measure(network, work))


if __name__ == "__main__":
    main(sys.argv[1:])
