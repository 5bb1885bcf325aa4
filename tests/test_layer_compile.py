"""Compiled layers: one graph for each kind of step, none after that, and the same numbers as eager."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from layer_kinds import BY_NAME, SAME, Kind, assert_same_state, buffers
from netdeconv import ChannelWhitening, NonFiniteWarning, WhitenedLinear, WhiteningConfig


@pytest.fixture
def compiled() -> Iterator[Callable[..., tuple[Any, list[int]]]]:
    """Compile a module as one graph; also returns a list that grows by one with every compilation."""

    def compile_(module: nn.Module, backend: str = "aot_eager") -> tuple[Any, list[int]]:
        count: list[int] = []
        inner = torch._dynamo.lookup_backend(backend)

        def counting(graph: Any, inputs: Any) -> Any:
            count.append(1)
            return inner(graph, inputs)

        return torch.compile(module, backend=counting, fullgraph=True), count

    torch._dynamo.reset()
    yield compile_
    torch._dynamo.reset()


def train_both(kind: Kind, ours: Any, eager: Any, steps: range) -> None:
    for step in steps:
        mine, theirs = (kind.input(seed=step).requires_grad_() for _ in range(2))
        y, expected = ours(mine), eager(theirs)
        torch.testing.assert_close(y, expected, **SAME)
        along = torch.randn(y.shape, generator=torch.Generator().manual_seed(step))
        y.backward(along)
        expected.backward(along)
        torch.testing.assert_close(mine.grad, theirs.grad, **SAME)


# Few iterations: each is more graph to compile, and none is like another.
COMPILED = WhiteningConfig(block_size=3, num_iters=1, max_samples=100)
KEPT_ROOT = COMPILED.replace(scale=False, average="root", differentiable=False, update_every=16)
PAPER = WhiteningConfig.paper(num_iters=1)
DETACHED = PAPER.replace(differentiable=False, update_every=2)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        *(pytest.param(kind, COMPILED, id=name) for name, kind in BY_NAME.items()),
        *(pytest.param(BY_NAME[name], KEPT_ROOT, id=f"{name}_kept_root") for name in ("conv2d", "linear")),
        *(pytest.param(BY_NAME[name], PAPER, id=f"{name}_paper") for name in ("conv2d", "linear")),
        pytest.param(BY_NAME["conv2d"], DETACHED, id="conv2d_paper_without_gradient"),
    ],
)
def test_compiled_once_for_each_kind_of_step(kind: Kind, config: WhiteningConfig, compiled: Any) -> None:
    layer, eager = kind.layer(config), kind.layer(config)
    ours, count = compiled(layer)
    train_both(kind, ours, eager, range(18))  # 16 refreshes, one more, then the first ordinary step
    steps = len(count)
    assert steps == (1 if layer.whitening.config.update_every == 1 else 2)
    x = kind.input(seed=99)
    ours.eval(), eager.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), eager(x), **SAME)
    assert len(count) == steps + 1
    for first in (18, 30):  # nothing is compiled again, whatever the order
        ours.train(), eager.train()
        train_both(kind, ours, eager, range(first, first + 12))
        ours.eval(), eager.eval()
        with torch.no_grad():
            torch.testing.assert_close(ours(x), eager(x), **SAME)
    assert len(count) == steps + 1
    assert_same_state(layer, eager, **SAME)
    assert int(layer.whitening.num_steps) == 42
    assert layer.whitening.clock.steps == 42


def test_autocast_does_not_reach_the_fold_of_a_compiled_layer(compiled: Any) -> None:
    kind = BY_NAME["conv2d"]
    layer, eager = kind.layer(COMPILED), kind.layer(COMPILED)
    gradients = []
    for parameters in (compiled(layer.whitened_parameters)[0], eager.whitened_parameters):
        with torch.autocast("cpu", torch.bfloat16):
            weight, bias = parameters(kind.input())
        along = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        (weight.flatten() @ along.flatten() + bias.square().sum()).backward()
    for mine, theirs in zip(layer.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)
        gradients.append(mine.grad)
    assert len(gradients) == 2


def test_a_smaller_last_batch_is_compiled_once_for_all_sizes(compiled: Any) -> None:
    kind = BY_NAME["linear"]
    layer, eager = kind.layer(KEPT_ROOT), kind.layer(KEPT_ROOT)
    ours, count = compiled(layer)
    counts = []
    with torch.no_grad():
        for step, batch in enumerate([8] * 18 + [7, 7, 5, 5, 3, 3, 8, 8, 6, 6, 4, 4]):
            x = kind.input(batch, seed=step)
            torch.testing.assert_close(ours(x), eager(x), **SAME)
            counts.append(len(count))
    assert counts[17] == 2
    assert counts[19] == counts[-1] == 4
    assert_same_state(layer, eager, **SAME)


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="the default compiler needs one for C++"
)
def test_the_default_compiler_computes_the_same(compiled: Any) -> None:
    kind = BY_NAME["channel"]  # small, and without gradients: it is slow
    layer, eager = kind.layer(COMPILED), kind.layer(COMPILED)
    ours, count = compiled(layer, backend="inductor")
    with torch.no_grad():
        for step in range(40):
            x = kind.input(seed=step)
            torch.testing.assert_close(ours(x), eager(x), **SAME)
        ours.eval(), eager.eval()
        torch.testing.assert_close(ours(x), eager(x), **SAME)
    assert len(count) == 3
    assert_same_state(layer, eager, **SAME)


def test_a_compiled_network_advances_every_layer(compiled: Any) -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        config = WhiteningConfig(num_iters=1)
        return nn.Sequential(WhitenedLinear(5, 3, whitening=config), ChannelWhitening(3, whitening=config))

    model, eager = network(), network()
    ours, count = compiled(model)
    with torch.no_grad():
        for step in range(40):
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
            torch.testing.assert_close(ours(x), eager(x), **SAME)
    assert len(count) == 2
    assert_same_state(model, eager, **SAME)
    copied = copy.deepcopy(model)
    assert [module.whitening.clock.steps for module in copied] == [40, 40]


@pytest.mark.parametrize("config", [COMPILED, KEPT_ROOT], ids=["scaled", "kept_root"])
@pytest.mark.parametrize("bad", [torch.nan, 0.0], ids=["nan", "constant"])
def test_a_compiled_layer_leaves_out_what_has_no_statistics(compiled: Any, config: WhiteningConfig, bad: float) -> None:
    kind = BY_NAME["channel"]
    layer = kind.layer(config)
    ours, _ = compiled(layer)
    ours(kind.input())
    before = buffers(layer.whitening)
    ours(kind.input() * bad)
    compared = [name for name in before if name not in ("num_steps", "num_skipped")]
    assert {"running_mean", "running_root", "num_updates"} < set(compared)
    for name in compared:
        assert torch.equal(before[name], layer.whitening.get_buffer(name)), name
    with pytest.warns(NonFiniteWarning, match=r"in 1 step\(s\)"):
        ours.eval()


# torch's compiler looks at the gradient of an input that comes from another layer
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_many_layers_compiled_one_by_one_share_their_graphs() -> None:
    """More layers than the compiler's limit of graphs for one piece of code."""
    torch._dynamo.reset()
    net = nn.Sequential(*[WhitenedLinear(4, 4) for _ in range(10)])
    for layer in net:
        layer.compile(fullgraph=True, backend="aot_eager")
    for _ in range(18):
        net(torch.randn(8, 4))
    assert all(layer.whitening.clock.steps == 18 for layer in net)
