"""The refresh as one operator for compilers: the same numbers, and a good citizen among torch's operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from layer_kinds import BY_NAME, PARTS, Kind, every_kind
from netdeconv import WhiteningConfig
from netdeconv.functional import Window, patch_moments
from netdeconv.nn.averages import blended, blended_root, refresh_weight, update_weight
from netdeconv.nn.estimator import Estimator
from netdeconv.nn.refresh import Counters, all_finite, opaque_refresh, refreshed

# float32: a sum in another order, and the gain of five steps, 7.6, twice.
SAME: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
ROOTS = WhiteningConfig(scale=False, average="root", differentiable=False, block_size=3, num_iters=5)
EACH = {
    "default": WhiteningConfig(),
    "parts": PARTS,
    "covariance": WhiteningConfig(average="covariance", scale=False, momentum=None),
    "biased": WhiteningConfig(debias=False, solver="eigh", eps=0.1),
    "root": ROOTS,
    "scaled_root": ROOTS.replace(scale=True, debias=False),
}
Given = tuple[Any, Tensor, "Tensor | None", list[Tensor], list[Tensor], Counters]


def taken(kind: Kind, config: WhiteningConfig, steps: int = 3) -> Given:
    """A whitening after some steps, and what the next one gives the operator; copies of all of it."""
    layer = kind.trained(steps, config)
    whitening, x = layer.whitening, kind.input(seed=99)
    x = x.reshape(-1, x.shape[-1]) if kind.name == "linear" else x.flatten(2) if kind.name == "channel" else x
    scale = None
    if whitening.config.scale:
        scale = x.transpose(0, 1).flatten(1).var(1, correction=0).rsqrt()
    kept = whitening._matrices("running_root"), whitening._averages()
    running, averages = ([each.clone() for each in every] for every in kept)
    counters = Counters(*(count.clone() for count in whitening._counters()))
    return whitening, x, scale, running, averages, counters


@every_kind
@pytest.mark.parametrize("config", EACH.values(), ids=EACH)
def test_the_operator_computes_what_its_parts_do(kind: Kind, config: WhiteningConfig) -> None:
    whitening, x, scale, running, averages, counters = taken(kind, config)
    before = [value.clone() for value in (x, *running, *averages, *counters)]
    roots, new, counts = opaque_refresh(whitening.estimator, x, scale, running, averages, counters, torch.tensor(True))
    settings = whitening.config
    rows, weights = whitening.estimator.sample(x, max_samples=settings.max_samples, turn=counters.num_updates)
    if scale is not None:
        rows = rows * scale.repeat_interleave(whitening.blocks.taps)
    covs = patch_moments(rows, whitening.blocks, weights).covs
    if settings.average == "covariance":
        share = refresh_weight(settings, torch.float32, counters.num_updates)
        expected = [blended(old, cov, share) for old, cov in zip(averages, covs, strict=True)]
        torch.testing.assert_close(roots, [whitening.estimator.root_of(cov) for cov in expected], **SAME)
    else:
        torch.testing.assert_close(roots, [whitening.estimator.root_of(cov) for cov in covs], **SAME)
        waited = counters.num_steps + 1 - counters.last_update
        then = (waited, counters.num_updates + 1, counters.num_steps + 1, counters.num_updates)
        share = update_weight(settings, torch.float32, *then)
        blend = blended_root if settings.debias else blended
        expected = [blend(old, root, share) for old, root in zip(averages, roots, strict=True)]
    assert bool(counts)
    torch.testing.assert_close(new, expected, **SAME)
    for now, then_ in zip((x, *running, *averages, *counters), before, strict=True):
        assert torch.equal(now, then_)


@pytest.mark.parametrize("config", [PARTS, ROOTS], ids=["covariance", "root"])
@pytest.mark.parametrize("counted", [True, False])
def test_what_is_not_finite_leaves_the_running_values(config: WhiteningConfig, counted: bool) -> None:
    whitening, x, scale, running, averages, counters = taken(BY_NAME["conv2d"], config)
    if counted:
        x[:, 0] = torch.inf
    state = (running, averages, counters, torch.tensor(counted))
    found = opaque_refresh(whitening.estimator, x, scale, *state)
    assert not found.counts
    for root, old in zip(found.roots, running, strict=True):
        assert torch.equal(root, old)
    for new, old in zip(found.averages, averages, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("debias", "counts"), [(True, False), (False, True)])
def test_a_constant_sample_has_no_root_but_as_published(debias: bool, counts: bool) -> None:
    estimator = Estimator(2, Window(), 1, WhiteningConfig(debias=debias, eps=0.25, solver="eigh"))
    moments = patch_moments(torch.ones(5, 2), estimator.blocks)
    state = [torch.eye(2) * 7]
    counters = Counters(*(torch.tensor(count) for count in (3, 3, 3)))
    found = refreshed(estimator, moments, state, state, counters, torch.tensor(True))
    assert bool(found.counts) == counts
    torch.testing.assert_close(found.roots[0], torch.eye(2) * (2.0 if counts else 7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("average", ["covariance", "root"])
@pytest.mark.parametrize("scaled", [True, False])
def test_the_compiler_is_told_the_truth_about_it(dtype: torch.dtype, average: str, scaled: bool) -> None:
    config = WhiteningConfig(block_size=2, max_samples=9, average=average, scale=scaled)
    estimator = Estimator(5, Window((3,), (1,), (1,), ((1, 1),)), 1, config)
    running, averages = ([torch.eye(size) for _, size in estimator.blocks.parts] for _ in range(2))
    counters = Counters(*(torch.tensor(count) for count in (3, 2, 2)))
    scale = torch.arange(1, 6).to(torch.promote_types(dtype, torch.float32)) if scaled else None
    given = (torch.randn(4, 5, 7).to(dtype), scale, running, averages)
    arguments = (*given, *counters, torch.tensor(True), estimator.serialized)
    tests = ("test_schema", "test_faketensor")
    assert set(torch.library.opcheck(torch.ops.netdeconv.refresh, arguments, test_utils=tests).values()) == {"SUCCESS"}
    *roots, _ = torch.ops.netdeconv.refresh(*arguments)
    assert {root.dtype for root in roots} == {torch.promote_types(dtype, torch.float32)}


@pytest.mark.parametrize(
    "window",
    [Window(), Window((3, 1), (2, 1), (1, 2), ((0, 1), (2, 2)), "reflect"), Window((2,), (1,), (1,), ((1, 0),))],
)
def test_an_estimator_is_read_as_it_was_serialized(window: Window) -> None:
    changed = WhiteningConfig(momentum=None, max_samples=None)
    for config in (WhiteningConfig(), WhiteningConfig.paper(eps=1e-7), changed):
        estimator = Estimator(12, window, 3, config)
        assert Estimator.deserialize(estimator.serialized) == estimator
        assert Estimator.deserialize(estimator.serialized).blocks == estimator.blocks


def test_all_finite() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert not all_finite([torch.tensor([1.0, bad, 2.0])])
        assert not all_finite([torch.ones(2), torch.tensor([[3.0], [bad]])])
    assert all_finite([torch.full((3,), 3e38), torch.zeros(2, 2)])
