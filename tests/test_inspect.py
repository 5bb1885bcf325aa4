"""Whiteness and whitening filters against cases worked by hand and known limits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from netdeconv.errors import ShapeError
from netdeconv.inspect import (
    centre_filters,
    mean_abs_offdiagonal,
    pair_correlations,
    patch_correlation,
    patch_covariance,
    whitening_filters,
)
from netdeconv.inspect import whiteness as whiteness_module

# Float64 sums of some thousand products of numbers near 1.
EXACT = 1e-12
# Correlation of independent draws is about 1/sqrt(rows); the images below have over 15,000 patches.
NOISE = 0.05


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ar1_images(share: float, count: int = 8, size: int = 48) -> torch.Tensor:
    """Images whose rows and columns are first-order autoregressive: correlation share**distance."""
    x = noise(count, 1, size + 40, size + 40)
    for dim in (2, 3):
        lines = list(x.unbind(dim))
        for i in range(1, len(lines)):
            lines[i] = share * lines[i - 1] + (1 - share**2) ** 0.5 * lines[i]
        x = torch.stack(lines, dim)
    return x[:, :, 40:, 40:]


def test_covariance_of_four_patches_by_hand() -> None:
    # 1x2 patches of the row 1 2 4: (1, 2), (2, 4). Means 1.5 and 3; deviations -.5, .5 and -1, 1.
    x = torch.tensor([[[[1.0, 2.0, 4.0]]]])
    expected = torch.tensor([[0.25, 0.5], [0.5, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(patch_covariance(x, (1, 2)), expected, atol=EXACT, rtol=0)


def test_features_are_channel_then_tap() -> None:
    # Channel 0 never varies, channel 1 does: only the last two features have variance.
    x = torch.stack([torch.ones(1, 6), torch.arange(6.0).reshape(1, 6) ** 2]).unsqueeze(0)
    variance = patch_covariance(x, (1, 2)).diagonal()
    assert variance[:2].abs().max() < EXACT
    assert variance[2:].min() > 1


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2}, {"padding": 1}, {"dilation": 2}, {"stride": (2, 1), "padding": (0, 1)}]
)
def test_covariance_equals_unfold(options: dict) -> None:
    x = noise(3, 2, 9, 7)
    rows = F.unfold(x, (3, 2), **options).transpose(1, 2).reshape(-1, 12)
    expected = torch.cov(rows.T, correction=0)
    torch.testing.assert_close(patch_covariance(x, (3, 2), **options), expected, atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("limit", [1, 200, 5000])
def test_pieces_do_not_change_the_covariance(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    x = noise(5, 2, 8, 9) + 100
    options = {"stride": (2, 1), "padding": 1}
    whole = patch_covariance(x, 3, **options)
    monkeypatch.setattr(whiteness_module, "_CHUNK", limit)
    torch.testing.assert_close(patch_covariance(x, 3, **options), whole, atol=1e-9, rtol=0)


def test_far_off_means_do_not_cost_accuracy() -> None:
    x = noise(2, 2, 16, 16)
    far = x + torch.tensor([0.0, 1e6]).reshape(1, 2, 1, 1)  # adding it rounds to 1e-10; its square would to 1e-4
    torch.testing.assert_close(patch_covariance(far, 3), patch_covariance(x, 3), atol=1e-8, rtol=0)


def test_images_of_different_sizes_weigh_by_their_patches() -> None:
    small, large = noise(1, 4, 4), noise(1, 8, 8, seed=1)
    rows = torch.cat([F.unfold(i.unsqueeze(0), 2).squeeze(0).T for i in (small, large)])
    torch.testing.assert_close(
        patch_covariance([small, large], 2), torch.cov(rows.T, correction=0), atol=EXACT, rtol=EXACT
    )


def test_independent_channels_do_not_correlate() -> None:
    corr = patch_correlation(noise(4, 3, 64, 64), 1)
    assert corr.diagonal().eq(1).all()
    assert mean_abs_offdiagonal(corr) < NOISE


def test_a_channel_and_its_multiples_correlate_fully() -> None:
    x = noise(2, 1, 16, 16)
    corr = patch_correlation(torch.cat([x, 3 * x + 5, -x], dim=1), 1)
    expected = torch.tensor([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    torch.testing.assert_close(corr, expected, atol=1e-9, rtol=0)
    assert mean_abs_offdiagonal(corr) == pytest.approx(1)


def test_what_never_varies_correlates_with_nothing() -> None:
    corr = patch_correlation(torch.cat([noise(2, 1, 8, 8), torch.full((2, 1, 8, 8), 0.1).double()], dim=1), 1)
    torch.testing.assert_close(corr, torch.eye(2, dtype=torch.float64), atol=EXACT, rtol=0)


def test_neighbours_in_an_autoregressive_image_correlate_by_distance() -> None:
    corr = patch_correlation(ar1_images(0.7), (1, 3))
    assert corr[0, 1] == pytest.approx(0.7, abs=NOISE)
    assert corr[0, 2] == pytest.approx(0.49, abs=NOISE)


def test_converged_root_whitens_and_five_iterations_do_in_part() -> None:
    x = ar1_images(0.95)
    before = mean_abs_offdiagonal(patch_correlation(x, 3))
    after = {
        solver: mean_abs_offdiagonal(
            patch_correlation(x, 3, root=whitening_filters(x, 3, solver=solver, eps=0).flatten(1))
        )
        for solver in ("eigh", "newton_schulz")
    }
    assert before > 0.7
    assert after["eigh"] < 1e-8
    assert after["eigh"] < after["newton_schulz"] < before


def test_a_smaller_root_is_applied_block_by_block() -> None:
    x = noise(2, 4, 12, 12)
    x[:, 1] += x[:, 0]
    x[:, 3] += x[:, 2]
    root = whitening_filters(x[:, :2], 1, solver="eigh", eps=0).flatten(1)
    blocks = torch.block_diag(root, root)
    torch.testing.assert_close(patch_correlation(x, 1, root=root), patch_correlation(x, 1, root=blocks))
    assert not torch.allclose(patch_correlation(x, 1, root=root), patch_correlation(x, 1))


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [([[1.0]], 0.0), ([[1.0, 0.5], [-0.5, 1.0]], 0.5), ([[1.0, 0, 0], [0, 1, 0.6], [0, 0.6, 1]], 0.2)],
)
def test_mean_abs_offdiagonal_by_hand(matrix: list, expected: float) -> None:
    assert mean_abs_offdiagonal(torch.tensor(matrix)) == pytest.approx(expected)


def test_white_noise_has_single_peaks_for_filters() -> None:
    filters = whitening_filters(noise(4, 2, 64, 64), 3, solver="eigh")
    assert filters.shape == (18, 2, 3, 3)
    torch.testing.assert_close(filters.flatten(1), torch.eye(18, dtype=torch.float64), atol=NOISE, rtol=0)


def test_filters_of_correlated_images_are_centre_surround() -> None:
    (centre,) = centre_filters(whitening_filters(ar1_images(0.8), 5, solver="eigh"))
    kernel = centre[0]
    assert kernel[2, 2] == kernel.max() > 0
    for row, column in ((1, 2), (3, 2), (2, 1), (2, 3)):
        assert kernel[row, column] < -0.1 * kernel[2, 2]


def test_filters_of_scaled_images_scale_inversely() -> None:
    x = ar1_images(0.8, count=2)
    torch.testing.assert_close(whitening_filters(10 * x, 3, eps=0), whitening_filters(x, 3, eps=0) / 10)


def test_eps_bounds_the_filters_of_a_constant_image() -> None:
    filters = whitening_filters(torch.ones(1, 1, 8, 8), 3, solver="eigh", eps=0.25)
    torch.testing.assert_close(filters.flatten(1), 2 * torch.eye(9, dtype=torch.float64))


def test_centre_filters_are_those_of_the_centre_tap() -> None:
    filters = whitening_filters(noise(2, 3, 16, 16), (3, 5))
    assert torch.equal(centre_filters(filters), filters[[7, 22, 37]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patch_covariance(torch.zeros(3, 8, 8), 3), r"\(N, C, H, W\), got \(3, 8, 8\)"),
        (lambda: patch_covariance([torch.zeros(8, 8)], 3), r"\(C, H, W\), got \(8, 8\)"),
        (lambda: patch_covariance([], 3), "at least one image"),
        (lambda: patch_covariance(torch.zeros(1, 1, 2, 8), 3), "at least 3x3 pixels.*got 2x8"),
        (lambda: patch_covariance([torch.zeros(1, 8, 8), torch.zeros(2, 8, 8)], 3), "1 channels.*got 2"),
        (lambda: patch_correlation(noise(1, 1, 8, 8), 3, root=torch.eye(4)), r"divides the 9 features.*\(4, 4\)"),
        (lambda: mean_abs_offdiagonal(torch.zeros(2, 3)), r"square matrix.*\(2, 3\)"),
        (lambda: centre_filters(torch.zeros(4, 1, 2, 2)), "no centre pixel"),
    ],
)
def test_mistakes_say_what_was_expected(call, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        call()


def test_pairs_of_pixels_and_of_channels_by_hand() -> None:
    # Features (channel 0, tap 0), (0, 1), (1, 0), (1, 1): pixels correlate by .5 and .3, channels by .2 and .1.
    corr = torch.tensor([[1, 0.5, -0.2, 0.9], [0.5, 1, 0.9, 0.1], [-0.2, 0.9, 1, -0.3], [0.9, 0.1, -0.3, 1]])
    assert pair_correlations(corr, 2) == pytest.approx((0.4, 0.15))
    assert pair_correlations(corr, 1) == pytest.approx((0.0, mean_abs_offdiagonal(corr)))
    assert pair_correlations(corr, 4) == pytest.approx((mean_abs_offdiagonal(corr), 0.0))
    with pytest.raises(ShapeError, match="a multiple of 3 taps"):
        pair_correlations(corr, 3)
