"""Layers whose weights somebody else reads: seen when an example runs, or else when the converted model first does."""

from __future__ import annotations

import copy
import pickle
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import netdeconv
from netdeconv import WhitenedLinear, plan_conversion
from netdeconv.nn.layer import WhitenedLayer
from netdeconv.surgery import Action
from netdeconv.surgery.batches import max_relative_error
from small_networks import Shortcut, TwoNormsOfOne

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


class Hidden(Layers):
    """The name of the parameter is put together."""

    def matrix(self, x: Tensor) -> Tensor:
        return F.linear(x, dict(self.named_parameters())[".".join(["read", "weight"])])


class CalledToo(Layers):
    """The weight that is read belongs to the layer that is called, as in an autoencoder of tied weights."""

    def matrix(self, x: Tensor) -> Tensor:
        return x @ dict(self.named_parameters())["called.weight"] + self.read(x)


READERS: list[Any] = [
    ByProperty, ByPropertyOfLayer, ByMethodOfLayer, ByGetattr, ByParameters, ByDictionary, BySubmodule, ByWalrus,
    ByCondition, ByLoop, ByLambda, ByPlainList, ByPlainDict, ByHelper, ByStaticMethod, ByInnerFunction, Hidden,
]  # fmt: skip


class CalledDirectly(Layers):
    """Calls a layer's forward past its hooks, which is not to read its weight."""

    def matrix(self, x: Tensor) -> Tensor:
        return self.read.forward(x)


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
        for held in (
            module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called,
            module._load_state_dict_pre_hooks,
        )
        for hook in held
    ]  # fmt: skip


@pytest.mark.parametrize("kind", READERS, ids=lambda kind: kind.__name__)
def test_an_example_shows_who_reads(kind: Callable[[], nn.Module]) -> None:
    model, x = kind(), torch.randn(9, 4)
    plan = plan_conversion(model, example=x)
    assert plan["read"].action is Action.LEAVE
    assert re.fullmatch(r"its weight is read elsewhere \(test_reads.py:\d+ in \S+\)", plan["read"].why)
    assert plan["called"].action is Action.WHITEN
    converted = netdeconv.convert(model, example=x)
    assert type(converted.read) is nn.Linear and not hooks(converted)
    assert first_and_second(converted, x) == ([], [])
    assert plan_conversion(model, example=x, include="read")["read"].action is Action.WHITEN  # who asks for it gets it


@pytest.mark.parametrize(("kind", "layer"), [(Hidden, "read"), (ByHelper, "read"), (CalledToo, "called")])
def test_without_an_example_the_first_run_gives_such_a_layer_back(kind: Callable[[], nn.Module], layer: str) -> None:
    model = nn.Sequential(kind(), nn.Linear(4, 4))
    assert not plan_conversion(model).where(Action.LEAVE)
    converted = netdeconv.convert(model)
    x = torch.randn(9, 4)
    others = copy.deepcopy(converted), pickle.loads(pickle.dumps(converted)), netdeconv.convert(converted)
    for one in (*others, converted):
        before = one[0].get_submodule(layer)
        weight, bias = before.weight, before.bias
        assert type(before) is WhitenedLinear
        first, second = first_and_second(one, x)
        assert len(first) == 1 and not second
        assert f"0.{layer}: WhitenedLinear(4, 4) is plain again (its weight is read at test_reads.py:" in first[0]
        after = one[0].get_submodule(layer)
        assert after is before and type(after) is nn.Linear and after.weight is weight and after.bias is bias
        assert type(one[1]) is WhitenedLinear and "1.weight" not in first[0]
        assert not hooks(one)
        one(x).sum().backward()
        assert weight.grad is not None
    excluded = netdeconv.convert(model, exclude=f"0.{layer}")
    assert first_and_second(excluded, x) == ([], [])
    included = netdeconv.convert(model, include=["0", f"0.{layer}", "1"])
    assert first_and_second(included, x) == ([], [])
    assert type(included[0].get_submodule(layer)) is WhitenedLinear


