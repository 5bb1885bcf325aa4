"""Mean and covariance of patches: by hand, against the reference, and where float32 is short of digits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from netdeconv import reference as ref
from netdeconv.functional import Blocks, Moments, Window, patch_moments

DRAWS = settings(deadline=None, derandomize=True, max_examples=60)

# float64, sums of at most a few hundred products of numbers of order one.
TIGHT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
# float32: the same, and the rounding (6e-8) of centred numbers of order one.
SINGLE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}

PAIR = Window((2,), (1,), (1,), ((0, 0),))


def close(actual: Tensor, expected: Tensor, **tolerance: Any) -> None:
    torch.testing.assert_close(actual, expected, **(tolerance or TIGHT))


def correlated(rows: int, features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, features, dtype=torch.float64, generator=generator)
    mixing = torch.randn(features, features, dtype=torch.float64, generator=generator)
    return noise @ mixing + torch.arange(features)


def features_only(channels: int, block_size: int, groups: int = 1, grouping: str = "contiguous") -> Blocks:
    return Blocks.plan(channels, Window((1,), (1,), (1,), ((0, 0),)), groups, block_size, grouping)


def reference_moments(X: Tensor, blocks: Blocks) -> Moments:
    total = torch.tensor(float(X.shape[0]))
    options: dict[str, Any] = {"channels": blocks.channels, "block_size": blocks.block_size, "groups": blocks.groups}
    if blocks.pool_mean:
        mean, cov = ref.moments_interleaved(X, **options)
        return Moments(mean, (cov,), X.shape[0], total)
    mean, cov, rest = ref.moments_contiguous(X, **options)
    return Moments(mean, (cov,) if rest is None else (cov, rest), X.shape[0], total)


def assert_same(ours: Moments, theirs: Moments, **tolerance: Any) -> None:
    assert (ours.rows, float(ours.total)) == (theirs.rows, float(theirs.total))
    assert len(ours.covs) == len(theirs.covs)
    for mine, known in zip((ours.mean, *ours.covs), (theirs.mean, *theirs.covs), strict=True):
        close(mine.double(), known, **tolerance)


def test_contiguous_by_hand() -> None:
    X = torch.tensor([[1.0, 2, 30, 5], [3, 6, 10, 5]])  # four channels, two rows
    moments = patch_moments(X, features_only(4, 2))
    # Blocks (0, 1) and (2, 3), each about its own mean: [[1, 2], [2, 4]] and [[100, 0], [0, 0]].
    assert moments.mean.tolist() == [2, 4, 20, 5]
    assert moments.covs[0].tolist() == [[50.5, 1], [1, 2]]
    assert moments.rows == 2


def test_interleaved_by_hand() -> None:
    X = torch.tensor([[1.0, 2, 30, 5], [3, 6, 10, 5]])
    moments = patch_moments(X, features_only(4, 2, grouping="interleaved"))
    # Blocks (0, 2) and (1, 3): pooled rows (1, 30), (3, 10), (2, 5), (6, 5).
    assert moments.mean.tolist() == [3, 12.5]
    assert moments.covs[0].tolist() == [[3.5, -12.5], [-12.5, 106.25]]


def test_a_smaller_last_block_by_hand() -> None:
    X = torch.tensor([[1.0, 2, 7], [3, 6, 9]])
    moments = patch_moments(X, features_only(3, 2))
    assert [cov.tolist() for cov in moments.covs] == [[[1, 2], [2, 4]], [[1]]]


@DRAWS
@given(
    groups=st.integers(1, 3),
    per_group=st.integers(1, 5),
    block_size=st.integers(1, 6),
    rows=st.integers(1, 20),
    grouping=st.sampled_from(["contiguous", "interleaved"]),
)
def test_they_are_those_of_the_reference(
    groups: int, per_group: int, block_size: int, rows: int, grouping: str
) -> None:
    blocks = Blocks.plan(groups * per_group, PAIR, groups, block_size, grouping)
    X = correlated(rows, groups * per_group * 2)
    assert_same(patch_moments(X, blocks), reference_moments(X, blocks))


@DRAWS
@given(
    groups=st.integers(1, 2),
    per_group=st.integers(1, 5),
    block_size=st.integers(1, 6),
    times=st.lists(st.integers(1, 4), min_size=1, max_size=8),
    grouping=st.sampled_from(["contiguous", "interleaved"]),
)
def test_a_row_of_weight_three_counts_like_three_rows(
    groups: int, per_group: int, block_size: int, times: list[int], grouping: str
) -> None:
    blocks = Blocks.plan(groups * per_group, PAIR, groups, block_size, grouping)
    X, weights = correlated(len(times), groups * per_group * 2), torch.tensor(times)
    weighted = patch_moments(X, blocks, weights)
    repeated = patch_moments(X.repeat_interleave(weights, 0), blocks)
    assert (weighted.rows, float(weighted.total)) == (len(times), sum(times))
    assert_same(weighted._replace(rows=sum(times)), repeated)


@DRAWS
@given(
    groups=st.integers(1, 3),
    per_group=st.integers(1, 5),
    block_size=st.integers(1, 6),
    weighted=st.booleans(),
)
def test_those_of_single_blocks_are_pooled_by_their_mean(
    groups: int, per_group: int, block_size: int, weighted: bool
) -> None:
    blocks = Blocks.plan(groups * per_group, PAIR, groups, block_size, "contiguous")
    X = correlated(9, groups * per_group * 2)
    weights = torch.arange(1.0, 10) if weighted else None
    whole, each = (patch_moments(X, blocks, weights, pooled=pooled) for pooled in (True, False))
    assert torch.equal(whole.mean, each.mean)
    full = torch.cov(X.T, correction=0, fweights=None if weights is None else weights.long())
    for cov, parts, (count, size), place in zip(whole.covs, each.covs, blocks.parts, (0, 1), strict=False):
        assert tuple(parts.shape) == (groups, count, size, size)
        close(parts.mean(1).reshape(cov.shape), cov)
        first = 0 if place == 0 else blocks.group_features - size
        for group in range(groups):
            for block in range(count):
                start = group * blocks.group_features + first + block * size
                close(parts[group, block], full[start : start + size, start : start + size])


def test_with_one_block_it_is_the_biased_covariance_of_torch() -> None:
    X = correlated(50, 6)
    moments = patch_moments(X, features_only(6, 64))
    close(moments.mean, X.mean(0))
    close(moments.covs[0], torch.cov(X.T, correction=0))
    assert not torch.allclose(moments.covs[0], torch.cov(X.T))


@pytest.mark.parametrize("grouping", ["contiguous", "interleaved"])
def test_a_large_mean_does_not_cost_the_covariance_its_digits(grouping: str) -> None:
    # Rounding of the numbers themselves is 1e4 * 6e-8 = 6e-4; of their squares it would be 1e8 * 6e-8 = 6.
    X = (correlated(400, 4) + 1e4).float()
    blocks = features_only(4, 2, grouping=grouping)
    assert_same(patch_moments(X, blocks), reference_moments(X, blocks), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_summed_up_in_float32(kind: torch.dtype) -> None:
    X = correlated(3000, 4).to(kind)
    blocks = features_only(4, 2)
    moments = patch_moments(X, blocks)
    assert {value.dtype for value in (moments.mean, *moments.covs)} == {torch.float32}
    assert_same(moments, reference_moments(X, blocks), **SINGLE)


def test_autocast_does_not_reach_them() -> None:
    X, blocks = correlated(30, 6).float(), features_only(6, 2, groups=2)
    plain = patch_moments(X, blocks)
    with torch.autocast("cpu", torch.bfloat16):
        assert (X @ X.T).dtype == torch.bfloat16  # it is on
        cast = patch_moments(X, blocks)
    assert all(torch.equal(a, b) for a, b in zip((plain.mean, *plain.covs), (cast.mean, *cast.covs), strict=True))


def test_one_row_has_no_deviation_and_no_row_no_moments() -> None:
    X, blocks = correlated(1, 5), features_only(5, 2)
    one = patch_moments(X, blocks)
    close(one.mean, X[0])
    assert all(not cov.any() for cov in one.covs)
    none = patch_moments(X[:0], blocks)
    assert (none.rows, float(none.total)) == (0, 0)
    assert all(value.isnan().all() for value in (none.mean, *none.covs))


@pytest.mark.parametrize("grouping", ["contiguous", "interleaved"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2.5, 1.0, 4.0, 1.0])], ids=["plain", "weighted"])
def test_the_gradient_is_right(grouping: str, groups: int, weights: Tensor | None) -> None:
    blocks = features_only(6, 2, groups=groups, grouping=grouping)
    X = correlated(5, 6).requires_grad_()

    def run(X: Tensor) -> tuple[Tensor, ...]:
        moments = patch_moments(X, blocks, weights)
        return moments.mean, *moments.covs

    assert torch.autograd.gradcheck(run, X)
