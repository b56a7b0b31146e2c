"""Recording the discrete choices of a run, and repeating them in another."""

from typing import Any

import torch
from torch import Tensor

from bnfuse.model.pytree import map_tensors
from bnfuse.verify.discrete_choices import DiscreteChoices
from bnfuse.verify.measure import compare_outputs


def choices(values: Tensor) -> tuple[Any, ...]:
    first = values.clone().floor_()
    place = values.argmax()
    best = values.topk(2)
    return first, place, best.values, best.indices, values[values > 1], float(values.sum() > 3), values.max().item()


def test_a_run_repeats_the_choices_of_another() -> None:
    there, here = torch.tensor([1.0, 0.999999, 2.0, 1.999999]), torch.tensor([0.999999, 1.000001, 1.999999, 2.0])
    with torch.inference_mode():
        with DiscreteChoices() as path:
            expected = choices(there.double())
        with DiscreteChoices(path) as followed:
            found = choices(here)
        with DiscreteChoices(path) as same:
            choices(there)
    assert followed.followed_to_the_end
    assert followed.changed
    assert same.followed_to_the_end
    comparison = compare_outputs(map_tensors(expected, torch.Tensor.double), map_tensors(found, torch.Tensor.double))
    assert comparison.outputs
    assert all(not output.problem and output.max_abs < 1e-5 for output in comparison.outputs), comparison
    assert found[-2:] == expected[-2:]
    given = [tensor for tensors in followed.given for tensor in tensors]
    assert any(torch.equal(tensor, here) for tensor in given)


def test_a_run_that_makes_other_choices_does_not_follow() -> None:
    x = torch.randn(4)
    with torch.inference_mode():
        with DiscreteChoices() as path:
            x.argmax()
            x.argmin()
        with DiscreteChoices(path) as other:
            x.argmax()
            x.sort()
        with DiscreteChoices(path) as shorter:
            x.argmax()
    assert not other.followed_to_the_end
    assert not shorter.followed_to_the_end
