"""What a conversion plan says of every module, and what it refuses to look at."""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torchvision.ops import FrozenBatchNorm2d

import netdeconv
from netdeconv import ConfigError, plan_conversion
from netdeconv.surgery import Action
from netdeconv.zoo import create
from small_networks import ConvNormAct, PreActivation, randomise_statistics


class Standardised(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class Handy(nn.Linear):
    """A linear layer with nothing but another repr."""

    def extra_repr(self) -> str:
        return "handy"


class NormWithMore(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class NormThenAct(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Reader(nn.Module):
    """Uses layers in every way but calling them, except for ``called``."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.direct, self.alias, self.nested = (nn.Linear(4, 4) for _ in range(4))
        self.items = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.looped = nn.ModuleList([nn.Linear(4, 4)])
        self.norm = nn.BatchNorm1d(4)
        self.inner = nn.Sequential(self.nested)

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x).to(self.called.weight.dtype)  # asks for the dtype only
        x = F.linear(x, self.direct.weight)
        layer = self.alias
        x = F.linear(x, layer.weight, layer.bias)
        x = x @ self.inner[0].weight + self.items[1].bias
        for _, layer in enumerate(self.looped):
            x = F.linear(x, layer.weight)
        return self.helper(self.items[0](x))

    def helper(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.norm.running_mean, self.norm.running_var)

    def unused(self) -> Tensor:
        return self.called.weight


class ByFunction(nn.Module):
    """Normalises by torch's function: one convolution and one batch norm are modules, the other norm is not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.by_function(self.conv(x)))

    def by_function(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.mean, self.var, training=self.training)


class CalledBatchNorm(nn.Module):
    """A module of that name is no function."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.batch_norm(x)


def action(model: nn.Module, path: str = "0") -> Action:
    return plan_conversion(nn.Sequential(model))[path].action


def action_behind(layer: nn.Module, norm: nn.Module) -> Action:
    return plan_conversion(nn.Sequential(layer, norm))["1"].action


def test_the_table_of_a_network() -> None:
    plan = plan_conversion(create("resnet18", width=0.125))
    assert [entry.action for entry in plan][:3] == [Action.KEEP, Action.WHITEN, Action.REMOVE]
    assert len(plan.where(Action.WHITEN)) == 21
    assert len(plan.where(Action.REMOVE)) == 20
    assert not plan.batch_norms_left
    text = str(plan)
    assert "conv1" in text and "gains a bias" in text
    assert "20 of 20 batch norms gone" in text
    assert "container" not in text
    assert "container" in plan.table(everything=True)
    assert len(plan) == len(list(create("resnet18", width=0.125).modules()))


def test_nothing_is_touched() -> None:
    model = create("vgg11", width=0.125)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    plan_conversion(model)
    assert kinds == [type(module) for module in model.modules()]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_module_with_two_paths_has_one_entry() -> None:
    shared = nn.Linear(3, 3)
    plan = plan_conversion(nn.Sequential(shared, nn.ReLU(), shared))
    assert plan["0"] is plan["2"]
    assert plan["2"].aliases == ("2",)
    assert "0 = 2" in str(plan)
    with pytest.raises(KeyError, match="nowhere"):
        plan["nowhere"]


def test_layers_used_without_being_called_are_left() -> None:
    plan = plan_conversion(Reader(), example=torch.randn(9, 4))
    left = {entry.path for entry in plan.where(Action.LEAVE)}
    assert left == {"direct", "alias", "nested", "items.1", "looped.0", "norm"}
    assert re.fullmatch(r"its weight is read elsewhere \(test_plan.py:\d+ in forward\)", plan["direct"].why)
    assert "in helper" in plan["norm"].why
    assert plan["called"].action is plan["items.0"].action is Action.WHITEN
    named = plan_conversion(Reader(), example=torch.randn(9, 4), include=["direct", "called"])
    assert named["direct"].action is Action.WHITEN  # who asks for it gets it


def test_batch_normalisation_by_function_is_listed() -> None:
    model = nn.Sequential(ByFunction(), nn.Conv2d(4, 4, 1))
    x = torch.randn(2, 3, 4, 4)
    plan = plan_conversion(model, example=x)
    assert [entry.path for entry in plan.batch_norms_left] == ["0"]
    assert plan["0"].why == "ByFunction calls batch_norm by function"
    assert plan["0.conv"].action is plan["1"].action is Action.WHITEN and plan["0.norm"].action is Action.REMOVE
    assert "1 of 2 batch norms gone" in plan.summary
    with pytest.warns(UserWarning, match=r"1 batch norms are left: 0 \(ByFunction calls"):
        netdeconv.convert(model, example=x)
    assert plan_conversion(model, example=x, exclude=ByFunction)["0"].asked
    plan = plan_conversion(nn.Sequential(CalledBatchNorm(), nn.Conv2d(3, 3, 1)), example=x)
    assert plan["0.batch_norm"].action is Action.REMOVE


class NotInstalled:
    """A stand-in for a dependency that is not there: whoever asks it for anything is told so."""

    def __getattr__(self, name: str) -> Any:
        raise ImportError("pip install it")

    def __call__(self, *args: Any) -> Any:
        raise ImportError("pip install it")


class OnDemand(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise ImportError("pip install it")


not_installed, on_demand = NotInstalled(), OnDemand("on_demand")


class Optional(nn.Module):
    """With branches that run only where a dependency is installed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fast = nn.Conv2d(3, 3, 1), 0

    def forward(self, x: Tensor) -> Any:
        if self.fast == 1:
            return not_installed.ops.conv(x, self.conv)
        if self.fast == 2:
            return on_demand.conv(x, self.conv)
        return not_installed(x, self.conv) if self.fast == 3 else self.conv(x)


def test_dependencies_that_are_not_there_are_not_asked_for() -> None:
    assert plan_conversion(Optional())["conv"].action is Action.WHITEN


def test_attention_of_torch_is_left() -> None:
    plan = plan_conversion(nn.MultiheadAttention(8, 2))
    assert plan["out_proj"].action is Action.LEAVE
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    plan = plan_conversion(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    assert not plan.where(Action.WHITEN)
    assert "layers.1.linear2" in {entry.path for entry in plan.where(Action.LEAVE)}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.ConvTranspose2d(3, 4, 2), "transposed"),
        (lambda: nn.LazyConv2d(4, 3), "lazy"),
        (lambda: nn.LazyBatchNorm2d(), "lazy"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), "parametrised"),
        (lambda: torch.nn.utils.spectral_norm(nn.Linear(3, 4)), "computed"),
        (lambda: prune.identity(nn.Conv1d(3, 4, 3), "weight"), "computed"),
        (lambda: Standardised(3, 4, 3), "defines forward"),
        (lambda: NormWithMore(3), "does more"),
        (lambda: nn.Conv2d(3, 4, 3, dtype=torch.complex64), "not real"),
        (lambda: nn.Linear(0, 4), "no features"),
        (lambda: torch.ao.nn.quantized.Conv2d(3, 4, 1), "quantised"),
        (lambda: torch.ao.nn.quantized.dynamic.Linear(3, 4), "quantised"),
        (lambda: torch.ao.nn.qat.Linear(3, 4, qconfig=torch.ao.quantization.default_qat_qconfig), "quantised"),
        (lambda: torch.ao.nn.quantized.BatchNorm2d(3), "quantised"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch deprecates the old style of normalised weights, and empty layers
def test_what_cannot_be_converted_is_left_with_a_reason(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(make())
    entry = plan_conversion(model)["0"]
    assert entry.action is Action.LEAVE
    assert reason in entry.why
    assert not entry.asked


def test_a_forward_replaced_on_the_object_is_seen() -> None:
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    conv.forward = lambda x: x  # type: ignore[method-assign]
    norm.forward = lambda x: x  # type: ignore[method-assign]
    assert action(conv) is action(norm) is Action.LEAVE


def test_kinds_of_batch_norm() -> None:
    for norm in (nn.BatchNorm1d(3), nn.BatchNorm3d(3), nn.SyncBatchNorm(3), FrozenBatchNorm2d(3)):
        assert action_behind(nn.Conv2d(3, 3, 1), norm) is Action.REMOVE
    assert action_behind(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)) is Action.REMOVE
    plan = plan_conversion(nn.Sequential(nn.Conv2d(3, 3, 1), NormThenAct(3)))
    assert plan["1"].action is Action.REMOVE
    assert "SiLU stays" in plan["1"].why
    assert plan["1.act"].action is Action.KEEP


def test_other_normalisations_stay() -> None:
    norms = [nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3, track_running_stats=True)]
    plan = plan_conversion(nn.Sequential(*norms))
    assert not plan.where(Action.REMOVE, Action.LEAVE)
    assert "not a batch norm" in plan["2"].why
    assert "no batch norm to remove" in plan.summary


def test_a_subclass_that_changes_nothing_is_converted() -> None:
    assert action(Handy(3, 4)) is Action.WHITEN


def test_what_is_whitened_stays() -> None:
    model = netdeconv.convert(create("vgg11", width=0.125))
    plan = plan_conversion(nn.Sequential(model, netdeconv.ChannelWhitening(3)))
    assert {entry.action for entry in plan} == {Action.KEEP}
    assert plan["0.classifier"].why == "whitened already"


@pytest.mark.parametrize(
    ("options", "whitened"),
    [
        ({"include": "features"}, 2),
        ({"include": ["features.0", "head"]}, 2),
        ({"include": "features.*"}, 2),
        ({"include": nn.Linear}, 1),
        ({"exclude": nn.Linear}, 2),
        ({"exclude": ("head", "features.0")}, 1),
        ({"include": "features", "exclude": lambda path, module: path.endswith("3")}, 1),
        ({"include": []}, 0),
    ],
)
def test_include_and_exclude(options: dict[str, object], whitened: int) -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)]
    model = nn.Sequential()
    model.add_module("features", nn.Sequential(*layers))
    model.add_module("head", nn.Linear(4, 2))
    plan = plan_conversion(model, **options)  # type: ignore[arg-type]
    assert len(plan.where(Action.WHITEN)) == whitened
    assert all(entry.asked for entry in plan.where(Action.LEAVE))


