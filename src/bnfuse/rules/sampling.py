r"""Sampling an image: patches of it as columns and back (``F.unfold``, ``F.fold``), and samples at given places.

The columns of ``unfold`` are (channels * taps) rows of patches; a channel's units are those of all its taps. ``fold``
adds up what lies at the same place: a scale passes, and a shift only where patches tile the image, so that nothing
is added. Zeros that pad an image stay zeros under a scale and not under a shift. ``grid_sample`` takes averages of
pixels, with weights that sum to one unless it samples zeros outside of the image.
"""

from __future__ import annotations

from math import prod

from torch import Tensor

from bnfuse import reasons
from bnfuse.graph.graph import Node, Value
from bnfuse.rules.registry import Trial, forbid, link, rule
from bnfuse.units import Unit


@rule("im2col")
def unfold(node: Node, trial: Trial) -> None:
    """The units of a channel are those of all its taps: patches are copies.

    Uniform over positions; a shift only without padded zeros.
    """
    x, y = node.inputs[0], node.outputs[0]
    _patches(node, trial, x, y, exact=not any(node.bound["padding"]), adds=False)


@rule("col2im")
def fold(node: Node, trial: Trial) -> None:
    """The units of a channel are those of all its taps; where patches overlap they add up.

    Uniform over positions; a shift only if the patches tile the image.
    """
    columns, image = node.inputs[0], node.outputs[0]
    kernel = node.bound["kernel_size"]
    tiles = list(kernel) == list(node.bound["stride"]) and all(step == 1 for step in node.bound["dilation"])
    tiles = tiles and not any(node.bound["padding"]) and columns.elements == image.elements
    _patches(node, trial, image, columns, exact=tiles, adds=True)


def _patches(node: Node, trial: Trial, image: Value, columns: Value, exact: bool, adds: bool) -> None:
    """Tie an image (batch, channels, height, width) to its columns (batch, channels * taps, patches)."""
    taps = prod(node.bound["kernel_size"])
    axis = len(image.shape) - 3

    def checked(unit: Unit, spatial: set[int]) -> Unit:
        if unit.axes() & spatial:
            trial.refuse_unit(node, unit, reasons.POSITIONS_DIFFER)
        if unit.shift is not None:
            if not exact:
                why = reasons.PATCHES_OVERLAP if adds else reasons.PADS_WITH_ZEROS
                trial.refuse_shift(node, reasons.NO_SHIFT_SINCE, why=why.reason())
            trial.assume(node)  # that its patches tile the image at every size
        return unit

    def to_columns(unit: Unit) -> Unit:
        def spread(tensor: Tensor) -> Tensor:
            tensor = tensor.squeeze(axis + 2)
            return tensor.repeat_interleave(taps, axis) if tensor.shape[axis] > 1 else tensor

        return checked(unit, {axis + 1, axis + 2}).map(spread)

    def to_image(unit: Unit) -> Unit:
        def first(tensor: Tensor) -> Tensor:
            tensor = tensor.unsqueeze(axis + 2)
            return tensor[(slice(None),) * axis + (slice(None, None, taps),)] if tensor.shape[axis] > 1 else tensor

        return checked(unit, {axis + 1}).map(first)

    of_columns = trial.unit(columns)
    if of_columns is not None and not to_columns(to_image(of_columns)).same_as(of_columns):
        trial.refuse(node, reasons.TAPS_DIFFER)
    link(trial, image, columns, to_columns, to_image)


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def sample(node: Node, trial: Trial) -> None:
    """Units that are uniform over positions: its weights sum to one.

    No shift if it samples zeros outside of the image. The grid stays as it is.
    """
    x, grid = node.inputs
    forbid(node, trial, [grid], reasons.GRID_IS_FIXED)

    def checked(unit: Unit) -> Unit:
        if unit.axes() - {0, 1}:
            trial.refuse_unit(node, unit, reasons.AVERAGED_DIFFER)
        if unit.shift is not None and node.bound["padding_mode"] == 0:
            trial.refuse_shift(node, reasons.SAMPLES_ZEROS)
        return unit

    link(trial, x, node.outputs[0], checked, checked)
