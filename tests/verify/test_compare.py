"""Running two models on whatever inputs are given, and comparing what they return."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bnfuse.errors import BnFuseError, InputError
from bnfuse.model.calls import Call
from bnfuse.verify.compare import compare
from bnfuse.verify.comparison import Comparison


def only(comparison: Comparison) -> Any:
    assert len(comparison.outputs) == 1
    return comparison.outputs[0]


class Fixed(nn.Module):
    """Returns what a function makes of its arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def classifier() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 6))


def test_a_tensor_a_tuple_and_a_dict_are_one_call() -> None:
    model = Fixed(lambda x, y=None: x if y is None else x + y)
    x = torch.ones(2, 3)
    for inputs in (x, (x,), (x, x), {"x": x}, {"x": x, "y": x}):
        comparison = compare(model, model, inputs)
        assert comparison.within_tolerance()
        assert (comparison.batches, comparison.samples) == (1, 2)


def batches() -> Iterator[Tensor]:
    yield from torch.randn(3, 2, 4)


@pytest.mark.parametrize(
    "inputs",
    [
        lambda: list(batches()),
        batches,
        lambda: [(x,) for x in batches()],
        lambda: [{"input": x} for x in batches()],
        lambda: DataLoader(TensorDataset(torch.randn(6, 4)), batch_size=2),
        lambda: DataLoader(TensorDataset(torch.randn(6, 4), torch.arange(6)), batch_size=2),
        lambda: [(x, torch.tensor([0, 1])) for x in batches()],
    ],
)
def test_anything_else_gives_batches(inputs: Callable[[], Any]) -> None:
    model = classifier()
    comparison = compare(model, model, inputs())
    assert comparison.within_tolerance()
    assert (comparison.batches, comparison.samples, comparison.argmax_agreement) == (3, 6, 1.0)


def test_batches_add_up_to_one_whole() -> None:
    x = torch.randn(12, 4)
    before, after = classifier(), classifier()
    after.get_submodule("4").register_parameter("bias", nn.Parameter(torch.randn(6)))
    whole = only(compare(before, after, x))
    parts = compare(before, after, list(x.split(5)))
    part = only(parts)
    assert (parts.batches, parts.samples) == (3, 12)
    for name in ("max_abs", "relative_l2", "relative_max", "mse", "argmax_agreement", "differing"):
        assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=1e-6), name
    assert part.before.mean == pytest.approx(whole.before.mean, rel=1e-5)
    assert whole.where is not None
    assert (part.batch * 5 + part.where[0], part.where[1]) == whole.where


def test_top1_and_top5() -> None:
    labels = torch.arange(6).repeat(4)
    scores = nn.functional.one_hot(labels, 6).float()
    wrong = scores.clone()
    wrong[:6] = -scores[:6]  # the right class comes last
    wrong[6:12] = scores[6:12] + 2 * scores[6:12].roll(1, dims=1)  # the right class comes second
    loader = DataLoader(TensorDataset(torch.stack([scores, wrong], dim=1), labels), batch_size=5)
    before, after = Fixed(lambda x: x[:, 0]), Fixed(lambda x: x[:, 1])
    comparison = compare(before, after, loader)
    assert comparison.accuracy_before is not None
    assert comparison.accuracy_after is not None
    assert (comparison.accuracy_before.top1, comparison.accuracy_before.top5) == (1.0, 1.0)
    assert (comparison.accuracy_after.top1, comparison.accuracy_after.top5) == (0.5, 0.75)
    assert comparison.argmax_agreement == 0.5
    assert "top-1 50.00%, top-5 75.00%" in str(comparison)


def test_accuracy_needs_labels_and_classes() -> None:
    x, labels = torch.randn(4, 3), torch.arange(4)
    model = Fixed(lambda x: x)
    few = compare(model, model, [(x[:, :3], labels)])
    assert few.accuracy_before is not None
    assert few.accuracy_before.top5 is None
    assert compare(model, model, [x]).accuracy_before is None
    dense = Fixed(lambda x: x[:, :, None])
    assert compare(dense, dense, [(x, labels)]).accuracy_before is None
    two_arguments = Fixed(lambda x, y: x + y)
    assert compare(two_arguments, two_arguments, [(x, x)]).accuracy_before is None


