"""What a whitening looks at, its buffers and counters, and what leaves them alone."""

from __future__ import annotations

import contextlib
import types
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from netdeconv import (
    ChannelWhitening,
    NonFiniteWarning,
    StatisticsWarning,
    WhitenedConv2d,
    WhitenedLinear,
    WhiteningConfig,
    freeze,
    unfreeze,
)
from netdeconv.functional import Window, inverse_sqrt, patch_moments, spread_patches
from netdeconv.nn import Whitening
from netdeconv.nn.estimator import Estimator
from one_feature import PLAIN, POINT, average, average_root, close, number, one_feature, remembered, used


class InCompiler:
    """torch as a traced function sees it. Patched into our module only: the compiler keeps what it finds in torch."""

    compiler = types.SimpleNamespace(is_compiling=lambda: True)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


# ---- what a refresh looks at -------------------------------------------------------------------------


@pytest.mark.parametrize(("sampling", "options"), [("spread", {"sampling_stride": 3}), ("tiles", {"grid": 3})])
@pytest.mark.parametrize(("average", "scale"), [("root", False), ("root", True), ("covariance", True)])
def test_every_refresh_looks_at_other_positions_for_the_root_and_at_all_for_the_mean_and_the_scale(
    sampling: str, options: dict[str, int], average: str, scale: bool
) -> None:
    config = WhiteningConfig(
        max_samples=40, momentum=1, update_every=1, sampling=sampling, average=average, scale=scale
    )
    window = Window((2,), (1,), (1,), ((0, 0),))
    whitening = Whitening(2, window, config=config, dtype=torch.float64)
    x = torch.randn(3, 2, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(-1)
    var = x.var((0, 2), correction=0) if scale else torch.ones(2, dtype=torch.float64)
    deviation = var.sqrt().repeat_interleave(2)
    covs = []
    for turn in range(3):
        whitening(x)
        sample = spread_patches(x, window, **options, max_samples=40, turn=torch.tensor(turn))
        cov = patch_moments(sample.rows / deviation, whitening.blocks, sample.weights).covs[0]
        diagonal = config.eps * torch.eye(4, dtype=torch.float64)
        close(whitening.running_root, inverse_sqrt(cov + diagonal, num_iters=3))
        close(whitening.running_mean, patch_moments(spread_patches(x, window).rows, whitening.blocks).mean)
        if whitening.running_var is not None:
            close(whitening.running_var, var)
        if average == "covariance":
            close(whitening.running_cov, cov)
        covs.append(cov)
    assert not torch.equal(covs[0], covs[1])
    assert not torch.equal(covs[1], covs[2])


def test_the_published_grid_gives_the_mean_too() -> None:
    whitening = Whitening(1, POINT, config=WhiteningConfig.paper(momentum=1, eps=0.0), dtype=torch.float64)
    whitening(torch.arange(8.0, dtype=torch.float64).reshape(2, 1, 4))  # of the row 0, 1, ..., 7 every third
    close(remembered(whitening), (3, 6**-0.5))


def test_eps_is_added_to_the_diagonal_of_every_part() -> None:
    constants_too = {"debias": False, "momentum": 1}  # as published
    config = WhiteningConfig(block_size=2, eps=0.25, solver="eigh", **constants_too)
    whitening = Whitening(3, Window(), config=config)
    whitening(torch.ones(4, 3))
    close(whitening.running_root, 2 * torch.eye(2), rtol=1e-6, atol=1e-6)
    close(whitening.running_root_rest, [[2.0]], rtol=1e-6, atol=1e-6)


# ---- buffers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "groups", "config", "mean", "roots"),
    [
        (6, 1, WhiteningConfig(), (54,), [(54, 54)]),
        (5, 1, WhiteningConfig(block_size=2), (45,), [(18, 18), (9, 9)]),
        (6, 2, WhiteningConfig(block_size=2), (54,), [(2, 18, 18), (2, 9, 9)]),
        (6, 6, WhiteningConfig(), (54,), [(6, 9, 9)]),
        (5, 1, WhiteningConfig(block_size=2, average="root"), (45,), [(18, 18), (9, 9)]),
        (6, 1, WhiteningConfig(scale=False, average="root", update_every=1), (54,), [(54, 54)]),
        (6, 1, WhiteningConfig.paper(block_size=4), (18,), [(18, 18)]),
        (6, 2, WhiteningConfig.paper(), (54,), [(2, 27, 27)]),
    ],
)
def test_buffers_start_at_zero_one_and_identity(
    channels: int, groups: int, config: WhiteningConfig, mean: tuple[int, ...], roots: list[tuple[int, ...]]
) -> None:
    layer = WhitenedConv2d(channels, 6, 3, groups=groups, whitening=config)
    state, settings = layer.whitening.state_dict(), layer.whitening.config
    kinds = ["running_root"]
    if settings.average == "covariance":
        kinds.append("running_cov")
    elif settings.update_every > 1:
        kinds.append("last_root")
    names = {f"{kind}{rest}": shape for kind in kinds for rest, shape in zip(("", "_rest"), roots, strict=False)}
    numbers = {"running_mean", "num_updates", "num_steps", "last_update", "num_skipped"}
    assert set(state) == numbers | set(names) | ({"running_var"} if settings.scale else set())
    assert torch.equal(state["running_mean"], torch.zeros(mean))
    if settings.scale:
        assert torch.equal(state["running_var"], torch.ones(channels))
    for name, shape in names.items():
        assert torch.equal(state[name], torch.eye(shape[-1]).expand(shape))
    for name in ("num_updates", "num_steps", "last_update", "num_skipped"):
        assert state[name].dtype == torch.int64
        assert state[name] == 0


