"""What a model is built of, without what fusing changes: the same for a fused model and for a fresh one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping

from torch import Tensor, nn

from bnfuse.model import tree

_SETTINGS = (
    "stride", "padding", "dilation", "groups", "output_padding", "padding_mode", "kernel_size", "in_channels",
    "out_channels", "in_features", "out_features", "num_features", "eps", "normalized_shape", "num_groups",
    "num_channels", "negative_slope", "alpha", "beta", "threshold", "value", "min_val", "max_val", "lower", "upper",
    "approximate", "ceil_mode", "count_include_pad", "divisor_override", "return_indices", "output_size", "size",
    "scale_factor", "mode", "align_corners", "upscale_factor", "downscale_factor", "dim", "start_dim", "end_dim",
    "num_heads", "embed_dim", "batch_first", "input_size", "hidden_size", "num_layers", "bidirectional", "proj_size",
    "num_embeddings", "embedding_dim", "padding_idx", "norm_first",
)  # fmt: skip
"""Attributes of PyTorch's own layers that decide what they compute, and that fusing leaves alone."""


def architecture(model: nn.Module, norms: Collection[str], created: Mapping[str, Collection[str]]) -> dict[str, str]:
    """One line for each module outside of the norms: its class, and a hash of its settings and shapes.

    >>> architecture(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2)), {"1"}, {})
    {'': 'Sequential 44136fa3', '0': 'ReLU 44136fa3'}

    Args:
        norms: the names of the norms that are gone, or are to go.
        created: the parameters that fusing creates, by the name of their module; they are left out.
    """
    inside = tuple(f"{name}." for name in norms)
    return {
        name: f"{type(module).__name__} {_digest(module, created.get(name, ()))}"
        for name, module in tree.named_modules(model)
        if name not in norms and not name.startswith(inside)
    }


def _digest(module: nn.Module, created: Collection[str]) -> str:
    said: dict[str, object] = {}
    if type(module).__module__.startswith("torch.nn."):
        settings = {name: getattr(module, name) for name in _SETTINGS if name in module.__dict__}
        said = {name: _plain(value) for name, value in settings.items() if _is_plain(value)}
    saved = {name: it for name, it in module._buffers.items() if name not in module._non_persistent_buffers_set}
    tensors: list[tuple[str, Tensor | None]] = [*module._parameters.items(), *saved.items()]
    said |= {f"tensor {name}": list(it.shape) for name, it in tensors if it is not None and name not in created}
    text = json.dumps(said, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _plain(value: object) -> object:
    """As JSON has it; numbers that are equal are written alike."""
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, (bool, int, float)) else value
