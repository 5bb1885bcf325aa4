"""The fit of a difference of Gaussians against filters made of one, and filters that are none."""

from __future__ import annotations

import pytest
import torch

from netdeconv.errors import ShapeError
from netdeconv.lab.difference_of_gaussians import fit_difference_of_gaussians

# Nelder and Mead stop at 1e-4 in the logarithm of the widths.
FOUND = 0.01


def made(centre: float, centre_width: float, surround: float, surround_width: float, side: int = 9) -> torch.Tensor:
    offsets = torch.arange(side, dtype=torch.float64) - side // 2
    squares = offsets[:, None] ** 2 + offsets**2
    return centre * (-squares / (2 * centre_width**2)).exp() - surround * (-squares / (2 * surround_width**2)).exp()


@pytest.mark.parametrize("widths", [(0.6, 1.6), (1.0, 2.5), (0.4, 3.5)])
def test_a_difference_of_gaussians_is_found_again(widths: tuple[float, float]) -> None:
    kernel = made(5.0, widths[0], 2.0, widths[1])
    fit = fit_difference_of_gaussians(kernel)
    assert (fit.centre_width, fit.surround_width) == pytest.approx(widths, rel=FOUND)
    assert fit.centre / fit.surround == pytest.approx(2.5, rel=FOUND)
    assert fit.r2 > 0.9999 and fit.r2_around > 0.999
    assert fit.r2_centre_only < 0.98


def test_one_pixel_needs_no_surround() -> None:
    kernel = torch.zeros(7, 7)
    kernel[3, 3] = 2.0
    fit = fit_difference_of_gaussians(kernel)
    assert fit.r2 == pytest.approx(1, abs=1e-4)
    assert fit.r2_centre_only == pytest.approx(1, abs=1e-4)


def test_noise_and_edges_are_not_described() -> None:
    noise = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))
    edge = torch.linspace(-1, 1, 9).repeat(9, 1)
    assert fit_difference_of_gaussians(noise).r2 < 0.3
    assert fit_difference_of_gaussians(edge).r2 == pytest.approx(0, abs=0.01)


def test_an_inverted_filter_has_no_centre() -> None:
    fit = fit_difference_of_gaussians(-made(5.0, 0.8, 1.0, 2.0))
    assert fit.r2 < 0.4 and fit.r2_centre_only < 0.1  # something of the ring around it is
    assert fit.centre >= fit.surround >= 0


@pytest.mark.parametrize("shape", [(3,), (4, 4), (3, 5), (1, 1)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"expected a filter \(k, k\), k odd"):
        fit_difference_of_gaussians(torch.ones(shape))