def test_remembered_values_that_a_gradient_needs_are_copies() -> None:
    whitening = one_feature(PLAIN.replace(momentum=1))
    whitening(number(10, 2))
    found = whitening.remembered()
    whitening(number(20, 4))
    close((float(found.mean), float(found.roots[0])), (10, 0.5))
    with torch.no_grad():
        found = whitening.remembered()
    assert found.mean is whitening.running_mean
    assert found.roots[0] is whitening.running_root


def test_there_is_nothing_to_use_before_the_first_step() -> None:
    for whitening in (one_feature(PLAIN).eval(), freeze(one_feature(PLAIN))):
        with pytest.warns(StatisticsWarning, match="got none so far: whitened layers act as the plain ones"):
            assert used(whitening, number(1, 1)) == (0, 1)
    whitening = one_feature(PLAIN)
    whitening(number(1, 1))
    freeze(whitening)(number(5, 5))
    whitening.eval()(number(5, 5))


def test_values_written_from_outside_count_as_statistics() -> None:
    whitening = one_feature(PLAIN).eval()
    whitening.num_updates.fill_(1)
    assert whitening(number(1, 1))[0].tolist() == [0]


# ---- batches that must not count ----------------------------------------------------------------------


def test_a_batch_that_is_not_finite_is_left_out_and_reported() -> None:
    whitening = one_feature(PLAIN)
    whitening(number(10, 2))
    match = (
        r"^here: expected finite input that varies, got NaN, infinite or constant values, or a single row, "
        r"in 1 step\(s\), [12] so far\. The running statistics were left as they were; look for"
    )
    for poison, warned in ((torch.nan, True), (torch.inf, True), (-torch.inf, False)):
        with pytest.warns(NonFiniteWarning, match=match) if warned else contextlib.nullcontext():
            close(used(whitening, number(poison, 2)), (10, 1 / 2))
    assert (int(whitening.num_steps), int(whitening.num_updates), int(whitening.num_skipped)) == (4, 1, 3)
    whitening(number(20, 4))
    mean = average([10, 20], [4, 1], 0.1, True, 0)  # as if the steps left out had seen what was remembered
    close(remembered(whitening), (mean, average_root([2, 4], [1, 2.5], 0.1, True)))