def test_the_state_of_a_model_that_has_run_fits_one_that_has_not() -> None:
    torch.manual_seed(0)
    model = Hidden()
    trained, x = netdeconv.convert(model), torch.randn(9, 4)
    with pytest.warns(UserWarning, match="is plain again"):
        trained(x)
    fresh = netdeconv.convert(model)
    fresh.load_state_dict(trained.state_dict())
    assert type(fresh.read) is nn.Linear and type(fresh.called) is WhitenedLinear
    assert first_and_second(fresh.eval(), x) == ([], [])
    assert torch.equal(fresh(x), trained.eval()(x))


def test_the_part_that_runs_is_looked_at() -> None:
    converted = netdeconv.convert(nn.ModuleDict({"a": Hidden(), "b": Hidden()}))
    assert len(first_and_second(converted["a"], torch.randn(9, 4))[0]) == 1
    assert len(first_and_second(converted["b"], torch.randn(9, 4))[0]) == 1
    assert not hooks(converted["a"]) and not hooks(converted["b"])


@pytest.mark.parametrize(
    ("kind", "x"), [(OnlyAsked, torch.randn(9, 4)), (Tied, torch.arange(5)), (CalledDirectly, torch.randn(9, 4))]
)
def test_no_false_alarm(kind: Callable[[], nn.Module], x: Tensor) -> None:
    model = kind()
    assert not plan_conversion(model, example=x).where(Action.LEAVE)
    converted = netdeconv.convert(model)
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


@pytest.mark.parametrize("norms", [False, True])
def test_several_threads_may_be_the_first_to_run_a_model(norms: bool) -> None:
    """Each gets the right numbers, what is to be changed is changed once, and nothing is left."""
    torch.manual_seed(0)
    blocks = [Shortcut(4) if index % 2 else TwoNormsOfOne(4) for index in range(12)]
    model = nn.Sequential(*blocks) if norms else nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(12)))
    x = torch.randn(2, 4, 6, 6)
    trained = netdeconv.calibrate(netdeconv.convert(model, example=x), x).eval()
    expected = trained(x)
    for _ in range(5):
        loaded = netdeconv.convert(model).eval()
        for theirs, ours in zip(trained.modules(), loaded.modules(), strict=True):
            if isinstance(ours, WhitenedLayer):  # that of all modules would take the waiting batch norms away
                ours.load_state_dict(theirs.state_dict())
        found: list[Any] = []
        start = threading.Barrier(8)

        def run(model: nn.Module = loaded, start: Any = start, found: list[Any] = found) -> None:
            start.wait()
            with torch.no_grad():
                found.append((model(x), torch.overrides._len_torch_function_stack()))

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            threads = [threading.Thread(target=run) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(found) == 8 and all(modes == 0 for _, modes in found)
        assert not hooks(loaded)
        assert len(caught) == norms  # of the batch norms that went
        torch.testing.assert_close(loaded(x), expected)


def test_nothing_is_changed_before_all_threads_have_left() -> None:
    inside, release = threading.Event(), threading.Event()

    class Gate(nn.Module):
        """The watched call waits for another to come in, which waits until it is let go."""

        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread().name == "late":
                inside.set()
                assert release.wait(60)
            elif not release.is_set():
                late.start()
                assert inside.wait(60)
            return x

    converted, x = netdeconv.convert(nn.Sequential(Gate(), TwoNormsOfOne(4))), torch.randn(2, 4, 6, 6)
    late = threading.Thread(target=lambda: converted(x), name="late")
    converted(x)
    assert type(converted[1].first) is nn.BatchNorm2d
    with pytest.warns(UserWarning, match=r"1.first is gone; 1.second is gone"):
        release.set()
        late.join()
    assert type(converted[1].first) is not nn.BatchNorm2d and not hooks(converted)


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
