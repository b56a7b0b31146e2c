"""Naming, building and preparing models: what the command line, the census and the benchmarks work on.

A SPEC such as ``timm:resnet18`` becomes a module (:mod:`~bnfuse.tools.zoo.specs`), with weights from a file
(:mod:`~bnfuse.tools.zoo.weights`) or with random contents that are far from a fresh model's
(:mod:`~bnfuse.tools.zoo.randomise`), and gets inputs (:mod:`~bnfuse.tools.zoo.inputs`). Nothing here is used by
``bnfuse.fuse``, and nothing is ever downloaded.
"""

from bnfuse.tools.zoo.randomise import calibrate_, randomise_, wake_
from bnfuse.tools.zoo.specs import ZOOS, build, family, is_zoo, names
from bnfuse.tools.zoo.weights import load_weights

__all__ = ["ZOOS", "build", "calibrate_", "family", "is_zoo", "load_weights", "names", "randomise_", "wake_"]
