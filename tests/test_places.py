"""A batch norm goes only where a whitened layer takes its place: others', frozen and shared layers keep theirs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d

import netdeconv
from netdeconv import WhitenedConv2d, plan_conversion
from netdeconv.surgery import Action
from small_networks import batch_norms


class Own(nn.Module):
    """A convolution of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)


class Standardised(Own):
    """Its weight is computed."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, (self.weight - self.weight.mean()) / self.weight.std(), padding=1)


class Graph(nn.Module):
    """As graph convolutions are: a product, neighbours added up, a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(len(x)).roll(1)
        return torch.zeros_like(x).index_add_(0, index, x @ self.weight) + self.bias


class Transposed(nn.Module):
    """A linear layer with its weight the other way round, as language models have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


class Deformed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset, self.conv = nn.Conv2d(4, 18, 3, padding=1), DeformConv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.offset(x))


class InAFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=1)


class ByAutograd(Own):
    """Nobody sees what an autograd function does."""

    def forward(self, x: Tensor) -> Tensor:
        return InAFunction.apply(x, self.weight)


class Between(nn.Module):
    """A batch norm behind some layer, in a forward of its own, and another behind a convolution."""

    def __init__(self, layer: nn.Module, norm: Any, last: nn.Module) -> None:
        super().__init__()
        self.norm, self.layer, self.last, self.last_norm = norm(4), layer, last, norm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.norm(self.layer(x))), 0.1, self.training)
        return self.last_norm(self.last(x))


MAPS, ROWS = torch.randn(3, 4, 6, 6), torch.randn(8, 4)
LAYERS: list[Any] = [
    (Own, MAPS), (Standardised, MAPS), (Deformed, MAPS), (ByAutograd, MAPS),
    (lambda: nn.ConvTranspose2d(4, 4, 1), MAPS), (Graph, ROWS), (Transposed, ROWS), (Recurrent, ROWS),
]  # fmt: skip
IDS = ["own", "standardised", "deformed", "autograd", "transposed", "graph", "conv1d", "gru"]


def between(make: Callable[[], nn.Module], x: Tensor) -> nn.Module:
    maps = x.dim() == 4
    return Between(make(), nn.BatchNorm2d if maps else nn.BatchNorm1d, nn.Conv2d(4, 4, 1) if maps else nn.Linear(4, 4))


@pytest.mark.parametrize(("make", "x"), LAYERS, ids=IDS)
def test_the_batch_norm_of_a_layer_that_is_not_whitened_stays(make: Callable[[], nn.Module], x: Tensor) -> None:
    model = between(make, x)
    plan = plan_conversion(model, example=x)
    assert plan["norm"].action is Action.LEAVE and plan["norm"].why.startswith("it normalises the output of layer")
    assert plan["last"].action is Action.WHITEN and plan["last_norm"].action is Action.REMOVE
    with pytest.warns(UserWarning, match="1 batch norms are left: norm"):
        converted = netdeconv.convert(model, example=x)
    assert batch_norms(converted) == ["norm"]
    assert batch_norms(netdeconv.convert(model, example=x, include=["norm", "last*"])) == []  # who asks for it gets it


@pytest.mark.parametrize(("make", "x"), LAYERS, ids=IDS)
def test_without_an_example_it_stays_too(make: Callable[[], nn.Module], x: Tensor) -> None:
    converted = netdeconv.convert(between(make, x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted(x)
    assert batch_norms(converted) == ["norm"]


def test_a_sequence_shows_it_at_once() -> None:
    model = nn.Sequential(Own(), nn.BatchNorm2d(4), nn.ReLU(), Own(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    plan = plan_conversion(model)
    assert plan["1"].why == "it normalises the output of 0 (Own), which is not whitened"
    assert plan["4"].why == "it normalises the output of 3 (Own), which is not whitened"
    assert plan["6"].action is Action.WHITEN


class Scale(nn.Module):
    """One number for every channel is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@pytest.mark.parametrize("between", [Scale, nn.PReLU, nn.Dropout, lambda: nn.Upsample(scale_factor=2)])
def test_what_is_no_layer_is_looked_through(between: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), between(), nn.BatchNorm2d(4))
    for options in ({}, {"example": MAPS}):
        assert plan_conversion(model, **options)["2"].action is Action.REMOVE  # type: ignore[arg-type]


# ---- frozen layers


