"""Uses that batch normalisation bears: the state is in the buffers, whoever writes to them and whenever they are read.

Part of the contract of every layer, beside ``test_layer_contract.py``.
"""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.fx import GraphModule, symbolic_trace
from torch.utils.checkpoint import checkpoint

from layer_kinds import BY_NAME, KINDS, PARTS, SAME, Kind, assert_same_state, buffers, every_kind
from netdeconv import NonFiniteWarning, StatisticsError, StatisticsWarning, WhitenedConv2d, WhiteningConfig

CONFIGS = {
    "default": PARTS,
    "paper": WhiteningConfig.paper(),
    "kept roots with gradient": WhiteningConfig(differentiable=True, update_every=4),
    "corner": WhiteningConfig(sampling="corner", max_samples=None),
}


def steps(layer: nn.Module, kind: Kind, which: range) -> Any:
    for step in which:
        layer(kind.input(seed=step))
    return layer


# ---- recomputation --------------------------------------------------------------------------------------


def saved(layer: Any, x: Tensor, use_reentrant: bool | None) -> Tensor:
    if use_reentrant is None:
        return layer(x)
    y: Tensor = checkpoint(layer, x, use_reentrant=use_reentrant)
    return y


def gradients(layer: Any, xs: list[Tensor], losses: Iterator[Tensor]) -> list[Tensor]:
    """Of the sum of some losses, each a backward pass of its own: of parameters and inputs."""
    for loss in losses:
        loss.backward(retain_graph=True)
    return [each.grad.clone() for each in (*layer.parameters(), *xs)]


def three_calls(
    kind: Kind, name: str, before: int, use_reentrant: bool | None, run: Callable[..., Iterator[Tensor]]
) -> list[Tensor]:
    layer = kind.layer(CONFIGS[name])
    steps(layer, kind, range(before))
    xs = [kind.input(seed=70 + place).requires_grad_() for place in range(3)]
    found = gradients(layer, xs, run(layer, xs, use_reentrant, kind))
    assert int(layer.whitening.num_steps) == before + {_with_a_metric: 6}.get(run, 3)
    return [*found, *(value.double() for value in layer.buffers())]


def _together(layer: Any, xs: list[Tensor], how: bool | None, kind: Kind) -> Iterator[Tensor]:
    yield sum((saved(layer, x, how).square().sum() for x in xs), torch.zeros(()))


def _one_by_one(layer: Any, xs: list[Tensor], how: bool | None, kind: Kind) -> Iterator[Tensor]:
    """Backward passes in the order of the calls, and a call after the first of them."""
    ys = [saved(layer, x, how) for x in xs[:2]]
    yield ys[0].square().sum()
    last = saved(layer, xs[2], how)
    yield ys[1].square().sum()
    yield last.square().sum()


def _same_input(layer: Any, xs: list[Tensor], how: bool | None, kind: Kind) -> Iterator[Tensor]:
    """What the calls differ in is the state alone."""
    yield sum(((1 + place) * saved(layer, xs[0], how).square().sum() for place in range(3)), 0 * (xs[1] + xs[2]).sum())


def _with_a_metric(layer: Any, xs: list[Tensor], how: bool | None, kind: Kind) -> Iterator[Tensor]:
    """Calls without gradient in between."""
    losses = []
    for place, x in enumerate(xs):
        losses.append(saved(layer, x, how).square().sum())
        with torch.no_grad():
            layer(kind.input(seed=80 + place))
    yield losses[0] + losses[1] + losses[2]


def _with_a_constant(layer: Any, xs: list[Tensor], how: bool | None, kind: Kind) -> Iterator[Tensor]:
    """One of the batches has no statistics, and is whitened by the running values of its time."""
    still = (0 * xs[1] + 3.0) if how is None else (0 * xs[1] + 3.0).detach().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteWarning)
        yield sum((saved(layer, x, how).square().sum() for x in (xs[0], still, xs[2])), 0 * xs[1].sum())


# All kinds of layers with the defaults, and one with every setting that goes another way.
CASES = [
    *(pytest.param(param.values[0], "default", id=param.id) for param in KINDS),
    *(pytest.param(BY_NAME["conv2d"], name, id=name) for name in CONFIGS if name != "default"),
    pytest.param(BY_NAME["linear"], "kept roots with gradient", id="linear, kept roots with gradient"),
]


