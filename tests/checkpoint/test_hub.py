"""Folders of transformers and of PyTorchModelHubMixin: a fused model comes back right, or its loader refuses it."""

from __future__ import annotations

import copy
import json
import pickle
import pickletools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import transformers
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file
from support import EXACT, assert_untouched, prepared, snapshot
from torch import Tensor, nn
from transformers.quantizers import auto

import bnfuse
from bnfuse import CheckpointError, Options, from_pretrained, structure, unfuse
from bnfuse.checkpoint.quantizer import fitted
from bnfuse.model.pretrained import CONFIG_KEY, GUARD_SHAPE, METHOD

X = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
QUICK = Options(infer_calls=False)
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}


@pytest.fixture(autouse=True)
def _unregistered() -> Iterator[None]:
    """transformers does not know bnfuse at the start of a test, and says nothing of its progress."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _forget()
    yield
    _forget()


def _forget() -> None:
    for known in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        known.pop(METHOD, None)


def resnet() -> Any:
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**RESNET))


def detr() -> Any:
    """Its norms are frozen, and its files have other names than its modules."""
    sizes = {
        f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")
    }
    backbone = transformers.ResNetConfig(**RESNET)
    own = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone_config": backbone}
    return transformers.DetrForObjectDetection(transformers.DetrConfig(d_model=8, num_queries=2, **own, **sizes))


def conformer() -> Any:
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, conv_dim=[8], conv_stride=[5],
        conv_kernel=[10], num_feat_extract_layers=1, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        classifier_proj_size=4,
    )  # fmt: skip
    return transformers.Wav2Vec2ConformerForSequenceClassification(config)


def called(builder: Callable[[], nn.Module]) -> dict[str, Tensor]:
    return {"input_values": X[:1, 0, 0, :].repeat(1, 10)} if builder is conformer else {"pixel_values": X}


def fused_pair(builder: Callable[[], nn.Module], **options: Any) -> tuple[Any, Any]:
    """A model in float64, and the same fused."""
    model = prepared(builder())
    return model, bnfuse.fuse(model, called(builder), options=Options(infer_calls=False, **options))


@pytest.fixture(scope="module")
def resnets() -> tuple[Any, Any]:
    return fused_pair(resnet)


def tensors(made: Any) -> list[Tensor]:
    return [it for it in made.values() if isinstance(it, Tensor)] if isinstance(made, dict) else [made]


def assert_same(one: nn.Module, other: nn.Module, inputs: Any, tolerance: float = 0.0) -> None:
    with torch.no_grad():
        first, second = (
            tensors(model(**inputs) if isinstance(inputs, dict) else model(inputs)) for model in (one, other)
        )
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= tolerance * a.norm()


def assert_same_tensors(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# transformers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", [resnet, detr, conformer])
def test_what_transformers_saved_comes_back(builder: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, fused = fused_pair(builder)
    assert structure(fused).removed
    fused.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, report = from_pretrained(type(model), tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert structure(loaded) == structure(fused)
    assert_same_tensors(loaded, fused)
    assert_same(fused, loaded, called(builder))
    assert_same(model, loaded, called(builder), EXACT)
    assert not any(module.training for module in loaded.modules())


def test_their_own_loader_takes_it_once_it_is_registered(resnets: tuple[Any, Any], tmp_path: Path) -> None:
    _, fused = resnets
    fused.save_pretrained(tmp_path / "first")
    bnfuse.register_with_transformers()
    bnfuse.register_with_transformers()
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "first", device_map="cpu")
    assert_same(fused, loaded, X)
    # Nothing says that it is quantized: it is converted, trained and saved like any other.
    assert not getattr(loaded, "is_quantized", False)
    assert not hasattr(loaded, "hf_quantizer")
    loaded.save_pretrained(tmp_path / "second")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "second", dtype=torch.float32)
    assert_same_tensors(again, copy.deepcopy(fused).float())
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_their_own_loader_refuses_it_otherwise(resnets: tuple[Any, Any], tmp_path: Path) -> None:
    model, fused = resnets
    fused.save_pretrained(tmp_path)
    for loader in (type(model), transformers.AutoModelForImageClassification, transformers.AutoModel):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            loader.from_pretrained(tmp_path)
    # Without the guards it would be taken, and wrong.
    file = tmp_path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if tensor.shape != GUARD_SHAPE}
    save_file(kept, file, {"format": "pt"})
    wrong = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert (wrong(X).logits - model(X).logits).norm() > 0.1 * model(X).logits.norm()


def test_a_part_goes_into_the_whole_and_the_reverse(resnets: tuple[Any, Any], tmp_path: Path) -> None:
    model, fused = resnets
    fused.save_pretrained(tmp_path / "whole")
    fused.resnet.save_pretrained(tmp_path / "part")
    inner = from_pretrained(transformers.AutoModel, tmp_path / "whole")
    assert type(inner) is transformers.ResNetModel
    assert_same_tensors(inner, fused.resnet)
    assert_same_tensors(from_pretrained(transformers.ResNetModel, tmp_path / "part"), fused.resnet)
    around = from_pretrained(type(model), tmp_path / "part")
    assert_same_tensors(around.resnet, fused.resnet)


def test_the_original_and_its_configuration_stay() -> None:
    model = prepared(resnet())
    config, before = model.config, snapshot(model)
    said = config.to_json_string()
    bnfuse.fuse(model, X, options=QUICK)
    assert_untouched(model, before)
    assert model.config is config
    # In place, the model gets a configuration of its own, and loses it again.
    bnfuse.fuse(model, X, inplace=True, options=Options(infer_calls=False, reversible=True))
    assert config.to_json_string() == said
    assert model.config is model.resnet.config is not config
    assert model.config.quantization_config["quant_method"] == METHOD
    assert type(model.config) is type(config)
    unfuse(model, inplace=True)
    assert model.config.to_json_string() == said
    assert not any(tensor.shape == GUARD_SHAPE for tensor in model.state_dict().values())


def test_a_whole_of_which_a_part_alone_was_fused_is_refused(tmp_path: Path) -> None:
    model = prepared(resnet())
    model.resnet = bnfuse.fuse(model.resnet, X, options=QUICK)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        from_pretrained(type(model), tmp_path)


class Siamese(nn.Module):
    """Two models with one configuration, one of them with less in it to fuse."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.ResNetConfig(**RESNET)
        self.one, self.other = transformers.ResNetModel(config), transformers.ResNetModel(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x).pooler_output + self.other(x).pooler_output


