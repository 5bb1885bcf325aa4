"""Layers whose weights somebody else reads: seen in the source, or else when the model first runs."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import netdeconv
from netdeconv import plan_conversion
from netdeconv.surgery import Action
from netdeconv.surgery.batches import max_relative_error

PRESERVED_TOLERANCE = 1e-5  # float32, two layers


def times(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight)


class Layers(nn.Module):
    """``called`` is called, ``read`` is read, in the way of the subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)
        self.plain = [self.read]
        self.by_name = {"read": self.read}

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix(self.called(x))

    def matrix(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class ByProperty(Layers):
    @property
    def weight_of(self) -> Tensor:
        return self.read.weight

    def matrix(self, x: Tensor) -> Tensor:
        return x @ self.weight_of


class ByPropertyOfLayer(Layers):
    @property
    def picked(self) -> nn.Linear:
        return self.read

    def matrix(self, x: Tensor) -> Tensor:
        return x @ self.picked.weight


class ByMethodOfLayer(Layers):
    def pick(self) -> nn.Linear:
        return self.read

    def matrix(self, x: Tensor) -> Tensor:
        return x @ self.pick().weight


class ByGetattr(Layers):
    def matrix(self, x: Tensor) -> Tensor:
        return x @ getattr(getattr(self, "read"), "weight")  # noqa: B009


class ByParameters(Layers):
    def matrix(self, x: Tensor) -> Tensor:
        return x @ next(self.read.parameters())


class ByDictionary(Layers):
    def matrix(self, x: Tensor) -> Tensor:
        return x @ self.read._parameters["weight"]


class BySubmodule(Layers):
    def matrix(self, x: Tensor) -> Tensor:
        return x @ self.get_submodule("read").weight


class ByWalrus(Layers):
    def matrix(self, x: Tensor) -> Tensor:
        return x @ (layer := self.read).weight + layer.bias


class ByCondition(Layers):
    def matrix(self, x: Tensor) -> Tensor:
        return x @ (self.read if x.dim() == 2 else self.called).weight.T if x.dim() else x


class ByLoop(Layers):
    def matrix(self, x: Tensor) -> Tensor:
        for layer in (self.read,):
            x = x @ layer.weight
        return x


class ByLambda(Layers):
    def matrix(self, x: Tensor) -> Tensor:
        return x @ next(map(lambda layer: layer.weight, [self.read]))  # noqa: C417


class ByPlainList(Layers):
    def matrix(self, x: Tensor) -> Tensor:
        return x @ self.plain[0].weight


class ByPlainDict(Layers):
    def matrix(self, x: Tensor) -> Tensor:
        return x @ self.by_name["read"].weight


class ByHelper(Layers):
    def matrix(self, x: Tensor) -> Tensor:
        return times(self.read, x)


class ByStaticMethod(Layers):
    @staticmethod
    def product(x: Tensor, layer: nn.Linear) -> Tensor:
        return x @ layer.weight

    def matrix(self, x: Tensor) -> Tensor:
        return self.product(x, layer=self.read)


class ByInnerFunction(Layers):
    def matrix(self, x: Tensor) -> Tensor:
        def product(layer: nn.Linear) -> Tensor:
            return x @ layer.weight

        return product(self.read)


SEEN: list[Any] = [
    ByProperty, ByPropertyOfLayer, ByMethodOfLayer, ByGetattr, ByParameters, ByDictionary, BySubmodule, ByWalrus,
    ByLoop, ByLambda, ByPlainList, ByPlainDict, ByHelper, ByStaticMethod, ByInnerFunction,
]  # fmt: skip


class Hidden(Layers):
    """The name of the parameter is put together."""

    def matrix(self, x: Tensor) -> Tensor:
        return F.linear(x, dict(self.named_parameters())[".".join(["read", "weight"])])


class CalledToo(Layers):
    """The weight that is read belongs to the layer that is called, as in an autoencoder of tied weights."""

    def matrix(self, x: Tensor) -> Tensor:
        return x @ dict(self.named_parameters())["called.weight"] + self.read(x)


class OnlyAsked(Layers):
    """Shape, type and place of a weight are not its numbers."""

    def matrix(self, x: Tensor) -> Tensor:
        weight = dict(self.named_parameters())["called.weight"]
        return self.read(x).to(weight) + weight.new_zeros(weight.shape[0]).to(weight.device)


class Tied(nn.Module):
    """Two layers of one weight: each reads its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embedding(x))


def first_and_second(model: nn.Module, x: Tensor) -> tuple[list[str], list[str]]:
    """Warnings of the first and of the second forward."""
    found = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(x)
        found.append([str(warning.message) for warning in caught])
    return found[0], found[1]


def hooks(model: nn.Module) -> list[Any]:
    return [
        hook
        for module in model.modules()
        for held in (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called)
        for hook in held
    ]


@pytest.mark.parametrize("kind", SEEN, ids=lambda kind: kind.__name__)
def test_the_source_shows_who_reads(kind: Callable[[], nn.Module]) -> None:
    plan = plan_conversion(kind())
    assert plan["read"].action is Action.LEAVE
    assert "itself" in plan["read"].why
    assert plan["called"].action is Action.WHITEN


def test_either_layer_of_a_condition_may_be_the_one_that_is_read() -> None:
    plan = plan_conversion(ByCondition())
    assert plan["read"].action is plan["called"].action is Action.LEAVE


@pytest.mark.parametrize(("kind", "layer"), [(Hidden, "read"), (CalledToo, "called")])
def test_the_first_run_shows_who_reads(kind: Callable[[], nn.Module], layer: str) -> None:
    model = nn.Sequential(kind(), nn.Linear(4, 4))
    assert not plan_conversion(model).where(Action.LEAVE)  # not seen in the source
    converted = netdeconv.convert(model)
    x = torch.randn(9, 4)
    others = copy.deepcopy(converted), pickle.loads(pickle.dumps(converted)), netdeconv.convert(converted)
    for one in (*others, converted):
        first, second = first_and_second(one, x)
        assert len(first) == 1 and not second
        assert f"something else read: 0.{layer}: WhitenedLinear(4, 4) at test_reads.py:" in first[0]
        assert "in matrix" in first[0] and "1.weight" not in first[0]
        assert not hooks(one)
    excluded = netdeconv.convert(model, exclude=f"0.{layer}")
    assert first_and_second(excluded, x) == ([], [])


def test_the_part_that_runs_is_looked_at() -> None:
    converted = netdeconv.convert(nn.ModuleDict({"a": Hidden(), "b": Hidden()}))
    assert len(first_and_second(converted["a"], torch.randn(9, 4))[0]) == 1
    assert len(first_and_second(converted["b"], torch.randn(9, 4))[0]) == 1
    assert not hooks(converted["a"]) and not hooks(converted["b"])


@pytest.mark.parametrize(
    ("kind", "x"), [(OnlyAsked, torch.randn(9, 4)), (Tied, torch.arange(5)), (ByHelper, torch.randn(9, 4))]
)
def test_no_false_alarm(kind: Callable[[], nn.Module], x: Tensor) -> None:
    converted = netdeconv.convert(kind())
    assert first_and_second(converted, x) == ([], [])
    assert not hooks(converted)


def test_a_forward_that_fails_leaves_no_trace() -> None:
    class Fails(Layers):
        reason: Any = None

        def matrix(self, x: Tensor) -> Tensor:
            if self.reason is not None:
                raise self.reason
            return F.linear(x, dict(self.named_parameters())["read.weight"])

    for reason in (ValueError("no"), KeyboardInterrupt()):  # no hook runs after the second
        converted = netdeconv.convert(Fails())
        converted.reason = reason
        with pytest.raises(type(reason)):
            converted(torch.randn(9, 4))
        converted.reason = None
        assert len(first_and_second(converted, torch.randn(9, 4))[0]) == 1
        assert torch.overrides._len_torch_function_stack() == 0
        assert not hooks(converted)


def test_compiling_and_exporting_pass_it_by() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    compiled = torch.compile(netdeconv.convert(model), backend="eager", fullgraph=True)
    assert compiled(torch.randn(9, 4)).shape == (9, 4)
    converted = netdeconv.calibrate(netdeconv.convert(model), torch.randn(9, 4)).eval()
    exported = torch.export.export(copy.deepcopy(converted), (torch.randn(2, 4),))
    x = torch.randn(2, 4)
    assert not hooks(netdeconv.fuse(converted))
    assert max_relative_error(exported.module()(x), converted(x)) < PRESERVED_TOLERANCE


@pytest.mark.parametrize(("kind", "layer"), [(Hidden, "read"), (CalledToo, "called")])
def test_a_preserving_conversion_leaves_what_the_data_show_to_be_read(kind: Callable[[], Any], layer: str) -> None:
    model = kind().eval()
    x = torch.randn(9, 4)
    with pytest.warns(UserWarning, match=rf"{layer} \(its weight is read elsewhere \(test_reads.py:\d+ in matrix\)\)"):
        converted = netdeconv.convert(model, preserve=x)
    assert type(getattr(converted, layer)) is nn.Linear
    assert max_relative_error(converted(x), model(x)) < PRESERVED_TOLERANCE
    plan = plan_conversion(model, preserve=x)
    assert plan[layer].action is Action.LEAVE
