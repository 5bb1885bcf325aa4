"""The refresh as one operator for compilers: the same numbers, and a good citizen among torch's operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from layer_kinds import BY_NAME, PARTS, Kind, every_kind
from netdeconv import WhiteningConfig
from netdeconv.functional import Window
from netdeconv.nn.estimator import Estimator
from netdeconv.nn.refresh import Counters, all_finite, averaged_roots, opaque_refresh


def taken(kind: Kind, config: WhiteningConfig, steps: int = 3) -> tuple[Any, Tensor]:
    """A whitening after some steps, and an input for the next one."""
    layer = kind.trained(steps, config)
    x = kind.input(seed=99)
    return layer.whitening, x.reshape(-1, x.shape[-1]) if kind.name == "linear" else x


@every_kind
@pytest.mark.parametrize("config", [WhiteningConfig(), PARTS, WhiteningConfig(debias=False, solver="eigh", eps=0.1)])
def test_the_operator_computes_what_its_parts_do(kind: Kind, config: WhiteningConfig) -> None:
    whitening, x = taken(kind, config)
    if kind.name == "channel":
        x = x.flatten(2)
    running, counters = whitening._roots("running"), whitening._counters()
    before = [value.clone() for value in (*running, *counters)]
    roots, averages, finite = opaque_refresh(whitening.estimator, x, running, counters, torch.tensor(True))
    moments = whitening.estimator.sample_moments(x, counters.num_updates, factored=True)
    expected = [whitening.estimator.root_of(cov) for cov in moments.covs]
    assert bool(finite)
    torch.testing.assert_close(roots, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(averages, averaged_roots(config, roots, running, counters), rtol=0, atol=0)
    for now, then in zip((*running, *counters), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("mean_is_finite", [True, False])
def test_what_is_not_finite_leaves_the_running_roots(mean_is_finite: bool) -> None:
    whitening, x = taken(BY_NAME["conv2d"], PARTS)
    if mean_is_finite:
        x = x.clone()
        x[:, 0] = torch.inf
    running = whitening._roots("running")
    found = opaque_refresh(whitening.estimator, x, running, whitening._counters(), torch.tensor(mean_is_finite))
    assert not found[2]
    for root, average, old in zip(*found[:2], running, strict=True):
        assert torch.equal(root, old)
        torch.testing.assert_close(average, old, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_compiler_is_told_the_truth_about_it(dtype: torch.dtype) -> None:
    estimator = Estimator(5, Window((3,), (1,), (1,), ((1, 1),)), 1, WhiteningConfig(block_size=2, max_samples=9))
    running = [torch.eye(size, dtype=torch.float32) for _, size in estimator.blocks.parts]
    counters = Counters(*(torch.tensor(count) for count in (3, 2, 2)))
    arguments = (torch.randn(4, 5, 7).to(dtype), running, *counters, torch.tensor(True), estimator.serialized)
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
