"""What is known of an original model on one call: its outputs, its rounding errors and its discrete choices.

Each of these takes a run of the whole model, or several, so each is found out when it is first asked for and kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.model import tree
from bnfuse.model.copying import copy_model
from bnfuse.model.describe import first_line
from bnfuse.model.pytree import map_tensors
from bnfuse.model.sandbox import is_writable, run, run_either_way
from bnfuse.verify.comparison import Comparison
from bnfuse.verify.constants import Constants
from bnfuse.verify.discrete_choices import DiscreteChoices
from bnfuse.verify.float64 import InFloat64, float64_copy, to_float64
from bnfuse.verify.measure import compare_outputs

_log = logging.getLogger(__name__)

_NOISE_RUNS = 4
_UNKNOWN = object()


@dataclass(frozen=True)
class Path:
    """One run of a model that made discrete choices: the choices, and the output that they led to."""

    choices: DiscreteChoices
    output: Any


class Reference:
    """The original model on one call.

    Args:
        original: the model, which is not changed.
        args, kwargs: the arguments of the call.
        seed: of the random generators during the call.
        output: what the original gives on the call, if that is known.
        gradients: whether it runs with gradients tracked, None if that is not known; see `bnfuse.model.sandbox.run`.

    Attributes:
        inputs: (args, kwargs) of the call.
        in_float64: the mode under which a float64 model runs in float64 throughout.
    """

    def __init__(
        self,
        original: nn.Module,
        args: Iterable[Any],
        kwargs: Mapping[str, Any],
        seed: int = 0,
        output: Any = _UNKNOWN,
        gradients: bool | None = None,
    ) -> None:
        self.gradients = gradients
        self.original, self.inputs, self.seed = original, (tuple(args), dict(kwargs)), seed
        self.in_float64 = InFloat64()
        if output is not _UNKNOWN:
            self.output = output

    @cached_property
    def precision(self) -> torch.dtype:
        """The coarsest floating dtype among the original's parameters."""
        held = (tensor for module in tree.modules(self.original) for tensor in module._parameters.values())
        dtypes = {tensor.dtype for tensor in held if tensor is not None and tensor.is_floating_point()}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)

    def run(self, model: nn.Module, choices: DiscreteChoices | None = None) -> Any:
        """What a model gives on the call, while its choices are recorded or replaced."""
        args, kwargs = self.inputs
        return run(model, args, kwargs, self.seed, choices, gradients=self._known_gradients)

    def run_in_float64(self, model: nn.Module, choices: DiscreteChoices | None = None) -> Any:
        """What a float64 model gives on the inputs in float64, while its choices are recorded or replaced."""
        args, kwargs = map_tensors(self.inputs, to_float64)
        self.in_float64.lifted = []
        constants = Constants(model, self.constants) if self.constants.made else None
        return run(
            model, args, kwargs, self.seed, _all(self.in_float64, constants, choices), gradients=self._known_gradients
        )

    @cached_property
    def constants(self) -> Constants:
        """The constants that the original's code makes in its own precision."""
        constants = Constants(self.original)
        run(self.original, *self.inputs, self.seed, constants, gradients=self._known_gradients)
        return constants

    @cached_property
    def output(self) -> Any:
        """What the original gives in its own precision."""
        args, kwargs = self.inputs
        if self.gradients is not None:
            return run(self.original, args, kwargs, self.seed, gradients=self.gradients)
        output, self.gradients = run_either_way(self.original, args, kwargs, self.seed)
        return output

    @property
    def _known_gradients(self) -> bool | None:
        """Whether gradients are tracked. A mode must see one run, not two, so that must be known before."""
        if self.gradients is None:
            self.output  # noqa: B018 (which finds out)
        return self.gradients

    @cached_property
    def exact(self) -> tuple[Any, list[float], str]:
        """What the original gives in float64.

        Returns:
            The output; `InFloat64.lifted` of the run; and why there is no output, or "".
        """
        try:
            output = self.run_in_float64(float64_copy(self.original))
        except Exception as error:  # noqa: BLE001 - the model's own code, which may insist on another dtype
            return None, [], first_line(error)
        return output, self.in_float64.lifted, ""

    @cached_property
    def exact_noise(self) -> list[Comparison]:
        """What rounding does to the original in float64."""
        return noise(float64_copy(self.original), self.exact[0], self.run_in_float64)

    @cached_property
    def own_error(self) -> Comparison:
        """How far the original in its own precision is from float64."""
        return compare_in_float64(self.exact[0], self.output)

    @cached_property
    def own_noise(self) -> list[Comparison]:
        """How far the original in its own precision is from float64 with its parameters rounded otherwise."""
        return noise(copy_model(self.original), self.exact[0], self.run)

    @cached_property
    def noise(self) -> list[Comparison]:
        """What rounding does to the original in its own precision; needs no float64."""
        return noise(copy_model(self.original), self.output, self.run)

    @cached_property
    def path(self) -> Path:
        """The discrete choices of the original in float64, and its output."""
        choices = DiscreteChoices()
        output = self.run_in_float64(float64_copy(self.original), choices)
        return Path(choices, output)

    def follow(self, run: Callable[[nn.Module, DiscreteChoices], Any], model: nn.Module) -> Comparison | None:
        """Compare a model with the original in float64 while the model makes the original's discrete choices.

        Args:
            run: `run` or `run_in_float64`.

        Returns:
            The outputs compared, and the numbers that choices were made from; None if the model cannot follow.
        """
        choices = DiscreteChoices(self.path.choices)
        try:
            output = run(model, choices)
        except Exception as error:  # noqa: BLE001 - the model's own code, for which the choices may make no sense
            _log.debug("a model cannot make the choices of the original: %s", first_line(error))
            return None
        if not choices.followed_to_the_end:
            return None
        return compare_in_float64((self.path.output, self.path.choices.given), (output, choices.given))

    @cached_property
    def own_error_on_path(self) -> Comparison | None:
        """How far the original in its own precision is from float64 when it makes the same choices."""
        return self.follow(self.run, self.original)

    @cached_property
    def own_noise_on_path(self) -> list[Comparison]:
        """How far it is then from float64 with its parameters rounded otherwise."""
        return self._noise_on_path(self.run, copy_model(self.original))

    @cached_property
    def exact_noise_on_path(self) -> list[Comparison]:
        """What rounding does to the original in float64 when it makes the same choices."""
        return self._noise_on_path(self.run_in_float64, float64_copy(self.original))

    def _noise_on_path(self, run: Callable[[nn.Module, DiscreteChoices], Any], model: nn.Module) -> list[Comparison]:
        def run_on_path(model: nn.Module) -> Any:
            choices = DiscreteChoices(self.path.choices)
            return run(model, choices), choices.given

        return noise(model, (self.path.output, self.path.choices.given), run_on_path)


