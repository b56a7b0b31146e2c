"""On what the figures were measured."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("torch", "torchvision", "timm", "bnfuse")


def machine(threads: int) -> dict[str, str]:
    """Processor, cores, threads, load and versions, by what they are called."""
    versions = {package: found for package in _PACKAGES if (found := _version(package))}
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "clock": "processor time" if threads == 1 else "wall time",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load": load(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load() -> str:
    """How many processes wanted to run, on average over the last minute."""
    try:
        return f"{os.getloadavg()[0]:.2f}"
    except (OSError, AttributeError):  # not every system says
        return "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
