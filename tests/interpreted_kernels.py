"""Steps with the kernels of a GPU beside steps without: run by ``test_kernels.py``, under Triton's interpreter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from netdeconv import NonFiniteWarning, WhitenedConv1d, WhitenedConv2d, WhitenedConv3d, WhiteningConfig
from netdeconv.functional import kernels, on_gpu

# of NumPy, which the interpreter computes with
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "3x3": (lambda: WhitenedConv2d(5, 6, 3, padding=1), (4, 5, 6, 7)),
    "3x3, stride 2, no bias": (lambda: WhitenedConv2d(5, 6, 3, stride=2, bias=False), (4, 5, 7, 6)),
    "5x5, dilated": (lambda: WhitenedConv2d(2, 3, 5, padding=2, dilation=2), (3, 2, 9, 9)),
    "1x1": (lambda: WhitenedConv2d(7, 4, 1), (4, 7, 5, 5)),
    "1x1, stride 2": (lambda: WhitenedConv2d(7, 4, 1, stride=2), (4, 7, 5, 5)),
    "one channel": (lambda: WhitenedConv2d(1, 4, 3), (4, 1, 6, 6)),
    "blocks with a rest": (lambda: WhitenedConv2d(7, 4, 3, whitening=WhiteningConfig(block_size=3)), (4, 7, 5, 5)),
    "grouped": (lambda: WhitenedConv2d(6, 8, 3, padding=1, groups=2), (4, 6, 5, 5)),
    "depthwise": (lambda: WhitenedConv2d(6, 12, 3, padding=1, groups=6), (4, 6, 5, 5)),
    "1d": (lambda: WhitenedConv1d(3, 4, 3, padding=1), (5, 3, 11)),
    "3d": (lambda: WhitenedConv3d(3, 4, (1, 3, 3), padding=(0, 1, 1)), (2, 3, 3, 5, 4)),
    "one column": (lambda: WhitenedConv2d(5, 6, (3, 1)), (4, 5, 6, 1)),
    "one row": (lambda: WhitenedConv2d(5, 6, (1, 3), padding=(0, 1)), (4, 5, 1, 6)),
    "some images": (lambda: WhitenedConv2d(2, 3, 3, padding=1), (48, 2, 17, 16)),
}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
EXACT = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(params=[False, True], ids=["contiguous", "channels_last"])
def channels_last(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def layer_of(make: Any, *, last: bool = False) -> Any:
    torch.manual_seed(0)
    layer = make()
    with torch.no_grad():
        layer.weight.mul_(3)
    dims = layer.weight.dim()
    return layer.to(memory_format=LAST[dims]) if last and dims in LAST else layer


def batch(shape: tuple[int, ...], seed: int, *, last: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x * (1 + torch.arange(shape[1])).reshape(-1, *[1] * (len(shape) - 2)) ** 0.5 + 0.7
    x[:, -1] *= 0.01  # below the least variance, where there are several
    return x.contiguous(memory_format=LAST[len(shape)]) if last and len(shape) in LAST else x


def step(layer: Any, x: Tensor, *, by_kernels: bool, needs: bool = True, autocast: bool = False) -> list[Tensor]:
    """Output and gradients of a step."""
    on_gpu._interpreted.cache_clear()
    before = on_gpu._interpreted
    if not by_kernels:
        on_gpu._interpreted = lambda: False  # type: ignore[assignment]
    try:
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(needs)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = layer(x)
        along = torch.randn(y.shape, dtype=torch.float32, generator=torch.Generator().manual_seed(7))
        (y.float() * along).sum().backward()
    finally:
        on_gpu._interpreted = before
    found = [y.detach(), *([x.grad] if needs else []), *(parameter.grad for parameter in layer.parameters())]
    layer.zero_grad(set_to_none=True)
    return found


def trained(make: Any, shape: tuple[int, ...], *, last: bool = False, steps: int = 17) -> tuple[Any, Any]:
    """The same layer twice, after steps without kernels; 17 is where the first ordinary step comes."""
    layer = layer_of(make, last=last)
    for seed in range(steps):
        step(layer, batch(shape, seed, last=last), by_kernels=False)
    assert not layer.whitening.clock.due
    return layer, copy.deepcopy(layer)


def assert_same(ours: list[Tensor], theirs: list[Tensor], **tolerance: float) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **(tolerance or EXACT))


def assert_same_state(one: Any, other: Any, **tolerance: float) -> None:
    assert one.whitening.clock.steps == other.whitening.clock.steps
    for (name, mine), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, **(tolerance or EXACT), msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_without(case: str, channels_last: bool) -> None:
    make, shape = CASES[case]
    ours, theirs = trained(make, shape, last=channels_last)
    for seed in (20, 21):  # an ordinary step, and a refresh after it
        x = batch(shape, seed, last=channels_last)
        assert on_gpu.kernels_for(x) is kernels
        assert_same(step(ours, x, by_kernels=True), step(theirs, x, by_kernels=False))
        assert_same_state(ours, theirs)


def test_without_a_gradient_of_x() -> None:
    make, shape = CASES["3x3"]
    ours, theirs = trained(make, shape)
    x = batch(shape, 20)
    found = step(ours, x, by_kernels=True, needs=False)
    assert_same(found, step(theirs, x, by_kernels=False, needs=False))


@pytest.mark.parametrize("kind", ["nan", "infinite", "constant", "nan elsewhere"])
def test_batches_that_do_not_count(kind: str) -> None:
    make, shape = CASES["some images"]
    ours, theirs = trained(make, shape)
    x = batch(shape, 20)
    if kind == "constant":
        x = torch.full_like(x, 3.0)
    else:
        x[1 if kind == "nan elsewhere" else 0, 0, 2, 2] = float("inf" if kind == "infinite" else "nan")
    step(ours, x, by_kernels=True)
    with pytest.warns(NonFiniteWarning, match="finite input that varies"):
        step(theirs, x, by_kernels=False)
    assert int(ours.whitening.num_skipped) == 1
    assert_same_state(ours, theirs)
    x = batch(shape, 21)  # a refresh, and an ordinary step after it
    assert_same(step(ours, x, by_kernels=True), step(theirs, x, by_kernels=False))
    assert_same(step(ours, x, by_kernels=True), step(theirs, x, by_kernels=False))


def test_a_constant_batch_is_whitened_by_the_running_values_and_has_no_slope() -> None:
    make, shape = CASES["3x3"]
    ours, theirs = trained(make, shape)
    x = torch.full(shape, 3.0)
    with pytest.warns(NonFiniteWarning):
        theirs_found = step(theirs, x, by_kernels=False)
    assert_same(step(ours, x, by_kernels=True), theirs_found)


def test_the_first_step_that_counts_replaces_the_running_values() -> None:
    make, shape = CASES["3x3"]
    ours = layer_of(make)
    whitening = ours.whitening
    whitening.num_steps.fill_(17)  # as after 17 batches that did not count
    theirs = copy.deepcopy(ours)
    x = batch(shape, 3)
    step(ours, x, by_kernels=True)
    step(theirs, x, by_kernels=False)
    assert_same_state(ours, theirs)
    torch.testing.assert_close(whitening.running_var, x.var((0, 2, 3), correction=0), **EXACT)


@pytest.mark.parametrize("momentum", [None, 0.3])
@pytest.mark.parametrize("debias", [True, False])
def test_averages(momentum: float | None, debias: bool) -> None:
    config = WhiteningConfig(momentum=momentum, debias=debias)
    ours, theirs = trained(lambda: WhitenedConv2d(3, 4, 3, whitening=config), (4, 3, 6, 6))
    x = batch((4, 3, 6, 6), 20)
    assert_same(step(ours, x, by_kernels=True), step(theirs, x, by_kernels=False))
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("case", ["3x3", "depthwise", "1x1"])
def test_autocast(case: str, channels_last: bool) -> None:
    make, shape = CASES[case]
    ours, theirs = trained(make, shape, last=channels_last)
    x = batch(shape, 20, last=channels_last).bfloat16()
    found, expected = (step(layer, x, by_kernels=kernel, autocast=True) for layer, kernel in ((ours, 1), (theirs, 0)))
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine.float(), other.float(), rtol=0.05, atol=0.05 * float(other.abs().max()))
    assert_same_state(ours, theirs, rtol=1e-3, atol=1e-4)


def test_second_gradients() -> None:
    make, shape = CASES["3x3"]
    ours, theirs = trained(make, shape)
    found = []
    for layer, by_kernels in ((ours, True), (theirs, False)):
        x = batch(shape, 20).requires_grad_()
        interpreted = on_gpu._interpreted
        on_gpu._interpreted = interpreted if by_kernels else lambda: False  # type: ignore[assignment]
        try:
            (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
            grad.square().sum().backward()
        finally:
            on_gpu._interpreted = interpreted
        found.append([x.grad, layer.weight.grad])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_checkpointing_repeats_the_step() -> None:
    from torch.utils.checkpoint import checkpoint

    make, shape = CASES["3x3"]
    ours, plain = trained(make, shape)
    x = batch(shape, 20)
    expected = step(plain, x, by_kernels=True)
    own = x.clone().requires_grad_()
    y = checkpoint(ours, own, use_reentrant=False)
    along = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    (y * along).sum().backward()
    assert_same([y.detach(), own.grad, *(parameter.grad for parameter in ours.parameters())], expected)
    assert int(ours.whitening.num_steps) == int(plain.whitening.num_steps)


@pytest.mark.parametrize(
    "turned",
    [lambda x: x.transpose(2, 3), lambda x: x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unsqueeze(-1)],
    ids=["contiguous", "channels last"],
)
def test_a_dimension_of_one_entry_has_any_stride(turned: Any) -> None:
    ours, theirs = trained(*CASES["one column"])
    x = turned(batch((4, 5, 1, 6), 20))
    assert x.shape == (4, 5, 6, 1)
    assert x.stride(3) != x.stride(2)
    assert on_gpu.kernels_for(x) is kernels
    assert_same(step(ours, x, by_kernels=True), step(theirs, x, by_kernels=False))
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("last", [(True, False), (False, True)], ids=["weight last", "x last"])
def test_weight_and_x_in_different_layouts(last: tuple[bool, bool]) -> None:
    make, shape = CASES["3x3"]
    ours, theirs = trained(make, shape, last=last[0])
    x = batch(shape, 20, last=last[1])
    assert_same(step(ours, x, by_kernels=True), step(theirs, x, by_kernels=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["3x3", "grouped"])
def test_half_precision_models(case: str, dtype: torch.dtype) -> None:
    make, shape = CASES[case]
    exact, _ = trained(make, shape)
    layers = [copy.deepcopy(exact).to(dtype) for _ in range(2)]
    x = batch(shape, 20).to(dtype)
    found, expected = (step(layer, x, by_kernels=bool(k)) for k, layer in enumerate(layers))
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == other.dtype == dtype
        torch.testing.assert_close(mine.float(), other.float(), rtol=0.05, atol=0.05 * float(other.abs().max()))
    assert_same_state(*layers, rtol=0.02, atol=0.02)


def test_another_default_dtype() -> None:
    make, shape = CASES["3x3"]
    ours, theirs = trained(make, shape)
    x = batch(shape, 20)
    expected = step(theirs, x, by_kernels=False)
    try:
        torch.set_default_dtype(torch.float64)
        assert_same(step(ours, x, by_kernels=True), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_several_gradients_at_once() -> None:
    make, shape = CASES["3x3"]
    ours, theirs = trained(make, shape)
    found = []
    for layer, interpreted in ((ours, on_gpu._interpreted), (theirs, lambda: False)):
        before, on_gpu._interpreted = on_gpu._interpreted, interpreted  # type: ignore[assignment]
        try:
            x = batch(shape, 20).requires_grad_()
            y = layer(x)
            along = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(7))
            found.append(torch.autograd.grad(y, [x, layer.weight], along, is_grads_batched=True))
        finally:
            on_gpu._interpreted = before
    assert_same(list(found[0]), list(found[1]))


def test_a_refresh_without_a_root_changes_nothing() -> None:
    config = WhiteningConfig(max_samples=8)
    ours, theirs = trained(lambda: WhitenedConv2d(3, 4, 1, whitening=config), (4, 3, 6, 6))
    for layer in (ours, theirs):
        step(layer, batch((4, 3, 6, 6), 20), by_kernels=False)
    x = torch.full((4, 3, 6, 6), 2.0)
    x[0, :, 2, 3] = 2.01  # which the sample does not see
    assert ours.whitening.clock.due
    found = step(ours, x, by_kernels=True)
    with pytest.warns(NonFiniteWarning):
        assert_same(found, step(theirs, x, by_kernels=False))
    assert int(ours.whitening.num_skipped) == 1
    assert_same_state(ours, theirs)


def test_versions_tell_of_what_was_written() -> None:
    make, shape = CASES["3x3"]
    ours, _ = trained(make, shape)
    whitening = ours.whitening
    written = (whitening.running_mean, whitening.running_var, whitening.num_steps, whitening.num_skipped)
    before = [buffer._version for buffer in written]
    step(ours, batch(shape, 20), by_kernels=True)
    assert all(buffer._version > version for buffer, version in zip(written, before, strict=True))


def test_what_has_none() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = torch.randn(4, 5, 6, 7)
    assert on_gpu.kernels_for(x) is kernels
    for other in (x.double(), x.transpose(2, 3), x[:, ::2], x[:0], x.to("meta")):
        assert on_gpu.kernels_for(other) is None
    with FakeTensorMode() as mode:
        assert on_gpu.kernels_for(mode.from_tensor(x)) is None
    assert on_gpu.kernels_for(mode.from_tensor(x)) is None
