"""Whether the parameters of a fused model are those of the same fusion in float64, rounded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bnfuse.model.describe import dtype_name


def wrongly_rounded(fused: nn.Module, in_float64: nn.Module) -> str:
    """Describe the first parameter that is not the float64 one rounded to its own dtype; "" if all are.

    An error of two units in the last place is allowed, and one of the smallest positive number.

    Args:
        fused: the fused model in its own precision.
        in_float64: a float64 copy of the original, fused in the same way.
    """
    values, exact = (dict(_rewritable(model)) for model in (fused, in_float64))
    if values.keys() != exact.keys():
        return f"  parameters of only one of the two: {', '.join(sorted(values.keys() ^ exact.keys()))}"
    for name, value in values.items():
        limits = torch.finfo(value.dtype)
        expected, got = exact[name].detach().double(), value.detach().double()
        if expected.shape != got.shape:
            shapes = tuple(expected.shape), tuple(got.shape)
            return f"  parameter: {name}\n  expected:  shape {shapes[0]}\n  got:       shape {shapes[1]}"
        allowed = 2 * limits.eps * expected.abs() + limits.tiny * limits.eps
        wrong = ~(((got - expected).abs() <= allowed) | (got == expected) | (got.isnan() & expected.isnan()))
        if wrong.any():
            index = tuple(wrong.nonzero()[0].tolist())
            return (
                f"  parameter: {name}, {dtype_name(value.dtype)}, at {list(index)}\n"
                f"  expected:  {float(expected[index])!r}\n"
                f"  got:       {float(got[index])!r}"
            )
    return ""


def _rewritable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What fusing may write to: floating parameters, and the statistics of norms that stay."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        statistic = name.endswith(("running_mean", "running_var"))
        if tensor.is_floating_point() and (isinstance(tensor, nn.Parameter) or statistic):
            yield name, tensor
