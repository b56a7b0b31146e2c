"""Shell completion of the command line: scripts that shtab makes from the parser."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from typing import Any

SHELLS = ("bash", "zsh", "fish")

_FILES = frozenset({"spec", "input", "weights", "output", "report", "onnx"})
"""The arguments that may be files."""


class PrintCompletion(argparse.Action):
    """``--print-completion SHELL``: print the script for a shell, and end."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        try:
            shtab = importlib.import_module("shtab")
        except ModuleNotFoundError:
            parser.error("--print-completion takes the package shtab: run pip install 'bnfuse[cli]'")
        for action in _actions(parser):
            if action.dest in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # where shtab looks
        sys.stdout.write(shtab.complete(parser, values) + "\n")
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
