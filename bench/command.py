"""``python -m bench [SECTION ...]``: measure, print tables, and write everything to a JSON file."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import beside, compiling, fusing, growth, int8, latency, memory, restructuring
from bench.machine import load, machine
from bench.section import Section, Settings, progress
from bnfuse.printing.text import table_text

SECTIONS: dict[str, Callable[[Settings], Section]] = {
    "latency": latency.run,
    "compile": compiling.run,
    "fusing": fusing.run,
    "memory": memory.run,
    "growth": growth.run,
    "int8": int8.run,
    "restructuring": restructuring.run,
    "beside": beside.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections.

    Returns:
        0 if every target that was measured is met, 1 if not, 2 if there was nothing to measure.
    """
    options = _parser().parse_args(arguments)
    settings = Settings(options.networks, options.repeat, options.threads, options.quick)
    about = machine(settings.threads)
    print("\n".join(f"{name:12} {value}" for name, value in about.items()), end="\n\n", flush=True)
    document: dict[str, Any] = {"machine": about, "settings": vars(settings), "sections": {}}
    met, measured = True, False
    for name in options.sections or SECTIONS:
        started = time.perf_counter()
        section = SECTIONS[name](settings)
        measured |= bool(section.tables)
        for table in section.tables:
            print(table_text(table), end="\n\n")
        for target in section.targets:
            print(target)
            met &= target.met is not False
        print(flush=True)
        seconds = time.perf_counter() - started
        progress(f"{name} took {seconds:.0f} s, load now {load()}")
        document["sections"][name] = {
            "seconds": round(seconds, 1),
            "load at its end": load(),
            "targets": [target.to_dict() for target in section.targets],
            **section.data,
        }
        # After every section, so that little is lost when a later one is interrupted.
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if not measured:
        progress(f"python -m bench: --networks {settings.networks!r} matches nothing that was to be measured")
        return 2
    progress(f"written to {options.json}")
    return 0 if met else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", choices=[[], *SECTIONS], help=", ".join(SECTIONS))
    parser.add_argument("--networks", default="*", metavar="GLOB", help="only these, such as 'resnet*' or 'timm:*'")
    parser.add_argument("--repeat", type=_positive, metavar="N", help="rounds; each section has its own default")
    parser.add_argument("--threads", type=_positive, default=1, metavar="N", help="of PyTorch's operators (1)")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), metavar="FILE", help="(bench.json)")
    parser.add_argument("--quick", action="store_true", help="small networks, few rounds: only to see that it runs")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than one")
    return number
