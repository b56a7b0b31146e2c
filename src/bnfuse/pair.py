"""One layer and one norm: the function that people copy from blog posts, with the whole algebra behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bnfuse.analysis.norms import is_norm
from bnfuse.api import fuse_with_plan
from bnfuse.errors import BnFuseError, FusionError
from bnfuse.transaction import rewrite


def fuse_pair(layer: nn.Module, norm: nn.Module, inplace: bool = False) -> nn.Module:
    """Fold a batch norm into the convolution, transposed convolution or linear layer that feeds it.

    Args:
        layer: ``nn.Conv1d/2d/3d``, ``nn.ConvTranspose1d/2d/3d``, ``nn.Linear`` or a subclass, in evaluation mode.
        norm: the norm that reads the layer's output and nothing else does, in evaluation mode.
        inplace: change ``layer`` itself instead of a copy.

    Returns:
        A layer of the same class that computes ``norm(layer(x))``, with
        ``weight' = weight * a``, ``bias' = bias * a + c`` with ``a = gamma / sqrt(running_var + eps)`` and
        ``c = beta - running_mean * a`` (``torch.nn.utils.fuse_conv_bn_eval``).

    Raises:
        FusionError: the two do not go together, one is in training mode, or the norm has no running statistics.

    >>> fuse_pair(nn.Linear(3, 4).eval(), nn.BatchNorm1d(4).eval())
    Linear(in_features=3, out_features=4, bias=True)
    """
    inputs = _example(layer)
    _check(layer, norm)
    pair = nn.Sequential(layer, norm)
    try:
        fused, made = fuse_with_plan(pair, inputs)
        decision = made.decisions[0]
        if not decision.fused:
            raise FusionError(f"{_names(layer, norm)} cannot be fused: {'; '.join(map(str, decision.reasons))}")
        if decision.direction != "backward" or any(name.startswith("1") for edit in made.edits for name in edit.names):
            raise FusionError(f"{_names(layer, norm)} cannot be fused: the layer cannot take the norm up.")
        if made.replacements[0].keep:
            raise FusionError(
                f"{type(norm).__name__} has an activation built in, which a layer cannot take up. Call bnfuse.fuse on "
                f"the module that holds both: the activation stays in the place of the norm."
            )
    except FusionError:
        raise
    except BnFuseError as error:
        raise FusionError(f"{_names(layer, norm)} cannot be fused: {error}") from error
    if not inplace:
        return fused.get_submodule("0")
    rewrite(made, pair)
    return layer


def _names(layer: nn.Module, norm: nn.Module) -> str:
    return f"{type(layer).__name__} and {type(norm).__name__}"


def _example(layer: nn.Module) -> torch.Tensor:
    """The smallest input that the layer takes."""
    reference = next(layer.parameters(), torch.empty(0, device="cpu"))
    options: dict[str, Any] = {"dtype": reference.dtype, "device": reference.device}
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        shape = [2, layer.in_features]
    elif isinstance(layer, _ConvNd):
        sizes = [2] * len(layer.kernel_size)
        if not isinstance(layer, _ConvTransposeNd):
            padding = [0] * len(sizes) if isinstance(layer.padding, str) else layer.padding
            sizes = [
                max(d * (k - 1) + 1, p + 1) for k, d, p in zip(layer.kernel_size, layer.dilation, padding, strict=True)
            ]
        shape = [2, layer.in_channels, *sizes]
    else:
        raise FusionError(
            f"A convolution, a transposed convolution or a linear layer can take up a norm; "
            f"got {type(layer).__name__}. For anything else call bnfuse.fuse on the module that holds both."
        )
    return torch.randn(shape, generator=generator, device="cpu").to(**options)


def _check(layer: nn.Module, norm: nn.Module) -> None:
    if not is_norm(norm):
        raise FusionError(f"The second argument must be a batch norm; got {type(norm).__name__}.")
    for module in (layer, norm):
        if module.training:
            raise FusionError(
                f"{type(module).__name__} is in training mode, where the norm uses the statistics of the batch. "
                f"Call .eval() on it first."
            )
    if getattr(norm, "running_mean", None) is None or getattr(norm, "running_var", None) is None:
        raise FusionError(
            f"{type(norm).__name__} has no running statistics (track_running_stats=False), so there is nothing fixed "
            f"to fold. Train it with statistics, or keep it."
        )
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    channels = norm.running_mean.numel()  # type: ignore[operator]
    if outputs != channels:
        raise FusionError(
            f"The channels of {_names(layer, norm)} do not match:\n  got:      {channels} channels in the norm\n"
            f"  expected: {outputs}, the outputs of the layer"
        )
    wanted = {nn.BatchNorm1d: (0, 1), nn.BatchNorm2d: (2,), nn.BatchNorm3d: (3,)}
    rank = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)  # type: ignore[arg-type]
    for kind, ranks in wanted.items():
        if isinstance(norm, kind) and isinstance(norm, _BatchNorm) and rank not in ranks:
            raise FusionError(
                f"{type(norm).__name__} cannot follow {type(layer).__name__}: their numbers of axes differ."
            )
