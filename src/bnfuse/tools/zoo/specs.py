"""Naming and building models: from a SPEC such as ``timm:resnet18`` to a module with weights.

A SPEC is ``torchvision:NAME``, ``timm:NAME``, ``pytorchcv:NAME``, ``package.module:factory`` or
``path/to/file.py:factory``. Nothing is ever downloaded: without a weights file the weights are random.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from torch import nn

from bnfuse.errors import SpecError
from bnfuse.model.describe import one_line
from bnfuse.tools.zoo.weights import load_weights

_FORMS = "torchvision:NAME, timm:NAME, pytorchcv:NAME, package.module:factory or path/to/file.py:factory"
ZOOS = ("torchvision", "timm", "pytorchcv")
_LISTED = 3


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
            raise SpecError(f"{spec}: building the model failed: {one_line(error)}") from error
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
            raise SpecError(f"importing {path} failed: {one_line(error)}") from error
    return _factory(module, path, name)


def _from_module(source: str, name: str, search_path: Path) -> Callable[[], Any]:
    with _importable_from(search_path):
        try:
            module = importlib.import_module(source)
        except ModuleNotFoundError as error:
            if error.name is not None and (source == error.name or source.startswith(error.name + ".")):
                hint = _suggestion(source, list(_ZOOS)) or f"; a SPEC is {_FORMS}"
                raise SpecError(f"there is no Python module {source}{hint}") from error
            raise SpecError(f"importing {source} failed: {one_line(error)}") from error
        except Exception as error:
            raise SpecError(f"importing {source} failed: {one_line(error)}") from error
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


def _suggestion(name: str, names: Iterable[str]) -> str:
    by_lower = {known.lower(): known for known in names}
    near = [by_lower[match] for match in difflib.get_close_matches(name.lower(), by_lower, n=_LISTED)]
    if not near:
        return ""
    choice = near[0] if len(near) == 1 else f"{', '.join(near[:-1])} or {near[-1]}"
    return f"; did you mean {choice}?"
