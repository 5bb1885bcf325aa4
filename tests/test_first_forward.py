"""The first forward of a converted model, where it fails, runs in threads, or is that of a part."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

import netdeconv
from netdeconv.surgery.norms import Clone
from small_networks import batch_norms

X, WRONG = torch.randn(8, 3, 6, 6), torch.randn(8, 4, 6, 6)


class Net(nn.Module):
    """A forward that the tree does not show: the batch norm waits, and goes."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv, self.last = nn.BatchNorm2d(4), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(self.last(self.conv(x))))


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "convert: the first forward")
        warnings.simplefilter("ignore", netdeconv.StatisticsWarning)
        yield


def is_settled(model: nn.Module) -> bool:
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return not hooked and torch.overrides._len_torch_function_stack() == 0


# ---- a forward that fails


def test_a_first_forward_that_fails_leaves_nothing_behind() -> None:
    model = netdeconv.convert(Net())
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    with pytest.raises(ValueError, match="channels"):
        model(WRONG)
    assert torch.overrides._len_torch_function_stack() == 0
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for again in (model, *copies):
        assert batch_norms(again) == ["bn"]
        again(X)
        assert batch_norms(again) == [] and is_settled(again)


def test_the_activation_in_a_batch_norm_that_waits_is_the_copys_own() -> None:
    class NormThenAct(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.act = nn.PReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x))

    class Held(Net):
        def __init__(self) -> None:
            super().__init__()
            self.bn = NormThenAct(4)

    model = netdeconv.convert(Held())
    copied = copy.deepcopy(model)
    mine = copied.bn.act.weight
    copied(X)
    assert copied.bn.act.weight is mine and copied.bn.act.weight is not model.bn.act.weight


def test_a_model_that_failed_can_be_freed() -> None:
    model = netdeconv.convert(Net())
    with pytest.raises(ValueError, match="channels"):
        model(WRONG)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_call_that_failed_in_a_thread_does_not_keep_others_waiting(error: type[BaseException]) -> None:
    model = netdeconv.convert(Net())
    failed, stop = threading.Event(), threading.Event()

    def fail() -> None:
        def refuse(*_: Any) -> None:
            raise error

        handle = model.last.register_forward_hook(refuse)
        try:
            model(X)
        except error:
            handle.remove()
            failed.set()
        stop.wait()

    thread = threading.Thread(target=fail)
    thread.start()
    failed.wait()
    model(X)
    settled = is_settled(model)
    stop.set()
    thread.join()
    assert settled and batch_norms(model) == []


def test_a_forward_that_leaves_a_mode_behind() -> None:
    class Leaves(Net):
        def forward(self, x: Tensor) -> Any:
            self.mode = torch.device("cpu").__enter__()
            return super().forward(x)

    model = netdeconv.convert(Leaves())
    model(X)
    assert len(torch.overrides._get_current_function_mode_stack()) == 1
    torch.overrides._pop_mode()
    assert is_settled(model)


@pytest.mark.parametrize("handling", [False, True])
def test_a_forward_may_return_nothing(handling: bool) -> None:
    class Keeps(Net):
        def forward(self, x: Tensor) -> Any:
            self.kept = super().forward(x)

    model = netdeconv.convert(Keeps())
    try:
        if handling:
            raise KeyError
        model(X)
    except KeyError:
        model(X)
    assert batch_norms(model) == [] and is_settled(model)


# ---- a batch norm that the tree let go


class Reads(nn.Module):
    """The tree removes the batch norm, the forward reads the weight of its layer."""

    def __init__(self, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.body, self.last = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(True)), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.body(x)) + self.body[0].weight.pow(2).sum()


def test_a_batch_norm_returns_with_its_plain_layer() -> None:
    model = Reads()
    converted = netdeconv.convert(model).double()
    others = [copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))]
    assert batch_norms(converted) == []
    for one in (converted, *others):
        with pytest.warns(UserWarning, match=r"again .*; body\.1 is back \(it normalises the output of body\.0"):
            one(X.double())
        assert batch_norms(one) == ["body.1"] and type(one.body[0]) is nn.Conv2d and is_settled(one)
        assert type(one.body[1]) is nn.BatchNorm2d and one.body[1].weight.dtype == torch.float64
        one(X.double()).sum().backward()
        assert one.body[1].weight.grad is not None
    fresh = netdeconv.convert(model).double()
    fresh.load_state_dict(converted.state_dict())
    assert batch_norms(fresh) == ["body.1"]
    fresh.eval(), converted.eval()
    assert torch.equal(fresh(X.double()), converted(X.double()))
    included = netdeconv.convert(model, include="*")
    included(X)
    assert batch_norms(included) == []


def test_a_batch_norm_without_state_returns_after_a_state_dict() -> None:
    model = Reads(lambda channels: nn.BatchNorm2d(channels, affine=False, track_running_stats=False))
    converted, fresh = netdeconv.convert(model), netdeconv.convert(model)
    converted(X)
    fresh.load_state_dict(converted.state_dict())
    fresh(X)
    assert batch_norms(fresh) == batch_norms(converted) == ["body.1"]


