"""Batch norms that no whitening stands for: kept, listed with the reason, and warned of unless asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import netdeconv
from netdeconv import WhitenedConv2d, plan_conversion
from netdeconv.surgery import Action
from netdeconv.surgery.batches import max_relative_error
from netdeconv.surgery.norms import Clone
from small_networks import batch_norms, randomise_statistics

PRESERVED_TOLERANCE = 1e-5  # float32, a few layers


def upsampling() -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(4, 4, 2, stride=2)


class ConvWithNorm(nn.Conv2d):
    """A convolution that holds its batch norm and calls it, and does a little more."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(2 * super().forward(x))


class Decoder(nn.Module):
    """A transposed convolution and a batch norm, in the order that ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.up, self.conv, self.how = upsampling(), nn.Conv2d(4, 4, 3, padding=1), how
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "nested":
            return self.other(self.conv(self.norm(self.up(x))))
        if self.how == "through an activation":
            x = self.up(x)
            x = F.relu(x, inplace=True)
            x = self.drop(x).relu()
            x = self.norm(x)
            return self.other(self.conv(x))
        if self.how == "in a branch":
            y = self.conv(x)
            if x.dim() == 4:
                y = self.up(x)
            y = self.norm(y)
            return self.other(self.conv(y))
        if self.how == "in a loop":
            for step in (self.up, self.norm, self.conv, self.other):
                x = step(x)
            return x
        return self.other(self.conv(x)) + self.up(F.relu(self.norm(x)))[:, :, ::2, ::2]  # before it


class NormInABlock(Decoder):
    """The batch norm stands in a block of its own, the layer in another, and a method is between."""

    class Up(nn.Module):
        def __init__(self, up: nn.Module) -> None:
            super().__init__()
            self.up = up

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.up(x))

    class Norm(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.first, self.second = self.Up(self.up), self.Norm(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))

    def rest(self, y: Tensor) -> Tensor:
        return self.other(self.conv(self.second(y)))


HOW = ["nested", "through an activation", "in a branch", "in a loop", "before it"]


@pytest.mark.parametrize("how", HOW)
def test_the_batch_norm_of_a_layer_that_stays_plain_is_kept(how: str) -> None:
    x = torch.randn(2, 4, 4, 4)
    with pytest.warns(UserWarning, match=r"1 batch norms are left: norm \(it normalises the (out|in)put of up"):
        converted = netdeconv.convert(Decoder(how), example=x)
    assert batch_norms(converted) == ["norm"]
    plan = plan_conversion(Decoder(how), example=x)
    assert [entry.path for entry in plan.batch_norms_left] == ["norm"]
    assert "1 of 2 batch norms gone" in plan.summary
    assert plan["up"].action is Action.LEAVE and plan["conv"].action is Action.WHITEN
    converted(x).sum().backward()


@pytest.mark.parametrize("how", HOW)
def test_without_an_example_both_wait_for_the_first_forward(how: str) -> None:
    converted = netdeconv.convert(Decoder(how))
    assert batch_norms(converted) == ["norm", "other"]
    plan = plan_conversion(Decoder(how))
    assert [entry.path for entry in plan.where(Action.WAIT)] == ["norm", "other"]
    assert "0 of 2 batch norms gone, 2 waiting for the first forward" in plan.summary
    with pytest.warns(UserWarning, match=r"norm stays \(it normalises the (out|in)put of up\); other is gone"):
        converted(torch.randn(2, 4, 4, 4)).sum().backward()
    assert batch_norms(converted) == ["norm"]
    converted(torch.randn(2, 4, 4, 4)).sum().backward()


@pytest.mark.parametrize("how", HOW)
def test_it_is_kept_in_a_preserving_conversion_too(how: str) -> None:
    model = randomise_statistics(Decoder(how)).eval()
    x = torch.randn(3, 4, 4, 4)
    with pytest.warns(UserWarning, match="batch norms are left"):
        converted = netdeconv.convert(model, preserve=x)
    assert batch_norms(converted) == ["norm"]
    assert max_relative_error(converted(x), model(x)) < PRESERVED_TOLERANCE


def test_values_are_followed_through_modules_and_methods() -> None:
    plan = plan_conversion(NormInABlock(""), example=torch.randn(2, 4, 4, 4))
    assert plan["norm"].why == "it normalises the output of up, which is left"
    assert plan["other"].action is Action.REMOVE


def test_sequences_are_followed_across_their_borders() -> None:
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), upsampling())
    outer = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model = nn.Sequential(inner, nn.Dropout(0.1), nn.ReLU(), outer, nn.BatchNorm2d(4))
    plan = plan_conversion(model)
    assert plan["3.0"].why == "it normalises the output of 0.1, which is left"
    assert plan["4"].action is Action.REMOVE
    between = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), upsampling())
    assert plan_conversion(between)["1"].action is Action.REMOVE  # the whitened layer before it is enough


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
        lambda conv: nn.utils.parametrizations.weight_norm(conv),
        lambda conv: setattr(conv, "forward", lambda x: x),
    ],
)
def test_the_batch_norm_of_a_convolution_that_cannot_be_whitened(change: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    change(model[0])
    plan = plan_conversion(model)
    assert plan["1"].why == "it normalises the output of 0, which is left" and not plan["1"].asked
    assert plan["3"].action is Action.REMOVE


def test_who_excludes_a_convolution_keeps_its_batch_norm_without_a_warning() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    converted = netdeconv.convert(model, exclude="0")  # warnings are errors here
    assert batch_norms(converted) == ["1"]
    assert plan_conversion(model, exclude="0")["1"].asked


def test_a_batch_norm_inside_a_layer_that_is_left_is_listed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), ConvWithNorm(4))
    plan = plan_conversion(model)
    assert plan["2.norm"].action is Action.LEAVE and plan["2.norm"].norm
    assert plan["2.norm"].why == "inside 2, which is left"
    assert "1 of 2 batch norms gone" in plan.summary
    with pytest.warns(UserWarning, match=r"1 batch norms are left: 2.norm \(inside 2, which is left\)"):
        converted = netdeconv.convert(model)
    assert batch_norms(converted) == ["2.norm"]
    assert plan_conversion(model, exclude="2")["2.norm"].asked


def test_detectron2s_convolution_is_taken_apart() -> None:
    class Conv2d(nn.Conv2d):
        """What that library's class computes."""

        def __init__(self, *args: Any, norm: Any = None, activation: Any = None, **options: Any) -> None:
            super().__init__(*args, **options)
            self.norm, self.activation = norm, activation

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
            x = x if self.norm is None else self.norm(x)
            return x if self.activation is None else self.activation(x)

    Conv2d.__module__ = "detectron2.layers.wrappers"
    first = Conv2d(4, 4, 3, stride=2, padding=1, bias=False, norm=nn.BatchNorm2d(4), activation=F.relu_)
    second = Conv2d(4, 4, 3, dilation=2, groups=2, activation=nn.Tanh())
    model = randomise_statistics(nn.Sequential(first, second, Conv2d(4, 2, 1))).eval()
    converted = netdeconv.convert(model)
    assert not batch_norms(converted)
    assert sum(type(module) is WhitenedConv2d for module in converted.modules()) == 3
    x = torch.randn(2, 4, 15, 15)
    preserved = netdeconv.convert(model, preserve=x)
    assert not batch_norms(preserved)
    assert max_relative_error(preserved(x), model(x)) < PRESERVED_TOLERANCE
    assert "function=" not in repr(converted) and "relu_" in repr(converted)