def hugging_face(pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
    """What a classifier of theirs returns: with labels a loss comes first."""
    features = {"pooled": pixel_values.flip(1), "logits": pixel_values}
    if labels is None:
        return features
    return {"loss": nn.functional.cross_entropy(pixel_values, labels), **features}


def plain(pixel_values: Tensor) -> Tensor:
    return pixel_values


class Taking(nn.Module):
    """A module whose forward has the arguments of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function


@pytest.mark.parametrize("name", ["labels", "label", "targets", "target"])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_labels_in_a_dict(name: str, wrapped: bool, single: bool) -> None:
    """They count as labels, and the model is given them only if it takes them."""
    labels = torch.tensor([1, 0, 2, 2, 1])
    scores = nn.functional.one_hot(labels, 3).float()
    wrong = scores.clone()
    wrong[:2] = scores[:2].roll(1, dims=1)
    before = Taking(hugging_face if wrapped else plain)
    after = Taking(lambda pixel_values: (wrong, plain(pixel_values))[0])
    given = {"pixel_values": scores, name: labels}
    comparison = compare(before, before, given if single else [given, given])
    times = 1 if single else 2
    assert (comparison.batches, comparison.samples) == (times, 5 * times)
    assert comparison.accuracy_before is not None
    assert comparison.accuracy_before == comparison.accuracy_after
    assert comparison.accuracy_before.top1 == 1.0
    assert any("loss" in output.path for output in comparison.outputs) is (wrapped and name == "labels")
    if not wrapped:
        found = compare(before, after, given if single else [given])
        assert (found.accuracy_before.top1, found.accuracy_after.top1) == (1.0, 0.6)


def test_of_several_outputs_the_logits_count() -> None:
    labels = torch.tensor([1, 0, 2, 2, 1])
    scores = nn.functional.one_hot(labels, 3).float()
    model = Taking(hugging_face)  # whose first output with classes is another one
    assert compare(model, model, [{"pixel_values": scores, "labels": labels}]).accuracy_before.top1 == 1.0
    assert compare(model, model, [({"pixel_values": scores}, labels)]).accuracy_before.top1 == 1.0


def test_what_is_no_label_is_an_argument() -> None:
    x, labels = torch.randn(4, 3), torch.arange(4)
    model = Fixed(lambda x, labels: x + labels if labels.ndim else x)
    for other in (x, x > 0, torch.ones(4, 3, dtype=torch.int64), torch.tensor(1)):
        comparison = compare(model, model, [{"x": x, "labels": other}])
        assert comparison.accuracy_before is None
        assert comparison.samples == 4
    call = Call(x=x, label=labels)  # says what is passed, and all of it
    with pytest.raises(InputError, match="label"):
        compare(Taking(lambda x: x), model, [call])
    demanding = Fixed(lambda x, target: x + target[:, None])
    assert compare(demanding, demanding, [{"x": x, "target": labels}]).accuracy_before is not None


def test_a_loss_has_no_samples() -> None:
    model = Fixed(lambda x: (x.sum(), x))
    assert compare(model, model, [torch.ones(2, 3), torch.ones(4, 3)]).samples == 6
    alone = Fixed(lambda x: x.sum())
    assert compare(alone, alone, torch.ones(2, 3)).samples == 0
    labels = torch.arange(4)
    assert compare(alone, alone, [(torch.ones(4, 3), labels)]).samples == 4


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "no batch"),
        (iter(()), "no batch"),
        (3, "expected: a tensor"),
        ("text", "expected: a tensor"),
        (None, "expected: a tensor"),
        (torch.ones(2, 3), r"\[0\] \(2, 3\) float32"),
        ([torch.ones(2, 4), torch.ones(2, 5)], r"batch 1 of(.|\n)*\(\[a, b\],\)"),
    ],
)
def test_inputs_that_cannot_be_used(inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(classifier(), classifier(), inputs)


def test_only_modules_are_compared() -> None:
    with pytest.raises(BnFuseError, match="after is a function"):
        compare(nn.Identity(), lambda x: x, torch.ones(1))  # type: ignore[arg-type]


def test_a_model_in_training_mode_is_compared_in_evaluation_mode() -> None:
    model = classifier().train()
    norm = model.get_submodule("1")
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    assert compare(model, model, torch.randn(8, 4)).within_tolerance()
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())


def test_a_difference_between_models_is_found() -> None:
    model, other = classifier(), classifier()
    with torch.no_grad():
        other.get_parameter("4.bias")[2] += 1e-3
    x = torch.randn(8, 4)
    assert compare(model, classifier(), x).within_tolerance()
    comparison = compare(model, other, x)
    assert not comparison.within_tolerance()
    assert only(comparison).where[1] == 2
    assert "NOT equal" in str(comparison)


def test_half_precision_models_are_compared() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model, x = classifier().to(dtype), torch.randn(8, 4, dtype=dtype)
        assert only(compare(model, model, x)).dtype == dtype
        other = classifier().to(dtype)
        other.get_parameter("4.bias").data += 0.1
        assert not compare(model, other, x).within_tolerance()