def test_batch_norms_that_share_a_layer_return_with_it() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Any:
            return self.norm(self.first[0](self.first(x)))

    converted = netdeconv.convert(Shares())
    assert batch_norms(converted) == ["norm"]
    with pytest.warns(UserWarning, match=r"several batch norms.*first\.1 is back"):
        converted(X)
    assert batch_norms(converted) == ["first.1", "norm"]


# ---- a state dict before the first forward


class Stateless(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4, affine=False, track_running_stats=False)


def test_a_state_dict_takes_a_batch_norm_only_if_it_has_all_around_it() -> None:
    model, trained = Net(), netdeconv.convert(Net())
    trained(X)
    state = trained.state_dict()
    whole, partial, nested = netdeconv.convert(model), netdeconv.convert(model), netdeconv.convert(nn.Sequential(Net()))
    whole.load_state_dict(state)
    assert batch_norms(whole) == []
    partial.load_state_dict({key: value for key, value in state.items() if "last" not in key}, strict=False)
    assert batch_norms(partial) == ["bn"]
    nested.load_state_dict({f"0.{key}": value for key, value in state.items()})
    assert batch_norms(nested) == []


def test_a_batch_norm_without_state_waits_for_the_forward() -> None:
    model = netdeconv.convert(Stateless())
    model.load_state_dict(model.state_dict())
    assert batch_norms(model) == ["bn"]
    model(X)
    assert batch_norms(model) == []


# ---- a part that is called from elsewhere than the model's forward


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: {"y": [y[:, :2]]}, lambda y: lambda: y])
def test_what_a_part_returns_may_be_written_to(wrap: Any) -> None:
    class Encoder(Net):
        def forward(self, x: Tensor) -> Any:
            return wrap(self.bn(self.last(self.conv(x))))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder()

    model = netdeconv.convert(Model())
    model.encoder(X)
    assert type(model.encoder.bn) is Clone and is_settled(model.encoder)
    whole = netdeconv.convert(Encoder())
    whole(X)
    assert type(whole.bn) is nn.Identity


def test_a_part_makes_no_clone_of_what_it_keeps_to_itself() -> None:
    model = netdeconv.convert(nn.ModuleList([Net()]))
    model[0](X)
    assert type(model[0].bn) is nn.Identity


# ---- under torch.func


def swapped(model: nn.Module) -> None:
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    functional_call(model, parameters, (X,))


def buffers_swapped(model: nn.Module) -> None:
    functional_call(model, {name: value.clone() for name, value in model.named_buffers()}, (X,))


def gradients(model: nn.Module) -> None:
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (X,)).sum()

    grad(loss)(parameters)


def many_gradients(model: nn.Module) -> None:
    stacked, _ = stack_module_state([model, model])  # type: ignore[list-item]

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (X,)).sum()

    vmap(grad(loss))(stacked)


def closure(model: nn.Module) -> None:
    grad(lambda x: model(x).sum())(X)


@pytest.mark.parametrize("run", [swapped, buffers_swapped, gradients, many_gradients, closure])
@pytest.mark.parametrize("make", [Net, Reads])
def test_a_call_under_torch_func_changes_nothing(make: Any, run: Any) -> None:
    model = netdeconv.convert(make()).eval()
    names, held, norms = list(model.state_dict()), list(model.parameters()), batch_norms(model)
    run(model)
    assert list(model.state_dict()) == names and batch_norms(model) == norms
    assert all(a is b for a, b in zip(model.parameters(), held, strict=True))
    assert torch.overrides._len_torch_function_stack() == 0
    model(X)
    assert batch_norms(model) == ([] if make is Net else ["body.1"]) and is_settled(model)


def test_what_another_thread_has_shown_waits_until_the_parameters_are_back() -> None:
    class Stops(Net):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            if threading.current_thread() is thread:
                started.set()
                go_on.wait()
            elif not go_on.is_set():
                go_on.set()
                thread.join()
            return y

    started, go_on = threading.Event(), threading.Event()
    model = netdeconv.convert(Stops()).eval()
    names = list(model.state_dict())
    thread = threading.Thread(target=model, args=(X,))
    thread.start()
    started.wait()
    swapped(model)
    assert list(model.state_dict()) == names and batch_norms(model) == ["bn"]
    model(X)
    assert batch_norms(model) == [] and is_settled(model)


# ---- activations in place


def test_activations_work_in_place_again_if_no_batch_norm_goes() -> None:
    class Stays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv, self.act = nn.BatchNorm2d(4), nn.ConvTranspose2d(3, 4, 3), nn.ReLU(True)
            self.last = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.last(self.act(self.bn(self.conv(x))).mean((2, 3)))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stays, self.net = Stays(), Net()

        def forward(self, x: Tensor) -> Any:
            return self.stays(x), self.net(x)

    stays, both, reads = netdeconv.convert(Stays()), netdeconv.convert(Both()), netdeconv.convert(Reads())
    copied, loaded = copy.deepcopy(stays), pickle.loads(pickle.dumps(reads))
    assert not (stays.act.inplace or both.stays.act.inplace or reads.body[2].inplace)
    for model in (stays, both, reads, copied, loaded):
        model(X)
    assert batch_norms(stays) == ["bn"] and batch_norms(both) == ["stays.bn"] and batch_norms(reads) == ["body.1"]
    assert stays.act.inplace and copied.act.inplace and reads.body[2].inplace and loaded.body[2].inplace
    assert not both.stays.act.inplace
