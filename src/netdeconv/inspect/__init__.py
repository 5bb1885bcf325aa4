"""What whitening did: how correlated patches are, and the filters that whiten them."""

from __future__ import annotations

from netdeconv.inspect.filters import centre_filters, whitening_filters
from netdeconv.inspect.whiteness import mean_abs_offdiagonal, patch_correlation, patch_covariance

__all__ = [
    "centre_filters",
    "mean_abs_offdiagonal",
    "patch_correlation",
    "patch_covariance",
    "whitening_filters",
]
