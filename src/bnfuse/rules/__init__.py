"""What every known operator does to units: one file for each family, one registry.

A rule knows units and the graph, never a module, and writes to no tensor. Each file opens with the derivation of its
family. Rules are found: a new file in this folder is read without being listed anywhere.
"""

import importlib
import pkgutil

from bnfuse.rules.registry import ABSORBERS, RULES

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = ["ABSORBERS", "RULES"]