def test_parts_of_one_model_say_each_how_it_is_fused(tmp_path: Path) -> None:
    fused = bnfuse.fuse(prepared(Siamese()), X, keep="other.embedder.*", options=QUICK)
    for name in ("one", "other"):
        part = fused.get_submodule(name)
        part.save_pretrained(tmp_path / name)
        assert_same_tensors(from_pretrained(transformers.ResNetModel, tmp_path / name), part)
    assert fused.one.config.quantization_config != fused.other.config.quantization_config


def test_a_plan_that_fails_in_place_leaves_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(resnet())
    plan = bnfuse.plan(model, X, options=QUICK)
    config, before = model.config, snapshot(model)

    def no(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bnfuse.transaction._restorer_of_tensor", no)
    with pytest.raises(KeyboardInterrupt):
        plan.apply(model, inplace=True)
    assert model.config is config
    assert_untouched(model, before)


def test_copies_and_pickles_say_the_same_and_need_no_bnfuse(resnets: tuple[Any, Any], tmp_path: Path) -> None:
    _, fused = resnets
    data = pickle.dumps(fused)
    named = [word for _, word, _ in pickletools.genops(data) if isinstance(word, str)]
    assert "transformers.models.resnet.modeling_resnet" in named
    assert not [word for word in named if word.partition(".")[0] == METHOD and word != METHOD]
    pickle.loads(data).save_pretrained(tmp_path)
    assert_same_tensors(from_pretrained(type(fused), tmp_path), fused)
    assert copy.deepcopy(fused).config.quantization_config == fused.config.quantization_config


def test_weights_of_an_original_beside_the_configuration_of_a_fused_model(
    resnets: tuple[Any, Any], tmp_path: Path
) -> None:
    model, fused = resnets
    fresh = type(model)(copy.deepcopy(fused.config)).eval()
    fresh.save_pretrained(tmp_path)
    loaded = from_pretrained(type(model), tmp_path)
    assert_same(fresh, loaded, X.float())
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.config is loaded.resnet.config


def test_what_is_quantized_already_keeps_its_word() -> None:
    model = prepared(resnet())
    model.config.quantization_config = {"quant_method": "other"}
    fused = bnfuse.fuse(model, X, options=QUICK)
    assert fused.config.quantization_config == {"quant_method": "other"}
    assert any(tensor.shape == GUARD_SHAPE for tensor in fused.state_dict().values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda entry: entry.pop("structure"), "does not say how it was fused"),
        (lambda entry: entry.update(structure=3), "does not say how it was fused"),
        (lambda entry: entry.update(structure="{"), "is no JSON"),
        (lambda entry: entry.update(structure="[" * 100000), "is no JSON"),
        (lambda entry: entry.update(structure='{"format": 7}'), "install a newer bnfuse"),
        (lambda entry: entry.update(structure=entry["structure"].replace("stages", "steps")), "of another model"),
    ],
)
def test_a_damaged_configuration(
    change: Callable[[dict[str, Any]], None], said: str, resnets: tuple[Any, Any], tmp_path: Path
) -> None:
    _, fused = resnets
    fused.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        from_pretrained(type(fused), tmp_path)


def test_names_are_fitted_only_where_they_must_be(resnets: tuple[Any, Any]) -> None:
    _, fused = resnets
    said = structure(fused)
    assert fitted(said, fused, "resnet") is said
    assert fitted(said, fused, "") is said
    stripped = fitted(said, resnet().resnet, "resnet")
    assert [norm.names[0] for norm in said.removed] == [f"resnet.{norm.names[0]}" for norm in stripped.removed]


