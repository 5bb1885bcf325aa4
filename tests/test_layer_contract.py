"""What every layer must bear: copying, saving, half precision, odd batches, freezing, checkpointing.

Compiling, which belongs to the same contract, is in ``test_layer_compile.py``.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from layer_kinds import BFLOAT16, PARTS, SAME, Kind, assert_same_state, buffers, every_kind
from netdeconv import NonFiniteWarning, StatisticsWarning, WhiteningConfig, freeze, unfreeze


def assert_same_from_here(kind: Kind, one: Any, other: Any, steps: range) -> None:
    """Both go through the same further training steps, then evaluation, alike to the last bit."""
    assert_same_state(one, other)
    for step in steps:
        x = kind.input(seed=step)
        assert torch.equal(one(x), other(x))
    assert_same_state(one, other)
    x = kind.input(seed=99)
    assert torch.equal(one.eval()(x), other.eval()(x))


# ---- copies -----------------------------------------------------------------------------------------


@every_kind
def test_state_dict_round_trip(kind: Kind) -> None:
    layer = kind.trained(21, PARTS)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = kind.layer(PARTS)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_from_here(kind, layer, other, range(21, 41))
    ready = kind.layer(PARTS).eval()
    ready.load_state_dict(layer.state_dict())
    assert torch.equal(ready(kind.input()), layer(kind.input()))


@every_kind
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_goes_on_alike_and_on_its_own(kind: Kind, copied: Callable[[Any], Any]) -> None:
    layer = kind.trained(21, PARTS)
    before = buffers(layer)
    other = copied(layer)
    other(kind.input(seed=21))
    other(kind.input(seed=22))
    for name, value in layer.named_buffers():
        assert torch.equal(value, before[name]), name
    assert_same_from_here(kind, layer, copied(layer), range(21, 41))


# ---- precision --------------------------------------------------------------------------------------


@every_kind
def test_gradcheck_in_training(kind: Kind) -> None:
    config = WhiteningConfig(block_size=2, update_every=1, differentiable=True)
    layer = kind.layer(config, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return output

    x = kind.input(2, dtype=torch.float64).requires_grad_()
    # Not in fast mode, whose tolerance for a whole Jacobian let through a scale without gradient.
    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


@every_kind
@pytest.mark.parametrize("solver", ["newton_schulz", "chebyshev", "eigh"])
def test_gradcheck_in_evaluation(kind: Kind, solver: str) -> None:
    layer = kind.layer(WhiteningConfig(solver=solver), dtype=torch.float64)
    for step in range(3):
        layer(kind.input(seed=step, dtype=torch.float64))
    layer.eval()
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return output

    x = kind.input(1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


@every_kind
def test_autocast_leaves_the_statistics_in_float32(kind: Kind) -> None:
    layer, plain = kind.layer(PARTS), kind.layer(PARTS)
    for step in range(19):
        x = kind.input(seed=step)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(leaf)
        expected = plain(x)
        assert y.dtype == (torch.float32 if kind.name == "channel" else torch.bfloat16)
        torch.testing.assert_close(y.float(), expected, **BFLOAT16)
        y.float().square().sum().backward()
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())
    assert_same_state(layer, plain)
    assert layer.whitening.running_root.dtype == torch.float32
    x = kind.input(seed=50)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x.to(torch.bfloat16))  # as it comes from a layer before
        torch.testing.assert_close(low.float(), plain(x).float(), **BFLOAT16)
        y = layer.eval()(x)
    torch.testing.assert_close(y.float(), plain.eval()(x), **BFLOAT16)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_module_of_another_type(kind: Kind, dtype: torch.dtype) -> None:
    layer, plain = kind.layer(PARTS).to(dtype), kind.layer(PARTS)
    for step in range(19):
        x = kind.input(seed=step).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), plain(x.float()), **BFLOAT16)
    state = layer.whitening.state_dict()
    assert {name for name, value in state.items() if value.dtype == torch.int64} == {
        "num_updates",
        "num_steps",
        "last_update",
        "num_skipped",
    }
    assert state["running_root"].dtype == dtype
    x = kind.input(seed=50).to(dtype)
    torch.testing.assert_close(layer.eval()(x).float(), plain.eval()(x.float()), **BFLOAT16)


# ---- batches ----------------------------------------------------------------------------------------


@every_kind
def test_an_empty_batch(kind: Kind) -> None:
    layer = kind.layer()
    full = layer(kind.input())
    for each, updates in ((layer, 1), (kind.layer(), 0)):
        before = buffers(each.whitening)
        x = kind.input(0).requires_grad_()
        y = each(x)
        assert y.shape == (0, *full.shape[1:])
        y.sum().backward()
        assert x.grad is not None
        for name, value in each.whitening.named_buffers():
            assert torch.equal(value, before[name]), name
        assert int(each.whitening.num_updates) == updates
        assert int(each.whitening.num_steps) == updates
    assert layer.eval()(kind.input(0)).shape == (0, *full.shape[1:])


@every_kind
@pytest.mark.parametrize("config", [None, WhiteningConfig(solver="eigh"), WhiteningConfig.paper()])
def test_a_batch_of_one(kind: Kind, config: WhiteningConfig | None) -> None:
    layer = kind.layer(config)
    x = kind.input(1).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert bool(y.isfinite().all())
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    together = layer.eval()(kind.input(3))
    apart = torch.cat([layer(sample.unsqueeze(0)) for sample in kind.input(3)])
    torch.testing.assert_close(apart, together, **SAME)


def unusual_layouts(x: Tensor) -> dict[str, Tensor]:
    """The same numbers, laid out in memory in other ways."""
    wide = torch.stack([x, x + 1], dim=-1)
    layouts = {
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
        "strided": wide[..., 0],
        "flipped": x.flip(0).flip(0),
    }
    if x.dim() == 4:
        layouts["channels_last"] = x.contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        layouts["channels_last_3d"] = x.contiguous(memory_format=torch.channels_last_3d)
    return layouts


@every_kind
@pytest.mark.parametrize("config", [PARTS, WhiteningConfig.paper()], ids=["default", "paper"])
def test_the_memory_layout_does_not_matter(kind: Kind, config: WhiteningConfig) -> None:
    x = kind.input()
    plain = kind.layer(config)
    expected = plain(x)
    for name, other in unusual_layouts(x).items():
        layer = kind.layer(config)
        torch.testing.assert_close(layer(other), expected, **SAME, msg=name)
        assert_same_state(layer, plain, **SAME)


@every_kind
def test_expanded_input(kind: Kind) -> None:
    x = kind.input(1).expand(4, *kind.size)
    torch.testing.assert_close(kind.layer()(x), kind.layer()(x.contiguous()), **SAME)


# ---- what must not change the statistics ---------------------------------------------------------------


@every_kind
def test_evaluation_changes_nothing(kind: Kind) -> None:
    layer = kind.trained(17, PARTS).eval()
    before = buffers(layer)
    x = kind.input(seed=50)
    outputs = [layer(x)]
    layer(kind.input(seed=51) * 100)
    with torch.no_grad():
        outputs.append(layer(x))
    with torch.inference_mode():
        outputs.append(layer(x).clone())
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    for name, value in layer.named_buffers():
        assert torch.equal(value, before[name]), name


@every_kind
def test_training_without_gradients_gathers_the_same_statistics(kind: Kind) -> None:
    layer, other = kind.trained(19, PARTS), kind.layer(PARTS)
    with torch.no_grad():
        for step in range(19):
            other(kind.input(seed=step))
    assert_same_state(layer, other)


@every_kind
def test_frozen_in_training_is_evaluation_until_unfrozen(kind: Kind) -> None:
    layer = kind.trained(17, PARTS)
    before, x = buffers(layer), kind.input(seed=50)
    expected = copy.deepcopy(layer).eval()(x)
    assert torch.equal(freeze(layer)(x), expected)
    assert layer.training
    for name in before.keys() & layer.state_dict().keys():  # not the mode itself, which is not saved
        assert torch.equal(layer.state_dict()[name], before[name]), name
    assert copy.deepcopy(layer).whitening.frozen
    unfreeze(layer)
    assert_same_from_here(kind, layer, kind.trained(17, PARTS), range(17, 20))


@every_kind
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("solver", ["newton_schulz", "chebyshev", "eigh"])
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_batch_that_is_not_finite_does_not_poison(
    kind: Kind, poison: float, solver: str, differentiable: bool
) -> None:
    layer = kind.trained(2, WhiteningConfig(solver=solver, differentiable=differentiable))
    before, x = buffers(layer.whitening), kind.input()
    x.view(-1)[x.numel() // 2] = poison
    with pytest.warns(NonFiniteWarning, match=r"got NaN, infinite or constant values, or a single row, in 1 step"):
        layer(x)
    for name, value in layer.whitening.named_buffers():
        if name not in ("num_steps", "num_skipped"):
            assert torch.equal(value, before[name]), name
    assert bool(layer(kind.input(seed=3)).isfinite().all())
    assert int(layer.whitening.num_updates) == 3


@every_kind
def test_nothing_is_remembered_of_a_first_batch_that_is_not_finite(kind: Kind) -> None:
    layer = kind.layer()
    with pytest.warns(NonFiniteWarning, match="expected finite input"):
        layer(kind.input() * torch.nan)
    silent = kind.name == "pointwise"  # which may have been trained on single pixels
    with contextlib.nullcontext() if silent else pytest.warns(StatisticsWarning, match="got none so far"):
        layer.eval()(kind.input())
    layer.train()(kind.input())
    fresh = kind.trained(1)
    torch.testing.assert_close(layer.eval()(kind.input()), fresh.eval()(kind.input()), **SAME)


# ---- autograd ---------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("first", [3, 16, 17])
@pytest.mark.parametrize("differentiable", [False, True])
def test_two_forwards_and_one_backward(kind: Kind, first: int, differentiable: bool) -> None:
    config = PARTS.replace(differentiable=differentiable)
    together, apart = kind.trained(first, config), kind.trained(first, config)
    xs = [kind.input(seed=50 + place).requires_grad_() for place in range(2)]
    sum(together(x).square().sum() for x in xs).backward()
    for x in xs:
        again = x.detach().clone().requires_grad_()
        apart(again).square().sum().backward()
        torch.testing.assert_close(x.grad, again.grad, **SAME)
    for ours, theirs in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **SAME)


@every_kind
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("config", [PARTS, WhiteningConfig.paper()], ids=["default", "paper"])
def test_activation_checkpointing_updates_once(kind: Kind, use_reentrant: bool, config: WhiteningConfig) -> None:
    plain, saved = kind.layer(config), kind.layer(config)
    for step in range(19):
        one, other = (kind.input(seed=step).requires_grad_() for _ in range(2))
        expected = plain(one)
        y = checkpoint(saved, other, use_reentrant=use_reentrant)
        assert torch.equal(y, expected)
        expected.square().sum().backward()
        y.square().sum().backward()
        assert torch.equal(one.grad, other.grad)
        assert int(saved.whitening.num_steps) == step + 1
    assert_same_state(saved, plain)
    for ours, theirs in zip(saved.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@every_kind
def test_frozen_weights_let_the_gradient_through(kind: Kind) -> None:
    layer = kind.trained(2).requires_grad_(False)
    x = kind.input().requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())


@every_kind
def test_no_warning_on_ordinary_data(kind: Kind) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        kind.trained(20).eval()(kind.input())