def test_a_run_that_has_diverged_is_reported_ever_more_rarely() -> None:
    whitening = one_feature(PLAIN)
    with pytest.warns(NonFiniteWarning) as caught:
        for _ in range(20):
            whitening(number(torch.nan, 2))
    told = [str(each.message).partition(" so far")[0].rpartition("in ")[2] for each in caught]
    assert told == [
        "1 step(s), 1", "1 step(s), 2", "2 step(s), 4", "4 step(s), 8", "8 step(s), 16"
    ]  # fmt: skip


def test_a_step_without_a_refresh_is_left_out_as_well() -> None:
    whitening = one_feature(PLAIN.replace(update_every=2))
    for step in range(17):
        whitening(number(10, 2 + step % 2))
    before = remembered(whitening)
    with pytest.warns(NonFiniteWarning, match=r"in 1 step\(s\)"):
        found = used(whitening, number(torch.nan, 3))
    close(found, (10, 1 / 2))  # the running mean, the root of the last refresh
    assert remembered(whitening) == before
    assert (int(whitening.num_steps), int(whitening.num_updates), int(whitening.num_skipped)) == (18, 17, 1)


def test_after_a_refresh_that_is_left_out_the_last_good_root_is_used() -> None:
    whitening = one_feature(PLAIN.replace(update_every=2))
    for step in range(18):
        whitening(number(10, 2 + step % 3))  # the last refresh, at step 16, sees 3
    with pytest.warns(NonFiniteWarning, match=r"in 1 step\(s\)"):
        whitening(number(torch.nan, 7))
    close(used(whitening, number(5, 9)), (5, 1 / 3))


def test_a_first_batch_that_is_not_finite_leaves_nothing_to_evaluate() -> None:
    whitening = one_feature(PLAIN)
    with pytest.warns(NonFiniteWarning, match="expected finite input"):
        assert used(whitening, number(torch.nan, 1)) == (0, 1)
    with pytest.warns(StatisticsWarning, match="got none so far"):
        whitening.eval()(number(1, 1))
    whitening.train()(number(10, 2))
    close(remembered(whitening), (10, 1 / 2))