@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["hooks", "reentrant"])
@pytest.mark.parametrize("before", [3, 17], ids=["refreshes", "ordinary steps"])
@pytest.mark.parametrize("run", [_together, _one_by_one, _same_input, _with_a_metric, _with_a_constant])
def test_recomputing_several_calls_is_not_recomputing_the_last_one(
    kind: Kind, name: str, before: int, use_reentrant: bool, run: Callable[..., Iterator[Tensor]]
) -> None:
    expected = three_calls(kind, name, before, None, run)
    found = three_calls(kind, name, before, use_reentrant, run)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", [param for param in KINDS if param.id in ("conv2d", "linear", "depthwise")])
def test_calls_of_one_input_are_told_apart_in_any_order(kind: Kind, use_reentrant: bool) -> None:
    """Backward passes in the order of the calls, a retained graph, a metric on the same batch, a change of mode."""

    def run(how: bool | None) -> list[Tensor]:
        layer, x = kind.layer(PARTS), kind.input(seed=5).requires_grad_()
        ys = []
        for _ in range(3):
            ys.append(saved(layer, x, how))
            with torch.no_grad():
                layer(x)
        layer.eval()
        layer(x)
        layer.train()
        for y in ys:
            for _ in range(1 if how else 2):  # a reentrant checkpoint does not bear a retained graph
                y.square().sum().backward(retain_graph=not how)
            saved(layer, x, how)
        assert int(layer.whitening.num_steps) == 9
        scale = 1 if how else 2
        return [each.grad / scale for each in (x, *layer.parameters())]

    for ours, theirs in zip(run(use_reentrant), run(None), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the reentrant one within another
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_checkpoints_within_checkpoints(outer: bool, inner: bool) -> None:
    def run(nested: bool) -> list[Tensor]:
        torch.manual_seed(0)
        layers = [WhitenedConv2d(2, 2, 3, padding=1), WhitenedConv2d(2, 2, 3, padding=1)]

        def block(x: Tensor) -> Tensor:
            x = layers[0](x)
            return checkpoint(layers[1], x, use_reentrant=inner) if nested else layers[1](x)

        xs = [torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(s)).requires_grad_() for s in range(2)]
        ys = [checkpoint(block, x, use_reentrant=outer) if nested else block(x) for x in xs]
        for y in ys:
            y.square().sum().backward()
        assert [int(layer.whitening.num_steps) for layer in layers] == [2, 2]
        return [each.grad for each in (*xs, *layers[0].parameters(), *layers[1].parameters())]

    for ours, theirs in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_calls_live_as_long_as_their_checkpoints() -> None:
    layer = WhitenedConv2d(2, 3, 3)

    def x() -> Tensor:
        return torch.randn(4, 2, 6, 6, requires_grad=True)

    layer(x()).sum().backward()
    with torch.no_grad():
        layer(x())
    with torch.autograd.graph.save_on_cpu():
        kept = layer(x())
    calls = layer.whitening._calls
    assert calls.alive() == []
    ys = [saved(layer, x(), how) for how in (False, True) for _ in range(100)]
    assert len(calls.alive()) == 200
    assert copy.deepcopy(layer).whitening._calls.alive() == []
    del ys
    gc.collect()
    assert calls.alive() == []
    kept.sum().backward()


def test_a_step_in_a_backward_pass_that_recomputes_nothing_is_a_step() -> None:
    layer = WhitenedConv2d(2, 3, 3)
    inside = torch.randn(4, 2, 6, 6) + 3
    y = checkpoint(layer, torch.randn(4, 2, 6, 6, requires_grad=True), use_reentrant=False)
    z = torch.ones(1, requires_grad=True) * 2
    z.register_hook(lambda grad: layer(inside).detach().sum() * 0 + grad)
    before = int(layer.whitening.num_steps)
    z.sum().backward()
    assert int(layer.whitening.num_steps) == before + 1
    y.sum().backward()
    assert int(layer.whitening.num_steps) == before + 1


# ---- evaluation first -----------------------------------------------------------------------------------