def noise(model: nn.Module, expected: object, run: Callable[[nn.Module], Any]) -> list[Comparison]:
    """Compare ``expected`` with outputs of a model whose parameters are moved by one unit in the last place.

    Integral values in floating buffers stay: they may be indices or masks.

    Args:
        model: a copy that may be written to.
        run: gives the output of the model.
    """
    generator = torch.Generator().manual_seed(0)
    held: list[Tensor] = [*model.parameters(), *model.buffers()]
    movable = [(t, t.detach().double()) for t in held if t.is_floating_point() and is_writable(t)]
    comparisons = []
    for _ in range(_NOISE_RUNS):
        for tensor, exact in movable:
            signs = torch.randint(0, 2, exact.shape, generator=generator, device="cpu").to(exact) * 2 - 1
            moved = exact * (1 + torch.finfo(tensor.dtype).eps * signs)
            if not isinstance(tensor, nn.Parameter):
                moved = torch.where(exact == exact.round(), exact, moved)
            with torch.no_grad():
                tensor.copy_(moved)
        comparisons.append(compare_in_float64(expected, run(model)))
    return comparisons


def compare_in_float64(expected: object, got: object) -> Comparison:
    """Compare the values of outputs whose dtypes may differ."""
    return compare_outputs(map_tensors(expected, to_float64), map_tensors(got, to_float64))


@contextmanager
def _all(*contexts: AbstractContextManager[object] | None) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            if context is not None:
                stack.enter_context(context)
        yield