def test_a_layer_inside_a_layer_that_is_left_is_converted() -> None:
    class Adapted(nn.Linear):
        """A linear layer with a second way round."""

        def __init__(self) -> None:
            super().__init__(4, 4)
            self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.up(self.down(x))

    plan = plan_conversion(nn.Sequential(Adapted()))
    assert [plan[path].action for path in ("0", "0.down", "0.up")] == [Action.LEAVE, Action.WHITEN, Action.WHITEN]


def test_a_class_is_chosen_with_everything_inside() -> None:
    model = nn.Sequential(Decoder("nested"), nn.Conv2d(4, 4, 1))
    plan = plan_conversion(model, exclude=Decoder)
    assert [entry.path for entry in plan.where(Action.WHITEN)] == ["1"]
    assert plan["0.norm"].why == "excluded by Decoder" and plan["0.norm"].asked
    plan = plan_conversion(model, include=Decoder)
    assert [entry.path for entry in plan.where(Action.WHITEN)] == ["0.conv"]
    by_function = plan_conversion(model, exclude=lambda path, module: not isinstance(module, nn.Conv2d))
    assert [entry.path for entry in by_function.where(Action.WHITEN)] == ["0.conv", "1"]


class TakesApart(nn.Module):
    """Runs the members of a sequence one by one, and keeps what comes out of each."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))


class ByList(TakesApart):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x := step(x) for step in list(self.body)]


class ByName(TakesApart):
    def forward(self, x: Tensor) -> list[Tensor]:
        kept = []
        for name in self.body._modules:
            x = self.body._modules[name](x)
            kept.append(x)
        return kept


class ByHelper(TakesApart):
    def forward(self, x: Tensor) -> list[Tensor]:
        return collect(self.body, x)


class ByOthers(TakesApart):
    """Only somebody outside calls the members."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return collect(next(iter(self._modules.values())), x)


def collect(body: Any, x: Tensor) -> list[Tensor]:
    kept = []
    for step in body:
        x = step(x)
        kept.append(x)
    return kept


@pytest.mark.parametrize("kind", [ByList, ByName, ByHelper, ByOthers])
def test_outputs_collected_from_a_sequence_are_not_overwritten(kind: Callable[[], Any]) -> None:
    converted = netdeconv.convert(kind())
    kept = converted(torch.randn(4, 3, 5, 5))
    assert type(converted.body[0]) is WhitenedConv2d
    assert bool((kept[0] < 0).any())  # what the convolution gave, before the activation in place


def test_the_user_may_run_a_models_members_one_by_one() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU(inplace=True))
    converted = netdeconv.calibrate(netdeconv.convert(model), torch.randn(4, 3, 5, 5)).eval()
    kept = collect(converted, torch.randn(4, 3, 5, 5))
    assert bool((kept[0] < 0).any())
    for harmless in (nn.ReLU(), nn.Conv2d(4, 4, 1)):
        assert type(netdeconv.convert(nn.Sequential(*model[:2], harmless))[1]) is nn.Identity
    for no_longer_in_place in (nn.Sequential(nn.ReLU(inplace=True)), nn.Dropout(inplace=True)):
        assert type(netdeconv.convert(nn.Sequential(*model[:2], no_longer_in_place))[1]) is nn.Identity
    assert type(netdeconv.convert(nn.Sequential(*model[:2], ByList()))[1]) is Clone  # until the first forward


def test_who_listens_before_a_batch_norm_hears_what_it_heard() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    heard: list[Tensor] = []
    model[1].register_forward_pre_hook(lambda norm, args: heard.append(args[0]))
    netdeconv.convert(model)(torch.randn(4, 3, 5, 5))
    assert bool((heard[0] < 0).any())
