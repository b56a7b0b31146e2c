"""The errors that bnfuse raises: one base class, one subclass for each thing that a caller can do about it.

And the warnings.
"""


class BnFuseError(Exception):
    """Base class of every error that bnfuse raises on purpose."""


class InputError(BnFuseError):
    """The example inputs are missing, of the wrong form, or the model does not run on them.

    Attributes:
        call: the :class:`bnfuse.Call` that the model does not take, if that is the mistake.
    """

    call: object = None


class FusionError(BnFuseError):
    """A layer and a norm, or a plan and a model, do not go together."""


class VerificationError(BnFuseError):
    """The fused model does not compute what the original computes."""


class SpecError(BnFuseError):
    """A model specification names nothing that can be built."""


class CheckpointError(BnFuseError):
    """A file or a structure is damaged, or belongs to another model."""


class NothingFusedWarning(UserWarning):
    """The model that comes back has all the batch norms that it had, or had none."""


class NothingEqualisedWarning(UserWarning):
    """The model that comes back has the weights that it had."""
