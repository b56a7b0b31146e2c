"""What every known operator does to units: one file for each family, one registry."""

from bnfuse.rules import (
    activation,
    attention,
    einsum,
    joining,
    layers,
    norms,
    padding,
    passing,
    patches,
    picking,
    places,
    pooling,
    products,
    recurrent,
    shapes,
    sums,
)
from bnfuse.rules.registry import ABSORBERS, RULES

__all__ = [
    "ABSORBERS",
    "RULES",
    "activation",
    "attention",
    "einsum",
    "joining",
    "layers",
    "norms",
    "padding",
    "passing",
    "patches",
    "picking",
    "places",
    "pooling",
    "products",
    "recurrent",
    "shapes",
    "sums",
]
