"""Weights and norms with random contents that are far from the identity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SMALL = 0.1


def randomise_(model: nn.Module, seed: int = 0, dead: float = 0.02) -> nn.Module:
    """Randomise the statistics and affine parameters of every batch norm, in place.

    A fresh batch norm is nearly the identity, so that a wrong fold goes unnoticed. Afterwards means and
    biases are normal with a standard deviation of 0.3, the variances lie between 0.5 and 2, and the weights
    between 0.5 and 1.5 in magnitude with a random sign, a few exactly zero.

    >>> norm = randomise_(torch.nn.BatchNorm2d(4))
    >>> bool(((norm.running_var > 0.5) & (norm.running_var < 2)).all())
    True

    Args:
        model: any module; norms are known by their running statistics, or by PyTorch's own classes.
        seed: of a generator of its own; the global random state is left alone.
        dead: the share of weights that are exactly zero, 0 to 1.

    Returns:
        The same model.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return 0.3 * torch.randn(like.shape, generator=generator)

    def variance(like: Tensor) -> Tensor:
        return 0.5 + 1.5 * torch.rand(like.shape, generator=generator)

    def signed_weight(like: Tensor) -> Tensor:
        magnitude = 0.5 + torch.rand(like.shape, generator=generator)
        sign = torch.rand(like.shape, generator=generator).sub_(0.5).sign_()
        alive = torch.rand(like.shape, generator=generator) >= dead
        return magnitude * sign * alive

    values = {
        "running_mean": normal,
        "running_var": variance,
        "weight": signed_weight,
        "bias": normal,
    }
    with torch.no_grad():
        for norm in _norms(model):
            for name, make in values.items():
                tensor = getattr(norm, name, None)
                if isinstance(tensor, Tensor):
                    tensor.copy_(make(tensor))
    return model


def calibrate_(model: nn.Module, *args: Any, floor: float = 0.0) -> Any:
    """Set the statistics of every batch norm from one run, in place, so that activations stay as large as in training.

    Args:
        model: any module; only its batch norms work as in training, and only during the run.
        args: its positional arguments, with at least two samples.
        floor: no variance becomes smaller than this share, 0 to 1, of the mean variance of its norm: a few samples
            may agree on a channel by chance, and others would then be blown up.

    Returns:
        What the model returned.

    Raises:
        Exception: whatever the model raises; then the statistics may be those of half a run.
    """
    norms = [module for module in _norms(model) if isinstance(getattr(module, "running_var", None), Tensor)]
    trainable = [norm for norm in norms if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    flags = [(norm, norm.momentum, norm.training) for norm in trainable]
    frozen = [norm for norm in norms if not isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(_take_statistics) for norm in frozen]
    try:
        for norm in trainable:
            norm.momentum, norm.training = 1.0, True
        with torch.no_grad():
            output = model(*args)
    finally:
        for norm, momentum, training in flags:
            norm.momentum, norm.training = momentum, training
        for hook in hooks:
            hook.remove()
    for module in norms:
        assert isinstance(module.running_var, Tensor)
        module.running_var.clamp_(min=floor * float(module.running_var.mean()))
    return output


def _take_statistics(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    """For norms that work on fixed statistics even in training (frozen ones)."""
    x = args[0].transpose(0, 1).flatten(1)  # (channels, everything else)
    assert isinstance(norm.running_mean, Tensor)
    assert isinstance(norm.running_var, Tensor)
    norm.running_mean.copy_(x.mean(1))
    norm.running_var.copy_(x.var(1))


def wake_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make different numbers of all parameters whose elements are all the same, in place.

    Zoos begin with biases, gains and last layers of 0 or 1, behind which a wrong fold goes unnoticed. A small number
    (0, or the 1e-6 of a LayerScale) becomes about 0.1 in magnitude, with a random sign; another is moved by up to a
    fifth. The norms are left to :func:`randomise_`.

    >>> bool((wake_(torch.nn.LayerNorm(4)).bias != 0).all())
    True

    Args:
        model: any module.
        seed: of a generator of its own; the global random state is left alone.

    Returns:
        The same model.
    """
    generator = torch.Generator().manual_seed(seed)
    own = {id(parameter) for norm in _norms(model) for parameter in norm.parameters(recurse=False)}
    with torch.no_grad():
        for parameter in model.parameters():
            trained = parameter.requires_grad and parameter.is_floating_point()
            if id(parameter) in own or not trained or not parameter.numel():
                continue
            value = float(parameter.flatten()[0])
            if bool((parameter == value).all()):
                noise = torch.rand(parameter.shape, generator=generator)
                if abs(value) < _SMALL:
                    sign = torch.rand(parameter.shape, generator=generator).sub_(0.5).sign_()
                    parameter.copy_(_SMALL * (0.5 + noise) * sign)
                else:
                    parameter.copy_(value * (0.8 + 0.4 * noise))
    return model


def _norms(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        statistics = (getattr(module, "running_mean", None), getattr(module, "running_var", None))
        known = isinstance(module, nn.modules.batchnorm._NormBase)
        if known or all(isinstance(tensor, Tensor) for tensor in statistics):
            yield module
