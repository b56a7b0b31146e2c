"""Naming and building models: from a SPEC such as ``timm:resnet18`` to a module with weights.

A SPEC is ``torchvision:NAME``, ``timm:NAME``, ``pytorchcv:NAME``, ``package.module:factory`` or
``path/to/file.py:factory``. Nothing is ever downloaded: without a weights file the weights are random.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bnfuse.errors import SpecError

_FORMS = "torchvision:NAME, timm:NAME, pytorchcv:NAME, package.module:factory or path/to/file.py:factory"
ZOOS = ("torchvision", "timm", "pytorchcv")
_LISTED = 3
_SMALL = 0.1


def build(spec: str, weights: str | Path | None = None, options: Mapping[str, Any] = MappingProxyType({})) -> nn.Module:
    """Build the model that ``spec`` names.

    Args:
        spec: ``torchvision:NAME``, ``timm:NAME``, ``pytorchcv:NAME``, ``package.module:factory`` or
            ``path/to/file.py:factory``. A factory is called without arguments; a module is taken as it is.
        weights: a ``.safetensors`` file, or a state dict saved with ``torch.save``, which may lie under the
            key ``state_dict``, ``model`` or ``model_state_dict``. None leaves the random weights.
        options: further keyword arguments of the constructor.

    Returns:
        The model as its constructor leaves it, with the weights loaded.

    Raises:
        SpecError: the SPEC names nothing that can be built, or the weights cannot be read or do not fit; the
            message is one line and says what to do.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise SpecError(f"{spec!r} does not name a model: write {_FORMS}")
    if source in _ZOOS:
        builder = _ZOOS[source](name)
        search_path = None
    elif source.endswith(".py"):
        search_path = Path(source).resolve().parent
        builder = _from_file(source, name, search_path)
    else:
        search_path = Path.cwd()
        builder = _from_module(source, name, search_path)
    with _importable_from(search_path):
        try:
            model = builder(**options)
        except Exception as error:
            raise SpecError(f"{spec}: building the model failed: {_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise SpecError(f"{spec} made a {type(model).__name__}, where a torch.nn.Module was expected")
    if weights is not None:
        load_weights(model, weights)
    return model


def is_zoo(spec: str) -> bool:
    """Whether ``spec`` names a model of a zoo, and not a factory of the caller's own."""
    return spec.rpartition(":")[0] in _ZOOS


def names(zoo: str) -> list[str]:
    """Every model name of a zoo, in its own order.

    Args:
        zoo: torchvision, timm or pytorchcv.

    Raises:
        SpecError: there is no such zoo, or it is not installed.
    """
    if zoo == "torchvision":
        return list(_import_zoo("torchvision.models").list_models())
    if zoo == "timm":
        return list(_import_zoo("timm").list_models())
    if zoo == "pytorchcv":
        return list(_import_zoo("pytorchcv.model_provider")._models)
    raise SpecError(f"{zoo!r} is no zoo{_suggestion(zoo, _ZOOS) or '; there are ' + ', '.join(_ZOOS)}")


def family(spec: str) -> str:
    """The file of a zoo that a model comes from, such as ``resnet`` or ``detection.faster_rcnn``; else ``own``."""
    zoo, _, name = spec.rpartition(":")
    if zoo == "torchvision":
        path = _import_zoo("torchvision.models").get_model_builder(name).__module__
        return str(path).removeprefix("torchvision.models.")
    if zoo == "timm":
        return str(_import_zoo("timm").model_entrypoint(name).__module__.rpartition(".")[2])
    if zoo == "pytorchcv":
        return str(_import_zoo("pytorchcv.model_provider")._models[name].__module__.rpartition(".")[2])
    return "own"


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a file of weights into ``model``.

    Args:
        model: every parameter and buffer of its state dict must be in the file, and the reverse.
        path: a ``.safetensors`` file, or a state dict saved with ``torch.save``.

    Raises:
        SpecError: the file does not exist, holds more than tensors, or does not fit; the message lists the
            first few keys that are missing, left over or of another shape.
    """
    state = _read_state_dict(Path(path))
    own = {key: tensor for key, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    in_both = [key for key, tensor in state.items() if key in own and isinstance(tensor, Tensor)]
    differing = {
        key: f"{key} ({_shape(state[key])} in the file, {_shape(own[key])} in the model)"
        for key in in_both
        if state[key].shape != own[key].shape
    }
    for key in differing:
        del state[key]
    # strict=False, and judged here, because a model's own hooks may rename keys of older files while loading.
    outcome = model.load_state_dict(state, strict=False)
    given = {own[key].data_ptr() for key in in_both}  # a tied tensor may be saved under one name only
    missing = [key for key in outcome.missing_keys if key not in own or own[key].data_ptr() not in given]
    problems = {
        "missing": missing,
        "unknown to the model": outcome.unexpected_keys,
        "of another shape": list(differing.values()),
    }
    found = [f"{len(keys)} {problem}: {_first_few(keys)}" for problem, keys in problems.items() if keys]
    if found:
        raise SpecError(f"the weights in {path} do not fit the model: {'; '.join(found)}")


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


def _from_torchvision(name: str) -> Callable[[], Any]:
    models = _import_zoo("torchvision.models")
    _check_name("torchvision", name.lower(), models.list_models(), "torchvision.models.list_models()")
    builder = models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}  # no download
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    if "googlenet" in name.lower() or "inception" in name.lower():
        options["init_weights"] = False  # drawing from scipy's truncated normal takes many seconds
    return partial(builder, **options)


def _from_timm(name: str) -> Callable[[], Any]:
    timm = _import_zoo("timm")
    if not timm.is_model(name):
        _check_name("timm", name, timm.list_models(), "timm.list_models()")
    return partial(timm.create_model, name, pretrained=False)


def _from_pytorchcv(name: str) -> Callable[[], Any]:
    provider = _import_zoo("pytorchcv.model_provider")
    _check_name("pytorchcv", name.lower(), list(provider._models), "its README")
    return partial(provider.get_model, name, pretrained=False)


_ZOOS: dict[str, Callable[[str], Callable[..., Any]]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "pytorchcv": _from_pytorchcv,
}


def _import_zoo(module: str) -> Any:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or package).partition(".")[0]
        raise SpecError(f"{missing} is not installed: run pip install {missing}") from error


def _check_name(zoo: str, name: str, names: Sequence[str], listing: str) -> None:
    if name not in names:
        hint = _suggestion(name, names) or f"; {listing} names them all"
        raise SpecError(f"{zoo} has no model {name!r}{hint}")


def _from_file(path: str, name: str, search_path: Path) -> Callable[[], Any]:
    if not Path(path).is_file():
        raise SpecError(f"there is no file {path}")
    specification = importlib.util.spec_from_file_location(Path(path).stem, path)
    if specification is None or specification.loader is None:
        raise SpecError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(specification)
    # Dataclasses and pickling look a class's module up by its name.
    sys.modules.setdefault(specification.name, module)
    with _importable_from(search_path):
        try:
            specification.loader.exec_module(module)
        except Exception as error:
            raise SpecError(f"importing {path} failed: {_one_line(error)}") from error
    return _factory(module, path, name)


def _from_module(source: str, name: str, search_path: Path) -> Callable[[], Any]:
    with _importable_from(search_path):
        try:
            module = importlib.import_module(source)
        except ModuleNotFoundError as error:
            if error.name is not None and (source == error.name or source.startswith(error.name + ".")):
                hint = _suggestion(source, list(_ZOOS)) or f"; a SPEC is {_FORMS}"
                raise SpecError(f"there is no Python module {source}{hint}") from error
            raise SpecError(f"importing {source} failed: {_one_line(error)}") from error
        except Exception as error:
            raise SpecError(f"importing {source} failed: {_one_line(error)}") from error
    return _factory(module, source, name)


def _factory(module: ModuleType, source: str, name: str) -> Callable[[], Any]:
    try:
        found = reduce(getattr, name.split("."), module)
    except AttributeError as error:
        callables = [known for known, value in vars(module).items() if callable(value)]
        raise SpecError(f"{source} has no {name!r}{_suggestion(name, callables)}") from error
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise SpecError(f"{source}:{name} is a {type(found).__name__}, where a factory was expected")
    return found


@contextmanager
def _importable_from(directory: Path | None) -> Iterator[None]:
    """Let imports find modules in ``directory`` for a while, as running a script from there would."""
    if directory is None:
        yield
        return
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))


def _read_state_dict(path: Path) -> MutableMapping[str, Any]:
    if not path.is_file():
        raise SpecError(f"there is no weights file {path}")
    if path.suffix == ".safetensors":
        content = _read_safetensors(path)
    else:
        content = _read_torch_file(path)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, MutableMapping) or not all(isinstance(key, str) for key in content):
        raise SpecError(f"{path} holds a {type(content).__name__}, where a state dict was expected")
    # The prefix is left by nn.DataParallel.
    nn.modules.utils.consume_prefix_in_state_dict_if_present(content, "module.")  # type: ignore[arg-type]
    return content


def _read_safetensors(path: Path) -> object:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise SpecError(f"reading {path} takes safetensors: run pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise SpecError(f"{path} cannot be read as safetensors: {_one_line(error)}") from error


def _read_torch_file(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on TorchScript files, which are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None and "TorchScript" not in str(error):
            raise SpecError(
                f"{path} cannot be read as a state dict saved with torch.save: {_one_line(error)}"
            ) from error
        what = f"the class {refused[1]}" if refused else "a TorchScript program"
        raise SpecError(
            f"{path} holds {what} and not only tensors, and loading it would run code from the file; save "
            "the weights alone with torch.save(model.state_dict(), FILE), or pass a factory that builds the "
            "trained model as path/to/file.py:factory"
        ) from error


def _suggestion(name: str, names: Iterable[str]) -> str:
    by_lower = {known.lower(): known for known in names}
    near = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=_LISTED)]
    if not near:
        return ""
    choice = near[0] if len(near) == 1 else f"{', '.join(near[:-1])} or {near[-1]}"
    return f"; did you mean {choice}?"


def _first_few(keys: Sequence[str]) -> str:
    return ", ".join(keys[:_LISTED]) + (", ..." if len(keys) > _LISTED else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