@every_kind
def test_evaluation_first_is_that_of_the_plain_layer_and_changes_nothing(kind: Kind) -> None:
    layer, fresh = kind.layer(), kind.layer()
    silent = kind.name == "pointwise"  # which may have been trained on single pixels
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = layer.eval()(kind.input())
        layer(kind.input())
    assert [warning.category for warning in caught if "got none" in str(warning.message)] == [StatisticsWarning] * (
        not silent
    )
    expected = kind.input()
    if kind.name != "channel":
        plain = nn.functional.linear if kind.name == "linear" else layer._conv_forward
        expected = plain(expected, layer.weight, layer.bias)
    torch.testing.assert_close(y, expected, **SAME)
    assert_same_state(layer, fresh)
    for step in range(3):
        assert torch.equal(layer.train()(kind.input(seed=step)), fresh(kind.input(seed=step)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.eval()(kind.input())


def test_one_warning_for_a_whole_network() -> None:
    network = nn.Sequential(WhitenedConv2d(2, 3, 3), WhitenedConv2d(3, 3, 3)).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        network(torch.randn(1, 2, 8, 8))
    assert len(caught) == 1


# ---- the buffers are the truth --------------------------------------------------------------------------


def _copy(into: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        into.copy_(value)


def _copy_data(into: Tensor, value: Tensor) -> None:
    into.data.copy_(value)


@every_kind
@pytest.mark.parametrize("write", [_copy, _copy_data])
@pytest.mark.parametrize("taken", [5, 21, 34])
def test_a_state_written_into_the_buffers_is_the_state(
    kind: Kind, write: Callable[[Tensor, Tensor], None], taken: int
) -> None:
    layer, other = kind.trained(taken, PARTS), kind.trained(3, PARTS)
    theirs = other.state_dict()
    for name, value in layer.state_dict().items():
        write(theirs[name], value)
    assert other.whitening.clock.steps == taken
    for step in range(taken, taken + 20):
        assert torch.equal(layer(kind.input(seed=step)), other(kind.input(seed=step)))
    assert_same_state(other, layer)


@every_kind
def test_a_written_state_is_noticed_between_compiled_steps(kind: Kind) -> None:
    layer, other = kind.trained(33, PARTS), kind.layer(PARTS)
    run = torch.compile(other, backend="eager")
    for step in range(2):
        run(kind.input(seed=step))
    for name, value in layer.state_dict().items():
        _copy(other.state_dict()[name], value)
    run(kind.input(seed=33))  # refreshes, as it did before
    assert other.whitening._clock.steps == 34
    assert other.whitening._clock.due == (kind.name == "linear")
    torch._dynamo.reset()


@every_kind
@pytest.mark.parametrize("integers", ["truncated", "left alone"])
def test_an_averaged_copy_is_evaluated_whatever_became_of_its_counters(kind: Kind, integers: str) -> None:
    layer = kind.layer(PARTS)
    average = copy.deepcopy(layer)
    for step in range(30):
        layer(kind.input(seed=step))
        for name, value in average.state_dict().items():
            new = layer.state_dict()[name]
            if value.is_floating_point():
                value.lerp_(new, 0.1)
            elif integers == "truncated":
                value.copy_((0.9 * value + 0.1 * new).to(value.dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = average.eval()(kind.input())
    full = kind.layer(PARTS)
    full.load_state_dict({name: average.state_dict()[name] for name in full.state_dict()})
    full.whitening.num_updates.fill_(30)
    assert torch.equal(found, full.eval()(kind.input()))


@every_kind
def test_a_copy_of_inference_mode_is_evaluated_and_trained_on_in_it(kind: Kind) -> None:
    layer = kind.trained(5)
    with torch.inference_mode():
        made = copy.deepcopy(layer)
    assert torch.equal(made.eval()(kind.input()), layer.eval()(kind.input()))
    made.train()
    with torch.inference_mode():
        assert torch.equal(made(kind.input()), layer.train()(kind.input()))


@every_kind
@pytest.mark.parametrize("steps_before", [0, 20])
def test_made_on_meta_and_assigned(kind: Kind, steps_before: int) -> None:
    layer = kind.trained(steps_before)
    with torch.device("meta"):
        empty = kind.layer()
    empty.load_state_dict(layer.state_dict(), assign=True)
    empty.to("cpu")
    assert not any(buffer.is_meta for buffer in empty.buffers())
    empty = copy.deepcopy(empty)  # an assigned state is shared
    for step in range(steps_before, steps_before + 18):
        assert torch.equal(empty(kind.input(seed=step)), layer(kind.input(seed=step)))
    assert_same_state(empty, layer)


# ---- the geometry of a convolution ----------------------------------------------------------------------


WRITES: dict[str, dict[str, Any]] = {
    "stride": {"stride": (2, 2)},
    "a number": {"stride": 2, "dilation": 2, "padding": 2},
    "dilation and padding": {"dilation": (2, 2), "padding": (2, 2)},
    "same": {"padding": "same"},
    "valid": {"padding": "valid"},
    "one after the other": {"padding": (0, 1), "stride": [1, 2]},
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("groups", [1, 2])
def test_geometry_written_afterwards_is_that_of_a_layer_built_so(name: str, groups: int) -> None:
    def layer(**options: Any) -> WhitenedConv2d:
        torch.manual_seed(0)
        return WhitenedConv2d(4, 6, 3, groups=groups, **options)

    given = {"padding": 1, **WRITES[name]}
    written, built = layer(padding=1), layer(**given)
    for attribute, value in WRITES[name].items():
        setattr(written, attribute, value)
    assert written.whitening.window == built.whitening.window
    assert copy.deepcopy(written).whitening.window == built.whitening.window
    for step in range(20):
        x = torch.randn(5, 4, 9, 8, generator=torch.Generator().manual_seed(step)) + 1
        mine, known = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = written(mine), built(known)
        assert torch.equal(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(mine.grad, known.grad)
    assert_same_state(written, built)
    assert torch.equal(written.eval()(x), built.eval()(x))


def test_a_padding_mode_written_afterwards_is_what_torch_makes_of_it() -> None:
    layer, plain = WhitenedConv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    for each in (layer, plain):
        each.padding_mode = "reflect"
        each.padding = (2, 2)  # which torch does not look at with this mode
    x = torch.randn(3, 2, 6, 6)
    with pytest.warns(StatisticsWarning):
        torch.testing.assert_close(layer.eval()(x), plain(x), **SAME)
    assert layer.whitening.window.padding == ((1, 1), (1, 1))
    mean = nn.functional.unfold(nn.functional.pad(x, (1, 1, 1, 1), mode="reflect"), 3).mean((0, 2))
    torch.testing.assert_close(layer.train().whitening(x).mean, mean, **SAME)


@pytest.mark.parametrize(("name", "value"), [("kernel_size", (5, 5)), ("groups", 2), ("in_channels", 8)])
def test_what_the_statistics_are_made_for_cannot_be_written(name: str, value: Any) -> None:
    layer = WhitenedConv2d(4, 4, 3)
    before = getattr(layer, name)
    setattr(layer, name, before)  # the same is no change
    with pytest.raises(ValueError, match=rf"WhitenedConv2d\(4, 4, .*expected {name}=.*Build another layer"):
        setattr(layer, name, value)
    assert getattr(layer, name) == before


# ---- tracers --------------------------------------------------------------------------------------------


@every_kind
def test_evaluation_is_traced_and_checked_by_torch_jit(kind: Kind) -> None:
    layer = kind.trained(20).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        warnings.filterwarnings("ignore", ".*torch.jit.trace.* is deprecated")
        traced = torch.jit.trace(layer, kind.input(), check_trace=True)
    x = kind.input(3, seed=4)
    torch.testing.assert_close(traced(x), layer(x), **SAME)
    with torch.no_grad():  # made from the weights of the moment, not from folded ones of before
        for parameter in layer.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(traced(x), layer(x), **SAME)


@every_kind
def test_a_layer_is_a_leaf_of_fx(kind: Kind) -> None:
    network = nn.Sequential(kind.trained(20), nn.ReLU())
    traced: GraphModule = symbolic_trace(network)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["0", "1"]
    assert torch.equal(traced(kind.input()), copy.deepcopy(network)(kind.input()))


@every_kind
def test_an_ensemble_trains_under_vmap_as_its_members_alone(kind: Kind) -> None:
    def members() -> list[nn.Module]:
        found = []
        for seed in (1, 2):
            member = kind.layer(PARTS)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in member.parameters():
                    parameter.normal_(generator=generator)
            found.append(member)
        return found

    together, alone = members(), members()
    state = stack_module_state(together)
    for step in range(18):
        x = kind.input(seed=step)
        xs = torch.stack([x, x * 2 + 1])
        y = vmap(lambda p, b, x: functional_call(together[0], (p, b), (x,)))(*state, xs)
        torch.testing.assert_close(y, torch.stack([m(x) for m, x in zip(alone, xs, strict=True)]), **SAME)
    for place, member in enumerate(alone):
        for name, value in member.named_buffers():
            torch.testing.assert_close(state[1][name][place], value, **SAME, msg=name)


def test_several_batches_for_one_set_of_statistics_are_refused_in_our_words() -> None:
    layer = WhitenedConv2d(2, 3, 3)
    with pytest.raises(StatisticsError, match=r"under vmap in training mode and one set of running statistics"):
        vmap(layer)(torch.randn(5, 4, 2, 6, 6))
    layer(torch.randn(4, 2, 6, 6))
    assert vmap(layer.eval())(torch.randn(5, 4, 2, 6, 6)).shape == (5, 4, 3, 4, 4)


# ---- threads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [param for param in KINDS if param.id in ("conv2d", "linear", "channel")])
def test_eight_threads_serve_one_layer_and_leave_nothing_behind(kind: Kind) -> None:
    layer = kind.trained(20).eval()
    x, before = kind.input(), buffers(layer)
    attributes = set(vars(layer)) | {"_cache"}
    expected, wrong = copy.deepcopy(layer)(x), []
    start = threading.Barrier(8)

    def serve() -> None:
        start.wait()
        for _ in range(20):
            with torch.inference_mode():
                if not torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-6):
                    wrong.append(1)

    threads = [threading.Thread(target=serve) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for name, value in layer.named_buffers():
        assert torch.equal(value, before[name])
    assert set(vars(layer)) <= attributes
    assert not layer._forward_hooks and not layer._forward_pre_hooks


# ---- devices that nobody waits for ----------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("bad", [None, torch.nan, 3.0], ids=str)
def test_a_step_that_may_not_look_at_numbers_is_the_step_that_does(
    kind: Kind, bad: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator, where a number in Python means to wait."""
    layers = kind.layer(PARTS), kind.layer(PARTS)
    for step in range(36):
        x = kind.input(seed=step)
        if bad is not None and step in (0, 5, 17, 24):
            x = x * 0 + bad
        found = []
        for place, layer in enumerate(layers):
            with monkeypatch.context() as patch, warnings.catch_warnings():
                warnings.simplefilter("ignore", NonFiniteWarning)
                if place:
                    patch.setattr("netdeconv.nn.batch.traced", lambda: True)
                    patch.setattr("netdeconv.nn.whitening.Whitening.takes_own_root", lambda self, x: False)
                mine = x.clone().requires_grad_()
                y = layer(mine)
                y.square().sum().backward()
                found.append((y.detach(), mine.grad))
        torch.testing.assert_close(*found, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert_same_state(*layers, **SAME)


# ---- gradients ------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("before", [3, 17], ids=["refresh", "ordinary step"])
def test_a_gradient_with_a_graph_is_the_gradient_where_x_depends_on_the_weight(kind: Kind, before: int) -> None:
    """As in a layer that is applied twice; what comes over x is not the layer's to add."""
    layer = kind.trained(before, PARTS)
    leaf = next(layer.parameters(), None)
    if leaf is None:
        pytest.skip("nothing to learn")
    found = []
    for create_graph in (False, True):
        copied = copy.deepcopy(layer)
        parameters = list(copied.parameters())
        x = kind.input(seed=9).requires_grad_()
        y = copied(x * (1 + parameters[0].square().sum()))
        found.append(torch.autograd.grad(y.square().sum(), [x, *parameters], create_graph=create_graph))
    for ours, theirs in zip(*found, strict=True):
        size = float(theirs.detach().abs().max())
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-3, atol=1e-3 * size)


def test_half_precision_takes_gradients_that_fit_into_it() -> None:
    torch.manual_seed(0)
    layer = WhitenedConv2d(3, 8, 3, padding=1).half()
    x = torch.randn(16, 3, 32, 32, dtype=torch.half, requires_grad=True)
    (10 * layer(x).float().square().sum()).backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize(("name", "value"), [("padding", "bogus"), ("stride", (2, 2, 2)), ("dilation", 1.5)])
def test_geometry_that_cannot_be_meant_is_refused_where_it_is_written(name: str, value: Any) -> None:
    layer = WhitenedConv2d(3, 4, 3, padding=1)
    window, before = layer.whitening.window, getattr(layer, name)
    with pytest.raises(ValueError, match=rf"WhitenedConv2d.*expected {name} as torch's convolutions take it, got "):
        setattr(layer, name, value)
    assert getattr(layer, name) == before
    assert layer.whitening.window == window


def test_a_computed_weight_is_computed_once_a_step() -> None:
    counted = []

    class Counting(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            counted.append(1)
            return weight * 1

    layer = WhitenedConv2d(3, 4, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", Counting())
    counted.clear()
    layer(torch.randn(4, 3, 6, 6))
    assert len(counted) == 1
    with torch.no_grad():
        layer.eval()(torch.randn(4, 3, 6, 6))
    assert len(counted) == 2


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_shapes_are_found_without_numbers(kind: Kind, training: bool) -> None:
    """As libraries do that count operations or parameters."""
    layer = kind.layer(device="meta").train(training)
    y = layer(kind.input().to("meta"))
    assert y.is_meta
    assert y.shape == kind.layer()(kind.input()).shape