def test_reports_that_had_to_wait_come_when_the_mode_changes_and_only_once() -> None:
    whitening = one_feature(PLAIN)
    whitening(number(10, 2))
    whitening.num_skipped.add_(3)  # as a step on an accelerator leaves it
    with pytest.warns(NonFiniteWarning, match=r"in 3 step\(s\)"):
        whitening.eval()
    other = one_feature(PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whitening.train()
        other.load_state_dict(whitening.state_dict())
        other.eval()
    assert int(other.num_skipped) == 3


@pytest.mark.parametrize("update_every", [1, 2])
def test_an_empty_batch_is_no_step(update_every: int) -> None:
    whitening = one_feature(PLAIN.replace(update_every=update_every))
    empty = torch.empty(0, 1, dtype=torch.float64)
    assert used(whitening, empty) == (0, 1)
    whitening(number(10, 2))
    close(used(whitening, empty), (10, 1 / 2))
    assert (int(whitening.num_steps), int(whitening.num_updates), int(whitening.num_skipped)) == (1, 1, 0)
    assert whitening.clock.steps == 1
    close(remembered(whitening), (10, 1 / 2))


def test_after_nothing_but_skipped_refreshes_an_ordinary_step_is_the_first_one() -> None:
    whitening = one_feature(PLAIN.replace(update_every=16))
    with pytest.warns(NonFiniteWarning):
        for _ in range(17):
            whitening(number(torch.nan, 1))
    assert not whitening.clock.due
    whitening(number(10, 2))
    assert float(whitening.running_mean) == 10


CONSTANT = {
    "constant": torch.full((4, 2, 3), 5.0, dtype=torch.float64),
    "constants": torch.tensor([5.0, -3.0], dtype=torch.float64)[:, None].expand(4, 2, 3),
    "nan": torch.full((4, 2, 3), torch.nan, dtype=torch.float64),
    "single_row": torch.tensor([[[5.0], [-3.0]]], dtype=torch.float64),
}


@pytest.mark.parametrize(
    ("steps", "scale", "bad"),
    [
        *((1, scale, bad) for scale in (False, True) for bad in CONSTANT),
        *((17, True, bad) for bad in CONSTANT),
        (17, False, "nan"),  # without scale, an ordinary step takes the mean only, which constants have
    ],
)
@pytest.mark.parametrize("average", ["root", "covariance"])
def test_a_batch_without_statistics_changes_nothing(steps: int, scale: bool, bad: str, average: str) -> None:
    config = WhiteningConfig(average=average, scale=scale, update_every=16)
    whitening = Whitening(2, POINT, config=config, kind="channels", dtype=torch.float64)
    for step in range(steps):
        whitening(torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step)))
    before = {name: value.clone() for name, value in whitening.state_dict().items()}
    with pytest.warns(NonFiniteWarning, match=r"constant values, or a single row, in 1 step\(s\), 1 so far"):
        found = whitening(CONSTANT[bad])
    changed = {"num_steps", "num_skipped"}
    for name, value in whitening.state_dict().items():
        if name in changed:
            assert int(value) == int(before[name]) + 1
        else:
            torch.testing.assert_close(value, before[name], rtol=1e-15, atol=1e-15, msg=name)
    close(found.mean, before["running_mean"])
    if scale:
        close(found.scale, before["running_var"].rsqrt())


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (4, 2), (4, 4)])
def test_one_row_per_image_leaves_the_plain_layer(channels: int, groups: int) -> None:
    layer = WhitenedConv2d(channels, 4, 1, groups=groups)
    x = torch.randn(5, channels, 1, 1)
    start = {name: value.clone() for name, value in layer.whitening.state_dict().items()}
    plain = nn.functional.conv2d(x, layer.weight, layer.bias, groups=groups)
    assert layer.whitening(x) is None
    torch.testing.assert_close(layer(x), plain)
    torch.testing.assert_close(layer.eval()(x), plain)
    for name, value in layer.whitening.state_dict().items():
        assert torch.equal(value, start[name]), name
    published = WhitenedConv2d(channels, 4, 1, groups=groups, whitening=WhiteningConfig.paper())
    assert published.whitening(x) is not None
    assert WhitenedConv2d(4, 4, 3, padding=1).whitening(x) is not None  # several taps see more than one row


def test_an_empty_batch_of_single_pixels_is_no_step_either() -> None:
    layer = WhitenedConv2d(4, 4, 1)
    start, x = {name: value.clone() for name, value in layer.state_dict().items()}, torch.randn(2, 4, 1, 1)
    layer(torch.randn(0, 4, 1, 1))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, start[name]), name
    torch.testing.assert_close(layer.eval()(x), layer._conv_forward(x, layer.weight, layer.bias))