def test_files_of_our_own_take_such_models(resnets: tuple[Any, Any], tmp_path: Path) -> None:
    _, fused = resnets
    bnfuse.save(fused, tmp_path / "fused.safetensors")
    loaded = bnfuse.load(resnet().double(), tmp_path / "fused.safetensors")
    assert_same_tensors(loaded, fused)
    assert loaded.config.quantization_config == fused.config.quantization_config


def test_an_old_release_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(CheckpointError, match=r"transformers 4\.57\.1 is too old .* install transformers 5 or later"):
        bnfuse.register_with_transformers()


# PyTorchModelHubMixin --------------------------------------------------------------------------------------------------


class Plain(nn.Module, PyTorchModelHubMixin):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Bare(Plain):
    def __init__(self) -> None:
        super().__init__()


class AnyKeyword(Plain):
    def __init__(self, width: int = 4, **rest: int) -> None:
        assert not rest, rest
        super().__init__(width)


class Configured(Plain):
    def __init__(self, config: dict[str, int]) -> None:
        super().__init__(config["width"])


def unet() -> nn.Module:
    return smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 4), classes=2)


MIXINS: list[Callable[[], Any]] = [
    lambda: Plain(5), Bare, lambda: AnyKeyword(width=6), lambda: Configured({"width": 7}), unet,
]  # fmt: skip


@pytest.mark.parametrize("builder", MIXINS)
def test_what_a_mixin_saved_comes_back(builder: Callable[[], Any], tmp_path: Path) -> None:
    model = prepared(builder()).float()
    config = copy.deepcopy(model._hub_mixin_config)
    fused: Any = bnfuse.fuse(model, X.float(), options=QUICK)
    assert model._hub_mixin_config == config
    fused.save_pretrained(tmp_path / "first")
    loaded = from_pretrained(type(model), tmp_path / "first")
    assert type(loaded) is type(model)
    assert structure(loaded) == structure(fused)
    assert_same_tensors(loaded, fused)
    assert_same(fused, loaded, X.float())
    loaded.save_pretrained(tmp_path / "second")
    assert_same_tensors(from_pretrained(type(model), tmp_path / "second"), fused)
    model.save_pretrained(tmp_path / "original")
    assert_same_tensors(from_pretrained(type(model), tmp_path / "original"), model)


@pytest.mark.filterwarnings("ignore:(?s).*Mismatched keys")  # before the error
@pytest.mark.parametrize("builder", MIXINS)
def test_the_loader_of_a_mixin_refuses_it(builder: Callable[[], Any], tmp_path: Path) -> None:
    fused: Any = bnfuse.fuse(prepared(builder()).float(), X.float(), options=QUICK)
    fused.save_pretrained(tmp_path)
    loaders = [type(fused).from_pretrained, *([smp.from_pretrained] if builder is unet else [])]
    for loader in loaders:
        with pytest.raises((RuntimeError, AssertionError), match=f"size mismatch|Missing key|{CONFIG_KEY}"):
            loader(tmp_path)


def test_a_mixin_is_lenient_without_guards(tmp_path: Path) -> None:
    fused = bnfuse.fuse(prepared(Plain()).float(), X.float(), options=QUICK)
    del fused.norm.running_var
    fused.save_pretrained(tmp_path)
    assert type(Plain.from_pretrained(tmp_path).norm) is nn.BatchNorm2d  # at random, without a word


def test_a_mixin_that_goes_back(tmp_path: Path) -> None:
    model = prepared(unet())
    config = model._hub_mixin_config
    reversible = Options(infer_calls=False, reversible=True)
    back = unfuse(bnfuse.fuse(model, X, options=reversible))
    assert back._hub_mixin_config == config
    assert_same_tensors(back, model)


def test_weights_without_a_word_on_how_they_were_fused(tmp_path: Path) -> None:
    bnfuse.fuse(prepared(Plain()), X, options=QUICK).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not say how it was fused"):
        from_pretrained(Plain, tmp_path)


def test_timm_refuses_it(tmp_path: Path) -> None:
    fused = bnfuse.fuse(prepared(timm.create_model("mobilenetv3_small_050")), X, options=QUICK)
    timm.models.save_for_hf(fused, tmp_path)
    with pytest.raises(RuntimeError, match="Missing key"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_other_classes(tmp_path: Path) -> None:
    for cls in (nn.Linear, smp):
        with pytest.raises(CheckpointError, match="no class of transformers"):
            from_pretrained(cls, tmp_path)
    assert not any(
        tensor.shape == GUARD_SHAPE
        for tensor in bnfuse.fuse(prepared(nn.Sequential(*Plain().children())), X, options=QUICK).state_dict().values()
    )


def test_neither_library_is_imported_with_bnfuse() -> None:
    """One file imports transformers, and that file is imported inside of a function alone."""
    pattern = r"^(import|from) (transformers|huggingface_hub|bnfuse\.checkpoint\.quantizer|bnfuse\.checkpoint import)"
    files = Path(bnfuse.__file__).parent.rglob("*.py")
    assert {path.stem for path in files if re.search(pattern, path.read_text(), re.MULTILINE)} == {"quantizer"}