def test_a_frozen_layer_is_a_function() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1, bias=False))
    model[2].requires_grad_(False)
    for options in ({}, {"example": MAPS}):
        plan = plan_conversion(model, **options)  # type: ignore[arg-type]
        assert plan["2"].action is Action.LEAVE and plan["2"].why.startswith("frozen (requires_grad=False)")
        assert plan["0"].action is Action.WHITEN and plan["1"].action is Action.REMOVE
        assert plan_conversion(model, include=["0", "1", "2"], **options)["2"].action is Action.WHITEN  # type: ignore[arg-type]
    model[0].requires_grad_(False)
    assert plan_conversion(model)["1"].why == "it normalises the output of 0, which is left"
    with pytest.warns(UserWarning, match="got frozen ones only"):
        netdeconv.convert(model)
    converted = netdeconv.convert(model.eval(), include="*", preserve=MAPS)
    assert type(converted[0]) is WhitenedConv2d and not converted[0].weight.requires_grad
    torch.testing.assert_close(converted(MAPS), model(MAPS), rtol=1e-4, atol=1e-4)  # float32, two layers


# ---- one layer, several batch norms


class Levels(nn.Module):
    """One convolution for several levels, a batch norm for each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bns = nn.ModuleList([nn.BatchNorm2d(4) for _ in range(3)])

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        return [norm(self.conv(x)) for x, norm in zip(xs, self.bns, strict=True)]


class Domains(nn.Module):
    """Which batch norm is taken depends on where the data are from."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(4, 4, 3)
        self.norms = nn.ModuleDict({"photo": nn.BatchNorm2d(4), "sketch": nn.BatchNorm2d(4)})

    def forward(self, xs: list[Tensor]) -> Any:
        return [F.relu(self.norms[name](self.body(x))) for name, x in zip(("photo", "sketch"), xs, strict=False)]


def tied() -> nn.Module:
    """The convolution stands in every level's block."""
    conv = nn.Conv2d(4, 4, 3, padding=1)

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU()) for _ in range(3)])

        def forward(self, xs: list[Tensor]) -> list[Tensor]:
            return [block(x) for block, x in zip(self.blocks, xs, strict=True)]

    return Blocks()


XS = [torch.randn(2, 4, n, n) * n + n for n in (8, 6, 4)]


@pytest.mark.parametrize("make", [Levels, Domains, tied])
def test_batch_norms_that_share_a_layer_are_kept_with_it(make: Callable[[], nn.Module]) -> None:
    model = make()
    plan = plan_conversion(model, example={"xs": XS})
    assert not plan.where(Action.WHITEN, Action.REMOVE)
    layer = next(entry for entry in plan.where(Action.LEAVE) if not entry.norm)
    assert layer.why.startswith("it feeds several batch norms (")
    with pytest.warns(UserWarning, match="batch norms are left"):
        converted = netdeconv.convert(model, example={"xs": XS})
    assert batch_norms(converted) == batch_norms(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        converted = netdeconv.convert(model)
        converted(XS)
    assert any(
        "several batch norms" in str(warning.message) or "are left" in str(warning.message) for warning in caught
    )
    assert batch_norms(converted) == batch_norms(model)
    assert not any(isinstance(module, WhitenedConv2d) for module in converted.modules())


def test_one_batch_norm_for_all_calls_goes() -> None:
    class Shared(Levels):
        def forward(self, xs: list[Tensor]) -> list[Tensor]:
            return [self.bns[0](self.conv(x)) for x in xs]

    plan = plan_conversion(Shared(), example={"xs": XS})
    assert plan["conv"].action is Action.WHITEN and plan["bns.0"].action is Action.REMOVE
    assert plan["bns.1"].why.startswith("the example does not reach it")


# ---- names


class Logger:
    def info(self, text: str) -> None: ...


LOGGER = Logger()


class Named(nn.Module):
    """A method that looks at weights has the name of another that the forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)

    def info(self) -> float:
        return float(self.conv.weight.std())

    def forward(self, x: Tensor) -> Tensor:
        LOGGER.info("forward")
        return self.bn(self.conv(x))


def test_names_do_not_matter() -> None:
    for options in ({}, {"example": MAPS}):
        plan = plan_conversion(Named(), **options)  # type: ignore[arg-type]
        assert plan["conv"].action is Action.WHITEN and plan["bn"].action is Action.REMOVE


# ---- what an example is


def test_an_example_may_be_passed_in_any_way() -> None:
    model = Levels()
    for options in ({"example": {"xs": XS}}, {"example": XS, "call": lambda model, xs: model(xs)}):
        assert not plan_conversion(model, **options).where(Action.WHITEN)  # type: ignore[arg-type]
    with pytest.raises(netdeconv.ConfigError, match="expected example= or preserve=, got both"):
        netdeconv.convert(Named(), example=MAPS, preserve=MAPS)


def test_nothing_is_left_of_the_run() -> None:
    class Counting(Named):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("runs", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            return super().forward(x) + torch.rand(())

    model = Counting()
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    plan_conversion(model, example=MAPS)
    converted = netdeconv.convert(model, example=MAPS)
    assert torch.equal(torch.rand(2), expected)
    assert model.runs == 0 and model.training and converted.training
    assert torch.overrides._len_torch_function_stack() == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in converted.modules())