# ---- activation checkpointing -------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [5, 17], ids=["refresh", "ordinary"])
@pytest.mark.parametrize("sampling", ["tiles", "spread", "corner"])
@pytest.mark.parametrize("bad", [False, True])
def test_a_recomputed_step_is_the_step_with_an_averaged_covariance(steps: int, sampling: str, bad: bool) -> None:
    def layer() -> WhitenedConv2d:
        torch.manual_seed(0)
        config = WhiteningConfig(block_size=2, sampling=sampling, max_samples=None if sampling == "corner" else 30)
        return WhitenedConv2d(5, 3, 3, padding=1, whitening=config)

    plain, saved = layer(), layer()
    for step in range(steps):
        x = torch.randn(3, 5, 6, 6, generator=torch.Generator().manual_seed(step)) * (1 + step)
        plain(x), saved(x)
    assert plain.whitening.clock.due == (steps == 5)
    x = torch.randn(3, 5, 6, 6, generator=torch.Generator().manual_seed(99))
    xs = [(x * 0 + 2 if bad else x).clone().requires_grad_() for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if bad else "error", NonFiniteWarning)
        ys = plain(xs[0]), checkpoint(saved, xs[1], use_reentrant=False)
        for y in ys:
            y.square().sum().backward()
    assert torch.equal(*ys)
    assert torch.equal(*(x.grad for x in xs))
    assert torch.equal(plain.weight.grad, saved.weight.grad)
    for name, value in plain.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value), name


# ---- the rest -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [WhiteningConfig(), WhiteningConfig(average="root", scale=False)], ids=str)
def test_what_a_compiled_step_does_is_what_an_eager_step_does(
    config: WhiteningConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, compiled = (Whitening(3, POINT, config=config.replace(max_samples=4)) for _ in range(2))
    for step in range(40):
        x = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(step)).requires_grad_()
        pair = eager(x)
        with monkeypatch.context() as patch:
            for module in ("schedule", "whitening", "batch", "running"):
                patch.setattr(f"netdeconv.nn.{module}.torch", InCompiler())
            ours = compiled(x)
        assert torch.equal(ours.mean, pair.mean)
        torch.testing.assert_close(ours.roots, pair.roots, rtol=1e-6, atol=1e-7)
        if config.scale is not False:
            assert torch.equal(ours.scale, pair.scale)
            slopes = [torch.autograd.grad(each.scale.sum(), x)[0] for each in (ours, pair)]
            assert torch.equal(*slopes)
    for name, value in eager.state_dict().items():  # the weight of a mean is Python's float here, and float32 there
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-6, atol=1e-7, msg=name)
    assert compiled.clock.steps == 40


def test_freeze_and_unfreeze_reach_every_whitening_of_a_model() -> None:
    model = nn.Sequential(WhitenedLinear(3, 3), nn.Sequential(ChannelWhitening(3)), nn.Linear(3, 3))
    inside = [module for module in model.modules() if isinstance(module, Whitening)]
    assert len(inside) == 2
    assert freeze(model) is model
    assert [whitening.frozen for whitening in inside] == [True, True]
    assert unfreeze(model) is model
    assert [whitening.frozen for whitening in inside] == [False, False]


def test_settings_cannot_be_changed_behind_the_buffers() -> None:
    whitening = one_feature(PLAIN)
    with pytest.raises(AttributeError):
        whitening.config = WhiteningConfig()  # type: ignore[misc]
    assert whitening.config == PLAIN.resolved("linear", 1)


def test_numbers_of_numpy_are_numbers() -> None:
    config = WhiteningConfig(block_size=np.int64(2), eps=np.float32(0.5), momentum=np.float64(0.1))
    layers = [WhitenedLinear(np.int64(6), 3, whitening=config), WhitenedConv2d(np.int64(6), 3, np.int64(3))]
    for layer, x in zip(layers, (torch.randn(9, 6), torch.randn(2, 6, 5, 5)), strict=True):
        assert layer(x).shape[1] == 3
        assert Estimator.deserialize(layer.whitening.estimator.serialized) == layer.whitening.estimator


def test_it_is_described_by_what_is_not_default() -> None:
    assert repr(Whitening(5, Window())) == "Whitening(5, linear)"
    layer = WhitenedConv2d(4, 4, (1, 3), whitening=WhiteningConfig(eps=0.5, momentum=None))
    assert repr(layer.whitening) == "Whitening(4, 1x3, eps=0.5, momentum=None)"
    assert repr(ChannelWhitening(7)) == "ChannelWhitening(\n  7\n  (whitening): Whitening(7, 1)\n)"

