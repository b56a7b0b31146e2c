"""bnfuse removes batch normalisation from trained PyTorch models, exactly, and proves it."""

from bnfuse.api import fuse, plan
from bnfuse.errors import (
    BnFuseError,
    FusionError,
    InputError,
    NoNormError,
    SpecError,
    VerificationError,
)
from bnfuse.pair import fuse_pair
from bnfuse.plan import Decision, Plan, Reason
from bnfuse.verify import Comparison, compare

__all__ = [
    "BnFuseError",
    "Comparison",
    "Decision",
    "FusionError",
    "InputError",
    "NoNormError",
    "Plan",
    "Reason",
    "SpecError",
    "VerificationError",
    "compare",
    "fuse",
    "fuse_pair",
    "plan",
]
