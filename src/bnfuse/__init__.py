"""bnfuse removes batch normalisation from trained PyTorch models, exactly, and proves it."""

from bnfuse.api import fuse, plan
from bnfuse.changes import Decision
from bnfuse.checkpoint.files import load, save
from bnfuse.checkpoint.hub import from_pretrained, register_with_transformers
from bnfuse.checkpoint.original import unfuse
from bnfuse.checkpoint.structure import Structure, restructure, structure
from bnfuse.equalisation.equalising import equalise
from bnfuse.errors import (
    BnFuseError,
    CheckpointError,
    FusionError,
    InputError,
    NothingFusedWarning,
    SpecError,
    VerificationError,
)
from bnfuse.fusion_plan import Plan
from bnfuse.model.calls import Call
from bnfuse.pair import fuse_pair
from bnfuse.planner.options import Options
from bnfuse.reasons import Reason
from bnfuse.reporting.report import report
from bnfuse.verify.compare import compare
from bnfuse.verify.comparison import Comparison

__all__ = [
    "BnFuseError",
    "Call",
    "CheckpointError",
    "Comparison",
    "Decision",
    "FusionError",
    "InputError",
    "NothingFusedWarning",
    "Options",
    "Plan",
    "Reason",
    "SpecError",
    "Structure",
    "VerificationError",
    "compare",
    "equalise",
    "from_pretrained",
    "fuse",
    "fuse_pair",
    "load",
    "plan",
    "register_with_transformers",
    "report",
    "restructure",
    "save",
    "structure",
    "unfuse",
]