def test_patterns_that_cannot_be_meant() -> None:
    model = create("vgg11", width=0.125)
    with pytest.raises(ConfigError, match="'layer1', which matches none"):
        plan_conversion(model, include="layer1")
    with pytest.raises(ConfigError, match="Transformer, which matches none"):
        plan_conversion(model, exclude=nn.Transformer)
    with pytest.raises(ConfigError, match="got 3 of type int"):
        plan_conversion(model, include=[3])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="rules: expected module classes"):
        plan_conversion(model, rules={"conv": None})  # type: ignore[dict-item]


def test_wrapped_models_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        with pytest.raises(ConfigError, match="Convert the module inside first"):
            plan_conversion(wrapped)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got str"):
        plan_conversion("resnet18")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is")
def test_scripted_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="scripted or traced"):
        plan_conversion(torch.jit.script(nn.Linear(2, 2)))


def test_the_plan_of_a_preserving_conversion() -> None:
    model = randomise_statistics(nn.Sequential(PreActivation(4), ConvNormAct(4))).eval()
    model.add_module("unused", nn.Identity())
    plan = plan_conversion(model, preserve=torch.randn(2, 4, 5, 5))
    assert plan["0.norm"].action is Action.AFFINE
    assert plan["1.norm"].action is Action.FOLD
    assert plan["1.norm"].why == "into 1.conv"
    assert "2 of 2 batch norms gone" in plan.summary
    assert type(model[0].norm) is nn.BatchNorm2d


def test_helpers_used_while_building_do_not_count() -> None:
    class Simple(nn.Conv3d):
        @staticmethod
        def get_stride(stride: int) -> int:
            return stride

    assert action(Simple(3, 4, 1)) is Action.WHITEN
