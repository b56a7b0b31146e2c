"""The errors that bnfuse raises: one base class, one subclass for each thing that a caller can do about it."""


class BnFuseError(Exception):
    """Base class of every error that bnfuse raises on purpose."""


class InputError(BnFuseError):
    """The example inputs are missing, of the wrong form, or the model does not run on them."""


class NoNormError(BnFuseError):
    """The model holds no batch norm."""


class FusionError(BnFuseError):
    """A layer and a norm, or a plan and a model, do not go together."""


class VerificationError(BnFuseError):
    """The fused model does not compute what the original computes."""


class SpecError(BnFuseError):
    """A model specification names nothing that can be built."""
